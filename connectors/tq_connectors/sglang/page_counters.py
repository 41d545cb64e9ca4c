"""PageCounters: what was moved and what went wrong, counted on several threads."""

import threading
from dataclasses import dataclass, field, fields


@dataclass(slots=True)
class PageCounters:
    """Since the start, in pages and bytes of blocks."""

    loaded_pages: int = 0
    loaded_bytes: int = 0
    failed_pages: int = 0
    """Pages asked for that were not there, late, not sound or no longer wanted."""
    saved_pages: int = 0
    present_pages: int = 0
    """Pages to save that the store had."""
    refused_pages: int = 0
    """Pages to save that the store did not take."""
    rejected_blocks: int = 0
    """Sound blocks that were not what their key promises."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **more: int) -> None:
        """Count some more of each."""
        with self._lock:
            for name, count in more.items():
                setattr(self, name, getattr(self, name) + count)

    def by_name(self) -> dict[str, int]:
        """All of them, as they are together."""
        with self._lock:
            return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "_lock"}
