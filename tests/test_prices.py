"""The user's price file."""

import math
from pathlib import Path

import numpy as np
import pytest

from icl_ft_fast.study.amortise import Samples
from icl_ft_fast.study.arms import arm_named
from icl_ft_fast.study.billing import BilledSamples, on_hosted
from icl_ft_fast.study.costs import ArmCosts
from icl_ft_fast.study.evaluate import Answer
from icl_ft_fast.study.prices import Hosted, Machine, PriceError, Prices, read_prices
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.service import Service
from icl_ft_fast.study.sweep import Sweep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"currency": "EUR"}', "machine_per_hour: Field required, or machines, or hosted"),
        ('{"currency": "EUR", "machine_per_hour": 2e9}', "machine_per_hour: Input should be less than or equal to 1"),
        ('{"currency": "EUR", "machine_per_hour": 0}', "every price is 0; a decision needs one above 0"),
        (
            '{"currency": "EUR", "machines": [{"name": "a", "per_hour": 1, "utilisation": 0}]}',
            "machines[0].utilisation: Input should be greater than 0",
        ),
        ('{"currency": "EUR", "hosted": [{"name": "a", "input": 1}]}', "hosted[0].output: Field required"),
        (
            '{"currency": "EUR", "hosted": [{"name": "a", "input": 1, "output": 1, "batch_discount": 1}]}',
            "hosted[0].batch_discount: Input should be less than 1",
        ),
        (
            '{"currency": "EUR", "hosted": [{"name": "a", "input": 1, "output": 1}], "machines": '
            '[{"name": "a", "per_hour": 1}]}',
            "name: 'a' is given twice",
        ),
        ('{"currency": "EUR", "machine_per_hour": -1}', "machine_per_hour: Input should be greater than or equal to 0"),
        ('{"currency": "EUR", "machine_per_hour": "2"}', "machine_per_hour: Input should be a valid number"),
        ('{"currency": "", "machine_per_hour": 1}', "currency: String should have at least 1 character"),
        ('{"currency": "EUR", "machine_per_hour": 1, "gpu": 2}', "gpu: Extra inputs are not permitted"),
        ('{"currency": "E", "machine_per_hour": 1e999}', "machine_per_hour: "),
        ('{"currency": "E", "machine_per_hour": 0, "electricity_per_kwh": 1}', "watts: expected a number above 0"),
        ("{", "Invalid JSON"),
        ("[]", "Input should be an object"),
    ],
)
def test_a_bad_price_file(text, message, tmp_path):
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(PriceError) as caught:
        read_prices(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_prices(tmp_path):
    path = tmp_path / "prices.json"
    path.write_text('{"currency": "EUR", "machine_per_hour": 3.6, "electricity_per_kwh": 0.36, "watts": 1000}')
    prices = read_prices(path)
    assert prices == Prices(currency="EUR", machine_per_hour=3.6, electricity_per_kwh=0.36, watts=1000.0)
    assert prices.money(1000, None) == pytest.approx(1.0 + 0.1)
    assert prices.money(1000, 3.6e6) == pytest.approx(1.0 + 0.36)  # what was read goes before what is assumed


def test_the_example_file_can_be_used():
    prices = read_prices(Path(__file__).parents[1] / "examples" / "prices.json")
    assert prices.names == ["by the hour", "held all day", "small hosted"]
    assert prices.currency == "XXX"  # ISO 4217: no currency


def bill_by_hand(n, machine, setup, reading, query, lifetime, days):
    """The bill written out: whole machines, whole readings, minimum billing."""
    serving = reading * max(1, math.ceil(n / lifetime)) + query * n
    needed = max(1, math.ceil(serving / (machine.utilisation * days * 86400)))
    if machine.count is not None and needed > machine.count:
        return math.inf
    seconds = max(setup, 60 * machine.minimum_minutes) if setup else 0.0
    if machine.held:
        seconds += needed * days * 86400
    else:
        seconds += max(serving / machine.utilisation, 60 * machine.minimum_minutes)
    return seconds / 3600 * machine.per_hour + 1e-5 * (setup + serving)


def test_bills_of_machines_equal_those_by_hand():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(2000):
        machine = Machine(
            name="m",
            per_hour=float(rng.integers(1, 9)),
            held=bool(rng.integers(2)),
            utilisation=float(rng.choice([0.25, 0.5, 1.0])),
            minimum_minutes=float(rng.choice([0, 10])),
            count=[None, 3][rng.integers(2)],
        )
        setup, reading, query = float(rng.choice([0, 50, 5000])), float(rng.integers(0, 20)), float(rng.integers(1, 9))
        lifetime, days, n = float(rng.choice([1, 7, 1000])), float(rng.integers(1, 40)), int(10 ** rng.uniform(0, 7))
        seconds = Samples((setup,) if setup else (), (reading,), (query,), lifetime)
        energy = Samples(*(tuple(1e-5 * x for x in some) for some in (seconds.setup, (reading,), (query,))), lifetime)
        billed = BilledSamples(seconds, energy, machine, days)
        expected = bill_by_hand(n, machine, setup, reading, query, lifetime, days)
        assert billed.line.cost(n) == pytest.approx(expected)
        assert billed.resampled_costs(n, 3, 0) == pytest.approx([expected] * 3)  # one measurement of each
        seen.add((machine.held, math.isinf(expected), billed.line.machines(n) > 1))
    assert len(seen) == 6  # held or not; cannot be served, or by one machine, or by several


def run_of(arm, request_tokens, phases=None):
    answers = tuple(Answer(f"q{i}", "s", None, f"t{i}", 0, (0.5, 0.5), (0,)) for i in range(4))
    return Run(arm, 0, {}, answers, 0.0, 0.1, request_tokens, 5.0, {"phases": phases or {"query": {}}}, {})


HOSTED = Hosted(
    name="h",
    input=2,
    output=8,
    cached_input=0.5,
    cache_write=2.5,
    cache_storage_per_hour=1,
    training=30,
    tuned_input=3,
    tuned_output=12,
    batch_discount=0.5,
)


def test_tokens_of_a_hosted_model_are_counted_by_hand():
    """Two choices: a request of ICL has 1,100 tokens, 1,000 of them context; one without context has 100."""
    sweep, service = Sweep(1000), Service(days=10, answer_tokens=20)

    def ways(arm, tokens, hosted=HOSTED, phases=None):
        return on_hosted(
            arm_named(arm), ArmCosts("money", (run_of(arm, tokens, phases),), sweep, 1, 500.0), hosted, service
        )

    assert ways("base", 200.0)["base"].line.cost(1000) == pytest.approx(1000 * (100 * 2 + 20 * 8) / 2 / 1e6)
    read = ways("icl", 2200.0)
    assert read["ICL"].line.cost(1000) == pytest.approx(1000 * (1100 * 2 + 20 * 8) / 2 / 1e6)
    each, kept = (100 * 2 + 1000 * 0.5 + 20 * 8) / 2 / 1e6, 1000 / 1e6 * 1 * 240
    assert read["ICL cached"].line.cost(1000) == pytest.approx(2 * 1000 * 2.5 / 1e6 + kept + 1000 * each)
    assert ways("icl", 2200.0, HOSTED.model_copy(update={"cached_input": None})).keys() == {"ICL"}
    phases = {"train": {"trained_tokens": 5000}, "generate": {"request_tokens": 300, "decoded_tokens": 40}, "query": {}}
    tuned = ways("augmented-ft", 200.0, phases=phases)["augmented"].line
    setup = (5000 * 30 + 300 * 2 + 40 * 8) / 1e6
    assert tuned.cost(1000) == pytest.approx(setup + 1000 * (100 * 3 + 20 * 12) / 2 / 1e6)
    assert ways("ft", 200.0, HOSTED.model_copy(update={"training": None})) == {}
    assert ways("distilled", 200.0) == {}  # needs the teacher's distributions
    assert ways("compacted", 200.0) == ways("prefix", 200.0) == {}  # no text
