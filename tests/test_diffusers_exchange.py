"""Adapters of another method, or form, by diffusers' own calls: PEFT's layers are exchanged, all or nothing.

The oracle is plain diffusers: the same file loaded onto a fresh pipeline.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hotslot
from compiling import Backend
from hotslot import errors
from hotslot.integrations.diffusers import swapping
from hotslot.pipelines import read, whole
from hotslot.swapper import Swapper
from hotslot.testing import no_recompile, same_addresses
from oracle import Snapshot, assert_unchanged, snapshot
from pipelines import _FLUX, PIPELINES, Kind, _denoiser, _flux2_inputs, _model, make_lokr, make_lora
from test_all_or_nothing import Fault, LineFault, OpFault
from test_diffusers_calls import (
    FLUX,
    FLUX_2,
    _blocks,
    _in_place,
    _wrapped,
    assert_outputs,
    cast_by_layers,
    differ,
    expected,
    fresh,
    loaded,
    models,
    offloaded_as_a_whole,
    patched,
    swap,
)

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:Already unmerged", "ignore:Adapter .* was active"
)

Z_IMAGE = PIPELINES["z-image"]
SOURCES = Path(hotslot.__file__).parent
STEPS = 2  # at how many an exchange is broken off, of each kind: all of the first and 60 of the others passed once
EXCHANGING = [SOURCES / name for name in ("live/exchange.py", "integrations/diffusers/exchanging.py")]
# Each method, and form, after each other one.
ROUND = ("lokr", "decomposed", "lora", "decomposed", "lokr", "wide")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity(100)
    yield
    diffusers.logging.set_verbosity(verbosity)
    hotslot.unpatch_peft()


def write(kind: Kind, folder: Path) -> dict[str, Path]:
    """LoRAs of two ranks, and LoKrs of three forms of factors, two of them of one form."""
    decomposed = {"target_modules": ["to_q", "to_v"], "r": 1, "decompose_both": True, "decompose_factor": 2}
    return {
        "lora": make_lora(kind, folder / "lora", seed=1, r=3, lora_alpha=5),
        "small": make_lora(kind, folder / "small", seed=2, r=2, lora_alpha=7),
        "wide": make_lora(kind, folder / "wide", seed=3, r=6, lora_alpha=3, use_dora=True),
        "lokr": make_lokr(folder / "lokr", seed=4, kind=kind),
        "other lokr": make_lokr(folder / "other", seed=5, kind=kind),
        "decomposed": make_lokr(folder / "decomposed", seed=6, kind=kind, **decomposed),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(FLUX_2, tmp_path_factory.mktemp("flux2"))


def base_tensors(model: nn.Module) -> dict[str, int]:
    """Name → address, of the base model's own."""
    named = model.named_parameters()
    return {
        name.replace(".base_layer", ""): param.data_ptr()
        for name, param in named
        if ".lora_" not in name and ".lokr_" not in name
    }


# -- each step is a fresh load ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FLUX_2, Z_IMAGE], ids=lambda kind: kind.name)
def test_each_follows_each(kind: Kind, tmp_path: Path) -> None:
    """In both pipelines into which diffusers loads LoKr; the base layers stay the same ones."""
    made = write(kind, tmp_path)
    with patched():
        pipe = loaded(kind, made["lora"])
        before = base_tensors(pipe.transformer)
        for name in ROUND if kind is FLUX_2 else ROUND[:3]:
            swap(pipe, made[name])
            assert_outputs(kind.outputs(pipe), expected(kind, made[name]))
        assert base_tensors(pipe.transformer) == before
        pipe.unload_lora_weights()
        assert_outputs(kind.outputs(pipe), expected(kind, None))


