"""The memory behind the slots: one arena per device, or the parameters where they are. Writes, clears, restores.

Who owns which bytes of an arena:

    [ part | part | … by name, each padded to its slot's rank, 64-byte aligned | scaling, use of DoRA: per slot ]
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..block import Block, Layout, Run, Tile
from ..checkpoint import Schema
from ..methods import PARTS
from .absolutes import AbsoluteImage
from .scaling import ScalingMap, put_back_scaling, set_scaling
from .scatter import KEPT_TABLES, Scatter, scatters
from .slots import Slot
from .staging import Arrival, Stagings
from .state import NEUTRAL_SCALING
from .tail import column_values, scaling_column
from .traces import Traces

Copy = tuple[torch.Tensor, torch.Tensor]

# A device is reached by one copy of the adapter's bytes and a scatter on the device; only if they go to this few
# places at most are they copied straight there.
_DIRECT_COPIES = 8


class Image(NamedTuple):
    """Parts, scalings and absolute values as they were at one moment, which slots DoRA used, what ranks had room."""

    parts: dict[tuple[str, str], torch.Tensor]
    scalings: dict[str, Any]
    dora: frozenset[str]
    ranks: dict[str, int]
    absolutes: AbsoluteImage | None = None


class _Slice(NamedTuple):
    """Bytes of a block in which pieces of one dtype lie one behind the other."""

    start: int
    stop: int
    dtype: torch.dtype
    sizes: list[int]  # of the pieces, in elements


@dataclass(frozen=True, eq=False, slots=True)
class Writes:
    """A block compiled for one Memory: what remains to be done at a swap.

    Attributes:
        block: whose bytes the scatters take; None if they only clear.
        scatters: what puts the bytes into each device's arena, and clears what is not written.
        staged: where there is no scatter, (buffer on the device, the block's bytes) to be copied before anything else.
        targets, sources: views to be copied one onto the other.
        scalings: fqn → scaling, for each slot.
        dora: fqn of the slots that are used for DoRA.
        columns: (the arena's columns of scalings and uses, their new values), where there is an arena.
        ranks: fqn → rank that is written.
        unused: (fqn, suffix) of parts without a rank that are not written.
        uncounted: whether no target shares its version counter with a part.
    """

    block: Block | None
    scatters: Sequence[tuple[torch.device, Scatter]]
    staged: list[Copy]
    targets: list[torch.Tensor]
    sources: list[torch.Tensor]
    scalings: Mapping[str, float]
    dora: frozenset[str]
    columns: list[Copy]
    ranks: Mapping[str, int]
    unused: tuple[tuple[str, str], ...]
    uncounted: bool

    def without_values(self) -> Writes:
        """The scalings alone, for slots that hold the values already."""
        return replace(self, block=None, scatters=(), staged=[], targets=[], sources=[], unused=())


class Memory:
    """Where the parts of `slots` live, and the only code that writes there.

    Made by `bind`. Every write goes through views that share nothing with autograd but the version counters, which
    each write increments: a backward pass over values that a swap has overwritten raises, and is not wrong in silence.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        layout: Layout,
        arenas: Sequence[torch.Tensor | None],
        stagings: Stagings | None = None,
        *,
        exclusive: bool = False,
    ) -> None:
        self.slots = slots
        self.layout = layout
        self.arenas = arenas
        self._params = [held.param for slot in slots.values() for held in slot.held.values()]
        self._doras = {fqn: slot.dora for fqn, slot in slots.items() if slot.dora is not None}
        self._views = {
            (fqn, suffix): held.param.detach() for fqn, slot in slots.items() for suffix, held in slot.held.items()
        }
        self._regions = {layout.places[key].region: view for key, view in self._views.items()}
        self._scalings = [
            scaling_column(arena, slots, i, layout) for i, arena in enumerate(arenas) if arena is not None
        ]
        self.devices = {view.device for view in self._views.values()}
        self.on_gpu = any(device.type == "cuda" for device in self.devices)
        self._buffers: dict[torch.device, torch.Tensor] = {}
        self._targets: weakref.WeakKeyDictionary[Schema, tuple[list[torch.Tensor], list[_Slice]]]
        self._targets = weakref.WeakKeyDictionary()
        self._known_columns: weakref.WeakKeyDictionary[Schema, tuple[Mapping[str, float], list[Copy]]]
        self._known_columns = weakref.WeakKeyDictionary()
        self._arenas = [arena for arena in arenas if arena is not None]
        self.stagings = stagings if stagings is not None else Stagings()
        self.came_from = "host"  # the bytes of the last swap
        self._scatters: weakref.WeakKeyDictionary[Schema, list[tuple[torch.device, Scatter]]]
        self._scatters = weakref.WeakKeyDictionary()
        # Up to what ranks slots may hold values before a swap: all, those that empty slots state, or an adapter's.
        bounds = [(slot.rank, slot.neutral_rank) for slot in slots.values()]
        self._rank_sets: dict[tuple[int, ...], None] = dict.fromkeys(zip(*bounds, strict=True))
        self._clearing = self._scatters_of(None)
        self._prepare(self._clearing)
        self._brought: tuple[Writes, dict[torch.device, torch.Tensor]] | None = None
        # Whose version counters a write counts up: of what shares the arena's, once.
        self._counted = _counting_alone(self._params, self._arenas) if exclusive else self._params
        self.traces = Traces(slots, self._arenas, exclusive=exclusive)

    def bind_scalings(self) -> None:
        """Let the arena's tail hold the layers' scalings, with the values that they have."""
        found = {}
        for column, fqns in self._scalings:
            for i, fqn in enumerate(fqns):
                slot = self.slots[fqn]
                layer, name = slot.layer, slot.adapter_name
                view = column[i, 0]
                view.fill_(float(layer.scaling[name]))
                if isinstance(layer.scaling, ScalingMap):
                    layer.scaling.bind(name, view)
                else:
                    layer.scaling = ScalingMap(layer.scaling, name, view)
                found[fqn] = layer, layer.scaling, name, view
                if slot.dora is not None:
                    column[i, 1] = slot.dora.in_use
                    slot.dora.in_use = column[i, 1]
        self.traces.expect_scalings(found)
        self.traces.mark_clean()

    # -- writing ----------------------------------------------------------------------------------------------------

    def compile(self, block: Block | None, scalings: Mapping[str, float], *, stage: bool | None = None) -> Writes:
        """The copies that put `block` in place; good as long as this memory is.

        Args:
            block: made for this memory's layout; None for nothing, with the slots neutral.
            scalings: fqn → scaling, for each slot.
            stage: by torch's copies, from the device if True; by default by the kernel, where it runs.
        """
        with torch.inference_mode(False), torch.no_grad():
            if block is None:
                columns, unused = self._columns(scalings, ()), self.layout.rankless
                return Writes(None, self._clearing, [], [], [], scalings, frozenset(), columns, {}, unused, True)
            assert block.layout is self.layout
            columns = self._columns_for(block, scalings)
            found = self._scatters_for(block) if stage is None else []
            staged, targets, sources = ([], [], []) if found else self._copies(block, stage)
            told = scalings, block.dora, columns, block.ranks, block.unused
            uncounted = bool(found) or not block.tiles
            return Writes(block if found else None, found, staged, targets, sources, *told, uncounted)

    @cached_property
    def neutral(self) -> Writes:
        """What leaves the slots as if there were no adapter."""
        return self.compile(None, dict.fromkeys(self.slots, NEUTRAL_SCALING))

    def _columns_for(self, block: Block, scalings: Mapping[str, float]) -> list[Copy]:
        """`_columns`, made once for all blocks of a schema that have these scalings."""
        schema = block.adapter.checkpoint.schema
        known = self._known_columns.get(schema)
        if known is None or known[0] is not scalings:
            known = self._known_columns[schema] = scalings, self._columns(scalings, block.dora)
        return known[1]

    def _columns(self, scalings: Mapping[str, float], dora: Collection[str]) -> list[Copy]:
        """The arenas' columns of scalings and uses of DoRA, and the values that are to be there."""
        return [
            (column, column_values([scalings[fqn] for fqn in fqns], [fqn in dora for fqn in fqns], like=column))
            for column, fqns in self._scalings
        ]

    def _copies(self, block: Block, stage: bool | None) -> tuple[list[Copy], list[torch.Tensor], list[torch.Tensor]]:
        """`staged`, `targets` and `sources` of the Writes, for torch's own copies."""
        if stage is None:
            many = len(block.runs) + len(block.tiles) > _DIRECT_COPIES
            stage = many and self.on_gpu
        staging = {device: self._staging(device, block.nbytes) for device in self.devices} if stage else {}
        schema = block.adapter.checkpoint.schema
        if schema not in self._targets:
            regions = [self._run_target(run) for run in block.runs]
            found = regions + [self._tile_target(block, tile) for tile in block.tiles]
            self._targets[schema] = found, _slices(block)
        targets, slices = self._targets[schema]
        sources = _sources(block.data, slices, targets, staging)
        return [(buffer, block.data) for buffer in staging.values()], targets, sources

    def _scatters_for(self, block: Block) -> list[tuple[torch.device, Scatter]]:
        """Those of the block's schema, with tables for whatever may be live before it, and be its successor."""
        schema = block.adapter.checkpoint.schema
        if schema not in self._scatters:
            self._scatters[schema] = self._scatters_of(block)
            if len(self._rank_sets) < KEPT_TABLES:
                self._rank_sets[tuple([block.ranks.get(fqn, 0) for fqn in self.slots])] = None
            for scatters_of_one in (self._clearing, *self._scatters.values()):
                self._prepare(scatters_of_one)
        return self._scatters[schema]

    def _scatters_of(self, block: Block | None) -> list[tuple[torch.device, Scatter]]:
        """One for each device, if all parts are in arenas that a kernel can write."""
        if not self._arenas or not all(map(scatters, self.devices)):
            return []
        found = [
            (arena.device, Scatter(block, self.slots, self.layout, region, arena))
            for region, arena in enumerate(self.arenas)
            if arena is not None
        ]
        return found if all(scatter.is_possible for _, scatter in found) else []

    def _prepare(self, found: Sequence[tuple[torch.device, Scatter]]) -> None:
        """Make tables when an adapter is loaded, and not when it is swapped in."""
        for _, scatter in found:
            for ranks in self._rank_sets:
                scatter.prepare(ranks)

    def _staging(self, device: torch.device, size: int) -> torch.Tensor:
        """The first `size` bytes of a buffer on `device` that all blocks share, one swap after the other."""
        buffer = self._buffers.get(device)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)
        return buffer[:size]

    def _run_target(self, run: Run) -> torch.Tensor:
        arena = self.arenas[run.region]
        if arena is None:
            region = self._regions[run.region].data  # with a version counter of its own: a swap counts by itself
            return region.view(-1) if region.is_contiguous() else region
        return arena[run.offset : run.offset + run.elements * run.target.itemsize].view(run.target)

    def _tile_target(self, block: Block, tile: Tile) -> torch.Tensor:
        view = self._views[tile.fqn, tile.suffix]
        return self.slots[tile.fqn].band(view, tile.suffix, 0, block.ranks[tile.fqn])

    def band(self, fqn: str, suffix: str, low: int, high: int) -> torch.Tensor:
        """The ranks from `low` to `high` of a part, to be written; all of a part that has none."""
        view = self._views[fqn, suffix]
        return view if PARTS[suffix].rank_dim is None else self.slots[fqn].band(view, suffix, low, high)

    def write(self, writes: Writes, occupied: Mapping[str, int], *, clean: bool = False) -> None:
        """Clear, copy and scale. Not atomic: whoever calls it puts back what was there if it raises.

        Args:
            writes: of `compile`.
            occupied: fqn → rank up to which the slot may hold values; what is not written of them is cleared.
            clean: whether it is known that nobody else has written since `Traces.mark_clean`.
        """
        clear = self._leftovers(occupied, writes) if not writes.scatters else []
        ones = [self._views[key] for key in writes.unused if PARTS[key[1]].neutral]
        with torch.inference_mode(False), torch.no_grad():
            if writes.scatters:
                self._scatter(writes, occupied)
            else:
                self.came_from = "host"
            # Before the copy, which takes all else out of the cache.
            torch.autograd.graph.increment_version(self._counted)
            if not writes.columns:
                for fqn, slot in self.slots.items():
                    set_scaling(slot.layer.scaling, slot.adapter_name, writes.scalings[fqn])
                self._use_dora(writes.dora)
            _make_neutral(clear, ones)
            for buffer, data in writes.staged:
                buffer.copy_(data, non_blocking=True)
            if len(writes.targets) == 1:  # a call of its own costs less than a list of one
                writes.targets[0].copy_(writes.sources[0], non_blocking=True)
            elif writes.targets:
                torch._foreach_copy_(writes.targets, writes.sources, non_blocking=True)
            for column, values in writes.columns:
                column.copy_(values, non_blocking=True)
            # Each part has counted one.
            if self._counted is self._params and clean and writes.uncounted and not clear and not ones:
                self.traces.count_write()
            else:
                self.traces.mark_clean()

    def make_neutral(self, clear: list[torch.Tensor], ones: list[torch.Tensor]) -> None:
        """Write zeros and ones into these, of the parts; it counts as a write of others."""
        with torch.inference_mode(False), torch.no_grad():
            _make_neutral(clear, ones)

    def bring(self, writes: Writes) -> None:
        """Set the bytes of `writes` on their way to the device, if they go there: what is live is not touched."""
        sources = {}
        if writes.block is not None:
            data, key = writes.block.data, writes.block.version
            with torch.inference_mode(False):  # a buffer that is made in it could not be written by a swap out of it
                for device, _ in writes.scatters:
                    sources[device], self.came_from = self.stagings.of(device).bring(data, key)
        self._brought = writes, sources

    def arrival(self) -> Arrival:
        """Where an adapter goes while it is read, if it is swapped in next: to no device where there is no kernel."""
        return Arrival([self.stagings.of(device) for device, _ in self._clearing])

    def prefetch(self, writes: Writes) -> bool:
        """Let the bytes of `writes` stay on their devices. Says whether there was room for them on all, and use."""
        block = writes.block
        if block is None:
            return False
        stay = [self.stagings.of(device).prefetch(block.data, block.version) for device, _ in writes.scatters]
        return bool(stay) and all(stay)

    def _scatter(self, writes: Writes, occupied: Mapping[str, int]) -> None:
        if self._brought is None or self._brought[0] is not writes:
            self.bring(writes)
        assert self._brought is not None
        (_, sources), self._brought = self._brought, None
        ranks = tuple([occupied.get(fqn, 0) for fqn in self.slots])
        for device, scatter in writes.scatters:
            scatter.run(sources.get(device), ranks)

    def _use_dora(self, fqns: frozenset[str]) -> None:
        for fqn, module in self._doras.items():
            module.in_use.fill_(fqn in fqns)

    def _leftovers(self, occupied: Mapping[str, int], writes: Writes) -> list[torch.Tensor]:
        views = [self._views[key] for key in writes.unused if not PARTS[key[1]].neutral]
        if occupied != writes.ranks:
            for fqn, rank in occupied.items():
                kept, slot = writes.ranks.get(fqn, 0), self.slots[fqn]
                if kept < rank:
                    for suffix in slot.held:
                        if PARTS[suffix].rank_dim is not None:
                            views.append(slot.band(self._views[fqn, suffix], suffix, kept, rank))
        return views

    # -- images: what is live, value for value ----------------------------------------------------------------------

    def image(self) -> Image:
        """A copy of all parts and scalings, for `restore`; it outlives this memory."""
        with torch.inference_mode(False), torch.no_grad():
            parts = {key: view.clone() for key, view in self._views.items()}
            scalings = {fqn: _copied(slot.layer.scaling.get(slot.adapter_name)) for fqn, slot in self.slots.items()}
        dora = frozenset(fqn for fqn, module in self._doras.items() if module.in_use > 0)
        return Image(parts, scalings, dora, {fqn: slot.rank for fqn, slot in self.slots.items()})

    def restore(self, image: Image) -> None:
        """Put an image back: bit for bit, if shapes and dtypes are as they were."""
        with torch.inference_mode(False), torch.no_grad():
            for (fqn, suffix), saved in image.parts.items():
                view, slot = self._views[fqn, suffix], self.slots[fqn]
                if view.shape == saved.shape:
                    view.copy_(saved)
                else:
                    view.zero_()
                    rank = min(slot.rank, image.ranks[fqn])
                    slot.fill(view, suffix, slot.corner(saved, suffix, rank), rank)
            for key, view in self._views.items():
                if key not in image.parts:  # that a slot was given later
                    view.fill_(PARTS[key[1]].neutral)
            self._use_dora(image.dora)
            for fqn, slot in self.slots.items():
                saved = image.scalings.get(fqn, 1.0)  # a slot that was added later is neutral
                put_back_scaling(slot.layer.scaling, slot.adapter_name, saved)
            torch.autograd.graph.increment_version(self._counted)
            self.traces.mark_clean()


