"""Our L2 adapter on a real server: what LMCache's own tests do not ask."""

import socket
import threading
import time

import pytest
import torch
from engines.lmcache.objects import Controller, make_adapter, memory_object, object_key, plugin
from store.running_server import running_server, wait_until

from tq_connectors.lmcache.l2_adapter import TQStoreL2Adapter
from tq_store.errors import ConfigError

CHUNK = torch.arange(4096, dtype=torch.bfloat16).view(2, 2, 8, 128)
KEYS = [object_key(number) for number in range(4)]


@pytest.fixture
def adapter(server, salt, client):
    made = make_adapter(plugin(server.address, salt=salt))
    yield made
    made.close()


@pytest.fixture
def controller(adapter):
    return Controller(adapter)


def chunks(count: int = 4) -> list[torch.Tensor]:
    return [CHUNK + number for number in range(count)]


def test_another_process_finds_what_was_stored(server, salt, controller):
    assert controller.store(KEYS, chunks())
    other = make_adapter(plugin(server.address, salt=salt))
    found = Controller(other).load([*KEYS, object_key(9)], CHUNK)
    other.close()
    assert found.pop() is None
    assert all(torch.equal(one, expected) for one, expected in zip(found, chunks(), strict=True))


@pytest.mark.parametrize(
    "changed",
    [{"revision": "s"}, {"kv_dtype": "float16"}, {"codec": "tq4"}, {"codec": "serde:tq4"}, {"salt": "other"}],
)
def test_a_cache_of_another_identity_has_none_of_it(server, salt, controller, changed):
    controller.store(KEYS, chunks())
    other = make_adapter(plugin(server.address, **({"salt": salt} | changed)))
    assert Controller(other).find(KEYS) == [False] * 4
    other.close()


@pytest.mark.parametrize("key", [object_key(0, salt="tenant"), object_key(0, model="org/other")])
def test_another_tenant_or_model_has_none_of_it(controller, key):
    controller.store(KEYS, chunks())
    assert controller.find([key, KEYS[0]]) == [False, True]


@pytest.mark.parametrize(
    "like",
    [CHUNK.to(torch.float16), CHUNK.view(2, 2, 16, 64), CHUNK[:, :1], torch.zeros(8192, dtype=torch.uint8)],
)
def test_an_object_of_another_layout_is_a_miss_even_if_it_has_the_size(adapter, controller, like):
    controller.store(KEYS[:1], chunks(1))
    assert controller.load(KEYS[:1], like) == [None]
    assert adapter.report_status()["rejected_objects"] == 1


def test_same_size_dtypes_are_told_apart(controller):
    """LMCache alone reads e4m3 as e5m2 and calls it a hit."""
    stored = torch.randn(64).to(torch.float8_e4m3fn)
    controller.store(KEYS[:1], [stored])
    assert controller.load(KEYS[:1], stored.to(torch.float8_e5m2)) == [None]
    assert torch.equal(controller.load(KEYS[:1], stored)[0].view(torch.uint8), stored.view(torch.uint8))


def test_what_the_store_dropped_is_a_miss_and_no_longer_counted(client, adapter, controller):
    controller.store(KEYS, chunks())
    assert adapter.get_usage().total_bytes_used == 4 * CHUNK.nbytes
    client.delete([adapter._block_key(KEYS[1])])
    assert controller.find(KEYS) == [True, False, True, True]
    assert adapter.get_usage().total_bytes_used == 3 * CHUNK.nbytes
    assert [one is None for one in controller.load(KEYS, CHUNK)] == [False, True, False, False]


def test_what_another_process_left_is_counted_when_it_is_loaded(server, salt, controller):
    controller.store([object_key(1, salt="a"), object_key(2, salt="b")], chunks(2))
    other = make_adapter(plugin(server.address, salt=salt))
    assert other.get_usage().total_bytes_used == 0
    Controller(other).load([object_key(1, salt="a")], CHUNK)
    assert dict(other.get_usage().bytes_by_cache_salt) == {"a": CHUNK.nbytes}
    other.close()


