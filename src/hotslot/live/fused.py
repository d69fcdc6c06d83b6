"""PEFT's LoRA on a linear layer with fewer passes over the outputs.

T: tokens   K: inputs   O: outputs   R: rank

PEFT writes B's product [T, O], scales it and adds it: three passes in eager mode. Here the scaling goes onto [T, R],
and B's product is accumulated onto the base's output. Compiled, one token's products are sums that inductor can fuse
into the kernels around them, where PEFT's are two small matrix products. How fast that is on a GPU is unmeasured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch.nn import functional as F

_MOST_TERMS = 32  # written out one by one


class FusedLinear(Linear):
    """PEFT's layer, with another forward where one plain adapter is active; PEFT's own everywhere else.

    What decides is known when the layer is traced, and no swap changes it. Forward hooks of `lora_A` and `lora_B` are
    not called.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output [..., O] for x [..., K]."""
        peft_forward: Callable[..., torch.Tensor] = super().forward
        if args or kwargs or self.training or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return peft_forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return peft_forward(x)
        down: Any = self.lora_A[name].weight
        up: Any = self.lora_B[name].weight
        if x.dtype != down.dtype:
            return peft_forward(x)
        base = self.base_layer(x)
        if base.dtype != x.dtype:
            return peft_forward(x)
        scaling = self.scaling[name]
        if torch.compiler.is_compiling() and x.numel() == x.shape[-1]:
            return _of_one_token(base, x, down, up, scaling)
        low = F.linear(x, down) * scaling
        flat = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.T) if x.dim() > 1 else base + F.linear(low, up)
        return flat.view(base.shape)


def _of_one_token(
    base: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: Any
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
