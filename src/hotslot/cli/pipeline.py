"""A diffusers pipeline out of its configs alone: its LoRA-bearing components, all tensors without values."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import HotslotError, ModelError

_INDEX = "model_index.json"


def is_pipeline(source: str) -> bool:
    """Whether there is a pipeline's index at this folder or Hub id.

    Raises:
        ModelError: nobody may look.
    """
    from huggingface_hub import hf_hub_download

    try:
        os.stat(source)
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(Path(source, _INDEX))
            return True
        return False
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ModelError(
            f"No model can be read at {source:.200}.",
            where=f"{source:.200}",
            found=f"{type(error).__name__}: {error.strerror}",
            expected="a folder that you may look into, or a Hub id",
        ) from error
    try:
        hf_hub_download(source, _INDEX)
    except Exception:  # no such file or repository, no network, no Hub id: whoever looks for a model says so
        return False
    return True


def build_pipeline_on_meta(source: str, pipeline_class: str | None) -> Any:
    """The pipeline, without those components that carry no LoRA.

    Args:
        source: a folder or Hub id.
        pipeline_class: a class of diffusers; by default the index's own.

    Raises:
        ModelError: it cannot be built.
        HotslotError: diffusers is not installed.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise HotslotError(
            "A pipeline needs diffusers.", where=source, found=error, hint="pip install 'hotslot[diffusers]'"
        ) from error
    try:
        index = DiffusionPipeline.load_config(source)
    except Exception as error:  # diffusers raises OSError, ValueError and the Hub's own
        raise ModelError(f"The pipeline's {_INDEX} cannot be read.", where=source, found=f"{error!s:.200}") from error
    cls = _class(source, index, pipeline_class)
    components = {name: _component(source, name, index.get(name)) for name in cls._lora_loadable_modules}
    pipe = object.__new__(cls)  # its constructor may want a scheduler, a tokenizer or others
    expected, _ = cls._get_signature_keys(cls)
    pipe.register_modules(**(dict.fromkeys(expected) | components))
    return pipe


def _class(source: str, index: dict[str, Any], wanted: str | None) -> Any:
    import diffusers

    name = wanted or str(index.get("_class_name"))
    cls = getattr(diffusers, name, None)
    # The name may be a stranger's: no other attribute of diffusers is called.
    if (
        isinstance(cls, type)
        and issubclass(cls, diffusers.DiffusionPipeline)
        and hasattr(cls, "_lora_loadable_modules")
    ):
        return cls
    raise ModelError(
        f"diffusers has no pipeline {name} that loads LoRA.",
        where=source if wanted is None else "--model-class",
        expected="a class such as StableDiffusionPipeline, by the index or --model-class",
    )


def _component(source: str, name: str, stated: Any) -> Any:
    """None if the pipeline has none."""
    import torch

    library, class_name = stated if isinstance(stated, (list, tuple)) and len(stated) == 2 else (None, None)
    if library is None or class_name is None:
        return None
    try:
        with torch.device("meta"):
            if library == "diffusers":
                return _of_diffusers(source, name, class_name)
            if library == "transformers":
                return _of_transformers(source, name, class_name)
    except Exception as error:  # any model's constructor
        raise ModelError(
            f"{class_name} cannot be built from its config alone.",
            where=f"{source}, {name}",
            found=f"{type(error).__name__}: {error!s:.200}",
            hint="attach to the loaded pipeline and ask swapper.fits(adapter)",
        ) from error
    raise ModelError(
        "A component that may carry LoRA is of another library.",
        where=f"{source}, {name}",
        found=f"{library}.{class_name}",
        expected="a model of diffusers or transformers",
        hint="attach to the loaded pipeline and ask swapper.fits(adapter)",
    )


def _of_diffusers(source: str, name: str, class_name: str) -> Any:
    import diffusers

    cls = _model_class(diffusers, class_name, diffusers.ModelMixin)
    return cls.from_config(cls.load_config(source, subfolder=name)).eval()


def _of_transformers(source: str, name: str, class_name: str) -> Any:
    import transformers

    cls = _model_class(transformers, class_name, transformers.PreTrainedModel)
    return cls(cls.config_class.from_pretrained(source, subfolder=name)).eval()


def _model_class(library: ModuleType, class_name: str, parent: type) -> Any:
    """The name may be a stranger's: no other attribute of the library is called."""
    found = getattr(library, class_name, None)
    if isinstance(found, type) and issubclass(found, parent):
        return found
    raise TypeError(f"{library.__name__} has no model class {class_name}")
