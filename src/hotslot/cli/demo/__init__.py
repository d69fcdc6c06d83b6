"""`hotslot demo`: real adapters, swapped in a real compiled model.

`run_demo` takes a model and adapters, by default SmolLM2-135M-Instruct and LoRAs under demo/; gives the answers of base
and adapters, and a table of what the swaps cost, beside a plain copy and PEFT. `run_methods` (`--methods`) merges one
task's adapters in seven methods, and counts right answers. `run_images` (`--images`) swaps style LoRAs in a diffusers
pipeline, and draws a contact sheet. Nothing imports torch until they run.
"""

from .images import run_images
from .methods import run_methods
from .result import (
    AdapterResult,
    DemoResult,
    ImagesResult,
    MethodResult,
    MethodsResult,
    RowResult,
    Speaker,
    SwapTimes,
)
from .run import run_demo

__all__ = [
    "AdapterResult",
    "DemoResult",
    "ImagesResult",
    "MethodResult",
    "MethodsResult",
    "RowResult",
    "Speaker",
    "SwapTimes",
    "run_demo",
    "run_images",
    "run_methods",
]
