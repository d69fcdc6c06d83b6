"""The LoRA calls that users of diffusers make, after `hotslot.patch_peft()`: each does what it says.

The oracle is plain diffusers: the same LoRA loaded onto a fresh pipeline. Where plain diffusers does it wrong, the test
shows that first, on a pipeline of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hotslot
from compiling import Backend
from hotslot import errors
from hotslot.integrations import diffusers as patched_calls
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, error, snapshot
from pipelines import ATTENTION, PIPELINES, Kind, load_plain, lora_tensors, make_lora

diffusers = pytest.importorskip("diffusers")

SD, FLUX, WAN = PIPELINES["sd"], PIPELINES["flux"], PIPELINES["wan22"]
BOTH = ("unet", "text_encoder")
FEED_FORWARD = {"unet": ("ff.net.2",)}
Outputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """diffusers warns of LoRAs that leave a component out, and logs what it then raises."""
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity(100)
    yield
    diffusers.logging.set_verbosity(verbosity)
    hotslot.unpatch_peft()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a LoRA file, each once: `lora(kind, seed=…, …)` as `make_lora`."""
    made: dict[str, Path] = {}

    def write(kind: Kind = SD, **config: Any) -> Path:
        key = f"{kind.name} {sorted(config.items(), key=str)}"
        if key not in made:
            options = {"r": 3, "lora_alpha": 5, **config}
            made[key] = make_lora(kind, tmp_path_factory.mktemp("lora"), **options)
        return made[key]

    return write


@contextmanager
def patched() -> Iterator[None]:
    hotslot.patch_peft()
    try:
        yield
    finally:
        hotslot.unpatch_peft()


_expected: dict[tuple[str, str], Outputs] = {}


def fresh(kind: Kind, source: Any) -> Any:
    """A pipeline with the LoRA, as plain diffusers loads it; its dropouts, which it leaves at work, at rest."""
    assert not patched_calls._patched
    pipe = kind.build()
    load_plain(pipe, source)
    for name in kind.components:
        getattr(pipe, name).eval()
    return pipe


def expected(kind: Kind, source: Path | None) -> Outputs:
    """What a fresh load computes; None: what the base does."""
    key = (kind.name, str(source))
    if key not in _expected:
        with _unpatched():
            _expected[key] = kind.outputs(kind.build() if source is None else fresh(kind, source))
    return _expected[key]


@contextmanager
def _unpatched() -> Iterator[None]:
    was = bool(patched_calls._patched)
    hotslot.unpatch_peft()
    yield
    if was:
        hotslot.patch_peft()


def assert_outputs(got: Outputs, want: Outputs) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_same_output(got[name], want[name])


def differ(got: Outputs, want: Outputs) -> bool:
    return max(error(got[name], want[name]) for name in want) > 1e-3


def swap(pipe: Any, source: Any, name: str = "style", **options: Any) -> None:
    pipe.load_lora_weights(source, adapter_name=name, hotswap=True, **options)


def loaded(kind: Kind, source: Any, *, rank: int | None = None, name: str = "style") -> Any:
    """A pipeline that a user has loaded a LoRA onto."""
    pipe = kind.build()
    if rank is not None:
        pipe.enable_lora_hotswap(target_rank=rank)
    pipe.load_lora_weights(source, adapter_name=name)
    return pipe


def models(kind: Kind, pipe: Any) -> dict[str, nn.Module]:
    plain = {name: getattr(pipe, name) for name in kind.components}
    return {name: getattr(model, "_orig_mod", model) for name, model in plain.items()}


def today(kind: Kind, first: Any, second: Any, **options: Any) -> Outputs | None:
    """What plain diffusers computes after a swap; None if it refuses."""
    assert not patched_calls._patched
    pipe = loaded(kind, first, **options)
    try:
        swap(pipe, second)
    except (RuntimeError, ValueError):
        return None
    return kind.outputs(pipe)


