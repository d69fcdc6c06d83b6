"""A diffusers pipeline as one model: the components that carry LoRA, and how diffusers reads a LoRA file for them.

Which tensor of a file goes where is known to diffusers alone: it loads each family of files once onto a copy of the
components that has no memory of its own, and what has come of the tensors is looked up there.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint as checkpoints
from . import live
from .checkpoint import Checkpoint, Source, config_dict
from .errors import (
    AdapterNotFoundError,
    ConfigError,
    CorruptFileError,
    HotslotError,
    ModelError,
    PickleRefusedError,
    ShapeError,
    TensorError,
    UnexpectedTargetError,
    UnsupportedError,
)
from .methods import Rules, refuse_endless, refuse_unsupported_options

logger = logging.getLogger(__name__)

_NAME = "hotslot"  # of the adapter on the copy
_KEPT = 16  # families
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TARGETS = ("exclude_modules", "layers_to_transform", "layers_pattern")  # options that narrow target_modules
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch.Size\((.*?)\).*?torch.Size\((.*?)\)")


def whole(model: Any) -> nn.Module:
    """The model itself, or the one in what transformers wraps it in; of a diffusers pipeline its components, as one.

    Raises:
        ModelError: it is neither, or none of the pipeline's components carries LoRA.
    """
    model = live.model_of(model)
    if isinstance(model, nn.Module):
        return model
    names = getattr(model, "_lora_loadable_modules", None)
    if names is None:
        raise ModelError(
            "There is nothing to attach to.",
            found=type(model).__name__,
            expected="an nn.Module, or a diffusers pipeline whose class loads LoRA",
        )
    found = {name: getattr(model, name, None) for name in names}
    members = {name: member for name, member in found.items() if isinstance(member, nn.Module)}
    if not members:
        raise ModelError(
            "The pipeline has none of its components that carry LoRA.",
            found=type(model).__name__,
            expected=f"one or more of {', '.join(names)}",
            hint="load them first",
        )
    for member in members.values():
        known = live.Assembly.of(member)
        if isinstance(known, Components) and known.are(members):
            known.follow(model)
            return known
    return Components(model, members)


def read(
    model: nn.Module, source: Source, *, config: Any = None, pin_memory: bool = False, **options: Any
) -> Checkpoint:
    """An adapter for the model: `hotslot.checkpoint.read`, or for a pipeline as diffusers reads it.

    Args:
        model: of `whole`.
        source: of a pipeline whatever `load_lora_weights` takes. A dict is neither kept nor changed.
        config: of a pipeline: name of a component → its peft config; with a dict of tensors that are named as
            `save_lora_weights` names them.
        pin_memory: read into page-locked memory.
        **options: as `hotslot.checkpoint.read` takes them, or as `load_lora_weights` does: weight_name, subfolder, …

    Raises:
        CheckpointError: one of its kinds, see `hotslot.errors`.
        DoesNotFitError, UnsupportedError: diffusers finds no place for all of it in the pipeline.
    """
    if not isinstance(model, Components) or isinstance(source, Checkpoint):
        return live.converted(model, checkpoints.read(source, config=config, pin_memory=pin_memory, **options))
    if config is not None:
        return _of_a_trainer(source, config, pin_memory=pin_memory)
    return model.read(source, pin_memory=pin_memory, **options)


def _of_a_trainer(source: Any, config: Any, *, pin_memory: bool) -> Checkpoint:
    if not isinstance(source, Mapping) or not isinstance(config, Mapping):
        raise ConfigError(
            "A config was given for a pipeline that is not one for each of its components.",
            where="config",
            found=f"{type(config).__name__}, for a {type(source).__name__}",
            expected="a dict of tensors, and a dict of peft configs by component: {'unet': LoraConfig(…), …}",
            hint="leave config out: a file that diffusers wrote says what it needs",
        )
    stated = {str(name): config_dict(part) for name, part in config.items()}
    stray = [name for name in source if str(name).partition(".")[0] not in stated]
    if stray:
        raise UnexpectedTargetError(
            "The dict of tensors has some of a component without a config.",
            where=str(stray[0]),
            found=f"configs of {', '.join(stated) or 'none'}",
            expected="names that begin with one of these components",
            hint="give the config of each component",
        )
    return checkpoints.from_tensors(source, _configuration(stated), pin_memory=pin_memory)


def _configuration(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    methods = {str(part.get("peft_type")) for part in parts.values()}
    return {"peft_type": next(iter(sorted(methods - {"LORA"})), "LORA"), "components": dict(parts)}


class _Place(NamedTuple):
    """Where one of the adapter's tensors comes from.

    Attributes:
        name: in the Checkpoint.
        source: name in what diffusers' converter gives.
        shape: of the tensor.
        box: where in it the source's values are, if they do not fill it; zeros around them.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    box: tuple[slice, ...] | None

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = tensors[self.source]
        if self.box is None:
            return values
        padded = values.new_zeros(self.shape)
        padded[self.box] = values
        return padded


