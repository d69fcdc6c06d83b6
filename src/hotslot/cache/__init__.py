"""Where checkpoints wait to be activated: on the device, in host memory, page-locked where a GPU will read it, on disk.

Takes names and bytes; gives them back. Knows nothing of LoRA, layouts or models. Packed files, which need torch, are in
`hotslot.cache.packed`.
"""

from .budget import Cache, user_folder
from .tier import Room, Sized, Tier

__all__ = ["Cache", "Room", "Sized", "Tier", "user_folder"]
