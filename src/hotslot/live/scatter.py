"""An adapter's bytes from one piece of a device's memory to all their places in the arena, by one kernel.

The same kernel clears what was live beyond them, so that a swap on a device takes one launch, however many tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..block import Block, Layout
from ..methods import PARTS
from .slots import Slot

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Table = tuple[torch.dtype, torch.dtype, torch.Tensor, torch.Tensor]

KEPT_TABLES = 32  # one for each set of ranks that were live before; a rank more or less makes another
_CONVERTED = (torch.float32, torch.bfloat16, torch.float16)  # Triton rounds these as torch does


def scatters(device: torch.device) -> bool:
    """Whether the kernel runs there: on a GPU with Triton, or where Triton interprets it."""
    try:
        import triton
    except ImportError:
        return False
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a slot, as rows in the arena and in the block.

    Attributes:
        start: of its bytes in the block.
        place: of its bytes in the arena.
        rows: how many.
        given, stride: elements of a row in the block and in the arena.
        room: the rank that a row has room for; 0 for a part that has none, which is given or cleared as a whole.
        slot: index of the slot, whose ranks decide how much of a row is cleared.
        source, target: dtypes; the first None for what the block does not have.
    """

    start: int
    place: int
    rows: int
    given: int
    stride: int
    room: int
    slot: int
    source: torch.dtype | None
    target: torch.dtype

    def width(self, occupied: Sequence[int]) -> int:
        """Elements of a row that are to be written, where ranks up to `occupied` may hold values."""
        if not self.room:
            return self.stride
        return max(self.given, self.stride * occupied[self.slot] // self.room)

    def kind(self, width: int) -> tuple[torch.dtype, torch.dtype]:
        """What it is read and written as: its own dtypes, or where these are the same the largest words that fit."""
        if self.source not in (None, self.target):
            return self.source, self.target
        size = self.target.itemsize
        lengths = [self.start, self.place, self.given * size, width * size]
        if self.rows > 1:
            lengths.append(self.stride * size)
        word = _WORDS[math.gcd(8, *lengths)]
        return word, word

    def in_words(self, kind: tuple[torch.dtype, torch.dtype], width: int) -> tuple[int, int, int, int, int, int]:
        """As `row_kernel.tabulate` takes it."""
        source, target = kind
        given, wide, stride = (
            n * self.target.itemsize // target.itemsize if source == target else n
            for n in (self.given, width, self.stride)
        )
        return self.start // source.itemsize, self.place // target.itemsize, self.rows, given, wide, stride


class Scatter:
    """Puts all blocks of one schema, or nothing, into one arena.

    Args:
        block: any one of them; None to clear.
        slots: all of the arena's memory, and of others.
        layout: of these.
        region: index of the arena.
        arena: 1-D uint8, on the device.
    """

    def __init__(
        self, block: Block | None, slots: Mapping[str, Slot], layout: Layout, region: int, arena: torch.Tensor
    ) -> None:
        self._arena = arena
        self._parts = list(_parts(block, slots, layout, region))
        self._tables: dict[tuple[int, ...], list[Table]] = {}

    @property
    def is_possible(self) -> bool:
        """Whether the kernel converts all dtypes as torch does."""
        pairs = {(part.source, part.target) for part in self._parts if part.source not in (None, part.target)}
        return all(source in _CONVERTED and target in _CONVERTED for source, target in pairs)

    def run(self, source: torch.Tensor | None, occupied: tuple[int, ...]) -> None:
        """Write, on the current stream.

        Args:
            source: 1-D uint8 on the arena's device, in whole words: the block's bytes, and others behind them; None to
                clear.
            occupied: of each slot the rank up to which it may hold values.
        """
        from .row_kernel import copy_rows

        given = self._arena if source is None else source
        for read, written, table, part_of_tile in self.prepare(occupied):
            copy_rows(given.view(read), self._arena.view(written), table, part_of_tile)

    def prepare(self, occupied: tuple[int, ...]) -> list[Table]:
        """The tables for these ranks, on the device; made once."""
        found = self._tables.get(occupied)
        if found is None:
            while len(self._tables) >= KEPT_TABLES:
                del self._tables[next(iter(self._tables))]
            found = self._tables[occupied] = self._tabulate(occupied)
        return found

    def _tabulate(self, occupied: tuple[int, ...]) -> list[Table]:
        from .row_kernel import compile_for, tabulate

        kinds: dict[tuple[torch.dtype, torch.dtype], list[tuple[int, int, int, int, int, int]]] = {}
        for part in self._parts:
            width = part.width(occupied)
            if width:
                kind = part.kind(width)
                kinds.setdefault(kind, []).append(part.in_words(kind, width))
        device = self._arena.device
        for read, written in kinds:
            compile_for(self._arena.view(read), self._arena.view(written))
        tables = [(kind, tabulate(parts)) for kind, parts in kinds.items()]
        return [(*kind, table.to(device), tiles.to(device)) for kind, (table, tiles) in tables]


def _parts(block: Block | None, slots: Mapping[str, Slot], layout: Layout, region: int) -> Iterable[_Part]:
    index = {fqn: i for i, fqn in enumerate(slots)}
    targets = block.adapter.targets if block is not None else {}
    for (fqn, suffix), place in layout.places.items():
        if place.region != region:
            continue
        spec = targets[fqn].parts.get(suffix) if fqn in targets else None
        if spec is None and PARTS[suffix].neutral:
            continue  # zeros would not be neutral
        slot, dim, elements = slots[fqn], PARTS[suffix].rank_dim, math.prod(place.shape)
        if dim is None:
            rows, room = 1, 0
        elif dim == 0:
            rows, room = slot.groups * slot.experts if PARTS[suffix].grouped else 1, slot.rank
        else:
            rows, room = place.shape[0], slot.rank
        stride = elements // rows
        given = 0 if spec is None else stride * targets[fqn].rank // room if room else stride
        start, dtype = (spec.start, spec.dtype) if spec is not None else (0, None)
        yield _Part(start, place.offset, rows, given, stride, room, index[fqn], dtype, place.dtype)
