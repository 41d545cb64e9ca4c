from pathlib import Path
from typing import Any

import pytest

from tq_store.config import ClientConfig, ServerConfig, is_local, load_config, split_address
from tq_store.errors import ConfigError
from tq_store.rpc.token import load_tokens
from tq_store.settings import DURATION, SIZE, format_size, settings


def load(arguments: dict[str, Any] | None = None, **sources: Any) -> ServerConfig:
    return load_config(ServerConfig, arguments=arguments or {}, **{"environment": {}} | sources)


def write(directory: Path, text: str) -> Path:
    path = directory / "tq-store.toml"
    path.write_text(text)
    return path


def test_nothing_given_means_the_defaults() -> None:
    assert load() == ServerConfig()
    assert load_config(ClientConfig, arguments={}, environment={}) == ClientConfig()


def test_argument_beats_file_beats_environment_beats_default(tmp_path: Path) -> None:
    environment = {"TQ_STORE_GRACE": "1", "TQ_STORE_CALL_TIMEOUT": "2", "TQ_STORE_MEMORY_BUDGET": "3"}
    file = write(tmp_path, "[server]\ncall_timeout = 4\nmemory_budget = '5KiB'")
    config = load({"memory_budget": "6MiB"}, file=file, environment=environment)
    assert (config.grace_s, config.call_timeout_s, config.memory_budget_bytes) == (1.0, 4.0, 6 << 20)
    assert config.write_queue_bytes == ServerConfig().write_queue_bytes


def test_one_file_serves_both_sides(tmp_path: Path) -> None:
    file = write(tmp_path, "[client]\naddress = 'host:1'\n[server]\ngrace = '500ms'")
    assert load(file=file).grace_s == 0.5
    assert load_config(ClientConfig, arguments={}, file=file, environment={}).address == "host:1"


def test_a_file_may_leave_a_side_out(tmp_path: Path) -> None:
    file = write(tmp_path, "[client]\naddress = 'host:1'")
    assert load(file=file) == ServerConfig()


def test_the_environment_may_hold_settings_of_the_other_side() -> None:
    assert load(environment={"TQ_STORE_ADDRESS": "host:1", "PATH": "/bin"}) == ServerConfig()


def test_what_kubernetes_sets_for_a_service_of_our_name_is_not_ours() -> None:
    environment = {
        "TQ_STORE_SERVICE_HOST": "10.0.0.1",
        "TQ_STORE_SERVICE_PORT_GRPC": "7437",
        "TQ_STORE_PORT": "tcp://10.0.0.1:7437",
        "TQ_STORE_PORT_7437_TCP_ADDR": "10.0.0.1",
        "TQ_STORE_METRICS_PORT": "tcp://10.0.0.2:9090",
        "TQ_STORE_METRICS_SERVICE_HOST": "10.0.0.2",
    }
    assert load(environment=environment) == ServerConfig()


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ({"arguments": {"memory_budge": "1"}}, "'memory_budge' (arguments); did you mean 'memory_budget'?"),
        (
            {"environment": {"TQ_STORE_MEMORY_BUGDET": "1"}},
            "'TQ_STORE_MEMORY_BUGDET' (environment); did you mean 'TQ_STORE_MEMORY_BUDGET'?",
        ),
        ({"arguments": {"memory_budget": "4 gigs"}}, "memory_budget (arguments): '4 gigs' is not understood"),
        ({"arguments": {"memory_budget": "4 gigs"}}, "write for example 4GiB"),
        ({"arguments": {"memory_budget": "9" * 400}}, "memory_budget (arguments): '999"),
        ({"environment": {"TQ_STORE_GRACE": "soon"}}, "grace (environment): 'soon' is not understood"),
        ({"environment": {"TQ_STORE_LISTEN": ""}}, "listen (environment): '' is not understood"),
        ({"arguments": {"listen": "nowhere"}}, "'nowhere' is not an address"),
        ({"arguments": {"memory_budget": 0}}, "memory_budget_bytes is 0; it must be greater than 0"),
        ({"arguments": {"max_inflight": 0}}, "max_inflight_bytes is 0"),
        (
            {"arguments": {"call_timeout": "21000h"}},
            "call_timeout_s is 75600000.0; it must be at most 1728000",
        ),
        ({"arguments": {"grace": "9" * 400}}, "grace (arguments): '999"),
        ({"arguments": {"disk_path": "/d", "disk_budget": 0}}, "disk_budget_bytes is 0"),
        ({"arguments": {"disk_path": "/d"}}, "disk_path and disk_budget go together"),
        (
            {"arguments": {"disk_path": "~nobody-here/d"}},
            "disk_path (arguments): '~nobody-here/d' is not underst",
        ),
        ({"arguments": {"redis_user": "me"}}, "redis_user is for a shared tier; set redis_url too"),
        ({"arguments": {"redis_ttl": "1h"}}, "redis_ttl is for a shared tier; set redis_url too"),
        ({"arguments": {"redis_url": "redis://h", "redis_ttl": "0.5"}}, "redis_ttl_s is 0.5; it must be at"),
        ({"arguments": {"redis_lookup_timeout": "0"}}, "redis_lookup_timeout_s is 0"),
        ({"arguments": {"tls_cert": "c"}}, "tls_cert and tls_key go together"),
        ({"arguments": {"tls_client_ca": "c"}}, "set tls_cert and tls_key too"),
        ({"arguments": {"metrics_port": 65536}}, "metrics_port is 65536"),
        ({"arguments": {"payload_port": 65536}}, "payload_port is 65536"),
        ({"arguments": {"listen": "unix:s", "payload_port": 0}}, "payload_port is for clients by TCP"),
        ({"arguments": {"max_concurrent_calls": 1.5}}, "max_concurrent_calls (arguments): 1.5"),
        ({"arguments": {"grace": -1}}, "grace (arguments): -1 is not understood"),
    ],
)
def test_wrong_settings_are_explained(sources: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**sources)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[serve]\n", "'serve'"),
        ("server = 1", "server"),
        ("[server]\nmemory-budget = 1", "did you mean 'memory_budget'?"),
        ("[server]\nmemory_budget = true", "True is not understood"),
        ("[server]\nlisten = 5", "5 is not understood"),
        ("[server]\nmemory_budget = [1]", r"[1] is not understood"),
        ("[server", "is not TOML"),
        ("x = " + "[" * 5000, "is not TOML"),
    ],
)
def test_wrong_files_are_explained(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file=write(tmp_path, text))
    assert complaint in str(caught.value)
    assert "tq-store.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "port"),
    [
        ({}, 0),
        ({"listen": "[::1]:7437"}, 0),
        ({"payload_port": 7438}, 7438),
        ({"payload_pipes": 0}, None),
        ({"payload_port": 7438, "payload_pipes": 0}, None),
        ({"listen": "unix:s"}, None),
        ({"tls_cert": Path("c"), "tls_key": Path("k")}, None),
        ({"tls_cert": Path("c"), "tls_key": Path("k"), "payload_port": 0}, 0),
    ],
)
def test_a_port_for_payload_is_opened_where_it_gains_something(
    settings: dict[str, Any], port: int | None
) -> None:
    assert ServerConfig(**settings).pipe_port == port


