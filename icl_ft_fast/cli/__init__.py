"""The command line, a module a command: `icl-ft-fast --help` lists them.

Bad input and a full disk end in one line on stderr and exit code 2, an interruption in one line and exit code 130.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from errno import EDQUOT, ENOSPC

from jinja2 import TemplateError

from icl_ft_fast import __version__
from icl_ft_fast.augmentation import AugmentError
from icl_ft_fast.cli import augment, compare, context, doctor, finetune, lm_eval, report, score, serve, task
from icl_ft_fast.cli.options import Parser, UsageError
from icl_ft_fast.engine.contexts import ContextError
from icl_ft_fast.engine.generate import GenerateError
from icl_ft_fast.engine.model import ModelError
from icl_ft_fast.engine.prompting import ProtocolError
from icl_ft_fast.engine.score import ScoreError
from icl_ft_fast.finetuning import FinetuneError, InterruptedRunError
from icl_ft_fast.runtime.durable import DamagedError, LockedError
from icl_ft_fast.runtime.executors import ExecutorError
from icl_ft_fast.runtime.printable import printable
from icl_ft_fast.study.prices import PriceError
from icl_ft_fast.study.results import ResultsError
from icl_ft_fast.tasks.task import TaskError

COMMANDS = (compare, report, augment, finetune, score, context, task, doctor, serve, lm_eval)
BAD_INPUT = (
    UsageError,
    TaskError,
    ModelError,
    ScoreError,
    GenerateError,
    AugmentError,
    FinetuneError,
    ProtocolError,
    ContextError,
    PriceError,
    ResultsError,
    LockedError,
    DamagedError,
    ExecutorError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input or files that fail, 130 when it was interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours = given[: 1 if given[:1] == ["lm-eval"] else None]  # what follows `lm-eval` is the harness's command line
    options = parser().parse_args(ours)
    options.given, options.rest = given, given[len(ours) :]
    try:
        options.run(options)
    except BAD_INPUT as error:
        print(printable(f"icl-ft-fast {options.command}: {error}"), file=sys.stderr)
        return 130 if isinstance(error, InterruptedRunError) else 2
    except TemplateError as error:
        print(printable(f"icl-ft-fast {options.command}: chat template: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        full = "; free some space and run the same command again" if error.errno in (ENOSPC, EDQUOT) else ""
        print(printable(f"icl-ft-fast {options.command}: {where}{error.strerror or error}{full}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"icl-ft-fast {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> Parser:
    """The parser of every command."""
    top = Parser(
        prog="icl-ft-fast",
        description="In-context learning, fine-tuning or augmented fine-tuning? Measured on your model and documents.",
        epilog="`icl-ft-fast COMMAND --help` shows a command's options and examples.",
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return top
