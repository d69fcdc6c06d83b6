"""Every kind of pipeline, and every way in which trainers write LoRA files, swapped through diffusers' own call.

The oracle is plain diffusers: the same file loaded onto a fresh pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotslot
from compiling import Backend
from dialects import DIALECTS, Dialect, sizes_of_the_tiny_flux
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, error
from pipelines import PIPELINES, Kind, load_plain, make_lora

diffusers = pytest.importorskip("diffusers")

# What plain diffusers says of some: of kohya's alphas it applies those whose names it recognises.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The following alpha_pattern keys", "ignore:In CPU autocast", "ignore:.*FluxPosEmbed"
)
Outputs = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers warns of each LoRA that leaves a component out; its Flux converters know one size."""
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity(100)
    with sizes_of_the_tiny_flux(monkeypatch):
        yield
    diffusers.logging.set_verbosity(verbosity)
    hotslot.unpatch_peft()


def fresh_outputs(kind: Kind, source: Path) -> Outputs:
    """What the file does on a fresh pipeline of plain diffusers."""
    hotslot.unpatch_peft()
    pipe = kind.build()
    load_plain(pipe, source)
    return kind.outputs(pipe)


def assert_outputs(got: Outputs, want: Outputs) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_same_output(got[name], want[name])


def swap(pipe: Any, source: Path) -> None:
    pipe.load_lora_weights(source, adapter_name="style", hotswap=True)


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """One of each kind of block: they are what users compile one by one, and whole models take minutes in all."""
    lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList) and len(child)]
    if hasattr(denoiser, "down_blocks"):  # of a unet, convolutions and all, the attention
        lists = [nn.ModuleList([m for m in denoiser.modules() if type(m).__name__ == "BasicTransformerBlock"])]
    return [found[0] for found in lists]


every_kind = pytest.mark.parametrize("kind", PIPELINES.values(), ids=PIPELINES.keys())
every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())


@every_kind
def test_every_pipeline_swaps(kind: Kind, tmp_path: Path) -> None:
    """All components, then the denoiser alone, of another rank and alpha; eager, and compiled with nothing compiled."""
    first = make_lora(kind, tmp_path / "1", seed=1, components=tuple(kind.components), r=3, lora_alpha=5)
    second = make_lora(kind, tmp_path / "2", seed=2, r=2, lora_alpha=3)
    want = {file: fresh_outputs(kind, file) for file in (first, second)}
    base = kind.outputs(kind.build())
    for name in kind.components:
        assert error(want[first][name], base[name]) > 1e-3  # the control: it does something
    hotslot.patch_peft()
    pipe = kind.build()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(first, adapter_name="style")
    for file in (second, first):
        swap(pipe, file)
        assert_outputs(kind.outputs(pipe), want[file])
    denoiser, backend = getattr(pipe, kind.denoiser), Backend()
    for block in blocks(denoiser):
        block.compile(backend=backend, fullgraph=True)
    assert_outputs(kind.outputs(pipe), want[first])
    assert backend.graphs > 0
    with no_recompile(), same_addresses(denoiser):
        for file in (second, first):
            swap(pipe, file)
            assert_outputs(kind.outputs(pipe), want[file])


def written(dialect: Dialect, folder: Path) -> tuple[Path, Path]:
    """A file of diffusers' own, and one of the dialect."""
    plain = make_lora(dialect.kind, folder / "plain", seed=1, r=2, lora_alpha=3)
    return plain, dialect.save(folder / "theirs.safetensors", seed=2)


@every_dialect
def test_every_dialect_swaps(dialect: Dialect, tmp_path: Path) -> None:
    """From a file of diffusers' own to theirs and back."""
    kind = dialect.kind
    plain, theirs = written(dialect, tmp_path)
    want = {file: fresh_outputs(kind, file) for file in (plain, theirs)}
    hotslot.patch_peft()
    pipe = kind.build()
    pipe.load_lora_weights(plain, adapter_name="style")
    for file in (theirs, plain, theirs):
        swap(pipe, file)
        assert_outputs(kind.outputs(pipe), want[file])
