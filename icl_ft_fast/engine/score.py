"""Log-likelihoods of continuations and of multiple-choice questions: one trie for all requests of a call.

What requests have in common can be forwarded beforehand, by prefill(), and kept for the calls that start from it.

The path of a request: encoding -> trie.build -> trie.plan -> Model.forward_chunk -> Model.target_logprob -> path sums.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from icl_ft_fast.engine import encoding, memory, trie
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.kv_cache import Context, KVCache, common_tokens
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import CHUNK_TOKENS, Model
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.tasks.task import Question

_log = logging.getLogger(__name__)


class ScoreError(UserError):
    """A request that cannot be scored; the message names it."""


class LogLikelihood(NamedTuple):
    """log P(continuation | context), natural log, summed; and whether greedy decoding would have written it."""

    logp: float
    is_greedy: bool


@dataclass(frozen=True)
class Score:
    """What the model makes of one question.

    Attributes:
        question_id: the question's id.
        logp: natural-log likelihood of each choice, summed over its tokens.
        num_tokens: tokens of each choice.
        is_greedy: whether greedy decoding would have written the choice.
        predicted: index of the most likely choice (the first of equals).
        answer: index of the correct choice, None if unknown.
        also_correct: indices of further correct choices.
    """

    question_id: str
    logp: tuple[float, ...]
    num_tokens: tuple[int, ...]
    is_greedy: tuple[bool, ...]
    predicted: int
    answer: int | None
    also_correct: tuple[int, ...] = ()

    @property
    def is_correct(self) -> bool | None:
        """Whether the prediction is a correct choice; None where the answer is unknown."""
        return None if self.answer is None else self.predicted in (self.answer, *self.also_correct)


TokenRequest = tuple[Sequence[int], Sequence[int]]


def loglikelihood(
    model: Model,
    requests: Sequence[TokenRequest | tuple[str, str]],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    shared_tokens: int = 0,
    ledger: Ledger | None = None,
    progress: bool = False,
    start: Context | None = None,
) -> list[LogLikelihood]:
    """Score (context, continuation) pairs, given as token ids (taken as they are) or as text (see encoding.py).

    Args:
        model: from load().
        requests: pairs; a continuation has at least one token, and so has a context of token ids.
        chunk_tokens: rows forwarded at a time, fewer where model.memory asks for it; results do not depend on it beyond
            rounding.
        shared_tokens: leading tokens that all requests have in common and that count as the ledger's phase "prefill";
            everything else forwarded is its phase "query".
        ledger: counts of this call are added to it.
        progress: show a bar of forwarded rows.
        start: from prefill() with this model; every request begins with its tokens, and they are not forwarded again.

    Returns:
        One LogLikelihood a request, in the order given.

    Raises:
        ScoreError: an empty continuation or context, more tokens than the model has positions, a token id that its
            vocabulary does not have, a request that does not begin with `start`, or too little memory.
    """
    encoded = _encode(model, requests)
    results = dict(_run(model, encoded, chunk_tokens, ledger or Ledger(), progress, start, shared_tokens))
    return [results[r] for r in range(len(requests))]


def iter_loglikelihood(
    model: Model,
    requests: Sequence[TokenRequest | tuple[str, str]],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    ledger: Ledger | None = None,
    progress: bool = False,
    start: Context | None = None,
) -> Iterator[tuple[int, LogLikelihood]]:
    """Score as loglikelihood() does, each (index of the request, result) yielded as soon as its chunk is done."""
    yield from _run(model, _encode(model, requests), chunk_tokens, ledger or Ledger(), progress, start)


@torch.inference_mode()
def prefill(
    model: Model,
    token: Sequence[int],
    *,
    near: Context | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    ledger: Ledger | None = None,
) -> Context:
    """Forward a beginning that requests have in common, so that loglikelihood(start=...) forwards the rest only.

    Args:
        model: from load().
        token: ids, at least one.
        near: another context of this model; what it has in common with this one is copied, not forwarded.
        chunk_tokens: rows forwarded at a time.
        ledger: counts of this call are added to it.

    Raises:
        ScoreError: no tokens, more than the model has positions, one that its vocabulary does not have, or too little
            memory.

    Memory: keys and values of every layer, and a hidden state, for each token.
    """
    is_counted, ledger = ledger is not None, ledger or Ledger()
    ids = [int(t) for t in token]
    if not ids:
        raise ScoreError("token: expected at least one id")
    check_fit(model, [(ids, ids[-1:])], ["context"])
    known = common_tokens(near.token, np.asarray(ids, np.int32)) if near else 0
    tree = trie.build_from_lists([(ids, [0])])  # a placeholder child makes the last token a row
    weight = model.head.weight
    hidden = torch.empty(len(ids), weight.shape[1], dtype=weight.dtype, device=weight.device)
    plan, cache = _fit(model, tree, chunk_tokens, known=known, extra_bytes=hidden.nbytes)
    if near and known:
        hidden[:known] = near.hidden[:known]
        near.cache.copy(known, cache)
    work = work_of(model)

    def forward(chunk: trie.Chunk) -> None:
        if chunk.first_row >= known:
            hidden[chunk.first_row : chunk.last_row] = model.forward_chunk(chunk, cache)
            ledger.ran(work, tree.depth[chunk.first_row : chunk.last_row], chunk.cached_rows, 0)

    with ledger.phase("prefill"):
        for _ in _by_chunk(plan, cache, forward):
            pass
        ledger.request_tokens += len(ids)
        ledger.cached_tokens += known
        ledger.forwarded_tokens += len(ids) - known
        ledger.kv_bytes += cache.nbytes
    return Context(np.asarray(ids, np.int32), hidden, cache, is_counted)


def stored_context(
    model: Model,
    token: Sequence[int],
    store: ContextStore,
    *,
    label: str = "",
    chunk_tokens: int = CHUNK_TOKENS,
    ledger: Ledger | None = None,
) -> Context:
    """The context of these tokens, mapped from the store or forwarded (what no saved beginning has) and saved there.

    Raises:
        ScoreError: see prefill().
        ContextError: a damaged file, or a context that the store has no room for.
    """
    found = store.find(token, like=prefill(model, token[:1]))
    if found is None or len(found.token) < len(token):
        found = prefill(model, token, near=found, chunk_tokens=chunk_tokens, ledger=ledger)
        store.add(found, label)
    elif ledger is not None:
        ledger.cached_tokens += len(token)
        found.is_counted = True
    return found


class TokenLogprobs(NamedTuple):
    """Of each token of a continuation: its log-probability, its rank (1 is the most likely), and the likeliest tokens.

    `top` has a list a token, of (token id, log-probability), likeliest first.
    """

    logp: list[float]
    rank: list[int]
    top: list[list[tuple[int, float]]]


LOGIT_ROWS = 64  # rows whose log-probabilities of the whole vocabulary are held at a time


@torch.inference_mode()
def iter_token_logprobs(
    model: Model,
    requests: Sequence[TokenRequest],
    *,
    top: int = 1,
    chunk_tokens: int = CHUNK_TOKENS,
    ledger: Ledger | None = None,
    start: Context | None = None,
) -> Iterator[tuple[int, TokenLogprobs]]:
    """Score token by token, with the `top` likeliest tokens at each place; otherwise as iter_loglikelihood() does."""
    tree = trie.build_from_lists(_encode(model, requests))
    num_scored = len(tree.scored_token)
    logp, rank = torch.empty(num_scored), torch.empty(num_scored, dtype=torch.int64)
    top_logp, top_id = torch.empty(num_scored, top), torch.empty(num_scored, top, dtype=torch.int64)

    def head(chunk: trie.Chunk, needed: torch.Tensor) -> None:
        for first in range(0, len(chunk.target_index), LOGIT_ROWS):
            block = slice(first, first + LOGIT_ROWS)
            where, row, target = (t[block].long() for t in (chunk.target_index, chunk.target_row, chunk.target_token))
            row -= int(row[0])
            hidden = needed[int(chunk.target_row[first]) :][: int(row[-1]) + 1]
            logp_RV = model.head.logits(hidden).log_softmax(-1).cpu()
            logp[where] = taken = logp_RV[row, target]
            rank[where] = 1 + (logp_RV[row] > taken[:, None]).sum(-1)
            values, ids = logp_RV.topk(top)
            top_logp[where], top_id[where] = values[row], ids[row]

    logit_bytes = 3 * 4 * LOGIT_ROWS * model.head.weight.shape[0]
    for completed in _forward(
        model, tree, chunk_tokens, ledger or Ledger(), False, start, head, extra_bytes=logit_bytes
    ):
        for r in completed:
            path = tree.path[tree.path_offset[r] : tree.path_offset[r + 1]]
            likeliest = zip(top_id[path].tolist(), top_logp[path].tolist(), strict=True)
            pairs = [list(zip(ids, values, strict=True)) for ids, values in likeliest]
            yield r, TokenLogprobs(logp[path].tolist(), rank[path].tolist(), pairs)


def iter_scores(
    model: Model,
    questions: Sequence[Question],
    *,
    context: str = "",
    chunk_tokens: int = CHUNK_TOKENS,
    ledger: Ledger | None = None,
    progress: bool = False,
    store: ContextStore | None = None,
) -> Iterator[Score]:
    """Score multiple-choice questions, each yielded as soon as its last choice is done; see score()."""
    for _, result in _scored(model, questions, context, chunk_tokens, ledger, progress, store):
        yield result


def _scored(
    model: Model,
    questions: Sequence[Question],
    context: str,
    chunk_tokens: int,
    ledger: Ledger | None,
    progress: bool,
    store: ContextStore | None,
) -> Iterator[tuple[int, Score]]:
    """Yield (question index, score) as questions are done."""
    ledger = ledger or Ledger()
    encoded, shared = encode_questions(model, questions, context, ledger)
    owner = [q for q, its in enumerate(encoded) for _ in its]
    first = [0, *itertools.accumulate(map(len, encoded))]
    waiting = [len(its) for its in encoded]
    results: dict[int, LogLikelihood] = {}
    start = None
    if store is not None and shared:
        with ledger.phase("context"):
            start = stored_context(
                model, shared, store, label=" ".join(context.split())[:60], chunk_tokens=chunk_tokens, ledger=ledger
            )
    requests = [request for its in encoded for request in its]
    for r, result in _run(model, requests, chunk_tokens, ledger, progress, start, len(shared)):
        results[r] = result
        q = owner[r]
        waiting[q] -= 1
        if not waiting[q]:
            yield q, score_of(questions[q], encoded[q], [results.pop(i) for i in range(first[q], first[q + 1])])


def encode_questions(
    model: Model, questions: Sequence[Question], context: str, ledger: Ledger
) -> tuple[list[list[tuple[list[int], list[int]]]], list[int]]:
    """Token ids of every question's choices after context + prompt, and the tokens of `context` that all begin with.

    Raises:
        ScoreError: as score() does.
    """
    pairs = [(context + question.prompt, choice) for question in questions for choice in question.choices]
    with ledger.phase("tokenise"):
        encoded = encoding.encode_pairs(model.tokenizer, pairs)
        (shared,) = encoding.encode(model.tokenizer, [context.rstrip()]) if context.strip() else ([],)
    requests = iter(encoded)
    by_question = []
    for question in questions:
        if not question.choices:
            raise ScoreError(f"question {question.id!r}: choices: expected at least one")
        by_question.append([next(requests) for _ in question.choices])
        for choice, (_, continuation) in enumerate(by_question[-1]):
            if not continuation:
                raise ScoreError(
                    f"question {question.id!r}: choices[{choice}]: no token of its own: empty, or merged into the end "
                    "of the prompt by the tokenizer (begin the choice with a space or end the prompt before one)"
                )
    check_fit(model, encoded, [f"question {question.id!r}" for question in questions for _ in question.choices])
    for ids in {id(ids): ids for ids, _ in encoded}.values():  # less what a token that spans its end changes
        shared = shared[: encoding.common(shared, ids)]
    return by_question, shared


def score_of(
    question: Question, encoded: Sequence[tuple[list[int], list[int]]], results: Sequence[LogLikelihood]
) -> Score:
    """The score of a question whose choices, as encode_questions() made them, have these results."""
    logp = tuple(result.logp for result in results)
    return Score(
        question_id=question.id,
        logp=logp,
        num_tokens=tuple(len(continuation) for _, continuation in encoded),
        is_greedy=tuple(result.is_greedy for result in results),
        predicted=max(range(len(logp)), key=logp.__getitem__),
        answer=question.answer,
        also_correct=question.also_correct,
    )


def score(
    model: Model,
    questions: Sequence[Question],
    *,
    context: str = "",
    chunk_tokens: int = CHUNK_TOKENS,
    ledger: Ledger | None = None,
    progress: bool = False,
    store: ContextStore | None = None,
) -> list[Score]:
    """Score multiple-choice questions by the likelihood of each choice after context + prompt.

    Args:
        model: from load().
        questions: prompts and choices; choices are not shown to the model.
        context: text before every prompt, forwarded once.
        chunk_tokens: rows forwarded at a time, fewer where model.memory asks for it; results do not depend on it beyond
            rounding.
        ledger: counts of this call are added to it.
        progress: show a bar of forwarded rows.
        store: of saved contexts; `context` is taken from it, or forwarded and saved there.

    Returns:
        One Score a question, in the order given.

    Raises:
        ScoreError: a choice without a token of its own, more tokens than the model has positions, or too little memory.
    """
    scores = dict(_scored(model, questions, context, chunk_tokens, ledger, progress, store))
    return [scores[q] for q in range(len(questions))]


def _encode(model: Model, requests: Sequence[TokenRequest | tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of requests that are ids already or text; raises ScoreError."""
    texts = [(a, b) for a, b in requests if isinstance(a, str) and isinstance(b, str)]
    from_text = iter(encoding.encode_pairs(model.tokenizer, texts))
    pairs: list[tuple[list[int], list[int]]] = []
    for r, (context, continuation) in enumerate(requests):
        if isinstance(context, str) != isinstance(continuation, str):
            raise ScoreError(f"requests[{r}]: one part is text and the other token ids")
        if isinstance(context, str):
            pairs.append(next(from_text))
        else:  # a list stays the caller's object: the trie reads a context that many requests share only once
            ids = context if isinstance(context, list) else [int(t) for t in context]
            pairs.append((ids, [int(t) for t in continuation]))
        for name, ids in zip(("context", "continuation"), pairs[-1], strict=True):
            if not ids:
                raise ScoreError(f"requests[{r}]: empty {name}")
    check_fit(model, pairs, [f"requests[{r}]" for r in range(len(pairs))])
    return pairs


