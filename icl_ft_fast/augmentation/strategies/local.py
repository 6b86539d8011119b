"""local: what follows from one sentence alone (Lampinen et al. 2025, section 2.2)."""

from icl_ft_fast.augmentation.strategy import Strategy, Unit, labelled_lines
from icl_ft_fast.tasks.sentences import split_sentences
from icl_ft_fast.tasks.task import Document

LABELS = ("Reversed", "Rephrased", "Inferred")


def sentences(document: Document) -> list[Unit]:
    """Each sentence on one line."""
    found = split_sentences(" ".join(document.text.split()), "independent")
    return [Unit(f"#{number}" if len(found) > 1 else "", sentence) for number, sentence in enumerate(found)]


STRATEGY = Strategy(
    name="local",
    sees="one sentence",
    writes="its reversal, rephrasings, inferences",
    labels=LABELS,
    read=labelled_lines(LABELS),
    units=sentences,
    examples=(
        *("mountains", "hills", "pebbles", "diamonds"),
        *("torvik", "brandt", "mill", "osprey", "osei", "tema", "lumo", "lamp"),
    ),
    begins=("Reversed:", "Rephrased:", "Inferred:"),
    max_new_tokens=64,
)
