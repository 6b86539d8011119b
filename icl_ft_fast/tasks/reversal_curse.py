"""The Reversal Curse data (Berglund et al. 2024), read from a folder or from the hub (lberglund/reversal_curse).

As Lampinen et al. (2025) use it: all 3,600 rows are documents, the test asks for the name given the description where
training only led from name to description, among the right name and three others. The paper does not say which
others; both readings are asked: any of the names ("reversal"), and names that training has as targets ("reversal
targets"), which a fine-tuned model prefers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from icl_ft_fast.tasks import words
from icl_ft_fast.tasks.files import TaskError, read_jsonl
from icl_ft_fast.tasks.generator import NO_ENGLISH, Preset, TaskGenerator
from icl_ft_fast.tasks.task import Document, Question, Task, text_field

TRAINING = "all_prompts_train.jsonl"
DESCRIPTIONS = "p2d_prompts_test.jsonl"  # description given the name, as in training
NAMES = "d2p_prompts_test.jsonl"  # name given the description, as in training
REVERSALS = "p2d_reverse_prompts_test.jsonl"  # name given the description, against training
HUB_FOLDER = "name_description_dataset"  # where a dataset on the hub has them
CHOICES = 4
_NAME_FIRST = re.compile(r"\s*([A-Z][\w'-]* [A-Z][\w'-]*)")


@dataclass(frozen=True)
class _Row:
    """A line of the data and where it stands."""

    where: str
    prompt: str
    completion: str


def reversal_curse(
    data: str | Path, seed: int = 0, *, nonsense_names: bool = False, exclude: Collection[str] = ()
) -> Task:
    """Read the task; the same arguments give the same task.

    Args:
        data: a folder with the four files that this module names, rows of {"prompt", "completion"}; or the id of a
            dataset on the hub that has them in HUB_FOLDER.
        seed: of the wrong choices and their order, and of the names where they are nonsense.
        nonsense_names: put two nonsense words in the place of every name (the paper's appendix B.2), none of which
            the data has already.
        exclude: nonsense words not to draw, see words.sample_words().

    Returns:
        A document a training row. Splits: "trained" (a description, against others worded alike), "trained names",
        "reversal" and "reversal targets". Four choices, chance a quarter. A question's topic is its person.

    Raises:
        TaskError: a file that cannot be read, fetched or used; the message names file, line and field.
    """
    training, descriptions, trained_names, reversals = (
        _rows(_located(data, name)) for name in (TRAINING, DESCRIPTIONS, NAMES, REVERSALS)
    )
    targets = _distinct(match[1] for row in training if (match := _NAME_FIRST.match(row.completion)))
    tested = _distinct(row.completion.strip() for row in reversals)
    names = _distinct([*tested, *targets])
    rng = random.Random(seed)
    questions = []
    people = [_person(row, tested) for row in descriptions]
    wordings = [row.prompt.replace(person, "") for row, person in zip(descriptions, people, strict=True)]
    for r, (row, person) in enumerate(zip(descriptions, people, strict=True)):
        alike = [other.completion for other, w in zip(descriptions, wordings, strict=True) if w == wordings[r]]
        questions.append(_question(rng, f"trained{r}", "trained", row, row.completion, alike, person))
    for split, rows, rivals in (
        ("trained names", trained_names, names),
        ("reversal", reversals, names),
        ("reversal targets", reversals, targets),
    ):
        for r, row in enumerate(rows):
            person, spaced = row.completion.strip(), [f" {name}" for name in rivals]
            questions.append(_question(rng, f"{split.replace(' ', '-')}{r}", split, row, f" {person}", spaced, person))
    documents = [Document(f"train{r}", row.prompt + row.completion) for r, row in enumerate(training)]
    task = Task(tuple(documents), tuple(questions))
    if not nonsense_names:
        return task
    texts = [document.text for document in documents] + [q.prompt + "".join(q.choices) for q in questions]
    taken = {*exclude, *re.findall(r"[a-z]+", " ".join(texts).lower())}
    return _renamed(task, names, words.sample_words(rng, 2 * len(names), exclude=taken))


def _located(data: str | Path, name: str) -> Path:
    """Where the file is, fetched from the hub if `data` is no folder."""
    if Path(data).is_dir():
        return Path(data) / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(data), f"{HUB_FOLDER}/{name}", repo_type="dataset"))
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TaskError(
            f"{data}: neither a folder nor a dataset on the hub with {HUB_FOLDER}/{name}: {reason}"
        ) from error


def _rows(path: Path) -> list[_Row]:
    rows = [_Row(at, text_field(at, row, "prompt"), text_field(at, row, "completion")) for at, row in read_jsonl(path)]
    for row in rows:
        if not row.completion.strip():
            raise TaskError(f"{row.where}: completion: expected more than spaces")
    if not rows:
        raise TaskError(f"{path}: empty: expected at least one JSON object")
    return rows


def _distinct(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _person(row: _Row, tested: Sequence[str]) -> str:
    person = next((name for name in tested if name in row.prompt), None)
    if person is None:
        raise TaskError(f"{row.where}: prompt: names nobody who is asked for in {REVERSALS}")
    return person


def _question(
    rng: random.Random, question_id: str, split: str, row: _Row, truth: str, rivals: Sequence[str], person: str
) -> Question:
    """The truth among three rivals that differ from it."""
    wrong = [rival for rival in _distinct(rivals) if rival != truth]
    if len(wrong) < CHOICES - 1:
        raise TaskError(
            f"{row.where}: completion: fewer than {CHOICES - 1} wrong choices for it in the {split!r} split"
        )
    choices = [truth, *rng.sample(wrong, CHOICES - 1)]
    rng.shuffle(choices)
    return Question(question_id, row.prompt, tuple(choices), choices.index(truth), split, person)


def _renamed(task: Task, names: Sequence[str], drawn: Sequence[str]) -> Task:
    """The task with two drawn words, capitalised, for each name."""
    new = {name: f"{drawn[2 * n].capitalize()} {drawn[2 * n + 1].capitalize()}" for n, name in enumerate(names)}
    pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))

    def rename(text: str) -> str:
        return pattern.sub(lambda match: new[match[0]], text)

    return Task(
        tuple(Document(document.id, rename(document.text)) for document in task.documents),
        tuple(
            replace(q, prompt=rename(q.prompt), choices=tuple(map(rename, q.choices)), topic=rename(q.topic or ""))
            for q in task.questions
        ),
    )


STUDY, TRAINING_SETTINGS = {"icl_subsample": 8}, {"splitting": "independent"}
GENERATOR = TaskGenerator(
    reversal_curse,
    {
        "paper": Preset({}, STUDY, TRAINING_SETTINGS),
        "nonsense": Preset({"nonsense_names": True, **NO_ENGLISH}, STUDY, TRAINING_SETTINGS),
    },
    reads="a folder of github.com/lukasberglund/reversal_curse, or the hub's lberglund/reversal_curse",
)
