"""What a swap did, and whether an adapter would fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SwapReport:
    """One swap.

    Attributes:
        adapter: name of what is live now; None for the base model, or for what was on the model before hotslot.
        previous: name of what was live before.
        version: digest of what is live now; None where `adapter` is.
        generation: how many swaps have changed the model's adapters so far, all of its swappers counted.
        route: "side", the low-rank branch beside the base layer.
        tier: where the bytes came from: "host", or "none" if there were none to bring.
        nbytes: adapter bytes brought in.
        seconds: wall time of the swap, without the wait for work in flight. On a GPU the copies may still be under way,
            in the stream's order.
        changed: False if this adapter was live already, untouched, and nothing was written.
        error: of a blend that was cut to its slots' rank: the largest relative error (Frobenius norm) of any module's
            delta. None where what is live is exact.
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
        route: "side", or None if it does not fit.
        nbytes: that a swap would bring in.
        reason: why it does not fit, the whole message of the error that `load` would raise.
        plan: the Plan that would take it, for `Swapper.grow`, if it is only beyond the present one.
    """

    route: str | None
    nbytes: int
    reason: str | None
    plan: Any = None

    def __bool__(self) -> bool:
        return self.route is not None
