"""The trie against sets of Python tuples, and the planner against a simulated KV cache."""

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.timing import peak_bytes
from icl_ft_fast import _C
from icl_ft_fast.engine import trie

TOKEN = st.sampled_from([0, 1, 7, 2**31 - 1])
PART = st.lists(TOKEN, min_size=1, max_size=5).map(tuple)
# Stretches of one long text agree over several blocks of the comparison and part anywhere in one.
TEXT = tuple(i * i % 97 for i in range(200))
STRETCH = st.integers(1, 200).map(lambda n: TEXT[:n])
# Its first few tokens, split anywhere: many requests then spell the same path.
SPLIT = st.integers(2, 5).flatmap(lambda n: st.integers(1, n - 1).map(lambda c: (TEXT[:c], TEXT[c:n])))
REQUESTS = (
    st.lists(st.tuples(PART, PART), max_size=12)
    | st.lists(st.tuples(STRETCH, PART | STRETCH), max_size=5)
    | st.lists(SPLIT, max_size=4)
)


def naive(requests, whole=False):
    """Every array of the trie, as lists; a node is the tuple of its tokens, and sorting tuples is pre-order."""
    paths = [[(c + t)[:n] for n in range(1, len(c + t) + 1)] for c, t in requests]
    nodes = sorted({p for path in paths for p in path})
    rows = nodes if whole else sorted({p[:-1] for p in nodes if len(p) > 1})
    ends = [path[len(c) :] for path, (c, _) in zip(paths, requests, strict=True)]
    scored = sorted({p for end in ends for p in end})
    node_index, row_index, scored_index = ({p: i for i, p in enumerate(x)} for x in (nodes, rows, scored))
    node_size, row_size = (Counter(p[:n] for p in x for n in range(1, len(p) + 1)) for x in (nodes, rows))
    return {
        "node_token": [p[-1] for p in nodes],
        "node_depth": [len(p) - 1 for p in nodes],
        "node_end": [i + node_size[p] for i, p in enumerate(nodes)],
        "node_parent": [node_index.get(p[:-1], -1) for p in nodes],
        "token": [p[-1] for p in rows],
        "depth": [len(p) - 1 for p in rows],
        "end": [i + row_size[p] for i, p in enumerate(rows)],
        "parent": [row_index.get(p[:-1], -1) for p in rows],
        "row_node": [node_index[p] for p in rows],
        "scored_token": [p[-1] for p in scored],
        "scored_row": [row_index[p[:-1]] for p in scored],
        "path": [scored_index[p] for end in ends for p in end],
        "path_offset": np.cumsum([0] + [len(end) for end in ends]).tolist(),
        "last_row": [row_index[path[-1] if whole else path[-2]] for path in paths],
        "request_tokens": sum(len(path) for path in paths),
    }


def contents(built):
    values = {f.name: getattr(built, f.name) for f in fields(built)}
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def pack(requests):
    tokens = np.asarray([x for c, t in requests for x in c + t], np.int32)
    offsets = np.cumsum([0] + [len(c + t) for c, t in requests])
    return tokens, offsets, np.asarray([len(c) for c, _ in requests], np.int64)


@settings(deadline=None)
@given(REQUESTS)
@example([])
@example([((1,), (2,))] * 3)
@example([((1, 2, 3), (4,)), ((1, 2), (3, 4)), ((1,), (2, 3, 4))])
@example([((1,), (2, 3)), ((4,), (2, 3)), ((1,), (2, 5)), ((4,), (2, 5))])
def test_equals_the_naive_trie(requests):
    built = trie.build_from_lists(requests)
    assert contents(built) == naive(requests)
    for f in fields(built):
        if f.name != "request_tokens":
            assert getattr(built, f.name).dtype == (torch.int64 if f.name == "path_offset" else torch.int32)
    arrays = pack(requests)
    assert contents(trie.build(*arrays)) == contents(built)
    assert contents(trie.build(*map(torch.from_numpy, arrays))) == contents(built)


