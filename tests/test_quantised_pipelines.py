"""LoRAs on pipelines with a quantised component, against a fresh pipeline that diffusers has loaded them into.

Needs diffusers and a library of quantisation; what needs a missing one is skipped. All of it runs on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import hotslot
from oracle import assert_same_output, error
from pipelines import PIPELINES, load_plain, make_lora
from test_quantised import EIGHT_BIT_TOLERANCE, KINDS, pytestmark, quantise

__all__ = ["pytestmark"]  # warnings of the libraries themselves

SD = PIPELINES["sd"]
LORAS: dict[str, dict[str, Any]] = {
    "four": {"seed": 1, "components": ("unet", "text_encoder"), "r": 4, "lora_alpha": 6},
    "two": {"seed": 2, "targets": {"unet": ("to_q", "net.2")}, "r": 2, "lora_alpha": 3},
}


def as_gguf(model: nn.Module) -> None:
    """The linear layers that Q8_0's blocks of 32 fit, as diffusers makes them of a GGUF file."""
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.in_features % 32 == 0:
            biased = module.bias is not None
            layer = GGUFLinear(module.in_features, module.out_features, biased, compute_dtype=torch.float32)
            packed = torch.from_numpy(gguf.quants.quantize(module.weight.detach().numpy(), kind))
            layer.weight, layer.bias = GGUFParameter(packed, quant_type=kind), module.bias
            model.set_submodule(name, layer)


def build(kind: str) -> Any:
    """A pipeline whose unet's linear layers are quantised, as diffusers' own configs of quantisation leave it."""
    pipe = SD.build()
    as_gguf(pipe.unet) if kind == "gguf" else quantise(pipe.unet, kind)
    assert any("bit" in type(m).__name__ or kind in ("torchao", "gguf") for m in pipe.unet.modules())
    return pipe


def outputs(pipe: Any) -> dict[str, Tensor]:
    for name in SD.components:
        getattr(pipe, name).eval().requires_grad_(False)
    return SD.outputs(pipe)


def loaded(kind: str, source: Path) -> dict[str, Tensor]:
    pipe = build(kind)
    load_plain(pipe, source)
    return outputs(pipe)


def assert_same(kind: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for component, values in want.items():
        if component == "unet" and kind == "8bit":
            assert error(got[component], values) < EIGHT_BIT_TOLERANCE
        else:
            assert_same_output(got[component], values)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    return {name: make_lora(SD, root / name, **options) for name, options in LORAS.items()}


@pytest.mark.parametrize("kind", [*KINDS, "gguf"])
def test_loras_swap_on_a_quantised_component(kind: str, sources: dict[str, Path]) -> None:
    pipe = build(kind)
    base = outputs(pipe)
    wanted = {name: loaded(kind, source) for name, source in sources.items()}
    assert not torch.allclose(wanted["four"]["unet"], wanted["two"]["unet"], atol=0.01)
    swapper = hotslot.attach(pipe, adapters=sources)
    for name in ("four", "two", "four", None, "two"):
        swapper.activate(name) if name else swapper.deactivate()
        assert_same(kind, SD.outputs(pipe), wanted[name] if name else base)
    swapper.detach()
    assert torch.equal(SD.outputs(pipe)["unet"], base["unet"])


@pytest.mark.parametrize("kind", [*KINDS, "gguf"])
def test_diffusers_own_calls_swap_there(kind: str, sources: dict[str, Path]) -> None:
    pipe = build(kind)
    hotslot.patch_peft()
    try:
        pipe.load_lora_weights(sources["four"], adapter_name="style")
        for name in ("two", "four"):
            pipe.load_lora_weights(sources[name], adapter_name="style", hotswap=True)
            assert_same(kind, outputs(pipe), loaded(kind, sources[name]))
    finally:
        hotslot.unpatch_peft()
