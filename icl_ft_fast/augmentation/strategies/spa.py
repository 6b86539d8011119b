"""spa: one document told in seven ways, each by a fixed prompt (SPA, arXiv 2603.22213). The wording is our own."""

from icl_ft_fast.augmentation.strategy import Strategy, Unit
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


def forms(document: Document) -> list[Unit]:
    """A prompt for each form."""
    return [
        Unit(f"#{name}", document.text, {"form": title, "instruction": instruction}, kind=name)
        for name, (title, instruction) in FORMS.items()
    ]


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
