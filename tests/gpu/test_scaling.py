"""Scalings are 0-dim tensors on the device: what they scale has to round as under PEFT's floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import hotslot

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def base(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 72)).to("cuda", dtype)


@pytest.mark.parametrize("options", [{"lora_alpha": 3, "r": 10}, {"lora_alpha": 3, "r": 8, "use_rslora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scaling_that_the_dtype_cannot_hold_is_not_rounded_to_it(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    trained = get_peft_model(base(torch.float32), LoraConfig(target_modules=["0", "1"], **options))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(base(dtype), str(tmp_path), autocast_adapter_dtype=False).eval()
    model = base(dtype).eval()
    plan = hotslot.plan(model, tmp_path, dtype="base", max_blend=1)
    hotslot.attach(model, {"a": tmp_path}, plan=plan).activate("a")
    x = torch.randn(16, 96, device="cuda", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x))
