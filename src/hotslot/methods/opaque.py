"""Adapters that slots cannot hold: what their tensors mean, PEFT's own layers know (`hotslot.live.skeleton`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import UnsupportedError
from .base import Adapter

_INPUT = "what it does depends on the input, so that no weights are the same as it"
_PROMPT = "it adds to the input or to its keys and values, and changes no weight"

# Method → why no base weights can stand for it.
NOT_MERGEABLE: Mapping[str, str] = {
    "ADAPTION_PROMPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "LILY": _INPUT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": "it has other weights for each task, and the task comes with the input",
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "SHADOW": _INPUT,
    "XLORA": _INPUT,
}

# Options that are refused, whatever the method, and why.
_REFUSED: Mapping[str, str] = {
    "arrow_config": "PEFT would load other adapters, which it routes between",
    "layer_replication": "it changes how many layers the base model has",
    "megatron_config": "PEFT would import a module that the config names",
}


def opaque(checkpoint: Checkpoint, *, merges: bool = True) -> Adapter:
    """An adapter of any method, of which nothing is for slots.

    Args:
        checkpoint: what was read.
        merges: whether it is to be merged into base weights.

    Raises:
        UnsupportedError: it does not say its method, or cannot be merged.
    """
    config, origin = checkpoint.config, checkpoint.origin
    method = config.get("peft_type")
    if not isinstance(method, str):
        raise UnsupportedError(
            f"{origin} does not say which method it is of.",
            where="peft_type",
            found=f"{method!r:.80}",
            expected="a method of PEFT, such as 'LORA'",
            hint="the config was edited: save the adapter again with save_pretrained",
        )
    if merges and method in NOT_MERGEABLE:
        raise UnsupportedError(
            f"{origin} cannot be merged into base weights: {NOT_MERGEABLE[method]}.",
            where="peft_type",
            found=method,
            expected="a method whose effect is another weight",
            hint="load it with PEFT itself; docs/supported.md lists what hotslot swaps",
        )
    for option, reason in _REFUSED.items():
        if config.get(option):
            raise UnsupportedError(
                f"{origin} uses {option}, which hotslot does not swap: {reason}.",
                where=option,
                found=f"{config[option]!r:.200}",
                expected="the option unused",
                hint="load it with PEFT itself",
            )
    if str(config.get("init_lora_weights")).startswith("pissa_niter"):
        raise UnsupportedError(
            f"{origin} is initialised by a randomised SVD, which PEFT draws anew whenever it loads the adapter.",
            where="init_lora_weights",
            found=f"{config['init_lora_weights']!r:.80}",
            expected="an adapter that is the same at each load",
            hint="convert it to plain LoRA: PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    return Adapter(checkpoint, _NONE, _NONE, _NONE, _NONE, _NONE, (), False)


_NONE: Mapping[str, Any] = {}
