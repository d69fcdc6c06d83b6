"""A blend as an Entry, and the few that are held."""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import xxhash

from .. import live
from ..cache import Room, Tier
from ..checkpoint import Checkpoint, each_config
from ..entry import Compiled, Entry
from ..errors import NonFiniteError, RankError, UnsupportedError
from ..live import Binding, Writes
from ..methods import Adapter, interpret
from .mix import mix
from .recipe import Ingredient, Recipe, make_recipe, needed_ranks, refuse_unblendable

# Held so that going back and forth between two builds none anew. With more, a weight that is moved step by step would
# never find the memory of a blend that was let go, and page faults would take longer than all the rest.
KEPT_BLENDS = 2
KEPT_RECIPES = 4


class Blend(Entry):
    """Several adapters as one, or one adapter weighted; immutable."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        ingredients: Sequence[Ingredient],
        key: Any,
        *,
        recipe: Recipe | None = None,
        error: float | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(name, checkpoint, adapter or interpret(checkpoint))
        self.key, self.recipe, self.error = key, recipe, error
        self.names = tuple(ingredient.entry.name for ingredient in ingredients)
        self.versions = tuple(ingredient.entry.version for ingredient in ingredients)
        self.weights = tuple(ingredient.weight for ingredient in ingredients)
        self._same_bytes = ingredients[0].entry if len(ingredients) == 1 else None
        if self._same_bytes is not None:
            self.lenders = (self._same_bytes,)
            self.contents = self._same_bytes.contents

    @property
    def place(self) -> str:
        """What it is held under: its name, which an adapter might have too, and its version."""
        return f"{self.name} ({self.version})"

    @property
    def nbytes(self) -> int:
        """Bytes of host memory of its own: none, if it shares those of its one adapter."""
        return super().nbytes if self._same_bytes is None else 0

    def compile(self, binding: Binding) -> Compiled:
        """See `Entry.compile`. One adapter alone is compiled already, but for its scalings."""
        if self._same_bytes is not None and (self._compiled is None or self._compiled.memory is not binding.memory):
            records, scalings = binding.describe(self.adapter)
            writes = self._same_bytes.compile(binding).writes
            columns = binding.memory.compile(None, scalings).columns
            weighted = replace(writes, scalings=scalings, columns=columns)
            nbytes = self._same_bytes.compile(binding).nbytes
            self._compiled = Compiled(binding.memory, weighted, {}, records, nbytes=nbytes)
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
        writes = replace(whole.without_values(), targets=targets, sources=sources, uncounted=not targets)
        return writes, sum(source.numel() * source.element_size() for source in sources)

    def differs_in_weights(self, other: Blend) -> bool:
        """Whether nothing but weights is different."""
        exact = self.error is None and other.error is None
        return exact and self.recipe is other.recipe and self.recipe is not None and self.versions == other.versions


class MergedBlend(Blend):
    """Adapters that no slot holds, added up in the base's weights."""

    def __init__(self, ingredients: Sequence[Ingredient], key: Any, binding: Binding) -> None:
        for entry, _ in ingredients:
            _refuse_slots(entry, binding)
        name = blend_name({entry.name: weight for entry, weight in ingredients})
        first = ingredients[0].entry.adapter.checkpoint
        nothing = Checkpoint(first.schema, first.data[:0], _version(ingredients, None), f"the blend {name}")
        adapter = replace(ingredients[0].entry.adapter, checkpoint=nothing, targets={})
        super().__init__(name, nothing, ingredients, key, adapter=adapter)
        merges = live.blended([(entry.compile(binding).merges.all, weight) for entry, weight in ingredients])
        self._merges_of_all = binding.merger.priced(merges)
        self.lenders = tuple(entry for entry, _ in ingredients)
        self.contents = nothing.version

    @property
    def nbytes(self) -> int:
        """Bytes of host memory of its own: its factors are where the weights are."""
        return 0

    def compile(self, binding: Binding) -> Compiled:
        """See `Entry.compile`."""
        known = self._compiled
        if known is None or known.memory is not binding.memory or known.beside != binding.beside:
            self._compiled = known = self._below(binding, self._merges_of_all)
        return known