def check_fit(model: Model, encoded: Iterable[tuple[list[int], list[int]]], names: Sequence[str]) -> None:
    """Raise unless the model has a position for every forwarded token and every id in its vocabulary."""
    num_tokens = min(model.vocabulary, model.head.weight.shape[0])
    checked: dict[int, Sequence[int]] = {}  # contexts by identity, theirs as long as they are kept here
    # The last token needs no position of its own: it is predicted, never forwarded.
    for (context, continuation), name in zip(encoded, names, strict=True):
        ids = continuation if id(context) in checked else [*context, *continuation]
        checked[id(context)] = context
        for token_id in (min(ids), max(ids)):
            if not 0 <= token_id < num_tokens:
                raise ScoreError(f"{name}: token id {token_id}: the model's vocabulary has {num_tokens} tokens")
        over = len(context) + len(continuation) - 1 - model.max_positions
        if over > 0:
            raise ScoreError(
                f"{name}: {len(context)} tokens of context and {len(continuation)} of continuation are {over} tokens "
                f"over the model's {model.max_positions} positions"
            )


@torch.inference_mode()
def _run(
    model: Model,
    requests: list[tuple[list[int], list[int]]],
    chunk_tokens: int,
    ledger: Ledger,
    progress: bool,
    start: Context | None = None,
    shared_tokens: int = 0,
) -> Iterator[tuple[int, LogLikelihood]]:
    """Yield (request index, result) as chunks complete them."""
    tree = trie.build_from_lists(requests)
    logp = torch.empty(len(tree.scored_token), dtype=torch.float64)
    is_argmax = torch.empty(len(tree.scored_token), dtype=torch.bool)

    def head(chunk: trie.Chunk, needed: torch.Tensor) -> None:
        if len(needed):
            values, flags = model.target_logprob(needed, chunk.target_row, chunk.target_token)
            logp[chunk.target_index] = values.double().cpu()
            is_argmax[chunk.target_index] = flags.cpu()

    for completed in _forward(model, tree, chunk_tokens, ledger, progress, start, head, shared_tokens):
        for r in completed:
            path = tree.path[tree.path_offset[r] : tree.path_offset[r + 1]]
            yield r, LogLikelihood(logp[path].sum().item(), bool(is_argmax[path].all()))


