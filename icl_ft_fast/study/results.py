"""results.json: written with a checksum, read with its schema validated, version 3 converted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.machine import Ceilings, fingerprint
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import ShownPrompt, prompt_context
from icl_ft_fast.runtime.durable import digest, replacing
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.study.prices import first_error
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.study.sweep import Sweep
from icl_ft_fast.tasks.task import Question

SCHEMA_VERSION = 4  # 3 counted rows where 4 counts tokens

# Fields, at any depth, that two runs of one command fill differently: times, energies, resident memory, what of them
# decided how much was measured, and how many workers they were measured beside.
MEASURED = frozenset(
    ("setup_s", "query_s", "wall_s", "device_s", "joules", "activation_bytes")
    + ("sweep", "ceilings", "workers", "checksum")
)


class ResultsError(UserError):
    """A results file that cannot be read; the message names file and field."""


@dataclass(frozen=True)
class AskedQuestion:
    """A question as it was asked."""

    id: str
    prompt: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class QuestionsOfSeeds:
    """The questions of some seeds."""

    seeds: tuple[int, ...]
    questions: tuple[AskedQuestion, ...]


@dataclass(frozen=True)
class Results:
    """A study's results.

    Attributes:
        schema_version: SCHEMA_VERSION, also where the file had an older one.
        model, parameters, weight_bytes: the network; 0 bytes where the file does not tell.
        quantization: how its weights were quantised, if they were read from a GGUF file.
        task, settings, machine: as they were given and found.
        sweep: what a query costs.
        questions: by seed; empty where the file does not tell.
        runs: every arm under every seed.
        load: the ledger of loading the model.
        arguments: a digest of the command's arguments; empty where there was none.
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
    quantization: str = ""
    questions: tuple[QuestionsOfSeeds, ...] = ()
    load: dict[str, Any] | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Setting:
    """What a study's results are about.

    Attributes:
        model, task_name, settings: of the study.
        arguments: a digest of the caller's, by which it finds the results again.
        prompt: one question as the model reads it.
    """

    model: Model
    task_name: str
    settings: StudySettings
    arguments: str = ""
    prompt: ShownPrompt | None = None


def as_json(
    setting: Setting,
    runs: Sequence[Run],
    *,
    costs: Sweep | None = None,
    load: dict[str, Any] | None = None,
    ceilings: Ceilings | None = None,
) -> dict[str, Any]:
    """Everything that results.json holds. Of an absolute path it names the last two parts.

    Args:
        setting: what the runs are of.
        runs: those that are made.
        costs: what queries cost.
        load: the ledger of loading the model.
        ceilings: what the device does at best.
    """
    model, questions_of = setting.model, dict[tuple[Question, ...], list[int]]()
    for run in runs:
        seeds = questions_of.setdefault(run.questions, [])
        seeds += [run.seed] * (run.seed not in seeds)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": _public(model.name) + (f" with {_public(model.adapter)}" if model.adapter else ""),
        "parameters": model.num_parameters,
        "weight_bytes": work_of(model).weight_bytes,
        "quantization": model.quantization,
        "task": _public(setting.task_name),
        "settings": asdict(setting.settings) | _prompts(setting),
        "machine": fingerprint(model.device) | {"ceilings": None if ceilings is None else asdict(ceilings)},
        "load": load,
        "arguments": setting.arguments,
        "sweep": asdict(costs or Sweep()),
        "questions": [
            {"seeds": seeds, "questions": [{"id": q.id, "prompt": q.prompt, "choices": q.choices} for q in questions]}
            for questions, seeds in questions_of.items()
        ],
        "runs": [run.as_json for run in runs],
    }


def _prompts(setting: Setting) -> dict[str, str]:
    """What the chat template makes of a request without documents, such as the date; and a prompt with its choice."""
    found = {}
    if setting.settings.template == "chat":
        found["chat_prompt"] = prompt_context(setting.model, [], "chat")
    if setting.prompt is not None:
        found["prompt"] = f"{setting.prompt.text}[{setting.prompt.choice}]"
        found["boundary"] = setting.prompt.boundary
    return found


def _public(name: str) -> str:
    """A path as others may read it: of an absolute one the last two parts."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results.json atomically, with a digest of it all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(results | {"checksum": digest(results)}, indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> Results:
    """Read a results.json of schema version 3 or 4.

    Raises:
        ResultsError: no UTF-8 JSON object, another schema, a field that is missing or wrong, or a wrong checksum.
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
    if type(version) is not int or not 3 <= version <= SCHEMA_VERSION:
        raise ResultsError(f"{path}: schema_version: expected 3 or {SCHEMA_VERSION}, got {version!r}")
    try:
        return parse_results(found if version == SCHEMA_VERSION else _from_3(found))
    except ValidationError as error:
        raise ResultsError(f"{path}: {first_error(error)}") from error
    except (KeyError, TypeError, AttributeError) as error:  # a file of another shape
        raise ResultsError(f"{path}: not a results file of schema {version}: {error!r}") from error


def unmeasured(found: Any) -> Any:
    """A results file's JSON without what is measured: the rest is the same, to the byte, whenever a command is run."""
    if isinstance(found, dict):
        return {name: unmeasured(value) for name, value in found.items() if name not in MEASURED}
    return [unmeasured(value) for value in found] if isinstance(found, list) else found


def parse_results(found: dict[str, Any]) -> Results:
    """Results from what as_json() makes; raises pydantic's ValidationError."""
    results: Results = TypeAdapter(Results).validate_python(found)
    return results


def _from_3(found: dict[str, Any]) -> dict[str, Any]:
    """Schema 4 from 3, which counted rows where 4 counts tokens."""
    renamed = {
        "forwarded_rows": "forwarded_tokens",
        "reused_rows": "cached_tokens",
        "head_rows": "head_tokens",
        "query_rows": "query_forwarded_tokens",
    }

    def with_new_names(value: Any) -> Any:
        if isinstance(value, dict):
            return {renamed.get(name, name): with_new_names(each) for name, each in value.items()}
        return [with_new_names(each) for each in value] if isinstance(value, list) else value

    runs = [with_new_names(run) for run in found["runs"]]
    runs = [run | {"query_request_tokens": run["query_tokens"]} for run in runs]
    runs = [{name: value for name, value in run.items() if name != "query_tokens"} for run in runs]
    return found | {"schema_version": 4, "load": with_new_names(found.get("load")), "runs": runs}
