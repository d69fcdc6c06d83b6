"""LoRA (https://arxiv.org/abs/2106.09685) and rank-stabilised LoRA (https://arxiv.org/abs/2312.03732)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ..checkpoint import PEFT_PREFIX, Checkpoint, TensorSpec
from ..errors import ConfigError, TensorError, UnsupportedError
from .base import MAGNITUDE, PARTS, Adapter, Target
from .lora_options import (
    SAVE_AGAIN,
    Parts,
    is_of_training,
    read_names,
    refuse_bad_values,
    refuse_on_parameters,
    refuse_transposed_attention,
    refuse_unsupported_options,
    refuse_variants,
    trained_otherwise,
)
from .patterns import Rules, refuse_endless
from .tokens import TOKENS, read_tokens

logger = logging.getLogger(__name__)

_NESTED = ".base_layer"  # where PEFT keeps what a layer of its own stands around

_LARGEST = torch.finfo(torch.float32).max  # in which slots hold scalings; JSON's whole numbers have no bound
# PEFT's names of embeddings (peft.utils.other.EMBEDDING_LAYER_NAMES), and what other models call theirs.
_EMBEDDINGS = "embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|shared|embeddings?"
_BASE_COPY = re.compile(
    rf"(?P<fqn>(?:.+\.)?(?:{_EMBEDDINGS}))\.(?:(?:token_adapter\.)?base_layer\.|original_module\.|)(?P<suffix>weight|bias)"
)
_BIAS = re.compile(r"(?P<fqn>.+)\.bias")
# What bias="all" saves of a module that is saved whole, beside that: the original's biases, and once more the copy's.
_BIAS_IN_WRAPPER = re.compile(r"(?P<which>original_module|modules_to_save)(?P<path>(?:\..+)?)\.bias")
# What save_embedding_layers=True saves of one: the original's tensors, and once more the copy's.
_COPY_IN_WRAPPER = re.compile(r"(?P<which>original_module|modules_to_save)\.(?P<suffix>weight|bias)")


def interpret(checkpoint: Checkpoint) -> Adapter:
    """See `hotslot.methods.interpret`."""
    config, origin = checkpoint.config, checkpoint.origin
    refuse_unsupported_options(config, origin)
    refuse_bad_values(config, origin)
    use_rslora, lora_bias = bool(config.get("use_rslora")), bool(config.get("lora_bias"))
    dropout = float(config.get("lora_dropout") or 0.0)
    targets = {}
    parameters = read_names(config, "target_parameters", origin)
    refuse_on_parameters(config, parameters, origin)
    tensors = _sorted(checkpoint, read_names(config, "modules_to_save", origin), config.get("bias", "none"))
    modules, tokens = tensors.targets, read_tokens(config, tensors.tokens, origin)
    refuse_transposed_attention(config, modules, origin)
    refuse_variants(config, modules, origin)
    keys = _pattern_keys(modules, parameters, config, origin)
    paths = {path for found in keys.values() for path in found}
    refuse_endless(config, paths, origin)
    ranks = _Pattern(config, "rank_pattern", "r", paths, origin)
    alphas = _Pattern(config, "alpha_pattern", "lora_alpha", paths, origin)
    for fqn, parts in modules.items():
        stated = {(ranks.of(key), alphas.of(key)) for key in keys[fqn]}
        if len(stated) > 1:
            rank = _rank_by_size(fqn, modules, [ranks.of(key) for key in keys[fqn]])
            stated = {pair for pair in stated if rank in (pair[0], None)}
        if len(stated) > 1:
            raise UnsupportedError(
                f"{origin} adapts several bare parameters of one module, of one rank and different alpha.",
                where=fqn,
                found=f"(rank, alpha) {sorted(stated)}",
                expected="one alpha for the parameters of one rank: a file does not say which tensor is whose",
                hint="load it with PEFT itself",
            )
        rank, alpha = stated.pop()
        _check_parts(fqn, parts, rank, config, origin)
        scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        targets[fqn] = Target(fqn, rank, alpha, scaling, parts, use_rslora, dropout)
    if variant := trained_otherwise(config):
        logger.warning("%s is taken as plain LoRA: %s is for training only", origin, ", ".join(variant))
    return Adapter(checkpoint, targets, tensors.copies, tensors.saved, tensors.biases, tokens, parameters, lora_bias)


class _Pattern:
    """`rank_pattern` over `r`, or `alpha_pattern` over `lora_alpha`, matched as PEFT's `get_pattern_key` does."""

    def __init__(
        self, config: Mapping[str, Any], pattern_key: str, default_key: str, paths: Collection[str], origin: str
    ) -> None:
        self._origin = origin
        self._whole = default_key == "r"
        self._default = self._number(config.get(default_key, 8), default_key)
        patterns = config.get(pattern_key)
        patterns = {} if patterns is None else patterns
        if not isinstance(patterns, Mapping):
            raise ConfigError(
                f"{origin} has a malformed pattern.",
                where=pattern_key,
                found=f"{patterns!r:.80}",
                expected="an object: pattern → number",
                hint=SAVE_AGAIN,
            )
        numbers = {str(key): self._number(value, f"{pattern_key}[{key!r:.200}]") for key, value in patterns.items()}
        self._rules = Rules(numbers, paths, pattern_key, origin)

    def of(self, fqn: str) -> Any:
        """The value for a module path: of the first pattern that matches, else the default."""
        return self._rules.first(fqn, self._default)

    def _number(self, value: Any, where: str) -> Any:
        kinds = (int,) if self._whole else (int, float)
        sound = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= _LARGEST
        if not sound or (self._whole and value < 1):  # NaN is not below any bound
            raise ConfigError(
                f"{self._origin} has an invalid value.",
                where=where,
                found=f"{value!r:.80}",
                expected="a whole number from 1, by PEFT's LoraConfig"
                if self._whole
                else "a number that float32 holds",
                hint=SAVE_AGAIN,
            )
        return value