def test_a_port_for_payload_that_others_can_reach_is_asked_for() -> None:
    public = {"tls_cert": Path("c"), "tls_key": Path("k"), "token_file": Path("t"), "listen": "0.0.0.0:7437"}
    assert ServerConfig(**public).pipe_port is None
    assert ServerConfig(**public, payload_port=7438).pipe_port == 7438


def test_a_file_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(file=tmp_path / "absent")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"lookup_timeout_s": 0}, "lookup_timeout_s is 0"),
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"tls_cert": Path("c")}, "go together"),
        ({"tls_cert": Path("c"), "tls_key": Path("k")}, "set tls_ca or tls too"),
        ({"address": "x"}, "not an address"),
    ],
)
def test_wrong_client_settings_are_explained(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ClientConfig(**fields)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        (17, 17),
        ("4GiB", 4 << 30),
        ("1.5 gib", 3 << 29),
        ("2kb", 2000),
        ("3TiB", 3 << 40),
        ("7B", 7),
        ("1MB", 10**6),
    ],
)
def test_sizes(text: object, num_bytes: int) -> None:
    assert SIZE.parse(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "seconds"), [("2", 2), (0.25, 0.25), ("500ms", 0.5), ("3 min", 180), ("1h", 3600)]
)
def test_durations(text: object, seconds: float) -> None:
    assert DURATION.parse(text) == seconds


@pytest.mark.parametrize("text", ["4G", "-1", "1e9", "", "GiB", "4 GiB 3", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a number"):
        SIZE.parse(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 30, "1 GiB"), (5 << 40, "5 TiB"), (5 << 50, "5120 TiB")],
)
def test_sizes_are_shown_as_they_are_read(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text
    assert SIZE.parse(text) == num_bytes


@pytest.mark.parametrize("config_type", [ServerConfig, ClientConfig])
def test_each_default_is_shown_as_it_would_be_written(config_type: Any) -> None:
    for setting in settings(config_type).values():
        assert setting.help
        if setting.shown_default:
            assert setting.kind.parse(setting.shown_default) == setting.default


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), (False, False), ("0", False)])
def test_switches(text: object, value: bool) -> None:
    assert load_config(ClientConfig, arguments={"tls": text}, environment={}).tls is value


