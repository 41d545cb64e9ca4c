"""Who a block is: namespace, chained prefix hash, block key.

A block key is 64 bytes: the digest of the namespace (everything that makes two caches incompatible) and the
hash of all tokens up to the end of the block; a block that holds only a part of the layers or KV heads mixes
that part into the hash. Two blocks of one key are interchangeable, whichever ranks of whichever engines made
them.
"""

import hashlib
import string
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NewType

from tq_store.errors import ConfigError

DIGEST_BYTES = 32
BLOCK_KEY_BYTES = 2 * DIGEST_BYTES

BlockKey = NewType("BlockKey", bytes)
"""Namespace digest followed by prefix hash; plain bytes so that it is its own wire and Redis form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """Everything besides the tokens that decides whether two caches hold interchangeable bytes.

    Args:
        model: Name or path under which the operator knows the model.
        revision: What tells two sets of weights of that name apart (a commit, a file digest).
        kv_dtype: Dtype of keys and values before the codec, e.g. ``"bfloat16"``.
        codec_fingerprint: Hex digest over all parameters of the codec.
        codec_state: Hex digest of statistics that readers must share; empty for a stateless codec.
        page_tokens: Tokens in a page; part of the byte layout.
        num_layers: Attention layers of the whole model, whatever the parallelism.
        num_kv_heads: KV heads of the whole model, whatever the parallelism.
        head_dim: Values in one key.
        salt: Keeps apart what only the caller knows to be different (a LoRA adapter, a user).
    """

    model: str
    revision: str
    kv_dtype: str
    codec_fingerprint: str
    codec_state: str = ""
    page_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    salt: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "revision", "kv_dtype", "codec_fingerprint"):
            if not getattr(self, name):
                raise ConfigError(
                    f"namespace field {name!r} is empty; it must name what the cache was made from"
                )
        for name in ("page_tokens", "num_layers", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"namespace field {name!r} must be an integer of at least 1, not {value!r}")

    def digest(self) -> bytes:
        """SHA-256 over all fields, each with its name and length, in the order of declaration."""
        hasher = hashlib.sha256(b"tq-store namespace v1")
        for field in fields(self):
            for part in (
                field.name.encode(),
                str(getattr(self, field.name)).encode(errors="surrogatepass"),
            ):
                hasher.update(struct.pack("<I", len(part)))
                hasher.update(part)
        return hasher.digest()


def prefix_hashes(token_ids: Sequence[int], page_tokens: int) -> Iterator[bytes]:
    """Hash of every prefix that ends on a page boundary, each chained to the one before.

    Args:
        token_ids: Token ids from position 0 on, each in ``[0, 2**32)``.
        page_tokens: Tokens a page holds, at least 1; a partial last page has no hash.

    Yields:
        32 bytes per full page.

    Raises:
        ValueError: A token id does not fit 32 bits, or `page_tokens` is below 1.
    """
    if page_tokens < 1:
        raise ValueError(f"page_tokens must be at least 1, not {page_tokens}")
    parent = hashlib.sha256(b"tq-store prefix v1").digest()
    for start in range(0, len(token_ids) - page_tokens + 1, page_tokens):
        try:
            tokens = struct.pack(f"<{page_tokens}I", *token_ids[start : start + page_tokens])
        except struct.error as error:
            raise ValueError(
                f"token ids {start} to {start + page_tokens} are not all in [0, 2**32)"
            ) from error
        parent = hashlib.sha256(parent + tokens).digest()
        yield parent


def block_keys(namespace: Namespace, token_ids: Sequence[int]) -> list[BlockKey]:
    """Keys of all full pages of a token sequence, in order."""
    digest = namespace.digest()
    return [BlockKey(digest + prefix) for prefix in prefix_hashes(token_ids, namespace.page_tokens)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some consecutive layers of a model's cache, and of each of them the same consecutive KV heads.

    Args:
        first_layer: First attention layer, counted from 0 in the whole model.
        num_layers: Attention layers.
        first_kv_head: First KV head, counted from 0 in the whole model.
        num_kv_heads: KV heads of each layer.

    Raises:
        ValueError: No layer, no head, or one before the first.
    """

    first_layer: int
    num_layers: int
    first_kv_head: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        if min(self.first_layer, self.first_kv_head) < 0 or min(self.num_layers, self.num_kv_heads) < 1:
            raise ValueError(f"a part has at least one layer and one KV head, counted from 0, not {self}")

    @property
    def last_layer(self) -> int:
        """Last attention layer."""
        return self.first_layer + self.num_layers - 1

    @property
    def last_kv_head(self) -> int:
        """Last KV head."""
        return self.first_kv_head + self.num_kv_heads - 1

    def overlap(self, other: "Part") -> "Part | None":
        """What both cover; None where that is nothing."""
        first_layer = max(self.first_layer, other.first_layer)
        first_kv_head = max(self.first_kv_head, other.first_kv_head)
        num_layers = min(self.last_layer, other.last_layer) - first_layer + 1
        num_kv_heads = min(self.last_kv_head, other.last_kv_head) - first_kv_head + 1
        if num_layers < 1 or num_kv_heads < 1:
            return None
        return Part(
            first_layer=first_layer,
            num_layers=num_layers,
            first_kv_head=first_kv_head,
            num_kv_heads=num_kv_heads,
        )

    def covers(self, other: "Part") -> bool:
        """Whether the other lies wholly within this one."""
        return (
            self.first_layer <= other.first_layer
            and other.last_layer <= self.last_layer
            and self.first_kv_head <= other.first_kv_head
            and other.last_kv_head <= self.last_kv_head
        )


def part_key(key: BlockKey, part: Part, whole: Part) -> BlockKey:
    """Key of the block that holds a part of what `key` stands for, and the key itself for the whole.

    Args:
        key: Key of all layers and heads of a page.
        part: What the block holds.
        whole: All layers and heads of the model.

    Raises:
        ValueError: The part does not lie within the whole.
    """
    if not whole.covers(part):
        raise ValueError(f"{part} does not lie within {whole}")
    if part == whole:
        return key
    namespace, prefix_hash = split_key(key)
    place = struct.pack("<4I", part.first_layer, part.num_layers, part.first_kv_head, part.num_kv_heads)
    return BlockKey(namespace + hashlib.sha256(b"tq-store part v1" + prefix_hash + place).digest())


def split_key(key: BlockKey) -> tuple[bytes, bytes]:
    """Namespace digest and prefix hash of a key.

    Raises:
        ValueError: Not 64 bytes.
    """
    if len(key) != BLOCK_KEY_BYTES:
        raise ValueError(f"a block key has {BLOCK_KEY_BYTES} bytes, not {len(key)}")
    return key[:DIGEST_BYTES], key[DIGEST_BYTES:]


def parse_key(text: str) -> BlockKey:
    """Key from the 128 hex digits that the command line and logs show.

    Raises:
        ValueError: Not 128 hex digits.
    """
    if len(text) == 2 * BLOCK_KEY_BYTES and set(text) <= set(string.hexdigits):
        return BlockKey(bytes.fromhex(text))
    raise ValueError(f"a block key is written as {2 * BLOCK_KEY_BYTES} hex digits")
