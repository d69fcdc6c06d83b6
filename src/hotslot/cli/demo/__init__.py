"""`hotslot demo`: real adapters, swapped in a real compiled model.

`run_demo` takes a model and adapters, by default SmolLM2-135M-Instruct and LoRAs under demo/; gives the answers of base
and adapters, and a table of what the swaps cost, beside a plain copy and PEFT. `run_methods` (`--methods`) merges one
task's adapters in seven methods, and counts right answers. Nothing imports torch until they run.
"""

from .methods import run_methods
from .result import AdapterResult, DemoResult, MethodResult, MethodsResult, Speaker, SwapTimes
from .run import run_demo

__all__ = [
    "AdapterResult",
    "DemoResult",
    "MethodResult",
    "MethodsResult",
    "Speaker",
    "SwapTimes",
    "run_demo",
    "run_methods",
]
