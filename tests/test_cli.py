"""The command line: what it prints, as text and as JSON, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import call, create_autospec

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

import hotslot
from adapters import expected_peft_warnings, make_adapter, random_config
from hotslot.checkpoint import read
from hotslot.cli import bench, demo, terminal
from hotslot.cli.app import app
from hotslot.cli.inspect import inspect_adapter, show_inspection
from hotslot.errors import HotslotError, ModelError, UnsupportedError
from oracle import fresh
from zoo import ZOO, Entry

LLAMA = ZOO["llama"]
WEIGHTS_NAME = "adapter_model.safetensors"
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ask(*arguments: Any, exit_code: int = 0) -> dict[str, Any]:
    """The JSON answer."""
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def plain(folder: Path, **config: Any) -> Path:
    return make_adapter(folder, LLAMA, seed=0, **{**PLAIN, **config})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's config, and no weights: whoever needs them fails."""
    return save_config(LLAMA, tmp_path / "model")


def save_config(entry: Entry, folder: Path, **changes: Any) -> Path:
    base = entry.build()
    config = base.config
    config.architectures = [type(base).__name__]
    for key, value in changes.items():
        setattr(config, key, value)
    config.save_pretrained(folder)
    return folder


# --- the command itself


def heavy_modules_after(code: str) -> list[str]:
    script = f"import sys\n{code}\nprint(sorted({{'torch', 'peft', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1].replace("'", '"'))


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
from hotslot.cli import main
sys.argv = ["hotslot", *{arguments}]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code
else:
    raise AssertionError("main() exits")"""
    assert heavy_modules_after(code) == []


def test_no_module_of_the_command_line_imports_torch() -> None:
    names = "app, bench, check, demo, inspect, terminal, top"
    assert heavy_modules_after(f"from hotslot.cli import {names}") == []
    assert "torch" in heavy_modules_after("import hotslot.checkpoint")  # the control


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("inspect", "check", "demo", "bench", "top"))


def test_version() -> None:
    assert run("--version").stdout == f"hotslot {hotslot.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["swap"], ["inspect"], ["check", "model"], ["inspect", "x", "--fast"], ["bench", "nonsense"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


# --- inspect


def test_inspect_shows_an_adapter(tmp_path: Path) -> None:
    folder = plain(tmp_path / "adapter", file_dtype=torch.bfloat16, layers_to_transform=[0, 2])
    tensors = load_file(folder / WEIGHTS_NAME)
    found = ask("inspect", folder)
    layers = {"model.layers": [0, 2]}
    assert found == {
        "supported": True,
        "route": "side",
        "adapter": str(folder),
        "method": "LORA",
        "base_model": None,
        "peft_version": found["peft_version"],
        "version": read(folder).version,
        "tensors": 8,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "nbytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": {"bfloat16": 8},
        "ranks": [{"rank": 4, "alpha": 6, "scaling": 1.5, "modules": 4}],
        "targets": [
            {"ending": "self_attn.q_proj", "modules": 2, "layers": layers, "shapes": ["16 → 16"]},
            {"ending": "self_attn.v_proj", "modules": 2, "layers": layers, "shapes": ["16 → 8"]},
        ],
        "unusual": [],
        "settings": found["settings"],
        "names": found["names"],
        "refusals": [],
    }
    assert found["settings"]["layers_to_transform"] == [0, 2]
    result = run("inspect", folder)
    assert result.exit_code == 0
    assert result.stderr == ""
    for text in (
        str(folder),
        "LORA",
        found["version"],
        "8 of bfloat16",
        "1.5",
        "self_attn.q_proj",
        "model.layers 0, 2",
    ):
        assert text in result.stdout
    assert f"{found['nbytes']:,} bytes" in result.stdout


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "embedding", "conv2d", "attention"])
def test_ranks_and_scalings_are_those_of_peft(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    for seed in range(6):
        folder = make_adapter(tmp_path / str(seed), entry, seed=seed, **random_config(Random(seed), entry))
        loaded = [layer for layer in fresh(entry, folder).modules() if isinstance(layer, LoraLayer)]
        wanted = Counter((one.r["default"], one.lora_alpha["default"], one.scaling["default"]) for one in loaded)
        found = ask("inspect", folder)
        groups = Counter({(one["rank"], one["alpha"], one["scaling"]): one["modules"] for one in found["ranks"]})
        assert groups == wanted
        assert sum(one["modules"] for one in found["targets"]) == len(loaded)


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"use_rslora": True}, "rsLoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern (1): 3 of 6 modules have another rank than r = 4"),
        ({"alpha_pattern": {"0.self_attn.v_proj": 2}}, "alpha_pattern (1): 1 of 6 modules"),
        ({"lora_bias": True}, "lora_bias"),
        (
            {"target_modules": [], "target_parameters": ["model.layers.0.mlp.up_proj.weight"]},
            "target_parameters: adapts bare parameters, model.layers.0.mlp.up_proj.weight",
        ),
        ({"lora_dropout": 0.1}, "lora_dropout 0.1"),
        ({"target_modules": ["lm_head"]}, "copy of the base model's lm_head.weight (3,072 bytes)"),
        ({"target_modules": ["embed_tokens"]}, "embeddings (1): model.embed_tokens"),
    ],
)
def test_inspect_says_what_is_unusual(config: dict[str, Any], note: str, tmp_path: Path) -> None:
    folder = plain(tmp_path, **config)
    assert any(note in line for line in ask("inspect", folder)["unusual"])
    assert note in run("inspect", folder).stdout


def test_targets_are_grouped_by_what_stands_behind_the_numbers(tmp_path: Path) -> None:
    names = {
        "up_blocks.0.attentions.1.attn1.to_out.0": "attn1.to_out.0",
        "up_blocks.2.attentions.0.attn1.to_out.0": "attn1.to_out.0",
        "mid_block.attentions.0.attn1.to_out.0": "attn1.to_out.0",
        "up_blocks.1.attentions.0.attn1.to_q": "attn1.to_q",
        "inner.0": "inner.0",
        "head": "head",
    }
    ab = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(8, 2)}
    save_file({f"{name}.{part}.weight": t.clone() for name in names for part, t in ab.items()}, tmp_path / WEIGHTS_NAME)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    groups = {one["ending"]: one for one in ask("inspect", tmp_path)["targets"]}
    assert {ending: one["modules"] for ending, one in groups.items()} == Counter(names.values())
    assert groups["attn1.to_out.0"]["layers"] == {"mid_block.attentions": [0], "up_blocks": [0, 2]}
    assert groups["inner.0"]["layers"] == groups["head"]["layers"] == {}
    assert "mid_block.attentions 0; up_blocks 0, 2" in run("inspect", tmp_path).stdout


def test_inspect_says_where_convolutions_are(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, ZOO["conv2d"], seed=0, r=4, target_modules=["stem", "head"])
    assert ask("inspect", folder)["unusual"] == ["convolutions (1): stem"]


def test_inspect_notices_an_untrained_adapter(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    file = folder / WEIGHTS_NAME
    tensors = load_file(file)
    save_file({name: t.zero_() if "q_proj.lora_B" in name else t for name, t in tensors.items()}, file)
    assert ask("inspect", folder)["unusual"] == [
        "partly untrained: the up-projections of 3 of 6 modules are zero, so that they add nothing"
    ]


def test_inspect_gives_every_reason_to_refuse(tmp_path: Path) -> None:
    folder = plain(tmp_path, use_dora=True, layer_replication=[(0, 3)])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "megatron_config": {"tensor_model_parallel_size": 2}}))
    found = ask("inspect", folder, exit_code=1)
    assert not found["supported"]
    assert [(one["type"], one["where"]) for one in found["refusals"]] == [
        ("UnsupportedError", "layer_replication"),
        ("UnsupportedError", "megatron_config"),
    ]
    with pytest.raises(UnsupportedError) as refused:
        hotslot.attach(LLAMA.build(), {"refused": folder})
    assert found["refusals"][0]["message"] == str(refused.value)
    assert found["settings"]["use_dora"] is True
    assert {"name": "model.layers.*.self_attn.q_proj.lora_magnitude_vector", "tensors": 3, "shapes": [[16]]} in found[
        "names"
    ]
    result = run("inspect", folder)
    assert result.exit_code == 1
    assert str(refused.value) in result.stdout
    assert "lora_magnitude_vector" in result.stdout


def test_inspect_reads_what_it_can_of_another_method(tmp_path: Path) -> None:
    base = LLAMA.build()
    with expected_peft_warnings():
        config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        get_peft_model(base, config).save_pretrained(tmp_path)
    found = ask("inspect", tmp_path)
    assert (found["method"], found["supported"], found["route"]) == ("IA3", True, "merged")
    assert found["version"] == read(tmp_path).version
    assert found["settings"]["feedforward_modules"] == ["down_proj"]
    assert [one["name"] for one in found["names"]] == [
        "model.layers.*.mlp.down_proj.ia3_l",
        "model.layers.*.self_attn.k_proj.ia3_l",
    ]
    assert "no slot can hold it (peft_type): it is merged" in run("inspect", tmp_path).stdout


def test_inspect_refuses_tensors_that_contradict_the_config(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    edit_config(folder, r=3)
    [refusal] = ask("inspect", folder, exit_code=1)["refusals"]
    assert refusal["type"] == "TensorError"
    assert refusal["expected"] == "rank 3 by the config's r and rank_pattern"


def test_json_has_no_nan(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    edit_config(folder, lora_dropout=float("inf"), megatron_core=float("nan"), corda_config=float("nan"))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(run("inspect", folder, "--json").stdout, parse_constant=refuse)
    assert (found["settings"]["lora_dropout"], found["settings"]["corda_config"]) == ("Infinity", "NaN")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- files that cannot be read


def make_pickle_only(folder: Path) -> Path:
    file = plain(folder) / WEIGHTS_NAME
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    return folder


def make_truncated(folder: Path) -> Path:
    file = plain(folder) / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def make_empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


UNREADABLE = [
    (make_pickle_only, "PickleRefusedError", "torch.load(path, weights_only=True)"),
    (make_truncated, "CorruptFileError", "is not a sound safetensors file"),
    (make_empty, "AdapterNotFoundError", WEIGHTS_NAME),
]


@pytest.mark.parametrize(("make", "kind", "words"), UNREADABLE, ids=[kind for _, kind, _ in UNREADABLE])
def test_errors_are_printed_as_they_are(make: Any, kind: str, words: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "adapter")
    with pytest.raises(HotslotError) as refused:
        read(folder)
    assert words in str(refused.value)
    result = run("inspect", folder)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"{refused.value}\n")
    error = ask("inspect", folder, exit_code=1)["error"]
    assert error["type"] == kind
    assert error["message"] == str(refused.value)
    assert error["next_step"] == refused.value.hint
    assert error["found"] == (None if refused.value.found is None else str(refused.value.found))


def test_a_folder_of_adapters_is_told_by_some_of_them(tmp_path: Path) -> None:
    for i in range(1_012):
        (tmp_path / f"adapter-{i:04}").mkdir()
    error = ask("inspect", tmp_path, exit_code=1)["error"]
    assert error["found"].endswith("adapter-0009 and 1,002 more")


@pytest.mark.parametrize("arguments", [["inspect"], ["check", "adapter"]], ids=" ".join)
def test_a_path_that_nobody_may_ask_for(arguments: list[str], tmp_path: Path) -> None:
    """The system refuses to look, as it does where there is no permission, which root always has."""
    command, *others = arguments
    assert "File name too long" in ask(command, tmp_path / ("x" * 300), *others, exit_code=1)["error"]["found"]


def test_a_narrow_terminal_cuts_nothing_off(tmp_path: Path) -> None:
    folder = plain(tmp_path / "adapter")
    text = io.StringIO()
    show_inspection(Console(width=40, file=text), inspect_adapter(folder))
    shown = "".join(text.getvalue().split())
    assert read(folder).version in shown
    assert "…" not in shown


def test_no_control_character_of_a_file_reaches_the_terminal(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    file = folder / WEIGHTS_NAME
    save_file({**load_file(file), "evil\x1b]0;owned\x07\u202e.weight": torch.zeros(2)}, file)
    result = run("inspect", folder)
    assert result.exit_code == 1
    assert "evil\\x1b]0;owned\\x07\\u202e.weight" in result.stdout
    assert not {"\x1b", "\x07", "\u202e"} & set(result.output)


def test_printable_keeps_text() -> None:
    assert terminal.printable("α × – [b]  'x'") == "α × – [b]  'x'"
    assert terminal.printable("\r\n\x00\ud800") == "\\r\\n\\x00\\ud800"


def test_a_pipe_that_knows_no_unicode(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from hotslot.cli import main; main()", "inspect", str(plain(tmp_path / "ü☃"))]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True, encoding="ascii", check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "16 \\u2192 8" in done.stdout
    assert "\\xfc\\u2603" in done.stdout


def test_what_a_file_says_adds_no_lines(tmp_path: Path) -> None:
    folder = plain(tmp_path / "adapter")
    edit_config(folder, base_model_name_or_path="llama\nversion     0000")
    assert "llama\\nversion     0000" in run("inspect", folder).stdout


# --- check


def test_check_tells_fits_from_misfits(model: Path, tmp_path: Path) -> None:
    fitting = plain(tmp_path / "fitting")
    large = plain(tmp_path / "large", r=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3})
    narrow = narrow_adapter(tmp_path / "narrow")
    elsewhere = make_adapter(tmp_path / "elsewhere", ZOO["gpt2"], seed=0, r=2, target_modules=["c_attn"])
    olora = plain(tmp_path / "olora", init_lora_weights="olora")
    alora = plain(tmp_path / "alora", alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    absent = tmp_path / "absent"
    sources = [fitting, large, narrow, elsewhere, olora, alora, absent]
    found = ask("check", model, *sources, exit_code=1)
    assert found["model_class"] == "LlamaForCausalLM"
    assert [one["fits"] for one in found["adapters"]] == [True, True, False, False, True, False, False]
    assert [one["route"] for one in found["adapters"]] == ["side", "side", None, None, "merged", None, None]
    for source, verdict in zip(sources, found["adapters"], strict=True):
        assert_agrees_with_attach(source, verdict)
    assert [one["ranks"] for one in found["adapters"][:2]] == [[4], [3, 6]]
    assert [one["slots"] for one in found["adapters"][:2]] == [6, 6]
    assert found["slots"] == 9  # q, v and down in each of three layers
    floats = 3 * ((6 * 16 + 16 * 6) + (4 * 16 + 8 * 4) + (3 * 24 + 16 * 3))  # q at the larger rank
    assert 4 * floats <= found["arena_bytes"] < 4 * floats + 64 * 18  # each part starts on a line of the cache


def narrow_adapter(folder: Path) -> Path:
    """For a Llama of half the width, and otherwise the zoo's."""
    config = LLAMA.build().config.to_dict() | {"hidden_size": 8, "head_dim": 4}
    with expected_peft_warnings():
        get_peft_model(LlamaForCausalLM(LlamaConfig(**config)), LoraConfig(**PLAIN)).save_pretrained(folder)
    return folder


