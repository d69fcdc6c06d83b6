"""How much memory adapters may take, of each kind."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cache:
    """Budgets of `hotslot.attach`. What was not used for longest goes first.

    Attributes:
        device_bytes: of each GPU's memory, for the adapters that were live there last: a swap back to one of them is
            one kernel, with no copy from the host. 0 keeps none; None has no limit. Beside these a GPU has room for the
            one adapter that passes through, and the slots themselves.
        host_bytes: of host memory, for adapters whose files are at hand: one that is not in memory is read when it is
            activated. Three have to fit: what is live, what was before, and what comes. None has no limit. Adapters
            that were given as tensors count, and stay until they are unloaded, but for those that `disk_bytes` has
            room for.
        disk_bytes: of `folder`, for packed files: what was read and checked of an adapter once, such that any process
            reads it again in one sweep. And, if there is a limit of host memory, for what was given as tensors, which
            is written when it is loaded or updated and is gone with the process; packed files go for it. 0 keeps none;
            None has no limit.
        folder: of the packed files, and on whose disk the tensors are. None: a place of the user's, see `user_folder`.
            Only its owner may write there.
    """

    device_bytes: int | None = 0
    host_bytes: int | None = None
    disk_bytes: int | None = 0
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes", "disk_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")


def user_folder() -> Path:
    """Where to keep files for this user: HOTSLOT_CACHE, else XDG_CACHE_HOME/hotslot, else the platform's place."""
    if chosen := os.environ.get("HOTSLOT_CACHE"):
        return Path(chosen).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "hotslot"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hotslot"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "hotslot" / "Cache"
    return Path.home() / ".cache" / "hotslot"
