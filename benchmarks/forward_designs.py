"""Ways to compute linear layers that share an input, each with a LoRA beside it: what `bench_forward` compares.

T: tokens   K: inputs   O: outputs of a layer   R: rank   G: layers that share the input

Each design is a module that takes x [..., T, K] and gives the outputs of its layers, [..., T, O] each. Its parameters
are the layers' own; A of its layers is one matrix [GR, K], as it is where their parts lie side by side in an arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Group(nn.Module):
    """Base layers alone, or with PEFT's layers in their places: what a model's author writes."""

    def __init__(self, **linears: nn.Module) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear(x) for linear in self.children())


class Design(nn.Module):
    """Layers with their LoRA, by another way; made of what PEFT has put into a Group."""

    def __init__(self, layers: Sequence[Any], adapter_name: str) -> None:
        super().__init__()
        self.weights = nn.ParameterList(layer.get_base_layer().weight for layer in layers)
        downs = [layer.lora_A[adapter_name].weight.detach() for layer in layers]
        self.rank = downs[0].shape[0]
        self.register_buffer("a", torch.cat(downs))
        self.bs = nn.ParameterList(layer.lora_B[adapter_name].weight for layer in layers)
        scalings = torch.tensor([layer.scaling[adapter_name] for layer in layers], dtype=torch.float32)
        self.register_buffer("scalings", scalings.to(self.a.device))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        return tuple(y.view(*x.shape[:-1], -1) for y in self.outputs(flat))

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """[T, K] → [T, O] of each layer."""
        raise NotImplementedError

    def base(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [F.linear(x, weight) for weight in self.weights]

    def added(self, ys: Sequence[torch.Tensor], lows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`ys` and the layers' products with low [T, R]; scaled last, where inductor fuses it into what follows."""
        return [y + (t @ b.T) * s for y, t, b, s in zip(ys, lows, self.bs, self.scalings, strict=True)]

    def added_pointwise(self, ys: Sequence[torch.Tensor], lows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`added` for one token, low [R] in float32: as sums that inductor fuses into what follows."""
        return [
            (y.float() + _product(b, t) * s).to(y.dtype)
            for y, t, b, s in zip(ys, lows, self.bs, self.scalings, strict=True)
        ]


def _product(b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """B t as terms and not as a reduction: what is pointwise, inductor fuses into any kernel."""
    total = b[:, 0].float() * t[0]
    for i in range(1, t.shape[0]):
        total = total + b[:, i].float() * t[i]
    return total


class Addmm(Design):
    """a: each layer by itself; s on [T, R], B's product accumulated onto the base's output."""

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        downs = self.a.split(self.rank)
        terms = zip(self.base(x), downs, self.bs, self.scalings, strict=True)
        return [torch.addmm(y, (x @ a.T) * s, b.T) for y, a, b, s in terms]


class OneDown(Design):
    """b: A of all layers in one product."""

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.added(self.base(x), (x @ self.a.T).split(self.rank, -1))


class Pointwise(Design):
    """b, and for one token both products are sums that inductor writes kernels for."""

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        if x.shape[0] > 1:
            return self.added(self.base(x), (x @ self.a.T).split(self.rank, -1))
        low = (self.a.float() * x.float()).sum(-1)
        return self.added_pointwise(self.base(x), low.split(self.rank))


class PointwiseEach(Design):
    """`Pointwise`, each layer by itself: inductor may fuse what reads the same input, and no one has to know it."""

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        downs = self.a.split(self.rank)
        if x.shape[0] > 1:
            return self.added(self.base(x), [x @ a.T for a in downs])
        return self.added_pointwise(self.base(x), [(a.float() * x.float()).sum(-1) for a in downs])


class Stacked(Design):
    """c: [W…; A…] in one matrix, so that A comes along with the base's product; B as in `Pointwise`."""

    def __init__(self, layers: Sequence[Any], adapter_name: str) -> None:
        super().__init__(layers, adapter_name)
        self.sizes = [weight.shape[0] for weight in self.weights]
        self.register_buffer("all", torch.cat([*self.weights, self.a]).detach())

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        *ys, low = (x @ self.all.T).split([*self.sizes, self.a.shape[0]], -1)
        if x.shape[0] > 1:
            return self.added(ys, low.split(self.rank, -1))
        return self.added_pointwise(ys, low[0].float().split(self.rank))


class Kernels(Design):
    """d: Triton kernels, one for A and one for B of all layers, which adds to the base's outputs in place."""

    side = False

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        kernels: Any = torch.ops.hotslot_bench.with_kernels
        outputs: Sequence[torch.Tensor] = kernels(
            x, list(self.weights), self.a, list(self.bs), self.scalings, self.side
        )
        return outputs


class KernelsBeside(Kernels):
    """d, and A's kernel runs beside the base's products, on a stream of its own."""

    side = True


class KernelThenPointwise(Design):
    """e: one Triton kernel for A, and B pointwise, for one token; d for more."""

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        ops: Any = torch.ops.hotslot_bench
        if x.shape[0] > 1:
            many: Sequence[torch.Tensor] = ops.with_kernels(
                x, list(self.weights), self.a, list(self.bs), self.scalings, True
            )
            return many
        low = ops.down_one(x, self.a, self.scalings)
        parts = zip(self.base(x), low.split(self.rank), self.bs, strict=True)
        return [(y.float() + _product(b, t)).to(y.dtype) for y, t, b in parts]


class Beside(Design):
    """f: the whole branch runs beside the base's products, on a stream of its own; the sum is inductor's."""

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        beside: Any = torch.ops.hotslot_bench.beside
        found = beside(x, list(self.weights), self.a, list(self.bs))
        ys, zs = found[: len(self.bs)], found[len(self.bs) :]
        return [y + z * s for y, z, s in zip(ys, zs, self.scalings, strict=True)]


class BesideEach(Design):
    """f, each layer by itself."""

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        beside: Any = torch.ops.hotslot_bench.beside
        terms = zip(self.weights, self.a.split(self.rank), self.bs, self.scalings, strict=True)
        return [y + z * s for (y, z), s in ((beside(x, [w], a, [b]), s) for w, a, b, s in terms)]


class DownBeside(Design):
    """f for more tokens; for one A's product alone runs beside, and B's is pointwise."""

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        beside: Any = torch.ops.hotslot_bench.beside
        found = beside(x, list(self.weights), self.a, list(self.bs) if x.shape[0] > 1 else [])
        ys, rest = found[: len(self.bs)], found[len(self.bs) :]
        if x.shape[0] == 1:
            return self.added_pointwise(ys, rest[0][0].float().split(self.rank))
        return [y + z * s for y, z, s in zip(ys, rest, self.scalings, strict=True)]


DESIGNS: dict[str, type[Design]] = {
    "a: addmm onto the base's output": Addmm,
    "b: a, and one product of A": OneDown,
    "b, pointwise for one token": Pointwise,
    "b, pointwise, each by itself": PointwiseEach,
    "c: [W; A] stacked": Stacked,
    "d: Triton kernels for A and B": Kernels,
    "d, A beside on a stream": KernelsBeside,
    "e: Triton A, pointwise B": KernelThenPointwise,
    "f: branch beside on a stream": Beside,
    "f, each by itself": BesideEach,
    "f, pointwise B for one token": DownBeside,
}
NEED_TRITON = (Kernels, KernelsBeside, KernelThenPointwise)

_sides: dict[torch.device, torch.cuda.Stream] = {}


def _side(device: torch.device) -> torch.cuda.Stream | None:
    """The stream beside the current one; none on a CPU."""
    if device.type != "cuda":
        return None
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device, priority=-1)  # small kernels go before the next wave of large ones
    return _sides[device]


