"""An adapter of any PEFT method that is on the model, and others of its method that are to take its place.

Nothing here knows a method. What PEFT keeps of an adapter is whatever a fresh load of it has in the modules that are
not the base model's own. If the model has the same, name by name, type by type, shape by shape, then with the fresh
load's tensors and numbers in them it is that fresh load.

    Seat         the adapter's name on the model, and all that PEFT keeps there
    FreshLoads   what PEFT makes of another adapter, beside the model
    comparing    whether that is the same but for its values
    Placing      where it stands in larger tensors, and how large they are made
    neutral      whether the seat's own layers, untrained, do nothing
    Resident     all of this as a swap sees it
"""

from .resident import Resident
from .seat import residents

__all__ = ["Resident", "residents"]
