"""The LoRA calls that users of diffusers make, after `hotslot.patch_peft()`: each does what it says.

The oracle is plain diffusers: the same LoRA loaded onto a fresh pipeline. Where plain diffusers does it wrong, the test
shows that first, on a pipeline of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hotslot
from compiling import Backend
from hotslot import errors
from hotslot.integrations.diffusers import patching as patched_calls
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, error, snapshot
from pipelines import ATTENTION, CLIP, PIPELINES, Kind, load_plain, make_lokr, make_lora

diffusers = pytest.importorskip("diffusers")

# PEFT tells diffusers that a second adapter is a second adapter, and one that is deleted was active.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`",
    "ignore:Already unmerged",
    "ignore:Adapter .* was active",
    "ignore:Adapter .* have invalid shape",  # as PEFT sees a bias
)

FLUX, FLUX_2, WAN = PIPELINES["flux"], PIPELINES["flux2"], PIPELINES["wan22"]
BOTH = ("transformer", "text_encoder")
FEED_FORWARD = {"transformer": ("ff.net.2",)}
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

    def write(kind: Kind = FLUX, **config: Any) -> Path:
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
        pipe = loaded(FLUX, files[0], rank=rank)
        for file in (*files[1:], *files):
            swap(pipe, str(file))
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, file))
        name = "pytorch_lora_weights.safetensors"
        swap(pipe, str(files[1]), weight_name=name)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, files[1]))
        swap(pipe, files[2] / name)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, files[2]))


def test_load_lora_weights_with_hotswap_wants_an_adapter_that_is_there(lora: Callable[..., Path]) -> None:
    """In diffusers' words."""
    with patched():
        pipe = loaded(FLUX, lora(seed=1))
        with pytest.raises(ValueError, match="there is no existing adapter by that name"):
            swap(pipe, lora(seed=2), name="other")
        with pytest.raises(ValueError, match="there is no existing adapter by that name"):
            pipe.transformer.load_lora_adapter(lora(seed=2), prefix="transformer", adapter_name="other", hotswap=True)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=1)))


def test_enable_lora_hotswap(lora: Callable[..., Path]) -> None:
    """Room for every adapter that is loaded from then on, and in text encoders; today for one, in the unet alone."""

    def ranks(pipe: Any, name: str) -> set[int]:
        found = {}
        for model in models(FLUX, pipe).values():
            found.update({key: p.shape[0] for key, p in model.named_parameters() if f"lora_A.{name}" in key})
        return set(found.values())

    first, second = lora(seed=1), lora(seed=2, components=BOTH)

    def prepared() -> Any:
        pipe = loaded(FLUX, first, rank=8)
        pipe.load_lora_weights(second, adapter_name="detail")
        return pipe

    pipe = prepared()
    assert (ranks(pipe, "style"), ranks(pipe, "detail")) == ({8}, {3})  # the control
    with patched():
        pipe = prepared()
        assert (ranks(pipe, "style"), ranks(pipe, "detail")) == ({8}, {8})
        with same_addresses(pipe.transformer), same_addresses(pipe.text_encoder):
            swap(pipe, lora(seed=3, r=8, components=BOTH), name="detail")
            swap(pipe, lora(seed=4, r=5), name="style")
        pipe.set_adapters("style")
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=4, r=5)))
        pipe.set_adapters("detail")
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=3, r=8, components=BOTH)))


def test_enable_lora_hotswap_checks_as_diffusers_does(lora: Callable[..., Path]) -> None:
    with patched():
        pipe = loaded(FLUX, lora(seed=1))
        with pytest.raises(RuntimeError, match="before loading the first adapter"):
            pipe.enable_lora_hotswap(target_rank=8)
        pipe.enable_lora_hotswap(target_rank=8, check_compiled="ignore")  # and makes room all the same
        with same_addresses(pipe.transformer):
            swap(pipe, lora(seed=3, r=5))
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=3, r=5)))
        pipe = FLUX.build()
        pipe.enable_lora_hotswap(target_rank=8)
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        with pytest.raises(ValueError, match="before"):
            pipe.load_lora_weights(lora(seed=1), adapter_name="style")
        assert pipe.get_list_adapters() == {}


def test_set_adapters(lora: Callable[..., Path]) -> None:
    """After a swap a weight is of the LoRA that is live; today the first one's alpha goes on."""
    first, second, other = lora(seed=1), lora(seed=2, r=2, lora_alpha=7), lora(seed=5, r=4, components=BOTH)

    def weighted(pipe: Any, names: Any, weights: Any) -> Outputs:
        pipe.set_adapters(names, weights)
        return FLUX.outputs(pipe)

    want = weighted(fresh(FLUX, second), "style", 0.5)
    both = FLUX.build()
    load_plain(both, second)
    load_plain(both, other, "detail")
    mixed = {"transformer": 0.3, "text_encoder": 0.9}
    want_both = weighted(both, ["style", "detail"], [0.5, mixed])

    def swapped() -> Any:
        pipe = loaded(FLUX, first, rank=8)
        swap(pipe, second)
        return pipe

    assert differ(weighted(swapped(), "style", 0.5), want)  # the control
    with patched():
        pipe = swapped()
        assert_outputs(weighted(pipe, "style", 0.5), want)
        assert_outputs(weighted(pipe, "style", None), expected(FLUX, second))
        pipe.load_lora_weights(other, adapter_name="detail")
        assert_outputs(weighted(pipe, ["style", "detail"], [0.5, mixed]), want_both)
        pipe.set_adapters("style", 0.5)
        swap(pipe, first)  # a LoRA comes at its own strength, as a load does
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, first))


