"""PrefixCache: pages of a token prefix from the store, and pages for it, with every failure a miss."""

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tq_connectors.codec import CacheGeometry, block_info, namespace_for, pack_pages, unpack_pages
from tq_connectors.codec_state import CodecState, agree_on_state
from tq_connectors.save_queue import SaveQueue
from tq_kernels.layout import PageLayout
from tq_store.block import Buffer
from tq_store.client import StoreClient
from tq_store.errors import BlockFormatError, ConfigError, RpcError
from tq_store.keys import BLOCK_KEY_BYTES, BlockKey, block_keys

logger = logging.getLogger(__name__)

DEFAULT_SAVE_QUEUE_BYTES = 256 << 20


@dataclass(slots=True)
class LoadCounters:
    """What loading has done so far: pages and bytes that came, and pages promised that did not."""

    loaded_pages: int = 0
    loaded_bytes: int = 0
    failed_pages: int = 0


class PrefixCache:
    """One model's view of the store. Used by engine connectors; never raises into them.

    Args:
        client: Connection to the store; owned by the caller.
        layout: Page layout, which fixes codec and shape.
        geometry: Shape of the model's KV cache.
        model: Name of the model.
        revision: What tells its weights from others of that name.
        salt: Keeps apart what only the caller knows to differ (a LoRA adapter, a tenant).
        save_queue_bytes: Most bytes of blocks waiting to be saved; more are dropped.

    Raises:
        ConfigError: The model has no name or no revision, or its pages are too large for a block.
    """

    def __init__(
        self,
        client: StoreClient,
        layout: PageLayout,
        geometry: CacheGeometry,
        *,
        model: str,
        revision: str,
        salt: str = "",
        save_queue_bytes: int = DEFAULT_SAVE_QUEUE_BYTES,
    ) -> None:
        try:
            block_info(layout, geometry.num_layers, BlockKey(bytes(BLOCK_KEY_BYTES)))
        except BlockFormatError as error:
            raise ConfigError(f"a page of all layers makes no block, use smaller pages: {error}") from error
        self._client = client
        self._layout = layout
        self._geometry = geometry
        self.namespace = namespace_for(layout, geometry, model=model, revision=revision, salt=salt)
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

    def load(self, keys: Sequence[BlockKey]) -> Iterator[memoryview]:
        """Page bytes of all layers for the leading keys that the store has, each as soon as it is here.

        Stops at the first page that is missing, late, or not sound; the caller computes the rest.
        """
        promised, loaded = 0, 0
        try:
            promised = self._client.lookup(keys)
            for index, block in self._client.get(keys[:promised]):
                if block is None:
                    break
                pages = unpack_pages(self._layout, self._geometry.num_layers, keys[index], block)
                loaded += 1
                self.counters.loaded_pages += 1
                self.counters.loaded_bytes += len(block)
                yield pages
            self._outage = False
        except (RpcError, BlockFormatError) as error:
            self._warn_once(f"loading from the store fails, prefixes are recomputed: {error}")
        self.counters.failed_pages += promised - loaded

    def save(self, key: BlockKey, pages: Buffer) -> bool:
        """Queue the page bytes of all layers; False when they were dropped. Never blocks."""
        return self.saves.offer(key, pack_pages(self._layout, self._geometry.num_layers, key, pages))

    def _warn_once(self, message: str) -> None:
        """Once an outage."""
        if not self._outage:
            logger.warning("%s", message)
        self._outage = True

    def close(self, timeout_s: float = 10.0) -> None:
        """Put what is queued, as far as `timeout_s` allows. May be called twice."""
        self.saves.close(timeout_s)
