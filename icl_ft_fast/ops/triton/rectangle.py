"""The keys that every query of a call sees, given to the best dense attention that the machine has.

Such keys and all queries are a rectangle without a mask, for which there are faster kernels than a tree's. The tree
kernel then starts from their state, so the two are joined exactly, by their log-sum-exps. Which engine serves a device
and dtype is decided once; if a chosen engine fails, its error is raised. Knows torch, and an engine when asked for one.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from icl_ft_fast.ops.triton.gpu import Gpu, gpu

# Estimated, none of it measured: FLOP/s of the tree kernel and of an engine on a rectangle, by engine; seconds that
# another kernel takes to start and to end; bytes a second of the state that it hands over.
RATES = {"flash-attn-4": (480e12, 600e12), "cuDNN": (480e12, 600e12), "flash-attn": (170e12, 200e12)}
START_S, BYTES_PER_S = 5e-6, 4e12


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """cuDNN's, which torch brings along; no soft-cap."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, False, False, scale=scale
    )
    return out[0].transpose(0, 1), lse[0, ..., 0].T


def _flash2(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """FlashAttention 2, the extra `flash2`."""
    attention = import_module("flash_attn").flash_attn_func
    q, k, v = q[None], k[None], v[None]
    out, lse, _ = attention(q, k, v, softmax_scale=scale, softcap=softcap, return_attn_probs=True)
    return out[0], lse[0].T


def _flash4(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """FlashAttention 4, the extra `flash`."""
    attention = import_module("flash_attn.cute").flash_attn_func
    out, lse, *_ = attention(q[None], k[None], v[None], softmax_scale=scale, softcap=softcap, return_lse=True)
    return out[0], lse[0].T


ENGINES: dict[str, Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "flash-attn-4": _flash4,
    "flash-attn": _flash2,
    "cuDNN": _cudnn,
}


def _has(module: str) -> bool:
    """Whether a module can be found; flash-attn and flash-attn-4 share the name of their package."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def engine_of(found: Gpu, dtype: torch.dtype) -> str | None:
    """The engine of a GPU and a dtype, None for none: the tree kernel then serves all."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    if found.matrix in ("wgmma", "tcgen05") and _has("flash_attn.cute"):
        return "flash-attn-4"
    if found.matrix == "wgmma":
        return "cuDNN"
    return "flash-attn" if found.matrix == "mma" and _has("flash_attn.flash_attn_interface") else None


@cache
def engine(device: torch.device, dtype: torch.dtype) -> str | None:
    """engine_of a device, looked for once."""
    return engine_of(gpu(device), dtype) if device.type == "cuda" else None


def gain_s(name: str, num_queries: int, num_keys: int, num_heads: int, size: int, itemsize: int) -> float:
    """Seconds that an engine spares on a rectangle, by the cost model; below 0 the tree kernel had better serve it."""
    tree, dense = RATES[name]
    spared = 4 * num_queries * num_keys * num_heads * size * (1 / tree - 1 / dense)
    state_bytes = 2 * num_queries * num_heads * (size * itemsize + 4)  # out and lse, written and read
    return spared - START_S - state_bytes / BYTES_PER_S


def chosen(q: Tensor, v: Tensor, softcap: float, shared: tuple[int, int]) -> str | None:
    """The engine that takes q [T, H, D] over keys [first, last), if one can and it is worth it."""
    name, size, num_keys = engine(q.device, q.dtype), q.shape[2], shared[1] - shared[0]
    if name is None or num_keys < 1 or size != v.shape[2] or size % 8:
        return None
    if name == "cuDNN" and (softcap or size > 128):
        return None
    if name == "flash-attn-4" and 128 < size < 256 and gpu(q.device).matrix == "tcgen05":  # sm_90 has them
        return None
    num_queries, num_heads, _ = q.shape
    return name if gain_s(name, num_queries, num_keys, num_heads, size, q.itemsize) > 0 else None


def rectangle(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key: out [T, H, Dv] in q's dtype, natural lse [T, H] in float32."""
    out, lse = ENGINES[name](q, k, v, scale, softcap)
    return out.contiguous(), lse.float().contiguous()
