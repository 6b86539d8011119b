"""Arms that put passages of the documents before each question: those that retrieval finds, or those of its source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.runtime.durable import digest
from icl_ft_fast.runtime.templates import ChatText
from icl_ft_fast.study import evaluate
from icl_ft_fast.study.amortise import Samples
from icl_ft_fast.study.arm import CONTEXT_TOKENS, ArmJob, Asking, Prepared, kept_store
from icl_ft_fast.study.costs import ArmCosts
from icl_ft_fast.study.retrieval import (
    Bm25,
    Dense,
    RetrievalError,
    Retriever,
    embedder_of,
    hit_rate,
    in_shared_order,
    retrieve,
    source_documents,
    words,
)
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks.chunks import Passage, split_documents
from icl_ft_fast.tasks.task import Document, Task


def retrieved(k: int) -> Asking:
    """The k passages that fit the question best, in the order of the documents."""
    prepare, check = partial(_prepare_retrieval, k), partial(_check_k, k)
    return Asking(ways_behind_own_context, prepare=prepare, check=check, is_kept=True, is_quick=True, ignores_seed=True)


def _check_k(k: int, task: Task) -> None:
    passages = split_documents(task.documents)
    if not any(words(passage.text) for passage in passages):
        raise RetrievalError("documents: no passage has a word, so nothing can be retrieved from them")
    if not 1 <= k <= len(passages):
        raise RetrievalError(
            f"arms: rag@{k}: expected 1 to the {len(passages)} passages of the documents; name such a number, "
            f"as in rag@{min(4, len(passages))}: rag alone is 1, 4 and 8"
        )


def _prepare_retrieval(k: int, job: ArmJob, ready: Prepared) -> Prepared:
    """Index the documents, and retrieve for the task's questions."""
    with job.ledger.phase("index"):
        passages = split_documents(job.task.documents)
        retriever = _retriever(passages, job.settings)

    def found_for(queries: Sequence[str], ledger: Ledger) -> list[tuple[int, ...]]:
        with ledger.phase("retrieve"):
            return in_shared_order(retrieve(retriever, queries, k, len(passages)))

    def before(queries: Sequence[str], ledger: Ledger) -> list[str]:
        return _contexts(ready.model, passages, found_for(queries, ledger), job.settings.template)

    prompts = [question.prompt for question in job.task.questions]
    if isinstance(retriever, Dense):  # asks an endpoint: not again after a kill
        key = digest("retrieved", job.key, retriever.fingerprint)
        kept = job.workspace.journal.once(key, lambda: found_for(prompts, job.ledger))
        found = [tuple(indices) for indices in kept]
    else:
        found = found_for(prompts, job.ledger)
    notes = {"passages": len(passages), "retriever": job.settings.retriever}
    rate = hit_rate(job.task, passages, job.task.questions, found)
    notes |= {} if rate is None else {"hit_rate": rate}
    contexts = _contexts(ready.model, passages, found, job.settings.template)
    ready = _behind(replace(ready, before=before, notes=ready.notes | notes), contexts)
    is_kept = ready.model is job.model and job.workspace.store is not None
    return _keeping(job, ready, passages, found) if is_kept else ready


def _retriever(passages: Sequence[Passage], settings: StudySettings) -> Retriever:
    texts = [passage.text for passage in passages]
    if settings.retriever == "bm25":
        return Bm25(texts)
    if settings.retriever == "dense":
        return Dense(texts, embedder_of(settings.embedding_url, settings.embedding_model))
    raise RetrievalError(f"retriever: expected bm25 or dense, got {settings.retriever!r}")


def _contexts(model: Model, passages: Sequence[Passage], found: Sequence[tuple[int, ...]], template: str) -> list[str]:
    """What stands before each question; equal sets of passages give the same text, which is made once."""
    made = {
        indices: prompt_context(model, [Document("", passages[i].text) for i in indices], template)
        for indices in set(found)
    }
    return [made[indices] for indices in found]


def _behind(ready: Prepared, contexts: Sequence[str]) -> Prepared:
    """The arm with a context for each of the task's questions."""
    once = list(dict.fromkeys(contexts))
    lengths = dict(zip(once, map(len, encoding.encode(ready.model.tokenizer, [c.rstrip() for c in once])), strict=True))
    tokens = {CONTEXT_TOKENS: round(fmean(lengths[context] for context in contexts))}
    return replace(ready, contexts=tuple(contexts), notes=ready.notes | tokens)


def _keeping(job: ArmJob, ready: Prepared, passages: Sequence[Passage], found: Sequence[tuple[int, ...]]) -> Prepared:
    """The arm with the passages that several questions begin with in the store, and how many questions those are."""
    times = Counter(indices[:n] for indices in found for n in range(1, len(indices) + 1))
    shared = [indices[: sum(times[indices[:n]] > 1 for n in range(1, len(indices) + 1))] for indices in found]
    kept = []
    begun = _contexts(ready.model, passages, shared, job.settings.template)
    for indices, context, text in zip(shared, ready.contexts or (), begun, strict=True):
        length = len(os.path.commonprefix([context, text])) if indices else 0  # noqa: RUF071
        kept.append(ChatText(context[:length]) if isinstance(context, ChatText) else context[:length])
    notes = {"kept_contexts": len(set(filter(None, kept))), "questions_behind_kept": sum(map(bool, kept))}
    return replace(ready, kept=tuple(kept), store=kept_store(job), notes=ready.notes | notes)


def _check_sources(task: Task) -> None:
    sources, ids = source_documents(task), {document.id for document in task.documents}
    for question in task.questions:
        if question.id not in sources:
            raise RetrievalError(
                f"arms: oracle: question {question.id!r} names no document (field document), and no document has its "
                "topic"
            )
        if not sources[question.id] <= ids:
            raise RetrievalError(
                f"arms: oracle: question {question.id!r}: field document: no document has the id "
                f"{question.document!r}; ids are such as {task.documents[0].id if task.documents else ''!r}"
            )


def _prepare_oracle(job: ArmJob, ready: Prepared) -> Prepared:
    """The documents that answer each question: of a topic as many as the in-context arm reads."""
    model, template = ready.model, job.settings.template
    sources, chosen = source_documents(job.task), dict[frozenset[str], str]()
    for ids in set(sources.values()):
        documents = [document for document in job.task.documents if document.id in ids]
        shown = evaluate.select_documents(documents, job.seed, per_topic=job.settings.icl_per_topic)
        chosen[ids] = prompt_context(model, shown, template)
    # A question of another task has no source here: it is asked without documents.
    nothing = prompt_context(model, [], template)
    before = lambda queries, _: [nothing] * len(queries)  # noqa: E731
    return _behind(replace(ready, before=before), [chosen[sources[q.id]] for q in job.task.questions])


ORACLE = Asking(
    lambda title, costs: ways_behind_own_context(title, costs),
    prepare=_prepare_oracle,
    check=_check_sources,
    is_quick=True,
    is_control=True,
)


def ways_behind_own_context(title: str, costs: ArmCosts) -> dict[str, Samples]:
    """Each query retrieves and reads a context of its own."""
    point, setup = costs.point(costs.note(CONTEXT_TOKENS)), costs.setup
    if point is None or setup is None or (query := costs.query(point)) is None:
        return {}
    own = costs.of_seconds([costs.query_phase_s("retrieve")])[0]
    return {title: Samples(setup, costs.reading(point), tuple(q + own for q in query), 1.0)}
