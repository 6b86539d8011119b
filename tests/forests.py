"""Random forests in pre-order, as attention sees them; what is visible comes from parent pointers, not intervals."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from hypothesis import strategies as st


class Forest(NamedTuple):
    """Queries and keys in stack coordinates."""

    row_q: list[int]
    end_k: list[int]
    depth_q: list[int]
    depth_k: list[int]
    visible: list[list[bool]]  # [T][S]


def forest(
    pops: Sequence[int],
    start: int = 0,
    stop: int | None = None,
    queries: Sequence[int] | None = None,
    unfilled: Collection[int] = (),
) -> Forest:
    """The forest whose row i closes pops[i] of the open rows and hangs under what is left of them.

    The stack holds the ancestors of row `start` that are still open there and the chunk of rows start..stop - 1. The
    queries are stack rows (default: the chunk's); `unfilled` stack rows have end 0.
    """
    stop = len(pops) if stop is None else stop
    paths: list[list[int]] = []
    for row, pop in enumerate(pops):
        above = paths[-1] if paths else []
        paths.append([*above[: max(0, len(above) - pop)], row])
    end = [0] * len(pops)
    for row, path in enumerate(paths):
        for node in path:
            end[node] = row + 1
    kept = [row for row in range(start) if end[row] > start]
    stack = [*kept, *range(start, stop)]
    queries = range(len(kept), len(stack)) if queries is None else queries
    return Forest(
        row_q=list(queries),
        end_k=[0 if i in unfilled else end[row] - start + len(kept) for i, row in enumerate(stack)],
        depth_q=[len(paths[stack[i]]) - 1 for i in queries],
        depth_k=[len(paths[row]) - 1 for row in stack],
        visible=[
            [row in path and j not in unfilled for j, row in enumerate(stack)]
            for path in (set(paths[stack[i]]) for i in queries)
        ],
    )


@st.composite
def forests(draw: st.DrawFn, max_rows: int = 40, contexts: Sequence[int] = (0,)) -> Forest:
    """Any chunk of any forest, behind its kept ancestors; sometimes some queries only, and rows not filled yet.

    The first tree starts with a chain of one of `contexts` rows.
    """
    pops = [0] * draw(st.sampled_from(contexts))
    pops += draw(st.lists(st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3, 99]), max_size=max_rows))
    start = draw(st.integers(0, len(pops)))
    stop = draw(st.integers(start, len(pops)))
    whole = forest(pops, start, stop)
    rows = st.integers(0, max(0, len(whole.end_k) - 1))
    if not whole.end_k or draw(st.booleans()):
        return whole
    queries, unfilled = draw(st.lists(rows, unique=True)), draw(st.sets(rows))
    return forest(pops, start, stop, queries, unfilled)
