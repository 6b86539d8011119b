"""The user's price file."""

import pytest

from icl_ft_fast.study.prices import PriceError, Prices, read_prices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"currency": "EUR"}', "machine_per_hour: Field required"),
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