@settings(deadline=None)
@given(REQUESTS, st.data())
@example([((1, 2), ()), ((1, 2), (3,)), ((1, 2, 3), ()), ((4,), ())], None)
def test_whole_requests_have_a_row_for_every_node(requests, data):
    if data is not None:
        ends = [data.draw(st.booleans()) for _ in requests]
        requests = [(c + t, ()) if end else (c, t) for (c, t), end in zip(requests, ends, strict=True)]
    built = trie.build_from_lists(requests, whole=True)
    assert contents(built) == naive(requests, whole=True)
    assert torch.equal(built.row_node, torch.arange(len(built.node_token), dtype=torch.int32))
    assert sum(len(chunk.token) for chunk in trie.plan(built, 3).chunks) == len(built.token)


@settings(deadline=None)
@given(st.data())
def test_the_order_of_requests_moves_only_paths(data):
    requests = data.draw(REQUESTS)
    order = data.draw(st.permutations(range(len(requests))))
    one, other = trie.build_from_lists(requests), trie.build_from_lists([requests[r] for r in order])
    for f in fields(one):
        if f.name not in ("path", "path_offset", "last_row", "request_tokens"):
            assert torch.equal(getattr(one, f.name), getattr(other, f.name)), f.name
    for i, r in enumerate(order):
        there, here = (x.path[x.path_offset[k] : x.path_offset[k + 1]] for x, k in ((one, r), (other, i)))
        assert torch.equal(there, here)


@settings(deadline=None)
@given(REQUESTS, st.integers(1, 40))
@example([], 1)
@example([((1, 2, 3), (4, 5)), ((1, 2, 3), (4, 6)), ((1, 9), (9, 9))], 1)
def test_plan_replayed_on_a_stack(requests, max_rows):
    built = trie.build_from_lists(requests)
    visible = []
    for i, parent in enumerate(built.parent.tolist()):
        visible.append({i} | (visible[parent] if parent >= 0 else set()))
    cache, next_row, targets, heights = [], 0, [], [0]
    plan = trie.plan(built, max_rows)
    for chunk in plan.chunks:
        assert chunk.first_row == next_row < chunk.last_row <= next_row + max_rows
        next_row = chunk.last_row
        assert chunk.keep.dtype == torch.int64
        assert chunk.end_k.dtype == chunk.depth_k.dtype == torch.int32
        cache = [cache[p] for p in chunk.keep.tolist()]
        assert len(cache) == chunk.cached_rows
        assert set(cache) == visible[chunk.first_row] - {chunk.first_row}
        cache += range(chunk.first_row, chunk.last_row)
        assert torch.equal(chunk.token, built.token[cache[chunk.cached_rows :]])
        heights.append(len(cache))
        end_k = chunk.end_k.tolist()
        assert len(end_k) == len(cache)
        for q in range(chunk.cached_rows, len(cache)):
            assert {cache[p] for p in range(q + 1) if q < end_k[p]} == visible[cache[q]]
        assert chunk.depth_k.tolist() == built.depth[cache].tolist()

        head_rows, target_row = chunk.head_rows.tolist(), chunk.target_row.tolist()
        assert head_rows == sorted(set(head_rows))
        assert sorted(set(target_row)) == list(range(len(head_rows)))
        assert target_row == sorted(target_row)
        parents = built.scored_row[chunk.target_index].tolist()
        assert [chunk.first_row + head_rows[i] for i in target_row] == parents
        assert all(chunk.first_row <= row < chunk.last_row for row in parents)
        assert torch.equal(chunk.target_token, built.scored_token[chunk.target_index])
        assert chunk.head_rows.dtype == chunk.target_row.dtype == chunk.target_token.dtype == torch.int32
        targets += chunk.target_index.tolist()
    assert next_row == len(built.token)
    assert plan.capacity == max(heights)
    assert sorted(targets) == list(range(len(built.scored_row)))