class _Family(NamedTuple):
    """What diffusers makes of files that differ in their values alone."""

    places: list[_Place]
    config: dict[str, Any]


class Components(live.Assembly):
    """The components of a pipeline that carry LoRA, under the names that diffusers gives them."""

    def __init__(self, pipe: Any, members: Mapping[str, nn.Module]) -> None:
        super().__init__(members)
        self._pipe = weakref.ref(pipe)
        self._families: OrderedDict[Any, _Family] = OrderedDict()

    def are(self, members: Mapping[str, nn.Module]) -> bool:
        """Whether these are its members, compiled or not."""
        own = {name: live.unwrap(member) for name, member in self.named_children()}
        return own == {name: live.unwrap(member) for name, member in members.items()}

    def follow(self, pipe: Any) -> None:
        """Go on with another pipeline of the same components, or with the same one, compiled since."""
        self._pipe = weakref.ref(pipe)
        for name in list(self._modules):
            self.add_module(name, getattr(pipe, name))

    def current(self) -> dict[str, Any]:
        """See Assembly."""
        pipe = self._pipe()
        return {} if pipe is None else {name: getattr(pipe, name, None) for name in self._modules}

    def read(self, source: Any, *, pin_memory: bool = False, **options: Any) -> Checkpoint:
        """See `read`."""
        pipe = self._pipe()
        if pipe is None:
            raise ModelError(
                "The pipeline that was attached no longer exists, and diffusers reads LoRA files with one.",
                hint="Swapper.of(pipe) for the pipeline that has its components now",
            )
        origin = "the dict of tensors" if isinstance(source, Mapping) else os.fspath(source)
        options = {key: value for key, value in options.items() if value is not None}
        _refuse_path(source, options)
        family, tensors = _Conversion(pipe, self, origin).run(source, options, self._families)
        taken = {place.name: place.take(tensors) for place in family.places}
        return checkpoints.from_tensors(taken, family.config, origin=origin, pin_memory=pin_memory)


def _refuse_path(source: Any, options: Mapping[str, Any]) -> None:
    """Raise if it is a pickle, or a path of nothing."""
    names = [os.fspath(name) for name in (source, options.get("weight_name")) if isinstance(name, (str, os.PathLike))]
    for name in names:
        if name.endswith(_PICKLES):
            raise PickleRefusedError(
                "A pickle is not read, for reading one can run code.",
                where=name,
                found="a pickle",
                expected="a safetensors file",
                hint="convert it where that is safe: safetensors.torch.save_file(torch.load(…, weights_only=True), …)",
            )
    if names and not os.path.exists(names[0]) and (os.path.isabs(names[0]) or names[0].startswith((".", "~"))):
        raise AdapterNotFoundError(
            f"No LoRA at {names[0]:.200}.",
            where=f"{names[0]:.200}",
            found="nothing",
            expected="a safetensors file, a folder with one, or a repository of the Hub",
            hint="check the path; ~ is not expanded",
        )


class _Answered(Exception):
    """Leaves diffusers' `load_lora_weights` once it has asked what is in the file."""


