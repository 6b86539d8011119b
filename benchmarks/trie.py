"""How fast requests are merged into a trie, beside reading them once and beside a Python dict of prefixes."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import Row, measure, peak_bytes
from icl_ft_fast.engine import trie

VOCABULARY = 32_000
MAX_ROWS = 4096
DICT_TOKENS = 500_000  # the dict is slow, so it gets the first requests up to this many tokens

Requests = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]


def cases(quick: bool) -> dict[str, Callable[[np.random.Generator], Requests]]:
    """Requests to merge, by name; `quick` divides their number by ten."""
    scale = 10 if quick else 1
    num = 10_000 // scale

    def tokens(rng: np.random.Generator, *shape: int) -> NDArray[np.int32]:
        return rng.integers(0, VOCABULARY, shape, dtype=np.int32)

    def shared(rng: np.random.Generator) -> Requests:
        own = tokens(rng, num, 20)
        context = np.broadcast_to(tokens(rng, 4000), (num, 4000))
        return _pack(np.hstack([context, own]), 4010)

    def choices(rng: np.random.Generator) -> Requests:
        context = np.broadcast_to(tokens(rng, 4000), (num, 4000))
        return _pack(np.hstack([context, np.repeat(tokens(rng, num // 4, 20), 4, axis=0), tokens(rng, num, 4)]), 4020)

    def shuffled(rng: np.random.Generator) -> Requests:
        contexts = tokens(rng, 100, 4000)[rng.integers(0, 100, num)]
        return _pack(np.hstack([contexts, tokens(rng, num, 20)]), 4010)

    def single(rng: np.random.Generator) -> Requests:
        return _pack(tokens(rng, 1, 1_000_000 // scale), 1)

    def short(rng: np.random.Generator) -> Requests:
        return _pack(tokens(rng, 1_000_000 // scale, 3), 1)

    def children(rng: np.random.Generator) -> Requests:
        n = 100_000 // scale
        return _pack(np.stack([np.zeros(n), rng.permutation(n), np.ones(n)], axis=1).astype(np.int32), 1)

    def nested(rng: np.random.Generator) -> Requests:
        lengths = rng.permutation(np.arange(2, 4000 // scale))
        flat = np.zeros(int(lengths.sum()), np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat[offsets[1:] - 1] = 1
        return flat, offsets, np.ones(len(lengths), np.int64)

    return {
        f"{num:,} requests, one context of 4,000": shared,
        f"{num // 4:,} questions x 4 choices, one context of 4,000": choices,
        f"{num:,} requests in random order, 100 contexts of 4,000": shuffled,
        f"one request of {1_000_000 // scale:,}": single,
        f"{1_000_000 // scale:,} requests of 3": short,
        f"{100_000 // scale:,} children of one node": children,
        f"{4000 // scale - 2:,} nested prefixes in random order": nested,
    }


def run(quick: bool) -> list[Row]:
    """Check and time every case; rates are in request tokens, a plan's in rows."""
    rows = []
    for case, make in cases(quick).items():
        requests = make(np.random.default_rng(0))
        start = _first_requests(requests, DICT_TOKENS)
        built = trie.build(*requests)
        _check(built, requests)
        small = trie.build(*start)
        if (len(small.node_token), len(small.token), len(small.scored_token)) != _dict_trie(*start):
            raise AssertionError(f"{case}: the trie and the dict of prefixes differ")

        variants: dict[str, tuple[Callable[[], object], int, str]] = {
            "build": (partial(trie.build, *requests), len(requests[0]), "M request tokens/s"),
            "read once": (requests[0].max, len(requests[0]), "M request tokens/s"),
            "plan": (partial(_plan, built), len(built.token), "M rows/s"),
            "python dict": (partial(_dict_trie, *start), len(start[0]), "M request tokens/s"),
        }
        timings = measure({name: call for name, (call, _, _) in variants.items()}, seconds=0.2 if quick else 1.0)
        for name, (call, size, unit) in variants.items():
            timing = timings[name]
            percent = 100 * timings["read once"].ms / timing.ms if name == "build" else None
            peak = peak_bytes(call) if name in ("build", "plan") else None
            rate = size / timing.ms / 1e3
            rows.append(Row("trie", case, name, timing.ms, timing.p20_ms, timing.p80_ms, rate, unit, percent, peak))
    return rows


def _pack(requests: NDArray[np.int32], context: int) -> Requests:
    num_requests, length = requests.shape
    offsets = np.arange(num_requests + 1, dtype=np.int64) * length
    return np.ascontiguousarray(requests).reshape(-1), offsets, np.full(num_requests, context, np.int64)


def _first_requests(requests: Requests, num_tokens: int) -> Requests:
    tokens, offsets, contexts = requests
    n = max(int(np.searchsorted(offsets, num_tokens, side="right")) - 1, 1)
    return tokens[: offsets[n]], offsets[: n + 1], contexts[:n]


def _plan(built: trie.Trie) -> int:
    """Make every tensor of every chunk, holding one chunk's at a time."""
    chunks = trie.plan(built, MAX_ROWS).chunks
    return sum(len(c.keep) + len(c.end_k) + len(c.depth_k) for c in chunks)


def _dict_trie(tokens: NDArray[np.int32], offsets: NDArray[np.int64], contexts: NDArray[np.int64]) -> tuple[int, ...]:
    """Nodes, rows and scored nodes, counted token by token with a dict from (parent, token) to node."""
    nodes: dict[tuple[int, int], int] = {}
    scored = set()
    for r, context in enumerate(contexts.tolist()):
        node = -1
        for depth, token in enumerate(tokens[offsets[r] : offsets[r + 1]].tolist()):
            node = nodes.setdefault((node, token), len(nodes))
            if depth >= context:
                scored.add(node)
    return len(nodes), len({parent for parent, _ in nodes} - {-1}), len(scored)


def _check(built: trie.Trie, requests: Requests) -> None:
    """No two children of a node are equal, parents precede, subtrees nest, and every path spells its continuation."""
    tokens, offsets, contexts = requests
    parent, end = built.node_parent.numpy(), built.node_end.numpy()
    node = np.arange(len(parent))
    child = parent >= 0
    edges = (parent.astype(np.int64) + 1) << 31 | built.node_token.numpy()
    lengths = np.diff(offsets)
    position = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
    continuation = tokens[position >= np.repeat(contexts, lengths)]
    holds = {
        "distinct children": len(np.unique(edges)) == len(edges),
        "parents first": bool((parent < node).all()),
        "nested subtrees": bool((end[child] <= end[parent[child]]).all() and (end > node).all()),
        "paths": np.array_equal(built.scored_token.numpy()[built.path.numpy()], continuation),
        "rows": len(built.token) == len(np.unique(parent[child])),
    }
    wrong = [name for name, ok in holds.items() if not ok]
    if wrong:
        raise AssertionError(f"the trie is wrong: {', '.join(wrong)}")
