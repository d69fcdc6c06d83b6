"""Tensors of the base model that adapters give values of their own, and where the model's own values are meanwhile.

A LoRA is a delta, and zero takes it back. These are not: what an adapter writes has to be replaced by what was there,
bit for bit. Each such tensor is a `Site`; `Absolutes` holds all of a model's, and is the only code that writes there.
They are few and large, so each is written by a copy of its own, where it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn

from ..errors import ModelError, UnexpectedTargetError, UnsupportedError
from ..methods import TOKENS, Adapter
from .assembly import Assembly
from .base import all_base_modules
from .copies import Copy, base_copies
from .discover import adapted_layers, adapter_names, lora_layers, unwrap
from .norms import Norms
from .pristine import InMemory, Store, stores
from .room import cut_to
from .saved import base_biases, named_tensors, refuse_other_biases, saved_wrappers
from .skeleton import base_tree
from .state import peft_configs
from .state_dict import SavedModule, ShownTokens
from .tokens import (
    PLACES,
    TokenRows,
    beyond,
    find_token_rows,
    own_tokens,
    refuse_other_ties,
    tied_modules,
    tokens_in,
)
from .tying import as_loaded

# Path of a module that is saved whole, name within the copy; path of a module with tokens, TOKENS or PLACES; or "" and
# the full name of a tensor of the base model.
Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """One tensor that adapters write.

    Attributes:
        holder, name: where the model's forward finds it.
        param: which must be there; None for a buffer: `model.to(…)` puts another in its place.
        original: gives the model's own values where an original stands beside the copy that is written; None where
            the base model's own tensor is written.
        kept: the values that this had before anything was written; empty as long as it has them.
        store: where those are kept.
        lost: whether the model's own values are gone: PEFT has written those of the adapter that came with the model
            over them. Then whatever is made live has values for it.
    """

    holder: dict[str, Any]
    name: str
    param: nn.Parameter | None
    original: Callable[[], torch.Tensor] | None
    kept: list[torch.Tensor]
    store: Store = field(default_factory=InMemory)
    lost: bool = False

    def own(self) -> torch.Tensor:
        """The model's own values."""
        if self.original is not None:
            return self.original()
        return self.kept[0].to(self.tensor) if self.kept else self.tensor

    def keep(self) -> None:
        """Keep the own values, before others are written."""
        if self.original is None and not self.kept and not self.lost:
            self.kept.append(self.store.keep(self.tensor))

    def put_back(self) -> None:
        """Write the own values."""
        if self.original is not None or self.kept:
            self.tensor.copy_(self.kept[0] if self.kept else self.own(), non_blocking=True)
            self.kept.clear()

    @property
    def tensor(self) -> torch.Tensor:
        """As it is now."""
        tensor: torch.Tensor = self.holder[self.name]
        return tensor


