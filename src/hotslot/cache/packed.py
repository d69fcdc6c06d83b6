"""Packed files: adapters as they were read and proved once, kept on disk so that the next process need not.

One safetensors file each, which any safetensors library reads. Its header begins with hotslot's own metadata:

    {"__metadata__":{"hotslot_seal":"…","hotslot_format":"1","version":"…","config":"…","source":"…","read_ns":"…"},…

| hotslot_seal | xxh3_128 of all of the header that stands behind it, 32 hexadecimal digits |
| hotslot_format | "1" |
| version | `Checkpoint.version`: a digest of config, names, shapes, dtypes and values, so of all the data |
| config | the adapter's config, JSON |
| source | `Stamp.text`: paths, devices, inodes, sizes and times of the files that it was read from |
| read_ns | when that stamp was taken, nanoseconds since 1970 |

Who reads one trusts nothing of it: the header is sealed and bounded like any safetensors file's, and the bytes have to
give the version, in the same sweep that brings them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import heapq
import json
import logging
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ..checkpoint import (
    DTYPES,
    Checkpoint,
    Files,
    Schema,
    Sink,
    Stamp,
    open_file,
    parse_config,
    parse_header,
    schemas,
)
from ..errors import CacheError, CorruptFileError, HotslotError

logger = logging.getLogger(__name__)

FORMAT = "1"
_PREFIX = f"hotslot-{FORMAT}-"  # another format's files are others' business, and have other names
_SUFFIX = ".safetensors"
_OPENING = b'{"__metadata__":{"hotslot_seal":"'  # of each header; then the seal
_SEAL_END = len(_OPENING) + 32
_LOOK_SECONDS = 10.0  # after so many what other processes have done to the folder is looked at, which takes a while
_ABANDONED_SECONDS = 3600.0  # a file that is being written is finished by then, or nobody will
_ATTEMPTS = 5  # at a file that other processes replace meanwhile
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Found(NamedTuple):
    """What a packed file's header says."""

    version: str
    source: str
    read_ns: int
    schema: Schema


