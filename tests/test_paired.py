"""Arms compared on the same questions."""

from dataclasses import replace

import pytest

from icl_ft_fast.study.evaluate import (
    Accuracy,
    Answer,
    accuracies,
)
from icl_ft_fast.study.paired import Paired, paired_tests
from icl_ft_fast.study.records import Run


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


def test_arms_are_paired_on_the_same_questions():
    icl = [("x", f"t{i}", i < 9, None) for i in range(10)] + [("y", "t0", True, None)]
    tuned = [("x", f"t{i}", i < 1, None) for i in range(10)] + [("z", "t0", True, None)]
    tests = paired_tests([run_with("icl", icl), run_with("ft", tuned), run_with("base", [("w", "t", True, None)])])
    # Eight topics differ, all one way: 2 / 2^8; the only test there is.
    assert tests == [Paired("icl", "ft", "x", pytest.approx(0.8), pytest.approx(2 / 256))]
    twice = [run_with(arm, rows, seed) for seed in (0, 1) for arm, rows in (("icl", icl), ("ft", tuned))]
    (test,) = paired_tests(twice)  # a second seed's answers to the same topics are no new witnesses
    assert (test.difference, test.p) == (pytest.approx(0.8), pytest.approx(2 / 256))
    three = [run_with(arm, icl if arm == "icl" else tuned) for arm in ("icl", "ft", "base")]
    ps = {(test.first, test.second, test.split): test.p for test in paired_tests(three)}
    assert len(ps) == 4  # ft and base also share z
    assert ps["icl", "ft", "x"] == ps["icl", "base", "x"] == pytest.approx(4 * 2 / 256)
    assert ps["ft", "base", "x"] == ps["ft", "base", "z"] == 1.0
