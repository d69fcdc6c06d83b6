"""What PEFT makes of an adapter: a fresh load onto a copy of the model's modules that shares no memory with it.

Whatever a method keeps in its file, draws from a seed or computes from the base weights, its layers in the skeleton
have it, and nothing here knows how. The live model is only read.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import nn

from ..checkpoint import PEFT_PREFIX, Checkpoint
from ..errors import ConfigError, ShapeError, TensorError, UnexpectedTargetError, UnsupportedError
from ..methods import Rules, refuse_endless
from .discover import canonical_name, innermost, unwrap
from .state import build_config

if TYPE_CHECKING:
    from peft import PeftModel

SKELETON = "skeleton"  # PEFT's adapter name there
# What PEFT may make beside the file's tensors (shared projections, index sets), as a multiple of base and file bytes.
# A config that asks for more is not what anybody trains: VeRA's projections are the size of one layer.
_LARGEST_GROWTH = 4
_SMALL = 64 << 20
_MATCHES = 4  # PEFT makes its layers twice, and asks of some modules more than once
# Method → options that make PEFT read the base's values, which on meta it has none of.
_WITHOUT_VALUES = {"LORA": {"init_lora_weights": False}, "ADALORA": {"init_lora_weights": False}}
_HOOKS = (
    "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks", "_load_state_dict_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
)  # fmt: skip

# Path of a base module and name of its parameter or buffer, and its pristine values → what the skeleton has there.
Place: TypeAlias = Callable[[str, torch.Tensor], torch.Tensor]


class Unit(NamedTuple):
    """One place of the base model where PEFT has put something.

    Attributes:
        fqn: path of the base module.
        layer: PEFT's layer or wrapper around it.
    """

    fqn: str
    layer: Any


def base_of(module: nn.Module) -> nn.Module:
    """The base model's own module within whatever PEFT and torch.compile have put around it."""
    from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        module = unwrap(module)
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, _BaseAdaptedAttention):
            module = module.model
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


def input_of(base: Any) -> torch.Tensor | None:
    """Something that the base layer takes; None if that is not known."""
    weight = getattr(base, "weight", None)
    if weight is None:
        return None
    options = {"dtype": weight.dtype, "device": weight.device}
    if isinstance(base, nn.Embedding):
        return torch.arange(base.num_embeddings, device=weight.device)
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sizes = [dilation * size + 3 for dilation, size in zip(base.dilation, base.kernel_size, strict=True)]
        return torch.randn(1, base.in_channels, *sizes, **options)
    if isinstance(base, nn.Linear) or weight.ndim == 1:  # a norm
        return torch.randn(3, weight.shape[-1], **options)
    return torch.randn(3, base.nx, **options) if hasattr(base, "nx") else None  # transformers' Conv1D


