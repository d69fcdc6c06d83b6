"""W + s B A on a GPU in one pass, in Triton, for many weights by one launch.

Each weight is read once, and the product never leaves the registers, so that a merge is as fast as memory is. One
launch for all: hundreds of launches would take longer than the smaller of the weights do.

Imported where a weight lies on a GPU, and by tests, which run it in Triton's interpreter on the CPU.

R: rank   O: rows of the weight   I: its columns
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what is accumulated in 32 bits loses nothing of these

_BLOCK_ROWS, _BLOCK_COLUMNS, _WARPS = 64, 128, 4
_MOST_RANKS = 64  # of one step of the product; tl.dot takes 16 at least
_VECTOR_BYTES = 16  # of one load of one thread

# Columns of the table, a row for each weight. Where a weight lies is told in units from the first one's place, and so
# are its sizes: the compiler sees a product with the unit, and so that loads of whole vectors are aligned.
_FIELDS = tl.constexpr(11)
_OWN, _TARGET, _LEFT, _RIGHT, _MAGNITUDE = (tl.constexpr(i) for i in range(5))
_ROWS, _COLUMNS, _RANK, _OWN_STRIDE, _TARGET_STRIDE, _FIRST_PROGRAM = (tl.constexpr(i) for i in range(5, 11))


@triton.jit
def _sum(
    own, left, right, row, rows, columns, first_column, rank, own_stride, scaling,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of W + s B A, in float32. `own` and `left` point to its first row; `rows` are left from there."""
    column = tl.arange(0, BLOCK_COLUMNS)
    in_rows, in_columns = (row < rows)[:, None], (column < columns - first_column)[None, :]
    # First of all, for it comes from farthest away.
    weight = tl.load(
        own + first_column + row[:, None] * own_stride + column[None, :], mask=in_rows & in_columns, other=0.0
    )
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANKS):
        ranks = first + tl.arange(0, BLOCK_RANKS)
        in_rank = ranks < rank
        up = tl.load(left + row[:, None] * rank + ranks[None, :], mask=in_rows & in_rank[None, :], other=0.0)
        down = tl.load(
            right + first_column + ranks[:, None] * columns + column[None, :],
            mask=in_rank[:, None] & in_columns,
            other=0.0,
        )
        product += tl.dot(up, down, input_precision=PRECISION)
    return weight.to(tl.float32) + scaling * product


