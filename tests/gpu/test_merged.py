"""Merging into weights on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import hotslot

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def base(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 72)).to(dtype)


def adapter(folder: Path, seed: int, *, use_dora: bool) -> Path:
    config = LoraConfig(r=8 + seed, lora_alpha=5, target_modules=["0", "1"], use_dora=use_dora)
    model = get_peft_model(base(torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def merged(dtype: torch.dtype, source: Path) -> list[torch.Tensor]:
    """By PEFT, in float64."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base(dtype).double(), source, autocast_adapter_dtype=False)
    return [parameter.detach() for parameter in model.merge_and_unload().parameters()]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fused_merge_is_near_the_exact_one_and_leaves_no_trace(
    tmp_path: Path, dtype: torch.dtype, use_dora: bool
) -> None:
    sources = {name: adapter(tmp_path / name, seed, use_dora=use_dora) for seed, name in enumerate("ab")}
    model = base(dtype).cuda()
    own = [parameter.detach().clone() for parameter in model.parameters()]
    swapper = hotslot.attach(model, adapters=sources, route="merged")
    first: dict[str, list[torch.Tensor]] = {}
    for name in "ababba":
        swapper.activate(name)
        now = [parameter.detach().clone() for parameter in model.parameters()]
        for value, exact in zip(now, merged(dtype, sources[name]), strict=True):
            assert torch.allclose(value.double().cpu(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
        for value, again in zip(first.setdefault(name, now), now, strict=True):
            assert torch.equal(value, again)
    swapper.deactivate()
    for parameter, value in zip(model.parameters(), own, strict=True):
        assert torch.equal(parameter, value)
