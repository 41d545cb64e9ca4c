"""Block keys for SGLang's pages: everything that its own hashes leave out is put in here."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from tq_connectors.sglang.page_shape import PagePart
from tq_store.keys import BlockKey, Namespace


class PageNames:
    """Names pages in the store.

    Args:
        namespace: What makes this cache another one than those of the same tokens; `salt` is the operator's.
        part: Which part of the model's pages this process holds, so that replicas divided in another way have
            other keys.
    """

    def __init__(self, namespace: Namespace, part: PagePart) -> None:
        self.namespace = replace(namespace, salt=f"sglang page {part} {namespace.salt}")
        self._digest = self.namespace.digest()

    def key(self, page_hash: str) -> BlockKey:
        """Key of one page.

        Args:
            page_hash: SGLang's hash of all tokens up to the end of the page.
        """
        prefix_hash = hashlib.sha256(b"sglang page" + page_hash.encode()).digest()
        return BlockKey(self._digest + prefix_hash)

    def keys(self, page_hashes: Sequence[str]) -> list[BlockKey]:
        """Keys of pages, in order."""
        return [self.key(page_hash) for page_hash in page_hashes]
