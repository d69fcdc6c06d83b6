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
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import xxhash

from .checkpoint import Checkpoint, Schema, TensorSpec
from .checkpoint.buffers import host_buffer
from .checkpoint.checkpoint import view
from .engine import Entry
from .errors import NonFiniteError, RankError, UnsupportedError
from .live import OUT_PROJ, Binding, Slot, Writes
from .live.corner import band
from .methods import PARTS, Target

logger = logging.getLogger(__name__)

# Blends that are held beside the one that is live, so that going back and forth builds none anew.
KEPT_BLENDS = 4
_PREFIX = "base_model.model."
_BIAS = "lora_B.bias"
_A, _B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")


class Ingredient(NamedTuple):
    """One adapter of a blend."""

    entry: Entry
    weight: float


class Band(NamedTuple):
    """The ranks from `low` to `high` of a module, which ingredient `number` fills, scaled by `factor`."""

    number: int
    target: Target
    low: int
    high: int
    factor: float


@dataclass(frozen=True)
class _Recipe:
    """All of a blend that does not depend on the weights: good for every blend of these schemas into these slots."""

    schema: Schema
    nbytes: int
    shrunk: Mapping[str, int]  # module path → rank that its delta is cut to


class Blend(Entry):
    """Several adapters as one; immutable."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        ingredients: Sequence[Ingredient],
        bands: Mapping[str, Sequence[Band]],
        error: float | None,
        key: Any,
    ) -> None:
        super().__init__(name, checkpoint)
        self.error, self.key = error, key
        self.versions = tuple(ingredient.entry.version for ingredient in ingredients)
        self.weights = tuple(ingredient.weight for ingredient in ingredients)
        self._bands = bands
        self.names = tuple(ingredient.entry.name for ingredient in ingredients)
        if len(ingredients) == 1:
            self.contents = ingredients[0].entry.contents

    @property
    def nbytes(self) -> int:
        """Bytes of host memory of its own: none, if it shares those of its one adapter."""
        return self.adapter.checkpoint.nbytes if len(self.versions) > 1 else 0

    def writes(self, binding: Binding, since: Entry | None) -> tuple[Writes, int]:
        """See `Entry.writes`: after a blend of the same adapters only the A of those whose weights have changed."""
        if not self._only_other_weights(since):
            return super().writes(binding, since)
        assert isinstance(since, Blend)
        whole, memory, checkpoint = self.compile(binding).writes, binding.memory, self.adapter.checkpoint
        changed = {i for i, (new, old) in enumerate(zip(self.weights, since.weights, strict=True)) if new != old}
        targets, sources = [], []
        for fqn, bands in self._bands.items():
            slot, parts = binding.slots[fqn], self.adapter.targets[fqn].parts
            written = [piece for piece in bands if piece.number in changed]
            for suffix, spec in parts.items():
                values = checkpoint.tensor(spec.name)
                if suffix in _A:
                    for piece in written:
                        targets.append(memory.band(fqn, suffix, piece.low, piece.high))
                        sources.append(slot.band(values, suffix, piece.low, piece.high))
                elif suffix == _BIAS and written:
                    targets.append(memory.band(fqn, suffix, 0, 0))
                    sources.append(values)
        writes = replace(whole, staged=[], targets=targets, sources=sources, unused=(), through_arena=not targets)
        return writes, sum(source.numel() * source.element_size() for source in sources)

    def _only_other_weights(self, since: Entry | None) -> bool:
        return (
            isinstance(since, Blend)
            and self.error is None
            and since.error is None
            and since.versions == self.versions
            and since.adapter.checkpoint.schema is self.adapter.checkpoint.schema
        )


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
        bands = _bands(ingredients)
        recipe = self._recipe(ingredients, bands, binding, svd)
        data, error = _mix(recipe, bands, ingredients, binding)
        name = blend_name({ingredient.entry.name: ingredient.weight for ingredient in ingredients})
        checkpoint = Checkpoint(recipe.schema, data, _version(ingredients, recipe), f"the blend {name}")
        return Blend(name, checkpoint, ingredients, bands, error, key)

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

    def _recipe(
        self, ingredients: Sequence[Ingredient], bands: Mapping[str, Sequence[Band]], binding: Binding, svd: bool
    ) -> _Recipe:
        ranks = {fqn: pieces[-1].high for fqn, pieces in bands.items()}
        room = binding.room
        shrunk = {fqn: room[fqn] for fqn, rank in ranks.items() if rank > room.get(fqn, rank)}
        if shrunk and not svd:
            fqn = next(iter(shrunk))
            raise RankError(
                "The ranks of the blend are beyond those of its slots.",
                where=fqn,
                found=f"{' + '.join(str(piece.target.rank) for piece in bands[fqn])} = {ranks[fqn]}, "
                f"and {len(shrunk) - 1} more modules",
                expected=f"at most {shrunk[fqn]}, the rank the slot was planned for",
                hint="plan for blends: hotslot.plan(model, sources, max_blend=…); or activate(…, blend='svd')",
            )
        key = (*(ingredient.entry.adapter.checkpoint.schema for ingredient in ingredients), tuple(shrunk.items()))
        dtypes = tuple(slot.dtype for slot in binding.slots.values())
        recipe = self._recipes.get((key, dtypes))
        if recipe is None:
            recipe = self._recipes[key, dtypes] = _make_recipe(ingredients, bands, shrunk, binding)
            if len(self._recipes) > KEPT_BLENDS:
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


# -- one adapter, weighted -------------------------------------------------------------------------------------------


def _weighted(ingredient: Ingredient, key: Any) -> Blend:
    """The adapter's own bytes under a config of another alpha."""
    entry, weight = ingredient
    checkpoint = entry.adapter.checkpoint
    config = dict(checkpoint.config)
    config["lora_alpha"] = config.get("lora_alpha", 8) * weight
    config["alpha_pattern"] = {key: alpha * weight for key, alpha in (config.get("alpha_pattern") or {}).items()}
    schema = Schema(config, checkpoint.tensors.values())
    name = blend_name({entry.name: weight})
    blended = Checkpoint(schema, checkpoint.data, _version([ingredient], None), f"the blend {name}")
    return Blend(name, blended, [ingredient], {}, None, key)


