"""What grpc asks for before each handshake; `test_auth.py` has the handshakes themselves."""

import itertools
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from store.running_server import make_certificates

from tq_store.errors import ConfigError
from tq_store.server import tls as tls_module
from tq_store.server.tls import TlsFiles


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    old, new = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("new")
    for directory in (old, new):
        make_certificates(directory)
    return old, new


@pytest.fixture
def replace(made: tuple[Path, Path], tmp_path: Path) -> Callable[..., None]:
    """Copies old files into the test's folder, and new ones over them."""
    old, new = made
    for name in ("server.pem", "server.key", "ca.pem"):
        shutil.copy(old / name, tmp_path / name)

    def copy(*names: str) -> None:
        for name in names:
            shutil.copy(new / name, tmp_path / name)

    return copy


def files_in(directory: Path, client_ca: str | None = "ca.pem") -> TlsFiles:
    authority = directory / client_ca if client_ca else None
    return TlsFiles(directory / "server.pem", directory / "server.key", authority)


def test_files_are_read_again_once_they_fit_together(
    replace: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = files_in(tmp_path)
    assert files._refresh() is None
    replace("server.pem")
    assert files._refresh() is None
    assert files._refresh() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    replace("server.key")
    assert files._refresh() is not None
    assert files._refresh() is None
    replace("ca.pem")
    assert files._refresh() is not None
    (tmp_path / "ca.pem").unlink()
    assert files._refresh() is None


@pytest.mark.usefixtures("replace")
def test_files_that_change_while_they_are_read_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = tls_module._read, itertools.count()
    monkeypatch.setattr(tls_module, "_read", lambda path: read(path) + b"\n" * next(reads))
    with pytest.raises(ConfigError, match="are being replaced just now"):
        files_in(tmp_path)


@pytest.mark.usefixtures("replace")
@pytest.mark.parametrize("content", ["no certificate", "\x80"])
def test_an_authority_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "ca.pem").write_text(content)
    with pytest.raises(ConfigError, match="may not fit together"):
        files_in(tmp_path)
    files_in(tmp_path, client_ca=None)


@pytest.mark.usefixtures("replace")
def test_a_key_with_a_passphrase_is_refused_without_asking_for_it(tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "ec", "-aes128", "-passout", "pass:secret", "-in", "server.key", "-out", "locked.key"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    with pytest.raises(ConfigError, match="may not fit together"):
        TlsFiles(tmp_path / "server.pem", tmp_path / "locked.key", None)