def refuse_biased_embeddings(adapter: Adapter) -> None:
    """Raise if the config states a bias, and a target is an embedding: PEFT does not load that."""
    for fqn, target in adapter.targets.items():
        if adapter.lora_bias and "lora_embedding_A" in target.parts:
            raise ConfigError(
                f"{adapter.checkpoint.origin} states a bias for an embedding.",
                where=fqn,
                found="lora_bias: true",
                expected="lora_bias: false, since PEFT's embeddings have no place for it",
                hint=SAVE_AGAIN,
            )


def split_key(name: str) -> tuple[str, str] | None:
    """(module path in the base model, suffix of `PARTS`) of a tensor's name in a file; None if it is no LoRA tensor."""
    head, _, last = name.rpartition(".")
    if last not in PARTS:  # lora_embedding_A has no tensor name behind it, lora_A.weight has
        head, _, container = head.rpartition(".")
        last = container if (container, last) == (MAGNITUDE, "weight") else f"{container}.{last}"
    path = head.removeprefix(PEFT_PREFIX)
    return (path, last) if path and last in PARTS else None


class _Tensors(NamedTuple):
    """A checkpoint's tensors by what they are: module path → name within the module → tensor."""

    targets: Parts
    copies: Parts
    saved: Parts
    biases: Parts
    tokens: Parts


