"""Shards: every request in one, stems that are shared, FLOPs counted node by node, the same bits wherever they run."""

import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_ft_fast.engine import shards
from icl_ft_fast.engine.flops import Work, work_of
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood

WORK = Work(row_flops=10, head_flops=0, attention=((None, 1), (3, 2)), weight_bytes=0, kv_row_bytes=0)
TOKENS = st.lists(st.sampled_from([2, 3]), min_size=1, max_size=6)
REQUESTS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=40)
RNG = random.Random(0)
CONTEXTS = [[0, *RNG.choices(range(2, 300), k=60)] for _ in range(2)]
TWO = [
    ([*context, *RNG.choices(range(2, 300), k=5)], RNG.choices(range(2, 300), k=3))
    for context in CONTEXTS
    for _ in range(20)
]


def row_flops(depth):
    """Of a row, by definition."""
    return WORK.row_flops + (depth + 1) + 2 * min(depth + 1, 3)


def rows_of(request):
    """What is forwarded of a request: every prefix but the whole."""
    ids = (*request[0], *request[1])
    return {ids[: n + 1] for n in range(len(ids) - 1)}


def test_path_flops_are_the_rows_own():
    assert list(WORK.path_flops(6)) == [0, *accumulate(row_flops(d) for d in range(6))]
    assert WORK.path_flops(6)[-1] == WORK.flops(torch.arange(6), 0)


@settings(deadline=None)
@given(requests=REQUESTS, shard_tokens=st.integers(1, 12))
def test_shards_are_a_partition_and_their_flops_are_counted(requests, shard_tokens):
    cuts = shards.cut(requests, WORK, shard_tokens=shard_tokens)
    assert sorted(r for one in cuts for r in one.members) == list(range(len(requests)))
    longest = max(len(a) + len(b) - 1 for a, b in requests)
    goal = shard_tokens * sum(row_flops(d) for d in range(longest)) / longest
    for one in cuts:
        whole = [[*requests[r][0], *requests[r][1]] for r in one.members]
        assert all(ids[: one.stem_tokens] == whole[0][: one.stem_tokens] for ids in whole)
        rows = set().union(*(rows_of(requests[r]) for r in one.members))
        assert one.flops == sum(row_flops(len(row) - 1) for row in rows if len(row) > one.stem_tokens)
        # Above twice the goal is only what nothing could divide: all of it behind one more token.
        following = {tuple(ids[: one.stem_tokens + 1]) for ids in whole}
        assert one.flops <= 2 * goal or len(following) == 1


@settings(deadline=None)
@given(requests=REQUESTS, shard_tokens=st.integers(1, 12), seed=st.integers(0, 9))
def test_shards_do_not_depend_on_the_order_of_requests(requests, shard_tokens, seed):
    def named(given):
        cuts = shards.cut(given, WORK, shard_tokens=shard_tokens)
        return [task.name for task in shards.jobs_of(given, cuts, WORK, {})]

    assert named(requests) == named(random.Random(seed).sample(requests, len(requests)))


def test_names_stand_for_everything_a_result_depends_on():
    def name(requests, **identity):
        (one,) = shards.jobs_of(requests, shards.cut(requests, WORK), WORK, identity)
        return one.name

    names = [
        name([([2, 3], [4])]),
        name([([2], [3, 4])]),
        name([([2, 3], [5])]),
        name([([2, 3], [4])] * 2),
        name([([2, 3], [4])], model="a"),
        name([([2, 3], [4])], model="b"),
    ]
    assert len(set(names)) == len(names)
    assert name([([2, 3], [4])]) == names[0]


def test_contexts_are_stems_and_each_is_forwarded_once(llama):
    cuts = shards.cut(TWO, work_of(llama), shard_tokens=32)
    assert len(cuts) > 6
    assert {one.stem_tokens for one in cuts} == {61}
    tasks = shards.jobs_of(TWO, cuts, work_of(llama), {})
    groups = [task.group for task in tasks]
    assert groups == sorted(groups, key=groups.index)
    assert len(set(groups)) == 2
    scorer, ledger = shards.Scorer(llama), Ledger()
    for task in tasks:
        ledger.include(scorer(task.work)["ledger"])
    apart = Ledger()
    for n in (0, 20):  # the two share their first token only
        loglikelihood(llama, TWO[n : n + 20], ledger=apart)
    assert (ledger.forwarded_tokens, ledger.request_tokens) == (apart.forwarded_tokens, apart.request_tokens)
    assert ledger.phases["prefill"].forwarded_tokens == 2 * 61


@pytest.mark.parametrize("stem_tokens", [0, 30])
def test_results_are_those_of_one_trie(llama, stem_tokens):
    requests = [([*CONTEXTS[0], *a], b) for a, b in TWO] + [
        (CONTEXTS[0], [7]),
        (CONTEXTS[0], [7]),
        (CONTEXTS[0][:59], [9, 8]),
    ]
    cuts = shards.cut(requests, work_of(llama), shard_tokens=64, stem_tokens=stem_tokens)
    scorer = shards.Scorer(llama, chunk_tokens=32)
    results = [scorer(task.work) for task in shards.jobs_of(requests, cuts, work_of(llama), {})]
    for got, expected in zip(shards.in_order(cuts, results), loglikelihood(llama, requests), strict=True):
        assert got.logp == pytest.approx(expected.logp, abs=1e-5)
        assert got.is_greedy == expected.is_greedy


def test_a_single_request_whose_rows_are_all_stem(llama):
    requests = [([0, 5, 6], [7])]
    (one,) = shards.jobs_of(requests, shards.cut(requests, work_of(llama)), work_of(llama), {})
    assert one.work.stem == (0, 5, 6)
    (expected,) = loglikelihood(llama, requests)
    assert shards.Scorer(llama)(one.work)["logp_is_greedy"][0].logp == pytest.approx(expected.logp, abs=1e-6)


def test_a_shard_has_the_same_bits_whatever_was_scored_before(llama):
    tasks = shards.jobs_of(TWO, shards.cut(TWO, work_of(llama), shard_tokens=32), work_of(llama), {})
    alone = [shards.Scorer(llama)(task.work)["logp_is_greedy"] for task in tasks]
    for seed in range(3):
        scorer = shards.Scorer(llama)
        for i in random.Random(seed).sample(range(len(tasks)), len(tasks)):
            assert scorer(tasks[i].work)["logp_is_greedy"] == alone[i]


def test_nothing_to_cut():
    assert shards.cut([], WORK) == []
    assert shards.jobs_of([], [], WORK, {}) == []
