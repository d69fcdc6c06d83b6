"""Makes each forward pass of a model hold a lease: around its calls, outside of what torch.compile traces."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from ..leases import Gate, Lease, Turn
from .discover import callable_roots
from .streams import note_stream

# nn.Module.__call__ looks both up on the instance: the first where `module.compile()` has set it, else the second.
_COMPILED, _PLAIN = "_compiled_call_impl", "_call_impl"


class _Guard:
    """Stands in a module's `__dict__` for one of the two, and calls it under a lease.

    Not a hook: a pre-hook that raises leaves the other hooks out, dynamo traces hooks in place of running them, and
    has no guard that would notice one that came later.

    Attributes:
        owners: slots whose swappers want it there; it goes with the last of them.
    """

    __slots__ = ("_attribute", "_call", "_gate", "_is_method", "_module", "owners", "was")

    # `module.compile()` hands `_call_impl` to torch.compile, which takes a function of this name as it is; any other
    # it would trace from outside, the lease with it.
    __name__ = _PLAIN
    __code__: CodeType

    def __init__(self, gate: Gate, module: nn.Module, attribute: str) -> None:
        self.owners: set[str] = set()
        self.was = module.__dict__.get(attribute)
        self._gate = gate
        self._attribute = attribute
        # Held strongly, in a bound method or otherwise, the module would be part of a cycle, and its memory would wait
        # for the garbage collector.
        self._module = weakref.ref(module)
        call: Any = getattr(module, attribute)
        self._is_method = getattr(call, "__self__", None) is module
        self._call: Callable[..., Any] = call.__func__ if self._is_method else call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_method:
            args = (self._module(), *args)
        # Within a function that was compiled around the model there is no place to wait. Without an owner it is a
        # remnant: `module.compile()` was handed it.
        if torch.compiler.is_compiling() or not self.owners:
            return self._call(*args, **kwargs)
        lease = self._gate.enter()
        note_stream(self._gate)
        try:
            return self._call(*args, **kwargs)
        finally:
            self._gate.leave(lease)

    def __reduce__(self) -> Any:
        # A copy or pickle of the model is not guarded: it gets its own class's method.
        return getattr, (self._module(), self._attribute)


_Guard.__code__ = _Guard.__call__.__code__

# Dynamo goes past these frames to those that they call, and compiles what it would without them.
for _function in (_Guard.__call__, note_stream, *vars(Gate).values(), Lease.__init__, Turn.__init__):
    if isinstance(_function, FunctionType):
        torch._dynamo.eval_frame.skip_code(_function.__code__)


def guard(model: nn.Module, gate: Gate, owner: str) -> None:
    """Guard the calls of the model, of the PeftModel around it, and of the base model within; for `owner`.

    May be repeated. Not to be called by two threads at once, nor beside `unguard`.
    """
    for module in callable_roots(model):
        for attribute in (_COMPILED, _PLAIN):
            present = module.__dict__.get(attribute)
            if present is None and attribute == _COMPILED:
                continue
            if not isinstance(present, _Guard):
                present = _Guard(gate, module, attribute)
                module.__dict__[attribute] = present
            present.owners.add(owner)


def is_guarded(model: nn.Module, owner: str) -> bool:
    """Whether `guard` was called for `owner`."""
    found = [module.__dict__.get(_PLAIN) for module in callable_roots(model)]
    return any(isinstance(present, _Guard) and owner in present.owners for present in found)


def unguard(model: nn.Module, owner: str) -> None:
    """Undo `guard`, unless another owner wants it. May be repeated."""
    for module in callable_roots(model):
        for attribute in (_COMPILED, _PLAIN):
            present = module.__dict__.get(attribute)
            if isinstance(present, _Guard):
                present.owners.discard(owner)
                if not present.owners and present.was is not None:
                    module.__dict__[attribute] = present.was
                elif not present.owners:
                    del module.__dict__[attribute]
