"""PageMover: a worker's half of our connector. Moves pages between the engine's blocks and the store."""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from tq_connectors.prefix_cache import PrefixCache
from tq_connectors.vllm.chunk_codec import ChunkCodec, host_cells
from tq_connectors.vllm.chunk_mover import Chunk, ChunkMover
from tq_connectors.vllm.page_loader import PageLoader
from tq_connectors.vllm.page_moves import PageMove, RequestMoves, StepMoves, parts_of
from tq_connectors.vllm.streams import Event
from tq_store.errors import ConfigError

logger = logging.getLogger(__name__)


class PageMover:
    """Loads and saves on a thread each, and never raises into the engine.

    A page that is missing, late or not sound is reported as blocks that were not filled. At most twice as
    many pages wait to be saved as the host memory has room for, others are dropped: a lost save is a future
    miss. Once it is closed nothing is filled, and nothing saved.

    Args:
        cache: This rank's view of the store.
        codec: What a page becomes on the device.
        staging_bytes: Most device memory of each of four buffers, but at least one page.
        host_bytes: Host memory for pages on their way, each way; at least one page.
        load_threads: Parts of a load that come from the store at once.
        load_timeout_s: Longest from the start of a load to its last request to the store.

    Raises:
        ConfigError: A page of the engine's null block cannot be moved.
    """

    def __init__(
        self,
        cache: PrefixCache,
        codec: ChunkCodec,
        *,
        staging_bytes: int,
        host_bytes: int,
        load_threads: int,
        load_timeout_s: float,
    ) -> None:
        self._cache = cache
        self._saver = ChunkMover([codec], staging_bytes=staging_bytes, is_save=True)
        self._save_cells = host_cells(codec, host_bytes)
        self._loader = PageLoader(
            cache,
            codec,
            staging_bytes=staging_bytes,
            host_bytes=host_bytes,
            load_threads=load_threads,
        )
        self._load_timeout_s = load_timeout_s
        self._pool = {
            name: ThreadPoolExecutor(1, thread_name_prefix=f"tq-{name}-pages") for name in ("save", "load")
        }
        self._changed = threading.Lock()
        self._received: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._saving: dict[str, list[Future[None]]] = {}
        self._waiting_pages = 0
        self._held: set[str] = set()
        self.dropped_pages = 0
        """Pages that were not saved because too many waited."""
        null_page = [Chunk(0, self._save_cells[0], [0] * codec.blocks_per_chunk)]
        for mover in (self._saver, self._loader.mover):  # kernels are compiled now, not beside a request
            if not mover.move(null_page, mover.fence()):
                raise ConfigError("this engine's blocks cannot be moved; the log says why")

    def start(self, moves: StepMoves) -> None:
        """Begin the loads of a step."""
        for request in moves.loads:
            late_at = time.monotonic() + self._load_timeout_s
            try:
                self._pool["load"].submit(self._load, request, self._loader.mover.fence(), late_at)
            except RuntimeError:  # closed
                self._ended(request, 0)

    def save(self, moves: StepMoves) -> None:
        """Begin the saves of a step whose work the device has been given."""
        for request in moves.saves:
            with self._changed:
                room = max(0, 2 * len(self._save_cells) - self._waiting_pages)
                pages = request.pages[:room]
                self._waiting_pages += len(pages)
            self.dropped_pages += len(request.pages) - len(pages)
            if not pages:
                continue
            try:
                job = self._pool["save"].submit(self._save, pages, self._saver.fence())
            except RuntimeError:  # closed
                self.dropped_pages += len(pages)
                continue
            self._saving.setdefault(request.request_id, []).append(job)
        self._held.update(moves.held)

    def wait_for_saves(self) -> None:
        """Wait until no block is being read."""
        wait([job for jobs in self._saving.values() for job in jobs])

    def take_finished(self) -> tuple[set[str], set[str], set[int]]:
        """Held requests that are no longer read, requests whose load has ended, and blocks not filled."""
        for request_id in list(self._saving):
            self._saving[request_id] = [job for job in self._saving[request_id] if not job.done()]
            if not self._saving[request_id]:
                del self._saving[request_id]
        sent = self._held - self._saving.keys()
        self._held -= sent
        with self._changed:
            received, self._received = self._received, set()
            failed, self._failed_blocks = self._failed_blocks, set()
        return sent, received, failed

    def close(self) -> None:
        """Wait for what runs, and put what is queued. May be called twice."""
        for pool in self._pool.values():
            pool.shutdown(wait=True, cancel_futures=True)
        self._saver.close()
        self._loader.close()
        self._cache.close()

    def _load(self, request: RequestMoves, ready: Event, late_at: float) -> None:
        loaded = 0
        try:
            loaded = self._loader.load(request.pages, ready, late_at)
        except Exception:  # whatever it is, the request must not wait for ever
            logger.exception("loading pages failed, they are computed")
        self._ended(request, loaded)

    def _ended(self, request: RequestMoves, loaded: int) -> None:
        blocks = {block for page in request.pages[loaded:] for block in page.blocks if block >= 0}
        with self._changed:
            self._failed_blocks |= blocks
            self._received.add(request.request_id)

    def _save(self, wanted: Sequence[PageMove], ready: Event) -> None:
        try:
            for pages in parts_of(wanted, len(self._save_cells)):
                cells = self._save_cells
                chunks = [Chunk(0, cells[number], page.blocks) for number, page in enumerate(pages)]
                if not self._saver.move(chunks, ready):
                    return
                for number, page in enumerate(pages):
                    self._cache.save(page.key, cells[number].numpy().data)
        except Exception:
            logger.exception("saving pages failed")
        finally:
            with self._changed:
                self._waiting_pages -= len(wanted)
