"""What follows by rule, where the grammar is known: controls whose inferences are always right."""

from __future__ import annotations

import re
from collections.abc import Sequence

from icl_ft_fast.augment.steps import Augmentation, Augmented
from icl_ft_fast.tasks import comparisons
from icl_ft_fast.tasks.task import Document

_CATEGORICAL = re.compile(r"\b(All|Some|No) (\w+) are (\w+)\.")


def augment_rules(documents: Sequence[Document]) -> Augmented:
    """The reversal and rephrasing of every comparison, and what follows from the syllogisms of all documents."""
    rows = []
    for document in documents:
        for fact in comparisons.find(document.text):
            rows.append(Augmentation(document.id, "reversed", fact.reversed.statement, _origin("rules", document.id)))
            rows.append(Augmentation(document.id, "rephrased", fact.rephrased, _origin("rules", document.id)))
    return Augmented((*rows, *_syllogisms(documents)), {"unparsed": 0, "repeats": 0})


def augment_reverse(documents: Sequence[Document]) -> Augmented:
    """Each document with its words in reverse order: reverse training (Golovneva et al. 2024, arXiv 2403.13799)."""
    reversed_words = ((document.id, " ".join(reversed(document.text.split()))) for document in documents)
    rows = (Augmentation(name, "reverse", text, _origin("reverse", name)) for name, text in reversed_words)
    return Augmented(tuple(rows), {"unparsed": 0, "repeats": 0})


def _origin(strategy: str, *source_ids: str) -> dict[str, object]:
    return {"strategy": strategy, "source_ids": list(source_ids)}


Statement = tuple[str, str, str]  # quantifier, subject, object


def _syllogisms(documents: Sequence[Document]) -> list[Augmentation]:
    """All that follows from statements with all, some and no, without assuming that what "all" speaks of exists."""
    sources: dict[Statement, tuple[str, ...]] = {}
    for document in documents:
        for quantifier, subject, object in _CATEGORICAL.findall(document.text):
            sources.setdefault((quantifier, subject, object), (document.id,))
    told, by_subject = set(sources), dict[str, list[Statement]]()
    waiting = list(sources)
    for statement in waiting:  # grows while it is walked
        quantifier, subject, object = statement
        by_subject.setdefault(subject, []).append(statement)
        followed = [] if quantifier == "All" else [((quantifier, object, subject), sources[statement])]
        pairs = [(statement, other) for other in by_subject.get(object, [])]
        pairs += [(other, statement) for known in list(by_subject.values()) for other in known if other[2] == subject]
        for first, second in pairs:
            # All a are b, All b are c: All a are c; No b are c: No a are c. Some a are b, All b are c: Some a are c.
            quantifier = {("All", "All"): "All", ("All", "No"): "No", ("Some", "All"): "Some"}.get(
                (first[0], second[0]), ""
            )
            if quantifier and first[1] != second[2]:
                ids = tuple(dict.fromkeys(sources[first] + sources[second]))
                followed.append(((quantifier, first[1], second[2]), ids))
        for conclusion, ids in followed:
            if conclusion not in sources:
                sources[conclusion] = ids
                waiting.append(conclusion)
    return [
        Augmentation(ids[0], "concluded", f"{quantifier} {subject} are {object}.", _origin("rules", *ids))
        for (quantifier, subject, object), ids in sources.items()
        if (quantifier, subject, object) not in told
    ]
