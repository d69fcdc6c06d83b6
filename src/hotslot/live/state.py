"""PEFT's own records of an adapter: each layer's r, lora_alpha and flags, the dropout, and the config.

After a swap they must describe what is live, or `save_pretrained`, `set_scale` and merging go by the adapter before.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from ..checkpoint import Checkpoint, Schema, config_dict
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
    """All records of one adapter, and the attributes of its peft config (None where the model has none).

    `values` are the slots' SlotRecords column by column: all r, all lora_alpha, and so on.
    """

    values: tuple[Any, ...]
    config: dict[str, Any] | None


def _columns(records: list[SlotRecord]) -> tuple[Any, ...]:
    return tuple(chain.from_iterable(zip(*records, strict=True)))


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
    """A peft LoraConfig of the checkpoint's config.

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
            return LoraConfig(**known)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"PEFT refuses the config of {origin}.",
            where="adapter_config.json",
            found=f"{type(error).__name__}: {error}",
            expected="options that peft.LoraConfig takes",
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
            bias = "lora_B.bias" in target.parts
            record = SlotRecord(target.rank, target.alpha, adapter.use_rslora, bias, target.rank, adapter.dropout)
            records.append(record)
    return Records(_columns(records), dict(config.__dict__))


def neutral_records(slots: Mapping[str, Slot]) -> Records:
    """The records of slots that add nothing."""
    config = _lora_config(neutral_config({fqn: slot.neutral_rank for fqn, slot in slots.items()}), "the empty slot")
    # Shown at its smallest rank, all zeros: what is saved loads again, and adds nothing.
    records = [_unused(slot, 0.0)._replace(shown_rank=slot.neutral_rank) for slot in slots.values()]
    return Records(_columns(records), dict(config.__dict__))


def _unused(slot: Slot, dropout: float) -> SlotRecord:
    return SlotRecord(slot.neutral_rank, slot.neutral_rank, False, False, 0, dropout)


_COLUMNS = len(SlotRecord._fields)


class Ledger:
    """Where PEFT keeps its records of one adapter: dicts and keys, looked up once, in the order of `Records.values`.

    Module attributes and per-slot objects would cost a swap a millisecond for 224 slots; this takes a twentieth.
    """

    def __init__(self, slots: Mapping[str, Slot], hooks: Mapping[str, TrueRank]) -> None:
        name = self._adapter_name = next(iter(slots.values())).adapter_name
        layers = [slot.layer for slot in slots.values()]
        columns: list[tuple[list[dict[str, Any]], str]] = [
            ([layer.r for layer in layers], name),
            ([layer.lora_alpha for layer in layers], name),
            ([layer.use_rslora for layer in layers], name),
            ([layer.lora_bias for layer in layers], name),
            ([hooks[fqn].__dict__ for fqn in slots], "rank"),
            ([_dropout_record(layer.lora_dropout[name]) for layer in layers], "p"),
        ]
        self._dicts = [holder for holders, _ in columns for holder in holders]
        self._keys = [key for holders, key in columns for _ in holders]
        self._unused = _columns([_unused(slot, 0.0) for slot in slots.values()])

    def capture(self, model: nn.Module | None) -> Records:
        """The records as they are now."""
        config = peft_config(model, self._adapter_name)
        values = tuple(map(dict.__getitem__, self._dicts, self._keys))
        return Records(values, dict(config.__dict__) if config is not None else None)

    def apply(self, records: Records, model: nn.Module | None, current: Records | None = None) -> None:
        """Make the model's records say `records`, of which `current` is known to be said already.

        Compiled code guards none of them, but for the config object: that stays the same one.
        """
        values = self._widened(records.values)
        if current is None or current.values != values:
            for holder, key, value in zip(self._dicts, self._keys, values, strict=True):
                holder[key] = value
        config = peft_config(model, self._adapter_name)
        if config is not None and records.config is not None:
            # The model's copy: who edits it must not edit the adapter's.
            said = {
                key: copy.copy(value) if isinstance(value, _MUTABLE) else value for key, value in records.config.items()
            }
            said["inference_mode"] = config.__dict__["inference_mode"]
            for key in config.__dict__.keys() - said.keys():
                del config.__dict__[key]
            config.__dict__.update(said)

    def _widened(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Records that were taken before the last slots were added say that those are not in use."""
        known, slots = len(values) // _COLUMNS, len(self._dicts) // _COLUMNS
        if known == slots:
            return values
        columns = [
            values[i * known : (i + 1) * known] + self._unused[i * slots + known : (i + 1) * slots]
            for i in range(_COLUMNS)
        ]
        return tuple(chain.from_iterable(columns))


_MUTABLE = (list, dict, set)


def _dropout_record(dropout: nn.Module) -> dict[str, Any]:
    """Where the dropout's p is kept. PEFT's own stays as it is, where the model was compiled before: that guards it."""
    return dropout.__dict__ if type(dropout) is SlotDropout else {"p": getattr(dropout, "p", 0.0)}
