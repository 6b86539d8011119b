"""`python -m benchmarks.real_results PAGE [DIR ...]`: publishes finished studies and writes all tables into a page.

Of the results.json in DIR, benchmarks/results/real/NAME.json keeps what the tables are made of, where NAME is the
folder's own name: no text of documents, questions or augmentations, which others may have written. The tables of each
published study take the place between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.readme import RESULTS, replace_block
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.table import break_even_words, count, interval_words
from icl_ft_fast.report.verdict import verdict_of, why_none
from icl_ft_fast.study.arms import recorded_arm

PUBLISHED = RESULTS / "real"
TEXTS = ("prompt", "chat_prompt", "boundary")  # of the settings
QUERIES, POINTS = 15_000, 2.0  # 500 a day for 30 days; accuracy that may be lost


def block(study: Derived) -> str:
    """The study's ways in one table, what differs between them, its verdict, and what is to be known before any."""
    runs, seeds = study.results.runs, sorted({run.seed for run in study.results.runs})
    asked = len({answer.question_id for run in runs for answer in run.answers})
    hours = math.fsum(p["wall_s"] for run in runs for p in run.counts["phases"].values()) / 3600
    told = f"{asked} questions, {len(seeds)} seeds" if len(seeds) > 1 else f"{asked} questions, seed {seeds[0]}"
    spent = f"{told}, {hours:.1f} hours of reading, writing, training and answering."
    parts = [spent, _accuracies(study), _costs(study)]
    if differences := _differences(study):
        parts.append(differences)
    verdict = verdict_of(study, QUERIES, POINTS)
    parts.append(f"Verdict on {QUERIES:,} queries: " + (why_none(study) if verdict is None else verdict.text))
    parts.append("\n".join(f"- {line}" for line in (*study.concerns, *study.notes)))
    return "\n\n".join(parts)


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def _accuracies(study: Derived) -> str:
    """Accuracy of each way and split with its interval, the seeds pooled, and the range of the seeds' accuracies."""
    splits: list[str | None] = [*study.splits, None] if len(study.splits) > 1 else [None]
    rows = [["way", *(split or "all" for split in splits), "least and most of a seed"]]
    chances = [study.chance(split) for split in splits]
    rows.append(["chance", *("-" if chance is None else f"{chance:.2f}" for chance in chances), ""])
    for arm in study.arms:
        cells = []
        for split in splits:
            accuracy, interval = study.accuracy(arm, split), study.interval(arm, split)
            told = accuracy is not None and interval is not None
            cells.append(f"{accuracy.value:.2f} ({interval[0]:.2f}-{interval[1]:.2f})" if told else "-")
        each = [fmean(answer.is_correct for answer in run.answers) for run in study.of(arm)]
        rows.append([recorded_arm(arm).title, *cells, f"{min(each):.2f}, {max(each):.2f}" if len(each) > 1 else ""])
    return _table(rows)


def _costs(study: Derived) -> str:
    """What is paid once and for a query, and from how many queries on a trained way takes less than ICL."""
    titles = ["way", "written s", "trained s", "read s", "s a query", "pays from, by seconds", "by FLOPs"]
    ways, rows = study.ways("seconds", batch=1), [titles]
    for arm in study.arms:
        mine, title = study.of(arm), recorded_arm(arm).title
        trained = fmean(run.counts["phases"].get("train", {"wall_s": 0.0})["wall_s"] for run in mine)
        written = fmean(run.setup_s for run in mine) - trained
        line = ways[title].line if title in ways else None
        found = [study.break_evens.get(by, {}).get((title, recorded_arm("icl").title)) for by in ("seconds", "FLOPs")]
        pays = ["" if each is None else f"{break_even_words(each)} ({interval_words(each)})" for each in found]
        query = "-" if line is None else f"{line.query:.2f}"
        reading = "" if line is None or not line.reading else f"{line.reading:.1f}"
        rows.append([title, *(f"{s:,.0f}" if s >= 0.5 else "" for s in (written, trained)), reading, query, *pays])
    return _table(rows)


def _differences(study: Derived) -> str:
    """The paired tests whose adjusted p is below .05, over all questions and by split."""
    titles = {arm: recorded_arm(arm).title for arm in study.arms}
    found = [test for test in study.paired if test.p < 0.05]
    lines = [
        f"- {titles[test.first]} - {titles[test.second]}, {test.split or 'all'}: {test.difference:+.2f} "
        f"({test.low:+.2f} to {test.high:+.2f})"
        for test in found
    ]
    tests = count(len(study.paired))
    return "\n".join([f"Differences with an adjusted p below .05, of {tests} tested:\n", *lines]) if lines else ""


def packed(results: dict[str, Any]) -> dict[str, Any]:
    """What a results.json says beside texts; topics have numbers in the order of their names."""
    if len(results["questions"]) != 1:
        raise SystemExit(f"{results['task']}: expected the same questions under every seed")
    answers = [answer for run in results["runs"] for answer in run["answers"]]
    topics = {topic: n for n, topic in enumerate(sorted({answer["topic"] for answer in answers}))}
    asked = {a["question_id"]: [a["split"], topics[a["topic"]], a["correct"]] for a in answers}
    numbers = {id: n for n, id in enumerate(asked)}
    runs = []
    for run in results["runs"]:
        said = [
            [numbers[answer["question_id"]], answer["predicted"], [round(p, 3) for p in answer["probability"]]]
            for answer in run["answers"]
        ]
        runs.append(run | {"answers": said, "samples": [], "losses": []})
    settings = {name: value for name, value in results["settings"].items() if name not in TEXTS}
    kept = {name: value for name, value in results.items() if name != "checksum"}
    return kept | {"settings": settings, "questions": [*asked.values()], "runs": runs}


def unpacked(found: dict[str, Any]) -> dict[str, Any]:
    """A results.json again, in which questions have numbers and no text."""

    def answer(number: int, predicted: int, probability: list[float]) -> dict[str, Any]:
        split, topic, correct = found["questions"][number]
        named = {"question_id": f"{number:05}", "split": split, "form": None, "topic": f"{topic:05}"}
        return named | {"predicted": predicted, "probability": probability, "correct": correct}

    runs = [run | {"answers": [answer(*said) for said in run["answers"]]} for run in found["runs"]]
    return found | {"questions": [], "runs": runs}


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def publish(folder: Path) -> None:
    """Keep a finished study's results."""
    found = packed(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    lines = [_json({name: value for name, value in found.items() if name != "runs"})]
    lines += [_json(run) for run in found["runs"]]  # a line a run, so that a change of one is seen
    PUBLISHED.mkdir(exist_ok=True)
    (PUBLISHED / f"{folder.name}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


def published(name: str) -> Derived:
    """A published study."""
    head, *runs = map(json.loads, (PUBLISHED / f"{name}.json").read_text(encoding="utf-8").splitlines())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        path.write_text(json.dumps(unpacked(head | {"runs": runs})), encoding="utf-8")
        return Derived.read(path)


def main() -> None:
    """Publish the studies and fill the page's blocks."""
    page, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        publish(folder)
    for name in sorted(path.stem for path in PUBLISHED.glob("*.json")):
        replace_block(page, name, block(published(name)))
        print(f"{page}: {name} updated")


if __name__ == "__main__":
    main()
