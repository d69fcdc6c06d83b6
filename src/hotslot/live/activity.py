"""Which adapters are active on a model, while slots come and go.

PEFT has their names in each of its layers, whether the layer has those adapters or not, and in its own models around
the base. A layer computes with those of them that it has. PEFT's calls give all layers the same names; so does this.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn

from .discover import callable_roots, innermost, lora_layers


class Choice(NamedTuple):
    """What said which adapters are active: before a slot came, and right after."""

    before: Any
    given: Any

    def without(self, slot: str, now: Any, there: Collection[str]) -> Any:
        """What is to be said once the slot has gone: the same as before, unless others have chosen since.

        Args:
            slot: the slot.
            now: what is said.
            there: the adapters that are left, the slot among them if other layers keep it.
        """
        if now == self.given:
            return self.before
        if slot in there or slot not in listed(now):
            return now
        rest = [name for name in listed(now) if name != slot]
        rest = rest or [name for name in listed(self.before) if name in there]  # the slot alone had been chosen
        return self.before if rest == listed(self.before) else rest


class Activity:
    """Which adapters were active on a model when a slot came to it, and are with it."""

    def __init__(self, model: nn.Module, slot: str, *, joins: bool) -> None:
        """Remember what is active. If the slot joins, it is active beside that from now on, in all layers."""
        from peft import PeftModel

        self._model = weakref.ref(model)
        self._choices: weakref.WeakKeyDictionary[nn.Module, Choice] = weakref.WeakKeyDictionary()
        self._slot = slot
        for place, key in _places(model):
            before = given = vars(place)[key]
            # A PeftModel has the name of one, by which it looks its config up.
            if joins and slot not in listed(before) and not isinstance(place, PeftModel):
                given = [*listed(before), slot]
            self._choices[place] = Choice(before, given)
            vars(place)[key] = given

    def leave(self) -> None:
        """Let be active again what was, but for what others have chosen since. May be repeated.

        The model has configs of those adapters alone that are left.
        """
        model = self._model()
        if model is None:
            return
        there = getattr(innermost(model), "peft_config", None) or {}
        for place, key in _places(model):
            choice = self._choices.get(place, Choice([], None))  # layers that came later, with other adapters
            vars(place)[key] = choice.without(self._slot, vars(place)[key], there)


def listed(active: Any) -> list[str]:
    """The names in what PEFT keeps of them: a string, or a list."""
    return [active] if isinstance(active, str) else active


def _places(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """(module, attribute) of all that names active adapters, but for wrappers around modules that are saved whole."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    for root in callable_roots(model):
        if isinstance(root, (PeftModel, BaseTuner)):
            yield root, "active_adapter"
    for _, layer in lora_layers(model):
        yield layer, "_active_adapter"
