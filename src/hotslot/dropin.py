"""PEFT's hotswap functions over a Swapper: same names, signatures, defaults and, where PEFT raises with reason, errors.

What differs from `peft.utils.hotswap` differs in the result: every LoRA option that hotslot swaps is swapped, a swap
that raises has changed nothing, other adapters keep every byte, and the model's configs describe what is live. As in
PEFT no parameter moves unless its shape has to change.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import PeftType
from torch import nn

from . import checkpoint as checkpoints
from . import live
from .block import arrange, pack
from .engine import Engine, State
from .entry import Entry
from .errors import ModelError, RankError, UnexpectedTargetError, UnsupportedError
from .leases import Gate
from .methods import PARTS, TOKENS, is_of_training, refuse_unsupported_options, split_key
from .planning import plan_adapters, refuse_unfit
from .report import SwapReport
from .swapper import Swapper

_lock = threading.RLock()


logger = logging.getLogger(__name__)


class PaddedLoraConfig(LoraConfig):
    """A config whose `r` and `rank_pattern` state the padding, as PEFT's `prepare_…(config=…)` makes them.

    What is saved is the adapter: `to_dict`, and so `save_pretrained`, state the ranks that it has.
    """

    def to_dict(self) -> dict[str, Any]:
        """The config with the adapter's own ranks."""
        stated: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        stated.update(self.__dict__.get("_true_ranks", {}))
        return stated


