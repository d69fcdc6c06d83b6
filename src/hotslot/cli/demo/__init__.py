"""`hotslot demo`: real adapters, swapped in a real model whose decode step is compiled.

Takes a model and adapters, by default SmolLM2-135M-Instruct and those under demo/; gives the answers of base and
adapters, and a table of what the swaps cost, beside a plain copy and PEFT. Nothing imports torch until it runs.
"""

from .result import AdapterResult, DemoResult, Speaker, SwapTimes
from .run import run_demo

__all__ = ["AdapterResult", "DemoResult", "Speaker", "SwapTimes", "run_demo"]
