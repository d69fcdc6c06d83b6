"""What a swap did, and whether an adapter would fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class SwapReport:
    """One swap.

    Attributes:
        adapter: name of what is live now; None for the base model, or for what was on the model before hotslot.
        previous: name of what was live before.
        version: digest of what is live now; None where `adapter` is.
        generation: how many swaps have changed the model's adapters so far, all of its swappers counted.
        route: "side", beside the base layer, where the model has its adapters; "merged", into the base's weights;
            "side+merged", as far as there are slots.
        tier: where the bytes came from: "disk", "host", "device", or "none" if there were none to bring.
        nbytes: that were brought in: of the adapter, and of base weights where it was merged. None of a rollback to
            what came with the model, or was trained on it: that was kept beside the slots.
        seconds: wall time of the swap, without the wait for work in flight. On a GPU the copies may still be under way,
            in the stream's order.
        changed: False if this adapter was live already, untouched, and nothing was written.
        error: the largest relative error (Frobenius norm) of any module's delta: of a blend that was cut to its slots'
            rank, or of an adapter that was merged into weights of 16 bits. None where what is live is exact, within the
            roundings of its dtype.
    """

    adapter: str | None
    previous: str | None
    version: str | None
    generation: int
    route: str
    tier: str
    nbytes: int
    seconds: float
    changed: bool
    error: float | None = None

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes over wall time."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether an adapter can be activated on this model.

    Attributes:
        route: as of SwapReport, or None if it does not fit.
        nbytes: that a swap would bring in.
        reason: why it does not fit, the whole message of the error that `load` would raise.
        plan: the Plan that would take it into slots, for `Swapper.grow`, if it is only beyond the present one.
        pristine_bytes: of the base's own values that are kept beside those it is merged into.
        seconds: that merging it took when it was tried; None on the side path.
        pristine: "device", "host" and "file" → what it costs to keep those values there, whatever the plan says:
            `nbytes` of memory, and the `seconds` that merging from there takes, as tried. Without "file" if the model's
            checkpoint is not at hand, or has other values.
        error: as of SwapReport.
    """

    route: str | None
    nbytes: int
    reason: str | None
    plan: Any = None
    pristine_bytes: int = 0
    seconds: float | None = None
    error: float | None = None
    pristine: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.route is not None
