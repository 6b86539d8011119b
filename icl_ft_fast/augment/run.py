"""Ask a generator for augmentations: what is stored already is not asked again, and a price bounds what is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from icl_ft_fast.augment.generators import Engine, Generator
from icl_ft_fast.augment.prompts import MAX_NEW_TOKENS, Ask, Prompting, fitting
from icl_ft_fast.augment.steps import Augmentation, Augmented, parse
from icl_ft_fast.augment.store import Answer, Store
from icl_ft_fast.cost import Ledger
from icl_ft_fast.generate import Sampling
from icl_ft_fast.model import Model
from icl_ft_fast.tasks.task import Document


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


class Run:
    """Prompts, their sampling, who answers them and where answers are kept.

    Args:
        prompting: the strategy and its template.
        asks: from prompting.asks().
        generator: see generators.
        sampling: of each answer; sample n has the seed sampling.seed + n.
        samples: answers a prompt.
        folder: where answers are kept; None for in memory alone.
    """

    def __init__(
        self, prompting: Prompting, asks: Sequence[Ask], generator: Generator, sampling: Sampling, samples: int = 1,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.prompting, self.generator = prompting, generator
        self.jobs = [
            (replace(ask, sample=n), replace(sampling, seed=sampling.seed + n)) for ask in asks for n in range(samples)
        ]
        how = {name: value for name, value in asdict(sampling).items() if name != "seed"}
        self.identity = {
            "strategy": prompting.strategy, "template_sha256": prompting.digest, "template": prompting.source,
            "generator": generator.fingerprint, "sampling": how,
        }  # fmt: skip
        self.store = Store(folder, self.identity)

    def missing(self) -> list[tuple[str, tuple[Ask, Sampling]]]:
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
            stored=len(self.store.answers), answers=len(jobs),
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
            usd=price.of(prompt_tokens, completion_tokens),
            seconds=elapsed_s / (len(times) - 1) * len(jobs) if elapsed_s else None,
        )  # fmt: skip

    def collect(
        self, *, price: Price | None = None, limit: int | None = None, max_usd: float | None = None,
        progress: bool = False,
    ) -> None:  # fmt: skip
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
            try:
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
                    for i, written in self.generator.answer([job for _, job in batch]):
                        key, (_, sampling) = batch[i]
                        self.store.append(Answer(key, seed=sampling.seed, time=time.time(), **asdict(written)))
                        bar.update()
            finally:
                self.store.close()

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
    most: int | None = None,
    seed: int = 0,
) -> tuple[list[Ask], Sequence[Document]]:
    """The prompts about the documents and, in the global strategy, the documents that each of them shows.

    Args:
        prompting: the strategy and its template.
        documents: to ask about.
        generator: who will be asked; what our engine's model has no positions for is not shown.
        max_new_tokens: of an answer.
        most: documents to show; None for all.
        seed: of their selection where not all are shown.

    Raises:
        AugmentError: a template that fails on a document, or not one document fits.
    """
    shown: Sequence[Document] = ()
    if prompting.strategy == "global" and documents:
        longest = max(documents, key=lambda document: len(document.text))
        room = generator.model.max_positions if isinstance(generator, Engine) else None

        def fits(selected: Sequence[Document]) -> bool:
            (ask,) = prompting.asks([longest], selected)
            count = generator.prompt_tokens(ask.prompt) + max_new_tokens if room else 0
            return len(selected) <= (most or len(documents)) and count <= (room or 0)

        shown = fitting(documents, fits, seed)
    return prompting.asks(documents, shown), shown


def augment_by_model(
    model: Model,
    documents: Sequence[Document],
    strategy: str = "local",
    *,
    seed: int = 0,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> Augmented:
    """Let the model write what follows from the documents, greedily (Lampinen et al. 2025, section 2.2).

    Args:
        model: a base model: it gets the strategy's prompts for those.
        documents: to augment.
        strategy: a key of LABELS.
        seed: global: of the documents in context, where not all fit.
        ledger: counts the work, as phase "generate".
        progress: show a bar of answers.

    Raises:
        AugmentError: an unknown strategy.
        GenerateError: a sentence or document that does not fit the model's positions with its prompt.
    """
    prompting, engine = Prompting.of(strategy), Engine(model, ledger=ledger)
    sampling = Sampling(MAX_NEW_TOKENS[strategy], stop=("\n\n",))
    asks, _ = prompts(prompting, documents, engine, sampling.max_new_tokens, seed=seed)
    run = Run(prompting, asks, engine, sampling)
    run.collect(progress=progress)
    return run.read()
