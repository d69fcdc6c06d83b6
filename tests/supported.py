"""What docs/supported.md says in tables: rows that tests/test_supported.py runs over, and that are written from here.

    python tests/supported.py      # writes the tables into the page, between its comments `table: …` and `end of table`

Another table is another list of rows, a function that renders it, and a line in TABLES.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from hotslot.methods import NOT_MERGEABLE
from methods import METHODS, Method

PAGE = Path(__file__).parents[1] / "docs" / "supported.md"
EXACT, PEFT_REFUSES = "exact", "PEFT refuses it"
_BLOCKS = BdLoraConfig(target_modules_bd_b=["q_proj", "up_proj"], nblocks=2, match_strict=False)


@dataclass(frozen=True, kw_only=True)
class InPeft:
    """What an option does in PEFT: the tensors beside A and B, whether loading changes base weights, and whether A and
    B compute alone what they compute with it (None: they are no plain LoRA)."""

    extra: frozenset[str] = frozenset()
    changes_base: bool = False
    is_plain: bool | None = False


@dataclass(frozen=True, kw_only=True)
class Option:
    """Fields of LoraConfig that are treated alike.

    Attributes:
        names: the fields; `values`: those of their values that the row is about, if not all.
        kind: which table it stands in, and so what is tested of `example`.
        said, verdict: for the reader.
        proved_by: tests beside those that run over the rows.
        example: a LoraConfig that uses it, on a model of the zoo; `from_peft`: whether PEFT makes such an adapter.
        merged: of one that slots refuse, whether `route="auto"` merges it into the base weights.
    """

    names: str
    kind: Literal["exact", "without effect", "refused"]
    said: str
    verdict: str = ""
    values: tuple[Any, ...] = ()
    proved_by: tuple[str, ...] = ()
    example: Mapping[str, Any] = field(default_factory=dict)
    on: str = "mlp"
    from_peft: bool = True
    merged: bool = False
    in_peft: InPeft | None = None

    @property
    def title(self) -> str:
        """The fields, and the values."""
        values = ", ".join(f"`{value!r}`".replace("'", '"') for value in self.values)
        return ", ".join(f"`{name}`" for name in self.names.split()) + (f" = {values}" if values else "")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A kind of layer. `on`: model of the zoo → a module of it that is one."""

    layer: str
    said: str
    bias: str
    proved_by: tuple[str, ...] = ()
    on: Mapping[str, str] = field(default_factory=dict)


_COMPILED = "tests/test_compiled.py::test_swaps_compile_nothing"
_QUANTISED = "tests/test_quantised.py::test_every_adapter_after_every_other"

LAYERS = (
    Layer(layer="`nn.Linear`", said=EXACT, bias=EXACT, on={"mlp": "up", "llama": "q_proj"},
          proved_by=("random_pairs --entries llama bert t5 mlp", _COMPILED)),
    Layer(layer="transformers' `Conv1D`", said=EXACT, bias=EXACT, on={"gpt2": "c_attn"},
          proved_by=("random_pairs --entries gpt2", _COMPILED)),
    Layer(layer="`nn.Embedding`", said=EXACT, bias=PEFT_REFUSES, on={"embedding": "word"},
          proved_by=("random_pairs --entries embedding bert gpt2",
                     "tests/hostile/test_bad_input.py::test_sound_adapter_is_taken_the_same_way")),
    Layer(layer="`nn.Conv1d`, `nn.Conv3d`", said="exact, groups too", bias=EXACT,
          on={"conv1d": "grouped", "conv3d": "grouped"}, proved_by=("random_pairs --entries conv1d conv3d",)),
    Layer(layer="`nn.Conv2d`", bias=EXACT, on={"conv2d": "grouped", "vision": "patch"},
          said="exact, groups too; the rank must be a multiple of the groups (PEFT's rule)",
          proved_by=("random_pairs --entries conv2d vision", _COMPILED)),
    Layer(layer="`nn.MultiheadAttention`, one embedding size", said="exact: PEFT's first forward, every time",
          bias="as in PEFT: on `out_proj` only", on={"attention": "batch_first"},
          proved_by=("tests/test_attention.py::test_every_kind_of_adapter",
                     "random_pairs --entries attention vision")),
    Layer(layer="the same with `kdim` or `vdim`", said=PEFT_REFUSES, bias=PEFT_REFUSES,
          proved_by=("tests/test_supported.py::test_what_peft_itself_does_not_take",)),
    Layer(layer="bare parameters (`target_parameters`), experts of a mixture",
          said="exact, each expert padded by itself, on plain models and PEFT's. All adapters of a model must have the "
          "same list (PEFT's rule). Compiled, PEFT's own forward of bare parameters breaks the graph and recompiles by "
          "itself", bias="PEFT refuses it, and dropout too",
          proved_by=("tests/test_experts.py", "tests/peft_suite",
                     "tests/test_supported.py::test_what_peft_itself_does_not_take")),
    Layer(layer="bitsandbytes' `Linear8bitLt`, `Linear4bit`", said="exact, DoRA and padding too; see below", bias=EXACT,
          proved_by=(_QUANTISED, "tests/test_quantised.py::test_compiled")),
    Layer(layer="`nn.Linear` with torchao's int8 weight", said="exact, DoRA and padding too", bias=PEFT_REFUSES,
          proved_by=(_QUANTISED, "tests/test_quantised.py::test_bias_is_swapped_where_peft_takes_it")),
    Layer(layer="layers of GPTQ, AWQ, AQLM, EETQ, HQQ, INC", said="untested; see below", bias="untested"),
    Layer(layer="tensor-parallel, Megatron, Transformer Engine layers", said="not tried", bias="not tried"),
    Layer(layer="any other module", said="PEFT refuses it: `UnsupportedError`, by module path", bias=""),
)  # fmt: skip