@pytest.mark.parametrize(("name", "rank"), [("decomposed", None), ("small", 8)])
def test_all_calls_reach_what_was_put_there(
    name: str, rank: int | None, files: dict[str, Path], tmp_path: Path
) -> None:
    """As they reach what diffusers has loaded; and the next one of the same method is swapped in place."""
    file, base = files[name], expected(FLUX_2, None)
    halved = fresh(FLUX_2, file)
    halved.set_adapters("style", 0.5)
    half = FLUX_2.outputs(halved)
    assert differ(half, expected(FLUX_2, file))
    with patched():
        pipe = loaded(FLUX_2, files["lora" if name == "decomposed" else "lokr"], rank=rank)
        swap(pipe, file)
        assert pipe.get_list_adapters() == {"transformer": ["style"]}
        assert pipe.get_active_adapters() == ["style"]
        assert_outputs(FLUX_2.outputs(pipe, joint_attention_kwargs={"scale": 0.5}), half)
        pipe.set_adapters("style", 0.5)
        assert_outputs(FLUX_2.outputs(pipe), half)
        with same_addresses(pipe.transformer):
            swap(pipe, file)
        assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, file))
        pipe.disable_lora()
        assert_outputs(FLUX_2.outputs(pipe), base)
        pipe.enable_lora()
        pipe.fuse_lora()
        assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, file))
        pipe.unfuse_lora()
        pipe.transformer.save_lora_adapter(tmp_path, adapter_name="style")
        assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, file))
        pipe.delete_adapters("style")
        assert pipe.get_list_adapters() == {}
        assert_outputs(FLUX_2.outputs(pipe), base)
        pipe.load_lora_weights(files["small"], adapter_name="style")
        swap(pipe, files["lokr"])
        assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, files["lokr"]))
    again = FLUX_2.build()
    again.transformer.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert_outputs(FLUX_2.outputs(again), expected(FLUX_2, file))


def test_in_half_precision(files: dict[str, Path]) -> None:
    """In the dtype of a fresh load; and LoKr follows LoKr in place, which it did in float32 alone."""

    def outputs(pipe: Any) -> dict[str, Tensor]:
        pipe.transformer.eval()
        return FLUX_2.outputs(pipe)

    wanted = {}
    for name in (*ROUND, "other lokr"):
        pipe = FLUX_2.build(dtype=torch.bfloat16)
        pipe.load_lora_weights(files[name])
        wanted[name] = outputs(pipe)
    with patched():
        pipe = FLUX_2.build(dtype=torch.bfloat16)
        pipe.load_lora_weights(files["lora"], adapter_name="style")
        for name in ROUND:
            swap(pipe, files[name])
            assert_outputs(outputs(pipe), wanted[name])
            assert {param.dtype for param in pipe.transformer.parameters()} == {torch.bfloat16}
        swap(pipe, files["lokr"])
        with same_addresses(pipe.transformer):
            swap(pipe, files["other lokr"])
        assert_outputs(outputs(pipe), wanted["other lokr"])


def test_what_was_disabled_stays_so(files: dict[str, Path]) -> None:
    with patched():
        pipe = loaded(FLUX_2, files["lora"])
        pipe.disable_lora()
        for name in ("lokr", "decomposed", "small"):
            swap(pipe, files[name])
            assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, None))
        pipe.enable_lora()
        assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, files["small"]))


def test_guarded_forward_passes_stay_guarded(files: dict[str, Path]) -> None:
    with patched():
        pipe = loaded(FLUX_2, files["lora"])
        swap(pipe, files["small"])
        first = Swapper.of(pipe, "style")
        assert first is not None
        first.guard()
        swap(pipe, files["lokr"])
        assert first.detached
        second = Swapper.of(pipe.transformer, "style")
        assert second is not None
        seen: list[bool] = []
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(second.engine.gate.holds_lease))
        FLUX_2.outputs(pipe)
        hook.remove()
        assert seen == [True]


