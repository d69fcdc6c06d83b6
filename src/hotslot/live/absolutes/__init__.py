"""Tensors of the base model that adapters give values of their own, and where the model's own values are meanwhile.

A LoRA is a delta, and zero takes it back. These are not: what an adapter writes has to be replaced by what was there,
bit for bit. Each such tensor is a `Site`; `Sites` holds all of a model's, and is the only code that writes there. They
are few and large, so each is written by a copy of its own, where it is. The kinds of them (`modules`, `tokens`,
`biases`, `weights`) know what an adapter has for each; `Absolutes` is all of that as a swap sees it.
"""

from .absolutes import AbsoluteImage, Absolutes
from .sites import Key, Merge, Site

__all__ = ["AbsoluteImage", "Absolutes", "Key", "Merge", "Site"]
