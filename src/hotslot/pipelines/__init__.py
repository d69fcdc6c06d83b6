"""A diffusers pipeline as one model: the components that carry LoRA, and how diffusers reads a LoRA file for them.

Takes a pipeline, or any model, and whatever `load_lora_weights` takes; gives one module and a Checkpoint. Which tensor
of a file goes where is known to diffusers alone (`conversion`); a file like one that it has read is then read without
it (`straight`). Nothing here is written to the live model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from .. import checkpoint as checkpoints
from .. import live
from ..checkpoint import CONFIG_NAME, Checkpoint, Files, Schema, Sink, Source, config_dict
from ..errors import AdapterNotFoundError, ConfigError, ModelError, UnexpectedTargetError
from .components import Components
from .conversion import configuration

__all__ = ["LoraFile", "Request", "listed", "packed_as", "read", "request", "survey", "whole"]


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA in a file, a folder or the Hub, which diffusers finds and reads.

    Attributes:
        source: as `load_lora_weights` takes it.
        options: of `load_lora_weights`.
    """

    source: Any
    options: Mapping[str, Any]

    @property
    def origin(self) -> str:
        """What the user called the adapter, for messages."""
        return str(self.source)

    @property
    def nbytes(self) -> int:
        """Bytes of the file, if it is one that is named."""
        return os.path.getsize(self.source) if os.path.isfile(self.source) else 0


# An adapter that can be read at any time; or that has been read, and cannot be read again.
Request: TypeAlias = Files | LoraFile | Checkpoint


def whole(model: Any) -> nn.Module:
    """The model itself, or what has one: of a diffusers pipeline its components that carry LoRA, as one.

    Of a pipeline of transformers, or of a SentenceTransformer, its model.

    Raises:
        ModelError: it is neither, or none of the pipeline's components carries LoRA.
    """
    names = getattr(model, "_lora_loadable_modules", None)
    if names is None or isinstance(model, nn.Module):
        held = live.model_of(model)
        if isinstance(held, nn.Module):
            return held
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
        live.note_norms(live.unwrap(member))  # while the LoRAs on it are those that may have brought them
    for member in members.values():
        known = live.Assembly.of(member)
        if isinstance(known, Components) and known.are(members):
            known.follow(model)
            return known
    return Components(model, members)


def request(
    model: nn.Module, source: Source | Request, *, config: Any = None, pin_memory: bool = False, **options: Any
) -> Request:
    """Where an adapter for the model is, such that it can be read when it is needed. Tensors are copied now.

    Args:
        model: of `whole`.
        source: what `hotslot.checkpoint.read` takes; of a pipeline whatever `load_lora_weights` takes. A dict is
            neither kept nor changed.
        config: of a pipeline: name of a component → its peft config; with a dict of tensors that are named as
            `save_lora_weights` names them.
        pin_memory: copy tensors into page-locked memory.
        **options: as `hotslot.checkpoint.read` takes them, or as `load_lora_weights` does: weight_name, subfolder, …

    Raises:
        CheckpointError: one of its kinds, see `hotslot.errors`.
        DoesNotFitError, UnsupportedError: diffusers finds no place for all of the tensors in the pipeline.
    """
    if isinstance(source, (Checkpoint, Files, LoraFile)):
        return source
    if not isinstance(model, Components):
        if isinstance(source, Mapping):
            return checkpoints.read(source, config=config, pin_memory=pin_memory, **options)
        return checkpoints.locate(source, config, **options)
    if config is not None:
        return _of_a_trainer(source, config, pin_memory=pin_memory)
    if isinstance(source, Mapping):
        return model.read(source, pin_memory=pin_memory, **options)
    if os.path.exists(source):  # and not on the Hub; when it is read, the working directory may be another one
        source = os.path.join(os.getcwd(), source)
    return LoraFile(source, options)


def read(
    model: nn.Module,
    source: Source | Request,
    *,
    config: Any = None,
    pin_memory: bool = False,
    sink: Sink | None = None,
    **options: Any,
) -> Checkpoint:
    """An adapter for the model: `hotslot.checkpoint.read`, or for a pipeline as diffusers reads it.

    Takes what `request` does, or what it gives; `sink` as `hotslot.checkpoint.read` does.

    Raises:
        CheckpointError: one of its kinds, see `hotslot.errors`.
        DoesNotFitError, UnsupportedError: diffusers finds no place for all of it in the pipeline.
    """
    asked = request(model, source, config=config, pin_memory=pin_memory, **options)
    if isinstance(asked, LoraFile):
        assert isinstance(model, Components)
        return model.read(asked.source, pin_memory=pin_memory, sink=sink, **asked.options)
    checkpoint = checkpoints.read(asked, pin_memory=pin_memory, sink=sink)
    return checkpoint if isinstance(model, Components) else live.converted(model, checkpoint)


def survey(model: nn.Module, asked: Request) -> Schema | None:
    """All of an adapter but its values, of which none is read; None where only reading it tells.

    Raises:
        CheckpointError: as `read`, but for what values may be at fault.
    """
    if isinstance(asked, LoraFile):
        assert isinstance(model, Components)
        return model.survey(asked.source, **asked.options)
    if isinstance(asked, Files) and not isinstance(model, Components):
        return live.outcome(model, checkpoints.survey(asked))
    return None


def packed_as(model: nn.Module, asked: Request) -> Files | None:
    """For what files a packed file of the adapter stands; None if it cannot be told whether they are still the same."""
    if isinstance(asked, LoraFile):
        assert isinstance(model, Components)
        return model.files(asked.source, **asked.options)
    return asked if isinstance(asked, Files) else None


def listed(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The adapters for the model that lie in a folder: the name that each has there → where it is.

    Each folder in it that has an adapter_config.json; for a pipeline each safetensors file, without the suffix. What
    begins with a dot is being written, or was put away.

    Raises:
        AdapterNotFoundError: there is no such folder; or it is an adapter itself.
    """
    place = Path(folder)
    try:
        found = sorted(path for path in place.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise AdapterNotFoundError(
            f"No folder of adapters at {place}.",
            where=place,
            found=f"{type(error).__name__}: {error}",
            expected="a folder with a folder for each adapter, or for a pipeline a safetensors file",
            hint="give the folder that the adapters' folders are in; or {name: source, …}",
        ) from error
    if isinstance(model, Components):
        return {path.stem: path for path in found if path.suffix == ".safetensors"}
    held = {path.name: path for path in found if os.path.isfile(path / CONFIG_NAME)}  # False where nobody may look
    if not held and os.path.isfile(place / CONFIG_NAME):
        raise AdapterNotFoundError(
            f"{place} is an adapter, and no folder of adapters.",
            where=place,
            found=f"{CONFIG_NAME} in it",
            expected="a folder with a folder for each adapter",
            hint="give {name: that folder}; or the folder that it is in",
        )
    return held


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
    return checkpoints.from_tensors(source, configuration(stated), pin_memory=pin_memory)
