"""A user's price file: what seconds and joules cost. No prices come with the package."""

from __future__ import annotations

import codecs
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from icl_ft_fast.runtime.errors import UserError


class PriceError(UserError):
    """A price file that cannot be used; the message names file and field."""


class Prices(BaseModel):
    """What the user pays, in a currency of their own.

    Attributes:
        currency: as it is to be printed, say "USD".
        machine_per_hour: for the machine that everything was measured on, while it computes.
        electricity_per_kwh: beside that, for the joules that were read; with `watts`, for those of the seconds.
        watts: drawn while computing, where the machine has no energy counter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    currency: str = Field(min_length=1, max_length=8)
    machine_per_hour: float = Field(ge=0)
    electricity_per_kwh: float = Field(default=0.0, ge=0)
    watts: float | None = Field(default=None, gt=0)

    def money(self, seconds: float, joules: float | None) -> float:
        """The price of computing so long; joules that nobody read and no `watts` stand for cost nothing."""
        energy = seconds * (self.watts or 0.0) if joules is None else joules
        return seconds / 3600 * self.machine_per_hour + energy / 3.6e6 * self.electricity_per_kwh


def read_prices(path: Path) -> Prices:
    """Read a price file: one JSON object with the fields of Prices.

    Raises:
        PriceError: no UTF-8 JSON, or a field that is missing, unknown or out of range.
        OSError: the file cannot be read.
    """
    try:
        prices: Prices = Prices.model_validate_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        raise PriceError(f"{path}: {first_error(error)}") from error
    if prices.electricity_per_kwh and prices.machine_per_hour == 0 and prices.watts is None:
        raise PriceError(f"{path}: watts: expected a number above 0 where electricity is all that is paid for")
    return prices


def first_error(error: ValidationError) -> str:
    """The first thing wrong, behind the field it is in, and how many more there are."""
    first, *more = error.errors(include_url=False)
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    rest = f" (and {len(more)} more)" if more else ""
    return f"{field}: {first['msg']}{rest}" if field else f"{first['msg']}{rest}"
