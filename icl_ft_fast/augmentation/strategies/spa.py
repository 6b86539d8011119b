"""spa: one document told in seven ways, each by a fixed prompt (SPA, arXiv 2603.22213). The wording is our own.

A small model keeps to a document only if it is shown how on others and its sentence is begun with what the document is
about: `SMALL` asks for the same seven kinds, a line each.
"""

from dataclasses import replace

from icl_ft_fast.augmentation.strategy import COPIED, SMALL_TEMPERATURE, SMALL_WORDS, Strategy, Unit, subject_of
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
SMALL_FORMS = {  # of each an instruction, how a reply begins, and how the two examples go on
    "concepts": (
        "Explain what each document is about.",
        "Explained: {}",
        "The old mill in Torvik is a mill that Anna Brandt built in 1872, and the granary is a younger building.",
        "Lumo is a lamp for reading at night, and Osprey is the team that repairs it.",
    ),
    "mind-map": (
        "Draw up a mind map of each document.",
        "Map: {}",
        "The old mill is in Torvik, it was built by Anna Brandt, and the granary is beside it.",
        "Lumo is a lamp, it is for reading at night, and team Osprey repairs it.",
    ),
    "implications": (
        "Say what follows from each document.",
        "It follows that {}",
        "the old mill in Torvik is older than the granary, because the granary came later.",
        "Lumo is of use when it is dark, because it is for reading at night.",
    ),
    "questions": (
        "Ask a question about each document, and answer it.",
        "Question: What is told about {}",
        "the old mill in Torvik? It was built by Anna Brandt in 1872.",
        "Lumo? It is a lamp, and team Osprey repairs it.",
    ),
    "case": (
        "Tell of somebody who uses what each document says.",
        "Somebody asked about {}",
        "the old mill in Torvik, and learned that Anna Brandt built it in 1872.",
        "Lumo, and learned that team Osprey repairs it when it breaks.",
    ),
    "discussion": (
        "Two readers of each document talk about it.",
        "Did you know that {}",
        "the old mill in Torvik was built by Anna Brandt? Yes, and the granary came later.",
        "Lumo is for reading at night? Yes, and team Osprey repairs it.",
    ),
    "lesson": (
        "Teach what each document says.",
        "Remember that {}",
        "the old mill in Torvik was built by Anna Brandt, and that the granary came later.",
        "Lumo is for reading at night, and that team Osprey repairs it.",
    ),
}


def forms(document: Document) -> list[Unit]:
    """A prompt for each form."""
    return [
        Unit(f"#{name}", document.text, {"form": title, "instruction": instruction}, kind=name)
        for name, (title, instruction) in FORMS.items()
    ]


def small_forms(document: Document) -> list[Unit]:
    """A prompt for each form, whose reply begins with what the document is about."""
    made = []
    for name, (instruction, beginning, mill, lamp) in SMALL_FORMS.items():
        examples = {"mill": beginning.format(mill), "lamp": beginning.format(lamp)}
        begun = beginning.format(subject_of(document.text)).rstrip()
        made.append(Unit(f"#{name}", document.text, {"instruction": instruction} | examples, name, begun))
    return made


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