def test_scale_in_joint_attention_kwargs(lora: Callable[..., Path]) -> None:
    second = lora(seed=2, r=2, lora_alpha=7)
    want = FLUX.outputs(fresh(FLUX, second), joint_attention_kwargs={"scale": 0.4})
    with patched():
        pipe = loaded(FLUX, lora(seed=1))
        swap(pipe, second)
        assert_outputs(FLUX.outputs(pipe, joint_attention_kwargs={"scale": 0.4}), want)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, second))
    assert differ(want, expected(FLUX, second))


def test_fuse_lora_and_unfuse_lora(lora: Callable[..., Path]) -> None:
    """After swaps, and with the components that the pipeline names."""
    second = lora(seed=2, r=2, lora_alpha=7, components=BOTH)
    with patched():
        pipe = loaded(FLUX, lora(seed=1), rank=8)
        swap(pipe, second)
        pipe.fuse_lora()
        assert pipe.fused_loras == {"style"}
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, second))
        pipe.unfuse_lora()
        assert pipe.num_fused_loras == 0
        swap(pipe, lora(seed=1))
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=1)))


def test_a_fused_lora_is_not_swapped_and_the_base_survives(lora: Callable[..., Path]) -> None:
    first, second = lora(seed=1), lora(seed=2)
    pipe = loaded(FLUX, first)  # the control: diffusers refuses, and takes the LoRA that is fused off
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="merged"):
        swap(pipe, second)
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert differ(FLUX.outputs(pipe), expected(FLUX, None))
    with patched():
        pipe = loaded(FLUX, first)
        pipe.fuse_lora()
        before = snapshot(pipe.transformer)
        with pytest.raises(errors.MergedError, match="unfuse_lora"):
            swap(pipe, second)
        assert_unchanged(before, snapshot(pipe.transformer))
        pipe.unfuse_lora()
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, first))
        swap(pipe, second)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, second))
        pipe.disable_lora()
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, None))


def test_unload_lora_weights(lora: Callable[..., Path]) -> None:
    """Nothing is left, and all may begin again."""
    more = lora(seed=6, targets={"transformer": (*ATTENTION, "ff.net.2"), "text_encoder": CLIP})
    with patched():
        pipe = loaded(FLUX, lora(seed=1), rank=8)
        for _ in range(2):
            swap(pipe, more)
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, more))
            pipe.unload_lora_weights()
            assert pipe.get_list_adapters() == {}
            assert not any("lora" in name for model in models(FLUX, pipe).values() for name, _ in model.named_modules())
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, None))
            pipe.load_lora_weights(lora(seed=1), adapter_name="style")
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=1)))


def test_get_list_adapters_and_get_active_adapters(lora: Callable[..., Path]) -> None:
    with patched():
        pipe = loaded(FLUX, lora(seed=1), rank=8)
        pipe.load_lora_weights(lora(seed=2), adapter_name="detail")
        assert pipe.get_list_adapters() == {"transformer": ["style", "detail"]}
        swap(pipe, lora(seed=4, components=BOTH))
        listed = pipe.get_list_adapters()
        assert {name: set(adapters) for name, adapters in listed.items()} == {
            "transformer": {"style", "detail"},
            "text_encoder": {"style"},
        }
        pipe.set_adapters("style")
        assert pipe.get_active_adapters() == ["style"]


def test_delete_adapters(lora: Callable[..., Path]) -> None:
    """The one that was swapped goes, the other stays."""
    with patched():
        pipe = loaded(FLUX, lora(seed=1), rank=8)
        pipe.load_lora_weights(lora(seed=2), adapter_name="detail")
        swap(pipe, lora(seed=4, components=BOTH))
        pipe.delete_adapters("style")
        pipe.set_adapters("detail")
        assert pipe.get_list_adapters() == {"transformer": ["detail"]}
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=2)))
        swap(pipe, lora(seed=3), name="detail")
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=3)))
        pipe.load_lora_weights(lora(seed=1), adapter_name="style")
        pipe.set_adapters("style")
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=1)))
        pipe.delete_adapters(["style", "detail"])
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, None))


def test_disable_lora_and_enable_lora(lora: Callable[..., Path]) -> None:
    with patched():
        pipe = loaded(FLUX, lora(seed=1))
        swap(pipe, lora(seed=4, components=BOTH))
        pipe.disable_lora()
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, None))
        swap(pipe, lora(seed=2))  # stays disabled
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, None))
        pipe.enable_lora()
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=2)))


def test_load_lora_adapter_with_hotswap(lora: Callable[..., Path]) -> None:
    """The call of one model: alone, prepared or not, and beside the pipeline's."""
    first, second, more = lora(seed=1), lora(seed=2, r=2, lora_alpha=7), lora(seed=6, targets=FEED_FORWARD)
    options = {"prefix": "transformer", "adapter_name": "style", "use_safetensors": True}
    with patched():
        for rank in (None, 8):
            pipe = FLUX.build()
            if rank:
                pipe.transformer.enable_lora_hotswap(target_rank=rank)
            pipe.transformer.load_lora_adapter(first, **options)
            for file in (second, more, first):
                pipe.transformer.load_lora_adapter(file, hotswap=True, **options)
                assert_outputs(FLUX.outputs(pipe), expected(FLUX, file))
        te = lora(seed=4, components=BOTH)
        pipe = loaded(FLUX, first)
        swap(pipe, te)
        pipe.transformer.load_lora_adapter(second, hotswap=True, **options)  # the text encoder keeps what it has
        want = {
            "transformer": expected(FLUX, second)["transformer"],
            "text_encoder": expected(FLUX, te)["text_encoder"],
        }
        assert_outputs(FLUX.outputs(pipe), want)
        swap(pipe, first)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, first))


