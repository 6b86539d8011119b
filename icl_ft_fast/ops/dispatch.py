"""The torch.library ops: each one's schema, the shapes of its results, and the kernel of each device.

Schemas are flat: window 0 and softcap 0.0 mean "none".
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from icl_ft_fast.ops import cpu, reference
from icl_ft_fast.ops.target_logprob import (
    fake_target_logprob,
    fake_target_logprob_backward,
    fake_target_logprob_sum,
)
from icl_ft_fast.ops.trie_attention import (
    fake_trie_attention,
    fake_trie_attention_backward,
    fake_trie_attention_plan,
)


def _triton(module: str, name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The Triton kernels, loaded with the first CUDA tensor; float64, which exists to be exact, has the definition."""

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        exact = arguments[0].dtype == torch.float64
        served = reference if exact else import_module(f"icl_ft_fast.ops.triton.{module}")
        results: tuple[Tensor, ...] = getattr(served, name)(*arguments)
        return results

    return call


def _register(name: str, schema: str, fake: Callable[..., Any], **kernels: Callable[..., tuple[Tensor, ...]]) -> None:
    """Defines an op and registers each device's kernel, a function of the schema's arguments."""
    torch.library.define(f"icl_ft_fast::{name}", schema)
    torch.library.register_fake(f"icl_ft_fast::{name}", fake)
    for device, kernel in kernels.items():
        torch.library.impl(f"icl_ft_fast::{name}", device, kernel)


_TRIE = "Tensor row_q, Tensor end_k, Tensor depth_q, Tensor depth_k"
_register(
    "trie_attention",
    f"(Tensor q, Tensor k, Tensor v, {_TRIE}, Tensor? sinks, float scale, int window, float softcap,"
    " Tensor? plan=None, bool batch_invariant=False, int shared_first=0, int shared_last=0)"
    " -> (Tensor out, Tensor lse)",
    fake_trie_attention,
    cpu=cpu.trie_attention,
    cuda=_triton("trie_attention", "trie_attention"),
)
_register(
    "trie_attention_backward",
    f"(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TRIE}, Tensor? sinks,"
    " float scale, int window, float softcap, Tensor? plan_q=None, Tensor? plan_kv=None)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor delta)",
    fake_trie_attention_backward,
    cpu=cpu.trie_attention_backward,
    cuda=_triton("trie_attention", "trie_attention_backward"),
)
_register(
    "trie_attention_plan",
    f"(Tensor q, Tensor k, Tensor v, {_TRIE}, int window, str kernel, float softcap=0.0, int shared_first=0,"
    " int shared_last=0) -> Tensor",
    fake_trie_attention_plan,
    cuda=_triton("trie_attention", "trie_attention_plan"),
)
_register(
    "target_logprob",
    "(Tensor hidden, Tensor weight, Tensor row, Tensor target, Tensor? bias, float scale, float softcap,"
    " bool batch_invariant=False) -> (Tensor logp, Tensor is_argmax, Tensor lse)",
    fake_target_logprob,
    cpu=cpu.target_logprob,
    cuda=_triton("target_logprob", "target_logprob"),
)
_register(
    "target_logprob_backward",
    "(Tensor grad_logp, Tensor grad_lse, Tensor hidden, Tensor weight, Tensor row, Tensor target, Tensor? bias,"
    " Tensor lse, float scale, float softcap, bool need_weight)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    fake_target_logprob_backward,
    cpu=cpu.target_logprob_backward,
    cuda=_triton("target_logprob", "target_logprob_backward"),
)
_register(
    "target_logprob_sum",
    "(Tensor hidden, Tensor weight, Tensor row, Tensor target, Tensor target_weight, Tensor? bias, float scale,"
    " float softcap) -> (Tensor logp, Tensor grad_hidden)",
    fake_target_logprob_sum,
    cpu=cpu.target_logprob_sum,
)
