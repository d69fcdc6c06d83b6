"""Give a plain model LoRA layers where adapters will want them, and take them away again."""

from __future__ import annotations

import math
import re
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..block import SlotShape
from ..errors import ModelError, UnexpectedTargetError, UnsupportedError
from ..methods import MAGNITUDE, Adapter
from .base import base_modules, parameter_name
from .discover import canonical_name, lora_layers, roots, unwrap
from .offloading import is_offloaded, refuse_offloaded, refuse_reading_offloaded, stay_beside
from .photo import ABSENT, Photo
from .quantised import has_bias, is_repacked
from .saved import refuse_adapted_and_saved, saved_wrappers
from .slots import Slot

_BIAS = "lora_B.bias"
OUT_PROJ = ".base_layer.out_proj"  # where PEFT keeps the output projection of a MultiheadAttention
_LOW_PRECISION = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class Injection:
    """What `inject` has done, for `remove`: on a model, or on each member of an Assembly."""

    roots: list[_Injected]


@dataclass(frozen=True, eq=False)
class _Injected:
    """What was done to one model that keeps PEFT's configs of its own."""

    model: weakref.ref[nn.Module]
    adapter_name: str
    replaced: list[tuple[dict[str, Any], str, nn.Module, Any]]  # parent's modules, name, base layer, LoRA layer
    joined: list[tuple[Any, Any]]  # LoRA layers that had other adapters, and which of those were active
    auxiliary: list[tuple[Any, Any]]  # PEFT's wrappers beside its layers, and which adapter was active in them
    attributes: dict[str, Any]  # of the model, as they were; ABSENT where there was none
    resident: Any  # the config of an adapter of this name that was there before, or None


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
            raise UnexpectedTargetError(
                f"{adapter.checkpoint.origin} targets modules that the model does not have.",
                where=", ".join(unknown[:8]),
                found=f"{len(unknown)} of {len(adapter.targets)} targets missing in {type(unwrap(model)).__name__}",
                expected="the paths of the model that the adapter was trained on",
                hint="this adapter belongs to another base model, or to a part of this one",
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


def inject(model: nn.Module, adapter_name: str, shapes: Mapping[str, SlotShape]) -> Injection:
    """Add LoRA layers for `shapes`, at the smallest rank; the base model's own tensors and flags stay as they are.

    PEFT makes the layers; it is told the modules by name, because its rank_pattern of hundreds of regular expressions
    takes seconds (9 s for 840 modules). `bind` gives them their ranks.
    """
    injection = Injection([])
    photos: list[Photo] = []
    standing = _standing(model, adapter_name)
    try:
        for prefix, root in roots(model).items():
            own = {fqn.removeprefix(prefix): shape for fqn, shape in shapes.items() if fqn.startswith(prefix)}
            if not own:
                continue
            get_base_model: Any = getattr(root, "get_base_model", None)
            inner: nn.Module = get_base_model() if get_base_model is not None else root
            photos.append(Photo(inner))
            injection.roots.append(_inject(root, inner, adapter_name, own, photos[-1], standing))
        return injection
    except BaseException:
        if len(photos) > len(injection.roots):  # amid the last one
            photos[-1].put_back()
        remove(injection)
        raise


def _inject(
    model: nn.Module,
    inner: nn.Module,
    adapter_name: str,
    shapes: Mapping[str, SlotShape],
    photo: Photo,
    standing: _Standing | None,
) -> _Injected:
    from peft import inject_adapter_in_model
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = {canonical_name(name, ""): name for name, _ in inner.named_modules()}
    targeted = {names[fqn.removesuffix(OUT_PROJ)] for fqn, shape in shapes.items() if shape.parameter is None}
    parameters = [
        f"{names[fqn.replace('.base_layer', '')]}.{shape.parameter}"
        for fqn, shape in shapes.items()
        if shape.parameter is not None
    ]
    adapted = [*targeted, *(parameter.rpartition(".")[0] for parameter in parameters)]
    _refuse_compiled_targets(adapted)
    for fqn, shape in shapes.items():
        _refuse_without_memory(inner, fqn, names[fqn.removesuffix(OUT_PROJ).replace(".base_layer", "")], shape)
    before = _layers_with_parents(inner)
    stood = {id(layer): _Standing.of(layer) for _, _, layer in before.values()}
    auxiliary = [(m, m._active_adapter) for m in inner.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    attention = _plain_attentions(inner)
    with warnings.catch_warnings(), torch.inference_mode(False):
        # Targets by name and not by pattern, Conv1D's transposed weight, grouped convolutions: all meant so.
        warnings.simplefilter("ignore")
        config, targets = _injection_config(shapes), {f"{root}.lora_A.weight": torch.empty(0) for root in targeted}
        if parameters:  # which PEFT does not take together with a state_dict
            config.target_modules = f"^({'|'.join(map(re.escape, sorted(targeted)))})$" if targeted else set()
            config.target_parameters = parameters
        try:
            inject_adapter_in_model(config, inner, adapter_name, state_dict=None if parameters else targets)
        except ValueError as error:  # a bare parameter of a layer that another adapter has wrapped
            raise UnsupportedError(
                "PEFT does not put such an adapter on this model.",
                where=adapted[0],
                found=f"{type(error).__name__}: {error!s:.300}",
                expected="a model on which no other adapter is in its way",
                hint="attach to the base model; or route='merged'",
            ) from error
    after = _layers_with_parents(inner)
    _settle_attention((layer for _, _, layer in after.values()), attention)
    photo.put_back_flags()
    if standing is not None:
        _keep_active(adapter_name, standing, stood, (layer for _, _, layer in after.values()))
        _put_back_auxiliary(auxiliary)
        auxiliary.clear()
    resident = photo.configs.get(adapter_name)
    if resident is not None:
        inner.__dict__["peft_config"][adapter_name] = resident  # PEFT has put the injection's in its place
    injection = _Injected(weakref.ref(inner), adapter_name, [], [], auxiliary, photo.attributes, resident)
    for name, (parent, child, layer) in after.items():
        if name not in before:
            injection.replaced.append((parent._modules, child, layer.get_base_layer(), layer))
    by_name = dict(lora_layers(model))
    for fqn, shape in shapes.items():
        layer = by_name[fqn]
        if id(layer) in stood:
            injection.joined.append((layer, stood[id(layer)].active))
        _make_neutral(layer, adapter_name, shape)
    if hasattr(inner, "_hf_peft_config_loaded"):
        inner.__dict__["_hf_peft_config_loaded"] = True  # transformers' own adapter methods ask it
    return injection


def _refuse_without_memory(model: nn.Module, fqn: str, name: str, shape: SlotShape) -> None:
    """Raise if the module is on meta, unless accelerate has its weight: a slot can be there without."""
    module: Any = model.get_submodule(name)
    base: nn.Module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    refuse_reading_offloaded(fqn, base, dora=MAGNITUDE in shape.parts, parameter=shape.parameter)
    if any(param.is_meta for param in base.parameters()) and not is_offloaded(base):
        refuse_offloaded(model)


def _refuse_compiled_targets(roots: Iterable[str]) -> None:
    alone = sorted(root for root in roots if root.endswith("._orig_mod"))
    if alone:
        raise ModelError(
            "A module that an adapter targets was compiled by itself.",  # its compiled call would go past the slot
            where=", ".join(alone[:8]),
            found=f"{len(alone)} modules wrapped by torch.compile",
            expected="a module that is not wrapped, or one that carries its LoRA layer already",
            hint="attach before torch.compile",
        )


def _plain_attentions(model: nn.Module) -> dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]]:
    """nn.MultiheadAttention → its own parameters and its projection's, for those that PEFT has not wrapped yet."""
    found = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    plain = [module for module in found if not hasattr(module.out_proj, "base_layer")]
    return {module: (dict(module._parameters), dict(module.out_proj._parameters)) for module in plain}


