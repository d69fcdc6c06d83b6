"""An adapter merged into base weights: which of them, and how each is computed, from pristine values alone.

What a merge means is asked of PEFT's own layers, once, when the adapter is loaded. What a swap runs then gives the same
bits: that was tried, and where it does not, the merged values themselves are kept.
"""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..errors import NonFiniteError, ShapeError, UnexpectedTargetError, UnsupportedError
from .absolutes import Absolutes, Key, Merge
from .discover import unwrap
from .saved import named_tensors
from .skeleton import SKELETON, Unit, base_of, base_tree, load, outline, units

# A product's rows that are added up at a time: few enough to be in the cache still when they are read.
_BLOCK_BYTES = 1 << 21
_PREFIX = "base_model.model."
_HALVES = (torch.float16, torch.bfloat16)
_FAILURES = (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError)  # of PEFT's layers


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


class Constant:
    """Values that are kept: of modules saved whole, and where PEFT's layer merges once only."""

    def __init__(self, keys: tuple[Key, ...], values: Sequence[torch.Tensor]) -> None:
        self.keys = keys
        self._values = [value.clone() for value in values]

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

    @property
    def adds_up(self) -> bool:
        """Whether it is the base's own weight and something."""
        return self._magnitude is None

    def write(self, targets: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """See Merge."""
        (target,), (own,), right = targets, pristine, self._right
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


class Merger:
    """Makes merges for one model.

    Args:
        model: the live model; only read.
        absolutes: knows the model's own values where an adapter's are live.
        fused: whether LoRA and DoRA of linear layers are merged with fewer roundings than PEFT's; None: on a GPU.
    """

    def __init__(self, model: nn.Module, absolutes: Absolutes, *, fused: bool | None = None) -> None:
        self._model = weakref.ref(unwrap(model))
        self._absolutes = absolutes
        self._fused = fused

    def prepare(self, checkpoint: Checkpoint, besides: Collection[str]) -> Merges:
        """How to merge the adapter, but for the modules `besides`, which slots hold.

        Raises:
            UnsupportedError: PEFT does not merge it, or a weight is tied to another that would have to be another.
            ConfigError, TensorError, DoesNotFitError: see `skeleton.load`.
        """
        model = self._model()
        assert model is not None
        places = {
            name: (holder, key) for path, module in base_tree(model) for name, holder, key in _tensors(path, module)
        }

        def own(name: str) -> torch.Tensor:
            holder, key = places[name]
            return self._absolutes.own(("", name), holder[key])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's and torch's advice to whoever trains
            skeleton = load(model, checkpoint, own)
            found = list(units(skeleton))
            prepared = [
                _prepare(unit, checkpoint, own, places, self._fused) for unit in found if unit.fqn not in besides
            ]
            prepared += _stated(checkpoint, [unit.fqn for unit in found], places)
            kept = _one_of_each_tie([merge for merge in prepared if merge], places, own, checkpoint)
            self._absolutes.take_in({key: places[key[1]] for merge in kept for key in merge.keys})
            return self.priced(kept)

    def priced(self, merges: Sequence[Merge]) -> Merges:
        """What they cost, by trying each of them beside the model."""
        started = time.perf_counter()
        errors = [_rounding(merge, self._own) for merge in merges]
        seconds = time.perf_counter() - started
        nbytes = sum(self._own(path).nbytes for merge in merges for _, path in merge.keys)
        return Merges(tuple(merges), nbytes, seconds, max((one for one in errors if one is not None), default=None))

    def _own(self, path: str) -> torch.Tensor:
        site = self._absolutes.sites["", path]
        return site.own().detach()


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


def outline_bytes(model: nn.Module, checkpoint: Checkpoint) -> int:
    """Bytes of the base's weights that the adapter would be merged into, as far as that can be told without values.

    Raises:
        ConfigError, UnsupportedError, TensorError, ShapeError: as `Merger.prepare`, if it can be told.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = outline(model, checkpoint)
        nbytes = 0
        for unit in units(empty) if empty is not None else ():
            nbytes += sum(param.nbytes for param in base_of(unit.layer).parameters(recurse=False))
            try:
                merge_once(unit.layer)
            except NotImplementedError as error:
                raise _not_merged(unit, checkpoint, error) from error
            except _FAILURES:
                continue  # it has no values to merge
    return nbytes


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


def _not_merged(unit: Unit, checkpoint: Checkpoint, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"PEFT does not merge {checkpoint.origin}.",
        where=unit.fqn,
        found=f"{type(error).__name__}: {error!s:.300}",
        expected="a layer that merges into its base layer",
        hint="attach the model with a slot for it, or load it with PEFT itself",
    )


def _prepare(
    unit: Unit,
    checkpoint: Checkpoint,
    own: Callable[[str], torch.Tensor],
    places: Mapping[str, Any],
    fused: bool | None,
) -> Merge | None:
    """The fastest way to PEFT's own bits, or a fused one to fewer roundings; None if the merged module is as it was."""
    try:
        merged = merge_once(unit.layer)
    except _FAILURES as error:
        raise _not_merged(unit, checkpoint, error) from error
    values = {name: tensor.detach() for name, _, _, tensor in named_tensors(merged)}
    unknown = [name for name in values if f"{unit.fqn}.{name}" not in places]
    if unknown:
        raise UnexpectedTargetError(
            f"{checkpoint.origin} gives a module a tensor that the model does not have.",
            where=f"{unit.fqn}.{unknown[0]}",
            found=f"shape {tuple(values[unknown[0]].shape)}",
            expected="tensors of the base model",
            hint="this adapter belongs to another base model",
        )
    names = [name for name, value in values.items() if not _same_bits(value, own(f"{unit.fqn}.{name}"))]
    if not names:
        return None
    keys = tuple(("", f"{unit.fqn}.{name}") for name in names)
    wanted = [values[name].clone() for name in names]
    for name, value in zip(names, wanted, strict=True):
        if value.is_floating_point() and not value.isfinite().all():
            raise NonFiniteError(
                f"{checkpoint.origin} makes values overflow where it is merged.",
                where=f"{unit.fqn}.{name}",
                found="infinite values or NaN",
                expected=f"numbers of {value.dtype}",
                hint="the adapter is damaged, or its scaling too large",
            )
    pristine = [own(key[1]) for key in keys]
    if fused or (fused is None and pristine[0].is_cuda):
        once = _fused(keys, unit, names)
        if once is not None:
            return once
    for merge in _candidates(keys, unit, names, values, own):
        if _gives(merge, wanted, pristine):
            return merge
    return Constant(keys, wanted)


def _stated(checkpoint: Checkpoint, fqns: Collection[str], places: Mapping[str, Any]) -> Iterator[Merge]:
    """What the file itself has of the base's tensors where PEFT puts nothing: biases, weights of embeddings."""
    inside = tuple(f"{fqn}." for fqn in fqns)
    for name in checkpoint.tensors:
        path = name.removeprefix(_PREFIX)
        if path.startswith(inside) or path not in places:
            continue
        holder, key = places[path]
        values = checkpoint.tensor(name)
        if values.shape != holder[key].shape:
            raise ShapeError(
                f"{checkpoint.origin} has a tensor of the base model in another size.",
                where=path,
                found=f"shape {tuple(values.shape)}",
                expected=f"{tuple(holder[key].shape)}, by the model",
                hint="this adapter belongs to another base model, or to one with another vocabulary",
            )
        yield Constant((("", path),), [values.to(holder[key])])


def _fused(keys: tuple[Key, ...], unit: Unit, names: list[str]) -> Merge | None:
    """Of a LoRA or DoRA of a linear layer; None of anything else."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    layer: Any = unit.layer
    if type(layer) is not Linear or names != ["weight"]:
        return None
    variant = layer.lora_variant.get(SKELETON)
    magnitude: torch.Tensor | None = None
    if isinstance(variant, DoraLinearVariant) and not layer.fan_in_fan_out:
        learnt: Any = layer.lora_magnitude_vector[SKELETON].weight
        magnitude = learnt.float()
    elif variant is not None:
        return None
    down: Any = layer.lora_A[SKELETON].weight
    up: Any = layer.lora_B[SKELETON].weight
    transposed = bool(layer.fan_in_fan_out)
    scaling: float = layer.scaling[SKELETON]
    return LowRank(keys[0], down.float(), up.float(), scaling, transposed=transposed, fused=True, magnitude=magnitude)


def _candidates(
    keys: tuple[Key, ...],
    unit: Unit,
    names: list[str],
    values: Mapping[str, Any],
    own: Callable[[str], torch.Tensor],
) -> Iterator[Merge]:
    from peft.tuners.lora.layer import Linear

    layer: Any = unit.layer
    if type(layer) is Linear and names == ["weight"] and not layer.lora_variant:
        down: Any = layer.lora_A[SKELETON].weight
        up: Any = layer.lora_B[SKELETON].weight
        if down.dtype not in (torch.float16, torch.bfloat16) or down.is_cuda:  # PEFT takes another way there
            for whole in (False, True):
                transposed = bool(layer.fan_in_fan_out)
                yield LowRank(keys[0], down, up, layer.scaling[SKELETON], transposed=transposed, whole=whole)
    base = base_of(layer)
    if hasattr(layer, "merged_adapters") and not dict(base.named_buffers()).keys() & set(names):
        others = {name: _reader(own, f"{unit.fqn}.{name}") for name, _ in base.named_parameters() if name not in names}
        yield ByPeft(keys, unit, names, others)


def _reader(own: Callable[[str], torch.Tensor], path: str) -> Callable[[], torch.Tensor]:
    return lambda: own(path)


def _gives(merge: Merge, wanted: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> bool:
    """Whether the merge, done anew, gives these bits."""
    targets = [torch.empty_like(value) for value in wanted]
    with torch.no_grad():
        try:
            merge.write(targets, pristine)
        except _FAILURES:
            return False
    return all(_same_bits(target, value) for target, value in zip(targets, wanted, strict=True))


def _rounding(merge: Merge, own: Callable[[str], torch.Tensor]) -> float | None:
    """How much of the merge's effect the weights' dtype cannot hold."""
    pristine = [own(key[1]) for key in merge.keys]
    targets = [torch.empty_like(values) for values in pristine]
    with torch.no_grad():
        merge.write(targets, pristine)
        if isinstance(merge, Constant) or not all(values.dtype in _HALVES for values in pristine):
            return None
        exact = [values.float() for values in pristine]
        try:
            merge.write(exact, exact)
        except RuntimeError:  # a layer that computes in the weights' dtype
            return None
    lost, effect = (
        math.hypot(*(float((one.float() - other.float()).norm()) for one, other in zip(exact, others, strict=True)))
        for others in (targets, pristine)
    )
    return lost / effect if effect else None


def _one_of_each_tie(
    merges: list[Merge], places: Mapping[str, Any], own: Callable[[str], torch.Tensor], checkpoint: Checkpoint
) -> list[Merge]:
    """Of merges into tied tensors the first alone, if all names of the tensor get the same values."""
    names: dict[int, list[str]] = {}
    for name, (holder, key) in places.items():
        names.setdefault(id(holder[key]), []).append(name)
    by_name = {key[1]: merge for merge in merges for key in merge.keys}
    dropped: set[int] = set()
    for ties in names.values():
        merging = [name for name in ties if name in by_name]
        if len(ties) == 1 or not merging:
            continue
        results = [_result(by_name[name], name, own) if name in by_name else own(name) for name in ties]
        if not all(_same_bits(result, results[0]) for result in results):
            raise UnsupportedError(
                f"{checkpoint.origin} would have to be merged into a weight that is tied to another.",
                where=merging[0],
                found=f"tied: {', '.join(ties)}, which get other values each",
                expected="the same values for all of them",
                hint="attach the model with a slot for it: the side path leaves the tied weight alone",
            )
        dropped.update(id(by_name[name]) for name in merging[1:])
    return [merge for merge in merges if id(merge) not in dropped]


def _result(merge: Merge, name: str, own: Callable[[str], torch.Tensor]) -> torch.Tensor:
    pristine = [own(key[1]) for key in merge.keys]
    targets = [torch.empty_like(values) for values in pristine]
    with torch.no_grad():
        merge.write(targets, pristine)
    return targets[merge.keys.index(("", name))]


def _tensors(path: str, module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(full name, the dict that has it, name there) of a module's own tensors."""
    for holder in (module._parameters, module._buffers):
        for name, tensor in holder.items():
            if tensor is not None:
                yield f"{path}.{name}" if path else name, holder, name


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(_bits(first), _bits(second))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
