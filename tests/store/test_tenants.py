import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from store.sample_blocks import NAMESPACE, OTHER_NAMESPACE, sample_block, sample_key
from store.tenants_file import TenantsFile

from tq_store.backends.disk import DiskBackend
from tq_store.errors import ChecksumMismatch, ConfigError, IdentityMismatch, UnknownOwner
from tq_store.keys import BlockKey, split_key
from tq_store.results import PutOutcome
from tq_store.server import tenants as tenants_module
from tq_store.server.credentials import Credentials
from tq_store.server.tenants import SOLE_TENANT, Tenant, Tenants, load_tenants
from tq_store.server.tokens import TokenEntry, matches, new_token, parse_entry, token_id_of
from tq_store.tiering.store import TieredStore


def test_a_token_fits_its_entry_and_no_other() -> None:
    token, entry = new_token()
    other, other_entry = new_token()
    assert token_id_of(token) == entry.id
    assert matches(token, entry)
    assert parse_entry(str(entry)) == entry
    assert not matches(other, entry)
    assert not matches(token, None)
    assert not matches(token, TokenEntry(entry.id, other_entry.digest))
    assert not matches(token[:-1] + ("0" if token[-1] != "0" else "1"), entry)
    swapped = token.replace(entry.id, other_entry.id)
    assert not matches(swapped, TokenEntry(other_entry.id, entry.digest)), "the id is part of what is hashed"


def test_a_token_holds_256_random_bits_and_its_entry_none_of_them() -> None:
    token, entry = new_token()
    secret = token.split("_")[2]
    assert re.fullmatch(r"[0-9a-f]{64}", secret)
    assert secret not in str(entry)
    assert len({new_token()[0] for _ in range(100)}) == 100


@pytest.mark.parametrize("text", ["", "tqs_", "Bearer x", "tqs_" + "0" * 16 + "_" + "0" * 63, "ü" * 85])
def test_what_has_not_the_shape_of_a_token_fits_nothing(text: str) -> None:
    assert token_id_of(text) is None
    assert not matches(text, new_token()[1])


def test_an_entry_that_is_a_token_by_mistake_is_not_shown() -> None:
    token, _ = new_token()
    with pytest.raises(ValueError, match="tq-store token new") as failure:
        parse_entry(token)
    assert token not in str(failure.value)


def test_a_file_is_read_with_all_its_fields(tmp_path: Path) -> None:
    file = TenantsFile(tmp_path)
    namespaces = [NAMESPACE.hex()]
    file.add("search", bytes="2GiB", keys=7, calls_per_second=5, namespaces=namespaces, admin=True)
    file.add("search")
    file.add("ads", group="both", calls_at_once=3)
    tenants = load_tenants(file.path)
    search, ads = tenants.by_name["search"], tenants.by_name["ads"]
    assert len(search.tokens) == 2
    assert (search.quota_bytes, search.quota_keys, search.calls_per_second) == (2 << 30, 7, 5)
    assert search.namespaces == {NAMESPACE}
    assert (search.is_admin, ads.is_admin) == (True, False)
    assert (ads.group, ads.quota_bytes, ads.namespaces) == ("both", None, frozenset())
    assert (search.calls_at_once, ads.calls_at_once) == (None, 3)
    found = tenants.of_token(token_id_of(file.tokens["ads"]) or "")
    assert found is not None
    assert found[0] is ads
    assert tenants.of_token("0" * 16) is None


