"""The shipped model's training text: lessons as in-context learning and augmentation show them, and lists to copy.

A document is a list of (text, loss weight) segments, see lessons.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from icl_ft_fast.augment.prompts import Prompting
from icl_ft_fast.evaluate import icl_context
from icl_ft_fast.shipped import lessons
from icl_ft_fast.shipped.lessons import GIVEN, UNPREDICTABLE, Lesson, Segments, num_tokens
from icl_ft_fast.tasks import words
from icl_ft_fast.tasks.task import Document

AROUND = 16  # tokens of the templates


def study_document(rng: random.Random, lesson: Lesson, free_tokens: int) -> Segments:
    """The texts, then as many statements that follow as fit (in long documents, sometimes only some of them)."""
    context = icl_context([Document("", text) for text in lesson.texts]).rstrip()
    room = free_tokens - num_tokens(context)
    fraction = rng.choice((0.4, 1.0)) if free_tokens > 512 else 1.0
    segments = [(context, UNPREDICTABLE)]
    for statement in lesson.asked[: max(1, int(fraction * len(lesson.asked)))]:
        segments += statement
        room -= num_tokens("".join(text for text, _ in statement))
        if room <= 0:
            break
    return segments


def augmentation_document(rng: random.Random, lesson: Lesson, strategy: str, free_tokens: int) -> Segments:
    """Texts, each with the lines that an augmentation should write, in the strategy's prompt for base models."""
    prompting, documents = _prompting(strategy), [Document("", text) for text in lesson.texts]
    unit = "Statement" if strategy == "local" else "Document"
    segments: Segments = []
    for d in rng.sample(range(len(documents)), len(documents)):
        prompt = f"{unit}: {documents[d].text}\n"
        if not segments and (strategy == "global" or (free_tokens >= 160 and rng.random() < 0.5)):
            prompt = prompting.asks([documents[d]], documents if strategy == "global" else ())[0].prompt
        segments.append((prompt, UNPREDICTABLE))
        for label, statement in lesson.lines[d]:
            segments += [(f"{label}:", GIVEN), *statement, ("\n", GIVEN)]
        segments.append(("\n", GIVEN))
        if num_tokens("".join(text for text, _ in segments)) > free_tokens:
            break
    return segments


@cache
def _prompting(strategy: str) -> Prompting:
    return Prompting.of(strategy)


def copying_document(rng: random.Random, free_tokens: int) -> Segments:
    """Names to find again: a list and its repetition, or pairs and the same pairs in another order."""
    count = rng.randint(2, max(2, min(6, (free_tokens - 4) // 10)))
    names = [f" {words.sample_word(rng, held_out=False)}" for _ in range(2 * count)]
    if rng.random() < 0.4:
        rest = "".join(names[1:]) + "."
        return [(f" Note:{names[0]}{rest}", UNPREDICTABLE), (names[0], UNPREDICTABLE), (rest, GIVEN)]
    pairs = list(zip(names[::2], names[1::2], strict=True))
    segments: Segments = [(" Note:" + ",".join(a + b for a, b in pairs) + ".", UNPREDICTABLE)]
    for a, b in rng.sample(pairs, count):
        segments += [(a, UNPREDICTABLE), (b, GIVEN), (",", GIVEN)]
    return segments


def document(
    rng: random.Random, most: int, free_tokens: int, copying: float, shares: Sequence[float] = (1, 1, 1, 1)
) -> Segments:
    """One document of at most `most` texts and about `free_tokens`; a fraction `copying` of them only repeats names.

    The others are of the families of lessons, by their shares.
    """
    if free_tokens >= 20 and rng.random() < copying:
        return copying_document(rng, min(free_tokens, 64))
    family, kind = lessons.family(rng, shares, free_tokens), rng.random()
    if kind < 0.03 or free_tokens < 48:  # a text alone, as fine-tuning sees it
        return [(family.make(rng, 1, free_tokens).texts[0], UNPREDICTABLE)]
    if kind < 0.2 and free_tokens >= 100:
        fraction = 0.35 if family.strategy == "global" else 0.3
        lesson = family.make(rng, most, int(fraction * (free_tokens - AROUND)))
        return augmentation_document(rng, lesson, family.strategy, free_tokens)
    fraction = 0.6 if free_tokens <= 512 else rng.choice((0.6, 0.8))
    return study_document(rng, family.make(rng, most, int(fraction * (free_tokens - AROUND))), free_tokens)
