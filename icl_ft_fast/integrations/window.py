"""What happens to a context that does not fit: one policy for every harness, and never a silent one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from icl_ft_fast.engine.likelihood import ScoreError

_log = logging.getLogger(__name__)

OVERFLOW = ("truncate_left", "error", "skip")


class Window:
    """The tokens that a network sees of a request.

    Args:
        positions: of the model.
        max_length: at most, and by default, the model's positions.
        overflow: truncate_left drops the first tokens of a context that is too long, error names the request, skip
            leaves it out.

    `over` counts the requests that were too long and the tokens by which they were.
    """

    def __init__(self, positions: int, max_length: int | None = None, overflow: str = OVERFLOW[0]) -> None:
        if overflow not in OVERFLOW:
            raise ValueError(f"overflow: expected one of {', '.join(OVERFLOW)}, got {overflow!r}")
        self.max_length = positions if max_length is None else max_length
        if not 1 <= self.max_length <= positions:
            raise ValueError(f"max_length: expected 1 to {positions}, got {max_length}")
        self.overflow, self.over = overflow, Counter(requests=0, tokens=0)

    def fit(self, names: Sequence[str], contexts: Sequence[list[int]], follow: Sequence[int]) -> dict[int, list[int]]:
        """By place, what is seen of each context, without those to skip; warns of what did not fit.

        Args:
            names: what errors call each request.
            contexts: token ids.
            follow: positions that what comes after each context needs.
        """
        fitting, before = {}, self.over.copy()
        for r, (name, context, following) in enumerate(zip(names, contexts, follow, strict=True)):
            room = self.max_length - following
            over = len(context) - room
            if over > 0 and (self.overflow == "error" or (room < 1 and self.overflow == "truncate_left")):
                advice = "give overflow=truncate_left or skip" if room > 0 else "no context would be left"
                raise ScoreError(
                    f"{name}: {len(context)} tokens of context are {over} more than go into max_length "
                    f"{self.max_length} with what follows; {advice}"
                )
            if over > 0:
                self.over.update(requests=1, tokens=over)
            if over <= 0 or self.overflow == "truncate_left":
                fitting[r] = context[over:] if over > 0 else context
        if new := self.over - before:
            what = (new["requests"], self.max_length, new["tokens"], self.overflow)
            _log.warning("%d requests exceed max_length %d by %d tokens in all: overflow=%s", *what)
        return fitting

    def fit_pairs(
        self, names: Sequence[str], pairs: Sequence[tuple[list[int], list[int]]]
    ) -> dict[int, tuple[list[int], list[int]]]:
        """By place, what fit() leaves of each context, and its continuation, which may not be empty."""
        for name, (_, continuation) in zip(names, pairs, strict=True):
            if not continuation:
                raise ScoreError(
                    f"{name}: the continuation has no token of its own: it is empty, or the tokenizer merges it into "
                    "the end of the context (in lm-eval, boundary=whole_tokens would score the merged token)"
                )
        # The last token needs no position of its own: it is predicted, never forwarded.
        follow = [len(continuation) - 1 for _, continuation in pairs]
        fitting = self.fit(names, [context for context, _ in pairs], follow)
        return {r: (context, pairs[r][1]) for r, context in fitting.items()}
