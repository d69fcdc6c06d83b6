"""Adapters of one method take each other's place on a model that carries one: bit for bit what a fresh load gives."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

import hotslot
from adapters import make_adapter, save
from compiling import Backend
from hotslot.errors import DoesNotFitError, HotslotError, MergedError, ModelError, UnsupportedError
from hotslot.testing import no_recompile, same_addresses
from methods import METHODS, make_method_adapter, method_config, tensors_of
from oracle import assert_same_output, assert_unchanged, error, fresh, snapshot
from test_all_or_nothing import Fault, LineFault, OpFault
from zoo import ZOO, Entry

ROWS = [(name, entry) for name, row in METHODS.items() if row.in_place and row.available for entry in row.targets]
# Tensors and modules; and hooks of state_dict, which are there while a swapper is attached.
_SHOWN_ELSEWHERE = ("_parameters", "_buffers", "_modules", "_non_persistent", "_state_dict", "_load_state_dict")
BY_TASK = ("MULTITASK_PROMPT_TUNING", "POLY")  # which task it is comes with the input


@pytest.fixture(autouse=True)
def advice_of_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def output(name: str, entry: Entry, model: nn.Module) -> Tensor:
    inputs = entry.inputs(1)
    if "input_ids" in inputs:
        inputs["input_ids"][0] = torch.arange(4, 10)  # the tokens that TRAINABLE_TOKENS has
    if name in BY_TASK:
        inputs["task_ids"] = torch.tensor([0, 1])
    return entry.output(model, inputs)


def fresh_of(name: str, entry: Entry, folder: Path) -> Tensor:
    return output(name, entry, fresh(entry, folder))


def three(name: str, entry: Entry, root: Path) -> list[Path]:
    """Adapters of the method, the last of which differs from the others outside of its file, too."""
    options: list[dict[str, Any]] = [{}, {}, dict(METHODS[name].outside)]
    return [
        make_method_adapter(root / str(seed), name, entry, seed=seed, **option) for seed, option in enumerate(options)
    ]


def outside(model: nn.Module) -> dict[str, str]:
    """All that PEFT's modules have beside parameters and buffers, and the configs."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith(_SHOWN_ELSEWHERE):
                found[f"{path}.{name}"] = str(value)
    return found


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "entry_name"), ROWS)
def test_swaps_in_any_order_are_fresh_loads(name: str, entry_name: str, tmp_path: Path) -> None:
    entry = ZOO[entry_name]
    folders = three(name, entry, tmp_path)
    wanted = [fresh_of(name, entry, folder) for folder in folders]
    assert all(not torch.equal(first, second) for first, second in itertools.pairwise(wanted))
    model = fresh(entry, folders[0])
    before, parameters = tensors_of(model), {key: id(param) for key, param in model.named_parameters()}
    swapper = hotslot.attach(model, {str(i): folder for i, folder in enumerate(folders)})
    with same_addresses(model):
        for number in [*random.Random(name).choices(range(3), k=6), 2]:
            swapper.activate(str(number))
            assert_same_output(output(name, entry, model), wanted[number], exact=True)
    assert {key: id(param) for key, param in model.named_parameters()} == parameters
    model.save_pretrained(str(tmp_path / "saved"))
    assert_same_output(fresh_of(name, entry, tmp_path / "saved"), wanted[2], exact=True)
    swapper.rollback()
    swapper.detach()
    after = tensors_of(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert_same_output(output(name, entry, model), wanted[0], exact=True)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.outside and row.available])
def test_control_the_files_tensors_alone_are_another_adapter(name: str, tmp_path: Path) -> None:
    """Else the test above would say nothing of scalings, seeds and the like."""
    entry = ZOO[next(iter(METHODS[name].targets))]
    folders = three(name, entry, tmp_path)
    model = fresh(entry, folders[0])
    try:
        set_peft_model_state_dict(model, load_peft_weights(str(folders[2])))
    except ValueError:  # it says itself that some are missing
        return
    assert not torch.equal(output(name, entry, model), fresh_of(name, entry, folders[2]))


@pytest.mark.parametrize("name", [name for name, _ in ROWS if name not in ("LORA", "P_TUNING")])
def test_an_adapter_that_is_being_trained_gives_way(name: str, tmp_path: Path) -> None:
    entry = ZOO[next(iter(METHODS[name].targets))]
    folder = make_method_adapter(tmp_path / "new", name, entry, seed=1)
    model = get_peft_model(entry.build(), method_config(name, entry)).eval()
    swapper = hotslot.attach(model, {"new": folder})
    swapper.activate("new")
    assert_same_output(output(name, entry, model), fresh_of(name, entry, folder), exact=True)


