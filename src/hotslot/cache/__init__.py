"""Where checkpoints wait to be activated: in host memory, page-locked where a GPU will read them.

Takes names and bytes; gives them back. Knows nothing of LoRA, layouts or models.
"""

from .host import HostTier

__all__ = ["HostTier"]
