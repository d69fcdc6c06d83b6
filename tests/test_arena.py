"""The arena: all bytes of a model's slots in one allocation, written exactly, with nothing left of what was there."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.hotswap import prepare_model_for_compiled_hotswap as peft_prepare
from torch import Tensor, nn

import hotslot
from adapters import expected_peft_warnings, make_adapter
from hotslot.block import Layout, SlotShape, arrange, pack
from hotslot.checkpoint import from_tensors
from hotslot.live import Memory
from hotslot.live.corner import band, corner, fill
from hotslot.methods import interpret
from hotslot.testing import RecompiledError, no_recompile, same_addresses
from oracle import assert_same_output, fresh, fresh_output
from zoo import ZOO, Entry

ENTRIES = pytest.mark.parametrize("entry", ZOO.values(), ids=list(ZOO))


def _adapters(root: Path, entry: Entry) -> dict[str, Path]:
    """Dense, of a smaller rank on half of the targets, with another scaling, and of a larger rank on few."""
    unit, targets = entry.rank_multiple, list(entry.targets)
    configs = {
        "dense": {"r": 8, "lora_alpha": 12, "target_modules": targets},
        "small": {"r": unit, "lora_alpha": 3, "target_modules": targets[: (len(targets) + 1) // 2]},
        "other": {"r": 6, "use_rslora": True, "target_modules": targets[1:]},
    }
    return {
        name: make_adapter(root / name, entry, seed=i, **config) for i, (name, config) in enumerate(configs.items())
    }


def _layers(model: nn.Module) -> dict[str, Any]:
    """Name → LoRA layer."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_embedding_A")}


def _slot_params(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    marked = {f".lora_{part}.{adapter_name}" for part in ("A", "B", "embedding_A", "embedding_B")}
    return {name: param for name, param in model.named_parameters() if any(mark in f".{name}" for mark in marked)}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _contents(model: nn.Module) -> dict[str, bytes]:
    """Every byte of the slots, padding included, and the scalings."""
    scalings = {f"{name}.scaling": _bytes(layer.scaling["default"].view(1)) for name, layer in _layers(model).items()}
    return {name: _bytes(param) for name, param in _slot_params(model).items()} | scalings


# --- where things are -----------------------------------------------------------------------------------------------


@ENTRIES
def test_one_arena_holds_every_part_and_every_scaling(entry: Entry, tmp_path: Path) -> None:
    model = entry.build()
    hotslot.attach(model, adapters=_adapters(tmp_path, entry))
    params = list(_slot_params(model).values())
    scalings = [layer.scaling["default"] for layer in _layers(model).values()]
    assert len(params) >= 2 * len(scalings) > 0
    assert len({_storage(tensor) for tensor in [*params, *scalings]}) == 1
    assert all(param.data_ptr() % 64 == 0 and param.is_contiguous() for param in params)
    assert all(scaling.dim() == 0 and scaling.dtype == torch.float32 for scaling in scalings)
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in [*params, *scalings])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))  # nothing overlaps
    base = {_storage(param) for name, param in model.named_parameters() if name not in _slot_params(model)}
    assert _storage(params[0]) not in base


