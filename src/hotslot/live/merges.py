"""The ways to compute merged weights from pristine ones: kept values, PEFT's own layer, and directly."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import NonFiniteError, UnsupportedError
from .absolutes import Key, Merge
from .skeleton import Unit, base_of

# A product's rows that are added up at a time: few enough to be in the cache still when they are read.
_BLOCK_BYTES = 1 << 21


class Merges(NamedTuple):
    """All merges of an adapter, and what they cost.

    Attributes:
        all: each module's.
        nbytes: of the base's tensors that they write; as many are kept beside them.
        seconds: what they took when they were tried.
        error: what rounding to the weights' dtype loses of the adapter's effect, relative to that (Frobenius norms, the
            largest of any module); None where weights are of 32 bits or more, or the method does not compute in them.
    """

    all: tuple[Merge, ...] = ()
    nbytes: int = 0
    seconds: float = 0.0
    error: float | None = None


NO_MERGES = Merges()


class Keeping(NamedTuple):
    """What it costs to keep the base's own values in one place.

    Attributes:
        nbytes: of memory for them, of that place.
        seconds: of a swap, for merging from there.
    """

    nbytes: int
    seconds: float


class Constant:
    """Values that are kept: of modules saved whole, and where PEFT's layer merges once only."""

    def __init__(self, keys: tuple[Key, ...], values: Sequence[torch.Tensor]) -> None:
        self.keys = keys
        self._values = [value.clone() for value in values]

    def held(self) -> Iterable[torch.Tensor]:
        """See Merge."""
        return self._values

    def write(self, targets: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """See Merge."""
        for target, value in zip(targets, self._values, strict=True):
            target.copy_(value)


class ByPeft:
    """What PEFT's layer makes of the base's own values.

    Args:
        keys: which tensors it changes.
        unit: a layer of the skeleton; its base has no values between merges.
        names: of `keys`, within the base module.
        others: name → gives the values of a tensor that it only reads.
    """

    def __init__(
        self,
        keys: tuple[Key, ...],
        unit: Unit,
        names: Sequence[str],
        others: Mapping[str, Callable[[], torch.Tensor]],
    ) -> None:
        self.keys = keys
        self._layer = unit.layer
        self._names = names
        self._others = others

    def held(self) -> Iterable[torch.Tensor]:
        """See Merge; what layers share, each of them has."""
        base = base_of(self._layer)
        lent = {id(base.get_parameter(name)) for name in (*self._names, *self._others)}  # the model's, for a merge
        for module in self._layer.modules():
            for holder in (module._parameters, module._buffers, vars(module)):
                yield from (tensor for tensor in _tensors_in(holder) if id(tensor) not in lent)

    def write(self, targets: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """See Merge."""
        base = base_of(self._layer)
        for name, other in self._others.items():
            base.get_parameter(name).data = other().detach()
        for name, target, values in zip(self._names, targets, pristine, strict=True):
            target.copy_(values)
            base.get_parameter(name).data = target.detach()
        merged = merge_once(self._layer)
        for name, target in zip(self._names, targets, strict=True):
            param = merged.get_parameter(name)
            if param.data_ptr() != target.data_ptr():
                target.copy_(param)
        for name in (*self._names, *self._others):
            param = base.get_parameter(name)
            param.data = param.data.new_empty(0)


class Scaled:
    """W times a factor, that of rows or of columns (IA³, https://arxiv.org/abs/2205.05638); a bias, too.

    Args:
        keys: which tensors.
        factors: one for each, of a shape that broadcasts.
    """

    def __init__(self, keys: tuple[Key, ...], factors: Sequence[torch.Tensor]) -> None:
        self.keys = keys
        self._factors = [factor.detach() for factor in factors]

    def held(self) -> Iterable[torch.Tensor]:
        """See Merge."""
        return self._factors

    def write(self, targets: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """See Merge."""
        for target, own, factor in zip(targets, pristine, self._factors, strict=True):
            torch.mul(own, factor, out=target)


class Rotated:
    """W Rᵀ, where R turns blocks of inputs, each by a matrix of its own (OFT, https://arxiv.org/abs/2306.07280).

    The blocks alone are kept and multiplied. PEFT makes the whole of R at each merge, and multiplies by all its zeros.

    Args:
        key: the weight, [out, in].
        blocks: of Rᵀ, [blocks, in / blocks, in / blocks].
    """

    def __init__(self, key: Key, blocks: torch.Tensor) -> None:
        self.keys: tuple[Key, ...] = (key,)
        self._blocks = blocks.detach().contiguous()

    def held(self) -> Iterable[torch.Tensor]:
        """See Merge."""
        return [self._blocks]

    def write(self, targets: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """See Merge."""
        (target,), (own,), (count, size, _) = targets, pristine, self._blocks.shape
        by_block = own.to(self._blocks.dtype).view(-1, count, size).transpose(0, 1)
        target.view(-1, count, size).copy_(torch.bmm(by_block, self._blocks).transpose(0, 1))


class LowRank:
    """W + scaling B A, a block of rows at a time, so that the product never leaves the cache.

    PEFT rounds the product, then scaling times it, then the sum (LoRA, https://arxiv.org/abs/2106.09685). Where the
    scaling is a power of two the second changes no digit, and one matrix multiplication does all of it. `fused` does so
    with any scaling, in 32 bits at least, and rounds to the weight's dtype once.

    Args:
        key: the weight, [out, in]; [in, out] of transformers' Conv1D, which is `transposed`.
        down, up: A, [rank, in], and B, [out, rank].
        whole: the product in one piece, for libraries that round blocks otherwise.
        fused: with fewer roundings than PEFT.
        magnitude: of DoRA (https://arxiv.org/abs/2402.09353), [out]: each row of the sum gets this norm.
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
        fused: bool = False,
        magnitude: torch.Tensor | None = None,
    ) -> None:
        self.keys: tuple[Key, ...] = (key,)
        self.down, self.up, self.scaling, self.transposed = down.detach(), up.detach(), scaling, transposed
        left, right = (down.T, up.T) if transposed else (up, down)
        self._magnitude = magnitude.detach() if magnitude is not None else None
        self._fused = fused
        self._folded = not fused and math.frexp(scaling)[0] == 0.5
        self._left = left.detach().contiguous()
        self._right = right.detach().contiguous()
        row_bytes = self._right.shape[1] * self._right.element_size()
        self._rows = len(left) if whole else max(1, min(len(left), _BLOCK_BYTES // max(1, row_bytes)))

    def held(self) -> Iterable[torch.Tensor]:
        """See Merge."""
        magnitude = [self._magnitude] if self._magnitude is not None else []
        return [self.down, self.up, self._left, self._right, *magnitude]

    @property
    def adds_up(self) -> bool:
        """Whether it is the base's own weight and something."""
        return self._magnitude is None

    def write(self, targets: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """See Merge."""
        (target,), (own,), right = targets, pristine, self._right
        kernels = _kernels() if self._fused and own.is_cuda and target.is_cuda else None
        if kernels is not None and target.dtype in kernels.DTYPES:
            kernels.add_low_rank(own, self._left, right, self.scaling, target, self._magnitude)
            return
        block = right.new_empty(self._rows, right.shape[1])
        product = torch.empty_like(block)
        for first in range(0, len(self._left), self._rows):
            rows = slice(first, first + self._rows)
            left, old, new = self._left[rows], own[rows], target[rows]
            exact = old if own.dtype == right.dtype else block[: len(left)].copy_(old)
            total = new if exact is old else exact
            if self._folded:
                torch.addmm(exact, left, right, alpha=self.scaling, out=total)
            else:
                delta = torch.mm(left, right, out=product[: len(left)])
                if self._fused:  # a matrix multiplication into the weight would round with each rank
                    torch.add(exact, delta, alpha=self.scaling, out=total)
                else:
                    torch.add(exact, delta.mul_(self.scaling), out=total)
            if self._magnitude is not None:
                norm = torch.linalg.vector_norm(total, dim=1, keepdim=True)
                total.mul_(self._magnitude[rows, None] / norm)
            if total is not new:
                new.copy_(total)


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
        down = torch.cat([part.down * (weight * part.scaling) for part, weight in terms])
        if not down.isfinite().all():
            raise NonFiniteError(
                "The weights make values overflow.",
                where=key[1],
                found="infinite values",
                expected=f"numbers of {down.dtype}",
                hint="smaller weights",
            )
        up = torch.cat([part.up for part, _ in terms], dim=1)
        sums.append(LowRank(key, down, up, 1.0, transposed=terms[0][0].transposed))
    return tuple(sums)


def host_bytes(tensors: Iterable[torch.Tensor], *, besides: torch.Tensor) -> int:
    """Bytes of host memory behind these tensors, each counted once, and none of what is behind `besides`."""
    memories = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.is_cpu}
    memories.pop(besides.untyped_storage().data_ptr(), None)
    return sum(memory.nbytes() for memory in memories.values())


def _tensors_in(holder: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """In a module's dict, and in dicts by adapter in it."""
    for value in holder.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) is dict:
            yield from (tensor for tensor in value.values() if isinstance(tensor, torch.Tensor))


def merge_once(layer: Any) -> nn.Module:
    """The base module with the layer's adapter merged in, as PEFT's `merge_and_unload` leaves it."""
    _forget(layer)  # of a merge that was broken off
    with torch.no_grad():
        if hasattr(layer, "unload_and_optionally_merge_module"):
            merged: nn.Module = layer.unload_and_optionally_merge_module(
                merge=True, safe_merge=False, adapter_names=None
            )
        else:
            layer.merge(safe_merge=False, adapter_names=None)
            merged = base_of(layer)
        _forget(layer)
        return merged


def _forget(layer: Any) -> None:
    """Let it merge again: a merge is recorded, in layers around bare parameters by each, one within the other."""
    if hasattr(layer, "merged_adapters"):
        layer.merged_adapters.clear()
    for child in layer._modules.values():  # `modules()` of PEFT's MultiheadAttention rewrites its weights
        if child is not None:
            _forget(child)
