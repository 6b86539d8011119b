"""The prefix trie of a run's requests and the chunks of rows it is forwarded in.

Knows token ids only: no text, no tokenizer, no network, no device but the CPU.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import icl_ft_fast._C as _C


@dataclass(frozen=True, eq=False)
class Trie:
    """All requests merged: every distinct token prefix is one node, in depth-first pre-order.

    Siblings, roots included, ascend by token, so nodes, rows and scored nodes do not depend on the order in which
    requests are given; only `path`, `path_offset` and `last_row` follow it. All tensors are contiguous and on the CPU.

    Nodes, int32 [N]: `node_token`, `node_depth` (position in the sequence, roots 0), `node_end` (first node after the
    subtree), `node_parent` (-1 for roots).

    Rows, int32 [T], are the nodes that have a child, in the same order, and all that a network must be run on: `token`,
    `depth`, `end` and `parent` count in rows, `row_node` is the node a row stands for. Row i sees row j if and only if
    j <= i < end[j]. In a trie of whole requests every node is a row, because something may come after each request.

    Scored nodes, int32 [M], are the nodes in some request's continuation, ascending: `scored_token`, and `scored_row`,
    the parent's row, whose hidden state predicts the token.

    `path[path_offset[r]:path_offset[r + 1]]` lists the continuation of request r as indices into the scored nodes;
    path is int32 [total continuation length], path_offset int64 [R + 1]. `last_row`, int32 [R], is the last row on the
    path of each request: its last token's in a trie of whole requests, else that of the token before. `request_tokens`
    is the total length of the requests, what a forward pass per request would read.
    """

    node_token: Tensor
    node_depth: Tensor
    node_end: Tensor
    node_parent: Tensor
    token: Tensor
    depth: Tensor
    end: Tensor
    parent: Tensor
    row_node: Tensor
    scored_token: Tensor
    scored_row: Tensor
    path: Tensor
    path_offset: Tensor
    last_row: Tensor
    request_tokens: int


def build(
    tokens: Tensor | NDArray[np.int32],
    offsets: Tensor | NDArray[np.int64],
    context_lengths: Tensor | NDArray[np.int64],
    *,
    heads: tuple[Tensor | NDArray[np.int32], Tensor | NDArray[np.int64]] | None = None,
    head: Tensor | NDArray[np.int32] | None = None,
    whole: bool = False,
) -> Trie:
    """Merge R requests into one trie.

    Args:
        tokens: the requests end to end, int32 [total length], >= 0; a CPU tensor or an array, read in place.
        offsets: request r is tokens[offsets[r]:offsets[r + 1]]; int64 [R + 1], from 0 to the total length.
        context_lengths: leading tokens of each request that are context, the rest being continuation; int64 [R],
            1 <= context_lengths[r] < length of request r.
        heads: beginnings that many requests share: their tokens and offsets, as above.
        head: which of them request r begins with, int32 [R]; `tokens` then holds what follows it.
        whole: the last token of every request is a row too, and a continuation may be empty.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or values, or there are 2^31 distinct prefixes.

    Time is one comparison of every input token with another request's, at memory speed, plus a sort of the R requests;
    memory is about 40 bytes a request and 8 a node beside the result. Equal requests, and requests that are a prefix of
    others, are welcome; R may be 0.
    """
    if (heads is None) != (head is None):
        raise ValueError("head: expected with heads, and only then")
    head_tokens, head_offsets = heads or (np.zeros(0, np.int32), np.zeros(1, np.int64))
    head_tokens = _vector("head_tokens", head_tokens, np.int32)
    arrays = _C.trie_build(
        _vector("tokens", tokens, np.int32),
        _vector("offsets", offsets, np.int64),
        _vector("context_lengths", context_lengths, np.int64),
        head_tokens,
        _vector("head_offsets", head_offsets, np.int64),
        None if head is None else _vector("head", head, np.int32),
        whole,
    )
    of_heads = 0 if head is None else int(np.diff(np.asarray(head_offsets))[np.asarray(head)].sum())
    return Trie(
        request_tokens=len(tokens) + of_heads,
        **{name: torch.from_numpy(values) for name, values in arrays.items()},
    )


def build_from_lists(requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, whole: bool = False) -> Trie:
    """Merge requests given as (context ids, continuation ids), neither empty unless `whole`; see `build`.

    A context that is one object for many requests is read, compared and kept once.
    """
    tokens, offsets, head = array("i"), array("q", [0]), array("i")
    head_tokens, head_offsets = array("i"), array("q", [0])
    contexts: dict[int, tuple[int, Sequence[int]]] = {}  # by identity, which is theirs as long as they are kept here
    for r, (context, continuation) in enumerate(requests):
        try:
            if id(context) not in contexts:
                contexts[id(context)] = len(contexts), context
                head_tokens.extend(array("i", context))
                head_offsets.append(len(head_tokens))
            tokens.extend(array("i", continuation))
        except OverflowError as error:
            raise ValueError(f"requests: expected token ids below 2^31 (request {r})") from error
        offsets.append(len(tokens))
        head.append(contexts[id(context)][0])
    lengths = np.diff(np.asarray(head_offsets))
    return build(
        np.asarray(tokens),
        np.asarray(offsets),
        lengths[np.asarray(head)],
        heads=(np.asarray(head_tokens), np.asarray(head_offsets)),
        head=np.asarray(head),
        whole=whole,
    )


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows [first_row, last_row) of a trie, forwarded together on top of the KV cache.

    The cache then holds the `cached_rows` open ancestors of first_row, root first, followed by the chunk's own rows.
    Row r is at cache position cached_rows + r - first_row. The query at position q sees the key at position p if and
    only if p <= q < end_k[p].

    `head_rows`, int32, are the rows whose hidden states the output head needs, counted from first_row, ascending and
    distinct. The scored nodes they predict are given by three tensors of one length: `target_row`, int32, ascending
    indices into head_rows; `target_token`, int32; `target_index`, int64, indices into the trie's scored nodes. Over a
    plan's chunks each scored node appears once.

    `keep`, `end_k` and `depth_k` are made at each access, so that a plan stays linear in the trie: take them once.
    """

    first_row: int
    last_row: int
    cached_rows: int
    head_rows: Tensor
    target_row: Tensor
    target_token: Tensor
    target_index: Tensor
    _previous_row: int = field(repr=False)
    _trie: Trie = field(repr=False)

    @property
    def token(self) -> Tensor:
        """The chunk's tokens, int32 [rows]; a view of the trie's."""
        return self._trie.token[self.first_row : self.last_row]

    @property
    def keep(self) -> Tensor:
        """Positions of the previous chunk's cache, its own rows included, that this chunk's cache starts with.

        int64 [cached_rows], ascending; empty for the first chunk.
        """
        # An ancestor already on the cache is at the position of its depth; the others follow in the previous chunk.
        ancestors, before = self._ancestors(), self._previous_row
        num_before = int(torch.searchsorted(ancestors, before))
        new = ancestors[num_before:] + (int(self._trie.depth[before]) - before)
        return torch.cat([torch.arange(num_before), new])

    @property
    def end_k(self) -> Tensor:
        """First cache position no longer below each cache row, int32 [cached_rows + rows].

        Not clipped: a subtree that goes on after the chunk ends beyond the cache.
        """
        end = self._trie.end
        ends = torch.cat([end[self._ancestors()], end[self.first_row : self.last_row]])
        return ends + (self.cached_rows - self.first_row)

    @property
    def depth_k(self) -> Tensor:
        """Depth of each cache row, int32 [cached_rows + rows]; its last rows are the depths of the queries."""
        ancestors = torch.arange(self.cached_rows, dtype=torch.int32)
        return torch.cat([ancestors, self._trie.depth[self.first_row : self.last_row]])

    def _ancestors(self) -> Tensor:
        """Open ancestors of the first row, root first, int32 [cached_rows]."""
        ancestors = torch.empty(self.cached_rows, dtype=torch.int32)
        _C.trie_ancestors(self._trie.parent.numpy(), self.first_row, ancestors.numpy())
        return ancestors


