"""What of an adapter the slots of a layout hold, where they do not hold all of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..checkpoint import each_config
from ..methods import PARTS, Adapter, Target
from .layout import Layout


def within(adapter: Adapter, layout: Layout, saved: Collection[str]) -> Adapter:
    """The targets for which `layout` has slots, and of the modules that are saved whole those of `saved`.

    It is an adapter of its own, whose config says no more than that; the same one, if it is all of it.
    """
    schema = adapter.checkpoint.schema
    if schema in layout.whole:
        return adapter
    targets = {fqn: target for fqn, target in adapter.targets.items() if _holds(layout, target)}
    kept = {fqn: specs for fqn, specs in adapter.saved.items() if fqn in saved}
    if len(targets) == len(adapter.targets) and len(kept) == len(adapter.saved):
        if not kept:  # copies of modules come and go, and are no part of the layout
            layout.whole.add(schema)
        return adapter

    def narrowed(prefix: str, config: Mapping[str, Any]) -> dict[str, Any]:
        stated = {
            "target_modules": [fqn.removeprefix(prefix) for fqn in sorted(targets) if fqn.startswith(prefix)],
            "exclude_modules": None,
            "layers_pattern": None,
            "layers_to_transform": None,
            "modules_to_save": sorted(kept) or None,
        }
        return {**config, **stated}

    checkpoint = adapter.checkpoint.under(each_config(adapter.checkpoint.config, narrowed))
    return replace(adapter, checkpoint=checkpoint, targets=targets, saved=kept)


def _holds(layout: Layout, target: Target) -> bool:
    """Whether `pack` would take it."""
    slot = layout.slots.get(target.fqn)
    if slot is None or target.rank > slot.rank or target.rank % slot.groups:
        return False
    for suffix, spec in target.parts.items():
        if suffix not in slot.parts:
            return False
        wanted, rank_dim = list(slot.parts[suffix]), PARTS[suffix].rank_dim
        if rank_dim is not None:
            wanted[rank_dim] = slot.experts * (target.rank if rank_dim == 0 else target.rank // slot.groups)
        if tuple(wanted) != tuple(spec.shape):
            return False
    return True
