"""PagePlanner: the scheduler's half of our connector. Decides which pages move, and moves none."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from tq_connectors.vllm.page_moves import EngineRequest, PageMove, RequestMoves, StepMoves
from tq_store.keys import BlockKey

logger = logging.getLogger(__name__)

_NO_BLOCK = -1
_LOOKUP_THREADS = 4


@dataclass(slots=True)
class _Request:
    """What is known of a request.

    Args:
        blocks: Its blocks, in token order.
        num_computed: Tokens that the engine had when it was last asked for.
        found: The number of leading pages that the store has, as soon as it has said so.
        late_at: When it is too late to say so, by the planner's clock.
        loading: Keys that are being loaded for it.
        loading_blocks: Where they go.
        next_page: First page that is not saved yet; None before the request runs.
        has_saved: Whether something of it was given to be saved.
        is_refused: Whether a load of it has failed, so that it loads nothing any more.
    """

    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    found: "Future[int] | None" = None
    late_at: float = 0.0
    loading: tuple[BlockKey, ...] = ()
    loading_blocks: frozenset[int] = frozenset()
    next_page: int | None = None
    has_saved: bool = False
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """A request in a step: blocks that it got, whether they are all it has, tokens before and in the step."""

    request: EngineRequest
    new_blocks: Sequence[int]
    is_resumed: bool
    num_computed: int
    num_scheduled: int


class PagePlanner:
    """Pages of requests, by the engine's hashes of their tokens. Nothing here waits for the store.

    Args:
        lookup: Number of leading pages that the store has; runs on threads of ours.
        key_of: Key of a page, from the engine's hash of all tokens up to its end.
        page_tokens: Tokens in a page.
        block_tokens: Tokens in a block of the engine.
        hash_tokens: Tokens between two hashes of the engine.
        shares_blocks: Whether what was loaded for one request is there for the next, which then waits for it
            and does not load it again.
        lookup_timeout_s: Longest that a request waits for a lookup, its turn included; then nothing is there.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        lookup: Callable[[Sequence[BlockKey]], int],
        key_of: Callable[[bytes], BlockKey],
        *,
        page_tokens: int,
        block_tokens: int,
        hash_tokens: int,
        shares_blocks: bool,
        lookup_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lookup, self._key_of = lookup, key_of
        self._page_tokens, self._block_tokens = page_tokens, block_tokens
        self._hashes_per_page = page_tokens // hash_tokens
        self._blocks_per_page = page_tokens // block_tokens
        self._shares_blocks = shares_blocks
        self._lookup_timeout_s, self._clock = lookup_timeout_s, clock
        self._requests: dict[str, _Request] = {}
        self._loading: set[BlockKey] = set()
        self._held: set[str] = set()
        self._next = StepMoves()
        self._pool = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="tq-lookup")

    @property
    def has_pending_work(self) -> bool:
        """Whether the engine must go on stepping: finished requests are saved, then their blocks freed."""
        return bool(self._held)

    def matched(self, request: EngineRequest, num_computed: int) -> int | None:
        """Tokens after those computed that can be loaded; None while that is not known, or being loaded."""
        known = self._requests.setdefault(request.request_id, _Request())
        known.num_computed = num_computed
        last = min((request.num_tokens - 1) // self._page_tokens, self._num_hashed(request))
        if known.is_refused or last * self._page_tokens <= num_computed:
            return 0
        keys = self._keys(request, 0, last)
        if known.found is None:
            known.found, known.late_at = self._ask(keys), self._clock() + self._lookup_timeout_s
        if not known.found.done():
            if self._clock() < known.late_at:
                return None
            known.found.cancel()
            return 0
        answer = 0 if known.found.cancelled() or known.found.exception() else known.found.result()
        first, found = num_computed // self._page_tokens, min(answer, last)
        if self._shares_blocks and not self._loading.isdisjoint(keys[first:found]):
            return None
        return max(0, found * self._page_tokens - num_computed)

    def allocated(self, request: EngineRequest, blocks: Sequence[int], num_external: int) -> None:
        """Load so many tokens after those computed into the request's blocks."""
        if not num_external:
            return
        known = self._requests[request.request_id]
        first = known.num_computed // self._page_tokens
        end = (known.num_computed + num_external) // self._page_tokens
        pages = self._pages(request, blocks, first, end, known.num_computed // self._block_tokens)
        known.loading = tuple(page.key for page in pages)
        known.loading_blocks = frozenset(block for page in pages for block in page.blocks)
        known.next_page = max(end, known.next_page or 0)
        self._loading.update(known.loading)
        self._next.loads.append(RequestMoves(request.request_id, pages))

    def step(self, requests: Iterable[Progress], *, overwrites: bool) -> StepMoves:
        """What is moved beside a step; each thing is told once."""
        for progress in requests:
            known = self._requests.setdefault(progress.request.request_id, _Request())
            if progress.is_resumed:
                known.blocks.clear()
            known.blocks.extend(progress.new_blocks)
            if known.next_page is None:
                known.next_page = progress.num_computed // self._page_tokens
            # what a prompt's step computes stays; a token of an answer may still be taken back
            after = min(progress.num_computed + progress.num_scheduled, progress.request.num_prompt_tokens)
            self._save(progress.request, known, max(after, progress.num_computed))
        moves, self._next = self._next, StepMoves()
        moves.overwrites = overwrites
        return moves

    def finished(self, request: EngineRequest, num_final: int) -> bool:
        """Forget a request with so many tokens computed for good; True if its blocks are still read."""
        known = self._requests.pop(request.request_id, None)
        if known is None:
            return False
        if known.loading:  # aborted on the way: the engine keeps the blocks until the load has ended
            self._loading.difference_update(known.loading)
            return False
        if known.next_page is not None:
            self._save(request, known, num_final)
        if known.has_saved:
            self._held.add(request.request_id)
            self._next.held.append(request.request_id)
        return known.has_saved

    def moved(self, received: Iterable[str], sent: Iterable[str], failed_blocks: set[int]) -> None:
        """Loads that have ended, requests that are no longer read, and blocks that were not filled.

        Blocks come as soon as one rank has failed, the end of a load when all ranks are done with it.
        """
        for loading in self._requests.values() if failed_blocks else ():
            if not failed_blocks.isdisjoint(loading.loading_blocks):
                loading.is_refused, loading.next_page = True, None
        for request_id in received:
            known = self._requests.get(request_id)
            if known is not None:
                self._loading.difference_update(known.loading)
                known.loading, known.loading_blocks = (), frozenset()
        self._held.difference_update(sent)

    def close(self) -> None:
        """Wait for lookups that run. May be called twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, keys: Sequence[BlockKey]) -> Future[int]:
        try:
            return self._pool.submit(self._count, keys)
        except RuntimeError:  # closed
            nothing: Future[int] = Future()
            nothing.set_result(0)
            return nothing

    def _count(self, keys: Sequence[BlockKey]) -> int:
        try:
            return self._lookup(keys)
        except Exception:
            logger.exception("a lookup failed, the prefix is computed")
            return 0

    def _save(self, request: EngineRequest, known: _Request, num_final: int) -> None:
        assert known.next_page is not None
        num_pages = min(num_final // self._page_tokens, self._num_hashed(request))
        end = min(num_pages, len(known.blocks) // self._blocks_per_page)
        if end > known.next_page:
            pages = self._pages(request, known.blocks, known.next_page, end, 0)
            self._next.saves.append(RequestMoves(request.request_id, pages))
            known.next_page, known.has_saved = end, True

    def _pages(
        self, request: EngineRequest, blocks: Sequence[int], first: int, end: int, first_block: int
    ) -> tuple[PageMove, ...]:
        """Pages and their blocks, without those before `first_block`."""
        pages = []
        for page, key in zip(range(first, end), self._keys(request, first, end), strict=True):
            numbers = range(page * self._blocks_per_page, (page + 1) * self._blocks_per_page)
            wanted = tuple(blocks[number] if number >= first_block else _NO_BLOCK for number in numbers)
            pages.append(PageMove(key, wanted))
        return tuple(pages)

    def _keys(self, request: EngineRequest, first: int, end: int) -> list[BlockKey]:
        step = self._hashes_per_page
        return [self._key_of(request.block_hashes[(page + 1) * step - 1]) for page in range(first, end)]

    def _num_hashed(self, request: EngineRequest) -> int:
        return len(request.block_hashes) // self._hashes_per_page
