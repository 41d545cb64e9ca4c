"""Keys: equal exactly when the blocks are interchangeable."""

import dataclasses
import hashlib
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from store.strategies import namespaces, token_ids

from tq_store.errors import ConfigError
from tq_store.keys import (
    BLOCK_KEY_BYTES,
    DIGEST_BYTES,
    BlockKey,
    Namespace,
    Part,
    block_keys,
    parse_key,
    part_key,
    prefix_hashes,
    split_key,
)

FORMAT_DOCUMENT = Path(__file__).parents[2] / "proto" / "BLOCK_FORMAT.md"
EXAMPLE = Namespace(
    model="example/model",
    revision="0123abc",
    kv_dtype="bfloat16",
    codec_fingerprint="c0ffee",
    page_tokens=64,
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
)
EXAMPLE_DIGEST = "8cfd2664f9f81923ce9e3b283d9ec2a7741a38fae70e1c96d971cf46bc033c30"
EXAMPLE_PAGES = (
    "e9e892bb8ebd843058874cb5ad44a8a4ce064e83f0ae0f8dba801e855c45f24b",
    "f94c88c07147b76ed4557b9c04a82e43d0d7a1e6a9f246304f0cc3742afee493",
)
DOCUMENTED_FIELDS = (
    "model",
    "revision",
    "kv_dtype",
    "codec_fingerprint",
    "codec_state",
    "page_tokens",
    "num_layers",
    "num_kv_heads",
    "head_dim",
    "salt",
)
TEXT_FIELDS = ("model", "revision", "kv_dtype", "codec_fingerprint", "codec_state", "salt")
page_sizes = st.integers(1, 9)


def replaced(namespace: Namespace, **values: Any) -> Namespace:
    return dataclasses.replace(namespace, **values)


def hashes(tokens: list[int], page_tokens: int) -> list[bytes]:
    return list(prefix_hashes(tokens, page_tokens))


def test_released_keys_never_change() -> None:
    assert EXAMPLE.digest().hex() == EXAMPLE_DIGEST
    assert [key.hex() for key in block_keys(EXAMPLE, range(128))] == [
        EXAMPLE_DIGEST + p for p in EXAMPLE_PAGES
    ]
    document = FORMAT_DOCUMENT.read_text()
    assert all(f"`{value}`" in document for value in (EXAMPLE_DIGEST, *EXAMPLE_PAGES))


@given(namespaces())
def test_namespace_digest_is_the_documented_recipe(namespace: Namespace) -> None:
    recipe = b"tq-store namespace v1"
    for name in DOCUMENTED_FIELDS:
        value = str(getattr(namespace, name)).encode("utf-8")
        recipe += struct.pack("<I", len(name)) + name.encode() + struct.pack("<I", len(value)) + value

    assert namespace.digest() == hashlib.sha256(recipe).digest()


@given(token_ids, page_sizes)
def test_prefix_hashes_are_the_documented_recipe(tokens: list[int], page_tokens: int) -> None:
    expected: list[bytes] = []
    parent = hashlib.sha256(b"tq-store prefix v1").digest()
    while len(tokens) >= page_tokens * (len(expected) + 1):
        start = page_tokens * len(expected)
        page = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + page_tokens])
        parent = hashlib.sha256(parent + page).digest()
        expected.append(parent)

    assert hashes(tokens, page_tokens) == expected


@given(token_ids, page_sizes, st.data())
def test_prefix_of_tokens_has_prefix_of_hashes(
    tokens: list[int], page_tokens: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(tokens)))
    whole, part = hashes(tokens, page_tokens), hashes(tokens[:cut], page_tokens)

    assert part == whole[: cut // page_tokens]
    assert len(set(whole)) == len(whole) == len(tokens) // page_tokens


@given(token_ids.filter(bool), page_sizes, st.integers(1, 2**32 - 1), st.data())
def test_one_token_changes_its_page_and_all_after_it(
    tokens: list[int], page_tokens: int, delta: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:at], (tokens[at] + delta) % 2**32, *tokens[at + 1 :]]
    before, after = hashes(tokens, page_tokens), hashes(changed, page_tokens)
    page = at // page_tokens

    assert after[:page] == before[:page]
    assert all(a != b for a, b in zip(after[page:], before[page:], strict=True))


@given(token_ids, page_sizes, page_sizes)
def test_another_page_size_shares_no_hash(tokens: list[int], one: int, other: int) -> None:
    assume(one != other)
    assert not set(hashes(tokens, one)) & set(hashes(tokens, other))


@pytest.mark.parametrize(("num_tokens", "num_keys"), [(0, 0), (1, 0), (63, 0), (64, 1), (127, 1), (128, 2)])
def test_partial_page_has_no_key(num_tokens: int, num_keys: int) -> None:
    assert len(block_keys(EXAMPLE, range(num_tokens))) == num_keys


