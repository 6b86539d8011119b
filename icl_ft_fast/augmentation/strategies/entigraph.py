"""entigraph: entities of a document, then texts about pairs and triples of them (EntiGraph, arXiv 2409.07431).

The paper asks for every pair. Here they are drawn, as many as stand below; further samples draw others.
"""

import random
from collections.abc import Sequence
from hashlib import sha256
from itertools import combinations

from icl_ft_fast.augmentation.strategy import Parsed, Strategy, Unit, lines_of

ENTITIES, PAIRS, TRIPLES = 10, 12, 4  # the most of each that a reply leads to
LABELS = ("Entity", "Summary")


def read(source: str, reply: str) -> Parsed:
    """The summary; the entities make no rows."""
    lines = lines_of(reply)
    summaries = [text for label, text in lines if label == "Summary"]
    return Parsed([("summary", text) for text in summaries], sum(label not in LABELS for label, _ in lines), 0)


def relations(unit: Unit, reply: str) -> Sequence[Unit]:
    """Pairs and triples of the entities, drawn by the document and the entities; nothing after those."""
    if unit.kind:
        return ()
    entities = list(dict.fromkeys(text for label, text in lines_of(reply) if label == "Entity"))[:ENTITIES]
    rng = random.Random(sha256("\n".join([unit.source, *entities]).encode()).digest())
    made = []
    for kind, size, most in (("pair", 2, PAIRS), ("triple", 3, TRIPLES)):
        groups = list(combinations(entities, size))
        for number, group in enumerate(rng.sample(groups, min(most, len(groups)))):
            named = rng.sample(group, size)
            made.append(Unit(f"#{kind}{number}", unit.source, {"entities": named}, kind=kind))
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
