"""The ways to compute merged weights from pristine ones, of any method; `low_rank.py` has LoRA's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .absolutes import Key, Merge
from .skeleton import Unit, base_of


class Merges(NamedTuple):
    """All merges of an adapter, and what they cost.

    Attributes:
        all: each module's.
        steps: the same as a swap does them, several at once where that is faster.
        nbytes: of the base's tensors that they write; as many are kept beside them.
        seconds: what they took when they were tried.
        error: what rounding to the weights' dtype loses of the adapter's effect, relative to that (Frobenius norms, the
            largest of any module); None where weights are of 32 bits or more, or the method does not compute in them.
    """

    all: tuple[Merge, ...] = ()
    steps: tuple[Merge, ...] = ()
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
