"""Times swaps of LoRAs in a diffusers pipeline: hotslot beside diffusers' own and beside a copy of the same tensors.

    scripts/bench diffusers [--json] [--plot diffusers.png]

The pipeline is Flux's, its transformer of Flux's layers and thin: 208 of them have LoRA, of rank 64, 18 MB in bfloat16.
All contenders swap the same two LoRAs by turns, in an order drawn anew for each round; a row's time is the median over
the rounds. Before, and once more after, each contender's pipeline is compared with a fresh one that has loaded the LoRA
by diffusers alone.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import hotslot
from hotslot import HotslotError

from .bench_swap import Times, time_swaps
from .command import Command
from .contenders import Contender, Twin
from .llama import quiet
from .report import Goal, bars, place
from .running import chosen_device, refuse_unknown, torch_threads

COLD, WARM = "file → live", "host memory → live"
ACTIVATE, LOAD = "hotslot Swapper.activate", "hotslot Swapper.load + activate"
HOTSWAP, HOTSWAP_DICT = (
    "diffusers load_lora_weights(file, hotswap=True)",
    "diffusers load_lora_weights(dict, hotswap=True)",
)
COPY, READ = "plain copy of each tensor", "plain read + copy of each tensor"
DEFAULT_SIZES = ("18MB",)
DEFAULT_ROUNDS = 20
ADAPTER_NAME = "style"


@dataclass(frozen=True, slots=True)
class Size:
    """Heads of 16 values, double blocks of 12 linears with LoRA, single blocks of 5, and a rank."""

    heads: int
    double_blocks: int
    single_blocks: int
    rank: int


SIZES = {"tiny": Size(2, 1, 2, 4), "18MB": Size(13, 9, 20, 64)}
# Of a double block, then of a single one.
_TARGETS = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    "proj_mlp", "proj_out",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One contender in one case.

    Attributes:
        size: name of the LoRAs' size.
        case: what is done.
        contender: who does it, and how.
        ms, min_ms: median and fastest of the rounds.
        cpu_ms: median of the CPU time of all threads.
        times_diffusers: how many times faster than diffusers' hotswap at the same case.
        times_copy: in times of the copy of each tensor, at the same case.
        nbytes: of the LoRA.
        error: largest difference of the outputs to those of a fresh pipeline; 0 is bit for bit.
    """

    size: str
    case: str
    contender: str
    ms: float
    min_ms: float
    cpu_ms: float
    times_diffusers: float
    times_copy: float
    nbytes: int
    error: float


