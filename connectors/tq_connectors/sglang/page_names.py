"""Block keys for SGLang's pages: everything that its own hashes leave out is put in here."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from tq_connectors.parts import Division, Shard
from tq_store.keys import BlockKey, Namespace, Part


class PageNames:
    """Names the blocks of pages, of which each process saves and loads parts.

    Args:
        namespace: What makes this cache another one than those of the same tokens; `salt` is the operator's.
        division: How all replicas that share pages cut them.
        shard: What this process holds.
    """

    def __init__(self, namespace: Namespace, division: Division, shard: Shard) -> None:
        self.namespace = replace(namespace, salt=f"sglang {namespace.salt}")
        self._digest = self.namespace.digest()
        self._division = division
        self.shard = shard
        self.loaded_parts: list[Part] = division.loaded_by(shard)
        self.saved_parts: list[Part] = division.saved_by(shard)

    def page_key(self, page_hash: str) -> BlockKey:
        """Key of a page with all layers and heads.

        Args:
            page_hash: SGLang's hash of all tokens up to the end of the page.
        """
        prefix_hash = hashlib.sha256(b"sglang page" + page_hash.encode()).digest()
        return BlockKey(self._digest + prefix_hash)

    def keys(self, page_hashes: Sequence[str], parts: Sequence[Part]) -> list[BlockKey]:
        """Keys of parts of pages, page after page."""
        page_keys = map(self.page_key, page_hashes)
        return [self._division.key(key, part) for key in page_keys for part in parts]
