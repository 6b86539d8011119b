"""Log-likelihoods of continuations: one prefix tree for all requests of a call.

The path of a request: encoding -> trie.build -> forward.forward_chunks -> Model.target_logprob -> sums over its path.
A prefix that requests share can be forwarded beforehand, by prefill(), for the calls that start from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from icl_ft_fast.engine import encoding, memory, trie
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.flops import Work, work_of
from icl_ft_fast.engine.forward import ScoringOptions as ScoringOptions
from icl_ft_fast.engine.forward import StartError, forward_chunks
from icl_ft_fast.engine.kv_cache import Context, common_tokens
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.transfer import Fetched, Sent, is_late
from icl_ft_fast.runtime.errors import UserError


class ScoreError(UserError):
    """A request that cannot be scored; the message names it."""


class LogLikelihood(NamedTuple):
    """log P(continuation | context), natural log, summed; and whether greedy decoding would generate it."""

    logp: float
    is_greedy: bool


TokenRequest = tuple[Sequence[int], Sequence[int]]
Encoded = tuple[list[int], list[int]]


def loglikelihood(
    model: Model,
    requests: Sequence[TokenRequest | tuple[str, str]],
    *,
    chunk_tokens: int | None = None,
    shared_tokens: int = 0,
    ledger: Ledger | None = None,
    progress: bool = False,
    start: Context | None = None,
    count_start: bool = True,
) -> list[LogLikelihood]:
    """Score (context, continuation) pairs, given as token ids (taken as they are) or as text (see encoding.py).

    Args:
        model: from load().
        requests: pairs; a continuation has at least one token, and so has a context of token ids.
        chunk_tokens: tokens forwarded at a time, fewer where model.memory asks for it; None for what suits the model's
            device. Results do not depend on it beyond rounding.
        shared_tokens: leading tokens that all requests have in common and that count as the ledger's phase "prefill";
            everything else forwarded is its phase "query".
        ledger: counts of this call are added to it.
        progress: show a bar of forwarded tokens.
        start: from prefill() with this model; every request begins with its tokens, which are not forwarded again.
        count_start: whether the ledger's cached_tokens grow by the tokens of `start`; False where this ledger has
            counted them already, as prefill() and stored_context() made the context.

    Returns:
        One LogLikelihood a request, in the order given.

    Raises:
        ScoreError: an empty continuation or context, more tokens than the model has positions, a token id that its
            vocabulary does not have, a request that does not begin with `start`, or too little memory.

    Examples:
        >>> model = iff.load("shipped")
        >>> (found,) = iff.loglikelihood(model, [("glon are", " wider than femp.")])
        >>> found.logp < 0
        True
    """
    encoded, options = encode_requests(model, requests), ScoringOptions(chunk_tokens, progress)
    found = score_requests(model, encoded, options, ledger or Ledger(), start, shared_tokens, count_start=count_start)
    results = dict(found)
    return [results[r] for r in range(len(requests))]


def iter_loglikelihood(
    model: Model,
    requests: Sequence[TokenRequest | tuple[str, str]],
    *,
    chunk_tokens: int | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
    start: Context | None = None,
    count_start: bool = True,
) -> Iterator[tuple[int, LogLikelihood]]:
    """Score as loglikelihood() does, each (index of the request, result) yielded as soon as its chunk is done."""
    encoded, options = encode_requests(model, requests), ScoringOptions(chunk_tokens, progress)
    yield from score_requests(model, encoded, options, ledger or Ledger(), start, count_start=count_start)


@torch.inference_mode()
def score_requests(
    model: Model,
    requests: Sequence[Encoded],
    options: ScoringOptions,
    ledger: Ledger,
    start: Context | None = None,
    shared_tokens: int = 0,
    *,
    count_start: bool = True,
) -> Iterator[tuple[int, LogLikelihood]]:
    """Yield (request index, result) as chunks complete them; what every way of scoring comes down to.

    Args:
        model: from load().
        requests: token ids that check_fit() has passed.
        options: chunk_tokens and progress are used.
        ledger: counts are added to it.
        start: see loglikelihood().
        shared_tokens: see loglikelihood().
        count_start: see loglikelihood().
    """
    tree = trie.build_from_lists(requests)
    targets, completed = _Targets(model, tree, ledger), _Completed(tree)
    _count_requests(ledger, tree, start if count_start else None)
    chunks = forward_chunks(
        model, tree, targets, options=options, ledger=ledger, start=start, shared_tokens=shared_tokens
    )
    done = _with_score_errors(chunks)
    for chunk in _after_the_next(done) if targets.is_late else done:
        if targets.is_late:
            with ledger.phase("query"):
                targets.read(chunk)
        for r in completed.by(chunk):
            path = tree.path[tree.path_offset[r] : tree.path_offset[r + 1]]
            yield r, LogLikelihood(targets.logp[path].sum().item(), bool(targets.is_argmax[path].all()))


class TokenLogprobs(NamedTuple):
    """Of each token of a continuation: its log-probability, its rank (1 is the most likely), and the likeliest tokens.

    `top` has a list a token, of (token id, log-probability), likeliest first. `after` is such a list of what comes
    after the last token, where it was asked for.
    """

    logp: list[float]
    rank: list[int]
    top: list[list[tuple[int, float]]]
    after: list[tuple[int, float]]


LOGIT_ROWS = 64  # rows whose log-probabilities of the whole vocabulary are held at a time


@torch.inference_mode()
def iter_token_logprobs(
    model: Model,
    requests: Sequence[TokenRequest],
    *,
    top: int = 1,
    with_after: bool = False,
    options: ScoringOptions | None = None,
    ledger: Ledger | None = None,
    start: Context | None = None,
    count_start: bool = True,
) -> Iterator[tuple[int, TokenLogprobs]]:
    """Score token by token, with the `top` likeliest tokens at each place; otherwise as iter_loglikelihood() does.

    Args:
        model: from load().
        requests: (context ids, continuation ids); a continuation may be empty if `with_after`.
        top: likeliest tokens at each place.
        with_after: whether to list the likeliest tokens after each request too.
        options: chunk_tokens and progress are used.
        ledger: see loglikelihood().
        start: see loglikelihood().
        count_start: see loglikelihood().
    """
    options, ledger = options or ScoringOptions(), ledger or Ledger()
    tree = trie.build_from_lists(encode_requests(model, requests, whole=with_after), whole=with_after)
    found, completed = _Likeliest(model, tree, ledger, top, with_after), _Completed(tree)
    _count_requests(ledger, tree, start if count_start else None)
    chunks = forward_chunks(model, tree, found, options=options, ledger=ledger, start=start)
    for chunk in _with_score_errors(chunks):
        for r in completed.by(chunk):
            path = tree.path[tree.path_offset[r] : tree.path_offset[r + 1]]
            after = found.top_at(found.num_scored + r) if with_after else []
            top_lists = [found.top_at(int(place)) for place in path]
            yield r, TokenLogprobs(found.logp[path].tolist(), found.rank[path].tolist(), top_lists, after)


@torch.inference_mode()
def prefill(
    model: Model,
    token: Sequence[int],
    *,
    reuse_from: Context | None = None,
    chunk_tokens: int | None = None,
    ledger: Ledger | None = None,
) -> Context:
    """Forward a prefix that requests share, so that loglikelihood(start=...) forwards only the rest.

    Args:
        model: from load().
        token: ids, at least one.
        reuse_from: another context of this model; the tokens that both begin with are copied from it, not forwarded.
        chunk_tokens: tokens forwarded at a time; None for what suits the model's device.
        ledger: counts of this call are added to it.

    Raises:
        ScoreError: no tokens, more than the model has positions, one that its vocabulary does not have, or too little
            memory.

    Memory: keys and values of every layer, and a hidden state, for each token.

    Examples:
        >>> model = iff.load("shipped")
        >>> context = iff.prefill(model, model.tokenizer("glon are wide.")["input_ids"])
        >>> len(context.token)
        7
    """
    ledger, ids = ledger or Ledger(), [int(t) for t in token]
    if not ids:
        raise ScoreError("token: expected at least one id")
    check_fit(model, [(ids, ids[-1:])], ["context"])
    known = common_tokens(reuse_from.token, np.asarray(ids, np.int32)) if reuse_from else 0
    tree = trie.build_from_lists([(ids, [])], whole=True)
    made = _Hidden(model, len(ids))
    begun = reuse_from.prefix(known) if reuse_from and known else Context.empty(made.hidden)
    with ledger.phase("prefill"):
        ledger.request_tokens += len(ids)
        ledger.cached_tokens += known
    options = ScoringOptions(chunk_tokens)
    chunks = forward_chunks(model, tree, made, options=options, ledger=ledger, start=begun, phase="prefill")
    for _ in _with_score_errors(chunks):
        pass
    return Context(np.asarray(ids, np.int32), made.hidden, begun.cache)


def stored_context(
    model: Model,
    token: Sequence[int],
    store: ContextStore,
    *,
    label: str = "",
    chunk_tokens: int | None = None,
    ledger: Ledger | None = None,
) -> Context:
    """The context of these tokens, from the store where it is there, else forwarded and saved there.

    Of a new context only what no saved one begins with is forwarded.

    Raises:
        ScoreError: see prefill().
        ContextError: a damaged file, or a context that the store has no room for.
    """
    found = store.find(token, like=prefill(model, token[:1]))
    if found is None or len(found.token) < len(token):
        found = prefill(model, token, reuse_from=found, chunk_tokens=chunk_tokens, ledger=ledger)
        store.add(found, label)
    elif ledger is not None:
        ledger.cached_tokens += len(token)
    return found


def encode_requests(
    model: Model, requests: Sequence[TokenRequest | tuple[str, str]], *, whole: bool = False
) -> list[Encoded]:
    """Token ids of requests that are ids already or text; continuations may be empty if `whole`; raises ScoreError."""
    texts = [(a, b) for a, b in requests if isinstance(a, str) and isinstance(b, str)]
    from_text = iter(encoding.encode_pairs(model.tokenizer, texts))
    pairs: list[Encoded] = []
    for r, (context, continuation) in enumerate(requests):
        if isinstance(context, str) != isinstance(continuation, str):
            raise ScoreError(f"requests[{r}]: one part is text and the other token ids")
        if isinstance(context, str):
            pairs.append(next(from_text))
        else:  # a list stays the caller's object: the trie reads a context that many requests share only once
            ids = context if isinstance(context, list) else [int(t) for t in context]
            pairs.append((ids, [int(t) for t in continuation]))
        for name, ids in zip(("context", "continuation")[: 1 if whole else 2], pairs[-1], strict=False):
            if not ids:
                raise ScoreError(f"requests[{r}]: empty {name}")
    check_fit(model, pairs, [f"requests[{r}]" for r in range(len(pairs))], whole=whole)
    return pairs


def check_fit(model: Model, encoded: Iterable[Encoded], names: Sequence[str], *, whole: bool = False) -> None:
    """Raise ScoreError unless the model has a position for every forwarded token and every id in its vocabulary.

    Args:
        model: from load().
        encoded: (context ids, continuation ids).
        names: what errors call each.
        whole: whether the last token is forwarded too. Otherwise it is predicted only, and needs no position.
    """
    num_tokens = min(model.vocabulary, model.head.weight.shape[0])
    checked: dict[int, Sequence[int]] = {}  # contexts by identity, theirs as long as they are kept here
    for (context, continuation), name in zip(encoded, names, strict=True):
        ids = continuation if id(context) in checked else [*context, *continuation]
        checked[id(context)] = context
        for token_id in (min(ids), max(ids)) if ids else ():
            if not 0 <= token_id < num_tokens:
                raise ScoreError(f"{name}: token id {token_id}: the model's vocabulary has {num_tokens} tokens")
        over = len(context) + len(continuation) - (0 if whole else 1) - model.max_positions
        if over > 0:
            raise ScoreError(
                f"{name}: {len(context)} tokens of context and {len(continuation)} of continuation are {over} tokens "
                f"over the model's {model.max_positions} positions"
            )


class _Targets:
    """Reads the log-probability of every scored token, and whether it is the most likely one."""

    def __init__(self, model: Model, tree: trie.Trie, ledger: Ledger) -> None:
        self.model, self.ledger, self.work = model, ledger, work_of(model)
        self.logp = torch.empty(len(tree.scored_token), dtype=torch.float64)
        self.is_argmax = torch.empty(len(tree.scored_token), dtype=torch.bool)
        self.is_late = is_late(model.device)
        self._fetched: dict[int, Fetched] = {}  # by the chunk's first row
        self.extra_bytes = _results_bytes(tree)

    def __call__(self, sent: Sent, hidden: torch.Tensor) -> None:
        chunk = sent.chunk
        if not len(chunk.head_rows):
            return
        found = self.model.target_logprob(hidden[sent.head_rows], sent.target_row, sent.target_token)
        self._fetched[chunk.first_row] = Fetched(*found)
        if not self.is_late:
            self.read(chunk)
        _count_head(self.ledger, self.work, chunk)

    def read(self, chunk: trie.Chunk) -> None:
        """Have the results of a chunk, unless they are there."""
        if (fetched := self._fetched.pop(chunk.first_row, None)) is not None:
            logp, is_argmax = fetched.read()
            self.logp[chunk.target_index] = logp.double()
            self.is_argmax[chunk.target_index] = is_argmax


class _Likeliest:
    """Reads the log-probability and rank of every scored token, and the likeliest tokens at its place."""

    def __init__(self, model: Model, tree: trie.Trie, ledger: Ledger, top: int, with_after: bool) -> None:
        self.model, self.ledger, self.work, self.top = model, ledger, work_of(model), top
        self.num_scored = len(tree.scored_token)
        self.logp = torch.empty(self.num_scored)
        self.rank = torch.empty(self.num_scored, dtype=torch.int64)
        places = self.num_scored + len(tree.last_row)  # behind those of the scored tokens, those after each request
        self.top_logp, self.top_id = torch.empty(places, top), torch.empty(places, top, dtype=torch.int64)
        self.last_row = tree.last_row.long()
        self.with_after = with_after
        self.extra_bytes = _results_bytes(tree) + 3 * 4 * LOGIT_ROWS * model.head.weight.shape[0]

    def top_at(self, place: int) -> list[tuple[int, float]]:
        """(token id, log-probability), likeliest first."""
        return list(zip(self.top_id[place].tolist(), self.top_logp[place].tolist(), strict=True))

    def __call__(self, sent: Sent, hidden: torch.Tensor) -> None:
        chunk = sent.chunk
        target_row = chunk.head_rows.long()[chunk.target_row.long()]
        ended = (self.last_row >= chunk.first_row) & (self.last_row < chunk.last_row) & self.with_after
        ended = ended.nonzero()[:, 0]
        end_row = self.last_row[ended] - chunk.first_row
        for rows in torch.cat([target_row, end_row]).unique().split(LOGIT_ROWS):
            logp_RV = self.model.head.logits(hidden[rows.to(hidden.device)]).log_softmax(-1).cpu()
            values, ids = logp_RV.topk(self.top)
            for wanted, place in ((target_row, chunk.target_index), (end_row, ended + self.num_scored)):
                is_here = torch.isin(wanted, rows)
                row, where = torch.searchsorted(rows, wanted[is_here]), place[is_here]
                self.top_logp[where], self.top_id[where] = values[row], ids[row]
            is_here = torch.isin(target_row, rows)
            row, where = torch.searchsorted(rows, target_row[is_here]), chunk.target_index[is_here]
            self.logp[where] = taken = logp_RV[row, chunk.target_token.long()[is_here]]
            self.rank[where] = 1 + (logp_RV[row] > taken[:, None]).sum(-1)
        _count_head(self.ledger, self.work, chunk)


class _Hidden:
    """Reads every hidden state."""

    def __init__(self, model: Model, num_rows: int) -> None:
        weight = model.head.weight
        self.hidden = torch.empty(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        self.extra_bytes = 0  # it is there already

    def __call__(self, sent: Sent, hidden: torch.Tensor) -> None:
        self.hidden[sent.chunk.first_row : sent.chunk.last_row] = hidden


def _results_bytes(tree: trie.Trie) -> int:
    return 16 * len(tree.scored_token) + 160 * len(tree.path_offset)  # the caller's, mostly


def _count_head(ledger: Ledger, work: Work, chunk: trie.Chunk) -> None:
    ledger.head_tokens += len(chunk.head_rows)
    ledger.scored_tokens += len(chunk.target_index)
    ledger.flops += len(chunk.head_rows) * work.head_flops


def _count_requests(ledger: Ledger, tree: trie.Trie, start: Context | None) -> None:
    with ledger.phase("query"):
        ledger.request_tokens += tree.request_tokens
        if start is not None:
            ledger.cached_tokens += min(len(start.token), len(tree.token))


def _with_score_errors(chunks: Iterator[trie.Chunk]) -> Iterator[trie.Chunk]:
    try:
        yield from chunks
    except (StartError, memory.BudgetError) as error:
        raise ScoreError(str(error)) from error


def _after_the_next(chunks: Iterator[trie.Chunk]) -> Iterator[trie.Chunk]:
    """Each chunk when the next one is on its way."""
    before = None
    for chunk in chunks:
        if before is not None:
            yield before
        before = chunk
    if before is not None:
        yield before


class _Completed:
    """Which requests each chunk completes: along a path rows ascend, so it is the chunk that has their last row."""

    def __init__(self, tree: trie.Trie) -> None:
        self._last_row = tree.last_row.numpy()
        self._order = np.argsort(self._last_row, kind="stable")
        self._num_done = 0

    def by(self, chunk: trie.Chunk) -> list[int]:
        """Indices of the requests that are complete with this chunk and were not before; chunks come in order."""
        first = self._num_done
        self._num_done = int(np.searchsorted(self._last_row, chunk.last_row, sorter=self._order))
        found: list[int] = sorted(self._order[first : self._num_done].tolist())
        return found
