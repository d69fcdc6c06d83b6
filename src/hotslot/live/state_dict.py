"""What `state_dict()` shows of a slot: the adapter that is live, at its own rank, and not the padding around it.

And of the modules that adapters save whole: the copy of one that the live adapter saves, and no other.
And of the places for tokens: the rows of the live adapter's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..methods import MAGNITUDE, PARTS, TOKENS
from .corner import all_zero, corner, fill
from .offloading import stay_from_now_on
from .saved import named_tensors
from .slots import Slot
from .training import Mute

# Which of the layer's records says that the live adapter has the part.
_FLAGS = {"lora_B.bias": "lora_bias", MAGNITUDE: "use_dora"}


class Speaker:
    """A hook on saving and loading that speaks for one adapter's part of a module: in copies and pickles of it, too.

    Attributes:
        subject: what it speaks for.
        resting: whether another one speaks for that meanwhile, in a copy that is attached by itself.
    """

    subject: Hashable
    resting = False

    def relieve(self, module: nn.Module, undo: list[Callable[[], object]]) -> None:
        """Let those rest that a copy or pickle has brought along; before this one is installed. `undo` wakes them."""
        hooks: list[Any] = list(module._state_dict_hooks.values())
        for other in hooks:
            if isinstance(other, type(self)) and other.subject == self.subject and not other.resting:
                undo.append(partial(setattr, other, "resting", False))
                other.resting = True


class Shown(dict[str, int]):
    """Path of a slot → rank of the live adapter; 0 where it does not target the layer, and nothing is shown.

    Attributes:
        all_biases: whether it saves the base's biases, all of them (`bias="all"`).
    """

    all_biases = False

    def note(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in what the live adapter's configs say."""
        self.all_biases = any(config.get("bias") == "all" for config in configs.values())


