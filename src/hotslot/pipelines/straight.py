"""LoRA files that need no diffusers: those with the header of one that it has read, and whose bytes it leaves alone.

A converter that is given tensors without values cannot look at any. If it takes them, and what it gives are pieces of
the very memory that they were said to be in, then any file with this header may be read piece by piece, in one sweep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache.packed import is_packed
from ..checkpoint import Checkpoint, FileFamily, Piece, Schema, parse_header, read_header, refuse_other_size, view
from ..errors import AdapterNotFoundError, HotslotError
from .conversion import Answer, Place

_WEIGHTS = "pytorch_lora_weights.safetensors"  # as `save_lora_weights` names it
_METADATA = '{"__metadata__":'  # begins a header that has any, as safetensors writes it


class Header(NamedTuple):
    """A safetensors file, and its header as it stands there."""

    path: Path
    content: bytes

    @property
    def tensors(self) -> str | bytes:
        """The header without the metadata, in which trainers keep their records: equal for files of equal tensors."""
        try:
            text = self.content.decode()
            if not text.startswith(_METADATA):
                return text
            _, end = json.JSONDecoder().raw_decode(text, len(_METADATA))
            return text[end:].rstrip()
        except (ValueError, RecursionError):  # it is none: which whoever reads the file says better
            return self.content


class Outline(NamedTuple):
    """What a file of LoRAs has come to, but for its values.

    Attributes:
        nbytes: behind its header.
        schema: of the adapter.
    """

    nbytes: int
    schema: Schema

    @classmethod
    def of(cls, header: Header, converted: Checkpoint) -> Outline:
        """Of a file that diffusers has read."""
        specs = parse_header(header.content, header.path)
        return cls(max((spec.stop for spec in specs), default=0), converted.schema)

    def of_another(self, header: Header) -> Schema:
        """What a file of the same tensors will come to.

        Raises:
            CorruptFileError: it is longer or shorter than its header says.
        """
        refuse_other_size(header.path, header.content, self.nbytes)
        return self.schema


def file_here(source: Any, options: Mapping[str, Any]) -> Path | None:
    """The file on this machine that diffusers reads for the source; None where only diffusers can tell which."""
    if isinstance(source, Mapping) or options.keys() - {"weight_name"}:
        return None
    path = Path(source)
    with suppress(OSError):  # which diffusers meets too
        if path.is_dir():
            names = [name for name in os.listdir(path) if name.endswith(".safetensors")]
            path /= options.get("weight_name") or (_WEIGHTS if names == [_WEIGHTS] else "")
        if path.is_file():
            return path
    return None


def header_here(source: Any, options: Mapping[str, Any]) -> Header | None:
    """Of `file_here`.

    Raises:
        CorruptFileError, PickleRefusedError: the file is none of safetensors.
        AdapterNotFoundError: it is a packed file.
    """
    path, header = file_here(source, options), None
    with suppress(OSError):
        header = Header(path, read_header(path)) if path is not None else None
    if header is not None and is_packed(header.content):
        raise AdapterNotFoundError(
            f"{header.path} is a packed file, which hotslot keeps for itself.",
            where=header.path,
            found="tensors without their alphas, as diffusers would read it",
            expected="the file that it was made of",
            hint="hotslot inspect tells which that is",
        )
    return header


def family_of_files(
    header: Header,
    answer: Answer,
    places: Iterable[Place],
    converted: Checkpoint,
    ask: Callable[[dict[str, Tensor]], Answer],
) -> FileFamily | None:
    """What files with this header have in common; None if their bytes have to go through the converter.

    Args:
        header: of a file.
        answer: what the converter gave for it.
        places: of its tensors.
        converted: the file, as the converter and diffusers have made it.
        ask: the converter.
    """
    try:
        specs = parse_header(header.content, header.path)
        nbytes = max((spec.stop for spec in specs), default=0)
        memory = torch.empty(nbytes, dtype=torch.uint8, device="meta")
        blind = ask({spec.name: view(memory, spec) for spec in specs})
        if repr(blind.more[:-1]) != repr(answer.more[:-1]):  # alphas among the tensors
            return None
        pieces = _pieces(blind.tensors, places, converted, memory)
        if pieces is None:
            return None
        family = FileFamily(header.content, nbytes, converted.schema, pieces)
        # The proof: the same bytes. A file that is another by now has others.
        same = family.read(header.path, origin=converted.origin).version == converted.version
    except (HotslotError, RuntimeError, KeyError):  # torch's for values that are not there
        return None
    return family if same else None


def _pieces(
    tensors: Mapping[str, Tensor], places: Iterable[Place], converted: Checkpoint, memory: Tensor
) -> tuple[Piece, ...] | None:
    """Where the converted bytes are in `memory`, of which the tensors are views; None if they are not all in it."""
    sources = {place.name: place for place in places}
    if memory._version:  # written into
        return None
    pieces: list[Piece] = []
    for spec in converted.tensors.values():
        place = sources[spec.name]
        if place.source is None or place.box is not None:
            return None
        found = tensors[place.source]
        own = found.untyped_storage()._cdata == memory.untyped_storage()._cdata
        if not own or not found.is_contiguous() or found.dtype != spec.dtype:
            return None
        piece = Piece(spec.start, spec.stop, int(found.storage_offset()) * found.itemsize)
        last = pieces[-1] if pieces else None
        if last is not None and last.stop == piece.start and last.place + last.stop - last.start == piece.place:
            pieces[-1] = last._replace(stop=piece.stop)
        else:
            pieces.append(piece)
    return tuple(pieces)
