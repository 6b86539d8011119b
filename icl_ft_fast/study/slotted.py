"""Arms that put slots before every question: keys and values that stand for the documents, see engine/slots.py."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from icl_ft_fast.augmentation.self_study import ConversationBatch, conversation_batches, write_conversations
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.compaction import compact
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.engine.slots import LABEL, key_of, slots_context
from icl_ft_fast.finetuning.prefix import SlotsRun, train_slots
from icl_ft_fast.finetuning.settings import RunOptions
from icl_ft_fast.runtime.durable import digest
from icl_ft_fast.study.amortise import Samples
from icl_ft_fast.study.arm import ArmJob, Asking, Expected, Prepared, all_documents
from icl_ft_fast.study.calibration import Calibration
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
        template=settings.template,
        tokens=prefix.conversation_tokens,
        temperature=prefix.temperature,
        seed=seed,
        key=key,
    )


def _expect_prefix(num_tokens: int, job: ArmJob, calibration: Calibration) -> Expected:
    model, settings, work = job.model, job.settings.prefix, work_of(job.model)
    batches = [batch for batch in job.batches if isinstance(batch, ConversationBatch)]
    texts = [prompt_context(model, part, job.settings.template).rstrip() for part in batches[0].parts]
    parts = encoding.encode(model.tokenizer, texts)
    found = calibration.conversing(batches[0], parts[0], num_tokens, settings)
    written = settings.conversations * found.written_tokens
    writing_s = settings.conversations * found.write_s
    per_part, own = settings.conversations / len(parts), found.tokens
    trained = settings.steps * settings.batch_size * (own + 1)
    flops = float(work.path_flops(num_tokens)[-1])
    for part in parts:  # read for the conversations and for what the teacher makes of them
        path = work.path_flops(math.ceil(len(part) + own))
        writing_s += len(batches) * calibration.read_s(part)
        flops += (1 + len(batches)) * float(path[len(part)]) + 2 * per_part * float(path[-1] - path[len(part)])
    behind = work.path_flops(math.ceil(num_tokens + own + 1))
    step_flops = settings.batch_size * float(behind[-1] - behind[num_tokens])
    teach_s = math.fsum(map(calibration.read_s, parts)) + settings.conversations * found.teach_s
    return Expected(
        slots=num_tokens,
        read_tokens=(1 + len(batches)) * sum(map(len, parts)) + settings.conversations * own + num_tokens,
        written_tokens=written,
        trained_tokens=trained,
        flops=flops + 2 * settings.steps * step_flops,
        seconds=writing_s + teach_s + settings.steps * found.step_s,
        shared=(batches[0].name, writing_s),
    )


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
