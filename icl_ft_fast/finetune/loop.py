"""The training loop: examples through one tree a batch, target_logprob as the loss, AdamW on float32 weights."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from icl_ft_fast.engine.flops import Work, work_of
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model, from_network
from icl_ft_fast.finetune import batches, distributed, lora
from icl_ft_fast.finetune.checkpoint import Progress, RunFolder, read_state
from icl_ft_fast.finetune.data import Example, Tokens, encode
from icl_ft_fast.finetune.distillation import Teacher, read_in_context
from icl_ft_fast.finetune.optimizer import Optimizer
from icl_ft_fast.finetune.settings import FinetuneError, FinetuneSettings
from icl_ft_fast.finetune.trackers import Trackers


class InterruptedRunError(FinetuneError):
    """A run that was asked to end by SIGINT or SIGTERM; its last step is in a checkpoint."""


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, adapters merged, and the mean loss per target token (nats) of each step."""

    model: Model
    losses: tuple[float, ...]


def finetune(
    model: Model,
    texts: Sequence[str | Example],
    settings: FinetuneSettings | None = None,
    *,
    seed: int = 0,
    validation: Sequence[str | Example] = (),
    teacher_context: str | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_s: float | None = None,
    in_place: bool = False,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> Finetuned:
    """Train a copy of the model on examples, with the loss on every token and on the end of each.

    Args:
        model: from load(); bfloat16 weights are trained through float32 copies of them.
        texts: documents or read_examples(); each epoch goes through all of them in a fresh seeded order.
        settings: see FinetuneSettings.
        seed: of the order, of adapters' first weights and of their dropout.
        validation: examples whose loss is measured every eval_steps; the best checkpoint by it is what is returned.
        teacher_context: learn what the model says next with this before each example (KL), not the examples' tokens.
        output_dir: where checkpoints and metrics go, see checkpoint.py; None writes nothing.
        resume: continue from the last checkpoint in output_dir, if there is one, as if there had been no pause.
        checkpoint_s: write a checkpoint when so many seconds have passed since the last one, in its place, and none at
            the end: for who resumes from output_dir but takes the model from here. One process, no validation.
        in_place: train the model itself, which saves the memory of a copy.
        ledger: the run's counts are added to it, those of a process that it was resumed from too; checkpoints are none.
        progress: show a bar of steps with the loss.

    Returns:
        The fine-tuned model, in its own dtype, and its losses.

    Raises:
        FinetuneError: examples, settings or files that do not fit, memory that does not suffice, or a loss that is not
            finite. The last checkpoint is whole whatever happens.
        InterruptedRunError: SIGINT or SIGTERM came while there is an output_dir.

    Deterministic: on a CPU equal bits for equal arguments and threads, interrupted and resumed or not. Dropout of the
    network itself stays off: texts that share a row could not each have a mask of their own. Under torchrun each
    process calls this with equal arguments (distributed.py).
    """
    settings, ledger = settings or FinetuneSettings(), ledger or Ledger()
    masked = {"splitting": settings.splitting, "completion_only": settings.completion_only}
    examples = encode(model.tokenizer, texts, model.max_positions, **masked)  # type: ignore[arg-type]
    held = encode(model.tokenizer, validation, model.max_positions, **masked) if validation else []  # type: ignore[arg-type]
    path = None if output_dir is None else Path(output_dir)
    if path is None and (held or settings.fsdp or resume):
        raise FinetuneError("output_dir: needed for validation, for fsdp and for resuming")
    if in_place and teacher_context is not None:
        raise FinetuneError("in_place: a teacher must stay as it is")
    rank, processes = distributed.place()
    if checkpoint_s is not None and (path is None or held or settings.fsdp or processes > 1):
        raise FinetuneError("checkpoint_s: needs output_dir, and goes with neither validation nor several processes")
    origin = {"seed": seed, "teacher_context": teacher_context, "examples": _digest([*examples, *held])}
    origin["model"] = "" if path is None else model.fingerprint()
    run = RunFolder(path, asdict(settings) | origin | {"processes": processes}, resume=resume, is_writer=rank == 0)
    done, counts = run.restore() if resume else Progress(), Ledger(meter=ledger.meter)

    teacher = None
    if teacher_context is not None:
        with counts.phase("teach"):
            teacher = read_in_context(model, [*examples, *held], teacher_context, ledger=counts)
    if done.step:  # which has counted the teacher's reading already
        counts = Ledger(meter=ledger.meter)
        counts.include(done.counts)
    network = model.network if in_place else copy.deepcopy(model.network)
    adapted = None if settings.lora is None else lora.inject(network, settings.lora, seed)
    if done.step:
        _load(network, adapted, run.folder(done.step))
    tuned = from_network(network, model.tokenizer, model.name, self_check=False, memory=model.memory)
    objective = Objective(tuned, teacher)
    wrapped = distributed.wrap(objective, network, fsdp=settings.fsdp)
    optimizer = Optimizer(network, settings)
    if done.step:
        optimizer.load(read_state(run.folder(done.step)))
    trackers = Trackers(settings.report_to if rank == 0 else (), path, run.origin)

    saved = time.perf_counter()

    def save() -> None:
        """Write a checkpoint; every process takes part, one writes."""
        nonlocal saved
        done.counts = counts.as_dict()
        weights = distributed.whole_weights(adapted or network, lora.PART if adapted else "")
        state = optimizer.state()
        run.save(
            done,
            state,
            partial(_write_model, network, adapted, model.tokenizer, weights),
            max_steps=settings.steps,
            train_batch_size=settings.batch_size,
            logging_steps=settings.logging_steps,
            eval_steps=settings.eval_steps,
            save_steps=settings.save_steps or 0,
            epoch=done.step * per_step / len(examples),
        )
        run.prune(settings.save_total_limit if checkpoint_s is None else 1, done.best and done.best[1])
        distributed.wait()
        saved = time.perf_counter()

    per_step = settings.batch_size * settings.gradient_accumulation_steps * processes
    stream = itertools.islice(
        batches.order(examples, seed, group_by_prompt=settings.group_by_prompt), done.step * per_step, None
    )
    is_hidden = not progress or rank > 0
    bar = tqdm(total=settings.steps, initial=done.step, desc="fine-tuning", unit="step", disable=is_hidden, delay=1)
    work = work_of(model)
    with (
        counts.phase("train"),
        bar,
        _asked_to_end(path is not None) as asked,
        _recomputed(network, settings),
        _named(run, done),
    ):
        while done.step < settings.steps and not _is_over(done, settings):
            start = time.perf_counter()
            loss, norm, num_targets = _step(
                wrapped,
                optimizer,
                examples,
                list(itertools.islice(stream, per_step)),
                settings,
                seed,
                done.step,
                counts,
                work,
            )
            rate = settings.rate(done.step)
            loss, stop = distributed.totals([loss, asked.is_set()], model.device)
            if not math.isfinite(loss + norm):
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
                raise FinetuneError(f"step {done.step}: {what}; lower the learning rate{_resumable(run)}")
            optimizer.step(rate)
            done.step += 1
            done.losses.append(loss)
            entry = {
                "step": done.step,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": rate,
                "epoch": done.step * per_step / len(examples),
            }
            run.append_metrics(entry | {"target_tokens": num_targets, "seconds": time.perf_counter() - start})
            if done.step % settings.logging_steps == 0:
                done.log.append(entry)
                trackers.log(entry, done.step)
            is_last = done.step == settings.steps
            if held and (done.step % settings.eval_steps == 0 or is_last):
                done.log.append({"step": done.step, "eval_loss": _evaluate(wrapped, held, len(examples), settings)})
                trackers.log(done.log[-1], done.step)
                is_best = done.best == (done.log[-1]["eval_loss"], done.step)
            else:
                is_best = False
            due = settings.save_steps is not None and done.step % settings.save_steps == 0
            due = due or is_best or is_last or _is_over(done, settings)
            if checkpoint_s is not None:
                due = time.perf_counter() - saved >= checkpoint_s
            if path is not None and (due or stop):
                with counts.phase(None):
                    save()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if stop:  # in the last step too: the same command then has only the ending left to do
                raise InterruptedRunError(f"interrupted after step {done.step}{_resumable(run)}")
    ledger.include(counts.as_dict())
    trackers.close()
    chosen = done.step if done.best is None else done.best[1]
    if checkpoint_s is None:
        run.finish(chosen)
    if settings.fsdp and settings.lora is not None:
        network = lora.base(network, distributed.whole_weights(network))
        adapted = lora.inject(network, settings.lora, seed)
        _load(network, adapted, run.folder(chosen))
    elif settings.fsdp:
        network = _read(network, run.folder(chosen))
    elif chosen != done.step:
        _load(network, adapted, run.folder(chosen))
    if adapted is not None:
        network = adapted.merge_and_unload(safe_merge=True)
    network.requires_grad_(True)
    trained = from_network(
        network,
        model.tokenizer,
        model.name,
        self_check=False,
        batch_invariant=model.batch_invariant,
        memory=model.memory,
    )
    return Finetuned(trained, tuple(done.losses))


class Objective(torch.nn.Module):
    """The summed loss of a batch's targets: what is wrapped by DDP or FSDP, head included."""

    def __init__(self, model: Model, teacher: Teacher | None) -> None:
        super().__init__()
        self.network, self._model, self._teacher = model.network, model, teacher

    def forward(self, batch: batches.Batch, examples: Sequence[int]) -> torch.Tensor:
        """Nats; `examples` are the batch's, by which a teacher knows them."""
        hidden = self._model.forward_tree(batch.tree)
        if len(batch.head_row) < len(hidden):
            hidden = hidden[batch.head_row.to(hidden.device)]
        taken = batch.taken.to(hidden.device)
        if self._teacher is not None:
            row = batch.row.to(hidden.device)[taken]
            return self._teacher.divergence(hidden[row], self._model.head, examples)
        logp, _ = self._model.target_logprob(hidden, batch.row, batch.target)
        return -logp[taken].sum()


def _step(
    objective: torch.nn.Module,
    optimizer: Optimizer,
    examples: Sequence[Tokens],
    indices: list[int],
    settings: FinetuneSettings,
    seed: int,
    step: int,
    ledger: Ledger,
    work: Work,
) -> tuple[float, float, int]:
    """Gradients of a step's mean loss; returns this process's part of the loss, their norm and the step's targets."""
    (rank, processes), size = distributed.place(), settings.batch_size
    num_targets = sum(sum(examples[i].is_target) for i in indices)
    loss = 0.0
    for first in range(rank * size, len(indices), processes * size):
        mine = indices[first : first + size]
        batch = batches.pack([examples[i] for i in mine])
        with lora.dropping_out(objective, hash((seed, step, first))) if settings.lora else nullcontext():
            part = objective(batch, mine) / num_targets
            (part * processes).backward()  # gradients are averaged over the processes
        optimizer.gather()
        loss += part.item()
        ledger.trained_tokens += len(batch.tree.token)
        ledger.ran(work, batch.tree.depth, 0, len(batch.head_row), passes=3)
    return loss, optimizer.clip(settings.clip_norm), num_targets


@torch.no_grad()
def _evaluate(objective: torch.nn.Module, held: Sequence[Tokens], first: int, settings: FinetuneSettings) -> float:
    """Mean loss of the validation examples, whose indices start at `first`, in every process alike."""
    loss = 0.0
    for start in range(0, len(held), settings.batch_size):
        part = held[start : start + settings.batch_size]
        loss += objective(batches.pack(part), range(first + start, first + start + len(part))).item()
    return loss / sum(sum(example.is_target) for example in held)


def _is_over(done: Progress, settings: FinetuneSettings) -> bool:
    """Whether the validation loss has stopped falling for too long."""
    if settings.early_stopping_patience is None or done.best is None:
        return False
    return sum(step > done.best[1] for _, step in done.evaluations) >= settings.early_stopping_patience


def _digest(examples: Sequence[Tokens]) -> str:
    return hashlib.sha256(json.dumps([(e.ids, e.is_target, e.group) for e in examples]).encode()).hexdigest()


def _write_model(network: Any, adapted: Any, tokenizer: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the network with these weights, or its adapters, and the tokenizer into a folder."""
    if adapted is None:
        network.save_pretrained(folder, state_dict=weights)
    else:
        adapted.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def _load(network: Any, adapted: Any, folder: Path) -> None:
    """Give the network, or its adapters, the weights of a checkpoint."""
    if adapted is not None:
        lora.load(adapted, folder)
    else:
        network.load_state_dict(_read(network, folder).state_dict())


def _read(network: Any, folder: Path) -> Any:
    """A network of the same class and dtype with the weights of a checkpoint."""
    return type(network).from_pretrained(folder, dtype=network.dtype, use_safetensors=True)


def _resumable(run: RunFolder) -> str:
    steps = run.steps()
    return f"; checkpoint-{steps[-1]} is whole and can be resumed" if steps else ""


@contextmanager
def _named(run: RunFolder, done: Progress) -> Iterator[None]:
    """Within the block running out of memory becomes a FinetuneError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError, and the CPU allocator's own RuntimeError
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        raise FinetuneError(
            f"step {done.step}: out of memory; lower batch_size, or set gradient_checkpointing or lora{_resumable(run)}"
        ) from error


@contextmanager
def _asked_to_end(is_saved: bool) -> Iterator[threading.Event]:
    """An event set by the first SIGINT or SIGTERM, if the run can be saved; the second one acts as usual."""
    asked = threading.Event()
    before: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        asked.set()
        signal.signal(number, before[number])

    if is_saved and threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _recomputed(network: Any, settings: FinetuneSettings) -> Iterator[None]:
    """Within the block layers keep only their inputs, if asked to, and are run again in the backward."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    wanted = GradientCheckpointingLayer if settings.gradient_checkpointing else ()
    layers = [module for module in network.modules() if isinstance(module, wanted)]
    if settings.gradient_checkpointing and not layers:
        raise FinetuneError("gradient_checkpointing: this family's layers do not offer it")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
