"""Times swaps against what they must not depend on, and what they may: adapters known, model size, rank, tier.

    scripts/bench scale [--json] [--plot scale.png]        or    python -m benchmarks.bench_scale

Four series, each beside a plain copy of the same bytes in the same run. Known: of so many adapters in a folder ten are
in memory, and swapped by turns. Rank and layers: two adapters by turns. Tier: swaps among adapters of which a tenth has
room in host memory, popular ones more often. After each swap the slots' tensors are compared with the file's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

import hotslot
from hotslot import HotslotError

from .command import Command
from .llama import ADAPTER_NAME, Llama, quiet, shapes
from .report import place
from .running import chosen_device, only_own_garbage, refuse_unknown, timed, torch_threads

DEFAULT_ROUNDS = 60
WEIGHTS = "adapter_model.safetensors"
HEADS = 8
KNOWN, RANK, LAYERS, TIER = "adapters known", "rank", "layers of the model", "tier"


@dataclass(frozen=True, slots=True)
class Scale:
    """What is varied, and how far.

    Attributes:
        name: of the scale.
        known: numbers of adapters in a folder.
        ranks: of an adapter for 32 layers.
        layers: of models, of which the adapter has the first four.
        gallery: adapters in a folder, of which a tenth has room in memory.
        hidden: of the models whose adapters' bytes count.
    """

    name: str
    known: tuple[int, ...]
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    gallery: int
    hidden: int


SCALES = {
    scale.name: scale
    for scale in (
        Scale("tiny", known=(10, 30), ranks=(4, 8), layers=(4, 8), gallery=50, hidden=32),
        Scale("full", (10, 100, 1_000, 10_000), (4, 8, 16, 32, 64, 128), (4, 16, 64, 256), gallery=1_000, hidden=216),
    )
}


@dataclass(frozen=True, slots=True)
class Row:
    """One point of a series.

    Attributes:
        series: what is varied.
        at: its value.
        swaps: how many were timed.
        ms: their median; of a swap from disk with the reading.
        p99_ms: what 99 of 100 are below.
        copy_ms: median of a plain copy of the same bytes, one flat run.
        nbytes: of the adapter.
        attach_ms: of `hotslot.attach`, for each adapter in the folder; None where there is no folder.
    """

    series: str
    at: str
    swaps: int
    ms: float
    p99_ms: float
    copy_ms: float
    nbytes: int
    attach_ms: float | None = None


def run(
    sizes: Sequence[str] = ("full",),
    *,
    rounds: int = DEFAULT_ROUNDS,
    device: str | None = None,
    threads: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time all series.

    Raises:
        HotslotError: there is no such size; or what is live after a swap is not the adapter, or the budget is exceeded.
    """
    refuse_unknown(sizes, SCALES)
    chosen = chosen_device(device)
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads), quiet(), only_own_garbage():
        rows = []
        for name in sizes:
            for series in (_known, _ranks, _layers, _tiers):
                for row in series(SCALES[name], Path(folder) / name, rounds, chosen):
                    progress(f"{row.series} {row.at}: {row.ms:.2f} ms")
                    rows.append(row)
        return rows


