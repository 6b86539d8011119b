"""Log-likelihood requests cut into shards that any worker can score, whatever the others do.

A shard is a few thousand rows of the requests' trie and what lies above them, its stem, which all shards below the same
node share: a worker forwards a stem once and scores shard after shard behind it. What is in a shard follows from the
requests alone, never from the number of workers, so that its results are the same to the bit wherever it is scored with
the same number of threads on a machine of the same kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icl_ft_fast.engine import trie
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.defaults import SHARD_CHUNKS, SHARD_TOKENS
from icl_ft_fast.engine.flops import Work, work_of
from icl_ft_fast.engine.forward import chunk_tokens_of
from icl_ft_fast.engine.kv_cache import Context
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import LogLikelihood, ScoringOptions, loglikelihood, prefill, stored_context
from icl_ft_fast.engine.loading import load_same
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.durable import digest
from icl_ft_fast.runtime.executors import Executor, Job, Ray, run_journaled

Request = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Shard:
    """Requests that begin with `stem`, token ids; of each its other tokens, and how many of all are its context."""

    stem: tuple[int, ...]
    rest: tuple[tuple[int, ...], ...]
    context_lengths: tuple[int, ...]

    @property
    def requests(self) -> list[Request]:
        """As score.loglikelihood() takes them."""
        whole = ([*self.stem, *rest] for rest in self.rest)
        return [(ids[:n], ids[n:]) for ids, n in zip(whole, self.context_lengths, strict=True)]


@dataclass(frozen=True)
class Cut:
    """Requests of a shard, by index in the order of the trie; the tokens of its stem; FLOPs below the stem."""

    members: tuple[int, ...]
    stem_tokens: int
    flops: int


def cut(
    requests: Sequence[Request], work: Work, *, shard_tokens: int = SHARD_TOKENS, stem_tokens: int = 0
) -> list[Cut]:
    """Cut requests into shards of about `shard_tokens` average rows' FLOPs each.

    From its leaves up, a node of the trie under which more than a shard's work is left becomes the stem of so many
    shards of nearly equal work; a child is never divided unless it was itself such a node.

    Args:
        requests: (context ids, continuation ids), neither empty.
        work: of the network.
        shard_tokens: see above.
        stem_tokens: tokens that all requests begin with and that are the last stem; 0 for all that they have in common.

    Time is that of trie.build() and a few microseconds a request.
    """
    if not requests:
        return []
    tree = trie.build_from_lists(requests)
    last = tree.path.numpy()[tree.path_offset.numpy()[1:] - 1]
    lengths = np.array([len(context) for context, _ in requests])
    order = np.lexsort((lengths, last))
    leaf, depth = tree.scored_row.numpy()[last[order]].astype(np.int64), tree.depth.numpy()
    rows = depth[leaf].astype(np.int64) + 1
    shared = _shared_rows(leaf, depth)
    new_heads = np.maximum(0, rows - np.maximum(lengths[order] - 1, np.concatenate([[0], shared])))
    flops = work.path_flops(int(rows.max()))
    goal = shard_tokens * flops[-1] / rows.max()

    found: list[Cut] = []
    common = int(shared.min()) if len(shared) else int(rows[0])
    open_nodes = [_Node(min(stem_tokens or common, common))]
    for k, r in enumerate(order):
        fork = max(open_nodes[0].depth, int(shared[k - 1]) if k else 0)
        while (node := open_nodes[-1]).depth > fork:
            open_nodes.pop()
            if open_nodes[-1].depth < fork:
                open_nodes.append(_Node(fork))
            _close(node, open_nodes[-1], flops, goal, found)
        if rows[k] > open_nodes[-1].depth:
            open_nodes.append(_Node(int(rows[k])))
        open_nodes[-1].parts.append(([int(r)], float(new_heads[k]) * work.head_flops))
    while len(open_nodes) > 1:
        _close(open_nodes.pop(), open_nodes[-1], flops, goal, found)
    found += _packed(open_nodes[0], goal)
    place = {int(r): k for k, r in enumerate(order)}
    return sorted(found, key=lambda one: place[one.members[0]])


@dataclass
class _Node:
    """A node of the trie, `depth` tokens down: what hangs below it and is in no shard yet, requests and FLOPs."""

    depth: int
    parts: list[tuple[list[int], float]] = field(default_factory=list)


def _close(node: _Node, above: _Node, flops: NDArray[np.float64], goal: float, found: list[Cut]) -> None:
    """Make shards of what hangs below a node, or hand it to the node above as one part."""
    below = sum(cost for _, cost in node.parts)
    if below > goal:
        found += _packed(node, goal)
    elif node.parts:
        members = node.parts[0][0]
        for more, _ in node.parts[1:]:
            members += more
        above.parts.append((members, below + float(flops[node.depth] - flops[above.depth])))


def _packed(node: _Node, goal: float) -> Iterator[Cut]:
    """The parts below a node in as many shards as their work asks for, each part whole, in their order."""
    total = sum(cost for _, cost in node.parts) or 1.0
    count = max(1, -int(-total // goal))
    bins: dict[int, list[tuple[list[int], float]]] = {}
    before = 0.0
    for part in node.parts:
        bins.setdefault(min(count - 1, int((before + part[1] / 2) / total * count)), []).append(part)
        before += part[1]
    for parts in bins.values():
        yield Cut(tuple(r for its, _ in parts for r in its), node.depth, int(sum(cost for _, cost in parts)))


def _shared_rows(leaf: NDArray[np.int64], depth: NDArray[np.int32]) -> NDArray[np.int64]:
    """Rows that each request but the first has in common with the one before it, from their last rows in trie order."""
    before, after = leaf[:-1], leaf[1:]
    # All rows from one to the other are visited on the way: the shallowest is a child of the last that both have.
    edges = np.stack([before + 1, np.maximum(before, after) + 1], 1).ravel()
    shallowest = np.minimum.reduceat(np.append(depth, 0), edges)[::2] if len(edges) else np.empty(0)
    return np.where(after > before, shallowest, depth[after] + 1).astype(np.int64)


def jobs_of(requests: Sequence[Request], cuts: Sequence[Cut], work: Work, identity: dict[str, Any]) -> list[Job]:
    """A job for each shard, named by `identity` (what else its results depend on) and its token ids."""
    start_flops = work.path_flops(max((one.stem_tokens for one in cuts), default=0))
    jobs = []
    for one in cuts:
        whole = [(*requests[r][0], *requests[r][1]) for r in one.members]
        lengths = tuple(len(requests[r][0]) for r in one.members)
        shard = Shard(whole[0][: one.stem_tokens], tuple(ids[one.stem_tokens :] for ids in whole), lengths)
        name = digest(sorted(identity.items()), shard.stem, shard.rest, shard.context_lengths)
        jobs.append(Job(name, shard, one.flops, digest(shard.stem), int(start_flops[one.stem_tokens])))
    return jobs


def in_order(cuts: Sequence[Cut], results: Sequence[dict[str, Any]]) -> list[LogLikelihood]:
    """Log-likelihoods in the order of the requests, from each shard's results."""
    by_request = {
        r: LogLikelihood(*found)
        for one, result in zip(cuts, results, strict=True)
        for r, found in zip(one.members, result["logp_is_greedy"], strict=True)
    }
    return [by_request[r] for r in range(len(by_request))]


