"""What a study can show before it is run, against studies that are simulated."""

import numpy as np
import pytest

from icl_ft_fast.study.power import AGREEMENT, DIFFERENT, power_of
from icl_ft_fast.study.statistics import gap_interval
from icl_ft_fast.tasks.task import Question, Task


def task_with(topics, each, seed=0):
    questions = [
        Question(f"t{t} q{q}", f"prompt {seed if seed else ''}", (" a", " b"), 0, topic=f"t{t}")
        for t in range(topics)
        for q in range(each)
    ]
    return Task((), tuple(questions))


def shown(rng, topics, each, gap, studies):
    """How often gap_interval() lies above 0: topics lean one way by what makes answers about them agree."""
    hits = 0
    up, down = (DIFFERENT + gap) / 2, (DIFFERENT - gap) / 2
    for _ in range(studies):
        draws = rng.random((topics, each))
        of_topic = rng.random((topics, 1))
        copied = rng.random((topics, each)) < AGREEMENT**0.5  # two answers of a topic agree where both are the topic's
        value = np.where(copied, of_topic, draws)
        difference = (value < up).astype(int) - (value > 1 - down)
        low, _ = gap_interval(difference.ravel().tolist(), np.repeat(range(topics), each).tolist())
        hits += low > 0
    return hits / studies


@pytest.mark.parametrize(("topics", "each"), [(60, 1), (40, 4)])
def test_the_gap_is_shown_in_four_studies_of_five(topics, each):
    power = power_of(lambda _: task_with(topics, each), [0], 2.0)
    assert (power.answers, power.topics, power.seeds) == (topics * each, topics, 1)
    assert 0.7 < shown(np.random.default_rng(0), topics, each, power.gap_points / 100, 300) < 0.9


def test_the_answers_needed_show_that_equal_arms_are_as_good():
    needed = power_of(lambda _: task_with(50, 1), [0], 5.0).needed
    rng, hits = np.random.default_rng(0), 0
    n = round(needed)
    for _ in range(200):
        u = rng.random(n)
        difference = (u < DIFFERENT / 2).astype(int) - (u > 1 - DIFFERENT / 2)
        hits += gap_interval(difference.tolist(), range(n))[0] >= -0.05
    assert 0.7 < hits / 200 < 0.9


def test_seeds_that_ask_the_same_are_no_new_witnesses():
    same = power_of(lambda _: task_with(20, 2), [0, 1, 2], 2.0)
    others = power_of(lambda seed: task_with(20, 2, seed + 1), [0, 1, 2], 2.0)
    assert (same.answers, same.topics, others.topics) == (120, 20, 60)
    assert same.gap_points > others.gap_points
    assert same.effective < others.effective
    assert "1 more seed(s) would speak of other training runs" in others.text
    assert "seed(s) would speak" not in power_of(lambda _: task_with(20, 2), [0, 1, 2, 3], 2.0).text
    assert power_of(lambda _: Task((), ()), [0], 2.0) is None


def test_what_cannot_be_shown_is_said():
    assert "cannot be shown by any number of questions" in power_of(lambda _: task_with(9, 1), [0], 0.0).text
    enough = power_of(lambda _: task_with(900, 1), [0], 5.0)
    assert "That is enough to show that an equal arm is as good within 5 points." in enough.text
    few = power_of(lambda _: task_with(12, 2), [0], 2.0)
    assert few.needed > 1000
    assert "24 answers an arm about 12 topics, 1 seed(s)" in few.text
