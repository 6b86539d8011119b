"""Prefixes that requests share, such as a task's worked examples, and that are worth caching."""

from __future__ import annotations

from collections.abc import Sequence

from icl_ft_fast.engine.encoding import common

WORTH_TOKENS = 64  # a shorter prefix is computed faster than it is looked up


def group_by_prefix(pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Groups (indices of pairs, the token prefix that all their contexts share): each pair is in one group.

    The contexts of a group share at least WORTH_TOKENS tokens and are not all equal; all other pairs form the last
    group, whose prefix is empty.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for p, (context, _) in enumerate(pairs):
        alike.setdefault(tuple(context[:WORTH_TOKENS]), []).append(p)
    groups, alone = [], []
    for start, members in alike.items():
        # The first and the last in order differ where any two do.
        first, last = (order(pairs[m][0] for m in members) for order in (min, max))
        if len(start) == WORTH_TOKENS and first != last:
            groups.append((members, first[: common(first, last)]))
        else:
            alone += members
    return groups + ([(alone, [])] if alone else [])
