"""The native ops as Python sees them; csrc/bindings.cpp checks every argument. Arrays are NumPy's."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_Int32 = NDArray[np.int32]
_Int64 = NDArray[np.int64]
_Array = NDArray[Any]

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
def linear(x: _Array, weight: _Array, bias: _Array | None, isa: int, out: _Array, /) -> None: ...
def trie_attention(
    q: _Array,
    k: _Array,
    v: _Array,
    row_q: _Array,
    end_k: _Array,
    depth_q: _Array,
    depth_k: _Array,
    sinks: _Array | None,
    scale: float,
    window: int,
    softcap: float,
    batch_invariant: bool,
    isa: int,
    out: _Array,
    lse: _Array,
    /,
) -> None: ...
def trie_attention_backward(
    q: _Array,
    k: _Array,
    v: _Array,
    row_q: _Array,
    end_k: _Array,
    depth_q: _Array,
    depth_k: _Array,
    sinks: _Array | None,
    scale: float,
    window: int,
    softcap: float,
    isa: int,
    out: _Array,
    lse: _Array,
    grad_out: _Array,
    grad_lse: _Array,
    delta: _Array,
    grad_q: _Array,
    grad_k: _Array,
    grad_v: _Array,
    /,
) -> None: ...
def target_logprob(
    hidden: _Array,
    weight: _Array,
    bias: _Array | None,
    row: _Array,
    target: _Array,
    scale: float,
    softcap: float,
    batch_invariant: bool,
    isa: int,
    num_threads: int,
    logp: _Array,
    is_argmax: _Array,
    lse: _Array,
    /,
) -> None: ...
def target_logprob_backward(
    hidden: _Array,
    weight: _Array,
    bias: _Array | None,
    row: _Array,
    target: _Array,
    scale: float,
    softcap: float,
    isa: int,
    num_threads: int,
    lse: _Array,
    grad_logp: _Array,
    grad_lse: _Array,
    grad_hidden: _Array,
    grad_weight: _Array | None,
    grad_bias: _Array | None,
    /,
) -> None: ...
def target_logprob_sum(
    hidden: _Array,
    weight: _Array,
    bias: _Array | None,
    row: _Array,
    target: _Array,
    scale: float,
    softcap: float,
    isa: int,
    num_threads: int,
    target_weight: _Array,
    logp: _Array,
    grad_hidden: _Array,
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
