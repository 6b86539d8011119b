"""The two ops: attention along the paths of a trie, and log-probabilities of chosen tokens.

One op has one name at every layer:

    ops/trie_attention.py, ops/target_logprob.py   the contract: arguments, checks, shapes of results, gradients
    ops/reference.py                               the definition in plain PyTorch, which every kernel is tested against
    ops/cpu.py, csrc/                              the kernels for CPUs, in C++
    ops/triton/                                    the kernels for GPUs, imported with the first CUDA tensor
    ops/dispatch.py                                the torch.library ops, and which kernel serves which device
    ops/serving.py                                 the name of what serves a device, and what it allocates
    ops/linear.py                                  no op: torch's linear layer, faster for few rows on a CPU

Knows nothing of models, tries or KV caches.
"""

from icl_ft_fast.ops import dispatch  # registers the ops
from icl_ft_fast.ops.linear import linear
from icl_ft_fast.ops.serving import served_by, temporary_bytes
from icl_ft_fast.ops.target_logprob import target_logprob, target_logprob_sum
from icl_ft_fast.ops.trie_attention import AttentionOptions, TreeIndex, shared_keys, trie_attention

__all__ = [
    "AttentionOptions",
    "TreeIndex",
    "dispatch",
    "linear",
    "served_by",
    "shared_keys",
    "target_logprob",
    "target_logprob_sum",
    "temporary_bytes",
    "trie_attention",
]
