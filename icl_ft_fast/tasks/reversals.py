"""Simple reversals (Lampinen et al. 2025, section 3.1): comparisons of nonsense entities, tested in the other order.

From the paper: 100 facts, each a comparison of two nonsense entities in one of 28 features; each fact in 10 training
articles, a short preamble and the one sentence; the test is a forced choice between the correct reversal and the
contradicting relation. The words, features and preambles are ours, the paper's being unpublished.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from icl_ft_fast.tasks import comparisons, words
from icl_ft_fast.tasks.comparisons import PREAMBLES, Comparison, article, sample_feature
from icl_ft_fast.tasks.generator import NO_ENGLISH, Preset, TaskGenerator, TaskOption
from icl_ft_fast.tasks.task import Document, Question, Task


def simple_reversals(
    seed: int = 0,
    *,
    num_facts: int = 100,
    num_articles: int = 10,
    reversed_fraction: float = 0.0,
    exclude: Collection[str] = (),
) -> Task:
    """Generate the task; the same arguments give the same task.

    Args:
        seed: of the words, features, preambles and order of choices.
        num_facts: comparisons, each of two entities of its own.
        num_articles: documents a fact and direction; at most as many as there are preambles.
        reversed_fraction: of the facts, at least 0 and below 1, whose reversal gets articles too. The paper has none;
            arXiv 2604.04943 takes 0.4 and tests the others.
        exclude: nonsense words not to draw, see words.sample_words().

    Returns:
        `num_articles` documents a fact (twice as many where its reversal is told). Split "reversal": a sentence never
        seen, of each fact whose reversal is not told; "trained": the direction of the articles, of each fact. Two
        choices each, chance 50%. A question's topic is its fact.

    Raises:
        ValueError: `num_articles` or `reversed_fraction` out of range, or more facts than there are words.
    """
    if not 1 <= num_articles <= len(PREAMBLES):
        raise ValueError(f"num_articles: expected 1 to {len(PREAMBLES)}, got {num_articles}")
    if num_facts < 1:
        raise ValueError(f"num_facts: expected at least 1, got {num_facts}")
    if not 0 <= reversed_fraction < 1:
        raise ValueError(f"reversed_fraction: expected at least 0 and below 1, got {reversed_fraction}")
    rng = random.Random(seed)
    nouns = words.sample_words(rng, 2 * num_facts, exclude=exclude)
    facts = [Comparison(a, sample_feature(rng), b) for a, b in zip(nouns[::2], nouns[1::2], strict=True)]
    documents, questions = [], []
    for f, fact in enumerate(facts):
        for a, preamble in enumerate(rng.sample(PREAMBLES, num_articles)):
            documents.append(Document(f"fact{f}-article{a}", article(fact, preamble), topic=f"fact{f}"))
        if f < int(reversed_fraction * num_facts):
            for a, preamble in enumerate(rng.sample(PREAMBLES, num_articles)):
                text = article(fact.reversed, preamble)
                documents.append(Document(f"fact{f}-reverse{a}", text, topic=f"fact{f}-reverse"))
        else:
            questions.append(_question(rng, f"fact{f}", fact.reversed, "reversal"))
        questions.append(_question(rng, f"fact{f}", fact, "trained"))
    return Task(tuple(documents), tuple(questions))


def _question(rng: random.Random, topic: str, truth: Comparison, split: str) -> Question:
    """The true comparison against the contradicting one, in a random order."""
    claims = [truth, Comparison(truth.subject, truth.reversed.comparative, truth.object)]
    answer = rng.randrange(2)
    ordered = claims if answer == 0 else claims[::-1]
    prompt = f"{truth.subject} are"
    choices = tuple(claim.statement.removeprefix(prompt) for claim in ordered)
    return Question(f"{topic}-{split}", prompt, choices, answer, split, topic)


GENERATOR = TaskGenerator(
    simple_reversals,
    {
        "paper": Preset(NO_ENGLISH),
        "small": Preset(
            {"num_facts": 40},
            {"icl_per_topic": 1},
            {"learning_rate": 1e-3, "steps": 600, "lr_scheduler_type": "linear"},
        ),
        "reverses": Preset({"reversed_fraction": 0.4, **NO_ENGLISH}),
    },
    options=(TaskOption("facts", "num_facts", "number of facts (default: the preset's, 100 or 40)"),),
    infer=comparisons.infer,
    deny=comparisons.deny,
)
