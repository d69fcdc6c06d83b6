"""Adapters whose tensors were given, on disk while others need the memory: bytes in a file that has no name.

So no other process takes it for its own, and however this one ends, the file is gone with it.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from ..checkpoint import Checkpoint, Schema, Sink, host_buffer
from ..errors import CacheError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Spilled:
    """An adapter's place in the file, which others may take once nobody has this any more.

    Attributes:
        file: that it is in.
        start: where its bytes begin there.
        schema: of the adapter, as the version and the origin.
    """

    file: SpillFile
    start: int
    schema: Schema
    version: str
    origin: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.schema.nbytes

    def read(self, *, pin_memory: bool = False, sink: Sink | None = None) -> Checkpoint:
        """The adapter as it was written.

        Args:
            pin_memory: read it into page-locked memory.
            sink: gets the pieces as they are read.

        Raises:
            CacheError: it cannot be read, or has become another one.
        """
        data = host_buffer(self.nbytes, pin_memory=pin_memory)
        target = data.numpy().data

        def fill(start: int, stop: int) -> None:
            os.preadv(self.file.fileno(), [target[start:stop]], self.start + start)  # what it leaves out, shows below

        try:
            found = Checkpoint.known(self.schema, data, self.version, self.origin, fill, sink)
            if found is not None:
                return found
            problem = "values of another version"
        except OSError as error:
            problem = f"{type(error).__name__}: {error}"
        raise CacheError(
            f"What was kept on disk of {self.origin} cannot be taken.",
            where=self.file.folder,
            found=problem,
            expected=f"version {self.version}, which was written",
            hint="load it again",
        )


class SpillFile:
    """Room on disk for adapters that are in no other place. Any thread may call anything.

    A fork can read what its parent has written, until that needs the place, and writes nothing.

    Args:
        folder: on whose file system it is; nothing is seen of it there.
        limit_bytes: of the file. None: no limit.

    Attributes:
        nbytes: of the file.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._holes: list[range] = []  # in the file, as of the last writing
        self._freed: deque[range] = deque()  # since then; by the garbage collector, which can wait for no lock

    def fileno(self) -> int:
        """Of the open file, in which something was written."""
        assert self._file is not None
        return self._file.fileno()

    def write(self, checkpoint: Checkpoint) -> Spilled | None:
        """Write an adapter's bytes. None if there is no room for them, by the limit or on the disk."""
        if os.getpid() != self._owner:
            return None
        try:
            place = self._take(checkpoint.nbytes)
            if place is None:
                return None
            spilled = Spilled(self, place.start, checkpoint.schema, checkpoint.version, checkpoint.origin)
            weakref.finalize(spilled, self._freed.append, place).atexit = False
            data, at = checkpoint.data.numpy().data, place.start
            while data:
                written = os.pwrite(self.fileno(), data, at)
                data, at = data[written:], at + written
            return spilled
        except OSError as error:
            logger.warning("%s stays in memory, for it cannot be written to disk: %s", checkpoint.origin, error)
            return None

    def check_integrity(self, held: Iterable[Spilled]) -> None:
        """Raise AssertionError unless each of these has its bytes for itself, and all are within the limit."""
        with self._lock:
            places = [range(one.start, one.start + one.nbytes) for one in held if one.file is self]
            taken = sorted((place for place in (*places, *self._holes) if place), key=lambda place: place.start)
            assert all(one.stop <= other.start for one, other in pairwise(taken)), taken
            assert not taken or taken[-1].stop <= self.nbytes, f"{taken[-1]} in {self.nbytes}"
            assert self.limit_bytes is None or self.nbytes <= self.limit_bytes, f"{self.nbytes} > {self.limit_bytes}"

    def _take(self, nbytes: int) -> range | None:
        """A place for so many bytes. Broken off between any two lines, it leaves some unused, and none used twice."""
        with self._lock:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  it stays open
                weakref.finalize(self, self._file.close)
            if self._freed:
                self._mend()
            for number, hole in enumerate(self._holes):
                if len(hole) >= nbytes:
                    self._holes[number] = hole[nbytes:]
                    return hole[:nbytes]
            if self.limit_bytes is not None and self.nbytes + nbytes > self.limit_bytes:
                return None
            self.nbytes += nbytes
            return range(self.nbytes - nbytes, self.nbytes)

    def _mend(self) -> None:
        """Make one hole of those side by side, and give the one at the end back to the disk."""
        while self._freed:
            self._holes.append(self._freed.popleft())
        mended: list[range] = []
        for hole in sorted(filter(None, self._holes), key=lambda hole: hole.start):
            if mended and mended[-1].stop == hole.start:
                mended[-1] = range(mended[-1].start, hole.stop)
            else:
                mended.append(hole)
        last = mended.pop() if mended and mended[-1].stop == self.nbytes else None
        self._holes = mended
        if last is not None:
            self.nbytes = last.start
            os.ftruncate(self.fileno(), self.nbytes)
