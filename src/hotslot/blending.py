"""Blends: several loaded adapters as one, their ranks side by side in one slot.

Takes adapters with weights and the slots that they are for; gives a `Blend`, an Entry like any other, whose own bytes
are in host memory. Exact: the sum of the deltas. Beyond the slots' ranks only on request, by a truncated SVD.

c: weight times scaling, one number for each adapter and module. It goes into A, so that B does not depend on weights:

    A = [c₁ A₁; c₂ A₂; …]    B = [B₁ B₂ …]    bias = c₁ bias₁ + c₂ bias₂ + …    scaling = 1, as PEFT's "cat" has it

One adapter alone keeps its bytes, and its weight goes into the scaling.
"""

from __future__ import annotations

import json
import logging
import math
import re
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import xxhash

from .checkpoint import Checkpoint, Schema, TensorSpec
from .checkpoint.buffers import host_buffer
from .checkpoint.checkpoint import view
from .engine import NEUTRAL_SCALING, Compiled, Entry
from .errors import NonFiniteError, RankError, UnsupportedError
from .live import OUT_PROJ, Binding, Memory, Slot, Writes
from .live.corner import band
from .methods import Adapter, Target

logger = logging.getLogger(__name__)

# Held so that going back and forth between two builds none anew. With more, a weight that is moved step by step would
# never find the memory of a blend that was let go, and page faults would take longer than all the rest.
KEPT_BLENDS = 2
KEPT_RECIPES = 4
_PREFIX = "base_model.model."
_BIAS = "lora_B.bias"
_A, _B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")


class Ingredient(NamedTuple):
    """One adapter of a blend."""

    entry: Entry
    weight: float


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
        if self.suffix == _BIAS:
            return values
        if self.groups * self.experts == 1:  # as `band` does, in one call: there are hundreds of them
            if self.suffix in _A:
                row = values.numel() // self.shape[0]
                return values.narrow(0, low * row, (high - low) * row)
            if len(self.shape) == 2:
                size, stride = (self.shape[0], high - low), (self.shape[1], 1)
                return values.as_strided(size, stride, values.storage_offset() + low)
        return band(values.view(self.shape), self.suffix, low, high, self.groups, self.experts)


@dataclass(frozen=True, eq=False)
class _Recipe:
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
                target.view(-1) if piece.suffix in _A and piece.groups * piece.experts == 1 else target
                for piece in self.scaled
                for target in [memory.band(piece.fqn, piece.suffix, piece.band.low, piece.band.high)]
            ]
        return self.targets[memory]


