"""What a PEFT method's tensors mean: which module each belongs to, which dimension is the rank, how they are scaled.

Takes a Checkpoint, gives an Adapter: targets by module path, with parts that are proved to agree with each other and
with the config. Knows nothing of a model: whether the adapter fits one is decided against a Layout (`hotslot.block`).
"""

from __future__ import annotations

import weakref
from dataclasses import replace

from ..checkpoint import Checkpoint, Schema, TensorSpec
from ..errors import UnsupportedError
from . import lora
from .base import MAGNITUDE, PARTS, Adapter, Meaning, Part, Target
from .lora import refuse_biased_embeddings, split_key
from .lora_options import is_of_training, neutral_config, refuse_unsupported_options, trained_otherwise
from .opaque import NOT_MERGEABLE, opaque
from .patterns import Rules, refuse_endless
from .tokens import TOKENS, Tokens

__all__ = [
    "MAGNITUDE",
    "NOT_MERGEABLE",
    "PARTS",
    "TOKENS",
    "Adapter",
    "Part",
    "Rules",
    "Target",
    "Tokens",
    "interpret",
    "is_of_training",
    "neutral_config",
    "opaque",
    "refuse_biased_embeddings",
    "refuse_endless",
    "refuse_unsupported_options",
    "split_key",
    "trained_otherwise",
]

_INTERPRETERS = {"LORA": lora.interpret}
# What was found out about a schema holds for every checkpoint that has it.
_known: weakref.WeakKeyDictionary[Schema, Meaning] = weakref.WeakKeyDictionary()


def interpret(checkpoint: Checkpoint) -> Adapter:
    """Find out what each tensor of `checkpoint` is.

    Raises:
        UnsupportedError: a method or an option that hotslot does not swap.
        ConfigError: keys or values in the config that it does not know.
        TensorError: tensors that contradict each other or the config.
    """
    known = _known.get(checkpoint.schema)
    if known is not None:
        return Adapter(checkpoint, *known)
    if "components" in checkpoint.config:
        adapter = _of_components(checkpoint)
        _known[checkpoint.schema] = adapter.meaning
        return adapter
    method = checkpoint.config.get("peft_type")
    interpreter = _INTERPRETERS.get(method) if isinstance(method, str) else None
    if interpreter is None:
        raise UnsupportedError(
            f"{checkpoint.origin} is an adapter of another method.",
            where="peft_type",
            found=f"peft_type {method!r:.80}",
            expected=f"one of {', '.join(_INTERPRETERS)}",
            hint="load it with PEFT itself; docs/supported.md lists what hotslot swaps",
        )
    adapter = interpreter(checkpoint)
    _known[checkpoint.schema] = adapter.meaning
    return adapter


def _of_components(checkpoint: Checkpoint) -> Adapter:
    """Each model's part interpreted by itself, and all of it as one."""
    places = {spec.start: spec for spec in checkpoint.tensors.values() if spec.start < spec.stop}
    targets, lora_bias = {}, False
    for prefix, part in checkpoint.components.items():
        adapter = interpret(part)
        lora_bias |= adapter.lora_bias
        for target in adapter.targets.values():
            fqn, parts = prefix + target.fqn, {suffix: places[spec.start] for suffix, spec in target.parts.items()}
            targets[fqn] = replace(target, fqn=fqn, parts=parts)
        more = [*adapter.base_copies, *adapter.saved, *adapter.biases, *adapter.tokens, *adapter.target_parameters]
        if more:
            raise UnsupportedError(
                f"{checkpoint.origin} has more than LoRA matrices for one of a pipeline's components.",
                where=f"{prefix}{more[0]}",
                found="whole modules, biases, tokens or bare parameters",
                expected="A, B, bias and magnitude",
                hint="attach to the component alone: hotslot.attach(pipe.unet, …)",
            )
    copies: dict[str, dict[str, TensorSpec]] = {}
    for name in checkpoint.schema.base_values:
        fqn, _, own = name.rpartition(".")
        copies.setdefault(fqn, {})[own] = checkpoint.tensors[name]
    return Adapter(checkpoint, targets, copies, {}, {}, {}, (), lora_bias)
