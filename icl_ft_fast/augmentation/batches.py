"""Augmentation by a loaded model: its prompts, in batches that are generated one call each, and the rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from icl_ft_fast.augmentation import strategies
from icl_ft_fast.augmentation.generators import Endpoint, LocalGenerator, TextGenerator
from icl_ft_fast.augmentation.prompts import Prompt, Prompting, fitting
from icl_ft_fast.augmentation.run import SAMPLES_APART, AugmentationRun
from icl_ft_fast.augmentation.steps import without_duplicates
from icl_ft_fast.augmentation.strategy import Augmentation, Augmented, AugmentError
from icl_ft_fast.engine.generate import Sampling
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import has_chat_template
from icl_ft_fast.runtime.durable import ResultJournal, digest
from icl_ft_fast.tasks.task import Document, Task

SMALL = 1_000_000_000  # parameters from which on a chat model is asked as the papers ask
PROMPTS_PER_BATCH = 64  # where a generator does not say how many it takes in a call


def augment(
    model: Model,
    task: Task | Sequence[Document],
    strategy: str = "local",
    *,
    samples: int = 1,
    seed: int = 0,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> Augmented:
    """Statements that follow from documents, written by the model.

    Args:
        model: asked with chat prompts if its tokenizer has a chat template; the strategies rules and reverse do not
            use it.
        task: the documents, or a task with them.
        strategy: a name in augmentation.strategies: local, document, global, self-qa, rules, reverse.
        samples: replies per prompt, of a strategy that samples (global).
        seed: random seed of sampling and of what the global strategy shows.
        ledger: counts the work, as phases "generate" and "filter".
        progress: show a bar of replies.

    Returns:
        The statements, each with its source, without those of an equal text, and a count of what was dropped.

    Raises:
        AugmentError: an unknown strategy, or several samples of a greedy one.
        GenerateError: a sentence or document that does not fit the model's positions with its prompt.

    Examples:
        >>> model = iff.load("shipped")
        >>> made = iff.augment(model, [iff.Document("d", "zota are wider than blata.")])
        >>> [row.text for row in made.rows if row.kind == "rephrased"]
        ['Compared with blata, zota are wider.']
    """
    documents = task.documents if isinstance(task, Task) else task
    found = strategies.find(strategy)
    if found.infer is not None:
        made = augment_by_rule(documents, strategy)
    else:
        generator = LocalGenerator(model, is_chat=has_chat_template(model))
        batches = prompt_batches(generator, documents, strategy, samples=samples, seed=seed)
        made = augment_by_model(generator, batches, ledger=ledger, progress=progress)
    rows = without_duplicates(made.rows)
    return replace(made, rows=tuple(rows), dropped=made.dropped | {"duplicates": len(made.rows) - len(rows)})


def augment_by_rule(documents: Sequence[Document], strategy: str = "rules") -> Augmented:
    """The rows of a strategy without a model.

    Raises:
        AugmentError: an unknown strategy, or one of a model.
    """
    infer = strategies.find(strategy).infer
    if infer is None:
        raise AugmentError(f"strategy: {strategy} needs a model")
    return Augmented(tuple(infer(documents)), {"unparsed": 0, "repeats": 0})


def prompts(
    prompting: Prompting,
    documents: Sequence[Document],
    generator: TextGenerator,
    max_new_tokens: int,
    *,
    samples: int = 1,
    among: Callable[[int], Sequence[Document]] | None = None,
    most: int | None = None,
    seed: int = 0,
) -> tuple[list[Prompt], Sequence[Document]]:
    """The prompts about the documents, and the documents that the first samples show beside them, if the strategy does.

    Each sample shows a selection and an order of its own: what a model overlooks in one context it finds in another.

    Args:
        prompting: the strategy and its template.
        documents: what the prompts are about.
        generator: of the replies; documents beyond a loaded model's positions are not shown.
        max_new_tokens: of a reply.
        samples: prompts about each unit, in turn.
        among: documents to show, by seed; None for those asked about, as they are and then in other orders.
        most: limit of documents to show; None for all.
        seed: of the first samples' selection; see SAMPLES_APART for the others'.

    Raises:
        AugmentError: a template that fails on a document, or not one document fits.
    """
    room = generator.model.max_positions if isinstance(generator, LocalGenerator) else None
    longest = sorted(documents, key=lambda document: len(document.text), reverse=True)[:1]

    def fits(selected: Sequence[Document]) -> bool:
        about = prompting.prompts(longest, selected) if room else []
        count = max((generator.prompt_tokens(prompt.text) + max_new_tokens for prompt in about), default=0)
        return len(selected) <= (most or len(selected)) and count <= (room or 0)

    def mixed(drawn: int) -> Sequence[Document]:
        return documents if drawn == seed else random.Random(drawn).sample(documents, len(documents))

    shown: list[Sequence[Document]] = [()] * samples
    if prompting.strategy.shows_documents and documents:
        draws = [seed + n * SAMPLES_APART for n in range(samples)]
        shown = [fitting((among or mixed)(drawn), fits, drawn) for drawn in draws]
    made = [[replace(prompt, sample=n) for prompt in prompting.prompts(documents, shown[n])] for n in range(samples)]
    return [prompt for same in zip(*made, strict=True) for prompt in same], shown[0]


def prompting_of(strategy: str, generator: TextGenerator, template: Path | None = None) -> Prompting:
    """How a generator is asked: a model that is loaded here and has fewer than SMALL parameters, as a small one.

    Raises:
        AugmentError: see Prompting.of().
    """
    is_small = isinstance(generator, LocalGenerator) and generator.model.num_parameters < SMALL
    return Prompting.of(strategy, is_chat=generator.is_chat, template=template, is_small=is_small)


def stop_of(prompting: Prompting, generator: TextGenerator) -> tuple[str, ...]:
    """Strings that end a reply; none for a chat elsewhere, which may begin with its reasoning or an empty line."""
    return () if isinstance(generator, Endpoint) and generator.is_chat else prompting.stop


@dataclass(frozen=True)
class PromptBatch:
    """Prompts whose replies are generated in one call.

    Attributes:
        name: a digest of all that decides the replies.
        prompting, prompts, sampling: as in AugmentationRun.
    """

    name: str
    prompting: Prompting
    prompts: tuple[Prompt, ...]
    sampling: Sampling

    def generate(self, generator: TextGenerator, ledger: Ledger, *, progress: bool = False) -> dict[str, Any]:
        """The rows of the replies, what was dropped, and the work done, which is all that `ledger` holds then."""
        with ledger.phase("filter"):  # all but the phase "generate" within it
            generator = generator.counting(ledger)
            run = AugmentationRun(self.prompting, self.prompts, generator, self.sampling)
            run.collect(progress=progress)
            made = run.read()
        counted = {"prompts": made.prompts, "parsed": made.parsed, "productive": made.productive}
        rows = [asdict(row) for row in made.rows]
        return {"rows": rows, "dropped": made.dropped, "replies": counted, "counts": ledger.as_dict()}


def prompt_batches(
    generator: TextGenerator,
    documents: Sequence[Document],
    strategy: str = "local",
    *,
    samples: int = 1,
    among: Callable[[int], Sequence[Document]] | None = None,
    seed: int = 0,
    key: str = "",
    apart: bool = False,
) -> list[PromptBatch]:
    """The prompts about documents, call by call (Lampinen et al. 2025, section 2.2).

    Args:
        generator: of the replies; its prompts are those for chat models where it is one.
        documents: to augment.
        strategy: one of strategies.BY_MODEL.
        samples: replies per prompt.
        among: the documents to show, see prompts().
        seed: of sampling, and of the documents to show.
        key: of the model, under which the batches are named together with their prompts and sampling.
        apart: whether each sample of the prompts has batches of its own, the first sample's first.

    Raises:
        AugmentError: an unknown strategy, or several samples of one that is greedy.
    """
    prompting = prompting_of(strategy, generator)
    limit, temperature = prompting.strategy.max_new_tokens, prompting.strategy.temperature
    if samples > 1 and not temperature:
        raise AugmentError(f"samples: the strategy {strategy} is greedy, {samples} replies would be all alike")
    drawn = seed if temperature else 0  # greedy replies are one batch for all seeds of a study
    sampling = Sampling(limit, temperature, stop=stop_of(prompting, generator), seed=drawn)
    made, _ = prompts(prompting, documents, generator, limit, samples=samples, among=among, seed=seed)
    layers = [[prompt for prompt in made if prompt.sample == n] for n in range(samples)] if apart else [made]
    found, size = [], generator.prompts_per_call or PROMPTS_PER_BATCH
    for call in (tuple(layer[first : first + size]) for layer in layers for first in range(0, len(layer), size)):
        name = digest(key, prompting.digest, asdict(sampling), [(p.id, p.sample, p.text, p.begun) for p in call])
        found.append(PromptBatch(name, prompting, call, sampling))
    return found


def augment_by_model(
    generator: TextGenerator,
    batches: Sequence[PromptBatch],
    *,
    journal: ResultJournal | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> Augmented:
    """The rows of a generator's replies.

    Args:
        generator: the one that prompt_batches() was given.
        batches: from prompt_batches().
        journal: where the rows of each batch are looked up and put, with the work they took.
        ledger: counts the work, as phases "generate" and "filter"; between phases.
        progress: show a bar of replies.

    Raises:
        GenerateError: a sentence or document that does not fit the model's positions with its prompt.
    """
    journal, ledger = journal or ResultJournal(None), ledger or Ledger()
    rows: list[Augmentation] = []
    dropped: dict[str, int] = {}
    replies: Counter[str] = Counter()
    for batch in batches:
        made = journal.once(
            batch.name, partial(batch.generate, generator, Ledger(meter=ledger.meter), progress=progress)
        )
        rows += (Augmentation(**row) for row in made["rows"])
        dropped |= {step: dropped.get(step, 0) + count for step, count in made["dropped"].items()}
        replies.update(made["replies"])
        ledger.include(made["counts"])
    return Augmented(tuple(rows), dropped, replies["prompts"], replies["parsed"], replies["productive"])
