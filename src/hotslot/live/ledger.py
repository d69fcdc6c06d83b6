"""Where PEFT keeps its records of one adapter on the layers, and how a swap reads and writes them in bulk."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import nn

from .discover import roots
from .dropout import SlotDropout
from .edits import CountingDict, edits
from .scaling import ScalingMap
from .slots import Slot
from .state import Columns, Records, peft_configs, unused_columns
from .state_dict import Shown
from .training import Mute

_WATCHED = ("r", "lora_alpha", "use_rslora", "lora_bias", "use_dora")  # attributes of a layer: dicts by adapter name
_USES = (3, 4)  # of these: which parts the live adapter has
_MUTABLE = (list, dict, set)


class Ledger:
    """PEFT's records of one adapter: dicts and keys, looked up once, in the order of `Records.columns`.

    Module attributes and per-slot objects would cost a swap a millisecond for 224 slots; this takes a twentieth.

    Args:
        adapter_name: PEFT's name.
        slots: all slots of it.
        shown: what the layers' state_dict shows.
        mutes: (fqn, suffix) → what keeps training away from a part that the live adapter may lack.
        watch: put CountingDicts in the place of the layers' dicts. Not where compiled code may know those.
    """

    def __init__(
        self,
        adapter_name: str,
        slots: Mapping[str, Slot],
        shown: Shown,
        mutes: Mapping[tuple[str, str], Mute],
        *,
        watch: bool,
    ) -> None:
        name = self._adapter_name = adapter_name
        self._slots, self._mutes = slots, mutes
        self._layers: list[Any] = [slot.layer for slot in slots.values()]
        if watch:
            for layer, key in self._records():
                if type(layer.__dict__[key]) is dict:
                    layer.__dict__[key] = CountingDict(layer.__dict__[key])
        self._columns: list[tuple[list[dict[str, Any]], list[str]]] = [
            ([layer.__dict__[key] for layer in self._layers], [name] * len(slots)) for key in _WATCHED
        ]
        self._watched = all(type(record) is CountingDict for records, _ in self._columns for record in records)
        dropouts = [_dropout_record(layer.lora_dropout[name]) for layer in self._layers]
        self._columns += [(dropouts, ["p"] * len(slots)), ([shown] * len(slots), list(slots))]
        self._shown = shown
        self._unused = unused_columns(slots)
        self._configs: dict[str, Any] = {}  # the model's config objects, those that are not shown too
        self._said: Columns = ()  # by `apply`, when there had been so many edits:
        self._edits = -1

    def _records(self) -> list[tuple[Any, str]]:
        return [(layer, key) for key in _WATCHED for layer in self._layers]

    def capture(self, model: nn.Module | None) -> Records:
        """The records as they are now."""
        configs = peft_configs(model) if model is not None else {}
        if self._watched and self._edits == edits.count:
            columns = self._said
        else:
            columns = tuple(tuple(map(dict.__getitem__, *column)) for column in self._columns)
        name = self._adapter_name
        own = {prefix: dict(found[name].__dict__) for prefix, found in configs.items() if name in found}
        return Records(columns, own)

    def apply(self, records: Records, model: nn.Module | None, current: Records | None = None) -> None:
        """Make the model's records say `records`, of which `current` is known to be said already.

        Compiled code guards none of them, but for the config object: that stays the same one.
        """
        self._edits, before = -1, edits.count
        said = current.columns if current is not None else [None] * len(self._columns)
        columns, uses_changed = self._widened(records.columns), False
        for i, ((holders, keys), old, new) in enumerate(zip(self._columns, said, columns, strict=True)):
            if old is not new and old != new:
                deque(map(dict.__setitem__, holders, keys, new), maxlen=0)  # for their effect, in C
                uses_changed = uses_changed or i in _USES
        self._shown.note(records.configs)
        if uses_changed:
            for (fqn, suffix), mute in self._mutes.items():
                mute.use(self._slots[fqn].uses(suffix))
        if model is not None:
            self._apply_configs(records.configs, model)
        self._said, self._edits = columns, before

    def _apply_configs(self, configs: Mapping[str, Mapping[str, Any]], model: nn.Module) -> None:
        name = self._adapter_name
        for prefix, root in roots(model).items():
            shown = getattr(root, "peft_config", None) or {}
            if name in shown:
                self._configs[prefix] = shown[name]
            if prefix in configs and prefix in self._configs:
                config = self._configs[prefix]
                _state(config, configs[prefix])
                if prefix and name not in shown:
                    root.__dict__.update(peft_config={**shown, name: config}, _hf_peft_config_loaded=True)
            elif prefix and name in shown:  # a fresh load puts nothing of the adapter on this member of an Assembly
                del shown[name]
                if not shown:
                    del root.__dict__["peft_config"], root.__dict__["_hf_peft_config_loaded"]

    def _widened(self, columns: Columns) -> Columns:
        """Records that were taken before the last slots were added say that those are not in use."""
        known = len(columns[0])
        if known == len(self._layers):
            return columns
        return tuple(column + unused[known:] for column, unused in zip(columns, self._unused, strict=True))

    def release(self) -> None:
        """Give the layers plain dicts again, unless another adapter of theirs has a Ledger, too."""
        for layer, key in self._records():
            if type(layer.__dict__[key]) is CountingDict and not isinstance(layer.scaling, ScalingMap):
                layer.__dict__[key] = dict(layer.__dict__[key])


def _state(config: Any, stated: Mapping[str, Any]) -> None:
    """Let the config object say this, and be the same object."""
    # The model's copy: who edits it must not edit the adapter's.
    attributes = {key: copy.copy(value) if isinstance(value, _MUTABLE) else value for key, value in stated.items()}
    attributes["inference_mode"] = config.__dict__["inference_mode"]
    for key in config.__dict__.keys() - attributes.keys():
        del config.__dict__[key]
    config.__dict__.update(attributes)


def _dropout_record(dropout: nn.Module) -> dict[str, Any]:
    """Where the dropout's p is kept. PEFT's own stays as it is, where the model was compiled before: that guards it."""
    return dropout.__dict__ if type(dropout) is SlotDropout else {"p": getattr(dropout, "p", 0.0)}
