"""Adapters' bytes on a device, from where one kernel puts them into the arena."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ..cache import Room, Tier
from ..errors import CacheFullError

_WORD_BYTES = 8  # the largest that the kernel reads


@dataclass(frozen=True, eq=False, slots=True)
class Resident:
    """An adapter's bytes on a device.

    Attributes:
        data: 1-D uint8, in whole words; the adapter's bytes, and others behind them.
        ready: when they are there, if another stream brings them.
    """

    data: torch.Tensor
    ready: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.data.numel()


class Staging:
    """Of one device: the adapters that are kept there, and room for one that passes through.

    One thread at a time swaps; any may bring there what it reads, by `expect`, `load` and `arrive`.

    Args:
        device: where.
        limit_bytes: for those that are kept; 0 keeps none.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None) -> None:
        self.tier: Tier[Resident] = Tier(limit_bytes, memory=f"the memory of {device}")
        self._device = device
        self._passing: tuple[str, Resident] | None = None  # one value: threads that read put theirs here too
        self._stream: torch.cuda.Stream | None = None  # of the last swap
        self._loader: torch.cuda.Stream | None = None

    def bring(self, data: torch.Tensor, key: str) -> tuple[torch.Tensor, str]:
        """The bytes on the device, once the current stream gets there; valid until the next call.

        Args:
            data: 1-D uint8 on the host, page-locked if the copy is to be asynchronous.
            key: of equal bytes.

        Returns:
            The bytes and others behind them, and where they came from: "device" or "host".
        """
        self._follow()
        found, tier = self.tier.get(key) or self._claim(key), "device"
        if found is None:
            found, tier = self._keep(data, key) or self._pass(data, key), "host"
        self._await(found)
        if self._stream is not None:
            found.data.record_stream(self._stream)  # which may be another than the one that it was allocated for
        return found.data, tier

    def prefetch(self, data: torch.Tensor, key: str) -> bool:
        """Bring the bytes to stay, while the streams that compute go on. Says whether there was room."""
        if key in self.tier:
            return True
        with self._loading():
            return self._keep(data, key, marked=True) is not None

    def expect(self, nbytes: int) -> torch.Tensor | None:
        """Memory for bytes that are about to be read, in any thread; None if there is none to be had now."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # to allocate would break the capture off; the swap will be refused
        try:
            with self._loading():
                return torch.empty(_padded(nbytes), dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return None

    def load(self, target: torch.Tensor, data: torch.Tensor, start: int, stop: int) -> None:
        """Copy some of the bytes to what `expect` gave, while the streams that compute go on."""
        with self._loading():
            target[start:stop].copy_(data[start:stop], non_blocking=True)

    def arrive(self, target: torch.Tensor, key: str) -> None:
        """Let the next swap find these bytes where `load` has brought them."""
        with self._loading():
            self._passing = key, Resident(target, self._mark())

    def forget(self, key: str) -> None:
        """Let go of these bytes."""
        self.tier.remove(key)
        if self._passing is not None and self._passing[0] == key:
            self._passing = None

    def _follow(self) -> None:
        """Let the current stream wait for the one of the swap before: they write the same memory."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream

    def _await(self, resident: Resident) -> None:
        """Let the current stream wait until the bytes are there that another one brings."""
        if resident.ready is not None and self._stream is not None:
            self._stream.wait_event(resident.ready)

    def _loading(self) -> AbstractContextManager[object]:
        """For a block: what is given to the device goes to a stream of its own, for which none that computes waits."""
        if self._device.type != "cuda":
            return nullcontext()
        self._loader = self._loader or torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._loader)

    def _mark(self) -> torch.cuda.Event | None:
        """When all is done that the current stream was given."""
        return torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None

    def _claim(self, key: str) -> Resident | None:
        """These bytes, if they pass through: read for this swap, or as the last. From now on they stay, if they may."""
        passing = self._passing
        if passing is None or passing[0] != key:
            return None
        self._passing = None  # before they stay: the next to pass would be written over them
        try:
            self.tier.add(*passing)
        except CacheFullError:
            self._passing = passing
        return passing[1]

    def _keep(self, data: torch.Tensor, key: str, *, marked: bool = False) -> Resident | None:
        """Copy the bytes to where they may stay; None if there is no room for them."""
        size, room = _padded(data.numel()), Room()
        try:
            self.tier.reserve(room, size, key)  # before it is allocated: what has to go gives back its memory
        except CacheFullError:
            return None
        try:
            target = torch.empty(size, dtype=torch.uint8, device=self._device)
            target[: data.numel()].copy_(data, non_blocking=True)
            kept = Resident(target, self._mark() if marked else None)
            self.tier.add(key, kept, room)
            return kept
        finally:
            room.nbytes = 0

    def _pass(self, data: torch.Tensor, key: str) -> Resident:
        """Copy the bytes to where the next ones will be."""
        size, passing = _padded(data.numel()), self._passing
        self._passing = None  # nobody's bytes, while they are overwritten
        if passing is not None and passing[1].nbytes >= size:
            self._await(passing[1])  # else they might still be coming, over those of this swap
            room = passing[1].data
        else:
            room = torch.empty(size, dtype=torch.uint8, device=self._device)
        room[: data.numel()].copy_(data, non_blocking=True)
        found = Resident(room)
        self._passing = key, found
        return found


class Arrival:
    """An adapter on its way to devices while it is read, for a swap that is to come: a `checkpoint.Sink`.

    No swap finds it before all of it is proved; what is not, is let go with this object.
    """

    def __init__(self, stagings: Sequence[Staging]) -> None:
        self._stagings = stagings
        self._targets: list[tuple[Staging, torch.Tensor]] = []

    def take(self, data: torch.Tensor, start: int, stop: int) -> None:
        """Copy these bytes to the devices; nothing waits for it."""
        if start == 0:
            found = [(staging, staging.expect(data.numel())) for staging in self._stagings]
            self._targets = [(staging, target) for staging, target in found if target is not None]
        for staging, target in self._targets:
            staging.load(target, data, start, stop)

    def prove(self, version: str) -> None:
        """Let swaps find them."""
        for staging, target in self._targets:
            staging.arrive(target, version)
        self._targets = []  # which are the stagings' now


class Stagings:
    """One for each device; they outlive the memory of the slots.

    Args:
        limit_bytes: of each device's tier.
    """

    def __init__(self, limit_bytes: int | None = 0) -> None:
        self.limit_bytes = limit_bytes
        self._by_device: dict[torch.device, Staging] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tiers."""
        return sum(staging.tier.nbytes for staging in list(self._by_device.values()))  # others may come meanwhile

    def of(self, device: torch.device) -> Staging:
        """The one of this device."""
        found = self._by_device.get(device)  # at once for all threads: some ask while they read
        return found or self._by_device.setdefault(device, Staging(device, self.limit_bytes))

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes that are accounted are those that are held, and within the limit."""
        for staging in self._by_device.values():
            staging.tier.check_integrity()

    def forget(self, key: str) -> None:
        """Keep these bytes nowhere any more."""
        for staging in self._by_device.values():
            staging.forget(key)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _WORD_BYTES) * _WORD_BYTES
