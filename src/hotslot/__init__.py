"""hotslot changes the adapter of a running PyTorch model in place.

Same addresses, no recompilation, all of it or none of it.

    swapper = hotslot.attach(model, adapters={"sql": "path/or/hub-id", "chat": "another"})
    model = torch.compile(model)
    swapper.activate("sql")

Names are imported when first used: torch and peft take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors, testing
    from .attaching import attach
    from .cache import Cache
    from .dropin import (
        check_hotswap_configs_compatible,
        hotswap_adapter,
        hotswap_adapter_from_state_dict,
        prepare_model_for_compiled_hotswap,
    )
    from .errors import HotslotError
    from .integrations import patch_peft, unpatch_peft
    from .metrics import Metrics
    from .planning import Plan, plan
    from .report import Fit, SwapReport
    from .swapper import Swapper

_HOMES = {
    "Cache": ".cache",
    "Fit": ".report",
    "HotslotError": ".errors",
    "Metrics": ".metrics",
    "Plan": ".planning",
    "SwapReport": ".report",
    "Swapper": ".swapper",
    "attach": ".attaching",
    "check_hotswap_configs_compatible": ".dropin",
    "errors": ".errors",
    "hotswap_adapter": ".dropin",
    "hotswap_adapter_from_state_dict": ".dropin",
    "patch_peft": ".integrations",
    "plan": ".planning",
    "prepare_model_for_compiled_hotswap": ".dropin",
    "testing": ".testing",
    "unpatch_peft": ".integrations",
}

__all__ = [
    "Cache",
    "Fit",
    "HotslotError",
    "Metrics",
    "Plan",
    "SwapReport",
    "Swapper",
    "attach",
    "check_hotswap_configs_compatible",
    "errors",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "patch_peft",
    "plan",
    "prepare_model_for_compiled_hotswap",
    "testing",
    "unpatch_peft",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_HOMES[name], __name__)
    return module if _HOMES[name] == f".{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
