"""Where in a padded tensor the values of a lower rank are.

R: rank, G: groups of a grouped convolution, E: experts of a mixture. One of G and E is 1.
A's rank dimension is G blocks of R / G, or E blocks of R, each padded by itself.
B's holds the R / G of one group, or E values for each of R: there a lower rank is the head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..methods import PARTS


def corner(padded: torch.Tensor, suffix: str, rank: int, groups: int = 1, experts: int = 1) -> torch.Tensor:
    """The part of `padded` that a lower rank fills, in the shape of the lower rank.

    A view, but a copy where the blocks leave gaps; to write into those use `fill`.
    """
    if PARTS[suffix].rank_dim is None:
        return padded
    head = band(padded, suffix, 0, rank, groups, experts)
    return head if head.dim() == padded.dim() else head.reshape(-1, *padded.shape[1:])


def band(padded: torch.Tensor, suffix: str, low: int, high: int, groups: int = 1, experts: int = 1) -> torch.Tensor:
    """A view of the ranks from `low` to `high` in `padded`; A's blocks, if there are several, as a first dimension."""
    part = PARTS[suffix]
    assert part.rank_dim is not None
    low, high = low // groups, high // groups
    if part.grouped and groups * experts > 1:
        return padded.view(groups * experts, -1, *padded.shape[1:]).narrow(1, low, high - low)
    return padded.narrow(part.rank_dim, low * experts, (high - low) * experts)


def fill(padded: torch.Tensor, suffix: str, values: torch.Tensor, rank: int, groups: int = 1, experts: int = 1) -> None:
    """Write `values` of `rank` into their corner of `padded`, in place."""
    if PARTS[suffix].rank_dim is None:
        padded.copy_(values)
    else:
        target = band(padded, suffix, 0, rank, groups, experts)
        target.copy_(values.view(target.shape))


def all_zero(parts: Mapping[str, torch.Tensor]) -> bool:
    """Whether the matrices among them, by suffix, are zero; not known of what has no memory."""
    matrices = [value.detach() for suffix, value in parts.items() if PARTS[suffix].rank_dim is not None]
    return not any(value.is_meta or bool(value.any()) for value in matrices)
