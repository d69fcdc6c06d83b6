"""Every method of PEFT, one row each: how to make an adapter of it, and what its layers can do.

A method of a newer PEFT has no row, and `tests/test_methods.py` says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from adapters import save
from zoo import ZOO, Entry


@dataclass(frozen=True)
class Method:
    """One method of PEFT.

    Attributes:
        options: of its config, for a small adapter on a model of the zoo.
        targets: entry of the zoo → the `target_modules` to give there, or None for the method's own choice.
        merges: whether base weights can stand for it.
        needs: a module without which PEFT cannot make or load it.
        outside: options that change what PEFT keeps beside the file's tensors, and no shape.
        in_place: whether one adapter of it takes the place of another on a model that carries one.
        ranks: the option that its rank is, and values of it; None if its tensors know no rank or other size.
        one_rank: why the shapes have to be the same; empty where another rank takes the place of one, too.
        deactivates: whether values are known with which it does nothing, bit for bit.
        reason: why it does not swap in place.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[str, list[str] | None] = field(default_factory=lambda: {"llama": ["q_proj", "v_proj"]})
    merges: bool = True
    needs: str | None = None
    outside: Mapping[str, Any] = field(default_factory=dict)
    in_place: bool = True
    ranks: tuple[str, Sequence[Any]] | None = None
    one_rank: str = ""
    deactivates: bool = True
    reason: str = ""

    @property
    def other_rank(self) -> bool:
        """Whether an adapter of another rank takes its place."""
        return self.ranks is not None and not self.one_rank

    @property
    def available(self) -> bool:
        """Whether what it needs is installed."""
        return self.needs is None or find_spec(self.needs) is not None


