"""The options of a LoRA's config: which decide what it computes, which do not, which are refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from ..checkpoint import TensorSpec
from ..errors import ConfigError, UnsupportedError

logger = logging.getLogger(__name__)

# Options that say what the tensors mean or whom they belong to.
_READ = frozenset(
    {
        "alpha_pattern", "bias", "ensure_weight_tying", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save",
        "r", "rank_pattern", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
    }
)  # fmt: skip

# Options without influence on what a trained adapter computes: they chose the targets (the tensors' names say which),
# or took part in initialising or training it, or describe its origin.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
        "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
        "use_qalora",  # of GPTQ layers alone, where A is smaller
    }
)  # fmt: skip

# Options by which an adapter is trained otherwise than plain LoRA, and run just the same → what plain LoRA has there.
# It is taken as the plain LoRA that it is; what else its file has, training alone would read.
_TRAINED_OTHERWISE: Mapping[str, Any] = {"monteclora_config": None, "velora_config": None}
_MICA = "mica"  # an initialisation by which B stays as it is
_OF_TRAINING = re.compile(r".+\.(?:lora_monteclora_sampler|lora_velora_embed)(?:\..+)?")

# Option → why an adapter that uses it is refused.
_REFUSED = {
    "alora_invocation_tokens": "aLoRA begins at an invocation token of its own",
    "layer_replication": "it changes how many layers the base model has",
    "use_bdlora": "block-diagonal LoRA has another forward pass",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA removes part of the base weights",
    "megatron_config": "Megatron layers hold a shard of each tensor",
}

# Initialisations that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them when
# PEFT loads the adapter, so that it is right only on weights that a swap would have to rewrite.
_BENIGN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", _MICA, "true", "false")

_BIASES = ("none", "all", "lora_only")
SAVE_AGAIN = "the config was edited or belongs to another adapter: save the adapter again with save_pretrained"
Parts: TypeAlias = "dict[str, dict[str, TensorSpec]]"  # module path → suffix of `PARTS` → tensor


def neutral_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The config of an adapter that adds nothing: as small as these modules allow, and scaled by 1.

    Args:
        ranks: module path → its smallest rank (1, or the number of groups of a grouped convolution).
    """
    odd = {re.escape(fqn): rank for fqn, rank in ranks.items() if rank != 1}
    return {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "target_modules": sorted(ranks),
        "inference_mode": True,
    }


