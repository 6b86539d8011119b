"""What a decision is for: how long, how often documents change, what is asked, what a wrong answer costs."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from icl_ft_fast.runtime.errors import UserError

MOST = 1e15  # of any number that a user gives: beyond it sums of money and seconds lose their digits


class ServiceError(UserError):
    """A service that cannot be decided on; the message names the option or the file's field."""


@dataclass(frozen=True)
class Service:
    """What answers are needed for, beside how many.

    Attributes:
        days: how long queries come.
        changes_per_month: of the documents, a month of 30 days; after each, every setup and reading is paid anew.
        cost_of_wrong: of one wrong answer, in the currency of the price file; None where it has no price.
        weights: by split, the fraction of queries of its kind; None for as many as there are questions.
        answer_tokens: that a query's answer has.
        concurrency: queries that come at once.
        max_latency_s: seconds within which 95% of queries must be answered; None for any.
    """

    days: float = 30.0
    changes_per_month: float = 0.0
    cost_of_wrong: float | None = None
    weights: Mapping[str, float] | None = None
    answer_tokens: int = 0
    concurrency: int = 1
    max_latency_s: float | None = None

    @property
    def versions(self) -> float:
        """Versions of the documents in all the days, the first one included."""
        return self.versions_at(self.changes_per_month)

    def versions_at(self, changes_per_month: float) -> float:
        """The same for another rate of changes."""
        return 1 + changes_per_month * self.days / 30

    def check_splits(self, splits: Sequence[str]) -> None:
        """Raise ServiceError on a weight for a split that is not there, or where no split has one."""
        if self.weights is None:
            return
        unknown = [name for name in self.weights if name not in splits]
        if unknown:
            raise ServiceError(f"weights: {unknown[0]!r} is no split of this study; it has {', '.join(splits)}")


def parse_weights(text: str) -> dict[str, float]:
    """Weights of splits from "reversal=0.5,trained=0.5"; they are divided by their sum.

    Raises:
        ServiceError: no such list, or a weight that is negative or no number.
    """
    found: dict[str, object] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        if not equals or not name.strip():
            raise ServiceError(f"--weights: expected SPLIT=WEIGHT,..., got {part!r}")
        if name.strip() in found:
            raise ServiceError(f"--weights: {name.strip()} is given twice")
        found[name.strip()] = value
    return _checked(found, "--weights")


def read_weights(path: Path) -> dict[str, float]:
    """Weights of splits from a JSON object {"split": weight, ...}.

    Raises:
        ServiceError: no such object.
        OSError: the file cannot be read.
    """
    try:
        found = json.loads(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"{path}: not UTF-8 JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ServiceError(f"{path}: expected an object with a weight for each split")
    return _checked(found, str(path))


def _checked(found: Mapping[str, object], where: str) -> dict[str, float]:
    weights = {}
    for name, value in found.items():
        try:
            weights[name] = float(value) if isinstance(value, str | int | float) else math.nan
        except ValueError:
            weights[name] = math.nan
        if not 0 <= weights[name] <= MOST:
            raise ServiceError(f"{where}: {name}: expected a weight from 0 on, got {value!r}")
    if not (total := math.fsum(weights.values())):
        raise ServiceError(f"{where}: expected a weight above 0, got none")
    return {name: weight / total for name, weight in weights.items()}
