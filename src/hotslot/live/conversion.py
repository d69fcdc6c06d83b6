"""Adapters that were trained when transformers named or laid out a model's weights in another way than now."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ..checkpoint import Checkpoint, Recent, Schema, from_tensors
from ..errors import UnsupportedError
from .discover import innermost
from .state import build_config

# Base model → digest of a file's schema → the schema of what PEFT has made of such a file.
_outcomes: weakref.WeakKeyDictionary[nn.Module, Recent[bytes, Schema]] = weakref.WeakKeyDictionary()


def converted(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The adapter as PEFT converts it on loading; itself where there is nothing to convert.

    LoRAs of each expert become one of all experts, the names of modules become those of today.

    Raises:
        UnsupportedError: PEFT cannot convert it.
    """
    if checkpoint.config.get("peft_type") != "LORA" or not is_converted(model):
        return checkpoint
    base = innermost(model)
    found = _by_peft(base, checkpoint)
    _outcomes.setdefault(base, Recent(64)).put(checkpoint.schema.digest, found.schema)
    return found


def outcome(model: nn.Module, schema: Schema) -> Schema | None:
    """What `converted` makes of the family; None where that is not known until one of it has been converted."""
    if schema.config.get("peft_type") != "LORA" or not is_converted(model):
        return schema
    known = _outcomes.get(innermost(model))
    return known.get(schema.digest) if known is not None else None


def is_converted(model: nn.Module) -> bool:
    """Whether transformers has renamed or laid out anew any weights of models of this kind."""
    model_type = getattr(getattr(innermost(model), "config", None), "model_type", None)
    if model_type is None:
        return False
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return get_checkpoint_conversion_mapping(model_type) is not None


def _by_peft(base: Any, checkpoint: Checkpoint) -> Checkpoint:
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
        convert_peft_config_for_transformers,
    )

    config = build_config(checkpoint, as_trained=True)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    try:
        convert_peft_config_for_transformers(config, base, None)
        made = convert_peft_adapter_state_dict_for_transformers(base, config, dict(tensors))
    except (ValueError, RuntimeError, KeyError) as error:
        raise UnsupportedError(
            f"{checkpoint.origin} was made for an earlier layout of this model's weights, and PEFT cannot convert it.",
            where=type(base).__name__,
            found=f"{type(error).__name__}: {error}",
            expected="an adapter of modules that transformers 5 still has, or of all that it has made one of",
            hint="train or save the adapter anew with transformers 5",
        ) from error
    if made.keys() == tensors.keys() and all(made[name] is tensors[name] for name in made):
        return checkpoint
    return from_tensors(made, config, origin=checkpoint.origin)