# -- several adapters ------------------------------------------------------------------------------------------------


def _bands(ingredients: Sequence[Ingredient]) -> dict[str, list[Band]]:
    bands: dict[str, list[Band]] = {}
    for i, (entry, weight) in enumerate(ingredients):
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
            own.append(Band(i, target, low, low + target.rank, weight * target.scaling))
    return bands


def _make_recipe(
    ingredients: Sequence[Ingredient], bands: Mapping[str, Sequence[Band]], shrunk: Mapping[str, int], binding: Binding
) -> _Recipe:
    biased = any(_BIAS in piece.target.parts for pieces in bands.values() for piece in pieces)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    ranks = {}
    for fqn, pieces in bands.items():
        slot, first = binding.slots.get(fqn), pieces[0].target
        ranks[fqn] = rank = shrunk.get(fqn, pieces[-1].high)
        for suffix, spec in first.parts.items():
            dim, shape = PARTS[suffix].rank_dim, list(spec.shape)
            if dim is not None:
                shape[dim] = shape[dim] // first.rank * rank if dim == 0 else shape[dim] * rank // first.rank
            shapes[f"{_PREFIX}{fqn}.{suffix}"] = slot.dtype if slot is not None else spec.dtype, tuple(shape)
        up = first.parts.get("lora_B.weight")
        if biased and up is not None:
            shapes[f"{_PREFIX}{fqn}.{_BIAS}"] = slot.dtype if slot is not None else up.dtype, (up.shape[0],)
    specs, end = [], 0
    for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):  # as safetensors orders them
        dtype, full = shapes[name]
        start, end = end, end + math.prod(full) * dtype.itemsize
        specs.append(TensorSpec(name, dtype, full, start, end))
    config = _config(ingredients, ranks, binding, lora_bias=biased)
    return _Recipe(Schema(config, specs), end, shrunk)


