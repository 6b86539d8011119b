"""entigraph: entities of a document, then texts about pairs and triples of them (EntiGraph, arXiv 2409.07431).

The paper asks for every pair. Here they are drawn, as many as stand below; further samples draw others. A small model's
list is begun with its number, and only what stands in the document counts; each text of it is a line.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import combinations

from icl_ft_fast.augmentation.strategy import (
    COPIED,
    SMALL_TEMPERATURE,
    SMALL_WORDS,
    Parsed,
    Strategy,
    Unit,
    lines_of,
    subject_of,
)
from icl_ft_fast.tasks.task import Document

ENTITIES, PAIRS, TRIPLES = 10, 12, 4  # the most of each that a reply leads to
NAME_WORDS = 4  # the most of a name in a small model's list
LABELS = ("Entity", "Summary")
_ITEM = re.compile(r"(?:\d+[.)]|[-*]) *(.*?)[.,;:]?")


def read(source: str, reply: str) -> Parsed:
    """The summary; the entities make no rows."""
    lines = lines_of(reply)
    summaries = [text for label, text in lines if label == "Summary"]
    return Parsed([("summary", text) for text in summaries], sum(label not in LABELS for label, _ in lines), 0)


def relations(unit: Unit, reply: str) -> Sequence[Unit]:
    """Pairs and triples of the entities, drawn by the document and the entities; nothing after those."""
    return [] if unit.kind else _drawn(unit, [text for label, text in lines_of(reply) if label == "Entity"])


def _drawn(unit: Unit, found: Sequence[str]) -> list[Unit]:
    entities = list(dict.fromkeys(found))[:ENTITIES]
    rng = random.Random(sha256("\n".join([unit.source, *entities]).encode()).digest())
    made = []
    for kind, size, most in (("pair", 2, PAIRS), ("triple", 3, TRIPLES)):
        groups = list(combinations(entities, size))
        for number, group in enumerate(rng.sample(groups, min(most, len(groups)))):
            named = rng.sample(group, size)
            made.append(Unit(f"#{kind}{number}", unit.source, {"entities": named}, kind=kind))
    return made


def listing(document: Document) -> list[Unit]:
    """A numbered list, begun with what the document is about."""
    subject = subject_of(document.text)
    return [Unit("", document.text, begun=f"1. {subject}\n2." if subject else "1.")]


def read_list(source: str, reply: str) -> Parsed:
    """No rows; lines that name nothing of the document are not in the form, and those that name it again repeat."""
    lines = [line for line in reply.splitlines() if line.strip()]
    found = _listed(source, reply)
    return Parsed([], len(lines) - len(found), len(found) - len(set(found)))


def _listed(source: str, reply: str) -> list[str]:
    """What a numbered list names, as the document spells it; what it does not have, and sentences, are left out."""
    items = (match[1] for line in reply.splitlines() if (match := _ITEM.fullmatch(line.strip())))
    names = (item for item in items if 0 < len(item.split()) <= NAME_WORDS)
    found = (re.search(rf"(?i)\b{re.escape(name)}\b", source) for name in names)
    return [match[0] for match in found if match]


def small_relations(unit: Unit, reply: str) -> Sequence[Unit]:
    """Pairs and triples of what the list names, each reply begun with their names; nothing after those.

    They stand in the list's order: what the document is about comes first. Team Osprey and Osprey are one.
    """
    apart: list[str] = []
    for name in [] if unit.kind else _listed(unit.source, reply):
        if not any(name.casefold() in other.casefold() or other.casefold() in name.casefold() for other in apart):
            apart.append(name)
    made = []
    for group in _drawn(unit, apart):
        first, *others = sorted(group.variables["entities"], key=apart.index)
        begun = f"About {', '.join([first, *others[:-1]])} and {others[-1]}: {first[0].upper()}{first[1:]}"
        made.append(group._replace(begun=begun))
    return made


STRATEGY = Strategy(
    name="entigraph",
    sees="one document; then the document with two or three of its entities",
    writes="a summary, and texts about pairs and triples of entities",
    labels=LABELS,
    read=read,
    follow=relations,
    follow_ups=PAIRS + TRIPLES,
    examples=("brooks", "puddles"),
    max_new_tokens=512,
    temperature=1.0,
    words=(2, 2000),
)
SMALL = replace(
    STRATEGY,
    prompts="entigraph-small",
    units=listing,
    read=read_list,
    follow=small_relations,
    examples=COPIED,
    begun_stop=("\n\n",),
    max_new_tokens=64,
    temperature=SMALL_TEMPERATURE,
    words=(SMALL_WORDS, 200),
    least_words=SMALL_WORDS,
)
STRATEGY = replace(STRATEGY, small=SMALL)
