"""One swap of all components of a pipeline, in slots of adapters that diffusers has loaded; and room for it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ... import live
from ...checkpoint import Checkpoint, from_tensors
from ...errors import DoesNotFitError, UnsupportedError
from ...pipelines import read, whole
from ...planning import plan
from ...swapper import Swapper
from .exchanging import attach_own, can_exchange, exchange, methods_of, methods_on, widen


class Room(NamedTuple):
    """What `enable_lora_hotswap` was told."""

    target_rank: int
    check_compiled: str


rooms: weakref.WeakKeyDictionary[nn.Module, Room] = weakref.WeakKeyDictionary()  # for adapters that a model is to get
# Names of adapters that a second transformer has from a file of its own: swapping the first leaves it alone.
apart: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def swap(pipe: Any, checkpoint: Checkpoint, adapter_name: str, kept: Collection[str]) -> None:
    """Make a LoRA, or a LoKr, live in the place of an adapter that diffusers has loaded, beside what `kept` ones have.

    In its slots, or in its layers. Those are exchanged where the method is another one, or the form of LoKr's factors.
    """
    model, checkpoint = _as_known(whole(pipe), checkpoint, adapter_name)
    if kept:
        checkpoint = _beside(model, checkpoint, adapter_name, kept)
    found, wanted = methods_on(model, adapter_name), methods_of(checkpoint)
    other = next((prefix for prefix, method in found.items() if method != "LORA"), None)
    held = live.roots(model)[other] if other is not None else model
    swapper = Swapper.of(held, adapter_name)
    made = None
    if swapper is None or not swapper.engine.is_current():
        live.refuse_merged(model, adapter_name)
        swapper = made = attach_own(held, adapter_name)
    try:
        room = _target_rank(model)
        if can_exchange(swapper) and (found != wanted if other is not None else {*wanted.values()} != {"LORA"}):
            exchange(swapper, model, checkpoint, adapter_name, room)
            return
        try:
            _load_growing(swapper, adapter_name, _part(checkpoint, other))
        except (DoesNotFitError, UnsupportedError):
            if other is None or not can_exchange(swapper):
                raise
            exchange(swapper, model, checkpoint, adapter_name, room)
        else:
            swapper.activate(adapter_name)
    except BaseException:
        if made is not None and not made.detached:
            made.detach()
        raise


def _as_known(model: nn.Module, checkpoint: Checkpoint, adapter_name: str) -> tuple[nn.Module, Checkpoint]:
    """The same, in the words of whoever writes the adapter: one model by itself is called otherwise than in a pipe."""
    members = live.roots(model)
    known = next(filter(None, (Swapper.of(member, adapter_name) for member in members.values())), None)
    own = {id(member): prefix for prefix, member in live.roots(known.engine.model).items()} if known else {}
    names = {prefix: own.get(id(member)) for prefix, member in members.items()}
    if known is None or {*names.values()} != {*own.values()} or "" in own.values() or names == {n: n for n in names}:
        return model, checkpoint

    def renamed(name: str) -> str:
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        return f"{names[prefix]}{name.removeprefix(prefix)}"

    config = dict(checkpoint.config)
    config["components"] = {renamed(f"{name}.")[:-1]: part for name, part in config["components"].items()}
    if "base_values" in config:
        config["base_values"] = [*map(renamed, config["base_values"])]
    tensors = {renamed(name): checkpoint.tensor(name) for name in checkpoint.tensors}
    return known.engine.model, from_tensors(tensors, config, origin=checkpoint.origin)


def _part(checkpoint: Checkpoint, prefix: str | None) -> Checkpoint:
    """What is for the component whose paths begin so; all of it if None."""
    if prefix is None:
        return checkpoint
    parts = checkpoint.components
    if parts.keys() != {prefix}:
        raise UnsupportedError(
            f"{checkpoint.origin} is for other components than the one that has the adapter.",
            where=", ".join(part.removesuffix(".") for part in parts),
            found=f"{len(parts)} components",
            expected=f"{prefix.removesuffix('.')} alone, to which a Swapper was attached",
            hint="detach that Swapper",
        )
    return parts[prefix]


def _target_rank(model: nn.Module) -> int | None:
    """What `enable_lora_hotswap` was told, for whichever component."""
    told = (rooms.get(member) for member in live.roots(model).values())
    return next((room.target_rank for room in told if room is not None), None)


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
    if live.is_compiled(model):
        widen(attach_own(model, adapter_name), room.target_rank)
    else:
        planned = plan(model, max_rank=room.target_rank, adapter_name=adapter_name)
        attach_own(model, adapter_name, plan=planned)


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
