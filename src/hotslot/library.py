"""Adapters by name: what is known of each, and those that wait in host memory, within a budget.

An adapter whose files are at hand may go from memory and be read again, so that of thousands that are known some wait.
One that is live, was live before, is about to be, or has no other place, stays.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .blending import Blend, Blender
from .cache import Cache, Room, Tier, user_folder
from .cache.packed import PackedFiles
from .cache.spilled import Spilled, SpillFile
from .checkpoint import Checkpoint, Files, Sink, keep_buffer, read_files
from .entry import Entry
from .errors import CacheFullError, ChangedError, UnknownAdapterError
from .pipelines import Request


@dataclass(slots=True, eq=False)
class Known:
    """What is known of an adapter, whether it is in memory or not.

    Attributes:
        name: that the user has given it.
        source: from which it is read, and read again; None once it is held if its tensors were given, and are in memory
            alone.
        nbytes: of host memory that reading it takes.
        version: digest of what was read; None as long as only the header was.
        pinned: whether the user wants it to stay in memory.
    """

    name: str
    source: Request | Spilled | None
    nbytes: int
    version: str | None = None
    pinned: bool = False


@dataclass(eq=False)
class Loan:
    """Adapters that stay in memory as long as the block lasts in which they are lent, or whoever has this.

    Attributes:
        entries: by name.
        seconds: that reading those took which were not in memory; None if all were.
    """

    entries: dict[str, Entry]
    seconds: float | None = None


class Library:
    """name → adapter, in the order of loading. Whoever calls it holds no lock, unless it says otherwise.

    Args:
        cache: budgets.
        lock: held while anything changes, and never while a file is read.
        pin_memory: whether a GPU will read what is in memory.
        open: gives the Checkpoint of a source, and raises what is wrong with it; called without the lock. Where a file
            has to be read for it, its bytes go on to the sink.
        packed_as: gives the files that a source's packed file stands for, if it may have one.
        make: gives the Entry of a name and a Checkpoint, made ready for the model; called with the lock held.
        is_used: whether what is live, or was before, has its values there; called with the lock held.
    """

    def __init__(
        self,
        cache: Cache,
        lock: AbstractContextManager[Any],
        *,
        pin_memory: bool,
        open: Callable[[Request, Sink | None], Checkpoint],
        packed_as: Callable[[Request], Files | None],
        make: Callable[[str, Checkpoint], Entry],
        is_used: Callable[[Entry], bool],
    ) -> None:
        self._lock = lock
        self._pin_memory = pin_memory
        self._open, self._packed_as, self._make, self._is_used = open, packed_as, make, is_used
        self._known: dict[str, Known] = {}
        self._loans: weakref.WeakSet[Loan] = weakref.WeakSet()  # a block that is broken off lends no more
        self._reading = threading.RLock()  # one at a time, each by many threads: so three adapters are budget enough
        self._tier: Tier[Entry] = Tier(cache.host_bytes, keeps=self._keeps)
        self._packed = self._spill_file = None
        self._packing: dict[Future[None], Loan] = {}
        if cache.disk_bytes != 0:
            folder = Path(cache.folder) if cache.folder is not None else user_folder() / "packed"
            self._packed = PackedFiles(folder.absolute(), cache.disk_bytes)
            if cache.host_bytes is not None:  # else nothing has to leave memory
                self._spill_file = SpillFile(folder.absolute(), cache.disk_bytes)
        self.blender = Blender(self._tier)
        self.hits = self.misses = 0
        _libraries.add(self)

    # -- what there is, with the lock held or not -------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._known))

    @property
    def nbytes(self) -> int:
        """Bytes of host memory: of adapters, of blends of them, and of what is being read."""
        self._settle()
        return self.held_bytes

    @property
    def held_bytes(self) -> int:
        """`nbytes` without the library's lock: what could be let go of by now, and was not yet, counts too."""
        return self._tier.nbytes

    @property
    def waiting(self) -> int:
        """How many adapters are in memory."""
        return sum(not isinstance(entry, Blend) for _, entry in self._tier.items())

    @property
    def evictions(self) -> int:
        """How often an adapter, or a blend, has gone from memory because others needed the room."""
        return self._tier.evictions

    def entries(self) -> list[Entry]:
        """What is in memory, blends included, and what is lent, though it was unloaded since."""
        lent = [entry for loan in self._loans for entry in loan.entries.values()]
        return list(dict.fromkeys([*(entry for _, entry in self._tier.items()), *lent]))

    def known(self, name: str) -> Known:
        """What is known of an adapter.

        Raises:
            UnknownAdapterError: no adapter of that name is loaded.
        """
        try:
            return self._known[name]
        except KeyError:
            names = [repr(name) for name in self]
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            raise UnknownAdapterError(
                f"No adapter {name!r} is loaded.",
                found=f"loaded: {', '.join(names[:20]) or 'none'}{more}",
                hint=f"swapper.load({name!r}, source) first",
            ) from None

    def pins(self, name: str) -> bool:
        """Whether what has this name is to stay in memory."""
        known = self._known.get(name)
        return known is not None and known.pinned

    def peek(self, name: str) -> Entry | None:
        """The adapter, if it is in memory. That is no use of it."""
        return self._tier.peek(name)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes that are accounted are those that are held, and within the budget."""
        with self._lock:
            self._tier.check_integrity()
            for name, entry in self._tier.items():
                assert name in self._known or self.blender.holds(entry), f"nobody's: {name!r}"
            if self._spill_file is not None:
                sources = (known.source for known in self._known.values())
                self._spill_file.check_integrity(source for source in sources if isinstance(source, Spilled))

    # -- what comes and goes ----------------------------------------------------------------------------------------

    def load(self, name: str, source: Request) -> None:
        """Read an adapter and hold it, in place of what had its name.

        Raises:
            CheckpointError, DoesNotFitError, UnsupportedError: what is wrong with it; what had its name is held on.
            CacheFullError: there is no room for it.
        """
        with self._reading:
            self._bring(Known(name, source, source.nbytes))

    def know(self, name: str, source: Request, nbytes: int) -> None:
        """Hold what is known of an adapter, in place of what had its name, and read it when it is needed."""
        with self._lock:
            _to_the_end(functools.partial(self._replace, Known(name, source, nbytes)))

    def spill(self, checkpoint: Checkpoint) -> Spilled | None:
        """Write an adapter whose tensors were given to where it is read again, as long as anybody has what this gives.

        None if there is no such place: then it has to stay in memory. Called without the lock.
        """
        if self._packed is None or self._spill_file is None:
            return None
        spilled = self._spill_file.write(checkpoint)
        if spilled is not None:
            self._packed.leave(self._spill_file.nbytes)
        return spilled

    def hold(self, entry: Entry, source: Request | Spilled | None, room: Room | None = None) -> None:
        """Hold an adapter that was read and made ready elsewhere, in place of what had its name.

        Args:
            entry: the adapter.
            source: from which it is read again; None if it cannot be. A Checkpoint is spilled.
            room: that was made for it.

        Raises:
            CacheFullError: there is no room for it.
        """
        if isinstance(source, Checkpoint):
            source = self.spill(entry.adapter.checkpoint)
        with self._lock:
            self._put(Known(entry.name, source, entry.nbytes), entry, room or Room())

    @contextmanager
    def room(self, nbytes: int, name: str) -> Iterator[Room]:
        """For a block: bytes are reserved for what is about to be read or made.

        Raises:
            CacheFullError: there is no room for as many.
        """
        room = Room()
        try:
            try:
                self._reserve(room, nbytes, name)
            except CacheFullError:
                if not self._packing:
                    raise
                self.finish_packing()
                self._reserve(room, nbytes, name)
            yield room
        finally:
            room.nbytes = 0

    def enlarge(self, room: Room, nbytes: int, name: str) -> None:
        """Let a room have at least so many bytes.

        Raises:
            CacheFullError: there is no room for as many.
        """
        if nbytes > room.nbytes:
            self._reserve(room, nbytes - room.nbytes, name)

    def remove(self, name: str) -> Known:
        """Let go of an adapter, and of blends with it."""
        with self._lock:
            known = self.known(name)
            _to_the_end(functools.partial(self._take_out, name))
            self._settle()
            return known

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self.blender.clear()
            self._known.clear()
            self._tier.clear()
            self._spill_file = None

    @contextmanager
    def lent(self, names: Collection[str], sink: Sink | None = None) -> Iterator[Loan]:
        """For a block: adapters in memory, read if they were not there; then their bytes go on to the sink meanwhile.

        Raises:
            UnknownAdapterError: no adapter of that name is loaded.
            CheckpointError: its files are not there any more, or not those that were loaded.
            CacheError: what was spilled of it is damaged.
            CacheFullError: there is no room for it beside what is in use.
        """
        self._settle()
        loan = self._open_loan()
        try:
            for name in names:
                if not self._lend(name, loan):
                    started = time.perf_counter()
                    self._lend_read(name, loan, sink)
                    loan.seconds = (loan.seconds or 0.0) + time.perf_counter() - started
            yield loan
        finally:
            loan.entries = {}

    @contextmanager
    def kept(self, entry: Entry | None) -> Iterator[None]:
        """For a block: an entry, and what it borrows from, stays accounted. With the lock held or not."""
        loan = self._open_loan(*([] if entry is None else [entry, *entry.lenders]))
        try:
            yield
        finally:
            loan.entries = {}

    def finish_packing(self) -> None:
        """Wait until no adapter has to stay in memory because it is being packed."""
        wait(tuple(self._packing))

    def weigh(self, entry: Entry) -> None:
        """Take the size of an adapter anew."""
        if self._tier.peek(entry.name) is entry:
            self._tier.weigh(entry.name)

    def evict(self, name: str) -> bool:
        """Let go of an adapter's memory; says whether it was there.

        Raises:
            UnknownAdapterError: no adapter of that name is loaded.
            CacheFullError: it is in use, pinned, or in no other place.
        """
        with self._lock:
            self.known(name)
            entry = self._tier.peek(name)
            if entry is None or not self._needs(entry):
                self.blender.forget(name)
            return self._tier.evict(name) is not None

    # -- inside -----------------------------------------------------------------------------------------------------

    def _keeps(self, entry: Entry) -> bool:
        """Whether an adapter has to stay in memory now."""
        return self._needs(entry) or self.blender.shares(entry)

    def _needs(self, entry: Entry) -> bool:
        """Whether it has to, also if no blend of it is held."""
        if any(entry in loan.entries.values() for loan in self._loans) or self._is_used(entry):
            return True
        known = self._known.get(entry.name)
        return known is not None and self._tier.peek(entry.name) is entry and (known.pinned or known.source is None)

    def _open_loan(self, *entries: Entry) -> Loan:
        loan = Loan({entry.name: entry for entry in entries})
        with self._lock:
            self._loans.add(loan)
        return loan

    def _lend(self, name: str, loan: Loan, *, waited: bool = False) -> bool:
        """Add what is in memory to the loan; says whether it is. Who has waited until it was has not hit it."""
        with self._lock:
            self.known(name)
            entry = self._tier.get(name)
            if entry is not None:
                loan.entries[name] = entry
                self.hits += not waited
                self.misses += waited
            return entry is not None

    def _lend_read(self, name: str, loan: Loan, sink: Sink | None) -> None:
        """Add what has to be read, unless another thread has just done so."""
        with self._reading:
            while not self._lend(name, loan, waited=True):
                if self._bring(self.known(name), loan, sink):
                    self.misses += 1
                    return

    def _bring(self, known: Known, loan: Loan | None = None, sink: Sink | None = None) -> bool:
        """Read an adapter and hold it; says whether it is the one that was read.

        Args:
            known: of the adapter.
            loan: what it is added to, unless it has lost its name meanwhile. None: it takes the place of what has its
                name, unless that is the same.
            sink: where its bytes go on to.
        """
        with self.room(known.nbytes, known.name) as room:
            assert known.source is not None, "what cannot be read again does not go"
            checkpoint, pack = self._read(known.source, sink)
            if isinstance(known.source, Checkpoint):
                known.source = self.spill(checkpoint)
            with self._lock:
                if loan is not None and self._known.get(known.name) is not known:
                    return False
                held = self._known.get(known.name) if known.name in self._tier else None
                if loan is None and held is not None and held.version == checkpoint.version:
                    held.source = known.source or held.source
                    return False
                if known.version not in (None, checkpoint.version):
                    raise _changed(known, checkpoint)
                entry = self._make(known.name, checkpoint)
                if loan is not None:
                    self.enlarge(room, entry.nbytes, known.name)
                    known.version, known.nbytes = entry.version, entry.adapter.checkpoint.nbytes
                    self._tier.add(known.name, entry, room)
                    loan.entries[known.name] = entry
                else:
                    self._put(known, entry, room)
                kept = (pack, self._open_loan(entry)) if pack is not None else None
        if kept is not None:
            packing = background("packing").submit(_pack, *kept)
            self._packing[packing] = kept[1]
            packing.add_done_callback(lambda done: self._packing.pop(done, None))
        return True

    def _put(self, known: Known, entry: Entry, room: Room) -> None:
        """Hold an entry in the place of what has its name. If there is no room for it, nothing has changed."""
        self.enlarge(room, entry.nbytes, known.name)
        known.version, known.nbytes = entry.version, entry.adapter.checkpoint.nbytes

        def put() -> None:
            if self._tier.peek(known.name) is not entry:
                self._replace(known)
                self._tier.add(known.name, entry, room)

        _to_the_end(put)

    def _reserve(self, room: Room, nbytes: int, name: str) -> None:
        with self._lock:
            try:
                _keep_buffers(self._tier.reserve(room, nbytes, name))
                return
            except CacheFullError:
                if not len(self.blender):
                    raise
            self.blender.clear()  # some may keep adapters from going
            _keep_buffers(self._tier.reserve(room, nbytes, name))

    def _settle(self) -> None:
        """Let go of what was replaced or unloaded and is not live any more. Not by a swap: that is done when it is."""
        with self._lock:
            _keep_buffers(self._tier.settle())

    def _replace(self, known: Known) -> None:
        """Let a name stand for another adapter. May be repeated."""
        self.blender.forget(known.name)
        self._tier.retire(known.name)
        self._settle()
        former = self._known.get(known.name)
        if former is not None:
            known.pinned = former.pinned
            del self._known[known.name]  # the new one comes last
        self._known[known.name] = known

    def _take_out(self, name: str) -> None:
        """Let a name stand for nothing. May be repeated."""
        self.blender.forget(name)
        self._tier.retire(name)
        self._known.pop(name, None)

    def _read(self, source: Request | Spilled, sink: Sink | None) -> tuple[Checkpoint, Callable[[], object] | None]:
        """What a source holds; and what keeps it as a packed file, where that is to be done."""
        if isinstance(source, Spilled):
            return source.read(pin_memory=self._pin_memory, sink=sink), None
        files = self._packed_as(source) if self._packed is not None else None
        if self._packed is None or files is None:
            return self._open(source, sink), None
        try:
            stamp, read_ns = files.stamp(), time.time_ns()
            checkpoint = self._packed.read(files, stamp, pin_memory=self._pin_memory, sink=sink)
        except OSError:  # it is gone: which `open` says better
            return self._open(source, sink), None
        if checkpoint is not None:
            return self._open(checkpoint, None), None
        # What PEFT makes of an adapter for this model is not packed, what diffusers makes of a file is.
        if source is files:
            checkpoint = read_files(source, pin_memory=self._pin_memory, sink=sink)
        else:
            checkpoint = self._open(source, sink)
        return self._open(checkpoint, None), functools.partial(self._packed.write, files, stamp, read_ns, checkpoint)


def _pack(pack: Callable[[], object], loan: Loan) -> None:
    try:
        pack()
    finally:
        loan.entries = {}


def _to_the_end(step: Callable[[], None]) -> None:
    """Do what may be repeated; if it is broken off, all of it before that goes on."""
    try:
        step()
    except BaseException:
        step()
        raise


def _keep_buffers(gone: Iterable[Entry]) -> None:
    """For what is read next: the memory of what had to go for it, which is touched already."""
    for entry in gone:
        keep_buffer(entry.adapter.checkpoint.data)


def _changed(known: Known, found: Checkpoint) -> ChangedError:
    return ChangedError(
        f"The files of the adapter {known.name!r} have changed since it was loaded.",
        where=found.origin,
        found=f"version {found.version}",
        expected=f"version {known.version}, which was loaded",
        hint=f"swapper.load({known.name!r}, source) takes what is there now; attach(…, watch=True) does so by itself",
    )


@functools.cache
def background(purpose: str) -> ThreadPoolExecutor:
    """A thread for each purpose, since reading ahead may wait for packing; one, because each reading has many."""
    return ThreadPoolExecutor(1, thread_name_prefix=f"hotslot-{purpose}")


_libraries: weakref.WeakSet[Library] = weakref.WeakSet()
_at_rest = ExitStack()  # what is held of them while the process forks


def _before_fork() -> None:
    """Let nobody read or change anything: a lock that another thread holds now, nobody would ever give back."""
    for library in list(_libraries):
        _at_rest.enter_context(library._reading)
        _at_rest.enter_context(library._lock)
        _at_rest.enter_context(library._tier.at_rest())  # which is asked for its bytes without the other, too


def _after_in_child() -> None:
    """A fork has none of its parent's threads: what these were packing is kept for nobody."""
    background.cache_clear()
    for library in _libraries:
        for loan in library._packing.values():
            loan.entries = {}
        library._packing.clear()
    _at_rest.close()


os.register_at_fork(before=_before_fork, after_in_parent=_at_rest.close, after_in_child=_after_in_child)
