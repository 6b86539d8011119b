"""The verdict: what is not known comes first, the choice has its certainty, and it says why there is none."""

import math

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.verdict import summary, verdict_of, why_none
from icl_ft_fast.study.evaluate import Answer, accuracies
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.results import Results
from icl_ft_fast.study.sweep import Point, Sweep

QUERIES = (0.09, 0.1, 0.11)
COSTS = Sweep(
    500,
    (
        Point(0, 1, (), QUERIES),
        Point(500, 1, (7.0, 7.1, 7.2), (0.45, 0.5, 0.55), save_s=(0.9,), load_s=(0.1,)),
    ),
)


def run_of(arm, right, n, seed=0, setup_s=0.0):
    answers = tuple(
        Answer(f"q{i}", "test", None, f"t{i}", 0, (0.8, 0.2), (0,) if i < right else (1,)) for i in range(n)
    )
    phases = {"query": {"wall_s": 1.0}}
    return Run(arm, seed, accuracies(answers), answers, setup_s, 0.1, 20.0, 5.0, {"phases": phases}, {})


def study_of(counts, n, costs=COSTS, setups=(100.0,)):
    runs = []
    for seed, setup in enumerate(setups):
        runs += [run_of(arm, right, n, seed, setup * arm.endswith("ft")) for arm, right in counts.items()]
    return Derived(Results(4, "model", 1, "task", {}, {}, costs, tuple(runs)), "study")


def test_few_questions_are_said_to_be_few():
    """A new user's case: 24 questions, 10, 9 and 9 right, two choices."""
    verdict = verdict_of(study_of({"base": 13, "icl": 14, "ft": 13}, 24), 1000, 2.0)
    chance, apart = verdict.unknown
    assert chance.startswith(
        "No way is clearly above chance (0.500): fix the model, the prompt or the questions first."
    )
    assert apart.startswith("Within 2 points of accuracy, ICL cannot be told apart from base, fine-tuned: about ")
    assert verdict.text.startswith(chance)
    assert " is chosen in " in verdict.certainty


def test_what_is_clear_is_said_without_doubt():
    study = study_of({"base": 500, "icl": 990, "ft": 989}, 1000)
    verdict = verdict_of(study, 1e6, 2.0)
    assert verdict.unknown == ()
    assert verdict.decision.chosen.name == "fine-tuned"
    assert verdict.shares == {"fine-tuned": 1.0}
    assert verdict.certainty == "fine-tuned is chosen in 100% of resamples of facts, timings and setups."
    assert math.isclose(sum(summary(study, 1e6)["decision"]["chosen_in"].values()), 1.0)


def test_a_close_call_has_its_share():
    """At the break-even of two setups that differ, either way is chosen about as often."""
    study = study_of({"icl": 990, "ft": 990}, 1000, setups=(90.0, 110.0))
    even = study.break_evens["seconds"]["fine-tuned", "ICL cached"].queries
    verdict = verdict_of(study, even * 1.001, 2.0)
    assert verdict.shares["fine-tuned"] > 0.3
    assert verdict.shares["fine-tuned"] < 0.9
    assert verdict.certainty.count("%") == 2


def test_why_there_is_no_verdict():
    unmeasured = study_of({"icl": 9, "ft": 9}, 10, costs=Sweep())
    assert verdict_of(unmeasured, 100, 2.0) is None
    assert why_none(unmeasured) == "No decision: the results have no measured query costs; run `compare` to its end."
    assert why_none(study_of({"icl": 0, "ft": 0}, 0)) == "No decision: no question of this task has a known answer."
    assert summary(unmeasured, 100)["decision"] is None


def test_arms_are_compared_on_the_seeds_that_all_have():
    whole = study_of({"icl": 9, "ft": 5}, 10, setups=(100.0, 100.0))
    runs = (*whole.results.runs[:2], run_of("icl", 0, 10, 1))  # killed before the second fine-tuning
    settings = {"arms": ["icl", "ft"], "seeds": [0, 1]}
    cut = Derived(Results(4, "model", 1, "task", settings, {}, COSTS, runs), "study")
    assert {way.name: way.accuracy for way in cut.decision_ways("seconds")}["ICL"] == 0.9
    assert cut.notes[0].startswith("Unfinished: 3 of 4 runs are there (missing: fine-tuned under seed 1).")
    assert whole.unfinished == ""
