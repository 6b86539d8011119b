"""rules: what the grammars of the generated tasks imply; always right, and nothing from any other text."""

from collections.abc import Sequence

from icl_ft_fast.augmentation.strategy import Augmentation, Strategy
from icl_ft_fast.tasks import generated
from icl_ft_fast.tasks.task import Document


def infer(documents: Sequence[Document]) -> list[Augmentation]:
    """All that follows from the documents in the grammar of a task."""
    return [
        Augmentation(
            found.source_ids[0], found.kind, found.text, {"strategy": "rules", "source_ids": list(found.source_ids)}
        )
        for found in generated.infer(documents)
    ]


STRATEGY = Strategy(
    name="rules",
    sees="no model: the grammar of the generated tasks",
    writes="comparisons reversed and rephrased, syllogisms closed over all documents",
    infer=infer,
)
