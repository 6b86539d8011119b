"""The command line, a module a command: `icl-ft-fast --help` lists them.

Bad input and a full disk end in one line on stderr and exit code 2, an interruption in one line and exit code 130.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from errno import EDQUOT, ENOSPC
from io import TextIOWrapper

from jinja2 import TemplateError

from icl_ft_fast import __version__
from icl_ft_fast.cli import (
    augment,
    compare,
    context,
    convert,
    doctor,
    finetune,
    lm_eval,
    report,
    score,
    serve,
    status,
    task,
)
from icl_ft_fast.cli.options import Parser
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.executors import is_first_process
from icl_ft_fast.runtime.printable import printable
from icl_ft_fast.runtime.progress import Activity
from icl_ft_fast.runtime.threads import share_cores

COMMANDS = (compare, report, status, augment, finetune, score, context, convert, task, doctor, serve, lm_eval)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input or files that fail, 130 when it was interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # in a locale without them, letters are spelt out
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_harness = given[:1] == ["lm-eval"] and given[1:] not in (["--help"], ["-h"])  # whose command line follows
    ours = given[: 1 if is_harness else None]
    options = parser().parse_args(ours)
    options.given, options.rest = given, given[len(ours) :]
    share_cores()
    shown = is_first_process() and not getattr(options, "quiet", False) and options.command != "status"
    try:
        with Activity(f"icl-ft-fast {options.command}", shown=shown):
            options.run(options)
    except UserError as error:
        print(printable(f"icl-ft-fast {options.command}: {error}"), file=sys.stderr)
        return error.exit_code
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
