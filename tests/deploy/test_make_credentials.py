"""The script that makes secrets for a first set-up says what went wrong, and leaves nothing half made."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "make_credentials.sh"
TQ_STORE = str(Path(sys.executable).with_name("tq-store"))
_TOOLS = ("bash", "cat", "grep", "id", "mkdir", "rm", "sed")


def run(directory: Path, *names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, directory, *names],
        env=os.environ | {"TQ_STORE": TQ_STORE} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def without_openssl(tmp_path: Path) -> str:
    """A PATH on which everything else is."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for tool in _TOOLS:
        found = shutil.which(tool)
        assert found
        (programs / tool).symlink_to(found)
    return str(programs)


def test_a_name_that_no_certificate_can_bear(tmp_path: Path) -> None:
    failed = run(tmp_path / "secrets", "bad,name")
    assert failed.returncode != 0
    assert "value=DNS:localhost" in failed.stderr, "what openssl says"
    assert "failed, see above" in failed.stderr
    assert not (tmp_path / "secrets").exists()


@pytest.mark.parametrize("missing", ["openssl", "tq-store"])
def test_a_program_that_is_not_there(tmp_path: Path, missing: str) -> None:
    environment = (
        {"PATH": without_openssl(tmp_path)} if missing == "openssl" else {"TQ_STORE": "/no/tq-store"}
    )
    failed = run(tmp_path / "secrets", **environment)
    assert failed.returncode != 0
    assert f"{missing}: " in failed.stderr
    assert not (tmp_path / "secrets").exists()


def test_a_directory_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    failed = run(tmp_path)
    assert (failed.returncode, failed.stderr) == (1, f"{tmp_path} is there already; move it away first\n")
    assert tmp_path.exists()


def test_where_all_goes_well_nothing_is_said(tmp_path: Path) -> None:
    made = run(tmp_path / "secrets", "cache.example", "10.0.0.7")
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    assert (tmp_path / "secrets" / "server.toml").is_file()
    assert not (tmp_path / "secrets" / "openssl.log").exists()
