"""Contexts: what starts from one scores as if it did not and forwards its own rows only."""

import random
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_ft_fast.engine.kv_cache import ContextCache
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import ScoreError, ScoringOptions, iter_token_logprobs, loglikelihood, prefill

RNG = random.Random(0)
CONTEXT = [0, *RNG.choices(range(2, 300), k=40)]
PART = st.lists(st.sampled_from([5, 6, 299]), min_size=1, max_size=5)


def ids(token):
    return np.asarray(token, np.int32)


def cache_of(llama, *sequences, max_bytes=2**30):
    cache = ContextCache(max_bytes)
    for token in sequences:
        cache.add(prefill(llama, token))
    return cache


@settings(max_examples=20, deadline=None)
@given(
    tails=st.lists(st.tuples(PART, PART), min_size=1, max_size=6),
    length=st.integers(1, len(CONTEXT)),
    inside=st.integers(0, 3),
    chunk_tokens=st.sampled_from([1, 7, 512]),
)
def test_scores_are_those_without_it_and_only_new_rows_are_forwarded(llama, tails, length, inside, chunk_tokens):
    requests = [([*CONTEXT, *context], continuation) for context, continuation in tails]
    requests += [(CONTEXT[: n + 1], CONTEXT[n + 1 :]) for n in range(inside)]  # probabilities within the context
    start, alone, ledger = prefill(llama, CONTEXT[:length], chunk_tokens=chunk_tokens), Ledger(), Ledger()
    expected = loglikelihood(llama, requests, ledger=alone)
    for _ in range(2):  # the first run leaves the context as it found it
        got = loglikelihood(llama, requests, start=start, chunk_tokens=chunk_tokens, ledger=ledger)
        for one, other, (_, continuation) in zip(got, expected, requests, strict=True):
            assert one.logp == pytest.approx(other.logp, rel=0, abs=1e-5 * len(continuation))
            assert one.is_greedy == other.is_greedy
    assert ledger.forwarded_tokens == 2 * (alone.forwarded_tokens - length)
    assert ledger.cached_tokens == 2 * length
    assert (ledger.head_tokens, ledger.scored_tokens) == (2 * alone.head_tokens, 2 * alone.scored_tokens)


def test_probabilities_within_a_context_forward_nothing(llama):
    start, ledger = prefill(llama, CONTEXT), Ledger()
    requests = [(CONTEXT[:1], CONTEXT[1:]), (CONTEXT[:7], CONTEXT[7:12]), (CONTEXT[:-1], CONTEXT[-1:])]
    got = loglikelihood(llama, requests, start=start, ledger=ledger)
    expected = loglikelihood(llama, requests)
    assert [one.logp for one in got] == pytest.approx([one.logp for one in expected], rel=0, abs=1e-4)
    assert (ledger.forwarded_tokens, ledger.cached_tokens) == (0, len(CONTEXT) - 1)


def test_a_context_near_another_forwards_what_differs(llama):
    parted = [*CONTEXT[:25], 7, 8, 9]
    near, ledger = prefill(llama, CONTEXT), Ledger()
    got = prefill(llama, parted, reuse_from=near, ledger=ledger)
    want = prefill(llama, parted)
    torch.testing.assert_close(got.hidden, want.hidden, rtol=1e-5, atol=1e-5)
    assert (ledger.forwarded_tokens, ledger.cached_tokens) == (3, 25)
    request = [([*parted, 4], [11, 12])]
    assert loglikelihood(llama, request, start=got)[0].logp == pytest.approx(
        loglikelihood(llama, request)[0].logp, rel=0, abs=2e-5
    )
    again = [([*CONTEXT, 4], [11])]  # the near one is untouched
    assert loglikelihood(llama, again, start=near)[0].logp == pytest.approx(
        loglikelihood(llama, again)[0].logp, rel=0, abs=1e-5
    )


@pytest.mark.parametrize(
    "requests", [[([6, 7], [8])], [(CONTEXT[:3], [299, 4])], [([*CONTEXT, 5], [6]), ([5, 6], [7])]]
)
def test_requests_that_begin_otherwise_are_refused(llama, requests):
    start = prefill(llama, CONTEXT)
    with pytest.raises(ScoreError, match=r"^start: not every request begins with its tokens$"):
        loglikelihood(llama, requests, start=start)


@pytest.mark.parametrize(
    ("token", "message"),
    [([], "^token: expected at least one id$"), ([300], "^context: token id 300"), ([5] * 257, "^context: 257 tokens")],
)
def test_contexts_that_cannot_be_forwarded_are_refused(llama, token, message):
    with pytest.raises(ScoreError, match=message):
        prefill(llama, token)


def test_token_logprobs_are_those_of_plain_forwards(llama, plain_llama, monkeypatch):
    monkeypatch.setattr(
        import_module("icl_ft_fast.engine.likelihood"), "LOGIT_ROWS", 3
    )  # blocks that end between siblings
    requests = [([*CONTEXT, 4], [5, 6, 7]), ([*CONTEXT, 4], [5, 9]), (CONTEXT[:1], [*CONTEXT[1:], 8])]
    requests += [([*CONTEXT, 4], [n]) for n in range(20, 28)]
    for start in (None, prefill(llama, CONTEXT[:20])):
        results = dict(iter_token_logprobs(llama, requests, top=4, start=start, options=ScoringOptions(16)))
        for r, (context, continuation) in enumerate(requests):
            with torch.no_grad():
                logits = plain_llama(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
            want = logits.double().log_softmax(-1)
            target = want.gather(-1, torch.tensor(continuation)[:, None])
            assert results[r].logp == pytest.approx(target[:, 0].tolist(), abs=1e-5)
            assert results[r].rank == ((want > target).sum(-1) + 1).tolist()
            values, likeliest = want.topk(4)
            assert [[token for token, _ in top] for top in results[r].top] == likeliest.tolist()
            got = torch.tensor([[logp for _, logp in top] for top in results[r].top], dtype=torch.float64)
            torch.testing.assert_close(got, values, rtol=0, atol=1e-5)


def test_the_longest_context_that_fits_is_found(llama):
    cache = cache_of(llama, CONTEXT[:5], CONTEXT[:20], [0, 9, 9])
    assert len(cache.find(ids(CONTEXT)).token) == 20
    assert len(cache.find(ids([*CONTEXT[:19], 299])).token) == 5
    assert len(cache.find(ids([*CONTEXT[:19], 299]), whole=False).token) == 20
    assert cache.find(ids([7, 8])) is cache.find(ids([7]), whole=False) is None


def test_the_least_recently_used_go_first(llama):
    size = prefill(llama, CONTEXT).nbytes
    cache = cache_of(llama, CONTEXT, [1, *CONTEXT[1:]], max_bytes=2 * size)
    cache.find(ids([*CONTEXT, 5]))
    cache.add(prefill(llama, [2, *CONTEXT[1:]]))
    assert (len(cache), cache.nbytes) == (2, 2 * size)
    assert cache.find(ids([1, *CONTEXT[1:]])) is None
    start = cache.find(ids(CONTEXT))
    loglikelihood(llama, [([*CONTEXT, *range(5, 25)], [6])], start=start)  # its cache has grown
    assert start.nbytes > size
    cache.trim()
    assert len(cache) == 1
    assert cache.find(ids(CONTEXT)) is start
    assert len(cache_of(llama, CONTEXT, max_bytes=size - 1)) == 0