def assert_agrees_with_attach(source: Path, verdict: dict[str, Any]) -> None:
    base = LLAMA.build()
    if verdict["fits"]:
        report = hotslot.attach(base, {"it": str(source)}).activate("it")
        assert verdict["error"] is None
        assert (verdict["version"], verdict["nbytes"], verdict["route"]) == (
            report.version,
            report.nbytes,
            report.route,
        )
    else:
        with pytest.raises(HotslotError) as refused:
            hotslot.attach(base, {"it": str(source)})
        assert verdict["error"]["message"] == str(refused.value)
        assert verdict["error"]["type"] == type(refused.value).__name__


def test_check_of_single_files_says_what_they_are_for(model: Path, tmp_path: Path) -> None:
    folder = plain(tmp_path / "adapter")
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes((folder / WEIGHTS_NAME).read_bytes())
    one, other = ask("check", model, folder / WEIGHTS_NAME, lora, exit_code=1)["adapters"]
    assert "the folder that it is in" in one["error"]["next_step"]
    assert "diffusers pipeline" in other["error"]["next_step"]


def test_check_as_text(model: Path, tmp_path: Path) -> None:
    fitting, misfit = plain(tmp_path / "fitting"), narrow_adapter(tmp_path / "misfit")
    result = run("check", model, fitting)
    assert result.exit_code == 0
    assert "attached together: 6 slots" in result.stdout
    assert "where:" not in result.stdout
    result = run("check", model, fitting, misfit)
    assert result.exit_code == 1
    assert f"{misfit} was made for a base layer of other dimensions." in result.stdout
    assert "next step: this adapter belongs to another base model" in result.stdout
    assert [line.split()[1:3] for line in result.stdout.splitlines() if line.startswith(str(tmp_path))][:3] == [
        ["LlamaForCausalLM,", "checked"],
        ["yes", "side"],
        ["no", f"{read(misfit).nbytes:,}"],
    ]


