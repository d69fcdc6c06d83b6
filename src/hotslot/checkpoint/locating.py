"""Where an adapter's files are: in a folder, or on the Hub, whose are downloaded if they are not there."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePath
from typing import Any

from ..errors import AdapterNotFoundError, HotslotError
from .configs import config_dict
from .files import Files
from .safetensors_file import pickle_refused

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_NEXT_STEP = "give the folder that save_pretrained wrote, or a Hub id with its subfolder and revision"


def locate(
    source: str | os.PathLike[str],
    config: Any = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Files:
    """The files of a folder or a Hub id, whose are downloaded if they are not there; see `read`.

    They are the same files whatever the working directory becomes.

    Raises:
        CheckpointError: there are none.
    """
    hub: dict[str, Any] = {"subfolder": subfolder, "revision": revision, "cache_dir": cache_dir, "token": token}
    if subfolder:
        _refuse_escape(subfolder)
    folder, given = Path(source, subfolder or ""), None
    if config is not None:
        given = json.dumps(config_dict(config)).encode()
    here = folder.absolute()
    weights = here / WEIGHTS_NAME
    try:
        if os.path.isfile(weights):
            return Files(weights, here / CONFIG_NAME, given, str(folder))
        if folder.is_dir():
            raise _without_weights(folder)
        if folder.exists():
            raise _single_file(folder)
        if os.path.isabs(source) or str(source).startswith((".", "~")):
            raise not_found(str(folder), "a folder", "nothing")
        weights = _from_hub(str(source), WEIGHTS_NAME, **hub).absolute()
        if config is None:
            _from_hub(str(source), CONFIG_NAME, **hub)  # the Hub's cache puts it beside the weights
        return Files(weights, weights.parent / CONFIG_NAME, given, str(source))
    except HotslotError:
        raise
    except OSError as error:  # no permission, a name too long, a broken disk
        raise not_found(str(folder), "a folder that can be read", said(error)) from error


def _refuse_escape(subfolder: str) -> None:
    """A subfolder lies within the source, whoever chose it: that is what callers who pass one on rely on."""
    path = PurePath(subfolder)
    if path.is_absolute() or ".." in path.parts:
        raise AdapterNotFoundError(
            "The subfolder leads out of the adapter's folder.",
            where="subfolder",
            found=f"{subfolder!r:.200}",
            expected="a relative path without '..'",
            hint="give the folder itself as the source",
        )


def _single_file(path: Path) -> HotslotError:
    hint = _NEXT_STEP
    if path.name == WEIGHTS_NAME:
        hint = "give the folder that it is in: it says little without its config"
    elif path.suffix == ".safetensors":
        hint = "a LoRA in a single file is for a diffusers pipeline, and not for one model"
    return not_found(str(path), "a folder", f"a file ({path.name})", hint)


def _without_weights(folder: Path) -> HotslotError:
    if (folder / PICKLE_NAME).is_file():
        return pickle_refused(folder / PICKLE_NAME)
    held = sorted(path.name for path in folder.iterdir())
    more = f" and {len(held) - 10:,} more" if len(held) > 10 else ""
    return not_found(str(folder), f"{WEIGHTS_NAME} in it", ", ".join(held[:10]) + more or "an empty folder")


def _from_hub(
    repo: str,
    name: str,
    *,
    subfolder: str | None,
    revision: str | None,
    cache_dir: Any,
    token: str | bool | None,
) -> Path:
    from huggingface_hub import errors, hf_hub_download

    kinds = _hub_errors()
    options: dict[str, Any] = {"subfolder": subfolder, "revision": revision, "cache_dir": cache_dir, "token": token}
    try:
        return Path(hf_hub_download(repo, name, **options))
    except errors.EntryNotFoundError as error:  # also a repository that is not cached when the Hub is out of reach
        if name == WEIGHTS_NAME and _hub_has_pickle(repo, options):
            raise pickle_refused(Path(repo, PICKLE_NAME)) from error
        raise not_found(repo, f"a folder of that name, or {name} in the Hub's repository", said(error)) from error
    except kinds as error:
        expected = "a folder of that name, or a repository of the Hub that can be read"
        raise not_found(repo, expected, said(error)) from error


def _hub_has_pickle(repo: str, options: dict[str, Any]) -> bool:
    """Whether the repository has the weights as a pickle only; it is not downloaded."""
    from huggingface_hub import file_exists, try_to_load_from_cache

    path = f"{options['subfolder']}/{PICKLE_NAME}" if options["subfolder"] else PICKLE_NAME
    if isinstance(try_to_load_from_cache(repo, path, options["cache_dir"], options["revision"]), str):
        return True
    try:
        return bool(file_exists(repo, path, revision=options["revision"], token=options["token"]))
    except _hub_errors():
        return False


def _hub_errors() -> tuple[type[Exception], ...]:
    """Whatever huggingface_hub raises. Its HTTP client's errors are among them; which client that is has changed."""
    from huggingface_hub import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return *kinds, OSError


def said(error: Exception) -> str:
    """What an error says, in a line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), ''):.200}"


def not_found(source: str, expected: str, found: str, hint: str = _NEXT_STEP) -> AdapterNotFoundError:
    """The error to raise where files cannot be had."""
    return AdapterNotFoundError(
        f"No adapter at {source:.200}.",
        where=f"{source:.200}",
        found=found,
        expected=expected,
        hint=hint,
    )
