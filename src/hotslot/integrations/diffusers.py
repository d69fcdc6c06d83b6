"""diffusers' own LoRA calls over hotslot.

`load_lora_weights(…, hotswap=True)` of a pipeline, and `load_lora_adapter(…, hotswap=True)` of one model, are one swap
of all components, whole or not at all. The other calls are diffusers' own, and reach components that
`pipe.unet = torch.compile(pipe.unet)` has wrapped, which diffusers passes over in silence.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from .. import live
from ..attaching import attach
from ..checkpoint import Checkpoint
from ..errors import DoesNotFitError
from ..pipelines import read, whole
from ..planning import plan
from ..swapper import Swapper

Run = Callable[[], Any]  # diffusers' own call
Instead = Callable[[Any, Run, dict[str, Any]], Any]  # (pipeline or model, diffusers' own call, its arguments by name)


class _Room(NamedTuple):
    """What `enable_lora_hotswap` was told."""

    target_rank: int
    check_compiled: str


_rooms: weakref.WeakKeyDictionary[nn.Module, _Room] = weakref.WeakKeyDictionary()  # for adapters that a model is to get
# Names of adapters that a second transformer has from a file of its own: swapping the first leaves it alone.
_apart: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


# -- patching ---------------------------------------------------------------------------------------------------------

_patched: list[tuple[type, str, Any, Any]] = []  # (class, name, what was there or None, ours)


def patch_pipelines(lora_base: ModuleType) -> None:
    """Put hotslot's calls in the place of those of `LoraBaseMixin` and all classes derived from it, now or later."""
    _patch_all(lora_base.LoraBaseMixin, _OF_PIPELINES)


def patch_models(peft: ModuleType) -> None:
    """Put hotslot's calls in the place of those of `PeftAdapterMixin` and all classes derived from it, now or later."""
    _patch_all(peft.PeftAdapterMixin, _OF_MODELS)


def unpatch() -> None:
    """Give diffusers' classes their own calls back."""
    while _patched:
        cls, name, before, ours = _patched.pop()
        if cls.__dict__.get(name) is not ours:
            continue
        if before is None:
            delattr(cls, name)
        else:
            setattr(cls, name, before)


def _patch_all(mixin: Any, calls: Mapping[str, Instead | None]) -> None:
    if any(cls is mixin for cls, *_ in _patched):
        return

    def __init_subclass__(cls: Any, /, **options: Any) -> None:
        super(mixin, cls).__init_subclass__(**options)
        _patch(cls, calls)

    _put(mixin, "__init_subclass__", classmethod(__init_subclass__))
    for cls in _with_derived(mixin):
        _patch(cls, calls)


def _with_derived(cls: type) -> set[type]:
    return {cls}.union(*map(_with_derived, cls.__subclasses__()))


def _patch(cls: type, calls: Mapping[str, Instead | None]) -> None:
    for name, instead in calls.items():
        function = cls.__dict__.get(name)
        # What users have put over it goes on to diffusers' own, if to anything.
        if isinstance(function, FunctionType) and function.__module__.startswith("diffusers."):
            _put(cls, name, _call(function, instead))


def _put(cls: type, name: str, ours: Any) -> None:
    _patched.append((cls, name, cls.__dict__.get(name), ours))
    setattr(cls, name, ours)


def _call(original: FunctionType, instead: Instead | None) -> Callable[..., Any]:
    """What takes the place of diffusers' `original`, which sees components as they were before they were compiled."""

    @functools.wraps(original)
    def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
        with _uncompiled(owner) as plain:
            if instead is None:
                return original(plain, *args, **kwargs)
            bound = inspect.signature(original).bind(owner, *args, **kwargs)
            return instead(owner, functools.partial(original, plain, *args, **kwargs), _by_name(bound))

    return call


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments, but for the first."""
    _, *names = bound.arguments
    given = {name: bound.arguments[name] for name in names}
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


@contextmanager
def _uncompiled(pipe: Any) -> Iterator[Any]:
    """The pipeline with its components as they were before `torch.compile` wrapped them; a model itself."""
    plain = {} if isinstance(pipe, nn.Module) else _models(pipe)
    wrapped = {name: component for name, component in plain.items() if component is not getattr(pipe, name)}
    if not wrapped:
        yield pipe
        return
    twin = object.__new__(type(pipe))  # and not the pipeline itself, which may be running
    before = vars(pipe) | wrapped
    vars(twin).update(before)
    try:
        yield twin
    finally:  # what was set on the twin was meant for the pipeline
        for name in before.keys() - vars(twin).keys():
            del vars(pipe)[name]
        vars(pipe).update({name: value for name, value in vars(twin).items() if before.get(name, twin) is not value})


# -- calls of pipelines -----------------------------------------------------------------------------------------------


def _load(pipe: Any, run: Run, given: dict[str, Any]) -> Any:
    """`load_lora_weights`: one swap with `hotswap`; else diffusers' own, then room for what is to come."""
    source, adapter_name = given.pop("pretrained_model_name_or_path_or_dict"), given.pop("adapter_name", None)
    models, to_second = _models(pipe), given.get("load_into_transformer_2", False)
    if given.pop("hotswap", False):
        _refuse_unknown(adapter_name, models)
        kept = {name for name, model in models.items() if adapter_name in _apart.get(model, ())}
        if to_second:
            kept = models.keys() - {"transformer_2"}
        with _offloaded_again(pipe):
            return _swap(pipe, read(whole(pipe), source, **_of_reading(given)), adapter_name, kept)
    room, known = next(filter(None, map(_rooms.get, models.values())), None), _adapter_names(models)
    _complain_if_compiled(pipe, room)
    _note_norms(models)
    result = run()
    added = {adapter_name} if adapter_name is not None else _adapter_names(models) - known
    _note_norms(models, added)
    for name in added:
        if to_second:
            _apart.setdefault(models["transformer_2"], set()).add(name)
        else:
            _load_second_transformer(pipe, source, name, given)
        _make_room(pipe, name, room)
    return result