class Scorer:
    """A worker that scores shards, and keeps the stem of the last one.

    Args:
        model: from load().
        chunk_tokens: see score.loglikelihood().
        store: stems are taken from it, or forwarded and saved there.
    """

    def __init__(self, model: Model, chunk_tokens: int | None = None, store: ContextStore | None = None) -> None:
        self.model, self.chunk_tokens, self.store = model, chunk_tokens, store
        self._stem: tuple[tuple[int, ...], Context | None] = (), None

    def __call__(self, shard: Shard) -> dict[str, Any]:
        """Results in the order of the shard's requests, and the ledger of what it took."""
        ledger, is_new = Ledger(), shard.stem != self._stem[0]
        if is_new:
            self._stem = (), None  # freed before the next is made
            options: dict[str, Any] = {"chunk_tokens": self.chunk_tokens, "ledger": ledger}
            with ledger.phase("prefill"):
                if self.store is None:
                    context = prefill(self.model, shard.stem, **options)
                else:
                    label = " ".join(self.model.tokenizer.decode(shard.stem[:60]).split())[:60]
                    context = stored_context(self.model, shard.stem, self.store, label=label, **options)
                ledger.request_tokens = 0  # the stem's are counted with each request
            self._stem = shard.stem, context
        results = loglikelihood(
            self.model,
            shard.requests,
            chunk_tokens=self.chunk_tokens,
            ledger=ledger,
            start=self._stem[1],
            count_start=not is_new,
        )
        return {"logp_is_greedy": results, "ledger": ledger.as_dict()}


