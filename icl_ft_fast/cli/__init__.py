"""The command line: `icl-ft-fast demo | compare | report | score | task | doctor | serve | ...`, a module a command.

Bad input ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from icl_ft_fast.cli import compare, context, doctor, lm_eval, report, score, serve, task
from icl_ft_fast.cli.options import UsageError
from icl_ft_fast.contexts import ContextError
from icl_ft_fast.cost.prices import PriceError
from icl_ft_fast.evaluate import ProtocolError
from icl_ft_fast.finetune import FinetuneError
from icl_ft_fast.generate import GenerateError
from icl_ft_fast.model import ModelError
from icl_ft_fast.results import ResultsError
from icl_ft_fast.score import ScoreError
from icl_ft_fast.tasks.task import TaskError

BAD_INPUT = (
    UsageError, TaskError, ModelError, ScoreError, GenerateError, FinetuneError, ProtocolError, ContextError,
    PriceError, ResultsError,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours = given[: 1 if given[:1] == ["lm-eval"] else None]  # what follows `lm-eval` is the harness's command line
    options = parser().parse_args(ours)
    options.rest = given[len(ours) :]
    try:
        options.run(options)
    except BAD_INPUT as error:
        print(f"icl-ft-fast {options.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"icl-ft-fast {options.command}: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    top = argparse.ArgumentParser(
        prog="icl-ft-fast",
        description="In-context learning, fine-tuning or augmented fine-tuning? Measured on your model and documents.",
        epilog="`icl-ft-fast COMMAND --help` shows a command's options and examples.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (compare, report, score, task, doctor, lm_eval, serve, context):
        module.add(commands)
    return top