def test_interleaved_contexts_are_shared():
    contexts = [[k] * 300 for k in range(3)]
    requests = [(contexts[r % 3], [10 + r, 5]) for r in range(99)]
    built = trie.build_from_lists(requests)
    assert (len(built.node_token), len(built.token), len(built.scored_token)) == (3 * 300 + 2 * 99, 900 + 99, 2 * 99)
    assert built.request_tokens == 99 * 302


def test_memory_grows_with_distinct_tokens_not_with_requests():
    context = list(range(4000))
    requests = [(context, [5000 + r % 7, r]) for r in range(20_000)]
    taken = peak_bytes(lambda: trie.build_from_lists(requests))
    assert taken is not None
    assert taken < 30e6  # end to end they are 320 MB


@settings(deadline=None)
@given(st.data())
def test_beginnings_given_apart_change_nothing(data):
    requests = data.draw(REQUESTS)
    tokens, offsets, contexts = pack(requests)
    cuts = [data.draw(st.integers(0, len(c + t))) for c, t in requests]  # anywhere in a request, or at its ends
    heads = data.draw(st.permutations(sorted({(c + t)[:n] for (c, t), n in zip(requests, cuts, strict=True)})))
    head = np.asarray([heads.index((c + t)[:n]) for (c, t), n in zip(requests, cuts, strict=True)], np.int32)
    tails = [(c + t)[n:] for (c, t), n in zip(requests, cuts, strict=True)]

    def laid(parts):
        return np.asarray([x for part in parts for x in part], np.int32), np.cumsum([0] + [len(part) for part in parts])

    apart = trie.build(*laid(tails), contexts, heads=laid(heads), head=head)
    assert contents(apart) == contents(trie.build(tokens, offsets, contexts))


def test_bad_beginnings_are_named():
    tokens, offsets, contexts = pack([((1, 2), (3,)), ((1,), (4,))])
    good = np.asarray([7, 8, 9], np.int32), np.asarray([0, 1, 3])
    for heads, head, error, message in [
        (good, [0, 2], ValueError, r"^head: expected 0 <= head < 2 \(request 1\), got 2"),
        (good, [-1, 0], ValueError, "^head: expected"),
        (good, [0], ValueError, "^offsets: expected one more value than head, 2, got 3"),
        ((good[0], np.asarray([0, 4, 3])), [0, 0], ValueError, r"^head_offsets: expected ascending .* \(head 0\)"),
        ((good[0], np.asarray([0, 2])), [0, 0], ValueError, "^head_offsets: expected the number of tokens last"),
        ((good[0], np.asarray([], np.int64)), [0, 0], ValueError, "^head_offsets: expected"),
        ((good[0].astype(np.int64), good[1]), [0, 0], TypeError, "^head_tokens: expected"),
        ((np.asarray([7, 8, -9], np.int32), good[1]), [1, 1], ValueError, "^tokens: expected"),
    ]:
        with pytest.raises(error, match=message):
            trie.build(tokens, offsets, contexts, heads=heads, head=np.asarray(head, np.int32))
    with pytest.raises(ValueError, match=r"^head: expected with heads"):
        trie.build(tokens, offsets, contexts, heads=good)


def test_one_long_request():
    n = 300_000
    built = trie.build(torch.arange(n, dtype=torch.int32), torch.tensor([0, n]), torch.tensor([1]))
    assert torch.equal(built.parent, torch.arange(-1, n - 2, dtype=torch.int32))
    assert torch.equal(built.end, torch.full((n - 1,), n - 1, dtype=torch.int32))
    last = trie.plan(built, 100_000).chunks[-1]
    assert (last.cached_rows, len(last.keep), len(last.end_k)) == (200_000, 200_000, n - 1)