class _Conversion:
    """One reading of a source. Of a family that is not known yet diffusers loads it, onto a copy of the components.

    In place of its values each tensor has a number of its own there: where that comes out, the tensor belongs.
    """

    def __init__(self, pipe: Any, components: Components, origin: str) -> None:
        self._pipe = pipe
        self._models = {prefix.removesuffix("."): model for prefix, model in live.roots(components).items()}
        self._origin = origin
        self._tensors: dict[str, Tensor] = {}
        self._more: list[Any] = []  # what the converter says beside them: alphas, metadata
        self._key: Any = None

    def run(
        self, source: Any, options: Mapping[str, Any], families: OrderedDict[Any, _Family]
    ) -> tuple[_Family, Mapping[str, Tensor]]:
        """The family of the source, which is one of `families` from now on, and what diffusers' converter gives."""
        given = dict(source) if isinstance(source, Mapping) else source
        try:
            self._ask(given, options)
            if self._key not in families:
                families[self._key] = self._load(options)
        except HotslotError:
            raise
        except Exception as error:
            raise _refusal(error, self._origin) from error
        families.move_to_end(self._key)
        if len(families) > _KEPT:
            families.popitem(last=False)
        return families[self._key], self._tensors

    def _ask(self, source: Any, options: Mapping[str, Any]) -> None:
        """Have the pipeline's `load_lora_weights` call its `lora_state_dict`, and no more."""

        def answer(source: Any, **asked: Any) -> Any:
            self._tensors, *self._more = type(self._pipe).lora_state_dict(source, **asked)
            shapes = tuple((name, tensor.dtype, tensor.shape) for name, tensor in self._tensors.items())
            self._key = shapes, repr(self._more), repr(sorted(options.items()))
            raise _Answered

        # Of the components there is no more yet than what this looks at.
        stand_ins = {name: SimpleNamespace(config=model.config) for name, model in self._models.items()}
        try:
            self._twin(stand_ins, answer).load_lora_weights(source, use_safetensors=True, **options)
        except _Answered:
            self._refuse_metadata(self._more[-1] or {})
            self._refuse_absent_components()

    def _load(self, options: Mapping[str, Any]) -> _Family:
        """Have it load numbers, and see what becomes of them."""
        copies = {name: live.hollow(model) for name, model in self._models.items()}
        twin = self._twin(copies, lambda *_, **__: (self._numbered(), *self._more))
        with (
            warnings.catch_warnings(record=True) as said,
            torch.inference_mode(False),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.simplefilter("always")
            twin.load_lora_weights({}, adapter_name=_NAME, **options)
            self._load_left_out(copies)
        for message in dict.fromkeys(str(warning.message) for warning in said):  # of alphas that are not used, say
            logger.warning("%s: %s", self._origin, message)
        return self._family(copies)

    def _twin(self, components: Mapping[str, Any], lora_state_dict: Any) -> Any:
        """A pipeline of the class, with these components and no others."""
        twin = object.__new__(type(self._pipe))
        for name, value in vars(self._pipe).items():  # not by setattr, which writes into the shared config
            twin.__dict__[name] = None if isinstance(value, nn.Module) else value
        twin.__dict__.update(components, lora_state_dict=lora_state_dict)
        return twin

    def _numbered(self) -> dict[str, Tensor]:
        numbers = enumerate(self._tensors.items(), 1)
        return {name: torch.tensor(float(number)).expand(tensor.shape) for number, (name, tensor) in numbers}

    def _load_left_out(self, copies: Mapping[str, Any]) -> None:
        """Components of which diffusers' pipelines load nothing, though the file has it: a second transformer."""
        for name, copy in copies.items():
            own = any(key.startswith(f"{name}.") for key in self._tensors)
            if own and not getattr(copy, "peft_config", None) and hasattr(copy, "load_lora_adapter"):
                copy.load_lora_adapter(self._numbered(), prefix=name, adapter_name=_NAME, metadata=self._more[-1])

    def _family(self, copies: Mapping[str, Any]) -> _Family:
        from peft import get_peft_model_state_dict

        places, configs, sources = [], {}, list(self._tensors)
        for name, copy in copies.items():
            if _NAME not in (getattr(copy, "peft_config", None) or {}):
                continue
            made = get_peft_model_state_dict(copy, adapter_name=_NAME, save_embedding_layers=False)
            # The file's tensors say the targets, whatever its config does.
            adapted = [path for path, module in copy.named_modules() if hasattr(module, "base_layer")]
            whole_paths = {"target_modules": sorted(adapted), **dict.fromkeys(_TARGETS)}
            stated = vars(copy.peft_config[_NAME])
            stated.update({option: _number(value) for option, value in stated.items()})
            configs[name] = config_dict(copy.peft_config[_NAME]) | whole_paths
            for key, tensor in made.items():
                places.append(_place(f"{name}.{key}", tensor, sources, self._origin))
        self._refuse_base_weights(copies)
        found = {place.source for place in places}
        lost = [source for source in sources if source not in found]
        if lost or not places:
            raise UnexpectedTargetError(
                f"{self._origin} has tensors that diffusers finds no place for in this pipeline.",
                where=", ".join(lost[:8]) or self._origin,
                found=f"{len(lost)} of {len(sources)} tensors, as diffusers names them",
                expected=f"modules of {', '.join(self._models)} of a {type(self._pipe).__name__}",
                hint="this LoRA was made for another pipeline",
            )
        return _Family(places, _configuration(configs))

    def _refuse_base_weights(self, copies: Mapping[str, nn.Module]) -> None:
        """Raise if the file has others for the pipeline's own weights: the norms of Flux's control LoRAs."""
        own = [
            f"{name}.{key}"
            for name, copy in copies.items()
            for key, tensor in copy.named_parameters()
            if tensor.dim() < 2 and f".{_NAME}" not in key and tensor.any()
        ]
        if own:
            raise UnsupportedError(
                f"{self._origin} has values for the pipeline's own weights, beside LoRA's.",
                where=own[0],
                found=f"{len(own)} of them",
                expected="LoRA matrices alone",
                hint="load it with diffusers itself: the norms of a control LoRA stay until unload_lora_weights",
            )

    def _refuse_absent_components(self) -> None:
        absent = {*self._pipe._lora_loadable_modules} - self._models.keys()
        lost = [key for key in self._tensors if key.partition(".")[0] in absent]
        if lost:
            raise UnexpectedTargetError(
                f"{self._origin} is for a component, too, that the pipeline does not have.",
                where=lost[0],
                found=f"{len(lost)} of {len(self._tensors)} tensors of it; the pipeline has {', '.join(self._models)}",
                expected="a LoRA of these alone, or a pipeline with the component",
                hint="give a dict of the others' tensors to leave it out",
            )

    def _refuse_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Raise if a config that the file has with it would have PEFT do more than make layers."""
        for name, model in self._models.items():
            config = {
                key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")
            }
            if not any(key.startswith(f"{name}.") and ".lokr_" in key for key in self._tensors):
                refuse_unsupported_options(config, self._origin)
            paths = [path for path, _ in model.named_modules()]
            refuse_endless(config, paths, self._origin)
            for option in ("rank_pattern", "alpha_pattern"):
                Rules(config.get(option) or {}, paths, option, self._origin)


def _number(value: Any) -> Any:
    """An alpha or a rank that diffusers has left as a tensor, or a pattern of them, as numbers."""
    if isinstance(value, dict):
        return {key: _number(part) for key, part in value.items()}
    return value.item() if isinstance(value, Tensor) else value


def _place(name: str, tensor: Tensor, sources: list[str], origin: str) -> _Place:
    """Where the numbers have come out."""
    low, high = (int(value) for value in torch.aminmax(tensor.detach()))
    shape = tuple(tensor.shape)
    if low == high and 0 < high <= len(sources):
        return _Place(name, sources[high - 1], shape, None)
    where = (tensor.detach() == high).nonzero()
    box = tuple(slice(int(first), int(last) + 1) for first, last in zip(where.amin(0), where.amax(0), strict=True))
    padded = torch.zeros_like(tensor)
    padded[box] = high
    if low != 0 or not 0 < high <= len(sources) or not torch.equal(padded, tensor):
        raise UnsupportedError(
            f"diffusers computes a tensor of {origin} in a way that hotslot does not follow.",
            where=name,
            found=f"a tensor of shape {shape} that is none of the file's",
            expected="the file's tensors, one for each place, at most padded with zeros",
            hint="load it with diffusers itself",
        )
    return _Place(name, sources[high - 1], shape, box)


def _refusal(error: Exception, origin: str) -> HotslotError:
    """One of hotslot's errors for what diffusers, PEFT and their libraries raise for a LoRA that they do not take."""
    said = f"{type(error).__name__}: {error!s:.300}"
    mismatch = _MISMATCH.search(str(error))
    if mismatch is not None:
        return ShapeError(
            f"{origin} has other dimensions than this pipeline.",
            where=mismatch[1].replace(f".{_NAME}.", "."),
            found=f"shape {mismatch[2]}",
            expected=f"{mismatch[3]}, by the pipeline",
            hint="this LoRA was made for another base model",
        )
    if isinstance(error, OSError):
        return AdapterNotFoundError(
            f"diffusers finds no LoRA at {origin:.200}.",
            where=f"{origin:.200}",
            found=said,
            expected="a safetensors file, a folder with one, or a repository of the Hub",
            hint="name the file in a folder or repository with weight_name=",
        )
    if type(error).__name__ == "SafetensorError":
        return CorruptFileError(
            f"{origin:.200} is no safetensors file.",
            where=f"{origin:.200}",
            found=said,
            expected="what safetensors wrote",
            hint="the file was cut short or damaged: get it again",
        )
    return TensorError(
        f"diffusers does not load {origin:.200} into this pipeline.",
        where=f"{origin:.200}",
        found=said,
        expected="a LoRA of this kind of pipeline, in one of the formats that diffusers reads",
        hint="pipe.load_lora_weights(…) says the same",
    )