def hotswap_adapter(
    model: nn.Module, model_name_or_path: Any, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Swap the adapter `adapter_name` on the model for the one at `model_name_or_path`, in place.

    A drop-in for `peft.utils.hotswap.hotswap_adapter`.

    Args:
        model: the PEFT model, compiled or not.
        model_name_or_path: folder or Hub id of the new adapter.
        adapter_name: PEFT's name of the adapter that is replaced; the name stays.
        torch_device: taken for PEFT's sake; the tensors go straight to where the old ones are.
        **kwargs: `subfolder`, `revision`, `cache_dir`, `token`.

    Raises:
        ValueError: another method, an option that cannot be swapped, a broken adapter, or the old one is merged.
        RuntimeError: the adapter targets layers that have no adapter on the model, or does not fit them.
    """
    hub = {key: kwargs[key] for key in ("subfolder", "revision", "cache_dir", "token") if kwargs.get(key) is not None}
    if "token" not in hub and kwargs.get("use_auth_token"):
        hub["token"] = kwargs["use_auth_token"]
    engine = Engine.of(model, adapter_name)
    sink = engine.arrival() if engine is not None else None
    checkpoint = checkpoints.read(model_name_or_path, pin_memory=live.is_on_gpu(model), sink=sink, **hub)
    checkpoint = live.converted(model, checkpoint)
    _refuse_other_method(_config_on(model, adapter_name), checkpoint.config.get("peft_type"))
    swap(model, adapter_name, checkpoint)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Swap the adapter `adapter_name` on the model for tensors in memory, in place.

    A drop-in for `peft.utils.hotswap.hotswap_adapter_from_state_dict`. The tensors are copied: neither the dict nor
    they are changed or kept.

    Args:
        model: a model with LoRA layers, compiled or not.
        state_dict: the new adapter's tensors under the model's own names, `….lora_A.<adapter_name>.weight`. Layers
            that it leaves out no longer contribute.
        adapter_name: PEFT's name of the adapter that is replaced; the name stays.
        config: of the new adapter.
        parameter_prefix: taken for PEFT's sake; only "lora_" can be swapped.

    Raises:
        ValueError, RuntimeError: as `hotswap_adapter`.
    """
    if parameter_prefix != "lora_":
        raise UnsupportedError(
            "Only LoRA is swapped.", where="parameter_prefix", found=parameter_prefix, expected="lora_"
        )
    renamed, foreign = {}, []
    endings = {f".{part.key(adapter_name)}": suffix for suffix, part in PARTS.items()}
    stated = checkpoints.config_dict(config)
    for key, tensor in state_dict.items():
        if is_of_training(key, stated):
            continue
        plain = _without_adapter_name(key, adapter_name, endings)
        if plain is None and key.endswith(".bias") and getattr(config, "bias", "none") != "none":
            plain = key  # the base model's own, which has no adapter's name
        if plain is None:
            foreign.append(key)
        else:
            renamed[plain] = tensor
    if foreign:
        raise _unexpected(foreign)
    pin = live.is_on_gpu(model)
    swap(model, adapter_name, checkpoints.from_tensors(renamed, stated, origin="the state_dict", pin_memory=pin))


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make all LoRA adapters of the model ready to be swapped under torch.compile, for ranks up to `target_rank`.

    A drop-in for `peft.utils.hotswap.prepare_model_for_compiled_hotswap`. Scalings become tensors, and matrices are
    padded with zeros; the Parameter objects stay the same ones.

    Args:
        model: with at least one LoRA adapter, not compiled yet.
        target_rank: the largest rank to come; None to pad nothing.
        config: the model's config, or its dict of them, whose `r` and `rank_pattern` are to say `target_rank`. What
            `save_pretrained` writes states the adapter's own ranks all the same.
        check_compiled: what to do about a model that is compiled already: "error", "warn" or "ignore".

    Raises:
        ValueError: the model is compiled; it has no LoRA adapter; `target_rank` is below a rank that it has or not
            divisible by the groups of a convolution.
    """
    if live.is_compiled(model):
        _complain_about_compiled(check_compiled)
    names = live.adapter_names(model)
    if not names:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    if target_rank is not None:
        for name in names:
            for slot in live.find_slots(model, name).values():
                _refuse_target_rank(slot, target_rank)
    make_room(model, names, target_rank or 0)
    if config is not None and target_rank is not None:
        for entry in config.values() if isinstance(config, dict) else [config]:
            _state_padding(entry, target_rank)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ValueError if an adapter of `config1` cannot take the place of one of `config0`.

    A drop-in for `peft.utils.hotswap.check_hotswap_configs_compatible`. PEFT also refuses other `use_rslora`,
    `lora_dropout` and `alpha_pattern`; these are swapped here.
    """
    _refuse_other_method(config0, config1.peft_type)
    for config in (config0, config1):
        refuse_unsupported_options(checkpoints.config_dict(config), "the config")


# -- patching PEFT -------------------------------------------------------------------------------------------------

_REPLACED = (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
_patched: list[tuple[Any, str, Any]] = []  # (module, name, PEFT's function)


def patch_functions() -> None:
    """Put hotslot's functions in the place of PEFT's, in `peft.utils.hotswap` and wherever they were imported from it.

    Calling it again reaches modules that were imported meanwhile.
    """
    import peft.utils.hotswap as source

    originals = {name: original for module, name, original in _patched if module is source}
    for function in _REPLACED:
        name = function.__name__
        original = originals.get(name, getattr(source, name))
        for module in list(sys.modules.values()):
            # Not getattr: a lazy module would import what nobody has asked for.
            for key, value in list(getattr(module, "__dict__", {}).items()):
                if value is original and module is not sys.modules[__name__]:
                    _patched.append((module, key, original))
                    setattr(module, key, function)


def unpatch_functions() -> None:
    """Give PEFT its own functions back, wherever `patch_functions` has put hotslot's."""
    while _patched:
        module, key, original = _patched.pop()
        if getattr(module, key, None) in _REPLACED:
            setattr(module, key, original)


# -- for hotslot's integrations --------------------------------------------------------------------------------------


def swap(model: nn.Module, adapter_name: str, checkpoint: checkpoints.Checkpoint, *, grows: bool = False) -> None:
    """Swap the adapter `adapter_name` on the model for this one, in place: all of it, or none of it if this raises.

    Args:
        model: a model with LoRA layers, compiled or not.
        adapter_name: PEFT's name of the adapter that is replaced; the name stays.
        checkpoint: the new adapter.
        grows: whether to give modules that it targets or saves a slot where the model has none. Code compiled of the
            model is compiled anew then, so a model that is known to be compiled refuses it, as PEFT's function does.
            Where a Swapper is attached, its `grow` does that.

    Raises:
        CheckpointError, UnsupportedError, DoesNotFitError, ModelError: nothing was touched.
    """
    with Gate.of(live.innermost(model)).swap(), _lock:  # the gate first: who holds a lock must not wait for leases
        swapper = Swapper.of(model, adapter_name)
        try:
            report = _swap(model, adapter_name, checkpoint)
        except (UnexpectedTargetError, RankError):
            if not grows or live.is_compiled(model) or swapper is not None:
                raise
            _grow_and_swap(model, adapter_name, checkpoint)
            return
        if swapper is not None:
            swapper.witness(report)


def make_room(model: nn.Module, adapter_names: Iterable[str], target_rank: int) -> None:
    """Move these adapters' parameters into one allocation each, every slot with room for `target_rank`, or its own.

    Values stay, Parameter objects too; scalings become tensors. If it raises, all is where it was.
    """
    with Gate.of(live.innermost(model)).swap(), _lock:
        created: list[Engine] = []
        try:
            for name in adapter_names:
                slots = live.find_slots(model, name)
                engine = _known_engine(model, name)
                if engine is None:
                    engine = _new_engine(model, name, slots)
                    created.append(engine)
                room = {fqn: _rounded(max(target_rank, slot.rank), slot.groups) for fqn, slot in slots.items()}
                with engine.lock:
                    engine.resize(room, arena=True)
        except BaseException:
            for engine in created:
                engine.release()
            raise


# -- inside --------------------------------------------------------------------------------------------------------


def _rounded(rank: int, groups: int) -> int:
    """Up to what the groups of a convolution divide."""
    return -(-rank // groups) * groups


def _swap(model: nn.Module, adapter_name: str, checkpoint: checkpoints.Checkpoint) -> SwapReport:
    engine, created = _known_engine(model, adapter_name), False
    if engine is not None and engine.live.entry is not None and not engine.keeps_history:
        checkpoints.keep_buffer(engine.live.entry.adapter.checkpoint.data)  # for the next to come
    if engine is not None and checkpoint.schema in engine.binding.memory.layout.packed:
        entry = Entry(adapter_name, checkpoint)  # one of its family has been here before: it fits
        live.refuse_other_base(model, entry.adapter)
        live.refuse_other_parameters(model, engine.binding.slots, entry.adapter)
        with engine.lock:
            return engine.swap(State(entry))
    if engine is not None and engine.live.entry is None:  # a model that was prepared with what came with it
        live.refuse_unsupported_resident(model, adapter_name)
    slots = engine.binding.slots if engine is not None else _slots(model, adapter_name)
    _refuse_unexpected(checkpoint, slots, adapter_name)
    entry = _entry(checkpoint, adapter_name)
    live.refuse_other_base(model, entry.adapter)
    live.refuse_other_parameters(model, slots, entry.adapter)
    wanted = {fqn: max(slots[fqn].rank, target.rank) for fqn, target in entry.adapter.targets.items()}
    if engine is None:
        room = {fqn: wanted.get(fqn, slot.rank) for fqn, slot in slots.items()}
        shapes = [slot.shape(room[fqn], extra=_gained(slot, entry)) for fqn, slot in slots.items()]
        pack(entry.adapter, arrange(shapes))
        engine, created = _new_engine(model, adapter_name, slots), True
    if engine.binding.arena and any(slots[fqn].rank < rank for fqn, rank in wanted.items()):
        logger.warning("the new adapter's rank is above what the model was prepared for: compiled code will recompile")
    try:
        with engine.lock:
            return engine.swap_in(entry, wanted)
    except BaseException:
        if created:
            engine.release()
        raise


def _grow_and_swap(model: nn.Module, adapter_name: str, checkpoint: checkpoints.Checkpoint) -> None:
    adapter = _entry(checkpoint, adapter_name).adapter
    engine, created = _known_engine(model, adapter_name), False
    live.refuse_unsupported_resident(model, adapter_name)
    # The base layer's dtype is what transformers and diffusers give an adapter, without a PeftModel to cast it.
    plan = plan_adapters(model, [adapter], max_blend=1, dtype="base", adapter_name=adapter_name)
    refuse_unfit(model, adapter, plan, adapter_name)
    if engine is None:
        engine, created = _new_engine(model, adapter_name, _slots(model, adapter_name)), True
    had, growth = len(engine.binding.slots), None
    try:
        with engine.lock:
            engine.refuse_if_merged()
            engine.binding.put_right()
            growth = engine.grow(plan.slots, plan.saved, plan.tokens, plan.tied)
            engine.swap(State(Entry(adapter_name, adapter.checkpoint)))
    except BaseException:
        if growth is not None:
            growth.undo()
        if created:
            engine.release()
        raise
    logger.warning(
        "the new adapter targets modules that had no slot: %d added; compiled code will recompile",
        len(engine.binding.slots) - had,
    )


def _refuse_unexpected(checkpoint: checkpoints.Checkpoint, slots: Mapping[str, live.Slot], adapter_name: str) -> None:
    """PEFT's own message for layers that are not there."""
    keys = {name: key for name in checkpoint.tensors if (key := split_key(name)) is not None}
    unexpected = [name for name, (fqn, suffix) in keys.items() if fqn not in slots or not slots[fqn].can_have(suffix)]
    if unexpected:
        raise _unexpected([_with_adapter_name(name, keys[name][1], adapter_name) for name in unexpected])


def _entry(checkpoint: checkpoints.Checkpoint, adapter_name: str) -> Entry:
    """The adapter, with PEFT's leniency for half pairs."""
    keys = {name: key for name in checkpoint.tensors if (key := split_key(name)) is not None}
    # PEFT fills in zeros for a matrix that is missing, so that the module adds nothing: as if it were not there.
    have = set(keys.values())
    halves = {name for name, (fqn, suffix) in keys.items() if (fqn, _OTHER_HALF.get(suffix, suffix)) not in have}
    if halves:
        alone = {keys[name][0] for name in halves}
        kept = {
            name: checkpoint.tensor(name)
            for name in checkpoint.tensors
            if name not in keys or keys[name][0] not in alone
        }
        checkpoint = checkpoints.from_tensors(kept, dict(checkpoint.config), origin=checkpoint.origin)
    return Entry(adapter_name, checkpoint)


def _gained(slot: live.Slot, entry: Entry) -> Iterable[str]:
    """The parts that the adapter has and the slot will be given."""
    target = entry.adapter.targets.get(slot.fqn)
    return target.parts.keys() - slot.held.keys() if target is not None else ()


_OTHER_HALF = {
    "lora_A.weight": "lora_B.weight",
    "lora_B.weight": "lora_A.weight",
    "lora_B.bias": "lora_B.weight",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}


def _known_engine(model: nn.Module, adapter_name: str) -> Engine | None:
    """The engine of this slot, of a Swapper or of an earlier call, if there is one."""
    found = Engine.of(model, adapter_name)
    if found is not None and Swapper.of(model, adapter_name) is None and not found.is_current():
        found.release()  # the adapter was deleted or loaded anew; what is left of it is PEFT's again
        return None
    return found


def _new_engine(model: nn.Module, adapter_name: str, slots: dict[str, live.Slot]) -> Engine:
    binding = None
    try:
        live.stay_on_device(slots)
        ranks = {fqn: slot.rank for fqn, slot in slots.items()}
        binding = live.Binding(model, adapter_name, slots, ranks, arena=False)
        return Engine(model, adapter_name, binding, empty=False, keeps_history=False)
    except BaseException:
        if binding is not None:
            binding.release()
        live.let_be_offloaded(slots)
        raise


def _slots(model: nn.Module, adapter_name: str) -> dict[str, live.Slot]:
    """The slots of an adapter that PEFT has put on the model, if it is one that can be swapped out."""
    slots = live.find_slots(model, adapter_name)
    if not slots:
        raise ModelError(
            f"The model has no LoRA adapter {adapter_name!r} to swap out.",
            where=f"adapter_name={adapter_name!r}",
            expected="the name of an adapter that PEFT has loaded",
            found=f"adapters on the model: {live.adapter_names(model) or 'none'}",
            hint="load the first adapter with PEFT, or use hotslot.attach, which needs none",
        )
    live.refuse_unsupported_resident(model, adapter_name)
    for slot in slots.values():
        slot.refuse_if_merged()
    return slots


def _refuse_other_method(old: Any, new: Any) -> None:
    """PEFT's own words: its callers match them."""
    new_type = new.value if isinstance(new, PeftType) else str(new)
    old_type = old.peft_type.value if old is not None else new_type
    if old_type != new_type:
        raise _other_method(f"Incompatible PEFT types found: {old_type} and {new_type}", new_type)
    if new_type != PeftType.LORA.value:
        raise _other_method(f"Hotswapping only supports {PeftType.LORA.value} but {new_type} was passed.", new_type)


def _other_method(summary: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        summary,
        where="peft_type",
        found=found,
        expected="LORA, on the model and in the new adapter",
        hint="load it with PEFT itself; docs/supported.md lists what hotslot swaps",
    )


def _complain_about_compiled(check_compiled: str) -> None:
    if check_compiled == "error":
        raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
    if check_compiled == "warn":
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
            "result in re-compilation, hurting performance. Call the function before compiling the model.",
            stacklevel=3,
        )
    elif check_compiled != "ignore":
        raise ValueError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
        )


def _refuse_target_rank(slot: live.Slot, target_rank: int) -> None:
    if target_rank % slot.groups:
        raise ValueError(
            f"Trying to pad a Conv2d LoRA adapter with groups={slot.groups} to target rank {target_rank}, but the "
            f"target rank is not divisible by {slot.groups}. Please choose a target rank that is divisible by "
            f"{slot.groups}."
        )
    if slot.rank > target_rank:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
            f"({slot.rank}). This is not possible."
        )