def test_a_swapper_whose_layers_were_exchanged_keeps_its_counts_alone(files: dict[str, Path]) -> None:
    """A collector of metrics may hold it, and show what it holds."""
    with patched():
        pipe = loaded(FLUX_2, files["lora"])
        swap(pipe, files["small"])
        first = Swapper.of(pipe, "style")
        assert first is not None
        binding, changed = weakref.ref(first.engine.binding), first.metrics().changed
        swap(pipe, files["lokr"])
        gc.collect()
        metrics = first.metrics()
        assert binding() is None
        assert (metrics.changed, metrics.adapters, metrics.host_adapters, metrics.host_bytes) == (changed, 0, 0, 0)


def test_one_model_by_itself(files: dict[str, Path]) -> None:
    """`load_lora_adapter`, and calls of the pipeline between them."""
    with patched():
        pipe = loaded(FLUX_2, files["lora"])
        for i, name in enumerate(("small", *ROUND)):
            if i % 2:
                options = {"adapter_name": "style", "hotswap": True, "use_safetensors": True}
                pipe.transformer.load_lora_adapter(files[name], **options)
            else:
                swap(pipe, files[name])
            assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, files[name]))


def test_several_components(tmp_path: Path) -> None:
    """A LoRA for both in the place of a LoKr in one; what came with the LoRA, in text encoder and norms, has gone."""
    lokr = make_lokr(tmp_path / "lokr", seed=1, kind=FLUX)
    both = make_lora(FLUX, tmp_path / "both", seed=2, r=4, components=("transformer", "text_encoder"))
    plain = make_lora(FLUX, tmp_path / "plain", seed=3, r=2) / "pytorch_lora_weights.safetensors"
    normed = tmp_path / "normed.safetensors"
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": 1 + torch.arange(8) / 8}
    save_file(load_file(plain) | norm, normed)
    oracle = FLUX.build()
    oracle.transformer.load_lora_adapter(lokr, use_safetensors=True)
    wanted = FLUX.outputs(oracle)
    assert differ(expected(FLUX, normed), expected(FLUX, plain))
    with patched():
        pipe = loaded(FLUX, both)
        for file in (both, normed, plain):
            swap(pipe, file)
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, file))
            options = {"adapter_name": "style", "hotswap": True, "use_safetensors": True}
            if file is both:  # under one name there would be two methods, one in each
                before = {name: snapshot(model) for name, model in models(FLUX, pipe).items()}
                with pytest.raises(errors.UnsupportedError, match=r"another method in another component(.*\n)*.*LOKR"):
                    pipe.transformer.load_lora_adapter(lokr, **options)
                for name, model in models(FLUX, pipe).items():
                    assert_unchanged(before[name], snapshot(model))
                continue
            pipe.transformer.load_lora_adapter(lokr, **options)
            assert_outputs(FLUX.outputs(pipe), wanted)
            assert pipe.get_list_adapters() == {"transformer": ["style"]}
        swap(pipe, both)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, both))


# -- compiled and offloaded ------------------------------------------------------------------------------------------


