"""A folder of adapters that is looked into again and again: what comes is loaded, what goes is unloaded."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from pathlib import Path
from typing import NamedTuple

from torch import nn

from .checkpoint import CONFIG_NAME, GRAIN_NS, WEIGHTS_NAME
from .errors import CacheFullError, HotslotError, ModelError
from .pipelines import listed
from .swapper import Swapper

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
LOOKING_SHARE = 0.05  # of one core at most, however many adapters there are


class _Stamp(NamedTuple):
    """What the file system says of an adapter's files."""

    told: tuple[tuple[int, ...], ...]
    settled: bool  # whether a change after it was made must show in the next one


class Watch:
    """Keeps a swapper's adapters those of a folder, until the swapper is detached.

    Who puts an adapter there writes it elsewhere, or under a name that begins with a dot, and renames it: one that is
    found half-written is refused in the log, and loaded once it has changed. What is live goes on as it is.

    Args:
        model: of `whole`.
        folder: of adapters, as `hotslot.attach` takes it. What is in it now is taken for loaded once `start` is called.
    """

    def __init__(self, model: nn.Module, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).absolute()
        self._seen = {name: _stamp(path) for name, path in listed(model, folder).items()}

    def start(self, swapper: Swapper) -> None:
        """Look each second from now on, in a thread that does not keep the swapper alive."""
        threading.Thread(target=self._run, args=(weakref.ref(swapper),), name="hotslot-watch", daemon=True).start()

    def _run(self, known: weakref.ref[Swapper]) -> None:
        seconds = LOOK_SECONDS
        while True:
            time.sleep(seconds)
            swapper = known()
            if swapper is None or swapper.detached:
                return
            started = time.perf_counter()
            try:
                self.look(swapper)
            except ModelError:  # it is gone, or the swapper was detached meanwhile
                return
            except HotslotError as error:  # the folder is not there just now
                logger.warning("%s cannot be looked into: %s", self._folder, error)
            except Exception:
                logger.exception("%s cannot be looked into", self._folder)  # a thread that ends would end in silence
            seconds = max(LOOK_SECONDS, (time.perf_counter() - started) / LOOKING_SHARE)
            del swapper

    def look(self, swapper: Swapper) -> None:
        """Load what is new or has changed since the last look, and unload what has gone.

        Raises:
            AdapterNotFoundError: the folder is gone.
            ModelError: the model is gone, or the swapper is detached.
        """
        there = listed(swapper.engine.model, self._folder)
        for name, path in there.items():
            stamp, before = _stamp(path), self._seen.get(name)
            if before is not None and before.settled and before.told == stamp.told:
                continue
            self._seen[name] = stamp
            try:
                swapper.load(name, path, lazy=True)
            except CacheFullError as error:
                if before is None or before.told != stamp.told:
                    logger.warning("%s is not loaded yet: %s", path, error)
                self._seen[name] = stamp._replace(settled=False)  # there may be room at the next look
            except HotslotError as error:
                logger.warning("%s is not loaded: %s", path, error)
        for name in self._seen.keys() - there.keys():
            try:
                if name in swapper.adapters:
                    swapper.unload(name)
            except ModelError:
                continue  # it is live: the next look comes
            del self._seen[name]


def _stamp(path: Path) -> _Stamp:
    stats = []
    for file in [path] if path.is_file() else [path / CONFIG_NAME, path / WEIGHTS_NAME]:
        try:
            stats.append(file.stat())
        except OSError:
            continue  # it has gone since it was listed, or is not there yet
    changed_ns = max((max(found.st_mtime_ns, found.st_ctime_ns) for found in stats), default=0)
    told = tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)
    return _Stamp(told, changed_ns + GRAIN_NS < time.time_ns())
