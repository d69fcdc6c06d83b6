"""What of which adapter goes where in a blend, and the config of it: all that does not depend on weights."""

from __future__ import annotations

import math
import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..checkpoint import Schema, TensorSpec, each_config
from ..entry import Entry
from ..errors import UnsupportedError
from ..live import OUT_PROJ, Binding, Memory
from ..live.corner import band
from ..methods import TOKENS, Adapter, Target

PREFIX = "base_model.model."
BIAS = "lora_B.bias"
DOWN, UP = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")


class Ingredient(NamedTuple):
    """One adapter of a blend."""

    entry: Entry
    weight: float


def names_of(adapter: str | Mapping[str, float], blend: str | None) -> list[str]:
    """Which adapters `activate` is asked for: by name, so that the order of writing makes no other blend.

    Raises:
        TypeError: what is asked for is neither a name nor name → weight.
        ValueError: it is no blend.
    """
    if blend not in (None, "svd"):
        raise ValueError(f"blend must be None or 'svd', got {blend!r}")
    if isinstance(adapter, str):
        return [adapter]
    given: Any = adapter
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"adapter must be a name, or a mapping of names to weights, got {given!r:.200}")
    if not adapter:
        raise ValueError("A blend of no adapters; deactivate() makes the base model live")
    for name, weight in given.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not abs(weight) <= sys.float_info.max:  # NaN is not, nor a whole number of 400 digits
            raise ValueError(f"The weight of {name!r} in the blend must be a finite number, got {weight!r}")
    return sorted(adapter)


class Band(NamedTuple):
    """The ranks from `low` to `high` of a module, which ingredient `number` fills."""

    number: int
    target: Target
    low: int
    high: int


class Piece(NamedTuple):
    """A Band of one part: what of which tensor of the ingredient goes where in which of the blend.

    Attributes:
        name, source: the tensor's name in the blend, and in the ingredient.
        shape: of the tensor in the blend.
        scaling: of the ingredient there.
        groups, experts: of the slot.
    """

    band: Band
    fqn: str
    suffix: str
    name: str
    source: str
    shape: tuple[int, ...]
    scaling: float
    groups: int
    experts: int

    def place(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The view to be written, of the blend's flat tensors; itself flat for A, if there is no other block of it."""
        values, (_, _, low, high) = flat[self.name], self.band
        if self.suffix == BIAS:
            return values
        if self.groups * self.experts == 1:  # as `band` does, in one call: there are hundreds of them
            if self.suffix in DOWN:
                row = values.numel() // self.shape[0]
                return values.narrow(0, low * row, (high - low) * row)
            if len(self.shape) == 2:
                size, stride = (self.shape[0], high - low), (self.shape[1], 1)
                return values.as_strided(size, stride, values.storage_offset() + low)
        return band(values.view(self.shape), self.suffix, low, high, self.groups, self.experts)


@dataclass(frozen=True, eq=False)
class Recipe:
    """All of a blend that does not depend on the weights: good for every blend of these schemas into these slots.

    Attributes:
        schema: of the blend.
        nbytes: of all its tensors.
        bands: module path → its Bands.
        scaled, plain: pieces of A and of biases, which depend on weights, and of B, which do not.
        shrunk: module path → rank that its delta is cut to.
        targets: Memory → the views of it that `scaled` belong to.
    """

    schema: Schema
    nbytes: int
    bands: Mapping[str, Sequence[Band]]
    scaled: Sequence[Piece]
    plain: Sequence[Piece]
    shrunk: Mapping[str, int]
    targets: weakref.WeakKeyDictionary[Memory, list[torch.Tensor]] = field(default_factory=weakref.WeakKeyDictionary)

    def targets_in(self, memory: Memory) -> list[torch.Tensor]:
        """Of each of `scaled` the place in live memory, in the shape of `Piece.place`."""
        if memory not in self.targets:
            self.targets[memory] = [
                target.view(-1) if piece.suffix in DOWN and piece.groups * piece.experts == 1 else target
                for piece in self.scaled
                for target in [memory.band(piece.fqn, piece.suffix, piece.band.low, piece.band.high)]
            ]
        return self.targets[memory]


def needed_ranks(ingredients: Iterable[Ingredient]) -> dict[str, int]:
    """Module path → the ranks of all adapters there."""
    ranks: Counter[str] = Counter()
    for ingredient in ingredients:
        ranks.update({fqn: target.rank for fqn, target in ingredient.entry.adapter.targets.items()})
    return dict(ranks)


def refuse_unblendable(adapters: Sequence[Adapter]) -> None:
    """Raise unless all of these adapters add up, and one config of PEFT can say to what.

    Raises:
        UnsupportedError: naming the first tensor or module that is in the way.
    """
    for adapter in adapters:
        _refuse_what_does_not_add_up(adapter)
    bare = next((adapter for adapter in adapters if adapter.target_parameters), None)
    biased = next((adapter for adapter in adapters if adapter.lora_bias), None)
    if bare is not None and biased is not None:
        raise UnsupportedError(
            "A blend of an adapter of bare parameters and of one with lora_bias.",
            where=next(iter(bare.targets)),
            found=f"target_parameters of {bare.checkpoint.origin}, lora_bias of {biased.checkpoint.origin}",
            expected="one of the two: PEFT's config has one lora_bias for all, and PEFT refuses it on bare parameters",
            hint="activate one at a time",
        )


def _refuse_what_does_not_add_up(adapter: Adapter) -> None:
    """Neither DoRA's magnitudes do, nor what an adapter has in the place of the base's own."""
    odd = [
        f"{fqn}.{suffix}"
        for fqn, target in adapter.targets.items()
        for suffix in target.parts
        if suffix not in (*DOWN, *UP, BIAS)
    ]
    odd += [f"{fqn}.{name}" for held in (adapter.saved, adapter.biases) for fqn, own in held.items() for name in own]
    odd += [f"{fqn}.{TOKENS}" for fqn in adapter.tokens]
    odd += [] if adapter.targets else adapter.checkpoint.tensors  # of another method
    if odd:
        raise UnsupportedError(
            f"{adapter.checkpoint.origin} has tensors that cannot be blended.",
            where=odd[0],
            found=f"{len(odd)} tensors that are no deltas",
            expected="A, B and bias of plain LoRA, which add up",
            hint="activate it alone, with weight 1",
        )


def _bands(ingredients: Sequence[Ingredient]) -> dict[str, list[Band]]:
    bands: dict[str, list[Band]] = {}
    for i, (entry, _) in enumerate(ingredients):
        for fqn, target in entry.adapter.targets.items():
            own = bands.setdefault(fqn, [])
            low = own[-1].high if own else 0
            own.append(Band(i, target, low, low + target.rank))
    return bands


def make_recipe(ingredients: Sequence[Ingredient], shrunk: Mapping[str, int], binding: Binding) -> Recipe:
    """Lay the blend of these adapters, all of which add up, out; `shrunk` modules at the rank stated for them."""
    bands = _bands(ingredients)
    biased = any(BIAS in piece.target.parts for pieces in bands.values() for piece in pieces)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    scaled: list[Piece] = []
    plain: list[Piece] = []
    for fqn, pieces in bands.items():
        slot, first = binding.slots[fqn], pieces[0].target
        rank = shrunk.get(fqn, pieces[-1].high)
        suffixes = [suffix for suffix in first.parts if suffix != BIAS]
        for suffix in [*suffixes, *([BIAS] if biased and "lora_B.weight" in suffixes else [])]:
            name = f"{PREFIX}{fqn}.{suffix}"
            shape = slot.part_shape(suffix, rank) if suffix != BIAS else slot.part_shape("lora_B.weight", rank)[:1]
            shapes[name] = slot.dtype, shape
            for piece in pieces:
                spec = piece.target.parts.get(suffix)
                if spec is not None and (suffix == BIAS or fqn not in shrunk):
                    place = shape, piece.target.scaling, slot.groups, slot.experts
                    made = Piece(piece, fqn, suffix, name, spec.name, *place)
                    (plain if suffix in UP else scaled).append(made)
    specs, end = [], 0
    for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):  # as safetensors orders them
        dtype, shape = shapes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        specs.append(TensorSpec(name, dtype, shape, start, end))
    ranks = {fqn: shrunk.get(fqn, pieces[-1].high) for fqn, pieces in bands.items()}
    config = _config(ingredients, ranks, binding, lora_bias=biased)
    return Recipe(Schema(config, specs), end, bands, scaled, plain, shrunk)


