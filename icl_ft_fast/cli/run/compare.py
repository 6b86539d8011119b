"""The work of `icl-ft-fast compare` and `icl-ft-fast demo`."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any, TypeVar

from rich.console import Console

from icl_ft_fast.augmentation.generators import Endpoint
from icl_ft_fast.cli.compare import ALL, IN_A_STUDY
from icl_ft_fast.cli.finetune import GROUPS
from icl_ft_fast.cli.options import (
    Terminal,
    UsageError,
    arguments_digest,
    check_new,
    executor_of,
    load_model,
    loading,
    positive,
    seed,
    show_progress,
)
from icl_ft_fast.cli.run.finetune import OPTION_OF, fields_of, naming, parsed, tell
from icl_ft_fast.cli.run.page import check_page, write_page
from icl_ft_fast.cli.run.task import check_task_options, read_template, task_of_seed
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.meters import Meter
from icl_ft_fast.engine.model import Model
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings, LoraSettings, PrefixSettings
from icl_ft_fast.report import table
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.markdown import accuracy_table
from icl_ft_fast.report.plan import PLAN, kept_to, print_forecast, read_plan, write_plan
from icl_ft_fast.report.verdict import summary, verdict_of
from icl_ft_fast.runtime.durable import replacing
from icl_ft_fast.runtime.executors import Executor, InProcess
from icl_ft_fast.runtime.printable import printable
from icl_ft_fast.runtime.progress import Activity
from icl_ft_fast.study.arm import kept_name
from icl_ft_fast.study.arms import arm_named, arms_of, expand_arms
from icl_ft_fast.study.compare import RESULTS, StudyOptions, compare
from icl_ft_fast.study.forecast import forecast
from icl_ft_fast.study.harm import general_questions
from icl_ft_fast.study.power import power_of
from icl_ft_fast.study.prices import Prices, read_prices
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.retrieval import embedder_of
from icl_ft_fast.study.service import Service, parse_weights, read_weights
from icl_ft_fast.study.settings import DEFAULT_ARMS, StudySettings
from icl_ft_fast.tasks.generated import GENERATORS
from icl_ft_fast.tasks.generator import Preset
from icl_ft_fast.tasks.tables import silent
from icl_ft_fast.tasks.task import Task

MOST_SLOTS = 2**20
# Of settings of a training, the options of a study that are not named as `finetune`'s are.
STUDY_OPTION_OF = {"steps": "steps", "batch_size": "train-batch-size", "learning_rate": "learning-rate"}


def prices_of(options: argparse.Namespace) -> Prices | None:
    """The price file, read before any work."""
    if options.max_harm is not None and not getattr(options, "general", True):
        raise UsageError("--max-harm: needs --general, the task that harm is measured on")
    if options.queries_per_day is not None and options.queries_per_day * options.days < 1:
        raise UsageError("--queries-per-day: expected at least one query in all --days")
    return None if options.prices is None else read_prices(options.prices)


def service_of(options: argparse.Namespace) -> Service:
    """What the decision is for, read before any work."""
    if options.cost_of_wrong is not None and options.prices is None:
        raise UsageError("--cost-of-wrong: needs --prices, in whose currency it is")
    if options.weights is not None and options.weights_file is not None:
        raise UsageError("--weights: give it or --weights-file, not both")
    weights = None if options.weights is None else parse_weights(options.weights)
    if options.weights_file is not None:
        weights = read_weights(options.weights_file)
    return Service(
        options.days,
        options.changes_per_month,
        *(options.cost_of_wrong, weights, options.answer_tokens, options.concurrency, options.max_latency),
    )


def print_decision(study: Derived, options: argparse.Namespace, console: Console) -> None:
    """The decision at the end of a report, if a volume was given."""
    if options.queries_per_day is None:
        return
    queries = options.queries_per_day * options.days
    table.print_decision_at(study, queries, options.tolerance, console)


def cache_lifetime_of(options: argparse.Namespace) -> float:
    """Queries that share a reading of a context that stays in the cache."""
    return float(options.queries_per_cache_lifetime or options.queries_per_day or math.inf)


def run_demo(options: argparse.Namespace) -> None:
    """`icl-ft-fast demo`."""
    options.trust_remote_code = options.batch_invariant = False
    if not options.json:
        check_page(options.out / "report.html")  # before minutes of work
        _describe_demo(options)
    study = _run_one(options, executor_of(options))
    if study is not None and not options.json:
        queries = options.queries_per_day and options.queries_per_day * options.days
        write_page(options.out / "report.html", [study], queries, options.tolerance)


def _describe_demo(options: argparse.Namespace) -> None:
    Terminal().print(
        f"Simple reversals: {options.facts} facts such as 'femp are more dangerous than glon.', asked as "
        "'glon are' less / more 'dangerous than femp.'; chance 0.5.\n",
        highlight=False,
    )


def run_compare(options: argparse.Namespace) -> None:
    """`icl-ft-fast compare`."""
    executor = executor_of(options)
    if options.bf16 is not None and parsed("bf16", "--bf16", options.bf16):
        options.dtype = "bfloat16"  # as `finetune` holds them: every arm answers with the weights that are trained
    if options.dry_run:
        _plan(options, executor)
    elif options.task == ALL:
        _compare_all(options, executor)
    else:
        _run_one(options, executor)


def _run_one(options: argparse.Namespace, executor: Executor) -> Derived | None:
    """Run, print and return the study of one task; None in processes of other rank than 0."""
    study = _compared(options, executor, lambda: _load(options))
    if study is not None:
        _print(study, options)
    return study


def _plan(options: argparse.Namespace, executor: Executor) -> None:
    """What the study would take; the same command without --dry-run then says how far off that was."""
    if options.task == ALL:
        raise UsageError(f"--dry-run: plans one task at a time, not --task {ALL}")
    if not isinstance(executor, InProcess):
        raise UsageError("--dry-run: plans for one process; leave --executor out")
    make_task, settings, _, _ = _checked(options)
    arms_of(settings, make_task(settings.seeds[0]))  # an arm that cannot take the task is refused before the model
    model, _ = _load(options)
    has_store, checkpoint_s = options.store is not None, 60 * options.checkpoint_minutes
    with Activity("planning", shown=show_progress(options)):
        plan = forecast(model, make_task, settings, has_store=has_store, checkpoint_s=checkpoint_s)
    if options.out is not None:
        write_plan(options.out, plan, arguments_digest(options))
    power = power_of(make_task, settings.seeds, options.tolerance)
    if options.json:
        print(json.dumps(asdict(plan) | {"power": None if power is None else _finite(asdict(power))}))
        return
    print_forecast(plan, Terminal())
    if power is not None:
        print(f"\nWhat it can show: {power.text}")
    if options.out is not None:
        print(f"\nWritten to {options.out / PLAN}; the same command without --dry-run says how far off it was")


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """With None for infinity, which JSON does not have."""
    return {name: None if value == math.inf else value for name, value in values.items()}


def _print_plan(study: Derived, options: argparse.Namespace) -> None:
    """How far off the plan was, where there is one of the same arguments."""
    plan = None if options.out is None else read_plan(options.out, arguments_digest(options))
    if plan is not None:
        print("\n" + "\n".join(kept_to(plan, study.results.runs)))


def _print(study: Derived, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(_summary(study, options)))
        return
    console = Terminal()
    table.print_study(study, console, options.tolerance)
    print_decision(study, options, console)
    _print_plan(study, options)
    if (date := study.results.settings.get("template_date")) and study.results.settings.get("template") == "chat":
        print(f"\nThe chat template wrote the date {date}; --template-date sets it.")
    if options.out is not None:
        print(f"\nWritten to {options.out / 'results.json'}")
    if options.keep_models is not None:
        print(f"\n{_serving(study, options)}")


def _serving(study: Derived, options: argparse.Namespace) -> str:
    """How to serve the arm that the verdict chooses, or the most accurate one where no volume was given."""
    queries = options.queries_per_day and options.queries_per_day * options.days
    verdict = verdict_of(study, queries, options.tolerance) if queries else None
    if verdict is None:
        arms = [arm for arm in study.arms if not arm_named(arm).asking.is_control]
        arm, why = max(arms, key=lambda arm: a.value if (a := study.accuracy(arm)) else 0.0), "the most accurate"
    else:
        arm, why = study.arm_of(verdict.decision.chosen.name), "the one that the verdict chooses"
    given = shlex.quote(options.model)
    given += f" --adapter {shlex.quote(options.adapter)}" if getattr(options, "adapter", None) else ""
    trained = options.keep_models / kept_name(arm, study.results.runs[0].seed)
    served = shlex.quote(str(trained)) if arm_named(arm).training is not None else given
    dtype = f" --dtype {options.dtype}" if options.dtype else ""
    asking, before = arm_named(arm).asking, ""
    if asking.context is not None:
        before = ", with the documents in front of each question"
    elif asking.prepare is not None:
        before = f", with {'its saved context' if asking.has_slots else 'its passages'} in front of each question"
    return f"To serve {arm}, {why}{before}: icl-ft-fast serve {served}{dtype}"


def _compare_all(options: argparse.Namespace, executor: Executor) -> None:
    """Every task that is made from a seed, each in a folder of its own in --out, and one table of them all."""
    check_task_options(options, None)
    studies, loaded = [], cache(lambda: _load(options))  # once for all tasks
    for name in (name for name, generator in GENERATORS.items() if generator.reads is None):
        if show_progress(options) and executor.rank == 0:
            print(f"{name}:", file=sys.stderr)
        kept = options.keep_models and options.keep_models / name
        one = argparse.Namespace(**vars(options) | {"task": name, "out": options.out / name, "keep_models": kept})
        if (study := _compared(one, executor, loaded)) is not None:
            studies.append(study)
    if executor.rank:
        return
    text = accuracy_table(studies)
    with replacing(options.out / "table.md") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    print(json.dumps([_summary(study, options) for study in studies]) if options.json else text)
    if not options.json:
        print(f"\nWritten to {options.out}: table.md, and a folder for each task with its results.json")


def _summary(study: Derived, options: argparse.Namespace) -> dict[str, Any]:
    return summary(study, options.queries_per_day and options.queries_per_day * options.days, options.tolerance)


def _load(options: argparse.Namespace) -> tuple[Model, Ledger]:
    """The model and what loading it cost."""
    load = Ledger(meter=Meter("cpu"))
    with load.phase("load"):
        model = load_model(options)
    return model, load


def _compared(
    options: argparse.Namespace, executor: Executor, loaded: Callable[[], tuple[Model, Ledger]]
) -> Derived | None:
    """The study of one task; None in processes of other rank than 0."""
    make_task, settings, prices, service = _checked(options)
    if options.out is not None and not executor.rank:
        check_new(options.out / RESULTS, options.overwrite, arguments_digest(options))
    progress = show_progress(options) and executor.rank == 0
    how = StudyOptions(
        executor=executor,
        loading=loading(options),
        store=options.store,
        store_bytes=int(options.store_limit * 1e9),
        checkpoint_s=60 * options.checkpoint_minutes,
        measure_s=options.measure_seconds,
        answer_tokens=options.answer_tokens,
        task_name=options.task,
        arguments=arguments_digest(options),
        overwrite=options.overwrite,
        kept=options.keep_models,
        tell=silent if options.quiet or executor.rank else tell,
        on_run=_tell_run if progress else None,
    )
    results = compare(loaded, make_task, settings, out=options.out, options=how, progress=progress)
    if results is None:
        return None
    name = options.task if options.out is None else options.out.name
    return Derived(results, name, **derived_settings(options, prices, service))


def _checked(
    options: argparse.Namespace,
) -> tuple[Callable[[int], Task], StudySettings, Prices | None, Service]:
    """What the options ask for, of which a plan refuses what the study does."""
    for name in ("template_date", "chat_template_kwargs"):
        if getattr(options, name) and options.template == "base":
            raise UsageError(f"--{name.replace('_', '-')}: needs --template chat")
    make_task, preset = task_of_seed(options)
    settings, prices, service = _settings(options, preset), prices_of(options), service_of(options)
    if service.weights is not None:
        service.check_splits(list(dict.fromkeys(q.split for q in make_task(settings.seeds[0]).questions)))
    return make_task, settings, prices, service


def derived_settings(options: argparse.Namespace, prices: Prices | None, service: Service) -> dict[str, Any]:
    """What the options say of how results are read."""
    return {
        "prices": prices,
        "cache_lifetime": cache_lifetime_of(options),
        "batch": options.batch_size,
        "family": options.family,
        "max_harm": options.max_harm,
        "service": service,
    }


def _tell_run(run: Run) -> None:
    """A line for each arm of each seed as it ends: the table as it grows."""
    splits = "  ".join(f"{split} {accuracy.value:.2f}" for split, accuracy in run.accuracy.items())
    print(printable(f"seed {run.seed}  {arm_named(run.arm).title:<24}  {splits}"), file=sys.stderr, flush=True)


def _settings(options: argparse.Namespace, preset: Preset) -> StudySettings:
    """What the options ask for, else what the preset does, else the defaults."""
    given = {name: getattr(options, name) for name in ("icl_per_topic", "icl_subsample", "strategy", "samples")}
    study = dict(preset.study) | {name: value for name, value in given.items() if value is not None}
    if study.get("strategy") != preset.study.get("strategy") and options.samples is None:
        study.pop("samples", None)  # the preset's are those of its own strategy
    names = ("steps", "learning_rate", "lr_scheduler_type", "splitting")
    given = {name: getattr(options, name) for name in names}
    training = dict(preset.finetune) | {name: value for name, value in given.items() if value is not None}
    use_peft, more = _training(options)
    training |= more
    with naming(OPTION_OF | STUDY_OPTION_OF):
        tuning = FinetuneSettings(**{"batch_size": options.train_batch_size} | training)
    if options.generator_url and not options.generator:
        raise UsageError("--generator-url: needs --generator, the model's name there")
    if options.generator_url:  # a bad address is refused before the model is loaded
        Endpoint(options.generator_url, options.generator)
    general_questions(options.general)  # read before the model is loaded
    arms = ",".join(study.get("arms", DEFAULT_ARMS)) if options.arms is None else options.arms
    if options.retriever == "dense":  # a bad address or folder is refused before the model is loaded
        embedder_of(options.embedding_url, options.embedding_model)
    settings = StudySettings(
        **study
        | {
            "arms": _arms(arms),
            "seeds": _seeds(options.seeds),
            "icl_tokens": options.icl_tokens,
            "normalization": options.normalization,
            "template": read_template(options.template),
            "questions": options.questions,
            "mix": _mix(options.mix),
            "replay": _replay(options.replay),
            "synthetic_tokens": _budgets(options.synthetic_tokens),
            "general": options.general,
            "retriever": options.retriever,
            "embedding_url": options.embedding_url,
            "embedding_model": options.embedding_model,
            "template_date": options.template_date,
            "chat_template_kwargs": options.chat_template_kwargs or None,
            "special_tokens": vars(options).get("special_tokens", "text"),
            "generator": options.generator,
            "generator_url": options.generator_url,
            "use_peft": use_peft,
            "arm_training": options.arm_training or None,
            "eval_steps": options.eval_steps,
            "finetune": tuning,
            "prefix_tokens": prefix_tokens(options.prefix_tokens),
            "prefix": prefix_settings(options),
        }
    )
    _check_arm_training(settings)
    _check_written(settings)
    return settings


def _check_written(settings: StudySettings) -> None:
    """Refuse settings of what the model writes to train on where no arm of the study trains on it."""
    trained = [training for name in expand_arms(settings.arms) if (training := arm_named(name).training) is not None]
    writing = [training for training in trained if training.generates]
    needs = {
        "--replay": (settings.replay, trained, "an arm that trains"),
        "--synthetic-tokens": (settings.synthetic_tokens, writing, "an arm that trains on what the model writes"),
        "--mix": (settings.mix, [its for its in writing if not its.asks_itself], "augmented-ft"),
    }
    for option, (given, those, needed) in needs.items():
        if given and not those:
            raise UsageError(f"{option}: needs {needed} among --arms")


def _check_arm_training(settings: StudySettings) -> None:
    """Refuse own settings of an arm that the study has not, or does not train, before the model is loaded."""
    trained = {name.partition("+")[0] for name in expand_arms(settings.arms) if arm_named(name).training is not None}
    known = trained | {name.partition("@")[0] for name in trained}
    for name, own in (settings.arm_training or {}).items():
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            raise UsageError(f"--arm-training: {name}: expected an arm of --arms that trains: {names}")
        if not isinstance(own, dict):
            raise UsageError(f"--arm-training: {name}: expected an object of settings, got {own!r}")
        try:
            settings.training_of(name)
        except FinetuneError as error:
            raise UsageError(f"--arm-training: {error}") from error


def _training(options: argparse.Namespace) -> tuple[bool | None, dict[str, Any]]:
    """Whether adapters are trained (None: the default), and fields of FinetuneSettings, under `finetune`'s names."""
    given = {
        name: parsed(name, f"--{name}", getattr(options, name))
        for name in IN_A_STUDY
        if getattr(options, name) is not None
    }
    use_peft = None if options.use_peft is None else options.use_peft == "true"
    found, lora = fields_of(given, FinetuneSettings), fields_of(given, LoraSettings)
    if lora and use_peft is False:
        raise UsageError(f"--{next(name for name in GROUPS['LoRA'] if name in given)}: excludes --use_peft false")
    with naming(OPTION_OF):
        adapters = {"lora": LoraSettings(**lora)} if lora or use_peft else {}
    return (True if lora else use_peft), found | adapters


