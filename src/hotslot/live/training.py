"""What a model's training keeps beside its parameters."""

from __future__ import annotations

from collections.abc import Iterable

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
