"""The contract between a PEFT method and the rest: targets, their parts, and which dimension of a part is the rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from ..checkpoint import Checkpoint, TensorSpec
from .tokens import Tokens


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of tensor that a target may have.

    Attributes:
        suffix: what stands behind the module path in a file's key.
        rank_dim: the dimension that grows with the rank and pads neutrally with zeros; None if there is none.
        grouped: whether the rank dimension is cut into one block for each group of a grouped convolution, or for
            each expert; see `hotslot.live.corner`.
        neutral: the value of a part that no live adapter fills.
        tensor: the tensor's name in a live model's module, where the file's key leaves it out.
    """

    suffix: str
    rank_dim: int | None
    grouped: bool = False
    neutral: float = 0.0
    tensor: str = ""

    def key(self, adapter_name: str) -> str:
        """What stands behind the module path in a live model's key: `lora_A.default.weight`."""
        container, _, tensor = self.suffix.partition(".")
        return ".".join(filter(None, (container, adapter_name, tensor or self.tensor)))


MAGNITUDE = "lora_magnitude_vector"  # of DoRA (https://arxiv.org/abs/2402.09353)


# L: in features or channels, O: out, R: rank, G: groups, E: experts.
# A: [R, L, ...] or [E R, L]   B: [O, R / G, ...] or [O, R E]   magnitude: [O], [1, O, 1, ...] of a convolution
PARTS: Mapping[str, Part] = {
    part.suffix: part
    for part in (
        Part("lora_A.weight", rank_dim=0, grouped=True),
        Part("lora_B.weight", rank_dim=1),
        Part("lora_B.bias", rank_dim=None),
        Part("lora_embedding_A", rank_dim=0),
        Part("lora_embedding_B", rank_dim=1),
        Part(MAGNITUDE, rank_dim=None, neutral=1.0, tensor="weight"),
    )
}


@dataclass(frozen=True, slots=True)
class Target:
    """One module that an adapter adapts.

    Attributes:
        fqn: the module's path in the base model.
        rank: R of `PARTS`' legend.
        alpha: the config's lora_alpha for this module.
        scaling: the factor on the branch, alpha / R or alpha / sqrt(R) (https://arxiv.org/abs/2312.03732).
        parts: suffix → where its values are in the checkpoint.
        use_rslora: whether the scaling is the second of these.
        dropout: before A, in training.
    """

    fqn: str
    rank: int
    alpha: float
    scaling: float
    parts: Mapping[str, TensorSpec]
    use_rslora: bool
    dropout: float


# All of an Adapter but its checkpoint, in the order of the fields.
Meaning: TypeAlias = (
    "tuple[Mapping[str, Target], Mapping[str, Mapping[str, TensorSpec]], Mapping[str, Mapping[str, TensorSpec]],"
    " Mapping[str, Mapping[str, TensorSpec]], Mapping[str, Tokens], tuple[str, ...], bool]"
)


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """A checkpoint and what its tensors mean.

    Attributes:
        base_copies: base module's path → parameter name → where the checkpoint has a copy of it. PEFT saves the weight
            of an embedding or output layer along with a LoRA on it; such a copy says nothing if it equals the
            model's own, and otherwise takes its place. So do norms in a LoRA of a pipeline.
        saved: base module's path → name within it → where the checkpoint has values of its own for it: the modules of
            `modules_to_save`.
        biases: base module's path → "bias" → where the checkpoint has one for it: `bias="all"` and `"lora_only"`.
        tokens: base module's path → the tokens that the adapter has rows of its own for: `trainable_token_indices`.
        target_parameters: bare parameters that are adapted (mixture-of-experts layers), in PEFT's order of nesting.
    """

    checkpoint: Checkpoint
    targets: Mapping[str, Target]
    base_copies: Mapping[str, Mapping[str, TensorSpec]]
    saved: Mapping[str, Mapping[str, TensorSpec]]
    biases: Mapping[str, Mapping[str, TensorSpec]]
    tokens: Mapping[str, Tokens]
    target_parameters: tuple[str, ...]
    lora_bias: bool

    @property
    def meaning(self) -> Meaning:
        """What holds for every checkpoint of the same schema."""
        parts = self.targets, self.base_copies, self.saved, self.biases, self.tokens
        return *parts, self.target_parameters, self.lora_bias