SMALL = _denoiser(
    "flux2-small",
    "Flux2Pipeline",
    _model(
        "Flux2Transformer2DModel", **_FLUX | {"axes_dims_rope": (2, 2, 2, 2), "num_single_layers": 0},
        timestep_guidance_channels=16,
    ),
    _flux2_inputs,
)  # fmt: skip


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(SMALL, tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("compile_", [_wrapped, _in_place, _blocks], ids=["torch.compile", ".compile()", "blocks"])
def test_compiled_pipelines_compile_once_more(compile_: Callable[..., None], small_files: dict[str, Path]) -> None:
    """At each exchange, the control; what follows of the same method compiles nothing."""
    files = small_files
    torch._dynamo.reset()
    with patched():
        pipe, backend = loaded(SMALL, files["lora"], rank=8), Backend()
        compile_(pipe, backend)
        assert_outputs(SMALL.outputs(pipe), expected(SMALL, files["lora"]))
        for name, alike in (("lokr", "other lokr"), ("small", "lora"))[: 2 if compile_ is _blocks else 1]:
            graphs = backend.graphs
            swap(pipe, files[name])
            assert_outputs(SMALL.outputs(pipe), expected(SMALL, files[name]))
            assert backend.graphs > graphs
            with no_recompile(), same_addresses(models(SMALL, pipe)["transformer"]):
                swap(pipe, files[alike])
                assert_outputs(SMALL.outputs(pipe), expected(SMALL, files[alike]))
        with no_recompile():  # what was compiled for it is there still
            for name in ("decomposed", "lokr"):
                swap(pipe, files[name])
            assert_outputs(SMALL.outputs(pipe), expected(SMALL, files["lokr"]))


def offloaded_by_groups(pipe: Any) -> None:
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [offloaded_as_a_whole, cast_by_layers, offloaded_by_groups])
def test_offloaded_pipelines(offload: Callable[[Any], None], files: dict[str, Path]) -> None:
    names = ("lokr", "small")
    wanted = {}
    for name in names:
        pipe = fresh(FLUX_2, files[name])
        offload(pipe)
        with torch.no_grad():
            wanted[name] = pipe.transformer(**FLUX_2.inputs["transformer"]()).sample
    with patched():
        pipe = loaded(FLUX_2, files["lora"])
        offload(pipe)
        for name in names:
            swap(pipe, files[name])
            with torch.no_grad():
                got = pipe.transformer(**FLUX_2.inputs["transformer"]()).sample
            assert_outputs({"": got}, {"": wanted[name]})


# -- what is refused, and what fails ---------------------------------------------------------------------------------


def everything(pipe: Any) -> tuple[Snapshot, dict[str, Any]]:
    """What a user can see of the model, of the adapter on it, and of who writes it."""
    model = models(FLUX_2, pipe)["transformer"]
    rest: dict[str, Any] = {"hooks": sum(len(module._state_dict_hooks) for module in model.modules())}
    for holder in (pipe, pipe.transformer):
        swapper = Swapper.of(holder, "style")
        rest[type(holder).__name__] = swapper and (id(swapper), swapper.active, swapper.version, swapper.detached)
    for path, module in model.named_modules():
        for record in ("r", "alpha", "scaling", "_disable_adapters"):
            if hasattr(module, record):
                rest[f"{path}.{record}"] = repr(getattr(module, record))
    return snapshot(model), rest | {"lists": pipe.get_list_adapters(), "loaded": model._hf_peft_config_loaded}


def assert_untouched(before: tuple[Snapshot, dict[str, Any]], pipe: Any) -> None:
    now = everything(pipe)
    assert_unchanged(before[0], now[0])
    assert before[1] == now[1]


def _beside(pipe: Any, files: dict[str, Path]) -> None:
    pipe.load_lora_weights(files["small"], adapter_name="another")


def _fused(pipe: Any, files: dict[str, Path]) -> None:
    pipe.fuse_lora()


def _compiled_by_itself(pipe: Any, files: dict[str, Path]) -> None:
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.to_q = torch.compile(attention.to_q, backend="eager")


REFUSED: dict[str, tuple[Callable[..., None], str]] = {
    "beside another": (_beside, "'another' on the same model"),
    "fused": (_fused, r"merged(.*\n)*.*unfuse_lora"),
    "a layer compiled by itself": (_compiled_by_itself, "compiled by itself"),
}


@pytest.mark.parametrize("first", ["lora", "lokr"])
@pytest.mark.parametrize(("prepare", "said"), REFUSED.values(), ids=list(REFUSED))
@pytest.mark.filterwarnings("ignore:.*Dynamo detected")
def test_what_cannot_be_exchanged_is_refused_with_nothing_touched(
    prepare: Callable[..., None], said: str, first: str, files: dict[str, Path]
) -> None:
    """By name; of LoRA after a first swap, of LoKr before it."""
    with patched():
        pipe = loaded(FLUX_2, files[first])
        if first == "lora":
            swap(pipe, files[first])
        prepare(pipe, files)
        want, before = FLUX_2.outputs(pipe), everything(pipe)
        with pytest.raises(errors.HotslotError, match=said):
            swap(pipe, files["decomposed"])
        assert_untouched(before, pipe)
        assert_outputs(FLUX_2.outputs(pipe), want)


