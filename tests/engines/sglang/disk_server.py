"""A server that tests kill, damage and start again at the same address."""

from pathlib import Path

from store.running_server import wait_until
from store.server_process import ServerProcess

from tq_store.client import StoreClient


class DiskServer:
    """A server with a disk tier.

    Args:
        directory: Of the disk tier.
        page_bytes: No block is smaller.
    """

    def __init__(self, directory: Path, page_bytes: int) -> None:
        self._directory = directory
        self._page_bytes = page_bytes
        self.address = "127.0.0.1:0"

    def start(self) -> None:
        disk = ("--disk-path", self._directory, "--disk-budget", "16MiB")
        self._process = ServerProcess(*disk, listen=self.address)
        self.address = self._process.address

    def stop(self) -> None:
        self._process.close()

    def wait_until_stored(self, num_blocks: int) -> None:
        with StoreClient(self.address) as client:
            wait_until(lambda: client.stats().tiers["disk"].num_blocks == num_blocks)

    def purge(self) -> None:
        """Remove all blocks."""
        with StoreClient(self.address) as client:
            client.purge(None)

    def damage(self) -> None:
        """Flip a bit in the middle of each page on disk."""
        for file in self._directory.rglob("*"):
            if file.is_file() and file.stat().st_size > self._page_bytes:
                data = bytearray(file.read_bytes())
                for place in range(self._page_bytes // 2, len(data), self._page_bytes):
                    data[place] ^= 1
                file.write_bytes(data)