def _forward(
    model: Model,
    tree: trie.Trie,
    chunk_tokens: int,
    ledger: Ledger,
    progress: bool,
    start: Context | None,
    head: Callable[[trie.Chunk, torch.Tensor], None],
    shared_tokens: int = 0,
    extra_bytes: int = 0,
) -> Iterator[list[int]]:
    """Call `head` with each chunk and the hidden states of its head rows, and yield the requests that it completes."""
    known = 0 if start is None else min(len(start.token), len(tree.token))
    if start is not None and known:
        begins = torch.from_numpy(start.token[:known]).equal(tree.token[:known])
        if not begins or not (tree.end[:known] == len(tree.token)).all():
            raise ScoreError("start: not every request begins with its tokens")
    shared_rows = int((tree.end[:shared_tokens] == len(tree.end)).int().cumprod(0).sum())
    plan, cache = _fit(model, tree, chunk_tokens, start, known, shared_rows, extra_bytes)
    work = work_of(model)
    with ledger.phase("query"):
        ledger.request_tokens += tree.request_tokens
        if start is not None and not start.is_counted:
            ledger.cached_tokens += known
    if start is not None:
        start.is_counted = False

    def run(chunk: trie.Chunk) -> None:
        with ledger.phase("prefill" if known < chunk.last_row <= shared_rows else "query"):
            if start is not None and chunk.first_row < known:
                hidden = start.hidden[chunk.first_row : chunk.last_row]
                ledger.flops += len(chunk.head_rows) * work.head_flops
            else:
                hidden = model.forward_chunk(chunk, cache)
                if chunk.first_row == known:
                    ledger.kv_bytes += plan.capacity * model.footprint.kv_row_bytes
                depth = tree.depth[chunk.first_row : chunk.last_row]
                ledger.ran(work, depth, chunk.cached_rows, len(chunk.head_rows))
                ledger.forwarded_tokens += len(chunk.token)
            ledger.head_tokens += len(chunk.head_rows)
            ledger.scored_tokens += len(chunk.target_index)
        with ledger.phase("query"):
            head(chunk, hidden[chunk.head_rows.to(hidden.device)])

    # Along a path rows ascend, so a request is complete with the chunk that has its last scored node's row.
    last_row = tree.scored_row.numpy()[tree.path.numpy()[tree.path_offset.numpy()[1:] - 1]]
    order = np.argsort(last_row, kind="stable")
    num_done = 0
    with tqdm(total=len(tree.token), initial=known, desc="scoring", unit="row", disable=not progress, delay=1) as bar:
        for chunk in _by_chunk(plan, cache, run):
            bar.update(max(0, chunk.last_row - max(known, chunk.first_row)))
            completed = order[num_done : np.searchsorted(last_row, chunk.last_row, sorter=order)]
            num_done += len(completed)
            yield sorted(completed.tolist())


