"""Training with slots: what the live adapter does not have is neither trained nor saved, as in a plain PEFT model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import nn

import hotslot
from adapters import expected_peft_warnings, make_adapter, save
from compiling import Backend
from hotslot.testing import no_recompile
from oracle import assert_same_output, error, fresh
from zoo import ZOO

LLAMA = ZOO["llama"]
ALIKE: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "r": 2}
MORE: dict[str, dict[str, Any]] = {
    "rank": {"r": 6},
    "targets": {"target_modules": ["q_proj", "down_proj", "v_proj"]},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5, 7]}},
    "base biases": {"bias": "all"},
}
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
# Both change values that have no gradient, too.
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("training")
    several = {"r": 4, "lora_bias": True, **MORE["targets"], **MORE["head"], **MORE["tokens"]}
    options = {"plain": {}, **MORE, "several": several}
    return {
        name: make_adapter(root / name, LLAMA, seed=i, **{**ALIKE, **more})
        for i, (name, more) in enumerate(options.items())
    }


def attached(folders: dict[str, Path], *names: str, **options: Any) -> tuple[nn.Module, hotslot.Swapper]:
    """A base with slots for all of these, of which the first is live."""
    model = LLAMA.build().requires_grad_(False)
    swapper = hotslot.attach(model, {name: folders[name] for name in names}, **options)
    swapper.activate(names[0])
    return model, swapper


def whole_slot(model: nn.Module) -> list[nn.Parameter]:
    """All that adapters have on the model, live or not, made trainable."""
    kinds = "lora_", "modules_to_save", "trainable_tokens_delta"
    params = [param for name, param in model.named_parameters() if any(kind in name for kind in kinds)]
    return [param.requires_grad_(True) for param in params]


def twin_of(folder: Path) -> tuple[Any, list[nn.Parameter]]:
    twin = fresh(LLAMA, folder)
    twin.set_requires_grad("default", True)
    return twin, [param for name, param in twin.named_parameters() if param.requires_grad]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, *, count: int = 3) -> None:
    """With the norm of all gradients clipped, so that each counts."""
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        LLAMA.read(model(**LLAMA.inputs())).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
        optimizer.step()
    model.eval()


def output(model: nn.Module) -> torch.Tensor:
    return LLAMA.output(model, LLAMA.inputs())


def saved_output(model: Any, folder: Path) -> torch.Tensor:
    """Of a fresh load of what the model saves."""
    save(model, folder)
    return output(fresh(LLAMA, folder))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("more", MORE)
def test_a_whole_slot_is_trained_as_the_adapter_alone(
    more: str, make: Optimizer, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, _ = attached(folders, "plain", more)
    before = output(model)
    steps(model, make(whole_slot(model)))
    twin, params = twin_of(folders["plain"])
    steps(twin, make(params))
    assert error(output(model), before) > 0.05
    assert_same_output(output(model), output(twin))
    assert_same_output(saved_output(model, tmp_path), output(model))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_momentum_of_the_adapter_before_reaches_nothing_that_is_not_saved(
    make: Optimizer, exclusive: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, swapper = attached(folders, "several", "plain", "dora", exclusive=exclusive)
    optimizer = make(whole_slot(model))
    for name in ("several", "plain", "dora", "plain"):
        swapper.activate(name)
        steps(model, optimizer)
        assert_same_output(saved_output(model, tmp_path / name), output(model))
    swapper.deactivate()
    steps(model, optimizer)
    assert_same_output(output(model), output(LLAMA.build()))
    for change in (lambda: swapper.activate("several"), swapper.rollback):  # to what was written by others
        change()
        steps(model, optimizer)
    assert_same_output(output(model), output(LLAMA.build()))


def test_compiled_training_stays_compiled_over_adapters_with_other_parts(folders: dict[str, Path]) -> None:
    model, swapper = attached(folders, "plain", "several", "dora")
    params, make = whole_slot(model), OPTIMIZERS["adamw"]
    compiled: Any = torch.compile(model, backend=Backend())
    steps(compiled, make(params))
    with no_recompile():
        for name in ("several", "dora", "plain"):
            swapper.activate(name)
            steps(compiled, make(params))
            twin, twins = twin_of(folders[name])
            steps(twin, make(twins))
            assert_same_output(output(model), output(twin))


@pytest.mark.parametrize("exclusive", [False, True])
def test_after_growing_a_whole_slot_is_still_trained_as_the_adapter_alone(
    exclusive: bool, folders: dict[str, Path]
) -> None:
    model, swapper = attached(folders, "plain", "bias", exclusive=exclusive)
    swapper.grow(hotslot.plan(model, [folders["rank"], folders["dora"]], max_blend=1))
    twin, params = twin_of(folders["plain"])
    for subject, trained in ((model, whole_slot(model)), (twin, params)):
        steps(subject, torch.optim.SGD(trained, lr=0.1))
    assert_same_output(output(model), output(twin))


def test_hooks_on_gradients_outlive_an_exclusive_attach(folders: dict[str, Path]) -> None:
    model = fresh(LLAMA, folders["plain"])
    params = whole_slot(model)
    seen: list[torch.Size] = []
    params[0].register_hook(lambda gradient: seen.append(gradient.shape))
    model.requires_grad_(False)
    hotslot.attach(model, {"rank": folders["rank"]}, exclusive=True)
    whole_slot(model)
    LLAMA.read(model(**LLAMA.inputs())).square().mean().backward()
    assert seen == [params[0].shape]


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # type: ignore[no-any-return]
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_trained_likewise_and_attached_anew(
    copied: Callable[[nn.Module], nn.Module], folders: dict[str, Path]
) -> None:
    model, _ = attached(folders, "plain", "several")
    other = copied(model)

    def assert_trained_as(name: str) -> None:
        twin, params = twin_of(folders[name])
        for subject, trained in ((other, whole_slot(other)), (twin, params)):
            steps(subject, torch.optim.SGD(trained, lr=0.1))
        assert_same_output(output(other), output(twin))

    assert_trained_as("plain")
    hotslot.attach(other, {name: folders[name] for name in ("plain", "several")}).activate("several")
    assert_trained_as("several")


def test_what_is_left_behind_is_trained_as_pefts_own(folders: dict[str, Path]) -> None:
    model = fresh(LLAMA, folders["bias"])
    swapper = hotslot.attach(model, {"plain": folders["plain"]})
    swapper.activate("plain")
    swapper.detach()
    model.set_requires_grad("default", True)
    twin, params = twin_of(folders["bias"])
    for subject, trained in ((model, [p for p in model.parameters() if p.requires_grad]), (twin, params)):
        steps(subject, torch.optim.SGD(trained, lr=0.1))
    assert_same_output(output(model), output(twin))
    assert not any(param._backward_hooks for param in model.parameters())


@pytest.mark.parametrize("kept", [True, False])
def test_adapters_trained_by_turns(kept: bool, folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """What `update` keeps goes on; what it does not keep is lost at the next swap, which says so."""
    names, make = ("bias", "head"), OPTIMIZERS["adamw"]
    model, swapper = attached(folders, *names)
    params = whole_slot(model)
    optimizers, twins = {name: make(params) for name in names}, {name: twin_of(folders[name]) for name in names}
    twins_optimizers = {name: make(trained) for name, (_, trained) in twins.items()}
    for name in (*names, *names):
        swapper.activate(name)
        with swapper.using(None):  # which comes back to what was trained
            assert_same_output(output(model), output(LLAMA.build()))
        steps(model, optimizers[name], count=1)
        steps(twins[name][0], twins_optimizers[name], count=1)
        with swapper.using(None):
            pass
        if kept:
            with expected_peft_warnings():
                swapper.update(name, get_peft_model_state_dict(model))
    lost = [record for record in caplog.records if "was trained while it was live" in record.getMessage()]
    assert len(lost) == (0 if kept else 2)
    if not kept:
        swapper.activate(names[-1])  # live already, but not as it was loaded
    for name in names:
        swapper.activate(name)
        assert_same_output(output(model), output(twins[name][0] if kept else fresh(LLAMA, folders[name])))


def test_a_rollback_brings_back_what_was_trained_and_loses_nothing_in_silence(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, swapper = attached(folders, "plain", "rank")
    steps(model, OPTIMIZERS["adamw"](whole_slot(model)))
    trained = output(model)
    assert not caplog.records
    swapper.activate("rank")
    assert len(caplog.records) == 1
    swapper.rollback()
    assert_same_output(output(model), trained, exact=True)
    swapper.deactivate()
    assert len(caplog.records) == 1  # once for an adapter


def test_an_optimizer_that_holds_a_frozen_slot_trains_nothing(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, swapper = attached(folders, "plain", "rank")
    optimizer = torch.optim.AdamW(model.parameters())
    model.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
    steps(model, optimizer)
    swapper.activate("rank")
    assert not caplog.records


@pytest.mark.parametrize("live", [None, "plain"])
def test_training_after_a_rollback_is_there_at_detach(live: str | None, folders: dict[str, Path]) -> None:
    """Of the adapter that came with the model, which no file has."""
    model = fresh(LLAMA, folders["rank"])
    swapper = hotslot.attach(model, {"plain": folders["plain"]})
    swapper.activate("plain")
    swapper.rollback()
    steps(model, OPTIMIZERS["adamw"](whole_slot(model)))
    trained = output(model)
    if live is not None:
        swapper.activate(live)
        swapper.deactivate()
    swapper.detach()
    assert_same_output(output(model), trained)


def test_detach_gives_gradients_the_shapes_of_their_parameters(folders: dict[str, Path]) -> None:
    model = fresh(LLAMA, folders["plain"])
    twin, twins = twin_of(folders["plain"])
    swapper = hotslot.attach(model, {"rank": folders["rank"]})
    params = whole_slot(model)
    for subject in (model, twin):
        LLAMA.read(subject(**LLAMA.inputs())).square().mean().backward()
    swapper.detach()
    for trained in (params, twins):
        torch.optim.SGD(trained, lr=0.1).step()
    assert_same_output(output(model), output(twin))
