"""The tasks that come by name: each a maker and its presets, "paper" (the paper's sizes) being the default.

A preset is the maker's arguments and how much of the documents goes into the context unless asked otherwise: the paper
gives one in eight of its two largest sets, and splits documents into sentences for training, except the semantic
benchmark's. Nonsense words are no English ones. The documents of a "small" preset fit the shipped model's context; that
model knows no English, so a nonsense word may be an English one there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from icl_ft_fast.tasks.process import process
from icl_ft_fast.tasks.reversal_curse import reversal_curse
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.semantic import semantic_structure
from icl_ft_fast.tasks.syllogisms import simple_syllogisms
from icl_ft_fast.tasks.task import Task
from icl_ft_fast.tasks.words import ENGLISH


@dataclass(frozen=True)
class Preset:
    """A maker's arguments and how its task is studied unless asked otherwise.

    Attributes:
        arguments: of the maker.
        icl_per_topic: documents of a topic that ICL reads; None for all.
        icl_subsample: of those, one in this many.
        splitting: of documents for training, see tasks.sentences.
        learning_rate, steps, lr_scheduler_type: of the fine-tuning; None for its own defaults.
        strategy, samples: of augmentation by the model, see augment.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    icl_per_topic: int | None = None
    icl_subsample: int = 1
    splitting: str = "none"
    learning_rate: float | None = None
    steps: int | None = None
    lr_scheduler_type: str | None = None
    strategy: str = "local"
    samples: int = 1


@dataclass(frozen=True)
class Generator:
    """How to make a task from a seed; `reads` says what folder its maker takes first, if any."""

    make: Callable[..., Task]
    presets: Mapping[str, Preset]
    reads: str | None = None


NO_ENGLISH: Mapping[str, Any] = {"exclude": ENGLISH}
GENERATORS: dict[str, Generator] = {
    "simple-reversals": Generator(
        simple_reversals,
        {
            "paper": Preset(NO_ENGLISH),
            "small": Preset(
                {"num_facts": 40}, icl_per_topic=1, learning_rate=1e-3, steps=600, lr_scheduler_type="linear"
            ),
            "reverses": Preset({"reversed_fraction": 0.4, **NO_ENGLISH}),
        },
    ),
    "simple-syllogisms": Generator(
        simple_syllogisms,
        {
            "paper": Preset(NO_ENGLISH, splitting="independent", strategy="document"),
            "small": Preset({"num_examples": 18}, strategy="document"),
        },
    ),
    "semantic-structure": Generator(
        semantic_structure,
        {
            "paper": Preset(NO_ENGLISH, icl_subsample=8, strategy="global"),
            "small": Preset(
                {"num_categories": 12, "num_articles": 48, "sentences": (2, 6), "num_questions": 40},
                icl_per_topic=1,
                splitting="independent",
                learning_rate=1e-3,
                steps=2000,
                lr_scheduler_type="linear",
                strategy="global",
                samples=8,
            ),
        },
    ),
    "process": Generator(
        process,
        {
            "paper": Preset(NO_ENGLISH, strategy="global"),
            "small": Preset(
                {"num_functions": (2, 2), "num_atoms": 4, "num_examples": 1, "num_questions": 40},
                strategy="global",
                samples=4,
            ),
        },
    ),
    "reversal-curse": Generator(
        reversal_curse,
        {
            "paper": Preset(icl_subsample=8, splitting="independent"),
            "nonsense": Preset({"nonsense_names": True, **NO_ENGLISH}, icl_subsample=8, splitting="independent"),
        },
        reads="a folder of github.com/lukasberglund/reversal_curse, or the hub's lberglund/reversal_curse",
    ),
}
