"""Whether and where an adapter's tensors can stand in larger ones, such that its layers compute the same.

It is tried, in 64 bits, on a skeleton, with random values in the place of the adapter's, so that what holds for them
holds for whatever is trained. For each kind of layer the forward and the merge are compared, with and without the
padding, by what the adapter does there.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import nn

from ..checkpoint import Checkpoint, from_tensors
from .leaves import Held, Leaf, Value
from .merges import merge_once
from .room import Part, Placement
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
        drawn = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.dtype)
        tensors[name] = drawn if tensor.is_floating_point() and name not in kept else tensor
    return from_tensors(tensors, dict(checkpoint.config), origin=checkpoint.origin)


def find_placement(skeleton: Any, leaves: Mapping[str, Leaf], shapes: Mapping[str, torch.Size]) -> Placement | str:
    """Where its tensors can stand in larger ones; or why the layers do not compute the same with zeros around them.

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
        return _tried(
            list(map(_Trial, _one_of_each_kind(found, larger))), leaves, {path: shapes[path] for path in padded}
        )


def _tried(trials: list[_Trial], leaves: Mapping[str, Leaf], shapes: Mapping[str, torch.Size]) -> Placement | str:
    try:
        outputs = [trial.output() for trial in trials]
    except _FAILURES as error:
        return f"a layer could not be tried alone ({type(error).__name__}: {error!s:.100})"
    if not all(effect.any() for output in outputs for effect in output.values()):
        return "a layer does nothing, whatever the values"
    wanted = [output | _merged_or_nothing(trial) for trial, output in zip(trials, outputs, strict=True)]
    reasons = []
    for candidate in _candidates(leaves, shapes):
        reason = _why_inexact(candidate, trials, wanted, leaves, shapes)
        if reason is None:
            return candidate
        reasons.append(reason)
    return reasons[0]


def _why_inexact(
    placement: Placement,
    trials: list[_Trial],
    wanted: list[Effects],
    leaves: Mapping[str, Leaf],
    shapes: Mapping[str, torch.Size],
) -> str | None:
    """Why the layers do not compute the same where their tensors stand so; None if they do. All is as before."""
    tensors = [(leaf.tensor, leaf.tensor.data) for path in placement.parts if isinstance(leaf := leaves[path], Held)]
    numbers = [(leaf, leaf.read()) for path in placement.numbers if isinstance(leaf := leaves[path], Value)]
    try:
        for (tensor, own), (path, part) in zip(tensors, placement.parts.items(), strict=True):
            tensor.data = part.padded(own, shapes[path])
        for (value, _), number in zip(numbers, placement.numbers.values(), strict=True):
            value.write(number)
        for trial, effects in zip(trials, wanted, strict=True):
            try:
                merged = trial.merged() if len(effects) > 1 else {}
                reason = _difference(trial.output() | merged, effects)
            except _FAILURES as error:
                reason = f"raises {type(error).__name__}: {error!s:.100}"
            if reason is not None:
                return f"{trial.fqn} {reason}"
        return None
    finally:
        for tensor, own in tensors:
            tensor.data = own
        for value, number in numbers:
            value.write(number)


def _candidates(leaves: Mapping[str, Leaf], shapes: Mapping[str, torch.Size]) -> Iterator[Placement]:
    """Ways for tensors to stand in such of `shapes`, the simplest first."""
    own = {path: leaf.tensor.shape for path in shapes if isinstance(leaf := leaves[path], Held)}
    for numbers in ({}, *_stated_sizes(leaves, own, shapes)):
        yield Placement({path: Part(shape) for path, shape in own.items()}, numbers)
        for blocks in _blocks(own, shapes):
            yield Placement({path: Part(shape, blocks[path]) for path, shape in own.items()}, numbers)
        if all(size % n == 0 for path in own for n, size in zip(own[path], shapes[path], strict=True)):
            yield Placement({path: Part(shape, repeated=True) for path, shape in own.items()}, numbers)


def _blocks(own: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Ways to take the dimensions for several blocks of the rank, or of equal parts of it, of each tensor."""
    pairs = {path: list(zip(shape, shapes[path], strict=True)) for path, shape in own.items()}
    grown = {pair for of_one in pairs.values() for pair in of_one if pair[0] != pair[1]}
    ranks = {Fraction(*pair): pair for pair in sorted(grown, reverse=True)}  # the smallest that grows by as much
    common = [math.gcd(*pair) for pair in ranks.values()]
    for count in range(1, max(common) + 1):
        if all(parts % count for parts in common):
            continue
        blocks = {path: tuple(_blocks_of(pair, ranks, count) for pair in of_one) for path, of_one in pairs.items()}
        if any(set(of_one) != {1} for of_one in blocks.values()):
            yield blocks


def _blocks_of(pair: tuple[int, int], ranks: Mapping[Fraction, tuple[int, int]], count: int) -> int:
    """Of a dimension of this size that is to have that: one for each rank in it, and of `count` parts each."""
    if pair[0] == pair[1]:
        return 1
    rank, padded = ranks[Fraction(*pair)]
    return pair[0] // rank * math.gcd(count, rank, padded) if pair[0] % rank == 0 else 1


def _stated_sizes(
    leaves: Mapping[str, Leaf], own: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]
) -> Iterator[Mapping[str, int]]:
    """Path → what it would be of the larger tensors: of each attribute by which PEFT's layers may state a size."""
    sizes: dict[str, dict[int, int]] = {}  # path of a module → size of a tensor within → that of the larger one
    for path, shape in own.items():
        grown = {n: size for n, size in zip(shape, shapes[path], strict=True) if n != size}
        names = path.split(".")
        for end in range(1, len(names)):
            sizes.setdefault(".".join(names[:end]), {}).update(grown)
    found: dict[str, dict[str, int]] = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, Value) and type(leaf.read()) is int:
            module, _, attribute = path.removesuffix(f"[{leaf.key!r}]").rpartition(".")
            size = sizes.get(module, {}).get(leaf.read())
            if size is not None:
                found.setdefault(attribute, {})[path] = size
    yield from found.values()


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
