"""The last few things that were made of something, so that they need not be made again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """What a thing was made of → the thing, of those asked for last. For any number of threads."""

    def __init__(self, kept: int = 16) -> None:
        self._kept = kept
        self._made: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The thing, or None."""
        with self._lock:
            made = self._made.get(key)
            if made is not None:
                self._made.move_to_end(key)
            return made

    def put(self, key: K, made: V) -> None:
        """Keep it, in the place of the one that nobody has asked for the longest time."""
        with self._lock:
            self._made[key] = made
            self._made.move_to_end(key)
            if len(self._made) > self._kept:
                self._made.popitem(last=False)
