"""What surrounds every test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No test sees what another has compiled, nor its recompile limits and counters. Imports nothing by itself."""
    _forget_compiled()
    yield
    _forget_compiled()


def _forget_compiled() -> None:
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()  # a tenth of a millisecond when there is nothing to forget
        dynamo.utils.counters.clear()
