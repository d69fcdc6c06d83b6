"""diffusers' own LoRA calls over hotslot.

`load_lora_weights(…, hotswap=True)` of a pipeline, and `load_lora_adapter(…, hotswap=True)` of one model, are one swap
of all components, whole or not at all. The other calls are diffusers' own, and reach components that
`pipe.unet = torch.compile(pipe.unet)` has wrapped, which diffusers passes over in silence.
"""

from .patching import patch_models, patch_pipelines, unpatch

__all__ = ["patch_models", "patch_pipelines", "unpatch"]