def run(
    sizes: Sequence[str] = DEFAULT_SIZES,
    *,
    rounds: int = DEFAULT_ROUNDS,
    device: str | None = None,
    threads: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time all cases.

    Raises:
        HotslotError: diffusers is not installed, there is no such size, or a contender's outputs are not those of a
            fresh load.
    """
    refuse_unknown(sizes, SIZES)
    _quiet_diffusers()
    chosen, rows = chosen_device(device), list[Row]()
    with torch_threads(threads), quiet():
        for name in sizes:
            with tempfile.TemporaryDirectory() as folder:
                progress(f"{name}: pipelines and LoRAs")
                subject = Subject(SIZES[name], Path(folder), chosen)
                taking_part = list(_contenders(subject))
                progress(f"{name}: swapping")
                rows += _rows(name, subject, time_swaps(taking_part, rounds, chosen))
    return rows


def _quiet_diffusers() -> None:
    try:
        from diffusers.utils import logging
    except ImportError as error:
        raise HotslotError("This benchmark needs diffusers.", hint="pip install 'hotslot[diffusers]'") from error
    logging.set_verbosity_error()


class Subject:
    """A transformer's weights, two LoRAs for it as files, and what fresh pipelines compute with each."""

    def __init__(self, size: Size, folder: Path, device: torch.device) -> None:
        from diffusers import FluxTransformer2DModel

        self.device = device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = FluxTransformer2DModel(
                in_channels=4, num_layers=size.double_blocks, num_single_layers=size.single_blocks,
                attention_head_dim=16, num_attention_heads=size.heads, joint_attention_dim=16,
                pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
            )  # fmt: skip
        self._config, self._weights = model.config, model.to(torch.bfloat16).state_dict()
        self._inputs = self._draw_inputs()
        self.files = [self._save_lora(size.rank, seed, folder) for seed in (1, 2)]
        self.expected = [self.output(self.loaded(file)) for file in self.files]

    def pipeline(self) -> Any:
        """A new one, with the same weights each time."""
        from diffusers import FluxPipeline, FluxTransformer2DModel

        transformer = FluxTransformer2DModel.from_config(self._config).to(torch.bfloat16).eval()
        transformer.load_state_dict(self._weights)
        absent = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        return FluxPipeline(transformer=transformer, **dict.fromkeys(absent)).to(self.device)

    def loaded(self, file: Path) -> Any:
        """A new one that has loaded a LoRA by diffusers alone."""
        pipe = self.pipeline()
        pipe.load_lora_weights(str(file), adapter_name=ADAPTER_NAME)
        return pipe

    def output(self, pipe: Any) -> torch.Tensor:
        with torch.no_grad():
            return pipe.transformer(**self._inputs).sample

    def _draw_inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.device, torch.bfloat16)

        return {
            "hidden_states": draw(1, 4, 4),
            "encoder_hidden_states": draw(1, 4, 16),
            "pooled_projections": draw(1, 16),
            "timestep": torch.full((1,), 0.5, device=self.device, dtype=torch.bfloat16),
            "img_ids": torch.zeros(4, 3, device=self.device),
            "txt_ids": torch.zeros(4, 3, device=self.device),
        }

    def _save_lora(self, rank: int, seed: int, folder: Path) -> Path:
        """Of random values, as diffusers saves one; alphas are ranks, as they are where a file tells nothing."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, weight in self._weights.items():
            module = name.removesuffix(".weight")
            if weight.ndim == 2 and any(module.endswith(f".{target}") for target in _TARGETS):
                for part, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                    values = torch.randn(shape, generator=generator) * 0.1
                    tensors[f"{module}.lora_{part}.weight"] = values.to(torch.bfloat16)
        file = folder / f"{seed}.safetensors"
        type(self.pipeline()).save_lora_weights(folder, transformer_lora_layers=tensors, weight_name=file.name)
        return file


class Model(Twin):
    """A pipeline, compared by its transformer's outputs with a fresh one."""

    def __init__(self, subject: Subject, pipe: Any) -> None:
        self.subject, self.pipe = subject, pipe

    def error(self) -> float:
        """The largest difference in the outputs; infinite if it is not small beside what a swap changes."""
        want, other = (self.subject.expected[i].float() for i in (self.live, 1 - self.live))
        found = (self.subject.output(self.pipe).float() - want).abs().max()
        return float(found) if found < 0.1 * (want - other).abs().max() else float("inf")


class Scratch(Twin):
    """Tensors like a LoRA's, that the plain copies write."""

    def __init__(self, subject: Subject) -> None:
        self.sources = [load_file(file, device="cpu") for file in subject.files]
        self._targets = {name: torch.empty_like(t, device=subject.device) for name, t in self.sources[0].items()}

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, target in self._targets.items():
            target.copy_(tensors[name])

    def error(self) -> float:
        same = all(torch.equal(self._targets[name].cpu(), t) for name, t in self.sources[self.live].items())
        return 0.0 if same else float("inf")


def _contenders(subject: Subject) -> Iterator[Contender]:
    """The first of diffusers' and the first copy of a case are its measures."""
    files = list(map(str, subject.files))
    names = ("first", "second")
    pipe = subject.pipeline()
    swapper = hotslot.attach(pipe, adapters=dict(zip(names, files, strict=True)))
    swapper.activate(names[0])
    ours = Model(subject, pipe)

    def load_and_activate(adapter: int) -> None:
        swapper.load("cold", files[adapter])
        swapper.activate("cold")

    yield Contender(COLD, LOAD, ours, load_and_activate)
    yield Contender(WARM, ACTIVATE, ours, lambda adapter: swapper.activate(names[adapter]))

    theirs = Model(subject, subject.loaded(subject.files[0]))
    hotswap = partial(theirs.pipe.load_lora_weights, adapter_name=ADAPTER_NAME, hotswap=True)
    yield Contender(COLD, HOTSWAP, theirs, lambda adapter: hotswap(files[adapter]))
    dicts = [load_file(file) for file in files]
    yield Contender(WARM, HOTSWAP_DICT, theirs, lambda adapter: hotswap(dict(dicts[adapter])))

    both = Model(subject, subject.pipeline())
    for name, file in zip(names, files, strict=True):
        both.pipe.load_lora_weights(file, adapter_name=name)
    both.pipe.set_adapters(names[0])
    yield Contender(WARM, "diffusers set_adapters, both loaded", both, lambda i: both.pipe.set_adapters(names[i]))

    scratch = Scratch(subject)
    yield Contender(COLD, READ, scratch, lambda adapter: scratch.copy(load_file(files[adapter])))
    yield Contender(WARM, COPY, scratch, lambda adapter: scratch.copy(scratch.sources[adapter]))


