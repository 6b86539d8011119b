"""The native ops as Python sees them; csrc/bindings.cpp checks every argument.

The tree's arrays are NumPy's. Tensors come as DLPack capsules, torch.utils.dlpack.to_dlpack().
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_Int32 = NDArray[np.int32]
_Int64 = NDArray[np.int64]
_Array = NDArray[Any]
_Tensor = object

def trie_build(
    tokens: _Int32,
    offsets: _Int64,
    context_lengths: _Int64,
    head_tokens: _Int32,
    head_offsets: _Int64,
    head: _Int32 | None,
    whole: bool,
) -> dict[str, _Array]: ...
def trie_ancestors(parent: _Int32, row: int, out: _Int32) -> None: ...
def best_isa() -> int: ...
def sleep_at_barriers(sleep: bool, /) -> None: ...
def linear(x: _Tensor, weight: _Tensor, bias: _Tensor | None, isa: int, out: _Tensor, /) -> None: ...
def trie_attention(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    row_q: _Tensor,
    end_k: _Tensor,
    depth_q: _Tensor,
    depth_k: _Tensor,
    sinks: _Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    batch_invariant: bool,
    isa: int,
    out: _Tensor,
    lse: _Tensor,
    /,
) -> None: ...
def trie_attention_backward(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    row_q: _Tensor,
    end_k: _Tensor,
    depth_q: _Tensor,
    depth_k: _Tensor,
    sinks: _Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    isa: int,
    out: _Tensor,
    lse: _Tensor,
    grad_out: _Tensor,
    grad_lse: _Tensor,
    delta: _Tensor,
    grad_q: _Tensor,
    grad_k: _Tensor,
    grad_v: _Tensor,
    /,
) -> None: ...
def target_logprob(
    hidden: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    row: _Tensor,
    target: _Tensor,
    scale: float,
    softcap: float,
    batch_invariant: bool,
    isa: int,
    num_threads: int,
    logp: _Tensor,
    is_argmax: _Tensor,
    lse: _Tensor,
    /,
) -> None: ...
def target_logprob_backward(
    hidden: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    row: _Tensor,
    target: _Tensor,
    scale: float,
    softcap: float,
    isa: int,
    num_threads: int,
    lse: _Tensor,
    grad_logp: _Tensor,
    grad_lse: _Tensor,
    grad_hidden: _Tensor,
    grad_weight: _Tensor | None,
    grad_bias: _Tensor | None,
    /,
) -> None: ...
def target_logprob_sum(
    hidden: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    row: _Tensor,
    target: _Tensor,
    scale: float,
    softcap: float,
    isa: int,
    num_threads: int,
    target_weight: _Tensor,
    logp: _Tensor,
    grad_hidden: _Tensor,
    /,
) -> None: ...
def target_logprob_workspace_bytes(
    bfloat16: bool,
    sizes: tuple[int, int, int, int],
    contiguous: bool,
    isa: int,
    num_threads: int,
    of: str = "",
) -> int: ...