class Blend(Entry):
    """Several adapters as one, or one adapter weighted; immutable."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        ingredients: Sequence[Ingredient],
        key: Any,
        *,
        recipe: _Recipe | None = None,
        error: float | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(name, checkpoint, adapter)
        self.key, self.recipe, self.error = key, recipe, error
        self.names = tuple(ingredient.entry.name for ingredient in ingredients)
        self.versions = tuple(ingredient.entry.version for ingredient in ingredients)
        self.weights = tuple(ingredient.weight for ingredient in ingredients)
        self._same_bytes = ingredients[0].entry if len(ingredients) == 1 else None
        if self._same_bytes is not None:
            self.contents = self._same_bytes.contents

    @property
    def nbytes(self) -> int:
        """Bytes of host memory of its own: none, if it shares those of its one adapter."""
        return self.adapter.checkpoint.nbytes if self._same_bytes is None else 0

    def compile(self, binding: Binding) -> Compiled:
        """See `Entry.compile`. One adapter alone is compiled already, but for its scalings."""
        if self._same_bytes is not None and (self._compiled is None or self._compiled.memory is not binding.memory):
            scalings = dict.fromkeys(binding.slots, NEUTRAL_SCALING)
            scalings.update((fqn, target.scaling) for fqn, target in self.adapter.targets.items())
            writes = self._same_bytes.compile(binding).writes
            columns = binding.memory.compile(None, scalings).columns
            weighted = replace(writes, scalings=scalings, columns=columns)
            self._compiled = Compiled(binding.memory, weighted, binding.records(self.adapter))
        return super().compile(binding)

    def writes(self, binding: Binding, since: Entry | None) -> tuple[Writes, int]:
        """See `Entry.writes`: after a blend of the same adapters only the A of those whose weights have changed."""
        if self.recipe is None or not isinstance(since, Blend) or not self.differs_in_weights(since):
            return super().writes(binding, since)
        whole, recipe = self.compile(binding).writes, self.recipe
        changed = {i for i, (new, old) in enumerate(zip(self.weights, since.weights, strict=True)) if new != old}
        flat = recipe.schema.split(self.adapter.checkpoint.data)
        written = {
            (piece.name, piece.band.low): (target, piece.place(flat))  # once, a bias that several have changed
            for piece, target in zip(recipe.scaled, recipe.targets_in(binding.memory), strict=True)
            if piece.band.number in changed
        }
        targets, sources = [target for target, _ in written.values()], [source for _, source in written.values()]
        writes = replace(whole, staged=[], targets=targets, sources=sources, unused=(), through_arena=not targets)
        return writes, sum(source.numel() * source.element_size() for source in sources)

    def differs_in_weights(self, other: Blend) -> bool:
        """Whether nothing but weights is different."""
        exact = self.error is None and other.error is None
        return exact and self.recipe is other.recipe and self.recipe is not None and self.versions == other.versions


class Blender:
    """Makes blends, and holds the last few."""

    def __init__(self) -> None:
        self._blends: OrderedDict[Any, Blend] = OrderedDict()
        self._recipes: OrderedDict[Any, _Recipe] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory of all blends that are held."""
        return sum(blend.nbytes for blend in self._blends.values())

    def blend(self, ingredients: Sequence[Ingredient], binding: Binding, *, svd: bool = False) -> Blend:
        """The blend of these adapters for the slots of `binding`; one that is held, if it is the same.

        Raises:
            RankError: ranks beyond a slot's, and `svd` is False.
            UnsupportedError: an adapter has something that does not add up.
            NonFiniteError: a weight makes values overflow.
        """
        room = tuple(binding.room.items()) if svd else None  # what a truncated delta is cut to
        key = tuple((entry.name, entry.version, weight) for entry, weight in ingredients), room
        held = self._blends.get(key)
        if held is not None:
            return held
        if len(ingredients) == 1:
            return _weighted(ingredients[0], key)
        recipe = self._recipe(ingredients, binding, svd)
        versions = tuple(ingredient.entry.version for ingredient in ingredients)
        alike = (blend for blend in reversed(self._blends.values()) if blend.recipe is recipe)
        like = next((blend for blend in alike if blend.versions == versions and not recipe.shrunk), None)
        data, error = _mix(recipe, ingredients, binding, like)
        name = blend_name({ingredient.entry.name: ingredient.weight for ingredient in ingredients})
        checkpoint = Checkpoint(recipe.schema, data, _version(ingredients, recipe), f"the blend {name}")
        return Blend(name, checkpoint, ingredients, key, recipe=recipe, error=error)

    def hold(self, blend: Blend) -> None:
        """Keep a blend that has been activated, and let go of the one that was not used for longest."""
        self._blends[blend.key] = blend
        self._blends.move_to_end(blend.key)
        if len(self._blends) > KEPT_BLENDS:
            self._blends.popitem(last=False)

    def forget(self, name: str) -> None:
        """Let go of the blends that have this adapter in them."""
        for key in [key for key, blend in self._blends.items() if name in blend.names]:
            del self._blends[key]

    def clear(self) -> None:
        """Let go of all."""
        self._blends.clear()
        self._recipes.clear()

    def _recipe(self, ingredients: Sequence[Ingredient], binding: Binding, svd: bool) -> _Recipe:
        room = binding.room
        shrunk = {fqn: room[fqn] for fqn, rank in needed_ranks(ingredients).items() if rank > room.get(fqn, rank)}
        if shrunk and not svd:
            raise _beyond(shrunk, ingredients)
        schemas = tuple(ingredient.entry.adapter.checkpoint.schema for ingredient in ingredients)
        dtypes = tuple((fqn, slot.dtype) for fqn, slot in binding.slots.items())
        key = schemas, tuple(shrunk.items()), dtypes
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = self._recipes[key] = _make_recipe(ingredients, shrunk, binding)
            if len(self._recipes) > KEPT_RECIPES:
                self._recipes.popitem(last=False)
        return recipe


