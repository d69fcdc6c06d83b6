"""`load_adapter(…, hotswap=…)` and `enable_peft_hotswap` of transformers: wrong by themselves, right with hotslot.

The oracle is a fresh model with a plain `load_adapter`, transformers' own.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

import hotslot
from adapters import expected_peft_warnings, make_adapter
from compiling import Backend
from hotslot import errors
from hotslot.integrations import transformers as integration
from hotslot.testing import RecompiledError, no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, error, fresh, snapshot
from zoo import BATCH, CLASSIFIERS, HIDDEN, LENGTH, VOCAB, ZOO, Entry

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # PEFT, of a second plain load
    # PEFT, of parameters that it has matched all the same
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
THEIRS = {name: vars(PeftAdapterMixin)[name] for name in ("load_adapter", "enable_peft_hotswap")}


# --- architectures: those of the zoo, and tiny ones of other kinds ---------------------------------------------------


def _floats(name: str, *shape: int) -> Callable[[torch.Generator, torch.dtype], dict[str, Tensor]]:
    return lambda generator, dtype: {name: torch.randn(shape, generator=generator).to(dtype)}


def _tokens(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)}


def _gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, initializer_range=0.3, use_cache=False,
        )
    )  # fmt: skip


def _mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=3, max_position_embeddings=32, initializer_range=0.3,
            use_cache=False,
        )
    )  # fmt: skip


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8,
            patch_size=4, initializer_range=0.3, num_labels=5,
        )
    )  # fmt: skip


def _convnext() -> nn.Module:
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(
            num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], patch_size=2, initializer_range=0.5, num_labels=5,
            layer_scale_init_value=1.0,
        )
    )  # fmt: skip


def _whisper() -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCAB, d_model=HIDDEN, num_mel_bins=8, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
            max_source_positions=6, max_target_positions=16, init_std=0.3, decoder_start_token_id=1, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, suppress_tokens=None, begin_suppress_tokens=None, use_cache=False,
        )
    )  # fmt: skip


def _whisper_inputs(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(2, 8, 12, generator=generator).to(dtype),
        "decoder_input_ids": torch.randint(3, VOCAB, (2, 4), generator=generator),
    }


def _hubert() -> nn.Module:
    return transformers.HubertModel(
        transformers.HubertConfig(
            hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
            conv_kernel=(4, 3), conv_stride=(2, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, initializer_range=0.3,
        )
    )  # fmt: skip


def _clip() -> nn.Module:
    shared = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shared, "vocab_size": VOCAB, "max_position_embeddings": 16, "initializer_range": 0.3}
    vision = {**shared, "image_size": 8, "patch_size": 4, "initializer_range": 0.3}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=HIDDEN)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def _clip_inputs(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {**_tokens(generator, dtype), "pixel_values": torch.randn(2, 3, 8, 8, generator=generator).to(dtype)}


def _logits(result: Any) -> Tensor:
    return result.logits


def _hidden(result: Any) -> Tensor:
    return result.last_hidden_state


def _similarities(result: Any) -> Tensor:
    return result.logits_per_image / 10


_PIXELS, _SOUND = _floats("pixel_values", 2, 3, 8, 8), _floats("input_values", 2, 60)
OTHERS = {
    entry.name: entry
    for entry in (
        Entry("gpt_neox", _gpt_neox, _tokens, _logits, ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
        Entry("mixtral", _mixtral, _tokens, _logits, ("q_proj", "k_proj", "v_proj", "o_proj")),
        Entry("vit", _vit, _PIXELS, _logits, ("q_proj", "v_proj", "fc1", "fc2")),
        Entry("convnext", _convnext, _PIXELS, _logits, ("pwconv1", "pwconv2", "classifier")),
        Entry("whisper", _whisper, _whisper_inputs, _logits, ("q_proj", "v_proj", "fc1", "out_proj")),
        Entry("hubert", _hubert, _SOUND, _hidden, ("q_proj", "v_proj", "output_dense", "projection")),
        Entry("clip", _clip, _clip_inputs, _similarities, ("q_proj", "v_proj", "fc1", "text_projection")),
    )
}  # fmt: skip
MODELS: dict[str, Entry] = {
    **{name: ZOO[name] for name in ("llama", "gpt2", "bert", "t5")},
    **{name: CLASSIFIERS[name] for name in ("llama_score", "bert_classifier")},
    **OTHERS,
}
LLAMA = ZOO["llama"]


# --- adapters, and what they are to compute --------------------------------------------------------------------------


def changes(entry: Entry) -> dict[str, dict[str, Any]]:
    """Adapters that differ from the first in one thing each; `more` has targets that no other has."""
    some, more = list(entry.targets[:2]), list(entry.targets[:4])
    head = {"modules_to_save": [entry.extras[0]]} if entry.task_type == "SEQ_CLS" else {}
    return {
        "first": {"r": 4, "lora_alpha": 4, "target_modules": some, **head},
        "alpha": {"r": 4, "lora_alpha": 13, "target_modules": some, **head},
        "smaller rank": {"r": 2, "lora_alpha": 4, "target_modules": some, **head},
        "larger rank": {"r": 6, "lora_alpha": 4, "target_modules": some, **head},
        "subset": {"r": 4, "lora_alpha": 4, "target_modules": some[:1], **head},
        "more": {"r": 4, "lora_alpha": 4, "target_modules": more, **head},
    }


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(name of a model, name of a change) → its folder."""
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def folder(model: str, change: str) -> Path:
        if (model, change) not in made:
            entry = MODELS[model]
            configs = changes(entry)
            path = root / model / change.replace(" ", "_")
            made[model, change] = make_adapter(path, entry, seed=list(configs).index(change), **configs[change])
        return made[model, change]

    return folder


