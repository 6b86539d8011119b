"""What a task that comes by name consists of: a maker, its presets, its options, and what its grammar implies.

A task is added by one file that ends in a TaskGenerator and by a line in generated.py. General code asks these objects
and knows no task's grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from icl_ft_fast.tasks.task import Document, Task
from icl_ft_fast.tasks.words import ENGLISH

NO_ENGLISH: Mapping[str, Any] = {"exclude": ENGLISH}


@dataclass(frozen=True)
class Preset:
    """A task's arguments and the study settings that suit it; what a user asks for goes before both.

    Attributes:
        arguments: keyword arguments of the task's maker.
        study: overrides of the study's settings, by the names of StudySettings (arms, icl_per_topic, strategy, ...).
        finetune: overrides of the training's settings, by the names of FinetuneSettings (steps, learning_rate, ...).
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    study: Mapping[str, Any] = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskOption:
    """A whole number above 0 that a task takes on the command line in place of its preset's.

    Attributes:
        name: of the option, without its dashes.
        argument: the maker's keyword argument.
        help: a sentence of help.
    """

    name: str
    argument: str
    help: str


@dataclass(frozen=True)
class Inference:
    """A statement that follows from documents by a task's grammar.

    Attributes:
        kind: the rule that made it ("reversed", "concluded", ...).
        text: the statement.
        source_ids: ids of the documents it follows from.
    """

    kind: str
    text: str
    source_ids: tuple[str, ...]


@dataclass(frozen=True)
class TaskGenerator:
    """How to make a task from a seed.

    Attributes:
        make: takes the folder or dataset that the task reads, if it does, a seed and keyword arguments.
        presets: by name; "paper", the paper's sizes, is the default.
        reads: what folder or dataset `make` takes first; None if it reads none.
        options: what the command line can set.
        infer: all that follows from documents in the task's grammar; None if it has no rules.
        deny: the contradiction of a statement in the same words, None for a text that is no statement of the grammar.
    """

    make: Callable[..., Task]
    presets: Mapping[str, Preset]
    reads: str | None = None
    options: tuple[TaskOption, ...] = ()
    infer: Callable[[Sequence[Document]], Iterable[Inference]] | None = None
    deny: Callable[[str], str | None] | None = None
