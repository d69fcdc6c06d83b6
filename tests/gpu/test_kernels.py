"""The Triton kernels: on a GPU, or in Triton's interpreter, as `tests/test_kernels.py` runs this file."""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs a GPU, or TRITON_INTERPRET=1 from the start of the process",
    ),
]
pytest.importorskip("triton")

from hotslot.live.kernels import Sums, Term  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(70, 130, 4), (1, 1, 1), (33, 257, 24), (128, 64, 100)]


def drawn(rows: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * columns + rank)
    shapes = (rows, columns), (rows, rank), (rank, columns), (rows,)
    own, left, right, magnitude = (torch.randn(shape, generator=generator) for shape in shapes)
    return own.to(DEVICE, dtype), left.to(DEVICE), right.to(DEVICE), magnitude.abs().to(DEVICE)


def in_peft_s_way(
    own: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float, magnitude: torch.Tensor | None
) -> torch.Tensor:
    """In the weight's dtype, rounded at each step."""
    left, right = left.to(own.dtype), right.to(own.dtype)
    total = own + (left @ right) * scaling
    if magnitude is None:
        return total
    return total * (magnitude.to(own.dtype) / total.norm(dim=1))[:, None]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sum_is_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype, dora: bool) -> None:
    own, left, right, norms = drawn(*shape, dtype)
    magnitude, scaling = norms if dora else None, 0.3
    exact = own.double() + scaling * left.double() @ right.double()
    if magnitude is not None:
        exact *= (magnitude.double() / exact.norm(dim=1))[:, None]
    target = torch.full_like(own, torch.nan)
    Sums([Term(left, right, scaling, magnitude)]).write([target], [own])

    if DEVICE == "cuda" or dtype != torch.bfloat16:  # which the interpreter cuts off, where a GPU rounds
        peft = in_peft_s_way(own, left, right, scaling, magnitude)
        assert (target.double() - exact).norm() <= 1.05 * (peft.double() - exact).norm() + 1e-7
    # Beside the one rounding there is the order of a float32 sum.
    assert torch.allclose(target, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


NARROW = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # the interpreter takes bfloat16 for integers


@pytest.mark.parametrize("narrow", NARROW)
def test_many_weights_at_once_each_as_if_alone(narrow: torch.dtype) -> None:
    """Of other sizes, ranks and dtypes, whole vectors or not, with norms and without; and again, at other places."""
    jobs = [
        (drawn(*shape, dtype), factors, scaling, dora)
        for scaling, (shape, dtype, factors, dora) in enumerate([
            ((40, 64, 8), narrow, narrow, False), ((70, 200, 24), narrow, narrow, False),
            ((9, 33, 3), narrow, narrow, False), ((40, 48, 16), narrow, torch.float32, False),
            ((16, 40, 8), torch.float32, torch.float32, False), ((40, 64, 8), narrow, narrow, True),
            ((70, 136, 16), narrow, narrow, True),
        ], 1)
    ]  # fmt: skip
    terms, exact = [], []
    for (own, left, right, norms), factors, scaling, dora in jobs:
        terms.append(Term(left.to(factors), right.to(factors), scaling, norms if dora else None))
        exact.append(own.double() + scaling * terms[-1].left.double() @ terms[-1].right.double())
        if dora:
            exact[-1] *= (norms.double() / exact[-1].norm(dim=1))[:, None]
    sums, owns = Sums(terms), [own for (own, *_), *_ in jobs]
    for _ in range(2):
        targets = [torch.full_like(own, torch.nan) for own in owns]
        sums.write(targets, owns)
        for target, wanted in zip(targets, exact, strict=True):
            assert torch.allclose(target, wanted.to(target.dtype), rtol=2 * torch.finfo(target.dtype).eps, atol=2e-4)


def test_rows_may_lie_apart_and_nothing_beside_them_is_written() -> None:
    own, left, right, _ = drawn(40, 30, 8, torch.float32)
    wide = torch.full((40, 50), 7.0, device=DEVICE)
    Sums([Term(left, right, 2.0)]).write([wide[:, 10:40]], [own])
    assert torch.allclose(wide[:, 10:40], own + 2.0 * left @ right, rtol=1e-5, atol=1e-5)
    assert (wide[:, :10] == 7).all()
    assert (wide[:, 40:] == 7).all()


def test_a_write_counts_as_one() -> None:
    """Else a backward pass over the old weight would be wrong in silence."""
    own, left, right, _ = drawn(16, 16, 4, torch.float32)
    target = torch.empty_like(own)
    before = target._version
    Sums([Term(left, right, 1.0)]).write([target], [own])
    assert target._version == before + 1
