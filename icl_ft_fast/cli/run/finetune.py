"""The work of `icl-ft-fast finetune`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from icl_ft_fast.cli.finetune import GROUPS, OPTIONS
from icl_ft_fast.cli.options import UsageError
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.machine import slow_dtype
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.finetuning import distributed
from icl_ft_fast.finetuning.data import read_examples, split_validation
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import (
    MOST_RATE,
    MOST_STEPS,
    FinetuneError,
    FinetuneSettings,
    LoraSettings,
    RunOptions,
    training_concerns,
)
from icl_ft_fast.runtime.durable import locked
from icl_ft_fast.runtime.templates import check_date, fix_date
from icl_ft_fast.tasks.tables import silent
from icl_ft_fast.tasks.task import read_documents


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were set, in the file or on the command line, each of its type."""
    given: dict[str, tuple[str, Any]] = {}
    if options.config is not None:
        given = {name: (f"{options.config}: {name}", value) for name, value in _read_yaml(options.config).items()}
    for name in OPTIONS:
        if getattr(options, name) is not None:
            given[name] = (f"--{name}", getattr(options, name))
    values = {}
    for name, (where, value) in given.items():
        if name not in OPTIONS:
            raise UsageError(f"{where}: no such option; `icl-ft-fast finetune --help` lists them")
        values[name] = parsed(name, where, value)
    return values


def parsed(name: str, where: str, value: Any) -> Any:
    """The value of one of OPTIONS, of its type; `where` it stands is told in the error."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        return OPTIONS[name].parse(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{where}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{where}: expected {OPTIONS[name].parse.__name__.strip('_')}, got {value!r}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        read = yaml.safe_load(path.read_bytes())  # by its mark UTF-8 or UTF-16
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UsageError(f"--config: {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise UsageError(f"--config: {path}: expected `option: value` lines")
    for name, value in read.items():  # aliases within aliases would be longer than memory once written out
        if any(isinstance(part, list | dict) for part in (value if isinstance(value, list) else [value])):
            raise UsageError(f"--config: {path}: {name}: expected a value or a list of values")
    return {str(name): value for name, value in read.items() if value is not None}


def run_finetune(options: argparse.Namespace) -> None:
    """`icl-ft-fast finetune`."""
    from transformers.utils import logging

    given = _given(options)
    for name in ("model_name_or_path", "train_file", "output_dir"):
        if name not in given:
            raise UsageError(f"--{name}: required, here or in --config")
    seed = given.get("seed", 0)
    for name, is_fit, asked in (
        ("seed", 0 <= seed < 2**63, "from 0 to 2^63 - 1"),
        ("validation_split", 0 < given.get("validation_split", 0.5) < 1, "above 0 and below 1"),
        ("learning_rate", 0 < given.get("learning_rate", 1.0) <= MOST_RATE, f"above 0 to {MOST_RATE:g}"),
        ("num_train_epochs", 0 < given.get("num_train_epochs", 1.0) <= MOST_STEPS, f"above 0 to {MOST_STEPS:,}"),
    ):
        if not is_fit:
            raise UsageError(f"--{name}: expected a number {asked}, got {given[name]}")
    if "template_date" in given:
        check_date(given["template_date"])
    examples, validation = read_examples(given["train_file"]), []
    if "validation_file" in given:
        validation = read_examples(given["validation_file"])
    elif "validation_split" in given:
        examples, validation = split_validation(examples, given["validation_split"], seed)
    settings = _settings(given, len(examples))
    if given.get("teacher", "icl") != "icl" or ("teacher" in given) != ("teacher_documents" in given):
        raise UsageError("--teacher: expected icl, together with --teacher_documents")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    out = given["output_dir"]
    with distributed.joined(), locked(out / ".lock") if distributed.place()[0] == 0 else nullcontext():
        model = load(
            given["model_name_or_path"],
            dtype="bfloat16" if given.get("bf16") else "float32",
            device=distributed.device(),
            cache=given.get("cache"),
            trust_remote_code=given.get("trust_remote_code", False),
            special_tokens=given.get("special_tokens", "text"),
        )
        slow = slow_dtype(model.device, model.network.dtype)
        if slow and distributed.place()[0] == 0 and not given.get("quiet", False):
            tell(f"icl-ft-fast finetune: {slow}")
        context = None
        if "teacher" in given:
            context = prompt_context(model, read_documents(given["teacher_documents"]))
        tuned = finetune(
            model,
            examples,
            settings,
            seed=seed,
            validation=validation,
            teacher_context=context,
            options=RunOptions(
                output_dir=out,
                resume=given.get("resume_from_checkpoint", True),
                in_place=context is None,
                progress=not given.get("quiet", False),
                tell=silent if given.get("quiet", False) else tell,
            ),
        )
        if distributed.place()[0] == 0:
            if any(example.turns for example in examples) and (date := fix_date(model.tokenizer)):
                print(f"The chat template wrote the date {date}; --template_date sets it.")
            for concern in training_concerns(settings, tuned.losses):
                tell(f"icl-ft-fast finetune: warning: {concern}")
            print(f"{len(tuned.losses)} steps, last loss {tuned.losses[-1]:.4f}. Written to {out}")


OPTION_OF = {option.field or name: name for name, option in OPTIONS.items() if option.sets is not None}


@contextmanager
def naming(option_of: Mapping[str, str]) -> Iterator[None]:
    """Within the block an error about a field of settings names the option that sets it."""
    try:
        yield
    except FinetuneError as error:
        field, _, reason = str(error).partition(": ")
        if field not in option_of:
            raise
        raise UsageError(f"--{option_of[field]}: {reason}") from error


def tell(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def fields_of(given: dict[str, Any], kind: type[FinetuneSettings] | type[LoraSettings]) -> dict[str, Any]:
    """The fields of these settings that options set, by their names there."""
    found = {
        option.field or name: given[name] for name, option in OPTIONS.items() if option.sets is kind and name in given
    }
    if found.get("target_modules") == ("all-linear",):
        found["target_modules"] = "all-linear"
    return found


def _settings(given: dict[str, Any], num_examples: int) -> FinetuneSettings:
    ours, lora = fields_of(given, FinetuneSettings), fields_of(given, LoraSettings)
    if lora and not given.get("use_peft"):
        raise UsageError(f"--{next(name for name in GROUPS['LoRA'] if name in given)}: needs --use_peft")
    with naming(OPTION_OF):
        settings = FinetuneSettings(**ours, lora=LoraSettings(**lora) if given.get("use_peft") else None)
    if "num_train_epochs" not in given:
        return settings
    if "max_steps" in given or settings.splitting != "none":
        raise UsageError("--num_train_epochs: excludes --max_steps and --splitting; give max_steps")
    per_step = settings.batch_size * settings.gradient_accumulation_steps * distributed.num_launched()
    return replace(settings, steps=math.ceil(given["num_train_epochs"] * num_examples / per_step))
