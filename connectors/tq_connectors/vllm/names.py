"""Block keys for vLLM's chunks: everything that its own hashes leave out is put in here."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from tq_store.keys import BlockKey, Namespace


@dataclass(frozen=True)
class ChunkNames:
    """Names chunks in the store by vLLM's chained hash of all their tokens.

    Args:
        namespace: What makes this cache another one than those of the same tokens; `salt` is the operator's.
        chunk_tokens: Tokens in a chunk.
        hash_seed: What vLLM's first hash is chained to: the algorithm and its seed show in it. Asked for with
            the first key, as vLLM does not know it before.
    """

    namespace: Namespace
    chunk_tokens: int
    hash_seed: Callable[[], bytes]

    def key(self, block_hash: bytes) -> BlockKey:
        """Key of one chunk, from vLLM's hash of all tokens up to its end."""
        return BlockKey(self._digest + hashlib.sha256(b"vllm chunk" + block_hash).digest())

    @cached_property
    def _digest(self) -> bytes:
        words = f"vllm chunk {self.chunk_tokens} {self.hash_seed().hex()} {self.namespace.salt}"
        return replace(self.namespace, salt=words).digest()