def _known(scale: Scale, folder: Path, rounds: int, device: torch.device) -> Iterator[Row]:
    gallery = Gallery(folder / "known", hidden=32, layers=2, rank=2)
    for count in scale.known:
        gallery.grow(count)
        model = _model(32, 2, device)
        started = time.perf_counter()
        swapper = hotslot.attach(model, gallery.folder)
        attach_ms = (time.perf_counter() - started) * 1e3 / count
        names = swapper.adapters[:: count // 10][:10]
        for name in names:
            swapper.activate(name)
        timing = Timing(model, swapper, gallery, device)
        for i in range(rounds):
            timing.swap(names[i % len(names)])
        yield timing.row(KNOWN, f"{count:,}", attach_ms)


def _ranks(scale: Scale, folder: Path, rounds: int, device: torch.device) -> Iterator[Row]:
    for rank in scale.ranks:
        gallery = Gallery(folder / f"rank{rank}", hidden=scale.hidden, layers=32, rank=rank)
        yield _two_by_turns(gallery, 32, rounds, device, (RANK, str(rank)))


def _layers(scale: Scale, folder: Path, rounds: int, device: torch.device) -> Iterator[Row]:
    gallery = Gallery(folder / "layers", hidden=scale.hidden, layers=4, rank=16)
    for layers in scale.layers:
        yield _two_by_turns(gallery, layers, rounds, device, (LAYERS, str(layers)))


def _two_by_turns(gallery: Gallery, layers: int, rounds: int, device: torch.device, told: tuple[str, str]) -> Row:
    gallery.grow(2)
    model = _model(gallery.hidden, layers, device)
    swapper = hotslot.attach(model, {path.name: path for path in gallery.folder.iterdir()})
    timing = Timing(model, swapper, gallery, device)
    for name in swapper.adapters:
        swapper.activate(name)
    for i in range(rounds):
        timing.swap(swapper.adapters[i % 2])
    return timing.row(*told)


def _tiers(scale: Scale, folder: Path, rounds: int, device: torch.device) -> Iterator[Row]:
    gallery = Gallery(folder / "tiers", hidden=scale.hidden // 2 // HEADS * HEADS, layers=8, rank=8)
    gallery.grow(scale.gallery)
    model = _model(gallery.hidden, 8, device)
    limit = gallery.nbytes * scale.gallery // 10
    on_device = limit // 4 if device.type == "cuda" else 0
    cache = hotslot.Cache(host_bytes=limit, device_bytes=on_device)
    started = time.perf_counter()
    swapper = hotslot.attach(model, gallery.folder, cache=cache)
    attach_ms = (time.perf_counter() - started) * 1e3 / scale.gallery
    timing = Timing(model, swapper, gallery, device, limit=limit)
    names, popular = list(swapper.adapters), [1 / (i + 1) for i in range(scale.gallery)]  # Zipf's law
    for name in Random(0).choices(names, popular, k=scale.gallery):
        if name != swapper.active:
            timing.swap(name)
    swapper.check_integrity()
    for tier in timing.tiers:
        yield timing.row(TIER, tier, attach_ms, tier=tier)


class Gallery:
    """A folder of adapters for a model of Llama's linears, equal but for their values."""

    def __init__(self, folder: Path, *, hidden: int, layers: int, rank: int) -> None:
        self.folder, self.hidden = folder, hidden
        config = LoraConfig(r=rank, target_modules=list(shapes(hidden)))
        model = get_peft_model(_model(hidden, layers, torch.device("cpu")), config, ADAPTER_NAME)
        with tempfile.TemporaryDirectory() as first:
            model.save_pretrained(first)
            self._config = (Path(first) / "adapter_config.json").read_bytes()
            whole = (Path(first) / WEIGHTS).read_bytes()
        begin = 8 + int.from_bytes(whole[:8], "little")
        self._header, self.nbytes = whole[:begin], len(whole) - begin
        self._count = 0

    def grow(self, count: int) -> None:
        """Let it have so many adapters."""
        generator = torch.Generator().manual_seed(self._count)
        for i in range(self._count, count):
            values = torch.randn(self.nbytes // 4, generator=generator).mul_(0.02)
            folder = self.folder / f"adapter-{i:05}"
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_bytes(self._config)
            with (folder / WEIGHTS).open("wb") as file:
                file.write(self._header)
                file.write(values.numpy().data)
        self._count = max(self._count, count)


class Timing:
    """Swaps of one swapper: how long they took, and a check after each."""

    def __init__(
        self,
        model: nn.Module,
        swapper: hotslot.Swapper,
        gallery: Gallery,
        device: torch.device,
        *,
        limit: int | None = None,
    ) -> None:
        self.tiers: dict[str, list[float]] = defaultdict(list)
        self._model, self._swapper, self._gallery, self._limit = model, swapper, gallery, limit
        self._device = device
        self._source = torch.zeros(gallery.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._target = torch.zeros(gallery.nbytes, dtype=torch.uint8, device=device)
        self._copies: list[float] = []

    def swap(self, name: str) -> None:
        """To one that is not live."""
        reports: list[hotslot.SwapReport] = []
        wall, _ = timed(lambda: reports.append(self._swapper.activate(name)), self._device)
        self.tiers[reports[0].tier].append(wall)
        self._copies.append(timed(lambda: self._target.copy_(self._source, non_blocking=True), self._device)[0])
        self._refuse_wrong(name)

    def _refuse_wrong(self, name: str) -> None:
        live = dict(self._model.named_parameters())
        for key, tensor in load_file(self._gallery.folder / name / WEIGHTS).items():
            fqn = key.removeprefix("base_model.model.").replace(".weight", f".{ADAPTER_NAME}.weight")
            if not torch.equal(live[fqn].cpu(), tensor):
                raise HotslotError("What is live after a swap is not the adapter.", where=f"{name}, {fqn}")
        if self._limit is not None and self._swapper.host_bytes > self._limit:
            found = f"{self._swapper.host_bytes:,}"
            raise HotslotError("The budget is exceeded.", found=found, expected=f"at most {self._limit:,} bytes")

    def row(self, series: str, at: str, attach_ms: float | None = None, tier: str | None = None) -> Row:
        """What was timed, of all tiers or of one."""
        taken = sorted(self.tiers[tier] if tier is not None else [s for times in self.tiers.values() for s in times])
        return Row(
            series=series,
            at=at,
            swaps=len(taken),
            ms=statistics.median(taken) * 1e3,
            p99_ms=taken[min(len(taken) - 1, len(taken) * 99 // 100)] * 1e3,
            copy_ms=statistics.median(self._copies) * 1e3,
            nbytes=self._gallery.nbytes,
            attach_ms=attach_ms,
        )


def _model(hidden: int, layers: int, device: torch.device) -> nn.Module:
    """Whose layers share their weights: no swap touches them."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(device), requires_grad=False)
        for name, shape in shapes(hidden).items()
    }
    return Llama(weights, layers, HEADS).eval()


def render(rows: Sequence[Row], conditions: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title="Swaps at scale", title_justify="left", caption=place(conditions), caption_justify="left")
    for heading in ("", "at"):
        table.add_column(heading, no_wrap=True)
    for heading in ("swaps", "ms", "p99", "copy ms", "× copy", "bytes", "attach ms\nan adapter"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1].series != row.series
        if first:
            table.add_section()
        table.add_row(
            row.series if first else "",
            row.at,
            f"{row.swaps:,}",
            f"{row.ms:.3f}",
            f"{row.p99_ms:.3f}",
            f"{row.copy_ms:.3f}",
            f"{row.ms / row.copy_ms:.1f}",
            f"{row.nbytes:,}",
            "" if row.attach_ms is None else f"{row.attach_ms:.2f}",
        )
    console.print(table)


def draw(rows: Sequence[Row], conditions: dict[str, Any], path: Path) -> None:
    """Write an image with a panel for each series: median and p99 of swaps, and the plain copy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    series = list(dict.fromkeys(row.series for row in rows))
    figure, panels = plt.subplots(1, len(series), figsize=(4 * len(series), 3.6), squeeze=False, layout="constrained")
    for panel, title in zip(panels[0], series, strict=True):
        points = [row for row in rows if row.series == title]
        at = [row.at for row in points]
        panel.plot(at, [row.ms for row in points], "o-", color="tab:blue", label="swap, median")
        panel.plot(at, [row.p99_ms for row in points], "o:", color="tab:blue", alpha=0.5, label="swap, 99th percentile")
        panel.plot(at, [row.copy_ms for row in points], "s--", color="tab:green", label="plain copy")
        panel.set_title(title, fontsize=10)
        panel.set_yscale("log")
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    panels[0, 0].set_ylabel("milliseconds")
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel(place(conditions), fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


command = Command("scale", run, SCALES, ("full",), DEFAULT_ROUNDS, render, draw, columns=110)


if __name__ == "__main__":
    command.main()
