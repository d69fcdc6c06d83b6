"""An adapter merged into base weights: which of them, and how each is computed, from pristine values alone.

What a merge means is asked of PEFT's own layers, once, when the adapter is loaded. What a swap runs then gives the same
bits: that was tried, and where it does not, the merged values themselves are kept.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoint import PEFT_PREFIX, Checkpoint
from ..errors import ModelError, NonFiniteError, ShapeError, UnexpectedTargetError, UnsupportedError
from .absolutes import Absolutes, Key, Merge
from .discover import roots, unwrap
from .low_rank import LowRank, narrowed, together
from .merges import ByPeft, Constant, Keeping, Merges, Rotated, Scaled, merge_once
from .offloading import refuse_offloaded
from .pristine import PRISTINE, Stores, stores
from .saved import named_tensors
from .skeleton import SKELETON, Unit, base_of, base_tree, load, outline, units

_HALVES = (torch.float16, torch.bfloat16)
_FAILURES = (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError)  # of PEFT's layers


class Merger:
    """Makes merges for one model.

    Args:
        model: the live model; only read.
        absolutes: knows the model's own values where an adapter's are live.
        fused: whether LoRA and DoRA of linear layers are merged with fewer roundings than PEFT's; None: where a GPU
            holds weights of 16 bits.
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

        read: set[str] = set()

        def own(name: str) -> torch.Tensor:
            read.add(name)
            holder, key = places[name]
            values = self._absolutes.own(("", name), holder[key])
            if values.is_meta:
                refuse_offloaded(model)
            return values

        prepared: list[Merge | None] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's and torch's advice to whoever trains
            fqns: list[str] = []
            for prefix, part in checkpoint.components.items():
                skeleton = load(roots(model)[prefix], part, partial(_within, prefix, own))
                found = [Unit(prefix + unit.fqn, unit.layer) for unit in units(skeleton)]
                prepared += [
                    _prepare(unit, checkpoint, own, places, self._fused) for unit in found if unit.fqn not in besides
                ]
                fqns += [unit.fqn for unit in found]
            prepared += _stated(checkpoint, fqns, places)
            kept = _one_of_each_tie([merge for merge in prepared if merge], places, own, checkpoint)
            self._absolutes.take_in({key: places[key[1]] for merge in kept for key in merge.keys})
            self._absolutes.watch({("", name): places[name] for name in read})
            return self.priced(kept)

    def keeping(self, merges: Sequence[Merge]) -> dict[str, Keeping]:
        """What each place for the base's own values costs; without "file" if the model's checkpoint lacks them.

        Tried in the place itself, one merge after the other, twice: the second time is told.
        """
        model = self._model()
        assert model is not None
        costs = {}
        for where in PRISTINE:
            with contextlib.suppress(ModelError):
                make = stores(where, model)
                tried = [self._kept(merge, make) for merge in merges]
                costs[where] = Keeping(sum(one.nbytes for one in tried), sum(one.seconds for one in tried))
        return costs

    def _kept(self, merge: Merge, make: Stores) -> Keeping:
        own = [self._own(path) for _, path in merge.keys]
        kept = [make(path, values) for (_, path), values in zip(merge.keys, own, strict=True)]
        held = [store.keep(values) for store, values in zip(kept, own, strict=True)]
        targets, seconds = [torch.empty_like(values) for values in own], 0.0
        with torch.no_grad():
            for _ in range(2):
                _wait_for(own)
                started = time.perf_counter()
                merge.write(targets, [values.to(target) for values, target in zip(held, targets, strict=True)])
                _wait_for(own)
                seconds = time.perf_counter() - started
        return Keeping(sum(store.nbytes for store in kept), seconds)

    def priced(self, merges: Sequence[Merge]) -> Merges:
        """What they cost, by trying each of them beside the model."""
        started = time.perf_counter()
        errors = [_rounding(merge, self._own) for merge in merges]
        seconds = time.perf_counter() - started
        nbytes = sum(self._own(path).nbytes for merge in merges for _, path in merge.keys)
        error = max((one for one in errors if one is not None), default=None)
        return Merges(tuple(merges), together(merges), nbytes, seconds, error)

    def _own(self, path: str) -> torch.Tensor:
        site = self._absolutes.sites["", path]
        return site.own().detach()


