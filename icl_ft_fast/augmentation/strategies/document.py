"""document: what follows from the sentences of one document together."""

from icl_ft_fast.augmentation.strategy import Strategy, labelled_lines

LABELS = ("Rephrased", "Inferred")

STRATEGY = Strategy(
    name="document",
    sees="one document",
    writes="rephrasings, inferences",
    labels=LABELS,
    read=labelled_lines(LABELS),
    examples=("rivers", "brooks", "puddles", "torvik", "brandt", "mill", "granary", "lumo", "lamp", "osprey"),
    begins=("Rephrased:", "Inferred:", "Inferred: Whoever", "Inferred: The one"),
    begun_stop=("\n\n",),
)
