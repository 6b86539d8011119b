"""spa: one document told in seven ways, each by a fixed prompt (SPA, arXiv 2603.22213). The wording is our own.

A small model keeps to a document only if it is shown how on others and its sentence is begun with what the document is
about: `SMALL` asks for the same seven kinds, a line each.
"""

from dataclasses import replace

from icl_ft_fast.augmentation.strategy import COPIED, SMALL_TEMPERATURE, SMALL_WORDS, Strategy, Unit, opening_of
from icl_ft_fast.tasks.task import Document

FORMS = {
    "concepts": ("Key concepts", "Explain the key concepts of the document one after the other."),
    "mind-map": ("A mind map", "Draw up a mind map of the document as nested points, each a full sentence."),
    "implications": ("Implications", "Spell out what the document implies, and why each of these things follows."),
    "questions": (
        "Questions to think about",
        "Discuss questions about the document that compare, justify or ask what would happen if; no mere recall.",
    ),
    "case": ("A case study", "Write a case study in which somebody needs what the document says, and uses it."),
    "discussion": ("Two readers talk", "Write a conversation in which two readers of the document discuss all of it."),
    "lesson": ("A lesson", "Write down the lesson of a teacher who explains the document to a class."),
}
BEGUN = {  # how a small model's replies begin
    "concepts": "Explained: {}",
    "mind-map": "Map: {}",
    "implications": "It follows that {}",
    "questions": "Question: What is told about {}",
    "case": "Somebody asked about {}",
    "discussion": "Did you know that {}",
    "lesson": "Remember that {}",
}


def forms(document: Document) -> list[Unit]:
    """A prompt for each form."""
    return [
        Unit(f"#{name}", document.text, {"form": title, "instruction": instruction}, kind=name)
        for name, (title, instruction) in FORMS.items()
    ]


def small_forms(document: Document) -> list[Unit]:
    """A prompt for each form, whose reply begins with what the document is about."""
    subject = opening_of(document.text)
    begun = {name: beginning.format(subject).rstrip() for name, beginning in BEGUN.items()}
    return [Unit(f"#{name}", document.text, {"form": name}, name, text) for name, text in begun.items()]


STRATEGY = Strategy(
    name="spa",
    sees="one document, in seven prompts",
    writes="a text of each of seven kinds: key concepts, mind map, implications, questions, case, discussion, lesson",
    units=forms,
    max_new_tokens=512,
    temperature=1.0,
    is_lines=False,
    words=(30, 2000),
)
SMALL = replace(
    STRATEGY,
    prompts="spa-small",
    units=small_forms,
    examples=COPIED,
    max_new_tokens=64,
    temperature=SMALL_TEMPERATURE,
    words=(SMALL_WORDS, 200),
    least_words=SMALL_WORDS,
)
STRATEGY = replace(STRATEGY, small=SMALL)
