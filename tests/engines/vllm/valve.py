"""A valve in front of a server: what the server sends passes, until the valve lets no more through."""

import contextlib
import socket
import threading

_READ_BYTES = 1 << 16


class Valve:
    """Listens on a port of loopback and passes everything on to an address. Use as a context."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
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
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
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
