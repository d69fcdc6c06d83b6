"""Swaps through the kernel that fills the arena: on a GPU, or in Triton's interpreter, as `tests/test_kernels.py` does.

What it writes is compared, byte for byte, with what torch's copies write on the CPU; those are tested against PEFT.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs a GPU, or TRITON_INTERPRET=1 from the start of the process",
    ),
]
pytest.importorskip("triton")

import hotslot  # noqa: E402
from adapters import make_adapter  # noqa: E402
from hotslot.live import memory  # noqa: E402
from hotslot.live.scatter import Scatter  # noqa: E402
from oracle import assert_same_output, fresh_output  # noqa: E402
from test_experts import build  # noqa: E402
from test_experts import folders as of_experts  # noqa: E402, F401  a fixture
from zoo import ZOO, Entry  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENTRIES = ("mlp", "gpt2", "embedding", "conv1d", "conv2d", "conv3d", "attention")  # each kind of layer
ORDER = ("dense", "small", "other", None, "small", "dense", None, "other")


def adapters(root: Path, entry: Entry, **more: Any) -> dict[str, Path]:
    """Dense; of a smaller rank on half of the targets; of an odd rank and another scaling."""
    unit, targets = entry.rank_multiple, list(entry.targets)
    configs = {
        "dense": {"r": 8, "lora_alpha": 12, "target_modules": targets},
        "small": {"r": unit, "lora_alpha": 3, "target_modules": targets[: (len(targets) + 1) // 2]},
        "other": {"r": 6, "use_rslora": True, "target_modules": targets[1:] or targets},
    }
    return {
        name: make_adapter(root / name, entry, seed=i, **config, **more)
        for i, (name, config) in enumerate(configs.items())
    }


def arena(swapper: hotslot.Swapper) -> torch.Tensor:
    (found,) = swapper.engine.binding.memory.arenas
    assert found is not None
    return found.cpu()


def kernels(swapper: hotslot.Swapper, name: str) -> int:
    return len(swapper._library.peek(name).compile(swapper.engine.binding).writes.scatters)


@contextmanager
def torchs_copies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "scatters", lambda device: False)
        yield


def attached(entry: Entry, sources: Mapping[str, Path], device: str, **more: Any) -> tuple[nn.Module, hotslot.Swapper]:
    model = entry.build().to(device)
    return model, hotslot.attach(model, adapters=sources, **more)


@pytest.mark.parametrize("entry", [ZOO[name] for name in ENTRIES], ids=ENTRIES)
def test_the_kernel_writes_and_clears_what_copies_do(entry: Entry, tmp_path: Path) -> None:
    sources = adapters(tmp_path, entry)
    _, ours = attached(entry, sources, DEVICE)
    with torchs_copies():
        _, theirs = attached(entry, sources, "cpu")
    assert kernels(ours, "dense") == 1
    assert kernels(theirs, "dense") == 0
    for name in ORDER:
        for swapper in (ours, theirs):
            swapper.activate(name) if name else swapper.deactivate()
        assert torch.equal(arena(ours), arena(theirs)), name


def test_what_a_swap_takes_is_made_when_an_adapter_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ZOO["mlp"]
    sources = adapters(tmp_path, entry)
    _, swapper = attached(entry, sources, DEVICE)
    swapper.load("late", make_adapter(tmp_path / "late", entry, seed=9, r=3, target_modules=list(entry.targets)))

    def refuse(self: Scatter, occupied: tuple[int, ...]) -> Any:
        raise AssertionError(f"a table is made by a swap, for {occupied}")

    monkeypatch.setattr(Scatter, "_tabulate", refuse)
    for before, after in itertools.permutations([*sources, "late", None], 2):
        for name in (before, after):
            swapper.activate(name) if name else swapper.deactivate()


def test_experts(of_experts: dict[str, Path]) -> None:  # noqa: F811
    ours = hotslot.attach(build().to(DEVICE), of_experts)
    with torchs_copies():
        theirs = hotslot.attach(build(), of_experts)
    assert kernels(ours, "both") == 1
    for name in [*of_experts, *reversed(of_experts), "both", "experts"]:
        ours.activate(name)
        theirs.activate(name)
        assert torch.equal(arena(ours), arena(theirs)), name


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_parts_without_a_rank(options: dict[str, Any], tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    plain, odd = adapters(tmp_path / "plain", entry), adapters(tmp_path / "odd", entry, **options)
    sources = {f"{name} {kind}": path for kind, found in (("", plain), ("odd", odd)) for name, path in found.items()}
    _, ours = attached(entry, sources, DEVICE)
    with torchs_copies():
        _, theirs = attached(entry, sources, "cpu")
    for name in [*sources, *reversed(sources)]:
        ours.activate(name)
        theirs.activate(name)
        assert torch.equal(arena(ours), arena(theirs)), name


def test_values_of_another_dtype_are_rounded_as_torch_rounds(tmp_path: Path) -> None:
    entry, dtype = ZOO["mlp"], torch.float16  # the interpreter cuts bfloat16 off
    sources = adapters(tmp_path, entry)
    found = []
    for device in (DEVICE, "cpu"):
        model = entry.build().to(device)
        plan = hotslot.plan(model, sources, max_blend=1, dtype=dtype)
        with torchs_copies() if found else nullcontext():
            found.append(hotslot.attach(model, adapters=sources, plan=plan))
    for name in ORDER:
        for swapper in found:
            swapper.activate(name) if name else swapper.deactivate()
        assert torch.equal(*map(arena, found)), name


def test_what_was_live_last_stays_on_the_device(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    sources = adapters(tmp_path, entry)
    limit = sum(
        tensor.nbytes
        for name in ("dense", "other")
        for tensor in load_file(sources[name] / "adapter_model.safetensors").values()
    )
    model, swapper = attached(entry, sources, DEVICE, cache=hotslot.Cache(device_bytes=limit))
    tiers = [swapper.activate(name).tier for name in ("dense", "small", "dense", "other", "small", "dense", "dense")]
    assert tiers == ["host", "host", "device", "host", "host", "host", "none"]
    assert 0 < swapper.device_bytes <= limit
    swapper.engine.binding.stagings.check_integrity()
    if DEVICE == "cpu":
        assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, sources["dense"]))


def test_prefetched_adapters_come_from_the_device_and_unloaded_ones_do_not(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    sources = adapters(tmp_path, entry)
    _, swapper = attached(entry, sources, DEVICE, cache=hotslot.Cache(device_bytes=1 << 20))
    assert swapper.prefetch("small").result() == "device"
    held = swapper.device_bytes
    assert swapper.activate("small").tier == "device"
    swapper.deactivate()
    swapper.activate("dense")
    swapper.unload("small")
    assert 0 < swapper.device_bytes != held
    swapper.load("small", sources["small"])
    assert swapper.activate("small").tier == "host"


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_backward_pass_over_a_swap_raises(exclusive: bool, tmp_path: Path) -> None:
    """The kernel writes behind torch's back; the version counters have to rise all the same."""
    entry = ZOO["mlp"]
    model, swapper = attached(entry, adapters(tmp_path, entry), DEVICE, exclusive=exclusive)
    swapper.activate("dense")
    assert kernels(swapper, "dense")
    inputs = {name: value.to(DEVICE).requires_grad_() for name, value in entry.inputs().items()}
    for swaps in (False, True):  # the first is the control
        total = entry.read(model(**inputs)).sum()
        if swaps:
            swapper.activate("other")
        with pytest.raises(RuntimeError, match="modified by an inplace operation") if swaps else nullcontext():
            total.backward()


