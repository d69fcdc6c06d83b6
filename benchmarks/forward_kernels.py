"""Triton kernels of the forward designs: the low-rank inputs of layers that share an input, and their products.

T: tokens   K: inputs   O: outputs   R: rank of a slot   G: layers that share the input   S: parts of the sum over K
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MOST_LAYERS = 3


@triton.jit
def _down(
    x, a, partial, tokens, inputs, rows, part_inputs,
    BLOCK_T: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[S, T, GR] = x Aᵀ over each part of K, in float32: to be summed by whoever reads it, in a fixed order."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(1)
    total = tl.zeros((BLOCK_T, BLOCK_ROWS), dtype=tl.float32)
    for first in range(part * part_inputs, (part + 1) * part_inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < inputs
        left = tl.load(
            x + token[:, None] * inputs + k[None, :], mask=(token[:, None] < tokens) & inside[None, :], other=0.0
        )
        right = tl.load(a + row[None, :] * inputs + k[:, None], mask=(row[None, :] < rows) & inside[:, None], other=0.0)
        total += tl.dot(left, right, input_precision="ieee")
    place = partial + (part * tokens + token[:, None]) * rows + row[None, :]
    tl.store(place, total, mask=(token[:, None] < tokens) & (row[None, :] < rows))


@triton.jit
def _down_one(x, a, scaling, low, inputs, rank, BLOCK_K: tl.constexpr):
    """low[GR] = s A x for one token: a program for each row."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < inputs
        left = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(a + row * inputs + k, mask=inside, other=0.0).to(tl.float32)
        total += left * right
    tl.store(low + row, tl.sum(total) * tl.load(scaling + row // rank))


@triton.jit
def _place(block, y0, y1, y2, b0, b1, b2, outputs0, outputs1, outputs2, blocks0, blocks1):
    """Which layer a block of outputs is of, the how manieth there, and the layer's own y, B and O."""
    layer = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    if layer == 0:
        y, b, outputs = y0, b0, outputs0
    elif layer == 1:
        y, b, outputs = y1, b1, outputs1
        block -= blocks0
    else:
        y, b, outputs = y2, b2, outputs2
        block -= blocks0 + blocks1
    return layer, block, y, b, outputs


@triton.jit
def _up_one(
    low, y0, y1, y2, b0, b1, b2, outputs0, outputs1, outputs2, blocks0, blocks1, rank,
    BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y += B low for one token, of up to three layers: in place."""
    layer, block, y, b, outputs = _place(
        tl.program_id(0), y0, y1, y2, b0, b1, b2, outputs0, outputs1, outputs2, blocks0, blocks1
    )
    o, r = block * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_R)
    inside = o < outputs
    left = tl.load(low + layer * rank + r, mask=r < rank, other=0.0)
    right = tl.load(b + o[:, None] * rank + r[None, :], mask=inside[:, None] & (r[None, :] < rank), other=0.0)
    total = tl.load(y + o, mask=inside, other=0.0).to(tl.float32) + tl.sum(right.to(tl.float32) * left[None, :], axis=1)
    tl.store(y + o, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _up(
    partial, scaling, y0, y1, y2, b0, b1, b2, outputs0, outputs1, outputs2, blocks0, blocks1, tokens, rows, rank,
    PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y += s low Bᵀ for many tokens, of up to three layers: in place."""
    layer, block, y, b, outputs = _place(
        tl.program_id(1), y0, y1, y2, b0, b1, b2, outputs0, outputs1, outputs2, blocks0, blocks1
    )
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o, r = block * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_R)
    known = (token[:, None] < tokens) & (r[None, :] < rank)
    low = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for part in range(PARTS):
        low += tl.load(
            partial + (part * tokens + token[:, None]) * rows + layer * rank + r[None, :], mask=known, other=0.0
        )
    low *= tl.load(scaling + layer)
    right = tl.load(b + o[None, :] * rank + r[:, None], mask=(o[None, :] < outputs) & (r[:, None] < rank), other=0.0)
    total = tl.dot(low.to(b.dtype.element_ty), right, input_precision="ieee")
    place = y + token[:, None] * outputs + o[None, :]
    mask = (token[:, None] < tokens) & (o[None, :] < outputs)
    total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(y.dtype.element_ty), mask=mask)


def low_inputs(x: torch.Tensor, a: torch.Tensor, scalings: torch.Tensor) -> torch.Tensor:
    """x Aᵀ: of one token [GR], scaled; of more [S, T, GR], not scaled, to be summed over S. In float32.

    Args:
        x: [T, K], contiguous.
        a: [GR, K], contiguous.
        scalings: [G], float32.
    """
    tokens, inputs = x.shape
    rows = a.shape[0]
    if tokens == 1:
        low = torch.empty(rows, dtype=torch.float32, device=x.device)
        block = min(4096, triton.next_power_of_2(inputs))
        _down_one[rows,](x, a, scalings, low, inputs, rows // scalings.numel(), BLOCK_K=block, num_warps=8)
        return low
    block_t, block_k, parts = 16, 128, 4
    part_inputs = triton.cdiv(triton.cdiv(inputs, parts), block_k) * block_k
    parts = triton.cdiv(inputs, part_inputs)
    partial = torch.empty(parts, tokens, rows, dtype=torch.float32, device=x.device)
    _down[triton.cdiv(tokens, block_t), parts](
        x, a, partial, tokens, inputs, rows, part_inputs,
        BLOCK_T=block_t, BLOCK_ROWS=max(16, triton.next_power_of_2(rows)), BLOCK_K=block_k, num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial


def add_products(low: torch.Tensor, scalings: torch.Tensor, ys: list[torch.Tensor], bs: list[torch.Tensor]) -> None:
    """Add the layers' products to `ys` in place: each [T, O], contiguous; `low` of `low_inputs`, `bs` each [O, R]."""
    missing = _MOST_LAYERS - len(ys)
    outputs = [y.shape[1] for y in ys] + [0] * missing
    ys, bs, rank = [*ys, *[ys[0]] * missing], [*bs, *[bs[0]] * missing], bs[0].shape[1]
    block_r = max(16, triton.next_power_of_2(rank))
    if low.dim() == 1:
        block_o = 128
        blocks = [triton.cdiv(count, block_o) for count in outputs]
        _up_one[sum(blocks),](low, *ys, *bs, *outputs, *blocks[:2], rank, BLOCK_O=block_o, BLOCK_R=block_r, num_warps=4)
        return
    parts, tokens, rows = low.shape
    block_t, block_o = 64, 256
    blocks = [triton.cdiv(count, block_o) for count in outputs]
    _up[triton.cdiv(tokens, block_t), sum(blocks)](
        low, scalings, *ys, *bs, *outputs, *blocks[:2], tokens, rows, rank,
        PARTS=parts, BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_R=block_r, num_warps=8,
    )  # fmt: skip
