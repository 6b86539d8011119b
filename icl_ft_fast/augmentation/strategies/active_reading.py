"""active-reading: ways of studying this very document, then each carried out (Active Reading, arXiv 2508.09494)."""

from collections.abc import Sequence

from icl_ft_fast.augmentation.strategy import Parsed, Strategy, Unit, lines_of

WAYS = 8  # the most that are carried out


def read(source: str, reply: str) -> Parsed:
    """No rows: ways of studying say nothing about the document."""
    return Parsed([], sum(label != "Strategy" for label, _ in lines_of(reply)), 0)


def carry_out(unit: Unit, reply: str) -> Sequence[Unit]:
    """A prompt for each way of studying; nothing after those."""
    if unit.kind:
        return ()
    ways = list(dict.fromkeys(text for label, text in lines_of(reply) if label == "Strategy"))[:WAYS]
    return [Unit(f"#{number}", unit.source, {"way": way}, kind="studied") for number, way in enumerate(ways)]


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