def _wait_for(tensors: Sequence[torch.Tensor]) -> None:
    """For the work on a GPU that fills them."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def outline_bytes(model: nn.Module, checkpoint: Checkpoint) -> int:
    """Bytes of the base's weights that the adapter would be merged into, as far as that can be told without values.

    Raises:
        ConfigError, UnsupportedError, TensorError, ShapeError: as `Merger.prepare`, if it can be told.
    """
    nbytes = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outlines = [outline(roots(model)[prefix], part) for prefix, part in checkpoint.components.items()]
        for unit in [unit for empty in outlines if empty is not None for unit in units(empty)]:
            nbytes += sum(param.nbytes for param in base_of(unit.layer).parameters(recurse=False))
            try:
                merge_once(unit.layer)
            except NotImplementedError as error:
                raise _not_merged(unit, checkpoint, error) from error
            except _FAILURES:
                continue  # it has no values to merge
    return nbytes


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
    # In float32 the kernel's sums were further from the exact ones than PEFT's on an H100, and never in 16 bits.
    if fused or (fused is None and pristine[0].is_cuda and pristine[0].element_size() == 2):
        once = _fused(keys, unit, names, pristine[0])
        if once is not None:
            return once
    for merge in _candidates(keys, unit, names, values, own):
        if _gives(merge, wanted, pristine):
            return merge
    return Constant(keys, wanted)


def _within(prefix: str, own: Callable[[str], torch.Tensor], path: str) -> torch.Tensor:
    return own(prefix + path)


def _stated(checkpoint: Checkpoint, fqns: Collection[str], places: Mapping[str, Any]) -> Iterator[Merge]:
    """What the file itself has of the base's tensors where PEFT puts nothing: biases, weights of embeddings, norms."""
    inside = tuple(f"{fqn}." for fqn in fqns)
    for name in checkpoint.tensors:
        path = name.removeprefix(PEFT_PREFIX)
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


def _fused(keys: tuple[Key, ...], unit: Unit, names: list[str], own: torch.Tensor) -> Merge | None:
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
    factors: list[Any] = [layer.lora_A[SKELETON].weight, layer.lora_B[SKELETON].weight]
    down, up = narrowed([factor.detach() for factor in factors], own)
    transposed = bool(layer.fan_in_fan_out)
    scaling: float = layer.scaling[SKELETON]
    return LowRank(keys[0], down, up, scaling, transposed=transposed, fused=True, magnitude=magnitude)


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
            scaling, transposed = layer.scaling[SKELETON], bool(layer.fan_in_fan_out)
            for whole, stepwise in ((False, False), (True, False), (True, True)):
                yield LowRank(keys[0], down, up, scaling, transposed=transposed, whole=whole, stepwise=stepwise)
    yield from _direct(keys, layer, names)
    base = base_of(layer)
    if hasattr(layer, "merged_adapters") and not dict(base.named_buffers()).keys() & set(names):
        others = {name: _reader(own, f"{unit.fqn}.{name}") for name, _ in base.named_parameters() if name not in names}
        yield ByPeft(keys, unit, names, others)


def _direct(keys: tuple[Key, ...], layer: Any, names: list[str]) -> Iterator[Merge]:
    """Of methods whose merge is one multiplication, that one."""
    from peft.tuners.ia3.layer import Linear as Ia3Linear
    from peft.tuners.oft.layer import Linear as OftLinear

    kind = type(layer)
    if kind is Ia3Linear and set(names) <= {"weight", "bias"}:
        factor: torch.Tensor = layer.ia3_l[SKELETON]
        shaped = {"weight": factor.T if layer.fan_in_fan_out else factor, "bias": factor.reshape(-1)}
        yield Scaled(keys, [shaped[name] for name in names])
    elif kind is OftLinear and names == ["weight"]:
        with torch.no_grad():
            rotation, size = layer.get_delta_weight(SKELETON), layer.oft_R[SKELETON].block_size
            blocks = rotation.view(-1, size, len(rotation) // size, size).diagonal(dim1=0, dim2=2)
            yield Rotated(keys[0], blocks.permute(2, 1, 0))


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