@pytest.mark.parametrize("padded", [False, True])
def test_parameters_stay_the_same_objects(padded: bool, tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders = _adapters(tmp_path, entry)
    model = fresh(entry, folders["small" if padded else "dense"])
    before = _slot_params(model)
    facts = {name: (param.requires_grad, param.dtype, param.shape) for name, param in before.items()}
    hotslot.attach(model, adapters=folders)
    after = _slot_params(model)
    assert all(after[name] is param for name, param in before.items())
    assert len({_storage(param) for param in after.values()}) == 1
    for name, param in before.items():
        assert facts[name][:2] == (param.requires_grad, param.dtype)
        assert (facts[name][2] == param.shape) is not padded


def test_pefts_preparing_replaces_them(tmp_path: Path) -> None:
    """The control."""
    entry = ZOO["mlp"]
    model = fresh(entry, _adapters(tmp_path, entry)["small"])
    before = _slot_params(model)
    peft_prepare(model, target_rank=8)
    assert not any(_slot_params(model)[name] is param for name, param in before.items())


def test_an_optimizer_made_before_attaching_trains_what_is_in_the_arena(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folder = _adapters(tmp_path, entry)["dense"]
    model = fresh(entry, folder)
    params = _slot_params(model)
    for param in params.values():
        param.requires_grad_(True)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    hotslot.attach(model, adapters={"dense": folder})
    arena = {_storage(param) for param in params.values()}
    before = entry.output(model, entry.inputs())
    model(**entry.inputs()).sum().backward()
    optimizer.step()
    assert {_storage(param) for param in params.values()} == arena
    assert len(arena) == 1
    assert not torch.equal(entry.output(model, entry.inputs()), before)


def test_adapters_of_two_names_have_two_arenas(tmp_path: Path) -> None:
    """Swapping one changes no byte of the other; what is detached leaves the other as it is."""
    entry = ZOO["mlp"]
    folders = _adapters(tmp_path, entry)
    model = fresh(entry, folders["dense"])
    with expected_peft_warnings():
        model.load_adapter(str(folders["other"]), adapter_name="default_2")
    first = hotslot.attach(model, adapters=folders)
    second = hotslot.attach(model, adapters=folders, adapter_name="default_2")
    params = _slot_params(model), _slot_params(model, "default_2")
    assert len({_storage(param) for param in params[0].values()} | {_storage(p) for p in params[1].values()}) == 2
    kept = {name: _bytes(param) for name, param in params[1].items()}
    scalings = {name: float(layer.scaling["default_2"]) for name, layer in _layers(model).items()}
    for name in ("small", "dense", "other"):
        first.activate(name)
    first.deactivate()
    first.detach()
    assert {name: _bytes(param) for name, param in params[1].items()} == kept
    assert {name: float(layer.scaling["default_2"]) for name, layer in _layers(model).items()} == scalings
    assert all(isinstance(layer.scaling["default"], float) for layer in _layers(model).values())
    with same_addresses(model):
        second.activate("small")
    model.set_adapter("default_2")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders["small"]))


def test_attaching_and_swapping_inside_inference_mode_leaves_a_model_that_trains(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folders = _adapters(tmp_path, entry)
    model = entry.build()
    with torch.inference_mode():
        swapper = hotslot.attach(model, adapters=folders)
        swapper.activate("small")
        _layers(model)["up"].scaling["default"] = 1.5
        swapper.activate("other")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders["other"]))
    params = _slot_params(model)
    assert not any(param.is_inference() for param in params.values())
    assert not any(layer.scaling["default"].is_inference() for layer in _layers(model).values())
    for param in params.values():
        param.requires_grad_(True)
    model(**entry.inputs()).sum().backward()
    assert all(param.grad is not None for name, param in params.items())


def test_a_swap_counts_up_the_version_of_every_part(tmp_path: Path) -> None:
    """Whether it writes the arena in one piece or each part by itself. Reading counts nothing."""
    entry = ZOO["mlp"]
    swapper = hotslot.attach(model := entry.build(), adapters=_adapters(tmp_path, entry))
    for change in (lambda: swapper.activate("dense"), lambda: swapper.activate("small"), swapper.deactivate):
        before = {name: param._version for name, param in _slot_params(model).items()}
        model(**entry.inputs())
        assert {name: param._version for name, param in _slot_params(model).items()} == before
        change()
        assert all(param._version > before[name] for name, param in _slot_params(model).items())


