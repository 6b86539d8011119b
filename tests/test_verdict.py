"""The verdict: what is not known comes first, the choice has its certainty, and it says why there is none."""

import math
import re
from dataclasses import replace

import pytest

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.verdict import summary, verdict_of, why_none
from icl_ft_fast.study.evaluate import Answer, accuracies
from icl_ft_fast.study.prices import Hosted, Machine, Prices
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.results import Results
from icl_ft_fast.study.service import Service, ServiceError, parse_weights, read_weights
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
    """A new user's case: 24 questions, a few more or less right, two choices."""
    verdict = verdict_of(study_of({"base": 19, "icl": 20, "ft": 19}, 24), 1000, 2.0)
    (apart,) = verdict.unknown
    assert apart.startswith("Within 2 points of accuracy, ICL cannot be told apart from base, fine-tuned: about ")
    assert verdict.text.startswith(apart)
    assert " is chosen in " in verdict.certainty


def test_what_is_not_above_chance_is_not_ranked():
    study = study_of({"base": 13, "icl": 14, "ft": 13}, 24)
    assert verdict_of(study, 1000, 2.0) is None
    (concern,) = study.concerns
    assert concern == "No way is clearly above chance (0.500): fix the model, the prompt or the questions first."
    assert why_none(study) == f"No decision. {concern}"
    assert summary(study, 1000)["concerns"] == [concern]
    assert study_of({"oracle": 24, "base": 13}, 24).concerns == [concern]  # nobody can choose an oracle


def test_an_arm_without_augmentation_is_not_chosen():
    study = study_of({"icl": 900, "augmented-ft": 990}, 1000)
    assert {way.name for way in study.decision_ways("seconds")} >= {"ICL", "augmented"}
    notes = {"augmentation_prompts": 30, "augmentation_productive": 2, "augmentations": 2}
    runs = tuple(replace(run, notes=notes if run.arm == "augmented-ft" else {}) for run in study.results.runs)
    empty = replace(study, results=replace(study.results, runs=runs))
    assert "augmented" not in {way.name for way in empty.decision_ways("seconds")}
    assert empty.concerns[0].startswith("augmented: only 2 of 30 prompts gave a row (2 rows)")


def test_a_concern_is_told_once_for_all_its_arms():
    study = study_of({"base": 24, "augmented-ft@300": 13, "augmented-ft@600": 13, "ft": 13}, 24)
    noted = {"synthetic_tokens": 280, "training_concerns": ["8 steps are few"]}
    runs = tuple(replace(run, notes={} if run.arm == "base" else noted) for run in study.results.runs)
    assert replace(study, results=replace(study.results, runs=runs)).concerns == [
        "augmented 300 tokens, augmented 600 tokens, fine-tuned: 8 steps are few.",
        "augmented 600 tokens: 280 synthetic tokens in place of 600: replies gave no more that was new and in form.",
    ]


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


def with_service(study, **settings):
    return replace(study, service=Service(**settings))


def test_changes_of_the_documents_turn_the_choice():
    """A setup of 100 s is paid for each version; ICL's reading of 7 s too."""
    study = study_of({"icl": 990, "ft": 990}, 1000)
    never = verdict_of(study, 3000, 2.0)
    assert never.decision.chosen.name == "fine-tuned"
    (_, first), (rate, second) = never.by_changes
    assert (first, second) == ("fine-tuned", "ICL cached")
    for times, chosen in ((rate * 0.99, first), (rate * 1.01, second)):
        assert verdict_of(with_service(study, changes_per_month=times), 3000, 2.0).decision.chosen.name == chosen
    # 3000 * .1 + v * 100 and 3000 * .5 + v * 7.1: they meet at v = 12.9 versions
    assert math.isclose(rate, 3000 * 0.4 / (100 - 7.1) - 1, rel_tol=0.01)
    often = verdict_of(with_service(study, changes_per_month=9, days=60), 3000, 2.0)
    assert "19.0 versions in 60 days, each asked about 158 queries" in often.text


def test_a_wrong_answer_has_a_price():
    prices = Prices(currency="EUR", machine_per_hour=3.6)  # 0.001 a second
    study = replace(study_of({"base": 500, "icl": 990}, 1000), prices=prices)
    assert verdict_of(study, 100, 60.0).decision.chosen.name == "base"
    verdict = verdict_of(with_service(study, cost_of_wrong=0.02), 100, 60.0)
    assert verdict.decision.chosen.name == "ICL cached"
    assert "0.02 EUR" in verdict.text
    assert "no tolerance" in verdict.text
    assert 0 <= verdict.regret < 1e-3
    chosen = verdict.decision.chosen
    assert math.isclose(chosen.total(100), chosen.line.cost(100) + 100 * 0.01 * 0.02)