@dataclass(frozen=True, eq=False)
class Plan:
    """The chunks a trie is forwarded in, in order; together they hold every row once.

    `capacity` is the largest number of rows on the KV cache at any time, a chunk's own included.
    """

    chunks: tuple[Chunk, ...]
    capacity: int

    def halved(self, k: int) -> "Plan":
        """The plan from chunk k on, with no chunk longer than half of that one; the capacity suffices as it is.

        It begins with the cache as chunk k finds it: compacted, its own rows not yet there.
        """
        first = self.chunks[k]
        most = (first.last_row - first.first_row + 1) // 2
        edges = [row for chunk in self.chunks[k:] for row in range(chunk.first_row, chunk.last_row, most)]
        return Plan(_chunks(first._trie, [*edges, self.chunks[-1].last_row], first.first_row), self.capacity)


@dataclass(frozen=True)
class Slice:
    """Rows [first_row, last_row), forwarded together."""

    first_row: int
    last_row: int


@dataclass(frozen=True)
class Slices:
    """Consecutive slices, in order; a plan for rows whose place in the cache is known otherwise."""

    chunks: tuple[Slice, ...]

    def halved(self, k: int) -> "Slices":
        """The slices from number k on, none longer than half of that one."""
        first = self.chunks[k]
        most = (first.last_row - first.first_row + 1) // 2
        return slices(self.chunks[-1].last_row, most, first_row=first.first_row)