class Blender:
    """Makes blends, and holds the last few that were live in a tier of host memory, where they may go as adapters may.

    Args:
        tier: where they are held.
    """

    def __init__(self, tier: Tier[Entry]) -> None:
        self._tier = tier
        self._held: OrderedDict[Any, Blend] = OrderedDict()  # those that have not gone from the tier, and others
        self._activated: weakref.WeakSet[Blend] = weakref.WeakSet()
        self._recipes: OrderedDict[Any, Recipe] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(self.holds, self._held.values()))

    def holds(self, entry: Entry) -> bool:
        """Whether it is a blend that is held."""
        return isinstance(entry, Blend) and self._tier.peek(entry.place) is entry

    def shares(self, entry: Entry) -> bool:
        """Whether a blend that is held has its values in this adapter's memory."""
        return any(entry in blend.lenders and self.holds(blend) for blend in self._held.values())

    def blend(self, ingredients: Sequence[Ingredient], binding: Binding, *, svd: bool = False) -> Blend:
        """The blend of these adapters for the slots of `binding`; one that is held, if it is the same.

        Raises:
            RankError: ranks beyond a slot's, and `svd` is False.
            UnsupportedError: an adapter has something that does not add up.
            NonFiniteError: a weight makes values overflow.
            CacheFullError: there is no room for it.
        """
        room = tuple(binding.room.items()) if svd else None  # what a truncated delta is cut to
        dtypes = frozenset(slot.dtype for slot in binding.slots.values())
        key = tuple((entry.name, entry.version, weight) for entry, weight in ingredients), room, dtypes
        held = self._held.get(key)
        if held is not None and self._tier.get(held.place) is held:
            return held
        for ingredient in ingredients:
            _refuse_absolute(ingredient.entry, binding)
        if any(not entry.adapter.targets or entry.compile(binding).merges.all for entry, _ in ingredients):
            return self._made(MergedBlend(ingredients, key, binding))
        refuse_unblendable([ingredient.entry.adapter for ingredient in ingredients])  # whatever the ranks
        if len(ingredients) == 1:
            return self._made(_weighted(ingredients[0], key))
        recipe = self._recipe(ingredients, binding, svd)
        name = blend_name({ingredient.entry.name: ingredient.weight for ingredient in ingredients})
        reserved = Room()
        try:
            self._tier.reserve(reserved, recipe.schema.nbytes, name)
            versions = tuple(ingredient.entry.version for ingredient in ingredients)
            alike = (blend for blend in reversed(self._held.values()) if blend.recipe is recipe)
            like = next((blend for blend in alike if blend.versions == versions and not recipe.shrunk), None)
            known = (like.adapter.checkpoint.data, like.weights) if like is not None else None
            data, error = mix(recipe, ingredients, binding, known)
            checkpoint = Checkpoint(recipe.schema, data, _version(ingredients, recipe), f"the blend {name}")
            blend = Blend(name, checkpoint, ingredients, key, recipe=recipe, error=error)
            return self._made(blend, reserved)
        finally:
            reserved.nbytes = 0

    def forget(self, name: str) -> None:
        """Let go of the blends that have this adapter in them; of one that is live, once it is not."""
        for key, blend in list(self._held.items()):
            if name in blend.names:
                self._retire(blend)
                del self._held[key]

    def clear(self) -> None:
        """Let go of all."""
        for key, blend in list(self._held.items()):
            self._retire(blend)
            del self._held[key]
        self._recipes.clear()

    def hold(self, blend: Blend) -> None:
        """Keep a blend that has been activated, and let go of the one that was not used for longest."""
        if self.holds(blend):  # else it is one that was forgotten, and has come back by a rollback
            self._activated.add(blend)
            self._held[blend.key] = blend
            self._held.move_to_end(blend.key)
        while len(self._held) > KEPT_BLENDS:
            key = next(iter(self._held))
            self._retire(self._held[key])
            del self._held[key]

    def abandon(self, blend: Blend) -> None:
        """Let go of a blend that has not been activated, unless it was before."""
        if blend not in self._activated:
            self._retire(blend)
            self._held.pop(blend.key, None)

    def _made(self, blend: Blend, room: Room | None = None) -> Blend:
        """In the tier, until it is abandoned, or two newer ones are held."""
        self._held[blend.key] = blend  # first: what is broken off here goes as the others do
        self._tier.add(blend.place, blend, room)
        return blend

    def _retire(self, blend: Blend) -> None:
        if self.holds(blend):
            self._tier.retire(blend.place)

    def _recipe(self, ingredients: Sequence[Ingredient], binding: Binding, svd: bool) -> Recipe:
        room = binding.room
        shrunk = {fqn: room[fqn] for fqn, rank in needed_ranks(ingredients).items() if rank > room.get(fqn, rank)}
        if shrunk and not svd:
            raise _beyond(shrunk, ingredients)
        schemas = tuple(ingredient.entry.adapter.checkpoint.schema for ingredient in ingredients)
        dtypes = tuple((fqn, slot.dtype) for fqn, slot in binding.slots.items())
        key = schemas, tuple(shrunk.items()), dtypes
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = self._recipes[key] = make_recipe(ingredients, shrunk, binding)
            if len(self._recipes) > KEPT_RECIPES:
                self._recipes.popitem(last=False)
        return recipe