@dataclass(frozen=True)
class ScorerElsewhere:
    """Makes a Scorer in another process, perhaps on another machine, of the model that load_same() gives there."""

    name: str
    loading: dict[str, Any]
    fingerprint: str
    chunk_tokens: int
    store: Path | None
    store_bytes: int

    def __call__(self) -> Scorer:
        """Load, check, make."""
        model = load_same(self.name, self.loading, self.fingerprint)
        store = None if self.store is None else ContextStore(self.store, model, self.store_bytes)
        return Scorer(model, self.chunk_tokens, store)


class ShardedRun:
    """Scores requests shard by shard, and stores what is done: give it to score(sharded=...), within a `with`.

    Until the block ends the folder is locked. It is the caller's to remove, once the scores are in their place.

    Args:
        executor: whose workers score.
        folder: of finished shards; a run that was killed resumes from it.
        name: the model as load() takes it, for workers in other processes.
        loading: keyword arguments of load(), for these too.
        shard_tokens: see cut(); None for SHARD_CHUNKS chunks of the model's device.
    """

    def __init__(
        self,
        executor: Executor,
        folder: Path,
        name: str,
        loading: dict[str, Any],
        *,
        shard_tokens: int | None = None,
    ) -> None:
        self.executor, self.folder, self.name, self.loading = executor, folder, name, loading
        self.shard_tokens = shard_tokens
        self._locked = contextlib.ExitStack()

    def __enter__(self) -> ShardedRun:
        return self

    def __exit__(self, *error: Any) -> None:
        self._locked.close()

    def score(
        self, model: Model, requests: Sequence[Request], shared_tokens: int, options: ScoringOptions, ledger: Ledger
    ) -> list[LogLikelihood] | None:
        """Results in the order of the requests; None in processes of other rank than 0.

        Args:
            model: from load().
            requests: token ids that check_fit() has passed.
            shared_tokens: leading tokens that all have in common and that a store may have.
            options: see ScoringOptions.
            ledger: what all workers have counted is added to it.
        """
        work = work_of(model)
        fingerprint, chunk_tokens = model.fingerprint(), options.chunk_tokens
        chunk_tokens = chunk_tokens_of(model) if chunk_tokens is None else chunk_tokens
        shard_tokens = self.shard_tokens or SHARD_CHUNKS * chunk_tokens_of(model)
        cuts = cut(requests, work, shard_tokens=shard_tokens, stem_tokens=shared_tokens)
        identity = {"model": fingerprint, "chunk_tokens": chunk_tokens, "loading": repr(self.loading)}
        store = options.store if shared_tokens else None
        where = (None, 0) if store is None else (store.folder, store.max_bytes)
        elsewhere = ScorerElsewhere(self.name, self.loading, fingerprint, chunk_tokens, *where)
        start = elsewhere if isinstance(self.executor, Ray) else partial(Scorer, model, chunk_tokens, store)
        jobs = jobs_of(requests, cuts, work, identity)
        progress = "scoring" if options.progress else ""
        running = run_journaled(self.executor, start, jobs, self.folder, progress=progress)
        results = self._locked.enter_context(running)
        if results is None:
            return None
        for result in results:
            ledger.include(result["ledger"])
        return in_order(cuts, results)