# -- the calls, one by one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 8], ids=["unprepared", "prepared"])
def test_load_lora_weights_with_hotswap(rank: int | None, lora: Callable[..., Path]) -> None:
    """Other values, ranks, alphas; from a folder, a file in it, a path, a dict."""
    files = [lora(seed=1), lora(seed=2, r=2, lora_alpha=7), lora(seed=3, r=5), lora(seed=4, metadata=False)]
    with patched():
        pipe = loaded(SD, files[0], rank=rank)
        for file in (*files[1:], *files):
            swap(pipe, str(file))
            assert_outputs(SD.outputs(pipe), expected(SD, file))
        name = "pytorch_lora_weights.safetensors"
        swap(pipe, str(files[1]), weight_name=name)
        assert_outputs(SD.outputs(pipe), expected(SD, files[1]))
        swap(pipe, files[2] / name)
        assert_outputs(SD.outputs(pipe), expected(SD, files[2]))


def test_load_lora_weights_with_hotswap_wants_an_adapter_that_is_there(lora: Callable[..., Path]) -> None:
    """In diffusers' words."""
    with patched():
        pipe = loaded(SD, lora(seed=1))
        with pytest.raises(ValueError, match="there is no existing adapter by that name"):
            swap(pipe, lora(seed=2), name="other")
        with pytest.raises(ValueError, match="there is no existing adapter by that name"):
            pipe.unet.load_lora_adapter(lora(seed=2), prefix="unet", adapter_name="other", hotswap=True)
        assert_outputs(SD.outputs(pipe), expected(SD, lora(seed=1)))


def test_enable_lora_hotswap(lora: Callable[..., Path]) -> None:
    """Room for every adapter that is loaded from then on, and in text encoders; today for one, in the unet alone."""

    def ranks(pipe: Any, name: str) -> set[int]:
        found = {}
        for model in models(SD, pipe).values():
            found.update({key: p.shape[0] for key, p in model.named_parameters() if f"lora_A.{name}" in key})
        return set(found.values())

    first, second = lora(seed=1), lora(seed=2, components=BOTH)

    def prepared() -> Any:
        pipe = loaded(SD, first, rank=8)
        pipe.load_lora_weights(second, adapter_name="detail")
        return pipe

    pipe = prepared()
    assert (ranks(pipe, "style"), ranks(pipe, "detail")) == ({8}, {3})  # the control
    with patched():
        pipe = prepared()
        assert (ranks(pipe, "style"), ranks(pipe, "detail")) == ({8}, {8})
        with same_addresses(pipe.unet), same_addresses(pipe.text_encoder):
            swap(pipe, lora(seed=3, r=8, components=BOTH), name="detail")
            swap(pipe, lora(seed=4, r=5), name="style")
        pipe.set_adapters("style")
        assert_outputs(SD.outputs(pipe), expected(SD, lora(seed=4, r=5)))
        pipe.set_adapters("detail")
        assert_outputs(SD.outputs(pipe), expected(SD, lora(seed=3, r=8, components=BOTH)))


def test_enable_lora_hotswap_checks_as_diffusers_does(lora: Callable[..., Path]) -> None:
    with patched():
        pipe = loaded(SD, lora(seed=1))
        with pytest.raises(RuntimeError, match="before loading the first adapter"):
            pipe.enable_lora_hotswap(target_rank=8)
        pipe.enable_lora_hotswap(target_rank=8, check_compiled="ignore")  # and makes room all the same
        with same_addresses(pipe.unet):
            swap(pipe, lora(seed=3, r=5))
        assert_outputs(SD.outputs(pipe), expected(SD, lora(seed=3, r=5)))
        pipe = SD.build()
        pipe.enable_lora_hotswap(target_rank=8)
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        with pytest.raises(ValueError, match="before"):
            pipe.load_lora_weights(lora(seed=1), adapter_name="style")
        assert pipe.get_list_adapters() == {}


