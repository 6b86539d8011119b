"""Multiple-choice questions, scored by the likelihood of each choice after context and prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.control_tokens import as_text, plain
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import (
    Encoded,
    LogLikelihood,
    ScoreError,
    ScoringOptions,
    check_fit,
    score_requests,
    stored_context,
)
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.shards import ShardedRun
from icl_ft_fast.tasks.task import Question


@dataclass(frozen=True)
class Score:
    """What the model makes of one question.

    Attributes:
        question_id: the question's id.
        logp: natural-log likelihood of each choice, summed over its tokens.
        num_tokens: tokens of each choice.
        is_greedy: whether greedy decoding would generate the choice.
        predicted: index of the most likely choice (the first of equals).
        answer: index of the correct choice, None if unknown.
        also_correct: indices of further correct choices.
    """

    question_id: str
    logp: tuple[float, ...]
    num_tokens: tuple[int, ...]
    is_greedy: tuple[bool, ...]
    predicted: int
    answer: int | None
    also_correct: tuple[int, ...] = ()

    @property
    def is_correct(self) -> bool | None:
        """Whether the prediction is a correct choice; None where the answer is unknown."""
        return None if self.answer is None else self.predicted in (self.answer, *self.also_correct)


def iter_scores(
    model: Model,
    questions: Sequence[Question],
    *,
    context: str = "",
    chunk_tokens: int | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
    store: ContextStore | None = None,
) -> Iterator[Score]:
    """Score multiple-choice questions, each yielded as soon as its last choice is done; see score().

    Examples:
        >>> questions = [iff.Question(str(n), "glon are", (" wide.", " wider than femp.")) for n in range(2)]
        >>> sorted(score.question_id for score in iff.iter_scores(iff.load("shipped"), questions))
        ['0', '1']
    """
    options = ScoringOptions(chunk_tokens, progress, store)
    for _, result in _scored(model, questions, context, options, ledger or Ledger()):
        yield result


def _scored(
    model: Model,
    questions: Sequence[Question],
    context: str,
    options: ScoringOptions,
    ledger: Ledger,
    sharded: ShardedRun | None = None,
) -> Iterator[tuple[int, Score]]:
    """Yield (question index, score) as questions are done."""
    encoded, shared = encode_questions(model, questions, context, ledger)
    requests = [request for its in encoded for request in its]
    if sharded is not None:
        found = sharded.score(model, requests, len(shared), options, ledger)
        in_turn = iter(found or ())
        for q, its in enumerate(encoded if found is not None else ()):
            yield q, score_of(questions[q], its, [next(in_turn) for _ in its])
        return
    owner = [q for q, its in enumerate(encoded) for _ in its]
    first = [0, *itertools.accumulate(map(len, encoded))]
    waiting = [len(its) for its in encoded]
    results: dict[int, LogLikelihood] = {}
    start = None
    if options.store is not None and shared:
        label = " ".join(plain(context).split())[:60]
        with ledger.phase("context"):
            start = stored_context(
                model, shared, options.store, label=label, chunk_tokens=options.chunk_tokens, ledger=ledger
            )
    for r, result in score_requests(model, requests, options, ledger, start, len(shared), count_start=False):
        results[r] = result
        q = owner[r]
        waiting[q] -= 1
        if not waiting[q]:
            yield q, score_of(questions[q], encoded[q], [results.pop(i) for i in range(first[q], first[q + 1])])


def encode_questions(
    model: Model, questions: Sequence[Question], context: str, ledger: Ledger
) -> tuple[list[list[Encoded]], list[int]]:
    """Token ids of every question's choices after context + prompt, and the tokens of `context` that all begin with.

    Raises:
        ScoreError: as score() does.
    """
    text = partial(as_text, model.tokenizer)
    pairs = [(context + text(question.prompt), text(choice)) for question in questions for choice in question.choices]
    with ledger.phase("tokenise"):
        encoded = encoding.encode_pairs(model.tokenizer, pairs)
        (shared,) = encoding.encode(model.tokenizer, [context.rstrip()]) if context.strip() else ([],)
    requests = iter(encoded)
    by_question = []
    for question in questions:
        if not question.choices:
            raise ScoreError(f"question {question.id!r}: choices: expected at least one")
        by_question.append([next(requests) for _ in question.choices])
        for choice, (_, continuation) in enumerate(by_question[-1]):
            if not continuation:
                raise ScoreError(
                    f"question {question.id!r}: choices[{choice}]: no token of its own: empty, or merged into the end "
                    "of the prompt by the tokenizer (begin the choice with a space or end the prompt before one)"
                )
    check_fit(model, encoded, [f"question {question.id!r}" for question in questions for _ in question.choices])
    for ids in {id(ids): ids for ids, _ in encoded}.values():  # less what a token that spans its end changes
        shared = shared[: encoding.common(shared, ids)]
    return by_question, shared


def score_of(question: Question, encoded: Sequence[Encoded], results: Sequence[LogLikelihood]) -> Score:
    """The score of a question whose choices, as encode_questions() made them, have these results."""
    logp = tuple(result.logp for result in results)
    return Score(
        question_id=question.id,
        logp=logp,
        num_tokens=tuple(len(continuation) for _, continuation in encoded),
        is_greedy=tuple(result.is_greedy for result in results),
        predicted=max(range(len(logp)), key=logp.__getitem__),
        answer=question.answer,
        also_correct=question.also_correct,
    )


def score(
    model: Model,
    questions: Sequence[Question],
    *,
    context: str = "",
    chunk_tokens: int | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
    store: ContextStore | None = None,
    sharded: ShardedRun | None = None,
) -> list[Score]:
    """Score multiple-choice questions by the likelihood of each choice after context + prompt.

    Args:
        model: from load().
        questions: prompts and choices; choices are not shown to the model.
        context: text before every prompt, forwarded once.
        chunk_tokens: tokens forwarded at a time, fewer where model.memory asks for it; None for what suits the model's
            device. Results do not depend on it beyond rounding.
        ledger: counts of this call are added to it.
        progress: show a bar of forwarded tokens.
        store: of saved contexts; `context` is taken from it, or forwarded and saved there.
        sharded: to let other processes score too, and to resume a run that was killed.

    Returns:
        One Score a question, in the order given; none in processes of other rank than 0 of a sharded run.

    Raises:
        ScoreError: a choice without a token of its own, more tokens than the model has positions, or too little memory.

    Examples:
        >>> model = iff.load("shipped")
        >>> question = iff.Question("q1", "glon are", (" less dangerous than femp.", " more dangerous than femp."))
        >>> iff.score(model, [question], context="femp are more dangerous than glon.")[0].predicted in (0, 1)
        True
    """
    options = ScoringOptions(chunk_tokens, progress, store)
    scores = dict(_scored(model, questions, context, options, ledger or Ledger(), sharded))
    return [scores[q] for q in sorted(scores)]
