"""Checkpoint + Layout → Block: one run of bytes and, compiled once, where each of them goes.

Takes an Adapter and a Layout (which slots a model has, of what shapes, at which byte offsets); gives a Block that can
be written without looking at a name again. Knows no module and touches no live memory: everything is numbers.
"""

from .block import Block, Run, Tile, pack
from .layout import Layout, Place, SlotShape, arrange
from .partial import within

__all__ = ["Block", "Layout", "Place", "Run", "SlotShape", "Tile", "arrange", "pack", "within"]
