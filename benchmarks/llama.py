"""What the swap benchmark swaps on: a model of Llama's linears, and LoRA adapters for all of them.

L: layers   H: hidden   K: H / 4, keys and values   I: 7 H / 2, the MLP   R: rank
Seven linears a layer, so 14 L adapter tensors of 20 L H R values in all. L = 32, H = 4096 is Llama-3-8B.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

ADAPTER_NAME = "default"
ALPHAS = (16, 32)  # of the two adapters: a swap has to write another scaling, too


@dataclass(frozen=True, slots=True)
class Size:
    """How large a model and its adapters are."""

    name: str
    hidden: int
    layers: int
    rank: int
    dtype: torch.dtype
    heads: int

    @property
    def tensors(self) -> int:
        return 14 * self.layers

    @property
    def adapter_bytes(self) -> int:
        return 20 * self.layers * self.hidden * self.rank * self.dtype.itemsize


SIZES = {
    size.name: size
    for size in (
        Size("tiny", hidden=64, layers=2, rank=4, dtype=torch.float32, heads=8),
        Size("small", hidden=512, layers=4, rank=16, dtype=torch.float32, heads=8),
        Size("9MB", hidden=216, layers=32, rank=16, dtype=torch.float32, heads=8),
        Size("84MB", hidden=4096, layers=32, rank=16, dtype=torch.bfloat16, heads=32),
    )
}


class Attention(nn.Module):
    """Of one token to itself and to a sink of logit 0: all four projections matter to a forward pass of one token.

    (More tokens take seconds where the CPU has no bfloat16 matrix product.)
    """

    def __init__(self, weights: dict[str, nn.Parameter], heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, linear_of(weights[name]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, v = (p(x).unflatten(-1, (self.heads // 4, 1, -1)) for p in (self.k_proj, self.v_proj))
        q = self.q_proj(x).unflatten(-1, (self.heads // 4, 4, -1))
        attention = torch.sigmoid((q * k).sum(-1, keepdim=True) / q.shape[-1] ** 0.5)
        return self.o_proj((attention * v).flatten(-3))


class MLP(nn.Module):
    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.add_module(name, linear_of(weights[name]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, weights: dict[str, nn.Parameter], heads: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(weights, heads), MLP(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(F.rms_norm(x, x.shape[-1:]))
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class Llama(nn.Module):
    """The layers alone: embeddings and norms have no part in a swap."""

    def __init__(self, weights: dict[str, nn.Parameter], layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(weights, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def shapes(hidden: int) -> dict[str, tuple[int, int]]:
    """Name → (out, in) of a layer's linears."""
    narrow, wide = hidden // 4, hidden * 7 // 2
    return {
        "q_proj": (hidden, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden),
        "o_proj": (hidden, hidden), "gate_proj": (wide, hidden), "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
    }  # fmt: skip


def llama_of_own_weights(
    hidden: int,
    layers: int,
    heads: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Llama:
    """A model whose layers do not share weights: a merge writes all of them. The values are the same each time.

    They are made where they are to be: the generator of a CPU would take minutes for 14 GB.
    """
    none = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes(hidden).items()}
    model = Llama(none, layers, heads).eval()
    generator = torch.Generator(device).manual_seed(0)
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            values = torch.randn(linear.weight.shape, generator=generator, device=device, dtype=dtype)
            linear.weight = nn.Parameter(values.div_(linear.in_features**0.5), requires_grad=False)
    return model


def linear_of(weight: nn.Parameter) -> nn.Linear:
    """A linear layer that has `weight`, and no memory of its own."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


class Bench:
    """The models, adapters and reference outputs of one size on one device.

    All layers of all models share one layer's base weights, which no swap touches: 84 MB of adapters for 32 layers of
    Llama-3-8B then need 0.4 GB of base weights and not 14. The adapters' tensors are all there, and all different.
    """

    def __init__(self, size: Size, folder: Path, device: torch.device) -> None:
        self.size, self.device = size, device
        generator = torch.Generator().manual_seed(0)
        self._weights = {
            name: nn.Parameter(
                (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(device, size.dtype), requires_grad=False
            )
            for name, shape in shapes(size.hidden).items()
        }
        self.inputs = torch.randn(1, size.hidden, generator=generator).to(device, size.dtype)
        self.folders = tuple(folder / f"{size.name}-{i}" for i in range(2))
        for i in range(2):
            self._save_adapter(i)
        saved = time.monotonic()
        self.expected = tuple(self.output(self.peft_model(i)) for i in range(2))
        # Of files that were changed just now the file system's clock cannot tell whether they have changed since.
        time.sleep(max(0.0, saved + 2.1 - time.monotonic()))

    def base(self) -> nn.Module:
        return Llama(self._weights, self.size.layers, self.size.heads).eval()

    def peft_model(self, adapter: int) -> PeftModel:
        """A fresh load of one of the adapters, kept in its own dtype."""
        model = PeftModel.from_pretrained(
            self.base(), str(self.folders[adapter]), ADAPTER_NAME, autocast_adapter_dtype=False
        )
        return model.eval()

    def peft_model_of_rank(self, rank: int) -> PeftModel:
        """A model that began with an adapter of another rank: its slots have room for that."""
        model = get_peft_model(self.base(), self._config(rank, ALPHAS[0]), ADAPTER_NAME, autocast_adapter_dtype=False)
        return model.to(self.device).eval()

    def output(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(self.inputs)

    def _config(self, rank: int, alpha: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(self._weights))

    def _save_adapter(self, adapter: int) -> None:
        model = get_peft_model(
            self.base(), self._config(self.size.rank, ALPHAS[adapter]), ADAPTER_NAME, autocast_adapter_dtype=False
        )
        generator = torch.Generator().manual_seed(1 + adapter)
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.data.copy_(values)
        model.save_pretrained(str(self.folders[adapter]))


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's advice to those who train, and torch's on low-level calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
