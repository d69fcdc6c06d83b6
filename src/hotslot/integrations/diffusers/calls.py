"""What takes the place of diffusers' calls, of pipelines and of models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from ... import live
from ...checkpoint import Checkpoint
from ...pipelines import read, whole
from ...swapper import Swapper
from .swapping import (
    adapter_names_on,
    apart,
    complain_if_compiled,
    forget,
    make_room,
    models_of,
    of_reading,
    offloaded_again,
    refuse_unknown,
    remember,
    rooms,
    swap,
    take_mode,
)

Run = Callable[[], Any]  # diffusers' own call
Instead = Callable[[Any, Run, dict[str, Any]], Any]  # (pipeline or model, diffusers' own call, its arguments by name)


# -- calls of pipelines -----------------------------------------------------------------------------------------------


def _load(pipe: Any, run: Run, given: dict[str, Any]) -> Any:
    """`load_lora_weights`: one swap with `hotswap`; else diffusers' own, then room for what is to come."""
    source, adapter_name = given.pop("pretrained_model_name_or_path_or_dict"), given.pop("adapter_name", None)
    models, to_second = models_of(pipe), given.get("load_into_transformer_2", False)
    if given.pop("hotswap", False):
        refuse_unknown(adapter_name, models)
        kept = {name for name, model in models.items() if adapter_name in apart.get(model, ())}
        if to_second:
            kept = models.keys() - {"transformer_2"}
        with offloaded_again(pipe):
            return swap(pipe, read(whole(pipe), source, **of_reading(given)), adapter_name, kept)
    room, known = next(filter(None, map(rooms.get, models.values())), None), adapter_names_on(models)
    complain_if_compiled(pipe, room)
    _note_norms(models)
    result = run()
    added = {adapter_name} if adapter_name is not None else adapter_names_on(models) - known
    _note_norms(models, added)
    for name in added:
        if to_second:
            apart.setdefault(models["transformer_2"], set()).add(name)
        else:
            _load_second_transformer(pipe, source, name, given)
        make_room(pipe, name, room)
    return result


def _note_norms(models: Mapping[str, nn.Module], adapter_names: Collection[str] | None = None) -> None:
    for model in models.values():
        live.note_norms(model, adapter_names)


def _load_second_transformer(pipe: Any, source: Any, adapter_name: str, options: Mapping[str, Any]) -> None:
    """Load what diffusers leaves out of a file for both of Wan 2.2's transformers."""
    model: Any = models_of(pipe).get("transformer_2")
    if model is None or adapter_name in adapter_names_on({"": model}):
        return
    source = dict(source) if isinstance(source, dict) else source
    tensors, metadata = pipe.lora_state_dict(source, return_lora_metadata=True, **of_reading(options))
    if any(key.startswith("transformer_2.") for key in tensors):
        options = {"adapter_name": adapter_name, "metadata": metadata, "_pipeline": pipe}
        model.load_lora_adapter(tensors, prefix="transformer_2", **options)


def _enable(pipe: Any, run: Run, given: dict[str, Any]) -> None:
    """`enable_lora_hotswap`: diffusers checks; hotslot remembers it, for every adapter and the text encoders too."""
    run()
    models = models_of(pipe)
    for model in models.values():
        remember(model, given)
    for name in adapter_names_on(models):
        make_room(pipe, name, next(iter(map(rooms.get, models.values()))))


def _unload(pipe: Any, run: Run, given: dict[str, Any]) -> Any:
    """`unload_lora_weights`: hotslot keeps nothing of layers that diffusers has taken out."""
    names = adapter_names_on(models_of(pipe))
    with live.seen_to():
        result = run()
    forget(pipe, names)
    return result


def _delete(pipe: Any, run: Run, given: dict[str, Any]) -> Any:
    """`delete_adapters`: likewise."""
    names = given["adapter_names"]
    with live.seen_to():
        result = run()
    forget(pipe, [names] if isinstance(names, str) else names)
    return result


def _activate(pipe: Any, run: Run, given: dict[str, Any]) -> None:
    """`set_adapters` and the like: PEFT makes what is active trainable; it stays as it is in compiled models."""
    compiled = [model for name, model in models_of(pipe).items() if live.is_compiled(getattr(pipe, name))]
    flags = [(param, param.requires_grad) for model in compiled for param in model.parameters()]
    run()
    for param, flag in flags:
        param.requires_grad_(flag)