def blend_name(weights: Mapping[str, float]) -> str:
    """What `Swapper.active` says of a blend."""
    return "+".join(f"{name}:{weight!r}" for name, weight in weights.items())


def needed_ranks(ingredients: Iterable[Ingredient]) -> dict[str, int]:
    """Module path → the ranks of all adapters there."""
    ranks: Counter[str] = Counter()
    for ingredient in ingredients:
        ranks.update({fqn: target.rank for fqn, target in ingredient.entry.adapter.targets.items()})
    return dict(ranks)


def _version(ingredients: Sequence[Ingredient], recipe: _Recipe | None) -> str:
    stated = [[entry.version, weight.hex()] for entry, weight in ingredients]
    shrunk = sorted(recipe.shrunk.items()) if recipe is not None else []
    return xxhash.xxh3_128_hexdigest(json.dumps([stated, shrunk]).encode())


def _beyond(shrunk: Mapping[str, int], ingredients: Sequence[Ingredient]) -> RankError:
    fqn = next(iter(shrunk))
    targets = [entry.adapter.targets[fqn] for entry, _ in ingredients if fqn in entry.adapter.targets]
    ranks = [target.rank for target in targets]
    return RankError(
        "The ranks of the blend are beyond those of its slots.",
        where=fqn,
        found=f"{' + '.join(map(str, ranks))} = {sum(ranks)}, and {len(shrunk) - 1} more modules",
        expected=f"at most {shrunk[fqn]}, the rank the slot was planned for",
        hint="plan for blends: hotslot.plan(model, sources, max_blend=…); or activate(…, blend='svd')",
    )


# -- one adapter, weighted -------------------------------------------------------------------------------------------


def _weighted(ingredient: Ingredient, key: Any) -> Blend:
    """The adapter's own bytes under a config of another alpha."""
    entry, weight = ingredient
    adapter, checkpoint = entry.adapter, entry.adapter.checkpoint
    config = dict(checkpoint.config)
    config["lora_alpha"] = config.get("lora_alpha", 8) * weight
    config["alpha_pattern"] = {name: alpha * weight for name, alpha in (config.get("alpha_pattern") or {}).items()}
    name = blend_name({entry.name: weight})
    schema = checkpoint.schema.with_config(config)
    blended = Checkpoint(schema, checkpoint.data, _version([ingredient], None), f"the blend {name}")
    targets = {
        fqn: replace(target, alpha=target.alpha * weight, scaling=target.scaling * weight)
        for fqn, target in adapter.targets.items()
    }
    return Blend(name, blended, [ingredient], key, adapter=replace(adapter, checkpoint=blended, targets=targets))


# -- several adapters ------------------------------------------------------------------------------------------------


def _bands(ingredients: Sequence[Ingredient]) -> dict[str, list[Band]]:
    bands: dict[str, list[Band]] = {}
    for i, (entry, _) in enumerate(ingredients):
        for fqn, target in entry.adapter.targets.items():
            for suffix in target.parts:
                if suffix not in (*_A, *_B, _BIAS):
                    raise UnsupportedError(
                        f"{entry.adapter.checkpoint.origin} has a tensor that cannot be blended.",
                        where=f"{fqn}.{suffix}",
                        found=suffix,
                        expected="A, B and bias of plain LoRA, which add up",
                        hint="activate it alone",
                    )
            own = bands.setdefault(fqn, [])
            low = own[-1].high if own else 0
            own.append(Band(i, target, low, low + target.rank))
    return bands


