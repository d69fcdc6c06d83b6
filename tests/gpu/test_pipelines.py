"""Pipelines that offload to a GPU, or are compiled with CUDA graphs, swapped through both ways in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

import hotslot  # noqa: E402
from hotslot import errors  # noqa: E402
from hotslot.testing import no_recompile, same_addresses  # noqa: E402
from pipelines import PIPELINES, load_plain, make_lora  # noqa: E402

FLUX = PIPELINES["flux"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    every = tuple(FLUX.components)
    return [make_lora(FLUX, folder / str(seed), seed=seed, components=every, r=3) for seed in (1, 2)]


def output(pipe: Any) -> torch.Tensor:
    inputs = FLUX.inputs["transformer"]()
    with torch.no_grad():
        given = {key: value.cuda() for key, value in inputs.items()}
        return pipe.transformer(**given, return_dict=False)[0].clone().cpu()


def fresh(file: Path) -> torch.Tensor:
    pipe = FLUX.build()
    load_plain(pipe, file)
    return output(pipe.to("cuda"))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_model_offload_swaps_and_keeps_its_hooks(files: list[Path]) -> None:
    wanted = [fresh(file) for file in files]
    assert not torch.allclose(*wanted, atol=1e-2)  # the control
    pipe = FLUX.build()
    swapper = hotslot.attach(pipe, dict(zip("ab", files, strict=True)))
    pipe.enable_model_cpu_offload()
    for name, want in (*zip("ab", wanted, strict=True), ("a", wanted[0])):
        swapper.activate(name)
        assert_close(output(pipe), want)
        with pytest.raises(errors.HotslotError):
            swapper.load("bad", {"transformer.nothing.lora_A.weight": torch.ones(2, 2)})
        assert hasattr(pipe.transformer, "_hf_hook")


@pytest.mark.parametrize("order", ["attach, offload", "offload, attach", "patch_peft"])
def test_sequential_offload_swaps_on_the_gpu_and_touches_no_hook(order: str, files: list[Path]) -> None:
    """The slots come to the GPU whenever the offloading begins, and go back with the hooks."""
    wanted = dict(zip("ab", [fresh(file) for file in files], strict=True))
    sources = dict(zip("ab", files, strict=True))
    pipe = FLUX.build()
    if order == "offload, attach":
        pipe.enable_sequential_cpu_offload()
    if order == "patch_peft":
        hotslot.patch_peft()
        pipe.load_lora_weights(files[0], adapter_name="style")
    else:
        swapper = hotslot.attach(pipe, sources)
        swapper.activate("a")
    if order != "offload, attach":
        pipe.enable_sequential_cpu_offload()

    def hooks() -> dict[str, int]:
        return {name: id(m._hf_hook) for name, m in pipe.transformer.named_modules() if hasattr(m, "_hf_hook")}

    try:
        assert_close(output(pipe), wanted["a"])
        for name in ("b", "a", "b"):
            before = hooks()
            if order == "patch_peft":
                pipe.load_lora_weights(sources[name], adapter_name="style", hotswap=True)
            else:
                swapper.activate(name)
            assert hooks() == before or order == "patch_peft"
            assert_close(output(pipe), wanted[name])
            params = dict(pipe.transformer.named_parameters())
            assert {param.device.type for key, param in params.items() if "lora_" in key} == {"cuda"}
            assert {param.device.type for key, param in params.items() if "lora_" not in key} == {"meta"}
        pipe.remove_all_hooks()
        assert {param.device.type for param in pipe.transformer.parameters()} == {"cpu"}
        with torch.no_grad():
            assert_close(pipe.transformer(**FLUX.inputs["transformer"](), return_dict=False)[0], wanted["b"])
        pipe.enable_sequential_cpu_offload()
        assert_close(output(pipe), wanted["b"])
    finally:
        hotslot.unpatch_peft()


def test_swaps_under_cuda_graphs_compile_nothing(files: list[Path]) -> None:
    wanted = [fresh(file) for file in files]
    pipe = FLUX.build().to("cuda")
    sources = dict(zip("ab", files, strict=True))
    swapper = hotslot.attach(pipe, sources, plan=hotslot.plan(pipe, sources, max_blend=1))
    pipe.transformer.compile(mode="reduce-overhead")
    swapper.activate("a")
    for _ in range(4):
        output(pipe)
    with no_recompile(), same_addresses(pipe.transformer):
        for name, want in (*zip("ab", wanted, strict=True), ("a", wanted[0])):
            swapper.activate(name)
            assert_close(output(pipe), want)