def test_slots_that_users_hold_are_not_exchanged(files: dict[str, Path]) -> None:
    """Their swapper would be left without a slot."""
    with patched():
        pipe = FLUX_2.build()
        swapper = hotslot.attach(pipe, {"a": files["lora"]}, adapter_name="style", route="side")
        swapper.activate("a")
        before = everything(pipe)
        with pytest.raises(errors.UnsupportedError, match="another method"):
            swap(pipe, files["lokr"])
        assert_untouched(before, pipe)
        assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, files["lora"]))


def test_fused_projections_are_not_made_by_the_way(files: dict[str, Path], tmp_path: Path) -> None:
    """diffusers replaces layers of the base for such a LoKr; where it has, they swap."""
    pipe = FLUX_2.build()
    pipe.transformer.fuse_qkv_projections()
    targets, model = ["attn.to_qkv"], pipe.transformer
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoKrConfig(target_modules=targets, init_weights=False), model, "default")
    tensors = peft.get_peft_model_state_dict(model, adapter_name="default")
    fused = {f"transformer.{name}": tensor.detach().clone() for name, tensor in tensors.items()}
    again = FLUX_2.build()
    again.load_lora_weights(dict(fused))
    wanted = FLUX_2.outputs(again)
    with patched():
        pipe = loaded(FLUX_2, files["lora"])
        before = everything(pipe)
        with pytest.raises(errors.UnexpectedTargetError, match=r"to_qkv(.*\n)*.*without hotswap"):
            swap(pipe, fused)
        assert_untouched(before, pipe)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(dict(fused), adapter_name="style")
        swap(pipe, fused)
        assert_outputs(FLUX_2.outputs(pipe), wanted)


class CallFault(LineFault):
    """At a line that runs in what exchanges layers, above the engine, for the first time.

    Python runs the line of a `with` again on leaving it; who raises there leaves the gate locked.
    """

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        return self._line if Path(code.co_filename) in EXCHANGING or code.co_name == "superseded" else None


INJECTORS: dict[str, Callable[[int], Any]] = {
    "a line that exchanges": lambda k: CallFault(k, KeyboardInterrupt),
    "a line of the engine": lambda k: LineFault(k, KeyboardInterrupt),
    "amid an operation": lambda k: OpFault(k, Fault, "amid"),
}


def test_an_exchange_that_fails_leaves_the_running_one_live(files: dict[str, Path]) -> None:
    """At whatever step: the same layers, values, records and swapper, and the next swap succeeds."""
    walk = ("lora", "lokr", "lora")
    with patched():
        pipe = loaded(FLUX_2, files["lora"])
        for name in walk[1:]:  # what is known of families is known from here on
            swap(pipe, files[name])
        for first, second in pairwise(walk):
            checkpoint = read(whole(pipe), files[second])
            for injector in INJECTORS.values():
                with injector(0) as counted:
                    swapping.swap(pipe, checkpoint, "style", ())
                swap(pipe, files[first])
                before = everything(pipe)
                for k in some(counted):
                    with (
                        pytest.raises((Fault, KeyboardInterrupt, RuntimeError)),
                        injector(k),
                    ):  # torch puts it in its own
                        swapping.swap(pipe, checkpoint, "style", ())
                    assert_untouched(before, pipe)
                assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, files[first]))
            swap(pipe, files[second])
            assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, files[second]))


def some(counted: Any) -> list[int]:
    """A few of the steps: the first times that lines or operations run, and but for `CallFault` the last times."""
    steps = counted.steps
    firsts = {steps[k - 1]: k for k in range(len(steps), 0, -1)}
    lasts = {} if isinstance(counted, CallFault) else {step: k for k, step in enumerate(steps, 1)}
    numbers = sorted({*firsts.values(), *lasts.values()})
    return sorted(Random(len(numbers)).sample(numbers, min(STEPS, len(numbers))))
