"""PrefixCache: pages of a token prefix from the store, and pages for it, with every failure a miss."""

import copy
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from tq_connectors.codec import CacheGeometry, block_info, namespace_for, pack_pages, unpack_pages
from tq_connectors.codec_state import CodecState, agree_on_state
from tq_connectors.model_layout import ModelLayout
from tq_connectors.parts import Division, Shard
from tq_connectors.save_queue import SaveQueue
from tq_connectors.store_guard import StoreGuard
from tq_kernels.layout import PageLayout
from tq_store.block import Buffer
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError, ConfigError, RpcError
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey, Part, block_keys

logger = logging.getLogger(__name__)

DEFAULT_SAVE_QUEUE_BYTES = 256 << 20
_Answer = TypeVar("_Answer")


@dataclass(slots=True)
class LoadCounters:
    """What loading has done so far: pages and bytes that came, and pages promised that did not.

    Safe to add to from several threads.
    """

    loaded_pages: int = 0
    loaded_bytes: int = 0
    failed_pages: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, *, pages: int = 0, num_bytes: int = 0, failed: int = 0) -> None:
        """Count some more of each."""
        with self._lock:
            self.loaded_pages += pages
            self.loaded_bytes += num_bytes
            self.failed_pages += failed


class PrefixCache:
    """One rank's view of one model in the store. Used by engine connectors; never raises into them.

    Pages that go in and come out are those of the rank's shard; keys are those of pages with all layers and
    heads, the same on all ranks. Ranks that load agree on the least number of pages that one of them got.

    Args:
        client: Connection to the store; owned by the caller.
        layout: Page layout of all the model's layers, or of each, which fixes codec and shape. Blocks are cut
            where it changes, besides where `division` cuts them.
        geometry: Shape of the whole model's KV cache.
        model: Name of the model.
        revision: What tells its weights from others of that name.
        salt: Keeps apart what only the caller knows to differ (a LoRA adapter, a tenant).
        save_queue_bytes: Most bytes of blocks waiting to be saved; more are dropped.
        division: How blocks divide the model, the same for all who share them; None for one block a page.
        shard: What this rank holds; None for all layers and heads.
        guard: Leaves a store alone for a while that fails; None to ask it every time.

    Raises:
        ConfigError: The model has no name or no revision, its pages are too large for a block, or division or
            shard are those of another shape.
    """

    def __init__(
        self,
        client: StoreClient,
        layout: PageLayout | ModelLayout,
        geometry: CacheGeometry,
        *,
        model: str,
        revision: str,
        salt: str = "",
        save_queue_bytes: int = DEFAULT_SAVE_QUEUE_BYTES,
        division: Division | None = None,
        shard: Shard | None = None,
        guard: StoreGuard | None = None,
    ) -> None:
        division = division or Division.undivided(geometry)
        self._shard = shard or Shard(geometry.whole)
        if division.whole != geometry.whole or not geometry.whole.covers(self._shard.part):
            raise ConfigError(f"{division} and {self._shard} do not go with {geometry}")
        self._layout = ModelLayout.of(layout, geometry.num_layers)
        self._division = division.cut_at(self._layout.layer_cuts)
        try:
            for part in self._division.parts:
                pages = self._layout.within_run(part)
                block_info(pages, geometry.num_layers, BlockKey(bytes(BLOCK_KEY_BYTES)), part)
        except BlockFormatError as error:
            raise ConfigError(
                f"a page makes no block, use smaller pages or a finer division: {error}"
            ) from error
        self._saved_parts = self._division.saved_by(self._shard)
        self._loaded_parts = self._division.loaded_by(self._shard)
        self._client = client
        self._geometry = geometry
        self.namespace = namespace_for(self._layout, geometry, model=model, revision=revision, salt=salt)
        self._guard = guard
        self._outage = False
        self.saves = SaveQueue(client, budget_bytes=save_queue_bytes)
        self.counters = LoadCounters()

    def agree_on_state(self, propose: Callable[[], CodecState | None]) -> CodecState | None:
        """The codec state that replicas share, or None while it cannot be had; see `codec_state`."""
        try:
            state = agree_on_state(self._client, self.namespace, self._geometry, propose)
        except (RpcError, BlockFormatError) as error:
            self._warn_once(
                f"no codec state from the store, prefixes are recomputed and pages made without: {error}"
            )
            return None
        self._outage = False
        return state

    def fetch_or_offer(self, state: CodecState) -> CodecState | None:
        """The state that the store has, or this one if it had none and keeps it.

        Raises:
            RpcError: The store cannot be reached.
            BlockFormatError: What the store has is no state.
        """
        return agree_on_state(self._client, self.namespace, self._geometry, lambda: state)

    def with_state(self, state: CodecState) -> "PrefixCache":
        """The same view of the same store, for pages made with a state; queue and counters are shared."""
        view = copy.copy(self)
        view.namespace = dataclasses.replace(self.namespace, codec_state=state.digest)
        return view

    def keys(self, token_ids: Sequence[int]) -> list[BlockKey]:
        """Keys of all full pages of a token sequence."""
        return block_keys(self.namespace, token_ids)

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading pages that the store has with all their parts; 0 while it cannot be asked."""
        try:
            num_pages = self._attempt(partial(self._lookup, keys)) or 0
        except RpcError as error:
            self._warn_once(f"the store does not answer, prefixes are recomputed: {error}")
            return 0
        self._outage = False
        return num_pages

    def load(self, keys: Sequence[BlockKey]) -> Iterator[memoryview]:
        """Pages of the shard for the leading keys that the store has, each as soon as it is here.

        Stops at the first page that is missing, late, or not sound, on this rank or on another; the caller
        computes the rest.
        """
        promised, loaded = 0, 0
        try:
            promised = self._attempt(partial(self._lookup, keys)) or 0
            found = self._get(keys[:promised])
            while (pages := self._attempt(partial(next, found, None))) is not None:
                loaded += 1
                self.counters.add(pages=1)
                yield pages
            self._outage = False
        except (RpcError, BlockFormatError) as error:
            self._warn_once(f"loading from the store fails, prefixes are recomputed: {error}")
        self.counters.add(failed=promised - loaded)

    def save(self, key: BlockKey, pages: Buffer) -> bool:
        """Queue pages of the shard, as far as this rank saves them; False if some were dropped.

        Never blocks.
        """
        is_queued = True
        for part in self._saved_parts:
            piece = self._layout.join([(self._shard.part, pages)], part)
            layout = self._layout.within_run(part)
            block = pack_pages(layout, self._geometry.num_layers, key, piece, part)
            is_queued = self.saves.offer(self._division.key(key, part), block) and is_queued
        return is_queued

    def _attempt(self, call: Callable[[], _Answer]) -> _Answer | None:
        return call() if self._guard is None else self._guard.attempt(call)

    def _lookup(self, keys: Sequence[BlockKey]) -> int:
        """A page that lacks a part is not there, whichever ranks hold that part."""
        part_keys = [each for key in keys for each in self._division.keys(key)]
        return self._client.lookup(part_keys) // len(self._division.parts)

    def _get(self, keys: Sequence[BlockKey]) -> Iterator[memoryview]:
        """Pages of the shard, until a part is missing."""
        parts = self._loaded_parts
        part_keys = [self._division.key(key, part) for key in keys for part in parts]
        pieces: list[tuple[Part, memoryview]] = []
        for index, block in self._client.get(part_keys):
            if block is None:
                return
            key, part = keys[index // len(parts)], parts[index % len(parts)]
            layout = self._layout.within_run(part)
            pieces.append((part, unpack_pages(layout, self._geometry.num_layers, key, block, part)))
            self.counters.add(num_bytes=len(block))
            if len(pieces) == len(parts):
                yield self._layout.join(pieces, self._shard.part)
                pieces = []

    def _warn_once(self, message: str) -> None:
        """Once an outage."""
        if not self._outage:
            logger.warning("%s", message)
        self._outage = True

    def close(self, timeout_s: float = 10.0) -> None:
        """Put what is queued, as far as `timeout_s` allows. May be called twice."""
        self.saves.close(timeout_s)
