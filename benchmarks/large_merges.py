"""`bench_merged` where the weights are as many as a GPU holds: one model, made on the device, and LoRA alone.

The contenders come one after the other, so that each has the memory that it needs: hotslot the base's own values beside
the weights, PEFT nothing but them. Their order cannot favour one: nothing else runs on the device.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import nn

import hotslot
from hotslot import HotslotError

from .bench_merged import (
    ADDMM,
    BASE,
    BRANCH,
    COPY,
    HOTSLOT,
    LORA,
    MERGED,
    PEFT,
    TARGETS,
    Row,
    row_of,
    time_all,
    weights,
)
from .llama import Llama, llama_of_own_weights

RANK, ALPHA, HEADS, DTYPE = 16, 32, 32, torch.bfloat16
ADAPTERS = {LORA: DTYPE, f"{LORA}, in float32": torch.float32}  # as they are saved: PEFT trains them in float32
COMPILED_LAYERS = 4  # of the forward passes
TOKENS = (1, 512)
_SAMPLE = 7  # weights that are compared with a merge in 64 bits: those of the first layer


def run(
    size: str,
    hidden: int,
    layers: int,
    *,
    rounds: int,
    device: torch.device,
    tokens: tuple[int, ...] = TOKENS,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time swaps, and forward passes of so many tokens.

    Raises:
        HotslotError: hotslot's weights depend on what was live before, or are farther from the exact ones than PEFT's.
    """
    progress(f"{size}: making the model")
    model = llama_of_own_weights(hidden, layers, HEADS, device=device, dtype=DTYPE)
    with tempfile.TemporaryDirectory() as folder:
        sources = {job: _save_loras(model, Path(folder, job), dtype) for job, dtype in ADAPTERS.items()}
        samples = {job: Sample(model, pair[0]) for job, pair in sources.items()}
        times: dict[tuple[str, str], list[Any]] = {}
        errors: dict[tuple[str, str], float] = {}

        progress(f"{size}: hotslot")
        swapper = hotslot.attach(model, {str(path): path for pair in sources.values() for path in pair}, route="merged")
        for job, pair in sources.items():
            names = list(map(str, pair))
            swapper.activate(names[0])
            errors[job, HOTSLOT], first = samples[job].error(model), bits(model)
            times[job, HOTSLOT] = _swaps(swapper.activate, names, rounds, device)
            swapper.activate(names[0])
            if bits(model) != first:
                raise HotslotError("The weights after many swaps are not those after the first.", where=job)
        forwards, outputs = _forwards(model, swapper, str(sources[LORA][0]), rounds, device, tokens, progress)
        swapper.detach()
        del swapper

        progress(f"{size}: addmm and copy")
        for name, swap in _plain(model, sources[LORA]):
            times[LORA, name] = _swaps(swap, [0, 1], rounds, device)
            swap(0)
            errors[LORA, name] = samples[LORA].error(model)

        progress(f"{size}: PEFT")
        own_dtype = {"autocast_adapter_dtype": False}
        peft: Any = PeftModel.from_pretrained(model, str(sources[LORA][0]), "0", **own_dtype).eval()
        peft.load_adapter(str(sources[LORA][1]), "1", **own_dtype)
        for count, call in _calls(peft.base_model.model, device, tokens).items():
            _compare(call(), outputs[count])
            forwards[count, BRANCH] = _time_compiled(call, rounds, device)
        peft.merge_adapter(["0"])
        errors[LORA, PEFT] = samples[LORA].error(peft.base_model.model)
        times[LORA, PEFT] = _swaps(partial(_unmerge_and_merge, peft), ["0", "1"], rounds, device)
    if errors[LORA, HOTSLOT] > 1.01 * errors[LORA, PEFT]:
        raise HotslotError(
            "The weights are farther from those of a merge in 64 bits than PEFT's.", found=errors, where=size
        )
    return _rows(size, model, times, errors, forwards)


def _unmerge_and_merge(peft: Any, name: str) -> None:
    peft.unmerge_adapter()
    peft.merge_adapter([name])


def _swaps(swap: Callable[[Any], object], names: list[Any], rounds: int, device: torch.device) -> list[Any]:
    """(wall, CPU) seconds of swaps to one and to the other by turns."""
    for name in names:
        swap(name)
    live = [len(names) - 1]

    def to_the_other() -> None:
        live[0] = 1 - live[0]
        swap(names[live[0]])

    times: list[Any] = time_all({"": to_the_other}, rounds, device)[""]
    return times


def _plain(model: nn.Module, folders: list[Path]) -> Iterator[tuple[str, Callable[[int], None]]]:
    """What torch alone does with the same weights, which are as they were in the end."""
    targets = weights(model)
    own = {name: weight.clone() for name, weight in targets.items()}
    factors = [_factors(folder, next(iter(own.values())).device) for folder in folders]

    def addmm(adapter: int) -> None:
        for name, target in targets.items():
            down, up = factors[adapter][name]
            torch.addmm(own[name], up, down, alpha=ALPHA / RANK, out=target)

    def copy(adapter: int) -> None:
        for target, source in zip(targets.values(), own.values(), strict=True):
            target.copy_(source)

    yield ADDMM, addmm
    yield COPY, copy


