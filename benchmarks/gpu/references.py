"""What our results are held against before they are timed, and rivals that several parts have."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import HEADS, KV_HEADS, OURS, Bench, Index
from benchmarks.trie_attention import check_budget
from icl_ft_fast import ops
from icl_ft_fast.engine.model import ATTENTION, Model
from icl_ft_fast.ops import reference

ENGINES = {"flash-attn-4": "flash_attn.cute", "flash-attn": "flash_attn", "cuDNN": "torch", "FA3": "fa3_fwd_interface"}


def engine(name: str, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Dense attention by an engine that a rectangle can be given to, or by the yardstick FA3."""
    if name == "FA3":
        from fa3_fwd_interface import flash_attn_func

        return flash_attn_func(q[None], k[None], v[None], softmax_scale=q.shape[-1] ** -0.5, return_attn_probs=True)
    from icl_ft_fast.ops.triton import rectangle as served

    return served.rectangle(name, q, k, v, q.shape[-1] ** -0.5, 0.0)


def sdpa(backend: SDPBackend, qkv: list[Tensor], is_causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv, is_causal=is_causal, enable_gqa=qkv[1].shape[1] != HEADS)


def needs(package: str, call: Callable[[], Any], bench: Bench) -> Callable[[], Any] | str:
    """The call, or why it cannot be made."""
    if not bench.cuda:
        return "needs CUDA"
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # nor what it is in
        found = False
    return call if found else f"{package} is not importable here"


@contextmanager
def plain(model: Model) -> Iterator[Any]:
    """The network as transformers runs it."""
    model.network.set_attn_implementation("sdpa")
    try:
        yield model.network
    finally:
        model.network.set_attn_implementation(ATTENTION)


def checked(bench: Bench, case: str, index: Index, size: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """trie_attention of random q, k and v, some rows held against float64; and the three for torch, heads first."""
    row_q, end_k, depth_q, depth_k = index
    lengths, heads = (len(row_q), len(end_k), len(end_k)), (HEADS, KV_HEADS, KV_HEADS)
    qkv = [bench.random(*shape, size, seed=i) for i, shape in enumerate(zip(lengths, heads, strict=True))]
    ours = functools.partial(ops.trie_attention, *qkv, ops.TreeIndex(*index))
    some = torch.linspace(0, len(row_q) - 1, 32, device=bench.device).long()
    q, k, v = (x.double() for x in (qkv[0][some], *qkv[1:]))
    exact, _ = reference.trie_attention(q, k, v, row_q[some], end_k, depth_q[some], depth_k, None, size**-0.5, 0, 0.0)
    bench.check(case, check_budget, case, ours()[some], exact.bfloat16(), exact)
    return ours, [x.transpose(0, 1)[None] for x in qkv]


def check_near(name: str, ours: Tensor, theirs: Tensor) -> None:
    off = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    if not off <= 2e-2:  # bfloat16 factors and results
        raise AssertionError(f"{name}: off by {off:.1e} of their size")


def check_logp_exact(rows: int, found: Tensor, exact: Tensor) -> None:
    off = (found - exact).abs().max().item()
    if not off <= 1e-4:  # sums of E float32 products, of the very bfloat16 factors
        raise AssertionError(f"target_logprob of {rows} rows: off by {off:.1e}")


def check_logp(name: str, ours: list[float], theirs: list[float]) -> None:
    """Random weights spread log-probabilities by about one; two networks may differ by a tenth of that."""
    a, b = torch.tensor(ours[: len(theirs)]), torch.tensor(theirs)
    if not (a - b).std() <= 0.1 * b.std():
        raise AssertionError(f"{name}: log-likelihoods differ by {(a - b).std():.2f} of a spread of {b.std():.2f}")


def check_alike(alike: list[bool]) -> None:
    if sum(alike) < len(alike) / 2:  # between two tokens as likely as each other bfloat16 decides
        raise AssertionError(f"decode: {sum(alike)} of {len(alike)} first tokens are those of transformers")


def check_losses(losses: dict[str, float]) -> None:
    if len(losses) == 2 and not abs(losses[OURS] - losses["transformers, SDPA"]) <= 1e-2 * losses[OURS]:
        raise AssertionError(f"LoRA step: losses {losses}")
