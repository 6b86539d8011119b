"""`icl-ft-fast finetune`: one model on a file of examples, under TRL's names, from the command line or a YAML file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icl_ft_fast.cli.options import OUTPUT, Commands, UsageError, command
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


@dataclass(frozen=True)
class _Option:
    """An option under TRL's name where it has one.

    Attributes:
        parse: what reads its text.
        help: what it says, default excluded.
        sets: the class of settings it sets a field of, if any.
        field: that field, where it is not called like the option.
    """

    parse: Callable[[str], Any]
    help: str
    sets: Callable[[], FinetuneSettings | LoraSettings] | None = None
    field: str = ""


def _training(parse: Callable[[str], Any], help: str, field: str = "") -> _Option:
    return _Option(parse, help, FinetuneSettings, field)


def _lora(parse: Callable[[str], Any], help: str, field: str = "") -> _Option:
    return _Option(parse, help, LoraSettings, field)


GROUPS: dict[str, dict[str, _Option]] = {
    "model": {
        "model_name_or_path": _Option(str, "checkpoint directory, hub id, or 'shipped' (required)"),
        "bf16": _Option(_boolean, "hold the weights in bfloat16 and train them through float32 copies"),
        "trust_remote_code": _Option(_boolean, "run the checkpoint's own Python code"),
    },
    "data": {
        "train_file": _Option(
            Path, "JSON lines with text, prompt and completion, messages, or alpaca's or sharegpt's fields (required)"
        ),
        "validation_file": _Option(Path, "JSON lines; the checkpoint with the lowest loss on them is the result"),
        "validation_split": _Option(float, "fraction of train_file to hold out for validation, without a file"),
        "splitting": _training(
            str,
            "what becomes an example: each text (none), each sentence (independent), each sentence after all"
            " before it (cumulative)",
        ),
        "completion_only_loss": _training(
            _boolean, "take the loss on completions and assistant turns only", "completion_only"
        ),
        "group_by_prompt": _training(_boolean, "keep examples of one prompt together, which forwards it once"),
    },
    "training": {
        "max_steps": _training(int, "optimizer steps", "steps"),
        "num_train_epochs": _Option(float, "passes over train_file, instead of max_steps"),
        "per_device_train_batch_size": _training(int, "examples per forward in each process", "batch_size"),
        "gradient_accumulation_steps": _training(int, "forwards per optimizer step"),
        "learning_rate": _training(float, "learning rate after warm-up"),
        "lr_scheduler_type": _training(str, "schedule: constant, constant_with_warmup, linear or cosine"),
        "warmup_steps": _training(int, "steps over which the learning rate rises"),
        "weight_decay": _training(float, "AdamW's weight decay, on every weight"),
        "adam_beta1": _training(float, "AdamW's beta1"),
        "adam_beta2": _training(float, "AdamW's beta2"),
        "adam_epsilon": _training(float, "AdamW's epsilon"),
        "max_grad_norm": _training(float, "largest norm of the gradients; larger ones are scaled down", "clip_norm"),
        "optim": _training(str, "optimizer: adamw_torch or adamw_torch_fused"),
        "seed": _Option(int, "random seed of the order, of LoRA's weights and of its dropout (default: 0)"),
        "gradient_checkpointing": _training(_boolean, "recompute layers in the backward pass to save memory"),
        "fsdp": _training(
            _boolean, "shard the weights over torchrun's processes (FSDP2) instead of copying them (DDP)"
        ),
    },
    "LoRA": {
        "use_peft": _Option(_boolean, "train LoRA adapters instead of all weights"),
        "lora_r": _lora(int, "rank", "r"),
        "lora_alpha": _lora(float, "scale of the update times its rank"),
        "lora_dropout": _lora(float, "dropout on the adapters' inputs"),
        "lora_target_modules": _lora(_names, "names that adapted modules end in, or all-linear", "target_modules"),
        "use_rslora": _lora(_boolean, "scale by the square root of the rank (rsLoRA)"),
        "use_dora": _lora(_boolean, "decompose weights into magnitude and direction (DoRA)"),
    },
    "context distillation": {
        "teacher": _Option(str, "icl: learn what the untrained model predicts with teacher_documents in context (KL)"),
        "teacher_documents": _Option(Path, "JSON lines with id and text"),
    },
    OUTPUT: {
        "output_dir": _Option(Path, "folder for checkpoints, metrics.jsonl and the final model (required)"),
        "resume_from_checkpoint": _Option(
            _boolean, "resume the run in output_dir if it has the same settings (default: true)"
        ),
        "save_steps": _training(int, "steps between checkpoints; without it only the best and the last are saved"),
        "save_total_limit": _training(int, "checkpoints retained beside the best; without it all are"),
        "eval_steps": _training(int, "steps between validation losses"),
        "early_stopping_patience": _training(int, "stop after this many validation losses without a lower one"),
        "logging_steps": _training(int, "steps between entries of trainer_state.json and of trackers"),
        "report_to": _training(_names, "trackers: tensorboard, wandb, trackio"),
        "quiet": _Option(_boolean, "no progress bar"),
    },
}
_METAVARS = {_boolean: "BOOL", int: "N", float: "X", str: "NAME", Path: "PATH", _names: "NAMES"}
OPTIONS = {name: option for group in GROUPS.values() for name, option in group.items()}


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "finetune",
        _finetune,
        "fine-tune a model, or train LoRA adapters for it, on a file of examples",
        "icl-ft-fast finetune --model_name_or_path DIR --train_file data.jsonl --output_dir out/ft --max_steps 200\n"
        "icl-ft-fast finetune --config run.yaml --learning_rate 1e-4\n"
        "torchrun --nproc-per-node 2 -m icl_ft_fast.cli finetune --config run.yaml",
    )
    help = "YAML file with any of the options below; the command line wins"
    parser.group("configuration").add_argument("--config", type=Path, metavar="FILE", help=help)
    for title, group in GROUPS.items():
        for name, option in group.items():
            default = None if option.sets is None else getattr(option.sets(), option.field or name)
            has_default = default not in (None, False, ())
            is_flag = option.parse is _boolean
            text = f"{option.help} (default: {default})" if has_default else option.help
            parser.group(title).add_argument(
                f"--{name}",
                nargs="?" if is_flag else None,
                const="true" if is_flag else None,
                metavar=_METAVARS[option.parse],
                help=text,
            )


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
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        try:
            values[name] = OPTIONS[name].parse(text)
        except ValueError as error:
            raise UsageError(f"{where}: expected {OPTIONS[name].parse.__name__.strip('_')}, got {value!r}") from error
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
            raise UsageError(f"--{name}: required, here or in --config")
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
    ours, lora = (
        {option.field or name: given[name] for name, option in OPTIONS.items() if option.sets is kind and name in given}
        for kind in (FinetuneSettings, LoraSettings)
    )
    if lora and not given.get("use_peft"):
        raise UsageError(f"--{next(name for name in GROUPS['LoRA'] if name in given)}: needs --use_peft")
    if lora.get("target_modules") == ("all-linear",):
        lora["target_modules"] = "all-linear"
    settings = FinetuneSettings(**ours, lora=LoraSettings(**lora) if given.get("use_peft") else None)
    if "num_train_epochs" not in given:
        return settings
    if "max_steps" in given or settings.splitting != "none":
        raise UsageError("--num_train_epochs: excludes --max_steps and --splitting; give max_steps")
    per_step = settings.batch_size * settings.gradient_accumulation_steps * distributed.num_launched()
    return replace(settings, steps=math.ceil(given["num_train_epochs"] * num_examples / per_step))
