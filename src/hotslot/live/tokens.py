"""Tokens that adapters train by themselves: PEFT's wrappers with them, and the places that a slot has for tokens.

T: places, V: tokens of the embedding, D: features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ModelError, RankError, ShapeError, UnexpectedTargetError, UnsupportedError
from ..methods import TOKENS, Adapter, Tokens
from .discover import base_prefix, canonical_name, innermost, unwrap
from .training import refuse_padding_while_training

if TYPE_CHECKING:
    from peft.utils.other import TrainableTokensWrapper

PLACES = "token_places"
_PEFT_S_OWN = (".token_adapter.base_layer", ".original_module", ".base_layer")


def token_wrappers(model: nn.Module) -> Iterator[tuple[str, TrainableTokensWrapper]]:
    """(canonical path, wrapper) of every TrainableTokensWrapper, each once."""
    from peft.utils.other import TrainableTokensWrapper

    model = unwrap(model)
    prefix = base_prefix(model)
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            yield canonical_name(name, prefix), module


def token_rooms(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """Path → for how many tokens this adapter has rows there. Modules that are tied to another have none."""
    return {
        fqn: len(wrapper.token_adapter.trainable_tokens_delta[adapter_name])
        for fqn, wrapper in token_wrappers(model)
        if not wrapper.token_adapter.tied_adapter and adapter_name in wrapper.token_adapter.trainable_tokens_delta
    }


def own_tokens(model: nn.Module, adapter: Adapter) -> dict[str, Tokens]:
    """The adapter's tokens, without those that a file has once more of a tied module, which PEFT leaves out."""
    tied = tied_modules(model, adapter)
    return {fqn: tokens for fqn, tokens in adapter.tokens.items() if fqn not in tied}


def tied_modules(model: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Path → path of the input embedding whose tokens it shows, for the modules that PEFT ties to it.

    PEFT ties them whenever the model does, unless the adapter has other tokens for them.
    """
    from peft.tuners.tuners_utils import BaseTuner

    inner: Any = innermost(model)
    if not adapter.tokens or not BaseTuner.get_model_config(inner).get("tie_word_embeddings"):
        return {}
    names = {id(module): plain_name(name) for name, module in inner.named_modules()}
    embedding = names.get(id(inner.get_input_embeddings()))
    tied = tied_with_embedding(inner)
    if embedding is None or embedding not in adapter.tokens:
        return {}
    if any(adapter.tokens[fqn].indices != adapter.tokens[embedding].indices for fqn in tied & adapter.tokens.keys()):
        return {}
    return dict.fromkeys(sorted(tied), embedding)


def tied_with_embedding(model: Any) -> frozenset[str]:
    """Paths of the modules that have the input embedding's weight, whatever PEFT has put around them."""
    from peft.utils.other import ModulesToSaveWrapper, _get_module_names_tied_with_embedding

    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "_tied_weights_keys"):
        return frozenset()
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, ModulesToSaveWrapper):
        return frozenset(map(plain_name, _get_module_names_tied_with_embedding(model)))
    # PEFT looks for the weight by its name, which is another behind this wrapper.
    name = next(plain_name(name) for name, module in model.named_modules() if module is embedding)
    tied: set[str] = set()
    for path, module in model.named_modules() if model.config.tie_word_embeddings is not False else ():
        keys = getattr(module, "_tied_weights_keys", None)
        for key, source in keys.items() if isinstance(keys, dict) else ():
            if ".".join(filter(None, (path, source.rpartition(".")[0]))) == name:
                tied.add(".".join(filter(None, (path, key.rpartition(".")[0]))))
    return frozenset(tied)


def plain_name(name: str) -> str:
    """A module's path without what PEFT has put around it."""
    name = canonical_name(name, "")
    for ending in _PEFT_S_OWN:
        name = name.removesuffix(ending)
    return name