def _settle_attention(
    layers: Iterable[Any], parameters: Mapping[nn.Module, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    """Put hotslot's MultiheadAttention in the place of PEFT's, and the base's own Parameters back into it.

    PEFT's registers others, anew, whenever anybody lists the modules.
    """
    from .attention import use_slot_attention

    for layer in layers:
        base = layer.get_base_layer()
        if isinstance(base, nn.MultiheadAttention) and base in parameters:
            use_slot_attention(layer)
            projection: Any = base.out_proj
            for module, saved in zip((base, projection.get_base_layer()), parameters[base], strict=True):
                module._parameters.clear()
                module._parameters.update(saved)


class _Standing(NamedTuple):
    """Which adapters are active in a layer, and whether none is heeded."""

    active: Any
    disabled: bool

    @classmethod
    def of(cls, layer: Any) -> _Standing:
        return cls(layer._active_adapter, layer._disable_adapters)


def _standing(model: nn.Module, adapter_name: str) -> _Standing | None:
    """Of the layers that have the adapter already, on whichever member of an Assembly; None if none has."""
    own = (layer for _, layer in lora_layers(model) if adapter_name in {*layer.lora_A, *layer.lora_embedding_A})
    return next(map(_Standing.of, own), None)


def _keep_active(name: str, standing: _Standing, stood: Mapping[int, _Standing], layers: Iterable[Any]) -> None:
    """PEFT activates the adapter, and it alone, on all layers. One that was there before stays as active as it was.

    So do those beside it. Layers of other members may not know yet that it is active.
    """
    for layer in layers:
        before = stood.get(id(layer), standing)
        missing = name in _listed(standing.active) and name not in _listed(before.active)
        layer._active_adapter = [*_listed(before.active), name] if missing else before.active
        layer._disable_adapters = before.disabled


def _listed(active: Any) -> list[str]:
    return [active] if isinstance(active, str) else active


def _put_back_auxiliary(auxiliary: Iterable[tuple[Any, Any]]) -> None:
    for wrapper, active in auxiliary:
        wrapper._active_adapter = active


def _injection_config(shapes: Mapping[str, SlotShape]) -> Any:
    from peft import LoraConfig

    rank = math.lcm(*(shape.groups for shape in shapes.values()))
    # Matches nothing by itself: the modules come by name.
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="(?!)", init_lora_weights=False, inference_mode=True)


def _layers_with_parents(model: nn.Module) -> dict[str, tuple[nn.Module, str, Any]]:
    from peft.tuners.lora import LoraLayer

    found: dict[str, tuple[nn.Module, str, Any]] = {}
    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            if isinstance(child, LoraLayer):
                found[f"{name}.{child_name}"] = (module, child_name, child)
    return found


def _make_neutral(layer: Any, name: str, shape: SlotShape) -> None:
    """Zero the new slot's parameters, in the dtype and with the parts that the plan wants."""
    from .dora import add_magnitude

    with torch.inference_mode(False), torch.no_grad():
        stay_beside(layer, name)
        if "lora_B.bias" in shape.parts:
            up = layer.lora_B[name]
            up.bias = nn.Parameter(torch.zeros(shape.parts["lora_B.bias"], device=up.weight.device))
        for container in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
            if name in container:
                held = container[name]
                for param in [held] if isinstance(held, nn.Parameter) else list(held.parameters()):
                    param.data = torch.zeros_like(param, dtype=shape.dtype)
                    param.requires_grad_(False)
        if MAGNITUDE in shape.parts:
            add_magnitude(layer, name, shape.parts[MAGNITUDE], shape.dtype)
        for container in (layer.lora_A, layer.lora_B, layer.lora_dropout):
            if name in container:
                container[name].train(layer.get_base_layer().training)
    layer.training = layer.get_base_layer().training


def remove(injection: Injection) -> None:
    """Undo `inject`: the base layers back in their places, the model's attributes as they were."""
    for injected in injection.roots:
        _remove(injected)


def _remove(injection: _Injected) -> None:
    name = injection.adapter_name
    for layer, active in injection.joined:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's notice about which adapter becomes active: `active`, at once
            flags = [(param, param.requires_grad) for param in layer.parameters()]
            layer.delete_adapter(name)
            for param, flag in flags:  # PEFT makes the next adapter trainable
                param.requires_grad_(flag)
        layer._active_adapter = active
    for parent, child, base, layer in injection.replaced:
        others = {*layer.lora_A, *layer.lora_embedding_A} - {name}
        if others:
            layer.delete_adapter(name)
        elif child in parent and unwrap(parent[child]) is layer:
            parent[child] = base
    _put_back_auxiliary(injection.auxiliary)
    model = injection.model()
    configs = model.__dict__.get("peft_config") if model is not None else None
    if model is None or configs is None:
        return
    if injection.resident is not None:
        configs[name] = injection.resident
        return
    configs.pop(name, None)
    for key, value in injection.attributes.items():
        if value is not ABSENT:
            model.__dict__[key] = value
        elif not configs:  # users may have added adapters of their own since
            model.__dict__.pop(key, None)
