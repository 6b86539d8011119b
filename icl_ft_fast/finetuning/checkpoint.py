"""The files of a run, under the names of TRL and PEFT, each folder complete or absent.

    output_dir/metrics.jsonl          a line a step, always
    output_dir/checkpoint-N/          the model (or adapter) after step N with its tokenizer; trainer_state.json;
                                      optimizer.safetensors; run.json, what the run was started with; progress.json,
                                      its losses and costs; SHA256SUMS of all of them
    output_dir/                       at the end: the files of the best checkpoint, or of the last one

There is no generator to save: order, adapters' first weights and dropout follow from the seed and the step. A folder is
written under a hidden name, synced, and renamed; what a killed process leaves under hidden names is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from icl_ft_fast.finetuning.settings import FinetuneError
from icl_ft_fast.runtime.durable import follow_umask, replacing, sync

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = {"trainer_state.json", "optimizer.safetensors", "run.json", "progress.json", "SHA256SUMS"}


@dataclass
class Progress:
    """The steps a run has done.

    Attributes:
        step: steps done.
        losses: mean loss per target token of each.
        log: log_history of trainer_state.json; evaluations have an "eval_loss".
        counts: Ledger.as_dict() of the run so far, including processes it was resumed from.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def evaluations(self) -> list[tuple[float, int]]:
        """(loss, step) of each evaluation."""
        return [(entry["eval_loss"], int(entry["step"])) for entry in self.log if "eval_loss" in entry]

    @property
    def best(self) -> tuple[float, int] | None:
        """(loss, step) of the best evaluation, the first of equals."""
        return min(self.evaluations, default=None)


