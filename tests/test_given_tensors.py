"""Tensors in memory given to `hotswap_adapter_from_state_dict`: however they lie, whatever they share memory with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import hotslot
from adapters import make_adapter
from hotslot import checkpoint, errors
from hotslot.engine import Engine
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import ZOO

LLAMA = ZOO["llama"]  # three layers of the same shapes
LAYERS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    return [make_adapter(root / str(seed), LLAMA, seed=seed, lora_alpha=5 + seed, **options) for seed in range(2)]


@pytest.fixture(params=[None, 6], ids=["unprepared", "padded"])
def model(request: pytest.FixtureRequest, folders: list[Path]) -> nn.Module:
    model = fresh(LLAMA, folders[0])
    if request.param is not None:
        hotslot.prepare_model_for_compiled_hotswap(model, target_rank=request.param)
    return model


def as_on_the_model(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}


def live(model: nn.Module) -> dict[str, Tensor]:
    """What is in the slots, of which the adapter fills rank 4: views of the memory that a swap writes."""
    params = {name: param.detach() for name, param in model.named_parameters() if "lora_" in name}
    return {name: param[:4] if "lora_A" in name else param[:, :4] for name, param in params.items()}


def swap(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    config = LoraConfig.from_pretrained(str(folder))
    hotslot.hotswap_adapter_from_state_dict(model, tensors, "default", config)


def assert_live(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = live(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def _made_in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "parameters": nn.Parameter,
    "results of autograd": lambda t: nn.Parameter(t) * 1.0,
    "made in inference mode": _made_in_inference_mode,
    "transposed": lambda t: t.t().contiguous().t(),
    "every other value": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    "negated when read": lambda t: torch._neg_view(-t),
    "one value of many": lambda t: t.t()[:1].expand_as(t.t()).t(),
    "of more bits": lambda t: t.double(),
    "of fewer bits": lambda t: t.bfloat16(),
    "of several dtypes": lambda t: t.half() if t.shape[0] == 4 else t,
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_any_kind_become_live(kind: str, model: nn.Module, folders: list[Path]) -> None:
    given = {name: KINDS[kind](tensor) for name, tensor in as_on_the_model(folders[1]).items()}
    expected = {name: tensor.detach().clone() for name, tensor in given.items()}
    swap(model, given, folders[1])
    assert_live(model, expected)
    if kind not in ("one value of many", "of fewer bits", "of several dtypes"):  # the file's values
        assert_same_output(LLAMA.output(model, LLAMA.inputs()), fresh_output(LLAMA, folders[1]))


def rotated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's tensors under the name of the one before it."""
    return {
        f"{head}.layers.{i}.{rest}": tensors[f"{head}.layers.{(i + 1) % LAYERS}.{rest}"]
        for name in tensors
        for head, _, tail in [name.partition(".layers.")]
        for i, rest in [(int(tail.partition(".")[0]), tail.partition(".")[2])]
    }


def test_tensors_that_are_live_are_read_before_any_is_written(model: nn.Module, folders: list[Path]) -> None:
    """A round of all layers: whoever wrote one before he had read it would have it twice."""
    swap(model, as_on_the_model(folders[1]), folders[1])
    for _ in range(2):
        found = live(model)
        expected = {name: tensor.clone() for name, tensor in rotated(found).items()}
        assert any(not torch.equal(expected[name], found[name]) for name in found)
        swap(model, rotated(found), folders[1])
        assert_live(model, expected)
    swap(model, rotated(live(model)), folders[1])
    assert_live(model, as_on_the_model(folders[1]))
    assert_same_output(LLAMA.output(model, LLAMA.inputs()), fresh_output(LLAMA, folders[1]))


def test_one_tensor_may_have_several_names(model: nn.Module, folders: list[Path]) -> None:
    given = as_on_the_model(folders[1])
    first: dict[str, Tensor] = {}
    for name in given:
        given[name] = first.setdefault(name.rpartition(".layers.")[2].partition(".")[2], given[name])
    assert len({id(tensor) for tensor in given.values()}) == len(given) // LAYERS
    swap(model, given, folders[1])
    assert_live(model, given)


