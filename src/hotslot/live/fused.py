"""PEFT's LoRA on a linear layer with fewer passes over the outputs.

T: tokens   K: inputs   O: outputs   R: rank

PEFT writes B's product [T, O], scales it and adds it: three passes in eager mode. Here the scaling goes onto [T, R],
and of many tokens B's product is accumulated onto the base's output. Compiled, one token's products are sums, of which
inductor makes one kernel for A of all layers that share an input, and fuses B's into the kernels around them; PEFT's
are two small matrix products a layer. More tokens are compiled as PEFT's are. How fast that is on a GPU is unmeasured.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .dropout import SlotDropout

_MOST_TERMS = 32  # written out one by one
_MANY_TOKENS = 128  # addmm copies the base's output first, which costs more than it saves below


class FusedLinear(Linear):
    """PEFT's layer, with another forward where one plain adapter of `fused_adapters` is active; PEFT's own elsewhere.

    What decides is known when the layer is traced, and no swap changes it.
    """

    fused_adapters: frozenset[str]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output [..., O] for x [..., K]."""
        active = self._one_plain_adapter() if not args and not kwargs else None
        if active is None:
            peft_forward: Callable[..., torch.Tensor] = super().forward
            return peft_forward(x, *args, **kwargs)
        name, lora_a, up = active
        down: torch.Tensor = lora_a.weight
        scaling: torch.Tensor = self.scaling[name]
        base: torch.Tensor = self.base_layer(x)
        x = self._cast_input_dtype(x, down.dtype)
        compiling = torch.compiler.is_compiling()
        if compiling and statically_known_true(x.numel() == x.shape[-1]) and _is_product(lora_a):
            return _of_one_token(base, x, down, up, scaling)
        low: torch.Tensor = lora_a(x)
        if compiling or low.dtype == torch.float16:  # a kernel of its own; or, scaled, it might leave its range
            return (base + F.linear(low, up) * scaling).to(base.dtype)
        low = low * scaling
        if low.dtype != base.dtype or base.numel() < _MANY_TOKENS * base.shape[-1]:
            return (base + F.linear(low, up)).to(base.dtype)
        return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.T).view(base.shape)

    def _one_plain_adapter(self) -> tuple[str, Any, torch.Tensor] | None:
        """Name, A's module and B of what is active, if what PEFT's layer computes is W x + s B A x and nothing else."""
        active = self.active_adapters
        if self._disable_adapters or self.merged_adapters or len(active) != 1:
            return None
        name: str = active[0]
        if name not in self.fused_adapters or name in self.lora_variant:
            return None
        # Past nn.Module's __getattr__: in eager mode three calls of it take as long as a small kernel.
        modules: Any = self._modules
        lora_a, lora_b, dropout = (modules[key]._modules.get(name) for key in ("lora_A", "lora_B", "lora_dropout"))
        if type(dropout) is not SlotDropout or dropout.training or not _is_product(lora_b):
            return None
        return name, lora_a, lora_b._parameters["weight"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or a pickle is PEFT's own layer, with no slot that was asked to be fused.
        state = {key: value for key, value in self.__dict__.items() if key != "fused_adapters"}
        return copyreg._reconstructor, (Linear, object, None), state  # type: ignore[attr-defined]


def fuse(layer: Any, adapter_name: str) -> None:
    """Let a layer of PEFT's `Linear` compute this adapter so."""
    layer.__class__ = FusedLinear
    layer.fused_adapters = layer.__dict__.get("fused_adapters", frozenset()) | {adapter_name}


def unfuse(layer: Any, adapter_name: str) -> None:
    """Undo `fuse`; nothing the second time."""
    layer.fused_adapters = layer.__dict__.get("fused_adapters", frozenset()) - {adapter_name}
    if not layer.fused_adapters:
        layer.__class__ = Linear
        del layer.fused_adapters


def _is_product(linear: Any) -> bool:
    """Whether a call of the module multiplies by its weight, and nothing else: no bias, no one's hooks."""
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    if linear._forward_pre_hooks or linear._forward_hooks or linear._backward_pre_hooks or linear._backward_hooks:
        return False
    parameters = linear._parameters
    return parameters["bias"] is None and type(parameters["weight"]) is nn.Parameter


def _of_one_token(
    base: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """In float32 at least, rounded once."""
    exact = torch.promote_types(x.dtype, torch.float32)
    low = (down.to(exact) * x.flatten().to(exact)).sum(-1) * scaling
    if low.shape[0] > _MOST_TERMS:
        product = (up.to(exact) * low).sum(-1)
    else:  # what is pointwise, and no reduction, inductor fuses into any kernel
        product = up[:, 0].to(exact) * low[0]
        for i in range(1, low.shape[0]):
            product = product + up[:, i].to(exact) * low[i]
    total: torch.Tensor = base.to(exact) + product.view(base.shape)
    return total.to(base.dtype)