def test_network_alphas_of_one_model(lora: Callable[..., Path]) -> None:
    """Beside the tensors, as `pipe.lora_state_dict` gives them."""
    first, second = (tensors_of(lora(seed=seed, metadata=False)) for seed in (1, 2))
    alphas = {key.replace(".lora_A.weight", ".alpha"): 1.0 + i % 3 for i, key in enumerate(second) if "lora_A" in key}
    options = {"prefix": "transformer", "adapter_name": "style", "network_alphas": alphas}
    oracle = FLUX.build()
    oracle.transformer.load_lora_adapter(dict(second), **options)
    want = FLUX.outputs(oracle)
    assert differ(want, expected(FLUX, lora(seed=2, metadata=False)))  # the control
    with patched():
        pipe = loaded(FLUX, first)
        pipe.transformer.load_lora_adapter(second, hotswap=True, **options)
        assert_outputs(FLUX.outputs(pipe), want)


@pytest.mark.parametrize("state", ["inactive", "disabled", "beside"])
def test_what_is_active_stays_so_where_a_swap_adds_layers(state: str, lora: Callable[..., Path]) -> None:
    """In components that the adapter was not on before, too: no half of it is active."""
    first, second, other = lora(seed=1), lora(seed=4, components=BOTH), lora(seed=5, r=4, components=BOTH)
    oracle = FLUX.build()
    load_plain(oracle, second)
    load_plain(oracle, other, "detail")
    with patched():
        pipe = loaded(FLUX, first)
        if state == "disabled":
            pipe.disable_lora()
        else:
            pipe.load_lora_weights(other, adapter_name="detail")
        if state == "beside":
            pipe.set_adapters(["style", "detail"], [1.0, 0.5])
        swap(pipe, second)
        if state == "beside":
            oracle.set_adapters(["style", "detail"], [1.0, 0.5])
            assert_outputs(FLUX.outputs(pipe), FLUX.outputs(oracle))
            return
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, other if state == "inactive" else None))
        pipe.enable_lora()
        pipe.set_adapters("style")
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, second))


def test_the_pipelines_call_after_one_models(lora: Callable[..., Path]) -> None:
    """Neither has made what keeps the other from swapping; a failure leaves what is live."""
    first, second, third = lora(seed=1), lora(seed=2, r=2, use_dora=True), lora(seed=4, components=BOTH)
    options = {"prefix": "transformer", "adapter_name": "style", "use_safetensors": True}
    with patched():
        pipe = FLUX.build()
        pipe.transformer.load_lora_adapter(first, **options)
        pipe.transformer.load_lora_adapter(second, hotswap=True, **options)
        with pytest.raises(errors.NonFiniteError):
            swap(pipe, {key: value * float("nan") for key, value in tensors_of(third).items()})
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, second))
        swap(pipe, third)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, third))


def test_the_folder_of_save_lora_adapter_swaps(tmp_path: Path, lora: Callable[..., Path]) -> None:
    """It has no prefix, and diffusers is told so by `prefix=None`."""
    first, second = lora(seed=1), lora(seed=2, r=2, lora_alpha=7)
    fresh(FLUX, second).transformer.save_lora_adapter(tmp_path, adapter_name="style")
    options = {"prefix": None, "adapter_name": "style", "use_safetensors": True}
    with patched():
        pipe = loaded(FLUX, first)
        pipe.transformer.load_lora_adapter(tmp_path, hotswap=True, **options)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, second))


def test_pipelines_that_share_a_component_swap_in_turn(lora: Callable[..., Path]) -> None:
    with patched():
        one, other = loaded(FLUX, lora(seed=4, components=BOTH)), FLUX.build()
        other.transformer = one.transformer
        for pipe, file in ((one, lora(seed=1)), (other, lora(seed=4, components=BOTH)), (one, lora(seed=2))):
            swap(pipe, file)
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, file))


@pytest.mark.parametrize("call", ["unload_lora", "delete_adapters", "load_lora_weights"])
def test_layers_that_came_or_went_by_other_calls(call: str, lora: Callable[..., Path]) -> None:
    """After a swap: the next one finds the layers that there are, and leaves nothing in them of the one before."""
    text = lora(seed=7, targets={"text_encoder": CLIP})
    with patched():
        pipe = loaded(FLUX, lora(seed=1))
        swap(pipe, lora(seed=2))
        if call == "load_lora_weights":
            pipe.load_lora_weights(text, adapter_name="style")  # of the other component, under the same name
        else:
            swap(pipe, lora(seed=4, components=BOTH))
            getattr(pipe.transformer, call)(*["style"] * (call == "delete_adapters"))
        swap(pipe, lora(seed=3))
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=3)))


# -- what goes wrong today -------------------------------------------------------------------------------------------


def test_a_lora_that_fails_to_swap_leaves_the_running_one_live(lora: Callable[..., Path]) -> None:
    """Today it is deleted."""
    first, second = lora(seed=1), lora(seed=2, components=BOTH)
    spoilt = {key: value for key, value in tensors_of(second).items() if "lora_B" not in key}
    pipe = loaded(FLUX, first)
    with pytest.raises(RuntimeError):
        swap(pipe, lora(seed=6, targets=FEED_FORWARD))
    assert differ(FLUX.outputs(pipe), expected(FLUX, first))  # the control
    with patched():
        pipe = loaded(FLUX, first)
        before = snapshot(pipe.transformer), snapshot(pipe.text_encoder)
        with pytest.raises(errors.HotslotError):
            swap(pipe, spoilt)
        with pytest.raises(errors.NonFiniteError):
            swap(pipe, {key: value / 0 for key, value in tensors_of(second).items()})
        assert_unchanged(before[0], snapshot(pipe.transformer))
        assert_unchanged(before[1], snapshot(pipe.text_encoder))
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, first))
        swap(pipe, second)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, second))