def _make_recipe(ingredients: Sequence[Ingredient], shrunk: Mapping[str, int], binding: Binding) -> _Recipe:
    bands = _bands(ingredients)
    biased = any(_BIAS in piece.target.parts for pieces in bands.values() for piece in pieces)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    scaled: list[Piece] = []
    plain: list[Piece] = []
    for fqn, pieces in bands.items():
        slot, first = binding.slots[fqn], pieces[0].target
        rank = shrunk.get(fqn, pieces[-1].high)
        suffixes = [suffix for suffix in first.parts if suffix != _BIAS]
        for suffix in [*suffixes, *([_BIAS] if biased and "lora_B.weight" in suffixes else [])]:
            name = f"{_PREFIX}{fqn}.{suffix}"
            shape = slot.part_shape(suffix, rank) if suffix != _BIAS else slot.part_shape("lora_B.weight", rank)[:1]
            shapes[name] = slot.dtype, shape
            for piece in pieces:
                spec = piece.target.parts.get(suffix)
                if spec is not None and (suffix == _BIAS or fqn not in shrunk):
                    place = shape, piece.target.scaling, slot.groups, slot.experts
                    made = Piece(piece, fqn, suffix, name, spec.name, *place)
                    (plain if suffix in _B else scaled).append(made)
    specs, end = [], 0
    for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):  # as safetensors orders them
        dtype, shape = shapes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        specs.append(TensorSpec(name, dtype, shape, start, end))
    ranks = {fqn: shrunk.get(fqn, pieces[-1].high) for fqn, pieces in bands.items()}
    config = _config(ingredients, ranks, binding, lora_bias=biased)
    return _Recipe(Schema(config, specs), end, bands, scaled, plain, shrunk)


