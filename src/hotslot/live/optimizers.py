"""Steps of optimizers: what of a slot the live adapter lacks is neutral after each.

Its gradient is zero, by `Mute` or because its counterpart is. But an optimizer changes values without one, by weight
decay and by the momentum of the adapter before.
"""

from __future__ import annotations

import weakref
from collections.abc import Container
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Follower(Protocol):
    """Who is told of steps."""

    def after_step(self, params: Container[int]) -> None:
        """Called in the thread that steps, with the ids of the optimizer's parameters."""


# Without a lock, which an interrupt might leave shut: each use of this dict is one step of the interpreter.
_followers: weakref.WeakValueDictionary[int, Follower] = weakref.WeakValueDictionary()
_handles: list[object] = []


def follow_steps(follower: Follower) -> None:
    """Tell it of each step of any optimizer, while it lives, until `leave_steps`. May be repeated."""
    if not _handles:  # to stay: torch may be going through its hooks in another thread when one is taken off
        _handles.append(register_optimizer_step_post_hook(_after_step))
    _followers[id(follower)] = follower


def leave_steps(follower: Follower) -> None:
    """Undo `follow_steps`. May be repeated."""
    _followers.pop(id(follower), None)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    followers = [follower for known in _followers.valuerefs() if (follower := known()) is not None]
    # A graph would clear what is beyond this adapter at each replay, under others too.
    if followers and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        params = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for follower in followers:
            follower.after_step(params)
