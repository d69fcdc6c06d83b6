"""A dropout whose probability may change under compiled code."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class SlotDropout(nn.Dropout):
    """Computes what PEFT's `nn.Dropout(p)` or, for p = 0, `nn.Identity()` does.

    Reads `p` while training only: a compiled eval-mode forward has no guard on it, and a swap may change it.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply dropout to a tensor of any shape."""
        if not self.training or self.p == 0.0:
            return input
        return F.dropout(input, self.p, True)
