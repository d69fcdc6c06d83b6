"""Which slots a model has and where in memory their parts lie.

A *region* is one contiguous piece of memory: an arena, or, where nothing may move, a single parameter.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..checkpoint import Schema
from ..methods import MAGNITUDE, PARTS

# Inductor assumes 16-byte alignment of what it was compiled with, and a cache line is 64. Sizes of LoRA matrices are
# multiples of this as a rule, so that the arena and a file of the same shapes have the same bytes in the same order.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class SlotShape:
    """What the base layer asks of a slot's parts.

    Attributes:
        fqn: module path in the base model.
        rank: the rank that the slot is padded to.
        groups: of a grouped convolution, else 1.
        experts: of a mixture-of-experts parameter, each with a rank of its own; else 1.
        dtype: of the parts.
        parts: suffix → full shape, rank included.
        parameter: the bare parameter of the module that is adapted; None if it is the module.
    """

    fqn: str
    rank: int
    groups: int
    experts: int
    dtype: torch.dtype
    parts: Mapping[str, tuple[int, ...]]
    parameter: str | None = None

    def at_rank(self, rank: int) -> SlotShape:
        """The same slot with room for another rank."""
        parts = {}
        for suffix, shape in self.parts.items():
            dim, sizes = PARTS[suffix].rank_dim, list(shape)
            if dim is not None:
                sizes[dim] = self.experts * (rank if dim == 0 else rank // self.groups)
            parts[suffix] = tuple(sizes)
        return replace(self, rank=rank, parts=parts)

    def with_parts(self, extra: Iterable[str]) -> SlotShape:
        """The same slot with those of `extra` that such a layer can have: a bias, DoRA's magnitude."""
        parts = dict(self.parts)
        for suffix in extra:
            up = parts.get("lora_B.weight")
            if suffix == MAGNITUDE:
                up = up or parts["lora_embedding_B"]
                parts.setdefault(suffix, (up[0],) if len(up) == 2 else (1, up[0], *(1 for _ in up[2:])))
            elif suffix == "lora_B.bias" and up is not None:
                parts.setdefault(suffix, (up[0],))
        return replace(self, parts=parts)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one part lives: `region`'s bytes from `offset` on, C-contiguous."""

    region: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """Slots by module path, and the place of each of their parts.

    `packed` remembers what `pack` made of a schema for this layout, `whole` which schemas it holds all of.
    """

    slots: Mapping[str, SlotShape]
    places: Mapping[tuple[str, str], Place]
    region_bytes: tuple[int, ...]
    packed: weakref.WeakKeyDictionary[Schema, Any] = field(default_factory=weakref.WeakKeyDictionary, repr=False)
    whole: weakref.WeakSet[Schema] = field(default_factory=weakref.WeakSet, repr=False)

    @cached_property
    def rankless(self) -> tuple[tuple[str, str], ...]:
        """(fqn, suffix) of the parts that have no rank dimension: biases."""
        return tuple(key for key in self.places if PARTS[key[1]].rank_dim is None)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all regions, padding included."""
        return sum(self.region_bytes)


def arrange(slots: Iterable[SlotShape], region_of: Mapping[tuple[str, str], int] | None = None) -> Layout:
    """Give every part a place, in the order of the names, as a safetensors file has them.

    Args:
        slots: the slots.
        region_of: (fqn, suffix) → index of its region; without it all parts share region 0.
    """
    by_fqn = {slot.fqn: slot for slot in slots}
    keys = sorted((slot.fqn, suffix) for slot in by_fqn.values() for suffix in slot.parts)
    ends: dict[int, int] = {}
    places = {}
    for fqn, suffix in sorted(keys, key=lambda key: f"{key[0]}.{key[1]}"):
        slot = by_fqn[fqn]
        region = region_of[fqn, suffix] if region_of is not None else 0
        offset = -(-ends.get(region, 0) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        place = Place(region, offset, slot.dtype, tuple(slot.parts[suffix]))
        ends[region] = offset + slot.dtype.itemsize * math.prod(place.shape)
        places[fqn, suffix] = place
    return Layout(by_fqn, places, tuple(ends.get(i, 0) for i in range(max(ends, default=-1) + 1)))
