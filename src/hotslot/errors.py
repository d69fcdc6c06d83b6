"""Everything that hotslot raises on purpose.

    HotslotError
    ├── CheckpointError             (also ValueError)         the adapter as a file or dict is at fault
    │   ├── AdapterNotFoundError    (also FileNotFoundError)  no such folder, file or repository
    │   ├── CorruptFileError                                  not a whole, well-formed safetensors file
    │   ├── PickleRefusedError                                weights that only unpickling could read
    │   ├── ConfigError                                       adapter_config.json unreadable or self-contradicting
    │   ├── TensorError                                       names, shapes or dtypes contradict the config
    │   ├── NonFiniteError                                    NaN or infinity among the values
    │   └── ChangedError                                      files that are not those that were loaded
    ├── UnsupportedError            (also ValueError)         a method or option that hotslot does not swap
    ├── DoesNotFitError             (also RuntimeError)       sound, but not for this model or plan
    │   ├── UnexpectedTargetError                             targets modules that have no slot
    │   ├── ShapeError                                        made for a base layer of other dimensions
    │   └── RankError                                         a rank, or tokens, beyond what was planned for
    ├── ModelError                  (also RuntimeError)       the model is not in a state to be swapped
    │   ├── MergedError             (also ValueError)         the slot's adapter is merged into the base weights
    │   └── InFlightError           (also TimeoutError)       work in flight did not end in time
    ├── CacheError                  (also RuntimeError)       a cache cannot do what it is asked for
    │   └── CacheFullError                                    no room within the limit beside what may not go
    └── UnknownAdapterError         (also KeyError)           a name that was never loaded

Each says where it happened, what was found, what was expected and by whose word, and what to do next; the four are
attributes too. Raised before anything is touched: whoever catches one has the model as it was.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AdapterNotFoundError",
    "CacheError",
    "CacheFullError",
    "ChangedError",
    "CheckpointError",
    "ConfigError",
    "CorruptFileError",
    "DoesNotFitError",
    "HotslotError",
    "InFlightError",
    "MergedError",
    "ModelError",
    "NonFiniteError",
    "PickleRefusedError",
    "RankError",
    "ShapeError",
    "TensorError",
    "UnexpectedTargetError",
    "UnknownAdapterError",
    "UnsupportedError",
]


# A name of a million characters belongs in no log. The longest message of our own making has 700.
MAX_LINE_CHARACTERS = 2_000


class HotslotError(Exception):
    """Root of the tree.

    Args:
        summary: one sentence, first line of the message.
        where: module path, file or key at which it was noticed.
        found: what was there.
        expected: what should have been there, and whose word that is.
        hint: what to do next.
    """

    def __init__(
        self, summary: str, *, where: Any = None, found: Any = None, expected: Any = None, hint: str | None = None
    ) -> None:
        self.summary = summary
        self.where = where
        self.found = found
        self.expected = expected
        self.hint = hint
        details = (("where", where), ("found", found), ("expected", expected), ("next step", hint))
        lines = [
            summary,
            *(f"  {label}: {text!s:.{MAX_LINE_CHARACTERS + 1}}" for label, text in details if text is not None),
        ]
        super().__init__("\n".join(map(_printable, lines)))

    def __str__(self) -> str:
        # KeyError's own __str__ would show the repr of the message, newlines escaped.
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException would call the class with the finished message as the summary and drop the rest.
        return _rebuild, (type(self), self.summary, self.where, self.found, self.expected, self.hint)


def _printable(text: str) -> str:
    """Names and values come from strangers' files: no line breaks, terminal escapes or lone surrogates, no end."""
    text = text[: MAX_LINE_CHARACTERS + 1]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= MAX_LINE_CHARACTERS else f"{text[:MAX_LINE_CHARACTERS]}…"


def _rebuild(
    cls: type[HotslotError], summary: str, where: Any, found: Any, expected: Any, hint: str | None
) -> HotslotError:
    return cls(summary, where=where, found=found, expected=expected, hint=hint)


class CheckpointError(HotslotError, ValueError):
    """The adapter itself, as a file or dict, is at fault."""


class AdapterNotFoundError(CheckpointError, FileNotFoundError):
    """No such folder, file or repository."""


class CorruptFileError(CheckpointError):
    """Not a whole, well-formed safetensors file."""


class PickleRefusedError(CheckpointError):
    """The weights are a pickle, and reading one can run any code."""


class ConfigError(CheckpointError):
    """adapter_config.json cannot be read, or has keys or values that hotslot does not know."""


class TensorError(CheckpointError):
    """Tensor names, shapes or dtypes contradict each other or the config."""


class NonFiniteError(CheckpointError):
    """NaN or infinity among the values."""


class ChangedError(CheckpointError):
    """Files that are not those that were loaded, when they are read again."""


class UnsupportedError(HotslotError, ValueError):
    """A PEFT method or option that hotslot does not swap; docs/supported.md lists them with the reasons."""


class DoesNotFitError(HotslotError, RuntimeError):
    """A sound adapter that this model, or its plan, has no place for.

    Attributes:
        plan: the `hotslot.Plan` that would take it, where it is only beyond the plan of a Swapper; else None.
    """

    plan: Any = None

    def within(self, plan: Any) -> DoesNotFitError:
        """The same refusal, which knows the plan that would take the adapter."""
        hint = f"swapper.grow(error.plan), at one recompilation of compiled code: {plan!r}"
        refusal = type(self)(self.summary, where=self.where, found=self.found, expected=self.expected, hint=hint)
        refusal.plan = plan
        return refusal


class UnexpectedTargetError(DoesNotFitError):
    """The adapter targets modules that have no slot on the model."""


class ShapeError(DoesNotFitError):
    """The adapter was made for a base layer of other dimensions."""


class RankError(DoesNotFitError):
    """The adapter's rank, or its number of tokens, is beyond what the slot was planned for."""


class ModelError(HotslotError, RuntimeError):
    """The model is not in a state to be swapped: nothing attached, layers gone, parameters replaced."""


class MergedError(ModelError, ValueError):
    """The slot's adapter is merged into the base weights; to unmerge after a swap would spoil them."""


class InFlightError(ModelError, TimeoutError):
    """Forward passes or other leases did not end within the time that a swap was given to wait for them."""


class CacheError(HotslotError, RuntimeError):
    """A cache cannot do what it is asked for."""


class CacheFullError(CacheError):
    """There is no room within a cache's limit, whatever goes."""


class UnknownAdapterError(HotslotError, KeyError):
    """A name that was never loaded, or was unloaded."""
