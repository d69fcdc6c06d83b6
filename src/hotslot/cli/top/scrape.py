"""An address → the text that answers there, of bounded size and in bounded time."""

from __future__ import annotations

import time
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
    UnknownHandler,
)

from ...errors import HotslotError

MAX_BYTES = 16 * 2**20  # a slot takes 4 kB; all else that a large service counts, some hundred
TIMEOUT_SECONDS = 5.0
_CHUNK = 2**16
_FORMAT = {"Accept": "text/plain; version=0.0.4"}
_NEXT_STEP = (
    "in the service: prometheus_client.start_http_server(8000) and "
    "REGISTRY.register(hotslot.integrations.prometheus.Collector(swapper)); here: hotslot top HOST:PORT"
)


def metrics_url(address: str) -> str:
    """The URL of an address as people type it: a port, `host:port`, or a URL; the path is /metrics if it names none.

    Raises:
        ValueError: it is none of these.
    """
    if not address.isascii() or not address.isprintable() or " " in address:
        raise ValueError("an address is of printable ASCII characters, without spaces")
    if address.isdecimal():
        address = f"localhost:{address}"
    whole = "://" in address
    parts = urlsplit(address if whole else f"http://{address}")
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"hotslot top speaks http and https, and not {parts.scheme}")
    if not parts.hostname or parts.username is not None:
        raise ValueError("an address has a host, and no user or password")
    port = parts.port  # urlsplit itself refuses more than 65535
    if port == 0 or (port is None and not whole):
        raise ValueError("an address without http:// has a port above 0, such as localhost:8000")
    return parts._replace(path=parts.path or "/metrics", fragment="").geturl()


def fetch(url: str) -> str:
    """What `url` answers.

    Raises:
        HotslotError: nothing answers in time, or what answers is no text, cut off, or too much.
    """
    try:
        with _OPENER.open(Request(url, headers=_FORMAT), None, TIMEOUT_SECONDS) as answer:
            return _read(answer, time.monotonic() + TIMEOUT_SECONDS).decode()
    except HTTPError as error:
        error.close()
        raise _refusal(url, f"HTTP {error.code} {error.reason}") from None
    except UnicodeDecodeError:
        raise _refusal(url, "bytes that are not text") from None
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a host that nobody can have
        reason = error.reason if isinstance(error, URLError) else error  # URLError: while it connected
        if isinstance(reason, TimeoutError):
            reason = f"no whole answer within {TIMEOUT_SECONDS:g} s"
        raise _refusal(url, str(reason) or type(error).__name__) from None


def _read(answer: HTTPResponse, deadline: float) -> bytes:
    """The body. The timeout is for each packet; a server that sends one byte a second would never run into it."""
    body = bytearray()
    while chunk := answer.read1(_CHUNK):
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(f"more than {MAX_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if answer.length:  # read1 does not say so, and half a number is a number
        raise HTTPException(f"an answer cut off {answer.length:,} bytes before its end")
    if not body.endswith(b"\n"):
        raise HTTPException(f"{len(body):,} bytes whose last line has no end")
    return bytes(body)


def _refusal(url: str, found: str) -> HotslotError:
    return HotslotError("No metrics there.", where=url, found=found, expected="a service's metrics", hint=_NEXT_STEP)


def _new_opener() -> OpenerDirector:
    """As `urllib.request.build_opener`, without files and FTP, to which a redirection may lead, and without proxies.

    A service's metrics are for its own network: a proxy that the environment names for the web does not reach them.
    """
    opener = OpenerDirector()
    for handler in (
        HTTPHandler, HTTPSHandler, HTTPRedirectHandler, HTTPErrorProcessor, HTTPDefaultErrorHandler, UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


_OPENER = _new_opener()