def base_tree(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the base model alone, under each of its names."""

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(f"{path}.{name}" if path else name, base_of(child))

    return walk("", base_of(innermost(model)))


def shadow(model: nn.Module, place: Place) -> nn.Module:
    """A copy of the base model's modules, whose tensors `place` gives; tied ones get one for each of their names."""
    copies: dict[int, nn.Module] = {}

    def copied(path: str, module: nn.Module) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        twin = copies[id(module)] = module.__class__.__new__(module.__class__)
        attributes = dict(module.__dict__)
        attributes.update({name: OrderedDict() for name in _HOOKS if name in attributes})
        # An instance's own forward is that of the original; accelerate's hooks and compiled calls are.
        for name in ("forward", "_compiled_call_impl", "_hf_hook", "_old_forward", "_diffusers_hook"):
            attributes.pop(name, None)
        # PEFT writes into these, and so do transformers and diffusers.
        for name in ("peft_config", "_hf_peft_config_loaded", "_prepare_lora_hotswap_kwargs"):
            attributes.pop(name, None)
        for name in ("config", "_internal_dict"):  # the latter is diffusers', whose loader writes into it
            if name in attributes:
                attributes[name] = copy.deepcopy(attributes[name])
        attributes["_parameters"] = {
            name: None if tensor is None else _like(tensor, place(f"{path}{name}", tensor.detach()))
            for name, tensor in module._parameters.items()
        }
        attributes["_buffers"] = {
            name: None if tensor is None else place(f"{path}{name}", tensor) for name, tensor in module._buffers.items()
        }
        attributes["_modules"] = {}
        twin.__dict__.update(attributes)
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else copied(f"{path}{name}.", base_of(child))
        return twin

    return copied("", base_of(innermost(model)))


def _like(param: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """A frozen parameter of other values, with what is noted on `param`: bitsandbytes says there how it quantised."""
    twin = nn.Parameter(values, requires_grad=False)
    twin.__dict__.update(param.__dict__)
    return twin


def hollow(model: nn.Module) -> nn.Module:
    """A copy of the base model's modules, on the CPU, with zeros of float32, which take no memory for matrices."""

    def place(path: str, tensor: torch.Tensor) -> torch.Tensor:
        kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
        if tensor.dim() < 2:  # others may write into it
            return torch.zeros(tensor.shape, dtype=kind, device="cpu")
        return torch.zeros((), dtype=kind, device="cpu").expand(tensor.shape)

    return shadow(model, place)


def load(
    model: nn.Module,
    checkpoint: Checkpoint,
    own: Callable[[str], torch.Tensor],
    *,
    adapter_name: str = SKELETON,
    on_device: bool = False,
    trained: bool = True,
    autocast: bool = True,
) -> PeftModel:
    """`PeftModel.from_pretrained` of the checkpoint onto a copy of the base model, and without a file.

    Of the base's tensors it has copies where PEFT has put something, and elsewhere none: they are on meta, or with
    `on_device` one NaN each, where the live ones are, unless the file has values for them. Tied tensors are apart.

    Args:
        model: the live model; only read.
        checkpoint: an adapter of any method.
        own: path of a tensor of the base model → its values when no adapter is merged into it.
        adapter_name: PEFT's name of the adapter there.
        on_device: for methods that have more than layers: PEFT makes that where it finds the base.
        trained: whether to give it the checkpoint's tensors, and not leave it as PEFT has made it.
        autocast: whether tensors of 16 bits become float32, as by `autocast_adapter_dtype`.

    Raises:
        ConfigError: PEFT does not take its config, or it has a pattern that might be matched for ever.
        UnsupportedError, TensorError, ShapeError, UnexpectedTargetError: it does not belong to this model.
    """
    touched = _touched(model, checkpoint)

    def place(path: str, tensor: torch.Tensor) -> torch.Tensor:
        if path.startswith(touched) or (on_device and PEFT_PREFIX + path in checkpoint.tensors):
            return own(path).detach().clone()
        return _hollow(tensor) if on_device else _nothing(tensor)

    skeleton: PeftModel = _built(shadow(model, place), checkpoint, adapter_name, autocast=autocast)
    expected = _refuse_other_tensors(skeleton, checkpoint)
    if trained:
        _fill(skeleton, checkpoint, expected, autocast=autocast)
    skeleton.eval()
    return skeleton


def units(skeleton: PeftModel) -> Iterator[Unit]:
    """Where PEFT has put something, as its `merge_and_unload` finds it: outermost, in the order of the modules."""
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(skeleton.base_model, BaseTuner):
        return
    inside: tuple[str, ...] = ()
    root: Any = skeleton.base_model.model
    for name, module in root.named_modules():
        if inside and name.startswith(inside):
            continue
        if hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "base_layer"):
            yield Unit(canonical_name(name, ""), module)
            inside += (f"{name}.",)


def _touched(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the paths begin with of the tensors that PEFT needs."""
    empty = outline(model, checkpoint)
    return tuple(f"{unit.fqn}." for unit in units(empty)) if empty is not None else ("",)


def outline(model: nn.Module, checkpoint: Checkpoint, adapter_name: str = SKELETON) -> PeftModel | None:
    """`load` without memory or values; None if PEFT looks at values already when it makes its layers.

    Raises:
        ConfigError, UnsupportedError, TensorError, ShapeError: as `load`.
    """
    _refuse_endless(checkpoint, [path for path, _ in base_tree(model)])
    nothing = shadow(model, lambda path, tensor: _nothing(tensor))
    try:
        empty: PeftModel = _built(
            nothing, checkpoint, adapter_name, **_WITHOUT_VALUES.get(checkpoint.config["peft_type"], {})
        )
    except UnsupportedError as error:
        if isinstance(error.__cause__, NotImplementedError):
            return None
        # PEFT's layers for quantised weights look at more than these have here.
        _refuse_quantised(model, [path for path, _ in base_tree(model)], checkpoint)
        raise
    _refuse_quantised(model, [unit.fqn for unit in units(empty)], checkpoint)
    _refuse_growth(empty, checkpoint)
    if not empty.peft_config[adapter_name].is_prompt_learning:  # whose state_dict has to be computed
        _refuse_other_tensors(empty, checkpoint)
    return empty


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # of torchao's, too


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    """Of the tensor's shape, dtype and device, one element of memory, and with no values that pass for any."""
    nothing = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), nothing, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _built(base: nn.Module, checkpoint: Checkpoint, adapter_name: str, *, autocast: bool = True, **changes: Any) -> Any:
    from peft import PeftModel
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    config: Any = build_config(checkpoint, as_trained=True)
    config.inference_mode = True
    vars(config).update(changes)
    kind: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    cuda = sorted({tensor.device.index for tensor in base.parameters() if tensor.is_cuda})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=cuda), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # advice to whoever trains
        try:
            return kind(base, config, adapter_name, autocast_adapter_dtype=autocast)
        except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError, KeyError) as error:
            raise _refusal(checkpoint, error) from error