def test_set_adapters(lora: Callable[..., Path]) -> None:
    """After a swap a weight is of the LoRA that is live; today the first one's alpha goes on."""
    first, second, other = lora(seed=1), lora(seed=2, r=2, lora_alpha=7), lora(seed=5, r=4, components=BOTH)

    def weighted(pipe: Any, names: Any, weights: Any) -> Outputs:
        pipe.set_adapters(names, weights)
        return SD.outputs(pipe)

    want = weighted(fresh(SD, second), "style", 0.5)
    both = SD.build()
    load_plain(both, second)
    load_plain(both, other, "detail")
    mixed = {"unet": 0.3, "text_encoder": 0.9}
    want_both = weighted(both, ["style", "detail"], [0.5, mixed])

    def swapped() -> Any:
        pipe = loaded(SD, first, rank=8)
        swap(pipe, second)
        return pipe

    assert differ(weighted(swapped(), "style", 0.5), want)  # the control
    with patched():
        pipe = swapped()
        assert_outputs(weighted(pipe, "style", 0.5), want)
        assert_outputs(weighted(pipe, "style", None), expected(SD, second))
        pipe.load_lora_weights(other, adapter_name="detail")
        assert_outputs(weighted(pipe, ["style", "detail"], [0.5, mixed]), want_both)
        pipe.set_adapters("style", 0.5)
        swap(pipe, first)  # a LoRA comes at its own strength, as a load does
        assert_outputs(SD.outputs(pipe), expected(SD, first))


def test_scale_in_cross_attention_kwargs(lora: Callable[..., Path]) -> None:
    second = lora(seed=2, r=2, lora_alpha=7)
    want = SD.outputs(fresh(SD, second), cross_attention_kwargs={"scale": 0.4})
    with patched():
        pipe = loaded(SD, lora(seed=1))
        swap(pipe, second)
        assert_outputs(SD.outputs(pipe, cross_attention_kwargs={"scale": 0.4}), want)
        assert_outputs(SD.outputs(pipe), expected(SD, second))
    assert differ(want, expected(SD, second))


def test_fuse_lora_and_unfuse_lora(lora: Callable[..., Path]) -> None:
    """After swaps, and with the components that the pipeline names."""
    second = lora(seed=2, r=2, lora_alpha=7, components=BOTH)
    with patched():
        pipe = loaded(SD, lora(seed=1), rank=8)
        swap(pipe, second)
        pipe.fuse_lora()
        assert pipe.fused_loras == {"style"}
        assert_outputs(SD.outputs(pipe), expected(SD, second))
        pipe.unfuse_lora()
        assert pipe.num_fused_loras == 0
        swap(pipe, lora(seed=1))
        assert_outputs(SD.outputs(pipe), expected(SD, lora(seed=1)))


def test_a_fused_lora_is_not_swapped_and_the_base_survives(lora: Callable[..., Path]) -> None:
    first, second = lora(seed=1), lora(seed=2)
    pipe = loaded(SD, first)  # the control: diffusers refuses, and takes the LoRA that is fused off
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="merged"):
        swap(pipe, second)
    pipe.unfuse_lora()
    assert differ(SD.outputs(pipe), expected(SD, first))
    pipe.disable_lora()
    assert differ(SD.outputs(pipe), expected(SD, None))
    with patched():
        pipe = loaded(SD, first)
        pipe.fuse_lora()
        before = snapshot(pipe.unet)
        with pytest.raises(errors.MergedError, match="unfuse"):
            swap(pipe, second)
        assert_unchanged(before, snapshot(pipe.unet))
        pipe.unfuse_lora()
        assert_outputs(SD.outputs(pipe), expected(SD, first))
        swap(pipe, second)
        assert_outputs(SD.outputs(pipe), expected(SD, second))
        pipe.disable_lora()
        assert_outputs(SD.outputs(pipe), expected(SD, None))


