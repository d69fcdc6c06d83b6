"""Which slots a model needs for its adapters, and of what shapes. Nothing is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..block import SlotShape
from ..errors import UnexpectedTargetError, UnsupportedError
from ..methods import MAGNITUDE, Adapter
from .base import base_modules, parameter_name
from .discover import unwrap
from .quantised import has_bias, is_repacked
from .saved import refuse_adapted_and_saved, saved_wrappers
from .slots import Slot

_BIAS = "lora_B.bias"
OUT_PROJ = ".base_layer.out_proj"  # where PEFT keeps the output projection of a MultiheadAttention
_LOW_PRECISION = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def slot_shapes(
    model: nn.Module,
    adapters: Iterable[Adapter],
    slots: Mapping[str, Slot] = MappingProxyType({}),
    *,
    also: Mapping[str, int] = MappingProxyType({}),
    bare: Mapping[str, str | None] = MappingProxyType({}),
    dtype: torch.dtype | str | None = None,
) -> dict[str, SlotShape]:
    """The slots that a model needs for all of these adapters: the union of their targets, the largest rank of each.

    Args:
        model: the model.
        adapters: the adapters.
        slots: those that the model has already.
        also: fqn → rank of further targets.
        bare: fqn → the bare parameter that is adapted there, for those of `also` that do not adapt a module.
        dtype: of slots that the model does not have: "base" is their base layer's, None what a fresh PEFT load gives.

    Raises:
        UnexpectedTargetError: a target is no module of the model.
        UnsupportedError: a target is a module that LoRA does not adapt.
    """
    modules = base_modules(model)
    saved = {fqn for fqn, _ in saved_wrappers(model)}
    ranks: dict[str, int] = dict(also)
    parts: dict[str, set[str]] = {}
    parameters = dict(bare)
    for adapter in adapters:
        for fqn in adapter.targets:
            parameters.setdefault(fqn, parameter_name(fqn, adapter, modules))
        there = {*slots, *modules, *(fqn for fqn, parameter in parameters.items() if parameter is not None)}
        unknown = [fqn for fqn in adapter.targets if fqn not in there and fqn.removesuffix(OUT_PROJ) not in modules]
        if unknown:
            part = next((path for path in modules if all(f"{path}.{fqn}" in modules for fqn in unknown)), None)
            other = "this adapter belongs to another base model, or to a part of this one"
            raise UnexpectedTargetError(
                f"{adapter.checkpoint.origin} targets modules that the model does not have.",
                where=", ".join(unknown[:8]),
                found=f"{len(unknown)} of {len(adapter.targets)} targets missing in {type(unwrap(model)).__name__}",
                expected="the paths of the model that the adapter was trained on",
                hint=f"attach to model.{part}, which has them" if part else other,
            )
        for fqn, target in adapter.targets.items():
            ranks[fqn] = max(ranks.get(fqn, 0), target.rank)
            parts.setdefault(fqn, set()).update(target.parts)
        saved |= adapter.saved.keys()
    refuse_adapted_and_saved(ranks, saved)
    shapes = {}
    for fqn, rank in ranks.items():
        extra = sorted(parts.get(fqn, ()))
        _refuse_parts(fqn, extra, modules, slots)
        parameter = parameters.get(fqn)
        if fqn in slots:
            shape = slots[fqn].shape(rank)
        elif parameter is not None:
            shape = _parameter_shape(fqn, modules[fqn.replace(".base_layer", "")], parameter, rank, dtype)
        else:
            shape = _slot_shape(fqn, modules, rank, dtype)
        shapes[fqn] = shape.with_parts(extra)
    return shapes


def _refuse_parts(fqn: str, parts: Iterable[str], modules: Mapping[str, nn.Module], slots: Mapping[str, Slot]) -> None:
    """Raise unless PEFT has what these parts are for on this module."""
    module = modules.get(fqn)
    if MAGNITUDE in parts and not _can_be_dora(fqn, modules, slots):
        raise UnsupportedError(
            "An adapter with DoRA targets a module that PEFT has no DoRA for.",
            where=fqn,
            found=f"{MAGNITUDE} on a {type(module).__name__}",
            expected="Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d, Linear4bit or Linear8bitLt",
            hint="train it without DoRA there",
        )
    if MAGNITUDE in parts and module is not None and is_repacked(module):
        raise UnsupportedError(
            "An adapter with DoRA targets a module whose weight bitsandbytes repacks on this CPU.",
            where=fqn,
            found=f"{MAGNITUDE} on a {type(module).__name__} for AVX-512 BF16",
            expected="a weight that can be read back, for DoRA needs its norm",
            hint="set support_avx512bf16_for_cpu = False on the model's Linear4bit layers before their first forward",
        )
    if _BIAS in parts and module is not None and not has_bias(module):
        raise UnsupportedError(
            "An adapter with lora_bias targets a quantised module on which PEFT refuses it.",
            where=fqn,
            found=f"{_BIAS} on a weight of {type(getattr(module, 'weight', None)).__name__}",
            expected="lora_bias on layers that are not quantised, or are of bitsandbytes",
            hint="train it without lora_bias; PEFT's merge would leave the bias out there",
        )


def _can_be_dora(fqn: str, modules: Mapping[str, nn.Module], slots: Mapping[str, Slot]) -> bool:
    if fqn in slots:
        return slots[fqn].can_have(MAGNITUDE)
    if fqn not in modules:
        return False
    return not fqn.endswith(OUT_PROJ) and not isinstance(modules[fqn], nn.MultiheadAttention)


def _slot_shape(fqn: str, modules: Mapping[str, nn.Module], rank: int, dtype: torch.dtype | str | None) -> SlotShape:
    from transformers.pytorch_utils import Conv1D

    root = fqn.removesuffix(OUT_PROJ)
    down: tuple[int, ...]
    up: tuple[int, ...]
    module: Any = modules[root]
    groups = 1
    if root != fqn:
        module = getattr(module, "out_proj", module)
        module = getattr(module, "base_layer", module)  # PEFT's layer, where an adapter has been on it
    if isinstance(module, nn.Embedding):
        down, up = (rank, module.num_embeddings), (module.embedding_dim, rank)
        embedding = {"lora_embedding_A": down, "lora_embedding_B": up}
        return SlotShape(fqn, rank, 1, 1, _slot_dtype(module.weight.dtype, dtype), embedding)
    if isinstance(module, nn.Linear):
        down, up = (rank, module.in_features), (module.out_features, rank)
    elif isinstance(module, Conv1D):
        down, up = (rank, module.weight.shape[0]), (module.weight.shape[1], rank)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        groups = module.groups
        down = (rank, module.in_channels, *module.kernel_size)
        up = (module.out_channels, rank // groups, *(1 for _ in module.kernel_size))
    elif isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim:
        down, up = (rank, module.embed_dim), (3 * module.embed_dim, rank)
        module = getattr(module.out_proj, "base_layer", module.out_proj)
    else:
        raise UnsupportedError(
            "An adapter targets a module that PEFT's LoRA does not adapt.",
            where=fqn,
            found=type(module).__name__,
            expected="Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d or MultiheadAttention with one embedding size",
            hint="if PEFT does adapt it (GPTQ, AWQ, HQQ …), load one adapter with PEFT and attach to that",
        )
    parts = {"lora_A.weight": down, "lora_B.weight": up}
    return SlotShape(fqn, rank, groups, 1, _slot_dtype(module.weight.dtype, dtype), parts)


def _parameter_shape(fqn: str, module: nn.Module, name: str, rank: int, dtype: torch.dtype | str | None) -> SlotShape:
    """Of a bare parameter. PEFT's own layer is asked, around one without memory: it knows which way experts lie."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper

    param, stand_in = getattr(module, name), nn.Module()
    stand_in.register_parameter(name, nn.Parameter(torch.empty(param.shape, device="meta"), requires_grad=False))
    stand_in.__dict__["is_transposed"] = getattr(module, "is_transposed", False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=[name], init_lora_weights=False)
    try:
        layer: Any = ParamWrapper(stand_in, "slot", parameter_name=name, config=config, r=rank, lora_alpha=rank)
    except ValueError as error:
        raise UnsupportedError(
            "An adapter targets a bare parameter that PEFT's LoRA does not adapt.",
            where=f"{fqn}.{name}",
            found=f"shape {tuple(param.shape)}: {error}",
            expected="two dimensions, or three with one block for each expert",
        ) from error
    parts = {
        "lora_A.weight": tuple(layer.lora_A["slot"].weight.shape),
        "lora_B.weight": tuple(layer.lora_B["slot"].weight.shape),
    }
    return SlotShape(fqn, rank, 1, layer.num_experts, _slot_dtype(param.dtype, dtype), parts, name)


def _slot_dtype(base: torch.dtype, wanted: torch.dtype | str | None) -> torch.dtype:
    """The one that is wanted; by default, as in PEFT, the base layer's, and float32 where that is of low precision."""
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted == "base" and base.is_floating_point and base.itemsize > 1:  # matmuls do not take float8
        return base
    return torch.float32 if base in _LOW_PRECISION or not base.is_floating_point else base