def _refuse_slots(entry: Entry, binding: Binding) -> None:
    compiled = entry.compile(binding)
    if compiled.nbytes:
        raise UnsupportedError(
            "A blend of adapters that are merged and of others that slots hold.",
            where=entry.name,
            found=f"route {compiled.route!r}",
            expected="one route for all",
            hint="attach(model, …, route='merged'); or grow(plan) with a plan for all of them",
        )


def _refuse_absolute(entry: Entry, binding: Binding) -> None:
    """Raise if the adapter has values of its own for tensors of the base model: they have no weight."""
    compiled = entry.compile(binding)
    # Those of a merge below an adapter that came with the model are its neutral ones.
    values = {} if binding.resident is not None and compiled.merges.all else compiled.values
    if values:
        raise UnsupportedError(
            f"{entry.adapter.checkpoint.origin} has tensors that cannot be blended.",
            where=".".join(filter(None, next(iter(values)))),
            found=f"{len(values)} tensors in the place of the base model's own",
            expected="A, B and bias of plain LoRA, which add up",
            hint="activate it alone, with weight 1",
        )


def blend_name(weights: Mapping[str, float]) -> str:
    """What `Swapper.active` says of a blend."""
    return "+".join(f"{name}:{weight!r}" for name, weight in weights.items())


def _version(ingredients: Sequence[Ingredient], recipe: Recipe | None) -> str:
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

    def scaled(prefix: str, config: Mapping[str, Any]) -> dict[str, Any]:
        pattern = {name: alpha * weight for name, alpha in (config.get("alpha_pattern") or {}).items()}
        return {**config, "lora_alpha": config.get("lora_alpha", 8) * weight, "alpha_pattern": pattern}

    name = blend_name({entry.name: weight})
    schema = checkpoint.schema.with_config(each_config(checkpoint.config, scaled))
    blended = Checkpoint(schema, checkpoint.data, _version([ingredient], None), f"the blend {name}")
    targets = {
        fqn: replace(target, alpha=target.alpha * weight, scaling=target.scaling * weight)
        for fqn, target in adapter.targets.items()
    }
    largest = max(targets.values(), key=lambda target: abs(target.scaling))
    if not abs(largest.scaling) <= torch.finfo(torch.float32).max:  # in which the slots hold their scalings
        raise NonFiniteError(
            "The weight makes the scaling overflow.",
            where=largest.fqn,
            found=f"scaling {largest.scaling:.3g}",
            expected="a float32 number",
            hint="a smaller weight",
        )
    return Blend(name, blended, [ingredient], key, adapter=replace(adapter, checkpoint=blended, targets=targets))