SECRET = "tqs_" + "ab" * 8 + "_" + "cd" * 32


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "declares no tenant"),
        ("[a", "is not TOML"),
        ("a = " + "[" * 100_000, "is not TOML"),
        ("a = 1", "declares no tenant; write"),
        ('[""]', "declares no tenant; write"),
        (f'["{"x" * 65}"]', "declares no tenant; write"),
        ("[a]\ntoken = ['x']", "unknown key 'token'; known are tokens, bytes"),
        (f"[a]\ntokens = ['{SECRET}']", "tokens of .a. is not understood"),
        (f"[a]\ntokens = '{SECRET}'", "tokens of .a. is not understood"),
        (f"[a]\nbytes = '{SECRET}'", "bytes of .a. is not understood"),
        ("[a]\nbytes = 0", "bytes of .a. is not understood"),
        ("[a]\nkeys = 1.5", "keys of .a. is not understood"),
        ("[a]\nnamespaces = ['ab']", "namespaces of .a. is not understood"),
        ("[a]\nnamespaces = [1]", "namespaces of .a. is not understood"),
        ("[a]\ngroup = ''", "group of .a. is not understood"),
        ("[a]\nadmin = 'perhaps'", "admin of .a. is not understood"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_no_value_shown(
    tmp_path: Path, text: str, complaint: str
) -> None:
    file = TenantsFile(tmp_path)
    file.write(text)
    with pytest.raises(ConfigError, match=complaint) as failure:
        load_tenants(file.path)
    assert SECRET not in str(failure.value)


def test_a_file_is_for_its_owner_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TenantsFile(tmp_path)
    file.add("a")
    file.path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_tenants(file.path)
    file.path.chmod(0o600)
    monkeypatch.setattr(tenants_module, "_MAX_FILE_BYTES", 10)
    with pytest.raises(ConfigError, match="more than 10 bytes"):
        load_tenants(file.path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tenants(tmp_path / "absent")


def test_a_token_stands_for_one_tenant() -> None:
    _, entry = new_token()
    twins = {name: Tenant(name=name, tokens=(entry,)) for name in ("a", "b")}
    with pytest.raises(ConfigError, match=f"{entry.id} stands twice"):
        Tenants(twins)


def test_realms_with_one_tag_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def same_start(*parts: Any) -> bytes:
        return bytes(8) + hashlib.sha256(repr(parts).encode()).digest()[8:]

    monkeypatch.setattr(tenants_module, "_hash", same_start)
    with pytest.raises(ConfigError, match="rename b: its keys would begin as those of a do"):
        Tenants({name: Tenant(name=name) for name in ("a", "b")})
    Tenants({name: Tenant(name=name, group="one") for name in ("a", "b")})


def test_one_namespace_of_two_tenants_is_two() -> None:
    tenants = [Tenant(name="a"), Tenant(name="b"), Tenant(name="a", group="a"), Tenant(name="c", group="b")]
    of_each = {tenant.store_namespace(NAMESPACE) for tenant in tenants}
    assert len(of_each) == 4, "a group called like a tenant is another realm"
    assert NAMESPACE not in of_each
    assert {len(namespace) for namespace in of_each} == {32}
    for tenant in tenants:
        assert tenant.store_namespace(NAMESPACE)[:8] == tenant.realm_tag
        assert tenant.store_namespace(NAMESPACE) != tenant.store_namespace(OTHER_NAMESPACE)
    shared = [Tenant(name=name, group="g").store_namespace(NAMESPACE) for name in ("a", "b")]
    assert shared[0] == shared[1]


def test_how_keys_are_mixed_does_not_change() -> None:
    """Blocks on disk and in Redis lie under these; servers of two versions must agree."""
    namespace = bytes(range(32))
    assert Tenant(name="search").store_namespace(namespace).hex() == SEARCH
    assert Tenant(name="search", group="all").store_namespace(namespace).hex() == GROUP_ALL
    assert SOLE_TENANT.store_namespace(namespace) == namespace


SEARCH = "0c4bcebc96f2c35e8cffc9afa90e9d8cf8d41154de24d15aac3dcfd88912be1a"
GROUP_ALL = "128535472d8f2f2ff048114e2d8683db92fbc6ea5df1216658403d8037b2433e"


def test_a_block_is_verified_against_its_own_tenant() -> None:
    a, b = Tenant(name="a"), Tenant(name="b")
    tenants = Tenants({"a": a, "b": b})
    key, block = sample_block(1)
    of_a, of_b = (BlockKey(tenant.store_namespace(NAMESPACE) + key[32:]) for tenant in (a, b))
    tenants.verify(block, of_a)
    tenants.verify(block, of_b)
    tenants.verify(block, key)  # from before there were tenants; nobody can ask for it
    other_prefix = BlockKey(split_key(of_a)[0] + sample_key(2)[32:])
    other_namespace = BlockKey(a.store_namespace(OTHER_NAMESPACE) + key[32:])
    of_nobody = BlockKey(Tenant(name="c").store_namespace(NAMESPACE) + key[32:])
    for wrong in (other_prefix, other_namespace):
        with pytest.raises(IdentityMismatch, match="of another key"):
            tenants.verify(block, wrong)
    with pytest.raises(UnknownOwner, match="no tenant here"):
        tenants.verify(block, of_nobody)
    with pytest.raises(ChecksumMismatch):
        tenants.verify(block[:-1] + b"?", of_a)


async def test_a_tenant_that_leaves_during_its_get_costs_no_block(tmp_path: Path) -> None:
    file = TenantsFile(tmp_path)
    file.add("a")
    file.add("b")
    credentials = Credentials(tenants_file=file.path)
    known, block = sample_block(1)
    namespace = credentials.directory.tenants["a"].store_namespace(split_key(known)[0])
    key = BlockKey(namespace + split_key(known)[1])
    disk = await DiskBackend.open(tmp_path / "disk", budget_bytes=1 << 20)
    store = TieredStore([disk], verify=credentials.verify)
    try:
        assert await store.put([(key, block)]) == [PutOutcome.STORED]
        file.remove("a")
        credentials.reload()
        assert await store.get([key]) == [None]
        assert (await store.stats()).counters["quarantined"] == 0
        file.add("a")
        credentials.reload()
        assert await store.get([key]) == [block]
    finally:
        await store.close()