class PackedFiles:
    """The packed files of one folder. Any number of processes may share it; any thread may call anything.

    Args:
        folder: where they are; made for the user alone, if it is not there.
        limit_bytes: of all of them: what was not used for longest is deleted first. None: no limit.

    Raises:
        CacheError: the folder cannot be used, or others may write into it.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._left = 0
        self._sweeping = threading.Lock()
        self._looked = -_LOOK_SECONDS
        self._known: dict[Path, tuple[int, int]] = {}  # when it was used last, as far as known, and bytes
        self._oldest: list[tuple[int, Path]] = []  # a heap of these times, and of some that were known before
        self._known_bytes = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError as error:
            raise CacheError(
                "The folder of packed files cannot be used.",
                where=folder,
                found=f"{type(error).__name__}: {error}",
                expected="a folder, or a place for one",
                hint="give another folder",
            ) from error
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CacheError(
                "Others may write into the folder of packed files: adapters from there could be anybody's.",
                where=folder,
                found=f"owner {found.st_uid}, mode {stat.filemode(found.st_mode)}",
                expected=f"owner {os.getuid()}, and nobody else may write",
                hint=f"chmod go-w {folder}; or give another folder",
            )

    def path(self, files: Files) -> Path:
        """Where the packed file of these is, or would be."""
        return self.folder / name_for(files)

    def read(
        self, files: Files, stamp: Stamp, *, pin_memory: bool = False, sink: Sink | None = None
    ) -> Checkpoint | None:
        """The adapter in these files, from its packed file; None if there is none, or not of what they are now.

        A packed file that is damaged, or something else, is deleted.

        Args:
            files: whence it came.
            stamp: of them, taken now.
            pin_memory: read it into page-locked memory.
            sink: gets the pieces as they are read.
        """
        path = self.path(files)
        for _ in range(_ATTEMPTS):
            try:
                before = _identity(path)
                return self._read(path, files, stamp, pin_memory=pin_memory, sink=sink)
            except FileNotFoundError:
                return None
            except (_Damaged, HotslotError) as error:
                if _identity(path) != before:
                    continue  # another process has put another one there meanwhile, between two looks at it
                logger.warning("%s is no sound packed file, and is deleted: %s", path, error)
                _delete(path)
                return None
            except OSError as error:
                logger.warning("%s cannot be read: %s", path, error)
                return None
        return None

    def _read(
        self, path: Path, files: Files, stamp: Stamp, *, pin_memory: bool, sink: Sink | None
    ) -> Checkpoint | None:
        with open_file(path) as file:
            found = _unsealed(file.header, path)
            if found.source != stamp.text or not stamp.settled(found.read_ns):
                return None  # `write` will put another one in its place
            data, fill = file.data(found.schema.nbytes, pin_memory=pin_memory)
            known = Checkpoint.known(found.schema, data, found.version, files.origin, fill, sink)
        if known is None:
            raise _Damaged("values that are not those of its version")
        with contextlib.suppress(OSError):  # in a folder that others fill, and only they may change
            os.utime(path)  # used now: limits go by it
        return known

    def write(self, files: Files, stamp: Stamp, read_ns: int, checkpoint: Checkpoint) -> bool:
        """Keep an adapter that was read from `files`; says whether it is kept now.

        Args:
            files: whence it came.
            stamp: of them, taken before they were read.
            read_ns: `time.time_ns()` of when the stamp was taken.
            checkpoint: what was read.
        """
        path = self.path(files)
        header = pack_header(checkpoint, stamp.text, read_ns)
        size = 8 + len(header) + checkpoint.nbytes if header is not None else 0
        if header is None or (self.limit_bytes is not None and size > self.limit_bytes - self._left):
            return False
        temporary = self.folder / f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp"
        try:
            if files.stamp() != stamp:
                return False  # changed while it was read: what was read may be half of each
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.write(checkpoint.data.numpy().data)
            os.replace(temporary, path)
        except OSError as error:
            _delete(temporary)
            log = logger.warning if error.errno == errno.ENOSPC else logger.info
            log("%s was not packed: %s", files.origin, error)
            return False
        except BaseException:
            _delete(temporary)
            raise
        self._sweep(path)
        return True

    def leave(self, nbytes: int) -> None:
        """Let so much of the limit be for others than packed files: to the next 64th of it, since all are looked at."""
        step = 1 + (self.limit_bytes or 0) // 64
        left = -(-nbytes // step) * step
        if self.limit_bytes is not None and left != self._left:
            self._left = left
            try:
                self._sweep()
            except OSError as error:
                logger.warning("%s cannot be looked into: %s", self.folder, error)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed files of this format."""
        return sum(found.st_size for _, found in self._held())

    def _held(self) -> list[tuple[Path, os.stat_result]]:
        held = []
        for path in self.folder.iterdir():
            if path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX):
                try:
                    held.append((path, path.stat()))
                except FileNotFoundError:
                    continue  # another process was quicker
        return held

    def _sweep(self, written: Path | None = None) -> None:
        """Delete what is beyond the limit; and now and then what was never finished. Looks at few files as a rule."""
        with self._sweeping:
            if time.monotonic() - self._looked >= _LOOK_SECONDS:
                self._look()
            elif written is not None:
                with contextlib.suppress(FileNotFoundError):  # another process was quicker
                    self._note(written, written.stat())
            limit = self._known_bytes if self.limit_bytes is None else max(self.limit_bytes - self._left, 0)
            while self._known_bytes > limit:
                used_ns, path = heapq.heappop(self._oldest)
                known = self._known.get(path)
                if known is None or known[0] != used_ns:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    if found.st_mtime_ns != used_ns:  # used since
                        self._note(path, found)
                        continue
                    _delete(path)
                self._known_bytes -= self._known.pop(path)[1]

    def _look(self) -> None:
        now = time.time()
        for path in self.folder.glob(f".{_PREFIX}*.tmp"):
            try:
                if now - path.stat().st_mtime > _ABANDONED_SECONDS:
                    _delete(path)
            except FileNotFoundError:
                continue
        self._known, self._oldest, self._known_bytes = {}, [], 0
        for path, found in self._held():
            self._note(path, found)
        self._looked = time.monotonic()

    def _note(self, path: Path, found: os.stat_result) -> None:
        self._known_bytes += found.st_size - self._known.get(path, (0, 0))[1]
        self._known[path] = found.st_mtime_ns, found.st_size
        heapq.heappush(self._oldest, (found.st_mtime_ns, path))


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is there now, if any."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


