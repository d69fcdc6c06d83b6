"""What is different where the base layer is quantised; that it is, PEFT tells by its tensors, and so does this.

No library is imported that the model does not use: bitsandbytes and torchao are known by the names of their classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# These layers of PEFT have DoRA, though their `lora_variants` do not list it. HQQ's has it too, and is untested here.
_WITH_DORA = ("Linear4bit", "Linear8bitLt")


def is_dense(layer: nn.Module) -> bool:
    """Whether the layer is a plain nn.Linear whose weight is a plain Parameter: torchao quantises the weight alone."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def dense_weight(layer: Any) -> torch.Tensor:
    """The layer's weight as floating point numbers; the layer stays as it is.

    PEFT's `dequantize_module_weight` puts a new Parameter in the place of bitsandbytes' own, on a CPU. An 8-bit one
    lacks its statistics then: the second forward pass of DoRA raises. It also asks for the class of the tensor, which
    dynamo does not trace; that of the layer it does.
    """
    from peft.utils.integrations import dequantize_module_weight

    kinds = [kind.__name__ for kind in type(layer).__mro__]
    dequantized: torch.Tensor
    if "Linear4bit" in kinds:
        from bitsandbytes.functional import dequantize_4bit

        dequantized = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    elif "Linear8bitLt" not in kinds:
        dequantized = dequantize_module_weight(layer)
    elif layer.weight.dtype != torch.int8:  # kept as float16 for training
        dequantized = layer.weight
    else:
        from bitsandbytes.functional import int8_vectorwise_dequant

        # The first forward pass moves the scales from the one to the other.
        scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        dequantized = int8_vectorwise_dequant(layer.weight.data, scales)
    return dequantized


def is_repacked(layer: Any) -> bool:
    """Whether the layer's first forward pass replaces its 4-bit weight by another form, of which a part is rounded."""
    return bool(getattr(layer, "support_avx512bf16_for_cpu", False)) and layer.weight.device.type == "cpu"


def has_dora(layer: Any) -> bool:
    """Whether PEFT can do DoRA on this LoRA layer."""
    return ("use_dora",) in layer.lora_variants or type(layer).__name__ in _WITH_DORA


def has_bias(base_layer: nn.Module) -> bool:
    """Whether PEFT takes `lora_bias` on this base layer: not where merging would leave the bias out."""
    weight = getattr(base_layer, "weight", None)
    return not type(weight).__module__.startswith("torchao.") and not hasattr(base_layer, "W_q")
