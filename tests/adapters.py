"""Real LoRA adapters on disk, made and saved by PEFT itself, their options drawn over all that LoRA has.

`random_config` stays within plain LoRA, which hotslot swaps; `exotic_config` adds what it may refuse. Both
are settled by the `random.Random` they are given, and give only what PEFT accepts on the entry.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from zoo import ZOO, Entry

ALPHAS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 2.5)  # over the ranks 1..8 most of the scalings are no integers

# What PEFT says of adapters that are meant to be as they are. Anything else is news: an error in tests.
_EXPECTED_WARNINGS = (
    r"LoRA adapter added to ConvNd layer with groups > 1",
    r"`lora_bias=True` was passed but the targeted layer",
    r"fan_in_fan_out is set to (True|False) but the target module is",
    r"Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`",
    r"Could not identify embedding layer\(s\) because the model is not",
    r"The following (rank|alpha)_pattern keys did not match any targeted module",
    r"Model with `tie_word_embeddings=True` and",
    r"Model has `tie_word_embeddings=True` and",
    r"You have passed exclude_modules=.* but no modules were excluded",
    r"Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion",
    # PEFT takes the bias of `lora_bias` for a shard of a matrix
    r"Adapter '.*': \d+ LoRA tensor\(s\) have invalid shape: \S+\.lora_B\.bias:",
    r"Unsupported layer type '.*RMSNorm'>' encountered",  # LayerNorm tuning, which works there
    r"`is_gradient_checkpointing` is deprecated",  # transformers, of PEFT's own call
)


@contextmanager
def expected_peft_warnings() -> Iterator[None]:
    """Silence what PEFT is known to say of a sound but unusual adapter, and nothing else."""
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def make_adapter(
    folder: Path | str, entry: Entry, *, seed: int, file_dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Save an adapter for `entry` under `folder` as PEFT saves it, and return the folder.

    `config` holds `LoraConfig`'s arguments; `seed` settles every tensor; the base is always that of seed 0.
    Each tensor is random and of a size that adapters of two seeds give clearly different, finite outputs.
    """
    folder = Path(folder)
    model = random_peft_model(entry, seed=seed, **config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(file_dtype)
    save(model, folder)
    return folder


def save(model: PeftModel, folder: Path) -> None:
    """What `save_pretrained` writes, less the model card: compiling its template takes longer than all the rest."""
    model.create_or_update_model_card = lambda folder: None
    with expected_peft_warnings():
        model.save_pretrained(folder)


def random_peft_model(entry: Entry, *, seed: int, **config: Any) -> PeftModel:
    """A PEFT model on the base of seed 0 whose every adapter tensor is random."""
    with torch.random.fork_rng(devices=[]), expected_peft_warnings():
        torch.default_generator.manual_seed(seed)  # PEFT draws from the global generator
        model = get_peft_model(entry.build(), LoraConfig(**config))
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Fill the low-rank factors; disturb what starts from a base weight (magnitudes, copies, biases)."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # PEFT marks exactly the adapter's own tensors
            continue
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        low_rank = re.search(r"\.lora_(embedding_)?[AB]\.", name)
        parameter.data.copy_(noise if low_rank else parameter.data + noise)


# --- drawing configurations ---------------------------------------------------------------------------------


def random_config(rng: Random, entry: Entry) -> dict[str, Any]:
    """Arguments of a `LoraConfig`, over all options of plain LoRA that leave the base's weights alone."""
    while True:
        config = _draw(rng, entry)
        matched = matched_modules(entry, config)
        if matched:
            break
    if any(isinstance(entry.modules.get(name), nn.Embedding) for name in matched):
        config.pop("lora_bias", None)  # PEFT raises: an embedding has no place for it
    for kind, values in (("rank_pattern", _ranks(entry)), ("alpha_pattern", ALPHAS)):
        if rng.random() < 0.35:
            config[kind] = {key: rng.choice(values) for key in _pattern_keys(rng, matched)}
    return config


def _draw(rng: Random, entry: Entry) -> dict[str, Any]:
    config: dict[str, Any] = {"r": rng.choice(_ranks(entry)), "lora_alpha": rng.choice(ALPHAS)}
    if entry.task_type and rng.random() < 0.5:
        config["task_type"] = entry.task_type
    config["target_modules"] = _targets(rng, entry)
    if entry.layers and not isinstance(config["target_modules"], str) and rng.random() < 0.3:
        layers = rng.sample(range(entry.layers), rng.randint(1, entry.layers))
        config["layers_to_transform"] = layers[0] if len(layers) == 1 and rng.random() < 0.5 else layers
    if rng.random() < 0.25:
        config["exclude_modules"] = _excluded(rng, entry)
    if rng.random() < 0.3:
        config["use_rslora"] = True
    if rng.random() < 0.3:
        config["lora_dropout"] = rng.choice((0.05, 0.5))
    config["init_lora_weights"] = rng.choice((True, False, "gaussian"))
    if config["init_lora_weights"] != "gaussian" and rng.random() < 0.25:  # the two exclude each other
        config["lora_bias"] = True
    if entry.name == "gpt2" and rng.random() < 0.5:
        config["fan_in_fan_out"] = True
    return config


def _ranks(entry: Entry) -> range:
    return range(entry.rank_multiple, 9, entry.rank_multiple)


def _targets(rng: Random, entry: Entry) -> list[str] | str:
    chosen = rng.sample(entry.targets, rng.randint(1, len(entry.targets)))
    style = rng.choice(("endings", "endings", "names", "regex", "all"))
    if style == "endings" or (style == "all" and not entry.from_transformers):
        return chosen
    if style == "names":
        names = sorted(entry.modules)
        return rng.sample(names, rng.randint(1, len(names)))
    if style == "regex":
        return rf"(.*\.)?({'|'.join(re.escape(target) for target in chosen)})"
    return "all-linear"


def _excluded(rng: Random, entry: Entry) -> list[str] | str:
    if rng.random() < 0.5:
        return rng.sample(sorted(entry.modules), rng.randint(1, max(1, len(entry.modules) // 2)))
    return rf"(.*\.)?{re.escape(rng.choice(entry.targets))}"


def _pattern_keys(rng: Random, matched: list[str]) -> list[str]:
    """Keys as users write them: full names, endings, regexes, anchored; sometimes one that fits nothing."""
    keys = []
    for name in rng.sample(matched, rng.randint(1, min(3, len(matched)))):
        ending = name.rpartition(".")[2]
        numberless = re.sub(r"\.\d+\.", r".\\d+.", name)
        keys.append(rng.choice((name, ending, f"^{name}", numberless, f".*{ending}", f"({ending}|nowhere)")))
    if rng.random() < 0.1:
        keys.append("nowhere")
    # PEFT saves them sorted, and the first that matches wins: in another order it could not load its own file
    return sorted(set(keys))


def matched_modules(entry: Entry, config: dict[str, Any]) -> list[str]:
    """Full names of the modules that PEFT would wrap under `config`, in the model's order."""
    if config["target_modules"] == "all-linear":
        linear = [name for name, module in entry.modules.items() if _counts_as_linear(name, module)]
        config = {**config, "target_modules": linear}
    peft_config = LoraConfig(**config)
    # PEFT answers with an object that is false for excluded modules
    return [name for name in entry.modules if check_target_module_exists(peft_config, name)]


def _counts_as_linear(name: str, module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"


# --- options beyond plain LoRA ------------------------------------------------------------------------------

_Option = Callable[[Random, Entry, dict[str, Any]], dict[str, Any]]


def _token_indices(rng: Random, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    tokens = sorted(rng.sample(range(3, 40), rng.randint(1, 4)))
    names = {"llama": "embed_tokens", "bert": "word_embeddings", "embedding": "word", "gpt2": "wte"}
    return {"trainable_token_indices": {names[entry.name]: tokens}}


def _saved_modules(rng: Random, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    return {"modules_to_save": rng.sample(entry.extras, rng.randint(1, len(entry.extras)))}


def _replication(rng: Random, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    return {"layer_replication": rng.choice(([(0, 2), (1, 3)], [(0, 3), (2, 3)]))}


def _target_parameters(rng: Random, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    names = [name for name, module in entry.modules.items() if isinstance(module, nn.Linear)]
    return {"target_modules": [], "target_parameters": [f"{rng.choice(names)}.weight"]}


def _invocation_tokens(rng: Random, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    return {"alora_invocation_tokens": [rng.randrange(3, 40)], "task_type": "CAUSAL_LM"}


def _block_diagonal(rng: Random, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_b=["q_proj", "up_proj"], nblocks=2, match_strict=False)
    return {"use_bdlora": blocks, "r": 4, "rank_pattern": {}}


def _kasa(rng: Random, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    from peft.tuners.lora.config import KasaConfig

    return {"kasa_config": KasaConfig()}


def _init(rng: Random, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    return {"init_lora_weights": rng.choice(("pissa", "olora", "orthogonal", "mica", "pissa_niter_4"))}


def _dora(rng: Random, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    return {"use_dora": True, "lora_bias": False}


def _bias(rng: Random, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    return {"bias": rng.choice(("all", "lora_only"))}


# option → how it is drawn, and the entries on which it makes sense
EXOTIC_OPTIONS: dict[str, tuple[_Option, tuple[str, ...]]] = {
    "use_dora": (_dora, tuple(ZOO)),
    "modules_to_save": (_saved_modules, tuple(ZOO)),
    "bias": (_bias, tuple(ZOO)),
    "init_lora_weights": (_init, tuple(ZOO)),
    "target_parameters": (_target_parameters, ("llama", "bert", "mlp", "embedding")),
    "trainable_token_indices": (_token_indices, ("llama", "bert", "embedding", "gpt2")),
    "layer_replication": (_replication, ("llama",)),
    "alora_invocation_tokens": (_invocation_tokens, ("llama",)),
    "use_bdlora": (_block_diagonal, ("llama",)),
    "kasa_config": (_kasa, ("llama", "bert", "mlp")),
}


def exotic_config(rng: Random, entry: Entry) -> dict[str, Any]:
    """A `random_config` with one or two options beyond plain LoRA, drawn again until PEFT accepts it."""
    options = [draw for draw, entries in EXOTIC_OPTIONS.values() if entry.name in entries]
    for _ in range(100):
        config = random_config(rng, entry)
        for draw in rng.sample(options, rng.choice((1, 1, 2))):
            config.update(draw(rng, entry, config))
        if _accepted(entry, config):
            return config
    raise AssertionError(f"PEFT accepted none of 100 exotic configurations on {entry.name}")


def _accepted(entry: Entry, config: dict[str, Any]) -> bool:
    """Whether PEFT builds and runs the model. It refuses many combinations only when it meets the layer."""
    try:
        model = random_peft_model(entry, seed=0, **config)
        return bool(entry.output(model, entry.inputs()).isfinite().all())
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, KeyError):
        return False
