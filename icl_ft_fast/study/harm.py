"""Harm elsewhere: what an arm changes in a model that has nothing to do with the documents.

Two measures. On texts that the untouched model writes by itself, without documents, the mean over tokens of

    KL(untouched || arm) = sum over the vocabulary of p * (log p - log q)    in nats

and accuracy on a general task, before and after. Arms that put documents or slots before a question have them in place
in both. What a chat template writes around a question without documents stands before the untouched model's texts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from icl_ft_fast.engine import encoding, trie
from icl_ft_fast.engine.forward import ScoringOptions, forward_chunks
from icl_ft_fast.engine.kv_cache import Context
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import check_fit
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.engine.transfer import Sent
from icl_ft_fast.runtime.durable import digest
from icl_ft_fast.study import evaluate
from icl_ft_fast.study.arm import ArmJob, Prepared, ask
from icl_ft_fast.study.evaluate import Accuracy
from icl_ft_fast.study.own_texts import HarmError, own_texts
from icl_ft_fast.study.records import Harm
from icl_ft_fast.tasks.files import TaskError
from icl_ft_fast.tasks.task import Question, Task, read_documents, read_questions

SHIPPED_GENERAL = "shipped"  # the name of the general task that comes with the package
SHARED_WITH_GENERAL = "shared_with_general"  # the note of a run whose general task has some of the task's own
_FOLDER = Path(__file__).parents[1] / "tasks" / "general"
LOGIT_ROWS = 64  # rows whose distributions over the vocabulary are held at a time


def general_questions(general: str) -> tuple[Question, ...]:
    """The questions of a general task: "shipped", or a folder or file of questions; none for "".

    Raises:
        HarmError: the file cannot be read, or no question has a known answer.
    """
    if not general:
        return ()
    path = _FOLDER if general == SHIPPED_GENERAL else Path(general)
    path = path / "questions.jsonl" if path.is_dir() else path
    try:
        known = tuple(question for question in read_questions(path) if question.answer is not None)
    except TaskError as error:
        raise HarmError(f"general: {error}") from error
    if not known:
        raise HarmError(f"general: {path}: no question has an answer")
    return known


def shared_with(general: str, task: Task) -> int:
    """How many documents and questions of the task a general task has too; harm measured on those is none elsewhere."""
    if not general:
        return 0
    path = Path(general)
    documents = path / "documents.jsonl"
    is_there = documents.is_file() and documents.stat().st_size > 0
    theirs = {document.text for document in read_documents(documents)} if is_there else set()
    asked = {(question.prompt, question.choices) for question in general_questions(general)}
    own = sum(document.text in theirs for document in task.documents)
    return own + sum((question.prompt, question.choices) in asked for question in task.questions)


@torch.inference_mode()
def divergence(
    untouched: Model,
    changed: Model,
    texts: Sequence[Sequence[int]],
    *,
    opening: Sequence[int] | None = None,
    before: Sequence[Sequence[int]] | None = None,
    start: Context | None = None,
) -> float:
    """Mean KL(untouched || changed) in nats a token of the texts.

    Args:
        untouched: reads each text after `opening`.
        changed: reads each after what `before` says; it has the same vocabulary.
        texts: token ids.
        opening: token ids before each text; None for nothing.
        before: token ids before each text for `changed`, the opening included; None for the opening.
        start: a context that all of `before` begin with.

    Raises:
        ScoreError: a text does not fit behind what is before it.

    Numerics: hidden states in the models' dtypes, distributions and their sums in float64.
    """
    opening = opening or [encoding.prefix_token_id(untouched.tokenizer)]
    plain = _hidden(untouched, [opening] * len(texts), texts, None)
    other = _hidden(changed, before or [opening] * len(texts), texts, start)
    total = 0.0
    for first in range(0, len(plain), LOGIT_ROWS):
        block = slice(first, first + LOGIT_ROWS)
        log_p = untouched.head.logits(plain[block]).double().log_softmax(-1)
        log_q = changed.head.logits(other[block]).double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(plain)


def measure_harm(job: ArmJob, ready: Prepared, questions: tuple[Question, ...]) -> Harm:
    """What an arm that is ready changes elsewhere; counted in no ledger, because no query pays for it.

    Args:
        job: the arm's.
        ready: the arm.
        questions: of the general task.
    """
    journal, key = job.workspace.journal, digest("general", job.model.fingerprint(), job.seed, _named(questions))
    general = replace(job, task=Task(job.task.documents, questions), ledger=Ledger())
    untouched = Prepared(job.model, prompt_context(job.model, [], job.settings.template))
    counts = journal.once(key, lambda: _counts(evaluate.accuracies(ask(general, untouched))))
    contexts = None if ready.before is None else tuple(ready.before([q.prompt for q in questions], Ledger()))
    after = _counts(evaluate.accuracies(ask(general, replace(ready, contexts=contexts))))
    texts = own_texts(job.model, job.seed, journal=journal)
    written = job.model.tokenizer.batch_decode(texts)
    shown = [ready.context] * len(texts) if ready.before is None else ready.before(written, Ledger())
    nothing = [encoding.prefix_token_id(job.model.tokenizer)]
    around = [untouched.context, *shown]  # a chat template's own words stand there without documents, too
    encoded = encoding.encode(job.model.tokenizer, [context.rstrip() for context in around])
    opening, *before = [ids if context.strip() else nothing for ids, context in zip(encoded, around, strict=True)]
    is_shared = ready.store is not None and ready.before is None
    start = ready.store.find(before[0]) if is_shared and ready.store is not None else None
    kl = divergence(job.model, ready.model, texts, opening=opening, before=before, start=start)
    return Harm(kl, Accuracy(*after), Accuracy(*counts))


def _named(questions: Sequence[Question]) -> list[list[object]]:
    return [[question.id, question.prompt, list(question.choices), question.answer] for question in questions]


def _counts(accuracy: dict[str, Accuracy]) -> list[int]:
    return [sum(a.correct for a in accuracy.values()), sum(a.total for a in accuracy.values())]


def _hidden(
    model: Model, before: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], start: Context | None
) -> torch.Tensor:
    """Hidden states [tokens of all texts, E] that predict the texts' tokens, in their order."""
    requests = [(list(ids), list(text)) for ids, text in zip(before, texts, strict=True)]
    check_fit(model, requests, [f"text {t} of the model's own" for t in range(len(texts))])
    tree = trie.build_from_lists(requests)
    reader = _Reading(model, tree)
    for _ in forward_chunks(model, tree, reader, options=ScoringOptions(), ledger=Ledger(), start=start):
        pass
    return reader.hidden[tree.path.long().to(reader.hidden.device)]


class _Reading:
    """Reads the hidden states that predict the scored tokens."""

    def __init__(self, model: Model, tree: trie.Trie) -> None:
        weight = model.head.weight
        self.hidden = torch.empty(len(tree.scored_token), weight.shape[1], dtype=weight.dtype, device=weight.device)
        self.extra_bytes = self.hidden.nbytes

    def __call__(self, sent: Sent, hidden: torch.Tensor) -> None:
        self.hidden[sent.chunk.target_index.to(hidden.device)] = hidden[sent.head_rows[sent.target_row]]
