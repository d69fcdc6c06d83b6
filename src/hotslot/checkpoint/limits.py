"""How large the parts of an adapter may be: far above anything real, low enough that a hostile file costs little."""

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
MAX_CONFIG_BYTES = 8_000_000  # a config that lists 10,000 modules by full name, with patterns, is under 3 MB
MAX_CONFIG_DEPTH = 32  # PEFT's own nest three or four levels
MAX_TENSORS = 1_000_000  # ten thousand layers of a mixture of experts stay below
MAX_NAME_LENGTH = 4_096  # real module paths have fewer than 300 characters
