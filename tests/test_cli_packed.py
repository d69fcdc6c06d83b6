"""`hotslot inspect` of a packed file: what it was made of, whether it stands for that yet, and the adapter in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash
from typer.testing import CliRunner, Result

import hotslot
from adapters import make_adapter
from hotslot.cache.packed import PackedFiles, name_for, pack_header
from hotslot.checkpoint import Files, locate, read, read_files
from hotslot.cli.app import app
from hotslot.errors import AdapterNotFoundError
from zoo import ZOO

LATER_NS = 60 * 10**9  # after its files were made: they are settled
_OPENING = b'{"__metadata__":{"hotslot_seal":"'


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ask(*arguments: Any, exit_code: int = 0) -> dict[str, Any]:
    """The JSON answer."""
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "sql", ZOO["llama"], seed=0, r=4, lora_alpha=6, target_modules=["q_proj"])


def pack(files: Files, into: Path, *, after_ns: int = LATER_NS) -> Path:
    packed, stamp = PackedFiles(into), files.stamp()
    assert packed.write(files, stamp, stamp.changed_ns + after_ns, read_files(files))
    return packed.path(files)


def test_it_is_told_from_a_lora_file(folder: Path, tmp_path: Path) -> None:
    file = pack(locate(folder), tmp_path / "packed")
    found = ask("inspect", file)
    assert (found["packed"], found["source"]) == (str(file), str(folder / "adapter_model.safetensors"))
    assert (found["made_for"], found["stale"]) == ([], None)
    plain = ask("inspect", folder)
    assert found["adapter"] == plain | {"adapter": str(file)}, "alphas are the config's"
    assert found["adapter"]["ranks"] == [{"rank": 4, "alpha": 6, "scaling": 1.5, "modules": 3}]
    text = run("inspect", file).stdout
    assert all(part in text for part in (str(folder), plain["version"], "header by its seal", "in use       yes"))


def test_it_says_why_nobody_takes_it(folder: Path, tmp_path: Path) -> None:
    def stale(file: Path) -> Any:
        assert "in use       no: " in run("inspect", file).stdout
        return ask("inspect", file)["stale"]

    racy = pack(locate(folder), tmp_path / "racy", after_ns=10**9)
    assert "less than 2 s" in stale(racy)
    file = pack(locate(folder), tmp_path / "packed")
    renamed = file.rename(file.with_name("mine.safetensors"))
    assert "renamed" in stale(renamed)
    renamed.rename(file)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert stale(file) == "its source has changed since"
    weights.unlink()
    assert "cannot be found" in stale(file)


def test_one_that_is_damaged_is_refused(folder: Path, tmp_path: Path) -> None:
    file = pack(locate(folder), tmp_path / "packed")
    sound = file.read_bytes()
    end = 8 + int.from_bytes(sound[:8], "little")
    for place, found in ((end - 40, "not as it was sealed"), (len(sound) - 1, "values of version")):
        damaged = bytearray(sound)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        error = ask("inspect", file, exit_code=1)["error"]
        assert (error["type"], error["summary"]) == ("CorruptFileError", f"{file} is no sound packed file.")
        assert found in error["found"]
    file.write_bytes(sound[:-1])
    assert ask("inspect", file, exit_code=1)["error"]["type"] == "CorruptFileError"


def test_one_with_a_seal_of_somebody_else_is_refused(folder: Path, tmp_path: Path) -> None:
    """The seal is no secret: whoever wants to can seal anything."""
    files = locate(folder)
    file = pack(files, tmp_path / "packed")
    for metadata in ('{"hotslot_format":"1"}', '{"hotslot_format":[],"read_ns":"x"}', "{}"):
        sealed = b'",' + metadata[1:].encode() + b"}" if metadata != "{}" else b'"}}'
        header = _OPENING + xxhash.xxh3_128_hexdigest(sealed).encode() + sealed
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        error = ask("inspect", file, exit_code=1)["error"]
        assert "metadata that hotslot does not write" in error["found"]
        packed = PackedFiles(tmp_path / "packed")
        assert packed.read(files, files.stamp()) is None
        assert not file.exists(), "whoever finds it deletes it"


def test_what_a_stranger_has_sealed_is_told_without_a_traceback(folder: Path, tmp_path: Path) -> None:
    checkpoint = read(folder)
    key = json.dumps(["/a\0b", "/a\0b", '[{"no": "reader"}, 1]'])
    told = json.dumps([key, []])
    file = tmp_path / name_for(Files.of_stamp(told))

    def seal(source: str, read_ns: int) -> Path:
        header = pack_header(checkpoint, source, read_ns)
        assert header is not None
        file.write_bytes(len(header).to_bytes(8, "little") + header + checkpoint.data.numpy().tobytes())
        return file

    assert "cannot be found" in ask("inspect", seal(told, 2**63 - 1))["stale"]
    assert "/a\\x00b" in run("inspect", file).stdout
    for source, read_ns in (("{}", 0), ("[1]", 0), (told, 10**40), (told, -1)):
        assert "no sound packed file" in ask("inspect", seal(source, read_ns), exit_code=1)["error"]["summary"]


def test_of_a_pipeline_it_has_the_alphas_that_a_file_alone_does_not(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from dialects import DIALECTS
    from pipelines import PIPELINES

    lora = DIALECTS["sd: kohya_sd"].save(tmp_path / "kohya.safetensors", seed=0, rank=3)
    cache = hotslot.Cache(disk_bytes=1 << 30, folder=tmp_path / "packed")
    swapper = hotslot.attach(PIPELINES["sd"].build(), {"first": lora}, cache=cache)
    swapper.load("second", lora)
    swapper._library.finish_packing()
    (file,) = (tmp_path / "packed").iterdir()
    found = ask("inspect", file)
    assert found["source"] == str(lora)
    assert {"unet.UNet2DConditionModel", "text_encoder.CLIPTextModel"} < set(found["made_for"])
    stated = ask("inspect", lora)["components"]
    alphas = {float(alpha) for component in stated for alpha in component["alphas"]}
    assert {group["alpha"] for group in found["adapter"]["ranks"]} == alphas > {3.0}, "the rank is not all of them"
    # diffusers would take each alpha for the rank, and say nothing.
    with pytest.raises(AdapterNotFoundError, match="packed file"):
        hotslot.attach(PIPELINES["sd"].build(), {"it": file})
    with pytest.raises(AdapterNotFoundError, match="packed file"):
        swapper.load("it", file, lazy=True)


def test_a_file_of_peft_is_read_with_the_config_beside_it(folder: Path, tmp_path: Path) -> None:
    file = folder / "adapter_model.safetensors"
    assert ask("inspect", file) == ask("inspect", folder)
    assert ask("inspect", file)["version"] == read(folder).version
    (folder / "adapter_config.json").unlink()
    assert ask("inspect", file)["components"][0]["alphas"] == {}