def _note_norms(models: Mapping[str, nn.Module], adapter_names: Collection[str] | None = None) -> None:
    for model in models.values():
        live.note_norms(model, adapter_names)


def _load_second_transformer(pipe: Any, source: Any, adapter_name: str, options: Mapping[str, Any]) -> None:
    """Load what diffusers leaves out of a file for both of Wan 2.2's transformers."""
    model: Any = _models(pipe).get("transformer_2")
    if model is None or adapter_name in _adapter_names({"": model}):
        return
    source = dict(source) if isinstance(source, dict) else source
    tensors, metadata = pipe.lora_state_dict(source, return_lora_metadata=True, **_of_reading(options))
    if any(key.startswith("transformer_2.") for key in tensors):
        options = {"adapter_name": adapter_name, "metadata": metadata, "_pipeline": pipe}
        model.load_lora_adapter(tensors, prefix="transformer_2", **options)


def _enable(pipe: Any, run: Run, given: dict[str, Any]) -> None:
    """`enable_lora_hotswap`: diffusers checks; hotslot remembers it, for every adapter and the text encoders too."""
    run()
    models = _models(pipe)
    for model in models.values():
        _remember(model, given)
    for name in _adapter_names(models):
        _make_room(pipe, name, next(iter(map(_rooms.get, models.values()))))


def _unload(pipe: Any, run: Run, given: dict[str, Any]) -> Any:
    """`unload_lora_weights`: hotslot keeps nothing of layers that diffusers has taken out."""
    names = _adapter_names(_models(pipe))
    result = run()
    _forget(pipe, names)
    return result


def _delete(pipe: Any, run: Run, given: dict[str, Any]) -> Any:
    """`delete_adapters`: likewise."""
    result, names = run(), given["adapter_names"]
    _forget(pipe, [names] if isinstance(names, str) else names)
    return result


_OF_PIPELINES: dict[str, Instead | None] = {
    "load_lora_weights": _load,
    "enable_lora_hotswap": _enable,
    "unload_lora_weights": _unload,
    "delete_adapters": _delete,
    "set_adapters": None,
    "fuse_lora": None,
    "unfuse_lora": None,
    "disable_lora": None,
    "enable_lora": None,
    "get_list_adapters": None,
    "get_active_adapters": None,
    "set_lora_device": None,
}


# -- calls of models --------------------------------------------------------------------------------------------------


def _load_one(model: Any, run: Run, given: dict[str, Any]) -> Any:
    """`load_lora_adapter`: one swap with `hotswap`; else diffusers' own, then room for what is to come."""
    adapter_name, pipe, alone = given.pop("adapter_name", None), given.pop("_pipeline", None), _Alone(model)
    if given.pop("hotswap", False):
        _refuse_unknown(adapter_name, _models(alone))
        source = given.pop("pretrained_model_name_or_path_or_dict")
        options = {"prefix": "transformer"} | _of_reading(given)
        return _swap_one(alone, read(whole(alone), source, **options), adapter_name)
    room, known = _rooms.get(model) if pipe is None else None, _adapter_names(_models(alone))
    _complain_if_compiled(alone, room)
    result = run()
    _take_mode(model)
    for name in _adapter_names(_models(alone)) - known:
        _make_room(alone, name, room)
    return result


def _enable_one(model: Any, run: Run, given: dict[str, Any]) -> None:
    """`enable_lora_hotswap`: diffusers checks, hotslot remembers it."""
    run()
    _remember(model, given)


_OF_MODELS: dict[str, Instead | None] = {"load_lora_adapter": _load_one, "enable_lora_hotswap": _enable_one}


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
        prefix: str | None,
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
    """`_swap`; of a component whose pipeline has a swapper by that, which leaves the others what they have."""
    known = Swapper.of(alone.model, adapter_name)
    if known is None or len(members := live.roots(known.engine.model)) == 1:
        return _swap(alone, checkpoint, adapter_name, ())
    name = next(prefix for prefix, member in members.items() if member is alone.model).removesuffix(".")
    tensors = {key.replace("model", name, 1): checkpoint.tensor(key) for key in checkpoint.tensors}
    configs = {name: checkpoint.config["components"]["model"]}
    kept = {prefix.removesuffix(".") for prefix in members} - {name}
    _swap(known.engine.model, read(known.engine.model, tensors, config=configs), adapter_name, kept)