def test_a_locked_object_outlives_its_deletion_until_it_is_unlocked(client, adapter, controller):
    controller.store(KEYS, chunks())
    assert controller.find(KEYS[:2]) == [True, True]
    adapter.delete(KEYS)
    assert [one is None for one in controller.load(KEYS, CHUNK)] == [False, False, True, True]
    adapter.submit_unlock(KEYS[:1])
    wait_until(
        lambda: client.contains([adapter._block_key(key) for key in KEYS]) == [False, True, False, False]
    )
    assert controller.load(KEYS[:1], CHUNK) == [None]
    adapter.submit_unlock(KEYS)
    wait_until(lambda: client.contains([adapter._block_key(KEYS[1])]) == [False])
    assert adapter.report_status()["locked_key_count"] == 0


def test_an_object_may_be_stored_again_after_its_deletion(controller, adapter):
    for number in range(20):
        controller.store(KEYS[:1], [CHUNK + number])
        adapter.delete(KEYS[:1])
        assert controller.find(KEYS[:1]) == [False]
        assert controller.store(KEYS[:1], [CHUNK - number])
        assert torch.equal(controller.load(KEYS[:1], CHUNK)[0], CHUNK - number)
        adapter.delete(KEYS[:1])


def test_a_lookup_that_outlives_a_deletion_is_no_hit(adapter, controller):
    """The store answers before it deletes, and the answer is read when the deletion is over."""
    controller.store(KEYS, chunks())
    contains, adapter_store = adapter._store.contains, adapter._store

    def answer_late(keys):
        answers = contains(keys)
        gate.set()
        adapter._index.wait_for_deletions(KEYS, 10)
        return answers

    gate, delete = threading.Event(), adapter_store.delete
    adapter_store.contains = answer_late
    adapter_store.delete = lambda keys: (gate.wait(10), delete(keys))[1]
    adapter.delete(KEYS[:2])
    assert controller.find(KEYS) == [False, False, True, True]


def test_listing_goes_through_all_objects_page_by_page(adapter, controller):
    keys = [object_key(number, model=model) for number in range(5) for model in ("m/a", "m/b")]
    controller.store(keys, chunks(10))
    seen, cursor = [], None
    while True:
        page = adapter.list_l2_keys(page_size=3, cursor=cursor)
        seen += [entry.key.to_object_key() for entry in page.entries]
        assert all(entry.size_bytes == CHUNK.nbytes for entry in page.entries)
        cursor = page.next_page_token
        if cursor is None:
            break
    assert len(seen) == 10
    assert set(seen) == set(keys)
    only = adapter.list_l2_keys(model_name="m/a")
    assert {entry.key.model_name for entry in only.entries} == {"m/a"}
    assert len(only.entries) == 5
    for arguments in ({"page_size": 0}, {"cursor": "junk"}):
        with pytest.raises(ValueError, match=r"page_size|cursor"):
            adapter.list_l2_keys(**arguments)


def test_a_wrong_setting_stops_lmcache_at_its_start(server):
    with pytest.raises(ConfigError, match="revision is missing"):
        TQStoreL2Adapter({"address": server.address, "kv_dtype": "bfloat16", "codec": "none"})
    with pytest.raises(ConfigError, match="did you mean 'address'"):
        make_adapter(plugin(server.address, addres="x"))


def test_without_a_server_everything_is_a_miss_and_health_says_so():
    with running_server() as gone:
        spec = plugin(gone.address, lookup_timeout="200ms", transfer_timeout="200ms")
        adapter = make_adapter(spec)
        assert adapter.report_status()["is_healthy"]
    controller = Controller(adapter)
    assert controller.find(KEYS) == [False] * 4
    assert not controller.store(KEYS, chunks())
    assert controller.load(KEYS, CHUNK) == [None] * 4
    adapter.delete(KEYS)
    adapter.submit_unlock(KEYS)
    status = adapter.report_status()
    assert not status["is_healthy"]
    assert status["failed_calls"] >= 3
    adapter.close()


