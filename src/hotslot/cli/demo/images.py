"""The demo of pictures from beginning to end: style LoRAs swapped in a compiled diffusers pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ...cache import user_folder
from ...errors import HotslotError
from ..terminal import print_json
from . import adapters as casting
from . import show
from .conditions import backend_name, compiled, compiled_graphs, few_threads, kept_code, timed
from .result import ImagesResult, RowResult

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ... import Swapper
    from .twins import Twin

STYLES = ("neon", "cyanotype", "gameboy")
# Adapter → weight; a blend stands below what it is made of, and a style fades from the row of its full strength.
ROWS: tuple[dict[str, float], ...] = (
    {},
    {"neon": 1.0},
    {"cyanotype": 1.0},
    {"neon": 0.6, "cyanotype": 0.6},
    {"gameboy": 1.0},
    {"gameboy": 0.6},
    {"gameboy": 0.3},
)
PROMPTS = ("mage", "alien monster", "butterfly", "evergreen tree", "avocado", "red heart")
STEPS = 4  # of DDIM. Those of 20 steps look the same
_SEED = 0  # of the first column's noise; the next one's is one more


def run_images(
    prompts: Sequence[str] | None = None,
    *,
    folder: Path | None = None,
    sheet: Path,
    as_json: bool = False,
    backend: Any = "inductor",
    rounds: int = 9,
    steps: int = STEPS,
    console: Console | None = None,
) -> ImagesResult:
    """Run the demo, write the contact sheet and print the table.

    Args:
        prompts: names that the model knows, a column each; None for the demo's own.
        folder: of the pipeline, with the styles' LoRA files; None for the repository's.
        sheet: the PNG file to write.
        as_json: print one JSON document instead of text. Progress goes to standard error.
        backend: of torch.compile.
        rounds: repetitions of each swap that is timed; the table shows medians.
        steps: of the denoising.
        console: to print the text on, instead of standard output.

    Raises:
        HotslotError: diffusers, the model or the compiler is not there, a name is not known, or the sheet cannot be
            written.
    """
    started = time.perf_counter()
    folder = folder or casting.own_index("image/model_index.json").parent
    _refuse_unwritable(sheet)
    with show.Stages() as stages, kept_code():
        demo = _Demo(folder, tuple(prompts or PROMPTS), backend, steps, stages)
        with few_threads():
            result = demo.run(rounds)
        demo.draw(sheet)
    result.seconds = time.perf_counter() - started
    if as_json:
        print_json(result.as_dict())
    else:
        console = console or show.new_console()
        show.images_table(console, result)
        show.images_summary(console, result, str(user_folder()))
    return result


class _Demo:
    """One run; each method is a stage or a few, in the order of `run`."""

    def __init__(self, folder: Path, prompts: tuple[str, ...], backend: Any, steps: int, stages: show.Stages) -> None:
        self.folder, self.backend, self.stages = folder, backend, stages
        self.files = {style: folder / f"{style}.safetensors" for style in STYLES}
        self.pictures: list[Tensor] = []
        with stages.stage("importing torch and diffusers"):
            versions = _import_diffusers()
        self.result = ImagesResult(backend_name(backend), steps, list(prompts), *versions)

    def run(self, rounds: int) -> ImagesResult:
        import torch

        self.result.threads = torch.get_num_threads()
        self._attach()
        self._compile()
        self._paint()
        self._compare()
        self._time(rounds)
        self._paint_base_again()
        return self.result

    def draw(self, path: Path) -> None:
        """Write the contact sheet."""
        from .sheet import SheetRow, contact_sheet

        result = self.result
        rows = [
            SheetRow(
                [("+ " if i else "") + part for i, part in enumerate(row.parts)],
                f"swap {row.seconds * 1e3:.1f} ms",
                self.pipe.numpy_to_pil(pictures.permute(0, 2, 3, 1).numpy()),
            )
            for row, pictures in zip(result.rows, self.pictures, strict=True)
        ]
        contact_sheet(result.prompts, rows, result.caption).save(path, optimize=True)
        result.sheet = str(path)

    def _attach(self) -> None:
        import hotslot

        from . import emoji

        with self.stages.stage("loading the pipeline"), timed() as seconds:
            self.embeddings = emoji.embed(self.result.prompts, self.folder)
            self.pipe = emoji.load(self.folder)
        self.result.load_seconds = seconds()
        with self.stages.stage(f"attaching {len(self.files)} LoRAs"), timed() as seconds:
            plan = hotslot.plan(self.pipe, self.files)  # with room for a blend of two
            self.swapper: Swapper = hotslot.attach(self.pipe, adapters=self.files, plan=plan)
        self.result.attach_seconds = seconds()

    def _compile(self) -> None:
        before = compiled_graphs()
        with (
            self.stages.stage("compiling the unet (minutes the first time, less later)"),
            timed() as seconds,
        ):
            self.eager_unet = self.pipe.unet
            self.pipe.unet = compiled(self.pipe.unet, self.backend)
            self.first_step = self._run(steps=1)
        self.result.compile_seconds = seconds()
        self.result.graphs = compiled_graphs() - before

    def _paint(self) -> None:
        """A row of pictures for each combination, with a swap before it."""
        with self.stages.stage("painting, with a swap before each row", len(ROWS)) as step:
            for weights in ROWS:
                row = RowResult(weights)
                self.result.rows.append(row)
                self._swap_to(weights)
                before = compiled_graphs()
                self.pictures.append(self._run(steps=self.result.steps))
                row.recompilations = compiled_graphs() - before
                step(None)

    def _compare(self) -> None:
        """One picture of each row with that of a fresh pipeline, which has loaded the LoRAs by diffusers alone."""
        from .twins import Loaded

        with self.stages.stage("painting the same with fresh pipelines, without hotslot", len(ROWS)) as step:
            for i, (row, pictures) in enumerate(zip(self.result.rows, self.pictures, strict=True)):
                fresh = Loaded(self.folder, {style: self.files[style] for style in row.weights})
                if row.weights:
                    fresh.swap_to(row.weights)
                column = i % len(self.result.prompts)
                expected = self._run(fresh.pipe, steps=self.result.steps, columns=slice(column, column + 1))
                row.levels_off = 255 * float((pictures[column] - expected[0]).abs().max())
                step(None)

    def _time(self, rounds: int) -> None:
        from .twins import Hotswapped, Loaded

        with self.stages.stage("timing swaps, and diffusers' own", len(ROWS)) as step:
            loaded = Loaded(self.folder, self.files)
            for row in self.result.rows:
                before, style = self._before(row), row.style
                twin: Twin = loaded
                if style is not None:
                    self._swap_to(row.weights)
                    twin = Hotswapped(self.folder, self.files[next(iter(before))], self.files[style])
                    twin.refuse_other_pictures(self.eager_unet, self.embeddings)
                self._time_row(row, before, twin, rounds)
                step(None)

    def _time_row(self, row: RowResult, before: Mapping[str, float], twin: Twin, rounds: int) -> None:
        ours: list[float] = []
        from_file: list[float] = []
        theirs: list[float] = []
        for _ in range(rounds):
            self._swap_to(before)
            ours.append(_seconds(lambda: self._swap_to(row.weights)))
            if row.style is not None:
                self._swap_to(before)
                from_file.append(_seconds(partial(self._load_and_swap_to, row.style)))
            if twin.refusal is None:
                twin.swap_to(before)
                theirs.append(_seconds(lambda: twin.swap_to(row.weights)))
        self._swap_to(before)
        row.nbytes = self._swap_to(row.weights)
        row.seconds = median(ours)
        row.file_seconds = median(from_file) if from_file else None
        row.diffusers_call, row.diffusers_refusal = twin.call, twin.refusal
        row.diffusers_seconds = median(theirs) if theirs else None

    def _paint_base_again(self) -> None:
        import torch

        with self.stages.stage("painting with the base again"):
            self._swap_to({})
            before = compiled_graphs()
            again = self._run(steps=1)
        self.result.rows[0].recompilations += compiled_graphs() - before
        self.result.base_restored = torch.equal(again, self.first_step)

    def _before(self, row: RowResult) -> Mapping[str, float]:
        """What a row is swapped in from: the row above; a style alone from the style alone before it."""
        rows = [other for other in self.result.rows if row.style is None or other.style is not None]
        return rows[rows.index(row) - 1].weights

    def _swap_to(self, weights: Mapping[str, float]) -> int:
        """Bytes that were brought in."""
        self.result.swaps += 1
        return (self.swapper.activate(weights) if weights else self.swapper.deactivate()).nbytes

    def _load_and_swap_to(self, style: str) -> None:
        self.swapper.load(style, self.files[style])
        self.swapper.activate(style)
        self.result.swaps += 1

    def _run(self, pipe: Any = None, *, steps: int, columns: slice = slice(None)) -> Tensor:
        """[N, 3, 32, 32] from 0 to 1, of these columns, by the demo's own pipeline or another."""
        import torch

        embeddings = self.embeddings[columns]
        seeds = range(_SEED, _SEED + len(self.embeddings))[columns]
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        pictures: Tensor = (pipe or self.pipe)(
            embeddings, generator=noise, num_inference_steps=steps, output_type="pt"
        ).images
        return pictures


def _import_diffusers() -> tuple[str, str]:
    """Versions of torch and diffusers; quiet from here on, for the demo has a progress bar of its own."""
    import torch

    try:
        import diffusers

        from . import emoji  # noqa: F401  imports what is slow
    except ImportError as error:
        raise HotslotError(
            "The pictures need diffusers.", found=error, hint="pip install 'hotslot[diffusers]'"
        ) from error
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return str(torch.__version__), str(diffusers.__version__)


def _refuse_unwritable(sheet: Path) -> None:
    """Before a minute of work, not after it."""
    if sheet.suffix.lower() != ".png" or not sheet.absolute().parent.is_dir():
        raise HotslotError(
            "The contact sheet cannot be written there.", where=sheet, expected="a .png file in a folder that is there"
        )


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
