"""global: what follows from a document and others in context (Lampinen et al. 2025, section 2.2).

A reply writes down premises before what follows from them, so that each conclusion is one step away. What follows from
many documents comes in no order: a greedy reply soon repeats itself (LOG.md), so replies are sampled.
"""

from icl_ft_fast.augmentation.strategy import Strategy, labelled_lines

LABELS = ("Rephrased", "Inferred")
PREMISE = "Given"

STRATEGY = Strategy(
    name="global",
    sees="a document behind as many others as fit",
    writes="rephrasings, premises (which make no rows), inferences",
    labels=LABELS,
    read=labelled_lines(LABELS, PREMISE),
    shows_documents=True,
    examples=("rivers", "brooks", "puddles"),
    max_new_tokens=512,
    temperature=1.0,
)
