"""`patch_peft` and `unpatch_peft`: PEFT's functions, and the calls of libraries that are built on PEFT."""

from __future__ import annotations

from .. import dropin
from . import transformers


def patch_peft() -> None:
    """Put hotslot's functions in the place of PEFT's, in `peft.utils.hotswap` and wherever they were imported from it.

    transformers, diffusers and the user's own modules then use hotslot without a changed line. `load_adapter` and
    `enable_peft_hotswap` of transformers, which call none of PEFT's, go through hotslot too: see docs/transformers.md.
    Calling it again reaches modules that have imported PEFT's functions meanwhile.
    """
    dropin.patch_functions()
    transformers.patch()


def unpatch_peft() -> None:
    """Give PEFT and transformers their own functions back, wherever `patch_peft` has put hotslot's."""
    transformers.unpatch()
    dropin.unpatch_functions()
