"""A tq-store server on a fixed port with a disk, which can be killed, damaged and started again."""

import socket
from pathlib import Path

from store.server_process import ServerProcess


class StoreOnDisk:
    """Everything is on disk soon after it is put; memory holds little."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
            self.ports = free.getsockname()[1], other.getsockname()[1]
            """Of its address and for payloads, the same when it serves again."""
        self._folder = folder
        self._process: ServerProcess | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    def start(self) -> None:
        """Serve again; it may be serving."""
        if self._process is not None:
            return
        self._process = ServerProcess(
            *("--memory-budget", "256MiB", "--disk-path", self._folder, "--disk-budget", "2GiB"),
            *("--payload-port", self.ports[1]),
            listen=self.address,
        )

    def kill(self) -> None:
        """As if the machine went off; may be called twice."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def metric(self, name: str) -> float:
        assert self._process is not None
        return self._process.metric(name)

    def files(self) -> set[Path]:
        """Files of blocks that are whole."""
        return {path for path in (self._folder / "blocks").rglob("*") if path.is_file()}

    def damage(self, files: set[Path]) -> int:
        """Flip a bit in the middle of files; how many."""
        damaged = 0
        for path in files:
            data = bytearray(path.read_bytes())
            if len(data) > 1000:
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
                damaged += 1
        return damaged