@pytest.fixture(scope="module")
def expected(adapter: Callable[[str, str], Path]) -> Callable[[str, str], Tensor]:
    """(name of a model, name of a change) → the output of a fresh model with a plain load by transformers itself."""
    found: dict[tuple[str, str], Tensor] = {}

    def output(model: str, change: str) -> Tensor:
        if (model, change) not in found:
            found[model, change] = plain_output(MODELS[model], adapter(model, change))
        return found[model, change]

    return output


def plain_output(entry: Entry, folder: Path) -> Tensor:
    model = entry.build()
    THEIRS["load_adapter"](model, str(folder))
    return entry.output(model, entry.inputs())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without progress bars and reports; and all that a test has patched is taken back."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    yield
    hotslot.unpatch_peft()
    assert {name: vars(PeftAdapterMixin)[name] for name in THEIRS} == THEIRS


@pytest.fixture
def patched() -> None:
    hotslot.patch_peft()


def load(model: Any, folder: Path, **options: Any) -> Any:
    with expected_peft_warnings():
        return model.load_adapter(str(folder), adapter_name=options.pop("adapter_name", "default"), **options)


def loaded(entry: Entry, folder: Path, *, target_rank: int | None = None) -> Any:
    model: Any = entry.build()
    if target_rank is not None:
        model.enable_peft_hotswap(target_rank=target_rank)
    load(model, folder)
    return model


def output(model: Any, entry: Entry = LLAMA) -> Tensor:
    return entry.output(model, entry.inputs())


# --- the control: without hotslot ------------------------------------------------------------------------------------


def test_without_hotslot_a_hotswap_is_wrong_or_raises(adapter: Any, expected: Any) -> None:
    for change, outcome in {"alpha": "wrong", "subset": "wrong", "more": "wrong", "larger rank": "raises"}.items():
        model = loaded(LLAMA, adapter("llama", "first"))
        before = dict(model.named_parameters())
        if outcome == "raises":
            with pytest.raises(RuntimeError):
                load(model, adapter("llama", change), hotswap=True)
            continue
        load(model, adapter("llama", change), hotswap=True)
        assert error(output(model), expected("llama", change)) > 0.01
        assert any(parameter is not before[name] for name, parameter in model.named_parameters())


def test_without_hotslot_a_swap_while_merged_spoils_the_base(adapter: Any) -> None:
    model = loaded(LLAMA, adapter("llama", "first"))
    merge(model)
    load(model, adapter("llama", "alpha"), hotswap=True)
    for layer in lora_layers(model):
        layer.unmerge()
    model.disable_adapters()
    assert error(output(model), output(LLAMA.build())) > 0.01


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def merge(model: nn.Module) -> None:
    for layer in lora_layers(model):
        layer.merge()


# --- every change, on every architecture -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target_rank", [None, 8], ids=["as loaded", "enabled"])
def test_every_change_is_right(
    name: str, target_rank: int | None, adapter: Any, expected: Any, patched: None, tmp_path: Path
) -> None:
    entry = MODELS[name]
    model = loaded(entry, adapter(name, "first"), target_rank=target_rank)
    assert_same_output(output(model, entry), expected(name, "first"))
    outputs = [expected(name, change) for change in changes(entry)]
    assert all(error(outputs[i], outputs[j]) > 1e-3 for i in range(len(outputs)) for j in range(i))
    for i, change in enumerate(("alpha", "smaller rank", "subset", "first", "larger rank", "more", "subset", "first")):
        addresses = {key: parameter.data_ptr() for key, parameter in model.named_parameters()}
        found = load(model, adapter(name, change), hotswap=True if target_rank is None else "auto")
        assert (found.missing_keys, found.unexpected_keys, found.mismatched_keys) == (set(), set(), set())
        assert_same_output(output(model, entry), expected(name, change))
        assert model.active_adapters() == ["default"]
        stated, saved = (
            model.peft_config["default"].to_dict(),
            LoraConfig.from_pretrained(adapter(name, change)).to_dict(),
        )
        assert {key: stated[key] for key in ("r", "lora_alpha")} == {key: saved[key] for key in ("r", "lora_alpha")}
        if change not in ("larger rank", "more"):
            assert {key: parameter.data_ptr() for key, parameter in model.named_parameters()} == addresses
        if i % 3 == 2:
            folder = tmp_path / str(i)
            model.save_pretrained(folder)
            assert_same_output(plain_output(entry, folder), expected(name, change))
    model.disable_adapters()
    assert_same_output(output(model, entry), output(entry.build(), entry))


def test_dora_is_peft_s(adapter: Any, tmp_path: Path, patched: None) -> None:
    """transformers' own plain load leaves the magnitudes out, and says so in a report alone."""
    folder = make_adapter(tmp_path, LLAMA, seed=9, r=4, use_dora=True, target_modules=["q_proj", "down_proj"])
    want = output(fresh(LLAMA, folder))
    assert error(plain_output(LLAMA, folder), want) > 0.01
    model = loaded(LLAMA, adapter("llama", "first"))
    load(model, folder, hotswap=True)
    assert_same_output(output(model), want)


