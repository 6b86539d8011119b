"""`icl-ft-fast lm-eval`: lm-evaluation-harness's own command line."""

from __future__ import annotations

import argparse
import sys

from icl_ft_fast.cli.options import Commands, UsageError, command
from icl_ft_fast.runtime.executors import is_first_process
from icl_ft_fast.runtime.progress import tell_no_more


def add(commands: Commands) -> None:
    """Add the command; what follows it is the harness's."""
    command(
        commands,
        "lm-eval",
        _lm_eval,
        "run lm-evaluation-harness with the model icl-ft-fast; `lm-eval run --help` lists the harness's options",
        "icl-ft-fast lm-eval run --model icl-ft-fast --model_args pretrained=DIR --tasks hellaswag --num_fewshot 5",
    )


def _lm_eval(options: argparse.Namespace) -> None:
    try:
        from icl_ft_fast.integrations import lm_eval
    except ModuleNotFoundError as error:
        raise UsageError(f"needs {error.name}: pip install 'icl_ft_fast[lm-eval]'") from error
    tell_no_more()  # the harness has its own bars, but takes seconds to its first word
    if is_first_process():
        print("icl-ft-fast lm-eval: starting the harness", file=sys.stderr, flush=True)
    lm_eval.run(options.rest)