@triton.jit
def _add(
    table, scalings, weight_of, own, target, left, right,
    UNIT: tl.constexpr, RANK_UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one of the weights."""
    program = tl.program_id(0)
    weight = tl.load(weight_of + program)
    entry = table + weight * _FIELDS
    rows, rank = tl.load(entry + _ROWS).to(tl.int32), tl.load(entry + _RANK).to(tl.int32) * RANK_UNIT
    columns = tl.load(entry + _COLUMNS).to(tl.int32) * UNIT
    own_stride = tl.load(entry + _OWN_STRIDE).to(tl.int32) * UNIT
    target_stride = tl.load(entry + _TARGET_STRIDE).to(tl.int32) * UNIT
    tile, tile_columns = program - tl.load(entry + _FIRST_PROGRAM).to(tl.int32), tl.cdiv(columns, BLOCK_COLUMNS)
    first_row, first_column = tile // tile_columns * BLOCK_ROWS, tile % tile_columns * BLOCK_COLUMNS
    # What is far apart is told in 64 bits, once for a tile; within it 32 bits do.
    own += tl.load(entry + _OWN) * UNIT + first_row.to(tl.int64) * own_stride
    target += tl.load(entry + _TARGET) * UNIT + first_row.to(tl.int64) * target_stride + first_column
    left += tl.load(entry + _LEFT) * RANK_UNIT + first_row * rank
    right += tl.load(entry + _RIGHT) * UNIT
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    total = _sum(
        own, left, right, row, rows - first_row, columns, first_column, rank, own_stride, tl.load(scalings + weight),
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANKS, PRECISION,
    )  # fmt: skip
    mask = (row < rows - first_row)[:, None] & (column < columns - first_column)[None, :]
    tl.store(target + row[:, None] * target_stride + column[None, :], total.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _add_and_scale_rows(
    table, scalings, weight_of, own, target, left, right, magnitude,
    UNIT: tl.constexpr, RANK_UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DoRA, some rows: a row's norm has to be known before any of it is written, so the sum is made twice."""
    program = tl.program_id(0)
    weight = tl.load(weight_of + program)
    entry = table + weight * _FIELDS
    rows, rank = tl.load(entry + _ROWS).to(tl.int32), tl.load(entry + _RANK).to(tl.int32) * RANK_UNIT
    columns = tl.load(entry + _COLUMNS).to(tl.int32) * UNIT
    own_stride = tl.load(entry + _OWN_STRIDE).to(tl.int32) * UNIT
    target_stride = tl.load(entry + _TARGET_STRIDE).to(tl.int32) * UNIT
    first_row = (program - tl.load(entry + _FIRST_PROGRAM).to(tl.int32)) * BLOCK_ROWS
    own += tl.load(entry + _OWN) * UNIT + first_row.to(tl.int64) * own_stride
    target += tl.load(entry + _TARGET) * UNIT + first_row.to(tl.int64) * target_stride
    left += tl.load(entry + _LEFT) * RANK_UNIT + first_row * rank
    right += tl.load(entry + _RIGHT) * UNIT
    magnitude += tl.load(entry + _MAGNITUDE) + first_row
    row, column, scaling = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS), tl.load(scalings + weight)
    in_rows = row < rows - first_row
    squares = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for first_column in range(0, columns, BLOCK_COLUMNS):
        total = _sum(
            own, left, right, row, rows - first_row, columns, first_column, rank, own_stride, scaling,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANKS, PRECISION,
        )  # fmt: skip
        squares += tl.sum(total * total, axis=1)  # what lies outside is zero
    wanted = tl.load(magnitude + row, mask=in_rows, other=0.0)
    gain = tl.where(in_rows, wanted / tl.sqrt(tl.where(in_rows, squares, 1.0)), 0.0)
    for first_column in range(0, columns, BLOCK_COLUMNS):
        total = _sum(
            own, left, right, row, rows - first_row, columns, first_column, rank, own_stride, scaling,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANKS, PRECISION,
        )  # fmt: skip
        mask = in_rows[:, None] & (column < columns - first_column)[None, :]
        place = target + first_column + row[:, None] * target_stride + column[None, :]
        tl.store(place, (total * gain[:, None]).to(target.dtype.element_ty), mask=mask)