def test_a_whole_module_of_the_next_adapter_is_live_with_it(adapter: Any, expected: Any, patched: None) -> None:
    """An adapter without one gives the model's own back; the next one gets its copy again."""
    entry = CLASSIFIERS["bert_classifier"]
    plain = make_adapter(
        adapter("bert_classifier", "first").parent / "plain", entry, seed=7, r=4, target_modules=["query"]
    )
    model = loaded(entry, plain)
    for _ in range(2):
        load(model, adapter("bert_classifier", "first"), hotswap=True)
        assert_same_output(output(model, entry), expected("bert_classifier", "first"))
        load(model, plain, hotswap=True)
        assert_same_output(output(model, entry), plain_output(entry, plain))


# --- compiled --------------------------------------------------------------------------------------------------------


def documented(folder: Path, target_rank: int) -> tuple[Any, Any, Backend]:
    """As transformers documents it: enable, load, compile."""
    model: Any = LLAMA.build()
    model.enable_peft_hotswap(target_rank=target_rank)
    load(model, folder)
    backend = Backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return model, compiled, backend


def test_swaps_within_the_target_rank_compile_nothing(adapter: Any, expected: Any, patched: None) -> None:
    model, compiled, backend = documented(adapter("llama", "first"), 6)
    assert_same_output(output(compiled), expected("llama", "first"))
    with no_recompile(), same_addresses(model):
        for change in ("alpha", "smaller rank", "larger rank", "subset", "first"):
            load(compiled, adapter("llama", change))  # the compiled model hands it on
            assert_same_output(output(compiled), expected("llama", change))
    assert backend.graphs == 1


def test_without_hotslot_a_compiled_model_is_wrong_or_recompiles(adapter: Any, expected: Any) -> None:
    model, compiled, _ = documented(adapter("llama", "first"), 6)
    output(compiled)
    load(model, adapter("llama", "alpha"))
    assert error(output(compiled), expected("llama", "alpha")) > 0.01
    with pytest.raises(RuntimeError):
        load(model, adapter("llama", "smaller rank"))
    load(model, adapter("llama", "alpha"), adapter_name="other")  # what is left: to load it beside, and change over
    model.set_adapter("other")
    with pytest.raises(RecompiledError), no_recompile():
        output(compiled)


def test_beyond_what_there_is_room_for_it_compiles_once_and_says_so(
    adapter: Any, expected: Any, patched: None, caplog: pytest.LogCaptureFixture
) -> None:
    model, compiled, backend = documented(adapter("llama", "first"), 4)
    output(compiled)
    for i, (change, said) in enumerate({
        "larger rank": "rank is above what the model was prepared for", "more": "modules that had no slot: 6 added"
    }.items()):  # fmt: skip
        with caplog.at_level(logging.WARNING):
            load(model, adapter("llama", change))
        assert said in caplog.text
        assert_same_output(output(compiled), expected("llama", change))
        assert backend.graphs == 2 + i
    with no_recompile():
        for change in ("first", "larger rank", "more", "smaller rank"):
            load(model, adapter("llama", change))
            assert_same_output(output(compiled), expected("llama", change))


def test_a_model_that_is_known_to_be_compiled_refuses_more_targets(adapter: Any, expected: Any, patched: None) -> None:
    model = loaded(LLAMA, adapter("llama", "first"), target_rank=4)
    model.compile(backend=Backend(), fullgraph=True)
    output(model)
    before = snapshot(model)
    with pytest.raises(errors.UnexpectedTargetError, match=r"v_proj.*lora_A\.default\.weight"):
        load(model, adapter("llama", "more"))
    assert_unchanged(before, snapshot(model))
    with no_recompile():
        assert_same_output(output(model), expected("llama", "first"))


def test_generate_with_a_static_cache_compiles_its_step_once(adapter: Any, patched: None, tmp_path: Path) -> None:
    """And its tokens are those of a plain load."""

    def tokens(model: Any) -> Tensor:
        return model.generate(
            LLAMA.inputs()["input_ids"], max_new_tokens=3, do_sample=False, use_cache=True,
            cache_implementation="static", pad_token_id=0, eos_token_id=None, disable_compile=True,
        )  # fmt: skip

    model = loaded(LLAMA, adapter("llama", "first"), target_rank=6)
    backend = Backend()
    model.forward = torch.compile(model.forward, backend=backend, dynamic=False)
    tokens(model)
    graphs, seen = backend.graphs, set()
    for change in ("alpha", "larger rank"):
        load(model, adapter("llama", change))
        made = tokens(model)
        assert torch.equal(made, tokens(loaded(LLAMA, adapter("llama", change))))
        seen.add(tuple(made.flatten().tolist()))
    assert backend.graphs == graphs
    assert len(seen) > 1


# --- refusals: nothing changes, and the kinds of errors are transformers' --------------------------------------------


def broken(folder: Path, adapter: Callable[[str, str], Path], kind: str) -> Path:
    """A folder at which a hotswap onto `first` fails."""
    source = adapter("llama", "alpha")
    if kind == "IA3":
        with expected_peft_warnings():
            config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
            get_peft_model(LLAMA.build(), config).save_pretrained(folder)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "adapter_model.safetensors")
    key = next(key for key in tensors if "v_proj.lora_A" in key or "k_proj.lora_A" in key)
    config_text = (source / "adapter_config.json").read_text()
    if kind == "not finite":
        tensors[key][0, 0] = float("nan")
    elif kind == "other base":
        tensors = {name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in tensors.items()}
    elif kind == "pissa":
        config_text = config_text.replace('"init_lora_weights": true', '"init_lora_weights": "pissa"')
        assert "pissa" in config_text
    save_file(tensors, folder / "adapter_model.safetensors")
    if kind != "no config":
        (folder / "adapter_config.json").write_text(config_text)
    return folder / "nowhere" if kind == "no folder" else folder


