"""Several models that are swapped as one: a pipeline's unet and its text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

_KEY = "_hotslot_assembly"


class Assembly(nn.Module):
    """Models under names: the path of a module in it begins with the name of the model that has the module.

    It only looks at them: each keeps its own configs of PEFT.
    """

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        """Of `members`: name → model, as the user has it, compiled or not."""
        super().__init__()
        for name, member in members.items():
            self.add_module(name, member)

    @staticmethod
    def of(member: nn.Module) -> Assembly | None:
        """The assembly that holds the model, if there is one."""
        kept = _plain(member).__dict__.get(_KEY)
        return kept.assembly if isinstance(kept, _Kept) else None

    def hold(self) -> None:
        """Live as long as one of the members, which know it from now on.

        Raises:
            ModelError: another assembly holds one of them.
        """
        for name, member in self.named_children():
            other = Assembly.of(member)
            if other is not None and other is not self:
                raise ModelError(
                    "A component is attached as one of another pipeline, which has other components beside it.",
                    where=name,
                    found=f"attached together: {', '.join(dict(other.named_children()))}",
                    expected=f"no other swapper, or {', '.join(dict(self.named_children()))}",
                    hint="detach that one first",
                )
        for member in self.children():
            _plain(member).__dict__[_KEY] = _Kept(self)

    def dissolve(self) -> None:
        """Let the members forget it."""
        for member in self.children():
            if Assembly.of(member) is self:
                del _plain(member).__dict__[_KEY]

    def current(self) -> Mapping[str, Any]:
        """What the members should be by now, as far as that is known."""
        return {}

    def refuse_if_replaced(self) -> None:
        """Raise unless the members are those that they should be, compiled since or not."""
        for name, found in self.current().items():
            own = self._modules[name]
            assert own is not None
            if found is not own and (not isinstance(found, nn.Module) or _plain(found) is not _plain(own)):
                raise ModelError(
                    "A component of the pipeline was replaced.",
                    where=name,
                    found=f"another {type(found).__name__}" if found is not None else "none",
                    expected=f"the {type(_plain(own)).__name__} that was there at attach",
                    hint="put it back, or detach and attach again",
                )


class _Kept:
    """An assembly among a member's attributes, which goes into no copy or pickle of that."""

    def __init__(self, assembly: Assembly | None = None) -> None:
        self.assembly = assembly

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


def _plain(model: nn.Module) -> nn.Module:
    while isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        model = model._orig_mod
    return model