def refuse_unsupported_options(config: Mapping[str, Any], origin: str) -> None:
    """Raise if `config` uses a LoRA option that hotslot does not swap, or a key that it does not know."""
    for option, reason in _REFUSED.items():
        if _is_used(config, option):
            raise UnsupportedError(
                f"{origin} uses {option}, which hotslot does not swap: {reason}.",
                where=option,
                found=f"{config[option]!r:.200}",
                expected="the option unused",
                hint="load it with PEFT itself; docs/supported.md lists what hotslot swaps",
            )
    if (bias := config.get("bias", "none")) not in _BIASES:
        raise ConfigError(
            f"{origin} has an unknown kind of biases.",
            where="bias",
            found=f"{bias!r:.80}",
            expected=f"one of {', '.join(map(repr, _BIASES))}",
            hint=SAVE_AGAIN,
        )
    init = config.get("init_lora_weights", True)
    if init not in _BENIGN_INITS:
        raise UnsupportedError(
            f"{origin} is initialised in a way that rewrites the base weights, or that hotslot does not know.",
            where="init_lora_weights",
            found=f"{init!r:.80}",
            expected=f"one of {', '.join(map(repr, _BENIGN_INITS[:7]))}",
            hint="convert it to plain LoRA: PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    known = _READ | _WITHOUT_EFFECT | _TRAINED_OTHERWISE.keys() | _REFUSED.keys() | {"init_lora_weights"}
    unknown = sorted(config.keys() - known)
    for key in unknown:
        if config[key]:
            raise ConfigError(
                f"{origin} has an option that hotslot does not know.",
                where=key or "an option without a name",
                found=f"{config[key]!r:.200}",
                expected="an option of PEFT 0.21's LoraConfig",
                hint="a newer PEFT wrote it; update hotslot, or remove the key if it has no effect",
            )
    if unknown:  # one line: a hostile config has a million
        shown = ", ".join(f"{key:.80} = {config[key]!r}" for key in unknown[:8])
        more = f" and {len(unknown) - 8:,} more" if len(unknown) > 8 else ""
        logger.warning("%s has unknown options, which are taken as unused: %s%s", origin, shown, more)


def trained_otherwise(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the config that change how the adapter is trained and nothing else → what plain LoRA has there."""
    used = {option: plain for option, plain in _TRAINED_OTHERWISE.items() if _is_used(config, option)}
    return used | ({"init_lora_weights": True} if config.get("init_lora_weights") == _MICA else {})


def is_of_training(name: str, config: Mapping[str, Any]) -> bool:
    """Whether training alone reads this tensor, by its name in a file or a model."""
    return any(_is_used(config, key) for key in _TRAINED_OTHERWISE) and _OF_TRAINING.fullmatch(name) is not None


def _is_used(config: Mapping[str, Any], option: str) -> bool:
    value = config.get(option)
    return value is not None and (bool(value) or isinstance(value, Mapping))  # PEFT fills {} up with its defaults


def refuse_bad_values(config: Mapping[str, Any], origin: str) -> None:
    """Raise if an option that is no pattern has a value that PEFT would not take."""
    dropout = config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout <= 1.0:
        raise ConfigError(
            f"{origin} has no valid dropout.",
            where="lora_dropout",
            found=f"{dropout!r:.80}",
            expected="a number from 0 to 1",
            hint=SAVE_AGAIN,
        )


def refuse_transposed_attention(config: Mapping[str, Any], modules: Iterable[str], origin: str) -> None:
    """Raise if PEFT would transpose the update of a MultiheadAttention."""
    # Linear and Conv1D know which of the two they are, and PEFT corrects the option. Its MultiheadAttention does not,
    # and transposes the projection's square update.
    attention = next((fqn for fqn in modules if fqn.endswith(".base_layer.out_proj")), None)
    if config.get("fan_in_fan_out") and attention is not None:
        raise UnsupportedError(
            f"{origin} uses fan_in_fan_out on a MultiheadAttention, whose update PEFT then transposes.",
            where=attention,
            found=f"fan_in_fan_out: {config['fan_in_fan_out']!r:.80}",
            expected="fan_in_fan_out: false",
            hint="load it with PEFT itself",
        )


def refuse_on_parameters(config: Mapping[str, Any], parameters: tuple[str, ...], origin: str) -> None:
    """Raise if bare parameters are adapted with an option that PEFT refuses there."""
    used = [key for key in ("lora_dropout", "lora_bias", "fan_in_fan_out", "use_dora") if config.get(key)]
    used += trained_otherwise(config)
    if parameters and used:
        raise UnsupportedError(
            f"{origin} adapts bare parameters with an option that PEFT refuses there.",
            where="target_parameters",
            found=", ".join(f"{key}: {config[key]!r:.80}" for key in used),
            expected="no dropout, bias, transposition, DoRA or other variant on bare parameters",
            hint="the config was edited, for PEFT trains no such adapter: " + SAVE_AGAIN,
        )


def refuse_variants(config: Mapping[str, Any], modules: Parts, origin: str) -> None:
    """Raise if PEFT has no such variant of LoRA, or not on these layers, and so nobody has trained the adapter."""
    variants = [*trained_otherwise(config), *(["use_dora"] if config.get("use_dora") else [])]
    if variants in ([], ["use_dora"]):
        return
    for option in set(variants) & _TRAINED_OTHERWISE.keys():
        if not isinstance(config[option], Mapping):
            raise ConfigError(
                f"{origin} has an invalid value.",
                where=option,
                found=f"{config[option]!r:.80}",
                expected="an object: the options of the variant",
                hint=SAVE_AGAIN,
            )
    kinds = ({"lora_A.weight"}, {"lora_embedding_A"}) if variants == ["init_lora_weights"] else ({"lora_A.weight"},)
    odd = [
        fqn
        for fqn, parts in modules.items()
        if not any(kind <= parts.keys() for kind in kinds)
        or fqn.endswith(".base_layer.out_proj")
        or ("lora_A.weight" in parts and len(parts["lora_A.weight"].shape) > 2)
    ]
    if len(variants) > 1 or odd:
        raise UnsupportedError(
            f"{origin} uses a variant of LoRA where PEFT refuses it.",
            where=odd[0] if odd else variants[0],
            found=", ".join(f"{key}: {config[key]!r:.80}" for key in variants),
            expected="one variant, on linear layers; MiCA on embeddings too",
            hint="the config was edited, for PEFT trains no such adapter: " + SAVE_AGAIN,
        )


def read_names(config: Mapping[str, Any], key: str, origin: str) -> tuple[str, ...]:
    """The value of an option that is a list of names, or none."""
    values = config.get(key) or ()
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) and value for value in values):
        raise ConfigError(
            f"{origin} has an invalid list.",
            where=key,
            found=f"{values!r:.200}",
            expected="a list of names",
            hint=SAVE_AGAIN,
        )
    return tuple(values)
