"""Flux's control LoRAs: norms in the place of the model's own, and an x_embedder with more inputs.

The oracle is plain diffusers: the same file loaded onto a fresh pipeline, the model's own weights compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hotslot
from compiling import Backend
from dialects import DIALECTS, sizes_of_the_tiny_flux
from hotslot import errors
from hotslot.integrations.diffusers import patching as patched_calls
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output
from pipelines import _FLUX, PIPELINES, Kind, _denoiser, _model, load_plain, make_lora
from test_all_or_nothing import Fault, LineFault, OpFault, chosen

diffusers = pytest.importorskip("diffusers")

FLUX = PIPELINES["flux"]
NORMS = ("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")
KEPT = "_transformer_norm_layers"

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:Already unmerged", "ignore:Adapter .* was active"
)


def wide_inputs() -> dict[str, Any]:
    """Of a transformer that sees the control image beside the latents."""
    inputs = FLUX.inputs["transformer"]()
    return inputs | {"hidden_states": torch.cat([inputs["hidden_states"], inputs["hidden_states"].flip(1)], -1)}


WIDE = _denoiser(
    "flux-control",
    "FluxControlPipeline",
    _model(
        "FluxTransformer2DModel", **_FLUX | {"in_channels": 16}, out_channels=8, pooled_projection_dim=16,
        guidance_embeds=True,
    ),
    wide_inputs,
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity(100)
    with sizes_of_the_tiny_flux(monkeypatch):
        yield
    diffusers.logging.set_verbosity(verbosity)
    hotslot.unpatch_peft()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two control LoRAs as Black Forest Labs writes them, one as diffusers' trainer does, and two that are none."""
    folder = tmp_path_factory.mktemp("control")
    bfl = DIALECTS["flux: bfl_control"]
    made = {f"control {seed}": bfl.save(folder / f"{seed}.safetensors", seed=seed) for seed in (1, 2)}
    for name, seed, r in (("plain", 3, 2), ("other", 4, 3)):
        made[name] = make_lora(FLUX, folder / name, seed=seed, r=r, lora_alpha=5) / "pytorch_lora_weights.safetensors"
    norms = {f"transformer.transformer_blocks.0.attn.{name}": 1 + torch.arange(8) / 8 for name in NORMS[:2]}
    made["trained"] = folder / "trained.safetensors"
    save_file(load_file(made["other"]) | norms, made["trained"])
    return made


def wide_of(path: Path, folder: Path) -> Path:
    """The same control LoRA for twice as many inputs, as those of Black Forest Labs are."""
    tensors, name = load_file(path), "img_in.lora_A.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name].flip(0)], 1)
    wide = folder / f"wide {path.name}"
    save_file(tensors, wide)
    return wide


class Want(NamedTuple):
    """What plain diffusers makes of a pipeline: outputs by component, norms, and what it has kept of others."""

    outputs: dict[str, Tensor]
    norms: dict[str, Tensor]
    kept: dict[str, Tensor]


_wanted: dict[str, Want] = {}


def wanted(kind: Kind, *sources: Path, dtype: torch.dtype = torch.float32) -> Want:
    """Of a fresh pipeline with these LoRAs."""
    key = f"{kind.name} {dtype} {sources}"
    if key not in _wanted:
        pipe = fresh(kind, *sources, dtype=dtype)
        _wanted[key] = Want(kind.outputs(pipe), norms_of(pipe), dict(getattr(pipe.transformer, KEPT, None) or {}))
    return _wanted[key]


