"""The command line: `icl-ft-fast demo | compare | score | task | lm-eval`.

Bad input ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from icl_ft_fast import compare, report
from icl_ft_fast.cost import Ledger
from icl_ft_fast.evaluate import NORMALIZATIONS, ProtocolError, check_template, icl_context
from icl_ft_fast.finetune import SPLITTINGS, FinetuneError, FinetuneSettings
from icl_ft_fast.generate import GenerateError
from icl_ft_fast.model import CHUNK_ROWS, DTYPES, SHIPPED, Model, ModelError, load
from icl_ft_fast.score import ScoreError, iter_scores
from icl_ft_fast.tasks import own
from icl_ft_fast.tasks.generated import GENERATORS, Preset
from icl_ft_fast.tasks.task import Task, TaskError, read_documents, read_questions, write_jsonl


class UsageError(ValueError):
    """Arguments that cannot be followed; the message names the argument."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours = given[: 1 if given[:1] == ["lm-eval"] else None]  # what follows `lm-eval` is the harness's command line
    options = _parser().parse_args(ours)
    options.rest = given[len(ours) :]
    try:
        options.run(options)
    except (UsageError, TaskError, ModelError, ScoreError, GenerateError, FinetuneError, ProtocolError) as error:
        print(f"icl-ft-fast {options.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"icl-ft-fast {options.command}: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="icl-ft-fast",
        description="In-context learning, fine-tuning or augmented fine-tuning? Measured on your model and documents.",
        epilog="`icl-ft-fast COMMAND --help` shows a command's options and examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "the whole comparison on the shipped model", "icl-ft-fast demo")
    demo.add_argument("--facts", type=_positive, default=DEMO_FACTS, help="facts of the task (default: %(default)s)")
    _add_comparison_options(
        demo, arms=",".join(compare.ARMS), seeds="0,1,2", learning_rate=DEMO_LEARNING_RATE, out=None
    )
    demo.set_defaults(model=SHIPPED, dtype="float32", task="simple-reversals", preset="small", data=None)

    comparison = _command(
        commands, "compare", _compare, "arms x seeds on a task: accuracy, cost, break-even",
        "icl-ft-fast compare --model shipped --task simple-reversals --preset small --out out/run1\n"
        "icl-ft-fast compare --model DIR --task my_task_folder --arms base,icl,ft --seeds 0 --out out/run2",
    )  # fmt: skip
    _add_model_options(comparison)
    comparison.add_argument("--task", required=True, help=f"a task folder, or one of: {', '.join(GENERATORS)}")
    comparison.add_argument("--preset", default="paper", help="of a task by name: paper (the default), small, ...")
    comparison.add_argument("--facts", type=_positive, help="facts of simple-reversals, in place of the preset's")
    comparison.add_argument("--data", type=Path, help="the folder that a task by name reads, if it does")
    _add_comparison_options(
        comparison, arms="base,icl,ft,augmented-ft", seeds="0", learning_rate=3e-4, out=Path("out/compare")
    )

    scoring = _command(
        commands, "score", _score, "log-likelihoods of multiple-choice questions over documents",
        "icl-ft-fast score --model DIR --documents documents.jsonl --questions questions.jsonl --out scores.jsonl",
    )  # fmt: skip
    _add_model_options(scoring)
    scoring.add_argument(
        "--questions", type=Path, required=True, help="JSON lines with id, prompt, choices, answer, split"
    )
    scoring.add_argument("--documents", type=Path, help="JSON lines with id, text: all go before every prompt")
    scoring.add_argument(
        "--chunk-rows", type=_positive, default=CHUNK_ROWS, help="rows a forward (default: %(default)s)"
    )
    scoring.add_argument(
        "--out", type=Path, required=True, help="JSON lines, one a question, written as they are ready"
    )
    _add_output_options(scoring)

    task = _command(
        commands, "task", _task, "write a task to a folder: generated, or of your own documents; check one",
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
            made.add_argument("--facts", type=_positive, help="in place of the preset's")
        if generator.reads is not None:
            made.add_argument("--data", type=Path, required=True, help=generator.reads)
        made.add_argument("--seed", type=int, default=0, help="default: %(default)s")
        made.add_argument("--out", type=Path, required=True, help="folder for documents.jsonl and questions.jsonl")
        _add_output_options(made)
    new = names.add_parser("new", help="gather your own documents, and questions if there are any, into a task folder")
    new.add_argument("folder", type=Path, metavar="DIR")
    new.add_argument(
        "--documents", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl, .csv, .txt, .md or folders"
    )
    new.add_argument("--questions", type=Path, help="JSON lines with id, prompt, choices, answer, split")
    new.add_argument("--encoding", default="utf-8", help="of the documents (default: %(default)s)")
    _add_output_options(new)
    new.set_defaults(run=_task_new)
    check = names.add_parser("check", help="duplicates, leaked answers and choices that give themselves away")
    check.add_argument("folder", type=Path, metavar="DIR")
    check.add_argument("--ngram", type=_positive, default=8, help="words compared at a time (default: %(default)s)")
    check.set_defaults(run=_task_check)

    _command(
        commands, "lm-eval", _lm_eval, "lm-evaluation-harness's own command line, with the model icl-ft-fast",
        "icl-ft-fast lm-eval run --model icl-ft-fast --model_args pretrained=DIR --tasks hellaswag --num_fewshot 5",
    )  # fmt: skip
    return parser


DEMO_FACTS = 40
DEMO_LEARNING_RATE = 1e-3


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    indented = "\n".join("  " + line for line in examples.splitlines())
    parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"examples:\n{indented}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=f"a checkpoint directory, a hub id, or '{SHIPPED}'")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the checkpoint's own Python code (off by default)"
    )


def _add_comparison_options(
    parser: argparse.ArgumentParser, *, arms: str, seeds: str, learning_rate: float, out: Path | None
) -> None:
    defaults = FinetuneSettings()
    parser.add_argument("--arms", default=arms, help=f"of {','.join(compare.ARMS)} (default: %(default)s)")
    parser.add_argument("--seeds", default=seeds, help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=defaults.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=defaults.batch_size, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="default: %(default)s")
    parser.add_argument(
        "--icl-per-topic", type=_positive, help="documents of a topic in the context (default: the preset's, or all)"
    )
    parser.add_argument(
        "--icl-subsample", type=_positive, metavar="K", help="of those, one in K at random (default: as above, or 1)"
    )
    parser.add_argument(
        "--normalization", choices=NORMALIZATIONS, default="sum", help="of choices' log-likelihoods (default: sum)"
    )
    parser.add_argument(
        "--template",
        default="base",
        help="of the prompt: base (default), chat, or a file with {documents} and {prompt}",
    )
    parser.add_argument(
        "--splitting", choices=SPLITTINGS, default="none", help="of documents into training examples (default: none)"
    )
    parser.add_argument("--out", type=Path, default=out, help="folder for results.json (default: %(default)s)")
    _add_output_options(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _demo(options: argparse.Namespace) -> None:
    options.trust_remote_code = False
    Console().print(
        f"Simple reversals: {options.facts} facts such as 'femp are more dangerous than glon.', asked as "
        "'glon are' less / more 'dangerous than femp.'; chance 0.5.\n",
        highlight=False,
    )
    _compare(options)


def _compare(options: argparse.Namespace) -> None:
    task_of_seed, preset = _task_of_seed(options)
    settings = compare.Settings(
        arms=_arms(options.arms),
        seeds=_seeds(options.seeds),
        icl_per_topic=options.icl_per_topic or preset.icl_per_topic,
        icl_subsample=options.icl_subsample or preset.icl_subsample,
        normalization=options.normalization,
        template=_template(options.template),
        finetune=FinetuneSettings(
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            splitting=options.splitting,
        ),
    )
    results = None if options.out is None else options.out / "results.json"
    if results is not None:
        _check_new(results, options.overwrite)
    model = _load(options)
    runs: list[compare.Run] = []

    def keep(run: compare.Run) -> None:
        runs.append(run)
        if results is not None:
            compare.write_results(results, compare.as_json(model, options.task, settings, runs))

    compare.compare(model, task_of_seed, settings, progress=not options.quiet, on_run=keep)
    report.print_table(runs, Console())
    if results is not None:
        print(f"\nWritten to {results}")


def _score(options: argparse.Namespace) -> None:
    _check_new(options.out, options.overwrite)
    questions = read_questions(options.questions)
    context = icl_context(read_documents(options.documents)) if options.documents else ""
    model = _load(options)
    ledger = Ledger()
    scores = iter_scores(
        model, questions, context=context, chunk_rows=options.chunk_rows, ledger=ledger, progress=not options.quiet
    )
    correct = known = 0
    with ledger.phase("score"):
        first = next(scores)  # requests that cannot be scored are refused here, before the output is touched
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", encoding="utf-8") as file:
            for result in itertools.chain([first], scores):
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                known += result.answer is not None
                correct += bool(result.is_correct)
    accuracy = f", {correct} of {known} correct" if known else ""
    print(
        f"{len(questions)} questions in {ledger.seconds['score']:.1f} s{accuracy}: "
        f"{ledger.request_tokens:,} request tokens, "
        f"{ledger.forwarded_rows:,} rows forwarded (1 in {ledger.request_tokens / ledger.forwarded_rows:.0f}), "
        f"{ledger.head_rows:,} through the head. Written to {options.out}"
    )


def _task(options: argparse.Namespace) -> None:
    for name in ("documents.jsonl", "questions.jsonl"):
        _check_new(options.out / name, options.overwrite)
    task = _task_of_seed(options)[0](options.seed)
    task.write(options.out)
    print(f"{len(task.documents)} documents and {len(task.questions)} questions written to {options.out}")


def _lm_eval(options: argparse.Namespace) -> None:
    try:
        from icl_ft_fast.integrations import lm_eval
    except ModuleNotFoundError as error:
        raise UsageError(f"needs {error.name}: pip install 'icl_ft_fast[lm-eval]'") from error
    lm_eval.run(options.rest)


def _task_new(options: argparse.Namespace) -> None:
    try:
        "".encode(options.encoding)
    except LookupError as error:
        raise UsageError(f"--encoding: {error}") from error
    for name in ("documents.jsonl", "questions.jsonl"):
        _check_new(options.folder / name, options.overwrite)
    questions = read_questions(options.questions) if options.questions else ()
    options.folder.mkdir(parents=True, exist_ok=True)
    documents = own.iter_documents(options.documents, encoding=options.encoding)
    count = write_jsonl(options.folder / "documents.jsonl", map(asdict, documents))
    if questions:
        write_jsonl(options.folder / "questions.jsonl", map(asdict, questions))
    missing = "" if questions else "; questions.jsonl is yours to add"
    print(f"{count} documents and {len(questions)} questions written to {options.folder}{missing}")


def _task_check(options: argparse.Namespace) -> None:
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


def _load(options: argparse.Namespace) -> Model:
    from transformers.utils import logging

    logging.disable_progress_bar()  # other libraries' bars and notices; our own errors and bars remain
    logging.set_verbosity_error()
    return load(options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code)


def _task_of_seed(options: argparse.Namespace) -> tuple[Callable[[int], Task], Preset]:
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

    def task_of_seed(seed: int) -> Task:
        return generator.make(*folders, seed=seed, **arguments)

    try:
        task_of_seed(0)  # refused before any work
    except TaskError:
        raise
    except ValueError as error:
        raise UsageError(f"--facts: {error}") from error
    return task_of_seed, preset


def _check_new(path: Path, overwrite: bool) -> None:
    """Refuse, before any work, an output that could not or must not be written."""
    if path.is_dir():
        raise UsageError(f"--out: {path}: is a folder")
    if path.exists() and not overwrite:
        raise UsageError(f"--out: {path}: exists already; choose another or give --overwrite")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UsageError(f"--out: {above}: is a file, not a folder")


def _template(name: str) -> str:
    """base, chat, or the text of a file, less the line break that ends it."""
    if name in ("base", "chat"):
        return name
    try:
        return check_template(Path(name).read_text(encoding="utf-8").removesuffix("\n"))
    except UnicodeDecodeError as error:
        raise UsageError(f"--template: {name}: not UTF-8 text (byte {error.start + 1})") from error
    except OSError as error:
        raise UsageError(f"--template: {name}: neither base, chat nor a file: {error.strerror}") from error
    except ProtocolError as error:
        raise UsageError(f"--template: {name}: {error}") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _arms(text: str) -> tuple[str, ...]:
    arms = tuple(text.split(","))
    for arm in arms:
        if arm not in compare.ARMS:
            raise UsageError(f"--arms: expected some of {','.join(compare.ARMS)}, got {arm!r}")
    return _distinct("--arms", arms)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(seed) for seed in text.split(","))
    except ValueError as error:
        raise UsageError(f"--seeds: expected whole numbers separated by commas, got {text!r}") from error
    return _distinct("--seeds", seeds)


Item = TypeVar("Item", str, int)


def _distinct(option: str, items: tuple[Item, ...]) -> tuple[Item, ...]:
    """The items; a repeated one would be counted as more evidence than it is."""
    for i, item in enumerate(items):
        if item in items[:i]:
            raise UsageError(f"{option}: {item} is given twice")
    return items


if __name__ == "__main__":
    sys.exit(main())
