"""Blends: several loaded adapters as one, their ranks side by side in one slot.

Takes adapters with weights and the slots that they are for; gives a `Blend`, an Entry like any other, whose own bytes
are in host memory. Exact: the sum of the deltas. Beyond the slots' ranks only on request, by a truncated SVD.

c: weight times scaling, one number for each adapter and module. It goes into A, so that B does not depend on weights:

    A = [c₁ A₁; c₂ A₂; …]    B = [B₁ B₂ …]    bias = c₁ bias₁ + c₂ bias₂ + …    scaling = 1, as PEFT's "cat" has it

One adapter alone keeps its bytes, and its weight goes into the scaling.
"""

from .blend import Blend, Blender
from .recipe import Ingredient, names_of, needed_ranks

__all__ = ["Blend", "Blender", "Ingredient", "names_of", "needed_ranks"]
