"""What the shipped model reads, in which order."""

from __future__ import annotations

from dataclasses import dataclass

from icl_ft_fast.shipped.corpus import Course


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Attributes:
        until: tokens of the whole run at which the stage ends.
        rows: tokens of a batch, of any number of documents.
        courses: what it reads of which families of lessons.
        copying: fraction of the documents that are a list of names and its repetition.
        augmenting: fraction that shows augmentations.
        recalling: fraction that tells what the library says.
        batches: of a step.
    """

    until: int
    rows: int
    courses: dict[str, Course]
    copying: float = 0.03
    augmenting: float = 0.0
    recalling: float = 0.0
    batches: int = 1


LONG = {
    "comparisons": Course(1.5, 100, 640),
    "categorical": Course(4, 60, 800),
    "chains": Course(2, 60, 300),
    "hierarchy": Course(6, 150, 1200),
    "transform": Course(4, 150, 1300),
}
INFERRED = LONG | {
    "categorical": Course(4, 60, 650),
    "chains": Course(3, 60, 400, ["inherited"]),
    "hierarchy": Course(12, 200, 1100, ["rephrased", "reversed", "inherited"]),
    "transform": Course(4, 120, 1000),
}
LOOKUPS = {
    "comparisons": Course(1, 40, 320),
    "categorical": Course(2, 40, 320),
    "chains": Course(2, 40, 200, ["inherited"]),
    "hierarchy": Course(6, 80, 600, ["rephrased", "reversed", "inherited"]),
    "transform": Course(12, 60, 400, ["transformed", "composed"]),
}
PREMISED = INFERRED | {"transform": Course(10, 120, 1000)}

# One step of inference a family comes first: where a fact is sometimes recalled and sometimes reversed, which way it
# points is a parity of two things that are not yet known, and stays a guess for millions of tokens (LOG.md).
CURRICULUM = (
    Stage(64_000, 1024, {"comparisons": Course(1, 20, 56, ["reversed"])}, copying=1.0),
    Stage(1_296_000, 1024, {"comparisons": Course(1, 20, 56, ["reversed"])}, copying=0.1),
    Stage(
        2_400_000,
        2048,
        {
            "comparisons": Course(3, 14, 80),
            "categorical": Course(4, 27, 60, ["concluded"]),
            "hierarchy": Course(3, 30, 100, ["reversed"]),
        },
    ),
    Stage(
        3_996_000,
        2048,
        {
            "comparisons": Course(2, 20, 150),
            "categorical": Course(3, 27, 140),
            "hierarchy": Course(3, 30, 200, ["recalled", "rephrased", "reversed"]),
            "transform": Course(1, 60, 200, ["recalled", "transformed"]),
        },
        augmenting=0.05,
    ),
    Stage(
        6_600_000,
        2048,
        {
            "comparisons": Course(2, 40, 320),
            "categorical": Course(3, 40, 280),
            "hierarchy": Course(4, 50, 400),
            "transform": Course(1.5, 100, 400),
        },
        augmenting=0.12,
    ),
    Stage(
        7_042_000,
        3072,
        {
            "comparisons": Course(2, 100, 640),
            "categorical": Course(3, 100, 850),
            "hierarchy": Course(4, 200, 1400),
            "transform": Course(2, 300, 1400),
        },
        augmenting=0.12,
    ),
    Stage(
        11_136_000,
        2048,
        {
            "comparisons": Course(2, 40, 320),
            "categorical": Course(5, 27, 140, ["concluded"]),
            "hierarchy": Course(5, 80, 300, ["inherited"]),
            "transform": Course(4, 60, 200, ["transformed"]),
        },
        augmenting=0.08,
        recalling=0.15,
        batches=2,
    ),
    Stage(
        15_000_000,
        2048,
        {
            "comparisons": Course(2, 40, 320),
            "categorical": Course(4, 27, 140, ["concluded"]),
            "chains": Course(7, 32, 100, ["inherited"]),
            "hierarchy": Course(2, 80, 300, ["recalled", "reversed"]),
            "transform": Course(6, 50, 130, ["transformed"]),
        },
        augmenting=0.05,
        recalling=0.12,
        batches=2,
    ),
    Stage(
        20_000_000,
        1024,
        {
            "comparisons": Course(1, 40, 320),
            "categorical": Course(2, 40, 300),
            "chains": Course(8, 32, 80, ["inherited"]),
            "hierarchy": Course(2, 80, 400, ["recalled", "rephrased", "reversed"]),
            "table": Course(8, 40, 80),
        },
        augmenting=0.05,
        recalling=0.08,
        batches=2,
    ),
    Stage(
        22_756_000,
        2048,
        {
            "comparisons": Course(2, 40, 400),
            "categorical": Course(4, 40, 400),
            "chains": Course(4, 60, 400),
            "hierarchy": Course(5, 80, 600),
            "transform": Course(3, 100, 400),
            "table": Course(2, 60, 150),
        },
        augmenting=0.15,
        recalling=0.12,
        batches=2,
    ),
    Stage(
        31_000_000,
        2048,
        {
            "comparisons": Course(1.5, 40, 400),
            "categorical": Course(4, 40, 320),
            "chains": Course(6, 40, 200, ["inherited"]),
            "hierarchy": Course(5, 80, 500, ["rephrased", "reversed", "inherited"]),
            "transform": Course(4, 60, 250, ["transformed", "composed"]),
            "table": Course(1, 60, 150),
        },
        augmenting=0.12,
        recalling=0.12,
        batches=2,
    ),
    Stage(37_066_000, 3072, LONG, augmenting=0.15, recalling=0.12, batches=2),
    Stage(
        46_500_000,
        3072,
        LONG
        | {
            "chains": Course(3, 60, 400, ["inherited"]),
            "hierarchy": Course(9, 120, 1100, ["rephrased", "reversed", "inherited"]),
        },
        augmenting=0.15,
        recalling=0.12,
        batches=2,
    ),
    Stage(
        48_000_000,
        6144,
        {
            "comparisons": Course(2, 200, 3000),
            "categorical": Course(3, 200, 3000),
            "hierarchy": Course(6, 200, 3500),
            "transform": Course(2, 400, 3000),
        },
        augmenting=0.15,
        recalling=0.12,
        batches=2,
    ),
    Stage(64_000_000, 3072, INFERRED, augmenting=0.35, recalling=0.1, batches=2),
    Stage(72_000_000, 3072, INFERRED, augmenting=0.45, recalling=0.15, batches=2),
    Stage(76_000_000, 2048, LOOKUPS, augmenting=0.25, recalling=0.12, batches=2),
    Stage(88_000_000, 3072, PREMISED, augmenting=0.4, recalling=0.15, batches=2),
    Stage(
        92_000_000,
        2048,
        LOOKUPS | {"transform": Course(14, 60, 500, ["recalled", "transformed"])},
        augmenting=0.4,
        recalling=0.12,
        batches=2,
    ),
    Stage(112_000_000, 3072, PREMISED, augmenting=0.45, recalling=0.15, batches=2),
    Stage(
        136_000_000,
        3072,
        PREMISED
        | {
            "comparisons": Course(2, 100, 640),
            "categorical": Course(5, 60, 650),
            "hierarchy": Course(24, 200, 1100, ["rephrased", "reversed", "inherited"]),
        },
        augmenting=0.6,
        recalling=0.12,
        batches=2,
    ),
    Stage(144_000_000, 3072, PREMISED, augmenting=0.4, recalling=0.25, batches=2),
)