def _config(
    ingredients: Sequence[Ingredient], ranks: Mapping[str, int], binding: Binding, *, lora_bias: bool
) -> dict[str, Any]:
    """The config of the blend, or that of each component."""
    checkpoints = [entry.adapter.checkpoint for entry, _ in ingredients]
    parts = {prefix: part.config for one in reversed(checkpoints) for prefix, part in one.components.items()}
    bases = {key: value for key, value in checkpoints[0].config.items() if key != "base_values"}  # as the model's own
    if "components" in bases:
        bases["components"] = {prefix.removesuffix("."): config for prefix, config in parts.items()}

    def blended(prefix: str, config: Mapping[str, Any]) -> dict[str, Any]:
        own = {fqn: rank for fqn, rank in ranks.items() if fqn.startswith(prefix)}
        return _blended(config, prefix, ingredients, own, binding, lora_bias=lora_bias)

    return each_config(bases, blended)


def _blended(
    config: Mapping[str, Any],
    prefix: str,
    ingredients: Sequence[Ingredient],
    ranks: Mapping[str, int],
    binding: Binding,
    *,
    lora_bias: bool,
) -> dict[str, Any]:
    """The config by which PEFT loads the blend from a file: the first adapter's, where it is not of all of them."""
    from peft.tuners.lora.layer import ParamWrapper

    modules: set[str] = set()
    by_key: dict[str, int] = {}
    for fqn, rank in ranks.items():
        layer: Any = binding.slots[fqn].layer
        root = fqn.removesuffix(OUT_PROJ)
        if isinstance(layer, ParamWrapper):
            root = f"{fqn.replace('.base_layer', '')}.{layer.parameter_name}"
        else:
            modules.add(root.removeprefix(prefix))
        by_key[root.removeprefix(prefix)] = rank
    usual = Counter(by_key.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(key)}": rank for key, rank in by_key.items() if rank != usual}
    parameters = dict.fromkeys(name for entry, _ in ingredients for name in entry.adapter.target_parameters)
    whole = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return {
        **config,
        **whole,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "lora_bias": lora_bias,
        "init_lora_weights": True,
        "target_modules": sorted(modules),
        "target_parameters": list(parameters) or None,
    }
