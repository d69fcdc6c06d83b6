"""The Checkpoint, its digest, and the check that every value is finite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import xxhash

from ..errors import NonFiniteError

# Pieces of this size are hashed by several threads; xxhash lets go of the interpreter lock while it reads one.
DIGEST_CHUNK_BYTES = 4 << 20
_HASH_THREADS = 4


class TensorSpec(NamedTuple):
    """One tensor of a checkpoint: `checkpoint.data[start:stop]` are its bytes, C-contiguous."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An adapter as it was saved; immutable, on the host, independent of any model.

    Attributes:
        config: the content of adapter_config.json, read-only.
        tensors: name → TensorSpec, in the order of the bytes.
        data: 1-D uint8 tensor, all tensors' bytes. Nobody writes into it.
        version: digest of config, names, shapes, dtypes and values: 32 hexadecimal digits. Equal versions are equal
            adapters, whether they came from a file or from memory.
        origin: what the user called it, for messages.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    data: torch.Tensor
    version: str
    origin: str

    @classmethod
    def checked(cls, config: dict[str, Any], specs: list[TensorSpec], data: torch.Tensor, origin: str) -> Checkpoint:
        """Digest the bytes, prove every value finite, and seal both into a Checkpoint.

        Raises:
            NonFiniteError: naming the first tensor with a NaN or an infinity.
        """
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            hashing = [pool.submit(_hash, chunk) for chunk in _chunks(data)]
            _refuse_non_finite(specs, data, origin)  # in this thread, while the others hash
            version = _version(config, specs, [future.result() for future in hashing])
        return cls(MappingProxyType(config), MappingProxyType({s.name: s for s in specs}), data, version, origin)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.data.numel()

    def tensor(self, name: str) -> torch.Tensor:
        """A view of one tensor's values. Read it; do not write into it."""
        return view(self.data, self.tensors[name])


def view(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The values of `spec` as a view of `data`."""
    return data[spec.start : spec.stop].view(spec.dtype).view(spec.shape)


def _chunks(data: torch.Tensor) -> list[memoryview]:
    whole = memoryview(data.numpy())
    return [whole[i : i + DIGEST_CHUNK_BYTES] for i in range(0, len(whole), DIGEST_CHUNK_BYTES)]


def _hash(chunk: memoryview) -> bytes:
    return xxhash.xxh3_128_digest(chunk)


def _version(config: Mapping[str, Any], specs: list[TensorSpec], chunk_digests: list[bytes]) -> str:
    names = [[s.name, str(s.dtype), s.shape, s.start] for s in specs]
    head = json.dumps([dict(config), names], sort_keys=True, default=str).encode()
    return xxhash.xxh3_128_hexdigest(head + b"".join(chunk_digests))


def _refuse_non_finite(specs: list[TensorSpec], data: torch.Tensor, origin: str) -> None:
    # One aminmax over each run of equal dtype: it reads once and carries NaN and infinity through, where isfinite
    # would write a mask (30 times slower), and 448 calls would cost more than the reading.
    for run in _runs_of_one_dtype(specs):
        if _finite(view(data, run)):
            continue
        culprit = next(s for s in specs if not _finite(view(data, s)))
        values = view(data, culprit).float()
        raise NonFiniteError(
            f"{origin} holds values that are not finite.",
            where=culprit.name,
            found=f"{int(values.isnan().sum())} NaN and {int(values.isinf().sum())} infinite of {values.numel()} values",
            expected="finite values only",
            hint="the training run diverged, or the file was damaged: use an earlier checkpoint of this adapter",
        )


def _finite(values: torch.Tensor) -> bool:
    if values.numel() == 0:
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
