"""What can be known of adapters before a model is touched, with as little reading as may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from . import live
from .checkpoint import Checkpoint
from .entry import Entry
from .pipelines import Request, read, request, survey


class Surveyed(NamedTuple):
    """Adapters, read or not.

    Attributes:
        planned: what slots are planned for: those that were read, and of the others a few of each family, without
            values.
        read: those that were read, and where they are.
        unread: name → where the others are.
    """

    planned: list[Entry]
    read: list[tuple[Entry, Request]]
    unread: dict[str, Request]


def survey_all(
    model: nn.Module, sources: Mapping[str, Any], route: str, *, lazy: bool = False, of_family: int = 1
) -> Surveyed:
    """Read adapters, or what their headers and configs say.

    Args:
        model: of `pipelines.whole`.
        sources: name → what `pipelines.request` takes.
        route: of the entries.
        lazy: read no values where headers say all that a plan needs.
        of_family: how many adapters of equal header and config are planned for.

    Raises:
        CheckpointError, UnsupportedError: what is wrong with one of them.
    """
    pin, families = live.is_on_gpu(model), Counter[bytes]()
    found = Surveyed([], [], {})
    for name, source in sources.items():
        asked = request(model, source, pin_memory=pin)
        schema = survey(model, asked) if lazy else None
        if schema is None:
            checkpoint = read(model, asked, pin_memory=pin)
            if not lazy or isinstance(asked, Checkpoint):
                entry = Entry(name, checkpoint, route=route)
                found.planned.append(entry)
                found.read.append((entry, asked))
                continue
            schema = checkpoint.schema  # the values are let go of: there may be more of them than there is room for
        families[schema.digest] += 1
        found.unread[name] = asked
        if families[schema.digest] <= of_family:
            outline = Checkpoint.outline(schema, asked.origin, number=families[schema.digest])
            found.planned.append(Entry(name, outline, route=route))
    return found
