"""`hotslot inspect` of a packed file: what it was made of, whether it still stands for that, and the adapter in it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from .inspect import Inspection, inspect_checkpoint, show_inspection
from .terminal import new_facts

if TYPE_CHECKING:
    from ..checkpoint import Files


@dataclass(frozen=True, slots=True)
class PackedInspection:
    """What a packed file says, whose header was proved by its seal, and whose values by the adapter's version.

    Attributes:
        packed: as it was given.
        source: the file of weights that it was made of.
        made_for: of a pipeline's, who has read that and for what; else empty.
        read_unix_seconds: when.
        stale: why no process takes it any more; None if one that needs the source does.
        adapter: that is in it.
    """

    packed: str
    source: str
    made_for: list[str]
    read_unix_seconds: float
    stale: str | None
    adapter: Inspection

    @property
    def supported(self) -> bool:
        """Whether hotslot swaps the adapter."""
        return self.adapter.supported


def is_packed_file(path: Path) -> bool:
    """Whether it says of itself that it is one, sound or not."""
    from ..cache.packed import is_packed
    from ..checkpoint import read_header
    from ..errors import CheckpointError

    try:
        return is_packed(read_header(path))
    except (CheckpointError, OSError):  # which whoever reads it says better
        return False


def inspect_packed(path: Path) -> PackedInspection:
    """Read a packed file and tell what is in it.

    Raises:
        CheckpointError: it is not as it was packed.
    """
    from ..cache.packed import examine

    found, files, checkpoint = examine(path)
    return PackedInspection(
        packed=str(path),
        source=str(files.weights),
        made_for=_made_for(files),
        read_unix_seconds=found.read_ns / 1e9,
        stale=_stale(path, files, found.source, found.read_ns),
        adapter=inspect_checkpoint(checkpoint),
    )


def _made_for(files: Files) -> list[str]:
    """What `Components.files` has put in the place of a config."""
    if files.weights != files.config or files.given is None:
        return []
    try:
        readers, _ = json.loads(files.given)
        return [str(reader).partition(" {")[0] for reader in readers]  # without the components' configs
    except (TypeError, ValueError):
        return []


def _stale(path: Path, files: Files, told: str, read_ns: int) -> str | None:
    from ..cache.packed import name_for

    if path.name != name_for(files):
        return f"it was renamed, and is looked for as {name_for(files)}"
    try:
        stamp = files.stamp()
    except (OSError, ValueError) as error:  # ValueError: a path that there cannot be
        return f"its source cannot be found: {error}"
    if stamp.text != told:
        return "its source has changed since"
    if not stamp.settled(read_ns):
        return "its source was changed less than 2 s before it was read, and may be another by now"
    return None


def show_packed(console: Console, found: PackedInspection) -> None:
    """Print an inspection for people."""
    rows = {
        "packed file": found.packed,
        "made of": found.source,
        **({"made for": ", ".join(found.made_for)} if found.made_for else {}),
        "read at": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.read_unix_seconds)),
        "proved": "header by its seal, values by the version",
        "in use": "yes" if found.stale is None else f"no: {found.stale}",
    }
    console.print(new_facts(rows))
    console.print()
    show_inspection(console, found.adapter)