def refuse_other_tokens(model: nn.Module, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Raise unless the adapter's tokens are rows of the model's modules, and the forward with them is as without.

    Args:
        model: the model.
        adapter: the adapter.
        modules: path → base module.
    """
    origin = adapter.checkpoint.origin
    for fqn, tokens in own_tokens(model, adapter).items():
        module = modules.get(fqn)
        if module is None:
            raise UnexpectedTargetError(
                f"{origin} has tokens of a module that the model does not have; "
                f"unexpected keys found: {tokens.rows.name}.",
                where=fqn,
                found=f"no such module in {type(unwrap(model)).__name__}",
                expected="the paths of the model that the adapter was trained on",
                hint="this adapter belongs to another base model",
            )
        _refuse_other_layer(fqn, module, origin)
        weight: Any = module.weight
        if tokens.rows.shape[1] != weight.shape[1] or max(tokens.indices) >= weight.shape[0]:
            raise ShapeError(
                f"{origin} has tokens of an embedding of another size.",
                where=fqn,
                found=f"{tokens.rows.shape[1]} features, tokens up to {max(tokens.indices)}",
                expected=f"{weight.shape[1]} features, tokens up to {weight.shape[0] - 1}, by the model",
                hint="build the model as the adapter was trained, with as many tokens",
            )
    for fqn in tied_modules(model, adapter):
        if fqn in modules:
            _refuse_other_layer(fqn, modules[fqn], origin)


def _refuse_other_layer(fqn: str, module: nn.Module, origin: str) -> None:
    """PEFT calls F.embedding or F.linear with the changed weight, and nothing else of the module."""
    kind = type(module)
    if isinstance(module, nn.Embedding):
        same = kind.forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    else:
        same = isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward and module.bias is None
    if not same:
        raise UnsupportedError(
            f"{origin} has tokens of a module whose own forward PEFT leaves out.",
            where=fqn,
            found=f"{kind.__name__}{' with a bias' if getattr(module, 'bias', None) is not None else ''}",
            expected="an Embedding, or a Linear without bias",
            hint="load it with PEFT itself",
        )


def refuse_untied(tokens: Iterable[str], tied: Mapping[str, str]) -> None:
    """Raise if one adapter has tokens of its own for a module that another one ties to the embedding."""
    both = sorted(set(tokens) & tied.keys())
    if both:
        raise UnsupportedError(
            "One adapter has tokens of its own for a module that another one ties to the embedding.",
            where=both[0],
            found=f"tokens of it, and {tied[both[0]]!r} with the same weight",
            expected="one or the other: PEFT ties the layer itself, for all adapters on it",
            hint="attach them to models of their own",
        )


class TokenRows:
    """The places for tokens of one module: a parameter, and beside it whose rows it has.

    PEFT's own list of indices is kept right. To be bound before use; `release` undoes that, broken off or not.

    Args:
        wrappers: path → PEFT's wrapper of the module, and behind it those that are tied to it.
        adapter_name: PEFT's name of the slot.
    """

    def __init__(self, wrappers: Mapping[str, Any], adapter_name: str) -> None:
        self.fqn, *self.tied = wrappers
        self.wrappers = list(wrappers.values())
        self._name = adapter_name
        self._layer = self.wrappers[0].token_adapter
        self.param: nn.Parameter = self._layer.trainable_tokens_delta[adapter_name]
        # What came with the model.
        self._home = self.param.data
        self._original = self._layer.token_indices[adapter_name], self._layer.trainable_tokens_original[adapter_name]

    @property
    def room(self) -> int:
        """T."""
        return self.param.shape[0]

    @property
    def tokens(self) -> list[int]:
        """Of the live adapter."""
        found: list[int] = self._layer.token_indices[self._name]
        return found

    @property
    def params(self) -> dict[str, Any]:
        """The dict that holds the parameter."""
        found: dict[str, Any] = self._layer.trainable_tokens_delta._parameters
        return found

    @property
    def places(self) -> dict[str, torch.Tensor]:
        """The dict that holds the places."""
        found: dict[str, torch.Tensor] = self._layer.token_places._buffers
        return found

    def bind(self, room: int, *, empty: bool) -> None:
        """Give PEFT's layers those of a slot, with room for `room` tokens at least.

        Args:
            room: T.
            empty: whether the wrapper is hotslot's own, and holds nothing yet.

        Raises:
            ModelError: the parameter would move and is in training.
        """
        from .token_layer import use_slot_tokens

        for wrapper in self.wrappers:
            use_slot_tokens(wrapper, self._layer)
        self.resize(max(room, self.room), [] if empty else self.tokens)

    def resize(self, room: int, tokens: list[int]) -> None:
        """Make room for `room` tokens; `tokens` are live. The Parameter object stays, its memory moves."""
        from .token_layer import token_places

        with torch.inference_mode(False), torch.no_grad():
            if room != self.room:
                refuse_padding_while_training([self.param])
                self.param.data = self.values(self.param[: len(tokens)], tokens, room)[0]
            self._layer.token_places[self._name] = token_places(tokens, room).to(self.param.device)
            # Of a slot without tokens, which reads no rows.
            self._neutral = self.param.new_zeros(()).expand(self.param.shape), token_places([], room)
            self._no_rows = self.param.new_zeros(0, self.param.shape[1])
            self.note(tokens)

    def neutral_rows(self) -> torch.Tensor:
        """The parameter's values while no adapter has tokens here."""
        return self._neutral[0]

    def neutral_places(self) -> torch.Tensor:
        """The places then."""
        return self._neutral[1]

    def values(
        self, rows: torch.Tensor, tokens: Iterable[int], room: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameter's values and the places for these rows of these tokens."""
        from .token_layer import token_places

        room = self.room if room is None else room
        padded = rows.new_zeros(room, rows.shape[1])
        padded[: len(rows)] = rows
        return padded, token_places(list(tokens), room)

    def note(self, tokens: list[int]) -> None:
        """Let PEFT's records say whose rows are live."""
        self._layer.token_indices[self._name] = tokens
        self._layer.trainable_tokens_original[self._name] = self._no_rows

    def memory(self) -> Any:
        """Where all is now, for `put_memory_back`."""
        layer, name = self._layer, self._name
        records = layer.token_indices[name], layer.trainable_tokens_original[name]
        return self.param.data, self.places[name], self._neutral, self._no_rows, records

    def put_memory_back(self, memory: Any) -> None:
        """Undo a `resize`."""
        self.param.data, self._layer.token_places[self._name], self._neutral, self._no_rows, records = memory
        self._note(records)

    def release(self) -> None:
        """Leave PEFT's own layer behind, with the live rows in the memory that it had. May be repeated."""
        from .token_layer import leave_slot_tokens

        if self.params.get(self._name) is self.param:  # else PEFT has deleted the adapter
            with torch.inference_mode(False), torch.no_grad():
                self._move_home(self.tokens)
        for wrapper in self.wrappers:
            leave_slot_tokens(wrapper, self._name)

    def _move_home(self, tokens: list[int]) -> None:
        own, home = self._original, self._home
        rows = self.param.data[: len(tokens)]
        if not tokens:  # PEFT's layer always has some: with the model's own rows
            own = (list(range(len(home))), own[1])
            rows = self._layer.base_layer.weight.detach()[own[0]].to(rows)
        if (home.shape, home.dtype, home.device) != (rows.shape, rows.dtype, rows.device):
            home = torch.empty_like(rows)
        if home.data_ptr() != rows.data_ptr():
            home.copy_(rows)
        self.param.data = home
        if own[0] != (tokens or own[0]):
            own = tokens, self._layer.base_layer.weight.detach()[tokens]
        self._note(own)

    def _note(self, records: tuple[list[int], torch.Tensor]) -> None:
        self._layer.token_indices[self._name], self._layer.trainable_tokens_original[self._name] = records


def find_token_rows(model: nn.Module, adapter_name: str, known: Collection[str]) -> Iterator[TokenRows]:
    """The places of one adapter on the model but those `known`, to be bound."""
    wrappers = dict(token_wrappers(model))
    for fqn in token_rooms(model, adapter_name).keys() - known:
        layer = wrappers[fqn].token_adapter
        tied = {name: other for name, other in wrappers.items() if other.token_adapter.tied_adapter is layer}
        yield TokenRows({fqn: wrappers[fqn], **tied}, adapter_name)


def tokens_in(places: torch.Tensor) -> list[int]:
    """The tokens that have one of these places."""
    return [token for token in places.tolist() if token >= 0]


def refuse_other_ties(rows: TokenRows, adapter: Adapter, tied: Mapping[str, str]) -> None:
    """Raise unless the model ties the same modules to this one as PEFT would for the adapter."""
    wanted = [fqn for fqn, source in tied.items() if source == rows.fqn]
    if sorted(wanted) != sorted(rows.tied):
        raise UnsupportedError(
            f"{adapter.checkpoint.origin} has tokens of a module that it ties to others than the model's slot does.",
            where=rows.fqn,
            found=f"tied to it: {', '.join(wanted) or 'none'}",
            expected=f"{', '.join(rows.tied) or 'none'}: PEFT ties the layer itself, for all adapters on it",
            hint="attach it to a model of its own",
        )


def beyond(rows: TokenRows, adapter: Adapter) -> RankError:
    """The refusal of an adapter with more tokens than there are places."""
    count = len(adapter.tokens[rows.fqn].indices)
    return RankError(
        f"{adapter.checkpoint.origin} has more tokens than the slot has places for.",
        where=rows.fqn,
        found=f"{count} tokens by trainable_token_indices",
        expected=f"at most {rows.room}, which the slot was planned for",
        hint="attach with this adapter among adapters=",
    )


def refuse_compiled_tokens(
    model: nn.Module, adapter_name: str, wrapped: Collection[str], rooms: Mapping[str, int]
) -> None:
    """Raise if compiled code knows the indices of tokens on the model, as PEFT keeps them, or too small a room."""
    from peft.utils.other import TrainableTokensWrapper

    for fqn, wrapper in token_wrappers(model):
        known = adapter_name in wrapper._adapters and fqn not in wrapped
        if known and type(wrapper) is TrainableTokensWrapper:
            raise ModelError(
                "The model was compiled with an adapter's tokens on it, whose indices compiled code knows.",
                where=fqn,
                found=f"{TOKENS} of {adapter_name!r}",
                expected="a model that is attached, or prepared for hot-swapping, before it is compiled",
                hint="hotslot.attach(model, …), then torch.compile",
            )
    for fqn, room in token_rooms(model, adapter_name).items():
        if rooms.get(fqn, 0) > room:
            raise ModelError(
                "The model is compiled already, and the plan has more tokens than there are places for.",
                where=fqn,
                found=f"{room} places",
                expected=f"{rooms[fqn]} by the plan, without moving a parameter",
                hint="attach before torch.compile",
            )