def test_a_swap_between_forward_and_backward_is_noticed_by_autograd(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folders = _adapters(tmp_path, entry)
    swapper = hotslot.attach(model := entry.build().requires_grad_(False), adapters=folders)
    for param in _slot_params(model).values():
        param.requires_grad_(True)
    for change in (lambda: swapper.activate("dense"), swapper.deactivate, swapper.rollback):
        loss = model(**entry.inputs()).square().sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    model(**entry.inputs()).square().sum().backward()  # the control


# --- memory that somebody else has moved ----------------------------------------------------------------------------


def _to_double(model: nn.Module) -> None:
    model.double()


def _rebind_data(model: nn.Module) -> None:
    for param in _slot_params(model).values():
        param.data = param.data.clone()


def _rebind_one(model: nn.Module) -> None:
    param = next(iter(_slot_params(model).values()))
    param.data = torch.zeros_like(param)


@pytest.mark.parametrize("move", [_to_double, _rebind_data, _rebind_one], ids=lambda move: move.__name__.strip("_"))
def test_moved_memory_is_put_right_at_the_next_swap(move: Callable[[nn.Module], None], tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folders = _adapters(tmp_path, entry)
    swapper = hotslot.attach(model := entry.build(), adapters=folders)
    swapper.activate("dense")
    move(model)
    assert len({_storage(param) for param in _slot_params(model).values()}) > 1 or move is _to_double
    for name in ("small", "dense", "other"):
        swapper.activate(name)
        assert len({_storage(param) for param in _slot_params(model).values()}) == 1
        dtype = next(model.parameters()).dtype
        got = entry.output(model, entry.inputs(dtype=dtype))
        assert_same_output(got, fresh_output(entry, folders[name], dtype=dtype))


def test_a_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folders = _adapters(tmp_path, entry)
    swapper = hotslot.attach(model := entry.build(), adapters=folders)
    param = _layers(model)["up"].lora_A["default"].weight
    param.data = torch.zeros(3, 12)
    with pytest.raises(hotslot.errors.ModelError, match=r"(?s)another shape.*up.lora_A.weight.*\(3, 12\).*\(8, 12\)"):
        swapper.activate("small")


def test_a_copy_of_the_model_has_memory_of_its_own(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folders = _adapters(tmp_path, entry)
    swapper = hotslot.attach(model := entry.build(), adapters=folders)
    swapper.activate("dense")
    twin = copy.deepcopy(model)
    mine, its = _slot_params(model), _slot_params(twin)
    assert not {_storage(param) for param in mine.values()} & {_storage(param) for param in its.values()}
    assert all(isinstance(layer.scaling["default"], float) for layer in _layers(twin).values())
    swapper.deactivate()
    assert_same_output(entry.output(twin, entry.inputs()), fresh_output(entry, folders["dense"]))


# --- scalings -------------------------------------------------------------------------------------------------------


def _assign(layer: Any) -> None:
    layer.scaling["default"] = 0.3


def _assign_a_tensor(layer: Any) -> None:
    layer.scaling["default"] = torch.tensor(0.7, dtype=torch.float64)


def _multiply(layer: Any) -> None:
    layer.scaling["default"] *= 3


def _update(layer: Any) -> None:
    layer.scaling.update({"default": 0.9})


def _merge_in(layer: Any) -> None:
    layer.scaling |= {"default": 1.9}


def _set_scale(layer: Any) -> None:
    layer.set_scale("default", 0.55)


def _scale_layer(layer: Any) -> None:
    layer.scale_layer(0.7)


def _unscale_layer(layer: Any) -> None:
    layer.scale_layer(5)
    layer.unscale_layer(2)


def _unscale_wholly(layer: Any) -> None:
    layer.scale_layer(5)
    layer.unscale_layer()


SCALERS = (
    _assign, _assign_a_tensor, _multiply, _update, _merge_in, _set_scale, _scale_layer, _unscale_layer, _unscale_wholly
)  # fmt: skip


@pytest.mark.parametrize("scale", SCALERS, ids=lambda scale: scale.__name__.strip("_"))
def test_a_scaling_is_written_into_the_arena_and_nothing_recompiles(
    scale: Callable[[Any], None], tmp_path: Path
) -> None:
    """It does what it does on PEFT's layers, and the next swap finds the scaling where it was."""
    entry = ZOO["mlp"]
    folders = _adapters(tmp_path, entry)
    model, oracle = fresh(entry, folders["dense"]), fresh(entry, folders["small"])
    swapper = hotslot.attach(model, adapters=folders)
    compiled = torch.compile(model, backend="eager")
    entry.output(compiled, entry.inputs())
    swapper.activate("small")
    views = {name: layer.scaling["default"] for name, layer in _layers(model).items()}
    for layer in _layers(oracle).values():
        scale(layer)
    with no_recompile(), same_addresses(model):
        for layer in _layers(model).values():
            if layer.lora_alpha["default"] == 3:  # a target of the small one
                scale(layer)
        assert_same_output(entry.output(compiled, entry.inputs()), entry.output(oracle, entry.inputs()))
        swapper.activate("dense")
        assert_same_output(entry.output(compiled, entry.inputs()), fresh_output(entry, folders["dense"]))
    assert all(layer.scaling["default"] is views[name] for name, layer in _layers(model).items())
    assert {_storage(view) for view in views.values()} == {_storage(p) for p in _slot_params(model).values()}


def _rebind_scaling(layer: Any) -> None:
    layer.scaling = {"default": 9.0}


def _delete_and_set(layer: Any) -> None:
    del layer.scaling["default"]
    layer.scaling["default"] = 9.0


def _put_past_it(layer: Any) -> None:
    dict.__setitem__(layer.scaling, "default", 9.0)


@pytest.mark.parametrize("scale", [_update, _merge_in, _rebind_scaling, _delete_and_set, _put_past_it])
def test_a_scaling_that_was_replaced_is_put_right_at_the_next_swap(
    scale: Callable[[Any], None], tmp_path: Path
) -> None:
    """Else the swap would write into a view that nobody reads."""
    entry = ZOO["mlp"]
    folders = _adapters(tmp_path, entry)
    swapper = hotslot.attach(model := entry.build(), adapters=folders)
    swapper.activate("dense")
    for layer in _layers(model).values():
        scale(layer)
    for name in ("small", "dense", "other"):
        swapper.activate(name)
        assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders[name]))


def test_pefts_own_scaling_recompiles(tmp_path: Path) -> None:
    """The control."""
    entry = ZOO["mlp"]
    model = fresh(entry, _adapters(tmp_path, entry)["dense"])
    compiled = torch.compile(model, backend="eager")
    entry.output(compiled, entry.inputs())
    for layer in _layers(model).values():
        layer.set_scale("default", 0.55)
    with pytest.raises(RecompiledError, match="scaling"), no_recompile():
        entry.output(compiled, entry.inputs())


def test_a_changed_scaling_is_part_of_what_a_rollback_brings_back(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    swapper = hotslot.attach(model := entry.build(), adapters=_adapters(tmp_path, entry))
    swapper.activate("dense")
    _layers(model)["up"].scaling["default"] = 0.25
    before = _contents(model)
    swapper.activate("small")
    assert _contents(model) != before
    swapper.rollback()
    assert _contents(model) == before


def test_a_thousand_scalings_to_and_fro_drift_no_further_than_rounding(tmp_path: Path) -> None:
    """diffusers scales before each forward and unscales after it."""
    entry = ZOO["mlp"]
    swapper = hotslot.attach(model := entry.build(), adapters=_adapters(tmp_path, entry))
    swapper.activate("other")
    layer = _layers(model)["down"]
    before = float(layer.scaling["default"])
    for _ in range(1000):
        layer.scale_layer(0.7)
        layer.unscale_layer(0.7)
    assert float(layer.scaling["default"]) == pytest.approx(before, rel=3e-7)


# --- what is written ------------------------------------------------------------------------------------------------


@ENTRIES
def test_the_staged_path_writes_the_same_bytes(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy of the adapter's bytes and a scatter, as to a GPU, against copies straight into the slots."""
    folders = _adapters(tmp_path, entry)
    direct = hotslot.attach(one := entry.build(), adapters=folders)
    compile_, staged = Memory.compile, []

    def compile_staged(self: Memory, block: Any, *args: Any, **kwargs: Any) -> Any:
        writes = compile_(self, block, *args, **{**kwargs, "stage": True})
        staged.append(len(writes.staged))
        return writes

    monkeypatch.setattr(Memory, "compile", compile_staged)
    through = hotslot.attach(other := entry.build(), adapters=folders)
    last = _contents(other)
    for name in ("dense", "small", "other", "small", "dense", "other", "dense"):
        direct.activate(name)
        through.activate(name)
        assert _contents(one) == _contents(other) != last
        last = _contents(other)
    assert max(staged) == 1


@ENTRIES
def test_nothing_is_left_of_a_larger_adapter(entry: Entry, tmp_path: Path) -> None:
    """After any way through other adapters, every byte is as if this one had been the first."""
    folders = _adapters(tmp_path, entry)
    first = {}
    for name in folders:
        hotslot.attach(model := entry.build(), adapters=folders).activate(name)
        first[name] = _contents(model)
    swapper = hotslot.attach(model := entry.build(), adapters=folders)
    neutral = _contents(model)
    assert all(one != other for one, other in itertools.combinations([neutral, *first.values()], 2))  # the control
    for before, after in itertools.permutations(folders, 2):
        swapper.activate(before)
        swapper.activate(after)
        assert _contents(model) == first[after], (before, after)
        swapper.deactivate()
        assert _contents(model) == neutral
    assert not any(param.any() for param in _slot_params(model).values())


def test_padding_is_zero_to_the_last_byte(tmp_path: Path) -> None:
    """And without clearing it would not be: the control is the adapter before."""
    entry = ZOO["mlp"]
    folders = _adapters(tmp_path, entry)
    swapper = hotslot.attach(model := entry.build(), adapters=folders)
    swapper.activate("dense")
    up = _layers(model)["up"]
    assert up.lora_A["default"].weight[1:].all()
    assert up.lora_B["default"].weight[:, 1:].all()
    swapper.activate("small")
    assert up.lora_A["default"].weight[0].all()
    assert not up.lora_A["default"].weight[1:].any()
    assert not up.lora_B["default"].weight[:, 1:].any()
    assert not _layers(model)["down"].lora_A["default"].weight.any()  # no target of the small one


def test_what_a_user_wrote_into_the_padding_is_cleared_too(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folders = _adapters(tmp_path, entry)
    swapper = hotslot.attach(model := entry.build(), adapters=folders)
    swapper.activate("small")
    with torch.no_grad():
        for param in _slot_params(model).values():
            param.fill_(7)
    swapper.activate("other")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders["other"]))
    swapper.deactivate()
    assert not any(param.any() for param in _slot_params(model).values())


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
def test_a_grouped_convolution_is_padded_group_by_group(name: str, tmp_path: Path) -> None:
    """Rank 4 of 2 groups in a slot of rank 8: each group's 2 rows begin its own block of 4."""
    entry = ZOO[name]
    small, large = (make_adapter(tmp_path / str(r), entry, seed=r, r=r, target_modules=["grouped"]) for r in (4, 8))
    swapper = hotslot.attach(model := entry.build(), adapters={"small": small, "large": large})
    swapper.activate("large")
    swapper.activate("small")
    want = fresh(entry, small).get_submodule("base_model.model.grouped")
    got = _layers(model)["grouped"]
    down, up = got.lora_A["default"].weight, got.lora_B["default"].weight
    assert torch.equal(down[[0, 1, 4, 5]], want.lora_A["default"].weight)
    assert not down[[2, 3, 6, 7]].any()
    assert torch.equal(up[:, :2], want.lora_B["default"].weight)
    assert not up[:, 2:].any()
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, small))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("slot_dtype", DTYPES)
@pytest.mark.parametrize("file_dtype", DTYPES)
@pytest.mark.parametrize("name", ["mlp", "embedding", "conv2d"])
def test_a_file_of_another_dtype_becomes_what_a_fresh_load_makes_of_it(
    name: str, file_dtype: torch.dtype, slot_dtype: torch.dtype, tmp_path: Path
) -> None:
    """Bit for bit, in slots of the base's own dtype, padded and not."""
    entry = ZOO[name]
    first, second = (
        make_adapter(tmp_path / str(r), entry, seed=r, r=r, file_dtype=file_dtype, target_modules=list(entry.targets))
        for r in (4, 2)
    )
    model = fresh(entry, first, dtype=slot_dtype, autocast_adapter_dtype=False)
    swapper = hotslot.attach(model, adapters={"first": first, "second": second})
    for adapter, folder, rank in (("second", second, 2), ("first", first, 4)):
        swapper.activate(adapter)
        want = _slot_params(fresh(entry, folder, dtype=slot_dtype, autocast_adapter_dtype=False))
        got = _slot_params(model)
        groups = {key: getattr(layer.get_base_layer(), "groups", 1) for key, layer in _layers(model).items()}
        for key, param in got.items():
            layer, _, part = key.partition(".lora_")
            suffix = "lora_" + part.replace(".default", "")
            assert param.dtype == want[key].dtype == slot_dtype
            assert _bytes(corner(param.detach(), suffix, rank, groups[layer])) == _bytes(want[key])


