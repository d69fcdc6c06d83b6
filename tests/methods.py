"""Every method of PEFT, one row each: how to make an adapter of it, and what its layers can do.

A method of a newer PEFT has no row, and `tests/test_methods.py` says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from zoo import ZOO, Entry


@dataclass(frozen=True)
class Method:
    """One method of PEFT.

    Attributes:
        options: of its config, for a small adapter on a model of the zoo.
        targets: entry of the zoo → the `target_modules` to give there, or None for the method's own choice.
        merges: whether base weights can stand for it.
        needs: a module without which PEFT cannot make or load it.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[str, list[str] | None] = field(default_factory=lambda: {"llama": ["q_proj", "v_proj"]})
    merges: bool = True
    needs: str | None = None

    @property
    def available(self) -> bool:
        """Whether what it needs is installed."""
        return self.needs is None or find_spec(self.needs) is not None


_LINEAR = ["q_proj", "v_proj", "down_proj"]
_ALL = {
    "llama": _LINEAR,
    "gpt2": ["c_attn", "c_proj"],
    "conv2d": ["stem", "point", "head"],
    "embedding": ["word", "mix"],
}


def _on(*entries: str) -> dict[str, list[str] | None]:
    return {entry: list(_ALL[entry]) for entry in entries}


# Embeddings and convolutions as far as PEFT has the method for them.
METHODS: dict[str, Method] = {
    "ADALORA": Method({"total_step": 1, "init_r": 4, "target_r": 2}, {"llama": _LINEAR}),
    "ADAMSS": Method({"r": 4, "num_subspaces": 2}, needs="sklearn"),
    "ADAPTION_PROMPT": Method({"adapter_len": 4, "adapter_layers": 1}, {"llama": None}, merges=False),
    "BEFT": Method({}, {"bert": ["query", "value"]}),
    "BOFT": Method({"boft_block_size": 2}),
    "C3A": Method({"block_size": 4}),
    "CARTRIDGE": Method({"num_virtual_tokens": 4}, {"llama": None}, merges=False),
    "CPT": Method(
        {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
        {"llama": None},
        merges=False,
    ),
    "DEFT": Method({}),
    "DELORA": Method({"r": 4}),
    "FOURIERFT": Method({"n_frequency": 10}),
    "FROD": Method({"sparse_rate": 0.1}),
    "GLORA": Method({}),
    "GRALORA": Method({"r": 4, "gralora_k": 2, "hybrid_r": 0}),
    "HIRA": Method({"r": 4}),
    "HRA": Method({"r": 4}),
    "IA3": Method({"feedforward_modules": ["down_proj"]}, {"llama": ["q_proj", "down_proj"]}),
    "LILY": Method({"r": 4}, merges=False),
    "LN_TUNING": Method({}, {"llama": ["input_layernorm"], "bert": ["LayerNorm"]}),
    "LOHA": Method({"r": 4}, _on("llama", "conv2d")),
    "LOKR": Method({"r": 4}, _on("llama", "conv2d")),
    "LORA": Method({"r": 4}, _on("llama", "gpt2", "conv2d", "embedding")),
    "MISS": Method({"r": 4}),
    "MULTITASK_PROMPT_TUNING": Method({"num_virtual_tokens": 4, "num_tasks": 2}, {"llama": None}, merges=False),
    "OFT": Method({"oft_block_size": 2, "r": 0}, _on("llama", "conv2d")),
    "OSF": Method({}),
    "PEANUT": Method({}),
    "POLY": Method({"r": 4, "n_tasks": 2, "n_skills": 2}, merges=False),
    "PREFIX_TUNING": Method({"num_virtual_tokens": 4}, {"llama": None}, merges=False),
    "PROMPT_TUNING": Method({"num_virtual_tokens": 4}, {"llama": None}, merges=False),
    "PSOFT": Method({"r": 4}),
    "PVERA": Method({"r": 4}),
    "P_TUNING": Method({"num_virtual_tokens": 4, "encoder_hidden_size": 8}, {"llama": None}, merges=False),
    "RANDLORA": Method({"r": 4, "randlora_alpha": 1}),
    "ROAD": Method({"group_size": 2}),
    "SHADOW": Method({"r": 2, "shadow_num_hidden_layers": 1}, {"llama": None}, merges=False),
    "SHIRA": Method({"r": 2}),
    "SUPERTUNING": Method({"sparsity": 0.5}),
    "TINYLORA": Method({}),
    "TRAINABLE_TOKENS": Method({"token_indices": [4, 7, 9]}, {"llama": None}),
    "UNILORA": Method({"theta_d_length": 257}),
    "VBLORA": Method({"vector_length": 2, "num_vectors": 4, "topk": 2}),
    "VERA": Method({"r": 4}, _on("llama", "gpt2")),
    "WAVEFT": Method({"n_frequency": 8}),
    "XLORA": Method({"adapters": {}}, {"llama": None}, merges=False),
}


def method_config(name: str, entry: Entry, **options: Any) -> Any:
    """A peft config of the method for this model; `options` replace the row's."""
    kind: Any = next(kind for known, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if known.value == name)
    row = METHODS[name]
    stated = {"task_type": entry.task_type, **row.options}
    if row.targets.get(entry.name) is not None:
        stated["target_modules"] = row.targets[entry.name]
    return kind(**{**stated, **options})


def make_method_adapter(
    folder: Path | str,
    method: str,
    entry: Entry | None = None,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    """Save an adapter of the method as PEFT saves it; every trained tensor is moved at random, as `seed` says.

    Adapters of two seeds differ clearly, and so does each from the base of seed 0.
    """
    folder, entry = Path(folder), entry or ZOO[next(iter(METHODS[method].targets))]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        model = get_peft_model(entry.build(dtype=dtype), method_config(method, entry, **options))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        model.save_pretrained(folder)
    return folder


def fresh_merge(entry: Entry, folder: Path, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Name → values of all tensors of a new base with the adapter loaded and merged by PEFT."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        merged: Any = PeftModel.from_pretrained(entry.build(dtype=dtype), str(folder)).eval().merge_and_unload()
    return tensors_of(merged)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name → a copy of each parameter and buffer, under each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}
