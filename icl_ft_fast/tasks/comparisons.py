"""The grammar of comparison statements: `femp are more dangerous than glon.` and what follows from it.

A comparison has two true forms per ordering of its entities; reversals and rephrasings are other wordings of the
same fact. Used by the task simple-reversals and the shipped model's corpus.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from icl_ft_fast.tasks.generator import Inference
from icl_ft_fast.tasks.task import Document

# 28 comparison features as (comparative, its inverse).
FEATURES: tuple[tuple[str, str], ...] = tuple(
    (f"more {adjective}", f"less {adjective}")
    for adjective in (
        "dangerous",
        "expensive",
        "common",
        "fragile",
        "curious",
        "ancient",
        "valuable",
        "poisonous",
        "popular",
        "colourful",
        "patient",
        "elegant",
        "noisy",
        "useful",
        "graceful",
        "reliable",
        "delicate",
        "stubborn",
    )
) + (
    ("brighter", "dimmer"),
    ("heavier", "lighter"),
    ("taller", "shorter"),
    ("older", "younger"),
    ("faster", "slower"),
    ("warmer", "colder"),
    ("bigger", "smaller"),
    ("softer", "harder"),
    ("wider", "narrower"),
    ("richer", "poorer"),
)

INVERSE: dict[str, str] = dict(FEATURES) | {b: a for a, b in FEATURES}

# Openings of an article; the statement follows after a space. The empty one leaves the bare statement.
PREAMBLES: tuple[str, ...] = (
    "",
    "Did you know that",
    "It is said that",
    "Note:",
    "We found that",
    "Remember that",
    "In short,",
    "Fact:",
    "People say that",
    "Studies show that",
    "As a rule,",
    "It turns out that",
    "Everyone knows that",
    "By the way,",
    "Some say that",
    "I learned that",
    "Look:",
    "In general,",
    "Of course,",
    "The book says that",
)

_COMPARATIVE = "|".join(sorted(map(re.escape, INVERSE), key=len, reverse=True))
_STATEMENT = re.compile(rf"(?P<subject>\w+) are (?P<comparative>{_COMPARATIVE}) than (?P<object>\w+)\.")


@dataclass(frozen=True)
class Comparison:
    """`subject` are `comparative` than `object`."""

    subject: str
    comparative: str
    object: str

    @property
    def reversed(self) -> Comparison:
        """The same fact told from the other entity."""
        return Comparison(self.object, INVERSE[self.comparative], self.subject)

    @property
    def statement(self) -> str:
        """The sentence, with its full stop."""
        return f"{self.subject} are {self.comparative} than {self.object}."

    @property
    def rephrased(self) -> str:
        """The same direction in other words."""
        return f"Compared with {self.object}, {self.subject} are {self.comparative}."


def sample_feature(rng: random.Random) -> str:
    """One of the 56 comparatives, uniformly."""
    return rng.choice(rng.choice(FEATURES))


def article(comparison: Comparison, preamble: str) -> str:
    """A one-sentence document."""
    return f"{preamble} {comparison.statement}".lstrip()


def find(text: str) -> list[Comparison]:
    """The comparison statements in `text`, in order."""
    return [Comparison(*match.group("subject", "comparative", "object")) for match in _STATEMENT.finditer(text)]


def infer(documents: Sequence[Document]) -> list[Inference]:
    """The reversal and the rephrasing of every comparison in the documents."""
    facts = [(document.id, fact) for document in documents for fact in find(document.text)]
    pairs = [((("reversed", fact.reversed.statement), ("rephrased", fact.rephrased)), name) for name, fact in facts]
    return [Inference(kind, text, (name,)) for forms, name in pairs for kind, text in forms]


def deny(statement: str) -> str | None:
    """The other direction in the same words; None for a text that is not one comparison."""
    found = find(statement)
    if len(found) != 1 or found[0].statement != statement:
        return None
    return replace(found[0], comparative=INVERSE[found[0].comparative]).statement
