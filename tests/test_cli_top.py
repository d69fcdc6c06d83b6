"""`hotslot top`, on real swappers behind a real HTTP server; and on servers that answer anything else."""

from __future__ import annotations

import itertools
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any

import pytest
from peft.tuners.lora import LoraLayer
from typer.testing import CliRunner, Result

import hotslot
from adapters import make_adapter
from hotslot.cli.app import app
from hotslot.cli.top import metrics_url, scrape
from hotslot.cli.top.readings import Reading, parse, view
from hotslot.cli.top.run import read
from hotslot.errors import HotslotError, MergedError
from hotslot.metrics import BOUNDS, Metrics, Recorder
from hotslot.report import SwapReport
from zoo import ZOO

pytest.importorskip("prometheus_client")

import prometheus_client

from hotslot.integrations.prometheus import Collector

MLP = ZOO["mlp"]
NAMES = ["a", "b", "c", "d", "e"]
HEAVY = {"torch", "peft", "transformers"}


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["top", *map(str, arguments)])


# --- a service


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("top")
    return {name: make_adapter(place / name, MLP, seed=i, r=4, target_modules=["up"]) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, str]]:
    """The registry and the URL of a process that exposes its metrics as the documentation says."""
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=registry)
    http, thread = prometheus_client.start_http_server(0, addr="127.0.0.1", registry=registry)
    yield registry, f"http://127.0.0.1:{http.server_port}/metrics"
    http.shutdown()
    http.server_close()
    thread.join()


