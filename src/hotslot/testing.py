"""Assertions that users need too: that nothing recompiles, that nothing moves, that a swap gives what a load gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    import os

__all__ = ["matches_fresh_load", "no_recompile", "same_addresses"]


class RecompiledError(AssertionError):
    """Something was compiled, or fell back to eager, where nothing should have been."""


@contextmanager
def no_recompile() -> Iterator[None]:
    """Fail if torch.compile compiles anything in this block, or runs anything of it in eager for want of a graph.

    Run the compiled code once before the block, with the shapes and grad mode that it is called with inside. Also
    noticed, which `torch._dynamo.config.error_on_recompile` alone does not: a code object that has reached dynamo's
    recompile limit, after which it runs in eager in silence.

    Raises:
        RecompiledError: it did; the message says what and why.
    """
    from torch._dynamo.utils import counters

    given_up = [reason for kind in counters for reason in counters[kind] if "recompile limit" in str(reason)]
    if given_up:
        raise RecompiledError(
            "dynamo hit its recompile limit before this block: some code runs in eager, where nothing can recompile.\n"
            "  next step: raise torch._dynamo.config.recompile_limit (30 layers compiled one by one need 30), "
            "torch._dynamo.reset(), and torch._dynamo.utils.counters.clear()"
        )
    skipped = [str(reason).partition("\n")[0] for reason in counters["unimplemented"]]
    if skipped:
        raise RecompiledError(
            f"dynamo left a frame to eager before this block, where nothing can recompile: {'; '.join(skipped)}\n"
            "  next step: torch.compile(…, fullgraph=True) shows where; then torch._dynamo.reset() and "
            "torch._dynamo.utils.counters.clear()"
        )
    stance = torch._dynamo.eval_frame._stance.stance
    if stance in ("force_eager", "eager_on_recompile"):
        raise RecompiledError(
            f"torch.compiler.set_stance({stance!r}) is in force: what needs another graph runs in eager in silence.\n"
            "  next step: leave it for this block, or use 'fail_on_recompile'"
        )
    before = _frames(counters)
    with torch._dynamo.config.patch(error_on_recompile=True, fail_on_recompile_limit_hit=True):
        try:
            yield
        except (torch._dynamo.exc.RecompileError, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise RecompiledError(f"dynamo recompiled: {error}") from error
    after = _frames(counters)
    changed = [f"{name} {before[name]} → {after[name]}" for name in after if after[name] != before[name]]
    if changed:
        raise RecompiledError(
            f"dynamo was at work in a block that should only run what is compiled: {', '.join(changed)}\n"
            "  next step: call the compiled model once before the block, with the same shapes and grad mode"
        )


def _frames(counters: Any) -> dict[str, int]:
    """What dynamo counts when it looks at a frame, whether it then compiles it or gives it up."""
    return {
        "frames traced": int(counters["frames"]["total"]),
        "graphs": int(counters["stats"]["unique_graphs"]),
        "graph breaks": sum(counters["graph_break"].values()),
    }


@contextmanager
def same_addresses(model: nn.Module) -> Iterator[None]:
    """Fail if a parameter or buffer of `model` is another object, or at another address, after this block.

    Raises:
        AssertionError: naming the first few.
    """
    before = _tensors(model)  # held: the id of an object that is gone would be given again
    addresses = {name: tensor.data_ptr() for name, tensor in before.items()}
    yield
    after = _tensors(model)
    kept = {name for name in before if after.get(name) is before[name] and after[name].data_ptr() == addresses[name]}
    changed = (before.keys() | after.keys()) - kept
    if changed:
        raise AssertionError(f"{len(changed)} tensors were moved or replaced, among them {sorted(changed)[:5]}")


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def matches_fresh_load(
    model: Callable[..., Any],
    make_base: Callable[[], nn.Module],
    adapter: str | os.PathLike[str],
    *inputs: Any,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    **kwargs: Any,
) -> None:
    """Fail unless `model(*inputs, **kwargs)` is what a fresh `PeftModel.from_pretrained(make_base(), adapter)` gives.

    Args:
        model: the model after a swap.
        make_base: makes the base model anew, with the same weights.
        adapter: folder or Hub id of the adapter that should be live.
        rtol, atol: see `torch.testing.assert_close`; 0 for bitwise. Outputs may be tensors, or have `logits`,
            `last_hidden_state` or `sample`.

    Raises:
        AssertionError: with the largest difference.
    """
    from peft import PeftModel

    oracle = PeftModel.from_pretrained(make_base(), str(adapter)).eval()
    with torch.no_grad():
        got, expected = _output(model(*inputs, **kwargs)), _output(oracle(*inputs, **kwargs))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def _output(result: Any) -> torch.Tensor:
    for name in ("logits", "last_hidden_state", "sample"):
        value = getattr(result, name, None)
        if isinstance(value, torch.Tensor):
            return value
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"cannot compare a {type(result).__name__}; pass a function that returns a tensor")
    return result
