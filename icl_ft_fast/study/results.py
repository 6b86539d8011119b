"""results.json: its schema, validated, and older editions of it brought up to date."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from icl_ft_fast.runtime.durable import digest
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.study.compare import ANSWERING, SCHEMA_VERSION, Run
from icl_ft_fast.study.prices import first_error
from icl_ft_fast.study.sweep import Sweep

# Fields, at any depth, that two runs of one command fill differently: times, energies, resident memory, what of them
# decided how much was measured, and how many workers they were measured beside.
MEASURED = frozenset(
    ("setup_s", "query_s", "wall_s", "device_s", "joules", "activation_bytes")
    + ("sweep", "ceilings", "workers", "checksum")
)


class ResultsError(UserError):
    """A results file that cannot be read; the message names file and field."""


@dataclass(frozen=True)
class Asked:
    """A question as it was asked."""

    id: str
    prompt: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class AskedUnder:
    """The questions of some seeds."""

    seeds: tuple[int, ...]
    questions: tuple[Asked, ...]


@dataclass(frozen=True)
class Results:
    """What compare.as_json() writes.

    Attributes:
        schema_version: SCHEMA_VERSION, also where the file was an older one.
        model, parameters, weight_bytes: the network; 0 bytes where an old file does not tell.
        task, settings, machine: as they were given and found.
        sweep: what a query costs.
        questions: by seed; empty where an old file does not tell.
        runs: every arm under every seed.
        load: the ledger of loading the model.
        arguments: a digest of the command's; empty where there was none.
    """

    schema_version: int
    model: str
    parameters: int
    task: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    sweep: Sweep
    runs: tuple[Run, ...] = Field(min_length=1)
    weight_bytes: int = 0
    questions: tuple[AskedUnder, ...] = ()
    load: dict[str, Any] | None = None
    arguments: str = ""


def read_results(path: Path) -> Results:
    """Read a results.json of any schema version so far.

    Raises:
        ResultsError: no UTF-8 JSON object, a newer schema, a field that is missing or wrong, or another checksum.
        OSError: the file cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise ResultsError(f"{path}: not UTF-8 JSON: {error}") from error
    checksum = found.pop("checksum", None) if isinstance(found, dict) else None
    if checksum not in (None, digest(found)):
        raise ResultsError(f"{path}: checksum: the file was changed after it was written; `compare` writes it anew")
    version = found.get("schema_version") if isinstance(found, dict) else None
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise ResultsError(f"{path}: schema_version: expected 1 to {SCHEMA_VERSION}, got {version!r}")
    try:
        return parse_results(found if version == SCHEMA_VERSION else _from_2(found))
    except ValidationError as error:
        raise ResultsError(f"{path}: {first_error(error)}") from error
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:  # an old file of another shape
        raise ResultsError(f"{path}: not a results file of schema {version}: {error!r}") from error


def unmeasured(found: Any) -> Any:
    """A results file's JSON less what is measured: the rest is the same, to the byte, whenever a command is run."""
    if isinstance(found, dict):
        return {name: unmeasured(value) for name, value in found.items() if name not in MEASURED}
    return [unmeasured(value) for value in found] if isinstance(found, list) else found


def parse_results(found: dict[str, Any]) -> Results:
    """Results from what compare.as_json() makes; raises pydantic's ValidationError."""
    results: Results = TypeAdapter(Results).validate_python(found)
    return results


def _from_2(found: dict[str, Any]) -> dict[str, Any]:
    """Schema 3 from 2, or from 1, which has no answers: its seconds become phases and points of a sweep."""
    tokens = {run["arm"]: run["query_tokens"] for run in found["runs"]}
    context = max(0, round(tokens.get("icl", 0) - min(tokens.values())))
    samples: dict[tuple[int, int], list[tuple[float, float]]] = {}
    runs = []
    for run in found["runs"]:
        seconds = run["counts"]["seconds"]
        read_s, alone_s, length = seconds.get("prefill", 0.0), run["uncached_query_s"], context * (run["arm"] == "icl")
        together = max([2, *(accuracy["total"] for accuracy in run["accuracy"].values())])
        samples.setdefault((length, 1), []).append((read_s, max(0.0, alone_s - read_s)))
        samples.setdefault((length, together), []).append((read_s, run["query_s"]))
        counts = {name: value for name, value in run["counts"].items() if name != "seconds"}
        setup_s = sum(value for name, value in seconds.items() if name not in ANSWERING)
        phases = {name: {"wall_s": value, "how": {"wall_s": "measured"}} for name, value in seconds.items()}
        runs.append({"answers": []} | run | {"setup_s": setup_s, "counts": counts | {"phases": phases}})
    points = [
        {
            "context_tokens": length,
            "batch": batch,
            "prefill_s": [read for read, _ in pairs if length],
            "query_s": [query for _, query in pairs],
        }
        for (length, batch), pairs in sorted(samples.items())
    ]
    machine = {"versions": {}, "cores": None, "ceilings": None} | found["machine"]
    return found | {
        "schema_version": 3,
        "machine": machine,
        "runs": runs,
        "sweep": {"context_tokens": context, "points": points},
    }
