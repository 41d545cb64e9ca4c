"""LMCache's adapter and the store with a link of a given rate between them: how long a prefix takes.

The add-on's serde has no row: LMCache 0.5.6 cannot call it.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from engines.lmcache.objects import Controller, make_adapter, object_key, plugin
from store.running_server import running_server

from benchmarks.lmcache_serdes import seconds

_SLICE_BYTES = 64 << 10
_LINKED: dict[str, dict[str, Any] | None] = {
    "naive": None,
    "fp8": {"type": "fp8"},
    "tq4": {"type": "tq"},
    "tq3": {"type": "tq"},
}


class _Link:
    """Passes bytes on, those that come down no faster than the rate."""

    def __init__(self, upstream: str, gbit_per_s: float) -> None:
        self._host, _, self._port = upstream.rpartition(":")
        self._bytes_per_s = gbit_per_s * 1e9 / 8
        self._free_at = 0.0
        self.address = ""

    async def start(self) -> None:
        self._listener = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._listener.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above_reader, above_writer = await asyncio.open_connection(self._host, int(self._port))
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await asyncio.gather(
                self._pump(reader, above_writer, shaped=False), self._pump(above_reader, writer, shaped=True)
            )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, shaped: bool
    ) -> None:
        while data := await reader.read(_SLICE_BYTES):
            if shaped:
                now = time.monotonic()
                self._free_at = max(now, self._free_at) + len(data) / self._bytes_per_s
                if self._free_at - now > 0.002:
                    await asyncio.sleep(self._free_at - now)
            writer.write(data)
            await writer.drain()
        writer.close()


@contextmanager
def link_to(upstream: str, gbit_per_s: float) -> Iterator[str]:
    """Address of a link to a server."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    link = _Link(upstream, gbit_per_s)
    asyncio.run_coroutine_threadsafe(link.start(), loop).result(10)
    try:
        yield link.address
    finally:
        asyncio.run_coroutine_threadsafe(link.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def measure_links(
    chunks: Sequence[torch.Tensor],
    heads: int,
    dim: int,
    rates: Iterable[float],
    repeats: int,
    times: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Time until a prefix of all chunks is loaded, and the first token is there, by serde and rate.

    Args:
        chunks: Of the prefix.
        heads: KV heads.
        dim: Channels.
        rates: Of links, in Gbit/s.
        repeats: Of which the median is taken.
        times: Of the model, as `lmcache_kv` wrote them.
    """
    keys = [object_key(number) for number in range(len(chunks))]
    rows = []
    with running_server() as server:
        for name, written in _LINKED.items():
            serde = written
            if written == {"type": "tq"}:
                serde = written | {"preset": name, "num_kv_heads": heads, "head_dim": dim, "device": "cpu"}
            extra = {} if serde is None else {"serde": serde}
            settings = {"salt": name, "codec": f"serde:{name}" if name.startswith("tq") else "none"}
            writer = Controller(make_adapter(plugin(server.address, **settings) | extra))
            if not writer.store(keys, chunks):
                raise RuntimeError(f"the chunks of {name} were not stored")
            writer.adapter.close()
            for rate in rates:
                with link_to(server.address, rate) as address:
                    reader = Controller(make_adapter(plugin(address, **settings) | extra))

                    def load(reader: Controller = reader) -> None:
                        found = reader.load(keys, chunks[0]) if all(reader.find(keys)) else [None]
                        if any(chunk is None for chunk in found):
                            raise RuntimeError("a chunk was not loaded")

                    loaded_s = seconds(load, repeats, time.perf_counter)
                    reader.adapter.close()
                rows.append(
                    {
                        "serde": name,
                        "gbit_per_s": rate,
                        "loaded_ms": loaded_s * 1e3,
                        "first_token_ms": loaded_s * 1e3 + times["step_ms"],
                        "computed_ms": times["computed_ms"],
                    }
                )
    return rows