def _both(
    x: torch.Tensor, weights: Sequence[torch.Tensor], branches: Callable[[], list[torch.Tensor]], *, beside: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The base layers' outputs and what `branches` gives; that, if `beside`, on a stream of its own."""
    side = _side(x.device) if beside else None
    if side is None:
        return [F.linear(x, weight) for weight in weights], branches()
    current = torch.cuda.current_stream(x.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        found = branches()
    ys = [F.linear(x, weight) for weight in weights]
    current.wait_stream(side)
    if not torch.cuda.is_current_stream_capturing():
        for tensor in found:
            tensor.record_stream(current)
    return ys, found


@torch.library.custom_op("hotslot_bench::beside", mutates_args=())
def _beside(
    x: torch.Tensor, weights: list[torch.Tensor], a: torch.Tensor, bs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Outputs of the base layers; and of the branches, not scaled, or without `bs` low [T, GR]."""

    def branches() -> list[torch.Tensor]:
        low = x @ a.T
        return [t @ b.T for t, b in zip(low.split(a.shape[0] // len(bs), -1), bs, strict=True)] if bs else [low]

    ys, found = _both(x, weights, branches, beside=True)
    return [*ys, *found]


@_beside.register_fake
def _(x: torch.Tensor, weights: list[torch.Tensor], a: torch.Tensor, bs: list[torch.Tensor]) -> list[torch.Tensor]:
    tokens = x.shape[0]
    ys = [x.new_empty(tokens, weight.shape[0]) for weight in weights]
    return [*ys, *([x.new_empty(tokens, b.shape[0]) for b in bs] or [x.new_empty(tokens, a.shape[0])])]


@torch.library.custom_op("hotslot_bench::with_kernels", mutates_args=())
def _with_kernels(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    a: torch.Tensor,
    bs: list[torch.Tensor],
    scalings: torch.Tensor,
    beside: bool,
) -> list[torch.Tensor]:
    from .forward_kernels import add_products, low_inputs

    ys, (low,) = _both(x, weights, lambda: [low_inputs(x, a, scalings)], beside=beside)
    add_products(low, scalings, ys, bs)
    return ys


@_with_kernels.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    a: torch.Tensor,
    bs: list[torch.Tensor],
    scalings: torch.Tensor,
    beside: bool,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


@torch.library.custom_op("hotslot_bench::down_one", mutates_args=())
def _down_one(x: torch.Tensor, a: torch.Tensor, scalings: torch.Tensor) -> torch.Tensor:
    from .forward_kernels import low_inputs

    return low_inputs(x, a, scalings)


@_down_one.register_fake
def _(x: torch.Tensor, a: torch.Tensor, scalings: torch.Tensor) -> torch.Tensor:
    return x.new_empty(a.shape[0], dtype=torch.float32)
