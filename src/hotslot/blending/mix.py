"""The bytes of a blend: concatenated and scaled, or cut to a lower rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch

from ..checkpoint import Checkpoint, Schema
from ..checkpoint.buffers import host_buffer
from ..checkpoint.checkpoint import view
from ..errors import NonFiniteError
from ..live import Binding, Slot
from .recipe import BIAS, PREFIX, Ingredient, Piece, Recipe

logger = logging.getLogger("hotslot.blending")


def mix(
    recipe: Recipe,
    ingredients: Sequence[Ingredient],
    binding: Binding,
    like: tuple[torch.Tensor, Sequence[float]] | None,
) -> tuple[torch.Tensor, float | None]:
    """The bytes, and the largest relative error of a module's delta; None if nothing was cut.

    Args:
        recipe: for these ingredients.
        ingredients: what is blended.
        binding: of the slots.
        like: bytes and weights of the same blend with other weights, if there is one.
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
            data.copy_(like[0])
            changed = {i for i, (new, old) in enumerate(zip(weights, like[1], strict=True)) if new != old}
            sums = {piece.name for piece in pieces if piece.suffix == BIAS and piece.band.number in changed}
            pieces = [piece for piece in pieces if piece.band.number in changed or piece.name in sums]
        else:
            for name, values in flat.items():
                if name.endswith(BIAS):
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
        if piece.suffix == BIAS:
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


def _cut_all(recipe: Recipe, ingredients: Sequence[Ingredient], binding: Binding, data: torch.Tensor) -> float:
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
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    slot: Slot,
    data: torch.Tensor,
) -> tuple[float, float]:
    """Write the best approximation of the slot's rank; (squared norm of what was lost, of the whole)."""
    pieces = recipe.bands[fqn]
    a, b = sorted(pieces[0].target.parts.keys() - {BIAS})
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
    new_down, new_up = (view(data, recipe.schema.tensors[f"{PREFIX}{fqn}.{suffix}"]) for suffix in (a, b))
    ranks = recipe.shrunk[fqn] // slot.groups
    cut_down = s.new_zeros(s.shape[0], ranks, right.shape[1])
    cut_up = s.new_zeros(s.shape[0], left.shape[1], ranks)
    cut_down[:, :kept] = root[:, :, None] * (vh[:, :kept] @ right.mT)
    cut_up[:, :, :kept] = (left @ u[:, :, :kept]) * root[:, None]
    new_down.copy_(cut_down.reshape(new_down.shape))
    new_up.copy_((cut_up.permute(1, 2, 0) if slot.experts > 1 else cut_up).reshape(new_up.shape))
    return float(s[:, kept:].square().sum()), float(s.square().sum())
