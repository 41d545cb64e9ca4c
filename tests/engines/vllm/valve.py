"""A valve in front of a server: what the server sends passes, until the valve lets no more through."""

import contextlib
import socket
import threading
from collections.abc import Sequence

_READ_BYTES = 1 << 16


class Valve:
    """Passes everything on to ports of 127.0.0.1. Use as a context.

    It listens on the same ports of an address of its own, where a client finds all ports that a server names
    behind the valve.

    Args:
        ports: That of the server's address first.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self._listeners = [socket.create_server(("127.0.0.2", port)) for port in ports]
        self.address = f"127.0.0.2:{ports[0]}"
        self._changed = threading.Condition()
        self._left: int | None = None
        self._cuts = 0
        self.is_shut = threading.Event()
        """Set when something is held back."""

    def shut_after(self, num_bytes: int) -> None:
        """Let so many bytes of the server's through, and then nothing until it opens."""
        with self._changed:
            self._left = num_bytes
            self.is_shut.clear()

    def open(self) -> None:
        """Let everything through again."""
        with self._changed:
            self._left = None
            self._changed.notify_all()

    def cut(self) -> None:
        """Drop what is held back, and its connection; others are let through."""
        with self._changed:
            self._left = None
            self._cuts += 1
            self._changed.notify_all()

    def __enter__(self) -> "Valve":
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        for listener in self._listeners:
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        target = ("127.0.0.1", listener.getsockname()[1])
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                try:
                    server = socket.create_connection(target)
                except OSError:
                    client.close()
                    continue
                for source, sink, is_downward in ((client, server, False), (server, client, True)):
                    pump = threading.Thread(target=self._pump, args=(source, sink, is_downward), daemon=True)
                    pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_downward: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                if is_downward:
                    self._pass(len(data))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _pass(self, num_bytes: int) -> None:
        with self._changed:
            if self._left is not None:
                self._left -= num_bytes
                if self._left < 0:
                    self.is_shut.set()
                    cuts = self._cuts
                    self._changed.wait_for(lambda: self._left is None)
                    if self._cuts > cuts:
                        raise ConnectionAbortedError
