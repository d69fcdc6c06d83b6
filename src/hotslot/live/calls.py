"""The calls by which users take an adapter off a model or out of its weights: PEFT's, transformers', diffusers'."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .assembly import Assembly
from .discover import unwrap

# Of slots, which do not know whose model they are in.
UNMERGE = "peft_model.unmerge_adapter(), in diffusers pipe.unfuse_lora(), else unmerge() of PEFT's layers"


class Calls(NamedTuple):
    """As a message names them.

    Attributes:
        unload: gives the base model, without any layer of PEFT's.
        unmerge: takes what was merged out of the base weights.
        disable: passes the adapter over.
    """

    unload: str
    unmerge: str
    disable: str


_PEFT = Calls("peft_model.unload()", "peft_model.unmerge_adapter()", "with peft_model.disable_adapter(): …")
_DIFFUSERS = Calls("pipe.unload_lora_weights()", "pipe.unfuse_lora()", "pipe.disable_lora()")
# Its delete_adapter leaves PEFT's layers where they are.
_TRANSFORMERS = Calls("from_pretrained without the adapter", "unmerge() of PEFT's layers", "model.disable_adapters()")


def calls_of(model: nn.Module) -> Calls:
    """Of whoever has put an adapter on the model."""
    model = unwrap(model)
    if isinstance(model, Assembly) or hasattr(model, "unload_lora"):
        return _DIFFUSERS
    return _TRANSFORMERS if getattr(model, "_hf_peft_config_loaded", False) else _PEFT
