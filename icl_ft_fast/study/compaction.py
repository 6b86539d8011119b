"""Documents compacted into fewer keys and values, by itself: what the arm `compacted` puts before every question."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from icl_ft_fast.engine import compaction, encoding
from icl_ft_fast.engine.kv_cache import Context
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.engine.slots import key_of, slots_context
from icl_ft_fast.tasks.task import Document, Task


@dataclass(frozen=True)
class CompactedContext:
    """Compacted documents, for save_context(), ContextStore.add() and loglikelihood(start=...).

    Attributes:
        key: a text that stands for them: score(context=key, store=...) asks behind the slots.
        context: keys and values under the key's tokens.
        error: root mean square error of attention's output over what was matched, relative to the output.
    """

    key: str
    context: Context
    error: float


def compact(
    model: Model,
    documents: Task | Sequence[Document],
    ratio: float = 8,
    *,
    template: str = "base",
    ledger: Ledger | None = None,
) -> CompactedContext:
    """Compact documents to one slot, a key and a value in each head, for `ratio` of their tokens; without training.

    Args:
        model: from load(), with rotary positions and attention without sliding windows, soft-caps or sinks.
        documents: at least one; together they and one of them fit the model's positions.
        ratio: from 1 on. The slots are at least as many as the tokens that a text begins with, and one.
        template: what stands around documents and question, see prompt_context().
        ledger: counts of the phase "compact" are added to it.

    Raises:
        CompactionError: no documents, a ratio out of range, too long documents, or a model without these properties.

    Source: attention matching (arXiv 2602.16284), see engine/compaction.py.

    Examples:
        >>> documents = [iff.Document("d", "femp are wider than glon. glon are warmer than trup.")]
        >>> made = iff.compact(iff.load("shipped"), documents, 2)
        >>> len(made.context.token)  # of 27, with the template's words
        14
    """
    shown = documents.documents if isinstance(documents, Task) else documents
    if not 1 <= ratio < math.inf:
        raise compaction.CompactionError(f"ratio: expected a number from 1 on, got {ratio}")
    if not shown:
        raise compaction.CompactionError("documents: expected at least one")
    token, num_slots, followers = tokens_to_compact(model, prompt_context(model, shown, template), shown, ratio)
    made = compaction.compact(model, token, num_slots, followers, ledger=ledger)
    name = hashlib.sha256(json.dumps([token, num_slots, followers]).encode()).hexdigest()
    key, ids = key_of(model, name, num_slots)
    return CompactedContext(key, slots_context(model, made.layers, made.hidden, ids), made.mean_error)


def tokens_to_compact(
    model: Model, text: str, documents: Sequence[Document], ratio: float
) -> tuple[list[int], int, list[list[int]]]:
    """The context's tokens, the number of slots for them, and the tokens that are read behind it."""
    (token,) = encoding.encode(model.tokenizer, [text.rstrip()])
    followers = encoding.encode(model.tokenizer, [f" {document.text}" for document in documents], bos=False)
    num_slots = max(len(encoding.opening(model.tokenizer)) + 1, round(len(token) / ratio))
    return token, min(num_slots, len(token)), followers
