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

    @classmethod
    def like(cls, found: nn.Module) -> SlotDropout:
        """One that computes what PEFT's module does."""
        return cls(getattr(found, "p", 0.0)).train(found.training)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "p":
            edits.count += 1
        super().__setattr__(name, value)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply dropout to a tensor of any shape."""
        if not self.training or self.p == 0.0:
            return input
        return F.dropout(input, self.p, True)


def leave_slot_dropout(dropouts: nn.ModuleDict, adapter_name: str, found: nn.Module) -> None:
    """Put back what was `found` there; a Dropout of the live adapter's rate, if that has another."""
    live = dropouts._modules.get(adapter_name)
    if type(live) is SlotDropout:  # else the adapter was deleted, or loaded anew
        same = live.p == getattr(found, "p", 0.0)
        dropouts[adapter_name] = found if same else nn.Dropout(live.p).train(live.training)
