"""Weights that accelerate keeps elsewhere between forward passes, and slots, which stay where they are computed with.

accelerate's `cpu_offload`, and with it diffusers' `enable_sequential_cpu_offload`, gives each module with parameters a
hook: before the module's forward that puts in other Parameters, on the execution device, from a map that it has made of
the model's `state_dict()`; afterwards it puts in others again, without memory. Slots are small. So the hooks of their
modules are told not to offload, and do what is left to do: they bring the inputs. The base's hooks are not touched, and
a swap touches none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

_HINT = (
    "take the hooks off (pipe.remove_all_hooks(), or accelerate.hooks.remove_hook_from_submodules(model)), do it, and "
    "offload the model again"
)


class Stays:
    """One of a module's hooks, in accelerate's sense: the module's Parameters stay, whatever hook comes after it.

    Until one comes it does nothing: it stands in the module's attributes, and no forward pass knows it. accelerate then
    makes it the first of the two (`append=True`), and so it sees the Parameters that the other takes away. It puts them
    back before they are needed: at the next forward pass, swap or `state_dict()`.
    """

    no_grad = False  # which accelerate asks of its hooks

    def __init__(self, home: torch.device | None = None) -> None:
        """Of a module whose Parameters are to go to `home` as accelerate's hooks are taken off; or where they were."""
        self._home = home
        self._own: dict[str, nn.Parameter] = {}
        self._homes: dict[str, torch.device] = {}
        self._turned: list[tuple[Any, dict[str, Any]]] = []  # hooks that would offload, and what they had put there

    @staticmethod
    def of(module: nn.Module) -> Stays | None:
        """That of the module, if it has one."""
        return next((hook for hook in _hooks(module) if isinstance(hook, Stays)), None)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called by accelerate, before it does the same of the hook that comes."""
        self._own = {key: param for key, param in module._parameters.items() if param is not None}
        self._homes = {key: self._home or param.device for key, param in self._own.items()}
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Called by accelerate."""
        self.bring_back(module)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Called by accelerate."""
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Called by accelerate, as it takes off all of the module's hooks: Parameters go back to where they were."""
        self.bring_back(module)
        with torch.inference_mode(False):
            for key, home in self._homes.items():
                param = module._parameters.get(key)
                if param is not None and param.device != home:
                    param.data = param.data.to(home)
        return module

    def bring_back(self, module: nn.Module) -> None:
        """Put the Parameters on the execution device and into the module, for good. May be repeated."""
        for hook in _hooks(module):
            if _offloads(hook):
                with torch.inference_mode(False), torch.no_grad():
                    brought = {key: self._brought(key, there, hook) for key, there in module._parameters.items()}
                self._homes = self._homes or dict(hook.original_devices)
                self._turned.append((hook, dict(module._parameters)))
                module._parameters.update(brought)
                hook.offload = False  # last: broken off before, it is done again

    def _brought(self, key: str, there: nn.Parameter | None, hook: Any) -> nn.Parameter | None:
        if there is None:
            return None
        own = self._own.get(key)
        if own is None:  # from before there was a swapper: accelerate has the values
            return nn.Parameter(hook.weights_map[key].to(hook.execution_device, copy=True), there.requires_grad)
        if own.device != torch.device(hook.execution_device):
            own.data = own.data.to(hook.execution_device)
        return own

    def let_go(self, module: nn.Module) -> None:
        """Let accelerate offload the module again, with the values that it has now."""
        for hook, displaced in self._turned:
            if _offloads(hook):  # broken off amid `bring_back`
                continue
            params = {key: param for key, param in module._parameters.items() if param is not None}
            if not _has(hook.weights_map, params):
                hook.weights_map = {key: param.detach().to("cpu") for key, param in params.items()}
            hook.offload = True
            for key, param in params.items():
                there = displaced.get(key)
                if there is None or there.shape != param.shape:
                    there = nn.Parameter(param.detach().to("meta"), param.requires_grad)
                module._parameters[key] = there
        self._turned.clear()
        rest = [hook for hook in _hooks(module) if hook is not self]
        if rest:
            module.__dict__["_hf_hook"] = _in_sequence(rest)
        else:
            del module.__dict__["_hf_hook"]


def _has(weights_map: Mapping[str, torch.Tensor], params: Mapping[str, nn.Parameter]) -> bool:
    known = [(weights_map.get(key), param.detach().to("cpu")) for key, param in params.items()]
    return all(old is not None and torch.equal(old, new) for old, new in known)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks of the module, the first one first."""
    hooks: list[Any] = [module.__dict__.get("_hf_hook")]
    while hooks:
        hook = hooks.pop(0)
        if hasattr(hook, "hooks"):
            hooks = [*hook.hooks, *hooks]
        elif hook is not None:
            yield hook


def _in_sequence(hooks: list[Any]) -> Any:
    from accelerate.hooks import SequentialHook

    return SequentialHook(*hooks) if len(hooks) > 1 else hooks[0]


def _offloads(hook: Any) -> bool:
    return bool(getattr(hook, "offload", False))


def _hook_of(module: nn.Module) -> Any:
    """The hook that offloads the module itself, or None."""
    return next(filter(_offloads, _hooks(module)), None)


def _modules_of(layer: Any, adapter_name: str) -> Iterator[nn.Module]:
    """The modules that have the parameters of one slot."""
    for container in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        if adapter_name in container:
            yield container[adapter_name]
    for container in (layer.lora_embedding_A, layer.lora_embedding_B):
        if adapter_name in container:
            yield container


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate takes the module's own tensors away between forward passes."""
    return _hook_of(module) is not None


