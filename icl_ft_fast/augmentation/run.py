"""Ask a generator for augmentations: what is stored already is not asked again, and a price bounds what is."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from icl_ft_fast.augmentation.generators import Engine, Generator
from icl_ft_fast.augmentation.prompts import MAX_NEW_TOKENS, TEMPERATURE, Ask, AugmentError, Prompting, fitting
from icl_ft_fast.augmentation.steps import Augmentation, Augmented, parse
from icl_ft_fast.augmentation.store import Answer, Store
from icl_ft_fast.engine.generate import Sampling
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model, load_same
from icl_ft_fast.runtime.durable import ResultJournal, digest
from icl_ft_fast.runtime.executors import Executor, Job, Worker
from icl_ft_fast.tasks.task import Document

PromptJob: TypeAlias = tuple[Ask, Sampling]

SAMPLES_APART = 1_000_003  # seeds between the samples of a prompt, so that neighbouring seeds of a study share no draw


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    prompt_usd: float = 0.0
    completion_usd: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars."""
        return (prompt_tokens * self.prompt_usd + completion_tokens * self.completion_usd) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What is still to be done: answers, their tokens at most, dollars at most, seconds at most if a rate is known."""

    stored: int
    answers: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    seconds: float | None


@dataclass(frozen=True)
class Answering:
    """A worker that answers lists of jobs."""

    generator: Generator

    def __call__(self, jobs: Sequence[PromptJob]) -> list[tuple[int, dict[str, Any]]]:
        """(index, fields of what was written) of each answer."""
        return [(i, asdict(written)) for i, written in self.generator.answer(jobs)]


@dataclass(frozen=True)
class AnsweringElsewhere:
    """Makes an Answering in another process, by the model that load_same() gives there."""

    name: str
    loading: dict[str, Any]
    fingerprint: str
    is_chat: bool

    def __call__(self) -> Answering:
        """Load, check, make."""
        return Answering(Engine(load_same(self.name, self.loading, self.fingerprint), self.is_chat))


class Run:
    """Prompts, their sampling, who answers them and where answers are kept.

    Args:
        prompting: the strategy and its template.
        asks: from prompts().
        generator: see generators.
        sampling: of each answer; that of sample n has the seed sampling.seed + n * SAMPLES_APART.
        folder: where answers are kept; None for in memory alone.
    """

    def __init__(
        self,
        prompting: Prompting,
        asks: Sequence[Ask],
        generator: Generator,
        sampling: Sampling,
        folder: Path | None = None,
    ) -> None:
        self.prompting, self.generator, self.folder = prompting, generator, folder
        self.jobs = [(ask, replace(sampling, seed=sampling.seed + ask.sample * SAMPLES_APART)) for ask in asks]
        how = {name: value for name, value in asdict(sampling).items() if name != "seed"}
        self.identity = {
            "strategy": prompting.strategy,
            "template_sha256": prompting.digest,
            "template": prompting.source,
            "generator": generator.fingerprint,
            "sampling": how,
        }
        self.store = Store(folder, self.identity)

    def missing(self) -> list[tuple[str, PromptJob]]:
        """(key, job) of the answers that are not stored."""
        return [(key, job) for job in self.jobs if (key := _key(*job)) not in self.store.answers]

    def estimate(self, price: Price, limit: int | None = None) -> Estimate:
        """What collect() would ask for at most; seconds at the rate of the answers stored here."""
        jobs = [job for _, job in self.missing()[:limit]]
        prompt_tokens = sum(self.generator.prompt_tokens(ask.prompt) for ask, _ in jobs)
        completion_tokens = sum(sampling.max_new_tokens for _, sampling in jobs)
        times = [answer.time for answer in self.store.answers.values()]
        elapsed_s = max(times, default=0) - min(times, default=0)
        return Estimate(
            stored=len(self.store.answers),
            answers=len(jobs),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            usd=price.of(prompt_tokens, completion_tokens),
            seconds=elapsed_s / (len(times) - 1) * len(jobs) if elapsed_s else None,
        )

    def collect(
        self,
        *,
        price: Price | None = None,
        limit: int | None = None,
        max_usd: float | None = None,
        progress: bool = False,
    ) -> None:
        """Ask for the answers that are missing, each stored as it comes.

        Args:
            price: of the tokens.
            limit: the most answers to ask for.
            max_usd: the most that all stored answers together may cost: a request is made only if its prompt and its
                longest answer fit what is left.
            progress: show a bar of answers.

        Raises:
            AugmentError, GenerateError: what the generator raises; what came before is stored.
        """
        price, missing = price or Price(), self.missing()[:limit]
        with tqdm(total=len(missing), desc="augmenting", unit="answer", disable=not progress, delay=1) as bar:
            while missing:
                spent = sum(price.of(a.prompt_tokens, a.completion_tokens) for a in self.store.answers.values())
                count = 0
                for _, (ask, sampling) in missing:
                    spent += price.of(self.generator.prompt_tokens(ask.prompt), sampling.max_new_tokens)
                    if max_usd is not None and spent > max_usd:
                        break
                    count += 1
                batch, missing = missing[:count], missing[count:]
                if not batch:
                    return
                for jobs in self._together(batch):
                    for i, written in self.generator.answer([job for _, job in jobs]):
                        key, (_, sampling) = jobs[i]
                        if key not in self.store.answers:
                            self.store.append(Answer(key, seed=sampling.seed, time=time.time(), **asdict(written)))
                            bar.update()

    def collect_by(self, executor: Executor, start: Callable[[], Worker]) -> bool:
        """Ask for all answers that are missing where an executor's workers are, in the same calls as collect() makes.

        Args:
            executor: who does it.
            start: makes an Answering of this run's generator.

        Returns:
            Whether this process is the one that goes on, with all answers.
        """
        size = self.generator.together or 1
        batches, done = [], set()
        for first in range(0, len(self.jobs), size):
            jobs = self.jobs[first : first + size]
            keys = [_key(*job) for job in jobs]
            batches.append(Job(digest(keys), jobs, len(jobs), str(first)))
            if all(key in self.store.answers for key in keys):
                done.add(batches[-1].name)
        for batch, answers in executor.run(start, batches, done):
            for i, written in answers:
                ask, sampling = batch.work[i]
                if (key := _key(ask, sampling)) not in self.store.answers:
                    self.store.append(Answer(key, seed=sampling.seed, time=time.time(), **written))
        if not executor.is_last():
            return False
        self.store = Store(self.folder, self.identity)
        return True

    def _together(self, batch: list[tuple[str, PromptJob]]) -> Iterator[list[tuple[str, PromptJob]]]:
        """The batch in calls of the generator; where rounding depends on company, with what is stored of each call."""
        size = self.generator.together
        if size is None:
            yield batch
            return
        asked = {key for key, _ in batch}
        keyed = [(_key(*job), job) for job in self.jobs]
        for first in range(0, len(keyed), size):
            block = keyed[first : first + size]
            if any(key in asked for key, _ in block):
                yield [(key, job) for key, job in block if key in asked or key in self.store.answers]

    def read(self) -> Augmented:
        """The rows of the stored answers, in the order of the prompts; prompts without an answer are counted."""
        rows: list[Augmentation] = []
        dropped = {"unanswered": 0, "unparsed": 0, "repeats": 0}
        described = {name: value for name, value in self.identity.items() if name != "template"}
        for ask, sampling in self.jobs:
            answer = self.store.answers.get(_key(ask, sampling))
            if answer is None:
                dropped["unanswered"] += 1
                continue
            found, unparsed, repeats = parse(self.prompting.strategy, ask.told, answer.text)
            dropped["unparsed"] += unparsed
            dropped["repeats"] += repeats
            facts = {name: value for name, value in asdict(answer).items() if name != "text"}
            origin = described | facts | {"source_ids": list(ask.source_ids)}
            rows += (Augmentation(ask.source_ids[0], kind, text, origin) for kind, text in found)
        return Augmented(tuple(rows), dropped)


def _key(ask: Ask, sampling: Sampling) -> str:
    """What an answer is stored under, beside what its Store stands for."""
    return sha256(f"{sampling.seed}\n{ask.sample}\n{ask.id}\n{ask.prompt}".encode()).hexdigest()


def prompts(
    prompting: Prompting,
    documents: Sequence[Document],
    generator: Generator,
    max_new_tokens: int,
    *,
    samples: int = 1,
    among: Callable[[int], Sequence[Document]] | None = None,
    most: int | None = None,
    seed: int = 0,
) -> tuple[list[Ask], Sequence[Document]]:
    """The prompts about the documents and, in the global strategy, the documents that the first samples show.

    Each sample shows a selection and an order of its own: what a model overlooks in one context it finds in another.

    Args:
        prompting: the strategy and its template.
        documents: to ask about.
        generator: who will be asked; what our engine's model has no positions for is not shown.
        max_new_tokens: of an answer.
        samples: answers to each, in turn.
        among: documents to show, by seed; None for those asked about, as they are and then in other orders.
        most: of them; None for all.
        seed: of the first samples' selection; see SAMPLES_APART for the others'.

    Raises:
        AugmentError: a template that fails on a document, or not one document fits.
    """
    room = generator.model.max_positions if isinstance(generator, Engine) else None
    longest = sorted(documents, key=lambda document: len(document.text), reverse=True)[:1]

    def fits(selected: Sequence[Document]) -> bool:
        (ask,) = prompting.asks(longest, selected)
        count = generator.prompt_tokens(ask.prompt) + max_new_tokens if room else 0
        return len(selected) <= (most or len(selected)) and count <= (room or 0)

    def mixed(drawn: int) -> Sequence[Document]:
        return documents if drawn == seed else random.Random(drawn).sample(documents, len(documents))

    shown: list[Sequence[Document]] = [()] * samples
    if prompting.strategy == "global" and documents:
        draws = [seed + n * SAMPLES_APART for n in range(samples)]
        shown = [fitting((among or mixed)(drawn), fits, drawn) for drawn in draws]
    asked = [[replace(ask, sample=n) for ask in prompting.asks(documents, shown[n])] for n in range(samples)]
    return [ask for asks in zip(*asked, strict=True) for ask in asks], shown[0]


@dataclass(frozen=True)
class Part:
    """Prompts that the engine answers in one call.

    Attributes:
        name: a digest of all that decides the answers.
        prompting, asks, sampling: as in Run.
    """

    name: str
    prompting: Prompting
    asks: tuple[Ask, ...]
    sampling: Sampling

    def write(self, model: Model, ledger: Ledger, *, progress: bool = False) -> dict[str, Any]:
        """The rows of the answers, what was dropped, and what it took, all that is in `ledger` then."""
        with ledger.phase("filter"):  # all but the phase "generate" within it
            run = Run(self.prompting, self.asks, Engine(model, ledger=ledger), self.sampling)
            run.collect(progress=progress)
            made = run.read()
        return {"rows": [asdict(row) for row in made.rows], "dropped": made.dropped, "counts": ledger.as_dict()}


def parts_of(
    model: Model,
    documents: Sequence[Document],
    strategy: str = "local",
    *,
    samples: int = 1,
    among: Callable[[int], Sequence[Document]] | None = None,
    seed: int = 0,
    key: str = "",
) -> list[Part]:
    """What a model is asked to write about documents, call by call (Lampinen et al. 2025, section 2.2).

    Args:
        model: a base model: it gets the strategy's prompts for those.
        documents: to augment.
        strategy: a key of LABELS.
        samples: answers about each document.
        among: global: the documents in context, see prompts().
        seed: global: of the draws, and of the documents in context.
        key: of the model, under which the parts are named together with their prompts and sampling.

    Raises:
        AugmentError: an unknown strategy, or several samples of one that is greedy.
    """
    prompting = Prompting.of(strategy)
    if samples > 1 and not TEMPERATURE[strategy]:
        raise AugmentError(f"samples: the strategy {strategy} is greedy, {samples} answers would be all alike")
    sampling = Sampling(MAX_NEW_TOKENS[strategy], TEMPERATURE[strategy], stop=("\n\n",), seed=seed)
    asks, _ = prompts(
        prompting, documents, Engine(model), sampling.max_new_tokens, samples=samples, among=among, seed=seed
    )
    found = []
    for first in range(0, len(asks), Engine.together):
        call = tuple(asks[first : first + Engine.together])
        name = digest(key, prompting.digest, asdict(sampling), [(ask.id, ask.sample, ask.prompt) for ask in call])
        found.append(Part(name, prompting, call, sampling))
    return found


def augment_by_model(
    model: Model,
    parts: Sequence[Part],
    *,
    kept: ResultJournal | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> Augmented:
    """Let the model write what it is asked for.

    Args:
        model: the one that parts_of() was given.
        parts: from parts_of().
        kept: where what was written of each is looked up and put, with what it cost.
        ledger: counts the work, as phases "generate" and "filter"; between phases.
        progress: show a bar of answers.

    Raises:
        GenerateError: a sentence or document that does not fit the model's positions with its prompt.
    """
    kept, ledger = kept or ResultJournal(None), ledger or Ledger()
    rows: list[Augmentation] = []
    dropped: dict[str, int] = {}
    for part in parts:
        made = kept.once(part.name, partial(part.write, model, Ledger(meter=ledger.meter), progress=progress))
        rows += (Augmentation(**row) for row in made["rows"])
        dropped = {step: dropped.get(step, 0) + count for step, count in made["dropped"].items()}
        ledger.include(made["counts"])
    return Augmented(tuple(rows), dropped)
