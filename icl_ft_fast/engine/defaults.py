"""What can be chosen, and what is chosen unless asked; imports no torch, so that help and usage errors need none."""

from __future__ import annotations

import re
from pathlib import Path

SHIPPED = "shipped"  # the name of the model that comes with the package
SHIPPED_FOLDER = Path(__file__).parents[1] / "shipped" / "model"
DTYPE_NAMES = ("float32", "bfloat16")
KV_DTYPE_NAMES = ("bfloat16", "int8")
CHUNK_TOKENS = 512  # tokens forwarded at a time on a CPU
GPU_CHUNK_TOKENS, MOST_CHUNK_TOKENS = 8192, 65_536  # on a GPU, of a large model and of the smallest
SHARD_CHUNKS = 4  # forwards in an average shard, what a kill loses at most of each worker's work
SHARD_TOKENS = SHARD_CHUNKS * CHUNK_TOKENS


def parse_bytes(size: int | str) -> int:
    """Bytes of a number of them or of a text like "4GB" (10**9) or "512 MiB" (2**20); raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    value = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
    if not value or not match or (match[3] and not match[2]):
        raise ValueError(f"memory: expected a number of bytes above 0 or a size like 4GB, got {size!r}")
    return int(value)
