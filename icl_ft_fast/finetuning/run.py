"""A fine-tuning run: prepare() reads and encodes, train() takes the steps, finish() picks the weights to return."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from icl_ft_fast.engine.flops import Work, work_of
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.finetuning import batches, distributed, lora
from icl_ft_fast.finetuning.checkpoint import Progress, RunFolder, read_state, recorded, write_folder
from icl_ft_fast.finetuning.data import EncodedExample, Example, encode
from icl_ft_fast.finetuning.distillation import read_in_context
from icl_ft_fast.finetuning.network import NetworkInTraining, recomputing
from icl_ft_fast.finetuning.optimizer import Optimizer
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings, RunOptions
from icl_ft_fast.finetuning.trackers import Trackers
from icl_ft_fast.runtime.printable import duration
from icl_ft_fast.runtime.progress import Activity
from icl_ft_fast.runtime.templates import fix_date, set_template_arguments

TIMED_STEP = 2  # whose seconds tell how long a run will take: the first one also warms up
WATCHED = "watched/"  # begins the names of watched figures in the log


class InTraining(Protocol):
    """What a run trains: a network, or slots before a frozen one.

    Attributes:
        network: has the weights that take gradients.
        objective: the loss of a batch; see network.Objective.
        passes: forwards that a step's matrix products are worth.
        rows_before: keys and values that every row sees beside those of its batch.
    """

    network: Any
    objective: torch.nn.Module
    passes: int
    rows_before: int

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it; every process must ask for it."""

    def write(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write it with these weights into a folder."""


class InterruptedRunError(FinetuneError):
    """SIGINT or SIGTERM ended the run; its last step is in a checkpoint."""

    exit_code = 130


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, adapters merged.

    Attributes:
        model: with the best weights, or the last.
        losses: mean loss per target token (nats) of each step.
        watched: figures of RunOptions.watch by step, those of a run that this one resumed included.
    """

    model: Model
    losses: tuple[float, ...]
    watched: tuple[tuple[int, dict[str, float]], ...] = ()


@dataclass(eq=False)
class RunState:
    """A run between two steps.

    Attributes:
        examples, validation: encoded; a teacher numbers the validation examples after the training examples.
        network, optimizer: what is trained, and how.
        folder: where checkpoints and metrics go.
        progress: the steps done.
        ledger: what this run has cost, in earlier processes too.
        work: the model's operations per token.
        saved_at: when the last checkpoint was written, on time.perf_counter()'s clock.
    """

    settings: FinetuneSettings
    seed: int
    options: RunOptions
    examples: list[EncodedExample]
    validation: list[EncodedExample]
    network: InTraining
    optimizer: Optimizer
    folder: RunFolder
    progress: Progress
    trackers: Trackers
    ledger: Ledger
    work: Work
    saved_at: float = field(default_factory=time.perf_counter)

    @property
    def examples_per_step(self) -> int:
        """Examples of a step, in all processes."""
        settings = self.settings
        return settings.batch_size * settings.gradient_accumulation_steps * distributed.place()[1]

    @property
    def epoch(self) -> float:
        """How often the steps done have gone through all examples."""
        return self.progress.step * self.examples_per_step / len(self.examples)

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or the validation loss has stopped falling."""
        progress, patience = self.progress, self.settings.early_stopping_patience
        if progress.step >= self.settings.steps:
            return True
        if patience is None or progress.best is None:
            return False
        return sum(step > progress.best[1] for _, step in progress.evaluations) >= patience

    @property
    def resumable(self) -> str:
        """The end of an error message: which checkpoint can be resumed, if any."""
        steps = self.folder.steps()
        return f"; checkpoint-{steps[-1]} is complete and can be resumed" if steps else ""


def finetune(
    model: Model,
    examples: Sequence[str | Example],
    settings: FinetuneSettings | None = None,
    *,
    seed: int = 0,
    validation: Sequence[str | Example] = (),
    teacher_context: str | None = None,
    options: RunOptions | None = None,
    ledger: Ledger | None = None,
) -> Finetuned:
    """Train a copy of a model on examples and return it.

    The loss is the mean negative log-likelihood (nats) over the target tokens of a step: every token of each example
    and the end-of-sequence token after it, or with `settings.completion_only` those of completions alone.

    Args:
        model: from load(); bfloat16 weights are trained through float32 copies.
        examples: texts, or what read_examples() returns; each epoch takes all of them in a fresh seeded order.
        settings: what is learned and how, see FinetuneSettings.
        seed: of the order of examples, of LoRA's initial weights and of its dropout.
        validation: examples whose loss is measured every settings.eval_steps; the weights with the lowest are returned.
        teacher_context: context distillation: minimise the KL divergence to what the untrained model predicts with
            this text before each example, instead of the examples' negative log-likelihood.
        options: where the run saves, whether it resumes and what it shows, see RunOptions.
        ledger: the run's cost is added to it, that of processes it was resumed from included, checkpoints excluded.

    Returns:
        The fine-tuned model, in its own dtype, and the loss of each step.

    Raises:
        FinetuneError: examples, settings or files that do not fit, too little memory, or a loss that is not finite.
            The last checkpoint stays complete in every case.
        InterruptedRunError: SIGINT or SIGTERM arrived and there is an output_dir.

    Deterministic: on a CPU equal bits for equal arguments and threads, interrupted and resumed or not. The network's
    own dropout stays off: examples that share tokens of the prefix tree could not have masks of their own. Under
    torchrun every process calls this with equal arguments (distributed.py).

    Examples:
        >>> texts = ["femp are more dangerous than glon.", "zota are wider than femp."]
        >>> tuned = iff.finetune(iff.load("shipped"), texts, iff.FinetuneSettings(steps=2, batch_size=2))
        >>> len(tuned.losses)
        2
    """
    ledger = Ledger() if ledger is None else ledger
    state = prepare(
        model,
        examples,
        settings or FinetuneSettings(),
        seed=seed,
        validation=validation,
        teacher_context=teacher_context,
        options=options or RunOptions(),
        ledger=Ledger(meter=ledger.meter),
    )
    train(state)
    ledger.include(state.ledger.as_dict())
    return finish(state)


def prepare(
    model: Model,
    examples: Sequence[str | Example],
    settings: FinetuneSettings,
    *,
    seed: int,
    validation: Sequence[str | Example],
    teacher_context: str | None,
    options: RunOptions,
    ledger: Ledger,
) -> RunState:
    """The run before its next step: the first one, or the one after the last checkpoint; see finetune()."""
    _check(settings, options, has_validation=bool(validation), has_teacher=teacher_context is not None)
    path = None if options.output_dir is None else Path(options.output_dir)
    date = settings.template_date or (recorded(path, "template_date") if path and options.resume else None)
    settings = replace(settings, template_date=fix_date(model.tokenizer, date))
    if settings.chat_template_kwargs is not None:  # a study has set its own
        set_template_arguments(model.tokenizer, settings.chat_template_kwargs)
    encode_all = partial(
        encode,
        model.tokenizer,
        max_positions=model.max_positions,
        splitting=settings.splitting,
        completion_only=settings.completion_only,
    )
    encoded, held = encode_all(examples), encode_all(validation) if validation else []
    rank, processes = distributed.place()
    origin = {"seed": seed, "teacher_context": teacher_context, "examples": _digest([*encoded, *held])}
    origin["model"] = "" if path is None else model.fingerprint()
    origin = asdict(settings) | origin | {"processes": processes}
    folder = RunFolder(path, origin, resume=options.resume, is_writer=rank == 0)
    progress = folder.restore() if options.resume else Progress()
    checkpoint = folder.folder(progress.step) if progress.step else None
    teacher = None
    if teacher_context is not None:
        with ledger.phase("teach"):
            teacher = read_in_context(model, [*encoded, *held], teacher_context, ledger=ledger)
    if checkpoint is not None:  # its counts include the teacher's reading
        ledger = Ledger(meter=ledger.meter)
        ledger.include(progress.counts)
    network = NetworkInTraining(
        model, settings, seed, teacher=teacher, in_place=options.in_place, checkpoint=checkpoint
    )
    optimizer = Optimizer(network.network, settings)
    if checkpoint is not None:
        optimizer.load(read_state(checkpoint))
    trackers = Trackers(settings.report_to if rank == 0 else (), path, folder.origin)
    return RunState(
        settings=settings,
        seed=seed,
        options=options,
        examples=encoded,
        validation=held,
        network=network,
        optimizer=optimizer,
        folder=folder,
        progress=progress,
        trackers=trackers,
        ledger=ledger,
        work=work_of(model),
    )


def _check(settings: FinetuneSettings, options: RunOptions, *, has_validation: bool, has_teacher: bool) -> None:
    if options.output_dir is None and (has_validation or settings.fsdp or options.resume):
        raise FinetuneError("output_dir: required for validation, for fsdp and for resuming")
    if options.in_place and has_teacher:
        raise FinetuneError("in_place: a teacher must stay as it is")
    if options.checkpoint_s is not None and (
        options.output_dir is None or has_validation or settings.fsdp or distributed.place()[1] > 1
    ):
        raise FinetuneError("checkpoint_s: needs output_dir, and excludes validation and several processes")


def train(state: RunState) -> None:
    """Take the steps that are left."""
    settings, progress, rank = state.settings, state.progress, distributed.place()[0]
    order = batches.order(state.examples, state.seed, group_by_prompt=settings.group_by_prompt)
    upcoming = itertools.islice(order, progress.step * state.examples_per_step, None)
    shown = state.options.progress and rank == 0
    bar = Activity("fine-tuning", total=settings.steps, unit="step", initial=progress.step, shown=shown)
    with (
        state.ledger.phase("train"),
        bar,
        _stop_requests(state.options.output_dir is not None) as request,
        recomputing(state.network.network, settings.gradient_checkpointing),
        _naming_out_of_memory(state),
    ):
        while not state.is_over:
            loss, is_stopping = _advance(state, list(itertools.islice(upcoming, state.examples_per_step)), request)
            is_best = _evaluate_if_due(state)
            _watch_if_due(state)
            if state.options.output_dir is not None and (is_stopping or _is_checkpoint_due(state, is_best)):
                with state.ledger.phase(None):
                    save(state)
            bar.update()
            bar.note(loss=f"{loss:.3f}")
            if state.options.on_step is not None:
                state.options.on_step(progress.step, settings.steps)
            if is_stopping:  # after the last step too: the same command then has only finish() left to do
                raise InterruptedRunError(f"interrupted after step {progress.step}{state.resumable}")
    state.trackers.close()


def _advance(state: RunState, indices: list[int], request: threading.Event) -> tuple[float, bool]:
    """Take a step on these examples and log it; returns its loss, and whether any process is asked to stop."""
    progress, start = state.progress, time.perf_counter()
    settings = state.settings
    loss, norm, num_targets = train_step(state, indices)
    rate = settings.rate(progress.step)
    loss, stop = distributed.totals([loss, request.is_set()], state.network.device)
    if not math.isfinite(loss + norm):
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        raise FinetuneError(f"step {progress.step}: {what}; lower the learning rate{state.resumable}")
    state.optimizer.step(rate)
    progress.step += 1
    progress.losses.append(loss)
    entry = {"step": progress.step, "loss": loss, "grad_norm": norm, "learning_rate": rate, "epoch": state.epoch}
    took_s = time.perf_counter() - start
    state.folder.append_metrics(entry | {"target_tokens": num_targets, "seconds": took_s})
    if progress.step == TIMED_STEP and settings.steps > 10:
        all_s = took_s * settings.steps
        state.options.tell(f"fine-tuning: {settings.steps} steps of {took_s:.2f} s take about {duration(all_s)} here")
    if progress.step % settings.logging_steps == 0:
        _log(state, entry)
    return loss, bool(stop)


def train_step(state: RunState, indices: list[int]) -> tuple[float, float, int]:
    """Gradients of a step's mean loss: (this process's part of the loss, the gradients' norm, targets of the step)."""
    (rank, processes), size = distributed.place(), state.settings.batch_size
    objective, examples = state.network.objective, state.examples
    num_targets = sum(sum(examples[i].is_target) for i in indices)
    has_dropout = state.settings.lora is not None and state.settings.lora.lora_dropout > 0
    loss = 0.0
    for first in range(rank * size, len(indices), processes * size):
        mine = indices[first : first + size]
        batch = batches.pack([examples[i] for i in mine])
        draw = hash((state.seed, state.progress.step, first))
        with lora.dropping_out(objective, draw) if has_dropout else nullcontext():
            part = objective(batch, mine) / num_targets
            (part * processes).backward()  # DDP and FSDP average gradients over the processes
        state.optimizer.gather()
        loss += part.item()
        state.ledger.trained_tokens += len(batch.tree.token)
        before = state.network.rows_before
        depth, heads = batch.tree.depth + before, len(batch.head_row)
        state.ledger.ran(state.work, depth, before, heads, passes=state.network.passes)
    return loss, state.optimizer.clip(state.settings.clip_norm), num_targets


def _evaluate_if_due(state: RunState) -> bool:
    """Log the validation loss where settings ask for it; returns whether it is the lowest so far."""
    progress, settings = state.progress, state.settings
    if not state.validation or (progress.step % settings.eval_steps and progress.step < settings.steps):
        return False
    loss = _validation_loss(state)
    _log(state, {"step": progress.step, "eval_loss": loss})
    return progress.best == (loss, progress.step)


def _watch_if_due(state: RunState) -> None:
    """Measure what the caller watches, outside of the run's costs."""
    watch, step = state.options.watch, state.progress.step
    if watch is None or (step % watch.every and step < state.settings.steps):
        return
    assert isinstance(state.network, NetworkInTraining)
    with state.ledger.phase(None):
        figures = watch.measure(state.network.student)
    _log(state, {"step": step} | {WATCHED + name: value for name, value in figures.items()})


@torch.no_grad()
def _validation_loss(state: RunState) -> float:
    """Mean loss per target token of all validation examples, in every process alike."""
    loss, held = 0.0, state.validation
    for start in range(0, len(held), state.settings.batch_size):
        part = held[start : start + state.settings.batch_size]
        first = len(state.examples) + start
        loss += state.network.objective(batches.pack(part), range(first, first + len(part))).item()
    return loss / sum(sum(example.is_target) for example in held)


def _log(state: RunState, entry: dict[str, float]) -> None:
    state.progress.log.append(entry)
    state.trackers.log(entry, state.progress.step)


def _is_checkpoint_due(state: RunState, is_best: bool) -> bool:
    if state.options.checkpoint_s is not None:
        return time.perf_counter() - state.saved_at >= state.options.checkpoint_s
    save_steps = state.settings.save_steps
    return is_best or state.is_over or (save_steps is not None and state.progress.step % save_steps == 0)


def save(state: RunState) -> None:
    """Write a checkpoint and remove old ones; every process takes part, one writes."""
    settings, progress, network = state.settings, state.progress, state.network
    progress.counts = state.ledger.as_dict()
    weights, optimizer = network.weights(), state.optimizer.state()
    state.folder.save(
        progress,
        optimizer,
        partial(network.write, weights),
        max_steps=settings.steps,
        train_batch_size=settings.batch_size,
        logging_steps=settings.logging_steps,
        eval_steps=settings.eval_steps,
        save_steps=settings.save_steps or 0,
        epoch=state.epoch,
    )
    _remove_old(state)
    distributed.wait()
    state.saved_at = time.perf_counter()


def _remove_old(state: RunState) -> None:
    best = state.progress.best
    limit = state.settings.save_total_limit if state.options.checkpoint_s is None else 1
    state.folder.prune(limit, best and best[1])


def finish(state: RunState) -> Finetuned:
    """The model with the best weights, or the last; copies their checkpoint's files into output_dir."""
    progress = state.progress
    chosen = progress.step if progress.best is None else progress.best[1]
    _remove_old(state)  # by a kill between the last checkpoint and this they are still there
    if state.options.checkpoint_s is None:
        state.folder.finish(chosen)
    is_read = state.settings.fsdp or chosen != progress.step
    named = [(int(e["step"]), {k.removeprefix(WATCHED): v for k, v in e.items() if WATCHED in k}) for e in progress.log]
    watched = tuple((step, figures) for step, figures in named if figures)
    network = state.network
    assert isinstance(network, NetworkInTraining)
    if state.options.keep is not None:
        weights = network.weights()  # every process takes part, one writes
        if distributed.place()[0] == 0:
            write_folder(Path(state.options.keep), partial(network.write, weights))
    model = network.finished(state.folder.folder(chosen) if is_read else None)
    return Finetuned(model, tuple(progress.losses), watched)


def _digest(examples: Sequence[EncodedExample]) -> str:
    return hashlib.sha256(json.dumps([(e.ids, e.is_target, e.group) for e in examples]).encode()).hexdigest()


@contextmanager
def _naming_out_of_memory(state: RunState) -> Iterator[None]:
    """Within the block running out of memory becomes a FinetuneError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError, and the CPU allocator's own RuntimeError
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        raise FinetuneError(
            f"step {state.progress.step}: out of memory; lower batch_size, or set gradient_checkpointing or lora"
            f"{state.resumable}"
        ) from error


@contextmanager
def _stop_requests(is_saved: bool) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, if the run can be saved; the second acts as usual."""
    request = threading.Event()
    before: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        request.set()
        signal.signal(number, before[number])

    if is_saved and threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
