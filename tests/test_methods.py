"""Any method of PEFT, merged into the base weights: bit for bit what PEFT's own `merge_and_unload` gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftType
from torch import nn

import hotslot
from methods import METHODS, Method, fresh_merge, make_method_adapter, tensors_of
from zoo import ZOO

DTYPES = [torch.float32, torch.bfloat16]
MERGING = [(name, entry) for name, method in METHODS.items() if method.merges for entry in method.targets]


def assert_same_tensors(model: nn.Module, want: dict[str, torch.Tensor]) -> None:
    got = tensors_of(model)
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert torch.equal(got[name].view(torch.uint8), values.view(torch.uint8)), name


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: param.data_ptr() for name, param in model.named_parameters(remove_duplicate=False)}


def needed(name: str) -> Method:
    method = METHODS[name]
    if not method.available:
        pytest.skip(f"PEFT needs {method.needs} for {name}")
    return method


def test_every_method_of_peft_has_a_row() -> None:
    assert sorted(METHODS) == sorted(kind.value for kind in PeftType)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "entry"), MERGING)
def test_merged_weights_are_those_of_peft(name: str, entry: str, dtype: torch.dtype, tmp_path: Path) -> None:
    needed(name)
    folders = [make_method_adapter(tmp_path / str(seed), name, ZOO[entry], seed=seed, dtype=dtype) for seed in (1, 2)]
    model = ZOO[entry].build(dtype=dtype)
    before, places = tensors_of(model), addresses(model)
    swapper = hotslot.attach(model, {str(i): folder for i, folder in enumerate(folders)}, route="merged")
    assert_same_tensors(model, before)
    for number in (0, 1, 0):
        report = swapper.activate(str(number))
        assert report.route == "merged"
        want = fresh_merge(ZOO[entry], folders[number], dtype=dtype)
        assert any(not torch.equal(want[key], before[key]) for key in before)
        assert_same_tensors(model, want)
    swapper.deactivate()
    assert_same_tensors(model, before)
    assert addresses(model) == places
    swapper.activate("1")
    swapper.detach()
    assert_same_tensors(model, before)
    assert addresses(model) == places
