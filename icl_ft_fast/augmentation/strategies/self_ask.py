"""self-ask: questions that the model asks itself about a document, round by round, with their answers.

Five a reply, four rounds; each round is told what was asked before, and later ones ask for reversals and conclusions,
as the self-asked questions of context distillation do (Doc-to-LoRA, arXiv 2602.15902).

A small model loses the document and the form in the first reply: `SMALL` asks it as self-qa does, a question a reply,
and samples, so that a budget of tokens is filled.
"""

from collections.abc import Sequence
from dataclasses import replace

from icl_ft_fast.augmentation.strategies import self_qa
from icl_ft_fast.augmentation.strategy import SMALL_TEMPERATURE, Strategy, Unit, lines_of, questions_and_answers
from icl_ft_fast.tasks.task import Document

QUESTIONS, ROUNDS = 5, 4  # of a reply; of a document


def first_round(document: Document) -> list[Unit]:
    """A prompt that nothing was asked before."""
    return [Unit("", document.text, _variables([]))]


def next_round(unit: Unit, reply: str) -> Sequence[Unit]:
    """The round after, which knows all questions before it; nothing where a reply asked nothing, or after the last."""
    asked = [text for label, text in lines_of(reply) if label == "Question"]
    if not asked or unit.variables["round"] + 1 == ROUNDS:
        return ()
    before = list(dict.fromkeys([*unit.variables["asked"], *asked]))
    return [Unit("#next", unit.source, _variables(before, unit.variables["round"] + 1))]


def _variables(asked: list[str], number: int = 0) -> dict[str, object]:
    return {"asked": asked, "round": number, "questions": QUESTIONS}


STRATEGY = Strategy(
    name="self-ask",
    sees="one document, and what was asked about it in earlier rounds",
    writes="new questions with their answers, reversals and conclusions among them",
    labels=("Question", "Answer"),
    read=questions_and_answers,
    units=first_round,
    follow=next_round,
    follow_ups=ROUNDS - 1,
    examples=("brooks", "puddles"),
    max_new_tokens=384,
    temperature=1.0,
)
SMALL = replace(self_qa.STRATEGY, name=STRATEGY.name, prompts=self_qa.STRATEGY.name, temperature=SMALL_TEMPERATURE)
STRATEGY = replace(STRATEGY, small=SMALL)