def test_check_says_what_only_loading_can_tell(model: Path, tmp_path: Path) -> None:
    folder = plain(tmp_path / "adapter", target_modules=["lm_head"])
    [verdict] = ask("check", model, folder)["adapters"]
    assert verdict["notes"] == ["carries a copy of lm_head.weight, compared when loaded"]
    assert verdict["notes"][0] in run("check", model, folder).stdout


def test_check_refuses_a_copy_of_another_shape(tmp_path: Path) -> None:
    resized = save_config(LLAMA, tmp_path / "resized", vocab_size=50)
    folder = plain(tmp_path / "adapter", target_modules=["embed_tokens"])
    [verdict] = ask("check", resized, folder, exit_code=1)["adapters"]
    assert verdict["error"]["type"] == "UnsupportedError"


def test_check_takes_the_class_that_the_user_loads(tmp_path: Path) -> None:
    model = save_config(ZOO["bert"], tmp_path / "model", architectures=["BertForMaskedLM"])
    folder = make_adapter(tmp_path / "adapter", ZOO["bert"], seed=0, r=2, target_modules=["query"])
    [verdict] = ask("check", model, folder, exit_code=1)["adapters"]
    assert verdict["error"]["type"] == "UnexpectedTargetError"
    assert verdict["notes"] == ["was trained on BertModel, and checked on BertForMaskedLM; try --model-class BertModel"]
    found = ask("check", model, folder, "--model-class", "BertModel")
    assert found["model_class"] == "BertModel"
    assert found["adapters"][0]["notes"] == []


