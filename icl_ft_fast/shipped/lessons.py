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
from dataclasses import dataclass, replace

from icl_ft_fast.augmentation.strategies.global_documents import PREMISE
from icl_ft_fast.shipped.tokenizer import english_words
from icl_ft_fast.tasks import process, semantic, syllogisms, words
from icl_ft_fast.tasks.comparisons import FEATURES, PREAMBLES, Comparison, article

Segments = list[tuple[str, float]]

UNPREDICTABLE, LITTLE, GIVEN, DECISIVE = 0.05, 0.3, 1.0, 2.0
STEPS = ("recalled", "rephrased", "reversed", "concluded", "inherited", "transformed", "composed")

_ENGLISH = frozenset(english_words())
_PIECE = re.compile(r"[A-Za-z]+|[^A-Za-z ]")


@dataclass(frozen=True)
class Lesson:
    """Texts and what follows from them.

    Attributes:
        texts: documents, in a random order.
        asked: statements that follow from all texts together, as questions ask for them, each with the step that leads
            to it, a name of STEPS: what a question picks at random carries little weight.
        lines: for each text, what an augmentation of it should say: (label, statement).
    """

    texts: list[str]
    asked: list[tuple[str, Segments]]
    lines: list[list[tuple[str, Segments]]]


def num_tokens(text: str) -> int:
    """Tokens of the shipped model's tokenizer, nearly: two a nonsense word or ` =`, one for anything else."""
    pieces = _PIECE.findall(text)
    return sum(1 if piece in _ENGLISH or (len(piece) == 1 and piece != "=") else 2 for piece in pieces)


