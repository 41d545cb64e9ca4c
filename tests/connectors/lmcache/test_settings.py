"""What operators write for LMCache, and what they are told when it is wrong."""

import pytest

from tq_connectors.lmcache.settings import StoreSettings, read_settings
from tq_store.errors import ConfigError

WRITTEN = {"revision": "abc", "kv_dtype": "bfloat16", "codec": "serde:tq4"}


def test_settings_of_the_connection_stand_beside_ours():
    ours, connection = read_settings(
        WRITTEN | {"address": "127.0.0.1:9", "transfer_timeout": "500ms", "capacity": "2GiB"}, {}
    )
    assert ours == StoreSettings(
        revision="abc", kv_dtype="bfloat16", codec="serde:tq4", capacity_bytes=2 << 30
    )
    assert (connection.address, connection.transfer_timeout_s) == ("127.0.0.1:9", 0.5)


def test_the_environment_counts_where_the_json_is_silent():
    environment = {"TQ_STORE_ADDRESS": "10.0.0.1:1", "TQ_STORE_LOOKUP_TIMEOUT": "2"}
    _, connection = read_settings(WRITTEN | {"address": "127.0.0.1:9"}, environment)
    assert (connection.address, connection.lookup_timeout_s) == ("127.0.0.1:9", 2.0)


@pytest.mark.parametrize("codec", ["none", "tq4", "k8v4", "serde:tq3", "serde:raw"])
def test_a_codec_is_a_preset_with_or_without_the_serde_or_none(codec):
    assert read_settings(WRITTEN | {"codec": codec}, {})[0].codec == codec


@pytest.mark.parametrize("name", WRITTEN)
def test_what_makes_a_cache_another_one_must_be_written(name):
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        read_settings({key: value for key, value in WRITTEN.items() if key != name}, {})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"adress": "x"}, "did you mean 'address'"),
        ({"codec": "tq5"}, "unknown preset 'tq5'.*or none"),
        ({"codec": "serde:"}, "unknown preset ''"),
        ({"codec": "tq3+tq4:0"}, "'tq3\\+tq4:0' differs by layer, and an engine's pages have one size"),
        ({"codec": "serde:tq3+tq4:0"}, "differs by layer.*choose a preset, or none"),
        ({"revision": ""}, "not understood"),
        ({"load_threads": 0}, "load_threads is 0"),
        ({"store_threads": "many"}, "store_threads: 'many' is not understood"),
        ({"capacity": "much"}, "capacity: 'much' is not understood"),
        ({"lookup_timeout": "soon"}, "lookup_timeout"),
    ],
)
def test_a_wrong_setting_is_named(written, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(WRITTEN | written, {})


@pytest.mark.parametrize("name", ["revision", "kv_dtype"])
def test_identity_is_not_empty(name):
    with pytest.raises(ConfigError, match=f"{name} is empty"):
        StoreSettings(**(WRITTEN | {name: ""}))