class RunFolder:
    """output_dir, or nowhere.

    Args:
        path: the folder; None writes nothing.
        origin: what the run was started with; a run is only resumed with the same.
        is_writer: whether this process writes; one of many does.

    Raises:
        FinetuneError: the folder holds a run already, or cannot be made.
    """

    def __init__(self, path: Path | None, origin: dict[str, Any], *, resume: bool, is_writer: bool) -> None:
        self.path, self.origin, self.is_writer = path, json.loads(json.dumps(origin)), is_writer
        if path is None:
            return
        if not resume and (self.steps() or (path / "metrics.jsonl").exists()):
            raise FinetuneError(f"output_dir: {path}: holds a run already; resume it or choose another folder")
        if is_writer:
            with _naming_file_errors(path, "made"):
                path.mkdir(parents=True, exist_ok=True)
                for left in path.glob(".checkpoint-*"):  # by a process that was killed
                    shutil.rmtree(left)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return _steps(self.path)

    def folder(self, step: int) -> Path:
        """The checkpoint after a step."""
        assert self.path is not None
        return self.path / f"checkpoint-{step}"

    def restore(self) -> Progress:
        """The progress of the last checkpoint, later metrics removed; step 0 if there is none.

        Raises:
            FinetuneError: it was made with other examples or settings, or is damaged, or metrics.jsonl is.
        """
        step, done = max(self.steps(), default=0), Progress()
        if step:
            _check(self.folder(step))
            before = json.loads((self.folder(step) / "run.json").read_text(encoding="utf-8"))
            changed = [name for name in self.origin if before.get(name) != self.origin[name]]
            if changed:
                now, then = (json.dumps(x.get(changed[0]))[:60] for x in (self.origin, before))
                raise FinetuneError(
                    f"{self.folder(step)}: cannot be resumed: {changed[0]} was {then}, now {now}; give the "
                    "value the run was started with"
                )
            log = json.loads((self.folder(step) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            done = Progress(step, log=log, **json.loads((self.folder(step) / "progress.json").read_text()))
        assert self.path is not None
        metrics = self.path / "metrics.jsonl"
        written = metrics.read_bytes() if metrics.exists() else b""
        lines = written.split(b"\n")[:-1]
        steps = [_step_of(line) for line in lines[: max(step, 1)]]
        if len(lines) < step or steps != list(range(1, len(steps) + 1)):
            raise FinetuneError(
                f"{metrics}: damaged, or of another run: expected a line for each of {step} steps; restore it or "
                "choose another output_dir"
            )
        whole = b"".join(line + b"\n" for line in lines[:step])
        if self.is_writer and written != whole:
            with _naming_file_errors(metrics, "written"), replacing(metrics) as partial:
                partial.write_bytes(whole)
        return done

    def append_metrics(self, entry: dict[str, float]) -> None:
        """Add a line to metrics.jsonl."""
        if self.path is not None and self.is_writer:
            with (
                _naming_file_errors(self.path / "metrics.jsonl", "written"),
                (self.path / "metrics.jsonl").open("a") as file,
            ):
                file.write(json.dumps(entry) + "\n")

    def save(
        self, progress: Progress, state: dict[str, torch.Tensor], write_model: Callable[[Path], None], **trainer: Any
    ) -> None:
        """Write the checkpoint of this step.

        Args:
            progress: the steps done.
            state: the optimizer's tensors.
            write_model: writes model or adapter and tokenizer into a folder.
            trainer: more fields of trainer_state.json.

        Raises:
            FinetuneError: it could not be written; the partial folder is removed, earlier checkpoints stay complete.
        """
        if self.path is None or not self.is_writer or progress.step in self.steps():
            return
        best = progress.best
        described = {
            "global_step": progress.step,
            "log_history": progress.log,
            "best_metric": best and best[0],
            "best_global_step": best and best[1],
            "best_model_checkpoint": best and str(self.folder(best[1])),
            **trainer,
        }
        target = self.folder(progress.step)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with _naming_file_errors(target, "written", max(self.steps(), default=None)):
                partial.mkdir()
                write_model(partial)
                save_file(state, partial / "optimizer.safetensors")
                rest = {"losses": progress.losses, "counts": progress.counts}
                contents = {"trainer_state.json": described, "run.json": self.origin, "progress.json": rest}
                for name, content in contents.items():
                    (partial / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                sums = "".join(f"{_sha256(file)}  {file.relative_to(partial)}\n" for file in _files(partial))
                (partial / "SHA256SUMS").write_text(sums, encoding="utf-8")
                for file in _files(partial):
                    follow_umask(file)
                for file in (*partial.rglob("*"), partial, self.path / "metrics.jsonl"):
                    sync(file)
                os.rename(partial, target)
                sync(self.path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def prune(self, keep: int | None, best: int | None) -> None:
        """Remove all but the last `keep` checkpoints and the best one."""
        for step in self.steps()[: -keep if keep else 0]:
            if step != best and self.is_writer:
                hidden = self.folder(step).with_name(f".checkpoint-{step}.removed")
                os.rename(self.folder(step), hidden)
                shutil.rmtree(hidden)

    def finish(self, step: int) -> None:
        """Copy the model of a checkpoint into output_dir, weights last."""
        if self.path is None or not self.is_writer:
            return
        files = [file for file in _files(self.folder(step)) if file.name not in _STATE]
        with _naming_file_errors(self.path, "written", step):
            for file in sorted(files, key=lambda file: (file.suffix == ".safetensors", file.name)):
                target = self.path / file.relative_to(self.folder(step))
                target.parent.mkdir(exist_ok=True)
                with replacing(target) as partial:
                    shutil.copyfile(file, partial)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have a folder written, whole or not at all, in the place of what is there."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    with _naming_file_errors(folder, "written"):
        try:
            partial.mkdir(parents=True)
            write(partial)
            for file in _files(partial):
                follow_umask(file)
            for file in (*partial.rglob("*"), partial):
                sync(file)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(partial, folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _steps(path: Path | None) -> list[int]:
    found = (_NAME.fullmatch(p.name) for p in path.iterdir()) if path and path.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def recorded(path: Path, name: str) -> Any:
    """What the run in output_dir was started with under this name; None if it has no checkpoint, or a damaged one."""
    with suppress(OSError, ValueError, AttributeError):  # RunFolder.restore() says what is wrong with it
        folder = path / f"checkpoint-{max(_steps(path), default=0)}"
        return json.loads((folder / "run.json").read_text(encoding="utf-8")).get(name)
    return None


def _check(folder: Path) -> None:
    """Raise FinetuneError unless every file of a checkpoint is as it was written."""
    listed, sums = folder / "SHA256SUMS", {}
    with suppress(OSError, ValueError):
        sums = dict(line.split("  ", 1)[::-1] for line in listed.read_text(encoding="utf-8").splitlines())
    found = {str(file.relative_to(folder)): _sha256(file) for file in _files(folder) if file != listed}
    for name in sorted(found.keys() | sums.keys()):
        if found.get(name) != sums.get(name):
            raise FinetuneError(
                f"{folder / name}: damaged, lost, or not of this checkpoint; remove {folder} to resume from the one "
                "before it"
            )


def _files(folder: Path) -> list[Path]:
    """All below it: a tokenizer with several chat templates has a folder of them."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(line: bytes) -> object:
    """The step that a line of metrics.jsonl is of; None if it is no such line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer's tensors of a checkpoint."""
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _naming_file_errors(path: Path, done: str, last: int | None = None) -> Any:
    """Within the block a file error becomes a FinetuneError that names the path and the last complete checkpoint."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        whole = "" if last is None else f"; checkpoint-{last} is complete and can be resumed"
        raise FinetuneError(f"{path}: cannot be {done}: {reason}{whole}") from error