def _sorted(checkpoint: Checkpoint, saved_names: tuple[str, ...], bias: str) -> _Tensors:
    tensors = _Tensors({}, {}, {}, {}, {})
    for name, spec in checkpoint.tensors.items():
        if is_of_training(name, checkpoint.config):
            continue
        found, key = tensors.targets, split_key(name)
        if key is None and name.endswith(f".{TOKENS}"):
            found, key = tensors.tokens, (name.removeprefix(PEFT_PREFIX).removesuffix(f".{TOKENS}"), TOKENS)
        if key is None and (key := _within_saved(name, saved_names)):
            found = tensors.saved
            inner = _BIAS_IN_WRAPPER.fullmatch(key[1]) if bias == "all" else None
            if inner and inner["which"] == "modules_to_save":
                continue  # the copy's, which is there by its own name too, and that is what PEFT takes
            if inner:
                found, key = tensors.biases, (f"{key[0]}{inner['path']}", "bias")
            elif copy := _COPY_IN_WRAPPER.fullmatch(key[1]):
                if copy["which"] == "modules_to_save":
                    continue
                found, key = tensors.copies, (key[0], copy["suffix"])
        elif key is None and (bias == "all" or (bias == "lora_only" and ".base_layer." in name)):
            match = _BIAS.fullmatch(name)
            if match:
                found, key = tensors.biases, (match["fqn"].removeprefix(PEFT_PREFIX).replace(".base_layer", ""), "bias")
        if key is None and (match := _BASE_COPY.fullmatch(name)):
            found, key = tensors.copies, (match["fqn"].removeprefix(PEFT_PREFIX), match["suffix"])
        if key is None:
            raise TensorError(
                f"{checkpoint.origin} holds a tensor that belongs to no LoRA module.",
                where=name or "a tensor without a name",
                found=f"{spec.dtype} {spec.shape}",
                expected=f"names that end in one of {', '.join(PARTS)}, or lie in a module of modules_to_save",
                hint="remove it, if it says nothing; else load the adapter with PEFT itself",
            )
        if found is not tensors.saved and not spec.dtype.is_floating_point:
            raise TensorError(
                f"{checkpoint.origin} holds a tensor of a dtype that adapter weights do not have.",
                where=name,
                found=f"{spec.dtype} {spec.shape}",
                expected="floating point, but for buffers of a module of modules_to_save",
                hint="a quantised adapter has to be dequantised first",
            )
        if found.setdefault(key[0], {}).setdefault(key[1], spec) is not spec:
            raise TensorError(
                f"{checkpoint.origin} holds a tensor with and without {PEFT_PREFIX!r}.",
                where=name,
                found="two tensors for one place",
                expected="one",
                hint="remove one of them",
            )
    if not tensors.targets:
        raise TensorError(
            f"{checkpoint.origin} holds no LoRA tensors.",
            where=checkpoint.origin,
            found=f"{len(checkpoint.tensors)} tensors",
            expected="lora_A and lora_B of a module or more",
            hint="save the adapter again with save_pretrained, from the model that has it",
        )
    for fqn in tensors.targets:
        if saved := _saved_path(fqn, saved_names, whole=True):
            raise UnsupportedError(
                f"{checkpoint.origin} has a LoRA on a module that it also saves whole.",
                where=fqn,
                found=f"lora_A and lora_B, and {saved!r} by modules_to_save",
                expected="one or the other, as PEFT wants it",
                hint="merge the LoRA into the module, or load the adapter with PEFT itself",
            )
    return tensors


def _within_saved(name: str, saved_names: tuple[str, ...]) -> tuple[str, str] | None:
    """(path of the saved module, name within it) of a tensor's name in a file; None if it lies in none."""
    path = name.removeprefix(PEFT_PREFIX)
    fqn = _saved_path(path, saved_names)
    return None if fqn is None else (fqn, path[len(fqn) + 1 :])


def _saved_path(path: str, saved_names: tuple[str, ...], *, whole: bool = False) -> str | None:
    """The outermost module on this path that PEFT takes for one of `modules_to_save`: by the end of its path.

    Args:
        path: of a tensor; with `whole`, of a module, which may be the one itself.
    """
    names = path.split(".")
    prefixes = (".".join(names[:count]) for count in range(1, len(names) + whole))
    return next((prefix for prefix in prefixes if prefix.endswith(saved_names)), None) if saved_names else None


_WITHOUT_RANK = {"lora_B.bias", MAGNITUDE}
_A_AND_B = ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"})


# Real layers of a mixture of experts have two or three; each is matched against every pattern.
_MAX_PARAMETERS_OF_A_MODULE = 64


def _rank_by_size(fqn: str, modules: Parts, ranks: list[int]) -> int | None:
    """Which of the ranks of a module's bare parameters this layer has, by its size among those of all; None if any.

    A has as many rows as the rank times the experts, and of these each parameter has as many.
    """
    root = fqn.replace(_NESTED, "")
    rows = {path: parts["lora_A.weight"].shape[:1] for path, parts in modules.items()
            if path.replace(_NESTED, "") == root and "lora_A.weight" in parts}  # fmt: skip
    counts = sorted(count for shape in rows.values() for count in shape)
    if fqn not in rows or not rows[fqn] or len(counts) != len(ranks):
        return None
    experts, rest = divmod(counts[0], min(ranks))
    if rest or counts != [rank * experts for rank in sorted(ranks)]:
        return None
    return rows[fqn][0] // experts if experts else None


