"""What the model writes for an arm to train on: by which strategies, how much of each, and its own general text.

A budget of tokens is filled reply by reply: all prompts once, then all a second time, until there are enough. Of the
last time a seeded selection is taken, so a smaller budget's texts are among a larger one's.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

from icl_ft_fast.augmentation.batches import PromptBatch, augment_by_model
from icl_ft_fast.augmentation.generators import TextGenerator
from icl_ft_fast.augmentation.strategies import find
from icl_ft_fast.augmentation.strategy import Augmentation, Augmented
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.study.own_texts import TEXT_TOKENS, own_texts
from icl_ft_fast.study.settings import SELF_ASK, StudySettings

LEAST_REPLY_TOKENS = 16  # of a prompt on average, by which the prompts for a budget of tokens are counted
REPLAY_SEED = 1_000_003  # of texts to train on, far from the seeds of those that harm is measured on


def writers(is_chat: bool, settings: StudySettings, *, asks_itself: bool = False) -> dict[str, float]:
    """The strategies that write for an arm, each with its share of the synthetic tokens.

    Args:
        is_chat: whether the generator is asked as a chat: it then writes questions by "self-ask", where the settings
            name no strategy.
        settings: of the study.
        asks_itself: whether questions are all that is written.
    """
    questions = settings.questions or (SELF_ASK if is_chat else settings.strategy)
    if asks_itself:
        return {questions: 1.0}
    if settings.mix is None:
        return {settings.strategy: 1.0}
    of_questions, of_documents = settings.mix
    shares = {settings.strategy: of_documents, questions: of_questions}
    if len(shares) == 1:
        return {settings.strategy: 1.0}
    return {name: share / (of_documents + of_questions) for name, share in shares.items()}


def samples_for(strategy: str, num_prompts: int, tokens: float | None, samples: int) -> int:
    """Replies to each prompt: as asked for, or as many as a budget of tokens may take."""
    if tokens is None or not find(strategy).temperature:
        return samples
    return max(samples, math.ceil(tokens / (LEAST_REPLY_TOKENS * max(1, num_prompts))))


def surely_needed(batches: Sequence[PromptBatch], tokens: int) -> list[PromptBatch]:
    """The batches that a budget takes even if every reply is as long as it may be.

    Strategies that share a budget count as if their shares were equal: workers write these beforehand, and an arm
    writes what else it needs.
    """
    strategies = {batch.prompting.strategy.name for batch in batches}
    first = [batch for batch in batches if not batch.prompts[0].sample]
    longest = dict.fromkeys(strategies, 0)  # tokens of one go through the prompts
    for batch in first:
        per_prompt = batch.sampling.max_new_tokens * (1 + batch.prompting.strategy.follow_ups)
        longest[batch.prompting.strategy.name] += len(batch.prompts) * per_prompt
    rounds = {name: tokens / len(strategies) / most for name, most in longest.items() if most}
    return [batch for batch in batches if batch.prompts[0].sample < rounds[batch.prompting.strategy.name]]


def written(
    model: Model,
    writer: TextGenerator,
    batches: Sequence[PromptBatch],
    shares: Mapping[str, float],
    *,
    tokens: int | None = None,
    journal: ResultJournal | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> Augmented:
    """The rows of the batches' replies, as far as shares and budget take them.

    Args:
        model: of the study, which counts the tokens.
        writer: what the batches were made for.
        batches: of all strategies in `shares`; with a budget, each batch has one sample of its prompts.
        shares: strategies with their shares of the tokens, from writers().
        tokens: of all rows together; the last row is taken whole. None takes what one go through the batches gives.
        journal: where batches are looked up and put, see augment_by_model().
        ledger: counts the work.
        progress: show a bar of replies.
    """
    parts, seed = {}, batches[0].sampling.seed if batches else 0
    for strategy, share in shares.items():
        its = [batch for batch in batches if batch.prompting.strategy.name == strategy]
        part, left = Augmented((), {}), math.inf if tokens is None else tokens * share
        for _, layer in itertools.groupby(its, key=lambda batch: batch.prompts[0].sample if tokens is not None else 0):
            if left <= 0:
                break
            more = augment_by_model(writer, list(layer), journal=journal, ledger=ledger, progress=progress)
            if tokens is not None:
                more = _taken(model, _new(more, part), left, seed)
                left -= token_count(model, [row.text for row in more.rows])
            part = _plus(part, more)
        parts[strategy] = part
    if tokens is None and len(parts) > 1:  # what is less decides how much of the others is taken
        counts = {name: token_count(model, [row.text for row in part.rows]) for name, part in parts.items()}
        whole = min(counts[name] / shares[name] for name in parts)
        parts = {name: _taken(model, part, whole * shares[name], seed) for name, part in parts.items()}
    return reduce(_plus, parts.values())


def token_count(model: Model, texts: Sequence[str]) -> int:
    """Tokens of texts, without special ones."""
    return sum(map(len, encoding.encode(model.tokenizer, list(texts), bos=False))) if texts else 0


def general_texts(
    model: Model, tokens: float, seed: int, *, journal: ResultJournal | None = None, ledger: Ledger | None = None
) -> list[str]:
    """The model's own general text, of about so many tokens, none of which harm is measured on."""
    wanted = max(1, math.ceil(tokens / TEXT_TOKENS))
    written = own_texts(model, REPLAY_SEED + seed, journal=journal, num_texts=wanted, ledger=ledger)
    texts: list[str] = model.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [text for text in texts if text.strip()]


def _new(made: Augmented, before: Augmented) -> Augmented:
    """The rows that were not there before."""
    known, rows = {row.text.casefold() for row in before.rows}, []
    for row in made.rows:
        if row.text.casefold() not in known:
            known.add(row.text.casefold())
            rows.append(row)
    return _without(made, rows, "duplicates")


def _taken(model: Model, made: Augmented, tokens: float, seed: int) -> Augmented:
    """Rows of a seeded selection that has so many tokens, the last one whole, in their own order."""
    lengths = [token_count(model, [row.text]) for row in made.rows]
    chosen, count = set(), 0
    for i in random.Random(seed).sample(range(len(lengths)), len(lengths)):
        if count >= tokens:
            break
        chosen.add(i)
        count += lengths[i]
    return _without(made, [row for i, row in enumerate(made.rows) if i in chosen], "beyond_budget")


def _without(made: Augmented, rows: Sequence[Augmentation], step: str) -> Augmented:
    if len(rows) == len(made.rows):
        return made
    dropped = made.dropped | {step: made.dropped.get(step, 0) + len(made.rows) - len(rows)}
    return replace(made, rows=tuple(rows), dropped=dropped)


def _plus(first: Augmented, second: Augmented) -> Augmented:
    """Both, their counts added."""
    steps = dict.fromkeys([*first.dropped, *second.dropped])
    dropped = {step: first.dropped.get(step, 0) + second.dropped.get(step, 0) for step in steps}
    counts = {name: value + getattr(second, name) for name, value in vars(first).items() if isinstance(value, int)}
    return Augmented((*first.rows, *second.rows), dropped, **counts)
