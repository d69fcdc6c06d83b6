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

    def refuse_if_changed(self) -> None:
        """Raise ModelError if what was kept is lost."""


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

    def refuse_if_changed(self) -> None:
        """See Store."""


class InFile:
    """The tensor of the model's own checkpoint, mapped and not read.

    Args:
        file: that it is in. Another may take its name, but nobody may write into it.
        read: maps the tensor.
    """

    nbytes = 0

    def __init__(self, file: Path, read: Callable[[], torch.Tensor]) -> None:
        self._file, self._stat = file, file.stat()
        self._mapped = read()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it has these values."""
        return self._mapped.shape == tensor.shape and torch.equal(self._mapped.to(tensor), tensor.detach())

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """See Store."""
        return self._mapped

    def refuse_if_changed(self) -> None:
        """See Store."""
        try:
            found = self._file.stat()
        except FileNotFoundError:  # what is mapped is there still, and so if another has the name
            return
        was = self._stat
        same = (found.st_mtime_ns, found.st_size) == (was.st_mtime_ns, was.st_size)
        if (found.st_dev, found.st_ino) == (was.st_dev, was.st_ino) and not same:
            raise ModelError(
                "The model's checkpoint was written over, and with it the base's own values that it alone had.",
                where=str(self._file),
                found=f"{found.st_size:,} bytes, changed since",
                expected="the file as it was; another may be put in its place by renaming",
                hint="load the model anew; keep them in memory: pristine='host' or 'device'",
            )


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
        found = next((InFile(*mapped[name]) for name in names if name in mapped), None)
        if found is None or not found.holds(tensor):
            raise ModelError(
                "The model's checkpoint does not have what the model holds, so that it cannot bring that back.",
                where=path,
                found="other values" if found is not None else "no such tensor",
                expected="the model's own values",
                hint="keep them in memory: pristine='host' or 'device'",
            )
        return found

    return store


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


def _mapped(folder: Path) -> Iterator[tuple[str, tuple[Path, Callable[[], torch.Tensor]]]]:
    """(name, its file and a function that maps the tensor) of all tensors in the folder's files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, framework="pt")
        names = file.keys()  # in a line of its own: it is no dict
        for name in names:
            yield name, (path, _reader(file, name))


def _reader(file: Any, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    return read
