"""A dropout whose probability may change under compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .edits import edits


class SlotDropout(nn.Dropout):
    """Computes what PEFT's `nn.Dropout(p)` or, for p = 0, `nn.Identity()` does.

    Reads `p` while training only: a compiled eval-mode forward has no guard on it, and a swap may change it. Counts
    who else does.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "p":
            edits.count += 1
        super().__setattr__(name, value)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply dropout to a tensor of any shape."""
        if not self.training or self.p == 0.0:
            return input
        return F.dropout(input, self.p, True)
