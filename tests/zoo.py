"""Tiny real models, with every kind of layer that LoRA can target: no downloads, no mocks, milliseconds each.

Promised of every `Entry`: the same seed gives bit for bit the same weights and inputs, in any process, so
that a model and its oracle can be built apart; the global random state is left as it was.

Weights are larger than the libraries' own, under which the outputs of such small models are near zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, HIDDEN, BATCH, LENGTH = 48, 16, 2, 6


@dataclass(frozen=True, repr=False)
class Entry:
    """One model: how to build it, what to feed it, where LoRA can go."""

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[torch.Generator, torch.dtype], dict[str, Tensor]]
    read: Callable[[Any], Tensor]  # what the model returns → one tensor that shows every target's work
    targets: tuple[str, ...]  # module name endings, as `target_modules` takes them
    extras: tuple[str, ...] = ()  # modules that fit `modules_to_save`
    task_type: str | None = None
    rank_multiple: int = 1  # PEFT wants the ranks of a grouped convolution divisible by its groups
    from_transformers: bool = False
    layers: int = 0  # numbered layers that `layers_to_transform` can choose from; 0: it does not apply

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A new model in eval mode, its weights settled by `seed`; another dtype rounds the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.make().to(dtype).eval()

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Keyword arguments of a forward pass; floating inputs are in `dtype`."""
        return self.make_inputs(torch.Generator().manual_seed(seed), dtype)

    def output(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The model's output as one tensor, without a graph."""
        with torch.no_grad():
            return self.read(model(**inputs))

    def __repr__(self) -> str:
        return f"ZOO[{self.name!r}]"

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Full name → module, for all that `targets` names. Cached and shared: do not change them."""
        return _target_modules(self)


@cache
def _target_modules(entry: Entry) -> dict[str, nn.Module]:
    named = entry.build().named_modules()
    endings = tuple(f".{target}" for target in entry.targets)
    return {name: module for name, module in named if f".{name}".endswith(endings)}


def _tokens(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)}


def _two_token_runs(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    encoder = _tokens(generator, dtype)["input_ids"]
    decoder = torch.randint(3, VOCAB, (BATCH, 4), generator=generator)
    return {"input_ids": encoder, "decoder_input_ids": decoder}


def _floats(*shape: int) -> Callable[[torch.Generator, torch.dtype], dict[str, Tensor]]:
    return lambda generator, dtype: {"x": torch.randn(shape, generator=generator).to(dtype)}


def _logits(result: Any) -> Tensor:
    return result.logits


def _states_and_pooled(result: Any) -> Tensor:
    return torch.cat([result.last_hidden_state, result.pooler_output[:, None]], dim=1)


def _identity(result: Any) -> Tensor:
    return result


# --- transformers -------------------------------------------------------------------------------------------


def _llama(*, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    # the head is tied to `wte`, as in the real one
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=32,
            n_embd=HIDDEN,
            n_layer=2,
            n_head=2,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
            use_cache=False,
        )
    )


def _llama_score() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
            num_labels=3,
            pad_token_id=0,
            use_cache=False,
        )
    )


def _bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
            num_labels=5,
        )
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            initializer_factor=1.0,
            relative_attention_num_buckets=8,
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


# --- plain nn.Module ----------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Linear layers with and without bias; one of them nested, one narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 32)
        self.inner = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Tanh(), nn.Linear(8, 20))
        self.down = nn.Linear(20, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.inner(torch.tanh(self.up(x)))))


class Bag(nn.Module):
    """Embeddings (one with a padding index) into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCAB, HIDDEN, padding_idx=0)
        self.place = nn.Embedding(LENGTH, HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 12, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.word(input_ids) + self.place(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.head(torch.tanh(self.mix(x)))


class ConvNet(nn.Module):
    """Convolutions of one dimensionality: strided, grouped, pointwise without bias; then a linear head."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.stem = conv(3, 8, 3, stride=2, padding=1)
        self.grouped = conv(8, 12, 3, padding=1, groups=2)
        self.point = conv(12, 8, 1, bias=False)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.point(torch.tanh(self.grouped(torch.tanh(self.stem(x))))))
        return self.head(x.flatten(2).transpose(1, 2))


class Attention(nn.Module):
    """`nn.MultiheadAttention` both ways round, with a linear layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_first = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.length_first = nn.MultiheadAttention(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.batch_first(x, x, x, need_weights=False)[0]
        x = torch.tanh(self.mix(x)).transpose(0, 1)
        return (x + self.length_first(x, x, x, need_weights=False)[0]).transpose(0, 1)


class Vision(nn.Module):
    """Patches by convolution, a grouped convolution, attention, a norm, buffers, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, HIDDEN, 4, stride=4)
        self.local = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=2, bias=False)
        self.place = nn.Embedding(4, HIDDEN)
        self.norm = nn.BatchNorm2d(HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(HIDDEN, 24), "fc2": nn.Linear(24, HIDDEN)})
        self.classifier = nn.Linear(HIDDEN, 7)
        self.register_buffer("positions", torch.arange(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patch(x))
        x = (x + torch.tanh(self.local(x))).flatten(2).transpose(1, 2) + self.place(self.positions)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.classifier(x + self.mlp["fc2"](torch.tanh(self.mlp["fc1"](x))))


LLAMA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"
)  # fmt: skip
CONV_TARGETS = ("stem", "grouped", "point", "head")

_ENTRIES = (
    Entry("llama", _llama, _tokens, _logits, LLAMA_TARGETS, extras=("lm_head", "embed_tokens", "norm"),
          task_type="CAUSAL_LM", from_transformers=True, layers=3),
    Entry("bert", _bert, _tokens, _states_and_pooled, ("query", "key", "value", "dense", "word_embeddings"),
          extras=("pooler", "LayerNorm"), task_type="FEATURE_EXTRACTION", from_transformers=True, layers=2),
    Entry("gpt2", _gpt2, _tokens, _logits, ("c_attn", "c_proj", "c_fc", "wpe"), extras=("ln_f", "wpe"),
          task_type="CAUSAL_LM", from_transformers=True, layers=2),
    Entry("t5", _t5, _two_token_runs, _logits,
          ("q", "k", "v", "o", "wi", "wo", "lm_head", "relative_attention_bias"),
          extras=("lm_head", "final_layer_norm"), task_type="SEQ_2_SEQ_LM", from_transformers=True, layers=2),
    Entry("mlp", Mlp, _floats(3, 12), _identity, ("up", "inner.0", "inner.2", "down"),
          extras=("down", "inner")),
    Entry("embedding", Bag, _tokens, _identity, ("word", "place", "mix", "head"), extras=("head", "place")),
    Entry("conv1d", partial(ConvNet, 1), _floats(2, 3, 12), _identity, CONV_TARGETS,
          extras=("head", "point"), rank_multiple=2),
    Entry("conv2d", partial(ConvNet, 2), _floats(2, 3, 6, 6), _identity, CONV_TARGETS,
          extras=("head", "point"), rank_multiple=2),
    Entry("conv3d", partial(ConvNet, 3), _floats(2, 3, 4, 4, 4), _identity, CONV_TARGETS,
          extras=("head", "point"), rank_multiple=2),
    Entry("attention", Attention, _floats(2, 5, HIDDEN), _identity, ("batch_first", "mix", "length_first"),
          extras=("mix",)),
    Entry("vision", Vision, _floats(2, 3, 8, 8), _identity,
          ("patch", "local", "place", "attention", "fc1", "fc2", "classifier"), extras=("classifier", "norm"),
          rank_multiple=2),
)  # fmt: skip

ZOO: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}

# Classifiers, whose head every adapter brings along: beside the zoo, as runs over all of that are drawn from it.
_CLASSIFIERS = (
    Entry("llama_score", _llama_score, _tokens, _logits, ("q_proj", "v_proj", "down_proj"), extras=("score", "norm"),
          task_type="SEQ_CLS", from_transformers=True, layers=2),
    Entry("bert_classifier", _bert_classifier, _tokens, _logits, ("query", "value", "dense"),
          extras=("classifier", "pooler", "LayerNorm"), task_type="SEQ_CLS", from_transformers=True, layers=2),
)  # fmt: skip

CLASSIFIERS: dict[str, Entry] = {entry.name: entry for entry in _CLASSIFIERS}

# The output layer has the embedding's weight, as gpt2's has.
_TIED = (
    Entry("llama_tied", partial(_llama, tied=True), _tokens, _logits, LLAMA_TARGETS, extras=("norm",),
          task_type="CAUSAL_LM", from_transformers=True, layers=3),
)  # fmt: skip

TIED: dict[str, Entry] = {entry.name: entry for entry in _TIED}