def test_a_server_that_never_answers_holds_up_no_controller(salt):
    """Submitting, asking, unlocking and deleting return at once, whatever the store does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        times = {"connect_timeout": "1", "lookup_timeout": "2", "transfer_timeout": "2", "admin_timeout": "2"}
        adapter = make_adapter(plugin(address, salt=salt, **times))
        controller = Controller(adapter)
        before = time.monotonic()
        lookup = adapter.submit_lookup_and_lock_task(KEYS, {})
        adapter.delete(KEYS)
        adapter.submit_unlock(KEYS)
        assert adapter.query_lookup_and_lock_result(lookup) is None
        assert adapter.pop_completed_store_tasks() == {}
        adapter.report_status()
        assert time.monotonic() - before < 0.5
        assert controller.load(KEYS, CHUNK) == [None] * 4
        adapter.close()


def test_a_full_queue_fails_at_once(salt):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        adapter = make_adapter(plugin(address, salt=salt, max_pending_tasks=1, lookup_timeout="3"))
        adapter.submit_lookup_and_lock_task(KEYS, {})
        assert Controller(adapter).find(KEYS) == [False] * 4
        assert adapter.report_status()["refused_lookups"] == 1
        adapter.close()


def test_closing_waits_until_no_thread_touches_lmcaches_memory(server, salt):
    adapter = make_adapter(plugin(server.address, salt=salt))
    big = torch.zeros(1 << 22, dtype=torch.bfloat16)
    controller = Controller(adapter)
    assert controller.store(KEYS, [big] * 4)
    for _ in range(4):
        adapter.submit_load_task(KEYS, [memory_object(big) for _ in KEYS])
    adapter.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tq-lmcache")]


@pytest.mark.parametrize("serde", [None, {"type": "tq", "preset": "tq4", "num_kv_heads": 2, "head_dim": 64}])
def test_a_chunk_that_rotted_on_the_stores_disk_is_the_only_miss(tmp_path, salt, serde):
    shape = (2, 2, 256, 128)
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(4)]
    spec = plugin("unused", salt=salt) | ({} if serde is None else {"serde": serde})
    limits = {"disk_path": tmp_path, "disk_budget_bytes": 1 << 30}
    with running_server(**limits) as server:
        spec["adapter_params"]["address"] = server.address
        controller = Controller(make_adapter(spec))
        assert controller.store(KEYS, tensors)
        wait_until(lambda: len([*tmp_path.glob("blocks/*/*")]) == 4)
        keys = [
            getattr(controller.adapter, "inner_adapter", controller.adapter)._block_key(key) for key in KEYS
        ]
        controller.adapter.close()
    (rotten,) = tmp_path.glob(f"blocks/*/*{keys[1][32:].hex()}")
    data = bytearray(rotten.read_bytes())
    data[len(data) // 2] ^= 1
    rotten.write_bytes(data)
    with running_server(**limits) as server:
        spec["adapter_params"]["address"] = server.address
        controller = Controller(make_adapter(spec))
        assert controller.find(KEYS) == [True] * 4
        assert [one is None for one in controller.load(KEYS, tensors[0])] == [False, True, False, False]
        controller.adapter.close()


def test_a_killed_server_is_a_miss_and_a_new_one_works_again(salt):
    with running_server() as first:
        port = int(first.address.rpartition(":")[2])
        adapter = make_adapter(plugin(first.address, salt=salt, lookup_timeout="300ms"))
        controller = Controller(adapter)
        assert controller.store(KEYS, chunks())
    assert controller.find(KEYS) == [False] * 4
    assert adapter.get_usage().total_bytes_used == 4 * CHUNK.nbytes  # nobody said that it is gone
    with running_server(listen=f"127.0.0.1:{port}"):
        wait_until(lambda: controller.store(KEYS[:2], chunks(2)))
        assert controller.find(KEYS) == [True, True, False, False]
        assert adapter.get_usage().total_bytes_used == 2 * CHUNK.nbytes
    adapter.close()


def test_what_the_store_does_not_take_leaves_the_rest_stored(salt):
    big = torch.zeros(1 << 22, dtype=torch.bfloat16)
    with running_server(memory_budget_bytes=4 << 20) as small:
        adapter = make_adapter(plugin(small.address, salt=salt))
        controller = Controller(adapter)
        assert not controller.store(KEYS[:3], [CHUNK, big, CHUNK])
        assert controller.find(KEYS) == [True, False, True, False]
        assert adapter.get_usage().total_bytes_used == 2 * CHUNK.nbytes
        assert adapter.report_status()["refused_objects"] == 1
        adapter.close()