def test_a_fault_while_swapping_leaves_all_components_as_they_were(
    lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotslot.live import Binding

    first, second = lora(seed=1, components=BOTH), lora(seed=2, components=BOTH)
    with patched():
        pipe = loaded(FLUX, first, rank=8)
        swap(pipe, second)
        before = snapshot(pipe.transformer), snapshot(pipe.text_encoder)
        write, calls = Binding.write, []

        def broken(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            calls.append(result)
            if len(calls) == 1:
                raise MemoryError
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Binding, "write", broken)
            with pytest.raises(MemoryError):
                swap(pipe, first)
        assert_unchanged(before[0], snapshot(pipe.transformer))
        assert_unchanged(before[1], snapshot(pipe.text_encoder))
        swap(pipe, first)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, first))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_text_encoders_swap_too(lora: Callable[..., Path]) -> None:
    first, second = lora(seed=1, components=BOTH), lora(seed=2, components=BOTH)
    assert today(FLUX, first, second) is None  # the control
    with patched():
        pipe = loaded(FLUX, first)
        for file in (second, first):
            swap(pipe, file)
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, file))


def test_a_lora_without_a_text_encoders_part_clears_the_previous_ones(lora: Callable[..., Path]) -> None:
    first, second = lora(seed=1, components=BOTH), lora(seed=2)
    got = today(FLUX, first, second)
    assert got is None or differ(got, expected(FLUX, second))  # the control
    with patched():
        pipe = loaded(FLUX, first)
        swap(pipe, second)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, second))


def test_a_component_that_was_left_out_and_gets_more_room_is_on_record(lora: Callable[..., Path]) -> None:
    """Else no later call finds the adapter on any component."""
    first, encoder, larger = lora(seed=1), lora(seed=2, targets={"text_encoder": CLIP}), lora(seed=3, r=5)
    with patched():
        pipe = loaded(FLUX, first)
        for file in (encoder, larger, first):
            swap(pipe, file)
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, file))
        assert pipe.get_list_adapters() == {"transformer": ["style"]}
        assert pipe.transformer.peft_config["style"].r == 3


def test_wans_two_transformers_from_one_file(lora: Callable[..., Path]) -> None:
    """Today the second's half is dropped, at a load and at a swap."""
    both, other = (lora(WAN, seed=seed, components=("transformer", "transformer_2")) for seed in (1, 2))
    pipe = WAN.build()
    pipe.load_lora_weights(both, adapter_name="style", use_safetensors=True)
    assert differ(WAN.outputs(pipe), expected(WAN, both))  # the control
    with patched():
        pipe = WAN.build()
        pipe.load_lora_weights(both, adapter_name="style", use_safetensors=True)
        assert_outputs(WAN.outputs(pipe), expected(WAN, both))
        swap(pipe, other)
        assert_outputs(WAN.outputs(pipe), expected(WAN, other))
        one = lora(WAN, seed=3, components=("transformer",))
        swap(pipe, one)
        base = expected(WAN, None)["transformer_2"]
        assert_outputs(WAN.outputs(pipe), {"transformer": expected_of(WAN, one)["transformer"], "transformer_2": base})


def test_wans_two_transformers_from_a_file_each(lora: Callable[..., Path]) -> None:
    """`load_into_transformer_2`: what one has been given, the other's swap leaves alone."""
    files = [lora(WAN, seed=seed, components=("transformer",)) for seed in (1, 2, 3)]

    def both(pipe: Any, high: Path, low: Path, **options: Any) -> None:
        pipe.load_lora_weights(high, adapter_name="style", use_safetensors=True, **options)
        pipe.load_lora_weights(low, adapter_name="style", use_safetensors=True, load_into_transformer_2=True, **options)

    oracle = WAN.build()
    both(oracle, files[1], files[2])
    want = WAN.outputs(oracle)
    with patched():
        pipe = WAN.build()
        both(pipe, files[0], files[0])
        both(pipe, files[1], files[2], hotswap=True)
        assert_outputs(WAN.outputs(pipe), want)
        pipe.load_lora_weights(files[1], adapter_name="style", use_safetensors=True, hotswap=True)
        assert_outputs(WAN.outputs(pipe), want)


def expected_of(kind: Kind, source: Path) -> Outputs:
    """`expected` of a LoRA for the first transformer alone."""
    with _unpatched():
        pipe = kind.build()
        pipe.load_lora_weights(source, adapter_name="style", use_safetensors=True)
        return kind.outputs(pipe)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"targets": {"transformer": (*ATTENTION, "ff.net.2")}}),
        ({}, {"targets": {"transformer": ("ff.net.2",)}}),
        ({"targets": {"transformer": ("to_q", "to_k")}}, {"targets": {"transformer": ("to_v", "to_k")}}),
        ({"rank_pattern": {"to_q": 5}}, {"rank_pattern": {"to_k": 6, "to_v": 1}}),
        ({}, {"lora_alpha": 11, "alpha_pattern": {"to_q": 1}}),
        ({}, {"use_rslora": True, "lora_dropout": 0.5, "r": 4}),
        ({"lora_dropout": 0.5}, {}),
        ({}, {"use_dora": True}),
        ({"use_dora": True}, {}),
        ({"lora_bias": True}, {"lora_bias": True}),
        ({}, {"lora_bias": True}),
    ],
    ids=[
        "more targets", "disjoint targets", "overlapping targets", "mixed ranks", "other alphas", "rsLoRA and dropout",
        "from dropout", "to DoRA", "from DoRA", "lora_bias", "to lora_bias",
    ],
)  # fmt: skip
def test_what_another_lora_may_have(first: Any, second: Any, lora: Callable[..., Path]) -> None:
    one, other = lora(seed=1, **first), lora(seed=2, **second)
    with patched():
        for rank in (None, 8):
            pipe = loaded(FLUX, one, rank=rank)
            for file in (other, one, other):
                swap(pipe, file)
                assert_outputs(FLUX.outputs(pipe), expected(FLUX, file))