def test_a_switch_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="'maybe' is not understood"):
        load_config(ClientConfig, arguments={"tls": "maybe"}, environment={})


def test_a_home_directory_is_expanded() -> None:
    assert load({"token_file": "~/token"}).token_file == Path.home() / "token"


def test_the_url_of_redis_is_not_shown() -> None:
    assert "secret" not in repr(ServerConfig(redis_url="redis://:secret@host"))


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("host:1", ("host", 1)),
        ("10.1.2.3:65535", ("10.1.2.3", 65535)),
        ("[::1]:0", ("::1", 0)),
        ("unix:/a/b", ("/a/b", None)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int | None]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address", ["", "host", "host:", "host:x", "host:65536", "::1:80", ":80", "a b:80", "unix:"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        split_address(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/tmp/socket"]
)
def test_local_addresses_need_no_protection(address: str) -> None:
    assert is_local(address)
    assert ServerConfig(listen=address).listen == address


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"token_file": Path("t"), "tenants_file": Path("u")}, "exclude each other"),
        ({"audit_all": True}, "set audit_log too"),
    ],
)
def test_settings_of_callers_that_contradict_each_other(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ServerConfig(**fields)


def test_a_client_shares_no_more_than_a_segment_may_have() -> None:
    assert ClientConfig(shared_memory_bytes=0).shared_memory_bytes == 0
    with pytest.raises(ConfigError, match="at most 1 GiB"):
        ClientConfig(shared_memory_bytes=(1 << 30) + 1)


@pytest.mark.parametrize(
    ("config", "name"),
    [(ClientConfig, "pipes"), (ServerConfig, "payload_pipes"), (ServerConfig, "shared_segments")],
)
def test_what_may_be_none_is_no_fewer(config: type[Any], name: str) -> None:
    assert getattr(config(**{name: 0}), name) == 0
    with pytest.raises(ConfigError, match=f"{name} is -1; it must be 0 or more"):
        config(**{name: -1})


def test_a_server_has_one_unix_socket_at_most() -> None:
    assert ServerConfig(listen="unix:/tmp/s").local_path == Path("/tmp/s")
    assert ServerConfig(local_socket=Path("/tmp/s")).local_path == Path("/tmp/s")
    assert ServerConfig().local_path is None
    with pytest.raises(ConfigError, match="leave local_socket out"):
        ServerConfig(listen="unix:/tmp/s", local_socket=Path("/tmp/t"))


def test_a_word_that_is_no_choice_is_refused_with_the_choices() -> None:
    assert load({"log_format": "json"}).log_format == "json"
    with pytest.raises(ConfigError, match="'xml' is not understood; write for example text or json"):
        load({"log_format": "xml"})


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.com:1", "127.0.0.1.example.com:1", "*:1", "128.0.0.1:1"],
)
@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({}, "--tls-cert and --tls-key and --token-file"),
        ({"token_file": Path("t")}, "add --tls-cert and --tls-key,"),
        ({"tls_cert": Path("c"), "tls_key": Path("k")}, "add --token-file or --tenants-file,"),
    ],
)
def test_other_addresses_need_tls_and_a_token(address: str, fields: dict[str, Path], flags: str) -> None:
    assert not is_local(address)
    with pytest.raises(ConfigError) as caught:
        ServerConfig(listen=address, **fields)
    assert flags in str(caught.value)
    protected = {"tls_cert": Path("c"), "tls_key": Path("k"), "token_file": Path("t")}
    assert ServerConfig(listen=address, **protected).listen == address


def write_tokens(directory: Path, content: bytes, mode: int = 0o600) -> Path:
    path = directory / "tokens"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_tokens_are_lines(tmp_path: Path) -> None:
    path = write_tokens(tmp_path, b"  first-token-0123456\n\nsecond-token-012345\r\n", 0o640)
    assert load_tokens(path) == ("first-token-0123456", "second-token-012345")


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        (b"a-token-0123456789", 0o604, "read by everybody; run `chmod 600"),
        (b"", 0o600, "must hold tokens of at least 16"),
        (b"\n \n", 0o600, "must hold tokens"),
        (b"secret-but-shrt", 0o600, "must hold tokens"),
        (b"a-token-0123456789\nshort", 0o600, "must hold tokens"),
        (b"a token 0123456789", 0o600, "must hold tokens"),
        ("ein-schlüssel-0123456".encode(), 0o600, "must hold tokens"),
        (b"x" * (1 << 17), 0o600, "must hold tokens"),
    ],
)
def test_wrong_token_files_are_explained_without_their_contents(
    tmp_path: Path, content: bytes, mode: int, complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tokens(write_tokens(tmp_path, content, mode))
    assert complaint in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_token_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_tokens(tmp_path / "absent")