def fresh(kind: Kind, *sources: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline onto which plain diffusers has loaded these, the first as "style"."""
    assert not patched_calls._patched
    pipe = kind.build(dtype=dtype)
    for name, source in zip(("style", "beside"), sources, strict=False):
        load_plain(pipe, source, name)
    if len(sources) > 1:
        pipe.set_adapters(["style", "beside"])
    for name in kind.components:
        getattr(pipe, name).eval().requires_grad_(False)
    return pipe


def norms_of(pipe: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in pipe.transformer.state_dict().items() if key.endswith(NORMS)}


def assert_is(kind: Kind, pipe: Any, want: Want, *, kept: bool = True) -> None:
    """The pipeline computes what the fresh one does, with its norms, and diffusers finds there what it would undo."""
    got = kind.outputs(pipe)
    for name, output in want.outputs.items():
        assert_same_output(got[name], output)
    assert_equal(norms_of(pipe), want.norms)
    if kept:
        assert_equal(getattr(pipe.transformer, KEPT, None) or {}, want.kept)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def make_live(swapper: hotslot.Swapper, name: str | None) -> None:
    swapper.activate(name) if name else swapper.deactivate()


def swap(pipe: Any, source: Any, name: str = "style") -> None:
    pipe.load_lora_weights(source, adapter_name=name, hotswap=True)


@contextmanager
def patched() -> Iterator[None]:
    hotslot.patch_peft()
    yield
    hotslot.unpatch_peft()


ORDER = ("control 1", "plain", "control 2", "control 1", "trained", "plain")


def test_norms_are_swapped_with_their_lora(files: dict[str, Path]) -> None:
    """By a Swapper, from any to any and to none, compiled once and at the same addresses."""
    base, want = wanted(FLUX), {name: wanted(FLUX, path) for name, path in files.items()}
    assert not any(torch.equal(value, base.norms[name]) for name, value in want["control 1"].norms.items())
    pipe, backend = FLUX.build(), Backend()
    swapper = hotslot.attach(pipe, adapters=files)
    pipe.transformer.transformer_blocks[0].compile(backend=backend, fullgraph=True)
    FLUX.outputs(pipe)
    with no_recompile(), same_addresses(pipe.transformer):
        for name in ORDER:
            swapper.activate(name)
            assert_is(FLUX, pipe, want[name])
        with swapper.using("control 2"):
            assert_is(FLUX, pipe, want["control 2"])
        swapper.rollback()
        assert_is(FLUX, pipe, want["control 2"])
        swapper.deactivate()
        assert_is(FLUX, pipe, base)
    assert backend.graphs
    swapper.activate("control 1")
    swapper.detach()
    assert_is(FLUX, pipe, base)
    assert not hasattr(pipe.transformer, KEPT)


@pytest.mark.parametrize("first", ["control 1", "plain"])
def test_load_lora_weights_swaps_norms(first: str, files: dict[str, Path]) -> None:
    """Onto what diffusers has loaded, a control LoRA or none; and its own calls take the norms back."""
    base, want = wanted(FLUX), {name: wanted(FLUX, path) for name, path in files.items()}
    with patched():
        pipe = FLUX.build()
        pipe.load_lora_weights(files[first], adapter_name="style")
        for name in ORDER:
            swap(pipe, files[name])
            assert_is(FLUX, pipe, want[name])
        swap(pipe, files["control 2"])
        pipe.fuse_lora()
        with pytest.raises(errors.MergedError):
            swap(pipe, files["plain"])
        assert_equal(norms_of(pipe), want["control 2"].norms)
        pipe.unfuse_lora()  # by which diffusers puts the norms back, too
        assert_equal(norms_of(pipe), base.norms)
        swap(pipe, files["control 1"])
        assert_is(FLUX, pipe, want["control 1"])
        pipe.unload_lora_weights()
        assert_is(FLUX, pipe, base)


def test_norms_that_came_with_the_pipeline(files: dict[str, Path]) -> None:
    """They are its adapter's: gone with it, and back with `rollback` and `detach`, to the bit."""
    base, want = wanted(FLUX), {name: wanted(FLUX, path) for name, path in files.items()}
    pipe = fresh(FLUX, files["control 1"])
    swapper = hotslot.attach(pipe, {name: files[name] for name in ("plain", "control 2")}, adapter_name="style")
    assert_is(FLUX, pipe, want["control 1"])
    swapper.activate("plain")
    assert_is(FLUX, pipe, want["plain"])
    swapper.rollback()
    assert_is(FLUX, pipe, want["control 1"])
    swapper.activate("control 2")
    assert_is(FLUX, pipe, want["control 2"])
    swapper.deactivate()
    assert_is(FLUX, pipe, base)
    swapper.detach()
    assert_is(FLUX, pipe, want["control 1"])
    pipe.unload_lora_weights()
    assert_is(FLUX, pipe, base)


def test_norms_under_sequential_offloading_are_refused_with_nothing_touched(files: dict[str, Path]) -> None:
    """What is written into them would be gone; the plain LoRA swaps."""
    from accelerate import cpu_offload

    pipe, want = FLUX.build(), wanted(FLUX, files["plain"])
    cpu_offload(pipe.transformer, torch.device("cpu"))
    before = FLUX.outputs(pipe)
    with pytest.raises(errors.ModelError, match="offloaded layer by layer"):
        hotslot.attach(pipe, {name: files[name] for name in ("plain", "control 1")})
    assert_equal(FLUX.outputs(pipe), before)
    swapper = hotslot.attach(pipe, {"plain": files["plain"]})
    swapper.activate("plain")
    with pytest.raises(errors.HotslotError):
        swapper.load("control 1", files["control 1"])
    assert_same_output(FLUX.outputs(pipe)["transformer"], want.outputs["transformer"])


@pytest.mark.parametrize(
    "injector",
    [lambda k: LineFault(k, KeyboardInterrupt), lambda k: OpFault(k, Fault, "amid")],
    ids=["interrupted at a line", "failing amid an operation"],
)
@pytest.mark.parametrize("target", ["control 2", "plain", None])
def test_a_swap_of_norms_that_breaks_off_changes_nothing(
    injector: Callable[[int], Any], target: str | None, files: dict[str, Path]
) -> None:
    names = ("control 1", "control 2", "plain")
    want = wanted(FLUX, *([files[target]] if target else []))
    pipe = fresh(FLUX, files["control 1"])
    swapper = hotslot.attach(pipe, {name: files[name] for name in names}, adapter_name="style")
    swapper.activate("control 1")
    make_live(swapper, target)
    swapper.activate("control 1")
    with injector(0) as dry:
        make_live(swapper, target)
    swapper.activate("control 1")

    def state() -> dict[str, Tensor]:
        kept = {f"kept {key}": value for key, value in getattr(pipe.transformer, KEPT).items()}
        return {key: value.clone() for key, value in pipe.transformer.state_dict().items()} | kept

    before, numbers = state(), chosen(dry.steps)
    for k in numbers[:: max(1, len(numbers) // 12)]:
        with pytest.raises((KeyboardInterrupt, Fault)), injector(k):
            make_live(swapper, target)
        assert_equal(state(), before)
        assert swapper.active == "control 1"
    make_live(swapper, target)
    assert_is(FLUX, pipe, want)


def test_norms_are_merged_with_their_lora(files: dict[str, Path]) -> None:
    pipe = FLUX.build()
    base = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    swapper = hotslot.attach(pipe, files, route="merged")
    for name in ORDER:
        swapper.activate(name)
        assert_is(FLUX, pipe, wanted(FLUX, files[name]), kept=False)
    swapper.deactivate()
    assert_equal(pipe.transformer.state_dict(), base)


def test_in_half_precision(files: dict[str, Path]) -> None:
    pipe = FLUX.build(dtype=torch.bfloat16)
    swapper = hotslot.attach(pipe, files)
    for name in ("control 1", "plain", None, "trained"):
        make_live(swapper, name)
        assert_is(FLUX, pipe, wanted(FLUX, *([files[name]] if name else []), dtype=torch.bfloat16))


# -- beside other LoRAs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["style", "beside"])
def test_a_lora_beside_a_control_lora_leaves_its_norms(first: str, files: dict[str, Path]) -> None:
    """Either is swapped, and the norms go with the one that has brought them."""
    pairs = [("control 1", "other"), ("control 2", "other"), ("plain", "other"), ("control 1", "plain")]
    want = [wanted(FLUX, *(files[name] for name in pair)) for pair in pairs]
    with patched():
        pipe = FLUX.build()
        loaded = {"style": files["control 1"], "beside": files["plain"]}
        for name in sorted(loaded, key=lambda name: name != first):
            pipe.load_lora_weights(loaded[name], adapter_name=name)
        pipe.set_adapters(["style", "beside"])
        for (style, beside), one in zip(pairs, want, strict=True):
            swap(pipe, files[beside], "beside")
            swap(pipe, files[style], "style")
            assert_is(FLUX, pipe, one)


def test_nobody_knows_whose_the_norms_are(files: dict[str, Path]) -> None:
    """Of two that diffusers has loaded before hotslot came; a third one is swapped beside them."""
    pipe = fresh(FLUX, files["control 1"], files["plain"])
    before = norms_of(pipe)
    for name in ("style", "beside"):
        with pytest.raises(errors.UnsupportedError, match="one of 'beside', 'style'"):
            hotslot.attach(pipe, {"other": files["other"]}, adapter_name=name)
        assert_equal(norms_of(pipe), before)
        assert hotslot.Swapper.of(pipe, name) is None
    swapper = hotslot.attach(pipe, {"other": files["other"]})
    swapper.activate("other")
    assert_equal(norms_of(pipe), before)


def test_norms_of_two_at_a_time_are_refused(files: dict[str, Path]) -> None:
    pipe = FLUX.build()
    first = hotslot.attach(pipe, {"a": files["control 1"]}, adapter_name="first")
    second = hotslot.attach(pipe, {"b": files["control 2"]}, adapter_name="second")
    first.activate("a")
    with pytest.raises(errors.ModelError, match="norms of one LoRA at a time"):
        second.activate("b")
    assert_equal(norms_of(pipe), wanted(FLUX, files["control 1"]).norms)
    first.deactivate()
    second.activate("b")
    assert_equal(norms_of(pipe), wanted(FLUX, files["control 2"]).norms)
    second.deactivate()
    assert_equal(norms_of(pipe), wanted(FLUX).norms)


def test_norms_are_not_blended(files: dict[str, Path]) -> None:
    pipe = FLUX.build()
    swapper = hotslot.attach(pipe, files, plan=hotslot.plan(pipe, files))
    swapper.activate("control 1")
    for weights in ({"control 1": 0.5}, {"control 1": 1.0, "plain": 0.5}):
        with pytest.raises(errors.UnsupportedError, match="blended"):
            swapper.activate(weights)
        assert_is(FLUX, pipe, wanted(FLUX, files["control 1"]))


# -- x_embedder ------------------------------------------------------------------------------------------------------


def test_wide_control_loras_swap_on_a_wide_transformer(files: dict[str, Path], tmp_path: Path) -> None:
    """LoRAs of the narrow one, too: there diffusers puts zeros beside them."""
    narrow, x_embedder = tmp_path / "narrow.safetensors", "transformer.x_embedder.lora_"
    added = {f"{x_embedder}A.weight": torch.ones(2, 8), f"{x_embedder}B.weight": torch.ones(16, 2)}
    save_file(load_file(files["plain"]) | added, narrow)
    sources = {f"wide {i}": wide_of(files[f"control {i}"], tmp_path) for i in (1, 2)} | {"narrow": narrow}
    pipe = WIDE.build()
    swapper = hotslot.attach(pipe, sources)
    for name in ("wide 1", "narrow", "wide 2", None):
        make_live(swapper, name)
        assert_is(WIDE, pipe, wanted(WIDE, *([sources[name]] if name else [])))


def test_a_wider_x_embedder_is_refused_by_name(files: dict[str, Path], tmp_path: Path) -> None:
    """diffusers would give the transformer another layer; its config, which says how wide it is, stays as it was."""
    wide, want = wide_of(files["control 1"], tmp_path), wanted(FLUX, files["plain"])
    pipe = FLUX.build()
    swapper = hotslot.attach(pipe, {"plain": files["plain"]})
    swapper.activate("plain")
    with same_addresses(pipe.transformer):
        with pytest.raises(
            errors.ShapeError, match=r"where: transformer\.x_embedder\n.*16.*\n.*8.*\n.*load_lora_weights"
        ):
            swapper.load("wide", wide)
        with pytest.raises(errors.ShapeError, match=r"transformer\.x_embedder"):
            hotslot.attach(FLUX.build(), {"wide": wide})
        with patched(), pytest.raises(errors.ShapeError, match=r"transformer\.x_embedder"):
            pipe.load_lora_weights(wide, adapter_name="default", hotswap=True)
    assert pipe.transformer.config.in_channels == 8
    assert_is(FLUX, pipe, want)


def test_where_diffusers_has_widened_it_wide_ones_swap(files: dict[str, Path], tmp_path: Path) -> None:
    """As the refusal says: the first is loaded by diffusers, without hotswap."""
    sources = [wide_of(files[f"control {i}"], tmp_path) for i in (1, 2)]

    def output(pipe: Any) -> Tensor:
        with torch.no_grad():
            return pipe.transformer(**wide_inputs()).sample

    want = {}
    for source in (*sources, files["plain"]):
        oracle = fresh(FLUX, sources[0])
        oracle.unload_lora_weights()
        load_plain(oracle, source)
        oracle.transformer.eval().requires_grad_(False)
        want[source] = output(oracle), norms_of(oracle)
    with patched():
        pipe = FLUX.build()
        pipe.load_lora_weights(sources[0], adapter_name="style")
        for source in (*reversed(sources), files["plain"]):
            swap(pipe, source)
            assert_same_output(output(pipe), want[source][0])
            assert_equal(norms_of(pipe), want[source][1])
