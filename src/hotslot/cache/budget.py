"""How much memory adapters may take beside that in which they are loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cache:
    """Budgets of `hotslot.attach`.

    Attributes:
        device_bytes: of each GPU's memory, for the adapters that were live there last: a swap back to one of them is
            one kernel, with no copy from the host. The least recently used goes first. 0 keeps none; None has no
            limit. Beside these a GPU has room for the one adapter that passes through, and the slots themselves.
    """

    device_bytes: int | None = 0

    def __post_init__(self) -> None:
        if self.device_bytes is not None and self.device_bytes < 0:
            raise ValueError(f"device_bytes must not be negative, got {self.device_bytes}")
