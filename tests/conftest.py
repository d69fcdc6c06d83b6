"""What surrounds every test."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

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


def pytest_collection_finish() -> None:
    """Half a million objects of imported libraries stay for good: no full collection need walk over them."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the fuzzer's tests counted, whichever process ran them."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    recorded = [
        found
        for report in reports
        if getattr(report, "when", "") == "call"
        for found in getattr(report, "user_properties", ())
    ]
    counts: Counter[str] = Counter()
    for name, counted in recorded:
        if name == "fuzz":
            counts.update(counted)
    if counts:
        terminalreporter.section("malformed adapters")
        terminalreporter.write_line(", ".join(f"{name} {count:,}" for name, count in counts.most_common()))
        for name, line in recorded:
            if name == "fuzz cost":
                terminalreporter.write_line(line)
