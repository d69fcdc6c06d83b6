"""Where in a padded tensor the values of a lower rank are.

R: rank, G: groups.  The rank dimension of A in a grouped convolution is G blocks of R / G, each padded by itself;
that of its B holds one group's R / G.
"""

from __future__ import annotations

import torch

from ..methods import PARTS


def corner(padded: torch.Tensor, suffix: str, rank: int, groups: int = 1) -> torch.Tensor:
    """The part of `padded` that a lower rank fills, in the shape of the lower rank.

    A view, but a copy where the groups' blocks leave gaps; to write into those use `fill`.
    """
    part = PARTS[suffix]
    if part.rank_dim is None:
        return padded
    if part.grouped and groups > 1:
        head = band(padded, suffix, 0, rank, groups)
        return head.reshape(rank, *padded.shape[1:])
    return band(padded, suffix, 0, rank, groups)


def band(padded: torch.Tensor, suffix: str, low: int, high: int, groups: int = 1) -> torch.Tensor:
    """A view of the ranks from `low` to `high` in `padded`; grouped A's as [G, ranks / G, …]."""
    part = PARTS[suffix]
    assert part.rank_dim is not None
    low, high = low // groups, high // groups
    if part.grouped and groups > 1:
        return padded.view(groups, -1, *padded.shape[1:]).narrow(1, low, high - low)
    return padded.narrow(part.rank_dim, low, high - low)


def fill(padded: torch.Tensor, suffix: str, values: torch.Tensor, rank: int, groups: int = 1) -> None:
    """Write `values` of `rank` into their corner of `padded`, in place."""
    if PARTS[suffix].rank_dim is None:
        padded.copy_(values)
    else:
        target = band(padded, suffix, 0, rank, groups)
        target.copy_(values.view(target.shape))
