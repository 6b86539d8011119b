"""What a study records of each run: answers, costs, counts. Plain values that results.json holds as they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from icl_ft_fast.study.evaluate import Accuracy, Answer
from icl_ft_fast.tasks.task import Question


@dataclass(frozen=True)
class Sample:
    """An augmentation and the document it was written from."""

    source: str
    kind: str
    text: str


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy after a training step, by split, without documents in the context."""

    step: int
    accuracy: dict[str, float]


@dataclass(frozen=True)
class Harm:
    """What an arm changes elsewhere.

    Attributes:
        kl: KL(untouched || arm) in nats a token, on the untouched model's own texts.
        general: correct and total answers to the general task.
        general_before: the same of the untouched model without documents.
    """

    kl: float
    general: Accuracy
    general_before: Accuracy

    @property
    def points_lost(self) -> float:
        """Accuracy lost on the general task, in percentage points; negative where it rose."""
        return 100 * (self.general_before.value - self.general.value)


@dataclass(frozen=True)
class Run:
    """One arm under one seed.

    Attributes:
        arm: the name of an arm, see arms.ARMS.
        seed: the seed.
        accuracy: correct and total answers by split.
        answers: each question's choice probabilities, for those whose answer is known.
        setup_s: seconds spent once before the first query: augmentation and training.
        query_s: seconds a query took after that and after the context's prefill, all questions scored together.
        query_request_tokens: tokens of one query's requests, as a scorer without reuse forwards them: each choice with
            its own copy of the context and the prompt.
        query_forwarded_tokens: tokens really forwarded a query, without the context's prefill.
        counts: the ledger of the whole run.
        notes: augmentation counts and the like.
        losses: mean loss per target token (nats) of each training step.
        curve: accuracy by training step, where it was asked for.
        samples: some augmentations, each with the text it was written from.
        workers: runs that were made at once when this one was timed, itself included; None for as many as a cluster had
            room for.
        harm: what the arm changes elsewhere; None where it was not measured.
        questions: what was asked.
    """

    arm: str
    seed: int
    accuracy: dict[str, Accuracy]
    answers: tuple[Answer, ...]
    setup_s: float
    query_s: float
    query_request_tokens: float
    query_forwarded_tokens: float
    counts: dict[str, Any]
    notes: dict[str, Any]
    losses: tuple[float, ...] = ()
    samples: tuple[Sample, ...] = ()
    workers: int | None = 1
    harm: Harm | None = None
    curve: tuple[CurvePoint, ...] = ()
    questions: tuple[Question, ...] = field(default=(), repr=False)

    @cached_property
    def as_json(self) -> dict[str, Any]:
        """The run in results.json, which has the questions elsewhere; made once, though every run writes the file."""
        return asdict(replace(self, questions=()))
