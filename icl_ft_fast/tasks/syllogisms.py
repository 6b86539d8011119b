"""Simple syllogisms (Lampinen et al. 2025, section 3.2): two premises in training, their conclusion in the test.

From the paper: 69 training examples, each naming three nonsense entities and stating two premises; the test names the
two entities of the conclusion and scores all six statements {all, some, no} x two directions. The paper leaves the
choice of forms open. Ours: every form that is valid without assuming that the entities exist and whose statements are
all, some or no. "Some" and "no" hold in both directions, so their converses count as correct too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence

from icl_ft_fast.tasks import words
from icl_ft_fast.tasks.generator import NO_ENGLISH, Inference, Preset, TaskGenerator
from icl_ft_fast.tasks.task import Document, Question, Task

# Mood and figure: major premise, minor premise, conclusion; A all, I some, E no.
FORMS = ("AAA1", "EAE1", "AII1", "EAE2", "AEE2", "AII3", "IAI3", "AEE4", "IAI4")
QUANTIFIERS = {"A": "All", "I": "Some", "E": "No"}
# Figure: (subject, object) of the major and of the minor premise; M is the middle term, the conclusion is S - P.
FIGURES = {
    "1": (("M", "P"), ("S", "M")),
    "2": (("P", "M"), ("S", "M")),
    "3": (("M", "P"), ("M", "S")),
    "4": (("P", "M"), ("M", "S")),
}


Claim = tuple[str, str, str]  # mood (A, I or E), subject, object
Statement = tuple[str, str, str]  # quantifier, subject, object
_CATEGORICAL = re.compile(r"\b(All|Some|No) (\w+) are (\w+)\.")


def simple_syllogisms(seed: int = 0, *, num_examples: int = 69, exclude: Collection[str] = ()) -> Task:
    """Generate the task; the same arguments give the same task.

    Args:
        seed: of the words and of every order.
        num_examples: syllogisms, each of three entities of its own; the forms take turns.
        exclude: nonsense words not to draw, see words.sample_words().

    Returns:
        `num_examples` documents and, for each, a six-way question of split "conclusion" and one of split "premise"
        (a statement of the document). A question's form is the syllogism's mood and figure. Every statement that
        follows counts as correct, so chance on conclusions is a sixth for "all" and a third for "some" and "no".

    Raises:
        ValueError: `num_examples` below 1, or more entities than there are words.
    """
    if num_examples < 1:
        raise ValueError(f"num_examples: expected at least 1, got {num_examples}")
    rng = random.Random(seed)
    nouns = words.sample_words(rng, 3 * num_examples, exclude=exclude)
    forms = rng.sample(FORMS, len(FORMS))
    documents, questions = [], []
    for e in range(num_examples):
        form, topic = forms[e % len(forms)], f"example{e}"
        text, premises, conclusion = example(rng, form, nouns[3 * e : 3 * e + 3])
        documents.append(Document(topic, text, topic))
        for split, claim in (("conclusion", conclusion), ("premise", rng.choice(premises))):
            questions.append(_question(rng, f"{topic}-{split}", claim, split, topic, form))
    return Task(tuple(documents), tuple(questions))


def example(rng: random.Random, form: str, nouns: Sequence[str]) -> tuple[str, list[Claim], Claim]:
    """A document of the form about three entities, its two premises and their conclusion."""
    term = dict(zip("SMP", nouns, strict=True))
    premises = [(mood, term[a], term[b]) for mood, (a, b) in zip(form[:2], FIGURES[form[3]], strict=True)]
    rng.shuffle(premises)
    text = " ".join((opening(rng.sample(nouns, len(nouns))), *(statement(*premise) for premise in premises)))
    return text, premises, (form[2], term["S"], term["P"])


def statement(mood: str, subject: str, object: str) -> str:
    """The claim's sentence."""
    return f"{QUANTIFIERS[mood]} {subject} are {object}."


def opening(entities: Sequence[str]) -> str:
    """What stands before statements about the entities, named in this order."""
    *others, last = entities
    return f"The relationships between {', '.join(others)} and {last} are:"


def _question(rng: random.Random, question_id: str, claim: Claim, split: str, topic: str, form: str) -> Question:
    """All six statements about the claim's two entities, in a random order."""
    mood, subject, object = claim
    prompt = opening(rng.sample((subject, object), 2))
    statements = [statement(m, *pair) for m in QUANTIFIERS for pair in ((subject, object), (object, subject))]
    rng.shuffle(statements)
    true = [claim] if mood == "A" else [claim, (mood, object, subject)]
    if mood == "A" and "I" in form:  # the other premise says that the subject exists
        true += [("I", subject, object), ("I", object, subject)]
    answer, *also = (statements.index(statement(*other)) for other in true)
    choices = tuple(f" {statement}" for statement in statements)
    return Question(question_id, prompt, choices, answer, split, topic, form, tuple(also))


def infer(documents: Sequence[Document]) -> list[Inference]:
    """All that follows from statements with all, some and no, without assuming that what "all" speaks of exists."""
    sources: dict[Statement, tuple[str, ...]] = {}
    for document in documents:
        for quantifier, subject, object in _CATEGORICAL.findall(document.text):
            sources.setdefault((quantifier, subject, object), (document.id,))
    stated, by_subject = set(sources), dict[str, list[Statement]]()
    waiting = list(sources)
    for statement in waiting:  # grows while it is walked
        quantifier, subject, object = statement
        by_subject.setdefault(subject, []).append(statement)
        followed = [] if quantifier == "All" else [((quantifier, object, subject), sources[statement])]
        pairs = [(statement, other) for other in by_subject.get(object, [])]
        pairs += [(other, statement) for known in list(by_subject.values()) for other in known if other[2] == subject]
        for first, second in pairs:
            # All a are b, All b are c: All a are c; No b are c: No a are c. Some a are b, All b are c: Some a are c.
            quantifier = {("All", "All"): "All", ("All", "No"): "No", ("Some", "All"): "Some"}.get(
                (first[0], second[0]), ""
            )
            if quantifier and first[1] != second[2]:
                ids = tuple(dict.fromkeys(sources[first] + sources[second]))
                followed.append(((quantifier, first[1], second[2]), ids))
        for conclusion, ids in followed:
            if conclusion not in sources:
                sources[conclusion] = ids
                waiting.append(conclusion)
    return [
        Inference("concluded", f"{quantifier} {subject} are {object}.", ids)
        for (quantifier, subject, object), ids in sources.items()
        if (quantifier, subject, object) not in stated
    ]


GENERATOR = TaskGenerator(
    simple_syllogisms,
    {
        "paper": Preset(NO_ENGLISH, {"strategy": "document"}, {"splitting": "independent"}),
        "small": Preset({"num_examples": 18}, {"strategy": "document"}),
    },
    infer=infer,
)
