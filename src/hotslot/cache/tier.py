"""A tier: what waits under its name in one kind of memory, accounted to the byte and bounded."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from ..errors import CacheFullError


class Sized(Protocol):
    """Anything that knows how many bytes of the tier's memory it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


T = TypeVar("T", bound=Sized)


class Tier(Generic[T]):
    """name → item, and never more bytes of them than the limit: what was not used for longest goes first.

    An item's size is taken when it is added; if it changes, `weigh` it anew. Any thread may call anything. Nothing is
    called back with items that have gone: methods that evict return them, so that their owner, who has locks of its
    own, lets go of what belongs to them. Using, adding and evicting one item costs the same with ten as with 10,000.

    Args:
        limit_bytes: of all items; None: as many as there is memory for.
        keeps: says of an item that it may not be evicted now, such as one that is live. It is asked with the tier's
            lock held and must not call the tier.
        memory: what the bytes are of, for messages.
    """

    def __init__(
        self,
        limit_bytes: int | None = None,
        *,
        keeps: Callable[[T], bool] = lambda item: False,
        memory: str = "host memory",
    ) -> None:
        self.limit_bytes = limit_bytes
        self._keeps = keeps
        self._memory = memory
        self._lock = threading.RLock()
        self._items: dict[str, T] = {}
        self._sizes: dict[str, int] = {}
        self._order: OrderedDict[str, None] = OrderedDict()  # of what is not pinned, the least recently used first
        self._pins: Counter[str] = Counter()
        self._nbytes = self._reserved = 0

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all items, and of what is reserved."""
        return self._nbytes + self._reserved

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[str]:
        """Names, as they were added; a copy, so that the tier may change meanwhile."""
        with self._lock:
            return iter(list(self._items))

    def values(self) -> list[T]:
        """All items, as they were added. That is no use of them."""
        with self._lock:
            return list(self._items.values())

    def peek(self, name: str) -> T | None:
        """The item, if it is here; that is no use of it."""
        return self._items.get(name)

    def get(self, name: str) -> T | None:
        """The item, if it is here: now the last one that would go."""
        with self._lock:
            item = self._items.get(name)
            if name in self._order:
                self._order.move_to_end(name)
            return item

    # -- what comes and goes ----------------------------------------------------------------------------------------

    def add(self, name: str, item: T, *, reserved: int = 0) -> list[T]:
        """Hold an item, in place of what was under its name, whose pins it inherits. Returns what had to go for it.

        Args:
            name: of the item.
            item: what is held.
            reserved: bytes that were reserved for it and are not any more once it is held.

        Raises:
            CacheFullError: it does not fit beside what may not go. Nothing has changed, the reservation included.
        """
        with self._lock:
            size = item.nbytes
            gone = self._make_room(size - reserved - self._sizes.get(name, 0), name)
            known = self._forget(name)
            self._items[name], self._sizes[name] = item, size
            self._nbytes += size
            self._reserved -= reserved
            if not self._pins[name]:
                self._order[name] = None
            return gone if known is None else [*gone, known]

    def reserve(self, nbytes: int, name: str = "") -> list[T]:
        """Count bytes that are about to be filled, and make room for them. Returns what had to go.

        Raises:
            CacheFullError: there is no room for as many. Nothing has changed.
        """
        with self._lock:
            gone = self._make_room(nbytes, name)
            self._reserved += nbytes
            return gone

    def release(self, nbytes: int) -> None:
        """Count no longer what was reserved and came to nothing."""
        with self._lock:
            self._reserved -= nbytes

    def remove(self, name: str) -> T | None:
        """Let go of an item, pinned or not, and of its pins; None if there is none."""
        with self._lock:
            self._pins.pop(name, None)
            return self._forget(name)

    def evict(self, name: str) -> T | None:
        """Let go of an item as if there were no room; None if there is none.

        Raises:
            CacheFullError: it is pinned, or may not go now.
        """
        with self._lock:
            item = self._items.get(name)
            if item is not None and (self._pins[name] or self._keeps(item)):
                raise CacheFullError(
                    f"{name!r} cannot leave {self._memory} now.",
                    where=name,
                    found="pinned" if self._pins[name] else "in use, or of no other place than this",
                    expected="an item that is neither",
                    hint="unpin it, or swap to another one, before",
                )
            return self._forget(name)

    def pin(self, name: str) -> bool:
        """Evict the item of this name no more until it is unpinned as often as it was pinned. Says if it is here."""
        with self._lock:
            if name not in self._items:
                return False
            self._pins[name] += 1
            self._order.pop(name, None)
            return True

    def unpin(self, name: str) -> None:
        """Take back one `pin`; the item counts as used now."""
        with self._lock:
            if self._pins[name] > 1:
                self._pins[name] -= 1
            elif self._pins.pop(name, 0) and name in self._items:
                self._order[name] = None

    def weigh(self, name: str) -> list[T]:
        """Take an item's size anew. If it has grown, others go as far as they may, and are returned."""
        with self._lock:
            item = self._items.get(name)
            if item is None:
                return []
            size = item.nbytes
            self._nbytes += size - self._sizes[name]
            self._sizes[name] = size
            return [self._take(victim) for victim in self._victims(self._excess(0), name)]

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            for name in list(self._items):
                self.remove(name)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes that are accounted are those that are held, and within the limit."""
        with self._lock:
            sizes = {name: item.nbytes for name, item in self._items.items()}
            assert sizes == self._sizes, f"accounted {self._sizes}, held {sizes}"
            assert self._nbytes == sum(sizes.values()), f"accounted {self._nbytes}, held {sum(sizes.values())}"
            assert self._reserved >= 0
            assert set(self._order) | set(+self._pins) == set(self._items), "an item is neither to be used nor pinned"
            assert not set(self._order) & set(+self._pins), "an item is pinned and may be evicted"
            assert self.limit_bytes is None or self.nbytes <= self.limit_bytes, f"{self.nbytes} > {self.limit_bytes}"

    # -- inside, with the lock held ---------------------------------------------------------------------------------

    def _excess(self, more: int) -> int:
        """Bytes beyond the limit, with `more` of them."""
        return 0 if self.limit_bytes is None else self.nbytes + more - self.limit_bytes

    def _victims(self, nbytes: int, besides: str) -> list[str]:
        """Who goes for so many bytes, or all who may if that is not enough; not the item of the name `besides`."""
        chosen: list[str] = []
        for name in self._order:
            if nbytes <= 0:
                break
            if name != besides and not self._keeps(self._items[name]):
                chosen.append(name)
                nbytes -= self._sizes[name]
        return chosen

    def _make_room(self, more: int, name: str) -> list[T]:
        excess = self._excess(more) if more > 0 else 0
        chosen = self._victims(excess, name)
        if sum(self._sizes[victim] for victim in chosen) < excess:
            staying = self.nbytes - sum(self._sizes[victim] for victim in chosen)
            raise CacheFullError(
                f"{name!r} does not fit into {self._memory}.",
                where=name or None,
                found=f"{more:,} bytes more, beside {staying:,} that are pinned, in use, or have no other place",
                expected=f"{self.limit_bytes:,} bytes at most in all, by the cache's limit",
                hint="unpin or unload adapters, or raise the limit",
            )
        return [self._take(victim) for victim in chosen]

    def _take(self, name: str) -> T:
        item = self._forget(name)
        assert item is not None
        return item

    def _forget(self, name: str) -> T | None:
        item = self._items.pop(name, None)
        if item is not None:
            self._nbytes -= self._sizes.pop(name)
            self._order.pop(name, None)
        return item
