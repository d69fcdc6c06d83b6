"""Where the base's own values wait while others are live in their place: on the device, in host memory, in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from ..errors import ModelError
from .discover import innermost

PRISTINE = ("device", "host", "file")


class Store(Protocol):
    """Of one tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """What has the values of `tensor` from now on, whatever is written there. Nobody writes into it."""


# Path of a tensor of the base model, the tensor → where its values are to be kept. Raises if they cannot be.
Stores: TypeAlias = Callable[[str, torch.Tensor], Store]


class InMemory:
    """A copy, in memory that is kept from one time to the next.

    Args:
        host: in page-locked host memory, if the tensor is on a GPU; else beside it.
    """

    def __init__(self, *, host: bool = False) -> None:
        self._host = host
        self._memory: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """See Store."""
        return self._memory.nbytes if self._memory is not None else 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """See Store."""
        tensor = tensor.detach()
        known = self._memory
        if known is None or (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
            far = self._host and not tensor.is_cpu
            known = self._memory = torch.empty_like(tensor, device="cpu" if far else None, pin_memory=far)
        return known.copy_(tensor)


class InFile:
    """The tensor of the model's own checkpoint, mapped and not read."""

    nbytes = 0

    def __init__(self, mapped: torch.Tensor) -> None:
        self._mapped = mapped

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """See Store."""
        return self._mapped


def stores(where: str, model: nn.Module) -> Stores:
    """Makes the store of each tensor that is asked for.

    Args:
        where: one of PRISTINE.
        model: whose checkpoint it is, for "file".

    Raises:
        ValueError: `where` is none of them.
        ModelError: the model's checkpoint is not to be found.
    """
    if where not in PRISTINE:
        raise ValueError(f"pristine must be one of {', '.join(map(repr, PRISTINE))}, got {where!r}")
    if where != "file":
        return lambda path, tensor: InMemory(host=where == "host")
    mapped = dict(_mapped(_folder(innermost(model))))
    prefix = getattr(innermost(model), "base_model_prefix", "") or ""

    def store(path: str, tensor: torch.Tensor) -> Store:
        names = [path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")]
        found = next((mapped[name]() for name in names if name in mapped), None)
        if found is None or not _holds(found, tensor):
            raise ModelError(
                "The model's checkpoint does not have what the model holds, so that it cannot bring that back.",
                where=path,
                found="other values" if found is not None else "no such tensor",
                expected="the model's own values",
                hint="keep them in memory: pristine='host' or 'device'",
            )
        return InFile(found)

    return store


def _holds(found: torch.Tensor, tensor: torch.Tensor) -> bool:
    return found.shape == tensor.shape and torch.equal(found.to(tensor), tensor.detach())


def _folder(model: nn.Module) -> Path:
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None) or ""
    folder = Path(name)
    if name and not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            folder = Path()
    if not name or not any(folder.glob("*.safetensors")):
        raise ModelError(
            "There is no checkpoint of safetensors files for pristine='file'.",
            where=str(name) or type(model).__name__,
            expected="a model that from_pretrained has loaded from such files",
            hint="keep them in memory: pristine='host' or 'device'",
        )
    return folder


def _mapped(folder: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """(name, a function that maps the tensor) of all tensors in the folder's files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, framework="pt")
        names = file.keys()  # in a line of its own: it is no dict
        for name in names:
            yield name, _reader(file, name)


def _reader(file: Any, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    return read