class Merge(Protocol):
    """Values that are computed from the model's own, for a few tensors of one module.

    Attributes:
        keys: which tensors.
    """

    keys: tuple[Key, ...]

    def held(self) -> Iterable[torch.Tensor]:
        """What it keeps to compute them from."""

    def write(self, targets: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """Compute them into `targets`, of `keys`, from the model's own values of these."""


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
        self._adapter_name = adapter_name
        self.sites: dict[Key, Site] = {}
        self._modules: dict[str, frozenset[str]] = {}  # path of a wrapped module → names of its tensors
        self._shown: dict[str, bool] = {}  # shared with the hooks
        self._wrappers: dict[str, Any] = {}
        self._tokens: dict[str, TokenRows] = {}
        self._uninstall: list[Callable[[], None]] = []
        self._stores = stores(pristine, model)
        self._merged: set[Key] = set()  # the sites of `take_in`
        self._foreign: set[Key] = set()  # may hold something else than the model's own values
        self._versions: list[int] = []
        self._take_in_lost_biases(model)
        self._norms = Norms(model, adapter_name)
        self._take_in_norms(model)
        self.mark_clean()

    def find(self, model: nn.Module, wrapped: Collection[str], rooms: Mapping[str, int]) -> None:
        """Take in the wrappers that the model has got since the last time, and make the places that tokens lack.

        If it raises, `release`, or call what `undo_find` has given.

        Args:
            model: the model.
            wrapped: paths of the modules whose wrapper is hotslot's own, and holds nothing yet; others hold the values
                of an adapter that came with the model.
            rooms: path of a module → for how many tokens it is to have places.
        """
        dirty = self.is_dirty()
        for rows in self._tokens.values():
            if rooms.get(rows.fqn, 0) > rows.room:
                rows.resize(rooms[rows.fqn], rows.tokens)
        for rows in find_token_rows(model, self._adapter_name, set(self._tokens)):
            self._tokens[rows.fqn] = rows  # first: `release` is to find it, should the binding break off
            rows.bind(rooms.get(rows.fqn, 0), empty=rows.fqn in wrapped)
            self._take_in_tokens(rows)
        adapted = [fqn for fqn, _ in lora_layers(model)]
        for fqn, wrapper in saved_wrappers(model):
            if fqn in self._modules or self._adapter_name not in wrapper.modules_to_save:
                continue
            inside = [layer for layer in adapted if layer.startswith(f"{fqn}.")]
            if inside:
                raise UnsupportedError(
                    f"The adapter {self._adapter_name!r} on the model has a LoRA within a module that it saves whole.",
                    where=inside[0],
                    expected="one or the other",
                    hint="load it with PEFT itself",
                )
            self._take_in(fqn, wrapper, fqn not in wrapped)
        self._versions = [] if dirty else self._current_versions()

    def _take_in(self, fqn: str, wrapper: Any, shown: bool) -> None:
        copied = wrapper.modules_to_save[self._adapter_name]
        own = {name: (holder, key) for name, holder, key, _ in named_tensors(wrapper.original_module)}
        names = set()
        for name, holder, key, tensor in named_tensors(copied):
            param = tensor if isinstance(tensor, nn.Parameter) else None
            self.sites[fqn, name] = Site(holder, key, param, _reader(*own[name]), [])
            names.add(name)
        self._wrappers[fqn], self._modules[fqn], self._shown[fqn] = wrapper, frozenset(names), shown
        if shown:
            self._foreign.update((fqn, name) for name in names)
        self._uninstall.append(SavedModule(fqn, self._adapter_name, self._shown).install(wrapper))

    def _take_in_tokens(self, rows: TokenRows) -> None:
        keys = (rows.fqn, TOKENS), (rows.fqn, PLACES)
        self.sites[keys[0]] = Site(rows.params, self._adapter_name, rows.param, rows.neutral_rows, [])
        self.sites[keys[1]] = Site(rows.places, self._adapter_name, None, rows.neutral_places, [])
        if rows.tokens:
            self._foreign.update(keys)
        shown = ShownTokens(self._adapter_name, rows.param)
        for wrapper in rows.wrappers:
            self._uninstall.append(wrapper.register_state_dict_post_hook(shown).remove)
            self._uninstall.append(wrapper.register_load_state_dict_pre_hook(shown.on_load).remove)

    def undo_find(self) -> Callable[[], None]:
        """A function that undoes a `find`, whole or broken off; to be made before."""
        dicts: list[Any] = [self.sites, self._modules, self._shown, self._wrappers, self._tokens]
        kept, foreign, versions = [dict(known) for known in dicts], set(self._foreign), self._versions
        installed, memories = len(self._uninstall), [(rows, rows.memory()) for rows in self._tokens.values()]

        def undo() -> None:
            for uninstall in reversed(self._uninstall[installed:]):
                uninstall()
            del self._uninstall[installed:]
            for fqn in self._tokens.keys() - kept[-1].keys():
                self._tokens[fqn].release()
            for rows, memory in memories:
                rows.put_memory_back(memory)
            for known, was in zip(dicts, kept, strict=True):
                known.clear()
                known.update(was)
            self._foreign, self._versions = foreign, versions

        return undo

    def release(self) -> None:
        """Let go of the model; what is written stays."""
        for uninstall in reversed(self._uninstall):
            uninstall()
        self._uninstall.clear()
        for rows in self._tokens.values():
            rows.release()

    # -- state of the model -----------------------------------------------------------------------------------------

    def refuse_if_replaced(self) -> None:
        """Raise if the model no longer has one of the tensors, or another adapter has written the norms."""
        self._norms.refuse_if_others_came(self._model())
        for fqn, wrapper in self._wrappers.items():
            if self._adapter_name not in wrapper.modules_to_save:
                raise ModelError(
                    f"The adapter {self._adapter_name!r} was deleted from the model, or loaded anew.",
                    where=fqn,
                    expected="the copy of the module that was there at attach",
                    hint="attach again",
                )
        for (fqn, name), site in self.sites.items():
            found = site.holder.get(site.name)  # no call for each: this is part of every swap
            if found is None or (site.param is not None and found is not site.param):
                raise ModelError(
                    "A parameter of the base model that adapters have values for was replaced.",
                    where=f"{fqn}.{name}".removeprefix("."),
                    expected="the Parameter that was there at attach",
                    hint="attach again",
                )

    def is_dirty(self) -> bool:
        """Whether others have written a site, or the model's own values, since `mark_clean`."""
        return bool(self.sites) and self._current_versions() != self._versions

    def mark_clean(self) -> None:
        """Take what is live now as written by hotslot."""
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        tensors = [site.holder[site.name] for site in self.sites.values()]
        tensors += [site.original() for site in self.sites.values() if site.original is not None]
        # No pairs: a thousand small objects at each swap would call the garbage collector.
        return [*map(id, tensors), *[tensor._version for tensor in tensors]]

    # -- writing ----------------------------------------------------------------------------------------------------

    def compile(self, adapter: Adapter) -> dict[Key, torch.Tensor]:
        """The values that the adapter has for the sites.

        Raises:
            UnexpectedTargetError: it saves a module that has no wrapper, or has tokens of one.
            RankError: it has more tokens than there are places.
            UnsupportedError: it has values for the base that the model's other adapters would see, or that PEFT drops.
        """
        model = self._model()
        if model is not None:
            adapter = as_loaded(model, adapter)
        unknown = [fqn for fqn in adapter.saved if fqn not in self._modules]
        if unknown:
            keys = [spec.name for fqn in unknown for spec in adapter.saved[fqn].values()]
            raise UnexpectedTargetError(
                f"{adapter.checkpoint.origin} saves modules whole that the model was not prepared for; "
                f"unexpected keys found: {', '.join(keys[:8])}.",
                where=", ".join(unknown[:8]),
                found=f"{len(unknown)} modules of modules_to_save without a copy to write",
                expected=f"modules among {sorted(self._modules) or 'none'}",
                hint="attach with this adapter among adapters=, so that its modules get copies too",
            )
        self.refuse_without({f"{fqn}.bias" for fqn in adapter.biases}, adapter.checkpoint.origin)
        if model is not None:
            refuse_other_biases(model, adapter)
        self.take_in_biases(adapter.biases, adapter.checkpoint.origin)
        values = (
            self._token_values(adapter)
            | self._copied_values(adapter)
            | {
                ("", f"{fqn}.bias"): adapter.checkpoint.tensor(specs["bias"].name)
                for fqn, specs in adapter.biases.items()
            }
        )
        values |= {
            (fqn, name): adapter.checkpoint.tensor(spec.name)
            for fqn, specs in adapter.saved.items()
            for name, spec in specs.items()
        }
        self.refuse_torn(values, adapter.checkpoint.origin)
        return values

    def refuse_torn(self, values: Mapping[Key, torch.Tensor], what: str) -> None:
        """Raise if one tensor is to have two values: PEFT lets the copies of tied modules share it."""
        first: dict[int, Key] = {}
        for key, site in self.sites.items():
            other = first.setdefault(id(site.tensor), key)
            one, two = values.get(other), values.get(key)
            if other != key and not (one is two or (one is not None and two is not None and torch.equal(one, two))):
                raise UnsupportedError(
                    f"{what} has other values for a module than for the one that it is tied to.",
                    where=".".join(filter(None, key)),
                    found=f"one parameter with {'.'.join(filter(None, other))}, by ensure_weight_tying of the adapter "
                    "that came with the model",
                    expected="equal values, or none for either",
                    hint="attach to the base model, with that adapter among adapters=",
                )

    def refuse_without(self, biases: Collection[str], what: str) -> None:
        """Raise unless these are all base biases whose own values are lost, for nothing can put those back.

        Args:
            biases: their names, of which `what`, something that is to be live, has values.
            what: to call it in the message.
        """
        without = [name for (_, name), site in self.sites.items() if site.lost and name not in biases]
        if without:
            raise UnsupportedError(
                f"{what} lacks biases that the adapter {self._adapter_name!r}, which came with the model, "
                "has put in the place of the base model's.",
                where=without[0],
                found=f"{len(without)} biases that nobody knows any more, and it has no others for",
                expected="an adapter with a bias for each, of bias='all' or the same targets",
                hint="attach to the base model, with the adapter that came with this one among adapters=",
            )

    def _take_in_lost_biases(self, model: nn.Module) -> None:
        """Sites of all biases that an adapter of PEFT's may have written over before hotslot came."""
        configs = {prefix: found.get(self._adapter_name) for prefix, found in peft_configs(model).items()}
        biased = {prefix: config.bias for prefix, config in configs.items() if config and _has_biases(config)}
        if not biased:
            return
        adapted = {fqn.replace(".base_layer", "") for fqn in adapted_layers(model)}
        for fqn, module in base_tree(model):
            holder, param = module._parameters, module._parameters.get("bias")
            bias = next((bias for prefix, bias in biased.items() if fqn.startswith(prefix)), "none")
            if param is not None and (bias == "all" or (bias.endswith("_only") and fqn in adapted)):
                key = "", f"{fqn}.bias"
                self.sites[key] = Site(holder, "bias", param, None, [], lost=True)
                self._foreign.add(key)

    def _take_in_norms(self, model: nn.Module) -> None:
        """Sites of the norms that an adapter of diffusers' has put in place before hotslot came."""
        found = dict(self._norms.of_resident(model))
        modules = all_base_modules(model) if found else {}
        for path, own in found.items():
            fqn, _, name = path.rpartition(".")
            holder = modules[fqn]._parameters
            self.sites["", path] = Site(holder, name, holder[name], None, [own])
            self._foreign.add(("", path))

    def _token_values(self, adapter: Adapter) -> dict[Key, torch.Tensor]:
        values: dict[Key, torch.Tensor] = {}
        origin, model = adapter.checkpoint.origin, self._model()
        if not adapter.tokens or model is None:
            return {}
        tied = tied_modules(model, adapter)
        for fqn, tokens in own_tokens(model, adapter).items():
            rows = self._tokens.get(fqn)
            if rows is None:
                raise UnexpectedTargetError(
                    f"{origin} has tokens of a module that the model was not prepared for; "
                    f"unexpected keys found: {tokens.rows.name}.",
                    where=fqn,
                    found=f"{len(tokens.indices)} tokens by trainable_token_indices",
                    expected=f"tokens of modules among {sorted(self._tokens) or 'none'}",
                    hint="attach with this adapter among adapters=, so that there are places for its tokens",
                )
            refuse_other_ties(rows, adapter, tied)
            if len(tokens.indices) > rows.room:
                raise beyond(rows, adapter)
            given = adapter.checkpoint.tensor(tokens.rows.name)
            values[fqn, TOKENS], values[fqn, PLACES] = rows.values(given, tokens.indices)
        return values

    def _copied_values(self, adapter: Adapter) -> dict[Key, torch.Tensor]:
        """Those of the base's weights that the adapter carries and that are not the model's own."""
        model = self._model()
        if not adapter.base_copies or model is None:
            return {}
        copies = list(base_copies(model, adapter, all_base_modules(model)))
        # Of a tied weight the last one is what PEFT leaves behind.
        last = {id(copy.holder[copy.name]): copy for copy in copies if copy.taken}
        differing = [copy for copy in copies if self._differs(copy, adapter)]
        stray = next((copy for copy in differing if not copy.taken), None)
        if stray is not None:
            raise UnsupportedError(
                f"{adapter.checkpoint.origin} carries weights under a name that PEFT does not load.",
                where=stray.spec.name,
                found=f"other values than the model's for {stray.fqn}.{stray.name}",
                expected="the name that the tensor has in a model with this adapter on it",
                hint="remove them, or save the adapter again with save_pretrained",
            )
        values = {}
        for copy in differing:
            if last[id(copy.holder[copy.name])] is copy:
                if not isinstance(model, Assembly):  # norms of a pipeline are whose they are to all its LoRAs
                    self._refuse_beside_others(adapter, f"{copy.fqn}.{copy.name}")
                values[self._take_in_base(copy)] = adapter.checkpoint.tensor(copy.spec.name)
        return values

    def _differs(self, copy: Copy, adapter: Adapter) -> bool:
        own = copy.holder[copy.name]
        own = next((site.own() for site in self.sites.values() if site.param is own), own)
        if own.is_meta:  # a plan for a model whose weights are not loaded
            return False
        return not torch.equal(own, adapter.checkpoint.tensor(copy.spec.name).to(own.device, own.dtype))

    def _take_in_base(self, copy: Copy) -> Key:
        """The key of a base tensor's site, which has one under whichever of its names came first."""
        param = copy.holder[copy.name]
        known = next((key for key, site in self.sites.items() if site.param is param), None)
        if known is None:
            known, dirty = ("", f"{copy.fqn}.{copy.name}"), self.is_dirty()
            self.sites[known] = Site(copy.holder, copy.name, param, None, [])
            self._norms.take_in(known[1])
            self._versions = [] if dirty else self._current_versions()
        return known

    def _refuse_beside_others(self, adapter: Adapter, where: str) -> None:
        model = self._model()
        rivals = [name for name in adapter_names(model) if name != self._adapter_name] if model is not None else []
        if rivals:
            raise UnsupportedError(
                f"{adapter.checkpoint.origin} carries weights of the base model, which another adapter on it uses too.",
                where=where,
                found=f"other values than the model's, beside {', '.join(map(repr, rivals))}",
                expected="no other adapter on the model",
                hint="use a model of its own for this adapter",
            )

    def take_in_biases(self, fqns: Collection[str], what: str) -> None:
        """Make sites of the biases of these modules of the base model, for which `what` has values.

        Raises:
            UnsupportedError: another adapter on the model has some, too.
        """
        model = self._model()
        if not fqns or model is None:
            return
        configs = [(name, config) for found in peft_configs(model).values() for name, config in found.items()]
        rivals = [one for one in configs if one[0] != self._adapter_name and _has_biases(one[1])]
        if rivals:
            raise UnsupportedError(
                f"{what} carries biases of the base model, and so does another adapter on it.",
                where="bias",
                found=f"bias of {rivals[0][0]!r}: {rivals[0][1].bias!r}",
                expected="one adapter with biases, as in PEFT",
                hint="use a model of its own for this adapter",
            )
        modules, dirty = base_biases(model), self.is_dirty()
        for fqn in fqns:
            if ("", f"{fqn}.bias") not in self.sites:
                holder = modules[fqn]._parameters
                self.sites["", f"{fqn}.bias"] = Site(holder, "bias", holder["bias"], None, [])
        self._versions = [] if dirty else self._current_versions()

    @property
    def wrapped(self) -> Collection[str]:
        """Paths of the modules that have a copy for adapters to write."""
        return self._modules.keys()

    def own(self, key: Key, tensor: torch.Tensor) -> torch.Tensor:
        """The model's own values of a tensor of the base model, which holds `tensor` now."""
        site = self.sites.get(key)
        return site.own() if site is not None else tensor.detach()

    def take_in(self, places: Mapping[Key, tuple[dict[str, Any], str]]) -> None:
        """Make sites of more tensors of the base model: key → the dict that has it, its name there.

        Raises:
            UnsupportedError: what the model itself has there is lost.
        """
        lost = [key[1] for key in places if key in self.sites and self.sites[key].lost]
        if lost:
            raise UnsupportedError(
                f"The adapter {self._adapter_name!r}, which came with the model, has put its biases in the place of "
                "the base model's, so that nothing can be merged into those.",
                where=lost[0],
                found=f"{len(lost)} biases that nobody knows any more",
                expected="a merge that leaves them alone",
                hint="attach to the base model, with the adapter that came with this one among adapters=",
            )
        self._merged.update(self._hold(places, self._stores))

    def hold(self, places: Mapping[Key, tuple[dict[str, Any], str]]) -> None:
        """Make sites of tensors of an adapter that came with the model, whose values are the own ones; they stay."""
        self._hold(places, lambda path, tensor: InMemory())

    def _hold(
        self, places: Mapping[Key, tuple[dict[str, Any], str]], store: Callable[[str, torch.Tensor], Store]
    ) -> Collection[Key]:
        missing = places.keys() - self.sites.keys()
        dirty = bool(missing) and self.is_dirty()
        for key in missing:
            holder, name = places[key]
            param = holder[name] if isinstance(holder[name], nn.Parameter) else None
            self.sites[key] = Site(holder, name, param, None, [], store(key[1], holder[name]))
        if missing:
            self._versions = [] if dirty else self._current_versions()
        return missing

    def let_go(self, needed: Collection[Key]) -> None:
        """Forget what `take_in` has made, but for these and for what has others' values now."""
        dirty = self.is_dirty()
        for key in self._merged - set(needed) - self._foreign:
            del self.sites[key]
            self._merged.discard(key)
        self._versions = [] if dirty else self._current_versions()

    @property
    def pristine_bytes(self) -> int:
        """Bytes that are held of the base's own values."""
        return sum(site.store.nbytes for site in self.sites.values())

    def write(self, values: Mapping[Key, torch.Tensor], merges: Sequence[Merge], *, clean: bool) -> None:
        """Give these sites their values, and all others the model's own. Not atomic.

        Args:
            values: of `compile`.
            merges: of sites that are computed from the model's own values.
            clean: whether it is known that nobody else has written since `mark_clean`.
        """
        if not self.sites:
            return
        with torch.inference_mode(False), torch.no_grad():
            merged = {key for merge in merges for key in merge.keys}
            written = self._merge(merges)
            for sites in self._ordered():
                given = {key: site for key, site in sites.items() if key in values and key not in merged}
                for key, site in sites.items():
                    if key in given or key in merged:
                        continue
                    if not clean or key in self._foreign or id(site.own()) in written:
                        site.put_back()
                        self._foreign.discard(key)
                        written.add(id(site.tensor))
                self._foreign.update(given)
                written.update(map(id, _write(given, values)))
        norms = frozenset(path for fqn, path in values if not fqn) if self._norms.used else frozenset()
        self._show({fqn for fqn, _ in values}, values, norms)

    def _merge(self, merges: Sequence[Merge]) -> set[int]:
        """Write what is computed from the model's own values; returns the ids of the tensors."""
        written: set[int] = set()
        for merge in merges:
            sites = [self.sites[key] for key in merge.keys]
            for site in sites:
                site.keep()
            self._foreign.update(merge.keys)
            merge.write([site.tensor for site in sites], [site.own() for site in sites])
            written.update(id(site.tensor) for site in sites)
        return written

    def _ordered(self) -> tuple[dict[Key, Site], dict[Key, Site]]:
        """The base model's own tensors before the copies, some of which are to equal them."""
        copies = {key: site for key, site in self.sites.items() if site.original is not None}
        return {key: site for key, site in self.sites.items() if key not in copies} if copies else self.sites, copies

    def image(self) -> AbsoluteImage:
        """A copy of all values that are not the model's own, for `restore`."""
        dirty = self.is_dirty()
        with torch.inference_mode(False), torch.no_grad():
            values = {
                key: site.tensor.detach().clone() for key, site in self.sites.items() if dirty or key in self._foreign
            }
        shown = frozenset(fqn for fqn, shown in self._shown.items() if shown)
        return AbsoluteImage(values, shown, self._norms.said)

    def restore(self, image: AbsoluteImage) -> None:
        """Put an image back, bit for bit; what it has no values for gets the model's own."""
        with torch.inference_mode(False), torch.no_grad():
            values = self._fitted(image.values)
            for sites in self._ordered():
                given = {key: site for key, site in sites.items() if key in values}
                for key, site in sites.items():
                    if key not in given:
                        site.put_back()
                        self._foreign.discard(key)
                self._foreign.update(given)
                _write(given, values)
        self._show(image.shown, values, image.norms)

    def _fitted(self, values: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """An image's values, with places that were made since."""
        fitted = dict(values)
        for fqn, rows in self._tokens.items():
            if (fqn, PLACES) in values:
                tokens = tokens_in(values[fqn, PLACES])
                given = values[fqn, TOKENS][: len(tokens)]
                fitted[fqn, TOKENS], fitted[fqn, PLACES] = rows.values(given, tokens)
        return fitted

    def _show(self, fqns: Collection[str], values: Mapping[Key, torch.Tensor], norms: Collection[str]) -> None:
        """Let `state_dict`, PEFT's records and diffusers' say whose values are live."""
        for fqn in self._shown:
            self._shown[fqn] = fqn in fqns
        for fqn, rows in self._tokens.items():
            rows.note(tokens_in(values[fqn, PLACES]) if (fqn, PLACES) in values else [])
        self._norms.say(self._model(), {path: self.sites["", path].own() for path in norms})
        self.mark_clean()


def _write(sites: Mapping[Key, Site], values: Mapping[Key, torch.Tensor]) -> list[torch.Tensor]:
    """Write these sites' values, those of a smaller shape into the corner of zeros; returns the sites' tensors."""
    for site in sites.values():
        if not site.kept:
            site.keep()
    tensors = [site.holder[site.name] for site in sites.values()]
    targets, sources = list(tensors), [values[key] for key in sites]
    padded = [
        i for i, (target, source) in enumerate(zip(targets, sources, strict=True)) if target.shape != source.shape
    ]
    if padded:
        torch._foreach_zero_([targets[i] for i in padded])
        for i in padded:
            targets[i] = cut_to(targets[i], sources[i].shape)
    if targets:
        torch._foreach_copy_(targets, sources, non_blocking=True)
    return tensors


def _has_biases(config: Any) -> bool:
    return getattr(config, "bias", "none") not in ("none", None)


def _reader(holder: dict[str, Any], name: str) -> Callable[[], torch.Tensor]:
    return lambda: holder[name]
