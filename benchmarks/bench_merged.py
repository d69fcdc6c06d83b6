"""Times swaps by merging: hotslot beside PEFT's unmerge and merge, and beside a plain copy of the same weights.

    scripts/bench merged [--size 440MB] [--threads 2] [--json] [--plot merged.png]

All contenders swap the same two adapters of a method by turns, in an order drawn anew for each round; a row's time is
the median over the rounds. Before and after, hotslot's weights are compared bit for bit with those of a fresh
`merge_and_unload`. Forward passes follow: of the compiled base, the same with an adapter merged, and PEFT's branch.

`--size 14GB --device cuda` is another benchmark, `large_merges.py`: the linears of Llama-3-8B, merged with fewer
roundings than PEFT's, as is the default on a GPU, and compared with a merge in 64 bits.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

import hotslot
from hotslot import HotslotError

from .command import Command
from .llama import llama_of_own_weights, quiet
from .report import Goal, bars, place
from .running import by_turns, chosen_device, only_own_garbage, refuse_unknown, timed, torch_threads

HOTSLOT, PEFT, COPY = "hotslot Swapper.activate", "PEFT unmerge_adapter + merge_adapter", "plain copy"
ADDMM = "torch.addmm, layer by layer"
BASE, MERGED, BRANCH = "plain base model", "hotslot, merged", "PEFT, LoRA branch"
DEFAULT_SIZES = ("50MB",)  # at 440MB PEFT takes half a minute for each swap of OFT
DEFAULT_ROUNDS = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPY_FACTORS = {"fp32": 3.0, "bf16": 6.0}  # times the plain copy's time that LoRA may take
LARGE_COPY_FACTOR = 16 / 12.5  # of a GPU's memory: with fewer roundings than PEFT's
TOKENS = (1, 64)  # of a forward pass
LORA = "LoRA r=16"

# Name → hidden size and layers; every layer has weights of its own. The name tells what the weights are in float32.
SIZES = {"tiny": (64, 2), "50MB": (512, 4), "440MB": (1024, 8), "14GB": (4096, 32)}
LARGE = ("14GB",)  # in bfloat16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, Callable[[], Any]] = {
    LORA: lambda: LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS),
    "LoHa r=16": lambda: LoHaConfig(r=16, alpha=32, target_modules=TARGETS),
    "IA3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "OFT, blocks of 16": lambda: OFTConfig(r=0, oft_block_size=16, target_modules=TARGETS),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one job.

    Attributes:
        size, dtype: of the base weights.
        job: the method that is swapped, or what passes forward.
        contender: who does it.
        ms, min_ms: median and fastest of the rounds.
        cpu_ms: median of the CPU time of all threads.
        times_copy: in times of the plain copy's, of the base's where it is a forward pass.
        nbytes: of the weights that are written.
        error: largest difference of the weights to a fresh `merge_and_unload`; 0 is bit for bit. Of `LARGE`: their
            distance from a merge in 64 bits, as a part of what the adapter changes.
    """

    size: str
    dtype: str
    job: str
    contender: str
    ms: float
    min_ms: float
    cpu_ms: float
    times_copy: float
    nbytes: int
    error: float


