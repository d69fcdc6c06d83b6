"""How diffusers reads a LoRA file for a pipeline: which of its tensors go where.

diffusers alone knows, so it is asked: it loads each family of files once onto a copy of the components that has no
memory of its own, and what has come of the tensors is looked up there.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import live
from ..checkpoint import config_dict, hub_errors
from ..errors import (
    AdapterNotFoundError,
    CorruptFileError,
    HotslotError,
    ShapeError,
    TensorError,
    UnexpectedTargetError,
    UnsupportedError,
)
from ..methods import Rules, refuse_endless, refuse_unsupported_options

logger = logging.getLogger(__name__)

_OF_PEFT = "base_model.model."  # begins the tensors' names in PEFT's own folders
_NAME = "hotslot"  # of the adapter on the copy
_WIDENED = "x_embedder"  # of Flux: its control variants have more inputs there, and take LoRAs of those that have not
_TARGETS = ("exclude_modules", "layers_to_transform", "layers_pattern")  # options that narrow target_modules
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch.Size\((.*?)\).*?torch.Size\((.*?)\)")


def configuration(parts: Mapping[str, Mapping[str, Any]], base_values: Collection[str] = ()) -> dict[str, Any]:
    """The config of an adapter of several models.

    Args:
        parts: name of a component → its config.
        base_values: names of tensors that are values for the components' own.
    """
    methods = {str(part.get("peft_type")) for part in parts.values()}
    config = {"peft_type": next(iter(sorted(methods - {"LORA"})), "LORA"), "components": dict(parts)}
    return config | ({"base_values": sorted(base_values)} if base_values else {})


class Place(NamedTuple):
    """Where one of the adapter's tensors comes from.

    Attributes:
        name: in the Checkpoint.
        source: name in what diffusers' converter gives.
        shape: of the tensor.
        box: where in it the source's values are, if they do not fill it; zeros around them.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    box: tuple[slice, ...] | None

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor, of what the converter gives."""
        if self.source is None:
            return next(iter(tensors.values())).new_zeros(self.shape)
        values = tensors[self.source]
        if self.box is None:
            return values
        padded = values.new_zeros(self.shape)
        padded[self.box] = values
        return padded


class Family(NamedTuple):
    """What diffusers makes of files that differ in their values alone."""

    places: list[Place]
    config: dict[str, Any]


class Shell(NamedTuple):
    """A pipeline without its components: enough to run its loading code, and nothing that keeps it alive."""

    cls: type
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, pipe: Any) -> Shell:
        """Of a pipeline."""
        # Not by getattr and setattr, which go through the shared config.
        attributes = {name: None if isinstance(value, nn.Module) else value for name, value in vars(pipe).items()}
        return cls(type(pipe), attributes)

    def around(self, components: Mapping[str, Any], lora_state_dict: Any) -> Any:
        """A pipeline of the class, with these components and no others."""
        twin: Any = object.__new__(self.cls)
        twin.__dict__.update(self.attributes)
        twin.__dict__.update(components, lora_state_dict=lora_state_dict)
        return twin


class Answer(NamedTuple):
    """What diffusers' converter gives for a source.

    Attributes:
        tensors: as diffusers names them.
        more: what it says beside them: alphas, and last the file's metadata.
    """

    tensors: dict[str, Tensor]
    more: list[Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """Of all but the values."""
        return tuple((name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()), repr(self.more)


class _Answered(Exception):
    """Leaves diffusers' `load_lora_weights` once it has asked what is in the file."""


