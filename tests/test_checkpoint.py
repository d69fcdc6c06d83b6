"""What a Checkpoint holds is what was saved; its version changes with any bit of it; nothing non-finite gets in."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hotslot
from adapters import make_adapter
from hotslot import checkpoint, errors
from hotslot.checkpoint import Checkpoint
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import ZOO

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MLP = ZOO["mlp"]
UP_A, UP_B = "base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixed dtypes, patterns, all targets."""
    folder = tmp_path_factory.mktemp("adapter")
    options = {"target_modules": ["up", "inner.0", "down"], "rank_pattern": {"down": 2}, "alpha_pattern": {"up": 3}}
    make_adapter(folder, MLP, seed=1, r=4, lora_alpha=6, use_rslora=True, **options)
    tensors = load_file(folder / WEIGHTS)
    tensors[UP_A] = tensors[UP_A].bfloat16()
    save_file(tensors, folder / WEIGHTS)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return parsed


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def same_bytes(one: Tensor, other: Tensor) -> bool:
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


# -- what is read -------------------------------------------------------------------------------------------------


def assert_holds(read: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    assert read.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bytes(read.tensor(name), tensor), name
    assert read.nbytes == sum(tensor.nbytes for tensor in expected.values())


def test_file_is_read_as_safetensors_reads_it(folder: Path) -> None:
    assert_holds(checkpoint.read(folder), load_file(folder / WEIGHTS))
    assert checkpoint.read(folder).config == config_of(folder)


def every_dtype() -> dict[str, Tensor]:
    """Odd sizes; the values of all dtypes, the smallest and the largest among them."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for i, dtype in enumerate(checkpoint_dtypes()):
        values = torch.randn(3, 2 * i + 1, generator=generator).to(dtype)
        values.view(-1)[0], values.view(-1)[-1] = torch.finfo(dtype).max, torch.finfo(dtype).tiny
        tensors[f"base_model.model.layer{i}.lora_A.weight"] = values
    return tensors


def checkpoint_dtypes() -> tuple[torch.dtype, ...]:
    return (
        torch.float8_e4m3fn, torch.float64, torch.float16, torch.float8_e5m2, torch.float32, torch.bfloat16,
    )  # fmt: skip


def unaligned_file(tensors: Mapping[str, Tensor]) -> bytes:
    """In the order given, without gaps, behind a header of odd length."""
    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    }  # fmt: skip
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header)
    text += " " * (1 - len(text) % 2)
    return len(text).to_bytes(8, "little") + text.encode() + data


def test_every_float_dtype_is_read(tmp_path: Path, folder: Path) -> None:
    tensors = every_dtype()
    write(tmp_path, tensors, config_of(folder))
    assert_holds(checkpoint.read(tmp_path), tensors)
    assert_holds(checkpoint.read(tensors, config=config_of(folder)), tensors)


def test_unaligned_tensors_are_read(tmp_path: Path, folder: Path) -> None:
    tensors = every_dtype()
    write(tmp_path, tensors, config_of(folder))
    (tmp_path / WEIGHTS).write_bytes(unaligned_file(tensors))
    assert_holds(checkpoint.read(tmp_path), tensors)
    assert_holds(checkpoint.read(tmp_path), tensors)  # once more, of a family that is known by now


def test_scalars_and_empty_tensors_are_read(tmp_path: Path, folder: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "last": torch.ones(1, dtype=torch.float16)}
    write(tmp_path, tensors, config_of(folder))
    assert_holds(checkpoint.read(tmp_path), tensors)
    assert_holds(checkpoint.read(tensors, config=config_of(folder)), tensors)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """34 MB, above every size from which hotslot uses threads."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"base_model.model.{i}.lora_A.weight": torch.randn(1024, 1031, generator=generator) for i in range(8)}
    tensors["base_model.model.8.lora_A.weight"] = torch.randn(3, 7, generator=generator).half()
    return write(tmp_path_factory.mktemp("large"), tensors, {"peft_type": "LORA"})


def test_large_file_is_read_by_threads(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_file(large / WEIGHTS)
    names = threads_that_digest(monkeypatch)
    assert_holds(checkpoint.read(large), expected)
    assert names
    assert all(name.startswith("hotslot-read") for name in names)
    monkeypatch.setattr("hotslot.checkpoint.checkpoint._THREADS_FROM_BYTES", 1 << 40)
    names.clear()
    assert_holds(checkpoint.read(large), expected)
    assert names == {threading.current_thread().name}  # the control: a smaller one is read by whoever asks


def threads_that_digest(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    names: set[str] = set()
    digest = xxhash.xxh3_128_digest

    def noted(data: Any) -> bytes:
        if isinstance(data, memoryview):
            names.add(threading.current_thread().name)
        return digest(data)

    monkeypatch.setattr(xxhash, "xxh3_128_digest", noted)
    return names


def test_version_and_bytes_do_not_depend_on_threads(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = checkpoint.read(large)
    monkeypatch.setattr("hotslot.checkpoint.checkpoint._THREADS_FROM_BYTES", 1 << 40)
    alone = checkpoint.read(large)
    assert alone.version == usual.version
    assert torch.equal(alone.data, usual.data)
    given = checkpoint.from_tensors(load_file(large / WEIGHTS), config_of(large))
    assert given.version == usual.version


def test_any_bit_of_a_large_file_changes_the_version(large: Path, tmp_path: Path) -> None:
    shutil.copytree(large, tmp_path, dirs_exist_ok=True)
    whole = (large / WEIGHTS).stat().st_size
    start = 8 + int.from_bytes((large / WEIGHTS).read_bytes()[:8], "little")
    versions = {checkpoint.read(tmp_path).version}
    for where in (start, start + (4 << 20) - 1, start + (17 << 20), whole - 1):
        with (tmp_path / WEIGHTS).open("r+b") as file:
            file.seek(where)
            byte = file.read(1)[0]
            file.seek(where)
            file.write(bytes([byte ^ 1]))
        versions.add(checkpoint.read(tmp_path).version)
    assert len(versions) == 5


# -- the version --------------------------------------------------------------------------------------------------


def test_file_and_dict_of_it_have_one_version(folder: Path, tmp_path: Path) -> None:
    from_file = checkpoint.read(folder).version
    tensors, config = load_file(folder / WEIGHTS), config_of(folder)
    assert checkpoint.read(str(folder)).version == from_file
    assert checkpoint.read(tensors, config=config).version == from_file
    assert checkpoint.read(dict(reversed(tensors.items())), config=dict(reversed(config.items()))).version == from_file
    assert checkpoint.read(folder, config=config).version == from_file
    assert checkpoint.read(write(tmp_path, tensors, config)).version == from_file
    assert len(from_file) == 32
    assert int(from_file, 16)


def test_peft_config_and_its_json_have_one_version(folder: Path) -> None:
    config = LoraConfig.from_pretrained(str(folder))
    assert checkpoint.read(load_file(folder / WEIGHTS), config=config).version == checkpoint.read(folder).version


def test_saving_a_loaded_adapter_again_keeps_its_version(tmp_path: Path) -> None:
    """PEFT writes target_modules, a set of names, in the order of the process's hash seed."""
    make_adapter(tmp_path, MLP, seed=1, r=4, target_modules=list(MLP.targets))
    config = config_of(tmp_path)
    before = checkpoint.read(tmp_path).version
    (tmp_path / CONFIG).write_text(json.dumps({**config, "target_modules": config["target_modules"][::-1]}))
    assert checkpoint.read(tmp_path).version == before


def _flip(name: str, byte: int) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        raw = tensors[name].view(-1).view(torch.uint8)
        raw[byte] ^= 1

    return change


def _rename(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[UP_A.replace("up", "uq")] = tensors.pop(UP_A)


def _exchange(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """The same bytes under each other's names."""
    one, other = (f"base_model.model.{name}.lora_A.weight" for name in ("inner.0", "inner.1"))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _transpose(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[UP_A] = tensors[UP_A].view(tensors[UP_A].shape[::-1])


def _reinterpret(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[UP_A] = tensors[UP_A].view(torch.float16)


def _minus_zero(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[UP_B][0, 0] = -0.0


def _option(key: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, config: config.update({key: value})


CHANGES: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], None]] = {
    "first bit": _flip(UP_A, 0),
    "last bit": _flip("base_model.model.down.lora_B.weight", -1),
    "a bit in the middle": _flip(UP_B, 100),
    "a name": _rename,
    "names exchanged": _exchange,
    "a shape": _transpose,
    "a dtype": _reinterpret,
    "minus zero": _minus_zero,
    "r": _option("r", 5),
    "alpha": _option("lora_alpha", 7),
    "alpha as a float": _option("lora_alpha", 6.0),
    "rslora": _option("use_rslora", False),
    "rank_pattern": _option("rank_pattern", {"down": 3}),
    "alpha_pattern": _option("alpha_pattern", {"up": 3.5}),
    "dropout": _option("lora_dropout", 0.1),
    "a new option": _option("something_new", None),
}


def sample() -> tuple[dict[str, Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (4, 12), "inner.0": (4, 8), "inner.1": (4, 8), "down": (2, 8)}
    tensors = {f"base_model.model.{k}.lora_A.weight": torch.randn(v, generator=generator) for k, v in shapes.items()}
    tensors |= {
        f"base_model.model.{k}.lora_B.weight": torch.randn(9, v[0], generator=generator) for k, v in shapes.items()
    }
    tensors[UP_A] = tensors[UP_A].bfloat16()
    tensors[UP_B][0, 0] = 0.0
    options = {"use_rslora": True, "rank_pattern": {"down": 2}, "alpha_pattern": {"up": 3}, "lora_dropout": 0.0}
    return tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **options}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["dict", "file"])
def test_any_change_changes_the_version(change: str, kind: str, tmp_path: Path) -> None:
    def version(name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
        if kind == "file":
            return checkpoint.read(write(tmp_path / name, tensors, config)).version
        return checkpoint.read(tensors, config=config).version

    before = version("a", *sample())
    assert version("b", *sample()) == before  # the control
    tensors, config = sample()
    CHANGES[change](tensors, config)
    assert version("c", tensors, config) != before


def test_versions_of_the_changes_all_differ() -> None:
    versions = set()
    for change in CHANGES.values():
        tensors, config = sample()
        change(tensors, config)
        versions.add(checkpoint.read(tensors, config=config).version)
    assert len(versions) == len(CHANGES)


# -- finite values ------------------------------------------------------------------------------------------------

NON_FINITE = [
    (dtype, value)
    for dtype in checkpoint_dtypes()
    for value in (float("nan"), float("inf"), -float("inf"))
    if torch.tensor(value).to(dtype).float().isfinite().logical_not()  # float8_e4m3fn has no infinity
]


@pytest.mark.parametrize(("dtype", "value"), NON_FINITE, ids=str)
@pytest.mark.parametrize("kind", ["dict", "file"])
def test_non_finite_values_are_found_wherever_they_are(
    dtype: torch.dtype, value: float, kind: str, tmp_path: Path
) -> None:
    names = [f"base_model.model.{i}.lora_A.weight" for i in range(5)]
    for where in (0, 2, 4):
        for index in (0, 7, -1):
            tensors = {
                name: torch.full((3, 5), torch.finfo(dtype).max, dtype=torch.float64).to(dtype) for name in names
            }
            tensors["base_model.model.9.lora_A.weight"] = torch.ones(3, dtype=torch.float64)  # another run of bytes
            _put(tensors[names[where]], index, value)
            source = write(tmp_path / f"{where} {index}", tensors, {"peft_type": "LORA"}) if kind == "file" else tensors
            with pytest.raises(errors.NonFiniteError) as caught:
                checkpoint.read(source, config={"peft_type": "LORA"})
            assert caught.value.where == names[where]
            counts = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
            assert f"{counts} of 15 values" in str(caught.value)


def _put(tensor: Tensor, index: int, value: float) -> None:
    flat = tensor.view(-1).double()
    flat[index] = value
    tensor.copy_(flat.view(tensor.shape).to(tensor.dtype))


@pytest.mark.parametrize("dtype", checkpoint_dtypes(), ids=str)
@pytest.mark.parametrize("kind", ["dict", "file"])
def test_largest_finite_values_pass(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    """The control, and more: no sum or square on the way may overflow."""
    info = torch.finfo(dtype)
    tensors = {
        f"base_model.model.{i}.lora_A.weight": torch.full((64, 33), float(value), dtype=torch.float64).to(dtype)
        for i, value in enumerate((info.max, info.min, info.tiny, 0.0))
    }
    source = write(tmp_path, tensors, {"peft_type": "LORA"}) if kind == "file" else tensors
    assert_holds(checkpoint.read(source, config={"peft_type": "LORA"}), tensors)


# -- configs ------------------------------------------------------------------------------------------------------


def test_config_given_beside_a_folder_replaces_its_own(folder: Path) -> None:
    other = {**config_of(folder), "lora_alpha": 12}
    assert checkpoint.read(folder, config=other).config["lora_alpha"] == 12
    assert checkpoint.read(folder).config["lora_alpha"] == 6


@pytest.mark.parametrize("kind", ["dict", "LoraConfig"])
def test_config_as_dict_or_peft_config_activates_alike(folder: Path, kind: str) -> None:
    config = config_of(folder) if kind == "dict" else LoraConfig.from_pretrained(str(folder))
    model = MLP.build()
    swapper = hotslot.attach(model, {"file": folder})
    swapper.load("memory", load_file(folder / WEIGHTS), config=config)
    swapper.activate("memory")
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, folder))
    assert error(MLP.output(model, MLP.inputs()), MLP.output(MLP.build(), MLP.inputs())) > 0.01


# -- what belongs to the caller -----------------------------------------------------------------------------------


def tensors_of_all_kinds(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    tensors[names[0]] = nn.Parameter(tensors[names[0]])
    tensors[names[1]] = tensors[names[1]].t().contiguous().t()  # not contiguous
    with torch.inference_mode():
        tensors[names[2]] = tensors[names[2]].clone()
    tensors[names[3]] = torch.cat([tensors[names[3]]] * 2)[: len(tensors[names[3]])]  # a part of something larger
    return tensors


def bring(way: str, model: nn.Module, tensors: dict[str, Tensor], config: Any) -> None:
    if way == "hotswap_adapter_from_state_dict":
        named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
        hotslot.hotswap_adapter_from_state_dict(model, named, "default", LoraConfig(**_known(config)))
    else:
        swapper = hotslot.attach(model)
        swapper.load("new", tensors, config=config)
        swapper.activate("new")


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}


@pytest.mark.parametrize("way", ["load", "hotswap_adapter_from_state_dict"])
def test_the_callers_tensors_and_config_are_not_changed(way: str, folder: Path, tmp_path: Path) -> None:
    model = fresh(MLP, make_adapter(tmp_path, MLP, seed=2, r=4, target_modules=list(MLP.targets)))
    tensors, config = tensors_of_all_kinds(folder), config_of(folder)
    before = {name: (tensor, tensor.detach().clone(), tensor.data_ptr()) for name, tensor in tensors.items()}
    config_before = copy.deepcopy(config)
    bring(way, model, tensors, config)
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, folder))
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    bring("hotswap_adapter_from_state_dict", model, other, config)  # another one on top
    assert tensors.keys() == before.keys()
    for name, (tensor, values, pointer) in before.items():
        assert tensors[name] is tensor
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, values)
        assert tensor.grad is None
    assert config == config_before


@pytest.mark.parametrize("way", ["load", "hotswap_adapter_from_state_dict"])
def test_the_callers_tensors_are_not_kept(way: str, folder: Path, tmp_path: Path) -> None:
    model = fresh(MLP, make_adapter(tmp_path, MLP, seed=2, r=4, target_modules=list(MLP.targets)))
    tensors, config = load_file(folder / WEIGHTS), config_of(folder)
    own = {tensor.data_ptr() for tensor in tensors.values()}
    bring(way, model, tensors, config)
    assert not own & {parameter.data_ptr() for parameter in model.parameters()}
    before = MLP.output(model, MLP.inputs())
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    config["rank_pattern"]["up"] = 1
    assert torch.equal(MLP.output(model, MLP.inputs()), before)
    held = [weakref.ref(tensor) for tensor in tensors.values()]
    assert all(ref() is not None for ref in held)  # the control
    del tensors, tensor
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_what_was_loaded_does_not_follow_the_callers_tensors(folder: Path) -> None:
    tensors, config = load_file(folder / WEIGHTS), config_of(folder)
    read = checkpoint.read(tensors, config=config)
    for tensor in tensors.values():
        tensor.zero_()
    config["rank_pattern"]["down"] = 99
    config["target_modules"].append("nowhere")
    assert_holds(read, load_file(folder / WEIGHTS))
    assert read.config == config_of(folder)


# -- immutable ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dict", "file"])
def test_checkpoint_cannot_be_changed(kind: str, folder: Path) -> None:
    read = checkpoint.read(load_file(folder / WEIGHTS) if kind == "dict" else folder, config=config_of(folder))
    for name in ("config", "tensors", "data", "version", "origin", "schema"):
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(read, name, None)
    for mapping in (read.config, read.tensors):
        with pytest.raises(TypeError):
            mapping["r"] = 1  # type: ignore[index]
    with pytest.raises(AttributeError):
        read.tensors[UP_A].start = 3  # type: ignore[misc]


def test_adapters_of_one_family_keep_their_own_bytes(folder: Path, tmp_path: Path) -> None:
    """Equal headers and configs are read once, and memory that nobody holds is used again."""
    families = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        shapes = load_file(folder / WEIGHTS)
        tensors = {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in shapes.items()}
        families.append((write(tmp_path / str(seed), tensors, config_of(folder)), tensors))
    held = [checkpoint.read(path) for path, _ in families[:4]]
    views = [checkpoint.read(path).tensor(UP_B) for path, _ in families[4:6]]
    arrays = [checkpoint.read(path).tensor(UP_B).numpy() for path, _ in families[6:]]
    for _ in range(3):
        for path, tensors in families:
            assert_holds(checkpoint.read(path), tensors)
            checkpoint.read(tensors, config=config_of(folder))
    for read, (_, tensors) in zip(held, families, strict=False):
        assert_holds(read, tensors)
    for view, (_, tensors) in zip(views, families[4:], strict=False):
        assert torch.equal(view, tensors[UP_B])
    for array, (_, tensors) in zip(arrays, families[6:], strict=False):
        assert torch.equal(torch.from_numpy(array), tensors[UP_B])
    assert len({read.version for read in held}) == 4


def test_memory_that_nobody_holds_is_used_again(folder: Path) -> None:
    """The control of the test above: without it, it could not fail."""
    pointers = set()
    for _ in range(5):
        pointers.add(checkpoint.read(folder).data.data_ptr())
    assert len(pointers) < 5


def test_file_that_is_written_while_it_is_read_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header is read first, the rest after the config."""
    from hotslot.checkpoint.safetensors_file import SafetensorsFile

    write(tmp_path, load_file(folder / WEIGHTS), config_of(folder))
    smaller = {name: tensor[:1] for name, tensor in load_file(folder / WEIGHTS).items()}
    renamed = {name.replace(".up.", ".uq."): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    original = SafetensorsFile.refuse_rewritten
    for other in (smaller, renamed):
        write(tmp_path, load_file(folder / WEIGHTS), config_of(folder))

        def refuse_rewritten(file: SafetensorsFile, other: dict[str, Tensor] = other) -> None:
            save_file(other, file.path.with_name("other"))
            file.path.write_bytes(file.path.with_name("other").read_bytes())  # in place
            original(file)

        with monkeypatch.context() as patch:
            patch.setattr(SafetensorsFile, "refuse_rewritten", refuse_rewritten)
            with pytest.raises(errors.CorruptFileError, match=WEIGHTS):
                checkpoint.read(tmp_path)


def test_a_family_takes_no_file_of_another_header(folder: Path, tmp_path: Path) -> None:
    """It would read each tensor from where another one's values are."""
    known = checkpoint.read(folder)
    header = checkpoint.read_header(folder / WEIGHTS)
    pieces = (checkpoint.Piece(0, known.nbytes, 0),)
    family = checkpoint.FileFamily(header, known.nbytes, known.schema, pieces)
    assert family.read(folder / WEIGHTS, origin="it").version == known.version
    renamed = {name.replace(".up.", ".uq."): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    write(tmp_path, renamed, config_of(folder))
    assert len(checkpoint.read_header(tmp_path / WEIGHTS)) == len(header)
    with pytest.raises(errors.CorruptFileError, match="another header"):
        family.read(tmp_path / WEIGHTS, origin="another")


# -- the Hub ------------------------------------------------------------------------------------------------------

COMMIT, OLD_COMMIT = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub leaves it: one repository, two commits, a branch, a tag, a subfolder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub"
    repo = cache / "models--someone--adapter"
    (repo / "refs").mkdir(parents=True)
    for ref, commit in (("main", COMMIT), ("v1.0", OLD_COMMIT)):
        (repo / "refs" / ref).write_text(commit)
    for seed, path in enumerate((f"{COMMIT}", f"{COMMIT}/chat", f"{COMMIT}/chat/deep", f"{OLD_COMMIT}")):
        make_adapter(repo / "snapshots" / path, MLP, seed=seed, r=2 + seed, target_modules=["up", "inner.2"])
    return cache


HUB_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "the default branch": ({}, COMMIT),
    "a branch": ({"revision": "main"}, COMMIT),
    "a tag": ({"revision": "v1.0"}, OLD_COMMIT),
    "a commit": ({"revision": OLD_COMMIT}, OLD_COMMIT),
    "a subfolder": ({"subfolder": "chat"}, f"{COMMIT}/chat"),
    "a folder below": ({"subfolder": "chat/deep"}, f"{COMMIT}/chat/deep"),
    "a subfolder of a branch": ({"subfolder": "chat", "revision": "main"}, f"{COMMIT}/chat"),
}


@pytest.mark.parametrize("case", HUB_CASES)
@pytest.mark.parametrize("way", ["load", "hotswap_adapter", "fits"])
def test_hub_id(way: str, case: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, where = HUB_CASES[case]
    there = hub / "models--someone--adapter" / "snapshots" / where
    model = fresh(MLP, make_adapter(tmp_path / "first", MLP, seed=9, r=6, target_modules=list(MLP.targets)))
    if way == "hotswap_adapter":
        hotslot.hotswap_adapter(model, "someone/adapter", "default", cache_dir=str(hub), **options)
    else:
        swapper = hotslot.attach(model)
        assert swapper.fits("someone/adapter", cache_dir=hub, **options)
        assert not swapper.fits("someone/else", cache_dir=hub, **options)
        swapper.load("hub", "someone/adapter", cache_dir=hub, **options)
        assert swapper.activate("hub").version == checkpoint.read(there).version
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, there))


def test_hub_id_from_the_usual_cache(hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    model = MLP.build()
    swapper = hotslot.attach(model, {"hub": "someone/adapter"})
    swapper.activate("hub")
    there = hub / "models--someone--adapter" / "snapshots" / COMMIT
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, there))


@pytest.mark.parametrize(
    "options", [{"revision": "v2.0"}, {"revision": "c" * 40}, {"subfolder": "nowhere"}], ids=["tag", "commit", "folder"]
)
def test_what_the_hub_does_not_have_is_not_found(options: dict[str, str], hub: Path) -> None:
    with pytest.raises(errors.AdapterNotFoundError, match="someone/adapter"):
        checkpoint.read("someone/adapter", cache_dir=hub, **options)
    checkpoint.read("someone/adapter", cache_dir=hub)  # the control


def test_hub_repository_with_a_pickle_alone(hub: Path) -> None:
    there = hub / "models--someone--adapter" / "snapshots" / COMMIT
    (there / WEIGHTS).rename(there / "adapter_model.bin")
    with pytest.raises(errors.HotslotError, match="adapter_model") as caught:
        checkpoint.read("someone/adapter", cache_dir=hub)
    assert isinstance(caught.value, errors.PickleRefusedError)


def test_token_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def download(repo: str, name: str, **options: Any) -> str:
        asked.append({"repo": repo, "name": name, **options})
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    model = fresh(MLP, make_adapter(tmp_path / "first", MLP, seed=9, r=6, target_modules=list(MLP.targets)))
    checkpoint.read("someone/adapter", token="secret", revision="x", subfolder="y", cache_dir="z")
    assert asked[-1]["token"] == "secret"
    assert {entry["name"] for entry in asked} == {WEIGHTS, CONFIG}
    assert all((e["revision"], e["subfolder"], e["cache_dir"]) == ("x", "y", "z") for e in asked)
    for key in ("token", "use_auth_token"):
        asked.clear()
        hotslot.hotswap_adapter(model, "someone/adapter", "default", **{key: f"by {key}"})
        assert {entry["token"] for entry in asked} == {f"by {key}"}


def test_local_folder_comes_before_the_hub(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_adapter("someone/adapter", MLP, seed=7, r=5, target_modules=["up"])
    assert checkpoint.read("someone/adapter", cache_dir=hub).config["r"] == 5


# -- copies of the base model's embeddings ------------------------------------------------------------------------

COPIES = {  # entry → its embedding or output module, and the name under which PEFT saves a copy of its weight
    "llama": ("embed_tokens", "base_model.model.model.embed_tokens.base_layer.weight"),
    "llama head": ("lm_head", "base_model.model.lm_head.base_layer.weight"),
    "bert": ("word_embeddings", "base_model.model.embeddings.word_embeddings.base_layer.weight"),
}


def with_copy(case: str, folder: Path) -> tuple[Any, str]:
    entry = ZOO[case.partition(" ")[0]]
    module, name = COPIES[case]
    others = [target for target in entry.targets if target not in ("embed_tokens", "lm_head", "word_embeddings")]
    make_adapter(folder, entry, seed=3, r=3, target_modules=[*others[:2], module])
    return entry, name


@pytest.mark.parametrize("way", ["attach", "hotswap_adapter"])
@pytest.mark.parametrize("case", COPIES)
def test_copy_of_the_models_own_embedding_is_taken(case: str, way: str, tmp_path: Path) -> None:
    entry, name = with_copy(case, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    if name not in tensors:  # PEFT saves it for the models whose embeddings it knows
        tensors[name] = {f"{n}.weight": m.weight for n, m in entry.build().named_modules() if hasattr(m, "weight")}[
            name.removeprefix("base_model.model.").replace(".base_layer", "")
        ].detach()
        write(tmp_path, tensors, config_of(tmp_path))
    if way == "attach":
        model = entry.build()
        hotslot.attach(model, {"a": tmp_path}).activate("a")
    else:
        others = [target for target in entry.targets[:3] if target not in name]
        targets = [*others, COPIES[case][0], *entry.targets[:3]]
        model = fresh(entry, make_adapter(tmp_path / "first", entry, seed=4, r=2, target_modules=sorted(set(targets))))
        hotslot.hotswap_adapter(model, str(tmp_path), "default")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, tmp_path))


@pytest.mark.parametrize("case", COPIES)
def test_copy_of_a_resized_embedding_is_refused_by_name(case: str, tmp_path: Path) -> None:
    entry, name = with_copy(case, tmp_path)
    module = name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
    own = entry.build().get_submodule(module).weight.detach().clone()
    resized = torch.cat([own, own[:8]])
    write(tmp_path, {**load_file(tmp_path / WEIGHTS), name: resized}, config_of(tmp_path))
    model = entry.build()
    before = snapshot(model)
    with pytest.raises(errors.UnsupportedError, match=f"where: {module}.weight"):
        hotslot.attach(model, {"a": tmp_path})
    assert_unchanged(before, snapshot(model))
