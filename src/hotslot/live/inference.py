"""Tensors that were made in `torch.inference_mode()`: they count no versions, and may not be written outside of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import ModelError


def make_normal(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Let these, of an adapter that was loaded in inference mode, be normal ones: the same objects, with other memory.

    Args:
        tensors: (where, tensor), inference tensors or not.

    Raises:
        ModelError: something holds on to one of them, as compiled code does.
    """
    for where, tensor in tensors:
        if not tensor.is_inference():
            continue
        with torch.inference_mode(False):
            normal = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                normal = nn.Parameter(normal, requires_grad=tensor.requires_grad)
        normal.__dict__.update(tensor.__dict__)
        try:
            torch.utils.swap_tensors(tensor, normal)
        except RuntimeError as error:
            raise ModelError(
                "The adapter on the model was loaded in inference mode, and something holds on to its tensors.",
                where=where,
                found=f"an inference tensor ({error})",
                expected="tensors that were made outside of torch.inference_mode()",
                hint="load the adapter under torch.no_grad() instead, or attach before torch.compile",
            ) from error


def refuse_inference(where: str, tensor: torch.Tensor, fate: str) -> None:
    """Raise if a tensor of the base model, whose `fate` is to be written, is an inference tensor."""
    if tensor.is_inference():
        raise ModelError(
            f"The model's weights were made in inference mode, and cannot be {fate}.",
            where=where,
            found="an inference tensor",
            expected="weights that may be written",
            hint="build the model outside of torch.inference_mode(); swaps may be within it",
        )


def set_requires_grad(param: nn.Parameter, flag: bool) -> None:
    """`param.requires_grad_(flag)`, which torch allows to inference tensors within inference mode alone."""
    with torch.inference_mode(param.is_inference()):
        param.requires_grad_(flag)
