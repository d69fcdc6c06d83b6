"""Whether layers of a method compute the same with zeros around an adapter's tensors: tried, in 64 bits, on a skeleton.

Random values in the place of the adapter's, so that what holds for them holds for whatever is trained. For each kind
of layer the forward and the merge are compared, with and without the padding, by what the adapter does there.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from ..checkpoint import Checkpoint, from_tensors
from .leaves import Held, Leaf
from .merges import merge_once
from .room import padded_to
from .saved import named_tensors
from .skeleton import Unit, base_of, input_of, units

# Of the adapter's effect. PEFT's layers compute here and there in 32 bits; a wrong padding is off by percents.
_TOLERANCE = 1e-4
# Of PEFT's layers.
_FAILURES = (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError)

Effects: TypeAlias = dict[str, torch.Tensor]  # by what it is


def at_random(checkpoint: Checkpoint, kept: Container[str]) -> Checkpoint:
    """The same with random numbers, but for the tensors of `kept` and those that are no floating point numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in checkpoint.tensors:
        tensor = checkpoint.tensor(name)
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        tensors[name] = drawn if tensor.is_floating_point() and name not in kept else tensor
    return from_tensors(tensors, dict(checkpoint.config), origin=checkpoint.origin)


def why_inexact(skeleton: Any, leaves: Mapping[str, Leaf], shapes: Mapping[str, torch.Size]) -> str | None:
    """Why the layers do not compute the same once their tensors are padded; None if they do.

    Args:
        skeleton: PEFT's fresh load of a checkpoint of `at_random`; it is used up.
        leaves: all that it has.
        shapes: path → shape to pad the tensor to.
    """
    held = {path: leaf.tensor for path, leaf in leaves.items() if isinstance(leaf, Held)}
    padded = [path for path, shape in shapes.items() if shape != held[path].shape]
    indices = next((path for path in padded if not held[path].is_floating_point()), None)
    if indices is not None:
        return f"{indices} says what is where, and zero is a place"
    found = list(units(skeleton))
    inside = {id(tensor) for unit in found for tensor in _tensors_of(unit.layer)}
    outside = next((path for path in padded if id(held[path]) not in inside), None)
    if outside is not None:
        return f"{outside} is in no layer that could be tried alone"
    larger = {id(held[path]): shapes[path] for path in padded}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for tensor in held.values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.double()
        return _tried(list(map(_Trial, _one_of_each_kind(found, larger))), held.values(), larger)


def _tried(trials: list[_Trial], tensors: Iterable[torch.Tensor], larger: Mapping[int, torch.Size]) -> str | None:
    try:
        outputs = [trial.output() for trial in trials]
    except _FAILURES as error:
        return f"a layer could not be tried alone ({type(error).__name__}: {error!s:.100})"
    if not all(effect.any() for output in outputs for effect in output.values()):
        return "a layer does nothing, whatever the values"
    merges = [_merged_or_nothing(trial) for trial in trials]
    for tensor in tensors:
        if id(tensor) in larger:
            tensor.data = padded_to(tensor.data, larger[id(tensor)])
    for trial, output, merged in zip(trials, outputs, merges, strict=True):
        try:
            reason = _difference(trial.output() | (trial.merged() if merged else {}), output | merged)
        except _FAILURES as error:
            reason = f"raises {type(error).__name__}: {error!s:.100}"
        if reason is not None:
            return f"{trial.fqn} {reason}"
    return None


def _merged_or_nothing(trial: _Trial) -> Effects:
    try:
        return trial.merged()
    except _FAILURES:
        return {}  # PEFT does not merge it, padded or not


def _tensors_of(layer: nn.Module) -> Iterator[torch.Tensor]:
    yield from layer.parameters()
    yield from layer.buffers()


def _one_of_each_kind(found: list[Unit], larger: Mapping[int, torch.Size]) -> Iterator[Unit]:
    """Of the layers with padded tensors one of each type and shapes."""
    seen = set()
    for unit in found:
        tensors = list(_tensors_of(unit.layer))
        kind = type(unit.layer), *((tensor.shape, larger.get(id(tensor))) for tensor in tensors)
        if any(id(tensor) in larger for tensor in tensors) and kind not in seen:
            seen.add(kind)
            yield unit


class _Trial:
    """One layer, and what its adapter does, in 64 bits.

    Attributes:
        fqn: of the base module.
    """

    def __init__(self, unit: Unit) -> None:
        self.fqn, self._layer, self._base = unit.fqn, unit.layer, base_of(unit.layer).double()
        self._own = {name: tensor.clone() for name, tensor in self._tensors().items()}
        self._input = input_of(self._base)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach() for name, _, _, tensor in named_tensors(self._base)}

    def output(self) -> Effects:
        """What is added to the output."""
        if self._input is None:
            raise NotImplementedError("what it takes is not known")
        return {"its output": self._layer(self._input) - self._base(self._input)}

    def merged(self) -> Effects:
        """What a merge adds to the base's tensors, which are as before afterwards."""
        try:
            merged = merge_once(self._layer)
            return {f"its merged {name}": new - self._own[name] for name, _, _, new in named_tensors(merged)}
        finally:
            now = self._tensors()
            for name, own in self._own.items():
                now[name].copy_(own)


def _difference(got: Effects, wanted: Effects) -> str | None:
    for what, effect in wanted.items():
        error, size = float((got[what] - effect).abs().max()), float(effect.abs().max())
        if not error <= _TOLERANCE * size:  # nor if it is no number
            return f"has {what} wrong by {error / size if size else math.inf:.2g} of what the adapter does there"
    return None
