"""active-reading: ways of studying this very document, then each carried out (Active Reading, arXiv 2508.09494).

A small model invents no ways. Each of its ways is begun with what is to be done and with what the document is about,
and so is the text that carries it out, a line.
"""

from collections.abc import Sequence
from dataclasses import replace

from icl_ft_fast.augmentation.strategy import (
    COPIED,
    SMALL_TEMPERATURE,
    SMALL_WORDS,
    Parsed,
    Strategy,
    Unit,
    lines_of,
    opening_of,
)
from icl_ft_fast.tasks.task import Document

WAYS = 8  # the most that are carried out
BEGUN = ("Tell the story of", "Explain why", "Explain how", "Write a quiz about", "Describe", "Compare", "Retell what")


def read(source: str, reply: str) -> Parsed:
    """No rows: ways of studying say nothing about the document."""
    return Parsed([], sum(label != "Strategy" for label, _ in lines_of(reply)), 0)


def carry_out(unit: Unit, reply: str) -> Sequence[Unit]:
    """A prompt for each way of studying; nothing after those."""
    if unit.kind:
        return ()
    ways = list(dict.fromkeys(text for label, text in lines_of(reply) if label == "Strategy"))[:WAYS]
    return [Unit(f"#{number}", unit.source, {"way": way}, kind="studied") for number, way in enumerate(ways)]


def begun_ways(document: Document) -> list[Unit]:
    """A prompt for each way, which is begun."""
    subject = opening_of(document.text)
    begun = (f"Strategy: {beginning} {subject}".rstrip() for beginning in BEGUN)
    return [Unit(f"#{number}", document.text, begun=text) for number, text in enumerate(begun)]


def carry_out_begun(unit: Unit, reply: str) -> Sequence[Unit]:
    """The prompt for a way, whose reply begins with what the document is about."""
    begun = f"Text: {opening_of(unit.source)}".rstrip()
    return [way._replace(suffix="#text", begun=begun) for way in carry_out(unit, reply)[:1]]


STRATEGY = Strategy(
    name="active-reading",
    sees="one document; then the document with a way of studying it",
    writes="what studying the document in each of these ways gives",
    labels=("Strategy",),
    read=read,
    follow=carry_out,
    follow_ups=WAYS,
    max_new_tokens=512,
    temperature=1.0,
    words=(30, 2000),
)
SMALL = replace(
    STRATEGY,
    prompts="active-reading-small",
    units=begun_ways,
    follow=carry_out_begun,
    follow_ups=1,
    examples=COPIED,
    max_new_tokens=64,
    temperature=SMALL_TEMPERATURE,
    words=(SMALL_WORDS, 200),
    least_words=SMALL_WORDS,
)
STRATEGY = replace(STRATEGY, small=SMALL)