@dataclass
class Service:
    """Swappers by the label of their slot, and what a process does with them."""

    registry: Any
    url: str
    folders: dict[str, Path]
    swappers: dict[str, hotslot.Swapper] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    _collector: Any = None

    def start(self, slot: str = "chat") -> None:
        """Attach a swapper of this label, in the place of one that was there; room for three adapters."""
        model = self.models[slot] = MLP.build()
        cache = hotslot.Cache(host_bytes=3 * hotslot.attach(MLP.build(), {"a": self.folders["a"]}).host_bytes)
        self.swappers[slot] = hotslot.attach(model, self.folders, cache=cache)
        self.expose()

    def expose(self, *, nothing: bool = False) -> None:
        if self._collector is not None:
            self.registry.unregister(self._collector)
        self._collector = None if nothing else Collector(self.swappers)
        if self._collector is not None:
            self.registry.register(self._collector)

    def swap(self, seed: int, count: int, slot: str = "chat") -> list[SwapReport]:
        """Swaps from disk, from memory and to the base, and some to what is live already."""
        rng, swapper = Random(seed), self.swappers[slot]
        names = [rng.choice([None, "a", "b", *NAMES]) for _ in range(count)]
        return [swapper.deactivate() if name is None else swapper.activate(name) for name in names]

    def fail(self, slot: str = "chat") -> None:
        layers = [module for module in self.models[slot].modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.merge()
        with pytest.raises(MergedError):
            self.swappers[slot].activate("a")
        for layer in layers:
            layer.unmerge()


@pytest.fixture
def service(server: tuple[Any, str], folders: dict[str, Path]) -> Iterator[Service]:
    service = Service(*server, folders)
    service.start()
    yield service
    service.expose(nothing=True)


def exposed(service: Service) -> str:
    return prometheus_client.generate_latest(service.registry).decode()


# --- readings


def test_a_reading_is_what_the_swappers_counted(service: Service) -> None:
    service.start('odd "name"\\ of\na slot')
    service.swap(0, 30)
    service.fail()
    got = read(service.url)
    assert got.slots == {slot: replace(each.metrics(), slot=slot) for slot, each in service.swappers.items()}
    chat, odd = got.slots.values()
    assert set(chat.latency) == {"disk", "host", "none"}
    assert min(chat.unchanged, chat.failed, chat.hits, chat.misses, chat.evictions) > 0
    assert (odd.changed, odd.latency) == (0, {})
    assert got.process_started == pytest.approx(time.time() - time.monotonic(), rel=1)  # some time of this epoch


def test_openmetrics_reads_the_same(service: Service) -> None:
    from prometheus_client.openmetrics.exposition import generate_latest

    service.swap(0, 10)
    text = generate_latest(service.registry).decode()
    assert text.endswith("# EOF\n")
    assert parse(text, url="") == parse(exposed(service), url="")


def test_an_interval_is_what_was_done_in_it(service: Service) -> None:
    service.start("search")
    service.swap(0, 20)
    before, earlier = read(service.url), service.swappers["chat"].metrics()
    reports = service.swap(1, 25)
    service.fail()
    now, later = read(service.url), service.swappers["chat"].metrics()
    seen = view(service.url, now, before)
    seconds = now.monotonic_seconds - before.monotonic_seconds
    assert seen.interval_seconds == seconds
    chat, search = seen.slots
    changed = [report for report in reports if report.changed]
    done = chat.interval
    assert done is not None
    assert not chat.restarted
    assert (done.changed, done.unchanged, done.failed) == (len(changed), len(reports) - len(changed), 1)
    nbytes, swapping = sum(report.nbytes for report in changed), sum(report.seconds for report in changed)
    assert done.written_bytes == nbytes > 0
    assert done.swaps_per_second == pytest.approx(len(changed) / seconds)
    assert done.gigabytes_per_second == pytest.approx(nbytes / 1e9 / seconds)
    assert done.swapping_gigabytes_per_second == pytest.approx(nbytes / 1e9 / swapping)
    assert done.misses == later.misses - earlier.misses > 0
    assert done.hits == later.hits - earlier.hits > 0
    assert done.hit_rate == pytest.approx(done.hits / (done.hits + done.misses))
    assert done.evictions == later.evictions - earlier.evictions > 0
    by_tier = {tier: [r.seconds for r in changed if r.tier == tier] for tier in {r.tier for r in changed}}
    assert {tier: latency.swaps for tier, latency in done.latency.items()} == {t: len(s) for t, s in by_tier.items()}
    for tier, latency in done.latency.items():
        assert latency.mean_seconds == pytest.approx(sum(by_tier[tier]) / len(by_tier[tier]))
    assert chat.since_attach.changed == later.changed > done.changed
    assert chat.since_attach.swaps_per_second is None
    idle = search.interval
    assert idle is not None
    assert (idle.swaps_per_second, idle.swapping_gigabytes_per_second, idle.hit_rate, idle.latency) == (
        0,
        None,
        None,
        {},
    )


def metrics_of(seconds: list[float]) -> Metrics:
    recorder = Recorder()
    for each in seconds:
        recorder.add(SwapReport("a", None, None, 1, "side", "host", nbytes=8, seconds=each, changed=True))
    waiting = ("adapters", "host_adapters", "host_bytes", "device_bytes", "hits", "misses", "evictions")
    return recorder.metrics("chat", **dict.fromkeys(waiting, 0))


def test_quantiles_lie_in_the_bucket_of_the_true_ones() -> None:
    rng = Random(0)
    for _ in range(300):
        seconds = [10 ** rng.uniform(-5.5, 1.2) for _ in range(rng.choice([1, 2, 3, 50, 100, 300]))]
        if rng.random() < 0.3:
            seconds = [rng.choice(BOUNDS) for _ in seconds]
        metrics = metrics_of(seconds)
        latency = view("", Reading(0, 0, None, {"chat": metrics})).slots[0].since_attach.latency["host"]
        for share, got in ((0.5, latency.p50_seconds), (0.99, latency.p99_seconds)):
            true = sorted(seconds)[ceil(share * len(seconds)) - 1]
            bucket = bisect_left(BOUNDS, true)
            if bucket == len(BOUNDS):
                assert got is None
            else:
                assert (0.0, *BOUNDS)[bucket] < got <= BOUNDS[bucket] * (1 + 1e-12)


# --- counts that begin anew


def test_a_new_swapper_under_an_old_name_has_no_negative_rates(service: Service) -> None:
    service.swap(0, 20)
    before = read(service.url)
    service.start()
    reports = service.swap(1, 3)
    slot = view(service.url, read(service.url), before).slots[0]
    assert slot.restarted
    assert slot.interval is not None
    assert slot.interval.changed == sum(report.changed for report in reports) == slot.since_attach.changed


COUNTED = ("changed", "unchanged", "failed", "written_bytes", "hits", "misses", "evictions", "latency")


@pytest.fixture(scope="module")
def counted(server: tuple[Any, str], folders: dict[str, Path]) -> Metrics:
    """Of everything something."""
    service = Service(*server, folders)
    service.start()
    service.swap(0, 20)
    service.fail()
    service.expose(nothing=True)
    return replace(service.swappers["chat"].metrics(), recompilations=5)


@pytest.mark.parametrize("lower", [*COUNTED, "process", "recompilations", "adapters", "nothing"])
def test_whatever_falls_no_rate_is_negative(counted: Metrics, lower: str) -> None:
    """Each count alone; the control is what may fall without a restart."""
    if lower == "latency":
        later = replace(counted, latency={tier: each for tier, each in counted.latency.items() if tier != "disk"})
    else:
        later = replace(counted, **({lower: getattr(counted, lower) - 1} if hasattr(counted, lower) else {}))
    before = Reading(100, 100, 50, {"chat": counted})
    now = Reading(102, 102, 101 if lower == "process" else 50, {"chat": later})
    slot = view("", now, before).slots[0]
    assert slot.restarted == (lower in (*COUNTED, "process"))
    assert slot.interval is not None
    numbers = [getattr(slot.interval, each.name) for each in fields(slot.interval) if each.name != "latency"]
    assert all(number is None or number >= 0 for number in numbers)
    assert slot.interval.changed == (later.changed if slot.restarted else 0)
    assert slot.interval.recompilations == (4 if lower == "recompilations" else 5 if slot.restarted else 0)


def test_a_slot_that_was_not_there_before_has_no_rates_yet(service: Service) -> None:
    before = read(service.url)
    service.start("search")
    service.swap(0, 5, "search")
    chat, search = view(service.url, read(service.url), before).slots
    assert chat.interval is not None
    assert search.interval is None
    assert not search.restarted


# --- the command


def test_once_shows_all_slots(service: Service) -> None:
    service.start("search\x1b[2J")
    service.swap(0, 40)
    result = run(service.url, "--once")
    assert (result.exit_code, result.stderr) == (0, "")
    text = result.stdout
    assert "\x1b" not in text
    chat = service.swappers["chat"].metrics()
    for expected in ("search\\x1b[2J", "5 known, 3 in host memory", f"{chat.host_bytes:,} host, 0 device", "from disk"):
        assert expected in text, expected
    rows = {line[:18].strip(): line[18:].split() for line in text.splitlines()}
    assert rows["swaps"][0] == str(chat.changed)
    assert rows["misses"][0] == str(chat.misses)
    assert rows["hit rate"][0] == f"{chat.hits / (chat.hits + chat.misses):.1%}"
    assert "swaps/s" not in text


def test_once_as_json(service: Service) -> None:
    service.swap(0, 10)
    result = run(service.url, "--once", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    (slot,) = found["slots"]
    metrics = service.swappers["chat"].metrics()
    assert (found["url"], found["interval_seconds"], slot["interval"]) == (service.url, None, None)
    assert (slot["slot"], slot["adapters"], slot["host_adapters"]) == ("chat", 5, 3)
    assert slot["since_attach"]["changed"] == metrics.changed
    assert slot["since_attach"]["latency"].keys() == metrics.latency.keys()
    assert found["unix_seconds"] == pytest.approx(time.time(), abs=60)


def between_readings(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Do one of these instead of each wait; then ctrl-C."""
    left = iter(steps)

    def step(seconds: float) -> None:
        assert seconds == 7
        try:
            next(left)()
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("hotslot.cli.top.run.time.sleep", step)


def test_lines_of_json_through_a_restart(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        service.expose(nothing=True)

    def start_anew() -> None:
        service.start()
        service.swap(2, 4)

    between_readings(monkeypatch, lambda: service.swap(0, 20), lambda: service.swap(1, 9), stop, start_anew)
    result = run(service.url, "--json", "--interval", 7)
    assert result.exit_code == 0
    first, second, third, nothing, last = map(json.loads, result.stdout.splitlines())
    assert first["slots"][0]["interval"] is None
    intervals = [line["slots"][0]["interval"] for line in (second, third)]
    assert [sum(interval[each] for each in ("changed", "unchanged")) for interval in intervals] == [20, 9]
    assert nothing["error"]["where"] == service.url
    assert last["slots"][0]["restarted"]
    done = last["slots"][0]["interval"]
    assert done["changed"] + done["unchanged"] == 4
    assert min(done["swaps_per_second"], done["gigabytes_per_second"]) > 0


def test_into_a_pipe_readings_stand_below_each_other(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    between_readings(monkeypatch, lambda: service.swap(0, 9), lambda: service.expose(nothing=True))
    result = run(service.url, "--interval", 7)
    assert result.exit_code == 0
    first, second, third = result.stdout.split(service.url)[1:]
    assert "swaps/s" not in first
    assert "swaps/s" in second
    assert "nothing newer: What answers there does not give hotslot's metrics." in third


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import sys\n{code}"]


def test_on_a_terminal_until_ctrl_c(service: Service) -> None:
    """In a process of its own, on a terminal of its own."""
    ours, theirs = pty.openpty()
    code = """
import signal
from hotslot.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
main()"""
    command = [*python(code), "top", service.url, "--interval", "0.1"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "50"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        seen = until(ours, b"swaps/s")
        assert b"\x1b[?25l" in seen  # the cursor is hidden
        service.swap(0, 5)
        process.send_signal(signal.SIGINT)
        rest = until(ours, b"\x1b[?25h")
        assert process.wait(timeout=30) == 0
        assert b"Traceback" not in seen + rest
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def until(terminal: int, wanted: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + 30
    while wanted not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, seen
        seen += os.read(terminal, 65536)
    return seen


def test_it_starts_without_torch_asks_no_proxy_and_refuses_without_prometheus_client(service: Service) -> None:
    code = f"""
from hotslot.cli.app import app
def once():
    try:
        app(["top", {service.url!r}, "--once"])
    except SystemExit as stopped:
        return stopped.code
assert once() == 0
print(sorted({HEAVY} & set(sys.modules)))
for name in [name for name in sys.modules if name.startswith("prometheus_client")]:
    sys.modules[name] = None
sys.exit(once())"""
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}  # nobody is there
    done = subprocess.run(python(code), capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.returncode == 1
    assert "pip install hotslot[prometheus]" in done.stderr
    assert "Traceback" not in done.stderr


# --- other servers


@pytest.fixture(scope="module")
def stranger() -> Iterator[Callable[[Any], str]]:
    """A server that answers what it is told to: bytes, one after another, as they stand on the wire."""
    answers: dict[str, Iterator[bytes]] = {}
    over = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            for part in answers[self.path]:
                if over.is_set():
                    return
                try:
                    self.wfile.write(part)
                except OSError:
                    return

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    paths = (f"/{i}" for i in itertools.count())

    def answering(parts: Any) -> str:
        path = next(paths)
        answers[path] = iter(parts(over) if callable(parts) else parts)
        return f"http://127.0.0.1:{server.server_port}{path}"

    yield answering
    over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def http(body: bytes, status: str = "200 OK", **headers: object) -> list[bytes]:
    lines = [f"HTTP/1.0 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()), "", ""]
    return ["\r\n".join(lines).encode() + body]


def never(over: Event) -> Iterator[bytes]:
    over.wait(30)
    yield b""


def one_byte_at_a_time(over: Event) -> Iterator[bytes]:
    yield from http(b"")
    while not over.wait(0.05):
        yield b"#"


STRANGERS: dict[str, tuple[Any, str]] = {
    "nothing": (http(b""), "0 bytes whose last line has no end"),
    "a page": (http(b"<html>\n<body>Hello</body>\n"), "2 lines, and no slot of hotslot's among them"),
    "other metrics": (http(b"# TYPE x_total counter\nx_total 3\nhotslot_of_mine 3\n"), "no slot of hotslot's"),
    "not found": (http(b"no", "404 Not Found"), "HTTP 404 Not Found"),
    "an error": (http(b"x" * 100_000, "500 Oh \x1b[2J no"), r"HTTP 500 Oh \x1b[2J no"),
    "no HTTP": ([b"SSH-2.0-OpenSSH_9.6\r\n"], "SSH-2.0-OpenSSH_9.6"),
    "silence": ([], "closed connection without response"),
    "never": (never, "no whole answer within 0.3 s"),
    "for ever": (one_byte_at_a_time, "no whole answer within 0.3 s"),
    "too much": (itertools.chain(http(b""), itertools.repeat(b"x" * 2**20)), "more than 16,777,216 bytes"),
    "cut off": (http(b"hotslot_x 1\n", Content_Length=1000), "an answer cut off 988 bytes before its end"),
    "half a line": (http(b'hotslot_evictions_total{slot="x"} 12'), "whose last line has no end"),
    "bytes": (http(b"\xff\xfe\n"), "bytes that are not text"),
    "a file": (http(b"", "302 Found", Location="file:///etc/hostname"), "HTTP 302"),
    "FTP": (http(b"", "302 Found", Location="ftp://127.0.0.1/x"), "unknown url type: ftp"),
    "no host": (http(b"", "302 Found", Location="http://a..b/"), "label empty or too long"),
    "a long line": (http(b'hotslot_x{a="",' + b'a="",' * 10**6 + b"} 1\n"), "a line of 5,000,018 characters"),
    "not a number": (http(b'hotslot_evictions_total{slot="x"} many\n'), "could not convert string to float"),
    "bad labels": (http(b"hotslot_evictions_total{slot=x} 1\n"), "Invalid labels"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_who_gives_no_metrics_is_refused(
    name: str, stranger: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, found = STRANGERS[name]
    monkeypatch.setattr(scrape, "TIMEOUT_SECONDS", 0.3)
    url = stranger(answer)
    began = time.monotonic()
    result = run(url)
    assert time.monotonic() - began < 5
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert f"where: {url}\n" in result.stderr
    assert found in result.stderr
    assert "expected: " in result.stderr
    assert "next step: in the service: " in result.stderr


def test_nobody_listens(stranger: Callable[[Any], str]) -> None:
    closed = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    closed.server_close()
    result = run(closed.server_port, "--json", "--once")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["where"] == f"http://localhost:{closed.server_port}/metrics"
    assert "refused" in error["found"]
    assert "hotslot top HOST:PORT" in error["next_step"]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("hotslot_evictions_total", "hotslot_gone_total", "none of the name and labels hotslot_evictions_total"),
        ('le="0.001"', 'le="0.0015"', "none of the name and labels hotslot_swap_seconds_bucket 0.001 "),
        (
            'hotslot_evictions_total{slot="chat"} ',
            'hotslot_evictions_total{slot="chat"} NaN ',
            "hotslot_evictions_total nan",
        ),
        ('_count{slot="chat",tier="disk"} ', '_count{slot="chat",tier="disk"} -', "hotslot_swap_seconds_count -"),
        ('outcome="hit"', 'outcome="miss"', "twice hotslot_lookups_total of slot 'chat'"),
    ],
    ids=["no count", "other buckets", "NaN", "less than nothing", "two processes"],
)
def test_metrics_of_another_kind_are_refused(service: Service, old: str, new: str, found: str) -> None:
    service.swap(0, 5)
    text = exposed(service)
    assert parse(text, url="here")[1]["chat"].changed  # the control
    changed = text.replace(old, new)
    assert changed != text
    with pytest.raises(HotslotError) as caught:
        parse(changed, url="here")
    assert found in caught.value.found
    assert caught.value.where == "here"


def test_it_follows_a_redirection(service: Service, stranger: Callable[[Any], str]) -> None:
    result = run(stranger(http(b"", "307 Temporary Redirect", Location=service.url)), "--once", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["slots"][0]["slot"] == "chat"


# --- addresses and options


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("8000", "http://localhost:8000/metrics"),
        ("gpu-1:9090", "http://gpu-1:9090/metrics"),
        ("[::1]:9090", "http://[::1]:9090/metrics"),
        ("gpu-1:9090/internal/metrics", "http://gpu-1:9090/internal/metrics"),
        ("https://example.org", "https://example.org/metrics"),
        ("http://example.org:81/m?name[]=x#y", "http://example.org:81/m?name[]=x"),
    ],
)
def test_addresses(address: str, url: str) -> None:
    assert metrics_url(address) == url


@pytest.mark.parametrize(
    "arguments",
    [
        ["file:///etc/hostname"], ["ftp://example.org/x"], ["example.org"], ["localhost:99999"], ["0"], [""],
        ["http://user:secret@example.org"], ["http://exa mple.org"], ["http://ex\nample.org"], ["8000", "8001"],
        ["--interval", "0"], ["--interval", "nan"], ["--interval", "1e9"], ["--once", "--interval", "3"], ["--fast"], ["http://"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