@pytest.mark.parametrize("token", [-1, 2**32, 2**64, 0.5, None])
def test_token_that_does_not_fit_is_named_by_its_page(token: object) -> None:
    found = prefix_hashes([0, 1, 2, 3, token, 5], 2)  # type: ignore[list-item]

    assert [next(found), next(found)] == hashes([0, 1, 2, 3], 2)
    with pytest.raises(ValueError, match=r"token ids 4 to 6 are not all in \[0, 2\*\*32\)"):
        next(found)


def test_largest_and_smallest_token_fit() -> None:
    assert len(hashes([0, 2**32 - 1], 1)) == 2


@pytest.mark.parametrize("field", dataclasses.fields(Namespace), ids=lambda field: field.name)
def test_every_field_is_part_of_the_namespace(field: dataclasses.Field[object]) -> None:
    value = getattr(EXAMPLE, field.name)
    other = value + 1 if isinstance(value, int) else value + "x"

    changed = replaced(EXAMPLE, **{field.name: other})

    assert changed.digest() != EXAMPLE.digest()
    assert not set(block_keys(changed, range(512))) & set(block_keys(EXAMPLE, range(512)))


@given(namespaces(), namespaces(), token_ids)
@example(
    replaced(EXAMPLE, model="ab", revision="c"),
    replaced(EXAMPLE, model="a", revision="bc"),
    [],
)
@example(
    replaced(EXAMPLE, page_tokens=1, num_layers=12),
    replaced(EXAMPLE, page_tokens=11),
    [],
)
def test_two_namespaces_share_no_key(one: Namespace, other: Namespace, tokens: list[int]) -> None:
    assume(one != other)
    assert one.digest() != other.digest()
    assert not set(block_keys(one, tokens)) & set(block_keys(other, tokens))


@given(namespaces(), namespaces(), token_ids)
def test_the_prefix_half_of_a_key_depends_on_tokens_and_page_size_only(
    one: Namespace, other: Namespace, tokens: list[int]
) -> None:
    other = replaced(other, page_tokens=one.page_tokens)
    ours, theirs = block_keys(one, tokens), block_keys(other, tokens)

    assert [key[DIGEST_BYTES:] for key in ours] == [key[DIGEST_BYTES:] for key in theirs]
    assert {key[:DIGEST_BYTES] for key in ours} <= {one.digest()}


@given(st.text(min_size=2, max_size=12), st.data())
def test_text_moved_across_a_field_boundary_is_another_namespace(text: str, data: st.DataObject) -> None:
    first, second = data.draw(st.sampled_from([("model", "revision"), ("revision", "kv_dtype")]))
    cuts = range(1, len(text))
    digests = {replaced(EXAMPLE, **{first: text[:cut], second: text[cut:]}).digest() for cut in cuts}

    assert len(digests) == len(cuts)


@pytest.mark.parametrize("field", TEXT_FIELDS[:-1])
def test_a_value_that_imitates_the_next_field_is_another_namespace(field: str) -> None:
    """Text that contains the encoding of what follows it must not end where a shorter text would."""
    names = [f.name for f in dataclasses.fields(Namespace)]
    following = names[names.index(field) + 1]
    value = str(getattr(EXAMPLE, following))
    forged = "x" + "".join(struct.pack("<I", len(part)).decode() + part for part in (following, value))

    digests = {
        replaced(EXAMPLE, **{field: forged, **tail}).digest()
        for tail in ({}, {"salt": "s"}, {"salt": forged})
    }

    assert len(digests) == 3
    assert replaced(EXAMPLE, **{field: "x"}).digest() not in digests


def test_the_same_text_in_another_field_is_another_namespace() -> None:
    digests = {replaced(EXAMPLE, **{field: getattr(EXAMPLE, field) + "!"}).digest() for field in TEXT_FIELDS}
    assert len(digests) == len(TEXT_FIELDS)


def test_salt_keeps_two_users_apart() -> None:
    alice, bob = (replaced(EXAMPLE, salt=name) for name in ("alice", "bob"))
    assert len({block_keys(ns, range(64))[0] for ns in (EXAMPLE, alice, bob)}) == 3


@pytest.mark.parametrize("field", ["model", "revision", "kv_dtype", "codec_fingerprint"])
def test_empty_name_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"namespace field '{field}' is empty; it must name"):
        replaced(EXAMPLE, **{field: ""})


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("field", ["page_tokens", "num_layers", "num_kv_heads", "head_dim"])
def test_count_below_one_is_refused(field: str, value: int) -> None:
    with pytest.raises(
        ConfigError, match=f"namespace field '{field}' must be an integer of at least 1, not {value}"
    ):
        replaced(EXAMPLE, **{field: value})


def test_a_namespace_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXAMPLE.model = "other"  # type: ignore[misc]