def _state_padding(config: LoraConfig, target_rank: int) -> None:
    if type(config) is LoraConfig:
        config.__class__ = PaddedLoraConfig
    config.__dict__.setdefault("_true_ranks", {"r": config.r, "rank_pattern": dict(config.rank_pattern or {})})
    config.r = target_rank
    if config.rank_pattern:
        config.rank_pattern.update(dict.fromkeys(config.rank_pattern, target_rank))


def _config_on(model: nn.Module, adapter_name: str) -> PeftConfig | None:
    configs = getattr(live.unwrap(model), "peft_config", None)
    return configs.get(adapter_name) if isinstance(configs, Mapping) else None


def _unexpected(keys: list[str]) -> UnexpectedTargetError:
    shown = ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
    return UnexpectedTargetError(
        f"Hot swapping the adapter did not succeed, unexpected keys found: {shown}.",
        where=keys[0],
        found=f"{len(keys)} keys that the model does not have",
        expected="keys of layers that have the adapter",
        hint="the adapter targets layers without a slot; hotslot.attach(model, adapters={…}) gives them one",
    )


def _with_adapter_name(name: str, suffix: str, adapter_name: str) -> str:
    head = name.removesuffix(".weight").removesuffix(suffix.removesuffix(".weight"))  # a magnitude has it or not
    return head + PARTS[suffix].key(adapter_name)


def _without_adapter_name(key: str, adapter_name: str, endings: Mapping[str, str]) -> str | None:
    """The name that a file has for this key of a model, or None if it is none of this adapter's."""
    key = key.replace("_orig_mod.", "")
    for ending, suffix in endings.items():
        if key.endswith(ending):
            return f"{key.removesuffix(ending)}.{suffix}"
    if key.endswith(f".{TOKENS}.{adapter_name}"):
        return key.removesuffix(f".{adapter_name}")
    module, saved, name = key.partition(f".modules_to_save.{adapter_name}.")
    return f"{module}.{name}" if saved else None
