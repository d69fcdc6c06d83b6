"""W + s B A: merges of LoRA and its kin, directly, many by one launch on a GPU, and blends of them."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import NonFiniteError, UnsupportedError
from .absolutes import Key, Merge

# A product's rows that are added up at a time: few enough to be in the cache still when they are read.
_BLOCK_BYTES = 1 << 21
# Of the weights of one launch: those whose own values wait in host memory are all on the device for it.
_LAUNCH_VALUES = 1 << 28
_HALVES = (torch.bfloat16, torch.float16)


class LowRank:
    """W + scaling B A, a block of rows at a time, so that the product never leaves the cache.

    PEFT rounds the product, then scaling times it, then the sum (LoRA, https://arxiv.org/abs/2106.09685). Where the
    scaling is a power of two the second changes no digit, and one matrix multiplication does all of it. `fused` does so
    with any scaling, in 32 bits at least, and rounds to the weight's dtype once.

    Args:
        key: the weight, [out, in]; [in, out] of transformers' Conv1D, which is `transposed`.
        down, up: A, [rank, in], and B, [out, rank], of one dtype.
        whole: the product in one piece, for libraries that round blocks otherwise.
        stepwise: the product by itself, for libraries that round otherwise where they add it up.
        fused: with fewer roundings than PEFT.
        magnitude: of DoRA (https://arxiv.org/abs/2402.09353), [out], float32: each row of the sum gets this norm.
    """

    def __init__(
        self,
        key: Key,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        *,
        transposed: bool,
        whole: bool = False,
        stepwise: bool = False,
        fused: bool = False,
        magnitude: torch.Tensor | None = None,
    ) -> None:
        self.keys: tuple[Key, ...] = (key,)
        self.down, self.up, self.scaling, self.transposed = down.detach(), up.detach(), scaling, transposed
        left, right = (down.T, up.T) if transposed else (up, down)
        self.fused = fused
        self.magnitude = magnitude.detach() if magnitude is not None else None
        self._folded = not (fused or stepwise) and math.frexp(scaling)[0] == 0.5
        self.left = left.detach().contiguous()
        self.right = right.detach().contiguous()
        row_bytes = self.right.shape[1] * self.right.element_size()
        self._rows = len(left) if whole else max(1, min(len(left), _BLOCK_BYTES // max(1, row_bytes)))

    @property
    def size(self) -> int:
        """How many values the weight has."""
        return len(self.left) * self.right.shape[1]

    def held(self) -> Iterable[torch.Tensor]:
        """See Merge."""
        magnitude = [self.magnitude] if self.magnitude is not None else []
        return [self.down, self.up, self.left, self.right, *magnitude]

    @property
    def term(self) -> Any:
        """As `kernels.py` takes it."""
        return _kernels().Term(self.left, self.right, self.scaling, self.magnitude)

    def launches(self, target: torch.Tensor, own: torch.Tensor) -> bool:
        """Whether it is done by a kernel of ours."""
        kernels = _kernels() if self.fused and target.is_cuda else None
        return kernels is not None and bool(kernels.takes(own, target, self.term))

    @property
    def adds_up(self) -> bool:
        """Whether it is the base's own weight and something."""
        return self.magnitude is None

    def write(self, targets: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """See Merge."""
        (target,), (own,), left, right = targets, pristine, self.left, self.right
        if self.launches(target, own):
            _kernels().Sums([self.term]).write(targets, pristine)
            return
        if self.fused:
            exact_in = torch.promote_types(own.dtype, torch.float32)
            left, right = left.to(exact_in), right.to(exact_in)
        block = right.new_empty(self._rows, right.shape[1])
        product = torch.empty_like(block)
        for first in range(0, len(left), self._rows):
            rows = slice(first, first + self._rows)
            part, old, new = left[rows], own[rows], target[rows]
            exact = old if own.dtype == right.dtype else block[: len(part)].copy_(old)
            total = new if exact is old else exact
            if self._folded:
                torch.addmm(exact, part, right, alpha=self.scaling, out=total)
            else:
                delta = torch.mm(part, right, out=product[: len(part)])
                if self.fused:  # a matrix multiplication into the weight would round with each rank
                    torch.add(exact, delta, alpha=self.scaling, out=total)
                else:
                    torch.add(exact, delta.mul_(self.scaling), out=total)
            if self.magnitude is not None:
                norm = torch.linalg.vector_norm(total, dim=1, keepdim=True)
                total.mul_(self.magnitude[rows, None] / norm)
            if total is not new:
                new.copy_(total)


class Together:
    """Several that one launch does, on one GPU.

    Args:
        parts: all fused.
    """

    def __init__(self, parts: Sequence[LowRank]) -> None:
        self.keys = tuple(key for part in parts for key in part.keys)
        self._parts = parts
        self._sums = _kernels().Sums([part.term for part in parts])

    def held(self) -> Iterable[torch.Tensor]:
        """See Merge."""
        for part in self._parts:
            yield from part.held()

    def write(self, targets: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """See Merge."""
        if all(map(LowRank.launches, self._parts, targets, pristine)):
            self._sums.write(targets, pristine)
            return
        for part, target, own in zip(self._parts, targets, pristine, strict=True):
            part.write([target], [own])


def together(merges: Sequence[Merge]) -> tuple[Merge, ...]:
    """The same merges, those of one GPU that one launch can do at once."""
    steps, open_parts, size = list[Merge](), list[LowRank](), 0

    def close() -> None:
        if open_parts:
            steps.append(Together(list(open_parts)) if len(open_parts) > 1 else open_parts[0])
        open_parts.clear()

    for merge in merges:
        if not isinstance(merge, LowRank) or not merge.fused or not merge.left.is_cuda or _kernels() is None:
            steps.append(merge)
            continue
        if open_parts and (size + merge.size > _LAUNCH_VALUES or open_parts[0].left.device != merge.left.device):
            close()
            size = 0
        open_parts.append(merge)
        size += merge.size
    close()
    return tuple(steps)


def narrowed(tensors: Sequence[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """In 16 bits, if these hold all of their values and the weight has no more: so tensor cores multiply them."""
    for dtype in _HALVES if weight.dtype in _HALVES else ():
        narrow = [tensor.to(dtype) for tensor in tensors]
        if all(torch.equal(short.to(tensor), tensor) for short, tensor in zip(narrow, tensors, strict=True)):
            return narrow
    return [tensor.float() for tensor in tensors]


@functools.cache
def _kernels() -> Any:
    """Ours in Triton, which comes with most CUDA builds of torch; None without it."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import kernels

    return kernels


def blended(parts: Sequence[tuple[Sequence[Merge], float]]) -> tuple[Merge, ...]:
    """The sum of several adapters' deltas, each times its weight, added to the base's own values.

    That is a LoRA whose A and B are theirs one behind the other, as PEFT's `add_weighted_adapter(
    combination_type="cat")` makes it, and its merge.

    Raises:
        UnsupportedError: something that is no LoRA of linear layers.
        NonFiniteError: a weight makes values overflow.
    """
    found: dict[tuple[Key, ...], list[tuple[LowRank, float]]] = {}
    for merges, weight in parts:
        for merge in merges:
            if not isinstance(merge, LowRank) or not merge.adds_up:
                raise UnsupportedError(
                    "An adapter that is merged has other things than LoRA of linear layers, which do not add up.",
                    where=merge.keys[0][1],
                    found=type(merge).__name__,
                    expected="plain LoRA, without DoRA, biases, saved modules",
                    hint="activate it alone, with weight 1",
                )
            found.setdefault(merge.keys, []).append((merge, weight))
    sums = []
    for (key,), terms in found.items():
        factors = [(part.down.float(), part.up.float()) if part.fused else (part.down, part.up) for part, _ in terms]
        scaled = [down * (weight * part.scaling) for (down, _), (part, weight) in zip(factors, terms, strict=True)]
        down, up = torch.cat(scaled), torch.cat([up for _, up in factors], dim=1)
        if not down.isfinite().all():
            raise NonFiniteError(
                "The weights make values overflow.",
                where=key[1],
                found="infinite values",
                expected=f"numbers of {down.dtype}",
                hint="smaller weights",
            )
        first, _ = terms[0]
        sums.append(LowRank(key, down, up, 1.0, transposed=first.transposed, fused=first.fused))
    return tuple(sums)