def _factors(folder: Path, device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of a linear → A and B."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors", device=str(device))
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    return {
        name: (
            tensors[f"base_model.model.{name}.lora_A.weight"],
            tensors[f"base_model.model.{name}.lora_B.weight"],
        )
        for name in names
    }


def _save_loras(model: nn.Module, folder: Path, dtype: torch.dtype) -> list[Path]:
    """Two, as PEFT would save them; it needs the model for it."""
    folders = [folder / str(seed) for seed in range(2)]
    for seed, path in enumerate(folders):
        path.mkdir(parents=True)
        tensors, generator = {}, torch.Generator().manual_seed(seed)
        for name, weight in weights(model).items():
            for part, shape in (("A", (RANK, weight.shape[1])), ("B", (weight.shape[0], RANK))):
                values = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
        save_file(tensors, path / "adapter_model.safetensors")
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)).save_pretrained(str(path))
    return folders


def bits(model: nn.Module) -> list[int]:
    """Sums of the weights' bits."""
    return [int(weight.view(torch.int16).sum(dtype=torch.int64)) for weight in weights(model).values()]


class Sample:
    """A few of the weights, and what a merge of the adapter in 64 bits makes of them."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        own = dict(list(weights(model).items())[:_SAMPLE])
        factors = _factors(folder, next(iter(own.values())).device)
        deltas = {name: ALPHA / RANK * factors[name][1].double() @ factors[name][0].double() for name in own}
        self._own = {name: weight.double() for name, weight in own.items()}
        self._exact = {name: self._own[name] + delta for name, delta in deltas.items()}

    def error(self, model: nn.Module) -> float:
        """Distance of the model's weights from the exact ones, relative to what the adapter changes."""
        found = list(weights(model).values())[:_SAMPLE]
        pairs = list(zip(found, self._exact.values(), self._own.values(), strict=True))
        lost = sum(float((weight.double() - exact).square().sum()) for weight, exact, _ in pairs)
        return float((lost / sum(float((exact - own).square().sum()) for _, exact, own in pairs)) ** 0.5)


def _calls(model: Any, device: torch.device, tokens: tuple[int, ...]) -> dict[int, Callable[[], torch.Tensor]]:
    """Number of tokens → a compiled forward pass of so many through the first layers."""
    if not tokens:
        return {}
    first = Llama({}, 0, HEADS)
    first.layers = nn.ModuleList(list(model.layers)[:COMPILED_LAYERS])
    torch._dynamo.reset()  # it compiles one function so many times, and no more
    compiled = torch.compile(first.eval(), dynamic=False, fullgraph=True, mode="reduce-overhead")
    hidden = next(iter(weights(model).values())).shape[1]
    generator = torch.Generator(device).manual_seed(0)
    inputs = {count: torch.randn(count, hidden, generator=generator, device=device).to(DTYPE) for count in tokens}

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return compiled(x).clone()  # the next call writes over it

    return {count: partial(call, x) for count, x in inputs.items()}


def _forwards(
    model: nn.Module,
    swapper: hotslot.Swapper,
    name: str,
    rounds: int,
    device: torch.device,
    tokens: tuple[int, ...],
    progress: Callable[[str], None],
) -> tuple[dict[tuple[int, str], list[Any]], dict[int, torch.Tensor]]:
    """Times of the base, and of the same compiled code with an adapter merged; what that computes."""
    times: dict[tuple[int, str], list[Any]] = {}
    outputs = {}
    for count, call in _calls(model, device, tokens).items():
        progress(f"forward passes of {count} tokens")
        for _ in range(3):
            swapper.deactivate()
            times.setdefault((count, BASE), []).extend(_time_compiled(call, rounds, device))
            swapper.activate(name)
            times.setdefault((count, MERGED), []).extend(_time_compiled(call, rounds, device))
        outputs[count] = call()
    return times, outputs


def _time_compiled(call: Callable[[], Any], rounds: int, device: torch.device) -> list[Any]:
    for _ in range(5):
        call()
    times: list[Any] = time_all({"": call}, 5 * rounds, device)[""]
    return times


def _compare(branch: torch.Tensor, merged: torch.Tensor) -> None:
    difference = float((merged.double() - branch.double()).abs().max() / branch.abs().max())
    if not difference <= 0.1:
        raise HotslotError("The merged model computes something else than PEFT's branch.", found=difference)


def _rows(
    size: str,
    model: nn.Module,
    times: Mapping[tuple[str, str], list[Any]],
    errors: Mapping[tuple[str, str], float],
    forwards: Mapping[tuple[int, str], list[Any]],
) -> list[Row]:
    def median(taken: list[Any]) -> float:
        return statistics.median(wall for wall, _ in taken)

    nbytes, copied = sum(weight.nbytes for weight in weights(model).values()), median(times[LORA, COPY])
    rows = [
        row_of((size, "bf16", job), contender, times[job, contender], copied, nbytes, errors[job, contender])
        for job, contender in sorted(times, key=lambda key: (key[0], key[1] == COPY))
    ]
    for count, contender in sorted(forwards, key=lambda key: key[0]):
        job = f"forward pass, {count} token{'s' * (count > 1)}, {COMPILED_LAYERS} layers, compiled"
        taken, base = forwards[count, contender], median(forwards[count, BASE])
        rows.append(row_of((size, "bf16", job), contender, taken, base, nbytes, 0.0))
    return rows