def _pattern_keys(
    modules: Iterable[str], parameters: tuple[str, ...], config: Mapping[str, Any], origin: str
) -> dict[str, list[str]]:
    """Module path → what PEFT matches the patterns against: the path, or for bare parameters theirs.

    The output projection inside a MultiheadAttention has the rank and alpha of the attention itself.
    """
    whole = config.get("target_modules")
    whole = tuple(f".{name}" for name in whole) if isinstance(whole, (list, tuple)) else ()
    owned: dict[str, list[str]] = {}
    for parameter in parameters:
        owner, _, name = parameter.rpartition(".")
        owned.setdefault(owner, []).append(name)
    keys = {}
    for fqn in modules:
        root = fqn.replace(_NESTED, "")  # PEFT nests one layer for each parameter of a module
        # One that is named without its module may be any module's, but of those that are adapted as such.
        endings = (ending for ending in _endings(root) if ending or not f".{root}".endswith(whole))
        names = [f"{root}.{name}" for ending in endings for name in owned.get(ending, ())] if owned else []
        if len(names) > _MAX_PARAMETERS_OF_A_MODULE:
            raise ConfigError(
                f"{origin} adapts more bare parameters of one module than there can be.",
                where=fqn,
                found=f"{len(names):,} of target_parameters",
                expected=f"at most {_MAX_PARAMETERS_OF_A_MODULE}",
                hint=SAVE_AGAIN,
            )
        keys[fqn] = names or [fqn.removesuffix(".base_layer.out_proj")]
    return keys


def _endings(path: str) -> Iterator[str]:
    """The path, what stands behind each of its dots, and the empty one."""
    yield path
    while path:
        path = path.partition(".")[2]
        yield path


def _check_parts(fqn: str, parts: Mapping[str, TensorSpec], rank: int, config: Mapping[str, Any], origin: str) -> None:
    have, lora_bias = set(parts), bool(config.get("lora_bias"))
    if have - _WITHOUT_RANK not in _A_AND_B:
        raise TensorError(
            f"{origin} does not have both matrices of a module.",
            where=fqn,
            found=", ".join(sorted(have)),
            expected="A and B",
            hint="the file was cut or edited: save the adapter again with save_pretrained",
        )
    if (MAGNITUDE in have) != bool(config.get("use_dora")):
        raise TensorError(
            f"{origin} has a magnitude that its config denies, or lacks one.",
            where=fqn,
            found=f"{', '.join(sorted(have))}, use_dora: {config.get('use_dora')!r:.80}",
            expected=f"a {MAGNITUDE} of each module with DoRA, and none without",
            hint=SAVE_AGAIN,
        )
    if "lora_B.bias" in have and not lora_bias:
        raise TensorError(
            f"{origin} has a bias that its config denies.",
            where=fqn,
            found=f"lora_B.bias {parts['lora_B.bias'].shape}, lora_bias: false in the config",
            expected="lora_bias: true",
            hint=SAVE_AGAIN,
        )
    if lora_bias and "lora_B.weight" in have and "lora_B.bias" not in have:
        raise TensorError(
            f"{origin} lacks the bias that its config states.",
            where=fqn,
            found=", ".join(sorted(have)),
            expected="lora_B.bias too, by lora_bias in the config",
            hint=SAVE_AGAIN,
        )
    a, b = (parts[suffix] for suffix in sorted(have - _WITHOUT_RANK))
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or 0 in a.shape + b.shape:
        raise TensorError(
            f"{origin} has matrices that are none.",
            where=fqn,
            found=f"A {a.shape}, B {b.shape}",
            expected="A [R, …], B [O, R]",
            hint=SAVE_AGAIN,
        )
    # A grouped convolution's B holds the ranks of one group; how many groups there are, the base layer will say.
    agree = a.shape[0] == b.shape[1] if len(a.shape) == 2 else a.shape[0] % b.shape[1] == 0
    # With bare parameters there is one block of that rank for each expert; how many, the base layer will say.
    stated = a.shape[0] == rank or (config.get("target_parameters") and a.shape[0] % rank == 0)
    if not agree or not stated:
        raise TensorError(
            f"{origin} has matrices whose ranks disagree with each other or with the config.",
            where=fqn,
            found=f"A {a.shape}, B {b.shape}",
            expected=f"rank {rank} by the config's r and rank_pattern",
            hint="the config belongs to another adapter, or the file was edited; save the adapter again",
        )
    bias = parts.get("lora_B.bias")
    if bias is not None and bias.shape != (b.shape[0],):
        raise TensorError(
            f"{origin} has a bias of another size.",
            where=fqn,
            found=bias.shape,
            expected=f"{(b.shape[0],)}, by lora_B.weight",
            hint=SAVE_AGAIN,
        )