def _config(
    ingredients: Sequence[Ingredient], ranks: Mapping[str, int], binding: Binding, *, lora_bias: bool
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
            modules.add(root)
        by_key[root] = rank
    usual = Counter(by_key.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(key)}": rank for key, rank in by_key.items() if rank != usual}
    parameters = next((e.adapter.target_parameters for e, _ in ingredients if e.adapter.target_parameters), ())
    whole = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return {
        **ingredients[0].entry.adapter.checkpoint.config,
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


def _mix(
    recipe: _Recipe, ingredients: Sequence[Ingredient], binding: Binding, like: Blend | None
) -> tuple[torch.Tensor, float | None]:
    """The bytes, and the largest relative error of a module's delta; None if nothing was cut.

    Args:
        recipe: for these ingredients.
        ingredients: what is blended.
        binding: of the slots.
        like: the same blend with other weights, if there is one: its B is copied.
    """
    pinned = any(device.type == "cuda" for device in binding.memory.devices)
    with torch.inference_mode(False), torch.no_grad():
        checkpoints = [ingredient.entry.adapter.checkpoint for ingredient in ingredients]
        sources = [checkpoint.schema.split(checkpoint.data) for checkpoint in checkpoints]
        data = host_buffer(recipe.nbytes, pin_memory=pinned)
        flat = recipe.schema.split(data)
        weights = [ingredient.weight for ingredient in ingredients]
        pieces = recipe.scaled
        if like is not None:
            data.copy_(like.adapter.checkpoint.data)
            changed = {i for i, (new, old) in enumerate(zip(weights, like.weights, strict=True)) if new != old}
            sums = {piece.name for piece in pieces if piece.suffix == _BIAS and piece.band.number in changed}
            pieces = [piece for piece in pieces if piece.band.number in changed or piece.name in sums]
        else:
            for name, values in flat.items():
                if name.endswith(_BIAS):
                    values.zero_()
            places = [piece.place(flat) for piece in recipe.plain]
            own = [sources[piece.band.number][piece.source] for piece in recipe.plain]
            matched = [source.view(place.shape) for source, place in zip(own, places, strict=True)]
            if places:
                torch._foreach_copy_(places, matched)
        _scale(pieces, flat, sources, weights)
        error = _cut_all(recipe, ingredients, binding, data) if recipe.shrunk else None
        _refuse_overflow(recipe.schema, data)
        return data, error


def _scale(
    pieces: Sequence[Piece],
    flat: Mapping[str, torch.Tensor],
    sources: Sequence[Mapping[str, torch.Tensor]],
    weights: Sequence[float],
) -> None:
    """Multiply in float32 at least, and round once to what is written."""
    places, own, factors = [], [], []
    sums: dict[str, torch.Tensor] = {}
    for piece in pieces:
        place, factor = piece.place(flat), weights[piece.band.number] * piece.scaling
        source = sources[piece.band.number][piece.source]
        if piece.suffix == _BIAS:
            total = sums.setdefault(piece.name, torch.zeros_like(place, dtype=_wide(place)))
            total.add_(source.to(total.dtype), alpha=factor)
        else:
            places.append(place)
            own.append(source if place.dim() == 1 else source.view(place.shape))
            factors.append(factor)
    for name, total in sums.items():
        flat[name].copy_(total)
    if not places:
        return
    if all(place.dtype in (torch.float32, torch.float64) for place in places):
        torch._foreach_copy_(places, own)
        torch._foreach_mul_(places, factors)
    else:
        scaled = [source.to(_wide(place), copy=True) for place, source in zip(places, own, strict=True)]
        torch._foreach_mul_(scaled, factors)
        torch._foreach_copy_(places, scaled)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _refuse_overflow(schema: Schema, data: torch.Tensor) -> None:
    for run in schema.runs:
        low, high = torch.aminmax(view(data, run))
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NonFiniteError(
                "The weights of the blend make values overflow.",
                where=f"{run.name} and what follows",
                found=f"{run.dtype} values beyond {torch.finfo(run.dtype).max:.3g}",
                expected="finite values only",
                hint="smaller weights, or slots of a wider dtype: hotslot.plan(…, dtype=torch.float32)",
            )


# -- beyond the slots' rank ------------------------------------------------------------------------------------------

# As matrices, one for each group of a convolution or each expert:  G × [O, R] times G × [R, L]


def _as_matrices(down: torch.Tensor, up: torch.Tensor, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
    if slot.experts > 1:
        return (
            down.reshape(slot.experts, -1, down.shape[1]),
            up.reshape(up.shape[0], -1, slot.experts).permute(2, 0, 1),
        )
    ranks = up.shape[1]  # of one group
    return down.reshape(slot.groups, ranks, -1), up.reshape(slot.groups, -1, ranks)


def _cut_all(recipe: _Recipe, ingredients: Sequence[Ingredient], binding: Binding, data: torch.Tensor) -> float:
    """Write the modules that are cut; the largest relative error of them."""
    errors = [
        _cut(
            fqn, recipe, [entry.adapter.checkpoint for entry, _ in ingredients], [w for _, w in ingredients], slot, data
        )
        for fqn, slot in binding.slots.items()
        if fqn in recipe.shrunk
    ]
    lost, whole = (sum(column) for column in zip(*errors, strict=True))
    largest = max(math.sqrt(cut / full) if full else 0.0 for cut, full in errors)
    logger.warning(
        "blend: %d modules cut to their slots' rank by SVD; relative error %.3g in all of them, at most %.3g of one",
        len(errors), math.sqrt(lost / whole) if whole else 0.0, largest,
    )  # fmt: skip
    return largest


def _cut(
    fqn: str,
    recipe: _Recipe,
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    slot: Slot,
    data: torch.Tensor,
) -> tuple[float, float]:
    """Write the best approximation of the slot's rank; (squared norm of what was lost, of the whole)."""
    pieces = recipe.bands[fqn]
    a, b = sorted(pieces[0].target.parts.keys() - {_BIAS})
    downs, ups = [], []
    for piece in pieces:
        checkpoint, parts = checkpoints[piece.number], piece.target.parts
        factor = weights[piece.number] * piece.target.scaling
        down, up = (checkpoint.tensor(parts[suffix].name).double() for suffix in (a, b))
        down, up = _as_matrices(down, up, slot)
        downs.append(down * factor)
        ups.append(up)
    # Factors are of a few ranks: the decomposition is of an R × R matrix, and never of an O × L one.
    left, left_core = torch.linalg.qr(torch.cat(ups, dim=2))
    right, right_core = torch.linalg.qr(torch.cat(downs, dim=1).mT)
    u, s, vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    kept = min(recipe.shrunk[fqn] // slot.groups, s.shape[-1])
    root = s[:, :kept].sqrt()
    new_down, new_up = (view(data, recipe.schema.tensors[f"{_PREFIX}{fqn}.{suffix}"]) for suffix in (a, b))
    ranks = recipe.shrunk[fqn] // slot.groups
    cut_down = torch.zeros(s.shape[0], ranks, right.shape[1], dtype=torch.float64)
    cut_up = torch.zeros(s.shape[0], left.shape[1], ranks, dtype=torch.float64)
    cut_down[:, :kept] = root[:, :, None] * (vh[:, :kept] @ right.mT)
    cut_up[:, :, :kept] = (left @ u[:, :, :kept]) * root[:, None]
    new_down.copy_(cut_down.reshape(new_down.shape))
    new_up.copy_((cut_up.permute(1, 2, 0) if slot.experts > 1 else cut_up).reshape(new_up.shape))
    return float(s[:, kept:].square().sum()), float(s.square().sum())
