"""The assertions of `hotslot.testing`: each passes where it should, and fails on all that it is there to notice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

import hotslot
from adapters import make_adapter
from compiling import Backend
from hotslot.testing import RecompiledError, matches_fresh_load, no_recompile, same_addresses
from oracle import fresh
from zoo import ZOO


class Scaled(nn.Module):
    """A layer whose float and whose index compiled code guards."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scaling = {"default": 0.5}
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scaling["default"] + self.index


@pytest.fixture
def backend() -> Backend:
    return Backend()


# --- no_recompile: passes


def test_calls_that_were_compiled_before_pass(backend: Backend) -> None:
    model = torch.compile(Scaled(), backend=backend)
    model(torch.ones(2, 3))
    with no_recompile():
        for _ in range(3):
            model(torch.ones(2, 3))
    assert backend.graphs == 1


def test_weights_written_in_place_pass(backend: Backend) -> None:
    module = Scaled()
    module.compile(backend=backend)
    before = module(torch.ones(2, 3))
    with no_recompile(), torch.no_grad():
        module.linear.weight.mul_(2)
        module.linear.bias.zero_()
    with no_recompile():
        assert not torch.equal(module(torch.ones(2, 3)), before)


def test_a_graph_break_that_was_compiled_around_passes(backend: Backend) -> None:
    compiled = torch.compile(_broken, backend=backend)
    compiled(torch.ones(3))
    with no_recompile():
        compiled(torch.ones(3))
    assert backend.graphs == 2


def test_an_error_of_the_block_comes_through_and_dynamos_config_with_it() -> None:
    import torch._dynamo

    def fail() -> None:
        assert torch._dynamo.config.error_on_recompile
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), no_recompile():
        fail()
    assert not torch._dynamo.config.error_on_recompile
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


# --- no_recompile: fails


def _broken(x: Tensor) -> Tensor:
    x = x + 1
    torch._dynamo.graph_break()
    return x * 2


def _broken_in_a_loop(x: Tensor) -> Tensor:
    for _ in range(2):  # dynamo cannot resume inside of a loop: the whole frame is left to eager
        x = x + 1
        torch._dynamo.graph_break()
    return x


def _another_shape(model: Scaled) -> None:
    model(torch.ones(5, 3))


def _another_dtype_of_the_weights(model: Scaled) -> None:
    model.double()
    model(torch.ones(2, 3).double())


def _another_float(model: Scaled) -> None:
    model.scaling["default"] = 0.25
    model(torch.ones(2, 3))


def _another_grad_mode(model: Scaled) -> None:
    with torch.no_grad():
        model(torch.ones(2, 3))


def _another_module(model: Scaled) -> None:
    model.linear = nn.Linear(3, 3, bias=False)
    model(torch.ones(2, 3))


def _first_compilation(model: Scaled) -> None:
    torch.compile(lambda x: x - 1, backend="eager")(torch.ones(3))


def _graph_break(model: Scaled) -> None:
    torch.compile(_broken, backend="eager")(torch.ones(3))


def _frame_left_to_eager(model: Scaled) -> None:
    torch.compile(_broken_in_a_loop, backend="eager")(torch.ones(3))


def _in_another_thread(model: Scaled) -> None:
    thread = threading.Thread(target=_another_shape, args=(model,))
    thread.start()
    thread.join()


def _in_an_except_clause(model: Scaled) -> None:
    try:
        _another_shape(model)
    except Exception as error:
        model.swallowed = error


RECOMPILES = (
    _another_shape,
    _another_dtype_of_the_weights,
    _another_float,
    _another_grad_mode,
    _another_module,
    _first_compilation,
    _graph_break,
    _frame_left_to_eager,
    _in_another_thread,
    _in_an_except_clause,
)


@pytest.mark.parametrize("change", RECOMPILES, ids=lambda change: change.__name__.strip("_"))
def test_recompilation_is_noticed(change: Callable[[Scaled], None]) -> None:
    model = Scaled()
    model.compile(backend="eager")
    model(torch.ones(2, 3))
    with no_recompile():
        model(torch.ones(2, 3))  # the control
    with pytest.raises(RecompiledError), no_recompile():
        change(model)