def test_some_of_that_goes_wrong_today(lora: Callable[..., Path]) -> None:
    """The control of the above."""
    one = lora(seed=1)
    for second in ({"targets": {"transformer": (*ATTENTION, "ff.net.2")}}, {"use_dora": True}, {"use_rslora": True}):
        assert today(FLUX, one, lora(seed=2, **second)) is None


def test_lora_bias_after_none_goes_wrong_today(lora: Callable[..., Path]) -> None:
    """From one with biases to another is right."""
    with pytest.raises(KeyError, match="bias"):
        today(FLUX, lora(seed=1), lora(seed=2, lora_bias=True))


def test_set_adapters_after_a_swap_compiles_again_today(lora: Callable[..., Path]) -> None:
    """The control of `test_compiled_pipelines`."""
    pipe, backend = loaded(FLUX, lora(seed=1), rank=8), Backend()
    _blocks(pipe, backend)
    swap(pipe, lora(seed=2))
    FLUX.outputs(pipe)
    graphs = backend.graphs
    pipe.set_adapters("style", 0.5)
    FLUX.outputs(pipe)
    assert backend.graphs > graphs


def test_mixed_ranks_and_prepared_go_wrong_today(lora: Callable[..., Path]) -> None:
    mixed = lora(seed=1, rank_pattern={"to_q": 5})
    got = today(FLUX, mixed, lora(seed=2, rank_pattern={"to_k": 6, "to_v": 1}), rank=8)
    assert got is None or differ(got, expected(FLUX, lora(seed=2, rank_pattern={"to_k": 6, "to_v": 1})))


def test_a_lora_for_another_width_is_refused_by_name(tmp_path: Path, lora: Callable[..., Path]) -> None:
    """Today Flux's loader pads it, and runs it."""
    narrow = {
        key: value[:, :12] if "lora_A" in key and value.shape[1] == 16 else value
        for key, value in tensors_of(lora(seed=2)).items()
    }
    first = lora(seed=1)
    assert today(FLUX, first, dict(narrow)) is not None  # the control
    with patched():
        pipe = loaded(FLUX, first)
        with pytest.raises(errors.ShapeError, match=r"to_q|to_k|to_v"):
            swap(pipe, narrow)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, first))


@pytest.mark.parametrize("name", ["transformer.nothing", "unet.to_q"])
def test_a_file_in_which_nothing_matches_is_refused(name: str, lora: Callable[..., Path]) -> None:
    """Today it is logged, and the old one stays active."""
    tensors = {f"{name}.lora_A.weight": torch.ones(3, 16), f"{name}.lora_B.weight": torch.ones(16, 3)}
    if name == "unet.to_q":  # the control
        pipe = loaded(FLUX, lora(seed=1))
        swap(pipe, dict(tensors))
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=1)))
    with patched():
        pipe = loaded(FLUX, lora(seed=1))
        with pytest.raises(errors.HotslotError, match=name.rpartition(".")[2]):
            swap(pipe, tensors)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=1)))


def test_dicts_are_neither_changed_nor_kept(lora: Callable[..., Path]) -> None:
    """Today they become the parameters, and the next swap writes into them."""
    first, second = tensors_of(lora(seed=1, metadata=False)), tensors_of(lora(seed=2, metadata=False))
    given = dict(first)
    pipe = loaded(FLUX, given)  # the control
    swap(pipe, second)
    assert not all(torch.equal(given[key], value) for key, value in tensors_of(lora(seed=1, metadata=False)).items())
    first = tensors_of(lora(seed=1, metadata=False))
    with patched():
        pipe = loaded(FLUX, lora(seed=3, metadata=False))
        copies = [{key: value.clone() for key, value in tensors.items()} for tensors in (first, second)]
        held = {value.data_ptr() for tensors in (first, second) for value in tensors.values()}
        for tensors in (first, second, first):
            swap(pipe, tensors)
        assert held.isdisjoint(p.data_ptr() for model in models(FLUX, pipe).values() for p in model.parameters())
        for tensors, copy in zip((first, second), copies, strict=True):
            assert tensors.keys() == copy.keys()
            assert all(torch.equal(tensors[key], copy[key]) for key in copy)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, lora(seed=1, metadata=False)))


@pytest.mark.parametrize("rank", [None, 8])
def test_lokr_in_the_place_of_lokr(rank: int | None, tmp_path: Path) -> None:
    """In PEFT's own layers, where they are, so that all calls reach it."""
    first, second = make_lokr(tmp_path / "first", seed=1), make_lokr(tmp_path / "second", seed=2, alpha=5)
    halved, base = fresh(FLUX_2, second), expected(FLUX_2, None)
    halved.set_adapters("style", 0.5)
    with patched():
        pipe = loaded(FLUX_2, first, rank=rank)
        with same_addresses(pipe.transformer):
            for file in (second, first, second):
                swap(pipe, file)
                assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, file))
                assert differ(FLUX_2.outputs(pipe), base)
        assert pipe.get_list_adapters() == {"transformer": ["style"]}
        pipe.set_adapters("style", 0.5)
        assert_outputs(FLUX_2.outputs(pipe), FLUX_2.outputs(halved))
        pipe.set_adapters("style", 1.0)
        pipe.disable_lora()
        assert_outputs(FLUX_2.outputs(pipe), base)
        pipe.enable_lora()
        pipe.fuse_lora()
        with pytest.raises(errors.MergedError):
            swap(pipe, first)
        assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, second))
        pipe.unfuse_lora()
        pipe.delete_adapters("style")
        pipe.load_lora_weights(first, adapter_name="style")
        swap(pipe, second)
        assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, second))
        pipe.unload_lora_weights()
        assert_outputs(FLUX_2.outputs(pipe), base)