def slices(num_rows: int, max_rows: int, *, first_row: int = 0) -> Slices:
    """Rows first_row to num_rows in slices of `max_rows`, the last one perhaps smaller."""
    edges = [*range(first_row, num_rows, max_rows), num_rows]
    return Slices(tuple(Slice(a, b) for a, b in pairwise(edges)))


def plan(trie: Trie, max_rows: int, *, known: int = 0, cut: int = 0) -> Plan:
    """Cut a trie's rows into chunks of `max_rows` >= 1 consecutive rows, the last one perhaps smaller.

    The first `known` rows, which have been forwarded already and have every other row below them, are a chunk of their
    own, and no chunk goes over row `cut`. The KV cache of a chunk is never longer than its rows plus the longest path,
    whatever the size of the trie.
    """
    edges = _edges(trie, max_rows, known, cut)
    return Plan(_chunks(trie, edges, 0), extent(trie, max_rows, known=known, cut=cut)[1])


def extent(trie: Trie, max_rows: int, *, known: int = 0, cut: int = 0) -> tuple[int, int]:
    """The most rows that the same plan() forwards at a time, and its capacity."""
    edges = np.asarray(_edges(trie, max_rows, known, cut))
    rows = np.diff(edges)
    on_stack = trie.depth.numpy()[edges[:-1]] + rows
    return int(rows[bool(known) :].max(initial=0)), int(on_stack.max(initial=0))


def _edges(trie: Trie, max_rows: int, known: int, cut: int) -> list[int]:
    """The first row of each chunk, and the number of rows."""
    if max_rows < 1:
        raise ValueError(f"max_rows: expected at least 1, got {max_rows}")
    num_rows = len(trie.token)
    return [
        *([0] if known else []),
        *range(known, cut, max_rows),
        *range(max(known, cut), num_rows, max_rows),
        num_rows,
    ]


def _chunks(trie: Trie, edges: list[int], previous_row: int) -> tuple[Chunk, ...]:
    """The chunks between the edges; `previous_row` begins the chunk whose cache the first one finds."""
    # A sibling comes after its elder's whole subtree, so scored nodes are regrouped by parent; numpy's stable sort is
    # several times faster than torch's on such nearly sorted values.
    scored = torch.from_numpy(np.argsort(trie.scored_row.numpy(), kind="stable"))
    scored_row = trie.scored_row[scored]
    cuts = torch.searchsorted(scored_row, torch.tensor(edges, dtype=torch.int32)).tolist()
    chunks = []
    for k, first_row in enumerate(edges[:-1]):
        index = scored[cuts[k] : cuts[k + 1]]
        rows, inverse = torch.unique_consecutive(scored_row[cuts[k] : cuts[k + 1]], return_inverse=True)
        chunk = Chunk(
            first_row=first_row,
            last_row=edges[k + 1],
            cached_rows=int(trie.depth[first_row]),
            head_rows=rows - first_row,
            target_row=inverse.int(),
            target_token=trie.scored_token[index],
            target_index=index,
            _previous_row=edges[k - 1] if k else previous_row,
            _trie=trie,
        )
        chunks.append(chunk)
    return tuple(chunks)


def _vector(name: str, values: Any, dtype: type[np.generic]) -> NDArray[Any]:
    """A contiguous one-dimensional array of exactly this dtype, sharing the caller's memory where it can."""
    values = values.numpy() if isinstance(values, Tensor) and values.device.type == "cpu" else values
    if not isinstance(values, np.ndarray) or values.dtype != dtype:
        got = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"{name}: expected a CPU tensor or an array of {dtype.__name__}, got {got}")
    if values.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {values.shape}")
    return np.ascontiguousarray(values)
