"""The Block: an adapter's own bytes, and the copies that put them in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import DoesNotFitError, RankError, ShapeError, UnexpectedTargetError
from ..methods import MAGNITUDE, PARTS, Adapter, Target
from .layout import Layout, SlotShape


class Run(NamedTuple):
    """Elements that are contiguous both in the block and in the region: one flat copy."""

    start: int
    source: torch.dtype
    region: int
    offset: int
    target: torch.dtype
    elements: int


class Tile(NamedTuple):
    """One part whose rank is below the slot's: a copy of `shape`, its own, into a corner of its padded place."""

    start: int
    source: torch.dtype
    shape: tuple[int, ...]
    fqn: str
    suffix: str


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """An adapter, checked against a Layout and compiled into copies.

    Attributes:
        adapter: what it was made of. Its checkpoint's bytes, in their own dtype and without padding, are the block's.
        layout: what it was made for; it is good for this layout only.
        runs, tiles: the copies.
        ranks: module path → rank, for each slot that the block fills.
        unused: (module path, suffix) of the slots' parts that have no rank and that the block does not write.
        dora: paths of the modules that are adapted by DoRA.
    """

    adapter: Adapter
    layout: Layout
    runs: tuple[Run, ...]
    tiles: tuple[Tile, ...]
    ranks: Mapping[str, int]
    unused: tuple[tuple[str, str], ...]
    dora: frozenset[str]

    @property
    def data(self) -> torch.Tensor:
        """The bytes, 1-D uint8 on the host."""
        return self.adapter.checkpoint.data

    @property
    def version(self) -> str:
        """The checkpoint's digest."""
        return self.adapter.checkpoint.version

    @property
    def nbytes(self) -> int:
        """Bytes that a swap to this block brings in."""
        return self.data.numel()


def pack(adapter: Adapter, layout: Layout) -> Block:
    """Compile `adapter` for `layout`.

    Raises:
        UnexpectedTargetError: it targets modules that have no slot.
        ShapeError: it was made for other base dimensions.
        RankError: a rank is beyond its slot's.
    """
    schema = adapter.checkpoint.schema
    if schema not in layout.packed:
        _refuse_misfits(adapter, layout)
        layout.packed[schema] = _recipe(adapter, layout)
    return Block(adapter, layout, *layout.packed[schema])


def _recipe(adapter: Adapter, layout: Layout) -> tuple[Any, ...]:
    """All of a Block that does not depend on values."""
    runs: list[Run] = []
    tiles: list[Tile] = []
    pieces = [(spec, fqn, suffix) for fqn, target in adapter.targets.items() for suffix, spec in target.parts.items()]
    pieces.sort(key=lambda piece: piece[0].start)
    for spec, fqn, suffix in pieces:
        place = layout.places[fqn, suffix]
        if spec.shape == place.shape:
            elements = (spec.stop - spec.start) // spec.dtype.itemsize
            _append_run(runs, Run(spec.start, spec.dtype, place.region, place.offset, place.dtype, elements))
        else:
            tiles.append(Tile(spec.start, spec.dtype, spec.shape, fqn, suffix))
    ranks = {fqn: target.rank for fqn, target in adapter.targets.items()}
    written = {(fqn, suffix) for _, fqn, suffix in pieces}
    unused = tuple(key for key in layout.rankless if key not in written)
    dora = frozenset(fqn for fqn, target in adapter.targets.items() if MAGNITUDE in target.parts)
    return tuple(runs), tuple(tiles), ranks, unused, dora


def _append_run(runs: list[Run], run: Run) -> None:
    """Join `run` to the last one where both its ends touch: a dense adapter becomes one single copy."""
    if runs:
        last = runs[-1]
        if (
            last.source == run.source
            and last.region == run.region
            and last.target == run.target
            and last.start + last.elements * last.source.itemsize == run.start
            and last.offset + last.elements * last.target.itemsize == run.offset
        ):
            runs[-1] = last._replace(elements=last.elements + run.elements)
            return
    runs.append(run)


def _refuse_misfits(adapter: Adapter, layout: Layout) -> None:
    origin = adapter.checkpoint.origin
    unknown = [target for target in adapter.targets.values() if not _has_slot(target, layout)]
    if unknown:
        names = [spec.name for target in unknown for spec in target.parts.values()]
        raise UnexpectedTargetError(
            f"{origin} targets modules that have no slot; unexpected keys found: {_shortened(names)}.",
            where=_shortened([target.fqn for target in unknown]),
            found=f"{len(unknown)} of {len(adapter.targets)} targets without a slot",
            expected=f"targets among the {len(layout.slots)} slots that the model was prepared with",
            hint="attach with this adapter among adapters=, so that its targets get slots too",
        )
    for target in adapter.targets.values():
        slot = layout.slots[target.fqn]
        for suffix, spec in target.parts.items():
            _refuse_shape(target, slot, suffix, spec.shape, origin)
        if target.rank > slot.rank:
            raise RankError(
                f"{origin} has a larger rank than its slot.",
                where=target.fqn,
                found=f"rank {target.rank}",
                expected=f"at most {slot.rank}, the rank the slot was planned for",
                hint="attach with this adapter among adapters=, or prepare the model for a larger target_rank",
            )


def _has_slot(target: Target, layout: Layout) -> bool:
    slot = layout.slots.get(target.fqn)
    return slot is not None and target.parts.keys() <= slot.parts.keys()


def _refuse_shape(target: Target, slot: SlotShape, suffix: str, shape: tuple[int, ...], origin: str) -> None:
    """Every dimension but the rank must be the slot's; the rank dimension must be that of the target's rank."""
    rank_dim, full = PARTS[suffix].rank_dim, slot.parts[suffix]
    wanted: list[Any] = list(full)
    if rank_dim is not None:
        wanted[rank_dim] = slot.experts * (target.rank if rank_dim == 0 else target.rank // slot.groups)
        if target.rank % slot.groups:
            raise DoesNotFitError(
                f"{origin} has a rank that the base layer's groups do not divide.",
                where=target.fqn,
                found=f"rank {target.rank}",
                expected=f"a multiple of {slot.groups}, by the base layer's groups",
                hint="this adapter belongs to another base model",
            )
    if tuple(wanted) != tuple(shape):
        raise ShapeError(
            f"{origin} was made for a base layer of other dimensions.",
            where=f"{target.fqn}.{suffix}",
            found=f"shape {tuple(shape)}",
            expected=f"{tuple(wanted)} by the base layer, at rank {target.rank}",
            hint="this adapter belongs to another base model",
        )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