def comparisons(rng: random.Random, budget: int) -> Lesson:
    """One-sentence articles; each is asked for in the other direction, as it stands and in other words.

    Most lessons keep to one, two or three features: where each fact has a feature of its own, the feature alone tells
    the facts apart and names are never looked up.
    """
    count = max(1, budget // 14)
    names = words.sample_words(rng, 2 * count, held_out=False)
    features = rng.sample(FEATURES, rng.choice((1, 1, 2, 3, len(FEATURES), len(FEATURES))))
    facts = [Comparison(a, rng.choice(rng.choice(features)), b) for a, b in zip(names[::2], names[1::2], strict=True)]
    asked, lines = [], []
    for fact in facts:
        lines.append([("Reversed", compared(fact.reversed, GIVEN)), ("Rephrased", compared_with(fact, GIVEN))])
        asked.append(("reversed", compared(fact.reversed, UNPREDICTABLE)))
        asked.append(("recalled", compared(fact, UNPREDICTABLE)))
        asked.append(("rephrased", compared_with(rng.choice((fact, fact.reversed)), UNPREDICTABLE)))
    return Lesson([article(fact, rng.choice(PREAMBLES)) for fact in facts], asked, lines)


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


def categorical(rng: random.Random, budget: int) -> Lesson:
    """Pairs of premises; asked for are their conclusion and themselves."""
    count = max(1, budget // 27)
    nouns = words.sample_words(rng, 3 * count, held_out=False)
    texts, asked, lines = [], [], []
    for e in range(count):
        form = rng.choice(syllogisms.FORMS)
        text, premises, conclusion = syllogisms.example(rng, form, nouns[3 * e : 3 * e + 3])
        texts.append(text)
        claims = [("recalled", "Rephrased", premise) for premise in premises]
        claims.append(("concluded", "Inferred", conclusion))
        for step, _, claim in claims:
            asked.append((step, _stated(claim, rng.sample(claim[1:], 2), rng.sample(claim[1:], 2), UNPREDICTABLE)))
        orders = [(label, claim, named) for _, label, claim in claims for named in itertools.permutations(claim[1:])]
        lines.append([(label, _stated(claim, named, named, GIVEN)) for label, claim, named in orders])
    return Lesson(texts, asked, lines)


def _stated(claim: syllogisms.Claim, named: Sequence[str], told: Sequence[str], first: float) -> Segments:
    """`The relationships between a and b are: No b are a.`; `first` is the weight up to the colon.

    Entities are named in one order; in the other, or the same, is told what holds in both directions.
    """
    mood, *ends = claim
    subject, object = ends if mood == "A" else told
    return [
        (f" {syllogisms.opening(named)}", first),
        (f" {syllogisms.QUANTIFIERS[mood]}", DECISIVE),
        (f" {subject}", GIVEN if mood == "A" else max(first, LITTLE)),
        (" are", LITTLE),
        (f" {object}", GIVEN),
        (".", LITTLE),
    ]


def hierarchy(rng: random.Random, budget: int) -> Lesson:
    """Articles on categories; asked for are facts, the same in other words, reversed, and what is inherited."""
    world = semantic.sample_world(rng, rng.randint(12, max(16, budget // 50)), held_out=False)
    lineage = world.lineage(rng.choice(list(world.parent)))  # first, so that a short lesson has something to inherit
    rest = [category for category in world.parent if category not in lineage]
    articles: list[tuple[str, str, list[semantic.Fact]]] = []
    for category in lineage + rng.sample(rest, len(rest)):
        count = rng.randint(2, 9) if rng.random() < 0.5 else max(1, len(world.own[category]))
        text, facts = semantic.article(rng, world, category, count)
        if articles and num_tokens(text) > budget:
            break
        budget -= num_tokens(text)
        articles.append((category, text, facts))
    rng.shuffle(articles)
    own = [fact for category, _, facts in articles for fact in facts if fact.subject == category]
    told = list(dict.fromkeys(itertools.chain(own, *(facts for _, _, facts in articles))))
    inherited = {category: _inherited(world, category, told) for category, _, _ in articles}
    asked = [(step, _filled(fact, wording, UNPREDICTABLE)) for fact in told for step, wording in _ASKED]
    for fact, _ in itertools.chain.from_iterable(inherited.values()):
        wording = semantic.PLAIN if rng.random() < 0.7 else semantic.REVERSED
        asked.append(("inherited", _filled(fact, wording, UNPREDICTABLE)))
    lines = []
    for category, _, facts in articles:
        lines.append([(label, _filled(fact, wording, GIVEN)) for fact in facts for label, wording in _RETOLD])
        lines[-1] += [line for fact, premises in inherited[category] for line in _derived(fact, premises)]
    return Lesson([text for _, text, _ in articles], asked, lines)


_ASKED = (("recalled", semantic.PLAIN), ("rephrased", semantic.REPHRASED), ("reversed", semantic.REVERSED))
_RETOLD = (("Rephrased", semantic.REPHRASED), ("Inferred", semantic.REVERSED))


def _derived(fact: semantic.Fact, premises: Sequence[semantic.Fact]) -> list[tuple[str, Segments]]:
    """The premises, and what follows from them in both directions."""
    lines = [(PREMISE, _filled(premise, semantic.PLAIN, GIVEN)) for premise in premises]
    return lines + [("Inferred", _filled(fact, wording, GIVEN)) for wording in (semantic.PLAIN, semantic.REVERSED)]


def _inherited(
    world: semantic.World, category: str, told: Sequence[semantic.Fact]
) -> list[tuple[semantic.Fact, list[semantic.Fact]]]:
    """What follows of the category from told facts alone, each with its premises.

    Ancestor by ancestor, of each in the order of `told`: where that is the order of the ancestor's article, the next
    premise stands there behind the last one. The links that lead to an ancestor are premises of the first fact only.
    """
    lineage = world.lineage(category)
    links = [semantic.Fact("isa", *pair) for pair in itertools.pairwise(lineage)]
    found = []
    for _, fact, source in world.inferences(category):
        distance = lineage.index(source.subject)
        if all(premise in told for premise in (*links[:distance], source)):
            found.append((distance, told.index(source), fact))
    ordered, above = [], 0
    for distance, position, fact in sorted(found, key=lambda one: one[:2]):
        ordered.append((fact, [*links[above:distance], told[position]]))
        above = distance
    return ordered


def _filled(fact: semantic.Fact, wording: Mapping[str, str], first: float) -> Segments:
    """The fact in the wording and what completes it; `first` is the weight of what is asked."""
    side = fact.subject if wording is semantic.REVERSED else fact.object
    return [(f" {fact.fill(wording[fact.kind])}", first), (f" {side}.", GIVEN)]


def chains(rng: random.Random, budget: int) -> Lesson:
    """Links, and for each what is said of the category above; asked for is what the one below inherits.

    A hierarchy with one answer to each question: two facts to find, the second by the first, and nothing else.
    """
    count = max(2, budget // 16)
    names = words.sample_words(rng, 3 * count + 2, held_out=False)
    told, asked, lines = [], [], []
    for below, above, object in zip(names[:count], names[count : 2 * count], names[2 * count : 3 * count], strict=True):
        verb = rng.choice(names[3 * count :])
        fact = rng.choice((semantic.Fact("property", above, object), semantic.Fact("relation", above, object, verb)))
        inferred = replace(fact, subject=below)
        told += [semantic.Fact("isa", below, above), fact]
        asked += [("recalled", _filled(premise, semantic.PLAIN, UNPREDICTABLE)) for premise in told[-2:]]
        asked.append(("inherited", _filled(inferred, semantic.PLAIN, UNPREDICTABLE)))
        lines.append(_derived(inferred, told[-2:]))
        lines.append([("Inferred", _filled(fact, semantic.REVERSED, GIVEN))])
    order = rng.sample(range(len(told)), len(told))
    texts = [told[i].fill(rng.choice(semantic.TOLD[told[i].kind])) for i in order]
    return Lesson(texts, asked, [lines[i] for i in order])


def transform(rng: random.Random, budget: int) -> Lesson:
    """Rules of a transform, its atoms and examples; asked for are expressions of one and of two functions shown."""
    language = process.sample_language(rng, (3, 2), 4, held_out=False)
    shown = rng.sample(list(language.arity), rng.randint(1, max(1, min(len(language.arity), budget // 40))))
    atoms = list(language.atoms)
    made: list[process.Expression] = [(f, *rng.sample(atoms, language.arity[f])) for f in shown for _ in range(3)]
    for outer, inner in itertools.product(shown, repeat=2):
        made += process.compositions(rng, language, outer, inner, 2)
    expressions = rng.sample(list(dict.fromkeys(made)), len(set(made)))
    stated = {(f, *"AB"[: language.arity[f]]): language.rules[f] for f in shown} | dict(language.atoms)
    told = {left: f"{language.render((process.T, left))} = {language.render(right)}." for left, right in stated.items()}
    budget -= sum(map(num_tokens, told.values()))
    examples: list[process.Expression] = []
    while len(expressions) > len(shown) and budget > 0:
        examples.append(expressions.pop())
        told[examples[-1]] = "".join(text for text, _ in _transformed(language, examples[-1])).lstrip()
        budget -= num_tokens(told[examples[-1]])
    asked = [("recalled", _equal(language, left, right, UNPREDICTABLE)) for left, right in stated.items()]
    asked += [("recalled", _transformed(language, example)) for example in examples]
    for expression in expressions:
        step = "transformed" if isinstance(expression[1], str) else "composed"
        asked.append((step, _transformed(language, expression)))
    order = rng.sample(list(told), len(told))
    lines = [_worked(language, _next(language, shown[0], left), left) for left in order]
    return Lesson([told[left] for left in order], asked, lines)


def _next(language: process.Language, function: str, shown: process.Expression) -> process.Expression:
    """What to try after an atom (the function), a rule (atoms), a function of atoms (twice), a nested one (swapped).

    A function within itself would be the same again: then what is within.
    """
    if isinstance(shown, str):
        return (function, *[shown] * language.arity[function])
    outer, first, *rest = shown
    count = language.arity[str(outer)]
    if not isinstance(first, str):
        inner, *atoms = first
        if inner == outer:
            return first
        atoms += rest
        return (inner, (outer, *atoms[:count]), *atoms[count:])
    if first == "A":
        return (outer, *list(language.atoms)[:count])
    return (outer, shown, *[first] * (count - 1))


def _worked(
    language: process.Language, expression: process.Expression, known: process.Expression
) -> list[tuple[str, Segments]]:
    """An expression's transform from the inside out, each function's behind its rule and the atoms that it asks for.

    What is `known` already is not worked out again.
    """
    if isinstance(expression, str):
        return [(PREMISE, _transformed(language, expression, GIVEN))]
    outer, *arguments = expression
    rule = language.rules[str(outer)]
    asked = [x for a, x in zip("AB", arguments, strict=False) if f"{language.name}({a})" in language.render(rule)]
    lines = []
    for inner in asked:
        if not isinstance(inner, str) and inner != known:
            lines += _worked(language, inner, known)
    lines.append((PREMISE, _equal(language, (outer, *"AB"[: len(arguments)]), rule, GIVEN)))
    for atom in dict.fromkeys(x for x in asked if isinstance(x, str) and x != known):
        lines += _worked(language, atom, known)
    return [*lines, ("Inferred", _transformed(language, expression, GIVEN))]


def table(rng: random.Random, budget: int) -> Lesson:
    """What a transform makes of each atom and its rule for one function; asked for are both.

    A transform with one thing to find out at a time: which atom stands for which, and where a rule puts it.
    """
    language = process.sample_language(rng, (3, 2), max(4, min(12, budget // 12)), held_out=False)
    function = rng.choice(list(language.arity))
    atoms = list(language.atoms)
    stated = language.atoms | {(function, *"AB"[: language.arity[function]]): language.rules[function]}
    texts = [f"{language.render((process.T, left))} = {language.render(right)}." for left, right in stated.items()]
    made = dict.fromkeys((function, *rng.sample(atoms, language.arity[function])) for _ in atoms)
    asked = [("recalled", _transformed(language, atom)) for atom in atoms]
    asked += [("transformed", _transformed(language, expression)) for expression in made]
    rng.shuffle(texts)
    worked = itertools.cycle(_worked(language, expression, "") for expression in made)
    return Lesson(texts, asked, list(itertools.islice(worked, len(texts))))


def _transformed(language: process.Language, expression: process.Expression, first: float = UNPREDICTABLE) -> Segments:
    return _equal(language, expression, language.transform(expression, language.rules), first)


def _equal(language: process.Language, left: process.Expression, right: process.Expression, first: float) -> Segments:
    return [(f" {language.render((process.T, left))} =", first), (f" {language.render(right)}.", GIVEN)]


@dataclass(frozen=True)
class Family:
    """A kind of lesson: `make(rng, budget)` has texts of about `budget` tokens in all, at least one text.

    Attributes:
        strategy: of augmentation, whose prompts its texts stand in.
    """

    make: Callable[[random.Random, int], Lesson]
    strategy: str


FAMILIES = {
    "comparisons": Family(comparisons, "local"),
    "categorical": Family(categorical, "document"),
    "hierarchy": Family(hierarchy, "global"),
    "chains": Family(chains, "global"),
    "transform": Family(transform, "global"),
    "table": Family(table, "global"),
}
