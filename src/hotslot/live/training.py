"""What a model's training keeps beside its parameters, and what of a slot it is to leave alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ModelError


def refuse_padding_while_training(params: Iterable[nn.Parameter]) -> None:
    """Raise if one of these parameters, whose shapes are to change, has a gradient or an optimizer's state."""
    changing = list(params)
    if not changing:
        return
    in_optimizer = _held_by_optimizers() if any(param.requires_grad for param in changing) else set()
    for param in changing:
        if param.grad is not None or id(param) in in_optimizer:
            raise ModelError(
                "A parameter in training cannot be padded: its gradient and optimizer state have its old shape.",
                found=f"a parameter of shape {tuple(param.shape)} with "
                + ("a gradient" if param.grad is not None else "an optimizer"),
                expected="a parameter without gradient that no optimizer holds state for",
                hint="attach or prepare before training, or drop the gradients and make the optimizer afterwards",
            )


def _held_by_optimizers() -> set[int]:
    """Ids of the parameters for which any optimizer of this process keeps state."""
    import gc

    optimizers = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
    return {id(param) for optimizer in optimizers for param in optimizer.state}


_KEY = "hotslot"  # among a Parameter's hooks


class Mute:
    """Lets Parameters that not every adapter has get a gradient of zero while the live one does not have them.

    Else an optimizer would train what nobody saves, and its gradient would count where the norm of all is clipped. By
    hooks that read a tensor, for compiled code and captured graphs to stay as they are. Copies and pickles of whoever
    holds this have hooks of their own.

    Args:
        params: of one device.
        in_use: whether the live adapter has them.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, in_use: bool) -> None:
        self._params = list(params)
        with torch.inference_mode(False):
            self._in_use = torch.tensor(in_use, device=self._params[0].device)

    def install(self, undo: list[Callable[[], object]]) -> None:
        """Begin; `undo` gets what ends it, to be called from its end."""
        for param in self._params:
            hooks: Any = param._backward_hooks or {}
            undo.append(partial(_hook, param, hooks.get(_KEY)))
            _hook(param, _Masked(self._in_use))

    def use(self, in_use: bool) -> None:
        """Say whether the live adapter has them."""
        with torch.inference_mode(False), torch.no_grad():
            self._in_use.data = self._in_use.data.to(self._params[0].device)  # they may have moved
            self._in_use.fill_(in_use)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.install([])


class _Masked:
    """What Mute registers. It does not know the Parameter, which would keep itself alive."""

    def __init__(self, in_use: torch.Tensor) -> None:
        self._in_use = in_use

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        in_use = self._in_use.to(gradient.device)  # where it is, but between `model.to(…)` and the next swap
        if gradient.is_sparse:
            return gradient * in_use
        return torch.where(in_use, gradient, 0.0)  # a product would keep what is not finite


def _hook(param: nn.Parameter, hook: _Masked | None) -> None:
    """Set or take off the hook, as `register_hook` does it, which refuses a Parameter that is frozen meanwhile."""
    hooks: Any = param._backward_hooks if param._backward_hooks is not None else OrderedDict()
    if hook is not None:
        hooks[_KEY] = hook
    else:
        hooks.pop(_KEY, None)
    param._backward_hooks = hooks
