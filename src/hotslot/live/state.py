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
from ..errors import ConfigError, UnsupportedError
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

    `columns` are the slots' SlotRecords column by column: all r, all lora_alpha, and so on. `plain` is all that PEFT
    keeps beside tensors of an adapter that no slots hold; see `hotslot.live.resident`.
    """

    columns: Columns
    config: dict[str, Any] | None
    plain: tuple[Any, ...] = ()


def _columns(records: list[SlotRecord]) -> Columns:
    return tuple(zip(*records, strict=True)) or ((),) * len(SlotRecord._fields)


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


def build_config(checkpoint: Checkpoint, *, as_trained: bool = False) -> Any:
    """A peft config of the checkpoint's config, of its method's class.

    A LoRA's is that of plain LoRA or DoRA, and shared: what training alone reads is left out. With `as_trained` it is
    all of it, and the caller's own.

    Raises:
        UnsupportedError: a method that this PEFT does not have.
        ConfigError: PEFT does not take these values.
    """
    schema = checkpoint.schema
    if as_trained:
        return _build(schema.config, checkpoint.origin)
    if schema not in _configs:
        config = _configs[schema] = _build(schema.config, checkpoint.origin)
        if schema.config.get("peft_type") == "LORA":
            vars(config).update(trained_otherwise(schema.config))
    return _configs[schema]


def _build(options: Mapping[str, Any], origin: str) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    method = options.get("peft_type")
    kind: Any = next((kind for known, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if known.value == method), None)
    if kind is None:
        raise UnsupportedError(
            f"{origin} is an adapter of a method that this PEFT does not have.",
            where="peft_type",
            found=f"{method!r:.80}",
            expected=f"one of {', '.join(sorted(known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING))}",
            hint="update peft",
        )
    unknown = sorted(key for key, value in options.items() if key not in kind.__dataclass_fields__ and value)
    if unknown and method != "LORA":  # whose options `hotslot.methods.lora` has looked at, one by one
        raise ConfigError(
            f"{origin} has options that this PEFT does not know.",
            where=unknown[0],
            found=f"{options[unknown[0]]!r:.200}",
            expected=f"options of peft.{kind.__name__}",
            hint="a newer PEFT wrote it: update peft, or remove the keys if they have no effect",
        )
    known = {key: copy.deepcopy(value) for key, value in options.items() if key in kind.__dataclass_fields__}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice to whoever writes a config by hand
            return kind(**known)
    except (ImportError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"PEFT refuses the config of {origin}.",
            where="adapter_config.json",
            found=f"{type(error).__name__}: {error}",
            expected=f"options that peft.{kind.__name__} takes",
            hint="save the adapter again with save_pretrained, or correct the option",
        ) from error


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
    config = _build(neutral_config({fqn: slot.neutral_rank for fqn, slot in slots.items()}), "the empty slot")
    # Shown at its smallest rank, all zeros: what is saved loads again, and adds nothing.
    records = [_unused(slot, 0.0)._replace(shown_rank=slot.neutral_rank) for slot in slots.values()]
    return Records(_columns(records), dict(config.__dict__))


def unused_columns(slots: Mapping[str, Slot]) -> Columns:
    """`Records.columns` of slots that the live adapter does not target."""
    return _columns([_unused(slot, 0.0) for slot in slots.values()])


def _unused(slot: Slot, dropout: float) -> SlotRecord:
    return SlotRecord(slot.neutral_rank, slot.neutral_rank, False, False, False, dropout, 0)