def test_a_mixture_of_dtypes_in_one_file(tmp_path: Path) -> None:
    """safetensors sorts them by size: the parts of one module are far apart."""
    from safetensors.torch import load_file, save_file

    entry = ZOO["llama"]
    folder = make_adapter(tmp_path, entry, seed=0, r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    mixed = {name: value.to(DTYPES[i % 4]).contiguous() for i, (name, value) in enumerate(sorted(tensors.items()))}
    save_file(mixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    swapper = hotslot.attach(model := entry.build(), adapters={"mixed": folder})
    swapper.activate("mixed")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folder), exact=True)


# --- blocks ---------------------------------------------------------------------------------------------------------


def _layout(adapter: Any, room: Mapping[str, int], dtype: torch.dtype, groups: Mapping[str, int]) -> Layout:
    """A layout in which each target has the rank that `room` says."""
    shapes = []
    for fqn, target in adapter.targets.items():
        parts = {
            suffix: _padded_shape(suffix, spec.shape, room[fqn], groups[fqn]) for suffix, spec in target.parts.items()
        }
        shapes.append(SlotShape(fqn, room[fqn], groups[fqn], 1, dtype, parts))
    return arrange(shapes)


def _padded_shape(suffix: str, shape: tuple[int, ...], rank: int, groups: int) -> tuple[int, ...]:
    if suffix == "lora_B.bias":
        return shape
    first = suffix.endswith("A") or ".A" in suffix or "_A" in suffix
    return (rank, *shape[1:]) if first else (shape[0], rank // groups, *shape[2:])


def test_a_dense_adapter_is_one_single_copy(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folder = make_adapter(tmp_path / "dense", entry, seed=0, r=4, target_modules=list(entry.targets[:7]))
    swapper = hotslot.attach(entry.build(), adapters={"dense": folder})
    adapter = interpret(hotslot.checkpoint.read(folder))
    block = pack(adapter, swapper.engine.binding.memory.layout)
    assert (len(block.runs), len(block.tiles)) == (1, 0)
    assert block.runs[0].elements * 4 == block.nbytes == swapper.activate("dense").nbytes
    # the control: in larger slots each part goes into a corner of its own
    larger = make_adapter(tmp_path / "larger", entry, seed=0, r=8, target_modules=list(entry.targets[:7]))
    swapper = hotslot.attach(entry.build(), adapters={"dense": folder, "larger": larger})
    block = pack(adapter, swapper.engine.binding.memory.layout)
    assert (len(block.runs), len(block.tiles)) == (0, len(adapter.targets) * 2)


# What a hypothetical base layer may be: (down's shape without its rank, up's without its rank, groups)
SIZES = st.integers(1, 9)
LAYERS = st.one_of(
    st.tuples(st.tuples(SIZES), SIZES.map(lambda out: (out,)), st.just(1)),
    st.tuples(st.tuples(SIZES, st.integers(1, 3)), SIZES.map(lambda out: (out, 1)), st.integers(1, 3)),
    st.tuples(st.tuples(SIZES, st.integers(1, 2), st.just(3)), SIZES.map(lambda out: (out, 1, 1)), st.integers(1, 3)),
)
FLOATS = st.sampled_from(DTYPES)


@st.composite
def adapters(draw: Callable[[Any], Any]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, int], dict[str, int]]:
    """Tensors of a file, its config, and for each module the slot's rank and groups."""
    tensors, ranks, room, groups = {}, {}, {}, {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    bias = draw(st.booleans())
    for i in range(draw(st.integers(1, 4))):
        fqn = draw(st.sampled_from(["a", "b.0", "b.10", "layer", "x.lora_A"])) + f".m{i}"
        down, up, groups[fqn] = draw(LAYERS)
        ranks[fqn] = groups[fqn] * draw(st.integers(1, 4))
        room[fqn] = ranks[fqn] + groups[fqn] * draw(st.sampled_from([0, 0, 1, 3]))
        shapes = {"lora_A.weight": (ranks[fqn], *down), "lora_B.weight": (up[0], ranks[fqn] // groups[fqn], *up[1:])}
        if bias:
            shapes["lora_B.bias"] = (up[0],)
        for suffix, shape in shapes.items():
            tensors[f"base_model.model.{fqn}.{suffix}"] = torch.randn(shape, generator=generator).to(draw(FLOATS))
    pattern = {fqn.replace(".", r"\."): rank for fqn, rank in ranks.items()}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "rank_pattern": pattern, "lora_bias": bias}
    return tensors, config, room, groups


@settings(max_examples=150, deadline=None, derandomize=True)
@given(adapters(), FLOATS, st.booleans())
def test_a_packed_adapter_lands_where_a_slow_reference_puts_it(
    drawn: tuple[dict[str, Tensor], dict[str, Any], dict[str, int], dict[str, int]], dtype: torch.dtype, dirty: bool
) -> None:
    """Runs copied flat and tiles filled into corners give each part of each slot, element by element."""
    tensors, config, room, groups = drawn
    adapter = interpret(from_tensors(tensors, config))
    layout = _layout(adapter, room, dtype, groups)
    block = pack(adapter, layout)
    arena = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for run in block.runs:
        source = block.data[run.start : run.start + run.elements * run.source.itemsize].view(run.source)
        arena[run.offset : run.offset + run.elements * run.target.itemsize].view(run.target).copy_(source)
    for tile in block.tiles:
        values = block.data[tile.start : tile.start + math.prod(tile.shape) * tile.source.itemsize].view(tile.source)
        place = _place(arena, layout, tile.fqn, tile.suffix)
        fill(place, tile.suffix, values.view(tile.shape), block.ranks[tile.fqn], groups[tile.fqn])
    for fqn, target in adapter.targets.items():
        for suffix in target.parts:
            values = tensors[f"base_model.model.{fqn}.{suffix}"].to(dtype)
            want = _slow(values, suffix, layout.places[fqn, suffix].shape, groups[fqn])
            assert _bytes(_place(arena, layout, fqn, suffix)) == _bytes(want)
    spans = sorted((p.offset, p.offset + p.dtype.itemsize * math.prod(p.shape)) for p in layout.places.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= layout.nbytes
    between = [arena[end:start] for (_, end), (start, _) in itertools.pairwise(spans)]
    assert not any(gap.any() for gap in between)  # no copy runs over into the alignment


def _place(arena: Tensor, layout: Layout, fqn: str, suffix: str) -> Tensor:
    place = layout.places[fqn, suffix]
    size = place.dtype.itemsize * math.prod(place.shape)
    return arena[place.offset : place.offset + size].view(place.dtype).view(place.shape)


def _slow(values: Tensor, suffix: str, shape: tuple[int, ...], groups: int = 1, experts: int = 1) -> Tensor:
    """`values` in a padded tensor of `shape`, one rank after the other."""
    padded = torch.zeros(shape, dtype=values.dtype)
    if suffix == "lora_B.bias":
        return values.clone()
    blocks = groups * experts if suffix == "lora_A.weight" else 1
    if suffix in ("lora_A.weight", "lora_embedding_A"):
        own, room = values.shape[0] // blocks, shape[0] // blocks
        for block in range(blocks):
            for i in range(own):
                padded[block * room + i] = values[block * own + i]
    else:
        for i in range(values.shape[1]):
            padded[:, i] = values[:, i]
    return padded


@st.composite
def parts(draw: Callable[[Any], Any]) -> tuple[str, tuple[int, ...], int, int, int, int]:
    """(suffix, shape of its own rank, rank, room, groups, experts)"""
    suffix = draw(st.sampled_from(["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"]))
    groups, experts = 1, 1
    if "embedding" not in suffix:
        groups, experts = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (1, 4)]))
    rank = groups * draw(st.integers(1, 4))
    room = rank + groups * draw(st.integers(0, 4))
    rest = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    first = suffix in ("lora_A.weight", "lora_embedding_A")
    shape = (rank * experts, *rest) if first else (rest[0], rank // groups * experts, *rest[1:])
    return suffix, shape, rank, room, groups, experts


@settings(max_examples=200, deadline=None, derandomize=True)
@given(parts(), st.data())
def test_corners_and_bands_are_those_of_a_slow_reference(
    part: tuple[str, tuple[int, ...], int, int, int, int], data: st.DataObject
) -> None:
    suffix, shape, rank, room, groups, experts = part
    padded_shape = list(shape)
    rank_dim = 0 if suffix in ("lora_A.weight", "lora_embedding_A") else 1
    padded_shape[rank_dim] = shape[rank_dim] // rank * room if rank_dim == 0 or groups == 1 else room // groups
    values = torch.arange(1.0, math.prod(shape) + 1).view(shape)
    padded = torch.zeros(padded_shape)
    fill(padded, suffix, values, rank, groups, experts)
    assert torch.equal(padded, _slow(values, suffix, tuple(padded_shape), groups, experts))
    assert torch.equal(corner(padded, suffix, rank, groups, experts), values)
    # clearing the band from a lower rank on leaves what that rank alone would have filled
    lower = groups * data.draw(st.integers(0, rank // groups))
    band(padded, suffix, lower, room, groups, experts).zero_()
    kept = corner(values, suffix, lower, groups, experts)
    assert torch.equal(padded, _slow(kept, suffix, tuple(padded_shape), groups, experts))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["dense", "small", "other", None, "rollback"]), min_size=2, max_size=12))
def test_any_sequence_of_swaps_ends_in_the_same_bytes(way: list[str | None]) -> None:
    """And without the arena being allocated anew."""
    entry, folders, first = _prepared()
    swapper = hotslot.attach(model := entry.build(), adapters=folders)
    history: list[str | None] = [None]
    with same_addresses(model):
        for step in way:
            if step == "rollback":
                if len(history) > 1:
                    swapper.rollback()
                    history.append(history[-2])
            elif step != history[-1]:
                swapper.activate(step) if step is not None else swapper.deactivate()
                history.append(step)
            assert _contents(model) == first[history[-1]]


_made: list[Any] = []


def _prepared() -> tuple[Entry, dict[str, Path], dict[str | None, dict[str, bytes]]]:
    """Adapters of the convolutions, and the bytes of each when it is the first; made once."""
    if not _made:
        import tempfile

        entry = ZOO["conv2d"]
        _made.append(tempfile.TemporaryDirectory())
        folders = _adapters(Path(_made[0].name), entry)
        first: dict[str | None, dict[str, bytes]] = {}
        for name in (None, *folders):
            swapper = hotslot.attach(model := entry.build(), adapters=folders)
            swapper.activate(name) if name is not None else swapper.deactivate()
            first[name] = _contents(model)
        assert all(one != other for one, other in itertools.combinations(first.values(), 2))  # the control
        _made.append((entry, folders, first))
    return _made[1]
