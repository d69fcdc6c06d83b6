"""The Checkpoint, its digest, and the check that every value is finite."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import xxhash

from ..errors import NonFiniteError

# The bytes are read, digested and checked in steps of the first size, each while it is in a core's cache; all three let
# go of the interpreter lock. Each piece of the second size has a digest of its own, and goes to one thread. One reads
# the page cache at 4-5 GB/s, eight at 25. Below the third size it takes longer to wake them.
_STEP_BYTES = 1 << 20
CHUNK_BYTES = 4 << 20
_THREADS_FROM_BYTES = 32 << 20
_THREADS = 8

Fill: TypeAlias = Callable[[int, int], None]  # (start, stop): brings these bytes

PEFT_PREFIX = "base_model.model."  # of the names in a file of PEFT's

# PEFT holds these as sets, and writes them in an order of the moment.
_SETS = ("target_modules", "exclude_modules")


class TensorSpec(NamedTuple):
    """One tensor of a checkpoint: `checkpoint.data[start:stop]` are its bytes, C-contiguous."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Schema:
    """All of an adapter but its values. Adapters of one family, saved alike, share one; so does what is made of it.

    An adapter of several models, such as a pipeline's, has a config of its own for each: `config["components"]` is the
    name of a model → the config, and the names of the model's tensors begin with its name. `config["base_values"]` are
    the names of those that are no part of an adapter, but values for the models' own tensors of these names.

    Attributes:
        config: the content of adapter_config.json, read-only.
        tensors: name → TensorSpec, in the order of the bytes.
        runs: the same bytes as few long pieces of equal dtype.
        digest: of all of it.
    """

    def __init__(self, config: dict[str, Any], specs: Iterable[TensorSpec]) -> None:
        specs = list(specs)
        self.config: Mapping[str, Any] = MappingProxyType(config)
        self.tensors: Mapping[str, TensorSpec] = MappingProxyType({spec.name: spec for spec in specs})
        self.runs = _runs_of_one_dtype(specs)
        names = [[spec.name, str(spec.dtype), spec.shape, spec.start] for spec in specs]
        stated = config | {key: sorted(config[key], key=str) for key in _SETS if isinstance(config.get(key), list)}
        self.digest = xxhash.xxh3_128_digest(json.dumps([stated, names], sort_keys=True, default=str).encode())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return max((spec.stop for spec in self.tensors.values()), default=0)

    @property
    def base_values(self) -> Collection[str]:
        """Names of the tensors that are values for the models' own, of an adapter of several models."""
        names: Collection[str] = self.config.get("base_values", ())
        return names

    def with_config(self, config: dict[str, Any]) -> Schema:
        """The same tensors under another config."""
        twin = copy.copy(self)
        twin.__dict__.pop("components", None)
        twin.config = MappingProxyType(config)
        twin.digest = xxhash.xxh3_128_digest(self.digest + json.dumps(config, sort_keys=True, default=str).encode())
        return twin

    def split(self, data: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name → the tensor's values as a flat view of `data`; all with one call for each run."""
        pieces: list[torch.Tensor] = []
        for run, sizes in zip(self.runs, self._sizes, strict=True):
            pieces += view(data, run).split(sizes)
        return dict(zip(self.tensors, pieces, strict=True))

    @cached_property
    def components(self) -> Mapping[str, Schema]:
        """What stands before a model's module paths → what is of this model; "" → itself for an adapter of one."""
        configs = self.config.get("components")
        if configs is None:
            return MappingProxyType({"": self})
        specs: dict[str, list[TensorSpec]] = {f"{name}.": [] for name in configs}
        apart = frozenset(self.base_values)
        for spec in self.tensors.values():
            if spec.name in apart:
                continue
            path = spec.name.removeprefix(PEFT_PREFIX)
            prefix = path[: path.find(".") + 1]
            specs[prefix].append(spec._replace(name=PEFT_PREFIX + path.removeprefix(prefix)))
        return MappingProxyType({f"{name}.": Schema(config, specs[f"{name}."]) for name, config in configs.items()})

    @cached_property
    def _sizes(self) -> list[list[int]]:
        """Of each run the numbers of elements of its tensors."""
        sizes: list[list[int]] = []
        last: TensorSpec | None = None
        for spec in self.tensors.values():
            if last is None or last.dtype != spec.dtype or last.stop != spec.start:
                sizes.append([])
            sizes[-1].append((spec.stop - spec.start) // spec.dtype.itemsize)
            last = spec
        return sizes


def each_config(
    config: Mapping[str, Any], change: Callable[[str, Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """The config, or that of each component, changed; `change` gets what stands before the model's paths, and it."""
    if "components" not in config:
        return change("", config)
    changed = {name: change(f"{name}.", part) for name, part in config["components"].items()}
    return {**config, "components": changed}


class Sink(Protocol):
    """Takes a checkpoint's bytes further while others are still being read. One thread calls it: the one that reads."""

    def take(self, data: torch.Tensor, start: int, stop: int) -> None:
        """Bytes `start` to `stop` of `data` are there. The first begin at 0, and each next where the last ended."""

    def prove(self, version: str) -> None:
        """All of them were there, and are this version's."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An adapter as it was saved; immutable, on the host, independent of any model.

    Attributes:
        schema: names, shapes, dtypes and config.
        data: 1-D uint8 tensor, all tensors' bytes. Nobody writes into it.
        version: digest of config, names, shapes, dtypes and values: 32 hexadecimal digits. Equal versions are equal
            adapters, whether they came from a file or from memory.
        origin: what the user called it, for messages.
    """

    schema: Schema
    data: torch.Tensor
    version: str
    origin: str

    @classmethod
    def checked(
        cls, schema: Schema, data: torch.Tensor, origin: str, fill: Fill | None = None, sink: Sink | None = None
    ) -> Checkpoint:
        """Digest the bytes, prove every value finite, and seal both into a Checkpoint.

        Args:
            schema: what is where in `data`.
            data: the bytes, or, with `fill`, the memory that it will bring them to.
            origin: what the user called it.
            fill: called once for each piece, by several threads.
            sink: where the bytes go on to meanwhile. What it took is nothing if this raises.

        Raises:
            NonFiniteError: naming the first tensor with a NaN or an infinity.
        """

        def finite(start: int, stop: int) -> bool:
            return _finite_between(schema, data, start, stop)

        digests, sound = _sweep(data, fill, sink, finite)
        if not sound:
            raise _non_finite(schema, data, origin)
        version = _version(schema, digests)
        if sink is not None:
            sink.prove(version)
        return cls(schema, data, version, origin)

    @classmethod
    def known(
        cls, schema: Schema, data: torch.Tensor, version: str, origin: str, fill: Fill, sink: Sink | None = None
    ) -> Checkpoint | None:
        """As `checked`, of bytes that were once found sound and had this version; None if they have another one."""
        digests, _ = _sweep(data, fill, sink)
        if _version(schema, digests) != version:
            return None
        if sink is not None:
            sink.prove(version)
        return cls(schema, data, version, origin)

    @classmethod
    def outline(cls, schema: Schema, origin: str, *, number: int = 1) -> Checkpoint:
        """An adapter without values, which are on the meta device: enough to plan for the `number`th of a family."""
        data = torch.empty(schema.nbytes, dtype=torch.uint8, device="meta")
        return cls(schema, data, f"{schema.digest.hex()}.{number}", origin)

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of adapter_config.json, read-only."""
        return self.schema.config

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Name → TensorSpec, in the order of the bytes."""
        return self.schema.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.data.numel()

    @property
    def components(self) -> dict[str, Checkpoint]:
        """What stands before a model's module paths → the adapter of this model; "" → itself for an adapter of one."""
        return {
            prefix: self if schema is self.schema else replace(self, schema=schema, version=f"{self.version}.{prefix}")
            for prefix, schema in self.schema.components.items()
        }

    def under(self, config: dict[str, Any]) -> Checkpoint:
        """The same tensors, and the same version, under another config."""
        return replace(self, schema=self.schema.with_config(config))

    def tensor(self, name: str) -> torch.Tensor:
        """A view of one tensor's values. Read it; do not write into it."""
        return view(self.data, self.tensors[name])


def view(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The values of `spec` as a view of `data`."""
    return data[spec.start : spec.stop].view(spec.dtype).view(spec.shape)


def _sweep(
    data: torch.Tensor,
    fill: Fill | None,
    sink: Sink | None,
    proves: Callable[[int, int], bool] = lambda start, stop: True,
) -> tuple[bytes, bool]:
    """Bring and digest all bytes, piece by piece. Returns the digests, and whether `proves` held for each piece."""
    whole = data.numpy().data

    def take(piece: tuple[int, int]) -> tuple[bytes, bool]:
        digest, sound = xxhash.xxh3_128(), True
        for start, stop in _cut(*piece, _STEP_BYTES):
            if fill is not None:
                fill(start, stop)
            digest.update(whole[start:stop])
            sound = proves(start, stop) and sound
        return digest.digest(), sound

    pieces = _cut(0, len(whole), CHUNK_BYTES)
    in_threads = len(whole) >= _THREADS_FROM_BYTES
    digests, sound = [], True
    taken = _pool().map(take, pieces) if in_threads else map(take, pieces)
    for piece, (digest, proved) in zip(pieces, taken, strict=True):  # in their order, each as soon as it is there
        if sink is not None:
            sink.take(data, *piece)
        digests.append(digest)
        sound &= proved
    return b"".join(digests), sound


def _cut(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Start and stop of each part of at most `size`."""
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def _version(schema: Schema, digests: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(schema.digest + digests)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_THREADS, 2 * (os.cpu_count() or 1)), thread_name_prefix="hotslot-read")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of its parent's threads


def _finite_between(schema: Schema, data: torch.Tensor, start: int, stop: int) -> bool:
    # One aminmax over each run of equal dtype: it reads once and carries NaN and infinity through, where isfinite
    # would write a mask (30 times slower), and 448 calls would cost more than the reading.
    return all(
        _finite(data[max(run.start, start) : min(run.stop, stop)].view(run.dtype))
        for run in schema.runs
        if run.start < stop and start < run.stop
    )


def _non_finite(schema: Schema, data: torch.Tensor, origin: str) -> NonFiniteError:
    culprit = next(spec for spec in schema.tensors.values() if not _finite(view(data, spec)))
    values = view(data, culprit).double()
    nans, infinities = int(values.isnan().sum()), int(values.isinf().sum())
    return NonFiniteError(
        f"{origin} holds values that are not finite.",
        where=culprit.name,
        found=f"{nans} NaN and {infinities} infinite of {values.numel()} values",
        expected="finite values only",
        hint="the training run diverged, or the file was damaged: use an earlier checkpoint of this adapter",
    )


def _finite(values: torch.Tensor) -> bool:
    if values.numel() == 0 or not values.dtype.is_floating_point:
        return True
    if values.dtype.itemsize == 1:  # float8 has no aminmax
        values = values.float()
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _runs_of_one_dtype(specs: list[TensorSpec]) -> list[TensorSpec]:
    runs: list[TensorSpec] = []
    for spec in specs:
        last = runs[-1] if runs else None
        if last is not None and last.dtype == spec.dtype and last.stop == spec.start:
            count = (spec.stop - last.start) // spec.dtype.itemsize
            runs[-1] = TensorSpec(last.name, last.dtype, (count,), last.start, spec.stop)
        else:
            count = (spec.stop - spec.start) // spec.dtype.itemsize
            runs.append(TensorSpec(spec.name, spec.dtype, (count,), spec.start, spec.stop))
    return runs
