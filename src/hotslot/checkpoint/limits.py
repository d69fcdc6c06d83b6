"""How large the parts of an adapter may be: far above anything real, low enough that a hostile file costs little."""

# The format allows 100 MB, of which the JSON parser makes up to 25 times as much; the 89,000 tensors of an adapter on
# every expert of DeepSeek-V3 have a header of 13 MB.
MAX_HEADER_BYTES = 32_000_000
MAX_CONFIG_BYTES = 8_000_000  # a config that lists 10,000 modules by full name, with patterns, is under 3 MB
MAX_CONFIG_DEPTH = 32  # PEFT's own nest three or four levels
MAX_NUMBER_BITS = 4_096  # of a whole number in the config; floats end at 1024, and printing 4300 digits is an error
MAX_TENSORS = 250_000  # as many as fit into the header at the length of real names
MAX_NAME_LENGTH = 4_096  # real module paths have fewer than 300 characters
MAX_NAME_PARTS = 128  # between dots; real ones have fewer than 20, and each is looked up by itself
# A sparse file claims terabytes and takes no room. Rank 256 on all linear layers of Llama-405B has 20 GB in bf16.
MAX_DATA_BYTES = 64 << 30


def bad_name(name: str) -> tuple[str, str] | None:
    """(found, expected) if a tensor's name is beyond the limits."""
    if len(name) > MAX_NAME_LENGTH:
        return f"a tensor name of {len(name):,} characters", f"at most {MAX_NAME_LENGTH:,}"
    if name.count(".") >= MAX_NAME_PARTS:
        return f"a tensor name of {name.count('.') + 1:,} parts", f"at most {MAX_NAME_PARTS:,}"
    return None