def test_without_room_nothing_is_kept(tmp_path: Path) -> None:
    """The control."""
    entry = ZOO["mlp"]
    _, swapper = attached(entry, adapters(tmp_path, entry), DEVICE)
    assert swapper.prefetch("small").result() == "host"
    assert [swapper.activate(name).tier for name in ("small", "dense", "small")] == ["host"] * 3
    assert swapper.device_bytes == 0


def test_swaps_in_inference_mode_and_out_of_it(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    _, swapper = attached(entry, adapters(tmp_path, entry), DEVICE)
    binding = swapper.engine.binding
    dense, other = (swapper._library.peek(name).compile(binding).writes for name in ("dense", "other"))
    with torch.inference_mode():
        binding.memory.bring(dense)
    binding.memory.bring(other)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_swap_waits_for_nothing(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    _, swapper = attached(entry, adapters(tmp_path, entry), DEVICE)
    for name in ("dense", "small", "dense"):  # the tables are made
        swapper.activate(name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        swapper.activate("small")
        swapper.deactivate()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_swap_is_refused_while_a_graph_is_captured(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    _, swapper = attached(entry, adapters(tmp_path, entry), DEVICE)
    swapper.activate("dense")
    with pytest.raises(hotslot.HotslotError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        swapper.activate("small")
    assert swapper.active == "dense"


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_captured_graph_computes_what_is_live(tmp_path: Path) -> None:
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear).to(DEVICE)
    sources = {}
    from peft import LoraConfig, get_peft_model

    for i, name in enumerate("ab"):
        peft_model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), LoraConfig(r=4 + i, target_modules=["0"]))
        nn.init.normal_(peft_model.base_model.model[0].lora_B["default"].weight)
        peft_model.save_pretrained(str(tmp_path / name))
        sources[name] = tmp_path / name
    swapper = hotslot.attach(model, adapters=sources)
    swapper.activate("a")
    x = torch.randn(3, 64, device=DEVICE)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for name in ("b", "a", None, "b"):
            swapper.activate(name) if name else swapper.deactivate()
            graph.replay()
            assert torch.allclose(out, model(x), rtol=1e-4, atol=1e-5)