def test_a_mix_of_queries_turns_the_order():
    """Simpson's trap: 90 easy questions and 10 hard ones, and users who ask the hard ones."""

    def mixed(arm, easy, hard):
        run = run_of(arm, easy + hard, 100)
        split = tuple(
            replace(a, split="easy" if i < 90 else "hard", correct=(0,) if i < easy or 90 <= i < 90 + hard else (1,))
            for i, a in enumerate(run.answers)
        )
        return replace(run, answers=split, accuracy=accuracies(split))

    runs = (mixed("icl", 88, 1), mixed("ft", 70, 10))
    study = Derived(Results(4, "model", 1, "task", {}, {}, COSTS, runs), "study")
    plain = verdict_of(study, 1000, 2.0)
    assert "Over all questions ICL is the most accurate, but fine-tuned on hard: --weights" in plain.text
    verdict = verdict_of(with_service(study, weights={"easy": 0.2, "hard": 0.8}), 1000, 2.0)
    assert verdict.decision.best.name == "fine-tuned"
    assert math.isclose(verdict.decision.best.accuracy, 0.2 * 70 / 90 + 0.8)
    assert "(easy 20%, hard 80%) the most accurate arm is fine-tuned. Over all questions alike it would be ICL" in (
        verdict.text
    )
    weighted = with_service(study, weights={"easy": 0.2, "hard": 0.8})
    low, high = weighted.interval("icl")
    assert low < 0.2 * 88 / 90 + 0.8 * 0.1 < high < study.interval("icl")[0]
    assert math.isclose(weighted.gap("ft", "icl").difference, 0.2 * -18 / 90 + 0.8 * 0.9)
    same = with_service(study, weights={"easy": 0.9, "hard": 0.1})  # the questions' own mix
    assert same.gap("ft", "icl").low == pytest.approx(study.gap("ft", "icl").low)
    assert same.interval("icl") == pytest.approx(study.interval("icl"))


def test_weights_are_checked(tmp_path):
    assert parse_weights("a=1, b=3") == {"a": 0.25, "b": 0.75}
    for text, message in (
        ("a", "--weights: expected SPLIT=WEIGHT,..., got 'a'"),
        ("a=-1", "--weights: a: expected a weight from 0 on, got '-1'"),
        ("a=nan", "--weights: a: expected a weight from 0 on, got 'nan'"),
        ("a=1,a=2", "--weights: a is given twice"),
        ("a=0", "--weights: expected a weight above 0, got none"),
    ):
        with pytest.raises(ServiceError, match=re.escape(message)):
            parse_weights(text)
    path = tmp_path / "mix.json"
    path.write_text('{"test": 2}')
    assert read_weights(path) == {"test": 1.0}
    path.write_text('{"test": "x"}')
    with pytest.raises(ServiceError, match=r"mix\.json: test: expected a weight"):
        read_weights(path)
    with pytest.raises(ServiceError, match="'x' is no split of this study; it has test"):
        Service(weights={"x": 1.0}).check_splits(["test"])


def test_machines_that_cannot_serve_are_said(tmp_path):
    study = study_of({"base": 500, "icl": 990, "ft": 989}, 1000)
    few = Prices(currency="EUR", machines=(Machine(name="m", per_hour=1.0, held=True, count=2),))
    verdict = verdict_of(replace(study, prices=few), 3e7, 2.0)  # .5 s a query: 5.8 machines all month; .1 s: 1.2
    assert verdict.decision.chosen.name == "fine-tuned"
    assert "fine-tuned takes 2 machines at once" in verdict.text
    assert "cannot serve ICL, ICL cached, ICL from file." in verdict.text
    assert verdict.decision.chosen.total(3e7) == pytest.approx(2 * 24 * 30 + 100 / 3600)
    too_many = replace(study, prices=few)
    assert verdict_of(too_many, 1e10, 2.0) is None
    assert (
        why_none(too_many) == "No decision: no machine of the price file can serve so many queries, in any of 5 ways."
    )
    assert "takes 1,158 machines at once" in verdict_of(study, 3e10, 2.0).text


