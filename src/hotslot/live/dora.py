"""DoRA (https://arxiv.org/abs/2402.09353) in a slot that plain LoRA may use as well.

PEFT's layer multiplies by magnitude / norm(W + scaling B A) and works the norm out at each forward. Plain LoRA is the
same with a factor of 1. No stored magnitude gives exactly that, for compiled code rounds the norm otherwise; so while
the slot is not used for DoRA the norm is replaced by the magnitude itself, 1, and 1 / 1 is 1 everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import variants
from peft.tuners.lora.dora import (
    DoraConv1dLayer,
    DoraConv2dLayer,
    DoraConv3dLayer,
    DoraEmbeddingLayer,
    DoraLinearLayer,
)
from torch import nn
from torch.nn import functional as F

from ..errors import ModelError, UnsupportedError
from .quantised import dense_weight, is_dense

if TYPE_CHECKING:
    from .slots import Slot


class _InUse:
    """What all layers of DoRA in a slot have in common.

    Attributes:
        in_use: 0-dim tensor, 1.0 while the live adapter is a DoRA here, else 0.0. Compiled code reads it anew.
        displaced: the layer's variant before it was given a magnitude: MiCA's, or None.
    """

    in_use: torch.Tensor
    displaced: Any
    weight: nn.Parameter

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: Any, adapter_name: str | None = None
    ) -> torch.Tensor:
        """PEFT's norm; the magnitude, in its place, while the slot is not used for DoRA."""
        # Not as a Parameter: of a transposed one PEFT makes another Parameter, which dynamo cannot trace.
        norm: torch.Tensor = super().get_weight_norm(weight.detach(), lora_weight, scaling)  # type: ignore[misc]
        return torch.where(self.in_use > 0, norm, self.weight)

    def _cache_store(self, key: str, value: Any) -> None:
        """Nothing: what PEFT would keep of one adapter is wrong for the next."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle is a layer of its own, with no arena behind it.
        return {**self.__dict__, "in_use": self.in_use.detach().clone()}


class SlotDoraLinear(_InUse, DoraLinearLayer):
    """PEFT's DoRA on a linear layer."""

    def forward(
        self, x: torch.Tensor, *, lora_A: Any, lora_B: Any, scaling: Any, base_layer: Any, **kwargs: Any
    ) -> torch.Tensor:
        """What is to be added to the base layer's result, as PEFT works it out (section 4.3 of the paper).

        PEFT asks here whether the base layer is quantised, in a way that dynamo cannot trace: each linear layer with
        DoRA breaks the graph. So that is asked only if it may be.
        """
        base_result, bias = kwargs.get("base_result"), base_layer.bias
        dense = self.fan_in_fan_out or is_dense(base_layer)
        weight = (base_layer.weight if dense else dense_weight(base_layer)).to(x.dtype)
        delta = self.get_lora_weight(lora_A=lora_A, lora_B=lora_B).to(x.dtype)
        norm = self.get_weight_norm(weight=weight, lora_weight=delta.detach(), scaling=scaling)
        gain = (self.weight / norm.detach()).view(1, -1)
        if base_result is None:
            base_result = F.linear(x, weight.T if self.fan_in_fan_out else weight)
        elif bias is not None:
            base_result = base_result - bias
        result: torch.Tensor = (gain - 1) * base_result + gain * lora_B(lora_A(x)) * scaling
        return result


class SlotDoraEmbedding(_InUse, DoraEmbeddingLayer):
    """PEFT's DoRA on an embedding."""


class SlotDoraConv1d(_InUse, DoraConv1dLayer):
    """PEFT's DoRA on a one-dimensional convolution."""


class SlotDoraConv2d(_InUse, DoraConv2dLayer):
    """PEFT's DoRA on a two-dimensional convolution."""


class SlotDoraConv3d(_InUse, DoraConv3dLayer):
    """PEFT's DoRA on a three-dimensional convolution."""


_SLOT_CLASSES: dict[type[nn.Module], type[Any]] = {
    DoraLinearLayer: SlotDoraLinear,
    DoraEmbeddingLayer: SlotDoraEmbedding,
    DoraConv1dLayer: SlotDoraConv1d,
    DoraConv2dLayer: SlotDoraConv2d,
    DoraConv3dLayer: SlotDoraConv3d,
}
_OF_VARIANT: dict[type[Any], type[Any]] = {
    variants.DoraLinearVariant: SlotDoraLinear,
    variants.DoraEmbeddingVariant: SlotDoraEmbedding,
    variants.DoraConv1dVariant: SlotDoraConv1d,
    variants.DoraConv2dVariant: SlotDoraConv2d,
    variants.DoraConv3dVariant: SlotDoraConv3d,
}