# Why zeros around it are another adapter.
_PLACES = "indices cannot be padded with zeros"
_ATTENDED = "zeros are attended to"
_ROTATIONS = (
    "smaller blocks are more blocks, so that its tensor is larger in one dimension and smaller in the other; and "
    "blocks of b stand in blocks of B, along a diagonal, only where b divides B"
)
_CIRCULANTS = (
    "a block of 2b by 2b that is circulant has 2b numbers, and the four circulant ones of b that it takes the place of "
    "have 4b"
)

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
    "ADALORA": Method(
        {"total_step": 1, "init_r": 4, "target_r": 2},
        {"llama": _LINEAR},
        outside={"lora_alpha": 16},
        ranks=("init_r", range(3, 9)),
    ),
    "ADAMSS": Method({"r": 4, "num_subspaces": 2}, needs="sklearn", ranks=("r", (4, 8)), one_rank=_PLACES),
    "ADAPTION_PROMPT": Method(
        {"adapter_len": 4, "adapter_layers": 1},
        {"llama": None},
        merges=False,
        deactivates=False,
        ranks=("adapter_len", (4, 6)),
        one_rank=_ATTENDED,
    ),
    "BEFT": Method({}, {"bert": ["query", "value"]}),
    "BOFT": Method({"boft_block_size": 2}, ranks=("boft_block_size", (2, 4)), one_rank=_ROTATIONS),
    "C3A": Method({"block_size": 4}, deactivates=False, ranks=("block_size", (4, 8)), one_rank=_CIRCULANTS),
    "CARTRIDGE": Method(
        {"num_virtual_tokens": 4},
        {"llama": None},
        merges=False,
        deactivates=False,
        ranks=("num_virtual_tokens", (4, 6)),
        one_rank=_ATTENDED,
    ),
    "CPT": Method(
        {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
        {"llama": None},
        merges=False,
        deactivates=False,
    ),
    "DEFT": Method({}, outside={"alpha": 3}, deactivates=False, ranks=("r", range(1, 9))),
    "DELORA": Method({"r": 4}, ranks=("r", range(1, 9))),
    "FOURIERFT": Method(
        {"n_frequency": 10},
        outside={"scaling": 100.0, "random_loc_seed": 5},
        deactivates=False,
        ranks=("n_frequency", (10, 20)),
        one_rank=_PLACES,
    ),
    "FROD": Method(
        {"sparse_rate": 0.1},
        outside={"projection_prng_key": 1, "save_projection": False},
        deactivates=False,
        ranks=("sparse_rate", (0.1, 0.2)),
        one_rank=_PLACES,
    ),
    "GLORA": Method({}, ranks=("r", range(1, 9))),
    "GRALORA": Method({"r": 4, "gralora_k": 2, "hybrid_r": 0}, outside={"alpha": 128}, ranks=("r", range(2, 9, 2))),
    "HIRA": Method({"r": 4}, ranks=("r", range(1, 9))),
    "HRA": Method({"r": 4}, outside={"apply_GS": True}, deactivates=False, ranks=("r", range(2, 9, 2))),
    "IA3": Method({"feedforward_modules": ["down_proj"]}, {"llama": ["q_proj", "down_proj"]}),
    "LILY": Method(
        {"r": 4},
        merges=False,
        outside={"scaling": 2.0},
        deactivates=False,
        ranks=("r", range(1, 9)),
    ),
    "LN_TUNING": Method({}, {"llama": ["input_layernorm"], "bert": ["LayerNorm"]}),
    "LOHA": Method({"r": 4}, _on("llama", "conv2d"), outside={"alpha": 3}, ranks=("r", range(1, 9))),
    "LOKR": Method({"r": 4}, _on("llama", "conv2d"), outside={"alpha": 3}, ranks=("r", range(1, 4))),
    "LORA": Method(
        {"r": 4}, _on("llama", "gpt2", "conv2d", "embedding"), outside={"lora_alpha": 3}, ranks=("r", range(1, 9))
    ),
    "MISS": Method({"r": 4}, ranks=("r", (2, 4, 8))),
    "MULTITASK_PROMPT_TUNING": Method(
        {"num_virtual_tokens": 4, "num_tasks": 2},
        {"llama": None},
        merges=False,
        deactivates=False,
        ranks=("num_virtual_tokens", (4, 6)),
        one_rank=_ATTENDED,
    ),
    "OFT": Method(
        {"oft_block_size": 2, "r": 0},
        _on("llama", "conv2d"),
        outside={"use_cayley_neumann": False, "coft": True},
        ranks=("oft_block_size", (2, 4)),
        one_rank=_ROTATIONS,
    ),
    "OSF": Method({}, deactivates=False),
    "PEANUT": Method({}, outside={"scaling": 2.0}, ranks=("r", range(1, 9))),
    "POLY": Method(
        {"r": 4, "n_tasks": 2, "n_skills": 2},
        merges=False,
        deactivates=False,
        ranks=("r", (2, 4)),
        one_rank="layers cannot be tried without a task",
    ),
    "PREFIX_TUNING": Method(
        {"num_virtual_tokens": 4},
        {"llama": None},
        merges=False,
        deactivates=False,
        ranks=("num_virtual_tokens", (4, 6)),
        one_rank=_ATTENDED,
    ),
    "PROMPT_TUNING": Method(
        {"num_virtual_tokens": 4},
        {"llama": None},
        merges=False,
        deactivates=False,
        ranks=("num_virtual_tokens", (4, 6)),
        one_rank=_ATTENDED,
    ),
    "PSOFT": Method(
        {"r": 4}, outside={"psoft_alpha": 64, "ab_svd_init": "pissa_init"}, ranks=("r", (4, 8)), one_rank=_PLACES
    ),
    "PVERA": Method({"r": 4}, outside={"projection_prng_key": 1, "save_projection": False}, ranks=("r", range(1, 9))),
    "P_TUNING": Method(
        {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
        {"llama": None},
        merges=False,
        deactivates=False,
        ranks=("num_virtual_tokens", (4, 6)),
        one_rank=_ATTENDED,
    ),
    "RANDLORA": Method(
        {"r": 4, "randlora_alpha": 1},
        outside={"randlora_alpha": 2, "projection_prng_key": 1},
        ranks=("r", (4, 8)),
        one_rank="a lower rank has more matrices",
    ),
    "ROAD": Method({"group_size": 2}, outside={"group_size": 4}),
    "SHADOW": Method(
        {"r": 2, "shadow_num_hidden_layers": 1},
        {"llama": None},
        merges=False,
        outside={"shadow_alpha": 0.5},
        deactivates=False,
        ranks=("r", (2, 4)),
        one_rank="layers cannot be tried without the model",
    ),
    "SHIRA": Method({"r": 2}, ranks=("r", (2, 4)), one_rank=_PLACES),
    "SUPERTUNING": Method({"sparsity": 0.5}, outside={"select_top": False, "save_precomputed_indices": False}),
    "TINYLORA": Method({}, outside={"projection_seed": 43, "save_projection": False}, ranks=("r", range(1, 5))),
    "TRAINABLE_TOKENS": Method(
        {"token_indices": [4, 7, 9]},
        {"llama": None},
        outside={"token_indices": [5, 8, 10]},
        ranks=("token_indices", ([4, 7], [4, 7, 9])),
        one_rank="it has as many rows as tokens",
    ),
    "UNILORA": Method(
        {"theta_d_length": 257},
        outside={"proj_seed": 43},
        deactivates=False,
        ranks=("theta_d_length", range(200, 300, 7)),
    ),
    "VBLORA": Method(
        {"vector_length": 2, "num_vectors": 4, "topk": 2},
        outside={"topk": 3},
        deactivates=False,
        ranks=("num_vectors", (4, 8)),
        one_rank="it chooses among the vectors",
    ),
    "VERA": Method(
        {"r": 4},
        _on("llama", "gpt2"),
        outside={"projection_prng_key": 1, "save_projection": False},
        ranks=("r", range(1, 9)),
    ),
    "WAVEFT": Method(
        {"n_frequency": 8},
        outside={"scaling": 50.0, "random_loc_seed": 5},
        ranks=("n_frequency", (8, 12)),
        one_rank=_PLACES,
    ),
    "XLORA": Method(
        {"adapters": {}},
        {"llama": None},
        merges=False,
        in_place=False,
        reason="its file lacks the classifier's layer 0, which PEFT takes for a part of the expert of that name, so "
        "that each fresh load is another at random; the experts are in other files, which PEFT would load",
        deactivates=False,
    ),
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
        save(model, folder)
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
