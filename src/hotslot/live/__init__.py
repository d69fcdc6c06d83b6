"""The running model: finds the slots, binds their parameters to an arena, writes blocks into it, puts everything back.

Takes a model and Blocks; changes parameters, scalings and PEFT's own records of them, in place. The only package that
touches a live model, and the first of the line that imports peft.
"""

from .assembly import Assembly
from .base import base_modules, refuse_other_base, refuse_other_parameters
from .binding import Binding
from .calls import calls_of
from .conversion import converted, outcome
from .discover import adapter_names, count_slots, innermost, is_compiled, is_on_gpu, model_of, roots, unwrap
from .exchange import carries, put_on, refuse_merged, refuse_put_on, taken_off
from .forbidden import allow, forbid, refuse_passed_over, seen_to
from .guard import guard, is_guarded, unguard
from .inject import Injection, inject, remove
from .low_rank import blended
from .memory import Image, Memory, Writes
from .merges import NO_MERGES, Merges, host_bytes
from .merging import outline_bytes
from .norms import note_norms
from .offloading import refuse_offloaded
from .optimizers import follow_steps, leave_steps
from .pristine import PRISTINE
from .resident import Resident, residents
from .saved import refuse_adapted_and_saved, saved_modules
from .shapes import OUT_PROJ, slot_shapes
from .skeleton import hollow
from .slots import Slot, find_slots, let_be_offloaded, stay_on_device
from .staging import Arrival, Stagings
from .state import NEUTRAL_SCALING, Records, build_config, refuse_unsupported_resident
from .streams import note_stream, ordered, refuse_while_capturing
from .targets import matching_targets
from .tokens import own_tokens, refuse_untied, tied_modules, token_rooms
from .tying import as_loaded
from .wrap import Wrapping, unwrap_saved, wrap

__all__ = [
    "NEUTRAL_SCALING",
    "NO_MERGES",
    "OUT_PROJ",
    "PRISTINE",
    "Arrival",
    "Assembly",
    "Binding",
    "Image",
    "Injection",
    "Memory",
    "Merges",
    "Records",
    "Resident",
    "Slot",
    "Stagings",
    "Wrapping",
    "Writes",
    "adapter_names",
    "allow",
    "as_loaded",
    "base_modules",
    "blended",
    "build_config",
    "calls_of",
    "carries",
    "converted",
    "count_slots",
    "find_slots",
    "follow_steps",
    "forbid",
    "guard",
    "hollow",
    "host_bytes",
    "inject",
    "innermost",
    "is_compiled",
    "is_guarded",
    "is_on_gpu",
    "leave_steps",
    "let_be_offloaded",
    "matching_targets",
    "model_of",
    "note_norms",
    "note_stream",
    "ordered",
    "outcome",
    "outline_bytes",
    "own_tokens",
    "put_on",
    "refuse_adapted_and_saved",
    "refuse_merged",
    "refuse_offloaded",
    "refuse_other_base",
    "refuse_other_parameters",
    "refuse_passed_over",
    "refuse_put_on",
    "refuse_unsupported_resident",
    "refuse_untied",
    "refuse_while_capturing",
    "remove",
    "residents",
    "roots",
    "saved_modules",
    "seen_to",
    "slot_shapes",
    "stay_on_device",
    "taken_off",
    "tied_modules",
    "token_rooms",
    "unguard",
    "unwrap",
    "unwrap_saved",
    "wrap",
]
