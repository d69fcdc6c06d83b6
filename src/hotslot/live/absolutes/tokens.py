"""Tokens that adapters train by themselves: PEFT's parameter of rows, and beside it whose rows they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from ...errors import UnexpectedTargetError
from ...methods import TOKENS, Adapter
from ..inference import make_normal
from ..state_dict import ShownTokens
from ..tokens import (
    PLACES,
    TokenRows,
    beyond,
    find_token_rows,
    own_tokens,
    refuse_other_ties,
    tied_modules,
    tokens_in,
)
from .sites import Key, Site, Sites


class TokenSites:
    """The places for tokens of one adapter name on one model.

    Args:
        adapter_name: PEFT's name of the slot.
        sites: takes theirs in, two of each module.
    """

    def __init__(self, adapter_name: str, sites: Sites) -> None:
        self._adapter_name = adapter_name
        self._sites = sites
        self._rows: dict[str, TokenRows] = {}
        self._uninstall: list[Callable[[], object]] = []

    def find(self, model: nn.Module, wrapped: Collection[str], rooms: Mapping[str, int]) -> None:
        """Take in the wrappers that the model has got since the last time, and make the places that are lacking.

        Args:
            model: the model.
            wrapped: paths of the modules whose wrapper is hotslot's own, and holds nothing yet.
            rooms: path of a module → for how many tokens it is to have places.
        """
        for rows in self._rows.values():
            if rooms.get(rows.fqn, 0) > rows.room:
                rows.resize(rooms[rows.fqn], rows.tokens)
        for rows in find_token_rows(model, self._adapter_name, set(self._rows)):
            make_normal([(rows.fqn, rows.param)])
            self._rows[rows.fqn] = rows  # first: `release` is to find it, should the binding break off
            rows.bind(rooms.get(rows.fqn, 0), empty=rows.fqn in wrapped)
            self._take_in(rows)

    def _take_in(self, rows: TokenRows) -> None:
        keys = (rows.fqn, TOKENS), (rows.fqn, PLACES)
        self._sites.by_key[keys[0]] = Site(rows.params, self._adapter_name, rows.param, rows.neutral_rows)
        self._sites.by_key[keys[1]] = Site(rows.places, self._adapter_name, None, rows.neutral_places)
        if rows.tokens:
            self._sites.foreign.update(keys)
        shown = ShownTokens(self._adapter_name, rows.param)
        for wrapper in rows.wrappers:
            shown.relieve(wrapper, self._uninstall)
            self._uninstall.append(wrapper.register_state_dict_post_hook(shown).remove)
            self._uninstall.append(wrapper.register_load_state_dict_pre_hook(shown.on_load).remove)

    def undo_find(self) -> Callable[[], None]:
        """A function that undoes a `find`, whole or broken off; to be made before. The sites are not its business."""
        kept, installed = dict(self._rows), len(self._uninstall)
        memories = [(rows, rows.memory()) for rows in kept.values()]

        def undo() -> None:
            for uninstall in reversed(self._uninstall[installed:]):
                uninstall()
            del self._uninstall[installed:]
            for fqn in self._rows.keys() - kept.keys():
                self._rows[fqn].release()
            for rows, memory in memories:
                rows.put_memory_back(memory)
            self._rows.clear()
            self._rows.update(kept)

        return undo

    def release(self) -> None:
        """Let go of the model; what is written stays."""
        for uninstall in reversed(self._uninstall):
            uninstall()
        self._uninstall.clear()
        for rows in self._rows.values():
            rows.release()

    def values(self, model: nn.Module, adapter: Adapter) -> dict[Key, torch.Tensor]:
        """The adapter's rows in the places that there are, and whose they are.

        Raises:
            UnexpectedTargetError: it has tokens of a module that has no places.
            RankError: it has more of them than there are places.
            UnsupportedError: PEFT would tie other modules to this one.
        """
        if not adapter.tokens:
            return {}
        values: dict[Key, torch.Tensor] = {}
        origin, tied = adapter.checkpoint.origin, tied_modules(model, adapter)
        for fqn, tokens in own_tokens(model, adapter).items():
            rows = self._rows.get(fqn)
            if rows is None:
                raise UnexpectedTargetError(
                    f"{origin} has tokens of a module that the model was not prepared for; "
                    f"unexpected keys found: {tokens.rows.name}.",
                    where=fqn,
                    found=f"{len(tokens.indices)} tokens by trainable_token_indices",
                    expected=f"tokens of modules among {sorted(self._rows) or 'none'}",
                    hint="attach with this adapter among adapters=, so that there are places for its tokens",
                )
            refuse_other_ties(rows, adapter, tied)
            if len(tokens.indices) > rows.room:
                raise beyond(rows, adapter)
            given = adapter.checkpoint.tensor(tokens.rows.name)
            values[fqn, TOKENS], values[fqn, PLACES] = rows.values(given, tokens.indices)
        return values

    def fitted(self, values: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """An image's values, with places that were made since."""
        fitted = dict(values)
        for fqn, rows in self._rows.items():
            if (fqn, PLACES) in values:
                tokens = tokens_in(values[fqn, PLACES])
                given = values[fqn, TOKENS][: len(tokens)]
                fitted[fqn, TOKENS], fitted[fqn, PLACES] = rows.values(given, tokens)
        return fitted

    def say(self, values: Mapping[Key, torch.Tensor]) -> None:
        """Let PEFT's records say whose rows are live."""
        for fqn, rows in self._rows.items():
            rows.note(tokens_in(values[fqn, PLACES]) if (fqn, PLACES) in values else [])
