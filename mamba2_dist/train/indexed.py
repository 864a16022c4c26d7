"""Token files as Megatron reads them: documents end to end in `.bin`, their lengths and places in `.idx`."""

import struct
from pathlib import Path

import numpy as np

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
CODES = {"uint16": 8, "int32": 4}  # Megatron's names for the types of tokens
BLOCK = 1 << 24  # tokens copied at a time


def write_indexed(prefix: Path, tokens: np.ndarray, ends: np.ndarray) -> None:
    """Write `prefix`.bin and `prefix`.idx. tokens: documents end to end; ends: one past each of them."""
    dtype = np.dtype("uint16" if tokens.dtype.itemsize <= 2 else "int32")
    with open(prefix.with_suffix(".bin"), "wb") as file:
        for start in range(0, len(tokens), BLOCK):
            tokens[start : start + BLOCK].astype(dtype).tofile(file)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    with open(prefix.with_suffix(".idx"), "wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", VERSION, CODES[dtype.name], len(ends), len(ends) + 1))
        (ends - starts).astype(np.int32).tofile(file)
        (starts * dtype.itemsize).tofile(file)
        np.arange(len(ends) + 1, dtype=np.int64).tofile(file)
