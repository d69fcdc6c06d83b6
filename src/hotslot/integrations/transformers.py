"""`model.load_adapter(…, hotswap=…)` and `enable_peft_hotswap` of transformers, with hotslot underneath.

transformers' own `hotswap=True` leaves out that PEFT makes layers, and sets the new adapter's tensors in the old one's
place: scalings, ranks, configs, and layers that the new one leaves out stay the old one's. Here the adapter is read,
renamed as transformers renames it, and swapped: in place, all of it or none of it. Whatever is no hotswap is
transformers' own code.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import types
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from .. import checkpoint as checkpoints
from .. import dropin, live
from ..checkpoint import Checkpoint, Schema
from ..engine import Engine
from ..errors import UnsupportedError
from ..methods import MAGNITUDE, interpret

_PREFIX = "base_model.model."  # of every name in a file of PEFT's

# transformers' own, whoever has patched what since
_THEIRS: dict[str, Callable[..., Any]] = {
    name: vars(PeftAdapterMixin)[name] for name in ("enable_peft_hotswap", "load_adapter")
}
_signature = inspect.signature(_THEIRS["load_adapter"])

# Model → families of adapters whose tensors are named as its modules are: known after one look at the names.
_direct: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Schema]] = weakref.WeakKeyDictionary()


def enable(model: Any) -> None:
    """Let `load_adapter(…, hotswap=…)` and `enable_peft_hotswap` of this one model swap with hotslot.

    `hotslot.patch_peft()` does it for all models. What `load_adapter` loads beside a hotswap, `set_adapter`,
    `delete_adapter` and the rest stay transformers' own.

    Args:
        model: a transformers model, or what holds one: a pipeline, a SentenceTransformer.

    Raises:
        UnsupportedError: it has no `load_adapter` of transformers' PEFT integration.
    """
    model = live.model_of(model)
    own = getattr(type(model), "load_adapter", None)
    if not isinstance(model, PreTrainedModel) or own not in (_THEIRS["load_adapter"], load_adapter):
        raise UnsupportedError(
            "The model has no load_adapter that loads adapters of PEFT.",
            where="model",
            found=type(model).__name__ if own is None else f"{own.__module__}.{own.__qualname__}",
            expected="a transformers model with PeftAdapterMixin.load_adapter",
            hint="hotslot.attach(model, adapters={…}) swaps adapters of any nn.Module",
        )
    for name, ours in _OURS.items():
        object.__setattr__(model, name, types.MethodType(ours, model))


def disable(model: Any) -> None:
    """Give the model transformers' own methods back, or `patch_peft`'s; adapters stay as they are."""
    model = live.model_of(model)
    for name in _OURS:
        vars(model).pop(name, None)


def patch() -> None:
    """`enable` for all models of transformers, those to come included."""
    for name, ours in _OURS.items():
        setattr(PeftAdapterMixin, name, ours)


def unpatch() -> None:
    """Take `patch` back."""
    for name, theirs in _THEIRS.items():
        if vars(PeftAdapterMixin)[name] is _OURS[name]:
            setattr(PeftAdapterMixin, name, theirs)


@functools.wraps(_THEIRS["load_adapter"])
def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Theirs, but that a hotswap swaps."""
    asked = _signature.bind(self, *args, **kwargs)
    asked.apply_defaults()
    given = dict(asked.arguments)
    given.pop("self")
    given |= given.pop("kwargs", {})
    if _is_hotswap(self, given):
        return _hotswap(self, given)
    found = _THEIRS["load_adapter"](self, *args, **kwargs)
    if getattr(self, "_hotswap_enabled", False):
        _make_room(self, [given["adapter_name"] or "default"])
    return found


@functools.wraps(_THEIRS["enable_peft_hotswap"])
def enable_peft_hotswap(self: Any, *args: Any, **kwargs: Any) -> None:
    """Theirs, which notes what is asked for; adapters that are there already get their room at once."""
    noted = ("_hotswap_enabled", "_prepare_peft_hotswap_kwargs")
    before = {name: vars(self)[name] for name in noted if name in vars(self)}
    _THEIRS["enable_peft_hotswap"](self, *args, **kwargs)
    try:
        _make_room(self, getattr(self, "peft_config", {}))
    except BaseException:
        for name in noted:
            vars(self).pop(name, None)
        vars(self).update(before)
        raise