def test_the_error_says_what_was_recompiled_and_why() -> None:
    model = Scaled()
    model.compile(backend="eager")
    model(torch.ones(2, 3))
    with (
        pytest.raises(AssertionError, match=r"(?s)forward in .*test_testing.py.*scaling\['default'\] == 0.5"),
        no_recompile(),
    ):
        _another_float(model)
    with (
        pytest.raises(AssertionError, match=r"(?s)frames traced \d+ → \d+.*next step: call the compiled model"),
        no_recompile(),
    ):
        _first_compilation(model)


# --- no_recompile: where nothing can recompile because it runs in eager


def _thirty_layers(backend: Backend) -> Callable[[], Tensor]:
    layers = [Scaled(index) for index in range(30)]
    for layer in layers:
        layer.compile(backend=backend)

    @torch.no_grad()
    def forward() -> Tensor:
        x = torch.ones(2, 3)
        for layer in layers:
            x = layer(x)
        return x

    return forward


def test_layers_beyond_the_recompile_limit_do_not_count_as_compiled(backend: Backend) -> None:
    forward = _thirty_layers(backend)
    forward()
    assert backend.graphs == 8  # of 30, in silence
    with pytest.raises(RecompiledError, match="recompile limit before this block"), no_recompile():
        forward()


def test_thirty_layers_pass_with_a_recompile_limit_for_all(backend: Backend) -> None:
    forward = _thirty_layers(backend)
    with torch._dynamo.config.patch(recompile_limit=30):
        forward()
        assert backend.graphs == 30
        with no_recompile():
            forward()
    assert backend.graphs == 30


@pytest.mark.parametrize("limit", ["recompile_limit", "accumulated_recompile_limit"])
def test_reaching_a_recompile_limit_inside_is_noticed(limit: str) -> None:
    model = Scaled()
    model.compile(backend="eager", dynamic=False)
    with torch._dynamo.config.patch({limit: 2}):
        model(torch.ones(1, 3))
        model(torch.ones(2, 3))
        with pytest.raises(RecompiledError), no_recompile():
            model(torch.ones(3, 3))


def test_a_frame_that_fell_back_to_eager_before_is_noticed(backend: Backend) -> None:
    compiled = torch.compile(_broken_in_a_loop, backend=backend)
    compiled(torch.ones(3))
    assert backend.graphs == 0
    with pytest.raises(RecompiledError), no_recompile():
        compiled(torch.ones(3))


@pytest.mark.parametrize("stance", ["eager_on_recompile", "force_eager"])
def test_a_stance_that_falls_back_to_eager_is_noticed(stance: str) -> None:
    model = Scaled()
    model.compile(backend="eager")
    model(torch.ones(2, 3))
    with torch.compiler.set_stance(stance), pytest.raises(RecompiledError), no_recompile():
        _another_float(model)


# --- same_addresses


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model.register_buffer("hidden", torch.ones(2), persistent=False)
    model.tied = model[0]
    return model


def test_values_written_in_place_keep_their_addresses() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    with same_addresses(model):
        model[0].weight.data.zero_()
        model.hidden.add_(1)
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        model.load_state_dict(_model().state_dict())
        model.requires_grad_(False)


def _replace(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.data)  # the same memory


def _replace_by_one_of_the_same_id(model: nn.Module) -> None:
    """The ids of freed objects are given again, sooner or later."""
    data, old = model[0].weight.data, id(model[0].weight)
    model[0].weight = None
    tried = []
    while len(tried) < 10_000:
        tried.append(nn.Parameter(data))
        if id(tried[-1]) == old:
            break
    model[0].weight = tried[-1]


def _rebind_data(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.clone()


def _rebind_data_of_a_buffer(model: nn.Module) -> None:
    model[1].running_mean.data = torch.zeros(3)


def _swap_tensors(model: nn.Module) -> None:
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.zeros(3, 3)))


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "parameter replaced": _replace,
    "parameter replaced by one of the same id": _replace_by_one_of_the_same_id,
    "data rebound": _rebind_data,
    "data of a buffer rebound": _rebind_data_of_a_buffer,
    "tensors swapped": _swap_tensors,
    "buffer replaced": lambda model: setattr(model[1], "running_var", torch.ones(3)),
    "hidden buffer replaced": lambda model: setattr(model, "hidden", torch.ones(2)),
    "dtype changed": lambda model: model.double(),
    "parameter removed": lambda model: setattr(model[0], "bias", None),
    "parameter added": lambda model: model.register_parameter("more", nn.Parameter(torch.ones(1))),
    "one name of a tied module": lambda model: setattr(model, "tied", nn.Linear(3, 3)),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_moved_tensor_is_noticed(move: str) -> None:
    model = _model()
    with same_addresses(model):
        model(torch.ones(4, 3))  # the control
    with pytest.raises(AssertionError, match="moved or replaced"), same_addresses(model):
        MOVES[move](model)


