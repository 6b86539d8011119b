"""The semantic structure benchmark (Lampinen et al. 2025, section 3.4): a hierarchy of categories, told in articles.

From the paper: 110 categories with 1 to 6 properties each, inherited ones and relations; 2,200 articles of 4 to 20
sentences in varied styles and some question-and-answer documents; questions that rephrase, reverse and chain the
articles' facts, and questions about categories of which only the parent is told; wrong choices hold the target
relation to a different entity. The hierarchy, words, styles and numbers of questions are ours.

What follows: a category has the parents, properties and relations of its ancestors. Wrong choices are false under the
widest reading: nothing above or below the subject (or, of a relation, the object) makes them true either.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from icl_ft_fast.tasks import words
from icl_ft_fast.tasks.generator import NO_ENGLISH, Preset, TaskGenerator
from icl_ft_fast.tasks.task import Document, Question, Task

MAX_DEPTH, MAX_CHILDREN = 4, 5
CHOICES = 4
SPLITS = ("rephrase", "reversal", "syllogism", "deduction", "holdout")

# Wordings by kind of fact: subject s, object o, verb v. Articles use `told`; the others appear in questions only.
TOLD = {
    "isa": ("{s} are a type of {o}.", "{s} are a kind of {o}.", "all {s} belong to the {o}."),
    "property": ("{s} are {o}.", "all {s} are {o}.", "{s} are always {o}."),
    "relation": ("{s} {v} {o}.", "all {s} {v} {o}.", "it is known that {s} {v} {o}."),
}
ASKED = {"isa": "What are {s} a type of?", "property": "What can be said of {s}?", "relation": "What do {s} {v}?"}
PLAIN = {"isa": "{s} are a type of", "property": "{s} are", "relation": "{s} {v}"}
REPHRASED = {"isa": "{s} are classified as", "property": "{s} can be described as", "relation": "what {s} {v} are"}
REVERSED = {"isa": "{o} include", "property": "things that are {o} include", "relation": "those that {v} {o} include"}
STYLES: tuple[Callable[[str, list[str]], str], ...] = (
    lambda name, sentences: " ".join(sentences),
    lambda name, sentences: f"{name}\n\n" + " ".join(sentences),
    lambda name, sentences: f"Facts about {name}:\n" + "\n".join(f"* {sentence}" for sentence in sentences),
    lambda name, sentences: f"Notes on {name}\n" + "\n".join(f"{i}. {s}" for i, s in enumerate(sentences, 1)),
    lambda name, sentences: f"This article is about {name}. " + " ".join(sentences) + f" (See also: {name}.)",
)


@dataclass(frozen=True)
class Fact:
    """A statement: `kind` is "isa", "property" or "relation"; `verb` is empty but for relations."""

    kind: str
    subject: str
    object: str
    verb: str = ""

    @property
    def predicate(self) -> tuple[str, str, str]:
        """What is said of the subject: (kind, verb, object)."""
        return self.kind, self.verb, self.object

    def fill(self, wording: str) -> str:
        """The wording with this fact's words."""
        return wording.format(s=self.subject, o=self.object, v=self.verb)


@dataclass(frozen=True)
class World:
    """The categories, each with its parent (None for a root), the facts of its own, and who is held out."""

    parent: dict[str, str | None]
    own: dict[str, list[Fact]]
    held_out: set[str]

    def lineage(self, category: str) -> list[str]:
        """The category and its ancestors, nearest first."""
        found, above = [category], self.parent[category]
        while above is not None:
            found.append(above)
            above = self.parent[above]
        return found

    @cached_property
    def kin(self) -> dict[str, set[str]]:
        """Each category with all above and all below it."""
        lineage = {c: set(self.lineage(c)) for c in self.parent}
        return {c: lineage[c] | {below for below in self.parent if c in lineage[below]} for c in self.parent}

    def inferences(self, category: str) -> Iterator[tuple[int, Fact, Fact]]:
        """(premises, inherited fact, the ancestor's fact), nearest ancestors first, each fact once."""
        known = {fact.predicate for fact in self.own[category]}
        for premises, ancestor in enumerate(self.lineage(category)[1:], 2):
            for fact in self.own[ancestor]:
                if fact.predicate not in known:
                    known.add(fact.predicate)
                    yield premises, replace(fact, subject=category), fact

    @cached_property
    def holders(self) -> dict[tuple[str, str, str], set[str]]:
        """Whose own facts have a predicate."""
        found: dict[tuple[str, str, str], set[str]] = {}
        for fact in (fact for facts in self.own.values() for fact in facts):
            found.setdefault(fact.predicate, set()).add(fact.subject)
        return found

    def may_hold(self, claim: Fact) -> bool:
        """Whether any reading makes the claim true."""
        kin = self.kin[claim.subject]
        if claim.kind == "isa":
            return claim.object in kin
        objects = self.kin[claim.object] if claim.kind == "relation" else {claim.object}
        return any(kin & self.holders.get((claim.kind, claim.verb, o), set()) for o in objects)


