"""`icl-ft-fast finetune`: one model on a file of examples, under TRL's names, from the command line or a YAML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_ft_fast.cli.options import OUTPUT, Commands, command, json_object, later, path, place
from icl_ft_fast.finetuning.settings import FinetuneSettings, LoraSettings


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
        "model_name_or_path": _Option(place, "checkpoint directory, GGUF file, hub id, or 'shipped' (required)"),
        "cache": _Option(place, "folder that GGUF files are read into, once each (default: ~/.cache/icl_ft_fast)"),
        "bf16": _Option(_boolean, "hold the weights in bfloat16 and train them through float32 copies"),
        "trust_remote_code": _Option(_boolean, "run the checkpoint's own Python code"),
    },
    "data": {
        "train_file": _Option(
            path, "JSON lines with text, prompt and completion, messages, or alpaca's or sharegpt's fields (required)"
        ),
        "validation_file": _Option(path, "JSON lines; the checkpoint with the lowest loss on them is the result"),
        "validation_split": _Option(float, "fraction of train_file to hold out for validation, without a file"),
        "splitting": _training(
            str,
            "what becomes an example: each text (none), each sentence (independent), each sentence after all"
            " before it (cumulative)",
        ),
        "completion_only_loss": _training(
            _boolean, "take the loss on completions and assistant turns only", "completion_only"
        ),
        "template_date": _training(
            str, "day, YYYY-MM-DD, that a chat template writes as today's (default: that of the start)"
        ),
        "chat_template_kwargs": _training(
            json_object, "arguments of the chat template as JSON, such as '{\"enable_thinking\": false}'"
        ),
        "special_tokens": _Option(
            str, "control tokens that examples spell: text reads them as text, keep as the tokens (default: text)"
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
        "teacher_documents": _Option(path, "JSON lines with id and text"),
    },
    OUTPUT: {
        "output_dir": _Option(path, "folder for checkpoints, metrics.jsonl and the final model (required)"),
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

OPTIONS = {name: option for group in GROUPS.values() for name, option in group.items()}
_METAVARS = {
    _boolean: "BOOL",
    json_object: "JSON",
    int: "N",
    float: "X",
    str: "NAME",
    place: "NAME",
    path: "PATH",
    _names: "NAMES",
}


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "finetune",
        later("finetune", "run_finetune"),
        "fine-tune a model, or train LoRA adapters for it, on a file of examples",
        "icl-ft-fast finetune --model_name_or_path DIR --train_file data.jsonl --output_dir out/ft --max_steps 200\n"
        "icl-ft-fast finetune --config run.yaml --learning_rate 1e-4\n"
        "torchrun --nproc-per-node 2 -m icl_ft_fast.cli finetune --config run.yaml",
    )
    help = "YAML file with any of the options below; the command line wins"
    parser.group("configuration").add_argument("--config", type=Path, metavar="FILE", help=help)
    for title, group in GROUPS.items():
        add_training_options(parser.group(title), tuple(group))


def add_training_options(group: Any, names: Sequence[str]) -> None:
    """The options of these names; their values are texts, which OPTIONS has the parsers of."""
    for name in names:
        option = OPTIONS[name]
        default = None if option.sets is None else getattr(option.sets(), option.field or name)
        has_default = default not in (None, False, ())
        is_flag = option.parse is _boolean
        group.add_argument(
            f"--{name}",
            nargs="?" if is_flag else None,
            const="true" if is_flag else None,
            metavar=_METAVARS[option.parse],
            help=f"{option.help} (default: {default})" if has_default else option.help,
        )
