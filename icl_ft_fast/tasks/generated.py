"""The tasks that come by name, and what follows from documents in their grammars.

Each task's file holds its maker and its presets. The default preset is "paper": the paper's sizes, one in eight
documents of its two largest sets in the context, documents split into sentences for training except the semantic
benchmark's. Nonsense words are no English ones there. The documents of a "small" preset fit the shipped model's
context; that model knows no English, so a nonsense word may be an English one there.
"""

from __future__ import annotations

from collections.abc import Sequence

from icl_ft_fast.tasks import process, reversal_curse, reversals, semantic, syllogisms
from icl_ft_fast.tasks.generator import Inference, TaskGenerator
from icl_ft_fast.tasks.task import Document

GENERATORS: dict[str, TaskGenerator] = {
    "simple-reversals": reversals.GENERATOR,
    "simple-syllogisms": syllogisms.GENERATOR,
    "semantic-structure": semantic.GENERATOR,
    "process": process.GENERATOR,
    "reversal-curse": reversal_curse.GENERATOR,
}


def infer(documents: Sequence[Document]) -> list[Inference]:
    """All that follows from the documents in the grammar of any task; nothing from text that is in none."""
    rules = [generator.infer for generator in GENERATORS.values() if generator.infer is not None]
    return [inference for rule in rules for inference in rule(documents)]


def deny(statement: str) -> str | None:
    """The contradiction of a statement in the grammar of any task, None for any other text."""
    rules = [generator.deny for generator in GENERATORS.values() if generator.deny is not None]
    return next((denial for rule in rules if (denial := rule(statement)) is not None), None)
