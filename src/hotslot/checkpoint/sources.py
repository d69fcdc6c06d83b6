"""From what users call an adapter to a Checkpoint: a folder, a Hub id, or tensors in memory."""

from __future__ import annotations

import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..errors import ConfigError, HotslotError, TensorError
from .buffers import host_buffer
from .checkpoint import Checkpoint, Fill, Schema, Sink, TensorSpec
from .configs import SAVE_AGAIN, config_dict, parse_config
from .files import Files
from .limits import MAX_CONFIG_BYTES, bad_name
from .locating import locate, not_found, said
from .recent import Recent
from .safetensors_file import (
    DTYPES,
    Piece,
    aligned,
    is_aligned,
    open_file,
    open_regular,
    parse_header,
    read_header,
    refuse_other_size,
)

Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, torch.Tensor] | Checkpoint"


def read(
    source: Source | Files,
    *,
    config: Any = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    pin_memory: bool = False,
    sink: Sink | None = None,
) -> Checkpoint:
    """Read and check an adapter.

    Args:
        source: a folder with adapter_config.json and adapter_model.safetensors, a Hub id, a dict of tensors (then
            `config` is needed), what `locate` gives, or a Checkpoint, which is returned as it is.
        config: a peft config or a dict like adapter_config.json; replaces the folder's own where both are given.
        subfolder, revision, cache_dir, token: as in `huggingface_hub.hf_hub_download`; a folder takes `subfolder` too.
        pin_memory: read into page-locked memory, from which a copy to a GPU is several times faster.
        sink: where the bytes of a file go on to while it is read.

    Raises:
        CheckpointError: one of its kinds, see `hotslot.errors`.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Files):
        return read_files(source, pin_memory=pin_memory, sink=sink)
    found = _read(source, config, subfolder, revision, cache_dir, token, pin_memory=pin_memory, sink=sink)
    _refuse_components(found.config, found.origin)
    return found


def _refuse_components(config: Mapping[str, Any], origin: str) -> None:
    if "components" in config:  # which `hotslot.pipelines` alone states
        raise ConfigError(
            f"{origin} says that it is one of several models.",
            where="components",
            found=f"{config['components']!r:.80}",
            expected="the adapter of one model",
            hint=SAVE_AGAIN,
        )


def _read(
    source: Any,
    config: Any,
    subfolder: str | None,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    *,
    pin_memory: bool,
    sink: Sink | None,
) -> Checkpoint:
    if isinstance(source, Mapping):
        if config is None:
            raise ConfigError(
                "A dict of tensors comes without its config.",
                where="config",
                found="None",
                expected="what adapter_config.json would say",
                hint="pass config=, a peft config or a dict like its JSON",
            )
        return from_tensors(source, config, pin_memory=pin_memory)
    hub: dict[str, Any] = {"subfolder": subfolder, "revision": revision, "cache_dir": cache_dir, "token": token}
    return read_files(locate(source, config, **hub), pin_memory=pin_memory, sink=sink)


def read_files(files: Files, *, pin_memory: bool = False, sink: Sink | None = None) -> Checkpoint:
    """Read and check the adapter in these files; see `read`.

    Raises:
        CheckpointError: one of its kinds, see `hotslot.errors`.
    """
    with _mapped_errors(files):
        with open_file(files.weights) as file:
            specs, schema = _survey(files, file.header)
            file.refuse_rewritten()
            data, fill = file.data(_nbytes(specs), pin_memory=pin_memory)
            if is_aligned(specs):
                return Checkpoint.checked(schema, data, files.origin, fill, sink)
            fill(0, data.numel())
        return Checkpoint.checked(schema, aligned(specs, data)[1], files.origin, sink=sink)


def survey(files: Files) -> Schema:
    """All of the adapter in these files but its values, of which none is read.

    Raises:
        CheckpointError: as `read_files`, but for what values may be at fault.
    """
    with _mapped_errors(files):
        header = read_header(files.weights)
        specs, schema = _survey(files, header)
        refuse_other_size(files.weights, header, _nbytes(specs))
        return schema


def _survey(files: Files, header: bytes) -> tuple[list[TensorSpec], Schema]:
    """The tensors where the file of this header has them, and the schema, in which each is aligned."""
    text = _config_text(files.config) if files.given is None else files.given
    schema = schemas.get((header, text))
    if schema is not None:
        return list(schema.tensors.values()), schema
    specs = parse_header(header, files.weights)
    moved, _ = aligned(specs, torch.empty(_nbytes(specs), dtype=torch.uint8, device="meta"))
    schema = Schema(parse_config(text, files.config), moved)
    _refuse_components(schema.config, files.origin)
    if moved is specs:
        schemas.put((header, text), schema)
    return specs, schema


@contextmanager
def _mapped_errors(files: Files) -> Iterator[None]:
    try:
        yield
    except HotslotError:
        raise
    except OSError as error:
        raise not_found(str(files.weights.parent), "a folder that can be read", said(error)) from error


def read_file(path: Path) -> tuple[Checkpoint, dict[str, str]]:
    """A safetensors file by itself, as a Checkpoint without a config, and the file's own metadata.

    Raises:
        CheckpointError: one of its kinds, see `hotslot.errors`.
    """
    try:
        with open_file(path) as file:
            header = file.header
            specs = parse_header(header, path)
            data, fill = file.data(_nbytes(specs))
            fill(0, data.numel())
    except OSError as error:
        raise not_found(str(path), "a file that can be read", said(error)) from error
    metadata: dict[str, str] = json.loads(header).get("__metadata__") or {}
    specs, data = aligned(specs, data)
    return Checkpoint.checked(Schema({}, specs), data, str(path)), metadata


@dataclass(frozen=True)
class FileFamily:
    """Files of equal headers, whose bytes are the adapter's as they stand, if in another order.

    Attributes:
        header: of each of them.
        nbytes: behind it.
        schema: of the adapters.
        pieces: where the schema's bytes are in the file.
    """

    header: bytes
    nbytes: int
    schema: Schema
    pieces: tuple[Piece, ...]

    def read(self, path: Path, *, origin: str, pin_memory: bool = False, sink: Sink | None = None) -> Checkpoint:
        """One of them.

        Raises:
            CheckpointError: one of its kinds, see `hotslot.errors`.
        """
        try:
            with open_file(path) as file:
                file.refuse_other_header(self.header)
                data, fill = file.data(self.nbytes, pieces=self.pieces, pin_memory=pin_memory)
                return Checkpoint.checked(self.schema, data, origin, fill, sink)
        except HotslotError:
            raise
        except OSError as error:
            raise not_found(str(path), "a file that can be read", said(error)) from error


# (header, or names, dtypes and shapes; config) → what adapters of this family share
schemas: Recent[tuple[Any, bytes], Schema] = Recent()


def from_tensors(
    tensors: Mapping[str, torch.Tensor], config: Any, *, origin: str = "the dict of tensors", pin_memory: bool = False
) -> Checkpoint:
    """A Checkpoint of tensors in memory. They are copied: the caller's are neither kept nor changed.

    Args:
        tensors: name → tensor, on any device, named as in adapter_model.safetensors.
        config: a peft config or a dict like adapter_config.json.
        origin: what to call it in messages.
        pin_memory: copy into page-locked memory.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{origin} must be a mapping of names to tensors, got {type(tensors).__name__}")
    given: Mapping[Any, Any] = tensors
    for name, tensor in given.items():
        sound = isinstance(name, str) and isinstance(tensor, torch.Tensor)
        if not sound or tensor.dtype not in DTYPES.values():
            raise TensorError(
                f"{origin} holds something that is no adapter weight.",
                where=name,
                found=tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__,
                expected=f"a tensor of {', '.join(str(d) for d in DTYPES.values())}",
                hint="pass the adapter's own tensors alone, named as in adapter_model.safetensors",
            )
        problem = bad_name(name)
        if problem is not None:
            raise TensorError(
                f"{origin} holds a tensor of an impossible name.",
                where=f"{name:.80}",
                found=problem[0],
                expected=problem[1],
                hint="pass the adapter's own tensors alone, named as in adapter_model.safetensors",
            )
        if tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided:
            raise TensorError(
                f"{origin} holds a tensor without values of its own, a nested or a sparse one.",
                where=name,
                found=f"device {tensor.device}, layout {tensor.layout}{', nested' if tensor.is_nested else ''}",
                expected="a dense tensor with values",
                hint="load its values first, or .to_dense()",
            )
    stated = config_dict(config)
    family = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
    text = json.dumps(stated, default=str).encode()
    schema = schemas.get((family, text))
    if schema is None:
        schema = Schema(stated, _in_file_order(tensors))
        schemas.put((family, text), schema)
    with torch.inference_mode(False), torch.no_grad():
        data = host_buffer(schema.nbytes, pin_memory=pin_memory)
        flat = [_flat_bytes(tensors[name]) for name in schema.tensors]
        devices = {tensor.device for tensor in flat}
        if devices <= {data.device}:
            return Checkpoint.checked(schema, data, origin, _joining(flat, data))
        data.copy_(torch.cat(flat if len(devices) == 1 else [tensor.cpu() for tensor in flat]))
    return Checkpoint.checked(schema, data, origin)


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A 1-D uint8 view of its values, or of a copy where they do not lie one behind the other."""
    flat = tensor.resolve_neg().reshape(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _joining(pieces: list[torch.Tensor], data: torch.Tensor) -> Fill:
    """What brings the pieces' bytes, one behind the other, to `data`."""
    starts = [*accumulate((piece.numel() for piece in pieces), initial=0)]

    def fill(start: int, stop: int) -> None:
        first, last = bisect_right(starts, start) - 1, bisect_left(starts, stop) - 1
        wanted = pieces[first : last + 1]
        wanted[-1] = wanted[-1][: stop - starts[last]]
        wanted[0] = wanted[0][start - starts[first] :]
        # In one call: one for each of hundreds of tensors takes longer than the copying.
        torch.cat(wanted, out=data[start:stop])

    return fill


def _in_file_order(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """As safetensors writes them, so that a dict and its file have one version."""
    specs, end = [], 0
    place = {dtype: i for i, dtype in enumerate(DTYPES.values())}
    for name in sorted(tensors, key=lambda name: (place[tensors[name].dtype], name)):
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape), start, end))
    return specs


def _nbytes(specs: list[TensorSpec]) -> int:
    return max((spec.stop for spec in specs), default=0)


def _config_text(path: Path) -> bytes:
    if not path.is_file():
        raise not_found(str(path.parent), f"{path.name} in it", "weights without it")
    with open_regular(path) as file:
        text = file.read(MAX_CONFIG_BYTES + 1)  # not as many as its size is said to be: some files grow, or say 0
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"{path} is too large.",
            where=path,
            found=f"{path.stat().st_size:,} bytes",
            expected=f"at most {MAX_CONFIG_BYTES:,}",
            hint=SAVE_AGAIN,
        )
    return text
