"""Adapters' bytes on a device, from where one kernel puts them into the arena."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cache import Tier
from ..errors import CacheFullError

_WORD_BYTES = 8  # the largest that the kernel reads


@dataclass(frozen=True, eq=False, slots=True)
class Resident:
    """An adapter's bytes on a device.

    Attributes:
        data: 1-D uint8; up to 7 bytes longer than the adapter.
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

    Args:
        device: where.
        limit_bytes: for those that are kept; 0 keeps none.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None) -> None:
        self.tier: Tier[Resident] = Tier(limit_bytes, memory=f"the memory of {device}")
        self._device = device
        self._passing: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None  # of the last swap
        self._loader: torch.cuda.Stream | None = None

    def bring(self, data: torch.Tensor, key: str) -> tuple[torch.Tensor, str]:
        """The bytes on the device, once the current stream gets there; valid until the next call.

        Args:
            data: 1-D uint8 on the host, page-locked if the copy is to be asynchronous.
            key: of equal bytes.

        Returns:
            The bytes and up to 7 others, and where they came from: "device" or "host".
        """
        self._follow()
        kept = self.tier.get(key)
        if kept is not None:
            target, tier = kept.data, "device"
            if kept.ready is not None and self._stream is not None:
                self._stream.wait_event(kept.ready)
        else:
            own = self._keep(data, key)
            target, tier = self._pass(data) if own is None else own, "host"
        if self._stream is not None:
            target.record_stream(self._stream)  # which may be another than the one that it was allocated for
        return target, tier

    def prefetch(self, data: torch.Tensor, key: str) -> bool:
        """Bring the bytes to stay, while the streams that compute go on. Says whether there was room."""
        if key in self.tier:
            return True
        if self._device.type != "cuda":
            return self._keep(data, key) is not None
        self._loader = self._loader or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._loader):
            return self._keep(data, key, torch.cuda.Event()) is not None

    def _follow(self) -> None:
        """Let the current stream wait for the one of the swap before: they write the same memory."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream

    def _keep(self, data: torch.Tensor, key: str, ready: torch.cuda.Event | None = None) -> torch.Tensor | None:
        """Copy the bytes to where they may stay; None if there is no room for them."""
        size = _padded(data.numel())
        try:
            self.tier.reserve(size, key)  # before it is allocated: what has to go gives back its memory
        except CacheFullError:
            return None
        try:
            target = torch.empty(size, dtype=torch.uint8, device=self._device)
            target[: data.numel()].copy_(data, non_blocking=True)
            if ready is not None:
                ready.record()
        except BaseException:
            self.tier.release(size)
            raise
        self.tier.add(key, Resident(target, ready), reserved=size)
        return target

    def _pass(self, data: torch.Tensor) -> torch.Tensor:
        """Copy the bytes to where the next ones will be."""
        size = _padded(data.numel())
        if self._passing is None or self._passing.numel() < size:
            self._passing = torch.empty(size, dtype=torch.uint8, device=self._device)
        target = self._passing[:size]
        target[: data.numel()].copy_(data, non_blocking=True)
        return target


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
        return sum(staging.tier.nbytes for staging in self._by_device.values())

    def of(self, device: torch.device) -> Staging:
        """The one of this device."""
        if device not in self._by_device:
            self._by_device[device] = Staging(device, self.limit_bytes)
        return self._by_device[device]

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes that are accounted are those that are held, and within the limit."""
        for staging in self._by_device.values():
            staging.tier.check_integrity()

    def forget(self, key: str) -> None:
        """Keep these bytes nowhere any more."""
        for staging in self._by_device.values():
            staging.tier.remove(key)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _WORD_BYTES) * _WORD_BYTES
