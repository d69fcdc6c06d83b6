"""Triton's kernels: W + s B A in one pass over the weight, and an adapter's bytes into an arena.

Imported where a weight or an arena lies on a GPU, and by tests, which run it in Triton's interpreter on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what is accumulated in 32 bits loses nothing of these

_BLOCK_ROWS, _BLOCK_COLUMNS = 64, 128
_MOST_RANKS = 64  # of one step of the product; tl.dot takes 16 at least


@triton.jit
def _sum(
    own, left, right, row, column, rows, columns, rank, own_stride, scaling,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
):  # fmt: skip
    """A tile of W + s B A, in float32."""
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANKS):
        ranks = first + tl.arange(0, BLOCK_RANKS)
        left_mask = (row[:, None] < rows) & (ranks[None, :] < rank)
        right_mask = (ranks[:, None] < rank) & (column[None, :] < columns)
        up = tl.load(left + row[:, None] * rank + ranks[None, :], mask=left_mask, other=0.0)
        down = tl.load(right + ranks[:, None] * columns + column[None, :], mask=right_mask, other=0.0)
        product += tl.dot(up, down, input_precision="ieee")  # not tf32, which has ten bits
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    weight = tl.load(own + row[:, None] * own_stride + column[None, :], mask=mask, other=0.0)
    return weight.to(tl.float32) + scaling * product


@triton.jit
def _add(
    own, left, right, target, rows, columns, rank, own_stride, target_stride, scaling,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = _sum(
        own, left, right, row, column, rows, columns, rank, own_stride, scaling,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANKS,
    )  # fmt: skip
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    place = target + row[:, None] * target_stride + column[None, :]
    tl.store(place, total.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _add_and_scale_rows(
    own, left, right, target, magnitude, rows, columns, rank, own_stride, target_stride, scaling,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
):  # fmt: skip
    """DoRA: a row's norm has to be known before any of it is written, so the sum is made twice."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    squares = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        total = _sum(
            own, left, right, row, column, rows, columns, rank, own_stride, scaling,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANKS,
        )  # fmt: skip
        squares += tl.sum(total * total, axis=1)  # what lies outside is zero
    wanted = tl.load(magnitude + row, mask=row < rows, other=0.0).to(tl.float32)
    gain = tl.where(row < rows, wanted / tl.sqrt(tl.where(row < rows, squares, 1.0)), 0.0)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        total = _sum(
            own, left, right, row, column, rows, columns, rank, own_stride, scaling,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANKS,
        )  # fmt: skip
        mask = (row[:, None] < rows) & (column[None, :] < columns)
        place = target + row[:, None] * target_stride + column[None, :]
        tl.store(place, (total * gain[:, None]).to(target.dtype.element_ty), mask=mask)


def add_low_rank(
    own: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scaling: float,
    target: torch.Tensor,
    magnitude: torch.Tensor | None = None,
) -> None:
    """Write own + scaling × left @ right into `target`, rounded once; with `magnitude` each row gets that norm.

    Args:
        own: [rows, columns], of one of `DTYPES`; its columns one beside the other.
        left: [rows, rank], float32, contiguous.
        right: [rank, columns], float32, contiguous.
        scaling: of the product.
        target: as `own`, and not the same memory.
        magnitude: [rows], contiguous.
    """
    rows, columns = own.shape
    rank = left.shape[1]
    block_ranks = min(_MOST_RANKS, max(16, triton.next_power_of_2(rank)))
    blocks: dict[str, Any] = {"BLOCK_ROWS": _BLOCK_ROWS, "BLOCK_COLUMNS": _BLOCK_COLUMNS, "BLOCK_RANKS": block_ranks}
    sizes = rows, columns, rank, own.stride(0), target.stride(0), scaling
    grid_rows = triton.cdiv(rows, _BLOCK_ROWS)
    with torch.cuda.device_of(target):  # Triton launches on the current device, whatever the tensors'
        if magnitude is None:
            _add[grid_rows, triton.cdiv(columns, _BLOCK_COLUMNS)](own, left, right, target, *sizes, **blocks)
        else:
            _add_and_scale_rows[grid_rows,](own, left, right, target, magnitude, *sizes, **blocks)
    torch.autograd.graph.increment_version(target)  # as an operation of torch's does


_TILE = 4096  # words of a program: of 8 bytes on an H100 the fastest of 1,024 to 8,192
_FIELDS = 8  # of a row of the table


@triton.jit
def _copy_rows(source, target, table, part_of_tile, TILE: tl.constexpr, FIELDS: tl.constexpr):
    """A tile of one part: `given` words of each row from the source, zeros behind them up to `width`."""
    tile = tl.program_id(0)
    part = table + tl.load(part_of_tile + tile).to(tl.int64) * FIELDS
    start, place = tl.load(part), tl.load(part + 1)
    rows, given = tl.load(part + 2).to(tl.int32), tl.load(part + 3).to(tl.int32)
    width, stride, first = tl.load(part + 4).to(tl.int32), tl.load(part + 5), tl.load(part + 6).to(tl.int32)
    word = (tile - first) * TILE + tl.arange(0, TILE)
    row = word // width
    column = word - row * width
    inside = row < rows
    there = inside & (column < given)
    value = tl.load(source + start + row.to(tl.int64) * given + column, mask=there, other=0)
    tl.store(target + place + row.to(tl.int64) * stride + column, value.to(target.dtype.element_ty), mask=inside)


def tabulate(parts: Sequence[tuple[int, int, int, int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `copy_rows` takes, on the CPU.

    Args:
        parts: of each the first word in the source and in the target, rows, words of a row in the source, words of a
            row to be written, and words from one row of the target to the next. Less than 2^31 words in a part.

    Returns:
        int64 [parts, 8] and int32 [tiles]: the part that a tile is of.
    """
    rows: list[list[int]] = []
    tiles: list[int] = []
    for i, part in enumerate(parts):
        rows.append([*part, len(tiles), 0])
        tiles += [i] * triton.cdiv(part[2] * part[4], _TILE)
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(tiles, dtype=torch.int32)


def copy_rows(source: torch.Tensor, target: torch.Tensor, table: torch.Tensor, part_of_tile: torch.Tensor) -> None:
    """Copy rows of words, each followed by zeros, in one launch; counts for autograd as no write.

    Args:
        source, target: 1-D, of the dtypes that words are read and written as.
        table, part_of_tile: of `tabulate`, on the same device.
    """
    with torch.cuda.device_of(target):
        _copy_rows[part_of_tile.numel(),](source, target, table, part_of_tile, TILE=_TILE, FIELDS=_FIELDS, num_warps=8)