def test_saving_after_a_swap_reloads_to_the_same_outputs(tmp_path: Path, lora: Callable[..., Path]) -> None:
    """By `save_lora_adapter`, and by `save_lora_weights` of what PEFT gives."""
    from peft import get_peft_model_state_dict

    second = lora(seed=2, r=2, lora_alpha=7, rank_pattern={"(to_q|q_proj)": 4}, components=BOTH)
    plain = lora(seed=2, r=2, lora_alpha=7)
    pipe = loaded(FLUX, lora(seed=1), rank=8)  # the control
    swap(pipe, plain)
    pipe.transformer.save_lora_adapter(tmp_path / "today", adapter_name="style")
    again = FLUX.build()
    again.transformer.load_lora_adapter(tmp_path / "today", prefix=None, use_safetensors=True)
    assert differ(FLUX.outputs(again), expected(FLUX, plain))
    with patched():
        pipe = loaded(FLUX, lora(seed=1), rank=8)
        swap(pipe, second)
        pipe.transformer.save_lora_adapter(tmp_path / "one", adapter_name="style")
        saved, said = {}, {}
        for name, model in models(FLUX, pipe).items():
            saved[f"{name}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="style")
            said[f"{name}_lora_adapter_metadata"] = model.peft_config["style"].to_dict()
        type(pipe).save_lora_weights(tmp_path / "all", **saved, **said)
    again = FLUX.build()
    again.transformer.load_lora_adapter(tmp_path / "one", prefix=None, use_safetensors=True)
    want = expected(FLUX, second)
    assert_outputs(FLUX.outputs(again), {**want, "text_encoder": expected(FLUX, None)["text_encoder"]})
    assert_outputs(FLUX.outputs(fresh(FLUX, tmp_path / "all")), want)


# -- compiled --------------------------------------------------------------------------------------------------------


def _wrapped(pipe: Any, backend: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)


def _in_place(pipe: Any, backend: Any) -> None:
    pipe.transformer.compile(backend=backend, fullgraph=True)


def base_weight(pipe: Any) -> Tensor:
    layer: Any = models(FLUX, pipe)["transformer"].get_submodule("transformer_blocks.0.attn.to_q")
    weight: Tensor = layer.base_layer.weight
    return weight.detach().clone()


def _blocks(pipe: Any, backend: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)


@pytest.mark.parametrize("compile_", [_wrapped, _in_place, _blocks], ids=["torch.compile", ".compile()", "blocks"])
def test_compiled_pipelines(compile_: Callable[..., None], lora: Callable[..., Path]) -> None:
    """Swaps and weights compile nothing; list, fuse, disable, delete and unload do what they say."""
    first, second = lora(seed=1, components=BOTH), lora(seed=2, r=5, lora_alpha=9, rank_pattern={"to_q": 2})
    weighted = fresh(FLUX, second)
    weighted.set_adapters("style", 0.5)
    want = FLUX.outputs(weighted)
    oracle = fresh(FLUX, first)
    oracle.fuse_lora()
    fused = base_weight(oracle)
    with patched():
        pipe, backend = loaded(FLUX, first, rank=8), Backend()
        compile_(pipe, backend)
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, first))
        compiled = type(pipe.transformer)
        assert backend.graphs > 0
        with no_recompile(), same_addresses(models(FLUX, pipe)["transformer"]):
            swap(pipe, second)
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, second))
            pipe.set_adapters("style", 0.5)
            assert_outputs(FLUX.outputs(pipe), want)
            swap(pipe, first)
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, first))
        assert pipe.get_list_adapters() == {"transformer": ["style"], "text_encoder": ["style"]}
        pipe.disable_lora()
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, None))
        pipe.enable_lora()
        weight = base_weight(pipe)
        pipe.fuse_lora()
        assert pipe.fused_loras == {"style"}
        assert all(layer.merged for layer in models(FLUX, pipe)["transformer"].modules() if hasattr(layer, "merged"))
        assert_same_output(base_weight(pipe), fused)
        assert error(fused, weight) > 1e-3
        pipe.unfuse_lora()
        assert_same_output(base_weight(pipe), weight)
        pipe.delete_adapters("style")
        assert pipe.get_list_adapters() == {}
        pipe.load_lora_weights(second, adapter_name="other")
        pipe.unload_lora_weights()
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, None))
        assert type(pipe.transformer) is compiled


def test_weights_in_a_compiled_text_encoder_compile_nothing(lora: Callable[..., Path]) -> None:
    """transformers freezes what it loads, and PEFT makes trainable what it activates; compiled code guards both."""
    first, second, backend = lora(seed=4, components=BOTH), lora(seed=8, r=2, components=BOTH), Backend()
    weighted = fresh(FLUX, second)
    weighted.set_adapters("style", 0.5)
    want = FLUX.outputs(weighted)
    with patched():
        pipe = loaded(FLUX, first, rank=8)
        pipe.text_encoder = torch.compile(pipe.text_encoder, backend=backend)
        FLUX.outputs(pipe)
        compiled = backend.graphs
        swap(pipe, second)
        pipe.set_adapters("style", 0.5)
        assert_outputs(FLUX.outputs(pipe), want)
        pipe.disable_lora()
        pipe.enable_lora()
        assert_outputs(FLUX.outputs(pipe), want)
    assert backend.graphs == compiled
    models(FLUX, pipe)["text_encoder"].set_adapter("style")  # the control
    FLUX.outputs(pipe)
    assert backend.graphs > compiled


