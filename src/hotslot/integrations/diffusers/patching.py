"""Puts calls in the place of diffusers' own, on its two mixins and all classes derived from them, now or later."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from .calls import OF_MODELS, OF_PIPELINES, Instead
from .swapping import models_of

_patched: list[tuple[type, str, Any, Any]] = []  # (class, name, what was there or None, ours)


def patch_pipelines(lora_base: ModuleType) -> None:
    """Put hotslot's calls in the place of those of `LoraBaseMixin` and all classes derived from it, now or later."""
    _patch_all(lora_base.LoraBaseMixin, OF_PIPELINES)


def patch_models(peft: ModuleType) -> None:
    """Put hotslot's calls in the place of those of `PeftAdapterMixin` and all classes derived from it, now or later."""
    _patch_all(peft.PeftAdapterMixin, OF_MODELS)


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
    plain = {} if isinstance(pipe, nn.Module) else models_of(pipe)
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