class Conversion:
    """One reading of a source, by the pipeline's own code.

    Args:
        shell: of the pipeline.
        models: name → component that carries LoRA.
        origin: what the user called the source.
    """

    def __init__(self, shell: Shell, models: Mapping[str, nn.Module], origin: str) -> None:
        self._shell = shell
        self._models = models
        self._origin = origin

    def ask(self, source: Any, options: Mapping[str, Any]) -> Answer:
        """Have the pipeline's `load_lora_weights` call its `lora_state_dict`, and no more."""
        answers = []

        def answer(source: Any, **asked: Any) -> Any:
            cls: Any = self._shell.cls
            tensors, *more = cls.lora_state_dict(source, **asked)
            answers.append(Answer(tensors, more))
            raise _Answered

        # Of the components there is no more yet than what this looks at.
        stand_ins = {name: SimpleNamespace(config=model.config) for name, model in self._models.items()}
        try:
            self._shell.around(stand_ins, answer).load_lora_weights(source, use_safetensors=True, **options)
        except _Answered:
            pass
        except Exception as error:
            raise _refusal(error, self._origin) from error
        found = answers[-1]
        self._refuse_others_than_tensors(found)
        self._refuse_metadata(found)
        self._refuse_absent_components(found)
        return found

    def load(self, answer: Answer, options: Mapping[str, Any]) -> Family:
        """Have it load numbers, and see what becomes of them: each tensor has one of its own in place of its values.

        Where that comes out, the tensor belongs.
        """
        copies = {name: live.hollow(model) for name, model in self._models.items()}
        widths = {name: _widths(copy) for name, copy in copies.items()}
        twin = self._shell.around(copies, lambda *_, **__: (_numbered(answer), *answer.more))
        with (
            warnings.catch_warnings(record=True) as said,
            torch.inference_mode(False),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.simplefilter("always")
            try:
                twin.load_lora_weights({}, adapter_name=_NAME, **options)
                if not options.get("load_into_transformer_2"):  # by which Wan's loads everything into that one
                    _load_left_out(answer, copies)
                self._refuse_widened(widths, copies)
                family = self._family(answer, copies)
            except HotslotError:
                raise
            except Exception as error:
                raise _refusal(error, self._origin) from error
        for message in dict.fromkeys(str(warning.message) for warning in said):  # of alphas that are not used, say
            logger.warning("%s: %s", self._origin, message)
        return family

    def _family(self, answer: Answer, copies: Mapping[str, Any]) -> Family:
        from peft import get_peft_model_state_dict

        places, configs, sources = [], {}, list(answer.tensors)
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
                if _is_of_zero_pair(key, made):
                    places.append(Place(f"{name}.{key}", None, tuple(tensor.shape), None))
                else:
                    places.append(_place(f"{name}.{key}", tensor, sources, self._origin))
        norms = [_place(name, tensor, sources, self._origin) for name, tensor in self._norms(copies, configs)]
        places += norms
        found = {place.source for place in places}
        lost = [source for source in sources if source not in found]
        if lost or not places:
            whose = "this LoRA was made for another pipeline"
            if any(key.startswith(_OF_PEFT) for key in lost):
                one = next(iter(self._models))
                whose = f"PEFT saved it, for one component: hotslot.attach(pipe.{one}, …) takes it, if it is for that"
            raise UnexpectedTargetError(
                f"{self._origin} has tensors that diffusers finds no place for in this pipeline.",
                where=", ".join(lost[:8]) or self._origin,
                found=f"{len(lost)} of {len(sources)} tensors, as diffusers names them",
                expected=f"modules of {', '.join(self._models)} of a {self._shell.cls.__name__}",
                hint=whose,
            )
        return Family(places, configuration(configs, [place.name for place in norms]))

    def _refuse_widened(self, widths: Mapping[str, Mapping[str, int]], copies: Mapping[str, nn.Module]) -> None:
        """Raise if diffusers has put a layer of more inputs in the place of one: it does for Flux's control LoRAs."""
        for name, copy in copies.items():
            found = _widths(copy)
            for path, width in widths[name].items():
                if found[path] != width:
                    widens = path == _WIDENED
                    raise ShapeError(
                        f"{self._origin} was made for a layer of more inputs than this pipeline's.",
                        where=f"{name}.{path}",
                        found=f"{found[path]} inputs",
                        expected=f"{width}, by the pipeline; compiled code and the other LoRAs have them",
                        hint="let diffusers widen the layer first: pipe.load_lora_weights(…) of such a LoRA, without "
                        "hotswap and before hotslot.attach"
                        if widens
                        else "this LoRA was made for another base model",
                    )

    def _norms(self, copies: Mapping[str, nn.Module], configs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the pipeline's own that the file has values for: the norms of Flux's control LoRAs."""
        for name, copy in copies.items():
            for key, tensor in copy.named_parameters():
                if tensor.dim() > 1 or f".{_NAME}" in key or not tensor.any():
                    continue
                if name not in configs:
                    raise UnsupportedError(
                        f"{self._origin} has norms, and no LoRA beside them.",
                        where=f"{name}.{key}",
                        found="values for the pipeline's own weights alone",
                        expected="LoRA matrices of the same component, too",
                        hint="load it with diffusers itself",
                    )
                yield f"{name}.{key}", tensor

    def _refuse_others_than_tensors(self, answer: Answer) -> None:
        given: Mapping[str, Any] = answer.tensors
        stray = next((name for name, value in given.items() if not isinstance(value, Tensor)), None)
        if stray is not None:
            raise TensorError(
                f"{self._origin} holds something that is no adapter weight.",
                where=stray,
                found=type(given[stray]).__name__,
                expected="tensors alone",
                hint="pass the LoRA's own tensors, named as load_lora_weights takes them",
            )

    def _refuse_absent_components(self, answer: Answer) -> None:
        cls: Any = self._shell.cls
        absent = {*cls._lora_loadable_modules} - self._models.keys()
        lost = [key for key in answer.tensors if key.partition(".")[0] in absent]
        if lost:
            raise UnexpectedTargetError(
                f"{self._origin} is for a component, too, that the pipeline does not have.",
                where=lost[0],
                found=f"{len(lost)} of {len(answer.tensors)} tensors of it; the pipeline has {', '.join(self._models)}",
                expected="a LoRA of these alone, or a pipeline with the component",
                hint="give a dict of the others' tensors to leave it out",
            )

    def _refuse_metadata(self, answer: Answer) -> None:
        """Raise if a config that the file has with it would have PEFT do more than make layers."""
        metadata = answer.more[-1] or {}
        for name, model in self._models.items():
            config = {
                key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")
            }
            if not any(key.startswith(f"{name}.") and ".lokr_" in key for key in answer.tensors):
                refuse_unsupported_options(config, self._origin)
            paths = [path for path, _ in model.named_modules()]
            refuse_endless(config, paths, self._origin)
            for option in ("rank_pattern", "alpha_pattern"):
                Rules(config.get(option) or {}, paths, option, self._origin)


def _widths(model: nn.Module) -> dict[str, int]:
    """Path → number of inputs of each linear layer, PEFT's looked through."""
    found = {name.replace(".base_layer", ""): m for name, m in model.named_modules() if type(m) is nn.Linear}
    return {name: module.in_features for name, module in found.items() if f".{_NAME}" not in name}


def _numbered(answer: Answer) -> dict[str, Tensor]:
    numbers = enumerate(answer.tensors.items(), 1)
    return {name: torch.tensor(float(number), device="cpu").expand(tensor.shape) for number, (name, tensor) in numbers}


def _load_left_out(answer: Answer, copies: Mapping[str, Any]) -> None:
    """Components of which diffusers' pipelines load nothing, though the file has it: a second transformer."""
    for name, copy in copies.items():
        own = any(key.startswith(f"{name}.") for key in answer.tensors)
        if own and not getattr(copy, "peft_config", None) and hasattr(copy, "load_lora_adapter"):
            copy.load_lora_adapter(_numbered(answer), prefix=name, adapter_name=_NAME, metadata=answer.more[-1])


def _number(value: Any) -> Any:
    """An alpha or a rank that diffusers has left as a tensor, or a pattern of them, as numbers."""
    if isinstance(value, dict):
        return {key: _number(part) for key, part in value.items()}
    return value.item() if isinstance(value, Tensor) else value


def _is_of_zero_pair(key: str, made: Mapping[str, Tensor]) -> bool:
    """Whether diffusers has made up both matrices: Wan's loader does, of a text-to-video LoRA on image-to-video."""
    pair = [
        made.get(key.replace(".lora_A.", f".{part}.").replace(".lora_B.", f".{part}.")) for part in ("lora_A", "lora_B")
    ]
    return ".lora_" in key and all(tensor is not None and not tensor.any() for tensor in pair)


def _place(name: str, tensor: Tensor, sources: list[str], origin: str) -> Place:
    """Where the numbers have come out."""
    low, high = (int(value) for value in torch.aminmax(tensor.detach()))
    shape = tuple(tensor.shape)
    if low == high and 0 < high <= len(sources):
        return Place(name, sources[high - 1], shape, None)
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
    source = sources[high - 1]
    if f".{_WIDENED}." not in name:  # it would run, and be another model's LoRA
        raise ShapeError(
            f"{origin} has other dimensions than this pipeline.",
            where=name,
            found=f"{source} of {tuple(part.stop - part.start for part in box)}",
            expected=f"{shape}, by the pipeline; narrower ones at {_WIDENED} alone, which control LoRAs make wider",
            hint="this LoRA was made for another base model",
        )
    return Place(name, source, shape, box)


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
    if isinstance(error, hub_errors()):
        return AdapterNotFoundError(
            f"diffusers finds no LoRA at {origin:.200}.",
            where=f"{origin:.200}",
            found=said,
            expected="a safetensors file, a folder with one, or a repository of the Hub",
            hint="name the file in a folder or repository with weight_name=; a repository needs the Hub, or its cache",
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
