from pathlib import Path
from typing import Any

import pytest

from tq_store.backends.redis_target import Address, Arrangement, Login, RedisTarget, parse_target
from tq_store.errors import ConfigError


def write_password(directory: Path, content: bytes, mode: int = 0o600) -> Path:
    path = directory / "password"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("redis://host", {"addresses": (Address("host", 6379),)}),
        ("redis://host:7/", {"addresses": (Address("host", 7),)}),
        ("rediss://10.0.0.1:7/3", {"addresses": (Address("10.0.0.1", 7),), "database": 3, "uses_tls": True}),
        ("redis://[::1]:7", {"addresses": (Address("::1", 7),)}),
        ("unix:///run/my%20redis.sock", {"addresses": (Address("/run/my redis.sock", None),)}),
        ("unix:///run/r.sock?db=2", {"addresses": (Address("/run/r.sock", None),), "database": 2}),
        (
            "redis+cluster://a:1,b,[::1]:3",
            {
                "arrangement": Arrangement.CLUSTER,
                "addresses": (Address("a", 1), Address("b", 6379), Address("::1", 3)),
            },
        ),
        (
            "rediss+sentinel://a,b:1/my%2Fmaster/5",
            {
                "arrangement": Arrangement.SENTINEL,
                "addresses": (Address("a", 26379), Address("b", 1)),
                "service": "my/master",
                "database": 5,
                "uses_tls": True,
            },
        ),
    ],
)
def test_urls(url: str, fields: dict[str, Any]) -> None:
    defaults: dict[str, Any] = {"arrangement": Arrangement.STANDALONE, "login": Login()}
    assert parse_target(url) == RedisTarget(**(defaults | {"sentinel_login": Login()} | fields))


@pytest.mark.parametrize(
    ("login", "parts"),
    [
        ("", ()),
        (":secret@", ("secret",)),
        ("me:secret@", ("me", "secret")),
        ("m%40e:s%3Ae%2Fc@", ("m@e", "s:e/c")),
    ],
)
@pytest.mark.parametrize(
    "url", ["redis://{}h", "redis+cluster://{}h,i", "redis+sentinel://{}h/s", "unix://{}/r.sock"]
)
def test_logins_in_urls(url: str, login: str, parts: tuple[str, ...]) -> None:
    target = parse_target(url.format(login))
    assert target.login.read() == parts
    assert "secret" not in repr(target)


def test_a_password_file_is_read_at_each_use(tmp_path: Path) -> None:
    path = write_password(tmp_path, b"first secret \r\nnot this\n", 0o640)
    target = parse_target("redis://host", user="me", password_file=path)
    assert target.login.read() == ("me", "first secret ")
    write_password(tmp_path, "zweites Paßwort".encode())
    assert target.login.read() == ("me", "zweites Paßwort")


def test_sentinels_have_a_login_of_their_own(tmp_path: Path) -> None:
    path = write_password(tmp_path, b"secret")
    target = parse_target("redis+sentinel://a/s", sentinel_user="watcher", sentinel_password_file=path)
    assert target.login.read() == ()
    assert target.sentinel_login.read() == ("watcher", "secret")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:6379",
        "http://:hunter2@host",
        "redis://",
        "redis://:hunter2/7@host",
        "redis://:hunter2@host:port",
        "redis://:hunter2@host:65536",
        "redis://:hunter2@host/db",
        "redis://:hunter2@host/0/1",
        "redis://:hunter2@a,b",
        "redis://host?password=hunter2",
        "redis+cluster://:hunter2@a/0",
        "redis+cluster://a,,b",
        "redis+sentinel://:hunter2@a,b",
        "redis+sentinel://a/service/0/1",
        "redis+swarm://a",
        "unix://relative",
        "unix:///r.sock?password=hunter2",
        "redis://::1:80",
    ],
)
def test_urls_that_make_no_sense_are_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="the URL of the redis tier must read redis://") as caught:
        parse_target(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "access", "complaint"),
    [
        ("redis://:hunter2@h", {"password_file": "password"}, "stands in its URL and in a file"),
        ("redis://h", {"user": "me"}, "has a user and no password"),
        ("redis://me@h", {}, "has a user and no password"),
        ("redis://h", {"sentinel_password_file": "password"}, "is for a URL of redis\\+sentinel://"),
        ("redis+sentinel://h/s", {"sentinel_user": "me"}, "has a user and no password"),
        ("redis://h", {"tls_ca": "password"}, "write rediss in its URL"),
        ("rediss://h", {"tls_cert": "password"}, "go together"),
        ("rediss://h", {"tls_ca": "absent"}, "absent, a TLS file of the redis tier, cannot be read"),
        ("redis://h", {"password_file": "absent"}, "absent cannot be read: No such file"),
    ],
)
def test_what_does_not_fit_is_explained(
    tmp_path: Path, url: str, access: dict[str, str], complaint: str
) -> None:
    write_password(tmp_path, b"hunter2")
    files = {name: value if name.endswith("user") else tmp_path / value for name, value in access.items()}
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse_target(url, **files)  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        (b"hunter2", 0o604, "can be read by everybody; run `chmod 600"),
        (b"", 0o600, "must hold a password on its first line"),
        (b"\nhunter2", 0o600, "must hold a password on its first line"),
        (b"hunter2" * 1000, 0o600, "must hold a password on its first line"),
        (b"hunter2\xff", 0o600, "must hold UTF-8 text"),
    ],
)
def test_wrong_password_files_are_explained_without_their_contents(
    tmp_path: Path, content: bytes, mode: int, complaint: str
) -> None:
    path = write_password(tmp_path, content, mode)
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse_target("redis://h", password_file=path)
    shown: BaseException | None = caught.value
    while shown is not None:
        assert "hunter2" not in str(shown)
        shown = shown.__cause__


def test_addresses_are_shown_as_they_are_written() -> None:
    shown = [str(Address(*parts)) for parts in (("h", 1), ("::1", 2), ("/r.sock", None))]
    assert shown == ["h:1", "[::1]:2", "/r.sock"]
