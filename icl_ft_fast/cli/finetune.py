"""`icl-ft-fast finetune`: one model on a file of examples, under TRL's names, from the command line or a YAML file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from icl_ft_fast.cli.options import Commands, UsageError, command
from icl_ft_fast.engine.model import load
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.finetuning import (
    FinetuneSettings,
    LoraSettings,
    RunOptions,
    distributed,
    finetune,
    read_examples,
    split_validation,
)
from icl_ft_fast.runtime.durable import locked
from icl_ft_fast.tasks.task import read_documents


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.replace(",", " ").split() if name != "none")


# What an option is called (TRL's name where it has one): its type and what it sets.
RUN: dict[str, tuple[Callable[[str], Any], str]] = {
    "model_name_or_path": (str, "a checkpoint directory, a hub id, or 'shipped'; required"),
    "train_file": (Path, "JSON lines: text, prompt and completion, messages, alpaca or sharegpt; required"),
    "output_dir": (Path, "checkpoints, metrics.jsonl and the final model; required"),
    "validation_file": (Path, "examples whose loss picks the best checkpoint"),
    "validation_split": (float, "fraction of train_file to validate on, in place of a file"),
    "resume_from_checkpoint": (_boolean, "resume the run in output_dir if it has these settings (default: true)"),
    "num_train_epochs": (float, "passes over train_file, in place of max_steps"),
    "bf16": (_boolean, "bfloat16 weights, trained through float32 copies"),
    "seed": (int, "random seed of order, adapters and dropout (default: 0)"),
    "use_peft": (_boolean, "train LoRA adapters"),
    "teacher": (str, "icl: learn what the model says with teacher_documents in context (KL)"),
    "teacher_documents": (Path, "JSON lines with id, text"),
    "trust_remote_code": (_boolean, "run the checkpoint's own Python code"),
    "quiet": (_boolean, "no progress bar"),
}
SETTINGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "max_steps": ("steps", int, "optimizer steps"),
    "per_device_train_batch_size": ("batch_size", int, "examples a forward, in each process"),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", int, "forwards a step"),
    "learning_rate": ("learning_rate", float, "after warm-up"),
    "lr_scheduler_type": ("lr_scheduler_type", str, "constant, constant_with_warmup, linear or cosine"),
    "warmup_steps": ("warmup_steps", int, "steps of warm-up"),
    "weight_decay": ("weight_decay", float, "decay of every weight"),
    "adam_beta1": ("adam_beta1", float, "AdamW's"),
    "adam_beta2": ("adam_beta2", float, "AdamW's"),
    "adam_epsilon": ("adam_epsilon", float, "AdamW's"),
    "optim": ("optim", str, "adamw_torch or adamw_torch_fused"),
    "max_grad_norm": ("clip_norm", float, "bound of the gradient's norm"),
    "completion_only_loss": ("completion_only", _boolean, "loss on completions and assistants' turns only"),
    "splitting": ("splitting", str, "texts into sentences: none, independent or cumulative"),
    "group_by_prompt": ("group_by_prompt", _boolean, "keep examples of one prompt together and forward it once"),
    "gradient_checkpointing": ("gradient_checkpointing", _boolean, "recompute layers in the backward"),
    "eval_steps": ("eval_steps", int, "steps between validation losses"),
    "early_stopping_patience": ("early_stopping_patience", int, "evaluations without a better loss"),
    "save_steps": ("save_steps", int, "steps between checkpoints"),
    "save_total_limit": ("save_total_limit", int, "checkpoints kept beside the best"),
    "logging_steps": ("logging_steps", int, "steps between entries of trainer_state.json"),
    "report_to": ("report_to", _names, "trackers: tensorboard, wandb, trackio"),
    "fsdp": ("fsdp", _boolean, "shard weights over the processes"),
}
LORA: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "lora_r": ("r", int, "rank"),
    "lora_alpha": ("lora_alpha", float, "scale times rank"),
    "lora_dropout": ("lora_dropout", float, "dropout of the adapters' inputs"),
    "lora_target_modules": ("target_modules", _names, "ends of module names, or all-linear"),
    "use_rslora": ("use_rslora", _boolean, "rank-stabilised scale"),
    "use_dora": ("use_dora", _boolean, "weight-decomposed adaptation"),
}


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "finetune",
        _finetune,
        "train a model, or adapters, on a file of examples",
        "icl-ft-fast finetune --model_name_or_path DIR --train_file data.jsonl --output_dir out/ft --max_steps 200\n"
        "icl-ft-fast finetune --config run.yaml --learning_rate 1e-4\n"
        "torchrun --nproc-per-node 2 -m icl_ft_fast.cli finetune --config run.yaml",
    )
    run = parser.group("run")
    help = "YAML file with any of the options below; the command line wins"
    run.add_argument("--config", type=Path, metavar="FILE", help=help)
    for name, (_, text) in RUN.items():
        _add(run, name, text)
    for title, table, defaults in (("training", SETTINGS, FinetuneSettings()), ("LoRA", LORA, LoraSettings())):
        for name, (field, _, text) in table.items():
            default = getattr(defaults, field)
            _add(parser.group(title), name, f"{text}{_default(default)}")


def _default(value: Any) -> str:
    return "" if value is None or value is False or value == () else f" (default: {value})"


def _add(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    is_flag = _type(name) is _boolean
    group.add_argument(f"--{name}", nargs="?" if is_flag else None, const="true" if is_flag else None, help=text)


def _type(name: str) -> Callable[[str], Any]:
    return RUN[name][0] if name in RUN else (SETTINGS.get(name) or LORA[name])[1]


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were set, in the file or on the command line, each of its type."""
    given: dict[str, tuple[str, Any]] = {}
    if options.config is not None:
        given = {name: (f"{options.config}: {name}", value) for name, value in _read_yaml(options.config).items()}
    for name in (*RUN, *SETTINGS, *LORA):
        if getattr(options, name) is not None:
            given[name] = (f"--{name}", getattr(options, name))
    values = {}
    for name, (where, value) in given.items():
        if name not in {*RUN, *SETTINGS, *LORA}:
            raise UsageError(f"{where}: no such option; `icl-ft-fast finetune --help` lists them")
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        try:
            values[name] = _type(name)(text)
        except ValueError as error:
            raise UsageError(f"{where}: expected {_type(name).__name__.strip('_')}, got {value!r}") from error
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UsageError(f"--config: {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise UsageError(f"--config: {path}: expected `option: value` lines")
    for name, value in read.items():  # aliases within aliases would be longer than memory once written out
        if any(isinstance(part, list | dict) for part in (value if isinstance(value, list) else [value])):
            raise UsageError(f"--config: {path}: {name}: expected a value or a list of values")
    return {str(name): value for name, value in read.items() if value is not None}


def _finetune(options: argparse.Namespace) -> None:
    from transformers.utils import logging

    given = _given(options)
    for name in ("model_name_or_path", "train_file", "output_dir"):
        if name not in given:
            raise UsageError(f"--{name}: needed, here or in --config")
    examples, validation = read_examples(given["train_file"]), []
    seed = given.get("seed", 0)
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
            trust_remote_code=given.get("trust_remote_code", False),
        )
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
            ),
        )
        if distributed.place()[0] == 0:
            print(f"{len(tuned.losses)} steps, last loss {tuned.losses[-1]:.4f}. Written to {out}")


def _settings(given: dict[str, Any], num_examples: int) -> FinetuneSettings:
    ours = {field: given[name] for name, (field, *_) in SETTINGS.items() if name in given}
    lora = {field: given[name] for name, (field, *_) in LORA.items() if name in given}
    if lora and not given.get("use_peft"):
        raise UsageError(f"--{next(name for name in LORA if name in given)}: goes with --use_peft")
    if lora.get("target_modules") == ("all-linear",):
        lora["target_modules"] = "all-linear"
    settings = FinetuneSettings(**ours, lora=LoraSettings(**lora) if given.get("use_peft") else None)
    if "num_train_epochs" not in given:
        return settings
    if "max_steps" in given or settings.splitting != "none":
        raise UsageError("--num_train_epochs: goes neither with --max_steps nor with --splitting; give max_steps")
    per_step = settings.batch_size * settings.gradient_accumulation_steps * distributed.num_launched()
    return replace(settings, steps=math.ceil(given["num_train_epochs"] * num_examples / per_step))
