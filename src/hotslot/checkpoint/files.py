"""Where an adapter's files are, and what tells whether they are still those that were read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """What the file system says of an adapter's files: who reads the same stamp later has the same files before him.

    That holds if the files were not changed within the clock's grain of its making; see `settled`.

    Attributes:
        text: paths, devices, inodes, sizes and times.
        changed_ns: when one of the files was last changed, in nanoseconds.
    """

    text: str
    changed_ns: int

    def settled(self, read_ns: int) -> bool:
        """Whether a change after `read_ns`, when the files were read, must have given them another stamp."""
        return self.changed_ns + GRAIN_NS < read_ns


# A file that is changed twice within one tick of its file system's clock has one stamp for two contents. Ticks are
# 4 ms on ext4, 1 s on NFS of old, 2 s on FAT. git calls such files racily clean, and reads them again too.
GRAIN_NS = 2_000_000_000


@dataclass(frozen=True)
class Files:
    """An adapter in a folder.

    Attributes:
        weights: the safetensors file.
        config: adapter_config.json; only its folder matters if `given` is not None.
        given: the text of a config that was given in place of that file.
        origin: what the user called the adapter, for messages.
    """

    weights: Path
    config: Path
    given: bytes | None
    origin: str

    @cached_property
    def key(self) -> str:
        """The same for the same places, whatever is in them."""
        given = None if self.given is None else self.given.decode()
        return json.dumps([os.path.abspath(self.weights), os.path.abspath(self.config), given])

    @classmethod
    def of_stamp(cls, text: str) -> Files:
        """Those of which `Stamp.text` is.

        Raises:
            ValueError: it is of none.
        """
        try:
            weights, config, given = json.loads(json.loads(text)[0])
            return cls(Path(weights), Path(config), None if given is None else given.encode(), weights)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"no stamp of files: {text:.80}") from error

    @property
    def nbytes(self) -> int:
        """Bytes of the file of weights: a few more than those of the weights."""
        try:
            return os.stat(self.weights).st_size
        except OSError:  # which whoever reads it says better
            return 0

    def stamp(self) -> Stamp:
        """What the file system says of them now, links followed.

        Raises:
            OSError: one of them is gone.
        """
        paths = [self.weights, self.config] if self.given is None else [self.weights]
        stats = [os.stat(path) for path in paths]
        told = [[s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in stats]
        return Stamp(json.dumps([self.key, told]), max(max(s.st_mtime_ns, s.st_ctime_ns) for s in stats))