# Forward and merge are plain LoRA's; PEFT freezes B when it makes the layer.
_PLAIN = (type(None), variants.MiCALinearVariant, variants.MiCAEmbeddingVariant)


def is_plain_or_dora(variant: Any) -> bool:
    """Whether a PEFT layer of this variant (None: of none) runs as plain LoRA or as DoRA, and nothing else."""
    return isinstance(variant, _PLAIN) or type(variant) in _OF_VARIANT


def is_peft_dora(module: nn.Module) -> bool:
    """Whether the module is PEFT's own, and always in use."""
    return type(module) in _SLOT_CLASSES


def refuse_compiled_dora(slots: Mapping[str, Slot]) -> None:
    """Raise if compiled code knows a magnitude of these slots as PEFT's."""
    for fqn, slot in slots.items():
        if slot.dora is not None and not isinstance(slot.dora, _InUse):
            raise ModelError(
                "The model was compiled with a DoRA on it, which compiled code knows as PEFT computes it.",
                where=fqn,
                found=type(slot.dora).__name__,
                expected="a model that is attached, or prepared for hot-swapping, before it is compiled",
                hint="hotslot.attach(model, …), then torch.compile",
            )


def add_magnitude(
    layer: Any, adapter_name: str, shape: tuple[int, ...], dtype: torch.dtype, *, requires_grad: bool = False
) -> None:
    """Make a layer of plain LoRA one that DoRA may use, with a neutral magnitude, not in use."""
    try:
        variant = layer.resolve_lora_variant(config=LoraConfig(use_dora=True))
    except ValueError as error:
        raise UnsupportedError(
            "PEFT has no DoRA for such a layer.",
            where=type(layer).__name__,
            found=f"one adapter with DoRA, and another of a bare parameter (target_parameters) there: {error}",
            expected="one or the other",
            hint="attach them to models of their own; or route='merged'",
        ) from error
    slot_class, device = _OF_VARIANT[type(variant)], layer.get_base_layer().weight.device
    module = slot_class(fan_in_fan_out=slot_class is SlotDoraEmbedding or getattr(layer, "fan_in_fan_out", False))
    module.weight = nn.Parameter(torch.ones(shape, dtype=dtype, device=device), requires_grad)
    module.in_use = torch.zeros((), device=device)
    module.train(layer.training)
    module.displaced = layer.lora_variant.get(adapter_name)
    layer.lora_magnitude_vector[adapter_name] = module
    layer.lora_variant[adapter_name] = variant


def drop_magnitude(layer: Any, adapter_name: str) -> None:
    """Undo `add_magnitude`."""
    layer.use_dora[adapter_name] = False
    if adapter_name in layer.lora_magnitude_vector:
        displaced = layer.lora_magnitude_vector[adapter_name].displaced
        layer.lora_variant.pop(adapter_name, None)
        if displaced is not None:
            layer.lora_variant[adapter_name] = displaced
        del layer.lora_magnitude_vector[adapter_name]  # last: it may be broken off, and repeated


def use_slot_dora(module: Any) -> None:
    """Give PEFT's DoRA module the forward of a slot that is in use."""
    module.in_use = torch.ones((), device=module.weight.device)
    module.displaced = None
    module.__class__ = _SLOT_CLASSES[type(module)]


def leave_slot_dora(module: Any) -> None:
    """Make a slot's module PEFT's own, in use, whichever of the two has made it."""
    if type(module) in _SLOT_CLASSES.values():
        module.__class__ = next(theirs for theirs, ours in _SLOT_CLASSES.items() if type(module) is ours)
    for name in ("in_use", "displaced"):
        module.__dict__.pop(name, None)


def put_back_dora(layer: Any, adapter_name: str, module: Any) -> None:
    """Undo `use_slot_dora`. If the live adapter is no DoRA, the layer is to be none: PEFT's would compute one."""
    if (
        isinstance(module, _InUse)
        and not module.in_use
        and layer.lora_magnitude_vector._modules.get(adapter_name) is module
    ):
        drop_magnitude(layer, adapter_name)
    leave_slot_dora(module)