_PLAIN = InPeft(is_plain=True)
_SAMPLER = frozenset({"expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior"})
_VARIANTS = ("tests/test_variants.py",)

OPTIONS = (
    Option(names="r rank_pattern", kind="exact", said="any rank up to the slot's. Beyond it: `RankError`",
           example={"r": 3, "rank_pattern": {"up": 2}}),
    Option(names="lora_alpha alpha_pattern use_rslora", kind="exact", said="any finite number",
           example={"lora_alpha": 5, "alpha_pattern": {"up": 3}, "use_rslora": True}),
    Option(names="lora_bias", kind="exact", said="also where the adapter before had none",
           example={"lora_bias": True, "target_modules": ["up", "inner.2"]}),
    Option(names="use_dora", kind="exact", said="DoRA to DoRA, to plain LoRA and back, any rank, on every layer that "
           "PEFT has DoRA for. A slot that is planned for DoRA costs PEFT's norm in each forward, whoever is live. Not "
           "onto a model that was compiled with PEFT's own DoRA on it: attach first",
           example={"use_dora": True}, in_peft=InPeft(extra=frozenset({"lora_magnitude_vector"})),
           proved_by=("tests/test_dora.py",)),
    Option(names="lora_dropout", kind="exact", said="no effect in eval mode; in training the adapter's own",
           example={"lora_dropout": 0.5}, in_peft=_PLAIN),
    Option(names="target_parameters", kind="exact", said="see above", proved_by=("tests/test_experts.py",),
           example={"target_modules": [], "target_parameters": ["up.weight"]}),
    Option(names="modules_to_save", kind="exact", said="whole modules, classification heads: the adapter's while it is "
           "live, then the model's own, bit for bit, buffers of integers and booleans too. The model needs a copy to "
           "write: `attach` with the adapter among `adapters=`, or `grow`; the drop-in where the adapter on the model "
           "saves the same module. Else `UnexpectedTargetError`",
           example={"modules_to_save": ["inner"], "target_modules": ["up"]},
           proved_by=("tests/test_saved_modules.py::test_every_transition_is_exact",
                      "tests/test_saved_modules.py::test_drop_in_swaps_heads")),
    Option(names="bias", kind="exact", said='`"all"`, `"lora_only"`: written over the base model\'s own, which come '
           "back bit for bit. As in PEFT `disable_adapter` does not take them back, and only one adapter of a model "
           "may have them. They are not blended", example={"bias": "all"},
           proved_by=("tests/test_base_biases.py::test_every_transition_is_exact",
                      "tests/test_base_biases.py::test_biases_are_not_blended")),
    Option(names="trainable_token_indices", kind="exact", on="llama", said="other tokens under each adapter, or none: "
           "compiled code stays. Tied output layers too. A plan has places for the largest number of them; beyond it "
           "`RankError`, and `grow`. The drop-in swaps up to as many as the adapter on the model has. A slot for "
           "tokens costs a copy of the weight in each forward, as in PEFT, whoever is live. Refused: a Linear with a "
           "bias, or an embedding with a forward of its own, both of which PEFT leaves out; a layer that one adapter "
           "ties to the embedding and another has tokens of its own for",
           example={"trainable_token_indices": {"embed_tokens": [3]}, "target_modules": ["q_proj"]},
           proved_by=("tests/test_trainable_tokens.py::test_every_transition_is_exact",
                      "tests/test_trainable_tokens.py::test_swaps_compile_nothing")),
    Option(names="ensure_weight_tying", kind="exact", said="LoRA, whole modules and tokens that PEFT ties to the "
           "embedding: each layer has the file's values, which are equal. Refused where a fresh load drops tensors or "
           "makes them up: a file of an untied model on a tied one and the other way, LoRA on the head of a model "
           "whose embedding is not called `embed_tokens`; and values that differ. PEFT lets the matrices share "
           "memory: such an adapter on the model is not swapped by the drop-in, nor while it is trained",
           example={"ensure_weight_tying": True}, from_peft=False,
           proved_by=("tests/test_weight_tying.py::test_every_transition_is_right",
                      "tests/test_weight_tying.py::test_what_peft_drops_when_it_loads_its_own_file_is_refused",
                      "tests/test_weight_tying.py::test_shared_matrices_are_not_swapped_where_they_are")),
    Option(names="init_lora_weights", kind="exact", values=(True, False, "gaussian", "eva", "orthogonal"),
           said="without effect once trained", example={"init_lora_weights": "gaussian"}, in_peft=_PLAIN),
    Option(names="init_lora_weights", kind="exact", values=("mica",), said="plain LoRA of which A alone is trained. "
           "Taken as plain LoRA: what is live, saved and trained after the swap is that. The log says so",
           example={"init_lora_weights": "mica"}, in_peft=_PLAIN, proved_by=_VARIANTS),
    Option(names="velora_config", kind="exact", said="another backward pass, and a tensor for it; plain LoRA in eval "
           "mode. Taken as that, as MiCA is, and the tensor is left out. On a model whose own adapter is one: "
           "`UnsupportedError`, as PEFT's layer keeps the tensor", example={"velora_config": VeloraConfig()},
           in_peft=InPeft(extra=frozenset({"lora_velora_embed"}), is_plain=True), proved_by=_VARIANTS),
    Option(names="monteclora_config", kind="exact", said="samples its weights in training; plain LoRA in eval mode. As "
           "VeLoRA", example={"monteclora_config": MontecloraConfig()},
           in_peft=InPeft(extra=_SAMPLER, is_plain=True), proved_by=_VARIANTS),

    Option(names="target_modules exclude_modules layers_to_transform layers_pattern", kind="without effect",
           said="chose the targets; the tensors' names say which", on="llama",
           example={"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.v_proj"],
                    "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    Option(names="fan_in_fan_out", kind="without effect", said="the layer knows; on a MultiheadAttention "
           "`UnsupportedError`, as PEFT transposes the wrong matrix there", on="gpt2",
           example={"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    Option(names="use_qalora qalora_group_size", kind="without effect", said="pools the input of GPTQ layers, whose A "
           "has another shape (`ShapeError`); on others nothing", example={"use_qalora": True, "qalora_group_size": 4},
           in_peft=_PLAIN, proved_by=_VARIANTS),
    Option(names="corda_config eva_config loftq_config lora_ga_config", kind="without effect",
           said="of initialisations, which are asked for by `init_lora_weights`"),
    Option(names="auto_mapping base_model_name_or_path inference_mode megatron_core peft_type peft_version revision "
           "runtime_config task_type", kind="without effect", said="describe the adapter", on="llama",
           example={"task_type": "CAUSAL_LM", "revision": "main", "target_modules": ["q_proj"]}),

    Option(names="init_lora_weights", kind="refused", merged=True,
           values=("pissa", "olora", "corda", "loftq", "lora_ga"),
           said="PEFT changes the base weights when it loads the adapter, so its A and B belong to other base weights "
           "than the model's. PEFT converts such an adapter to plain LoRA: "
           "`save_pretrained(…, path_initial_model_for_weight_conversion=…)`",
           verdict="impossible where the base weights would have to be others: to or from plain LoRA, another rank, "
           "other targets. Not yet where they are the same (PiSSA to PiSSA of one rank on a PeftModel): `deactivate` "
           "would have to be refused there, as with biases", example={"init_lora_weights": "pissa"},
           in_peft=InPeft(changes_base=True)),
    Option(names="init_lora_weights", kind="refused", values=("pissa_niter_4",),
           said="as PiSSA, and PEFT draws what it takes out at random at each load: there is no right result",
           verdict="impossible", example={"init_lora_weights": "pissa_niter_4"}),
    Option(names="layer_replication", kind="refused", on="llama", said="the base model has another number of layers",
           verdict="impossible between different replications: the swap would add or remove parameters. Not yet "
           "between equal ones, on a model that PEFT has replicated",
           example={"layer_replication": [(0, 2), (1, 3)], "target_modules": ["q_proj"]}),
    Option(names="alora_invocation_tokens", kind="refused", on="llama", said="the branch begins at a token of the "
           "input, which PEFT looks for before each forward pass, in a Python list",
           verdict="not yet: aLoRA to aLoRA on a PeftModel needs the config's tokens alone; to plain LoRA, "
           "another layer",
           example={"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]},
           in_peft=InPeft()),
    Option(names="use_bdlora", kind="refused", merged=True, on="llama",
           said="block-diagonal A or B, saved as smaller matrices, another forward pass",
           verdict="not yet: equal blocks and ranks on a PeftModel need no padding; other ranks are padded block by "
           "block", example={"use_bdlora": _BLOCKS, "target_modules": ["q_proj", "up_proj"]},
           in_peft=InPeft(is_plain=None)),
    Option(names="kasa_config", kind="refused", merged=True,
           said="a diagonal between A and B; PEFT takes a part out of the base weights when it loads the adapter",
           verdict="as PiSSA", example={"kasa_config": KasaConfig()},
           in_peft=InPeft(extra=frozenset({"lora_diag"}), changes_base=True)),
    Option(names="arrow_config", kind="refused", said="routes between several adapters", from_peft=False,
           verdict="not yet: a slot holds one", example={"arrow_config": {"top_k": 2}}),
    Option(names="megatron_config", kind="refused", said="layers hold a shard of each tensor", verdict="not yet",
           example={"megatron_config": {"tensor_model_parallel_size": 2}}, from_peft=False),
)  # fmt: skip


def _tests(ids: Iterable[str]) -> str:
    return "; ".join(f"`{test}`" for test in ids)


def _layers() -> list[tuple[str, ...]]:
    titles = ("layer", "rank, alpha, patterns, rsLoRA, dropout", "`lora_bias`", "proved by")
    return [titles, *((row.layer, row.said, row.bias, _tests(row.proved_by)) for row in LAYERS)]


def _options(kind: str) -> list[tuple[str, ...]]:
    rows = [row for row in OPTIONS if row.kind == kind]
    if kind == "refused":
        titles = "option", "why slots refuse it", "in slots", '`route="auto"`'
        return [titles, *((o.title, o.said, o.verdict, "merged" if o.merged else "refused") for o in rows)]
    return [("option", "", "proved by"), *((row.title, row.said, _tests(row.proved_by)) for row in rows)]


def _methods() -> list[tuple[str, ...]]:
    titles = (
        "method",
        "in place, of its own kind",
        "of another rank",
        "merged",
        "LoRA → it → LoRA",
        "does nothing when deactivated",
    )
    return [titles, *(_method(name, row) for name, row in METHODS.items())]


def _method(name: str, row: Method) -> tuple[str, ...]:
    merged = "yes" if row.merges else f"no: {NOT_MERGEABLE[name]}"
    slots = name == "LORA"
    crossing = "in slots, or merged" if slots else "merged" if row.merges else "no"
    in_place = "in slots" if slots else "yes" if row.in_place else f"no: {row.reason}"
    title = name if row.needs is None else f"{name} (tested where {row.needs} is installed)"
    return title, in_place, _other_rank(row), merged, crossing, _yes(row.deactivates and row.in_place)


def _other_rank(row: Method) -> str:
    if row.ranks is None:
        return "–"
    option = f"`{row.ranks[0]}`"
    return f"{option}: no, {row.one_rank}" if row.one_rank else f"yes, {option}"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


# Name in the page's comments → the table: its titles, and its rows.
TABLES: dict[str, Callable[[], list[tuple[str, ...]]]] = {
    "layers": _layers,
    "options that are exact": lambda: _options("exact"),
    "options without effect": lambda: _options("without effect"),
    "options that are refused": lambda: _options("refused"),
    "methods": _methods,
}


def rendered(page: str) -> str:
    """The page with its tables written anew."""
    for name, table in TABLES.items():
        titles, *rows = table()
        lines = [titles, ("---",) * len(titles), *rows]
        text = "\n".join(re.sub(" +", " ", f"| {' | '.join(cells)} |") for cells in lines)
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(?=\n<!-- end of table -->)", re.DOTALL)
        if len(place.findall(page)) != 1:
            raise ValueError(f"the page has no place for the table {name!r}, or several")
        page = place.sub(lambda found, text=text: found[1] + text, page)  # type: ignore[misc]
    return page


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