def test_calls_that_do_nothing_today_on_a_wrapped_model(lora: Callable[..., Path]) -> None:
    """The control of the above."""
    pipe = loaded(FLUX, lora(seed=1))
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert pipe.get_list_adapters() == {}
    pipe.disable_lora()
    pipe.unload_lora_weights()
    assert hasattr(pipe.transformer, "peft_config")


def test_the_first_lora_onto_a_compiled_pipeline(lora: Callable[..., Path]) -> None:
    """It compiles once more, and then no more."""
    first, second = lora(seed=1), lora(seed=2, r=5)
    with patched():
        pipe = FLUX.build()
        pipe.enable_lora_hotswap(target_rank=8, check_compiled="ignore")
        _blocks(pipe, "eager")
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, None))
        pipe.load_lora_weights(first, adapter_name="style")
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, first))
        with no_recompile():
            swap(pipe, second)
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, second))


# -- offloaded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True], ids=["after loading", "before loading"])
def test_group_offloading(before: bool, lora: Callable[..., Path]) -> None:
    """Hooks are back on after a swap, and after one that fails."""
    first, second = lora(seed=1, components=BOTH), lora(seed=2, r=2)

    def offload(pipe: Any) -> None:
        device = torch.device("cpu")
        options = {"onload_device": device, "offload_device": device, "offload_type": "leaf_level"}
        pipe.transformer.enable_group_offload(**options)

    def hooked(pipe: Any) -> int:
        return sum(hasattr(module, "_diffusers_hook") for module in pipe.transformer.modules())

    with patched():
        pipe = FLUX.build()
        if before:
            offload(pipe)
        pipe.load_lora_weights(first, adapter_name="style")
        if not before:
            offload(pipe)
        count = hooked(pipe)
        assert count > 10
        for file in (second, first):
            swap(pipe, file)
            assert hooked(pipe) >= count
            assert_outputs(FLUX.outputs(pipe), expected(FLUX, file))
        with pytest.raises(errors.NonFiniteError):
            swap(pipe, {key: value / 0 for key, value in tensors_of(second).items()})
        assert hooked(pipe) >= count
        assert_outputs(FLUX.outputs(pipe), expected(FLUX, first))


def offloaded_as_a_whole(pipe: Any) -> None:
    """Each model moves as its forward pass begins: by accelerate's own hooks, the CPU in the place of a GPU."""
    pipe.enable_model_cpu_offload(device="cpu")


def cast_by_layers(pipe: Any) -> None:
    """To 32 bits as a layer runs, and back to 8."""
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("offload", [offloaded_as_a_whole, cast_by_layers])
def test_offloading_by_models_and_casting_by_layers(offload: Callable[[Any], None], lora: Callable[..., Path]) -> None:
    """Hooks are the same ones after a swap, and after one that fails."""
    first, second = lora(seed=1, components=BOTH), lora(seed=2, r=2)

    def hooks(pipe: Any) -> dict[str, int]:
        """Of accelerate and of diffusers."""
        found = {}
        for name, model in models(FLUX, pipe).items():
            for path, module in model.named_modules():
                for key in ("_hf_hook", "_diffusers_hook"):
                    if hasattr(module, key):
                        found[f"{name}.{path}.{key}"] = id(getattr(module, key))
        return found

    def outputs(pipe: Any) -> Outputs:
        with torch.no_grad():
            return {"transformer": pipe.transformer(**FLUX.inputs["transformer"]()).sample}

    wanted = {}
    for file in (first, second):
        pipe = fresh(FLUX, file)
        offload(pipe)
        wanted[file] = outputs(pipe)
    assert differ(wanted[first], wanted[second])
    with patched():
        pipe = loaded(FLUX, first)
        offload(pipe)
        for model in models(FLUX, pipe).values():
            model.eval()
        before = hooks(pipe)
        assert before
        for file in (second, first):
            swap(pipe, file)
            assert hooks(pipe) == before
            assert_outputs(outputs(pipe), wanted[file])
        with pytest.raises(errors.NonFiniteError):
            swap(pipe, {key: value / 0 for key, value in tensors_of(second).items()})
        assert hooks(pipe) == before
        assert_outputs(outputs(pipe), wanted[first])


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`enable_sequential_cpu_offload` without a GPU: what diffusers does in it, to the CPU."""
    from accelerate import cpu_offload

    def offload(pipe: Any) -> None:
        pipe.remove_all_hooks()
        for model in pipe.components.values():
            if isinstance(model, nn.Module):
                cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_sequential_cpu_offload", offload)


def hooks_of_base(kind: Kind, pipe: Any) -> dict[str, tuple[int, int]]:
    """Path → hook of accelerate and the Parameter that it has put there, of all weights but LoRAs'."""
    found = {}
    for name, model in models(kind, pipe).items():
        for path, module in model.named_modules():
            if hasattr(module, "_hf_hook") and "lora_" not in path:
                found[f"{name}.{path}"] = (id(module._hf_hook), id(module._parameters.get("weight")))
    return found


