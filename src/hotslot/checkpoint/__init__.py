"""A file, folder, Hub id or dict of tensors → Checkpoint: one run of bytes, names and places in it, the config.

Takes whatever a user calls an adapter; gives names, shapes, dtypes and values that have been checked. Knows nothing
of models, devices, or what a PEFT method means by a tensor (`hotslot.methods` does).
"""

from .buffers import host_buffer, keep_buffer
from .checkpoint import PEFT_PREFIX, Checkpoint, Schema, Sink, TensorSpec, each_config, view
from .configs import config_dict, parse_config
from .files import GRAIN_NS, Files, Stamp
from .limits import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_NAME_LENGTH, MAX_TENSORS
from .locating import CONFIG_NAME, WEIGHTS_NAME, hub_errors, locate
from .recent import Recent
from .safetensors_file import DTYPES, Piece, open_file, parse_header, read_header, refuse_other_size
from .sources import (
    FileFamily,
    Source,
    from_tensors,
    read,
    read_file,
    read_files,
    schemas,
    survey,
)

__all__ = [
    "CONFIG_NAME",
    "DTYPES",
    "GRAIN_NS",
    "MAX_CONFIG_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_NAME_LENGTH",
    "MAX_TENSORS",
    "PEFT_PREFIX",
    "WEIGHTS_NAME",
    "Checkpoint",
    "FileFamily",
    "Files",
    "Piece",
    "Recent",
    "Schema",
    "Sink",
    "Source",
    "Stamp",
    "TensorSpec",
    "config_dict",
    "each_config",
    "from_tensors",
    "host_buffer",
    "hub_errors",
    "keep_buffer",
    "locate",
    "open_file",
    "parse_config",
    "parse_header",
    "read",
    "read_file",
    "read_files",
    "read_header",
    "refuse_other_size",
    "schemas",
    "survey",
    "view",
]