def test_machines_and_hosted_models_stand_side_by_side():
    study = study_of({"base": 500, "icl": 990, "ft": 989}, 1000)
    both = Prices(
        currency="EUR",
        machines=(Machine(name="own", per_hour=1.0),),
        hosted=(Hosted(name="there", input=1.0, output=2.0),),
        electricity_per_kwh=0.3,
    )
    verdict = verdict_of(replace(study, prices=both), 1000, 2.0)
    names = {way.name for way in verdict.decision.ways}
    assert {"base on own", "base on there", "ICL on there", "fine-tuned on own"} <= names
    assert "fine-tuned on there" not in names  # no price of training
    (_, first), (times, second) = verdict.by_price
    assert (first, second) == ("fine-tuned on own", "ICL on there")
    for by, name in ((times * 0.99, first), (times * 1.01, second)):
        dearer = both.model_copy(update={"machines": (Machine(name="own", per_hour=by),)})
        assert verdict_of(replace(study, prices=dearer), 1000, 2.0).decision.chosen.name == name
    assert "give --answer-tokens" in verdict.text
    assert any(note.startswith("Electricity is not counted") for note in replace(study, prices=both).notes)
    undecoded = verdict_of(with_service(replace(study, prices=both), answer_tokens=9), 1000, 2.0)
    assert "Machines are left out: decoding was not measured" in undecoded.text
    assert {way.name for way in undecoded.decision.ways} == {"base on there", "ICL on there"}
    only = Prices(currency="EUR", hosted=both.hosted)
    assert {way.name for way in verdict_of(replace(study, prices=only), 1000, 2.0).decision.ways} == {"base", "ICL"}


def test_latency_is_a_constraint(monkeypatch):
    """ICL reads 7.1 s and asks .5 s; cached it asks .5 s; 8 at once are one batch, and each waits for all of it."""
    eight = Point(500, 8, (7.0, 7.1, 7.2), (0.2, 0.2, 0.3), save_s=(0.9,), load_s=(0.1,))
    costs = Sweep(500, (*COSTS.points, eight, Point(0, 8, (), (0.05,))))
    study = study_of({"base": 500, "icl": 990, "ft": 990}, 1000, costs=costs)
    assert study.latency("ICL") == pytest.approx((7.6, 7.19 + 0.545))
    assert study.latency("ICL cached") == pytest.approx((0.5, 0.545))
    assert study.latency("fine-tuned")[0] == pytest.approx(0.1)
    many = with_service(study, concurrency=8)
    assert many.latency("ICL cached")[0] == pytest.approx(8 * 0.2)
    assert (
        replace(many, cache_lifetime=80.0).latency("ICL cached")[1] > 7.1 + 8 * 0.2
    )  # 1 batch in 10 waits for a reading
    assert replace(many, cache_lifetime=8000.0).latency("ICL cached")[1] < 8 * 0.3 + 0.1
    slow = with_service(study, max_latency_s=0.2)
    verdict = verdict_of(slow, 10, 2.0)
    assert verdict.decision.chosen.name == "fine-tuned"
    assert (
        "takes 100 ms (median) and 109 ms (95th percentile). Slower than --max-latency, or not known: ICL,"
        in verdict.text
    )
    assert verdict_of(study, 10, 2.0).decision.chosen.name == "ICL cached"
    between = with_service(study, concurrency=30)
    assert (
        "With 8 (measured; 30 were asked for) at once, a query of ICL cached takes" in verdict_of(between, 10, 2.0).text
    )
    none = with_service(study, max_latency_s=0.01)
    assert verdict_of(none, 10, 2.0) is None
    assert why_none(none) == "No decision: no way answers 95% of queries within --max-latency."


def test_answers_are_decoded_behind_their_context():
    tokens = [replace(p, decode_s=(0.02 + p.context_tokens / 1e4,)) for p in COSTS.points]
    study = study_of({"icl": 990, "ft": 990}, 1000, costs=Sweep(500, tuple(tokens)))
    told = with_service(study, answer_tokens=30)
    assert told.ways("seconds")["fine-tuned"].line.query == pytest.approx(0.1 + 30 * 0.02)
    assert told.ways("seconds")["ICL cached"].line.query == pytest.approx(0.5 + 30 * 0.07)
    undecoded = with_service(study_of({"icl": 990, "ft": 990}, 1000), answer_tokens=30)
    assert verdict_of(undecoded, 100, 2.0) is None
    assert why_none(undecoded) == "No decision: decoding was not measured; run `compare` with --answer-tokens."
