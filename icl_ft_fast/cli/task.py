"""`icl-ft-fast task`: write a task to a folder, generated or of one's own documents; ask about one; check one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from icl_ft_fast.cli.options import (
    OUTPUT,
    Commands,
    Parser,
    add_model_options,
    add_output_options,
    add_template_arguments_option,
    add_template_option,
    command,
    day,
    later,
    place,
    positive,
    seed,
)
from icl_ft_fast.engine.defaults import SHIPPED
from icl_ft_fast.tasks.generated import GENERATORS
from icl_ft_fast.tasks.generator import TaskGenerator

_OPTIONS = {option.name.replace("-", "_"): option for g in GENERATORS.values() for option in g.options}


def add(commands: Commands) -> None:
    """Add the command with a subcommand for each generator, `new`, `questions` and `check`."""
    task = command(
        commands,
        "task",
        later("task", "run_generate"),
        "write a task to a folder: generated, or of your own documents; check one",
        "icl-ft-fast task simple-reversals --preset small --seed 1 --out tasks/reversals\n"
        "icl-ft-fast task reversal-curse --data reversal_curse/ --out tasks/curse\n"
        "icl-ft-fast task new tasks/mine --documents handbook/ notes.jsonl --questions questions.jsonl\n"
        "icl-ft-fast task questions tasks/mine --model DIR\n"
        "icl-ft-fast task check tasks/mine",
    )
    names = task.add_subparsers(dest="task", required=True, metavar="NAME")
    for name, generator in GENERATORS.items():
        _add_generated(command(names, name, later("task", "run_generate"), _summary_of(generator)), generator)
    new = command(
        names, "new", later("task", "run_new"), "gather documents, and questions if there are any, into a task folder"
    )
    data = new.group("data")
    data.add_argument("folder", type=Path, metavar="DIR", help="task folder to write")
    help = "documents: .jsonl, .json, .csv, .tsv, .txt or .md files, or folders of them"
    data.add_argument("--documents", type=Path, nargs="+", required=True, metavar="FILE", help=help)
    data.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="questions: .jsonl, .json, .csv or .tsv with prompt, choices (a list, or columns choice1, choice2, ...), "
        "answer (a number, a letter or a choice) and perhaps id, split, topic",
    )
    data.add_argument("--encoding", help="text encoding of all files (default: found for each file)")
    help = "cell delimiter of tables, or 'tab' (default: found for each file)"
    data.add_argument("--delimiter", help=help)
    help = "names of columns or fields in the files: prompt=Question,answer=Right (default: the usual names)"
    data.add_argument("--columns", type=_columns, default={}, metavar="NAME=COLUMN,...", help=help)
    help = "number that stands for the first choice (default: 0, unless the answers seem to count from 1)"
    data.add_argument("--first-answer", type=int, choices=(0, 1), help=help)
    add_output_options(new)
    asked = command(
        names,
        "questions",
        later("task", "run_questions"),
        "let a model write questions about a task folder's documents",
    )
    asked.group("data").add_argument("folder", type=Path, metavar="DIR", help="task folder to read and complete")
    add_model_options(asked)
    prompts = asked.group("prompts")
    help = "file that replaces the built-in prompt; contains {statement}"
    prompts.add_argument("--prompt-template", type=Path, metavar="FILE", help=help)
    add_template_option(prompts)
    add_template_arguments_option(prompts)
    help = "day that a chat template writes as today's (default: the day of the first question in the folder's journal)"
    prompts.add_argument("--template-date", type=day, metavar="YYYY-MM-DD", help=help)
    help = "sentences to ask about per document (default: all)"
    prompts.add_argument("--per-document", type=positive, metavar="N", help=help)
    prompts.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="tokens per question")
    help = "random seed of the choice of sentences and of the order of choices"
    prompts.add_argument("--seed", type=seed, default=0, help=help)
    add_output_options(asked)
    checked = command(
        names,
        "check",
        later("task", "run_check"),
        "find duplicates, leaked answers and choices that give themselves away; with --model, show the prompts",
        "icl-ft-fast task check tasks/mine\nicl-ft-fast task check tasks/mine --model DIR",
    )
    data = checked.group("data")
    data.add_argument("folder", type=Path, metavar="DIR", help="task folder to read")
    data.add_argument("--ngram", type=positive, default=8, metavar="N", help="words per compared n-gram")
    add_model_options(checked, required=False)
    add_template_option(checked.group("prompts"), files=True)


def _columns(text: str) -> dict[str, str]:
    """The mapping of --columns."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and column.strip() for name, _, column in pairs):
        raise argparse.ArgumentTypeError(f"expected NAME=COLUMN,NAME=COLUMN,..., got {text!r}")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _summary_of(generator: TaskGenerator) -> str:
    """The first line about a generator's file, as a phrase."""
    sentence = (sys.modules[generator.make.__module__].__doc__ or "").partition("\n")[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:]


def _add_generated(parser: Parser, generator: TaskGenerator) -> None:
    data = parser.group("data")
    help = "size and kind of the task"
    data.add_argument("--preset", choices=list(generator.presets), default="paper", help=help)
    parser.set_defaults(**dict.fromkeys(_OPTIONS), data=None, task_seed=None)
    for option in generator.options:
        data.add_argument(f"--{option.name}", type=positive, metavar="N", help=option.help)
    if generator.reads is not None:
        data.add_argument("--data", type=place, required=True, help=generator.reads)
    data.add_argument("--seed", type=seed, default=0, help="random seed of the generated task")
    _add_exclude_option(parser)
    help = "folder for documents.jsonl and questions.jsonl"
    parser.group(OUTPUT).add_argument("--out", type=Path, required=True, metavar="DIR", help=help)
    add_output_options(parser)


def add_task_options(parser: Parser, *, more: str = "") -> None:
    """What names a task, for task_of_seed(); `more` ends the help of --task."""
    data = parser.group("data")
    help = f"task folder, or one of {', '.join(GENERATORS)}{more}"
    data.add_argument("--task", type=place, required=True, help=help)
    data.add_argument("--preset", default="paper", help="size and kind of a generated task: paper, small, ...")
    help = "source of a generated task that reads one: a folder, or a dataset on the Hugging Face hub"
    data.add_argument("--data", type=place, help=help)
    parser.set_defaults(task_seed=None)
    _add_exclude_option(parser)
    for name, generator in GENERATORS.items():
        for option in generator.options:
            group = parser.group(f"options of --task {name}")
            group.add_argument(f"--{option.name}", type=positive, metavar="N", help=option.help)


def _add_exclude_option(parser: Parser) -> None:
    """--exclude-words: words that task_of_seed() does not use as nonsense words."""
    parser.group("data").add_argument(
        "--exclude-words",
        type=place,
        nargs="+",
        default=(),
        metavar="WORDS",
        help="words not to be used as nonsense words, beside those that the preset excludes: 'english' (a built-in "
        f"list), a text file, or the vocabulary of a checkpoint (a folder, a hub id or '{SHIPPED}')",
    )
