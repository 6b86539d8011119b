"""What to look at before trusting a task's questions: repeats, leaked answers, choices that give themselves away.

Documents are read once, in turn; memory grows with the questions only.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from icl_ft_fast.tasks.near import NearRepeats
from icl_ft_fast.tasks.seen import Seen
from icl_ft_fast.tasks.sentences import UNSPACED, words_of
from icl_ft_fast.tasks.task import Document, Question

NEAR = 0.8  # Jaccard similarity of 3-word shingles from which on a document nearly repeats another
NEAR_DOCUMENTS = 20_000  # looked at: each takes a millisecond and some kilobytes
_UNSPACED = re.compile(f"[{UNSPACED}]")


@dataclass(frozen=True)
class Check:
    """What to look at in a task.

    Attributes:
        same_documents: ids of documents with the text (but for case, space and punctuation) of an earlier one.
        same_questions: ids of questions with the prompt and choices of an earlier one.
        leaked: by split, ids of questions whose prompt and answer stand in the documents.
        answered: by split, questions with a known answer.
        longest_is_right: share of the answered questions that picking the longest choice gets right (ties shared).
        chance: what picking at random gets right.
        positions: by number of choices, how often each position is the answer's.
        empty_documents: ids of documents without a word.
        near_documents: ids of documents that nearly repeat an earlier one; None if none were looked for.
        equal_choices: ids of questions with two choices of one text.
        run_together: ids of questions whose choices follow the prompt without a space.
        empty_prompts: ids of questions that ask nothing.
        lost_documents: ids of questions whose `document` is the id of none.
    """

    same_documents: tuple[str, ...]
    same_questions: tuple[str, ...]
    leaked: dict[str, tuple[str, ...]]
    answered: dict[str, int]
    longest_is_right: float
    chance: float
    positions: dict[int, tuple[int, ...]]
    empty_documents: tuple[str, ...] = ()
    near_documents: tuple[str, ...] | None = None
    equal_choices: tuple[str, ...] = ()
    run_together: tuple[str, ...] = ()
    empty_prompts: tuple[str, ...] = ()
    lost_documents: tuple[str, ...] = ()


def check(
    documents: Iterable[Document],
    questions: Sequence[Question],
    *,
    ngram: int = 8,
    threshold: float = 0.8,
    near: NearRepeats | None = None,
) -> Check:
    """Look for duplicates, leaked answers, and choices that give themselves away.

    Args:
        documents: read once, in turn.
        questions: all of them.
        ngram: words; a prompt with its answer counts as leaked if at least `threshold` of its runs of so many words
            (of all its words, if it has fewer) stand in documents: n-gram containment (Broder 1997).
        threshold: above 0, at most 1.
        near: tells near-repeats among the first NEAR_DOCUMENTS documents, which it holds; None looks for none.
    """
    answered = [question for question in questions if question.answer is not None]
    grams = {q.id: _ngrams(words_of(q.prompt + q.choices[q.answer or 0]), ngram) for q in answered}
    wanted = {gram for mine in grams.values() for gram in mine}
    lengths = sorted({len(gram) for gram in wanted})
    found: set[tuple[str, ...]] = set()
    lost = {question.document for question in questions} - {None}
    same_documents, empty_documents, near_documents = list[str](), list[str](), list[str]()
    with contextlib.closing(Seen()) as texts:
        for document in documents:
            lost.discard(document.id)
            words = words_of(document.text)
            if not words:
                empty_documents.append(document.id)
            if not texts.add(" ".join(words)):
                same_documents.append(document.id)
            elif near is not None and words and near.count < NEAR_DOCUMENTS and not near.add(document.text):
                near_documents.append(document.id)
            found |= {gram for length in lengths for gram in _ngrams(words, length)} & wanted
    leaked = {
        split: tuple(
            q.id
            for q in answered
            if q.split == split and grams[q.id] and len(grams[q.id] & found) >= threshold * len(grams[q.id])
        )
        for split in dict.fromkeys(q.split for q in answered)
    }
    first: dict[tuple[str, tuple[str, ...]], str] = {}
    for question in questions:
        first.setdefault((question.prompt, tuple(sorted(question.choices))), question.id)
    right = []
    for question in answered:
        most = max(map(len, question.choices))
        longest = [c for c, choice in enumerate(question.choices) if len(choice) == most]
        right.append(sum(c in question.correct for c in longest) / len(longest))
    places: dict[int, list[int]] = {}
    for question in answered:
        places.setdefault(len(question.choices), [0] * len(question.choices))[question.answer or 0] += 1
    return Check(
        same_documents=tuple(same_documents),
        same_questions=tuple(q.id for q in questions if q.id not in set(first.values())),
        leaked=leaked,
        answered=dict(Counter(q.split for q in answered)),
        longest_is_right=sum(right) / max(1, len(right)),
        chance=sum(len(q.correct) / len(q.choices) for q in answered) / max(1, len(answered)),
        positions={number: tuple(counts) for number, counts in sorted(places.items())},
        empty_documents=tuple(empty_documents),
        near_documents=None if near is None else tuple(near_documents),
        equal_choices=tuple(q.id for q in questions if len(set(q.choices)) < len(q.choices)),
        run_together=tuple(q.id for q in questions if runs_together(q)),
        empty_prompts=tuple(q.id for q in questions if not q.prompt.strip()),
        lost_documents=tuple(q.id for q in questions if q.document in lost),
    )


def runs_together(question: Question) -> bool:
    """Whether a choice's first word is one with the prompt's last: "in" and "Lund" read as "inLund"."""
    last = question.prompt[-1:]
    if not last or last.isspace() or _UNSPACED.match(last):
        return False
    return any(choice[0].isalnum() and not _UNSPACED.match(choice[0]) for choice in question.choices)


def _ngrams(words: list[str], length: int) -> set[tuple[str, ...]]:
    """Runs of `length` words, or all the words if they are fewer; none of no words."""
    if not words:
        return set()
    length = min(length, len(words))
    return {tuple(words[first : first + length]) for first in range(len(words) - length + 1)}