def _make_neutral(clear: list[torch.Tensor], ones: list[torch.Tensor]) -> None:
    if clear:
        torch._foreach_zero_(clear)
    if ones:
        torch._foreach_zero_(ones)
        torch._foreach_add_(ones, 1.0)


def _counting_alone(params: Sequence[torch.Tensor], arenas: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The arenas, and those parameters that do not share their version counters."""
    before = [param._version for param in params]
    torch.autograd.graph.increment_version(arenas)
    alone = [param for param, version in zip(params, before, strict=True) if param._version == version]
    return [*alone, *arenas]


def _slices(block: Block) -> list[_Slice]:
    """The block's runs and then its tiles, as few slices."""
    pieces: list[Run | Tile] = [*block.runs, *block.tiles]
    lengths = [run.elements * run.source.itemsize for run in block.runs]
    lengths += [math.prod(tile.shape) * tile.source.itemsize for tile in block.tiles]
    found = []
    for start, stop in pairwise([*_breaks(pieces, lengths), len(pieces)]):
        first, nbytes = pieces[start], sum(lengths[start:stop])
        sizes = [length // first.source.itemsize for length in lengths[start:stop]]
        found.append(_Slice(first.start, first.start + nbytes, first.source, sizes))
    return found


def _sources(
    data: torch.Tensor,
    slices: Sequence[_Slice],
    targets: Sequence[torch.Tensor],
    staging: Mapping[torch.device, torch.Tensor],
) -> list[torch.Tensor]:
    """The slices of `data`, or of what is staged of it, as views that match `targets`."""
    sources: list[torch.Tensor] = []
    for start, stop, dtype, sizes in slices:
        device = next(iter(staging)) if len(staging) == 1 else targets[len(sources)].device
        # One call for all that lie one behind the other: 448 slices would take a millisecond.
        piece = staging.get(device, data)[start:stop].view(dtype)
        sources += piece.split(sizes) if len(sizes) > 1 else [piece]
    matched = zip(sources, targets, strict=True)
    return [source if target.dim() == 1 else source.view(target.shape) for source, target in matched]


def _breaks(pieces: Sequence[Run | Tile], lengths: Sequence[int]) -> list[int]:
    """Indices of the pieces that do not follow the one before them in the same dtype."""
    ends = [piece.start + length for piece, length in zip(pieces, lengths, strict=True)]
    follows = [a.source == b.source and end == b.start for (a, b), end in zip(pairwise(pieces), ends, strict=False)]
    return [0, *(i + 1 for i, yes in enumerate(follows) if not yes)] if pieces else []


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