def test_many_children_and_nested_prefixes():
    fan = [([1], [k, 2]) for k in range(5000)]
    built = trie.build_from_lists(fan[::2] + fan[1::2][::-1])
    assert built.token.tolist() == [1, *range(5000)]
    assert built.scored_token[::2].tolist() == list(range(5000))
    nested = [([3] * n, [4]) for n in range(1, 1000)]
    built = trie.build_from_lists(nested[::-2] + nested[1::2])
    assert (len(built.token), len(built.node_token), len(built.scored_token)) == (999, 2 * 999, 999)


def test_arrays_are_read_in_place_or_copied_when_strided():
    tokens, offsets, contexts = pack([((1, 2), (3,)), ((1, 2), (4,))])
    strided = np.repeat(tokens, 2)[::2], np.repeat(offsets, 2)[::2], torch.from_numpy(np.repeat(contexts, 3))[::3]
    assert contents(trie.build(*strided)) == contents(trie.build(tokens, offsets, contexts))
    tokens.flags.writeable = False
    assert trie.build(tokens, offsets, contexts).token.tolist() == [1, 2]


INT32, INT64 = np.int32, np.int64
GOOD = {"tokens": ([1, 2, 3, 4], INT32), "offsets": ([0, 2, 4], INT64), "context_lengths": ([1, 1], INT64)}


@pytest.mark.parametrize(
    ("argument", "values", "dtype", "error"),
    [
        ("tokens", [1, 2, -3, 4], INT32, ValueError),
        ("tokens", [[1, 2], [3, 4]], INT32, ValueError),
        ("tokens", [1, 2, 3, 4], INT64, TypeError),
        ("tokens", [1, 2, 3, 4], np.float32, TypeError),
        ("offsets", [0, 2, 3], INT64, ValueError),
        ("offsets", [0, 2, 5], INT64, ValueError),
        ("offsets", [1, 2, 4], INT64, ValueError),
        ("offsets", [0, 5, 4], INT64, ValueError),
        ("offsets", [0, -1, 4], INT64, ValueError),
        ("offsets", [0, 2**62, 4], INT64, ValueError),
        ("offsets", [-(2**63), 2**63 - 1, 4], INT64, ValueError),
        ("offsets", [0, 4], INT64, ValueError),
        ("offsets", [], INT64, ValueError),
        ("offsets", [0, 2, 4], INT32, TypeError),
        ("context_lengths", [1, 2], INT64, ValueError),
        ("context_lengths", [0, 1], INT64, ValueError),
        ("context_lengths", [1, -(2**62)], INT64, ValueError),
        ("context_lengths", [1, 1], np.uint64, TypeError),
    ],
)
def test_bad_arrays_are_named(argument, values, dtype, error):
    arguments = {name: np.asarray(*good) for name, good in GOOD.items()}
    assert len(trie.build(**arguments).token) == 2
    arguments[argument] = np.asarray(values, dtype)
    with pytest.raises(error, match=f"^{argument}: expected"):
        trie.build(**arguments)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([([], [1])], "context_lengths: expected"),
        ([([1], [])], "context_lengths: expected"),
        ([([1], [2]), ([1], [2**31])], r"requests: expected .*request 1"),
        ([([1], [-1])], "tokens: expected"),
    ],
)
def test_bad_lists_are_named(requests, message):
    with pytest.raises(ValueError, match=message):
        trie.build_from_lists(requests)


def test_bad_plans_and_ancestors_are_named():
    built = trie.build_from_lists([([1, 2], [3, 4])])
    with pytest.raises(ValueError, match="max_rows"):
        trie.plan(built, 0)
    parent, out = built.parent.numpy(), np.empty(2, np.int32)
    for row, bad_parent, size, argument in [(3, parent, 2, "row"), (-1, parent, 2, "row"), (2, parent, 1, "out")]:
        with pytest.raises(ValueError, match=argument):
            _C.trie_ancestors(bad_parent, row, out[:size])
    with pytest.raises(ValueError, match="out"):
        _C.trie_ancestors(parent, 1, out)
    with pytest.raises(ValueError, match="parent"):
        _C.trie_ancestors(np.asarray([-1, 1, 1], np.int32), 2, out)
