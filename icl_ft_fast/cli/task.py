"""`icl-ft-fast task`: write a task to a folder, generated or of one's own documents; check one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from icl_ft_fast.cli.options import Commands, UsageError, add_output_options, check_new, command, positive
from icl_ft_fast.tasks import own
from icl_ft_fast.tasks.generated import GENERATORS, Preset
from icl_ft_fast.tasks.task import Task, TaskError, read_questions, write_jsonl


def add(commands: Commands) -> None:
    """Add the command with a subcommand for each generator, `new` and `check`."""
    task = command(
        commands, "task", _generate, "write a task to a folder: generated, or of your own documents; check one",
        "icl-ft-fast task simple-reversals --preset small --seed 1 --out tasks/reversals\n"
        "icl-ft-fast task reversal-curse --data reversal_curse/ --out tasks/curse\n"
        "icl-ft-fast task new tasks/mine --documents handbook/ notes.jsonl --questions questions.jsonl\n"
        "icl-ft-fast task check tasks/mine",
    )  # fmt: skip
    names = task.add_subparsers(dest="task", required=True, metavar="NAME")
    for name, generator in GENERATORS.items():
        made = names.add_parser(name, help=(generator.make.__doc__ or "").partition("\n")[0])
        made.add_argument("--preset", choices=list(generator.presets), default="paper", help="default: %(default)s")
        made.set_defaults(facts=None, data=None)
        if name == "simple-reversals":
            made.add_argument("--facts", type=positive, help="in place of the preset's")
        if generator.reads is not None:
            made.add_argument("--data", type=Path, required=True, help=generator.reads)
        made.add_argument("--seed", type=int, default=0, help="default: %(default)s")
        made.add_argument("--out", type=Path, required=True, help="folder for documents.jsonl and questions.jsonl")
        add_output_options(made)
    new = names.add_parser("new", help="gather your own documents, and questions if there are any, into a task folder")
    new.add_argument("folder", type=Path, metavar="DIR")
    new.add_argument(
        "--documents", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl, .csv, .txt, .md or folders"
    )
    new.add_argument("--questions", type=Path, help="JSON lines with id, prompt, choices, answer, split")
    new.add_argument("--encoding", default="utf-8", help="of the documents (default: %(default)s)")
    add_output_options(new)
    new.set_defaults(run=_new)
    check = names.add_parser("check", help="duplicates, leaked answers and choices that give themselves away")
    check.add_argument("folder", type=Path, metavar="DIR")
    check.add_argument("--ngram", type=positive, default=8, help="words compared at a time (default: %(default)s)")
    check.set_defaults(run=_check)


def _generate(options: argparse.Namespace) -> None:
    for name in ("documents.jsonl", "questions.jsonl"):
        check_new(options.out / name, options.overwrite)
    task = task_of_seed(options)[0](options.seed)
    task.write(options.out)
    print(f"{len(task.documents)} documents and {len(task.questions)} questions written to {options.out}")


def _new(options: argparse.Namespace) -> None:
    try:
        "".encode(options.encoding)
    except LookupError as error:
        raise UsageError(f"--encoding: {error}") from error
    for name in ("documents.jsonl", "questions.jsonl"):
        check_new(options.folder / name, options.overwrite)
    questions = read_questions(options.questions) if options.questions else ()
    options.folder.mkdir(parents=True, exist_ok=True)
    documents = own.iter_documents(options.documents, encoding=options.encoding)
    count = write_jsonl(options.folder / "documents.jsonl", map(asdict, documents))
    if questions:
        write_jsonl(options.folder / "questions.jsonl", map(asdict, questions))
    missing = "" if questions else "; questions.jsonl is yours to add"
    print(f"{count} documents and {len(questions)} questions written to {options.folder}{missing}")


def _check(options: argparse.Namespace) -> None:
    questions = read_questions(options.folder / "questions.jsonl")
    documents = own.iter_documents([options.folder / "documents.jsonl"])
    found = own.check(documents, questions, ngram=options.ngram)
    print(f"documents that repeat another: {_named(found.same_documents)}")
    print(f"questions that repeat another: {_named(found.same_questions)}")
    for split, leaked in found.leaked.items():
        print(f"answers found in the documents, split {split}, of {found.answered[split]}: {_named(leaked)}")
    print(f"right by picking the longest choice: {found.longest_is_right:.3f}; by chance: {found.chance:.3f}")
    for number, counts in found.positions.items():
        print(f"position of the answer among {number} choices: {', '.join(map(str, counts))}")


def _named(ids: Sequence[str]) -> str:
    """How many, and the first few."""
    return f"{len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})" if ids else "none"


def task_of_seed(options: argparse.Namespace) -> tuple[Callable[[int], Task], Preset]:
    """The named task, or the folder's, for a seed; and its preset."""
    generator = GENERATORS.get(options.task)
    if generator is None:
        if not Path(options.task).is_dir():
            raise UsageError(f"--task: {options.task}: neither a folder nor one of {', '.join(GENERATORS)}")
        task = Task.read(options.task)
        return lambda _: task, Preset()
    if options.preset not in generator.presets:
        raise UsageError(f"--preset: {options.task} has {', '.join(generator.presets)}; got {options.preset!r}")
    preset = generator.presets[options.preset]
    if options.facts is not None and options.task != "simple-reversals":
        raise UsageError(f"--facts: {options.task} has none; only simple-reversals does")
    if (options.data is None) != (generator.reads is None):
        raise UsageError(f"--data: {options.task} reads {generator.reads or 'no folder'}")
    arguments = {**preset.arguments, **({} if options.facts is None else {"num_facts": options.facts})}
    folders = [] if options.data is None else [options.data]

    def make_task(seed: int) -> Task:
        return generator.make(*folders, seed=seed, **arguments)

    try:
        make_task(0)  # refused before any work
    except TaskError:
        raise
    except ValueError as error:
        raise UsageError(f"--facts: {error}") from error
    return make_task, preset