def _arms(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        try:
            expand_arms([name])
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    return _distinct("--arms", names)


def prefix_settings(options: argparse.Namespace) -> PrefixSettings:
    """How a prefix is trained."""
    with naming({"learning_rate": "prefix-rate", "steps": "prefix-steps"}):
        return PrefixSettings(
            conversations=options.conversations,
            part_tokens=options.part_tokens,
            steps=options.prefix_steps,
            learning_rate=options.prefix_rate,
        )


def prefix_tokens(text: str) -> tuple[int, ...]:
    """The sizes of --prefix-tokens."""
    sizes = sizes_of_option("--prefix-tokens", text)
    if max(sizes) > MOST_SLOTS:
        raise UsageError(f"--prefix-tokens: expected at most {MOST_SLOTS:,}, got {max(sizes):,}")
    return sizes


def sizes_of_option(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, separated by commas."""
    return _distinct(option, tuple(_each(option, text.split(","), positive)))


def _mix(text: str | None) -> tuple[int, int] | None:
    """Parts of questions and of documents."""
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--mix: expected two whole numbers above 0 such as 1:1, got {text!r}")
    return int(parts[0]), int(parts[1])


def _replay(fraction: float) -> float:
    if not 0 <= fraction < 1:
        raise UsageError(f"--replay: expected a fraction from 0 to below 1, got {fraction:g}")
    return fraction


def _budgets(text: str | None) -> tuple[int, ...]:
    numbers = text.split(",") if text is not None else []
    return _distinct("--synthetic-tokens", tuple(sorted(_each("--synthetic-tokens", numbers, positive))))


def _seeds(text: str) -> tuple[int, ...]:
    return _distinct("--seeds", tuple(_each("--seeds", text.split(","), seed)))


def _each(option: str, texts: Sequence[str], parse: Callable[[str], int]) -> list[int]:
    try:
        return [parse(text) for text in texts]
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{option}: {error}; separate several by commas") from error


Item = TypeVar("Item", str, int)


def _distinct(option: str, items: tuple[Item, ...]) -> tuple[Item, ...]:
    """The items; a repeated one would be counted as more evidence than it is."""
    for i, item in enumerate(items):
        if item in items[:i]:
            raise UsageError(f"{option}: {item} is given twice")
    return items