# -- inside -----------------------------------------------------------------------------------------------------------


def _swap(pipe: Any, checkpoint: Checkpoint, adapter_name: str, kept: Collection[str]) -> None:
    """Make a LoRA live in the slots of an adapter that diffusers has loaded, beside what `kept` components have."""
    model = whole(pipe)
    if kept:
        checkpoint = _beside(model, checkpoint, adapter_name, kept)
    model, checkpoint = _of_one_method(model, checkpoint, adapter_name)
    swapper = Swapper.of(model, adapter_name)
    made = None
    if swapper is None:
        for slot in live.find_slots(model, adapter_name).values():
            slot.refuse_if_merged()
        swapper = made = attach(model, adapter_name=adapter_name, route="side")
    try:
        _load_growing(swapper, adapter_name, checkpoint)
        swapper.activate(adapter_name)
    except BaseException:
        if made is not None:
            made.detach()
        raise


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


def _make_room(pipe: Any, adapter_name: str, room: _Room | None) -> None:
    """Give the slots of an adapter that diffusers has loaded the rank that others may have."""
    model = whole(pipe)
    if room is None or Swapper.of(model, adapter_name) is not None:
        return
    for component in live.roots(model).values():
        _rooms[component] = room._replace(check_compiled="ignore")  # diffusers asks at the first adapter alone
    if not live.count_slots(model, adapter_name):  # of another method, such as LoKr
        return
    planned = plan(model, max_rank=room.target_rank, adapter_name=adapter_name)
    if not live.is_compiled(model):
        attach(model, adapter_name=adapter_name, route="side", plan=planned)
        return
    swapper = attach(model, adapter_name=adapter_name, route="side")
    engine = swapper.engine
    with engine.gate.swap(), engine.lock:  # the layers are new to compiled code: they may move
        engine.resize(planned.ranks, arena=True)


def _remember(model: nn.Module, given: Mapping[str, Any]) -> None:
    vars(model).pop("_prepare_lora_hotswap_kwargs", None)  # by which diffusers would have room made for one adapter
    _rooms[model] = _Room(given.get("target_rank", 128), given.get("check_compiled", "error"))


def _of_reading(given: Mapping[str, Any]) -> dict[str, Any]:
    """What says where the file is: not how diffusers makes layers, nor that it might be a pickle."""
    return {key: value for key, value in given.items() if key not in ("low_cpu_mem_usage", "use_safetensors")}


def _refuse_unknown(adapter_name: str | None, models: Mapping[str, nn.Module]) -> None:
    """Raise in diffusers' own words, which its callers match."""
    if adapter_name not in _adapter_names(models):
        raise ValueError(
            f"Trying to hotswap LoRA adapter '{adapter_name}' but there is no existing adapter by that name. "
            "Please choose an existing adapter name or set `hotswap=False` to prevent hotswapping."
        )


def _complain_if_compiled(pipe: Any, room: _Room | None) -> None:
    if room is None or room.check_compiled == "ignore" or not live.is_compiled(whole(pipe)):
        return
    said = "Call enable_lora_hotswap and load the first adapter *before* compiling the model"
    if room.check_compiled == "error":
        raise ValueError(said)
    warnings.warn(f"{said}: it compiles once more", stacklevel=4)


def _take_mode(model: nn.Module) -> None:
    """Dropouts of new layers work in training alone: PEFT makes them in training mode, and diffusers leaves them so."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.train(layer.get_base_layer().training)


def _forget(pipe: Any, names: Iterable[str]) -> None:
    """Let go of the slots of adapters that diffusers has taken off the components."""
    model = whole(pipe)
    for name in names:
        for part in (model, *live.roots(model).values()):
            swapper = Swapper.of(part, name)
            if swapper is not None and not swapper.engine.is_current():
                Swapper.make_way(part, name)
        for component in live.roots(model).values():
            _apart.get(component, set()).discard(name)


@contextmanager
def _offloaded_again(pipe: Any) -> Iterator[None]:
    """Offloading by groups knows tensors and layers from when it was set up: it is set up anew, whatever happens."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    try:
        yield
    finally:
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                _maybe_remove_and_reapply_group_offloading(live.unwrap(component))


def _models(pipe: Any) -> dict[str, nn.Module]:
    """Name → component that may carry LoRA, as it was before `torch.compile` wrapped it."""
    found = {name: getattr(pipe, name, None) for name in pipe._lora_loadable_modules}
    return {name: live.unwrap(component) for name, component in found.items() if isinstance(component, nn.Module)}


def _adapter_names(models: Mapping[str, nn.Module]) -> set[str]:
    return {name for model in models.values() for name in getattr(model, "peft_config", None) or {}}