# --- everything of it -------------------------------------------------------------------------------------------------


def attached(name: str, root: Path, entry: Entry = ZOO["llama"]) -> tuple[nn.Module, hotslot.Swapper, list[Path]]:
    """A model that carries an adapter, and a swapper that has it and two others as "0", "1" and "2"; none is merged."""
    folders = three(name, entry, root)
    model = fresh(entry, folders[0])
    return model, hotslot.attach(model, {str(i): folder for i, folder in enumerate(folders)}, route="side"), folders


def test_what_was_trained_comes_back(tmp_path: Path) -> None:
    model, swapper, _ = attached("LOHA", tmp_path)
    with torch.no_grad():
        for key, param in model.named_parameters():
            if "hada_" in key:
                param.mul_(1.5)
    before = snapshot(model), outside(model)
    with swapper.using("2"):
        assert swapper.active == "2"
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)
    swapper.activate("1")
    swapper.detach()
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


def test_a_trainers_step_is_live_at_once(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    model, swapper, folders = attached("VERA", tmp_path)
    swapper.activate("1")
    version = swapper.version
    tensors = {key: value * 1.5 for key, value in load_peft_weights(str(folders[1])).items()}
    report = swapper.update("1", tensors)
    assert report is not None
    assert swapper.version != version
    set_peft_model_state_dict(model_of := fresh(entry, folders[1]), tensors)
    assert_same_output(output("VERA", entry, model), output("VERA", entry, model_of), exact=True)


def test_a_config_says_what_is_live(tmp_path: Path) -> None:
    model, swapper, folders = attached("FOURIERFT", tmp_path)
    config = model.peft_config["default"]
    for number in (2, 1, 2):
        swapper.activate(str(number))
        assert model.peft_config["default"] is config
        wanted = fresh(ZOO["llama"], folders[number]).peft_config["default"].to_dict()
        assert config.to_dict() | {"inference_mode": True} == wanted | {"inference_mode": True}


def test_a_dropout_is_taken_over_and_given_back(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    first = make_method_adapter(tmp_path / "first", "VERA", entry, seed=1)
    second = make_method_adapter(tmp_path / "second", "VERA", entry, seed=2, vera_dropout=0.5)
    model = fresh(entry, first)
    before = [type(module) for module in model.modules()]
    swapper = hotslot.attach(model, {"first": first, "second": second})
    swapper.activate("second")
    model.train()
    assert not torch.equal(output("VERA", entry, model), output("VERA", entry, model)), "no dropout in training"
    model.eval()
    assert_same_output(output("VERA", entry, model), fresh_of("VERA", entry, second), exact=True)
    swapper.activate("first")
    assert [type(module) for module in model.modules()] == before


def test_layers_without_pefts_model_around_them(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folder = make_method_adapter(tmp_path / "new", "LOHA", entry, seed=1)
    base = entry.build()
    inject_adapter_in_model(LoHaConfig(r=4, alpha=3, target_modules=METHODS["LOHA"].targets["llama"]), base)
    swapper = hotslot.attach(base.eval(), {"new": folder})
    swapper.activate("new")
    assert_same_output(output("LOHA", entry, base), fresh_of("LOHA", entry, folder), exact=True)
    swapper.deactivate()
    assert_same_output(output("LOHA", entry, base), output("LOHA", entry, entry.build()), exact=True)


def test_heads_are_swapped_along(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    first, second = (
        make_method_adapter(tmp_path / str(seed), "LOHA", entry, seed=seed, modules_to_save=["lm_head"])
        for seed in (1, 2)
    )
    model = fresh(entry, first)
    before = snapshot(model)
    swapper = hotslot.attach(model, {"second": second})
    swapper.activate("second")
    assert_same_output(output("LOHA", entry, model), fresh_of("LOHA", entry, second), exact=True)
    model.save_pretrained(str(tmp_path / "saved"))
    assert_same_output(fresh_of("LOHA", entry, tmp_path / "saved"), fresh_of("LOHA", entry, second), exact=True)
    swapper.detach()
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["LOHA", "VERA", "OFT", "FOURIERFT", "PROMPT_TUNING", "TINYLORA"])
def test_other_dtypes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders = [make_method_adapter(tmp_path / str(seed), name, entry, seed=seed, dtype=dtype) for seed in (1, 2)]
    model, wanted = (fresh(entry, folder, dtype=dtype) for folder in folders)
    hotslot.attach(model, {"second": folders[1]}).activate("second")
    assert_same_output(output(name, entry, model), output(name, entry, wanted), exact=True)


@pytest.mark.parametrize(("name", "entry_name"), [row for row in ROWS if row[0] != "LORA"])
def test_an_adapter_does_nothing_or_is_refused(name: str, entry_name: str, tmp_path: Path) -> None:
    entry = ZOO[entry_name]
    model, swapper, folders = attached(name, tmp_path, entry)
    swapper.activate("1")
    before = snapshot(model), outside(model)
    if not METHODS[name].deactivates or (name, entry_name) == ("OFT", "conv2d"):  # PEFT's OFT loses what strides skip
        with pytest.raises(UnsupportedError, match="cannot be made to do nothing"):
            swapper.deactivate()
        assert_unchanged(before[0], snapshot(model))
        assert before[1] == outside(model)
        return
    with swapper.using(None):
        # Frozen, for torch takes other kernels for weights that are.
        wanted = output(name, entry, entry.build().requires_grad_(False))
        assert_same_output(output(name, entry, model), wanted, exact=True)
        model.save_pretrained(str(tmp_path / "nothing"))
        assert_same_output(fresh_of(name, entry, tmp_path / "nothing"), wanted, exact=True)
    assert_same_output(output(name, entry, model), fresh_of(name, entry, folders[1]), exact=True)


def test_what_waits_in_memory_is_counted_and_no_tensor_of_the_file_twice(tmp_path: Path) -> None:
    _, swapper, folders = attached("LOHA", tmp_path / "loha")
    sizes = [sum(tensor.nbytes for tensor in load_peft_weights(str(folder)).values()) for folder in folders]
    assert swapper.host_bytes == sum(sizes)
    swapper.unload("2")
    assert swapper.host_bytes == sum(sizes[:2])
    _, swapper, folders = attached("VERA", tmp_path / "vera")
    projections = 4 * 24 + 16 * 4, 4
    swapper.unload("0")
    swapper.unload("1")
    own = sum(tensor.nbytes for tensor in load_peft_weights(str(folders[2])).values())
    assert swapper.host_bytes == own + projections[0] * projections[1], "the file has a seed in their place"


# --- beside others ----------------------------------------------------------------------------------------------------


def test_another_adapter_on_the_model_changes_by_no_byte(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders = three("LOHA", entry, tmp_path)
    model = fresh(entry, folders[0])
    model.load_adapter(str(folders[1]), adapter_name="other")
    swapper = hotslot.attach(model.eval(), {"2": folders[2]})
    swapper.activate("2")
    assert_same_output(output("LOHA", entry, model), fresh_of("LOHA", entry, folders[2]), exact=True)
    model.set_adapter("other")
    assert_same_output(output("LOHA", entry, model), fresh_of("LOHA", entry, folders[1]), exact=True)


def test_what_another_adapter_shares_is_not_written(tmp_path: Path) -> None:
    """VeRA's projections: one object for all adapters of a model."""
    entry = ZOO["llama"]
    same = [make_method_adapter(tmp_path / str(seed), "VERA", entry, seed=seed) for seed in range(3)]
    key = make_method_adapter(tmp_path / "key", "VERA", entry, seed=3, projection_prng_key=1)
    model = fresh(entry, same[0])
    swapper = hotslot.attach(model, {"1": same[1], "key": key}, route="side")
    swapper.activate("key")
    swapper.rollback()
    model.load_adapter(str(same[2]), adapter_name="other")
    model.eval()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"vera_A\['default'\](.|\n)*'other' on the model shares with it"):
        swapper.activate("key")
    assert_unchanged(before, snapshot(model))
    swapper.activate("1")
    assert_same_output(output("VERA", entry, model), fresh_of("VERA", entry, same[1]), exact=True)
    model.set_adapter("other")
    assert_same_output(output("VERA", entry, model), fresh_of("VERA", entry, same[2]), exact=True)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LOHA", "IA3", "VERA", "OFT", "FOURIERFT"])
def test_where_tensors_alone_differ_nothing_compiles(name: str, tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders = [make_method_adapter(tmp_path / str(seed), name, entry, seed=seed) for seed in range(3)]
    model = fresh(entry, folders[0])
    swapper = hotslot.attach(model, {str(i): folder for i, folder in enumerate(folders)})
    compiled: Any = torch.compile(model, backend=Backend())
    output(name, entry, compiled)
    with no_recompile():
        for number in (1, 2, 0, 2):
            swapper.activate(str(number))
            assert_same_output(output(name, entry, compiled), fresh_of(name, entry, folders[number]), exact=True)
        if METHODS[name].deactivates:
            swapper.deactivate()
            wanted = output(name, entry, entry.build().requires_grad_(False))
            assert_same_output(output(name, entry, compiled), wanted, exact=True)


def test_control_another_scaling_compiles_anew(tmp_path: Path) -> None:
    """PEFT keeps it as a Python number, which compiled code has as a constant."""
    model, swapper, folders = attached("LOHA", tmp_path)
    entry = ZOO["llama"]
    compiled: Any = torch.compile(model, backend=Backend())
    output("LOHA", entry, compiled)
    swapper.activate("2")
    with pytest.raises(AssertionError), no_recompile():
        output("LOHA", entry, compiled)
    assert_same_output(output("LOHA", entry, compiled), fresh_of("LOHA", entry, folders[2]), exact=True)


# --- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("injector", ["line", "before", "amid"])
@pytest.mark.parametrize("name", ["LOHA", "VERA", "FOURIERFT", "PROMPT_TUNING"])
def test_a_swap_that_is_broken_off_has_not_happened(name: str, injector: str, tmp_path: Path) -> None:
    def fault(k: int) -> Any:
        return LineFault(k, KeyboardInterrupt) if injector == "line" else OpFault(k, Fault, injector)

    model, swapper, folders = attached(name, tmp_path)
    swapper.activate("1")
    before = snapshot(model), outside(model)
    counting = fault(-1)
    with counting:
        swapper.activate("2")
    swapper.activate("1")
    total = len(counting.steps)
    assert total
    for k in sorted({*range(1, total + 1, max(1, total // 60)), total}):
        with pytest.raises((KeyboardInterrupt, Fault)), fault(k):
            swapper.activate("2")
        assert_unchanged(before[0], snapshot(model))
        assert before[1] == outside(model)
        assert swapper.active == "1"
    swapper.activate("2")
    assert_same_output(output(name, ZOO["llama"], model), fresh_of(name, ZOO["llama"], folders[2]), exact=True)


# --- refused ----------------------------------------------------------------------------------------------------------

# Of adapters of the row's method that have other shapes, targets or parts.
BEYOND: list[tuple[str, dict[str, Any], type[HotslotError], str]] = [
    ("LOHA", {"target_modules": ["q_proj"]}, DoesNotFitError, "other parts"),
    ("LOHA", {"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]}, DoesNotFitError, "other parts"),
    ("LOKR", {"decompose_factor": 2}, DoesNotFitError, "other parts|zeros around it"),
    ("IA3", {"feedforward_modules": ["q_proj", "down_proj"]}, DoesNotFitError, "zeros around it"),
    ("OFT", {"oft_block_size": 4}, DoesNotFitError, "zeros around it"),
    ("VBLORA", {"num_vectors": 8}, DoesNotFitError, "zeros around it"),
    ("PVERA", {"generator_seed": 3}, UnsupportedError, "Generator"),
    ("PSOFT", {"psoft_mag_a": False}, UnsupportedError, "vector_a"),
    ("PROMPT_TUNING", {"num_virtual_tokens": 6}, DoesNotFitError, "zeros around it"),
    ("ADAPTION_PROMPT", {"adapter_layers": 2}, DoesNotFitError, "other parts"),
    ("TRAINABLE_TOKENS", {"token_indices": [4, 7]}, DoesNotFitError, "zeros around it"),
    ("POLY", {"n_skills": 3}, DoesNotFitError, "zeros around it"),
    ("SHADOW", {"shadow_num_hidden_layers": 2}, DoesNotFitError, "other parts"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "kind", "words"), BEYOND, ids=[f"{row[0]}-{row[1]}" for row in BEYOND])
def test_what_has_other_shapes_is_refused(
    name: str, options: dict[str, Any], kind: type[HotslotError], words: str, tmp_path: Path
) -> None:
    entry = ZOO[next(iter(METHODS[name].targets))]
    first = make_method_adapter(tmp_path / "first", name, entry, seed=1)
    second = make_method_adapter(tmp_path / "second", name, entry, seed=2, **options)
    model = fresh(entry, first)
    before = snapshot(model), outside(model)
    with pytest.raises(kind, match=words) as caught:
        hotslot.attach(model, {"second": second}, route="side")
    for line in ("where: ", "found: ", "expected: ", "next step: "):
        assert line in str(caught.value)
    assert_unchanged(before[0], snapshot(model))
    swapper = hotslot.attach(model, route="side")
    assert swapper.fits(first)
    assert not swapper.fits(second)
    with pytest.raises(kind, match=words):
        swapper.load("second", second)
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


def test_another_method_is_refused(tmp_path: Path) -> None:
    model, swapper, _ = attached("LOHA", tmp_path)
    before = snapshot(model)
    other = make_method_adapter(tmp_path / "other", "IA3", ZOO["llama"], seed=1)
    with pytest.raises(UnsupportedError, match="another method"):
        swapper.load("other", other)
    assert_unchanged(before, snapshot(model))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    model, swapper, _ = attached("LOHA", tmp_path)
    before = snapshot(model)
    other = make_method_adapter(tmp_path / "other", "LOHA", ZOO["bert"], seed=1, target_modules=["query", "value"])
    with pytest.raises(UnsupportedError, match="PEFT does not load"):
        swapper.load("other", other)
    assert_unchanged(before, snapshot(model))


def test_no_slots_are_put_beside_an_adapter_that_stays_active(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders = three("LOHA", entry, tmp_path)
    model = fresh(entry, folders[0])
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="stay active"):
        hotslot.attach(model, {"1": folders[1]}, adapter_name="another")
    with pytest.raises(UnsupportedError, match="no slots"):
        hotslot.attach(model, plan=hotslot.plan(entry.build(), target_modules=["k_proj"], max_rank=4))
    assert_unchanged(before, snapshot(model))


def blend(swapper: hotslot.Swapper) -> None:
    swapper.activate({"1": 0.5, "2": 0.5})


def weaken(swapper: hotslot.Swapper) -> None:
    swapper.activate({"1": 0.5})


def grow(swapper: hotslot.Swapper) -> None:
    swapper.grow(hotslot.plan(ZOO["llama"].build(), target_modules=["k_proj"], max_rank=4))


@pytest.mark.parametrize("act", [blend, weaken, grow])
def test_what_only_slots_can_do_is_refused(act: Callable[[hotslot.Swapper], None], tmp_path: Path) -> None:
    model, swapper, _ = attached("LOHA", tmp_path)
    swapper.activate("1")
    before = snapshot(model), outside(model)
    with pytest.raises(UnsupportedError):
        act(swapper)
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)
    assert swapper.active == "1"


def test_a_merged_adapter_is_not_swapped(tmp_path: Path) -> None:
    model, swapper, folders = attached("LOHA", tmp_path)
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(MergedError):
        swapper.activate("1")
    with pytest.raises(MergedError):
        swapper.load("3", folders[1])
    assert_unchanged(before, snapshot(model))
    model.unmerge_adapter()
    swapper.activate("1")


def test_an_adapter_that_was_deleted_is_not_swapped(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders = three("LOHA", entry, tmp_path)
    model = fresh(entry, folders[0])
    model.load_adapter(str(folders[1]), adapter_name="other")
    swapper = hotslot.attach(model, {"2": folders[2]})
    model.set_adapter("other")
    model.delete_adapter("default")
    with pytest.raises(ModelError):
        swapper.activate("2")


def test_a_prompt_encoder_that_is_being_trained_is_refused(tmp_path: Path) -> None:
    """The file has the prompt and not the encoder that makes it in training."""
    entry = ZOO["llama"]
    folder = make_method_adapter(tmp_path / "new", "P_TUNING", entry, seed=1)
    model = get_peft_model(entry.build(), method_config("P_TUNING", entry))
    with pytest.raises(DoesNotFitError, match=r"PeftModel\.from_pretrained"):
        hotslot.attach(model, {"new": folder})


@pytest.mark.parametrize("depth", [1, 2])
def test_what_peft_saves_of_a_mixture_is_not_all_of_it(depth: int, tmp_path: Path) -> None:
    """Why there is nothing to be right about: no fresh load is another's. A PEFT that saves all of it fails here."""
    entry = ZOO["llama"]
    expert = make_adapter(tmp_path / "expert", entry, seed=1, r=4, target_modules=["q_proj"])
    options = {"adapters": {"0": str(expert)}, "hidden_size": 16, "xlora_depth": depth, "xlora_size": 8}
    model = get_peft_model(entry.build(), method_config("XLORA", entry, **options, enable_softmax=False))
    first = [name for name, _ in model.named_parameters() if "classifier.layers.0." in name]
    save(model, tmp_path / "mixture")
    saved = load_peft_weights(str(tmp_path / "mixture"))
    assert first
    assert not any(".layers.0." in key or ".lora_" in key for key in saved)
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(output("XLORA", entry, PeftModel.from_pretrained(entry.build(), tmp_path / "mixture").eval()))
    assert error(*outputs) > 1e-3


def test_a_mixture_that_names_other_adapters_is_refused_by_name(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    model = get_peft_model(entry.build(), method_config("XLORA", entry))
    with pytest.raises(UnsupportedError, match="XLORA"):
        hotslot.attach(model)