def run(
    sizes: Sequence[str] = DEFAULT_SIZES,
    *,
    rounds: int = DEFAULT_ROUNDS,
    device: str | None = None,
    threads: int = 1,
    dtypes: Sequence[str] = tuple(DTYPES),
    tokens: Sequence[int] = TOKENS,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time all methods, and forward passes of so many tokens.

    Raises:
        HotslotError: there is no such size, or hotslot's weights are not PEFT's.
    """
    refuse_unknown(sizes, SIZES)
    chosen, rows = chosen_device(device), list[Row]()
    with torch_threads(threads), quiet():
        for size in sizes:
            if size in LARGE:
                from . import large_merges

                rows += large_merges.run(size, *SIZES[size], rounds=rounds, device=chosen, progress=progress)
                continue
            for dtype in dtypes:
                for method in METHODS:
                    progress(f"{size}, {dtype}: {method}")
                    with tempfile.TemporaryDirectory() as folder:
                        rows += _swaps(Subject(size, dtype, method, Path(folder), chosen), rounds)
                with tempfile.TemporaryDirectory() as folder:
                    subject = Subject(size, dtype, LORA, Path(folder), chosen)
                    for count in tokens:
                        progress(f"{size}, {dtype}: forward passes of {count} tokens")
                        rows += _forwards(subject, count, rounds)
    return rows


class Subject:
    """A base model, two adapters of one method for it, and what a fresh merge of each makes of the weights."""

    def __init__(self, size: str, dtype: str, method: str, folder: Path, device: torch.device) -> None:
        hidden, layers = SIZES[size]
        self.size, self.dtype, self.method, self.device = size, dtype, method, device
        self.hidden = hidden
        self._base = llama_of_own_weights(hidden, layers, heads=8).to(device, DTYPES[dtype])
        self.folders = folder / "0", folder / "1"
        for seed, path in enumerate(self.folders):
            self._save_adapter(seed, path)
        self.expected = tuple(weights(self.peft_model(path).merge_and_unload()) for path in self.folders)

    def base(self) -> nn.Module:
        """A new one, with the same values each time."""
        return copy.deepcopy(self._base)

    def peft_model(self, folder: Path) -> PeftModel:
        """A fresh load, as PEFT does it by default."""
        return PeftModel.from_pretrained(self.base(), str(folder), "0").eval()

    def error(self, model: nn.Module, adapter: int) -> float:
        """Largest difference of the model's weights to the fresh merge's; 0 if the bits are equal."""
        pairs = list(zip(weights(model).values(), self.expected[adapter].values(), strict=True))
        if all(torch.equal(one, other) for one, other in pairs):
            return 0.0
        return max(float((one.double() - other.double()).abs().max()) for one, other in pairs)

    def _save_adapter(self, seed: int, folder: Path) -> None:
        model = get_peft_model(self.base(), METHODS[self.method]())
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter)
        model.save_pretrained(str(folder))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base weights, in the order of the layers, wherever PEFT has put them."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in (*TARGETS, "base_layer")
    }


@dataclass(frozen=True, slots=True)
class Contender:
    """Who swaps: `swap(i)` makes adapter i live; `model` is None for the copy."""

    name: str
    swap: Callable[[int], object]
    model: nn.Module | None


def _contenders(subject: Subject) -> Iterator[Contender]:
    model = subject.base()
    names = [str(i) for i in range(len(subject.folders))]
    sources = dict(zip(names, map(str, subject.folders), strict=True))
    swapper = hotslot.attach(model, sources, route="merged", plan=hotslot.plan(model, merge="peft"))
    yield Contender(HOTSLOT, lambda adapter: swapper.activate(names[adapter]), model)

    peft: Any = subject.peft_model(subject.folders[0])
    peft.load_adapter(str(subject.folders[1]), "1")
    peft.merge_adapter(["0"])

    def unmerge_and_merge(adapter: int) -> None:
        peft.unmerge_adapter()
        peft.merge_adapter([names[adapter]])

    yield Contender(PEFT, unmerge_and_merge, peft)
    expected = subject.expected
    targets = [torch.empty_like(weight) for weight in expected[0].values()]

    def plain_copy(adapter: int) -> None:
        for target, source in zip(targets, expected[adapter].values(), strict=True):
            target.copy_(source)

    yield Contender(COPY, plain_copy, None)


def _swaps(subject: Subject, rounds: int) -> list[Row]:
    contenders = list(_contenders(subject))
    errors = dict.fromkeys(contenders, 0.0)
    swaps = {contender: partial(_swap_to_other, contender, [0]) for contender in contenders}
    for i in (1, 0):
        for contender in contenders:
            contender.swap(i)
            _check(subject, contender, i, errors)
    times = time_all(swaps, rounds, subject.device)
    for contender in contenders:
        contender.swap(0)
        _check(subject, contender, 0, errors)
    nbytes = sum(weight.nbytes for weight in subject.expected[0].values())
    copied = next(statistics.median(wall for wall, _ in taken) for one, taken in times.items() if one.name == COPY)
    of = subject.size, subject.dtype, subject.method
    return [row_of(of, contender.name, taken, copied, nbytes, errors[contender]) for contender, taken in times.items()]


def _swap_to_other(contender: Contender, live: list[int]) -> None:
    live[0] = 1 - live[0]
    contender.swap(live[0])


def _check(subject: Subject, contender: Contender, adapter: int, errors: dict[Contender, float]) -> None:
    if contender.model is None:
        return
    errors[contender] = max(errors[contender], subject.error(contender.model, adapter))
    if contender.name == HOTSLOT and errors[contender]:
        raise HotslotError(
            "The weights after a swap are not those of a fresh merge_and_unload: its times would mean nothing.",
            where=f"{subject.size}, {subject.dtype}, {subject.method}",
            found=f"a difference of {errors[contender]:.2g}",
        )


def _forwards(subject: Subject, tokens: int, rounds: int) -> list[Row]:
    base, merged = subject.base(), subject.base()
    hotslot.attach(merged, {"0": str(subject.folders[0])}, route="merged").activate("0")
    models = {BASE: base, MERGED: merged, BRANCH: subject.peft_model(subject.folders[0])}
    x = torch.randn(tokens, subject.hidden, generator=torch.Generator().manual_seed(0))
    x = x.to(subject.device, DTYPES[subject.dtype])
    torch._dynamo.reset()  # it compiles one function so many times, and no more
    with torch.no_grad():
        calls = {
            name: partial(torch.compile(model, dynamic=False, fullgraph=True), x) for name, model in models.items()
        }
        outputs = {name: call() for name, call in calls.items()}
        for _ in range(3):
            for call in calls.values():
                call()
        times = time_all(calls, 5 * rounds, subject.device)
    difference = (outputs[MERGED].double() - outputs[BRANCH].double()).abs().max() / outputs[BRANCH].abs().max()
    if difference > (1e-3 if subject.dtype == "fp32" else 0.1):
        raise HotslotError("The merged model computes something else than PEFT's branch.", found=float(difference))
    copied = statistics.median(wall for wall, _ in times[BASE])
    nbytes = sum(weight.nbytes for weight in weights(base).values())
    of = subject.size, subject.dtype, f"forward pass, {tokens} token{'s' * (tokens > 1)}, compiled"
    return [row_of(of, name, taken, copied, nbytes, 0.0) for name, taken in times.items()]


def time_all(calls: Mapping[Any, Callable[[], Any]], rounds: int, device: torch.device) -> dict[Any, list[Any]]:
    """Of each call the (wall, CPU) seconds of each round."""
    times: dict[Any, list[Any]] = {name: [] for name in calls}
    with only_own_garbage():
        for name in by_turns(calls, rounds):
            times[name].append(timed(calls[name], device))
    return times


def row_of(of: tuple[str, str, str], contender: str, times: list[Any], unit: float, nbytes: int, error: float) -> Row:
    """Of a size, a dtype and a job."""
    walls, cpus = zip(*times, strict=True)
    median = statistics.median(walls)
    milliseconds = median * 1e3, min(walls) * 1e3, statistics.median(cpus) * 1e3
    return Row(*of, contender, *milliseconds, median / unit, nbytes, error)


def goals(rows: Sequence[Row]) -> list[Goal]:
    """As far as their rows are there."""
    ms = {(row.size, row.dtype, row.job, row.contender): row.ms for row in rows}
    found = []
    for size, dtype in dict.fromkeys((row.size, row.dtype) for row in rows):
        ours = ms[size, dtype, LORA, HOTSLOT]
        name = f"{size}, {dtype}, {LORA}: time of a swap in"
        found.append(Goal(f"{name} PEFT's", ours / ms[size, dtype, LORA, PEFT], 1.0, at_most=True))
        most = LARGE_COPY_FACTOR if size in LARGE else COPY_FACTORS[dtype]
        found.append(Goal(f"{name} the copy's", ours / ms[size, dtype, LORA, COPY], most, at_most=True))
    return found


def render(rows: Sequence[Row], conditions: dict[str, Any], console: Console) -> None:
    """Print the table, the goals, and where it was made."""
    table = Table(title="Swaps by merging, and forward passes", title_justify="left")
    for heading in ("job", "contender"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "min", "CPU ms", "× copy\n/ base", "bytes", "weights"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (size, dtype, job), group in groupby(rows, key=_panel):
        label = f"{size}, {dtype}: {job}"
        for row in group:
            figures = f"{row.ms:.1f}", f"{row.min_ms:.1f}", f"{row.cpu_ms:.1f}", f"{row.times_copy:.2f}"
            table.add_row(label, row.contender, *figures, f"{row.nbytes:,}", _weights(row))
            label = ""
        table.add_section()
    console.print(table)
    for goal in goals(rows):
        console.print(goal)
    console.print(place(conditions))


def _weights(row: Row) -> str:
    if row.contender not in (HOTSLOT, PEFT, ADDMM):
        return ""
    if row.size in LARGE:
        return f"{row.error:.2%} lost"
    return "as merged anew" if row.error == 0 else f"drifted by {row.error:.0e}"


def _panel(row: Row) -> tuple[str, str, str]:
    return row.size, row.dtype, row.job


def draw(rows: Sequence[Row], conditions: dict[str, Any], path: Path) -> None:
    """Write the medians as bars, one panel for each job."""
    panels = {
        f"{size}, {dtype}: {job}": [(row.contender, row.ms, f"{row.times_copy:.2f} ×") for row in group]
        for (size, dtype, job), group in groupby(rows, key=_panel)
    }
    bars(panels, f"milliseconds, median; × plain copy, or × base – {place(conditions)}", path)


command = Command("merged", run, SIZES, DEFAULT_SIZES, DEFAULT_ROUNDS, render, draw, goals, columns=160)


if __name__ == "__main__":
    command.main()
