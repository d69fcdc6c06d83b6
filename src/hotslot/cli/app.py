"""The commands and their options. Each imports what it needs when it runs."""

from __future__ import annotations

import sys
from enum import Enum
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from .bench import CASES
from .terminal import REFUSED, errors_reported, new_console, print_json

app = typer.Typer(
    name="hotslot",
    help="Changes the adapter of a running PyTorch model in place. Exit codes: 0, 1 (refused), 2 (usage).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Device(str, Enum):
    """Where a benchmark's model lives."""

    cpu = "cpu"
    cuda = "cuda"


_TOP_INTERVAL_SECONDS = 2.0

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, TextIOWrapper):  # where it speaks no Unicode, an arrow is "\\u2192", and no traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hotslot {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A folder, a Hub id, or a file.", show_default=False)
    ],
    subfolder: Annotated[str | None, typer.Option(help="Folder inside of it.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Show an adapter: method, rank, targets, dtype, bytes, digest, and what is unusual about it.

    Of a LoRA for diffusers, in a file or the folder of save_lora_weights: who writes such files, and for which
    components it is. Of a packed file of a Cache: what it was made of, and whether it is sound and still in use.
    """
    from .inspect import Inspection, inspect_adapter, is_of_peft, show_inspection
    from .inspect_file import FileInspection, inspect_file, lora_file, show_file
    from .inspect_packed import PackedInspection, inspect_packed, is_packed_file, show_packed

    found: Inspection | FileInspection | PackedInspection
    with errors_reported(as_json=as_json):
        file = lora_file(Path(adapter, subfolder or ""))
        if file is None:
            found = inspect_adapter(adapter, subfolder=subfolder, revision=revision)
        elif is_packed_file(file):
            found = inspect_packed(file)
        elif is_of_peft(file):
            found = inspect_adapter(file.parent)
        else:
            found = inspect_file(file)
    if as_json:
        print_json(found)
    elif isinstance(found, PackedInspection):
        show_packed(new_console(), found)
    elif isinstance(found, FileInspection):
        show_file(new_console(), found)
    else:
        show_inspection(new_console(), found)
    if not found.supported:
        raise typer.Exit(REFUSED)


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a transformers model, or a pipeline.")
    ],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="Folders, Hub ids; or LoRA files.", show_default=False),
    ],
    model_class: Annotated[
        str | None,
        typer.Option(help="Class that you load it with; else as its config says.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether each adapter would fit on a model, by what route, with how many bytes; else why not.

    Only the model's configs are read, not its weights.
    """
    from .check import check_adapters, show_check

    with errors_reported(as_json=as_json):
        found = check_adapters(model, adapters, model_class=model_class)
    if as_json:
        print_json(found)
    else:
        show_check(new_console(), found)
    if not all(verdict.fits for verdict in found.adapters):
        raise typer.Exit(REFUSED)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder, instead of SmolLM2-135M-Instruct.", show_default=False)
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Folder or Hub id, instead of the demo's own. Repeatable.", show_default=False),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="What to ask, instead of the demo's own. Repeatable.", show_default=False),
    ] = None,
    backend: Annotated[str, typer.Option(help="Of torch.compile.")] = "inductor",
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each swap that is timed.")] = 9,
    methods: Annotated[
        bool, typer.Option("--methods", help="One task's adapters in seven methods, merged; and who answers right.")
    ] = False,
    ask_all: Annotated[bool, typer.Option("--all", help="With --methods: ask all questions, not half.")] = False,
    images: Annotated[
        bool, typer.Option("--images", help="Style LoRAs in a diffusion model that paints emoji; --prompt is a name.")
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="With --images: where to write the pictures.", show_default="hotslot-images.png")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Swap real adapters in a real compiled model, and show answers, or pictures, and times."""
    from .demo import DemoResult, ImagesResult, MethodsResult, run_demo, run_images, run_methods

    if methods and images:
        raise typer.BadParameter("--methods and --images are two demos.")
    if methods and (adapters or prompts):
        raise typer.BadParameter("--methods has adapters and questions of its own: leave out --adapter and --prompt.")
    if images and (model or adapters):
        raise typer.BadParameter("--images has a model and adapters of its own: leave out --model and --adapter.")
    if ask_all and not methods:
        raise typer.BadParameter("--all goes with --methods.")
    if sheet and not images:
        raise typer.BadParameter("--sheet goes with --images.")
    result: DemoResult | ImagesResult | MethodsResult
    with errors_reported(as_json=as_json):
        if images:
            result = run_images(
                prompts, sheet=sheet or Path("hotslot-images.png"), backend=backend, rounds=rounds, as_json=as_json
            )
        elif methods:
            result = run_methods(model, ask_all=ask_all, backend=backend, as_json=as_json)
        else:
            result = run_demo(model, adapters, prompts=prompts, backend=backend, rounds=rounds, as_json=as_json)
    if not result.ok:
        raise typer.Exit(REFUSED)


def _known_case(case: str) -> str:
    if case not in CASES:
        raise typer.BadParameter(f"{case!r} is no benchmark; there is {', '.join(CASES)}.")
    return case


@app.command()
def bench(
    case: Annotated[
        str, typer.Argument(metavar="CASE", callback=_known_case, help=f"What to time: {', '.join(CASES)}.")
    ] = "swap",
    plot: Annotated[Path | None, typer.Option(help="Image file to draw the table into.", show_default=False)] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--size", help="Adapter size, such as 9MB or 84MB. Repeatable.", show_default=False),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed repetitions.", show_default=False)] = None,
    device: Annotated[Device | None, typer.Option(help="By default a GPU if there is one.", show_default=False)] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, on the CPU.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Time swaps beside PEFT and a plain copy of the same bytes. Needs a checkout of the repository."""
    from .bench import run_bench

    with errors_reported(as_json=as_json):
        run_bench(
            case,
            as_json=as_json,
            plot=plot,
            sizes=sizes,
            rounds=rounds,
            device=device.value if device is not None else None,
            threads=threads,
        )


def _metrics_url(address: str) -> str:
    from .top import metrics_url

    try:
        return metrics_url(address)
    except ValueError as error:
        raise typer.BadParameter(f"{address!r}: {error}.") from None


def _sound_interval(seconds: float | None) -> float | None:
    if seconds is not None and not 0.1 <= seconds <= 3600:  # written so that NaN is refused
        raise typer.BadParameter(f"{seconds:g} is not from 0.1 to 3600.")
    return seconds


@app.command()
def top(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", callback=_metrics_url, help="Of the service's metrics; or HOST:PORT, or PORT."),
    ] = "http://localhost:8000/metrics",
    interval: Annotated[
        float | None,
        typer.Option(
            callback=_sound_interval, help="Seconds between two readings.", show_default=f"{_TOP_INTERVAL_SECONDS:g}"
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="One reading: what happened since attach.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a running service: swaps per second, GB/s, latency and tiers of each of its swappers, until ctrl-C.

    The service exposes hotslot.integrations.prometheus.Collector(swapper) by prometheus_client.
    """
    from .top import run_top

    if once and interval is not None:
        raise typer.BadParameter("--once reads once: leave out --interval.")
    with errors_reported(as_json=as_json):
        run_top(url, interval_seconds=None if once else interval or _TOP_INTERVAL_SECONDS, as_json=as_json)
