"""PEFT's own records of an adapter: each layer's r, lora_alpha and flags, the dropout, and the config.

After a swap they must describe what is live, or `save_pretrained`, `set_scale` and merging go by the adapter before.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..checkpoint import config_dict
from ..errors import ConfigError
from ..methods import Adapter, neutral_config, refuse_unsupported_options
from .discover import unwrap
from .dropout import SlotDropout
from .slots import Slot
from .state_dict import TrueRank

# A slot that no live adapter fills keeps a rank and a scaling of 1, so that PEFT's alpha / r stays a number.
NEUTRAL_SCALING = 1.0


class SlotRecord(NamedTuple):
    """What one layer says of the slot's adapter, and the rank that its state_dict shows (0: not targeted)."""

    r: int
    lora_alpha: float
    use_rslora: bool
    lora_bias: bool
    shown_rank: int
    dropout: float


class Records(NamedTuple):
    """All records of one adapter: slot by slot, and the attributes of its peft config (None where there is none)."""

    slots: list[SlotRecord]
    config: dict[str, Any] | None


def peft_config(model: nn.Module | None, adapter_name: str) -> Any:
    """The model's config object for this adapter, or None."""
    configs = getattr(unwrap(model), "peft_config", None) if model is not None else None
    return configs.get(adapter_name) if isinstance(configs, Mapping) else None


def refuse_unsupported_resident(model: nn.Module, adapter_name: str) -> None:
    """Raise if the adapter that is on the model keeps more than slots hold: a swap would leave that behind."""
    config = peft_config(model, adapter_name)
    if config is not None:
        refuse_unsupported_options(config_dict(config), f"the adapter {adapter_name!r} on the model")


def build_config(options: Mapping[str, Any], origin: str) -> Any:
    """A peft LoraConfig of the content of an adapter_config.json.

    Raises:
        ConfigError: PEFT does not take these values.
    """
    from peft import LoraConfig

    known = {key: copy.deepcopy(value) for key, value in options.items() if key in LoraConfig.__dataclass_fields__}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice to whoever writes a config by hand
            return LoraConfig(**known)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"PEFT refuses the config of {origin}.", found=f"{type(error).__name__}: {error}") from error


def adapter_records(adapter: Adapter, slots: Mapping[str, Slot], config: Any) -> Records:
    """The records that describe `adapter` in these slots."""
    records = []
    for fqn, slot in slots.items():
        target = adapter.targets.get(fqn)
        if target is None:
            records.append(_unused(slot, adapter.dropout))
        else:
            bias = "lora_B.bias" in target.parts
            record = SlotRecord(target.rank, target.alpha, adapter.use_rslora, bias, target.rank, adapter.dropout)
            records.append(record)
    return Records(records, dict(config.__dict__))


def neutral_records(slots: Mapping[str, Slot]) -> Records:
    """The records of slots that add nothing."""
    config = build_config(neutral_config({fqn: slot.neutral_rank for fqn, slot in slots.items()}), "the empty slot")
    # Shown at its smallest rank, all zeros: what is saved loads again, and adds nothing.
    records = [_unused(slot, 0.0)._replace(shown_rank=slot.neutral_rank) for slot in slots.values()]
    return Records(records, dict(config.__dict__))


def _unused(slot: Slot, dropout: float) -> SlotRecord:
    return SlotRecord(slot.neutral_rank, slot.neutral_rank, False, False, 0, dropout)


class Ledger:
    """Where PEFT keeps its records of one adapter, looked up once."""

    def __init__(self, slots: Mapping[str, Slot], hooks: Mapping[str, TrueRank]) -> None:
        self._adapter_name = next(iter(slots.values())).adapter_name
        self._rows = [(slot.layer, hooks[fqn]) for fqn, slot in slots.items()]

    def capture(self, model: nn.Module | None) -> Records:
        """The records as they are now."""
        name, records = self._adapter_name, []
        for layer, hook in self._rows:
            dropout = getattr(layer.lora_dropout._modules[name], "p", 0.0)
            flags = layer.use_rslora[name], layer.lora_bias[name]
            records.append(SlotRecord(layer.r[name], layer.lora_alpha[name], *flags, hook.rank, dropout))
        config = peft_config(model, name)
        return Records(records, dict(config.__dict__) if config is not None else None)

    def apply(self, records: Records, model: nn.Module | None, current: Records | None = None) -> None:
        """Make the model's records say `records`, of which `current` is known to be said already.

        Compiled code guards none of them, but for the config object: that stays the same one.
        """
        name = self._adapter_name
        said = current.slots if current is not None else [None] * len(self._rows)
        for (layer, hook), record, old in zip(self._rows, records.slots, said, strict=True):
            if record == old:
                continue
            layer.r[name] = record.r
            layer.lora_alpha[name] = record.lora_alpha
            layer.use_rslora[name] = record.use_rslora
            layer.lora_bias[name] = record.lora_bias
            hook.rank = record.shown_rank
            # PEFT's own dropout stays as it is where the model was compiled before: compiled code guards its p.
            dropout = layer.lora_dropout._modules[name]
            if type(dropout) is SlotDropout:
                dropout.__dict__["p"] = record.dropout  # a module's own __setattr__ takes a microsecond
        config = peft_config(model, name)
        if config is not None and records.config is not None:
            mode = config.__dict__.get("inference_mode")
            config.__dict__.clear()
            config.__dict__.update(records.config, inference_mode=mode)
