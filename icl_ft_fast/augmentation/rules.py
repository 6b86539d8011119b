"""Augmentation without a model: what the grammars of the tasks imply, and documents with their words reversed."""

from __future__ import annotations

from collections.abc import Sequence

from icl_ft_fast.augmentation.steps import Augmentation, Augmented
from icl_ft_fast.tasks import generated
from icl_ft_fast.tasks.task import Document


def augment_rules(documents: Sequence[Document]) -> Augmented:
    """All that follows from the documents in the grammar of a task: always right, and nothing from other text."""
    rows = (
        Augmentation(found.source_ids[0], found.kind, found.text, _origin("rules", *found.source_ids))
        for found in generated.infer(documents)
    )
    return Augmented(tuple(rows), {"unparsed": 0, "repeats": 0})


def augment_reverse(documents: Sequence[Document]) -> Augmented:
    """Each document with its words in reverse order: reverse training (Golovneva et al. 2024, arXiv 2403.13799)."""
    reversed_words = ((document.id, " ".join(reversed(document.text.split()))) for document in documents)
    rows = (Augmentation(name, "reverse", text, _origin("reverse", name)) for name, text in reversed_words)
    return Augmented(tuple(rows), {"unparsed": 0, "repeats": 0})


def _origin(strategy: str, *source_ids: str) -> dict[str, object]:
    return {"strategy": strategy, "source_ids": list(source_ids)}
