"""Loopback made as slow as a network link: by the kernel where it lets us, by a proxy of ours elsewhere.

`python -m benchmarks.shaped_link PORT[,PORT] GBIT` is the proxy as a process, and prints its address.
"""

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Self

_HOST = "127.0.0.2"
_CHUNK_BYTES = 256 << 10
_BURST_S = 0.005
"""What the kernel lets pass at once after a pause, as time."""
_LATE_S = 0.001
"""What the proxy lets pass at once after a pause: how late it may wake from a sleep and still catch up."""


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
            self._free_at = max(self._free_at, now - _LATE_S) + num_bytes / self._bytes_per_s
            return max(0.0, self._free_at - now)


class ShapedProxy:
    """Listens on ports and passes what comes on to the same ports of 127.0.0.1, at the rate of a link.

    All connections share the link, each direction for itself. Use as a context. It has an address of its own,
    on which a client finds these ports of the server only, so that it cannot go round the link.

    Args:
        ports: Of the server: first that of its address, then others of which it tells its clients.
        gbit: The rate, Gbit/s.
    """

    def __init__(self, ports: Sequence[int], gbit: float) -> None:
        self.address = f"{_HOST}:{ports[0]}"
        self._buckets = (TokenBucket(gbit), TokenBucket(gbit))
        self._sockets: list[socket.socket] = []
        self._listeners = [socket.create_server((_HOST, port)) for port in ports]
        self._acceptors = [threading.Thread(target=self._accept, args=(each,)) for each in self._listeners]
        self._pumps: list[threading.Thread] = []

    def __enter__(self) -> Self:
        for thread in self._acceptors:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            _shut(listener)
        for thread in self._acceptors:
            thread.join()
        for end in self._sockets:
            _shut(end)
        for thread in self._pumps:
            thread.join()
        for end in (*self._listeners, *self._sockets):
            end.close()

    def _accept(self, listener: socket.socket) -> None:
        target = ("127.0.0.1", listener.getsockname()[1])
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            try:
                far = socket.create_connection(target)
            except OSError:  # the server is gone
                _shut(near)
                continue
            self._sockets.append(far)
            for end in (near, far):  # what comes goes on at once, as on a wire, and waits for no answer
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink, bucket in ((near, far, self._buckets[0]), (far, near, self._buckets[1])):
                pump = threading.Thread(target=_pump, args=(source, sink, bucket))
                self._pumps.append(pump)
                pump.start()


@contextlib.contextmanager
def shaped_process(ports: Sequence[int], gbit: float) -> Iterator[str]:
    """The address of a proxy that takes no processor time from this process, nor Python's lock."""
    words = [",".join(map(str, ports)), str(gbit)]
    command = [sys.executable, "-m", "benchmarks.shaped_link", *words]
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
    with ShapedProxy([*map(int, sys.argv[1].split(","))], float(sys.argv[2])) as of_this_process:
        print(of_this_process.address, flush=True)
        sys.stdin.read()