def offloaded_value(module: nn.Module, name: str) -> torch.Tensor | None:
    """What accelerate has of the module's tensor, wherever that is; None if it does not offload the module."""
    hook = _hook_of(module)
    value: torch.Tensor | None = None if hook is None else hook.weights_map[name]
    return value


# -- slots that accelerate offloads -----------------------------------------------------------------------------------


def can_stay(layer: Any, adapter_name: str) -> bool:
    """Whether what the slot has without memory is offloaded module by module, as it need not be."""
    return all(
        is_offloaded(module)
        for module in _modules_of(layer, adapter_name)
        if any(param.is_meta for param in module.parameters(recurse=False))
    )


def stay(layer: Any, adapter_name: str) -> None:
    """Put the slot's parameters, those that accelerate has taken away, where they are computed with."""
    for module in _modules_of(layer, adapter_name):
        if is_offloaded(module):
            stays = Stays.of(module)
            if stays is None:
                stays = Stays()
                module.__dict__["_hf_hook"] = _in_sequence([stays, *_hooks(module)])
            stays.bring_back(module)


def bring_back(layer: Any, adapter_name: str) -> None:
    """Put the slot's own Parameters back into modules that accelerate has begun to offload since they were bound."""
    for module in _modules_of(layer, adapter_name):
        stays = Stays.of(module)
        if stays is not None:
            stays.bring_back(module)


def stay_from_now_on(layer: Any, adapter_name: str) -> None:
    """Let the slot's parameters stay if accelerate begins to offload the model.

    For whoever shows a `state_dict()`: that is what accelerate reads before it puts its hooks on, and in it a slot is
    as large as the live adapter. Nothing else tells that it is about to, and taking all hooks off, as diffusers does
    each time before, takes this one off too.
    """
    for module in _modules_of(layer, adapter_name):
        stays = Stays.of(module)
        if stays is not None:
            stays.bring_back(module)
        elif "_hf_hook" not in module.__dict__:
            module.__dict__["_hf_hook"] = Stays()


def let_go(layer: Any, adapter_name: str) -> None:
    """Undo `stay` and `stay_from_now_on`. May be repeated."""
    for module in _modules_of(layer, adapter_name):
        stays = Stays.of(module)
        if stays is not None:
            stays.let_go(module)


def stay_beside(layer: Any, adapter_name: str) -> None:
    """Give a new slot beside an offloaded base layer memory where that computes, and the inputs, too.

    Args:
        layer: PEFT's layer, whose adapter has no values yet: they are zeros now.
        adapter_name: the slot's.
    """
    base = _hook_of(layer.get_base_layer())
    if base is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in _modules_of(layer, adapter_name):
        for key, param in module._parameters.items():
            if param is not None and param.is_meta:
                zeros = torch.zeros(param.shape, dtype=param.dtype, device=base.execution_device)
                module._parameters[key] = nn.Parameter(zeros, requires_grad=False)
        if "_hf_hook" not in module.__dict__ and not isinstance(module, nn.ParameterDict):
            module.__dict__["_hf_hook"] = Stays(home=next(iter(base.original_devices.values())))
            hook = AlignDevicesHook(base.execution_device, skip_keys=base.skip_keys)
            add_hook_to_module(module, hook, append=True)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refuse_offloaded(model: nn.Module, fqn: str | None = None) -> None:
    """Raise if accelerate offloads the model layer by layer, as diffusers' `enable_sequential_cpu_offload` has it do.

    For whoever finds a parameter without memory, or another one in its place. Offloading whole models
    (`enable_model_cpu_offload`) moves Parameters, and is no hindrance.

    Args:
        model: the model, or one of its modules.
        fqn: what to name in the message; by default the first module that is offloaded.
    """
    name = next((name for name, module in model.named_modules() if is_offloaded(module)), None)
    if name is not None:
        raise ModelError(
            "The model is offloaded layer by layer: between forward passes its weights have no memory.",
            where=fqn or name or type(model).__name__,
            found="a hook of accelerate that offloads",
            expected="LoRA and no more, which the slots hold: base weights that are written have to be there",
            hint=_HINT,
        )


def refuse_offloaded_tensor(model: nn.Module, fqn: str, tensor: torch.Tensor | None) -> None:
    """Raise if the tensor of the module at `fqn` is offloaded: what is written there would be gone."""
    if tensor is not None and tensor.is_meta:
        refuse_offloaded(model, fqn)


def refuse_reading_offloaded(fqn: str, base: nn.Module, *, dora: bool = False, parameter: str | None = None) -> None:
    """Raise if PEFT's layer around an offloaded module reads its weight, which is there only while the module runs.

    Args:
        fqn: the layer's path.
        base: the module.
        dora: whether the layer computes DoRA, which needs the weight's norm.
        parameter: the bare parameter of the module that the layer adapts, if it is one.
    """
    attention = isinstance(base, nn.MultiheadAttention) or ".base_layer." in fqn
    if (dora or parameter or attention) and any(is_offloaded(module) for module in base.modules()):
        what = "DoRA" if dora else "LoRA of a bare parameter" if parameter else "LoRA of a MultiheadAttention"
        raise ModelError(
            f"{what} reads the base's weight, and the model is offloaded layer by layer: it has no memory by then.",
            where=fqn,
            found=f"a hook of accelerate that offloads the {type(base).__name__}",
            expected="LoRA without DoRA, on linear layers, convolutions and embeddings",
            hint=_HINT,
        )