def test_unload_lora_weights(lora: Callable[..., Path]) -> None:
    """Nothing is left, and all may begin again."""
    more = lora(seed=6, targets={"unet": ATTENTION, **{"text_encoder": ("fc1",)}})
    with patched():
        pipe = loaded(SD, lora(seed=1), rank=8)
        for _ in range(2):
            swap(pipe, more)
            assert_outputs(SD.outputs(pipe), expected(SD, more))
            pipe.unload_lora_weights()
            assert pipe.get_list_adapters() == {}
            assert not any("lora" in name for model in models(SD, pipe).values() for name, _ in model.named_modules())
            assert_outputs(SD.outputs(pipe), expected(SD, None))
            pipe.load_lora_weights(lora(seed=1), adapter_name="style")
            assert_outputs(SD.outputs(pipe), expected(SD, lora(seed=1)))


def test_get_list_adapters_and_get_active_adapters(lora: Callable[..., Path]) -> None:
    with patched():
        pipe = loaded(SD, lora(seed=1), rank=8)
        pipe.load_lora_weights(lora(seed=2), adapter_name="detail")
        assert pipe.get_list_adapters() == {"unet": ["style", "detail"]}
        swap(pipe, lora(seed=4, components=BOTH))
        listed = pipe.get_list_adapters()
        assert {name: set(adapters) for name, adapters in listed.items()} == {
            "unet": {"style", "detail"},
            "text_encoder": {"style"},
        }
        pipe.set_adapters("style")
        assert pipe.get_active_adapters() == ["style"]


def test_delete_adapters(lora: Callable[..., Path]) -> None:
    """The one that was swapped goes, the other stays."""
    with patched():
        pipe = loaded(SD, lora(seed=1), rank=8)
        pipe.load_lora_weights(lora(seed=2), adapter_name="detail")
        swap(pipe, lora(seed=4, components=BOTH))
        pipe.delete_adapters("style")
        pipe.set_adapters("detail")
        assert pipe.get_list_adapters() == {"unet": ["detail"]}
        assert_outputs(SD.outputs(pipe), expected(SD, lora(seed=2)))
        swap(pipe, lora(seed=3), name="detail")
        assert_outputs(SD.outputs(pipe), expected(SD, lora(seed=3)))
        pipe.load_lora_weights(lora(seed=1), adapter_name="style")
        pipe.set_adapters("style")
        assert_outputs(SD.outputs(pipe), expected(SD, lora(seed=1)))
        pipe.delete_adapters(["style", "detail"])
        assert_outputs(SD.outputs(pipe), expected(SD, None))


def test_disable_lora_and_enable_lora(lora: Callable[..., Path]) -> None:
    with patched():
        pipe = loaded(SD, lora(seed=1))
        swap(pipe, lora(seed=4, components=BOTH))
        pipe.disable_lora()
        assert_outputs(SD.outputs(pipe), expected(SD, None))
        swap(pipe, lora(seed=2))  # stays disabled
        assert_outputs(SD.outputs(pipe), expected(SD, None))
        pipe.enable_lora()
        assert_outputs(SD.outputs(pipe), expected(SD, lora(seed=2)))


def test_load_lora_adapter_with_hotswap(lora: Callable[..., Path]) -> None:
    """The call of one model: alone, prepared or not, and beside the pipeline's."""
    first, second, more = lora(seed=1), lora(seed=2, r=2, lora_alpha=7), lora(seed=6, targets=FEED_FORWARD)
    options = {"prefix": "unet", "adapter_name": "style"}
    with patched():
        for rank in (None, 8):
            pipe = SD.build()
            if rank:
                pipe.unet.enable_lora_hotswap(target_rank=rank)
            pipe.unet.load_lora_adapter(first, **options)
            for file in (second, more, first):
                pipe.unet.load_lora_adapter(file, hotswap=True, **options)
                assert_outputs(SD.outputs(pipe), expected(SD, file))
        te = lora(seed=4, components=BOTH)
        pipe = loaded(SD, first)
        swap(pipe, te)
        pipe.unet.load_lora_adapter(second, hotswap=True, **options)  # the text encoder keeps what it has
        want = {"unet": expected(SD, second)["unet"], "text_encoder": expected(SD, te)["text_encoder"]}
        assert_outputs(SD.outputs(pipe), want)
        swap(pipe, first)
        assert_outputs(SD.outputs(pipe), expected(SD, first))
