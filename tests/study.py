"""`compare` where one of two workers is killed as it trains: python tests/study.py MARKS ARGUMENTS...

What would take seconds and decides nothing here is cut short, and whatever a random model answers is a row.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from icl_ft_fast import cli
from icl_ft_fast.augmentation.generators import LocalGenerator
from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.strategies import STRATEGIES
from icl_ft_fast.augmentation.strategy import Parsed
from icl_ft_fast.engine.machine import Ceilings
from icl_ft_fast.finetuning import run as finetune_run
from icl_ft_fast.study import compare, sweep, workers

MARKS = Path(sys.argv[1] if len(sys.argv) > 1 else "")
MORTAL = "augmented-ft 1"
STEP = finetune_run.train_step


def prepare(patch):
    """Cut short, by a function like setattr."""
    patch(compare, "ceilings", lambda *_: Ceilings("float32", 1.0, 1.0))
    patch(sweep, "LENGTHS", ())
    patch(sweep, "sweep", partial(sweep.sweep, rounds=1, batches=(1,)))
    patch(LocalGenerator, "prompts_per_call", 2)  # two calls for three documents
    strategy = replace(STRATEGIES["document"], max_new_tokens=6, read=any_text, is_lines=False)
    patch(Prompting, "of", lambda *_, **__: Prompting(strategy, "{{ document }}\nReversed:", "short"))


def any_text(source, reply):
    """A row of whatever the model replied."""
    return Parsed([("document", f"{source} {reply}")], 0, 0)


def note(name, text):
    """Add to a file of marks."""
    with (MARKS / name).open("a") as file:
        file.write(text)


def deadly(*arguments):
    """A step of training, the second of which is never made."""
    note("steps", ".")
    if (MARKS / "steps").stat().st_size == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return STEP(*arguments)


class Mortal(workers.StudyWorkers):
    """Workers that note what they begin."""

    def __call__(self):
        """See StudyWorkers."""
        prepare(setattr)
        return super().__call__()

    def do(self, model, job):
        """See StudyWorkers."""
        what = f"{job[0].arm} {job[0].seed}" if isinstance(job, tuple) else job.name
        note("begun", f"{what}\n")
        note(str(os.getpid()), "")
        while len(list(MARKS.glob("[0-9]*"))) < 2:  # both are at work before one dies
            time.sleep(0.01)
        finetune_run.train_step = deadly if what == MORTAL else STEP
        return super().do(model, job)


if __name__ == "__main__":
    prepare(setattr)
    workers.StudyWorkers = Mortal
    sys.exit(cli.main(sys.argv[2:]))
