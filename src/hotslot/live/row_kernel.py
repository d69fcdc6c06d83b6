"""Triton's kernel that puts an adapter's bytes into an arena.

Imported where an arena lies on a GPU, and by tests, which run it in Triton's interpreter on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

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
    return torch.tensor(rows, dtype=torch.int64, device="cpu"), torch.tensor(tiles, dtype=torch.int32, device="cpu")


def copy_rows(source: torch.Tensor, target: torch.Tensor, table: torch.Tensor, part_of_tile: torch.Tensor) -> None:
    """Copy rows of words, each followed by zeros, in one launch; counts for autograd as no write.

    Args:
        source, target: 1-D, of the dtypes that words are read and written as.
        table, part_of_tile: of `tabulate`, on the same device.
    """
    with torch.cuda.device_of(target):
        _copy_rows[part_of_tile.numel(),](
            source, target, table, part_of_tile, TILE=_TILE, FIELDS=_FIELDS, num_warps=8, enable_fp_fusion=True
        )  # nothing is added up: Triton 3.9 warns where it is not told


def compile_for(source: torch.Tensor, target: torch.Tensor) -> None:
    """Have the kernel compiled for the dtypes of these, before it is wanted; nothing is written."""
    no_rows = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0]], device=target.device)
    copy_rows(source, target, no_rows, torch.zeros(1, dtype=torch.int32, device=target.device))