def _rows(size: str, subject: Subject, times: dict[Contender, Times]) -> list[Row]:
    ms = {contender: statistics.median(taken.wall_seconds) * 1e3 for contender, taken in times.items()}

    def measure(case: str, kind: str) -> float:
        return next(ms[contender] for contender in times if contender.case == case and contender.name.startswith(kind))

    rows = [
        Row(
            size=size,
            case=contender.case,
            contender=contender.name,
            ms=ms[contender],
            min_ms=min(taken.wall_seconds) * 1e3,
            cpu_ms=statistics.median(taken.cpu_seconds) * 1e3,
            times_diffusers=measure(contender.case, "diffusers") / ms[contender],
            times_copy=ms[contender] / measure(contender.case, "plain"),
            nbytes=sum(tensor.nbytes for tensor in load_file(subject.files[0]).values()),
            error=taken.error,
        )
        for contender, taken in times.items()
    ]
    return sorted(rows, key=lambda row: (COLD, WARM).index(row.case))


def goals(rows: Sequence[Row]) -> list[Goal]:
    """As far as their rows are there; nothing is wanted of the tiny size."""
    ms = {(row.size, row.contender): row.ms for row in rows}
    return [
        Goal(f"{size}: {ours}, in times of {peer}", ms[size, ours] / ms[size, peer], most, at_most=True)
        for size in dict.fromkeys(row.size for row in rows if row.size in DEFAULT_SIZES)
        for ours, peer, most in ((ACTIVATE, COPY, 2.0), (LOAD, HOTSWAP, 0.2))
    ]


def render(rows: Sequence[Row], conditions: dict[str, Any], console: Console) -> None:
    """Print the table, the goals, and where it was made."""
    table = Table(title="Swaps of LoRAs in a diffusers pipeline", title_justify="left")
    for heading in ("case", "contender"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "min", "CPU ms", "× diffusers", "× plain\ncopy", "bytes", "outputs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (size, case), group in groupby(rows, key=lambda row: (row.size, row.case)):
        label = f"{size}: {case}"
        for row in group:
            figures = f"{row.ms:.2f}", f"{row.min_ms:.2f}", f"{row.cpu_ms:.2f}"
            ratios = f"{row.times_diffusers:.1f}", f"{row.times_copy:.2f}"
            outputs = "equal" if row.error == 0 else f"±{row.error:.0e}"
            table.add_row(label, row.contender, *figures, *ratios, f"{row.nbytes:,}", outputs)
            label = ""
        table.add_section()
    console.print(table)
    for goal in goals(rows):
        console.print(goal)
    console.print(place(conditions) + f", diffusers {conditions['versions']['diffusers']}")


def draw(rows: Sequence[Row], conditions: dict[str, Any], path: Path) -> None:
    """Write the medians as bars, one panel for each case."""
    panels = {
        f"{size}: {case}": [(row.contender, row.ms, f"{row.times_diffusers:.1f} × diffusers") for row in group]
        for (size, case), group in groupby(rows, key=lambda row: (row.size, row.case))
    }
    bars(panels, f"milliseconds, median – {place(conditions)}", path)


command = Command(
    "diffusers", run, SIZES, DEFAULT_SIZES, DEFAULT_ROUNDS, render, draw, goals, columns=160, packages=("diffusers",)
)


if __name__ == "__main__":
    command.main()
