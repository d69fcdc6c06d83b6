"""Tensors of the base model that hold an adapter's values for a while, and where the model's own are meanwhile.

Knows tensors, where they hang and what they are to hold; not what an adapter is. The only code that writes there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from ...errors import ModelError, UnsupportedError
from ..pristine import InMemory, Store
from ..room import cut_to

# Those of all adapter names on all models, and who looks at that or changes it: models are attached to in any thread.
_all: weakref.WeakSet[Sites] = weakref.WeakSet()
_all_lock = threading.Lock()

# Path of a module that is saved whole, name within the copy; path of a module with tokens, TOKENS or PLACES; or "" and
# the full name of a tensor of the base model.
Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """One tensor that adapters write.

    Attributes:
        holder, name: where the model's forward finds it.
        param: which must be there; None for a buffer: `model.to(…)` puts another in its place.
        original: gives the model's own values where an original stands beside the copy that is written; None where
            the base model's own tensor is written.
        kept: the values that this had before anything was written; empty as long as it has them.
        store: where those are kept.
        lost: whether the model's own values are gone: PEFT has written those of the adapter that came with the model
            over them. Then whatever is made live has values for it.
    """

    holder: dict[str, Any]
    name: str
    param: nn.Parameter | None
    original: Callable[[], torch.Tensor] | None = None
    kept: list[torch.Tensor] = field(default_factory=list)
    store: Store = field(default_factory=InMemory)
    lost: bool = False

    def own(self) -> torch.Tensor:
        """The model's own values."""
        if self.original is not None:
            return self.original()
        return self.kept[0].to(self.tensor) if self.kept else self.tensor

    def keep(self) -> None:
        """Keep the own values, before others are written."""
        if self.original is None and not self.kept and not self.lost:
            self.kept.append(self.store.keep(self.tensor))

    def put_back(self) -> None:
        """Write the own values."""
        if self.original is not None or self.kept:
            self.tensor.copy_(self.kept[0] if self.kept else self.own(), non_blocking=True)
            self.kept.clear()

    @property
    def tensor(self) -> torch.Tensor:
        """As it is now."""
        tensor: torch.Tensor = self.holder[self.name]
        return tensor


