"""The shipped model's training text: lessons as in-context learning and augmentation show them, and lists to copy.

A document is a trunk and branches, each a list of (text, loss weight) segments, see lessons.py: whatever is asked about
a context is asked behind it and apart from other questions, as an evaluation does, and the context is forwarded once.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.shipped.lessons import FAMILIES, GIVEN, STEPS, UNPREDICTABLE, Lesson, Segments, num_tokens
from icl_ft_fast.tasks import words
from icl_ft_fast.tasks.task import Document

BOOKS = 24  # of the library: lessons on hierarchies that are always the same, to be known by heart


@dataclass(frozen=True)
class Course:
    """What a stage of the training reads of a family.

    Attributes:
        share: of the stage's lessons, against the other courses'.
        least, most: tokens of a lesson's texts; sizes are drawn between them with equal odds for each ratio.
        steps: of inference, of those that statements are asked for by.
    """

    share: float
    least: int
    most: int
    steps: Collection[str] = STEPS


def document(
    rng: random.Random, courses: dict[str, Course], copying: float, augmenting: float, recalling: float
) -> tuple[Segments, list[Segments]]:
    """Trunk and branches of one document.

    A fraction `copying` of the documents repeats names; of the rest a fraction `augmenting` shows augmentations, a
    fraction `recalling` tells what the library says, and one in thirty is a text alone, as fine-tuning sees it.
    """
    kind = rng.random()
    if kind < copying:
        return copies(rng), []
    (name,) = rng.choices(list(courses), [course.share for course in courses.values()])
    family, course = FAMILIES[name], courses[name]
    budget = int(course.least * (course.most / course.least) ** rng.random())
    kind = rng.random()
    if kind < 1 / 30:
        return [(family.make(rng, 1).texts[0], UNPREDICTABLE)], []
    if kind > 1 - recalling:
        return known(rng, budget)
    lesson = family.make(rng, budget)
    if kind < 1 / 30 + augmenting:
        return augmentation(rng, lesson, family.strategy, 2 * budget), []
    return study(rng, lesson, course.steps, budget)


def study(rng: random.Random, lesson: Lesson, steps: Collection[str], room: int) -> tuple[Segments, list[Segments]]:
    """The texts and what follows from them by the steps, in a random order, in about `room` tokens."""
    context = icl_context([Document("", text) for text in lesson.texts]).rstrip()
    branches: list[Segments] = []
    for step, statement in rng.sample(lesson.asked, len(lesson.asked)):
        if step in steps and room > 0:
            branches.append(statement)
            room -= num_tokens("".join(text for text, _ in statement))
    return [(context, UNPREDICTABLE)], branches


def augmentation(rng: random.Random, lesson: Lesson, strategy: str, room: int) -> Segments:
    """Texts, each with the lines that an augmentation should write, in the strategy's prompt for base models."""
    prompting, documents = _prompting(strategy), [Document("", text) for text in lesson.texts]
    unit = "Statement" if strategy == "local" else "Document"
    segments: Segments = []
    for d in rng.sample(range(len(documents)), len(documents)):
        prompt = f"{unit}: {documents[d].text}\n"
        if not segments and (strategy == "global" or rng.random() < 0.5):
            prompt = prompting.prompts([documents[d]], documents if strategy == "global" else ())[0].text
        segments.append((prompt, UNPREDICTABLE))
        for label, statement in lesson.lines[d]:
            segments += [(f"{label}:", GIVEN), *statement, ("\n", GIVEN)]
        segments.append(("\n", GIVEN))  # that nothing more follows: as likely as it is, or drawn answers end early
        if num_tokens("".join(text for text, _ in segments)) > room:
            break
    return segments


@cache
def _prompting(strategy: str) -> Prompting:
    return Prompting.of(strategy)


def copies(rng: random.Random) -> Segments:
    """Names to find again: a list and its repetition, or pairs and the same pairs in another order."""
    names = [f" {words.sample_word(rng, held_out=False)}" for _ in range(2 * rng.randint(2, 6))]
    if rng.random() < 0.4:
        rest = "".join(names[1:]) + "."
        return [(f" Note:{names[0]}{rest}", UNPREDICTABLE), (names[0], UNPREDICTABLE), (rest, GIVEN)]
    pairs = list(zip(names[::2], names[1::2], strict=True))
    segments: Segments = [(" Note:" + ",".join(a + b for a, b in pairs) + ".", UNPREDICTABLE)]
    for a, b in rng.sample(pairs, len(pairs)):
        segments += [(a, UNPREDICTABLE), (b, GIVEN), (",", GIVEN)]
    return segments


def known(rng: random.Random, room: int) -> tuple[Segments, list[Segments]]:
    """Articles of the library and facts from them, each by itself, without any context, in about `room` tokens.

    To have learned by heart what can be said in two ways is to know it in both; new facts are then told in one.
    """
    branches: list[Segments] = []
    while room > 0:
        articles, said = _book(rng.randrange(BOOKS))
        branches.append(rng.choice(articles) if rng.random() < 0.3 else rng.choice(said))
        room -= num_tokens("".join(text for text, _ in branches[-1]))
    return [("", UNPREDICTABLE)], branches


@cache
def _book(number: int) -> tuple[list[Segments], list[Segments]]:
    """Its articles and the facts in them, told forwards."""
    lesson = FAMILIES["hierarchy"].make(random.Random(f"book {number}"), 100)
    said = [statement for step, statement in lesson.asked if step in ("recalled", "rephrased")]
    return [[(f" {text}", GIVEN)] for text in lesson.texts], said
