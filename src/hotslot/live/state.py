"""PEFT's own records of an adapter: each layer's r, lora_alpha and flags, the dropout, and the config.

After a swap they must describe what is live, or `save_pretrained`, `set_scale` and merging go by the adapter before.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from ..checkpoint import Checkpoint, Schema, config_dict
from ..errors import ConfigError, UnsupportedError
from ..methods import MAGNITUDE, Adapter, neutral_config, refuse_unsupported_options, trained_otherwise
from .discover import roots
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
    """All records of one adapter.

    `configs` are the attributes of its peft configs, by what `roots` says stands before their modules' paths: where a
    model has one, and of the members of an Assembly those that the adapter is for. `columns` are the slots' SlotRecords
    column by column: all r, all lora_alpha, and so on. `plain` is all that PEFT keeps beside tensors of an adapter that
    no slots hold; see `hotslot.live.resident`.
    """

    columns: Columns
    configs: Mapping[str, dict[str, Any]]
    plain: tuple[Any, ...] = ()


def _columns(records: list[SlotRecord]) -> Columns:
    return tuple(zip(*records, strict=True)) or ((),) * len(SlotRecord._fields)


def peft_configs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What `roots` says stands before the modules' paths → adapter name → PEFT's config object."""
    found = {prefix: getattr(root, "peft_config", None) for prefix, root in roots(model).items()}
    return {prefix: configs for prefix, configs in found.items() if isinstance(configs, dict)}


def peft_config(model: nn.Module, adapter_name: str) -> Any:
    """The config object of a model that is no Assembly for this adapter, or None."""
    return peft_configs(model).get("", {}).get(adapter_name)


def refuse_unsupported_resident(model: nn.Module, adapter_name: str) -> None:
    """Raise if the adapter that is on the model keeps more than slots hold: a swap would leave that behind."""
    for configs in peft_configs(model).values():
        if adapter_name in configs:
            options = config_dict(configs[adapter_name])
            refuse_unsupported_options(options, f"the adapter {adapter_name!r} on the model")


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
    if unknown and method != "LORA":  # whose options `hotslot.methods` has looked at, one by one
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


def adapter_records(adapter: Adapter, slots: Mapping[str, Slot]) -> Records:
    """The records that describe `adapter` in these slots."""
    configs = {
        prefix: dict(build_config(part).__dict__)
        for prefix, part in adapter.checkpoint.components.items()
        if not prefix or any(fqn.startswith(prefix) for fqn in adapter.targets)
    }
    records = []
    for fqn, slot in slots.items():
        target = adapter.targets.get(fqn)
        if target is None:
            records.append(_unused(slot))
        else:
            bias, dora = "lora_B.bias" in target.parts, MAGNITUDE in target.parts
            options = target.use_rslora, bias, dora, target.dropout
            records.append(SlotRecord(target.rank, target.alpha, *options, target.rank))
    return Records(_columns(records), configs)


def neutral_records(slots: Mapping[str, Slot], prefixes: Iterable[str]) -> Records:
    """The records of slots that add nothing.

    Args:
        slots: all of an adapter name.
        prefixes: what `roots` says stands before their paths.
    """
    configs = {}
    for prefix in prefixes:
        ranks = {fqn.removeprefix(prefix): slot.neutral_rank for fqn, slot in slots.items() if fqn.startswith(prefix)}
        if ranks or not prefix:
            configs[prefix] = dict(_build(neutral_config(ranks), "the empty slot").__dict__)
    # Shown at its smallest rank, all zeros: what is saved loads again, and adds nothing.
    records = [_unused(slot)._replace(shown_rank=slot.neutral_rank) for slot in slots.values()]
    return Records(_columns(records), configs)


def unused_columns(slots: Mapping[str, Slot]) -> Columns:
    """`Records.columns` of slots that the live adapter does not target."""
    return _columns([_unused(slot) for slot in slots.values()])


def _unused(slot: Slot) -> SlotRecord:
    return SlotRecord(slot.neutral_rank, slot.neutral_rank, False, False, False, 0.0, 0)
