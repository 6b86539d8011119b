"""The work of `icl-ft-fast task`."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from icl_ft_fast.cli.options import (
    UsageError,
    check_new,
    load_model,
)
from icl_ft_fast.cli.task import _OPTIONS
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.defaults import SHIPPED, SHIPPED_FOLDER
from icl_ft_fast.engine.prompting import (
    ProtocolError,
    check_prompts,
    check_template,
    chosen_template,
    shown_prompt,
)
from icl_ft_fast.runtime.printable import printable
from icl_ft_fast.runtime.templates import fix_date, set_template_arguments
from icl_ft_fast.study import questions
from icl_ft_fast.study.power import power_of
from icl_ft_fast.study.settings import TOLERANCE
from icl_ft_fast.tasks import check, own
from icl_ft_fast.tasks.files import Problems, TaskError, read_lines, read_text, write_jsonl
from icl_ft_fast.tasks.generated import GENERATORS
from icl_ft_fast.tasks.generator import Preset, TaskOption
from icl_ft_fast.tasks.near import NearRepeats
from icl_ft_fast.tasks.tables import Format
from icl_ft_fast.tasks.task import Document, Question, Task, read_documents, read_questions
from icl_ft_fast.tasks.words import ENGLISH


def check_task_options(options: argparse.Namespace, task: str | None) -> dict[str, int]:
    """The arguments of the task's maker that its own options set; refuses an option of another task.

    Args:
        options: of a command with add_task_options().
        task: a name of GENERATORS; None for none of them.
    """
    given = {}
    for name, option in _OPTIONS.items():
        value = getattr(options, name, None)
        if value is not None and name not in _options_of(task):
            owners = [owner for owner in GENERATORS if name in _options_of(owner)]
            raise UsageError(f"--{option.name}: is an option of {', '.join(owners)}, not of {task or 'this --task'}")
        if value is not None:
            given[option.argument] = value
    return given


def _options_of(task: str | None) -> dict[str, TaskOption]:
    """The task's own options, by their attribute among the parsed ones."""
    generator = GENERATORS.get(task or "")
    return {option.name.replace("-", "_"): option for option in (generator.options if generator else ())}


def run_generate(options: argparse.Namespace) -> None:
    """`icl-ft-fast task NAME`."""
    for name in ("documents.jsonl", "questions.jsonl"):
        check_new(options.out / name, options.overwrite)
    task = task_of_seed(options)[0](options.seed)
    task.write(options.out)
    print(f"{len(task.documents)} documents and {len(task.questions)} questions written to {options.out}")


def run_new(options: argparse.Namespace) -> None:
    """`icl-ft-fast task new`."""
    delimiter = "\t" if options.delimiter == "tab" else options.delimiter
    try:
        form = Format(options.encoding, delimiter, options.columns, lambda note: print(printable(note)))
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    for name in ("documents.jsonl", "questions.jsonl"):
        check_new(options.folder / name, options.overwrite)
    problems, given = Problems(), tuple[Question, ...]()
    if options.questions:
        try:
            given = own.read_questions(options.questions, form, options.first_answer)
        except TaskError as error:
            problems.add(error)
    empty: list[str] = []
    lost, some_id = {question.document for question in given} - {None}, ""

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal some_id
        try:
            for document in own.iter_documents(options.documents, form):
                empty.extend([] if document.text.strip() else [document.id])
                lost.discard(document.id)
                some_id = some_id or document.id
                yield asdict(document)
        except TaskError as error:
            problems.add(error)
        problems.check()

    with removing_if_failed(options.folder):
        count = write_jsonl(options.folder / "documents.jsonl", rows())
        if given:
            write_jsonl(options.folder / "questions.jsonl", map(asdict, given))
    if empty:
        print(f"documents without text: {_named(empty)}")
    if together := [question.id for question in given if check.runs_together(question)]:
        print(f"choices that run into the prompt, without a space between: {_named(together)}; {SPACED}")
    if equal := [question.id for question in given if len(set(question.choices)) < len(question.choices)]:
        print(f"questions with equal choices: {_named(equal)}")
    if lost:
        without = [question.id for question in given if question.document in lost]
        print(f"{LOST}: {_named(without)}; the documents have ids such as {printable(some_id)}")
    missing = "" if given else "; questions.jsonl is yours to add"
    print(f"{count} documents and {len(given)} questions written to {options.folder}{missing}")