class Term(NamedTuple):
    """What is added to one weight.

    Attributes:
        left: [O, R], contiguous, of one of `DTYPES`. What 16 bits hold is multiplied by tensor cores, which lose none
            of it in 32; other numbers go there in three parts, if the weight is of 16 bits.
        right: [R, I], as `left`.
        scaling: of their product.
        magnitude: [O], float32, contiguous: each row of the sum gets this norm; None if it is what it is.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None


class Sums:
    """W + s B A of many weights, each rounded once.

    Args:
        terms: one for each weight, all on one device.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = terms
        self._places: list[int] = []
        self._launches: list[_Launch] = []

    def write(self, targets: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> None:
        """Write own + scaling × left @ right into `targets`.

        Args:
            targets: [O, I] each, of one of `DTYPES`; their columns one beside the other.
            own: as `targets`, and not the same memory.
        """
        places = [tensor.data_ptr() for tensors in (own, targets) for tensor in tensors]
        if places != self._places:  # what a launch knows is where everything lies
            self._launches = [
                _Launch(jobs) for jobs in _alike(_Job(*job) for job in zip(own, targets, self._terms, strict=True))
            ]
            self._places = places
        with torch.cuda.device_of(targets[0]):  # Triton launches on the current device, whatever the tensors'
            for launch in self._launches:
                launch()
        for target in targets:
            torch.autograd.graph.increment_version(target)  # as an operation of torch's does


class _Job(NamedTuple):
    own: torch.Tensor
    target: torch.Tensor
    term: Term

    @property
    def unit(self) -> int:
        """Elements of a vector, if all rows begin where one does and consist of whole ones; else 1."""
        own, target, right = self.own, self.target, self.term.right
        unit = _VECTOR_BYTES // own.element_size()
        places = (*(tensor.data_ptr() // tensor.element_size() for tensor in (own, target, right)),)
        sizes = own.shape[1], own.stride(0), target.stride(0)
        return unit if not any(number % unit for number in (*places, *sizes)) else 1

    @property
    def rank_unit(self) -> int:
        """The same of the ranks."""
        left = self.term.left
        unit = _VECTOR_BYTES // left.element_size()
        return unit if not (left.data_ptr() % _VECTOR_BYTES or left.shape[1] % unit) else 1

    @property
    def block_ranks(self) -> int:
        """Ranks that are added up at a time."""
        power: int = triton.next_power_of_2(self.term.left.shape[1])
        return min(_MOST_RANKS, max(16, power))


def takes(own: torch.Tensor, target: torch.Tensor, term: Term) -> bool:
    """Whether `Sums.write` does: what it counts in 32 bits has to fit into them."""
    steps = max(own.stride(0), target.stride(0), own.shape[1]) * max(_BLOCK_ROWS, term.left.shape[1], _MOST_RANKS)
    in_place = target.is_cuda and own.device == target.device == term.left.device
    known = own.dtype == target.dtype and target.dtype in DTYPES and own.stride(1) == target.stride(1) == 1
    return in_place and known and steps < 1 << 31


def _alike(jobs: Iterable[_Job]) -> list[list[_Job]]:
    """What one kernel does with one choice of its constants."""
    groups: dict[Any, list[_Job]] = {}
    for job in jobs:
        dtypes = job.own.dtype, job.term.left.dtype
        alike = *dtypes, job.unit, job.rank_unit, job.block_ranks, job.term.magnitude is None
        groups.setdefault(alike, []).append(job)
    return list(groups.values())


class _Launch:
    """One launch, and the table that it reads, on the device.

    Args:
        jobs: of `_alike`, whose places do not change.
    """

    def __init__(self, jobs: Sequence[_Job]) -> None:
        own, target, (left, right, _, magnitude) = jobs[0]
        self._first = own, target, left, right, *([] if magnitude is None else [magnitude])
        unit, rank_unit = jobs[0].unit, jobs[0].rank_unit
        self._kernel: Any = _add if magnitude is None else _add_and_scale_rows
        # float32 by float32 into 16 bits: three products in TF32, whose ten bits are not enough by themselves.
        precision = "tf32x3" if left.dtype == torch.float32 and own.dtype != torch.float32 else "ieee"
        self._constants = {
            "UNIT": unit, "RANK_UNIT": rank_unit, "BLOCK_ROWS": _BLOCK_ROWS, "BLOCK_COLUMNS": _BLOCK_COLUMNS,
            "BLOCK_RANKS": jobs[0].block_ranks, "PRECISION": precision, "num_warps": _WARPS,
            "enable_fp_fusion": True,  # W + s × sum rounds once; by default it does up to Triton 3.9, with a warning
        }  # fmt: skip
        table, programs, counts = [], 0, []
        for job in jobs:
            rows, columns = job.own.shape
            norms = job.term.magnitude
            table.append([
                _apart(job.own, own) // unit, _apart(job.target, target) // unit,
                _apart(job.term.left, left) // rank_unit, _apart(job.term.right, right) // unit,
                0 if norms is None or magnitude is None else _apart(norms, magnitude),
                rows, columns // unit, job.term.left.shape[1] // rank_unit,
                job.own.stride(0) // unit, job.target.stride(0) // unit, programs,
            ])  # fmt: skip
            tile_columns = triton.cdiv(columns, _BLOCK_COLUMNS) if magnitude is None else 1
            counts.append(triton.cdiv(rows, _BLOCK_ROWS) * tile_columns)
            programs += counts[-1]
        device = target.device
        self._table = torch.tensor(table, device=device)
        self._scalings = torch.tensor([job.term.scaling for job in jobs], dtype=torch.float32, device=device)
        numbers = torch.arange(len(jobs), dtype=torch.int32, device=device)
        self._weight_of = numbers.repeat_interleave(torch.tensor(counts, device=device))  # a program's
        self._grid = (programs,)

    def __call__(self) -> None:
        self._kernel[self._grid](self._table, self._scalings, self._weight_of, *self._first, **self._constants)


def _apart(tensor: torch.Tensor, first: torch.Tensor) -> int:
    """How many elements lie between their beginnings: tensors of one dtype are aligned to it."""
    return (tensor.data_ptr() - first.data_ptr()) // first.element_size()
