"""Read a safetensors file in one sweep, having proved its header.

The safetensors library hands out one tensor per call, 15 µs each; an adapter has hundreds, and one read into one
buffer is what a swap wants. Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length,
JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import stat
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import AdapterNotFoundError, CorruptFileError, PickleRefusedError, TensorError
from .buffers import host_buffer
from .checkpoint import Fill, TensorSpec
from .limits import MAX_DATA_BYTES, MAX_HEADER_BYTES, MAX_TENSORS, bad_name

# In the order in which the library writes them.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_OTHER_DTYPES = frozenset({"U16", "U32", "U64", "C64", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4"})
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class Piece(NamedTuple):
    """Bytes `start` to `stop` in memory; in the file they begin at `place` behind the header."""

    start: int
    stop: int
    place: int


class SafetensorsFile:
    """A safetensors file that is open for reading, and stays the same file whatever is put in its place.

    Attributes:
        path: of the file.
        header: its JSON, as it stands there: equal headers are equal names, dtypes, shapes and places.

    Raises:
        CorruptFileError: the header does not lie within the file.
        PickleRefusedError: a pickle under another name.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path, self._file = path, file
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            if prefix.startswith(_PICKLE_MAGIC):  # asked only now: a header may well be 0x280 bytes long
                raise pickle_refused(path)
            found = f"a header of {length:,} bytes in a file of {size:,}"
            raise _corrupt(path, found, "a header that lies within the file")
        self.header = bytes(file.read(length))

    def refuse_other_header(self, known: bytes) -> None:
        """Raise CorruptFileError unless the header is the one that is known of the file."""
        if self.header != known:
            raise _corrupt(self.path, "another header than a moment ago", "a file that nobody is writing")

    def refuse_rewritten(self) -> None:
        """Raise CorruptFileError if somebody has written another header into the file since it was opened."""
        self.refuse_other_header(os.pread(self._file.fileno(), len(self.header), 8))

    def data(
        self, nbytes: int, *, pieces: Sequence[Piece] | None = None, pin_memory: bool = False
    ) -> tuple[torch.Tensor, Fill]:
        """Memory for the bytes behind the header, and what reads them into it.

        Args:
            nbytes: how many there are by the header.
            pieces: what of them is wanted and in which order, without holes in memory; by default all, as they stand
                there.
            pin_memory: page-locked memory.

        Returns:
            A 1-D uint8 tensor with anything in it, and a function that fills its bytes from start to stop while the
            file is open. It may be called by several threads; it raises CorruptFileError if the file has become
            shorter.

        Raises:
            CorruptFileError: the file is longer or shorter than its header says.
        """
        path, descriptor = self.path, self._file.fileno()
        refuse_other_size(path, self.header, nbytes, os.fstat(descriptor).st_size)
        begin = 8 + len(self.header)
        wanted = [Piece(0, nbytes, 0)] if pieces is None else pieces
        starts = [piece.start for piece in wanted]
        total = wanted[-1].stop if wanted else 0
        _refuse_beyond_memory(total, path)
        data = host_buffer(total, pin_memory=pin_memory)
        target = data.numpy().data

        def fill(start: int, stop: int) -> None:
            while start < stop:
                piece = wanted[bisect_right(starts, start) - 1]
                place = begin + piece.place + start - piece.start
                count = os.preadv(descriptor, [target[start : min(stop, piece.stop)]], place)
                if count == 0:
                    raise _corrupt(path, f"an end after {place:,} bytes", f"{begin + nbytes:,} bytes by its header")
                start += count

        return data, fill


@contextmanager
def open_file(path: Path) -> Iterator[SafetensorsFile]:
    """For a block: the file, open. Raises what `SafetensorsFile` and `open_regular` do."""
    with open_regular(path) as file:
        yield SafetensorsFile(path, file)


def read_header(path: Path) -> bytes:
    """`SafetensorsFile.header` of the file."""
    with open_file(path) as file:
        return file.header


def refuse_other_size(path: Path, header: bytes, nbytes: int, found: int | None = None) -> None:
    """Raise unless the file is as long as its header says; `found` is its length, if that is known."""
    found = path.stat().st_size if found is None else found
    size = 8 + len(header) + nbytes
    if found != size:
        raise _corrupt(path, f"{found:,} bytes", f"{size:,} bytes by its header")


def open_regular(path: Path) -> FileIO:
    """Open a file to read it, and nothing but a file: opening a pipe would wait for a writer, and a device may act.

    Symbolic links are followed: the Hub's cache consists of links out of the folder, and users make their own. A link
    in a folder gives nobody a file that they could not name; where a caller is remote, paths are confined before.

    Raises:
        AdapterNotFoundError: it is no regular file.
        OSError: it cannot be opened.
    """
    # Asked before, since to open a device may do something, and after, since it may be another one by then.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise _not_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    file = FileIO(descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise _not_regular(path)
    return file


def _not_regular(path: Path) -> AdapterNotFoundError:
    return AdapterNotFoundError(
        f"{path} is no file.",
        where=path,
        found="a folder, a pipe, a socket or a device",
        expected="a file, or a link to one",
        hint="give the folder that save_pretrained wrote",
    )


