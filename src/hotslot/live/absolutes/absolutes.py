"""Everything of one adapter name that replaces values of the base model, whatever kind it is of."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ...methods import Adapter
from ..discover import unwrap
from ..inference import refuse_inference
from ..pristine import InMemory, Store, stores
from ..saved import refuse_other_biases
from ..tying import as_loaded
from .biases import BiasSites
from .modules import ModuleSites
from .sites import Key, Merge, Site, Sites
from .tokens import TokenSites
from .weights import WeightSites


class AbsoluteImage(NamedTuple):
    """The sites' values at one moment, the modules of which `state_dict` showed them, and what `Norms` said."""

    values: dict[Key, torch.Tensor]
    shown: frozenset[str]
    norms: frozenset[str]


class Absolutes:
    """The sites of one adapter name on one model.

    Args:
        model: the model.
        adapter_name: PEFT's name of the slot.
        pristine: "device", "host" or "file": where the base's own values are kept of what adapters are merged into.
    """

    def __init__(self, model: nn.Module, adapter_name: str, pristine: str = "device") -> None:
        self._model = weakref.ref(unwrap(model))
        self._sites = Sites(adapter_name)
        self._stores = stores(pristine, model)
        self._merged: set[Key] = set()  # the sites of `take_in`
        self._outdated: set[Key] = set()  # those among them whose store was made for other values
        self.age = 0  # grows when others have changed the model's own values
        self._modules = ModuleSites(adapter_name, self._sites)
        self._tokens = TokenSites(adapter_name, self._sites)
        self._biases = BiasSites(adapter_name, self._sites)
        self._biases.find_lost(model)
        self._weights = WeightSites(model, adapter_name, self._sites)
        self._sites.mark_clean()

    @property
    def sites(self) -> Mapping[Key, Site]:
        """All of them."""
        return self._sites.by_key

    @property
    def wrapped(self) -> Collection[str]:
        """Paths of the modules that have a copy for adapters to write."""
        return self._modules.fqns

    @property
    def pristine_bytes(self) -> int:
        """Bytes that are held of the base's own values."""
        return self._sites.pristine_bytes

    def own(self, key: Key, tensor: torch.Tensor) -> torch.Tensor:
        """The model's own values of a tensor of the base model, which holds `tensor` now."""
        return self._sites.own(key, tensor)

    # -- on and off --------------------------------------------------------------------------------------------------

    def find(self, model: nn.Module, wrapped: Collection[str], rooms: Mapping[str, int]) -> None:
        """Take in the wrappers that the model has got since the last time, and make the places that tokens lack.

        If it raises, `release`, or call what `undo_find` has given.

        Args:
            model: the model.
            wrapped: paths of the modules whose wrapper is hotslot's own, and holds nothing yet; others hold the values
                of an adapter that came with the model.
            rooms: path of a module → for how many tokens it is to have places.
        """
        with self._sites.changing():
            self._tokens.find(model, wrapped, rooms)
            self._modules.find(model, wrapped)

    def undo_find(self) -> Callable[[], None]:
        """A function that undoes a `find`, whole or broken off; to be made before."""
        parts = [self._modules.undo_find(), self._tokens.undo_find(), self._sites.undo()]

        def undo() -> None:
            for part in parts:
                part()

        return undo

    def release(self) -> None:
        """Let go of the model; what is written stays."""
        self._modules.release()
        self._tokens.release()
        self._sites.release()

    def stand_aside(self) -> None:
        """Let others have sites where these are, and let go of nothing; `come_back` undoes it."""
        self._sites.release()

    def come_back(self) -> None:
        """Undo `stand_aside`. May be repeated."""
        self._sites.claim()

    def take_in(self, places: Mapping[Key, tuple[dict[str, Any], str]]) -> None:
        """Make sites of tensors of the base model that are merged into: key → the dict that has it, its name there.

        Raises:
            UnsupportedError: what the model itself has there is lost, or another swapper writes there.
            ModelError: they are inference tensors, which nobody may write outside of inference mode.
        """
        self._biases.refuse_merges_into_lost(places)
        self._sites.refuse_others(places)
        for (_, path), (holder, name) in places.items():
            refuse_inference(path, holder[name], "merged into")
        for key in places.keys() & self._outdated:
            site = self._sites.by_key[key]
            self._sites.by_key[key] = replace(site, store=self._stores(key[1], site.tensor))
            self._outdated.discard(key)
        self._merged.update(self._add(places, self._stores))

    def watch(self, places: Mapping[Key, tuple[dict[str, Any], str]]) -> None:
        """Note tensors of the base model that something was made from: `age` grows when they have changed."""
        missing = {key: place for key, place in places.items() if key not in self._sites.by_key}
        with self._sites.changing():
            self._sites.read.update(missing)

    @property
    def merged_now(self) -> set[Key]:
        """Which tensors of `take_in` may hold something else than the model's own values."""
        return self._merged & self._sites.foreign

    def note_changes(self) -> None:
        """Let `age` grow if others have changed the model's own values since this was last called."""
        if self._sites.own_changed():
            self.age += 1
            self._outdated = {key for key in self._merged if not self._sites.by_key[key].kept}

    def hold(self, places: Mapping[Key, tuple[dict[str, Any], str]]) -> None:
        """Make sites of tensors of an adapter that came with the model, whose values are the own ones; they stay."""
        self._add(places, lambda path, tensor: InMemory())

    def _add(
        self, places: Mapping[Key, tuple[dict[str, Any], str]], store: Callable[[str, torch.Tensor], Store]
    ) -> Collection[Key]:
        """Returns the keys of those that had no site."""
        missing = places.keys() - self._sites.by_key.keys()
        if missing:
            with self._sites.changing():
                for key in missing:
                    holder, name = places[key]
                    tensor = holder[name]
                    param = tensor if isinstance(tensor, nn.Parameter) else None
                    self._sites.by_key[key] = Site(holder, name, param, store=store(key[1], tensor))
        return missing

    def put_back_merged(self) -> None:
        """Write the model's own values over all that is merged, whether or not the slots are still there."""
        self._sites.put_back(self._merged)

    @property
    def idle(self) -> set[Key]:
        """Which sites of `take_in` hold the model's own values."""
        return self._merged - self._sites.foreign

    def let_go(self, keys: Iterable[Key]) -> None:
        """Forget these of what `take_in` has made, which are `idle`."""
        with self._sites.changing():
            for key in keys:
                site = self._sites.by_key.pop(key)
                self._sites.read[key] = site.holder, site.name
                self._merged.discard(key)
                self._outdated.discard(key)

    # -- what is to be live ------------------------------------------------------------------------------------------

    def compile(self, adapter: Adapter) -> dict[Key, torch.Tensor]:
        """The values that the adapter has for the sites; of base tensors sites are made.

        Raises:
            UnexpectedTargetError: it saves a module that has no wrapper, or has tokens of one.
            RankError: it has more tokens than there are places.
            UnsupportedError: it has values for the base that the model's other adapters would see, or that PEFT drops.
        """
        model, origin = self._model(), adapter.checkpoint.origin
        if model is not None:
            adapter = as_loaded(model, adapter)
        self._modules.refuse_unknown(adapter)
        self.refuse_without({f"{fqn}.bias" for fqn in adapter.biases}, origin)
        values: dict[Key, torch.Tensor] = {}
        if model is not None:
            refuse_other_biases(model, adapter)
            self.take_in_biases(adapter.biases, origin)
            values |= self._tokens.values(model, adapter) | self._weights.values(model, adapter)
        values |= self._biases.values(adapter) | self._modules.values(adapter)
        self.refuse_torn(values, origin)
        return values

    def take_in_biases(self, fqns: Collection[str], what: str) -> None:
        """See `BiasSites.take_in`."""
        model = self._model()
        if model is not None:
            self._biases.take_in(model, fqns, what)

    def refuse_without(self, biases: Collection[str], what: str) -> None:
        """See `BiasSites.refuse_without`."""
        self._biases.refuse_without(biases, what)

    def refuse_torn(self, values: Mapping[Key, torch.Tensor], what: str) -> None:
        """See `Sites.refuse_torn`."""
        self._sites.refuse_torn(values, what)

    # -- a swap ------------------------------------------------------------------------------------------------------

    def refuse_if_replaced(self) -> None:
        """Raise if the model no longer has one of the tensors or its own values, or others have written the norms."""
        self._weights.refuse_if_others_came(self._model())
        self._modules.refuse_if_deleted()
        self._sites.refuse_if_replaced()
        for key in self.merged_now:
            self._sites.by_key[key].store.refuse_if_changed()

    def is_dirty(self) -> bool:
        """Whether others have written a site, or the model's own values, since `mark_clean`."""
        return self._sites.is_dirty()

    def mark_clean(self) -> None:
        """Take what is live now as written by hotslot."""
        self._sites.mark_clean()

    def write(self, values: Mapping[Key, torch.Tensor], merges: Sequence[Merge], *, clean: bool) -> None:
        """Give these sites their values, and all others the model's own. Not atomic.

        Args:
            values: of `compile`.
            merges: of sites that are computed from the model's own values.
            clean: whether it is known that nobody else has written since `mark_clean`.
        """
        if self._sites.by_key:
            self._sites.write(values, merges, clean=clean)
            self._show({fqn for fqn, _ in values}, values, self._weights.norms_among(values))

    def image(self) -> AbsoluteImage:
        """A copy of all values that are not the model's own, for `restore`."""
        return AbsoluteImage(self._sites.image(), self._modules.shown, self._weights.said)

    def restore(self, image: AbsoluteImage) -> None:
        """Put an image back, bit for bit; what it has no values for gets the model's own."""
        with torch.inference_mode(False), torch.no_grad():
            values = self._tokens.fitted(image.values)
        self._sites.restore(values)
        self._show(image.shown, values, image.norms)

    def make_neutral(self, params: Container[int]) -> None:
        """See `ModuleSites.make_neutral`."""
        self._modules.make_neutral(params)

    def _show(self, fqns: Collection[str], values: Mapping[Key, torch.Tensor], norms: frozenset[str]) -> None:
        """Let `state_dict`, PEFT's records and diffusers' say whose values are live."""
        self._modules.show(fqns)
        self._tokens.say(values)
        self._weights.say(self._model(), norms)
        self._sites.mark_clean()
