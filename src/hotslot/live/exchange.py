"""PEFT's layers taken off a model whole, and an adapter's of any method put on, as a fresh load makes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoint import PEFT_PREFIX, Checkpoint
from ..errors import MergedError, ModelError, UnexpectedTargetError, UnsupportedError
from .calls import calls_of
from .discover import canonical_name
from .offloading import refuse_offloaded
from .photo import Photo
from .skeleton import outline
from .state import build_config

_OF_PEFT = ("peft_config", "_hf_peft_config_loaded")  # attributes of a model that has adapters


@contextmanager
def taken_off(models: Iterable[nn.Module], adapter_name: str) -> Iterator[Callable[[], None]]:
    """For a block that puts other layers on: the models without any of PEFT's, of which they have one adapter's alone.

    The base layers stay the same objects. If the block raises, the same layers, configs and flags are back in place.

    Args:
        models: each keeps PEFT's configs of its own.
        adapter_name: PEFT's name of the adapter; a model may have none.

    Yields:
        Call it when others are on, and they are disabled on those models where the ones taken off were.

    Raises:
        MergedError: it is merged into the base weights.
        ModelError: layers that were compiled by themselves; compiled code would go on with the ones taken off.
        UnsupportedError: another adapter, whose layers these may share.
    """
    models = [*models]
    for model in models:
        _refuse_others(model, adapter_name)
        refuse_merged(model, adapter_name)
        _refuse_compiled_layers(model)
    photos: list[Photo] = []
    disabled = [model for model in models if any(layer.disable_adapters for layer in _layers(model))]
    try:
        for model in models:
            photos.append(Photo(model))
            _take_off(model)
        yield partial(_disable, disabled)
    except BaseException:
        for photo in photos:
            photo.put_back()
        raise


def put_on(model: nn.Module, adapter_name: str, checkpoint: Checkpoint) -> None:
    """Make PEFT's layers of an adapter on a model that has none, fill and activate them.

    Call `refuse_put_on` before. The base model's own tensors and flags stay as they are. If it raises, layers may be
    left; `taken_off` takes them away.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    config: Any = build_config(checkpoint, as_trained=True)
    config.inference_mode = True
    tensors = {name.removeprefix(PEFT_PREFIX): checkpoint.tensor(name) for name in checkpoint.tensors}
    flags = [(param, param.requires_grad) for param in model.parameters()]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # advice to whoever trains
        inject_adapter_in_model(config, model, adapter_name, state_dict=tensors)
        _widen({id(param) for param, _ in flags}, model)
        filled: Any = set_peft_model_state_dict(model, tensors, adapter_name)
    assert not filled.unexpected_keys
    for param, flag in flags:
        param.requires_grad_(flag)
    for layer in _layers(model):
        layer.train(layer.get_base_layer().training)
    vars(model)["_hf_peft_config_loaded"] = True  # diffusers and transformers ask it


def refuse_put_on(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise if `put_on` would, as far as can be known with nothing touched: on a copy without memory.

    Raises:
        ConfigError, DoesNotFitError, TensorError, UnsupportedError: PEFT does not load it onto this model.
        ModelError: the model's weights are elsewhere.
    """
    paths = {canonical_name(name, "").replace(".base_layer", "") for name, _ in model.named_modules()}
    targets = checkpoint.config.get("target_modules") or ()
    missing = [target for target in targets if target not in paths]
    if missing:
        raise UnexpectedTargetError(
            f"{checkpoint.origin} targets modules that the model does not have.",
            where=", ".join(missing[:8]),
            found=f"{len(missing)} of {len(targets)} targets missing in {type(model).__name__}",
            expected="modules of the model as it is",
            hint="if they are projections that diffusers fuses: pipe.unload_lora_weights(), and load without hotswap",
        )
    if any(param.is_meta for param in model.parameters()):
        refuse_offloaded(model)
    outline(model, checkpoint)


def _disable(models: Iterable[nn.Module]) -> None:
    for model in models:
        for layer in _layers(model):
            layer._disable_adapters = True


def carries(model: nn.Module, adapter_name: str) -> bool:
    """Whether any of PEFT's layers on the model has this adapter, live or not."""
    return any(adapter_name in layer._get_available_adapters() for layer in _layers(model))


def refuse_merged(model: nn.Module, adapter_name: str) -> None:
    """Raise if the adapter, of whatever method, is merged into the base weights."""
    for name, layer in _named_layers(model):
        if adapter_name in layer.merged_adapters:
            raise MergedError(
                f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights.",
                where=name,
                hint=f"unmerge it first: {calls_of(model).unmerge}",
            )


def _layers(model: nn.Module) -> Iterator[Any]:
    return (layer for _, layer in _named_layers(model))


def _widen(known: Container[int], model: nn.Module) -> None:
    """Let new tensors be of float32 where PEFT has made them of 8 bits, as the base is stored: nothing computes so."""
    for param in model.parameters():
        if id(param) not in known and param.is_floating_point() and param.itemsize == 1:
            param.data = param.data.float()


def _named_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of each of PEFT's, of whatever method."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _take_off(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in [*model.modules()]:
        siblings: dict[str, Any] = module._modules
        for name, child in siblings.items():
            if isinstance(child, BaseTunerLayer):
                siblings[name] = child.get_base_layer()
            elif isinstance(child, AuxiliaryTrainingWrapper):
                siblings[name] = child.original_module
    for attribute in _OF_PEFT:
        vars(model).pop(attribute, None)


def _refuse_others(model: nn.Module, adapter_name: str) -> None:
    others = sorted({*(getattr(model, "peft_config", None) or {})} - {adapter_name})
    if others:
        raise UnsupportedError(
            f"The adapter {adapter_name!r} cannot make way for one of another method, or form, beside another adapter.",
            where=type(model).__name__,
            found=f"{', '.join(map(repr, others))} on the same model",
            expected=f"{adapter_name!r} alone: PEFT would put the layers of the one method around those of the other, "
            "whose tensors it would save under names that no model has",
            hint="delete the others; or delete this one, and load without hotswap",
        )


def _refuse_compiled_layers(model: nn.Module) -> None:
    for name, _ in _named_layers(model):
        parent, _, child = name.rpartition(".")
        if child == "_orig_mod":
            raise ModelError(
                "A layer of the adapter was compiled by itself, and would go on running when another has its place.",
                where=parent,
                found="a layer wrapped by torch.compile",
                expected="layers that are not wrapped; the model or its blocks may be",
                hint="pipe.delete_adapters(…), load without hotswap, and compile again",
            )
