"""Merged swaps on a compiled model: on a GPU under CUDA graphs, and as a twin on the CPU, where all else is the same.

What torch does beside running what it has, dynamo's callbacks tell: it compiles a frame, it records a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._dynamo.utils import counters

import hotslot
from adapters import expected_peft_warnings
from hotslot.testing import no_recompile, same_addresses
from methods import make_method_adapter, tensors_of
from oracle import assert_same_output, error
from zoo import ZOO

LLAMA = ZOO["llama"]
ORDER = ("lora", "loha", "oft", "ia3", "head", None, "oft", "lora", "head", "loha", None)
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TWINS = [
    ("cpu", torch.float32),
    pytest.param("cuda", torch.float32, marks=ON_GPU),
    pytest.param("cuda", torch.bfloat16, marks=ON_GPU),  # of which merges are fused there
]
RECORDING = CallbackTrigger.CUDAGRAPH_RECORDING.name


@contextmanager
def work() -> Iterator[Counter[str]]:
    """How often torch did what by the name of dynamo's trigger, beside running what it has."""
    found: Counter[str] = Counter()

    def count(told: CallbackArgs) -> None:
        found[told.callback_trigger.name] += 1

    callback_handler.register_start_callback(count)
    try:
        yield found
    finally:
        callback_handler.remove_start_callback(count)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    named = {
        "lora": ("LORA", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
        "loha": ("LOHA", {"target_modules": ["up_proj", "down_proj"]}),
        "oft": ("OFT", {}),
        "ia3": ("IA3", {}),
        "head": ("LORA", {"r": 4, "target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    }
    return {
        name: make_method_adapter(root / name, method, LLAMA, seed=seed, **options)
        for seed, (name, (method, options)) in enumerate(named.items(), 1)
    }


def compiled(model: nn.Module) -> Any:
    on_gpu = next(model.parameters()).is_cuda
    options = {"mode": "reduce-overhead"} if on_gpu else {"backend": "eager"}
    return torch.compile(model, fullgraph=True, dynamic=False, **options)


def output(model: Any, seed: int = 0) -> Tensor:
    weight = next(model.parameters())
    inputs = {name: value.to(weight.device) for name, value in LLAMA.inputs(seed).items()}
    return LLAMA.output(model, inputs).clone()  # the next replay writes over it


class Twin:
    """One that is swapped, and one compiled likewise that is given a fresh merge's values; both have settled."""

    def __init__(self, device: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.device, self.dtype = device, dtype
        self.model = self.build()
        self.swapper = hotslot.attach(self.model, folders, route="merged")
        self._wanted = self.build()
        self._merges: dict[Path | None, dict[str, Tensor]] = {
            folder: self.merge(folder) for folder in (None, *folders.values())
        }
        with work() as self.started:
            self.run = compiled(self.model)
            self._run_wanted = compiled(self._wanted) if device == "cuda" else self._wanted  # as backend="eager" does
            for _ in range(4):  # torch warms up, records, replays
                output(self.run)
                output(self._run_wanted)

    def build(self) -> nn.Module:
        return LLAMA.build(dtype=self.dtype).to(self.device)

    def merge(self, folder: Path | None) -> dict[str, Tensor]:
        """Name → values, merged by PEFT where the model is."""
        if folder is None:
            return tensors_of(self.build())
        with expected_peft_warnings():
            merged: Any = PeftModel.from_pretrained(self.build(), str(folder)).merge_and_unload()
        return tensors_of(merged)

    def swap(self, name: str | None) -> None:
        self.swapper.activate(name) if name else self.swapper.deactivate()

    def wanted(self, folder: Path | None) -> Tensor:
        with torch.no_grad():
            for name, tensor in tensors_in(self._wanted).items():
                tensor.copy_(self._merges[folder][name])
        return output(self._run_wanted)

    def disturb(self) -> None:
        """Move a weight, for which a graph is recorded anew; on the CPU take inputs for which a frame is compiled."""
        if self.device == "cuda":
            weight: Any = self.model.lm_head.weight
            weight.data = weight.data.clone()
            output(self.run)
        else:
            ids = LLAMA.inputs()["input_ids"]
            with torch.no_grad():
                self.run(input_ids=torch.cat([ids, ids], dim=1))

    def assert_right(self, folder: Path | None) -> Tensor:
        """Weights and output of a fresh merge; gives the output."""
        exact = self.dtype == torch.float32  # by PEFT's own merge
        for name, tensor in tensors_in(self.model).items():
            if exact or folder is None:
                assert torch.equal(tensor, self._merges[folder][name]), name
        found = output(self.run)
        assert_same_output(found, self.wanted(folder), exact=self.device == "cpu")
        return found


def tensors_in(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(("device", "dtype"), TWINS)
def test_merged_swaps_compile_and_record_nothing(device: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    twin, outputs = Twin(device, dtype, folders), {}
    assert twin.started[CallbackTrigger.DYNAMO.name] >= 1
    assert twin.started[RECORDING] >= (2 if device == "cuda" else 0)  # one of each model: graphs are in use
    with work() as done, no_recompile(), same_addresses(twin.model):
        for name in ORDER:
            twin.swap(name)
            outputs[name] = twin.assert_right(folders[name] if name else None)
    assert not done
    assert not counters["inductor"]["cudagraph_skips"]

    pairs = itertools.combinations(outputs.values(), 2)
    assert all(error(one, other) > 1e-2 for one, other in pairs), "the control: these are different adapters"
    with work() as done:
        twin.disturb()
    assert done[RECORDING if device == "cuda" else CallbackTrigger.DYNAMO.name] >= 1, "the control: work is noticed"
