"""Does anything grow? A hundred thousand swaps of one model: memory, objects, file handles and the time of a swap.

    scripts/bench soak [--rounds 100000] [--json]        or    python -m benchmarks.soak

Swaps by all the ways that there are: `activate`, `using`, `rollback`, a drop-in call, `load` and `unload`, a guarded
forward pass between them. Ends with exit code 1 if after the last tenth there is more than after the fifth, beyond
noise (until then caches and the allocator fill), or if a swap takes longer than in the second.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

import hotslot
from hotslot import HotslotError

from .command import command_line
from .llama import quiet
from .report import describe
from .running import only_own_garbage

DEFAULT_ROUNDS = 100_000
LAYERS, WIDTH, RANK = 4, 16, 4
_EVERY = 50  # so many plain swaps for one of each other kind

# How much is noise.
RESIDENT_KIB = 1024
OBJECTS = 200
TIME_FACTOR = 1.25


@dataclass(frozen=True, slots=True)
class Tenth:
    """After a tenth of the swaps.

    Attributes:
        swaps: so far.
        resident_kib: of the process's memory.
        objects: that Python's garbage collector follows.
        handles: open files.
        swap_us: time of an `activate`, of which a tenth were faster; a median would tell of the machine's load.
    """

    swaps: int
    resident_kib: int
    objects: int
    handles: int
    swap_us: float


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=8, target_modules=r"layers\.\d+")


def _adapter(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.layers.{i}.lora_{half}.weight": torch.randn(shape, generator=generator)
        for i in range(LAYERS)
        for half, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
    }


@only_own_garbage()
def soak(
    swaps: int,
    *,
    leak: Callable[[], object] = lambda: None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Tenth]:
    """Swap so many times. `leak` is called at each, for a test to let something grow."""
    model = get_peft_model(Tower(), _config()).eval()
    swapper = hotslot.attach(model)
    for i, name in enumerate("ab"):
        swapper.load(name, _adapter(i), config=_config())
    swapper.guard()
    x, other, config = torch.ones(1, WIDTH), _adapter(2), _config()
    in_model = {key.replace(".weight", ".default.weight"): tensor for key, tensor in other.items()}

    def other_ways() -> int:
        with swapper.using("a"), swapper.using(None), swapper.lease(), torch.no_grad():
            model(x)
        swapper.load("c", other, config=config)
        swapper.activate("c")
        swapper.rollback()
        swapper.unload("c")
        hotslot.hotswap_adapter_from_state_dict(model, in_model, "default", config)
        return 7

    tenths, done, times = [], 0, []
    while done < swaps:
        for i in range(_EVERY):
            started = time.perf_counter()
            swapper.activate("ab"[i % 2])
            times.append(time.perf_counter() - started)
            leak()
        done += _EVERY + other_ways()
        if done >= swaps * (len(tenths) + 1) / 10:
            tenths.append(_look(done, statistics.quantiles(times, n=10)[0] * 1e6))
            times.clear()
            progress(str(tenths[-1]))
    return tenths


def _look(swaps: int, swap_us: float) -> Tenth:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident_kib = pages * os.sysconf("SC_PAGE_SIZE") // 1024
    return Tenth(swaps, resident_kib, len(gc.get_objects()), len(os.listdir("/proc/self/fd")), swap_us)


def growth(tenths: Sequence[Tenth]) -> list[str]:
    """What has grown, in words."""
    middle, last = tenths[4], tenths[-1]
    kib, objects, handles = (getattr(last, of) - getattr(middle, of) for of in ("resident_kib", "objects", "handles"))
    slower = last.swap_us / tenths[1].swap_us
    found = {
        f"memory grew by {kib} KiB": kib > RESIDENT_KIB,
        f"{objects} objects more": objects > OBJECTS,
        f"{handles} file handles more": handles > 0,
        f"a swap takes {slower:.2f} times as long": slower > TIME_FACTOR,
    }
    return [text for text, grown in found.items() if grown]


def command(
    *,
    rounds: int = DEFAULT_ROUNDS,
    as_json: bool = False,
    sizes: Sequence[str] | None = None,
    device: str | None = None,
    threads: int = 1,
    plot: Path | None = None,
) -> None:
    """Run, and print the table or the JSON document on stdout.

    Raises:
        HotslotError: something grew; or an option was given that has no meaning here.
    """
    if plot is not None or sizes or device not in (None, "cpu"):
        raise HotslotError("The soak has one size and no plot, and runs on the CPU.", expected="--rounds, --json")
    conditions = describe("cpu", rounds=rounds) | {"benchmark": "soak"}
    console = Console(stderr=True)
    with console.status("") as status, quiet():
        tenths = soak(rounds, progress=status.update)
    if as_json:
        print(json.dumps(conditions | {"rows": list(map(asdict, tenths)), "grown": growth(tenths)}, indent=1))
    else:
        table = Table(title="A soak of swaps", title_justify="left")
        for heading in ("swaps", "memory KiB", "objects", "file handles", "µs a swap"):
            table.add_column(heading, justify="right")
        for row in tenths:
            table.add_row(
                str(row.swaps), str(row.resident_kib), str(row.objects), str(row.handles), f"{row.swap_us:.0f}"
            )
        Console(width=100).print(table)
    grown = growth(tenths)
    if grown:
        raise HotslotError("Something grows with the number of swaps.", found="; ".join(grown), expected="nothing")


if __name__ == "__main__":
    try:
        command(**vars(command_line(command, DEFAULT_ROUNDS).parse_args()))
    except HotslotError as error:
        sys.exit(str(error))