def _fit(
    model: Model,
    tree: trie.Trie,
    chunk_tokens: int,
    start: Context | None = None,
    known: int = 0,
    cut: int = 0,
    extra_bytes: int = 0,
) -> tuple[trie.Plan, KVCache]:
    """The plan that fits the model's memory, and its cache, on which `start` is already; raises ScoreError."""
    room = start.cache.capacity if start is not None and start.cache.kv_dtype == model.memory.kept else 0
    results_bytes = 16 * len(tree.scored_token) + 160 * len(tree.path_offset)  # the caller's, mostly
    try:
        plan, need = memory.fit(
            tree,
            chunk_tokens,
            model.memory,
            model.footprint,
            model.device,
            known=known,
            cut=cut,
            room=room,
            extra_bytes=extra_bytes + results_bytes,
        )
    except memory.BudgetError as error:
        raise ScoreError(str(error)) from error
    cache = model.new_cache(plan.capacity, need.folder if need.offloaded_bytes else None)
    return plan, cache if start is None else start.open(cache)


def _by_chunk(plan: trie.Plan, cache: KVCache, run: Callable[[trie.Chunk], None]) -> Iterator[trie.Chunk]:
    """Run chunks in turn, each yielded when it is done; one that memory runs out on, and all after it, in halves."""
    k = 0
    while k < len(plan.chunks):
        chunk = plan.chunks[k]
        rows = chunk.last_row - chunk.first_row
        try:
            run(chunk)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error) or rows == 1 or cache.rows < 0:  # nothing to halve, or the cache is lost
                raise
            _log.warning(
                "memory: ran out with %d rows at a time: going on with %d (%s)", rows, (rows + 1) // 2, str(error)
            )
        else:
            yield chunk
            k += 1
            continue
        cache.rows = chunk.cached_rows  # what the chunk has added is forgotten
        plan, k = plan.halved(k), 0