class _Damaged(Exception):
    """What is wrong with a packed file."""


def name_for(files: Files) -> str:
    """Of the packed file of these."""
    return f"{_PREFIX}{hashlib.blake2b(files.key.encode(), digest_size=16).hexdigest()}{_SUFFIX}"


def is_packed(header: bytes) -> bool:
    """Whether a safetensors file of this header is a packed file, sound or not."""
    return header.startswith(_OPENING)


def examine(path: Path) -> tuple[Found, Files, Checkpoint]:
    """What a packed file says, the files that it was made of, which need not be there, and the adapter in it.

    Header and values are proved to be those that were written; whoever wrote them.

    Raises:
        CheckpointError: it is not as it was packed.
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        try:
            found = _unsealed(file.header, path)
            files = Files.of_stamp(found.source)
        except (_Damaged, ValueError) as error:
            raise _not_as_packed(path, str(error), "a header as it was sealed") from error
        data, fill = file.data(found.schema.nbytes)
        checkpoint = Checkpoint.checked(found.schema, data, str(path), fill)
    if checkpoint.version != found.version:
        raise _not_as_packed(path, f"values of version {checkpoint.version}", f"version {found.version}, by its header")
    return found, files, checkpoint


def _not_as_packed(path: Path, found: str, expected: str) -> CorruptFileError:
    hint = "delete it: the adapter is read from its own files, and packed anew, when it is next needed"
    return CorruptFileError(f"{path} is no sound packed file.", where=path, found=found, expected=expected, hint=hint)


def _unsealed(header: bytes, path: Path) -> Found:
    """What the header of a packed file says.

    Raises:
        _Damaged, CheckpointError: it is none.
    """
    seal = xxhash.xxh3_128_hexdigest(header[_SEAL_END:]).encode()
    if header[:_SEAL_END] != _OPENING + seal:
        raise _Damaged("a header that is not as it was sealed")
    try:
        metadata, end = json.JSONDecoder().raw_decode(header.decode(), len('{"__metadata__":'))
        keys = ("hotslot_format", "version", "config", "source", "read_ns")
        told, version, text, source, read_ns = (str(metadata[key]) for key in keys)
        read = int(read_ns)
        if not 0 <= read < 2**63:
            raise ValueError("a time that no clock shows")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _Damaged(f"metadata that hotslot does not write ({type(error).__name__}: {error})") from error
    if told != FORMAT:
        raise _Damaged("another format than its name says")
    # Behind the metadata the headers of a family are equal, but for the spaces at their end.
    tensors, config = header[end:].rstrip(b" "), text.encode()
    schema = schemas.get((tensors, config))
    if schema is None:
        schema = Schema(parse_config(config, path), parse_header(header, path))
        schemas.put((tensors, config), schema)
    return Found(version, source, read, schema)


def pack_header(checkpoint: Checkpoint, source: str, read_ns: int) -> bytes | None:
    """The header of its packed file; None if the config has something that JSON does not give back."""
    schema = checkpoint.schema
    try:
        config = json.dumps(dict(schema.config))
        if Schema(json.loads(config), schema.tensors.values()).digest != schema.digest:
            return None
    except (TypeError, ValueError):
        return None
    metadata = {"hotslot_format": FORMAT, "version": checkpoint.version, "config": config, "source": source}
    metadata["read_ns"] = str(read_ns)
    entries: dict[str, Any] = {
        name: {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [spec.start, spec.stop]}
        for name, spec in schema.tensors.items()
    }
    compact = (",", ":")
    told = json.dumps(metadata, separators=compact)[1:]
    tensors = json.dumps(entries, separators=compact)[1:]
    sealed = f'",{told}{"," if entries else ""}{tensors}'.encode()
    sealed += b" " * (-(_SEAL_END + len(sealed)) % 8)
    seal = xxhash.xxh3_128_hexdigest(sealed)
    return _OPENING + seal.encode() + sealed


def _delete(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("%s cannot be deleted: %s", path, error)
