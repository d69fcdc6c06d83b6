"""Weights that accelerate keeps elsewhere between forward passes: nothing can be written that is not there."""

from __future__ import annotations

from torch import nn

from ..errors import ModelError


def refuse_offloaded(model: nn.Module, fqn: str = "") -> None:
    """Raise if accelerate offloads the model layer by layer, as diffusers' `enable_sequential_cpu_offload` has it do.

    For whoever finds a parameter without memory, or another one in its place. Offloading whole models
    (`enable_model_cpu_offload`) moves Parameters, and is no hindrance.

    Args:
        model: the model, or one of its modules.
        fqn: the path of that.
    """
    name = next((name for name, module in model.named_modules() if _offloads(module)), None)
    if name is not None:
        raise ModelError(
            "The model is offloaded layer by layer: between forward passes its weights have no memory.",
            where=".".join(filter(None, (fqn, name))) or type(model).__name__,
            found="a hook of accelerate that offloads",
            expected="weights that are there while an adapter is put in",
            hint="pipe.delete_adapters(…), then pipe.load_lora_weights(…) without hotswap: diffusers takes the "
            "hooks off and puts them on again. A Swapper is to be detached before the offloading, and attached after "
            "pipe.remove_all_hooks(), or of a model accelerate.hooks.remove_hook_from_submodules(model)",
        )


def _offloads(module: nn.Module) -> bool:
    hook = vars(module).get("_hf_hook")
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))
