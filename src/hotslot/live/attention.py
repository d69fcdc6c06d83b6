"""LoRA on nn.MultiheadAttention without touching its base weights.

PEFT adds the delta to the base weights before each forward and subtracts it after: that drifts by a rounding at each
call, replaces the Parameters, and breaks when two threads meet. Here the same sums go to the same nn.MultiheadAttention
forward as values of that one call.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention as PeftMultiheadAttention
from torch import nn


class SlotMultiheadAttention(PeftMultiheadAttention):
    """PEFT's LoRA layer on nn.MultiheadAttention, with a forward that changes nothing."""

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `nn.MultiheadAttention.forward`, with the active adapters' deltas on in_proj and out_proj."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return super().forward(query, *args, **kwargs)
        self._check_forward_args(query, *args, **kwargs)  # type: ignore[no-untyped-call]
        base: Any = self.get_base_layer()
        out_proj = base.out_proj  # PEFT's LoRA layer around the projection, whose own forward is never called
        in_weight, out_weight = base.in_proj_weight, out_proj.get_base_layer().weight
        out_bias = out_proj.get_base_layer().bias
        dtype = out_weight.dtype
        for name in active:
            in_weight = in_weight + _delta(self, name).to(dtype)
            # Twice, as PEFT has it: its merge adds out_proj's delta itself and then lets out_proj's own merge add it
            # again, in training too, so that an adapter's weights are trained for the double. The second time it is
            # added in place, past autograd and in the wider dtype of the two; and so is the bias.
            delta = _delta(out_proj, name)
            out_weight = ((out_weight + delta.to(dtype)) + delta.detach()).to(dtype)
            if out_proj.lora_B[name].bias is not None:  # in_proj's has no effect in PEFT
                bias = out_proj.lora_B[name].bias * out_proj.scaling[name]
                out_bias = (out_bias + bias.detach()).to(out_bias.dtype)
        in_weight = _like(base.in_proj_weight, in_weight)
        out_weight = _like(out_proj.get_base_layer().weight, out_weight)
        weights = _Weights(base, in_weight, out_weight, _like(out_proj.get_base_layer().bias, out_bias))
        output, attention = nn.MultiheadAttention.forward(weights, query, *args, **kwargs)  # type: ignore[arg-type]
        return output.to(query.dtype), attention.to(query.dtype) if attention is not None else None

    def _restore_weights(self) -> None:
        # PEFT registers the base weights anew, as other Parameters, whenever anybody lists the modules, for its forward
        # may have left them unregistered. This one never does; only a merge by the user can have.
        if "in_proj_weight" not in self.get_base_layer()._parameters:
            super()._restore_weights()


def use_slot_attention(layer: PeftMultiheadAttention) -> None:
    """Give a layer of PEFT's the forward of `SlotMultiheadAttention`."""
    layer.__class__ = SlotMultiheadAttention


def leave_slot_attention(layer: PeftMultiheadAttention) -> None:
    """Undo `use_slot_attention`."""
    layer.__class__ = PeftMultiheadAttention


def _delta(layer: Any, name: str) -> torch.Tensor:
    """PEFT's `get_delta_weight`, which gives low-precision factors on a CPU other memory."""
    down: torch.Tensor = layer.lora_A[name].weight
    up: torch.Tensor = layer.lora_B[name].weight
    scaling: float = layer.scaling[name]  # or a 0-dim tensor
    if up.device.type == "cpu" and up.dtype in (torch.float16, torch.bfloat16):
        return ((up.float() @ down.float()) * scaling).to(up.dtype)
    return (up @ down) * scaling


def _like(base: torch.Tensor | None, merged: torch.Tensor) -> torch.Tensor:
    """`merged`, trainable if `base` is: torch's linear takes a kernel with another rounding for a frozen weight."""
    if (
        base is not None
        and merged is not base
        and base.requires_grad
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        merged.requires_grad_()
    return merged


class _Projection:
    """What nn.MultiheadAttention.forward reads of its out_proj."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias


class _Weights:
    """Stands in for `self` in nn.MultiheadAttention.forward: all is the base module's but the two weights."""

    def __init__(
        self,
        base: nn.MultiheadAttention,
        in_weight: torch.Tensor,
        out_weight: torch.Tensor,
        out_bias: torch.Tensor | None,
    ) -> None:
        self._base = base
        self.in_proj_weight = in_weight
        self.out_proj = _Projection(out_weight, out_bias)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)
