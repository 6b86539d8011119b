"""`python -m benchmarks.support`: how often the support check of `augment` is right, by rows that were judged by hand.

    python -m benchmarks.support draw TASK MODEL OUT FOLDER [FOLDER ...]

draws the rows to judge: 50 that the check keeps and 50 that it drops, by seed, out of the rows.jsonl of folders that
`augment` wrote without the check. `supported` is left empty; whoever judges reads row and source, and writes true where
all that the row says follows from its source and makes sense, else false.
"""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icl_ft_fast.study.statistics import wilson

SAMPLE = Path(__file__).parent / "results" / "support.jsonl"
EACH = 50


def precision(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line of a table for the rows that the check kept, and one for those that it dropped."""
    lines = []
    for name, kept in (("kept", True), ("dropped", False)):
        right = [row["supported"] for row in rows if row["kept"] is kept]
        low, high = wilson(sum(right), len(right))
        lines.append(f"| {name} | {len(right)} | {sum(right)} | {sum(right) / len(right):.2f} ({low:.2f}-{high:.2f}) |")
    return lines


def draw(task: str, model_name: str, out: str, *folders: str) -> None:
    """Write rows to judge."""
    from icl_ft_fast.augmentation.strategy import Augmentation
    from icl_ft_fast.augmentation.support import supported
    from icl_ft_fast.engine.loading import load
    from icl_ft_fast.tasks.task import read_documents

    documents = read_documents(Path(task) / "documents.jsonl")
    lines = [line for folder in folders for line in (Path(folder) / "rows.jsonl").read_text().splitlines()]
    rows = [Augmentation(row["source_ids"][0], row["kind"], row["text"], row) for row in map(json.loads, lines)]
    kept, dropped = supported(load(model_name), rows, documents)
    passed = {id(row) for row in kept}
    print(f"{len(kept)} of {len(rows)} rows kept, dropped: {dropped}", file=sys.stderr)
    rng, drawn = random.Random(0), []
    for is_kept in (True, False):
        drawn += [(row, is_kept) for row in rng.sample([row for row in rows if (id(row) in passed) is is_kept], EACH)]
    rng.shuffle(drawn)
    with Path(out).open("w") as file:
        for row, is_kept in drawn:
            fields = {"source": row.source_id, "strategy": row.origin["strategy"], "kind": row.kind, "text": row.text}
            print(json.dumps(fields | {"kept": is_kept, "supported": None}), file=file)


if __name__ == "__main__":
    if sys.argv[1:2] == ["draw"]:
        draw(*sys.argv[2:])
    else:
        print("\n".join(precision([json.loads(line) for line in SAMPLE.read_text().splitlines()])))
