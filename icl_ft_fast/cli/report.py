"""`icl-ft-fast report`: one or several results.json as one HTML page, its charts as files, or tables again."""

from __future__ import annotations

from pathlib import Path

from icl_ft_fast.cli.compare import add_decision_options
from icl_ft_fast.cli.options import OUTPUT, Commands, add_json_option, command, later


def add(commands: Commands) -> None:
    """Add the command."""
    report = command(
        commands,
        "report",
        later("report", "run_report"),
        "results as one page of HTML or Markdown, as chart files, as rows, or as tables",
        "icl-ft-fast report out/run1 --out report.html\n"
        "icl-ft-fast report out/run1 out/run2 --out both.html --charts charts/\n"
        "icl-ft-fast report out/run1 --rows answers.csv\n"
        "icl-ft-fast report out/run1 --report_to trackio\n"
        "icl-ft-fast report out/run1 --queries-per-day 1000 --days 30 --prices prices.json",
    )
    help = "results.json files or the folders that hold them"
    report.group("data").add_argument("results", type=Path, nargs="+", metavar="RESULTS", help=help)
    output = report.group(OUTPUT)
    output.add_argument(
        "--out", type=Path, metavar="FILE", help="write a page: HTML, or Markdown where FILE ends in .md"
    )
    output.add_argument("--charts", type=Path, metavar="DIR", help="write each chart as .svg and .png")
    help = "write a row for each answer: FILE ends in .csv, .jsonl or .parquet (the last needs pyarrow)"
    output.add_argument("--rows", type=Path, metavar="FILE", help=help)
    help = "log each run to a tracker: its figures, its training by step, and a table of its answers"
    output.add_argument("--report_to", choices=("trackio", "wandb"), help=help)
    output.add_argument("--overwrite", action="store_true", help="replace existing output")
    add_decision_options(report)
    add_json_option(report)