@pytest.mark.parametrize("odd", [torch.ones(9)[::9], torch.ones(0, 3).t(), torch.ones(6, 0)[::3], torch.tensor(2.0)])
def test_strides_of_what_has_one_value_or_none_mean_nothing(odd: Tensor) -> None:
    given = checkpoint.from_tensors({"odd": odd}, {"peft_type": "LORA"})
    assert torch.equal(given.tensor("odd"), odd)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused(model: nn.Module, folders: list[Path]) -> None:
    before, tensors = snapshot(model), as_on_the_model(folders[1])
    name = next(iter(tensors))
    tensors[name] = torch.nested.nested_tensor([tensors[name]])
    with pytest.raises(errors.TensorError, match="nested"):
        swap(model, tensors, folders[1])
    assert_unchanged(before, snapshot(model))


def test_tensors_may_be_written_over_once_the_swap_is_done(model: nn.Module, folders: list[Path]) -> None:
    given = as_on_the_model(folders[1])
    swap(model, given, folders[1])
    for tensor in given.values():
        tensor.data.fill_(float("nan"))  # no version counter shows it
    assert_live(model, as_on_the_model(folders[1]))
    swap(model, as_on_the_model(folders[0]), folders[0])  # which would be undone to those values
    swap(model, {name: tensor.fill_(0.5) for name, tensor in given.items()}, folders[1])
    assert_live(model, given)
    assert error(LLAMA.output(model, LLAMA.inputs()), fresh_output(LLAMA, folders[1])) > 1e-3


@pytest.mark.parametrize("threads", [False, True], ids=["alone", "by-threads"])
def test_tensors_are_joined_wherever_the_pieces_end(
    threads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces end within tensors, and at their ends; several tensors are in one piece, and several pieces in one."""
    monkeypatch.setattr("hotslot.checkpoint.checkpoint.CHUNK_BYTES", 64)
    monkeypatch.setattr("hotslot.checkpoint.checkpoint._THREADS_FROM_BYTES", 0 if threads else 1 << 40)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{i:02}": torch.randn(size, generator=generator).to(dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for i, size in enumerate((16, 0, 1, 200, 15, 0, 0, 31, 1, 1, 100, 3), start=20 * dtype.itemsize)
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    version = checkpoint.read(tmp_path).version
    for kind in ("parameters", "results of autograd", "made in inference mode"):  # modes are those of a thread
        given = checkpoint.from_tensors({n: KINDS[kind](t) for n, t in tensors.items()}, {"peft_type": "LORA"})
        assert given.version == version
        for name, tensor in tensors.items():
            assert torch.equal(given.tensor(name), tensor)
    assert checkpoint.from_tensors({}, {"peft_type": "LORA"}).nbytes == 0


def test_each_of_many_models_leaves_its_memory_to_the_next(folders: list[Path]) -> None:
    """More than there are buffers kept for whoever asks: the one that a swap sets free is kept, and no other's."""
    models = [fresh(LLAMA, folders[0]) for _ in range(6)]
    for model in models:
        swap(model, as_on_the_model(folders[1]), folders[1])
    for model in models:
        was_live = StorageWeakRef(_data(model).untyped_storage())
        swap(model, as_on_the_model(folders[0]), folders[0])
        assert not was_live.expired()
    for model in models:
        assert_live(model, as_on_the_model(folders[0]))


def test_what_a_swap_has_written_is_not_taken_for_others(model: nn.Module, folders: list[Path]) -> None:
    """Else each swap would first copy what is live, to come back to it."""
    for i in (1, 0, 1):
        swap(model, as_on_the_model(folders[i]), folders[i])
        assert _engine(model).finds_live(_engine(model).live)
    with torch.no_grad():
        next(param for name, param in model.named_parameters() if "lora_B" in name).mul_(2)
    assert not _engine(model).finds_live(_engine(model).live)  # the control


def _data(model: nn.Module) -> Tensor:
    entry = _engine(model).live.entry
    assert entry is not None
    return entry.adapter.checkpoint.data


def _engine(model: nn.Module) -> Engine:
    engine = Engine.of(model, "default")
    assert engine is not None
    return engine
