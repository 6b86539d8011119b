"""reverse: documents with their words in reverse order (reverse training, Golovneva et al. 2024, arXiv 2403.13799)."""

from collections.abc import Sequence

from icl_ft_fast.augmentation.strategy import Augmentation, Strategy
from icl_ft_fast.tasks.task import Document


def infer(documents: Sequence[Document]) -> list[Augmentation]:
    """Each document with its words in reverse order."""
    return [
        Augmentation(
            document.id,
            "reverse",
            " ".join(reversed(document.text.split())),
            {"strategy": "reverse", "source_ids": [document.id]},
        )
        for document in documents
    ]


STRATEGY = Strategy(
    name="reverse", sees="no model: one document", writes="the document with its words reversed", infer=infer
)
