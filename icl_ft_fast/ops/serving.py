"""Which implementation serves the ops on a device, and what it allocates beside its results."""

from importlib import import_module

import torch

from icl_ft_fast.ops.checks import NATIVE


def served_by(device: torch.device, dtype: torch.dtype) -> str:
    """What serves trie_attention: "C++", "PyTorch", "Triton" or "Triton with" the engine of shared keys, by name.

    The engine takes the keys that every query sees where they are many, see docs/gpu.md; it is chosen once.
    """
    if device.type == "cpu":
        return "C++" if dtype in NATIVE else "PyTorch"
    if device.type != "cuda" or dtype == torch.float64:
        return "PyTorch"
    engine = import_module("icl_ft_fast.ops.triton.rectangle").engine(device, dtype)
    return f"Triton with {engine}" if engine else "Triton"


def temporary_bytes(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_queries: int,
    num_keys: int,
    heads: tuple[int, int],
    sizes: tuple[int, int],
) -> int:
    """The most that a GPU's forwards of both ops allocate beside their results; 0 for a CPU's, which need next to none.

    Args:
        device: that the ops run on.
        dtype: of queries, keys and values.
        num_queries: the most rows of a call, of target_logprob too.
        num_keys: the most keys.
        heads: of queries, and of keys.
        sizes: of a key's head, and of a value's.
    """
    if device.type != "cuda" or dtype == torch.float64:
        return 0
    attention, head = (import_module(f"icl_ft_fast.ops.triton.{op}") for op in ("trie_attention", "target_logprob"))
    of_attention: int = attention.temporary_bytes(num_queries, num_keys, heads, sizes, dtype, device)
    return max(of_attention, int(head.temporary_bytes(num_queries, dtype.itemsize, device)))
