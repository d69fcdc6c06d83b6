"""One swap of all components of a pipeline, in slots of adapters that diffusers has loaded; and room for it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ... import live
from ...attaching import attach
from ...checkpoint import Checkpoint
from ...errors import DoesNotFitError
from ...pipelines import read, whole
from ...planning import Plan, plan
from ...swapper import Swapper


class Room(NamedTuple):
    """What `enable_lora_hotswap` was told."""

    target_rank: int
    check_compiled: str


rooms: weakref.WeakKeyDictionary[nn.Module, Room] = weakref.WeakKeyDictionary()  # for adapters that a model is to get
# Names of adapters that a second transformer has from a file of its own: swapping the first leaves it alone.
apart: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
_made: weakref.WeakSet[Swapper] = weakref.WeakSet()  # by these calls, and held by nobody: they yield to each other


def swap(pipe: Any, checkpoint: Checkpoint, adapter_name: str, kept: Collection[str]) -> None:
    """Make a LoRA live in the slots of an adapter that diffusers has loaded, beside what `kept` components have."""
    model = whole(pipe)
    if kept:
        checkpoint = _beside(model, checkpoint, adapter_name, kept)
    model, checkpoint = _of_one_method(model, checkpoint, adapter_name)
    swapper = Swapper.of(model, adapter_name)
    made = None
    if swapper is None or not swapper.engine.is_current():
        for slot in live.find_slots(model, adapter_name).values():
            slot.refuse_if_merged()
        swapper = made = _attach(model, adapter_name)
    try:
        _load_growing(swapper, adapter_name, checkpoint)
        swapper.activate(adapter_name)
    except BaseException:
        if made is not None:
            made.detach()
        raise


def _attach(model: nn.Module, adapter_name: str, planned: Plan | None = None) -> Swapper:
    """A swapper of all that the model has of the adapter.

    One of these calls' own, for one component, for another pipeline that shares some, or for layers that are gone, has
    to go for it.
    """
    Swapper.make_way(model, adapter_name, yielding=_made)
    swapper = attach(model, adapter_name=adapter_name, route="side", plan=planned)
    _made.add(swapper)
    return swapper


def _of_one_method(model: nn.Module, checkpoint: Checkpoint, adapter_name: str) -> tuple[nn.Module, Checkpoint]:
    """The same, or where the adapter is none of LoRA's (LoKr) the one component that has it, and what is for that."""
    parts = checkpoint.components
    for prefix, member in live.roots(model).items():
        if live.residents(member).get(adapter_name, "LORA") != "LORA" and parts.keys() == {prefix}:
            return member, parts[prefix]
    return model, checkpoint


def _load_growing(swapper: Swapper, adapter_name: str, checkpoint: Checkpoint) -> None:
    try:
        swapper.load(adapter_name, checkpoint)
    except DoesNotFitError as error:
        if error.plan is None:
            raise
        swapper.grow(error.plan)
        swapper.load(adapter_name, checkpoint)


def _beside(model: nn.Module, checkpoint: Checkpoint, adapter_name: str, kept: Collection[str]) -> Checkpoint:
    """The same, and what the `kept` components have now."""
    from peft import get_peft_model_state_dict

    tensors = {key: checkpoint.tensor(key) for key in checkpoint.tensors}
    configs = dict(checkpoint.config["components"])
    for prefix, member in live.roots(model).items():
        name, config = prefix.removesuffix("."), (getattr(member, "peft_config", None) or {}).get(adapter_name)
        if name not in kept or name in configs or config is None:
            continue
        configs[name] = config
        live_now = get_peft_model_state_dict(member, adapter_name=adapter_name, save_embedding_layers=False)
        tensors |= {f"{prefix}{key}": tensor for key, tensor in live_now.items()}
    return read(model, tensors, config=configs)


def make_room(pipe: Any, adapter_name: str, room: Room | None) -> None:
    """Give the slots of an adapter that diffusers has loaded the rank that others may have."""
    model = whole(pipe)
    if room is None or Swapper.of(model, adapter_name) is not None:
        return
    for component in live.roots(model).values():
        rooms[component] = room._replace(check_compiled="ignore")  # diffusers asks at the first adapter alone
    if not live.count_slots(model, adapter_name):  # of another method, such as LoKr
        return
    planned = plan(model, max_rank=room.target_rank, adapter_name=adapter_name)
    if not live.is_compiled(model):
        _attach(model, adapter_name, planned)
        return
    engine = _attach(model, adapter_name).engine
    with engine.gate.swap(), engine.lock:  # the layers are new to compiled code: they may move
        engine.resize(planned.ranks, arena=True)


def remember(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Keep what `enable_lora_hotswap` was told, and not diffusers' own note of it."""
    vars(model).pop("_prepare_lora_hotswap_kwargs", None)  # by which diffusers would have room made for one adapter
    rooms[model] = Room(given.get("target_rank", 128), given.get("check_compiled", "error"))


def of_reading(given: Mapping[str, Any]) -> dict[str, Any]:
    """What says where the file is: not how diffusers makes layers, nor that it might be a pickle."""
    return {key: value for key, value in given.items() if key not in ("low_cpu_mem_usage", "use_safetensors")}


def refuse_unknown(adapter_name: str | None, models: Mapping[str, nn.Module]) -> None:
    """Raise in diffusers' own words, which its callers match."""
    if adapter_name not in adapter_names_on(models):
        raise ValueError(
            f"Trying to hotswap LoRA adapter '{adapter_name}' but there is no existing adapter by that name. "
            "Please choose an existing adapter name or set `hotswap=False` to prevent hotswapping."
        )


def complain_if_compiled(pipe: Any, room: Room | None) -> None:
    """Raise, or warn, if `room` comes too late to spare a compilation."""
    if room is None or room.check_compiled == "ignore" or not live.is_compiled(whole(pipe)):
        return
    said = "Call enable_lora_hotswap and load the first adapter *before* compiling the model"
    if room.check_compiled == "error":
        raise ValueError(said)
    warnings.warn(f"{said}: it compiles once more", stacklevel=4)


def take_mode(model: nn.Module) -> None:
    """Dropouts of new layers work in training alone: PEFT makes them in training mode, and diffusers leaves them so."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.train(layer.get_base_layer().training)


def forget(pipe: Any, names: Iterable[str]) -> None:
    """Let go of the slots of adapters that diffusers has taken off the components."""
    model = whole(pipe)
    for name in names:
        for part in (model, *live.roots(model).values()):
            swapper = Swapper.of(part, name)
            if swapper is not None and not swapper.engine.is_current():
                Swapper.make_way(part, name)
        for component in live.roots(model).values():
            apart.get(component, set()).discard(name)


@contextmanager
def offloaded_again(pipe: Any) -> Iterator[None]:
    """Offloading by groups knows tensors and layers from when it was set up: it is set up anew, whatever happens."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    try:
        yield
    finally:
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                _maybe_remove_and_reapply_group_offloading(live.unwrap(component))


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """Name → component that may carry LoRA, as it was before `torch.compile` wrapped it."""
    found = {name: getattr(pipe, name, None) for name in pipe._lora_loadable_modules}
    return {name: live.unwrap(component) for name, component in found.items() if isinstance(component, nn.Module)}


def adapter_names_on(models: Mapping[str, nn.Module]) -> set[str]:
    """Names of the adapters that any of them has."""
    return {name for model in models.values() for name in getattr(model, "peft_config", None) or {}}
