"""Which answers rest on the same facts: the clusters that statistics count as one witness."""

from __future__ import annotations

from collections.abc import Sequence

from icl_ft_fast.study.records import Run
from icl_ft_fast.study.results import QuestionsOfSeeds

Cluster = tuple[int | None, str]


def clusters_of(runs: Sequence[Run], questions: Sequence[QuestionsOfSeeds]) -> dict[tuple[int, str], Cluster]:
    """(seed, topic) -> its cluster: the topic, or the topic of that seed where seeds ask different questions about it.

    A generated task names its topics alike under every seed although they are other facts: what tells is the questions.
    Where a results file has no questions, a topic is one cluster under all seeds.
    """
    texts = {(seed, q.id): (q.prompt, q.choices) for some in questions for seed in some.seeds for q in some.questions}
    asked: dict[str, dict[int, set[object]]] = {}
    for run in runs:
        for answer in run.answers:
            text = (answer.question_id, texts.get((run.seed, answer.question_id)))
            asked.setdefault(answer.topic, {}).setdefault(run.seed, set()).add(text)
    found: dict[tuple[int, str], Cluster] = {}
    for topic, by_seed in asked.items():
        first = next(iter(by_seed.values()))
        is_same = all(some == first for some in by_seed.values())
        found |= {(seed, topic): (None if is_same else seed, topic) for seed in by_seed}
    return found
