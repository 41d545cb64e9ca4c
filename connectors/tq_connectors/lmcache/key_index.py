"""What this process knows of its objects in the store: sizes, locks, and deletions that are not done yet."""

import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class KeyIndex(Generic[Key]):
    """Sizes and locks by key. Safe to use from several threads; nothing here waits for the store.

    A locked object is not deleted before its last unlock. An object that is being deleted is gone for
    readers, and may not be stored again before the store has forgotten it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sizes: dict[Key, int] = {}
        self._locks: Counter[Key] = Counter()
        self._doomed: set[Key] = set()
        self._leaving: Counter[Key] = Counter()

    @property
    def num_objects(self) -> int:
        """Objects with a known size."""
        return len(self._sizes)

    @property
    def num_locked(self) -> int:
        """Objects that somebody holds."""
        return len(self._locks)

    def add(self, key: Key, num_bytes: int) -> bool:
        """Note an object; False when it was known."""
        with self._changed:
            if key in self._sizes:
                return False
            self._sizes[key] = num_bytes
            return True

    def forget(self, keys: Iterable[Key]) -> list[tuple[Key, int]]:
        """Note that objects are not there; those that were known, with their sizes."""
        with self._changed:
            return self._forget(keys)

    def lock(self, keys: Iterable[Key]) -> None:
        """Hold objects once more."""
        with self._changed:
            self._locks.update(keys)

    def unlock(self, keys: Iterable[Key]) -> list[Key]:
        """Hold objects once less; those whose deletion waited for it. One unlock too many does nothing."""
        due = []
        with self._changed:
            for key in keys:
                if self._locks[key] > 1:
                    self._locks[key] -= 1
                    continue
                del self._locks[key]
                if key in self._doomed:
                    self._doomed.discard(key)
                    due.append(key)
        return due

    def begin_deletion(self, keys: Iterable[Key]) -> tuple[list[Key], list[tuple[Key, int]]]:
        """Take objects out, but for those that are locked, which go with their last unlock.

        Returns:
            Keys to delete from the store now, then `end_deletion`; and those that were known, with sizes.
        """
        with self._changed:
            wanted = list(dict.fromkeys(keys))
            self._doomed.update(key for key in wanted if key in self._locks)
            leaving = [key for key in wanted if key not in self._locks]
            self._leaving.update(leaving)
            return leaving, self._forget(leaving)

    def end_deletion(self, keys: Iterable[Key]) -> None:
        """The store has forgotten these, or failed to."""
        with self._changed:
            for key in keys:
                self._leaving[key] -= 1
                if self._leaving[key] <= 0:
                    del self._leaving[key]
            self._changed.notify_all()

    def is_leaving(self, key: Key) -> bool:
        """Whether an object is being deleted."""
        return key in self._leaving

    def wait_for_deletions(self, keys: Sequence[Key], timeout_s: float) -> bool:
        """Wait until none of the objects is being deleted; False when that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(key in self._leaving for key in keys), timeout_s)

    def known(self) -> list[tuple[Key, int]]:
        """All objects and their sizes, in the order in which they became known."""
        with self._changed:
            return list(self._sizes.items())

    def _forget(self, keys: Iterable[Key]) -> list[tuple[Key, int]]:
        return [(key, self._sizes.pop(key)) for key in keys if key in self._sizes]
