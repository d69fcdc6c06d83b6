"""`attach(fused=True)`: what PEFT's layers compute, by another forward, eager and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hotslot
from adapters import make_adapter
from compiling import Backend
from hotslot.errors import ModelError
from hotslot.live.fused import FusedLinear
from oracle import assert_same_output, fresh, fresh_output
from zoo import ZOO, Entry

CONFIGS: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_alpha": 6},
    {"r": 2, "lora_alpha": 3, "use_rslora": True},
    {"r": 8, "lora_alpha": 8, "lora_dropout": 0.5},
)


def adapters(folder: Path, entry: Entry) -> dict[str, Path]:
    half = list(entry.targets)[:1]
    targets = (list(entry.targets), half, list(entry.targets))
    return {
        str(i): make_adapter(folder / str(i), entry, seed=i, target_modules=targets[i], **config)
        for i, config in enumerate(CONFIGS)
    }


def first_token(entry: Entry) -> dict[str, Tensor]:
    return {name: tensor[:1, :1] for name, tensor in entry.inputs().items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_outputs_are_those_of_fresh_loads_and_then_the_base_s(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    folders, model = adapters(tmp_path, entry), entry.build()
    base = entry.output(model, entry.inputs())
    swapper = hotslot.attach(model, folders, fused=True)
    assert any(isinstance(module, FusedLinear) for module in model.modules())
    for adapter in ("0", "1", "2", "0"):
        swapper.activate(adapter)
        assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders[adapter]))
    swapper.deactivate()
    assert torch.equal(entry.output(model, entry.inputs()), base)
    swapper.detach()
    assert not any(isinstance(module, FusedLinear) for module in model.modules())
    assert torch.equal(entry.output(model, entry.inputs()), base)


def test_compiled_code_serves_all_adapters_with_one_token_and_with_many(tmp_path: Path) -> None:
    entry, backend = ZOO["llama"], Backend()
    folders, model = adapters(tmp_path, entry), entry.build()
    swapper = hotslot.attach(model, folders, fused=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    counts = []
    for adapter in ("0", "1", "2", "0"):
        swapper.activate(adapter)
        for inputs in (entry.inputs(), first_token(entry)):
            want = entry.output(fresh(entry, folders[adapter]), inputs)
            assert_same_output(entry.output(compiled, inputs), want)
        counts.append(backend.graphs)
    assert counts == [2, 2, 2, 2]  # one graph for each length, made by the first adapter


def test_what_is_not_one_plain_adapter_is_pefts(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folder = make_adapter(tmp_path / "biased", entry, seed=5, r=2, use_dora=True, target_modules=list(entry.targets))
    model = entry.build()
    swapper = hotslot.attach(model, {"dora": folder}, fused=True)
    swapper.activate("dora")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folder))


def test_a_model_that_is_compiled_already_is_refused(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders, model = adapters(tmp_path, entry), entry.build()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ModelError, match="compiled already"):
        hotslot.attach(compiled, folders, fused=True)
