"""Loopback made as slow as a network link: by the kernel where it lets us, by a proxy of ours elsewhere.

`python -m benchmarks.shaped_link PORT GBIT` is the proxy as a process of its own, and prints its address.
"""

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Self

_HOST = "127.0.0.2"
_CHUNK_BYTES = 256 << 10
_BURST_S = 0.005
"""What may pass at once after a pause, as time: below it, a sleep is not exact enough."""


def in_shaped_namespace(command: list[str], gbit: float) -> list[str] | None:
    """The same command in a network namespace of its own, whose loopback passes so many Gbit/s.

    The kernel shapes it (a token bucket, `tc-tbf`), so it costs no processor time worth counting, and nobody
    else's loopback is touched. None where the kernel or its tools do not allow it.
    """
    if not all(map(shutil.which, ("unshare", "ip", "tc"))):
        return None
    burst_bytes = max(256 << 10, round(gbit * 1e9 / 8 * _BURST_S))
    script = (
        "ip link set lo up && tc qdisc add dev lo root tbf "
        f'rate {round(gbit * 1000)}mbit burst {burst_bytes} limit 64mb && exec "$@"'
    )
    shaped = ["unshare", "--map-root-user", "--net", "sh", "-c", script, "sh"]
    tried = subprocess.run([*shaped, "true"], capture_output=True, check=False)  # noqa: S603
    return None if tried.returncode else [*shaped, *command]


class TokenBucket:
    """Says how long to wait so that bytes pass at a rate. Safe to use from several threads.

    Args:
        gbit: The rate, Gbit/s.
    """

    def __init__(self, gbit: float) -> None:
        self._bytes_per_s = gbit * 1e9 / 8
        self._free_at = 0.0
        self._lock = threading.Lock()

    def delay_s(self, num_bytes: int, now: float) -> float:
        """Take bytes; they may pass after so many seconds."""
        with self._lock:
            self._free_at = max(self._free_at, now - _BURST_S) + num_bytes / self._bytes_per_s
            return max(0.0, self._free_at - now)


class ShapedProxy:
    """Listens on a port of loopback and passes what comes on to another, each direction at the link's rate.

    All connections share the link. Use as a context. It has an address of its own, so that a client finds no
    other port of the server there, on which it could go round the link.
    """

    def __init__(self, target_port: int, gbit: float) -> None:
        self._target = ("127.0.0.1", target_port)
        self._buckets = (TokenBucket(gbit), TokenBucket(gbit))
        self._listener = socket.create_server((_HOST, 0))
        self.address = f"{_HOST}:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for end in self._sockets:
            _shut(end)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._sockets):
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._sockets += [near, far]
            for source, sink, bucket in ((near, far, self._buckets[0]), (far, near, self._buckets[1])):
                self._threads.append(threading.Thread(target=_pump, args=(source, sink, bucket)))
                self._threads[-1].start()


@contextlib.contextmanager
def shaped_process(target_port: int, gbit: float) -> Iterator[str]:
    """The address of a proxy that takes no processor time from this process, nor Python's lock."""
    command = [sys.executable, "-m", "benchmarks.shaped_link", str(target_port), str(gbit)]
    proxy = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
    try:
        assert proxy.stdout is not None  # it is a pipe
        address = proxy.stdout.readline().strip()
        if not address:
            raise RuntimeError("the proxy did not start; what it says is above")
        yield address
    finally:
        proxy.communicate()


def _pump(source: socket.socket, sink: socket.socket, bucket: TokenBucket) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        while num_bytes := source.recv_into(buffer):
            delay_s = bucket.delay_s(num_bytes, time.monotonic())
            if delay_s:
                time.sleep(delay_s)
            sink.sendall(buffer[:num_bytes])
    except OSError:
        pass
    _shut(sink)


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


if __name__ == "__main__":
    with ShapedProxy(int(sys.argv[1]), float(sys.argv[2])) as of_this_process:
        print(of_this_process.address, flush=True)
        sys.stdin.read()