@pytest.mark.parametrize("before", [False, True], ids=["load, offload", "offload, load"])
@pytest.mark.usefixtures("layer_by_layer")
def test_sequential_offloading(before: bool, lora: Callable[..., Path], tmp_path: Path) -> None:
    """Other ranks, more targets and fewer, text encoders; a failure; and diffusers' other calls after it."""
    kind = FLUX
    name = kind.denoiser
    both, more = (name, "text_encoder"), {name: (*kind.targets[name], "ff.net.2")}
    first, second = lora(kind, seed=1, components=both), lora(kind, seed=2, r=2)
    third, fourth = lora(kind, seed=3, r=6, components=both, targets=more), lora(kind, seed=4, targets={name: ["to_q"]})
    with patched():
        pipe = kind.build()
        if before:
            pipe.enable_lora_hotswap(target_rank=8)
            pipe.enable_sequential_cpu_offload()
        pipe.load_lora_weights(first, adapter_name="style")
        if not before:
            pipe.enable_sequential_cpu_offload()
        assert_outputs(kind.outputs(pipe), expected(kind, first))
        for file in (second, first, third, fourth, second):
            hooks = hooks_of_base(kind, pipe)
            swap(pipe, file)
            assert hooks_of_base(kind, pipe) == hooks or file == third  # which has layers put around some
            assert_outputs(kind.outputs(pipe), expected(kind, file))
        hooks = hooks_of_base(kind, pipe)
        with pytest.raises(errors.NonFiniteError):
            swap(pipe, {key: value / 0 for key, value in tensors_of(first).items()})
        assert hooks_of_base(kind, pipe) == hooks
        assert_outputs(kind.outputs(pipe), expected(kind, second))

        model = models(kind, pipe)[name]
        model.save_lora_adapter(tmp_path, adapter_name="style")
        pipe.set_adapters("style", 0.0)
        assert_outputs(kind.outputs(pipe), expected(kind, None))
        pipe.set_adapters("style", 1.0)
        pipe.disable_lora()
        assert_outputs(kind.outputs(pipe), expected(kind, None))
        pipe.enable_lora()
        pipe.load_lora_weights(fourth, adapter_name="other")
        assert_outputs(kind.outputs(pipe), expected(kind, fourth))
        pipe.set_adapters("style")
        assert_outputs(kind.outputs(pipe), expected(kind, second))
        swap(pipe, first)
        assert_outputs(kind.outputs(pipe), expected(kind, first))
        pipe.unload_lora_weights()
        assert_outputs(kind.outputs(pipe), expected(kind, None))
        pipe.remove_all_hooks()
        assert_outputs(kind.outputs(pipe), expected(kind, None))
    saved = kind.build()
    getattr(saved, name).load_lora_adapter(tmp_path, prefix=None, adapter_name="style", use_safetensors=True)
    assert_outputs({name: kind.outputs(saved)[name]}, {name: expected(kind, second)[name]})


@pytest.mark.usefixtures("layer_by_layer")
def test_lokr_under_sequential_offloading_is_refused_with_nothing_touched(tmp_path: Path) -> None:
    """It has no slots."""
    files = [make_lokr(tmp_path / str(seed), seed=seed, r=3) for seed in (1, 2)]
    with patched():
        pipe = loaded(FLUX_2, files[0])
        pipe.enable_sequential_cpu_offload()
        hooks = hooks_of_base(FLUX_2, pipe)
        with pytest.raises(errors.ModelError, match=r"offloaded layer by layer(.*\n)*.*remove_all_hooks"):
            swap(pipe, files[1])
        assert hooks_of_base(FLUX_2, pipe) == hooks
        pipe.remove_all_hooks()  # as the refusal says
        swap(pipe, files[1])
        assert_outputs(FLUX_2.outputs(pipe), expected(FLUX_2, files[1]))


# -- patching --------------------------------------------------------------------------------------------------------


def calls() -> dict[str, Any]:
    from diffusers.loaders import lora_base, peft

    found = {}
    for mixin in (lora_base.LoraBaseMixin, peft.PeftAdapterMixin):
        for cls in patched_calls._with_derived(mixin):
            found |= {f"{cls.__name__}.{name}": value for name, value in vars(cls).items() if callable(value)}
    return found


def test_unpatch_gives_diffusers_its_own_calls_back() -> None:
    """However often either is called."""
    FLUX.build()
    before = calls()
    for _ in range(2):
        hotslot.patch_peft()
    ours = {name for name, value in calls().items() if value is not before[name]}
    assert {"FluxLoraLoaderMixin.load_lora_weights", "PeftAdapterMixin.load_lora_adapter"} <= ours
    for _ in range(2):
        hotslot.unpatch_peft()
    assert calls() == before


def test_a_users_own_pipeline_swaps(lora: Callable[..., Path]) -> None:
    """Its call, made after patching, goes on to diffusers'."""
    seen = []
    with patched():

        class Mine(diffusers.FluxPipeline):  # type: ignore[misc,name-defined]
            def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
                seen.append(kwargs.get("adapter_name"))
                super().load_lora_weights(*args, **kwargs)

        mine = Mine(**FLUX.build().components)
        mine.load_lora_weights(lora(seed=1), adapter_name="style")
        swap(mine, lora(seed=2, components=BOTH))
        assert_outputs(FLUX.outputs(mine), expected(FLUX, lora(seed=2, components=BOTH)))
    assert seen.count("style") == 2


def test_patching_reaches_diffusers_imported_later() -> None:
    code = """
import sys
import hotslot
hotslot.patch_peft()
assert "diffusers" not in sys.modules  # nothing is imported by the way
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from diffusers.loaders.peft import PeftAdapterMixin
for cls, name in ((FluxLoraLoaderMixin, "load_lora_weights"), (PeftAdapterMixin, "load_lora_adapter")):
    assert "hotslot" in getattr(cls, name).__code__.co_filename, name
hotslot.unpatch_peft()
for cls, name in ((FluxLoraLoaderMixin, "load_lora_weights"), (PeftAdapterMixin, "load_lora_adapter")):
    assert "hotslot" not in getattr(cls, name).__code__.co_filename, name
assert not any("hotslot" in type(finder).__module__ for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
