"""The components of a pipeline that carry LoRA, as one model that is swapped as one."""

from __future__ import annotations

import functools
import json
import os
import weakref
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

from torch import nn

from .. import checkpoint as checkpoints
from .. import live
from ..checkpoint import Checkpoint, FileFamily, Files, Recent, Schema, Sink
from ..errors import AdapterNotFoundError, PickleRefusedError
from .conversion import Answer, Conversion, Family, Shell
from .straight import Outline, family_of_files, file_here, header_here

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class _Seen(NamedTuple):
    """Whether files with a header may be read without diffusers, and how."""

    family: FileFamily | None


class Components(live.Assembly):
    """The components of a pipeline that carry LoRA, under the names that diffusers gives them.

    It outlives the pipeline if it has to: what reading LoRA files takes of that is kept.
    """

    def __init__(self, pipe: Any, members: Mapping[str, nn.Module]) -> None:
        super().__init__(members)
        self._pipe = weakref.ref(pipe)
        self._shell = Shell.of(pipe)
        self._families: Recent[Any, Family] = Recent()
        self._files: Recent[Any, _Seen] = Recent()
        self._outlines: Recent[Any, Outline] = Recent(64)

    def are(self, members: Mapping[str, nn.Module]) -> bool:
        """Whether these are its members, compiled or not."""
        own = {name: live.unwrap(member) for name, member in self.named_children()}
        return own == {name: live.unwrap(member) for name, member in members.items()}

    def follow(self, pipe: Any) -> None:
        """Go on with another pipeline of the same components, or with the same one, compiled since."""
        self._pipe = weakref.ref(pipe)
        self._shell = Shell.of(pipe)
        for name in list(self._modules):
            self.add_module(name, getattr(pipe, name))

    def current(self) -> dict[str, Any]:
        """See Assembly."""
        pipe = self._pipe()
        return {} if pipe is None else {name: getattr(pipe, name, None) for name in self._modules}

    def read(self, source: Any, *, pin_memory: bool = False, sink: Sink | None = None, **options: Any) -> Checkpoint:
        """See `hotslot.pipelines.read`."""
        origin = "the dict of tensors" if isinstance(source, Mapping) else os.fspath(source)
        options = {key: value for key, value in options.items() if value is not None}
        _refuse_path(source, options)
        asked = repr(sorted(options.items()))
        header = header_here(source, options)
        seen = self._files.get((header.content, asked)) if header is not None else None
        if header is not None and seen is not None and seen.family is not None:
            return seen.family.read(header.path, origin=origin, pin_memory=pin_memory, sink=sink)
        models = {prefix.removesuffix("."): model for prefix, model in live.roots(self).items()}
        conversion = Conversion(self._shell, models, origin)
        answer = conversion.ask(dict(source) if isinstance(source, Mapping) else source, options)
        places, config = self._family(conversion, answer, options)
        taken = {place.name: place.take(answer.tensors) for place in places}
        checkpoint = checkpoints.from_tensors(taken, config, origin=origin, pin_memory=pin_memory)
        if header is not None and seen is None:
            ask = functools.partial(conversion.ask, options=options)
            family = family_of_files(header, answer, places, checkpoint, ask)
            self._files.put((header.content, asked), _Seen(family))
        if header is not None:
            self._outlines.put((header.tensors, asked), Outline.of(header, checkpoint))
        return checkpoint

    def survey(self, source: Any, **options: Any) -> Schema | None:
        """What an adapter will be but for its values, if a file of the same tensors has been read; else None.

        Its metadata may say something else of alphas. That is found when it is read.
        """
        options = {key: value for key, value in options.items() if value is not None}
        _refuse_path(source, options)
        header = header_here(source, options)
        outline = self._outlines.get((header.tensors, repr(sorted(options.items())))) if header is not None else None
        return outline.of_another(header) if header is not None and outline is not None else None

    def files(self, source: Any, **options: Any) -> Files | None:
        """The file that an adapter is read from, with all that decides what is made of it; None if it is not here."""
        options = {key: value for key, value in options.items() if value is not None}
        path = file_here(source, options)
        if path is None:
            return None
        given = json.dumps([self._readers(), repr(sorted(options.items()))]).encode()
        return Files(path, path, given, os.fspath(source))

    def _readers(self) -> list[str]:
        """Whose code reads LoRA files, and for what components."""
        shell, models = self._shell.cls, live.roots(self)
        components = [f"{name}{type(model).__qualname__} {vars(model.config)}" for name, model in models.items()]
        return [*_versions(), f"{shell.__module__}.{shell.__qualname__}", *components]

    def _family(self, conversion: Conversion, answer: Answer, options: Mapping[str, Any]) -> Family:
        key = answer.key, repr(sorted(options.items()))
        family = self._families.get(key)
        if family is None:
            family = conversion.load(answer, options)
            self._families.put(key, family)
        return family


@functools.cache
def _versions() -> list[str]:
    """Of the libraries that have a part in it."""
    return [f"{name} {version(name)}" for name in ("hotslot", "diffusers", "peft", "transformers")]


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
    if names and not os.path.exists(names[0]) and "weight_name" not in options and _is_offline(options):
        raise AdapterNotFoundError(
            f"No LoRA at {names[0]:.200}, and the Hub cannot be asked which files it has of that name.",
            where=f"{names[0]:.200}",
            found="no file or folder here, and local_files_only or HF_HUB_OFFLINE",
            expected="a path; or a repository in the Hub's cache and the name of a file in it",
            hint="weight_name='pytorch_lora_weights.safetensors' takes that from the cache; or go online",
        )


def _is_offline(options: Mapping[str, Any]) -> bool:
    from huggingface_hub import constants

    return bool(options.get("local_files_only") or constants.HF_HUB_OFFLINE)
