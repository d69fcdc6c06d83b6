"""Give a plain model LoRA layers where adapters will want them, and take them away again."""

from __future__ import annotations

import math
import re
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..block import SlotShape
from ..errors import MergedError, ModelError, UnsupportedError
from ..methods import MAGNITUDE
from .activity import Activity
from .calls import calls_of
from .discover import callable_roots, canonical_name, lora_layers, roots, unwrap
from .offloading import is_offloaded, refuse_offloaded, refuse_reading_offloaded, stay_beside
from .photo import ABSENT, Photo
from .shapes import OUT_PROJ
from .state_dict import forget_left

# LoRA layers that are on their models for hotslot's slots alone: the last slot to go puts the base layer back.
_made: weakref.WeakSet[Any] = weakref.WeakSet()
# Model → its attributes of PEFT's before any slot came, ABSENT where there was none. So when the last adapter has gone.
_attributes: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Injection:
    """What `inject` has done, for `remove`: on a model, or on each member of an Assembly."""

    adapter_name: str
    roots: list[_Injected]
    activities: list[Activity]


@dataclass(frozen=True, eq=False)
class _Injected:
    """What was done to one model that keeps PEFT's configs of its own."""

    model: weakref.ref[nn.Module]
    layers: list[tuple[dict[str, Any], str, Any]]  # parent's modules, name, LoRA layer: those with a new slot
    resident: Any  # the config of an adapter of this name that was there before, or None


def inject(model: nn.Module, adapter_name: str, shapes: Mapping[str, SlotShape]) -> Injection:
    """Add LoRA layers for `shapes`, at the smallest rank; the base model's own tensors and flags stay as they are.

    A slot that is new is active beside the adapters that are; one that was there already stays as active as it was.
    If it raises, the model is as it was.

    PEFT makes the layers; it is told the modules by name, because its rank_pattern of hundreds of regular expressions
    takes seconds (9 s for 840 modules). `bind` gives them their ranks.

    Raises:
        MergedError: an adapter is merged into the base weights.
        ModelError: a target was compiled by itself, or its weights are elsewhere.
    """
    injection = Injection(adapter_name, [], [])
    photos: list[Photo] = []
    layers = [layer for _, layer in lora_layers(model)]
    own = {layer for layer in layers if adapter_name in layer._get_available_adapters()}
    joins = not own or any(adapter_name in layer.active_adapters for layer in own)
    _refuse_merged(model, layers)
    try:
        for prefix, root in roots(model).items():
            *around, inner = callable_roots(root)
            photos.append(Photo(inner, around))
            wanted = {fqn.removeprefix(prefix): shape for fqn, shape in shapes.items() if fqn.startswith(prefix)}
            if wanted:
                here = {layer for _, layer in lora_layers(root)}
                like = min(layers, key=lambda layer: (layer not in here, layer not in own), default=None)
                injection.roots.append(_inject(root, inner, adapter_name, wanted, photos[-1], like))
            injection.activities.append(Activity(root, adapter_name, joins=joins))
        return injection
    except BaseException:
        for photo in reversed(photos):
            photo.put_back()
        raise


def _inject(
    model: nn.Module,
    inner: nn.Module,
    adapter_name: str,
    shapes: Mapping[str, SlotShape],
    photo: Photo,
    like: Any,
) -> _Injected:
    """`inject` for one model that keeps PEFT's configs. New layers are as active as `like`, one that was there."""
    from peft import inject_adapter_in_model

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
    before = {layer for _, _, layer in _layers_with_parents(inner)}
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
    _settle_attention((layer for _, _, layer in after), attention)
    photo.put_back_flags()
    photo.put_back_active()  # PEFT has activated the adapter, and it alone
    for _, _, layer in after:
        if layer not in before:
            _made.add(layer)
            layer._active_adapter = [] if like is None else [*like.active_adapters]
            layer._disable_adapters = like is not None and like.disable_adapters
    resident = photo.configs.get(adapter_name)
    if resident is not None:
        inner.__dict__["peft_config"][adapter_name] = resident  # PEFT has put the injection's in its place
    by_name = dict(lora_layers(model))
    joined = {by_name[fqn] for fqn in shapes}
    for fqn, shape in shapes.items():
        _make_neutral(by_name[fqn], adapter_name, shape)
    if hasattr(inner, "_hf_peft_config_loaded"):
        inner.__dict__["_hf_peft_config_loaded"] = True  # transformers' own adapter methods ask it
    changed = [place for place in after if place[2] not in before or place[2] in joined]
    _attributes.setdefault(inner, photo.attributes)
    return _Injected(weakref.ref(inner), changed, resident)


def _refuse_merged(model: nn.Module, layers: Iterable[Any]) -> None:
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise MergedError(
            "An adapter is merged into the base weights: its layers pass over what else they have, and PEFT unmerges "
            "it when it makes new ones.",
            where=", ".join(merged),
            expected="a model on which nothing is merged",
            hint=f"unmerge it first: {calls_of(model).unmerge}",
        )


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


def _injection_config(shapes: Mapping[str, SlotShape]) -> Any:
    from peft import LoraConfig

    rank = math.lcm(*(shape.groups for shape in shapes.values()))
    # Matches nothing by itself: the modules come by name.
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="(?!)", init_lora_weights=False, inference_mode=True)


def _layers_with_parents(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """(the parent's modules, name there, layer) of every LoRA layer, outermost first."""
    from peft.tuners.lora import LoraLayer

    return [
        (module._modules, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, LoraLayer)
    ]


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
    """Undo `inject`, but for what others have activated since: base layers and attributes as they were.

    Layers that have other adapters stay. May be repeated.
    """
    for injected in injection.roots:
        _remove(injected, injection.adapter_name)
    for activity in injection.activities:
        activity.leave()


def _remove(injected: _Injected, name: str) -> None:
    for _, _, layer in injected.layers:
        _delete(layer, name)
    for siblings, child, layer in injected.layers:
        base = layer.get_base_layer()
        if layer in _made and _is_free(layer) and child in siblings and unwrap(siblings[child]) is layer:
            siblings[child] = base
    model = injected.model()
    if model is None:
        return
    configs = model.__dict__.get("peft_config") or {}
    if injected.resident is not None:
        configs[name] = injected.resident
        return
    configs.pop(name, None)
    if not configs:
        for key, value in _attributes.get(model, {}).items():
            if value is ABSENT:
                model.__dict__.pop(key, None)
            else:
                model.__dict__[key] = value
        _attributes.pop(model, None)


def _delete(layer: Any, name: str) -> None:
    """What PEFT's delete_adapter does, which also activates another adapter, and makes it trainable."""
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
        held = getattr(layer, attribute)
        if name in held:
            del held[name]
    forget_left(layer, name)


def _is_free(layer: Any) -> bool:
    """Whether neither the layer nor one within it, around the same base layer, has any adapter."""
    while hasattr(layer, "_get_available_adapters"):
        if layer._get_available_adapters():
            return False
        layer = layer.base_layer
    return True
