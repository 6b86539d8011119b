"""Arms compared on the same questions."""

from dataclasses import replace

import pytest

from icl_ft_fast.study.clusters import clusters_of
from icl_ft_fast.study.evaluate import (
    Accuracy,
    Answer,
    accuracies,
)
from icl_ft_fast.study.paired import Paired, family_of, paired_tests
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.results import AskedQuestion, QuestionsOfSeeds


def run_of(arm, seed=0, scale=1.0, **accuracy):
    seconds = (
        {"filter": 12.3 * scale, "train": 98.7 * scale, "query": 1.0} if arm not in ("base", "icl") else {"query": 1.0}
    )
    return Run(
        arm=arm,
        seed=seed,
        accuracy={name: Accuracy(*counts) for name, counts in accuracy.items()},
        answers=(),
        setup_s=111.0 * scale * (len(seconds) > 1),
        query_s=0.002 * scale,
        query_request_tokens=1234 * scale,
        query_forwarded_tokens=12.5,
        counts={"phases": {name: {"wall_s": value} for name, value in seconds.items()}},
        notes={},
    )


def answered(split, topic, right, form=None, choices=2):
    """An answer with probability 0.75 on the predicted choice."""
    probability = (0.75, *[0.25 / (choices - 1)] * (choices - 1))
    return Answer(f"{split} {topic} {form}", split, form, topic, 0, probability, (0,) if right else (1,))


def run_with(arm, rows, seed=0):
    """A run of answers given as (split, topic, whether right, form)."""
    answers = tuple(answered(*row) for row in rows)
    return replace(run_of(arm, seed), answers=answers, accuracy=accuracies(answers))


def paired_of(runs, questions=(), family="all"):
    return paired_tests(runs, clusters_of(runs, questions), family)


def test_arms_are_paired_on_the_same_questions():
    icl = [("x", f"t{i}", i < 9, None) for i in range(10)] + [("y", "t0", True, None)]
    tuned = [("x", f"t{i}", i < 1, None) for i in range(10)] + [("z", "t0", True, None)]
    (test,) = paired_of([run_with("icl", icl), run_with("ft", tuned), run_with("base", [("w", "t", True, None)])])
    # Eight topics differ, all one way: half of 2 / 2^8; the only test there is.
    assert (test.first, test.second, test.split, test.clusters) == ("icl", "ft", "x", 10)
    assert (test.difference, test.p) == (pytest.approx(0.8), pytest.approx(1 / 256))
    assert 0.2 < test.low < 0.8 <= test.high <= 1
    twice = [run_with(arm, rows, seed) for seed in (0, 1) for arm, rows in (("icl", icl), ("ft", tuned))]
    (test,) = paired_of(twice)  # a second seed's answers to the same topics are no new witnesses
    assert (test.difference, test.p, test.is_about_weights) == (pytest.approx(0.8), pytest.approx(1 / 256), True)
    three = [run_with(arm, icl if arm == "icl" else tuned) for arm in ("icl", "ft", "base")]
    ps = {(test.first, test.second, test.split): test.p for test in paired_of(three)}
    assert len(ps) == 4  # ft and base also share z
    assert ps["icl", "ft", "x"] == ps["icl", "base", "x"] == pytest.approx(4 / 256)
    assert ps["ft", "base", "x"] == ps["ft", "base", "z"] == 1.0


def asked(seed, text):
    return QuestionsOfSeeds(
        (seed,), tuple(AskedQuestion(f"x t{i} None", f"{text} {i}", (" a", " b")) for i in range(10))
    )


def test_facts_of_one_name_under_different_seeds_are_different_facts():
    icl, tuned = ([("x", f"t{i}", right, None) for i in range(10)] for right in (True, False))
    runs = [run_with(arm, rows, seed) for seed in (0, 1) for arm, rows in (("icl", icl), ("ft", tuned))]
    same, other = ([asked(0, "a"), asked(1, text)] for text in ("a", "b"))
    found = {name: paired_of(runs, questions)[0] for name, questions in (("same", same), ("other", other))}
    assert (found["same"].clusters, found["other"].clusters) == (10, 20)
    assert found["same"].p == pytest.approx(2**-10)
    assert found["other"].p == pytest.approx(2**-20)
    assert found["other"].low > found["same"].low


def test_from_four_seeds_on_seeds_are_the_unit_of_trained_arms():
    """Runs whose luck differs: over facts alone the difference is certain, over seeds it is not."""
    right, wrong = ([("x", f"t{i}", is_right, None) for i in range(10)] for is_right in (True, False))
    runs = []
    for seed in range(4):
        lucky = seed < 3
        runs.append(run_with("ft", right if lucky else wrong, seed))
        runs.append(run_with("augmented-ft", wrong if lucky else right, seed))
    (test,) = paired_of(runs)
    assert (test.difference, test.is_about_weights) == (0.5, False)
    assert test.p > 0.2
    assert test.low < 0 < test.high
    (few,) = paired_of(runs[:6])
    assert few.is_about_weights
    assert few.p < 0.01


def test_a_word_for_each_gap():
    gap = Paired("ft", "icl", None, 0.0, -0.015, 0.02, 0.5, 100)
    assert gap.word(2.0) == "as good"
    assert gap.word(1.0) == "not shown"
    assert replace(gap, low=-0.2, high=-0.05).word(2.0) == "worse"


def test_the_family_is_named():
    arms = ["base", "icl", "ft", "augmented-ft", "distilled"]
    assert family_of(arms) == [
        ("ft", "icl"),
        ("augmented-ft", "icl"),
        ("distilled", "icl"),
        ("augmented-ft", "ft"),
        ("distilled", "ft"),
    ]
    assert len(family_of(arms, "all")) == 10
    assert family_of(["base", "icl"]) == [("base", "icl")]
    with pytest.raises(ValueError, match=r"^family: expected trained or all, got 'some'$"):
        family_of(arms, "some")
