"""A loaded adapter made ready for one model: what goes into its slots, what is merged, what PEFT's records then say.

Below the Engine, which swaps entries; knows nothing of what is live.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from . import live
from .block import Block, pack, within
from .checkpoint import Checkpoint
from .errors import DoesNotFitError, HotslotError, RankError, TensorError, UnexpectedTargetError, UnsupportedError
from .live import NO_MERGES, Binding, Memory, Merges, Records, Writes
from .methods import Adapter, interpret, opaque, refuse_biased_embeddings


@dataclass(frozen=True, eq=False)
class Compiled:
    """An adapter, or none, made ready for one Memory: what remains to be done at a swap.

    Attributes:
        memory: of the slots.
        writes: into the slots.
        values: of the base's own tensors that it has others for.
        records: of PEFT, which describe what the slots hold.
        merges: of what the slots do not hold, into the base's weights.
        nbytes: of the adapter that the slots take.
        beside: names of other adapters on the model that were looked at.
    """

    memory: Memory
    writes: Writes
    values: Mapping[tuple[str, str], torch.Tensor]
    records: Records
    merges: Merges = NO_MERGES
    nbytes: int = 0
    beside: frozenset[str] = frozenset()

    @property
    def route(self) -> str:
        """See SwapReport."""
        if not self.merges.all:
            return "side"
        return "side+merged" if self.nbytes else "merged"


class Entry:
    """A loaded adapter: what it is, and what it was compiled into when last asked.

    Args:
        name: that the user has given it.
        checkpoint: what was read.
        adapter: what it means, if that is known.
        route: "side": slots have to hold all of it; "merged": none of it; "auto": what they can; "resident": it takes
            the place of an adapter of its own method; "resident+merged": or it is merged below that one, as with
            "merged" it is at once.

    Raises:
        UnsupportedError, CheckpointError: it cannot take that route on any model.
    """

    def __init__(
        self, name: str, checkpoint: Checkpoint, adapter: Adapter | None = None, *, route: str = "side"
    ) -> None:
        self.name = name
        self.refusal: UnsupportedError | None = None  # why slots cannot hold it, whatever their size
        self.adapter = adapter or self._meaning(checkpoint, route)
        self.route = route
        for part in checkpoint.components.values():
            live.build_config(part)  # refused here if PEFT would refuse it
        self._compiled: Compiled | None = None
        self._age = 0  # of the base's own values that it was made from
        self._merged: tuple[Binding, frozenset[str], Merges] | None = None
        self.contents = checkpoint.version  # of equal contents the values are equal, and alpha may differ
        self.error: float | None = None  # of what it is an approximation of
        self.lenders: tuple[Entry, ...] = ()  # in whose memory it has values

    @property
    def nbytes(self) -> int:
        """Bytes of host memory: of the file's tensors, and of what was made of them."""
        checkpoint, compiled = self.adapter.checkpoint, self._compiled
        if compiled is None:
            return checkpoint.nbytes
        held = [*compiled.values.values(), *(tensor for merge in compiled.merges.all for tensor in merge.held())]
        return checkpoint.nbytes + live.host_bytes(held, besides=checkpoint.data)

    @property
    def version(self) -> str:
        """Digest of the adapter."""
        return self.adapter.checkpoint.version

    def compile(self, binding: Binding) -> Compiled:
        """Make it ready for the binding's memory; done once, and again when that memory has moved.

        Raises:
            DoesNotFitError: the model has no place for it.
        """
        memory, beside = binding.memory, binding.beside
        if self._compiled is None:
            self._age = binding.absolutes.age
        if self._compiled is None or self._compiled.memory is not memory or self._compiled.beside != beside:
            if binding.resident is not None:
                self._compiled = self._in_the_place_of(binding.resident, binding)
                return self._compiled
            sided, block, merges = self._split(binding)
            values, (records, scalings) = binding.absolutes.compile(sided), binding.describe(sided)
            writes, nbytes = memory.compile(block, scalings), self.adapter.checkpoint.nbytes if block else 0
            self._compiled = Compiled(memory, writes, values, records, merges, nbytes)
        return self._compiled

    def refresh(self, binding: Binding) -> bool:
        """Make it ready anew if others have changed the base's own values since, of which some of it was made.

        Returns:
            Whether that was needed.

        Raises:
            DoesNotFitError, ModelError, UnsupportedError: the base as it is now has no place for it.
        """
        if self._age == binding.absolutes.age:
            return False
        known = self._compiled, self._merged, self._age
        try:
            self._compiled = self._merged = None
            self.compile(binding)
            return True
        except BaseException:
            self._compiled, self._merged, self._age = known
            raise

    def reads_base(self, binding: Binding) -> bool:
        """Whether what a swap writes was made from the base's own values."""
        return bool(self.adapter.base_copies or self.compile(binding).merges.all)

    def _in_the_place_of(self, resident: live.Resident, binding: Binding) -> Compiled:
        """In the layers of the adapter that came with the model; or below them, which are to do nothing then."""
        if self.route == "merged":
            return self._below(binding, self._merges(binding, frozenset(), None))
        checkpoint, memory = self.adapter.checkpoint, binding.memory
        try:
            values, records = resident.fit(checkpoint)
            nbytes = checkpoint.nbytes
            return Compiled(memory, memory.neutral, values, records, nbytes=nbytes, beside=binding.beside)
        except (DoesNotFitError, UnsupportedError) as error:
            if self.route == "resident":
                raise
            refusal = error
        try:
            opaque(checkpoint)
            return self._below(binding, self._merges(binding, frozenset(), None))
        except (DoesNotFitError, TensorError, UnsupportedError) as error:
            raise refusal from error

    def _below(self, binding: Binding, merges: Merges) -> Compiled:
        """All of it merged into the base's weights, below whatever the model carries, which does nothing."""
        memory = binding.memory
        values, records = binding.neutral_values(merges.all)
        return Compiled(memory, memory.neutral, values, records, merges, beside=binding.beside)

    def _split(self, binding: Binding) -> tuple[Adapter, Block | None, Merges]:
        """What the slots hold, and how the rest is merged, if there is any.

        Raises:
            DoesNotFitError: as `pack`, where no merge can take what the slots do not.
        """
        adapter, layout = self.adapter, binding.memory.layout
        if self.route == "side":
            return adapter, pack(adapter, layout), NO_MERGES
        if not adapter.targets:
            return adapter, None, self._merges(binding, frozenset(), self.refusal)
        sided = within(adapter, layout, binding.absolutes.wrapped)
        if sided is adapter:
            return adapter, pack(adapter, layout), NO_MERGES
        try:
            if len(sided.targets) < len(adapter.targets):
                pack(adapter, layout)
            binding.absolutes.compile(adapter)
        except (RankError, UnexpectedTargetError) as error:
            refusal = error
        merges = self._merges(binding, frozenset([*sided.targets, *sided.saved]), refusal)
        return sided, pack(sided, layout) if sided.targets else None, merges

    def _merges(self, binding: Binding, besides: frozenset[str], refusal: HotslotError | None) -> Merges:
        """Of all modules but these; made once for one model. If they cannot be merged, slots say why they cannot."""
        if self._merged is None or self._merged[:2] != (binding, besides):
            try:
                self._merged = binding, besides, binding.merger.prepare(self.adapter.checkpoint, besides)
            except (DoesNotFitError, TensorError, UnsupportedError) as error:
                if refusal is None:
                    raise
                raise refusal from error
        return self._merged[2]

    def _meaning(self, checkpoint: Checkpoint, route: str) -> Adapter:
        if route.startswith("resident"):
            return opaque(checkpoint, merges=False)
        if route == "merged" and checkpoint.config.get("peft_type") != "LORA":
            return opaque(checkpoint)
        try:
            adapter = interpret(checkpoint)
            refuse_biased_embeddings(adapter)  # a blend may have both: biases of one, an embedding of another
            return adapter if route != "merged" else opaque(checkpoint)
        except UnsupportedError as error:
            if route == "side":
                raise
            self.refusal = error if checkpoint.config.get("peft_type") == "LORA" else None
            try:
                return opaque(checkpoint)
            except UnsupportedError:
                if self.refusal is not None:
                    raise error from None
                raise

    def writes(self, binding: Binding, since: Entry | None) -> tuple[Writes, int]:
        """What is to be written where `since` is live, untouched, or anything if None; and its bytes of adapter."""
        compiled = self.compile(binding)
        if since is not None and since.contents == self.contents:
            return compiled.writes.without_values(), 0
        return compiled.writes, compiled.nbytes
