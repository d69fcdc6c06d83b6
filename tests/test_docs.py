"""What README and docs say is so: code runs, messages are real, what is named exists, tables are whole."""

from __future__ import annotations

import builtins
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hotslot
from adapters import expected_peft_warnings, make_adapter
from hotslot import errors
from hotslot.methods import lora
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, error, fresh, fresh_output
from zoo import ZOO

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "demo" / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
README = (ROOT / "README.md").read_text()
SUPPORTED = (ROOT / "docs" / "supported.md").read_text()
LLAMA = ZOO["llama"]

in_every_document = pytest.mark.parametrize("document", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


# --- the README's code ----------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the README's code asks for; torch.compile without inductor, which takes a minute."""
    LLAMA.build().save_pretrained(tmp_path / "my-model")
    linear = [target for target in LLAMA.targets if target.endswith("_proj")]
    configs: dict[str, dict[str, Any]] = {
        "sql": {"r": 4, "lora_alpha": 8, "target_modules": linear},
        "chat": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        "new": {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj", "up_proj"]},
    }
    for i, (name, config) in enumerate(configs.items()):
        make_adapter(tmp_path / "adapters" / name, LLAMA, seed=i, **config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield tmp_path / "adapters"
    hotslot.unpatch_peft()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    with expected_peft_warnings():
        exec(compile(code, "README.md", "exec"), names)
    names["model"].eval()
    return names


def test_the_first_code_runs_and_swaps(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(blocks(README, "python")[0])
    model, swapper, inputs = names["model"], names["swapper"], LLAMA.inputs()
    assert capsys.readouterr().out.startswith("SwapReport(adapter='new', previous='sql', ")
    assert_same_output(LLAMA.output(model, inputs), fresh_output(LLAMA, workplace / "new"))
    with no_recompile(), same_addresses(model):
        for name in ("chat", "sql", "new"):
            swapper.activate(name)
            assert_same_output(LLAMA.output(model, inputs), fresh_output(LLAMA, workplace / name))
        with swapper.using(None):
            base = LLAMA.output(model, inputs)
    assert_same_output(base, LLAMA.output(LLAMA.build(), inputs))
    assert error(base, fresh_output(LLAMA, workplace / "new")) > 0.01  # the control


def test_the_drop_in_s_code_runs_and_swaps(workplace: Path) -> None:
    code = blocks(README, "python")[1]
    model = run(code)["model"]
    assert_same_output(LLAMA.output(model, LLAMA.inputs()), fresh_output(LLAMA, workplace / "chat"))
    import peft.utils.hotswap

    original = peft.utils.hotswap.hotswap_adapter
    hotslot.patch_peft()
    names = run(re.sub(r"from hotslot import (.*?)  #.*", r"from peft.utils.hotswap import \1", code))
    assert names["hotswap_adapter"] is hotslot.hotswap_adapter is not original
    assert_same_output(LLAMA.output(names["model"], LLAMA.inputs()), fresh_output(LLAMA, workplace / "chat"))


def test_the_blends_code_runs_and_blends(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(blocks(README, "python")[2])
    model, swapper = names["model"], names["swapper"]
    printed, _, stated = capsys.readouterr().out.strip().rpartition("\n")
    assert printed == str(names["plan"])
    assert 0 < float(stated) < 1
    assert swapper.active == "new:1.0+sql:0.7"
    swapper.activate("new")
    assert_same_output(LLAMA.output(model, LLAMA.inputs()), fresh_output(LLAMA, workplace / "new"))


def test_no_code_is_left_out() -> None:
    assert len(blocks(README, "python")) == 3


def test_the_error_is_verbatim(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(ROOT)
    larger = LlamaConfig(  # SmolLM2-360M
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
        vocab_size=49152,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(larger)
    with pytest.raises(errors.ShapeError) as caught:
        hotslot.attach(model, adapters={"french": "demo/french"})
    said = f"{caught.type.__module__}.{caught.type.__qualname__}: {caught.value}\n"
    assert said in blocks(README, "text")


# --- what is named exists -------------------------------------------------------------------------------------------


@in_every_document
def test_relative_links_resolve(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@in_every_document
def test_paths_and_tests_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    paths = re.findall(r"\b((?:tests|benchmarks|scripts|docs|demo|src)/[\w/.-]*\w)", text)
    if document.name != "CONTRIBUTING.md":  # its commands have examples
        assert [path for path in paths if not (ROOT / path).exists()] == []
    for path, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path} has no {name}"
    for entries in re.findall(r"--entries ((?:\w+ ?)+)", text):
        assert set(entries.split()) <= set(ZOO)


@in_every_document
def test_errors_that_are_named_exist(document: Path) -> None:
    named = set(re.findall(r"\b[A-Z]\w*Error\b", document.read_text()))
    assert {name for name in named if not (hasattr(errors, name) or hasattr(builtins, name))} == set()


def test_each_part_of_the_package_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = text.partition("## Packages")[2].partition("\n## ")[0]
    parts = {path.stem for path in (ROOT / "src" / "hotslot").iterdir() if path.name not in ("py.typed", "__pycache__")}
    assert {part for part in parts if not re.search(rf"\b{part}\b", listed)} == set()


# --- docs/supported.md is whole -------------------------------------------------------------------------------------


def section(start: str, end: str) -> str:
    assert start in SUPPORTED
    assert end in SUPPORTED
    return SUPPORTED.partition(start)[2].partition(end)[0]


EXACT = section("\nExact, read from the config:", "\nWithout effect")
WITHOUT_EFFECT = section("\nWithout effect", "\nRefused")
REFUSED = section("\nRefused", "\nAn option that is none of these")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (EXACT, lora._READ | lora._TRAINED_OTHERWISE.keys()),
        (WITHOUT_EFFECT, lora._WITHOUT_EFFECT),
        (REFUSED, frozenset(lora._REFUSED)),
    ],
    ids=["exact", "without effect", "refused"],
)
def test_each_option_stands_where_the_code_has_it(text: str, options: frozenset[str]) -> None:
    assert {option for option in options if f"`{option}`" not in text} == set()


def test_each_option_of_the_installed_peft_is_documented() -> None:
    options = set(LoraConfig.__dataclass_fields__)
    assert {option for option in options if f"`{option}`" not in EXACT + WITHOUT_EFFECT + REFUSED} == set()


def test_initialisations_stand_where_the_code_has_them() -> None:
    row = next(line for line in EXACT.splitlines() if line.startswith("| `init_lora_weights`"))
    benign = [repr(init).replace("'", '"') for init in lora._BENIGN_INITS if init not in (None, "true", "false")]
    assert [init for init in benign if f"`{init}`" not in row] == []
    refused = re.findall(r'"(\w+)"', "".join(line for line in REFUSED.splitlines() if "`init_lora_weights`" in line))
    assert refused
    assert not set(refused) & set(lora._BENIGN_INITS)


# --- and its reasons hold -------------------------------------------------------------------------------------------

LINEARS = ["up", "inner.0"]
BLOCKS = BdLoraConfig(target_modules_bd_b=["q_proj", "up_proj"], nblocks=2, match_strict=False)
# option → (model, config, tensors beside A and B, PEFT changes base weights at loading, computes what plain LoRA does;
# None: A and B alone are no plain LoRA)
IN_PEFT: dict[str, tuple[str, dict[str, Any], set[str], bool, bool | None]] = {
    "nothing": ("mlp", {}, set(), False, True),
    "use_dora": ("mlp", {"use_dora": True}, {"lora_magnitude_vector"}, False, False),
    "pissa": ("mlp", {"init_lora_weights": "pissa"}, set(), True, False),
    "olora": ("mlp", {"init_lora_weights": "olora"}, set(), True, False),
    "mica": ("mlp", {"init_lora_weights": "mica"}, set(), False, True),
    "kasa_config": ("mlp", {"kasa_config": KasaConfig()}, {"lora_diag"}, True, False),
    "velora_config": ("mlp", {"velora_config": VeloraConfig()}, {"lora_velora_embed"}, False, True),
    "monteclora_config": (
        "mlp",
        {"monteclora_config": MontecloraConfig()},
        {"expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior"},
        False,
        True,
    ),
    "use_qalora": ("mlp", {"use_qalora": True, "qalora_group_size": 4}, set(), False, True),
    "alora_invocation_tokens": (
        "llama",
        {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]},
        set(),
        False,
        False,
    ),
    "use_bdlora": ("llama", {"use_bdlora": BLOCKS, "target_modules": ["q_proj", "up_proj"]}, set(), False, None),
}


@pytest.mark.parametrize("option", IN_PEFT)
def test_what_a_refused_option_does_in_peft(option: str, tmp_path: Path) -> None:
    name, config, extra, changes_base, is_plain = IN_PEFT[option]
    entry = ZOO[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = make_adapter(tmp_path / option, entry, seed=1, **{"r": 4, "target_modules": LINEARS, **config})
        model = fresh(entry, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {key.rpartition(".")[2] for key in tensors if "lora_A" not in key and "lora_B" not in key} == extra
        assert (_base_weights(model) != _base_weights(entry.build())) == changes_base
        options = {"r": 4, "peft_type": "LORA", "target_modules": config.get("target_modules", LINEARS)}
        if is_plain is None:
            with pytest.raises(RuntimeError, match="size mismatch"):
                _load_plain(entry.build(), tensors, options, tmp_path / "plain")
        else:
            plain = _load_plain(entry.build(), tensors, options, tmp_path / "plain")
            outputs = [entry.output(subject, entry.inputs()) for subject in (model, plain)]
            assert torch.equal(*outputs) == is_plain


def _base_weights(model: nn.Module) -> dict[str, list[Any]]:
    wrapping = r"base_model\.model\.|\.base_layer|\.modules_to_save\.default"
    return {
        re.sub(wrapping, "", key): value.tolist()
        for key, value in model.state_dict().items()
        if "lora_" not in key and "original_module" not in key
    }


def _load_plain(base: nn.Module, tensors: dict[str, Tensor], options: dict[str, Any], folder: Path) -> PeftModel:
    """A and B, read as plain LoRA."""
    LoraConfig(**{key: value for key, value in options.items() if key != "peft_type"}).save_pretrained(folder)
    save_file(
        {k: v for k, v in tensors.items() if "lora_A" in k or "lora_B" in k}, folder / "adapter_model.safetensors"
    )
    return PeftModel.from_pretrained(base, str(folder)).eval()


class KeysOfTheirOwn(nn.Module):
    """Attention whose keys and values are narrower, experts as one bare parameter, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.word = nn.Embedding(5, 8)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.zeros(3, 8, 6))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["attention"]}, "Only same embed"),
        ({"target_modules": ["word"], "lora_bias": True}, "lora_bias=True is not supported for Embedding"),
        ({"target_modules": [], "target_parameters": ["experts.weight"], "lora_bias": True}, "lora_bias=True"),
        ({"target_modules": [], "target_parameters": ["experts.weight"], "lora_dropout": 0.5}, "lora_dropout != 0"),
    ],
)
def test_what_peft_itself_does_not_take(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get_peft_model(KeysOfTheirOwn(), LoraConfig(**config))


class Experts(nn.Module):
    """Three of them in one parameter, and the linear layer behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Module()
        self.experts.forward = self._mix  # type: ignore[method-assign]
        self.experts.weight = nn.Parameter(0.3 * torch.randn(3, 8, 6))
        self.out = nn.Linear(6, 4)

    def _mix(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.get_submodule("experts").weight).tanh().sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.experts(x))


def by_drop_in(model: nn.Module, folder: Path) -> None:
    hotslot.hotswap_adapter(model, folder, "default")


def by_swapper(model: nn.Module, folder: Path) -> None:
    swapper = hotslot.attach(model, route="side")
    swapper.load("new", folder)
    swapper.activate("new")


@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (4, 3), (4, 4)])
@pytest.mark.parametrize("swap", [by_drop_in, by_swapper])
def test_experts_stay_apart_when_the_rank_changes(
    swap: Callable[[nn.Module, Path], None], first: int, second: int, tmp_path: Path
) -> None:
    folders = [_expert_adapter(tmp_path / str(i), rank, seed=i) for i, rank in enumerate((first, second))]
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    live, oracle = (PeftModel.from_pretrained(Experts(), str(folder)).eval() for folder in folders)
    assert error(live(x), oracle(x)) > 0.01  # the control
    if swap is by_swapper and second > first:
        with pytest.raises(errors.RankError):
            swap(live, folders[1])
    else:
        swap(live, folders[1])
        assert_same_output(live(x), oracle(x))


def _expert_adapter(folder: Path, rank: int, *, seed: int) -> Path:
    config = LoraConfig(r=rank, lora_alpha=2 * rank + seed, target_modules=[], target_parameters=["experts.weight"])
    model = get_peft_model(Experts(), config)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.data.copy_(0.3 * torch.randn(param.shape, generator=generator))
    model.save_pretrained(folder)
    return folder
