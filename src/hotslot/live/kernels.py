"""W + s B A on a GPU in one pass, in Triton: the weight is read once, the product never leaves the registers.

Imported where a weight lies on a GPU, and by tests, which run it in Triton's interpreter on the CPU.
"""

from __future__ import annotations

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