@pytest.mark.parametrize("target_rank", [None, 8], ids=["as loaded", "enabled"])
@pytest.mark.parametrize("kind", ["not finite", "other base", "pissa", "no config", "no folder", "IA3", "merged"])
def test_what_fails_has_changed_nothing(
    kind: str, target_rank: int | None, adapter: Any, expected: Any, patched: None, tmp_path: Path
) -> None:
    model = loaded(LLAMA, adapter("llama", "first"), target_rank=target_rank)
    load(model, adapter("llama", "alpha"), hotswap=True)
    source = adapter("llama", "first") if kind == "merged" else broken(tmp_path, adapter, kind)
    if kind == "merged":
        merge(model)
    before = snapshot(model)
    with pytest.raises((errors.HotslotError, ValueError, OSError)):
        load(model, source, hotswap=True)
    assert_unchanged(before, snapshot(model))
    if kind != "merged":
        assert_same_output(output(model), expected("llama", "alpha"))
    else:
        for layer in lora_layers(model):
            layer.unmerge()
    load(model, adapter("llama", "subset"), hotswap=True)
    assert_same_output(output(model), expected("llama", "subset"))


def test_a_failure_after_slots_were_added_takes_them_away_again(
    adapter: Any, expected: Any, patched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotslot.engine import Engine

    model = loaded(LLAMA, adapter("llama", "first"))
    before = snapshot(model)

    def fail(self: Engine, target: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "swap", fail)
        with pytest.raises(KeyboardInterrupt):
            load(model, adapter("llama", "more"), hotswap=True)
    assert_unchanged(before, snapshot(model))
    load(model, adapter("llama", "more"), hotswap=True)
    assert_same_output(output(model), expected("llama", "more"))


MISTAKES: dict[str, Callable[[Any, Callable[[str], Path]], Any]] = {
    "no adapter yet": lambda model, at: LLAMA.build().load_adapter(str(at("alpha")), hotswap=True),
    "another name": lambda model, at: model.load_adapter(str(at("alpha")), adapter_name="other", hotswap=True),
    "no name": lambda model, at: model.load_adapter(str(at("alpha")), hotswap=True),
    "no source": lambda model, at: model.load_adapter(adapter_name="default", hotswap=True),
    "name taken": lambda model, at: model.load_adapter(str(at("alpha")), adapter_name="default"),
    "name taken, hotswap=False": lambda model, at: model.load_adapter(
        str(at("alpha")), adapter_name="default", hotswap=False
    ),
    "no such folder": lambda model, at: model.load_adapter("/no/where", adapter_name="default", hotswap=True),
    "no config": lambda model, at: model.load_adapter(str(at("alpha").parent), adapter_name="default", hotswap=True),
    "a keyword that there is not": lambda model, at: model.load_adapter(
        str(at("alpha")), adapter_name="default", hotswap=True, nonsense=1
    ),
    "enabled too late": lambda model, at: model.enable_peft_hotswap(target_rank=8),
    "check_compiled": lambda model, at: model.enable_peft_hotswap(target_rank=8, check_compiled="never"),
    "delete": lambda model, at: model.delete_adapter("other"),
    "set": lambda model, at: model.set_adapter("other"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises_what_it_does_in_transformers(mistake: str, adapter: Any) -> None:
    def at(change: str) -> Path:
        return adapter("llama", change)

    with pytest.raises(Exception) as theirs:  # noqa: PT011  # whatever it is
        MISTAKES[mistake](loaded(LLAMA, at("first")), at)
    hotslot.patch_peft()
    model = loaded(LLAMA, at("first"))
    before = snapshot(model)
    with pytest.raises(theirs.type):
        MISTAKES[mistake](model, at)
    assert_unchanged(before, snapshot(model))
    assert not getattr(model, "_hotswap_enabled", False)


# --- what transformers documents of hotswap="auto" -------------------------------------------------------------------


def test_auto_swaps_where_it_was_enabled_and_the_name_is_known(adapter: Any, expected: Any, patched: None) -> None:
    model = loaded(LLAMA, adapter("llama", "first"), target_rank=6)
    load(model, adapter("llama", "alpha"))
    assert_same_output(output(model), expected("llama", "alpha"))
    load(model, adapter("llama", "subset"), adapter_name="other")  # a name that is not known: loaded beside it
    assert list(model.peft_config) == ["default", "other"]
    with pytest.raises(ValueError, match="already exists"):
        load(model, adapter("llama", "first"), hotswap=False)
    model.set_adapter("default")
    assert_same_output(output(model), expected("llama", "alpha"))
    load(model, adapter("llama", "first"), adapter_name="other")  # and that one was given room, too
    model.set_adapter("other")
    assert_same_output(output(model), expected("llama", "first"))


def test_enabling_with_an_adapter_there_gives_it_room(adapter: Any, expected: Any, patched: None) -> None:
    model = loaded(LLAMA, adapter("llama", "first"))
    model.enable_peft_hotswap(target_rank=6, check_compiled="ignore")
    assert_same_output(output(model), expected("llama", "first"))
    with same_addresses(model):
        load(model, adapter("llama", "larger rank"))
        assert_same_output(output(model), expected("llama", "larger rank"))


# --- beside it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["load_adapter", "hotswap", "drop-in"])
def test_an_adapter_that_is_loaded_anew_needs_no_swapper_of_the_one_before(
    call: str, adapter: Any, expected: Any, patched: None
) -> None:
    """Somebody still holds that: it had raised, from `load_adapter` too, which had loaded by then."""
    model = loaded(LLAMA, adapter("llama", "first"), target_rank=6)
    swapper = hotslot.attach(model, {"more": adapter("llama", "more")})
    swapper.activate("more")
    model.delete_adapter("default")
    with pytest.raises(errors.ModelError, match="deleted"):
        hotslot.hotswap_adapter(model, str(adapter("llama", "alpha")), "default")
    assert not swapper.detached  # the control: nothing has come in its place
    load(model, adapter("llama", "first"), hotswap=False)
    if call == "hotswap":
        load(model, adapter("llama", "alpha"), hotswap=True)
    elif call == "drop-in":
        hotslot.hotswap_adapter(model, str(adapter("llama", "alpha")), "default")
    assert_same_output(output(model), expected("llama", "first" if call == "load_adapter" else "alpha"))
    assert swapper.detached


def test_the_swapper_of_the_one_before_leaves_nothing_on_one_that_is_loaded_anew(adapter: Any) -> None:
    model = loaded(LLAMA, adapter("llama", "first"))
    swapper = hotslot.attach(model, {"larger rank": adapter("llama", "larger rank")})
    swapper.activate("larger rank")
    model.delete_adapter("default")
    load(model, adapter("llama", "smaller rank"))
    before = snapshot(model)
    with pytest.raises(errors.UnexpectedTargetError):
        hotslot.hotswap_adapter(model, str(adapter("llama", "more")), "default")
    assert swapper.detached  # the control: it was let go of
    assert_unchanged(before, snapshot(model))


def test_other_adapters_change_by_no_byte(adapter: Any, expected: Any, patched: None) -> None:
    model = loaded(LLAMA, adapter("llama", "first"), target_rank=6)
    load(model, adapter("llama", "subset"), adapter_name="default_2")
    others = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters() if ".default_2" in name}
    assert others
    model.set_adapter("default")
    for change in ("larger rank", "more", "alpha"):
        load(model, adapter("llama", change))
        assert_same_output(output(model), expected("llama", change))
        now = dict(model.named_parameters())
        for name, (parameter, address, values) in others.items():
            assert now[name] is parameter
            assert parameter.data_ptr() == address
            assert torch.equal(parameter, values)
    model.set_adapter("default_2")
    assert_same_output(output(model), expected("llama", "subset"))
    model.delete_adapter("default")
    assert list(model.peft_config) == ["default_2"]
    load(model, adapter("llama", "more"), adapter_name="default")  # a plain load under the name again
    model.set_adapter("default")
    assert_same_output(output(model), expected("llama", "more"))
    load(model, adapter("llama", "alpha"))
    assert_same_output(output(model), expected("llama", "alpha"))
    model.set_adapter([])  # PEFT warns of what is active
    model.delete_adapter(["default", "default_2"])
    assert_same_output(output(model), output(LLAMA.build()))
    load(model, adapter("llama", "first"))
    assert_same_output(output(model), expected("llama", "first"))


def test_tensors_in_memory_are_copied(adapter: Any, expected: Any, patched: None) -> None:
    model = loaded(LLAMA, adapter("llama", "first"))
    tensors = load_file(adapter("llama", "smaller rank") / "adapter_model.safetensors")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    config = LoraConfig.from_pretrained(adapter("llama", "smaller rank"))
    model.load_adapter(adapter_state_dict=tensors, peft_config=config, adapter_name="default", hotswap=True)
    assert_same_output(output(model), expected("llama", "smaller rank"))
    assert model.peft_config["default"] is not config
    load(model, adapter("llama", "alpha"), hotswap=True)
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_are_as_after_a_plain_load(trainable: bool, adapter: Any, patched: None) -> None:
    plain: Any = LLAMA.build()
    load(plain, adapter("llama", "alpha"), is_trainable=trainable)
    model: Any = LLAMA.build().train()
    load(model, adapter("llama", "first"), is_trainable=not trainable)
    load(model, adapter("llama", "alpha"), hotswap=True, is_trainable=trainable)
    wanted = {name: p.requires_grad for name, p in plain.named_parameters() if "lora_" in name}
    assert {name: p.requires_grad for name, p in model.named_parameters() if "lora_" in name} == wanted
    assert set(wanted.values()) == {trainable}
    assert model.peft_config["default"].inference_mode is not trainable


# --- names and layouts that transformers changes ---------------------------------------------------------------------


def test_an_adapter_of_the_whole_model_goes_onto_its_base(adapter: Any, patched: None) -> None:
    """transformers takes the prefix away."""

    def build() -> Any:
        return LLAMA.build().model

    def read(model: Any) -> Tensor:
        with torch.no_grad():
            return model(**LLAMA.inputs()).last_hidden_state

    wants = []
    for change in ("alpha", "more"):
        plain = build()
        THEIRS["load_adapter"](plain, str(adapter("llama", change)))
        wants.append(read(plain))
    model = build()
    load(model, adapter("llama", "first"))
    for change, want in zip(("alpha", "more"), wants, strict=True):
        load(model, adapter("llama", change), hotswap=True)
        assert_same_output(read(model), want)


def test_a_mapping_of_names_is_transformers_own(adapter: Any, expected: Any, patched: None, tmp_path: Path) -> None:
    from transformers.core_model_loading import WeightRenaming

    source = adapter("llama", "alpha")
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(
        {name.replace("layers", "blocks"): t for name, t in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    model = loaded(LLAMA, adapter("llama", "first"))
    load(model, tmp_path, hotswap=True, weight_mapping=[WeightRenaming("blocks", "layers")])
    assert_same_output(output(model), expected("llama", "alpha"))


def old_mixtral(folder: Path, seed: int, rank: int, alpha: int, targets: tuple[str, ...]) -> Path:
    """An adapter as transformers 4 had it: a LoRA for each expert."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    shapes = {"w1": (24, HIDDEN), "w2": (HIDDEN, 24), "w3": (24, HIDDEN), "q_proj": (HIDDEN, HIDDEN)}
    for layer in range(2):
        for target in targets:
            experts = [f"block_sparse_moe.experts.{i}.{target}" for i in range(3)]
            for path in experts if target.startswith("w") else [f"self_attn.{target}"]:
                outs, ins = shapes[target]
                name = f"base_model.model.model.layers.{layer}.{path}"
                tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, ins, generator=generator)
                tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(outs, rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("old")
    return {
        "all": old_mixtral(root / "all", 0, 4, 8, ("q_proj", "w1", "w2", "w3")),
        "small": old_mixtral(root / "small", 1, 2, 6, ("q_proj", "w1", "w2", "w3")),
        "attention": old_mixtral(root / "attention", 2, 3, 3, ("q_proj",)),
    }


def test_experts_of_transformers_4_are_converted(old: dict[str, Path], patched: None, tmp_path: Path) -> None:
    entry = MODELS["mixtral"]
    wants = {name: plain_output(entry, folder) for name, folder in old.items()}
    assert error(wants["all"], output(entry.build(), entry)) > 0.1
    assert error(wants["all"], wants["small"]) > 0.1
    model = loaded(entry, old["all"])
    for name in ("small", "attention", "all", "small"):
        load(model, old[name], hotswap=True)
        assert_same_output(output(model, entry), wants[name])
    model.save_pretrained(tmp_path)
    assert_same_output(plain_output(entry, tmp_path), wants["small"])


def test_experts_of_transformers_4_are_converted_for_attach_and_the_drop_in(old: dict[str, Path]) -> None:
    entry = MODELS["mixtral"]
    wants = {name: plain_output(entry, folder) for name, folder in old.items()}
    model = entry.build()
    swapper = hotslot.attach(model, adapters={name: old[name] for name in ("all", "small")})
    swapper.load("attention", old["attention"])
    for name in ("small", "attention", "all"):
        swapper.activate(name)
        assert_same_output(output(model, entry), wants[name])
    wrapped = fresh(entry, old["all"])
    for name in ("small", "all"):
        hotslot.hotswap_adapter(wrapped, old[name], "default")
        assert_same_output(output(wrapped, entry), wants[name])


def test_of_a_folder_of_such_adapters_one_of_each_kind_is_read(tmp_path: Path) -> None:
    """What the others come to is known from that: their values are read when they are needed."""
    entry, targets = MODELS["mixtral"], ("q_proj", "w1", "w2", "w3")
    folders = [old_mixtral(tmp_path / "adapters" / f"tenant{i}", i, 4, 8, targets) for i in range(3)]
    broken = load_file(folders[1] / "adapter_model.safetensors")
    next(iter(broken.values())).fill_(float("nan"))
    save_file(broken, folders[1] / "adapter_model.safetensors")
    model = entry.build()
    with pytest.raises(errors.NonFiniteError):  # the control: all are read
        hotslot.attach(model, {folder.name: folder for folder in folders})
    swapper = hotslot.attach(model, tmp_path / "adapters")
    assert swapper.metrics().host_adapters == 1
    with pytest.raises(errors.NonFiniteError):
        swapper.activate("tenant1")
    for i in (2, 0):
        swapper.activate(f"tenant{i}")
        assert_same_output(output(model, entry), plain_output(entry, folders[i]))


def test_tensors_of_such_adapters_come_back_from_disk_as_they_were_converted(tmp_path: Path) -> None:
    entry, targets = MODELS["mixtral"], ("q_proj", "w1", "w2", "w3")
    folders = [old_mixtral(tmp_path / f"tenant{i}", i, 4, 8, targets) for i in range(6)]
    model = entry.build()
    swapper = hotslot.attach(model, {"0": folders[0]})
    room = int(3.5 * swapper.host_bytes)
    swapper.detach()
    cache = hotslot.Cache(host_bytes=room, disk_bytes=None, folder=tmp_path / "cache")
    swapper = hotslot.attach(model, {"0": folders[0]}, cache=cache)
    for i in range(1, 6):
        tensors = load_file(folders[i] / "adapter_model.safetensors")
        swapper.load(str(i), tensors, config=LoraConfig.from_pretrained(folders[i]))
    swapper.activate("5")
    now = {name: values.clone() for name, values in model.get_adapter_state_dict("default").items()}
    assert swapper.update("1", now) is None
    for i in (3, 4, 1, 2, 5, 1):
        swapper.activate(str(i))
        assert_same_output(output(model, entry), plain_output(entry, folders[5 if i == 1 else i]))
        swapper.check_integrity()
    assert swapper.metrics().evictions


def test_half_of_what_was_fused_is_refused(old: dict[str, Path], patched: None, tmp_path: Path) -> None:
    half = old_mixtral(tmp_path / "half", 3, 2, 2, ("q_proj", "w1"))
    model = loaded(MODELS["mixtral"], old["all"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="without also targeting w3"):
        load(model, half, hotswap=True)
    assert_unchanged(before, snapshot(model))
    with pytest.raises(errors.UnsupportedError, match="without also targeting w3"):
        hotslot.attach(MODELS["mixtral"].build(), adapters={"half": half})


# --- one model alone, all models, and back ---------------------------------------------------------------------------


def test_signatures_are_transformers_own() -> None:
    for name, theirs in THEIRS.items():
        ours = integration._OURS[name]
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert ours.__doc__ == theirs.__doc__


def test_patching_reaches_every_model_and_is_taken_back(adapter: Any, expected: Any) -> None:
    before: Any = LLAMA.build()
    overriding = vars(transformers.Wav2Vec2ForCTC.__mro__[1])["load_adapter"]
    for _ in range(2):
        hotslot.patch_peft()
    for name, ours in integration._OURS.items():
        assert getattr(type(before), name) is ours
        assert getattr(transformers.BertModel, name) is ours
    assert vars(transformers.Wav2Vec2ForCTC.__mro__[1])["load_adapter"] is overriding
    load(before, adapter("llama", "first"))
    load(before, adapter("llama", "alpha"), hotswap=True)
    assert_same_output(output(before), expected("llama", "alpha"))
    for _ in range(2):
        hotslot.unpatch_peft()
    assert {name: getattr(type(before), name) for name in THEIRS} == THEIRS


def test_enable_is_for_one_model_and_disable_takes_it_back(adapter: Any, expected: Any) -> None:
    model, other = loaded(LLAMA, adapter("llama", "first")), loaded(LLAMA, adapter("llama", "first"))
    integration.enable(model)
    load(model, adapter("llama", "alpha"), hotswap=True)
    load(other, adapter("llama", "alpha"), hotswap=True)
    assert_same_output(output(model), expected("llama", "alpha"))
    assert error(output(other), expected("llama", "alpha")) > 0.01  # the control
    twin = copy.deepcopy(model)
    load(twin, adapter("llama", "subset"), hotswap=True)
    assert_same_output(output(twin), expected("llama", "subset"))
    assert_same_output(output(model), expected("llama", "alpha"))
    integration.disable(model)
    assert model.load_adapter.__func__ is THEIRS["load_adapter"]
    assert "load_adapter" not in vars(model)
    integration.disable(model)
    assert_same_output(output(model), expected("llama", "alpha"))


def test_a_model_with_another_load_adapter_is_refused() -> None:
    model = transformers.Wav2Vec2ForCTC(
        transformers.Wav2Vec2Config(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, conv_dim=(8,),
            conv_kernel=(4,), conv_stride=(2,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, vocab_size=8,
        )
    )  # fmt: skip
    for other in (model, nn.Linear(2, 2)):
        with pytest.raises(errors.UnsupportedError, match="no load_adapter that loads adapters of PEFT"):
            integration.enable(other)
        assert "load_adapter" not in vars(other)


# --- attach ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_attach_takes_any_architecture(name: str, adapter: Any, expected: Any) -> None:
    entry = MODELS[name]
    model = entry.build()
    swapper = hotslot.attach(model, adapters={change: adapter(name, change) for change in ("first", "subset", "more")})
    run = torch.compile(model, backend=Backend()) if name == "vit" else model
    output(run, entry)
    with no_recompile(), same_addresses(model):
        for change in ("more", "subset", "first"):
            swapper.activate(change)
            assert_same_output(output(run, entry), expected(name, change))
        swapper.deactivate()
        assert_same_output(output(run, entry), output(entry.build(), entry))


class Recogniser(transformers.Pipeline):
    """A pipeline without a tokenizer: none can be downloaded."""

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], ...]:
        return {}, {}, {}

    def preprocess(self, inputs: Any, **kwargs: Any) -> Any:
        return inputs

    def _forward(self, inputs: Any, **kwargs: Any) -> Any:
        return self.model(**inputs)

    def postprocess(self, outputs: Any, **kwargs: Any) -> Any:
        return outputs.logits


def test_a_pipeline_stands_for_its_model(adapter: Any, expected: Any) -> None:
    entry = MODELS["vit"]
    pipe = Recogniser(model=entry.build(), device="cpu")
    plan = hotslot.plan(pipe, [adapter("vit", "first"), adapter("vit", "subset")], max_blend=1)
    swapper = hotslot.attach(pipe, {change: adapter("vit", change) for change in ("first", "subset")}, plan=plan)
    assert hotslot.Swapper.of(pipe) is swapper is hotslot.Swapper.of(pipe.model)
    for change in ("subset", "first"):
        swapper.activate(change)
        assert_same_output(pipe(entry.inputs()), expected("vit", change))
    swapper.detach()
    integration.enable(pipe)
    load(pipe.model, adapter("vit", "first"))
    load(pipe.model, adapter("vit", "subset"), hotswap=True)
    assert_same_output(pipe(entry.inputs()), expected("vit", "subset"))


def test_a_folder_of_a_trainer_is_taken(tmp_path: Path, patched: None) -> None:
    """checkpoint-N: the adapter beside the optimizer's and the trainer's state, which nobody reads."""
    torch.manual_seed(0)
    model = get_peft_model(LLAMA.build(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    ids = LLAMA.inputs()["input_ids"][0]
    with expected_peft_warnings():
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, save_steps=1, per_device_train_batch_size=1, learning_rate=0.5,
            report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 2)
        trainer.train()
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    assert (first / "optimizer.pt").exists()
    live = loaded(LLAMA, first)
    load(live, second, hotswap=True)
    wants = {folder.name: plain_output(LLAMA, folder) for folder in (first, second)}
    assert error(*wants.values()) > 0.01
    assert_same_output(output(live), wants[second.name])
    bare = LLAMA.build()
    swapper = hotslot.attach(bare, {folder.name: folder for folder in (first, second)})
    for folder in (second, first):
        swapper.activate(folder.name)
        assert_same_output(output(bare), wants[folder.name])


def tokenizer() -> Any:
    """Of five words: none can be downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2, "quick": 3, "brown": 4, "fox": 5}
    words = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def sentences(folder: Path) -> Any:
    """A SentenceTransformer of the tiny BERT, which adds mean pooling."""
    library = pytest.importorskip("sentence_transformers")
    ZOO["bert"].build().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return library.SentenceTransformer(str(folder), device="cpu").eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sentence_transformers(adapter: Any, patched: None, tmp_path: Path) -> None:
    """`load_adapter` hands on to the model within, and `attach` finds it."""
    text = ["a quick fox", "brown"]

    def encoded(model: Any) -> Tensor:
        return torch.from_numpy(model.encode(text, show_progress_bar=False))

    wants = {}
    for change in ("first", "alpha", "more"):
        model = sentences(tmp_path / change.replace(" ", "_"))
        THEIRS["load_adapter"](model.transformers_model, str(adapter("bert", change)))
        wants[change] = encoded(model)
    assert error(wants["first"], wants["alpha"]) > 0.01
    model = sentences(tmp_path / "live")
    base = encoded(model)
    load(model, adapter("bert", "first"))
    for change in ("alpha", "more", "first"):
        load(model, adapter("bert", change), hotswap=True)
        assert_same_output(encoded(model), wants[change])
    model = sentences(tmp_path / "attached")
    swapper = hotslot.attach(model, {change: adapter("bert", change) for change in wants})
    for change, want in wants.items():
        swapper.activate(change)
        assert_same_output(encoded(model), want)
    swapper.deactivate()
    assert_same_output(encoded(model), base)
    assert hotslot.Swapper.of(model) is swapper


# --- docs/transformers.md --------------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).parents[1] / "docs" / "transformers.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
# What each block of code leaves live: the model's name in it, the zoo's entry, the folder of the adapter.
LIVE = (
    ("model", LLAMA, "adapters/chat"),
    ("model", LLAMA, "adapters/chat"),
    ("model", LLAMA, "adapters/chat"),
    ("pipe", CLASSIFIERS["bert_classifier"], "adapters/topic"),
    ("encoder", ZOO["bert"], "adapters/code"),
    ("model", LLAMA, "out/checkpoint-1000"),
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the document's code asks for."""
    root = tmp_path_factory.mktemp("document")
    LLAMA.build().save_pretrained(root / "my-model")
    for name, entry in (("my-classifier", CLASSIFIERS["bert_classifier"]), ("my-encoder", ZOO["bert"])):
        entry.build().save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    head = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    adapters: dict[str, tuple[Entry, dict[str, Any]]] = {
        "adapters/sql": (LLAMA, {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}),
        "adapters/chat": (LLAMA, {"r": 8, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}),
        "adapters/mood": (CLASSIFIERS["bert_classifier"], {"r": 2, **head}),
        "adapters/topic": (CLASSIFIERS["bert_classifier"], {"r": 4, **head}),
        "adapters/law": (ZOO["bert"], {"r": 2, "target_modules": ["query"]}),
        "adapters/code": (ZOO["bert"], {"r": 3, "target_modules": ["value"]}),
        "out/checkpoint-500": (LLAMA, {"r": 4, "target_modules": ["o_proj"]}),
        "out/checkpoint-1000": (LLAMA, {"r": 4, "target_modules": ["o_proj"]}),
    }
    for seed, (name, (entry, config)) in enumerate(adapters.items()):
        make_adapter(root / name, entry, seed=seed, **config)
        (root / name / "optimizer.pt").write_bytes(b"not to be read")
    return root


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("index", range(len(LIVE)))
def test_the_document_s_code_runs_and_swaps(index: int, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) == len(LIVE)
    name, entry, folder = LIVE[index]
    if name == "encoder":
        pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names: dict[str, Any] = {}
    with expected_peft_warnings():
        exec(compile(BLOCKS[index], str(DOCUMENT), "exec"), names)
    holder = names[name]
    model = {"model": lambda: holder, "pipe": lambda: holder.model, "encoder": lambda: holder.transformers_model}[
        name
    ]()
    want = output(fresh(entry, workplace / folder), entry)
    assert error(want, output(entry.build(), entry)) > 0.01
    assert_same_output(output(model, entry), want)
