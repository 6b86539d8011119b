"""Arms that put slots before every question: keys and values that stand for the documents, see engine/slots.py."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from icl_ft_fast.augmentation.self_study import (
    ConversationBatch,
    conversation_batches,
    turn_tokens,
    write_conversations,
)
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.compaction import compact
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.engine.slots import LABEL, key_of, slots_context
from icl_ft_fast.finetuning.prefix import SlotsRun, conversation_settings, train_slots
from icl_ft_fast.finetuning.settings import RunOptions
from icl_ft_fast.runtime.durable import digest
from icl_ft_fast.study.amortise import Samples
from icl_ft_fast.study.arm import ArmJob, Asking, Expected, Prepared, all_documents
from icl_ft_fast.study.calibration import SLOT_PASSES, Calibration
from icl_ft_fast.study.compaction import tokens_to_compact
from icl_ft_fast.study.costs import ArmCosts
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks.task import Task

SLOTS = "context_slots"  # the note of a run that has the number of slots before a question
STORE_BYTES = 2**40  # of a temporary folder: no limit


def compacted(ratio: int) -> Asking:
    """One slot for `ratio` tokens of the documents, by attention matching."""
    prepare, expect = partial(_prepare_compaction, ratio), partial(_expect_compaction, ratio)
    return Asking(ways_behind_slots, prepare=prepare, expect=expect, has_slots=True)


def _expect_compaction(ratio: int, job: ArmJob, calibration: Calibration) -> Expected:
    read = all_documents(job.model, job.task, job.seed, job.settings)
    token, num_slots, followers = tokens_to_compact(job.model, read.text, read.documents, ratio)
    tokens = len(token) + sum(map(len, followers))
    flops = 2 * float(work_of(job.model).path_flops(len(token))[-1])
    return Expected(num_slots, tokens, flops, calibration.compacting_s(token, num_slots, followers))


def _prepare_compaction(ratio: int, job: ArmJob, ready: Prepared) -> Prepared:
    model = ready.model
    read = all_documents(model, job.task, job.seed, job.settings)
    token, num_slots, followers = tokens_to_compact(model, read.text, read.documents, ratio)
    made = compact(model, token, num_slots, followers, ledger=job.ledger)
    notes = {
        "context_documents": len(read.documents),
        "context_tokens": len(token),
        "compaction_error": made.mean_error,
    }
    ready = replace(ready, notes=ready.notes | notes)
    return behind_slots(job, ready, read.text, made.layers, made.hidden)


def trained_prefix(num_tokens: int) -> Asking:
    """Slots of `num_tokens` tokens, trained on conversations that the model has about the documents."""
    prepare, expect = partial(_prepare_prefix, num_tokens), partial(_expect_prefix, num_tokens)
    return Asking(ways_behind_slots, prepare=prepare, batches=_conversations, has_slots=True, expect=expect)


def _conversations(
    model: Model, task: Task, seed: int, settings: StudySettings, key: str
) -> Sequence[ConversationBatch]:
    prefix = settings.prefix
    return conversation_batches(
        model,
        all_documents(model, task, seed, settings).documents,
        prefix.conversations,
        conversation_settings(prefix),
        template=settings.template,
        seed=seed,
        key=key,
    )


def _expect_prefix(num_tokens: int, job: ArmJob, calibration: Calibration) -> Expected:
    model, settings, work = job.model, job.settings.prefix, work_of(job.model)
    batches = [batch for batch in job.batches if isinstance(batch, ConversationBatch)]
    texts = [prompt_context(model, part, job.settings.template).rstrip() for part in batches[0].parts]
    parts = encoding.encode(model.tokenizer, texts)
    count, num_documents = settings.conversations, sum(map(len, batches[0].parts))
    talk = _expect_conversations(batches, parts, job, calibration)
    own = talk.trained_tokens
    trained = settings.steps * settings.batch_size * (own + 1)
    path = work.path_flops(num_tokens + math.ceil(own) + 1)
    step_flops = settings.batch_size * (float(path[-1] - path[num_tokens]) + own * work.head_flops)
    teach_rate, step_rate = calibration.prefix_rates(parts[0], num_tokens, settings, math.ceil(own))
    teach_s, teach_flops = 0.0, float(path[num_tokens]) + count * own * work.head_flops
    for part, documents in zip(parts, batches[0].parts, strict=True):
        path = work.path_flops(len(part) + math.ceil(own))
        teach_s += calibration.read_s(part)
        teach_flops += float(path[len(part)])
        ahead = count * len(documents) / num_documents * (float(path[-1] - path[len(part)]) + own * work.head_flops)
        teach_s, teach_flops = teach_s + ahead * teach_rate, teach_flops + ahead
    train_flops = SLOT_PASSES * settings.steps * step_flops
    return Expected(
        slots=num_tokens,
        read_tokens=talk.read_tokens + sum(map(len, parts)) + count * own + num_tokens,
        written_tokens=talk.written_tokens,
        trained_tokens=trained,
        flops=talk.flops + teach_flops + train_flops,
        seconds=talk.seconds + teach_s + train_flops * step_rate,
        shared=(batches[0].name, talk.seconds),
    )


def _expect_conversations(
    batches: Sequence[ConversationBatch], parts: Sequence[list[int]], job: ArmJob, calibration: Calibration
) -> Expected:
    """What writing conversations takes; `trained_tokens` are those of a whole conversation."""
    model, work, first = job.model, work_of(job.model), batches[0]
    decoding = calibration.conversing(first, parts[0])
    turn, _ = decoding.reply(first.tokens)
    starts = [start.text for start in first.beginnings()]
    begun = fmean(map(len, encoding.encode(model.tokenizer, starts, bos=False)))
    between, message = turn_tokens(model, first)
    asks = 0 if first.is_small else 1  # whether the model writes the message
    read = written = flops = seconds = 0.0
    for batch in batches:
        asking = batch.count / 2 if batch.template == "chat" else 0.0  # these go on for two turns more
        calls = 2 + asks if asking else 1  # each reads the documents
        ahead = batch.count * begun + asking * (begun + turn + between + message)
        ahead += asking * asks * (begun + 2 * turn + between)
        replies = batch.count + (1 + asks) * asking
        read += calls * sum(map(len, parts)) + ahead
        written += replies * turn
        for part, documents in zip(parts, batch.parts, strict=True):
            path = work.path_flops(len(part) + 1)
            one, share = float(path[-1] - path[-2]), len(documents) / sum(map(len, batch.parts))
            flops += calls * float(path[-2]) + share * (ahead * one + replies * turn * (one + work.head_flops))
            seconds += calls * calibration.read_s(part) + calibration.read_s(part, share * ahead * one)
        seconds += decoding.seconds(batch.count, batch.tokens)
        seconds += (1 + asks) * decoding.seconds(asking, batch.tokens) if asking else 0.0
    asked = turn if asks else message
    own = begun + turn + ((asked + turn + between) / 2 if first.template == "chat" else 0.0)
    return Expected(read_tokens=read, written_tokens=written, trained_tokens=own, flops=flops, seconds=seconds)


def _prepare_prefix(num_tokens: int, job: ArmJob, ready: Prepared) -> Prepared:
    model, checkpoints, template = ready.model, job.workspace.checkpoints, job.settings.template
    read = all_documents(model, job.task, job.seed, job.settings)
    batches = [batch for batch in job.batches if isinstance(batch, ConversationBatch)]
    conversations = write_conversations(
        model, batches, journal=job.workspace.journal, ledger=job.ledger, progress=job.progress
    )
    (token,) = encoding.encode(model.tokenizer, [read.text.rstrip()])
    parts = [prompt_context(model, part, template) for part in batches[0].parts]
    made = train_slots(
        model,
        SlotsRun(token[:num_tokens], parts, conversations, job.settings.prefix, job.seed),
        options=RunOptions(
            output_dir=checkpoints and checkpoints / job.key,
            resume=checkpoints is not None,
            checkpoint_s=None if checkpoints is None else job.workspace.checkpoint_s,
            progress=job.progress,
            on_step=job.workspace.progress.step,
        ),
        ledger=job.ledger,
    )
    teacher = job.ledger.phases["teach"]
    notes = {
        "context_documents": len(read.documents),
        "context_tokens": len(token),
        "conversations": len(conversations),
        "teacher_sharing": teacher.request_tokens / teacher.forwarded_tokens,
        "final_loss": made.losses[-1],
    }
    ready = replace(ready, notes=ready.notes | notes, losses=made.losses)
    return behind_slots(job, ready, read.text, made.layers, made.hidden)


def behind_slots(
    job: ArmJob,
    ready: Prepared,
    text: str,
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]],
    hidden: torch.Tensor,
) -> Prepared:
    """The arm with slots in place of a text: saved in the study's store, or in a temporary folder without one."""
    model, num_slots = ready.model, len(next(iter(layers.values()))[0])
    key, token = key_of(model, digest(job.key, "slots"), num_slots)
    folder = tempfile.TemporaryDirectory() if job.workspace.store is None else None
    store = job.workspace.store or ContextStore(Path(folder.name if folder else ""), model, STORE_BYTES)
    store.add(slots_context(model, layers, hidden, token), f"{LABEL}{key}")
    tail = text[len(text.rstrip()) :]
    notes = ready.notes | {SLOTS: num_slots}
    return replace(ready, context=key + tail, store=store, notes=notes, folder=folder)


def ways_behind_slots(title: str, costs: ArmCosts) -> dict[str, Samples]:
    """The slots are made once and lie in a file, which is read for each batch of queries or stays in memory."""
    point, setup = costs.point(costs.note(SLOTS)), costs.setup
    if point is None or setup is None or (query := costs.query(point)) is None:
        return {}
    load = costs.of_seconds(point.load_s)
    return {title: Samples(setup, load, query, max(float(costs.batch), costs.cache_lifetime))}
