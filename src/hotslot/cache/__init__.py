"""Where checkpoints wait to be activated: on the device, in host memory, page-locked where a GPU will read it, on disk.

Takes names and bytes; gives them back. Knows nothing of LoRA, layouts or models.
"""

from .budget import Cache, user_folder
from .packed import PackedFiles
from .tier import Sized, Tier

__all__ = ["Cache", "PackedFiles", "Sized", "Tier", "user_folder"]
