"""Figures and durations have one readable form wherever they are printed."""

import pytest

from icl_ft_fast.runtime.printable import amount, duration


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (27_000.4, "27,000"),
        (13_534, "13,530"),
        (8_305.2, "8,305"),
        (999.96, "1,000"),
        (315.93, "315.9"),
        (100, "100"),
        (0.012345, "0.01235"),
        (1e-5, "0.00001"),
        (-27_000, "-27,000"),
        (1e9, "1,000,000,000"),
        (0, "0"),
        (float("inf"), "inf"),
    ],
)
def test_an_amount_has_four_digits_and_no_exponent(value, text):
    assert amount(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (27_000, "7 h 30 min")]
)
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text