@contextmanager
def removing_if_failed(folder: Path) -> Iterator[None]:
    """Make a folder; remove it, and those above it that were made, if the block fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            shutil.rmtree(folder)
            for path in made[1:]:
                path.rmdir()
        raise


def run_questions(options: argparse.Namespace) -> None:
    """`icl-ft-fast task questions`."""
    out, documents = options.folder / "questions.jsonl", options.folder / "documents.jsonl"
    check_new(out, options.overwrite)
    settings = questions.QuestionSettings(
        per_document=options.per_document,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        wrapping=options.template,
        template_date=options.template_date,
    )
    if options.prompt_template is not None:
        try:
            settings = replace(settings, template=read_text(options.prompt_template))
        except ValueError as error:
            raise UsageError(f"--prompt-template: {error}") from error
    read = read_documents(documents)
    model = load_model(options)
    set_template_arguments(model.tokenizer, options.chat_template_kwargs)
    written = questions.write_questions(
        model, read, options.folder / "questions.journal.jsonl", settings, progress=not options.quiet
    )
    if options.template != "base" and (date := fix_date(model.tokenizer)):
        print(f"The chat template wrote the date {date}; --template-date sets it.")
    dropped = ", ".join(f"{count} {reason}" for reason, count in written.dropped.items()) or "none"
    counts = f"{len(written.rows)} questions from {written.statements} statements; dropped: {dropped}"
    if not written.rows:
        raise TaskError(f"{documents}: {counts}")
    write_jsonl(out, (asdict(question) | {"provenance": origin} for question, origin in written.rows))
    print(f"{counts}. Written to {out}")


def run_check(options: argparse.Namespace) -> None:
    """`icl-ft-fast task check`."""
    questions = read_questions(options.folder / "questions.jsonl")
    documents = own.iter_documents([options.folder / "documents.jsonl"])
    try:
        near = NearRepeats(check.NEAR)
    except ModuleNotFoundError:
        near = None
    found = check.check(documents, questions, ngram=options.ngram, near=near)
    print(f"documents without text: {_named(found.empty_documents)}")
    print(f"documents that repeat another: {_named(found.same_documents)}")
    if found.near_documents is None:
        print("documents that nearly repeat another: not looked for, needs pip install 'icl_ft_fast[augment]'")
    else:
        print(f"documents that nearly repeat another: {_named(found.near_documents)}")
    print(f"questions that repeat another: {_named(found.same_questions)}")
    print(f"questions with equal choices: {_named(found.equal_choices)}")
    spaced = f"; {SPACED}" if found.run_together else ""
    print(f"questions whose choices run into the prompt, without a space between: {_named(found.run_together)}{spaced}")
    print(f"questions without a prompt: {_named(found.empty_prompts)}")
    print(f"{LOST}: {_named(found.lost_documents)}")
    for split, leaked in found.leaked.items():
        asked = f"split {printable(split)}, {found.answered[split]} questions"
        print(f"answers that the documents state word for word, {asked}: {_named(leaked)}")
    print(f"accuracy of always picking the longest choice: {found.longest_is_right:.3f}; chance: {found.chance:.3f}")
    for number, counts in found.positions.items():
        print(f"correct choices by position among {number} choices: {', '.join(map(str, counts))}")
    if (power := power_of(lambda _: Task((), tuple(questions)), [0], TOLERANCE)) is not None:
        print(f"what a study can show: {power.text}")
    if options.model is not None:
        _show_prompts(options, read_documents(options.folder / "documents.jsonl"), questions)


def _show_prompts(options: argparse.Namespace, documents: Sequence[Document], questions: Sequence[Question]) -> None:
    """One whole prompt under each template, its tokens around the choice, and whether all fits the positions."""
    model = load_model(options)
    usual = chosen_template(model, "auto")
    templates = {options.template: read_template(options.template)}
    if options.template == "auto":
        templates = {name: name for name in ("base", usual)}
    for name, template in templates.items():
        found = check_prompts(model, documents, questions, template)
        default = ", the default for this model" if name == usual else ""
        print(
            f"\n== template {printable(name)}{default}: with documents at most {found.longest_tokens:,} tokens of ",
            end="",
        )
        print(f"{model.max_positions:,} positions, {found.context_tokens:,} of them before the question ==")
        if found.longest_tokens > model.max_positions + 1:
            print(f"does not fit: give compare --icl-tokens {max(found.room, 0)} or a model with more positions")
        print(f"questions whose prompt swallows the beginning of a choice: {_named(found.merged)}")
        for shown_documents in ((), documents):
            shown = shown_prompt(model, shown_documents, questions[0], template)
            print(f"-- question {printable(questions[0].id)}, {'all' if shown_documents else 'no'} documents --")
            print(f"{printable(shown.text)}[{printable(shown.choice)}]")
            print(f"-- its last tokens | those of the choice: {printable(shown.boundary)}")


def read_template(name: str) -> str:
    """auto, base, chat, or the text of a file, less the line break that ends it."""
    if name in ("auto", "base", "chat"):
        return name
    if not Path(name).exists():
        raise UsageError(f"--template: {name}: neither auto, base, chat nor a file: No such file or directory")
    try:
        return check_template(read_text(name).removesuffix("\n"))
    except TaskError as error:
        raise UsageError(f"--template: {error}") from error
    except ProtocolError as error:
        raise UsageError(f"--template: {name}: {error}") from error


LOST = "questions whose document (field document) is not there"
SPACED = "begin such choices with a space, in tables too"


def _named(ids: Sequence[str]) -> str:
    """How many, and the first few."""
    return f"{len(ids)} ({printable(', '.join(ids[:3]))}{', ...' if len(ids) > 3 else ''})" if ids else "none"


def task_of_seed(options: argparse.Namespace) -> tuple[Callable[[int], Task], Preset]:
    """The named task, or the folder's, for a seed; and its preset."""
    generator = GENERATORS.get(options.task)
    if generator is None:
        if not Path(options.task).is_dir():
            raise UsageError(f"--task: {options.task}: neither a folder nor one of {', '.join(GENERATORS)}")
        check_task_options(options, None)
        task = Task.read(options.task)
        return lambda _: task, Preset()
    if options.preset not in generator.presets:
        raise UsageError(f"--preset: {options.task} has {', '.join(generator.presets)}; got {options.preset!r}")
    preset = generator.presets[options.preset]
    own_arguments = check_task_options(options, options.task)
    if (options.data is None) != (generator.reads is None):
        raise UsageError(f"--data: {options.task} reads {generator.reads or 'no folder'}")
    excluded = frozenset(preset.arguments.get("exclude", ())).union(*map(_words, options.exclude_words))
    arguments = {**preset.arguments, "exclude": excluded, **own_arguments}
    folders = [] if options.data is None else [options.data]

    @cache
    def make_task(seed: int) -> Task:
        return generator.make(*folders, seed=seed if options.task_seed is None else options.task_seed, **arguments)

    try:
        make_task(0)  # refused before any work
    except TaskError:
        raise
    except ValueError as error:
        names = [f"--{option.name}" for option in _options_of(options.task).values()]
        raise UsageError(f"{', '.join([*names, '--exclude-words'])}: {error}") from error
    return make_task, preset


def _words(source: str) -> frozenset[str]:
    """The words that one of --exclude-words stands for."""
    if source == "english":
        return ENGLISH
    if Path(source).is_file():
        return frozenset(word for _, line in read_lines(Path(source)) for word in line.casefold().split())
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(SHIPPED_FOLDER if source == SHIPPED else source)
    except (OSError, ValueError) as error:
        raise UsageError(f"--exclude-words: {source}: neither english, a file nor a checkpoint's tokenizer") from error
    return encoding.vocabulary_words(tokenizer)