OF_PIPELINES: dict[str, Instead | None] = {
    "load_lora_weights": _load,
    "enable_lora_hotswap": _enable,
    "unload_lora_weights": _unload,
    "delete_adapters": _delete,
    "set_adapters": _activate,
    "fuse_lora": None,
    "unfuse_lora": None,
    "disable_lora": _activate,
    "enable_lora": _activate,
    "get_list_adapters": None,
    "get_active_adapters": None,
    "set_lora_device": None,
}


# -- calls of models --------------------------------------------------------------------------------------------------


def _load_one(model: Any, run: Run, given: dict[str, Any]) -> Any:
    """`load_lora_adapter`: one swap with `hotswap`; else diffusers' own, then room for what is to come."""
    adapter_name, pipe, alone = given.pop("adapter_name", None), given.pop("_pipeline", None), _Alone(model)
    if given.pop("hotswap", False):
        refuse_unknown(adapter_name, models_of(alone))
        source = given.pop("pretrained_model_name_or_path_or_dict")
        options = {"prefix": "transformer"} | of_reading(given)
        return _swap_one(alone, read(whole(alone), source, **options), adapter_name)
    room, known = rooms.get(model) if pipe is None else None, adapter_names_on(models_of(alone))
    complain_if_compiled(alone, room)
    result = run()
    take_mode(model)
    for name in adapter_names_on(models_of(alone)) - known:
        make_room(alone, name, room)
    return result


def _enable_one(model: Any, run: Run, given: dict[str, Any]) -> None:
    """`enable_lora_hotswap`: diffusers checks, hotslot remembers it."""
    run()
    remember(model, given)


OF_MODELS: dict[str, Instead | None] = {"load_lora_adapter": _load_one, "enable_lora_hotswap": _enable_one}


class _Alone:
    """A model as a pipeline of nothing else."""

    _lora_loadable_modules = ("model",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def load_lora_weights(self, source: Any, *, adapter_name: str | None = None, **options: Any) -> None:
        """As a pipeline's."""
        model: Any = self.model
        tensors, alphas, metadata = self.lora_state_dict(source, **options)
        options = {"adapter_name": adapter_name, "network_alphas": alphas, "metadata": metadata}
        model.load_lora_adapter(tensors, prefix="model", **options)

    @staticmethod
    def lora_state_dict(
        source: Any,
        *,
        prefix: str | None = None,
        network_alphas: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        **hub: Any,
    ) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]:
        """As a pipeline's: tensors, alphas and metadata of what stands under `prefix`."""
        from diffusers.loaders import lora_base

        fetch: Any = lora_base._fetch_state_dict
        required = inspect.signature(fetch).parameters
        stated = dict.fromkeys(required) | {"allow_pickle": False, "return_file_metadata": False, "metadata": metadata}
        tensors, found = fetch(**stated | {"pretrained_model_name_or_path_or_dict": source} | hub)
        start = "" if prefix is None else f"{prefix}."

        def own(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
            if values is None:
                return None
            return {f"model.{key.removeprefix(start)}": value for key, value in values.items() if key.startswith(start)}

        return own(tensors) or {}, own(network_alphas), own(found)


def _swap_one(alone: _Alone, checkpoint: Checkpoint, adapter_name: str) -> None:
    """`swap`; of a component whose pipeline has a swapper by that, which leaves the others what they have."""
    known = Swapper.of(alone.model, adapter_name)
    if known is None or len(members := live.roots(known.engine.model)) == 1:
        return swap(alone, checkpoint, adapter_name, ())
    name = next(prefix for prefix, member in members.items() if member is alone.model).removesuffix(".")
    tensors = {key.replace("model", name, 1): checkpoint.tensor(key) for key in checkpoint.tensors}
    configs = {name: checkpoint.config["components"]["model"]}
    kept = {prefix.removesuffix(".") for prefix in members} - {name}
    swap(known.engine.model, read(known.engine.model, tensors, config=configs), adapter_name, kept)