def _config(
    ingredients: Sequence[Ingredient], ranks: Mapping[str, int], binding: Binding, *, lora_bias: bool
) -> dict[str, Any]:
    """The config by which PEFT loads the blend from a file: the first adapter's, where it is not of all of them."""
    from peft.tuners.lora.layer import ParamWrapper

    modules: set[str] = set()
    by_key: dict[str, int] = {}
    for fqn, rank in ranks.items():
        layer: Any = binding.slots[fqn].layer if fqn in binding.slots else None
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
    recipe: _Recipe, bands: Mapping[str, Sequence[Band]], ingredients: Sequence[Ingredient], binding: Binding
) -> tuple[torch.Tensor, float | None]:
    """The bytes, and the error of what was cut, relative to the whole; None if nothing was."""
    pinned = any(device.type == "cuda" for device in binding.memory.devices)
    checkpoints = [ingredient.entry.adapter.checkpoint for ingredient in ingredients]
    plain: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {"A": [], "B": []}
    errors: list[tuple[float, float]] = []
    with torch.inference_mode(False), torch.no_grad():
        data = host_buffer(recipe.nbytes, pin_memory=pinned)
        for fqn, pieces in bands.items():
            blended = {
                suffix: view(data, spec)
                for suffix in PARTS
                if (spec := recipe.schema.tensors.get(f"{_PREFIX}{fqn}.{suffix}")) is not None
            }
            slot = binding.slots.get(fqn)
            groups, experts = (slot.groups, slot.experts) if slot is not None else (1, 1)
            own = [{s: checkpoints[p.number].tensor(x.name) for s, x in p.target.parts.items()} for p in pieces]
            for suffix, values in blended.items():
                if suffix == _BIAS:
                    values.copy_(_bias(values, pieces, own))
                elif fqn not in recipe.shrunk:
                    for piece, parts in zip(pieces, own, strict=True):
                        place = band(values, suffix, piece.low, piece.high, groups, experts)
                        source = parts[suffix]
                        if source.shape != place.shape:
                            source = source.view(place.shape)
                        plain["A" if suffix in _A else "B"].append((place, source, piece.factor))
            if fqn in recipe.shrunk and slot is not None:
                errors.append(_cut(blended, slot, recipe.shrunk[fqn], pieces, own))
        _copy_scaled(plain["A"])
        if plain["B"]:
            torch._foreach_copy_([place for place, _, _ in plain["B"]], [source for _, source, _ in plain["B"]])
    _refuse_overflow(recipe.schema, data)
    if not errors:
        return data, None
    lost, whole = (sum(column) for column in zip(*errors, strict=True))
    largest = max(math.sqrt(cut / full) if full else 0.0 for cut, full in errors)
    logger.warning(
        "blend: %d modules cut to their slots' rank by SVD; relative error %.3g in all, at most %.3g of one module",
        len(errors), math.sqrt(lost / whole) if whole else 0.0, largest,
    )  # fmt: skip
    return data, largest


def _copy_scaled(pieces: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
    """Scale in float32 at least, and round once to what is copied to."""
    if not pieces:
        return
    places, sources, factors = map(list, zip(*pieces, strict=True))
    if all(place.dtype in (torch.float32, torch.float64) for place in places):
        torch._foreach_copy_(places, sources)
        torch._foreach_mul_(places, factors)
    else:
        scaled = [source.to(_wide(place), copy=True) for place, source in zip(places, sources, strict=True)]
        torch._foreach_mul_(scaled, factors)
        torch._foreach_copy_(places, scaled)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _bias(like: torch.Tensor, pieces: Sequence[Band], own: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    total = torch.zeros_like(like, dtype=_wide(like))
    for piece, parts in zip(pieces, own, strict=True):
        if _BIAS in parts:
            total.add_(parts[_BIAS].to(total.dtype), alpha=piece.factor)
    return total


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


def _cut(
    blended: Mapping[str, torch.Tensor],
    slot: Slot,
    rank: int,
    pieces: Sequence[Band],
    own: Sequence[Mapping[str, torch.Tensor]],
) -> tuple[float, float]:
    """Write the best approximation of `rank`; (squared norm of what was lost, of the whole)."""
    (a, down), (b, up) = ((suffix, blended[suffix]) for suffix in sorted(blended.keys() - {_BIAS}))
    matrices = [
        _as_matrices(parts[a].double() * p.factor, parts[b].double(), slot)
        for p, parts in zip(pieces, own, strict=True)
    ]
    # Factors are of a few ranks: the decomposition is of an R × R matrix, and never of an O × L one.
    left, left_core = torch.linalg.qr(torch.cat([m[1] for m in matrices], dim=2))
    right, right_core = torch.linalg.qr(torch.cat([m[0] for m in matrices], dim=1).mT)
    u, s, vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    kept = min(rank // slot.groups, s.shape[-1])
    root = s[:, :kept].sqrt()
    new_down, new_up = _as_matrices(down, up, slot)
    cut_down, cut_up = torch.zeros_like(new_down, dtype=torch.float64), torch.zeros_like(new_up, dtype=torch.float64)
    cut_down[:, :kept] = root[:, :, None] * (vh[:, :kept] @ right.mT)
    cut_up[:, :, :kept] = (left @ u[:, :, :kept]) * root[:, None]
    down.copy_(cut_down.reshape(down.shape))
    if slot.experts > 1:
        up.copy_(cut_up.permute(1, 2, 0).reshape(up.shape))
    else:
        up.copy_(cut_up.reshape(up.shape))
    return float(s[:, kept:].square().sum()), float(s.square().sum())
