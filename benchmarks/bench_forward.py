"""Times what a LoRA beside the linear layers costs a forward pass, computed in several ways, beside the base model.

    scripts/bench forward [--json]        or    python -m benchmarks.bench_forward

A decode step of one token and a prefill, of layers with Llama's linears, norms, rotary positions and a static KV cache.
All contenders have the same weights and the same adapter. They run by turns, in an order drawn anew for each round; a
ratio is of medians over the rounds. What they compute is compared with PEFT's layers in eager mode, in float32 on a
small model and in the timed model's own dtype.

On a GPU each is compiled, one layer for all, and its step captured as one CUDA graph ("graph"), as
`torch.compile(mode="reduce-overhead")` of the whole model does; a few are compiled just so, too.
"""

from __future__ import annotations

import math
import os
import statistics
import time
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from hotslot import HotslotError

from .command import Command
from .forward_designs import DESIGNS, NEED_TRITON, Group
from .llama import ADAPTER_NAME, Size, linear_of, quiet, shapes
from .running import by_turns, chosen_device, refuse_unknown, timed, torch_threads

SIZES = {
    size.name: size
    for size in (
        Size("tiny", hidden=64, layers=2, rank=4, dtype=torch.float32, heads=8),
        Size("small", hidden=512, layers=2, rank=16, dtype=torch.float32, heads=8),
        Size("8B", hidden=4096, layers=16, rank=16, dtype=torch.bfloat16, heads=32),
    )
}
DEFAULT_ROUNDS = 30
BASE, PEFT = "base", "PEFT's branch"
WHOLE = (BASE, PEFT, "f, pointwise B for one token")  # compiled as whole models, too
_CHECKED = {"8B": "small"}  # whose float32 twin is a smaller one
_PROMPT, _CACHE = 512, 576  # tokens
_ALPHA = 24  # 1.5 at rank 16: no power of two
_REPEATS = 3  # of a step, between two looks at the clock
_GROUPS = {
    "attention_in": ("q_proj", "k_proj", "v_proj"),
    "attention_out": ("o_proj",),
    "mlp_in": ("gate_proj", "up_proj"),
    "mlp_out": ("down_proj",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One contender's forward pass.

    Attributes:
        error: distance of its outputs to those of PEFT's layers in eager mode, as a part of what the adapter changes.
    """

    size: str
    mode: str
    tokens: int
    contender: str
    ms: float
    min_ms: float
    times_base: float
    error: float


class Layer(nn.Module):
    """A decoder layer with a cache of its own."""

    def __init__(self, weights: dict[str, nn.Parameter], size: Size, device: torch.device) -> None:
        super().__init__()
        self.heads, self.width = size.heads, size.hidden // size.heads
        for name, members in _GROUPS.items():
            self.add_module(name, Group(**{member: linear_of(weights[member]) for member in members}))
        self.first_norm = nn.RMSNorm(size.hidden, eps=1e-5, dtype=size.dtype, device=device)
        self.second_norm = nn.RMSNorm(size.hidden, eps=1e-5, dtype=size.dtype, device=device)
        cache = torch.zeros(1, _CACHE, size.heads // 4, self.width, dtype=size.dtype, device=device)
        self.register_buffer("keys", cache)
        self.register_buffer("values", cache.clone())
        angles = torch.arange(_CACHE)[:, None] / 5e5 ** (torch.arange(0, self.width, 2) / self.width)
        self.register_buffer("cos", angles.cos().repeat(1, 2).to(device, size.dtype))
        self.register_buffer("sin", angles.sin().repeat(1, 2).to(device, size.dtype))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """x [1, T, H], position [T]."""
        (attended,) = self.attention_out(self._attend(*self.attention_in(self.first_norm(x)), position))
        x = x + attended
        gate, up = self.mlp_in(self.second_norm(x))
        (out,) = self.mlp_out(F.silu(gate) * up)
        return x + out

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.width)) for t in (q, k, v))
        q, k = self._rotated(q, position), self._rotated(k, position)
        self.keys.index_copy_(1, position, k)
        self.values.index_copy_(1, position, v)
        if position.shape[0] > 1:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(-2)
        q = q[0, 0].unflatten(0, (-1, 4))
        scores = (q @ self.keys[0].permute(1, 2, 0)).float() / self.width**0.5
        seen = torch.arange(_CACHE, device=q.device) <= position
        weights = torch.where(seen, scores, -math.inf).softmax(-1).to(q.dtype)
        return (weights @ self.values[0].transpose(0, 1)).view(1, 1, -1)

    def _rotated(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]
        return x * cos + torch.cat((-second, first), -1) * sin


class Llama(nn.Module):
    """The layers alone: embeddings carry no adapter."""

    def __init__(self, weights: Sequence[dict[str, nn.Parameter]], size: Size, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(own, size, device) for own in weights)

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, position)
        return x


class Bench:
    """The contenders of one size on one device: models that share their base weights."""

    def __init__(self, size: Size, device: torch.device, designs: Sequence[str]) -> None:
        self.size, self.device = size, device
        torch.manual_seed(0)
        weights = [
            {
                name: nn.Parameter(torch.randn(shape, device=device, dtype=size.dtype) / shape[1] ** 0.5, False)
                for name, shape in shapes(size.hidden).items()
            }
            for _ in range(size.layers)
        ]

        def fresh() -> Llama:
            return Llama(weights, size, device).eval()

        config = LoraConfig(r=size.rank, lora_alpha=_ALPHA, target_modules=list(weights[0]))
        peft_model = get_peft_model(fresh(), config, ADAPTER_NAME, autocast_adapter_dtype=False).eval()
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False).copy_(torch.randn_like(parameter) * 0.02)
        adapted: Any = peft_model.get_base_model()
        self.models: dict[str, Any] = {BASE: fresh(), PEFT: adapted}
        for name in designs:
            self.models[name] = fresh()
            for layer, source in zip(self.models[name].layers, adapted.layers, strict=True):
                for group in _GROUPS:
                    members = list(getattr(source, group).children())
                    setattr(layer, group, DESIGNS[name](members, ADAPTER_NAME).eval())

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states, and their positions: a prompt, or what follows it."""
        torch.manual_seed(tokens)
        x = torch.randn(1, tokens, self.size.hidden, device=self.device, dtype=self.size.dtype)
        first = 0 if tokens > 1 else _PROMPT
        return x, torch.arange(first, first + tokens, device=self.device)

    def fill_caches(self) -> None:
        """Let all contenders have seen the same prompt."""
        torch.manual_seed(1)
        keys, values = (torch.randn_like(self.models[BASE].layers[0].keys) for _ in range(2))
        for model in self.models.values():
            for layer in model.layers:
                layer.keys.copy_(keys)
                layer.values.copy_(values)


def _by_itself(function: Callable[..., Any]) -> Any:
    """A twin with a code object of its own: torch.compile keeps what it has made by code object, and only eight."""
    return types.FunctionType(function.__code__.replace(), function.__globals__)


def _run_layer(layer: nn.Module, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return layer(x, position)  # type: ignore[no-any-return]


def _run_model(model: nn.Module, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return model(x, position)  # type: ignore[no-any-return]


def _call(model: Any, mode: str, inputs: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A step of the model on fixed inputs, compiled and warm."""
    if mode == "eager":
        return partial(model, *inputs)
    backend = {"backend": "eager"} if mode == "traced" else {}
    if mode in ("reduce-overhead", "default"):
        whole: Any = torch.compile(_by_itself(_run_model), mode=mode, dynamic=False, fullgraph=True)
        return partial(whole, model, *inputs)
    one: Any = torch.compile(_by_itself(_run_layer), dynamic=False, fullgraph=True, **backend)

    def step() -> torch.Tensor:
        x, position = inputs
        for layer in model.layers:
            x = one(layer, x, position)
        return x

    return step if mode != "graph" else _captured(step)


def _ready(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    for _ in range(4):
        call()
    return call


def _captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def run(
    sizes: Sequence[str] = ("8B",),
    *,
    rounds: int = DEFAULT_ROUNDS,
    device: str | None = None,
    threads: int = 1,
    modes: Sequence[str] | None = None,
    tokens: Sequence[int] = (1, _PROMPT),
    designs: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time all contenders.

    Args:
        sizes: names in `SIZES`.
        rounds: timed steps of each contender.
        device: "cpu" or "cuda"; by default a GPU if there is one.
        threads: of torch, on the CPU.
        modes: "eager"; "traced", by dynamo alone; "compiled", layer by layer; "graph", that as one CUDA graph;
            "default" and "reduce-overhead", of torch.compile of the whole model.
        tokens: of a step.
        designs: names in `DESIGNS`; by default all that can run.
        progress: is told what is being done.

    Raises:
        HotslotError: there is no such size, or a contender's outputs are not those of PEFT's layers.
    """
    refuse_unknown(sizes, SIZES)
    chosen = chosen_device(device)
    if modes is None:
        modes = ("graph", "reduce-overhead") if chosen.type == "cuda" else ("eager", "traced")
    known = [name for name in DESIGNS if _can_run(name, chosen)] if designs is None else list(designs)
    rows = []
    with torch_threads(threads), quiet(), torch.no_grad():
        for name in sizes:
            progress(f"{name}: comparing in float32")
            size = replace(SIZES[_CHECKED.get(name, name)], dtype=torch.float32)
            known = [design for design in known if _is_right(design, size, chosen, tokens, progress)]
            bench = Bench(SIZES[name], chosen, known)
            for mode in modes:
                for count in tokens:
                    rows += _rows(bench, mode, count, rounds, progress)
    return rows


def _can_run(design: str, device: torch.device) -> bool:
    if DESIGNS[design] not in NEED_TRITON:
        return True
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return find_spec("triton") is not None and (device.type == "cuda" or interpreted)


def _is_right(
    design: str, size: Size, device: torch.device, tokens: Sequence[int], progress: Callable[[str], None]
) -> bool:
    """Whether the design computes in float32 what PEFT's layers do; if it does not even run, that is told."""
    bench = Bench(size, device, [design])
    for count in tokens:
        try:
            error = _errors(bench, {design: partial(bench.models[design], *bench.inputs(count))}, count)[design]
        except Exception:  # a design that a GPU does not take says nothing of the others
            progress(f"{design}: FAILED\n{traceback.format_exc()}")
            return False
        if not error <= 1e-4:
            raise HotslotError(
                "A design's outputs are not those of PEFT's layers: its times would mean nothing.",
                where=f"{design}, {count} tokens, float32",
                found=f"an error of {error:.1e} of what the adapter changes",
            )
    return True


def _errors(bench: Bench, calls: dict[str, Callable[[], torch.Tensor]], tokens: int) -> dict[str, float]:
    inputs = bench.inputs(tokens)

    def output(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        bench.fill_caches()
        return call().double()

    want, base = (output(partial(bench.models[name], *inputs)) for name in (PEFT, BASE))
    return {name: float((output(call) - want).norm() / (want - base).norm()) for name, call in calls.items()}


def _rows(bench: Bench, mode: str, tokens: int, rounds: int, progress: Callable[[str], None]) -> list[Row]:
    whole = mode in ("reduce-overhead", "default")
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for name, model in bench.models.items():
        if not whole or name in WHOLE:
            started = time.perf_counter()
            where = f"{bench.size.name}, {mode}, {tokens} tokens: {name}"
            try:
                calls[name] = _ready(_call(model, mode, bench.inputs(tokens)))
            except Exception:  # a design that a GPU does not take says nothing of the others
                progress(f"{where}: FAILED\n{traceback.format_exc()}")
            else:
                progress(f"{where}: ready in {time.perf_counter() - started:.1f} s")
    errors = _errors(bench, calls, tokens)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in by_turns(calls, rounds):
        times[name].append(_milliseconds(calls[name], bench.device))
    base = statistics.median(times[BASE])
    for name, taken in times.items():
        progress(f"{name}: {statistics.median(taken):.3f} ms, {statistics.median(taken) / base:.3f} of the base's")
    return [
        Row(
            size=bench.size.name,
            mode=mode,
            tokens=tokens,
            contender=name,
            ms=statistics.median(taken),
            min_ms=min(taken),
            times_base=statistics.median(taken) / base,
            error=errors[name],
        )
        for name, taken in times.items()
    ]


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one step, on the device's own clock if it has one."""
    if device.type != "cuda":
        return timed(call, device)[0] * 1e3
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_REPEATS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / _REPEATS


def render(rows: Sequence[Row], conditions: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table("size", "mode", "tokens", "contender", "ms", "min ms", "× base", "error")
    for row in rows:
        figures = f"{row.ms:.3f}", f"{row.min_ms:.3f}", f"{row.times_base:.3f}", f"{row.error:.1e}"
        table.add_row(row.size, row.mode, str(row.tokens), row.contender, *figures)
    console.print(table)


command = Command("forward", run, SIZES, ("8B",), DEFAULT_ROUNDS, render, keeps_progress=True)


if __name__ == "__main__":
    command.main()
