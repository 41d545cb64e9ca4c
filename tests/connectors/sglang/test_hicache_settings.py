"""What operators write for SGLang, and what they are told when it is wrong."""

import pytest
import torch

from tq_connectors.sglang.hicache_settings import PageSettings, read_settings
from tq_store.errors import ConfigError

WRITTEN = {"revision": "abc", "codec": "tq4"}


def test_what_sglang_reads_itself_may_stand_in_the_same_json():
    of_sglang = {
        "backend_name": "tq-store",
        "module_path": "tq_connectors.sglang.hicache_storage",
        "class_name": "TQHiCacheStorage",
        "interface_v1": 1,
        "prefetch_threshold": 64,
    }
    ours, connection = read_settings(WRITTEN | of_sglang | {"address": "127.0.0.1:9", "staging": "1MiB"}, {})
    assert ours == PageSettings(revision="abc", codec="tq4", staging_bytes=1 << 20)
    assert connection.address == "127.0.0.1:9"


def test_a_transfer_is_given_up_sooner_than_clients_do_by_themselves():
    assert read_settings(WRITTEN, {})[1].transfer_timeout_s == 5
    assert read_settings(WRITTEN | {"transfer_timeout": "9s"}, {})[1].transfer_timeout_s == 9
    assert read_settings(WRITTEN, {"TQ_STORE_TRANSFER_TIMEOUT": "7"})[1].transfer_timeout_s == 7


def test_the_linkers_lookups_are_given_up_sooner_still():
    assert read_settings(WRITTEN, {})[1].lookup_timeout_s == 1
    assert read_settings(WRITTEN, {}, is_linker=True)[1].lookup_timeout_s == 0.2
    assert read_settings(WRITTEN | {"lookup_timeout": "2s"}, {}, is_linker=True)[1].lookup_timeout_s == 2


def test_the_scheduler_waits_for_pages_no_longer_than_for_a_few_steps():
    assert read_settings(WRITTEN, {}, is_linker=True)[0].load_wait_s == 0.1


@pytest.mark.parametrize("name", WRITTEN)
def test_what_makes_a_cache_another_one_must_be_written(name):
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        read_settings({key: value for key, value in WRITTEN.items() if key != name}, {})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"reversion": "x"}, "did you mean 'revision'"),
        ({"codec": "tq5"}, "unknown preset 'tq5'.*or none"),
        ({"codec": "tq3+tq4:0"}, "differs by layer, and an engine's pages have one size.*or none"),
        ({"staging": 0}, "staging is 0"),
        ({"load_threads": 0}, "load_threads is 0"),
        ({"tp_sizes": "2,0"}, "tp_sizes is '2,0'"),
        ({"tp_sizes": "all"}, "write for example 1,2,4"),
        ({"lookup_timeout": "soon"}, "lookup_timeout"),
    ],
)
def test_a_wrong_setting_is_named(written, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(WRITTEN | written, {})


def test_pages_are_packed_where_the_operator_says():
    assert PageSettings(revision="a", codec="none").codec_device() == torch.device(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    assert PageSettings(revision="a", codec="none", device="cuda:1").codec_device() == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="device is 'gpu'"):
        PageSettings(revision="a", codec="none", device="gpu").codec_device()