class Merge(Protocol):
    """Values that are computed from the model's own, for a few tensors of one module.

    Attributes:
        keys: which tensors.
    """

    keys: tuple[Key, ...]

    def held(self) -> Iterable[torch.Tensor]:
        """What it keeps to compute them from."""

    def write(self, targets: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """Compute them into `targets`, of `keys`, from the model's own values of these."""


class Sites:
    """All sites of one adapter name on one model: written at once, and put back.

    Args:
        adapter_name: PEFT's name of the slot, for messages.

    Attributes:
        by_key: each of them. Add and remove within `changing`.
        foreign: keys of those that may hold something else than the model's own values.
        read: key → where it hangs, of the base's tensors without a site that something to be written was made from.
    """

    def __init__(self, adapter_name: str) -> None:
        self.by_key: dict[Key, Site] = {}
        self.foreign: set[Key] = set()
        self.read: dict[Key, tuple[dict[str, Any], str]] = {}
        self._versions: list[int] = []
        self._noted: list[int] = []  # what they were when `own_changed` was last asked, or nobody else had written
        self._adapter_name = adapter_name
        self.claim()

    def claim(self) -> None:
        """Let nobody else have sites where these are. May be repeated."""
        with _all_lock:
            _all.add(self)

    def release(self) -> None:
        """Let others have sites where these are."""
        with _all_lock:
            _all.discard(self)

    # -- which there are ---------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Sites come and go meanwhile; if nobody else has written before, nobody has afterwards."""
        dirty = self.is_dirty()
        yield
        for key in self.read.keys() & self.by_key.keys():
            del self.read[key]
        if dirty:
            self._versions = []
        else:
            self.mark_clean()

    def undo(self) -> Callable[[], None]:
        """A function that forgets what comes and goes from now on. It writes nothing."""
        by_key, foreign, versions = dict(self.by_key), set(self.foreign), self._versions

        def undo() -> None:
            self.by_key.clear()
            self.by_key.update(by_key)
            self.foreign, self._versions = foreign, versions

        return undo

    def own(self, key: Key, tensor: torch.Tensor) -> torch.Tensor:
        """The model's own values of a tensor of the base model, which holds `tensor` now."""
        site = self.by_key.get(key)
        return site.own() if site is not None else tensor.detach()

    @property
    def pristine_bytes(self) -> int:
        """Bytes that are held of the base's own values."""
        return sum(site.store.nbytes for site in self.by_key.values())

    def refuse_others(self, places: Mapping[Key, tuple[dict[str, Any], str]], *, copied: bool = False) -> None:
        """Raise if another adapter name has a site at one of these: each would keep the other's values as the model's.

        Args:
            places: key → the dict that has the tensor, its name there.
            copied: whether copies are written, and of these is only read what the model's own values are.
        """
        wanted = {id(holder[name]): key for key, (holder, name) in places.items()}
        with _all_lock:
            others = set(_all) - {self}
        for other in others:
            sites = other.by_key.values()
            theirs = [site.holder.get(site.name) for site in sites]
            if not copied:
                theirs += [site.original() for site in sites if site.original is not None]
            taken = [key for tensor in theirs if (key := wanted.get(id(tensor)))]
            if taken:
                raise UnsupportedError(
                    "Two swappers would write into the same tensors of the base model.",
                    where=".".join(filter(None, taken[0])),
                    found=f"{len(taken)} tensors that the swapper of {other._adapter_name!r} writes adapters into"
                    + ("" if copied else ", or has copies of"),
                    expected=f"others, or none, for the swapper of {self._adapter_name!r}",
                    hint="load both adapters into one swapper; or detach the other one",
                )

    # -- who has written ---------------------------------------------------------------------------------------------

    def refuse_if_replaced(self) -> None:
        """Raise if the model no longer has one of the tensors."""
        for (fqn, name), site in self.by_key.items():
            found = site.holder.get(site.name)  # no call for each: this is part of every swap
            if found is None or (site.param is not None and found is not site.param):
                raise ModelError(
                    "A parameter of the base model that adapters have values for was replaced.",
                    where=f"{fqn}.{name}".removeprefix("."),
                    expected="the Parameter that was there at attach",
                    hint="attach again",
                )

    def refuse_torn(self, values: Mapping[Key, torch.Tensor], what: str) -> None:
        """Raise if one tensor is to have two values: PEFT lets the copies of tied modules share it."""
        first: dict[int, Key] = {}
        for key, site in self.by_key.items():
            other = first.setdefault(id(site.tensor), key)
            one, two = values.get(other), values.get(key)
            if other != key and not (one is two or (one is not None and two is not None and torch.equal(one, two))):
                raise UnsupportedError(
                    f"{what} has other values for a module than for the one that it is tied to.",
                    where=".".join(filter(None, key)),
                    found=f"one parameter with {'.'.join(filter(None, other))}, by ensure_weight_tying of the adapter "
                    "that came with the model",
                    expected="equal values, or none for either",
                    hint="attach to the base model, with that adapter among adapters=",
                )

    def is_dirty(self) -> bool:
        """Whether others have written a site, or the model's own values, since `mark_clean`."""
        return bool(self.by_key or self.read) and self._current_versions() != self._versions

    def mark_clean(self) -> None:
        """Take what is live now as written by hotslot."""
        self._versions = self._noted = self._current_versions()

    def own_changed(self) -> bool:
        """Whether others have changed the model's own values, as far as can be told, since this was last asked.

        Another dtype or device is a change, too, of what is kept meanwhile as well.
        """
        before, now = self._noted, self._current_versions()
        self._noted = now
        if before == now or len(before) != len(now):
            return before != now
        written = [key in self.foreign or site.original is not None for key, site in self.by_key.items()]
        count = len(now) // 3
        return any(
            one != other and (i // count == 2 or i % count >= len(written) or not written[i % count])
            for i, (one, other) in enumerate(zip(before, now, strict=True))
        )

    def _current_versions(self) -> list[int]:
        sites = self.by_key.values()
        tensors = [site.holder[site.name] for site in sites]
        tensors += [site.original() for site in sites if site.original is not None]
        tensors += [holder[name] for holder, name in self.read.values()]
        # No triples: a thousand small objects at each swap would call the garbage collector.
        versions = [0 if one.is_inference() else one._version for one in tensors]  # those count no versions
        return [*map(id, tensors), *versions, *[one.data_ptr() for one in tensors]]

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(self, values: Mapping[Key, torch.Tensor], merges: Sequence[Merge], *, clean: bool) -> None:
        """Give these sites their values, and all others the model's own. Not atomic.

        Args:
            values: of sites, each in the site's shape or in a smaller one: then in the corner of zeros.
            merges: of sites that are computed from the model's own values.
            clean: whether it is known that nobody else has written since `mark_clean`.
        """
        with torch.inference_mode(False), torch.no_grad():
            merged = {key for merge in merges for key in merge.keys}
            written = self._merge(merges)
            for sites in self._ordered():
                given = {key: site for key, site in sites.items() if key in values and key not in merged}
                for key, site in sites.items():
                    if key in given or key in merged:
                        continue
                    if not clean or key in self.foreign or id(site.own()) in written:
                        site.put_back()
                        self.foreign.discard(key)
                        written.add(id(site.tensor))
                self.foreign.update(given)
                written.update(map(id, _write(given, values)))

    def put_back(self, keys: Iterable[Key]) -> None:
        """Write the model's own values there."""
        with torch.inference_mode(False), torch.no_grad():
            for key in keys:
                self.by_key[key].put_back()
                self.foreign.discard(key)

    def _merge(self, merges: Sequence[Merge]) -> set[int]:
        """Write what is computed from the model's own values; returns the ids of the tensors."""
        written: set[int] = set()
        for merge in merges:
            sites = [self.by_key[key] for key in merge.keys]
            for site in sites:
                site.keep()
            self.foreign.update(merge.keys)
            merge.write([site.tensor for site in sites], [site.own() for site in sites])
            written.update(id(site.tensor) for site in sites)
        return written

    def _ordered(self) -> tuple[dict[Key, Site], dict[Key, Site]]:
        """The base model's own tensors before the copies, some of which are to equal them."""
        sites = self.by_key
        copies = {key: site for key, site in sites.items() if site.original is not None}
        return {key: site for key, site in sites.items() if key not in copies} if copies else sites, copies

    def image(self) -> dict[Key, torch.Tensor]:
        """A copy of all values that are not the model's own, for `restore`."""
        dirty = self.is_dirty()
        with torch.inference_mode(False), torch.no_grad():
            return {
                key: site.tensor.detach().clone() for key, site in self.by_key.items() if dirty or key in self.foreign
            }

    def restore(self, image: Mapping[Key, torch.Tensor]) -> None:
        """Put an image back, bit for bit; what it has no values for gets the model's own."""
        with torch.inference_mode(False), torch.no_grad():
            for sites in self._ordered():
                given = {key: site for key, site in sites.items() if key in image}
                for key, site in sites.items():
                    if key not in given:
                        site.put_back()
                        self.foreign.discard(key)
                self.foreign.update(given)
                _write(given, image)


def _write(sites: Mapping[Key, Site], values: Mapping[Key, torch.Tensor]) -> list[torch.Tensor]:
    """Write these sites' values, those of a smaller shape into the corner of zeros; returns the sites' tensors."""
    for site in sites.values():
        if not site.kept:
            site.keep()
    tensors = [site.holder[site.name] for site in sites.values()]
    targets, sources = list(tensors), [values[key] for key in sites]
    padded = [
        i for i, (target, source) in enumerate(zip(targets, sources, strict=True)) if target.shape != source.shape
    ]
    if padded:
        torch._foreach_zero_([targets[i] for i in padded])
        for i in padded:
            targets[i] = cut_to(targets[i], sources[i].shape)
    if targets:
        torch._foreach_copy_(targets, sources, non_blocking=True)
    return tensors