_OURS: dict[str, Callable[..., Any]] = {"enable_peft_hotswap": enable_peft_hotswap, "load_adapter": load_adapter}


# -- loading --------------------------------------------------------------------------------------------------------


def _is_hotswap(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether an adapter is to take another's place, by transformers' rule; what it refuses is left to it."""
    known = getattr(model, "peft_config", None) or {}
    asked = given["hotswap"]
    if asked == "auto":
        asked = getattr(model, "_hotswap_enabled", False)
    is_lora = all(method == "LORA" for method in live.residents(model).values())
    return bool(asked) and given["adapter_name"] in known and is_lora and _names_a_source(given)


def _names_a_source(given: Mapping[str, Any]) -> bool:
    named = given["peft_model_id"] or given.get("pretrained_model_name_or_path") or given["load_config"]
    return named is not None or (given["adapter_state_dict"] is not None and given["peft_config"] is not None)


def _make_room(model: Any, names: Any) -> None:
    """Room for the rank that `enable_peft_hotswap` was told, in the slots of LoRA adapters that were just loaded."""
    methods = live.residents(model)
    loras = [name for name in names if methods.get(name) == "LORA"]
    target_rank = (model._prepare_peft_hotswap_kwargs or {}).get("target_rank") or 0
    dropin.make_room(model, loras, target_rank)


def _hotswap(model: Any, given: dict[str, Any]) -> Any:
    name = given["adapter_name"]
    request = _request(given)
    checkpoint, found = _as_loaded(model, request, request.read())
    dropin.swap(model, name, checkpoint, grows=True)
    model.peft_config[name].inference_mode = not given["is_trainable"]
    _set_trainable(model, name, trainable=given["is_trainable"])
    return found


def _set_trainable(model: Any, adapter_name: str, *, trainable: bool) -> None:
    """As a plain load leaves the model. PEFT and torch take four times as long as the swap to set what is set."""
    from peft.functional import set_requires_grad

    engine = Engine.of(model, adapter_name)
    assert engine is not None
    params = (param for slot in engine.binding.slots.values() for param in slot.params.values())
    if any(param.requires_grad is not trainable for param in params):
        set_requires_grad(model, adapter_name, requires_grad=trainable)
    if not trainable and any(module.training for module in model.modules()):
        model.eval()


# -- what is to be loaded -------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """What `load_adapter` was asked to load.

    Attributes:
        adapter_name: PEFT's name of it.
        source: folder or Hub id; None if there are tensors.
        tensors: in memory; they go before the folder's.
        config: a peft config, which goes before the folder's; None for that.
        options: transformers' LoadStateDictConfig, without what is downloaded.
        download: options of the Hub.
        is_trainable: whether it is to be trained.
    """

    adapter_name: str
    source: str | None
    tensors: Mapping[str, torch.Tensor] | None
    config: Any
    options: Any
    download: dict[str, Any]
    is_trainable: bool

    def read(self) -> Checkpoint:
        """The adapter as it was saved, read and checked by hotslot."""
        folder = self._folder() if self.source is not None else None
        if self.tensors is None:
            assert folder is not None
            return checkpoints.read(folder, config=self.config)
        config = self.config
        if config is None:
            from peft import PeftConfig

            config = PeftConfig.from_pretrained(str(folder))
        return checkpoints.from_tensors(self.tensors, config, origin="adapter_state_dict")

    def _folder(self) -> Path:
        """Where the adapter lies on this machine; transformers fetches what is on the Hub."""
        from transformers.utils.hub import cached_file
        from transformers.utils.peft_utils import find_adapter_config_file

        source = self.source
        assert source is not None
        subfolder = self.download.get("subfolder") or ""
        if os.path.isdir(source):
            return Path(source, subfolder)
        found = find_adapter_config_file(source, **self.download)
        if found is None:
            raise ValueError(
                f"adapter model file not found in {source}. Make sure you are passing the correct path to the adapter "
                "model."
            )
        weights = cached_file(source, checkpoints.WEIGHTS_NAME, **self.download) if self.tensors is None else None
        return Path(weights or found).parent


def _request(given: dict[str, Any]) -> _Request:
    from transformers.modeling_utils import LoadStateDictConfig

    known = set(_signature.parameters)
    more = {name: value for name, value in given.items() if name not in known}
    options = LoadStateDictConfig(**(vars(given["load_config"]) if given["load_config"] is not None else {}) | more)
    download: dict[str, Any] = {**(options.download_kwargs or {}), **(given["adapter_kwargs"] or {})}
    if given.get("local_files_only"):
        download["local_files_only"] = True
    source = given["peft_model_id"] or options.pretrained_model_name_or_path
    return _Request(
        adapter_name=given["adapter_name"],
        source=None if source is None else os.fspath(source),
        tensors=given["adapter_state_dict"],
        config=given["peft_config"],
        options=options,
        download=download,
        is_trainable=given["is_trainable"],
    )


# -- names and layouts that have changed since the adapter was saved ------------------------------------------------


def _as_loaded(model: Any, request: _Request, checkpoint: Checkpoint) -> tuple[Checkpoint, Any]:
    """The adapter under this model's names and in its layouts, and what transformers reports of loading it."""
    known = _direct.setdefault(model, weakref.WeakSet())
    plain = request.options.weight_mapping is None and not request.options.ignore_mismatched_sizes
    if (plain and checkpoint.schema in known) or _is_direct(model, request, checkpoint):
        if plain:
            known.add(checkpoint.schema)
        return checkpoint, _report()
    return _converted(model, request, checkpoint)


def _report() -> Any:
    from transformers.utils.loading_report import LoadStateDictInfo

    return LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def _is_direct(model: Any, request: _Request, checkpoint: Checkpoint) -> bool:
    """Whether each tensor belongs where its name says: in a module that the model has, and renamed by no rule."""
    from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    if request.options.ignore_mismatched_sizes:
        return False
    rules: Any = request.options.weight_mapping or get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    adapted = build_peft_weight_mapping(rules, request.adapter_name, peft_config=live.build_config(checkpoint))
    converters = [rule for rule in adapted if isinstance(rule, WeightConverter)]
    adapter, modules = interpret(checkpoint), live.base_modules(model)
    places = {*adapter.targets, *adapter.base_copies, *adapter.saved, *adapter.biases, *adapter.tokens}
    if not all(name.startswith(_PREFIX) for name in checkpoint.tensors):
        return False
    if not all(fqn.replace(".base_layer", "") in modules for fqn in places):
        return False
    names = [name.removeprefix(_PREFIX) for name in checkpoint.tensors]
    return all(rename_source_key(name, renamings, converters) == (name, None) for name in names)


def _converted(model: Any, request: _Request, checkpoint: Checkpoint) -> tuple[Checkpoint, Any]:
    """What a plain load of transformers makes of it, on a copy of the model without memory for its weights."""
    from peft import get_peft_model_state_dict

    if interpret(checkpoint).base_copies:
        raise UnsupportedError(
            f"{checkpoint.origin} carries base weights under names that transformers changes.",
            where=next(iter(interpret(checkpoint).base_copies)),
            found="a copy of an embedding or output layer, beside tensors of other names than the model's",
            expected="an adapter without copies: save_embedding_layers=False",
            hint="load it without hotswap",
        )
    name = request.adapter_name
    twin: Any = live.hollow(model)
    # transformers finds no place for a magnitude under the name that PEFT saves it by.
    tensors = {
        f"{key}.weight" if key.endswith(f".{MAGNITUDE}") else key: checkpoint.tensor(key) for key in checkpoint.tensors
    }
    with torch.random.fork_rng(devices=[]):
        found = _THEIRS["load_adapter"](
            twin,
            adapter_name=name,
            peft_config=live.build_config(checkpoint, as_trained=True),
            adapter_state_dict=tensors,
            is_trainable=request.is_trainable,
            hotswap=False,
            load_config=copy.copy(request.options),
        )
    state = get_peft_model_state_dict(twin, adapter_name=name, save_embedding_layers=False)
    named = {f"{_PREFIX}{key}": tensor for key, tensor in state.items()}
    return checkpoints.from_tensors(named, twin.peft_config[name], origin=checkpoint.origin), found