def _refuse_beyond_memory(nbytes: int, path: Path) -> None:
    # Asked of the machine too: where memory is handed out before there is any, torch.empty would not fail.
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nbytes > min(here, MAX_DATA_BYTES):
        expected = f"at most {min(here, MAX_DATA_BYTES):,}, " + (
            "the memory of this machine" if here < MAX_DATA_BYTES else "far above any real adapter"
        )
        raise _corrupt(path, f"tensors of {nbytes:,} bytes", expected)


def parse_header(header: bytes, path: Path) -> list[TensorSpec]:
    """The tensors' specs in the order of the bytes.

    Raises:
        CorruptFileError: not a well-formed header.
        TensorError: a dtype that is no adapter's.
    """
    try:
        # Decoded here: json would also take UTF-16 and a byte order mark, at which other readers see another file.
        entries = json.loads(header.decode(), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except CorruptFileError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _corrupt(path, f"a header that is no JSON ({error})", "a JSON object") from error
    if not isinstance(entries, dict):
        raise _corrupt(path, f"a header that is a JSON {type(entries).__name__}", "a JSON object")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(map(_is_text, [*metadata, *metadata.values()]))
    ):
        raise _corrupt(path, f"{metadata!r:.100}", "an object of texts", where="__metadata__")
    if len(entries) > MAX_TENSORS:
        raise _corrupt(path, f"{len(entries):,} tensors", f"at most {MAX_TENSORS:,}")
    specs = [_spec(name, entry, path) for name, entry in entries.items()]
    specs.sort(key=lambda spec: (spec.start, spec.stop))
    end = 0
    for spec in specs:
        if spec.start != end:
            found = f"bytes {spec.start:,} to {spec.stop:,}, where the tensor before ends at {end:,}"
            raise _corrupt(path, found, "ranges that neither overlap nor leave holes", where=spec.name)
        end = spec.stop
    return specs


def aligned(specs: list[TensorSpec], data: torch.Tensor) -> tuple[list[TensorSpec], torch.Tensor]:
    """The same tensors, each at a multiple of its item size: safetensors writes files so, but need not."""
    if is_aligned(specs):
        return specs, data
    moved, end = [], 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        moved.append(spec._replace(start=end, stop=end + spec.stop - spec.start))
        end = moved[-1].stop
    origin = {spec.name: spec for spec in specs}
    pieces = [data[origin[spec.name].start : origin[spec.name].stop] for spec in moved]
    return moved, torch.cat(pieces)


def is_aligned(specs: Iterable[TensorSpec]) -> bool:
    """Whether each tensor starts at a multiple of its item size."""
    return all(spec.start % spec.dtype.itemsize == 0 for spec in specs)


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _corrupt(path, "the same key twice in the header", "each key once", where=twice)
    return found


def _spec(name: str, entry: Any, path: Path) -> TensorSpec:
    problem = bad_name(name)
    if problem is not None:
        raise _corrupt(path, *problem, where=name[:80])
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"{entry!r:.100}", "an object with dtype, shape and data_offsets", where=name)
    shape, offsets, dtype_name = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise _corrupt(path, f"shape {shape!r:.80}, offsets {offsets!r:.80}", "natural numbers", where=name)
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        if isinstance(dtype_name, str) and dtype_name in _OTHER_DTYPES:
            raise TensorError(
                f"{path} holds a tensor of a dtype that adapter weights do not have.",
                where=name or "a tensor without a name",
                found=dtype_name,
                expected=f"one of {', '.join(DTYPES)}",
                hint="save the adapter again without it; a quantised adapter has to be dequantised first",
            )
        raise _corrupt(path, f"dtype {dtype_name!r:.80}", "a dtype of the safetensors format", where=name)
    start, stop = offsets
    # An empty tensor is legal, yet dimensions beyond int64 would break torch even where another is 0.
    if any(n >= 2**63 for n in shape) or stop - start != math.prod(shape) * dtype.itemsize:
        found = f"{stop - start:,} bytes for shape {tuple(shape)!s:.80} of {dtype_name}"
        raise _corrupt(path, found, "as many bytes as the shape takes", where=name)
    return TensorSpec(name, dtype, tuple(shape), start, stop)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _naturals(values: Any) -> bool:
    return type(values) is list and all(type(n) is int and n >= 0 for n in values)


def _corrupt(path: Path, found: str, expected: str, where: str | None = None) -> CorruptFileError:
    return CorruptFileError(
        f"{path} is not a sound safetensors file.",
        where=where or path,
        found=found,
        expected=expected,
        hint="download or save the adapter again: the file is cut short, damaged, or something else",
    )


def pickle_refused(path: Path) -> PickleRefusedError:
    """The error for weights that only unpickling could read; it names the way to convert them."""
    return PickleRefusedError(
        f"{path} is a pickle, and reading one can run any code that is in it.",
        where=path,
        found=f"a pickle ({path.name})",
        expected="adapter_model.safetensors",
        hint="convert it once, where you trust it: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'adapter_model.safetensors')",
    )
