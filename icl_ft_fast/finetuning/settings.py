"""Settings of a run, and the learning rate of each step; knows no model and no file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.ranges import outside
from icl_ft_fast.tasks.sentences import SPLITTINGS
from icl_ft_fast.tasks.tables import silent

if TYPE_CHECKING:
    from icl_ft_fast.engine.model import Model

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
MOST_STEPS, MOST_RATE, MOST_AMOUNT = 10**9, 10.0, 1e15  # beyond them a number is a slip
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


class FinetuneError(UserError):
    """Examples or settings that do not fit, or a run that had to end; the message says why."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters in place of all weights, by peft; the names are peft's.

    Attributes:
        r: rank.
        lora_alpha: the update's scale is lora_alpha / r, or / sqrt(r) under rsLoRA.
        lora_dropout: dropout on the adapters' inputs; a token that several examples share has one mask.
        target_modules: names that adapted modules end in; "all-linear" is every linear layer but the output head; None
            is peft's choice for the model family. LoRA does not support the output head or the embeddings, because
            neither is called as a module here.
        use_rslora: rank-stabilised scale.
        use_dora: weight-decomposed adaptation.

    Raises:
        FinetuneError: a number out of range.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self, "r")
        _within(self, "lora_alpha", 0, MOST_AMOUNT, above=True)
        if not 0 <= self.lora_dropout < 1:
            raise FinetuneError(f"lora_dropout: expected 0 or more and below 1, got {self.lora_dropout}")


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune; the paper's batch size, learning rate and number of steps (section 3) by default.

    Attributes:
        steps: optimizer steps.
        batch_size: examples per forward in each process.
        gradient_accumulation_steps: forwards per step; the loss is the mean over all target tokens of the step.
        learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon: AdamW's; every weight decays.
        optim: "adamw_torch", or "adamw_torch_fused", which is faster and rounds differently.
        warmup_steps: steps over which the rate rises linearly.
        lr_scheduler_type: "constant" rises from learning_rate / warmup_steps; "constant_with_warmup", "linear" and
            "cosine" are transformers', whose first step of a warm-up has rate 0.
        clip_norm: largest norm of the gradients; larger ones are scaled down to it.
        splitting: what becomes an example: each text ("none"), each sentence ("independent"), or each sentence after
            all sentences before it ("cumulative"). The paper splits multi-sentence documents independently, except in
            the semantic benchmark's baseline; "none" is the default because a sentence that says "they" means nothing
            alone.
        completion_only: take the loss on completions and assistant turns only.
        group_by_prompt: keep examples of one prompt, and sentences of one text, together, so that a batch forwards
            their prompt once.
        gradient_checkpointing: keep each layer's input only and recompute the rest in the backward pass.
        lora: train adapters instead of all weights.
        eval_steps: steps between losses on the validation examples, if there are any.
        early_stopping_patience: stop after this many validation losses without a lower one; None never does.
        save_steps: steps between checkpoints; None saves at the lowest validation loss so far, and at the end.
        save_total_limit: checkpoints retained beside the best one; None retains all.
        logging_steps: steps between entries of trainer_state.json's log_history and of trackers; metrics.jsonl has all.
        report_to: trackers, out of tensorboard, wandb and trackio.
        template_date: YYYY-MM-DD, what a chat template that writes the date writes; None is the day the run began.
        chat_template_kwargs: arguments of the chat template, such as enable_thinking; None gives none.
        fsdp: shard weights over the processes (FSDP2) instead of copying them to each (DDP).

    Raises:
        FinetuneError: a number out of range or an unknown name.
    """

    steps: int = 500
    batch_size: int = 8
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 20
    clip_norm: float = 1.0
    splitting: str = "none"
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "constant"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_epsilon: float = 1e-8
    optim: str = "adamw_torch"
    completion_only: bool = False
    group_by_prompt: bool = False
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = None
    eval_steps: int = 50
    early_stopping_patience: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = None
    logging_steps: int = 10
    report_to: tuple[str, ...] = ()
    fsdp: bool = False
    template_date: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "eval_steps", "logging_steps"):
            _at_least_one(self, name)
        for name in ("early_stopping_patience", "save_steps", "save_total_limit"):
            if getattr(self, name) is not None:
                _at_least_one(self, name)
        _within(self, "learning_rate", 0, MOST_AMOUNT, above=True)
        _within(self, "clip_norm", 0, math.inf, above=True)  # infinity cuts nothing
        _within(self, "adam_epsilon", 0, 1, above=True)
        for name, most in (("warmup_steps", MOST_STEPS), ("weight_decay", MOST_RATE)):
            _within(self, name, 0, most)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise FinetuneError(f"{name}: expected 0 or more and below 1, got {getattr(self, name)}")
        names = (("splitting", SPLITTINGS), ("lr_scheduler_type", SCHEDULES), ("optim", OPTIMIZERS))
        for name, allowed in names:
            if getattr(self, name) not in allowed:
                raise FinetuneError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        first = 1 if self.lr_scheduler_type == "constant" else 0
        if step + first < self.warmup_steps:
            return self.learning_rate * ((step + first) / self.warmup_steps)
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.lr_scheduler_type == "linear":
            return self.learning_rate * (1 - done)
        if self.lr_scheduler_type == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate


@dataclass(frozen=True)
class Watch:
    """What is measured of a model while it is trained, apart from the training's cost.

    Attributes:
        every: steps between measurements; the last step is measured too.
        measure: figures by name, of the model as it is then.
    """

    every: int
    measure: Callable[[Model], dict[str, float]]


@dataclass(frozen=True)
class PrefixSettings:
    """How to train a prefix: conversations to write, and steps over them; see prefix.train_prefix().

    Attributes:
        conversations: that the model writes about the documents.
        conversation_tokens: the most of each of their turns.
        part_tokens: of the documents that a conversation is about; None for 512, or 128 for a chat model below 1e9
            parameters.
        temperature: of what the model writes, above 0.
        steps: optimizer steps.
        batch_size: conversations per step.
        learning_rate: AdamW's, without decay of the weights; it rises over `warmup_steps`, then falls linearly to 0.
        warmup_steps: see learning_rate.
        clip_norm: largest norm of the gradients.
        top: the likeliest tokens of the model that reads the documents, whose probabilities are learned at each place.

    Raises:
        FinetuneError: a number out of range.
    """

    conversations: int = 512
    conversation_tokens: int = 32
    part_tokens: int | None = None
    temperature: float = 0.7
    steps: int = 128
    batch_size: int = 16
    learning_rate: float = 0.1
    warmup_steps: int = 8
    clip_norm: float = 1.0
    top: int = 20

    def __post_init__(self) -> None:
        for name in ("conversations", "conversation_tokens", "part_tokens", "top"):
            if getattr(self, name) is not None:
                _at_least_one(self, name)
        if not 0 < self.temperature < math.inf:
            raise FinetuneError(f"temperature: expected a finite number above 0, got {self.temperature}")
        self.training()

    def training(self) -> FinetuneSettings:
        """The same as the settings of a training."""
        return FinetuneSettings(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            warmup_steps=self.warmup_steps,
            clip_norm=self.clip_norm,
            lr_scheduler_type="linear",
        )


@dataclass(frozen=True)
class RunOptions:
    """Where a run saves, whether it resumes and what it shows; none of it changes what is learned.

    Attributes:
        output_dir: where checkpoints and metrics go, see checkpoint.py; None writes nothing.
        resume: continue from the last checkpoint in output_dir, if there is one, as if there had been no pause.
        checkpoint_s: write a checkpoint when so many seconds have passed since the last one, replacing it, and none at
            the end: for callers who resume from output_dir but use the returned model. One process, no validation.
        keep: a folder that the trained model, or its adapters, are written to at the end; whatever is there goes.
        in_place: train the given model itself, which saves the memory of a copy.
        progress: show a progress bar with the loss.
        tell: called with a line of text: once the second step is done, how long all will take here.
        watch: see Watch; its figures are in Finetuned.watched. One process.
        on_step: called after each step with the steps done and those in all.
    """

    output_dir: str | Path | None = None
    resume: bool = False
    checkpoint_s: float | None = None
    keep: str | Path | None = None
    in_place: bool = False
    progress: bool = False
    tell: Callable[[str], None] = silent
    watch: Watch | None = None
    on_step: Callable[[int, int], None] | None = None


UNSETTLED = 0.9  # of the mean loss of the steps before: below it the last steps still learned
UNSETTLED_NATS = 0.02


def training_concerns(settings: FinetuneSettings, losses: Sequence[float]) -> list[str]:
    """What says that a finished training was too short, in sentences."""
    found, steps = [], len(losses)
    if steps <= settings.warmup_steps:
        found.append(
            f"{steps} steps are no more than the {settings.warmup_steps} of the warm-up: the learning rate was never "
            "at its height; take more steps or lower warmup_steps"
        )
    width = max(5, steps // 10)
    if steps >= 3 * width:
        before, last = (fmean(part) for part in (losses[-2 * width : -width], losses[-width:]))
        if last < min(UNSETTLED * before, before - UNSETTLED_NATS):
            found.append(
                f"the loss has not settled: {before:.3f} over steps {steps - 2 * width + 1} to {steps - width}, "
                f"{last:.3f} over the last {width}; take more steps"
            )
    return found


def _at_least_one(settings: object, name: str) -> None:
    if not getattr(settings, name) >= 1:
        raise FinetuneError(f"{name}: expected at least 1, got {getattr(settings, name)}")
    if getattr(settings, name) > MOST_STEPS:
        raise FinetuneError(f"{name}: expected at most {MOST_STEPS:,}")


def _within(settings: object, name: str, least: float, most: float, *, above: bool = False) -> None:
    value = getattr(settings, name)
    if expected := outside(value, least, most, above=above):
        raise FinetuneError(f"{name}: {expected}, got {value}")