def semantic_structure(
    seed: int = 0,
    *,
    num_categories: int = 110,
    num_articles: int = 2200,
    sentences: tuple[int, int] = (4, 20),
    num_questions: int = 200,
    exclude: Collection[str] = (),
) -> Task:
    """Generate the task; the same arguments give the same task.

    Args:
        seed: of everything.
        num_categories: in two trees; at least 12. A tenth are held out: leaves of which only the parent is told.
        num_articles: at least one a category; a twentieth as many question-and-answer documents come on top.
        sentences: least and most of an article; it always tells every fact of its category, 9 at most.
        num_questions: at most so many a split, in equal parts by kind of fact as far as there are.
        exclude: nonsense words not to draw, see words.sample_words().

    Returns:
        The documents (topic: an article's category) and four-way questions of the splits in SPLITS. A "syllogism" has
        two premises, a "deduction" more; both conclude in the articles' direction; "holdout" questions ask what follows
        from a held-out category's parent, in both directions. A question's form is its kind of fact; its topic is the
        told fact that it rests on. Few categories may give fewer questions.

    Raises:
        ValueError: an argument out of its range, or more categories than there are words.
    """
    if num_categories < 12:
        raise ValueError(f"num_categories: expected at least 12, got {num_categories}")
    if num_articles < num_categories:
        raise ValueError(f"num_articles: expected at least {num_categories}, one a category, got {num_articles}")
    if not 1 <= sentences[0] <= sentences[1]:
        raise ValueError(f"sentences: expected (least, most) with 1 <= least <= most, got {sentences}")
    if num_questions < 1:
        raise ValueError(f"num_questions: expected at least 1, got {num_questions}")
    rng = random.Random(seed)
    world = sample_world(rng, num_categories, exclude=exclude)
    categories = list(world.parent)
    documents = [_article(rng, world, categories[a % num_categories], a, sentences) for a in range(num_articles)]
    documents += [_questions_and_answers(rng, world, a) for a in range(num_articles // 20)]
    rng.shuffle(documents)
    return Task(tuple(documents), tuple(_questions(rng, world, num_questions)))


def sample_world(
    rng: random.Random, num_categories: int, *, held_out: bool = True, exclude: Collection[str] = ()
) -> World:
    """Categories with their facts, in words of the held-out part or of the training part, see words.sample_words()."""
    num_verbs = max(2, num_categories // 14)
    names = words.sample_words(rng, 3 * num_categories + num_verbs, held_out=held_out, exclude=exclude)
    categories, verbs = names[:num_categories], names[num_categories : num_categories + num_verbs]
    adjectives = names[num_categories + num_verbs :]
    parent: dict[str, str | None] = {}
    depth: dict[str, int] = {}
    for category in categories:
        open_to = [c for c in parent if depth[c] < MAX_DEPTH and list(parent.values()).count(c) < MAX_CHILDREN]
        parent[category] = rng.choice(open_to) if len(parent) >= 2 else None
        depth[category] = depth.get(parent[category] or "", -1) + 1
    leaves = [c for c in categories if c not in parent.values() and depth[c] >= 2]
    world = World(parent, {}, set(rng.sample(leaves, min(len(leaves), max(CHOICES, num_categories // 10)))))
    told = [c for c in categories if c not in world.held_out]
    for category, above in parent.items():  # parents come first
        facts = [] if above is None else [Fact("isa", category, above)]
        if category not in world.held_out:
            inherited = {fact.object for c in world.lineage(category)[1:] for fact in world.own[c]}
            fresh = [adjective for adjective in adjectives if adjective not in inherited]
            facts += [Fact("property", category, a) for a in rng.sample(fresh, min(len(fresh), rng.randint(1, 6)))]
            others = [c for c in told if c not in world.kin[category]]
            for other in rng.sample(others, min(len(others), rng.randint(0, 2))):
                facts.append(Fact("relation", category, other, rng.choice(verbs)))
        world.own[category] = facts
    return world


def _article(rng: random.Random, world: World, category: str, index: int, sentences: tuple[int, int]) -> Document:
    count = max(rng.randint(*sentences), len(world.own[category]))
    return Document(f"article{index}", article(rng, world, category, count)[0], category)


def article(rng: random.Random, world: World, category: str, count: int) -> tuple[str, list[Fact]]:
    """`count` facts, of the category, then of any others, told in one of the styles."""
    others = [c for c in rng.sample(list(world.parent), len(world.parent)) if c != category]
    own = rng.sample(world.own[category], len(world.own[category]))
    facts = list(itertools.islice(itertools.chain(own, (fact for c in others for fact in world.own[c])), count))
    told = [fact.fill(rng.choice(TOLD[fact.kind])) for fact in facts]
    return rng.choice(STYLES)(category, told), facts


def _questions_and_answers(rng: random.Random, world: World, index: int) -> Document:
    category = rng.choice([c for c, facts in world.own.items() if facts])
    pairs = [f"Question: {fact.fill(ASKED[fact.kind])}\nAnswer: {fact.object}." for fact in world.own[category]]
    return Document(f"qa{index}", "\n".join(pairs))


def _questions(rng: random.Random, world: World, num_questions: int) -> Iterator[Question]:
    told = [c for c in world.parent if c not in world.held_out]
    unseen = [c for c in world.parent if c in world.held_out]
    own = [(fact, fact) for c in told for fact in world.own[c]]
    chained = [found for c in told for found in world.inferences(c)]
    # (what is asked, the told fact it rests on, wordings)
    asked = {
        "rephrase": [(fact, source, REPHRASED) for fact, source in own],
        "reversal": [(fact, source, REVERSED) for fact, source in own],
        "syllogism": [(fact, source, PLAIN) for premises, fact, source in chained if premises == 2],
        "deduction": [(fact, source, PLAIN) for premises, fact, source in chained if premises > 2],
        "holdout": [
            (fact, source, wording)
            for c in unseen
            for _, fact, source in world.inferences(c)
            for wording in (PLAIN, REVERSED)
        ]
        + [(fact, fact, REVERSED) for c in unseen for fact in world.own[c]],
    }
    for split in SPLITS:
        candidates: list[tuple[int, tuple[Fact, Fact, dict[str, str]]]] = []
        for kind in TOLD:  # the kinds of fact in turn, as far as there are
            mine = [candidate for candidate in asked[split] if candidate[0].kind == kind]
            candidates += enumerate(rng.sample(mine, len(mine)))
        candidates.sort(key=lambda ranked: ranked[0])
        made = (_question(rng, world, split, *candidate) for _, candidate in candidates)
        for q, question in enumerate(itertools.islice(filter(None, made), num_questions)):
            yield replace(question, id=f"{split}{q}")


def _question(
    rng: random.Random, world: World, split: str, fact: Fact, source: Fact, wording: dict[str, str]
) -> Question | None:
    """The fact against claims with what is true of others in its place; None where fewer than three are false."""
    alike = [own for c in world.parent for own in world.own[c] if (own.kind, own.verb) == (fact.kind, fact.verb)]
    side = "subject" if wording is REVERSED else "object"
    if side == "subject" and split == "holdout":
        rivals = sorted(world.held_out)  # a held-out name among told ones would give itself away
    else:  # as often as facts name them, so that what is told most is no likelier to be true
        rivals = [getattr(own, side) for own in alike if getattr(own, side) not in world.held_out]
    truth = getattr(fact, side)
    holds = {rival for rival in {*rivals} - {truth} if world.may_hold(replace(fact, **{side: rival}))} | {truth}
    false = [rival for rival in rivals if rival not in holds]
    wrong = list(dict.fromkeys(rng.sample(false, len(false))))[: CHOICES - 1]
    if len(wrong) < CHOICES - 1:
        return None
    choices = [truth, *wrong]
    rng.shuffle(choices)
    texts = tuple(f" {choice}." for choice in choices)
    topic = " ".join(filter(None, (source.subject, source.verb, source.object)))
    return Question("", fact.fill(wording[fact.kind]), texts, choices.index(truth), split, topic, fact.kind)


GENERATOR = TaskGenerator(
    semantic_structure,
    {
        "paper": Preset(NO_ENGLISH, {"icl_subsample": 8, "strategy": "global"}),
        "small": Preset(
            {"num_categories": 12, "num_articles": 48, "sentences": (2, 6), "num_questions": 40},
            {"icl_per_topic": 1, "strategy": "global", "samples": 8},
            {"splitting": "independent", "learning_rate": 1e-3, "steps": 2000, "lr_scheduler_type": "linear"},
        ),
    },
)
