"""PEFT's own records of an adapter: each layer's r, lora_alpha and flags, the dropout, and the config.

After a swap they must describe what is live, or `save_pretrained`, `set_scale` and merging go by the adapter before.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from ..checkpoint import Checkpoint, Schema, config_dict
from ..errors import ConfigError
from ..methods import MAGNITUDE, Adapter, neutral_config, refuse_unsupported_options, trained_otherwise
from .discover import unwrap
from .slots import Slot

# A slot that no live adapter fills keeps a rank and a scaling of 1, so that PEFT's alpha / r stays a number.
NEUTRAL_SCALING = 1.0


Columns: TypeAlias = tuple[tuple[Any, ...], ...]


class SlotRecord(NamedTuple):
    """What one layer says of the slot's adapter, and the rank that its state_dict shows (0: not targeted)."""

    r: int
    lora_alpha: float
    use_rslora: bool
    lora_bias: bool
    use_dora: bool
    dropout: float
    shown_rank: int


class Records(NamedTuple):
    """All records of one adapter, and the attributes of its peft config (None where the model has none).

    `columns` are the slots' SlotRecords column by column: all r, all lora_alpha, and so on.
    """

    columns: Columns
    config: dict[str, Any] | None


def _columns(records: list[SlotRecord]) -> Columns:
    return tuple(zip(*records, strict=True))


def peft_config(model: nn.Module | None, adapter_name: str) -> Any:
    """The model's config object for this adapter, or None."""
    configs = getattr(unwrap(model), "peft_config", None) if model is not None else None
    return configs.get(adapter_name) if isinstance(configs, Mapping) else None


def refuse_unsupported_resident(model: nn.Module, adapter_name: str) -> None:
    """Raise if the adapter that is on the model keeps more than slots hold: a swap would leave that behind."""
    config = peft_config(model, adapter_name)
    if config is not None:
        refuse_unsupported_options(config_dict(config), f"the adapter {adapter_name!r} on the model")


_configs: weakref.WeakKeyDictionary[Schema, Any] = weakref.WeakKeyDictionary()


def build_config(checkpoint: Checkpoint) -> Any:
    """A peft LoraConfig of the checkpoint's config, as plain LoRA or DoRA: what training alone reads is left out.

    Raises:
        ConfigError: PEFT does not take these values.
    """
    schema = checkpoint.schema
    if schema not in _configs:
        _configs[schema] = _lora_config(schema.config, checkpoint.origin)
    return _configs[schema]


def _lora_config(options: Mapping[str, Any], origin: str) -> Any:
    from peft import LoraConfig

    known = {key: copy.deepcopy(value) for key, value in options.items() if key in LoraConfig.__dataclass_fields__}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice to whoever writes a config by hand
            config = LoraConfig(**known)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"PEFT refuses the config of {origin}.",
            where="adapter_config.json",
            found=f"{type(error).__name__}: {error}",
            expected="options that peft.LoraConfig takes",
            hint="save the adapter again with save_pretrained, or correct the option",
        ) from error
    vars(config).update(trained_otherwise(options))
    return config


def adapter_records(adapter: Adapter, slots: Mapping[str, Slot], config: Any) -> Records:
    """The records that describe `adapter` in these slots."""
    records = []
    for fqn, slot in slots.items():
        target = adapter.targets.get(fqn)
        if target is None:
            records.append(_unused(slot, adapter.dropout))
        else:
            bias, dora = "lora_B.bias" in target.parts, MAGNITUDE in target.parts
            record = SlotRecord(target.rank, target.alpha, adapter.use_rslora, bias, dora, adapter.dropout, target.rank)
            records.append(record)
    return Records(_columns(records), dict(config.__dict__))


def neutral_records(slots: Mapping[str, Slot]) -> Records:
    """The records of slots that add nothing."""
    config = _lora_config(neutral_config({fqn: slot.neutral_rank for fqn, slot in slots.items()}), "the empty slot")
    # Shown at its smallest rank, all zeros: what is saved loads again, and adds nothing.
    records = [_unused(slot, 0.0)._replace(shown_rank=slot.neutral_rank) for slot in slots.values()]
    return Records(_columns(records), dict(config.__dict__))


def unused_columns(slots: Mapping[str, Slot]) -> Columns:
    """`Records.columns` of slots that the live adapter does not target."""
    return _columns([_unused(slot, 0.0) for slot in slots.values()])


def _unused(slot: Slot, dropout: float) -> SlotRecord:
    return SlotRecord(slot.neutral_rank, slot.neutral_rank, False, False, False, dropout, 0)
