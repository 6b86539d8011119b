"""A user's price file: what machines, electricity and hosted models cost. No prices come with the package."""

from __future__ import annotations

import codecs
from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from icl_ft_fast.runtime.errors import UserError

MOST = 1e9  # of any price: beyond it somebody mistook the unit


class PriceError(UserError):
    """A price file that cannot be used; the message names file and field."""


class Machine(BaseModel):
    """A machine like the one that everything was measured on, and how it is billed.

    Attributes:
        name: beside other machines and hosted models.
        per_hour: its price.
        held: billed all day for as long as queries come; else for the time that it computes.
        utilisation: the fraction of billed time that computes, or that a held machine may be busy.
        minimum_minutes: billed at least for each training or other setup and, of one that is not held, for the serving.
        count: machines that can be had at once; None for as many as are needed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    name: str = Field(min_length=1, max_length=40)
    per_hour: float = Field(ge=0, le=MOST)
    held: bool = False
    utilisation: float = Field(default=1.0, gt=0, le=1)
    minimum_minutes: float = Field(default=0.0, ge=0, le=1e6)
    count: int | None = Field(default=None, ge=1, le=10**6)


class Hosted(BaseModel):
    """A hosted model of the same accuracy, priced a million tokens.

    Attributes:
        name: beside machines and other hosted models.
        input, output: of the model as it is.
        cached_input: of tokens found in its cache; None where it has no cache.
        cache_write: of tokens put there; None for the price of input.
        cache_storage_per_hour: of a million tokens that stay there.
        training: of a token trained on; None where it cannot be fine-tuned.
        tuned_input, tuned_output: of a fine-tuned model; None for the prices of the model as it is.
        batch_discount: fraction off input and output, where queries can wait.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    name: str = Field(min_length=1, max_length=40)
    input: float = Field(ge=0, le=MOST)
    output: float = Field(ge=0, le=MOST)
    cached_input: float | None = Field(default=None, ge=0, le=MOST)
    cache_write: float | None = Field(default=None, ge=0, le=MOST)
    cache_storage_per_hour: float = Field(default=0.0, ge=0, le=MOST)
    training: float | None = Field(default=None, ge=0, le=MOST)
    tuned_input: float | None = Field(default=None, ge=0, le=MOST)
    tuned_output: float | None = Field(default=None, ge=0, le=MOST)
    batch_discount: float = Field(default=0.0, ge=0, lt=1)


class Prices(BaseModel):
    """What the user pays, in a currency of their own.

    Attributes:
        currency: as it is to be printed, say "USD".
        machine_per_hour: short for one machine that is billed while it computes.
        electricity_per_kwh: beside machines, for the joules that were read; with `watts`, for those of the seconds.
        watts: drawn while computing, where the machine has no energy counter.
        machines, hosted: what there is to choose from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    currency: str = Field(min_length=1, max_length=8)
    machine_per_hour: float | None = Field(default=None, ge=0, le=MOST)
    electricity_per_kwh: float = Field(default=0.0, ge=0, le=MOST)
    watts: float | None = Field(default=None, gt=0, le=1e6)
    machines: tuple[Machine, ...] = Field(default=(), strict=False)
    hosted: tuple[Hosted, ...] = Field(default=(), strict=False)

    @property
    def all_machines(self) -> tuple[Machine, ...]:
        """The machines with the one of machine_per_hour."""
        short = () if self.machine_per_hour is None else (Machine(name="machine", per_hour=self.machine_per_hour),)
        return (*short, *self.machines)

    @property
    def names(self) -> list[str]:
        """Of all that can be chosen."""
        return [machine.name for machine in self.all_machines] + [hosted.name for hosted in self.hosted]

    def money(self, seconds: float, joules: float | None) -> float:
        """The price of computing so long on the first machine; see electricity()."""
        hourly = self.all_machines[0] if self.all_machines else None
        busy = 0.0 if hourly is None else seconds / 3600 * hourly.per_hour / hourly.utilisation
        return busy + self.electricity(seconds, joules)

    def electricity(self, seconds: float, joules: float | None) -> float:
        """The price of energy; joules that nobody read and no `watts` stand for cost nothing."""
        energy = seconds * (self.watts or 0.0) if joules is None else joules
        return energy / 3.6e6 * self.electricity_per_kwh


def read_prices(path: str | Path) -> Prices:
    """Read a price file: one JSON object with the fields of Prices.

    Raises:
        PriceError: no UTF-8 JSON, or a field that is missing, unknown or out of range.
        OSError: the file cannot be read.

    Examples:
        >>> with open("prices.json", "w") as file:
        ...     _ = file.write('{"currency": "EUR", "machine_per_hour": 1.5}')
        >>> iff.read_prices("prices.json").names
        ['machine']
    """
    path = Path(path)
    try:
        prices: Prices = Prices.model_validate_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        raise PriceError(f"{path}: {first_error(error)}") from error
    if not prices.names:
        raise PriceError(f"{path}: machine_per_hour: Field required, or machines, or hosted")
    twice = [name for name, times in Counter(prices.names).items() if times > 1]
    if twice:
        raise PriceError(f"{path}: name: {twice[0]!r} is given twice")
    free = all(machine.per_hour == 0 for machine in prices.all_machines)
    if prices.electricity_per_kwh and prices.all_machines and free and prices.watts is None:
        raise PriceError(f"{path}: watts: expected a number above 0 where electricity is all that is paid for")
    if free and not prices.electricity_per_kwh and not any(one.input or one.output for one in prices.hosted):
        raise PriceError(f"{path}: every price is 0; a decision needs one above 0")
    return prices


def first_error(error: ValidationError) -> str:
    """The first thing wrong, behind the field it is in, and how many more there are."""
    first, *more = error.errors(include_url=False)
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    rest = f" (and {len(more)} more)" if more else ""
    return f"{field}: {first['msg']}{rest}" if field else f"{first['msg']}{rest}"
