"""One reading, or one after another until somebody stops it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.live import Live

from ...errors import HotslotError
from ..terminal import new_console, print_json
from .readings import Reading, View, parse, view
from .scrape import fetch
from .screen import draw

_Show = Callable[[View, HotslotError | None], None]  # the last view there was, and why there is none of now


def run_top(url: str, *, interval_seconds: float | None, as_json: bool = False) -> None:
    """Show what the swappers of a service are doing, until ctrl-C.

    A service that answered once and then does not is waited for: it may be on its way to start again.

    Args:
        url: of its metrics.
        interval_seconds: between two readings; None: there is one, and it shows what happened since attach.
        as_json: a JSON object; of many readings one on each line, `{"error": …}` for one that came to nothing.

    Raises:
        HotslotError: the first reading came to nothing: no answer, or not hotslot's metrics.
    """
    with suppress(KeyboardInterrupt):
        now = read(url)
        if interval_seconds is not None:
            with _shown(as_json=as_json) as show:
                _follow(url, now, interval_seconds, show)
        elif as_json:
            print_json(view(url, now))
        else:
            new_console().print(draw(view(url, now)))


def read(url: str) -> Reading:
    """What the process that answers there has counted until now.

    Raises:
        HotslotError: no answer, or not hotslot's metrics.
    """
    text = fetch(url)
    unix_seconds, monotonic_seconds = time.time(), time.monotonic()
    started, slots = parse(text, url=url)
    return Reading(unix_seconds, monotonic_seconds, started, slots)


def _follow(url: str, now: Reading, interval_seconds: float, show: _Show) -> None:
    last = view(url, now)
    show(last, None)
    while True:
        time.sleep(interval_seconds)
        before = now
        try:
            now = read(url)
        except HotslotError as trouble:
            show(last, trouble)
            continue
        last = view(url, now, before)
        show(last, None)


@contextmanager
def _shown(*, as_json: bool) -> Iterator[_Show]:
    """Where readings go: lines of JSON; one place of a terminal; or one below the other into a pipe."""
    console = new_console()
    if as_json:
        yield lambda last, trouble: print_json(last if trouble is None else {"error": trouble}, one_line=True)
    elif not console.is_terminal:
        yield lambda last, trouble: console.print(draw(last, trouble))
    else:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda last, trouble: live.update(draw(last, trouble), refresh=True)