def _fill(skeleton: Any, checkpoint: Checkpoint, expected: Container[str], *, autocast: bool) -> None:
    from peft import set_peft_model_state_dict

    name = skeleton.active_adapter
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        try:
            result: Any = set_peft_model_state_dict(skeleton, tensors, adapter_name=name)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise _refusal(checkpoint, error) from error
        # PEFT finds no place for a prompt, which it has taken out of the file before it looks.
        unexpected = [key for key in result.unexpected_keys if key not in expected]
        if unexpected:
            raise UnexpectedTargetError(
                f"{checkpoint.origin} has tensors that PEFT finds no place for; unexpected keys found: "
                f"{', '.join(unexpected[:8])}.",
                where=unexpected[0],
                found=f"{len(unexpected)} of {len(tensors)} tensors",
                expected="tensors of modules that the model has",
                hint="this adapter belongs to another base model",
            )
        if hasattr(skeleton.base_model, "_cast_adapter_dtype"):
            skeleton.base_model._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=autocast)


def _refuse_endless(checkpoint: Checkpoint, paths: list[str]) -> None:
    config, origin = checkpoint.config, checkpoint.origin
    refuse_endless(config, paths, origin, runs=_MATCHES * len(paths))
    for option, patterns in config.items():
        if option.endswith("_pattern") and isinstance(patterns, Mapping):
            Rules(patterns, paths, option, origin)


def _refuse_quantised(model: nn.Module, fqns: list[str], checkpoint: Checkpoint) -> None:
    modules = dict(base_tree(model))
    for fqn in fqns:
        for name, param in modules[fqn].named_parameters() if fqn in modules else ():
            if type(param) is not nn.Parameter or not param.is_floating_point():
                raise UnsupportedError(
                    f"{checkpoint.origin} would have to be merged into a quantised weight, which cannot hold the sum.",
                    where=f"{fqn}.{name}",
                    found=f"{type(param).__name__} of {param.dtype}",
                    expected="floating point weights",
                    hint="attach the model with a slot for it: route='side'",
                )


def _refuse_growth(empty: Any, checkpoint: Checkpoint) -> None:
    made = sum(tensor.nbytes for tensors in (empty.parameters(), empty.buffers()) for tensor in tensors)
    base = sum(tensor.nbytes for tensor in empty.parameters() if not tensor.requires_grad)
    allowed = _LARGEST_GROWTH * (base + checkpoint.nbytes) + _SMALL
    if made > allowed:
        raise ConfigError(
            f"The config of {checkpoint.origin} makes PEFT allocate out of all proportion.",
            where="adapter_config.json",
            found=f"{made:,} bytes",
            expected=f"at most {allowed:,}, for {checkpoint.nbytes:,} bytes of adapter on this model",
            hint="the config was edited, or belongs to another adapter: save the adapter again with save_pretrained",
        )


def _refuse_other_tensors(empty: Any, checkpoint: Checkpoint) -> Collection[str]:
    """Names of what PEFT would save of such an adapter. Raise unless the file has all: the rest is left at random."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = get_peft_model_state_dict(empty, adapter_name=empty.active_adapter, save_embedding_layers=False)
    for name, tensor in expected.items():
        found = checkpoint.tensors.get(name)
        if found is None:
            raise TensorError(
                f"{checkpoint.origin} lacks a tensor that its config asks for on this model.",
                where=name,
                found="no such tensor",
                expected=f"shape {tuple(tensor.shape)}",
                hint="this adapter belongs to another base model, or its file was cut",
            )
        if tuple(found.shape) != tuple(tensor.shape):
            raise ShapeError(
                f"{checkpoint.origin} has other dimensions than this model.",
                where=name,
                found=f"shape {tuple(found.shape)}",
                expected=f"{tuple(tensor.shape)}, by the model and the config",
                hint="this adapter belongs to another base model",
            )
    return set(expected)


def _refusal(checkpoint: Checkpoint, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"PEFT does not load {checkpoint.origin} onto this model.",
        where=str(checkpoint.config.get("peft_type")),
        found=f"{type(error).__name__}: {error!s:.300}",
        expected="an adapter of this base model",
        hint="PeftModel.from_pretrained(base, adapter) says the same",
    )