@given(st.binary(min_size=BLOCK_KEY_BYTES, max_size=BLOCK_KEY_BYTES).map(BlockKey))
def test_key_survives_text_and_splitting(key: BlockKey) -> None:
    assert parse_key(key.hex()) == parse_key(key.hex().upper()) == key
    assert b"".join(split_key(key)) == key
    assert [len(part) for part in split_key(key)] == [DIGEST_BYTES, DIGEST_BYTES]


@pytest.mark.parametrize("length", [0, 1, 32, 63, 65, 128])
def test_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"a block key has 64 bytes, not {length}"):
        split_key(BlockKey(bytes(length)))
    with pytest.raises(ValueError, match="a block key "):
        parse_key(bytes(length).hex())


@pytest.mark.parametrize("text", ["0x" + 126 * "a", 127 * "a", 127 * "a" + "g", 64 * "é", "-" + 127 * "a"])
def test_text_that_is_not_hex_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a block key is written as 128 hex digits"):
        parse_key(text)


@pytest.mark.parametrize("page_tokens", [0, -1])
def test_a_page_holds_at_least_one_token(page_tokens: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        list(prefix_hashes([1, 2], page_tokens))


@pytest.mark.parametrize("value", [16.0, True, "16"])
def test_a_count_that_only_looks_like_an_integer_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="integer"):
        dataclasses.replace(EXAMPLE, page_tokens=value)


def test_a_path_that_is_not_unicode_has_a_digest() -> None:
    paths = ("model\udc80", "model\udc81", "model\ud800")
    assert len({dataclasses.replace(EXAMPLE, model=path).digest() for path in paths}) == len(paths)


@pytest.mark.parametrize("text", ["00 " * 64, " " * 128, "0x" + "00" * 63, "0" * 127])
def test_only_128_hex_digits_are_a_key(text: str) -> None:
    with pytest.raises(ValueError, match="128 hex digits"):
        parse_key(text)


EXAMPLE_WHOLE = Part(first_layer=0, num_layers=32, first_kv_head=0, num_kv_heads=8)
EXAMPLE_PARTS = {
    "1196ee8423268033ea55d35a934c6071384ea0e449b16e99c2140ddc52799636": (0, 32, 4, 4),
    "d17ef813eedba9de5660667cbc3d0531deb9409b886afc3e4cc08eddc59028b8": (10, 11, 0, 8),
}


def part_of(first_layer: int, num_layers: int, first_kv_head: int, num_kv_heads: int) -> Part:
    return Part(
        first_layer=first_layer,
        num_layers=num_layers,
        first_kv_head=first_kv_head,
        num_kv_heads=num_kv_heads,
    )


@st.composite
def example_parts(draw: st.DrawFn) -> Part:
    layer, head = draw(st.integers(0, 31)), draw(st.integers(0, 7))
    return part_of(layer, draw(st.integers(1, 32 - layer)), head, draw(st.integers(1, 8 - head)))


@pytest.mark.parametrize("digest", EXAMPLE_PARTS)
def test_keys_of_parts_are_the_documented_ones(digest: str) -> None:
    numbers = EXAMPLE_PARTS[digest]
    prefix_hash = bytes.fromhex(EXAMPLE_PAGES[1])
    key = BlockKey(EXAMPLE.digest() + prefix_hash)
    mixed = hashlib.sha256(b"tq-store part v1" + prefix_hash + struct.pack("<4I", *numbers)).hexdigest()
    layer, num_layers, head, num_heads = numbers
    row = (
        f"| layers {layer} to {layer + num_layers - 1}, heads {head} to {head + num_heads - 1} | `{digest}` |"
    )
    assert row in FORMAT_DOCUMENT.read_text()
    assert part_key(key, part_of(*numbers), EXAMPLE_WHOLE) == EXAMPLE.digest() + bytes.fromhex(digest)
    assert mixed == digest


@given(example_parts(), example_parts())
def test_two_parts_have_one_key_only_if_they_are_the_same(one: Part, other: Part) -> None:
    key = BlockKey(bytes(range(64)))
    keys = [part_key(key, part, EXAMPLE_WHOLE) for part in (one, other)]
    assert (keys[0] == keys[1]) is (one == other)
    assert [each == key for each in keys] == [part == EXAMPLE_WHOLE for part in (one, other)]
    assert one.covers(other) is (one.overlap(other) == other)


@pytest.mark.parametrize("numbers", [(-1, 1, 0, 1), (0, 0, 0, 1), (0, 1, -1, 1), (0, 1, 0, 0)])
def test_a_part_of_nothing_is_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least one layer and one KV head"):
        part_of(*numbers)


@pytest.mark.parametrize("numbers", [(0, 33, 0, 8), (31, 2, 0, 8), (0, 32, 0, 9), (0, 32, 8, 1)])
def test_a_part_beyond_the_whole_has_no_key(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="does not lie within"):
        part_key(BlockKey(bytes(64)), part_of(*numbers), EXAMPLE_WHOLE)
