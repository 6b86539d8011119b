"""Four families of lessons in nonsense words: texts, and what follows from them.

The families are those of the tasks, built from the tasks' own grammar on words of the training part (tasks/words.py),
at any size. A statement is a list of (text, loss weight) segments. What cannot be predicted (a fresh word, which fact
is asked about) carries little weight and what follows from the texts carries the loss: unweighted, training stays on a
plateau.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from icl_ft_fast.shipped.tokenizer import english_words
from icl_ft_fast.tasks import process, semantic, syllogisms, words
from icl_ft_fast.tasks.comparisons import FEATURES, PREAMBLES, Comparison, article

Segments = list[tuple[str, float]]

UNPREDICTABLE, LITTLE, GIVEN, DECISIVE = 0.05, 0.3, 1.0, 2.0

_ENGLISH = frozenset(english_words())
_PIECE = re.compile(r"[A-Za-z]+|[^A-Za-z ]")


@dataclass(frozen=True)
class Lesson:
    """Texts and what follows from them.

    Attributes:
        texts: documents, in a random order.
        asked: statements that follow from all texts together, most wanted first, as questions ask for them: what a
            question picks at random carries little weight.
        lines: for each text, what an augmentation of it should say: (label, statement).
    """

    texts: list[str]
    asked: list[Segments]
    lines: list[list[tuple[str, Segments]]]


def num_tokens(text: str) -> int:
    """Tokens of the shipped model's tokenizer, nearly: two a nonsense word, one for anything else."""
    return sum(1 if len(piece) == 1 or piece in _ENGLISH else 2 for piece in _PIECE.findall(text))