class TrueRank(Speaker):
    """Hook of one LoRA layer: on saving cut each part to the live rank, on loading put it back among the padding.

    Where the live adapter has none, and no other is, its bias of the base layer is saved as that of a plain layer: a
    fresh load has that, and would drop anything else.

    Attributes:
        params: suffix → the Parameter it speaks for. Another one under the same name is not its business: after
            `delete_adapter` PEFT may load anything there. Copies and pickles of the layer keep the two together.
        mutes: suffix → what keeps training away from a part that the live adapter may lack; with copies and pickles.
        left: whether hotslot has let go of the slot. Then it is shown as it is once it holds something.
    """

    left = False

    def __init__(self, slot: Slot, shown: Shown) -> None:
        """Speak for `slot`; `shown` is what all hooks of an adapter share."""
        self.fqn = slot.fqn
        self.adapter_name = self.subject = slot.adapter_name
        self.groups = slot.groups
        self.experts = slot.experts
        self.params = slot.params
        self.mutes: dict[str, Mute] = {}
        self._all_shown = shown

    def stay(self, layer: nn.Module) -> None:
        """Go on hiding a slot that holds nothing when hotslot lets go of it, once its other hooks are off."""
        hooks: list[Any] = list(layer._state_dict_hooks.values())
        for hook in hooks:
            if isinstance(hook, TrueRank) and hook.left and hook.subject == self.subject:
                hook.params = self.params
                return
        left = copy.copy(self)
        left._all_shown, left.left = Shown({self.fqn: 0}), True
        layer.register_state_dict_post_hook(left)
        layer.register_load_state_dict_pre_hook(left.on_load)

    @property
    def _silent(self) -> bool:
        return self.resting or (self.left and not all_zero(self.params))

    @property
    def rank(self) -> int:
        """Of the live adapter; 0 where it does not target this layer, and then nothing of the slot is shown."""
        return self._all_shown[self.fqn]

    def __call__(self, layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Called by `state_dict()`."""
        if self._silent:
            return
        stay_from_now_on(layer, self.adapter_name)
        live = dict(layer.named_parameters())
        for key, suffix in self._keys(prefix).items():
            param = live.get(key.removeprefix(prefix))
            if key in state_dict and param is self.params.get(suffix):
                if state_dict[key].is_meta and param is not None:  # read before it was brought back
                    state_dict[key] = param.detach()
                shown = self._shown(layer, state_dict[key], suffix)
                if shown is None:
                    del state_dict[key]
                elif shown.shape != state_dict[key].shape:
                    state_dict[key] = shown.contiguous()
        if self._all_shown.all_biases and self.rank == 0 and layer._get_available_adapters() == {self.adapter_name}:
            inner = f"{prefix}base_layer."
            for key in [key for key in state_dict if key.startswith(inner) and "bias" in key]:  # as PEFT chooses them
                state_dict[prefix + key.removeprefix(inner)] = state_dict.pop(key)

    def on_load(
        self,
        layer: Any,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        errors: list[str],
    ) -> None:
        """Called by `load_state_dict()`, before the parameters are looked up: what fits is what `state_dict` shows.

        What is to stay is given as the Parameter itself: `assign=True`, by which diffusers loads other adapters, keeps
        that, and makes another of anything else.
        """
        if self._silent:
            return
        live = dict(layer.named_parameters())
        for path, _ in layer.get_base_layer().named_parameters():
            name = path.replace("base_layer.", "")  # of an attention's output projection
            if "bias" in name and prefix + name in state_dict:
                state_dict[f"{prefix}base_layer.{name}"] = state_dict.pop(prefix + name)
        for key, suffix in self._keys(prefix).items():
            param = live.get(key.removeprefix(prefix))
            own = self.params.get(suffix) is param
            if param is None or not own:
                continue
            given, shown = state_dict.get(key), self._shown(layer, param.detach(), suffix)
            if shown is None:
                _refuse_around_the_slot(state_dict, prefix, suffix, self.adapter_name)
                if given is not None and strict:
                    unexpected_keys.append(key)
                state_dict[key] = param
            elif given is not None and given.shape != shown.shape:
                errors.append(
                    f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, "
                    f"the shape in current model is {shown.shape}."
                )
                state_dict[key] = param
            elif given is not None and given.shape != param.shape:
                full = torch.zeros_like(param, device=given.device, dtype=given.dtype)
                fill(full, suffix, given, self.rank, self.groups, self.experts)
                state_dict[key] = full

    def _shown(self, layer: Any, value: torch.Tensor, suffix: str) -> torch.Tensor | None:
        """The live adapter's part of a padded tensor; None if it has none there."""
        if self.rank == 0 or not getattr(layer, _FLAGS.get(suffix, "r")).get(self.adapter_name):
            return None
        return corner(value, suffix, self.rank, self.groups, self.experts)

    def _keys(self, prefix: str) -> dict[str, str]:
        """Key in a state_dict → suffix in a file."""
        return {prefix + part.key(self.adapter_name): suffix for suffix, part in PARTS.items()}


def forget_left(layer: nn.Module, adapter_name: str) -> None:
    """Take off what `TrueRank.stay` has put on the layer, for an adapter that goes."""

    def is_left(hook: Any) -> bool:
        return isinstance(hook, TrueRank) and hook.left and hook.subject == adapter_name

    saving, loading = layer._state_dict_hooks, layer._load_state_dict_pre_hooks
    for key in [key for key, hook in saving.items() if is_left(hook)]:
        del saving[key]
    methods = {key: getattr(wrapped, "hook", None) for key, wrapped in loading.items()}  # torch wraps each
    for key in [key for key, method in methods.items() if is_left(getattr(method, "__self__", None))]:
        del loading[key]


def _refuse_around_the_slot(state_dict: Mapping[str, Any], prefix: str, suffix: str, adapter_name: str) -> None:
    # PEFT maps a file's keys to the model's by the model's own state_dict, which does not show what is unused: the
    # tensor would be dropped in silence.
    for key in (prefix + suffix, "base_model.model." + prefix + suffix):
        if key in state_dict:
            raise ModelError(
                f"PEFT cannot load into the slot {adapter_name!r}, of which the live adapter makes no use.",
                where=key,
                hint="load it through the swapper (swapper.load, swapper.activate), or under another adapter_name",
            )


class _Asked:
    """Stands in a wrapper's attributes for a method of PEFT's that tells what an adapter saves or loads."""

    def __init__(self, wrapper: Any, method: str) -> None:
        self._wrapper = wrapper
        self._method = method
        self.speakers: dict[str, SavedModule] = {}

    def __call__(self, adapter_name: str, *args: Any) -> Any:
        speaker = self.speakers.get(adapter_name)
        if speaker is not None and speaker.hides:
            return {}
        return getattr(type(self._wrapper), self._method)(self._wrapper, adapter_name, *args)

    def forget(self, adapter_name: str, before: SavedModule | None) -> None:
        """Let `before` speak for the adapter again, if there was one. May be repeated."""
        self.speakers.pop(adapter_name, None)
        if before is not None:
            self.speakers[adapter_name] = before
        if not self.speakers:
            self._wrapper.__dict__.pop(self._method, None)


class SavedModule(Speaker):
    """Speaks for PEFT's copy of a module: on saving and loading it is there only while the live adapter saves it.

    If it is the only copy, so is the wrapper: the state_dict is that of the model without it, as a fresh load of the
    adapter has none. Not by hooks of the copy itself: `merge_and_unload` puts that into the model.
    """

    def __init__(self, fqn: str, adapter_name: str, shown: Mapping[str, bool], mute: Mute | None) -> None:
        """Speak for the copy of the module at `fqn`; all that speak for the adapter share `shown`.

        `mute`, of the copy's Parameters, is here for copies and pickles to have it, too.
        """
        self._fqn = fqn
        self._mute = mute
        self._adapter_name = self.subject = adapter_name
        self._shown = shown

    def install(self, wrapper: Any, undo: list[Callable[[], object]]) -> None:
        """Begin; `undo` gets what ends it, to be called from its end."""
        self.relieve(wrapper, undo)
        undo.append(wrapper.register_state_dict_post_hook(self).remove)
        undo.append(wrapper.register_load_state_dict_pre_hook(self.on_load).remove)
        if self._mute is not None:
            self._mute.install(undo)
        for method in ("adapter_state_dict", "adapter_state_dict_load_map"):
            asked = wrapper.__dict__.setdefault(method, _Asked(wrapper, method))
            undo.append(partial(asked.forget, self._adapter_name, asked.speakers.get(self._adapter_name)))
            asked.speakers[self._adapter_name] = self

    @property
    def hides(self) -> bool:
        """Whether the live adapter does not save this module."""
        return not self._shown.get(self._fqn, True)

    def __call__(self, wrapper: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Called by `state_dict()`."""
        if self.resting or not self.hides:
            return
        hidden, original = f"{prefix}modules_to_save.{self._adapter_name}.", f"{prefix}original_module."
        alone = self._is_alone(wrapper)
        for key in list(state_dict):
            if key.startswith(hidden):
                del state_dict[key]
            elif alone and key.startswith(original):
                state_dict[prefix + key.removeprefix(original)] = state_dict.pop(key)

    def _is_alone(self, wrapper: Any) -> bool:
        return set(wrapper.modules_to_save) == {self._adapter_name}

    def on_load(
        self,
        wrapper: Any,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        errors: list[str],
    ) -> None:
        """Called by `load_state_dict()`: what fits is what `state_dict` shows."""
        if self.resting or not self.hides or self._adapter_name not in wrapper.modules_to_save:
            return
        for name, _, _, tensor in named_tensors(wrapper.modules_to_save[self._adapter_name]):
            hidden, original = f"{prefix}modules_to_save.{self._adapter_name}.{name}", f"{prefix}original_module.{name}"
            if hidden in state_dict and strict:
                unexpected_keys.append(hidden)
            if self._is_alone(wrapper) and prefix + name in state_dict:
                state_dict[original] = state_dict.pop(prefix + name)
            else:
                _refuse_around_the_slot(state_dict, prefix, name, self._adapter_name)
            state_dict[hidden] = state_dict.get(original, tensor)  # the copy is to equal the original


class ShownTokens(Speaker):
    """Hooks of PEFT's wrapper of an embedding: on saving and loading it has the rows of the live adapter's tokens.

    If that has none there, and no other adapter has, the state_dict is that of the model without the wrapper.
    """

    def __init__(self, adapter_name: str, param: torch.nn.Parameter) -> None:
        """Speak for `param`: another one under the adapter's name, loaded later, is PEFT's."""
        self._adapter_name = self.subject = adapter_name
        self._param = param

    def __call__(self, wrapper: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Called by `state_dict()`."""
        key, base = self._key(prefix), f"{prefix}token_adapter.base_layer."
        if self.resting or not self._speaks(wrapper) or key not in state_dict:
            return
        count = self._count(wrapper)
        if count:
            state_dict[key] = state_dict[key][:count]
            return
        del state_dict[key]
        if self._is_alone(wrapper):
            for name in [name for name in state_dict if name.startswith(base)]:
                state_dict[prefix + name.removeprefix(base)] = state_dict.pop(name)

    def on_load(
        self,
        wrapper: Any,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        errors: list[str],
    ) -> None:
        """Called by `load_state_dict()`: what fits is what `state_dict` shows."""
        if self.resting or not self._speaks(wrapper):
            return
        key, param, count = self._key(prefix), self._param.detach(), self._count(wrapper)
        given = state_dict.get(key)
        if count and given is not None:
            if given.shape != param[:count].shape:
                errors.append(
                    f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, "
                    f"the shape in current model is {param[:count].shape}."
                )
            padded = param.clone()
            if given.shape == param[:count].shape:
                padded[:count] = given
            state_dict[key] = padded
        elif not count:
            _refuse_around_the_slot(state_dict, prefix, TOKENS, self._adapter_name)
            if given is not None and strict:
                unexpected_keys.append(key)
            state_dict[key] = self._param
            if self._is_alone(wrapper):
                for name in wrapper.original_module.state_dict():
                    if prefix + name in state_dict:
                        state_dict[f"{prefix}token_adapter.base_layer.{name}"] = state_dict.pop(prefix + name)

    def _key(self, prefix: str) -> str:
        return f"{prefix}{TOKENS}.{self._adapter_name}"

    def _speaks(self, wrapper: Any) -> bool:
        deltas = wrapper.token_adapter.trainable_tokens_delta
        return self._adapter_name in deltas and deltas[self._adapter_name] is self._param

    def _count(self, wrapper: Any) -> int:
        return len(wrapper.token_adapter.token_indices[self._adapter_name])

    def _is_alone(self, wrapper: Any) -> bool:
        return set(wrapper.token_adapter.trainable_tokens_delta) == {self._adapter_name}
