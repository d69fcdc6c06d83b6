"""Other libraries' own calls over hotslot: what `hotslot.patch_peft()` puts in their place, and what takes it back."""

from .patching import patch_peft, unpatch_peft

__all__ = ["patch_peft", "unpatch_peft"]
