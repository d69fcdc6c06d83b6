"""A file, folder, Hub id or dict of tensors → Checkpoint: one run of bytes, names and places in it, the config.

Takes whatever a user calls an adapter; gives names, shapes, dtypes and values that have been checked. Knows nothing
of models, devices, or what a PEFT method means by a tensor (`hotslot.methods` does).
"""

from .checkpoint import PEFT_PREFIX, Checkpoint, Schema, TensorSpec, each_config, view
from .limits import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_NAME_LENGTH, MAX_TENSORS
from .recent import Recent
from .safetensors_file import Piece, parse_header, read_header
from .sources import WEIGHTS_NAME, FileFamily, Source, config_dict, from_tensors, read, read_file

__all__ = [
    "MAX_CONFIG_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_NAME_LENGTH",
    "MAX_TENSORS",
    "PEFT_PREFIX",
    "WEIGHTS_NAME",
    "Checkpoint",
    "FileFamily",
    "Piece",
    "Recent",
    "Schema",
    "Source",
    "TensorSpec",
    "config_dict",
    "each_config",
    "from_tensors",
    "parse_header",
    "read",
    "read_file",
    "read_header",
    "view",
]
