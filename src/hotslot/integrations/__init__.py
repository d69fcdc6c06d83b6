"""Other libraries' own calls over hotslot: what `hotslot.patch_peft()` puts in their place, and what takes it back.

Takes the calls that users of transformers and diffusers make already; gives what the calls promise. The swapping is
done below. Nothing here imports diffusers: it waits until somebody does.
"""

from .patching import patch_peft, unpatch_peft

__all__ = ["patch_peft", "unpatch_peft"]