@pytest.mark.parametrize(("config", "name"), [(LlamaConfig, "LlamaForCausalLM"), (BertConfig, "BertLMHeadModel")])
def test_check_of_a_config_that_names_no_class(config: Any, name: str, tmp_path: Path) -> None:
    config(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    folder = plain(tmp_path / "adapter")
    assert ask("check", tmp_path / "model", folder, exit_code=1)["model_class"] == name


def test_check_says_that_quantisation_is_not_seen(tmp_path: Path) -> None:
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model = save_config(LLAMA, tmp_path / "model", quantization_config=quantised)
    [note] = ask("check", model, plain(tmp_path / "adapter"))["notes"]
    assert "not quantised" in note


def test_check_of_what_is_no_model(model: Path, tmp_path: Path) -> None:
    folder = plain(tmp_path / "adapter")
    swapped = ask("check", folder, model, exit_code=1)["error"]
    assert swapped["type"] == "ModelError"
    assert "the model comes first" in swapped["next_step"]
    assert ask("check", tmp_path / "absent", folder, exit_code=1)["error"]["type"] == "ModelError"
    for name in ("pipeline", "LlamaTokenizer", "Nonsense"):
        error = ask("check", model, folder, "--model-class", name, exit_code=1)["error"]
        assert error["summary"] == f"transformers has no model class {name}."
    broken = save_config(LLAMA, tmp_path / "broken", hidden_act="nonsense")
    assert "cannot be built" in ask("check", broken, folder, exit_code=1)["error"]["summary"]


# --- demo and bench: that the options arrive, and the exit code; what they do has tests of its own


@dataclass
class Outcome:
    ok: bool


@pytest.mark.parametrize("ok", [True, False])
def test_demo_is_given_its_options(ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = create_autospec(demo.run_demo, return_value=Outcome(ok))  # with its signature
    monkeypatch.setattr(demo, "run_demo", fake)
    assert run("demo").exit_code == (0 if ok else 1)
    options = "--model m --adapter a --adapter b --prompt p --rounds 2 --backend eager --json"
    assert run("demo", *options.split()).exit_code == (0 if ok else 1)
    assert fake.call_args_list == [
        call(None, None, prompts=None, backend="inductor", rounds=9, as_json=False),
        call("m", ["a", "b"], prompts=["p"], backend="eager", rounds=2, as_json=True),
    ]


def test_demo_reports_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModelError("No weights.", hint="install them")
    monkeypatch.setattr(demo, "run_demo", create_autospec(demo.run_demo, side_effect=error))
    result = run("demo")
    assert (result.exit_code, result.stderr) == (1, "No weights.\n  next step: install them\n")


def test_bench_is_given_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = create_autospec(bench.run_bench)
    monkeypatch.setattr(bench, "run_bench", fake)
    assert run("bench").exit_code == 0
    options = "swap --plot out.png --size 9MB --size 84MB --rounds 3 --device cuda --threads 2 --json"
    assert run("bench", *options.split()).exit_code == 0
    sizes, plot = ["9MB", "84MB"], Path("out.png")
    assert fake.call_args_list == [
        call("swap", as_json=False, plot=None, sizes=None, rounds=None, device=None, threads=1),
        call("swap", as_json=True, plot=plot, sizes=sizes, rounds=3, device="cuda", threads=2),
    ]
    assert run("bench", "--device", "tpu").exit_code == 2


def test_bench_reports_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "_FOLDER", tmp_path)
    monkeypatch.setattr(bench, "_PACKAGE", "hotslot_benchmarks_nowhere")
    result = run("bench")
    assert result.exit_code == 1
    assert "clone the repository" in result.stderr