def comparisons(rng: random.Random, most: int, budget: int) -> Lesson:
    """One-sentence articles; each is asked for in the other direction (half), as it stands or in other words.

    Most lessons keep to one, two or three features: where each fact has a feature of its own, the feature alone tells
    the facts apart and names are never looked up.
    """
    count = max(1, min(most, budget // 14))
    names = words.sample_words(rng, 2 * count, held_out=False)
    features = rng.sample(FEATURES, rng.choice((1, 1, 2, 3, len(FEATURES), len(FEATURES))))
    facts = [Comparison(a, rng.choice(rng.choice(features)), b) for a, b in zip(names[::2], names[1::2], strict=True)]
    asked, lines = [], []
    for fact in facts:
        lines.append([("Reversed", compared(fact.reversed, GIVEN)), ("Rephrased", compared_with(fact, GIVEN))])
        kind = rng.random()
        if kind < 0.85:
            asked.append(compared(fact.reversed if kind < 0.5 else fact, UNPREDICTABLE))
        else:
            asked.append(compared_with(fact if rng.random() < 0.5 else fact.reversed, UNPREDICTABLE))
    return Lesson([article(fact, rng.choice(PREAMBLES)) for fact in facts], rng.sample(asked, count), lines)


def compared(fact: Comparison, first: float) -> Segments:
    """`femp are more dangerous than glon.`; `first` is the weight of the subject."""
    direction, _, feature = fact.comparative.rpartition(" ")
    marked = [(f" {direction}", DECISIVE), (f" {feature}", GIVEN)] if direction else [(f" {feature}", DECISIVE)]
    return [(f" {fact.subject}", first), (" are", GIVEN), *marked, (f" than {fact.object}.", GIVEN)]


def compared_with(fact: Comparison, first: float) -> Segments:
    """`Compared with glon, femp are more dangerous.`; `first` is the weight of the object."""
    before, _, after = fact.rephrased.partition(f" {fact.comparative}")
    opening, _, subject = before.partition(",")
    return [(f" {opening}", first), (f",{subject}", GIVEN), (f" {fact.comparative}", DECISIVE), (after, GIVEN)]


def categorical(rng: random.Random, most: int, budget: int) -> Lesson:
    """Pairs of premises; asked for are conclusions (three in four) and premises."""
    count = max(1, min(most, budget // 27))
    nouns = words.sample_words(rng, 3 * count, held_out=False)
    texts, asked, lines = [], [], []
    for e in range(count):
        form = rng.choice(syllogisms.FORMS)
        text, premises, conclusion = syllogisms.example(rng, form, nouns[3 * e : 3 * e + 3])
        texts.append(text)
        asked.append(_stated(rng, conclusion if rng.random() < 0.75 else rng.choice(premises), UNPREDICTABLE))
        lines.append([("Rephrased", _stated(rng, premise, LITTLE)) for premise in premises])
        lines[-1].append(("Inferred", _stated(rng, conclusion, LITTLE)))
    return Lesson(texts, rng.sample(asked, count), lines)


def _stated(rng: random.Random, claim: syllogisms.Claim, first: float) -> Segments:
    """`The relationships between a and b are: No b are a.`; `first` is the weight up to the colon."""
    mood, *entities = claim
    opening = syllogisms.opening(rng, entities)
    if mood != "A" and rng.random() < 0.5:  # "some" and "no" hold in both directions
        entities.reverse()
    subject, object = entities
    return [
        (f" {opening}", first), (f" {syllogisms.QUANTIFIERS[mood]}", DECISIVE),
        (f" {subject}", GIVEN if mood == "A" else LITTLE), (" are", LITTLE), (f" {object}", GIVEN), (".", LITTLE),
    ]  # fmt: skip


def hierarchy(rng: random.Random, most: int, budget: int) -> Lesson:
    """Articles on categories; asked for are what is inherited (nearly half), reversals and the same in other words."""
    world = semantic.sample_world(rng, rng.randint(12, max(12, most)), held_out=False)
    lineage = world.lineage(rng.choice(list(world.parent)))  # first, so that a short lesson has something to inherit
    rest = [category for category in world.parent if category not in lineage]
    articles: list[tuple[str, str, list[semantic.Fact]]] = []
    for category in lineage + rng.sample(rest, len(rest)):
        own = len(world.own[category])
        text, facts = semantic.article(rng, world, category, rng.randint(2, 6) if rng.random() < 0.5 else max(1, own))
        if articles and num_tokens(text) > budget:
            break
        budget -= num_tokens(text)
        articles.append((category, text, facts))
    rng.shuffle(articles)
    told = list(dict.fromkeys(fact for _, _, facts in articles for fact in facts))
    inherited = {category: _inherited(world, category, told) for category, _, _ in articles}
    wordings = rng.choices((semantic.REVERSED, semantic.REPHRASED, semantic.PLAIN), (6, 3, 1), k=len(told))
    recalled = [_filled(*pair, UNPREDICTABLE) for pair in zip(told, wordings, strict=True)]
    concluded = [
        _filled(fact, semantic.PLAIN if rng.random() < 0.8 else semantic.REVERSED, UNPREDICTABLE)
        for facts in inherited.values()
        for fact in facts
    ]
    lines = []
    for category, _, facts in articles:
        lines.append([(label, _filled(fact, wording, GIVEN)) for fact in facts for label, wording in _RETOLD])
        lines[-1] += [("Inferred", _filled(fact, wording, GIVEN)) for fact in inherited[category] for wording in _DRAWN]
    return Lesson([text for _, text, _ in articles], _merged(rng, concluded, recalled, 0.45), lines)


_RETOLD = (("Rephrased", semantic.REPHRASED), ("Inferred", semantic.REVERSED))
_DRAWN = (semantic.PLAIN, semantic.REVERSED)


def _inherited(world: semantic.World, category: str, told: Sequence[semantic.Fact]) -> list[semantic.Fact]:
    """What follows of the category from told facts alone, in the order in which they are told."""
    found = {}
    for _, fact, source in world.inferences(category):
        above = world.lineage(category)
        path = above[: above.index(source.subject) + 1]
        links = [semantic.Fact("isa", *pair) for pair in itertools.pairwise(path)]
        if all(premise in told for premise in (*links, source)):
            found[fact] = told.index(source)
    return sorted(found, key=found.__getitem__)


def _filled(fact: semantic.Fact, wording: Mapping[str, str], first: float) -> Segments:
    """The fact in the wording and what completes it; `first` is the weight of what is asked."""
    side = fact.subject if wording is semantic.REVERSED else fact.object
    return [(f" {fact.fill(wording[fact.kind])}", first), (f" {side}.", GIVEN)]


def _merged(rng: random.Random, some: list[Segments], others: list[Segments], fraction: float) -> list[Segments]:
    """Both in a random order, as long as there are any with `fraction` of `some`."""
    some, others = rng.sample(some, len(some)), rng.sample(others, len(others))
    merged = []
    while some or others:
        merged.append((some if some and (not others or rng.random() < fraction) else others).pop())
    return merged


def transform(rng: random.Random, most: int, budget: int) -> Lesson:
    """Rules of a transform, its atoms and examples; asked for are expressions of one and of two functions shown."""
    language = process.sample_language(rng, (3, 2), 4, held_out=False)
    shown = rng.sample(list(language.arity), max(1, min(len(language.arity), budget // 120, most)))
    atoms = list(language.atoms)
    made: list[process.Expression] = [(f, *rng.sample(atoms, language.arity[f])) for f in shown for _ in range(3)]
    for outer in shown:
        for inner in shown:
            made += process.compositions(rng, language, outer, inner, 2)
    expressions = rng.sample(list(dict.fromkeys(made)), len(set(made)))
    stated = {(f, *"AB"[: language.arity[f]]): language.rules[f] for f in shown} | dict(language.atoms)
    texts = [f"{language.render((process.T, left))} = {language.render(right)}." for left, right in stated.items()]
    budget -= sum(map(num_tokens, texts))
    examples, unseen = [], [_transformed(language, expression) for expression in expressions]
    while len(unseen) > 2 and budget > 0 and rng.random() < 0.95:
        examples.append(unseen.pop())
        texts.append("".join(text for text, _ in examples[-1]).lstrip())
        budget -= num_tokens(texts[-1])
    rng.shuffle(texts)
    lines = [[("Inferred", statement)] for _, statement in zip(texts, itertools.cycle(unseen), strict=False)]
    return Lesson(texts, _merged(rng, examples, unseen, 0.15), lines)


def _transformed(language: process.Language, expression: process.Expression) -> Segments:
    result = language.render(language.transform(expression, language.rules))
    return [(f" {language.render((process.T, expression))} =", UNPREDICTABLE), (f" {result}.", GIVEN)]


@dataclass(frozen=True)
class Family:
    """A kind of lesson: `make(rng, most, budget)` has at most `most` texts of about `budget` tokens in all.

    Attributes:
        least_tokens: of a row that has room for one.
        strategy: of augmentation, whose prompts its texts stand in.
    """

    make: Callable[[random.Random, int, int], Lesson]
    least_tokens: int
    strategy: str


FAMILIES = (
    Family(comparisons, 0, "local"),
    Family(categorical, 60, "document"),
    Family(hierarchy, 100, "global"),
    Family(transform, 240, "global"),
)


def family(rng: random.Random, shares: Sequence[float], free_tokens: int) -> Family:
    """One of the families that have room in `free_tokens`, by their shares in the order of FAMILIES."""
    fitting = [pair for pair in zip(FAMILIES, shares, strict=True) if pair[0].least_tokens <= free_tokens and pair[1]]
    found = rng.choices(*zip(*(fitting or [(FAMILIES[0], 1.0)]), strict=True))[0]
    return cast(Family, found)