def test_the_moved_tensor_is_named() -> None:
    model = _model()
    with pytest.raises(AssertionError, match=r"^2 tensors .*'0.weight', 'tied.weight'"), same_addresses(model):
        _rebind_data(model)


def test_an_error_of_the_block_is_not_replaced_by_one_about_addresses() -> None:
    model = _model()

    def fail() -> None:
        _rebind_data(model)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), same_addresses(model):
        fail()


# --- matches_fresh_load


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two adapters of the tiny MLP, the second of a larger rank."""
    entry = ZOO["mlp"]
    return [make_adapter(tmp_path / str(r), entry, seed=r, r=r, target_modules=["up", "down"]) for r in (2, 4)]


def test_a_swap_keeps_addresses_where_pefts_does_not(folders: list[Path]) -> None:
    entry = ZOO["mlp"]
    swapper = hotslot.attach(model := entry.build(), adapters={"small": folders[0], "large": folders[1]})
    with same_addresses(model):
        for name in ("small", "large", "small"):
            swapper.activate(name)
        swapper.deactivate()
    model = fresh(entry, folders[0])
    with pytest.raises(AssertionError, match="4 tensors were moved or replaced"), same_addresses(model):
        hotswap_adapter(model, str(folders[1]), adapter_name="default")


def test_what_a_fresh_load_gives_matches(folders: list[Path]) -> None:
    entry = ZOO["mlp"]
    for folder in folders:
        matches_fresh_load(fresh(entry, folder), entry.build, folder, rtol=0, atol=0, **entry.inputs())
    swapper = hotslot.attach(model := entry.build(), adapters={"small": folders[0], "large": folders[1]})
    compiled = torch.compile(model, backend="eager")
    for name, folder in zip(("small", "large"), folders, strict=True):
        swapper.activate(name)
        matches_fresh_load(compiled, entry.build, folder, entry.inputs()["x"])


def test_everything_else_does_not_match(folders: list[Path]) -> None:
    entry = ZOO["mlp"]
    inputs = entry.inputs()

    def refused(model: Callable[..., Any], **tolerance: float) -> None:
        with pytest.raises(AssertionError, match="Greatest absolute difference"):
            matches_fresh_load(model, entry.build, folders[0], **tolerance, **inputs)

    refused(fresh(entry, folders[1]))
    refused(entry.build())
    refused(fresh(entry, folders[0], seed=1))  # on another base
    right = fresh(entry, folders[0])
    refused(lambda **kwargs: right(**kwargs) * 1.001)
    refused(lambda **kwargs: torch.nextafter(right(**kwargs), torch.tensor(9.0)), rtol=0, atol=0)
    right.get_submodule("base_model.model.up").scaling["default"] *= 1.01
    refused(right)


def test_a_nan_does_not_match(folders: list[Path]) -> None:
    entry = ZOO["mlp"]
    with pytest.raises(AssertionError):
        matches_fresh_load(lambda x: torch.full((3, 10), torch.nan), entry.build, folders[0], **entry.inputs())


@pytest.mark.parametrize(("name", "target"), [("llama", "q_proj"), ("bert", "query")])
def test_outputs_of_transformers_are_compared(name: str, target: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    right, other = (make_adapter(tmp_path / str(i), entry, seed=i, r=2, target_modules=[target]) for i in range(2))
    model = fresh(entry, right)
    matches_fresh_load(model, entry.build, right, rtol=0, atol=0, **entry.inputs())
    with pytest.raises(AssertionError):
        matches_fresh_load(model, entry.build, other, **entry.inputs())


def test_an_output_without_a_tensor_is_refused_by_its_type(folders: list[Path]) -> None:
    entry = ZOO["mlp"]
    with pytest.raises(TypeError, match="cannot compare a tuple; pass a function that returns a tensor"):
        matches_fresh_load(lambda x: (x, x), entry.build, folders[0], **entry.inputs())
