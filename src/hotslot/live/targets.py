"""Which modules of a model `target_modules` means: PEFT's own matching, without an adapter and without a change."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from .base import base_modules
from .discover import canonical_name, lora_layers, unwrap
from .saved import saved_wrappers
from .shapes import OUT_PROJ


def matching_targets(model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """Paths of the slots that `LoraConfig(target_modules=…)` would give this model.

    Args:
        model: the model, plain or with PEFT's layers on it.
        target_modules: endings of module paths, a regular expression, or "all-linear".

    Raises:
        ValueError: the regular expression is none.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    inner: Any = unwrap(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    wanted = target_modules if isinstance(target_modules, str) else list(target_modules)
    config: Any = _maybe_include_all_linear_layers(LoraConfig(target_modules=wanted), inner)
    if isinstance(wanted, str) and not isinstance(config.target_modules, str):  # all-linear: whole paths
        config.target_modules = {canonical_name(name, "") for name in config.target_modules or ()}
    within = tuple(f"{fqn}." for fqn, _ in lora_layers(model))  # PEFT's own modules inside of its layers
    saved = tuple(f"{fqn}." for fqn, _ in saved_wrappers(model))  # whole modules, which PEFT does not adapt as well
    found = []
    for fqn, module in base_modules(model).items():
        try:
            matches = bool(fqn) and not fqn.startswith(within) and bool(check_target_module_exists(config, fqn))
        except re.error as error:
            raise ValueError(f"target_modules is no regular expression: {wanted!r:.200}: {error}") from error
        if matches and not f"{fqn}.".startswith(saved):
            found.append(fqn)
            if isinstance(module, nn.MultiheadAttention):
                found.append(fqn + OUT_PROJ)  # PEFT adapts both projections or none
    return found
