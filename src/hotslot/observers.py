"""Who learns of a swapper's swaps: its counters, the log, and the callbacks of `on_swap`."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .engine import Engine, State
from .metrics import Recorder, log_fields
from .report import SwapReport

logger = logging.getLogger("hotslot.swapper")  # whom users ask for it


class Observers:
    """Tells of the swaps of one swapper.

    Attributes:
        recorder: counts them.
    """

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._callbacks: list[Callable[[SwapReport], object]] = []
        self._told_passed_over = False
        self._told_lost: set[str] = set()

    def add(self, callback: Callable[[SwapReport], object]) -> Callable[[], None]:
        """Have it called after each swap that changed what is live; returns what takes it back."""
        self._callbacks.append(callback)

        def take_back() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return take_back

    def note(self, report: SwapReport) -> None:
        """Count a swap that came to its end, and log it; with the swapper's lock held."""
        self.recorder.add(report)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%r is live", report.adapter, extra=log_fields(report))

    def tell(self, report: SwapReport) -> None:
        """Call back, without the lock: a callback may load, which waits for who reads, who waits for the lock."""
        for callback in tuple(self._callbacks) if report.changed else ():
            try:
                callback(report)
            except Exception:
                logger.exception("%r is live, and a callback of on_swap failed", report.adapter)

    def warn_if_lost(self, engine: Engine, target: State) -> None:
        """Say so once for each adapter, if what it was trained to while it was live goes, and no loaded adapter has it.

        Not of a rollback, nor where the target is another version of the same: an update.
        """
        live, name = engine.live, engine.live.name
        replaced = target.name == name and target.entry is not live.entry
        if name is None or name in self._told_lost or not engine.trained or target is engine.previous or replaced:
            return
        self._told_lost.add(name)
        logger.warning(
            "%r was trained while it was live, and is swapped out: activate(%r) makes live what was loaded. "
            "swapper.update(%r, peft.get_peft_model_state_dict(model)) before a swap keeps what it has become; "
            "rollback() brings it back once",
            name, name, name,
        )  # fmt: skip

    def warn_if_passed_over(self, engine: Engine, target: State) -> None:
        """Say so once, if a swap has no effect on what is computed: PEFT's `add_adapter` activates its own adapter."""
        if target.entry is None:
            return
        slots, passed_over = engine.binding.slots, False
        for fqn in target.entry.adapter.targets:
            if fqn in slots:
                passed_over = not slots[fqn].is_active
                break  # one speaks for all: PEFT's calls set them alike
        if passed_over and not self._told_passed_over:
            name = engine.adapter_name
            logger.warning(
                "%r goes into the slot %r, which the model does not compute with: that is not among PEFT's active "
                "adapters (model.set_adapter(%r)), or adapters are disabled",
                target.name, name, name,
            )  # fmt: skip
        self._told_passed_over = passed_over
