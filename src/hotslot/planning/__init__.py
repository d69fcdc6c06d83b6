"""Plans: which slots a model gets and how much room each has. Made ahead, from adapters or from module names.

Takes a model and what is known of the adapters to come; touches neither. `attach` takes a Plan or makes one, and
`Swapper.grow` takes a larger one later.
"""

from .making import plan, plan_adapters
from .plans import NO_SLOTS, Plan, refuse_unfit

__all__ = ["NO_SLOTS", "Plan", "plan", "plan_adapters", "refuse_unfit"]
