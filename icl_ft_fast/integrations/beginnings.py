"""Beginnings that requests have in common, such as a task's worked examples, and that are worth a saved context."""

from __future__ import annotations

from collections.abc import Sequence

from icl_ft_fast.engine.encoding import common

WORTH_TOKENS = 64  # a beginning is kept from so many new tokens on: a shorter one is forwarded faster than found


def beginnings(pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """(indices of pairs, the tokens that all their contexts begin with): each pair once.

    Those that go together have their first WORTH_TOKENS tokens in common and more than one context among them; the
    others come last, under no tokens.
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
