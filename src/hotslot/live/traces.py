"""Whether the parts of slots are still the model's, still where hotslot has put them, and as hotslot wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import torch

from ..errors import ModelError
from .slots import Slot

_CHUNK = 32  # tensors whose Python and C++ objects fit the first-level cache
_SAMPLED = 16  # slots of each part of a model, where nobody writes single ones
_version_of: Callable[[torch.Tensor], int] = attrgetter("_version")

# A layer, the map that is to be its `scaling`, the adapter's name, the view that is to be there.
Scaling = tuple[Any, Any, str, torch.Tensor]


class Traces:
    """What others leave behind when they replace, move or write the parts of `slots`; each swap looks for it.

    Args:
        slots: all slots of one adapter name.
        arenas: with whose version counters their scalings count.
        exclusive: look at some slots of each part of the model only.
    """

    def __init__(self, slots: Mapping[str, Slot], arenas: Iterable[torch.Tensor], *, exclusive: bool) -> None:
        self._slots = sample(slots) if exclusive else dict(slots)
        # The fields of all parts' Held as lists: a swap looks at each of hundreds.
        held = [entry for slot in self._slots.values() for entry in slot.held.values()]
        self._params = [entry.param for entry in held]
        self._chunks = [self._params[i : i + _CHUNK] for i in range(0, len(self._params), _CHUNK)]
        self._arenas = list(arenas)
        # The dicts of modules that hold the layers, and what they hold. One container of each layer: PEFT puts in and
        # takes out an adapter's A and B together.
        firsts = [next(iter(slot.held.values())) for slot in self._slots.values()]
        self._holders = list({id(h): h for slot in self._slots.values() for h in [slot.siblings]}.values())
        self._holders += [entry.owner for entry in firsts if entry.owner is not entry.params]
        self._held = list(map(dict, self._holders))
        self._dicts = [entry.params for entry in held], [entry.key for entry in held]
        self._pointers = [param.data_ptr() for param in self._params]
        # The layers' __dict__, "scaling", and the other fields of Scaling.
        self._scalings: Sequence[Sequence[Any]] = [], [], [], [], []
        self._versions: list[int] = []
        self.mark_clean()

    def expect_scalings(self, scalings: Mapping[str, Scaling]) -> None:
        """Take these, fqn → where it is, as the slots' scalings from now on."""
        found = [scalings[fqn] for fqn in self._slots if fqn in scalings]
        layers, maps, names, views = zip(*found, strict=True) if found else ((), (), (), ())
        self._scalings = [layer.__dict__ for layer in layers], ["scaling"] * len(layers), maps, names, views

    def refuse_if_replaced(self) -> None:
        """Raise if the model no longer has one of the parameters."""
        registered = map(dict.get, *self._dicts)
        # To compare dicts of modules looks at identities, and needs a third of the time of a look-up in each.
        if self._holders == self._held and all(map(is_, registered, self._params)):
            return
        for slot in self._slots.values():
            if not slot.in_place():
                raise ModelError(
                    f"The layers of adapter {slot.adapter_name!r} were taken out of the model (unload, "
                    "merge_and_unload).",
                    where=slot.fqn,
                    expected="the LoRA layer that was there at attach",
                    hint="attach again",
                )
            for suffix, entry in slot.held.items():
                if not entry.in_place():
                    raise ModelError(
                        f"The adapter {slot.adapter_name!r} was deleted from the model, or loaded anew.",
                        where=f"{slot.fqn}.{suffix}",
                        expected="the Parameter that was there at attach",
                        hint="attach again",
                    )
        self._held = list(map(dict, self._holders))  # something else has come, or a layer was compiled by itself

    def moved_and_dirty(self) -> tuple[bool, bool]:
        """Whether a part is no longer in the slot's memory, and whether others have written it since `mark_clean`.

        The first by `model.to(…)`, `param.data = …`, `layer.scaling = {…}`; the second by an optimizer,
        `load_state_dict` or a user. Autograd's version counters tell; a write through `.data` leaves no trace there.
        """
        pointers: list[int] = []
        versions: list[int] = []
        for chunk in self._chunks:  # each few tensors twice while they are in the cache, rather than all of them twice
            pointers += map(torch.Tensor.data_ptr, chunk)
            versions += map(_version_of, chunk)
        versions += map(_version_of, self._arenas)
        get: Any = dict.get
        layers, keys, maps, names, views = self._scalings
        scaled = all(map(is_, map(get, layers, keys), maps)) and all(map(is_, map(get, maps, names), views))
        return pointers != self._pointers or not scaled, versions != self._versions

    def mark_clean(self) -> None:
        """Take what is live now as written by hotslot."""
        self._versions = [*map(_version_of, self._params), *map(_version_of, self._arenas)]

    def mark_dirty(self) -> None:
        """Take what is live now as written by others."""
        self._versions = []

    def count_write(self) -> None:
        """`mark_clean` after a write that each part has counted once, if it was clean before."""
        counted = [version + 1 for version in self._versions[: len(self._params)]]
        self._versions = [*counted, *map(_version_of, self._arenas)]


def sample(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Some of each part of the model that may be moved or replaced by itself: of a pipeline, its components."""
    parts: dict[str, list[str]] = {}
    for fqn in slots:
        parts.setdefault(fqn.partition(".")[0], []).append(fqn)
    if len(parts) > _SAMPLED:  # they are layers
        parts = {"": list(slots)}
    return {fqn: slots[fqn] for fqns in parts.values() for fqn in fqns[:: -(-len(fqns) // _SAMPLED)]}
