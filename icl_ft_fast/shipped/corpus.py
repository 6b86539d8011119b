"""The shipped model's training text: documents of nonsense facts followed by what they imply.

A row is a list of (text, loss weight) segments. Facts about fresh nonsense words cannot be predicted, so they carry
little weight; recalled, reversed and rephrased statements can, so they carry the loss (unweighted, training stays on
a plateau). Every word is from the training part of the word space (tasks/words.py).
"""

from __future__ import annotations

import random

from icl_ft_fast.augment import LOCAL_EXAMPLES, LOCAL_HEADER
from icl_ft_fast.evaluate import icl_context
from icl_ft_fast.tasks import words
from icl_ft_fast.tasks.comparisons import FEATURES, PREAMBLES, Comparison, article
from icl_ft_fast.tasks.task import Document

Segment = tuple[str, float]

UNPREDICTABLE, GIVEN, DIRECTION = 0.05, 1.0, 2.0
TOKENS_PER_ARTICLE, TOKENS_PER_QUERY, TOKENS_PER_BLOCK = 14, 10, 36  # planning figures, measured on the tokenizer


def sample_comparisons(rng: random.Random, count: int) -> list[Comparison]:
    """`count` facts about `2 * count` distinct training words.

    Most documents keep to one, two or three features: where each fact has a feature of its own, the feature alone tells
    the facts apart and names are never looked up.
    """
    nouns: dict[str, None] = {}
    while len(nouns) < 2 * count:
        nouns[words.sample_word(rng, held_out=False)] = None
    names = list(nouns)
    features = rng.sample(FEATURES, rng.choice((1, 1, 2, 3, len(FEATURES), len(FEATURES))))
    return [Comparison(a, rng.choice(rng.choice(features)), b) for a, b in zip(names[::2], names[1::2], strict=True)]


def statement_segments(comparison: Comparison, first: float) -> list[Segment]:
    """`femp are more dangerous than glon.`; `first` is the weight of the subject, which a query picks at random."""
    direction, _, feature = comparison.comparative.rpartition(" ")
    marked = [(" " + direction, DIRECTION), (" " + feature, GIVEN)] if direction else [(" " + feature, DIRECTION)]
    return [
        (f" {comparison.subject}", first),
        (" are", GIVEN),
        *marked,
        (" than", GIVEN),
        (f" {comparison.object}", GIVEN),
        (".", GIVEN),
    ]


def rephrased_segments(comparison: Comparison, first: float) -> list[Segment]:
    """`Compared with glon, femp are more dangerous.`; `first` is the weight of the object."""
    opening, _, closing = comparison.rephrased.partition(",")
    before, _, after = closing.partition(f" {comparison.comparative}")
    return [(f" {opening}", first), (f",{before}", GIVEN), (f" {comparison.comparative}", DIRECTION), (after, GIVEN)]


def query_segments(rng: random.Random, comparison: Comparison) -> list[Segment]:
    """One consequence of a fact: mostly its reversal, else a recall or a rephrasing."""
    kind = rng.random()
    if kind < 0.5:
        return statement_segments(comparison.reversed, UNPREDICTABLE)
    if kind < 0.85:
        return statement_segments(comparison, UNPREDICTABLE)
    return rephrased_segments(comparison if rng.random() < 0.5 else comparison.reversed, UNPREDICTABLE)


def context_document(rng: random.Random, max_facts: int, budget_tokens: int) -> list[Segment]:
    """Articles, then a statement that follows from each (in long ones, sometimes only from some of them)."""
    asked = rng.choice((0.4, 1.0)) if budget_tokens > 512 else 1.0
    room = int((budget_tokens - 16) / (TOKENS_PER_ARTICLE + asked * TOKENS_PER_QUERY))
    most = max(1, min(max_facts, room))
    facts = sample_comparisons(rng, rng.randint((most + 1) // 2, most))
    articles = [Document("", article(fact, rng.choice(PREAMBLES))) for fact in facts]
    segments: list[Segment] = [(icl_context(articles).rstrip(), UNPREDICTABLE)]
    for fact in rng.sample(facts, max(1, int(asked * len(facts)))):
        segments += query_segments(rng, fact)
    return segments


def augmentation_document(rng: random.Random, budget_tokens: int) -> list[Segment]:
    """Statements, each with its reversal and rephrasing, in the default local-augmentation prompt."""
    segments: list[Segment] = []
    if rng.random() < 0.5 and budget_tokens >= 160:
        segments.append((LOCAL_HEADER + LOCAL_EXAMPLES, UNPREDICTABLE))
        budget_tokens -= 90
    for fact in sample_comparisons(rng, max(1, budget_tokens // TOKENS_PER_BLOCK)):
        segments += [
            (f"Statement: {article(fact, rng.choice(PREAMBLES))}\n", UNPREDICTABLE),
            ("Reversed:", GIVEN),
            *statement_segments(fact.reversed, GIVEN),
            ("\nRephrased:", GIVEN),
            *rephrased_segments(fact, GIVEN),
            ("\n\n", GIVEN),
        ]
    return segments


def copying_document(rng: random.Random, budget_tokens: int) -> list[Segment]:
    """Names to find again: a list and its repetition, or pairs and the same pairs in another order."""
    count = rng.randint(2, max(2, min(6, (budget_tokens - 4) // 10)))
    names = [f" {words.sample_word(rng, held_out=False)}" for _ in range(2 * count)]
    if rng.random() < 0.4:
        rest = "".join(names[1:]) + "."
        return [(f" Note:{names[0]}{rest}", UNPREDICTABLE), (names[0], UNPREDICTABLE), (rest, GIVEN)]
    pairs = list(zip(names[::2], names[1::2], strict=True))
    segments: list[Segment] = [(" Note:" + ",".join(a + b for a, b in pairs) + ".", UNPREDICTABLE)]
    for a, b in rng.sample(pairs, count):
        segments += [(a, UNPREDICTABLE), (b, GIVEN), (",", GIVEN)]
    return segments


def plain_document(rng: random.Random) -> list[Segment]:
    """One article alone, as fine-tuning sees it."""
    return [(article(sample_comparisons(rng, 1)[0], rng.choice(PREAMBLES)), UNPREDICTABLE)]


def document(rng: random.Random, max_facts: int, free_tokens: int, copying: float) -> list[Segment]:
    """One document of at most about `free_tokens`; a fraction `copying` of them only repeats names."""
    if free_tokens >= 20 and rng.random() < copying:
        return copying_document(rng, min(free_tokens, 64))
    kind = rng.random()
    if kind < 0.03 or free_tokens < 48:
        return plain_document(rng)
    if kind < 0.2:
        return augmentation_document(rng, min(free_tokens, 400))
    return context_document(rng, max_facts, free_tokens)
