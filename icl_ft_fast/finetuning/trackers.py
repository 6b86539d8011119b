"""Metrics to tensorboard, wandb or trackio, each imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from icl_ft_fast.finetuning.settings import FinetuneError

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Trackers:
    """The trackers of a run.

    Args:
        names: keys of TRACKERS.
        folder: where tensorboard writes (its runs/); its name is the run's.
        config: the settings the run was started with.

    Raises:
        FinetuneError: an unknown name, or one that is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path | None, config: dict[str, Any]) -> None:
        self._log: list[Callable[..., Any]] = []
        self._close: list[Callable[[], Any]] = []
        for name in names:
            if name not in TRACKERS:
                raise FinetuneError(f"report_to: expected some of {', '.join(TRACKERS)}, got {name!r}")
            module = tracker_of(name)
            if name == "tensorboard":
                writer = module.SummaryWriter(str((folder or Path()) / "runs"))
                self._log.append(partial(_add_scalars, writer))
                self._close.append(writer.close)
            else:
                run = module.init(project="icl_ft_fast", name=folder.name if folder else None, config=config)
                self._log.append(run.log)
                self._close.append(run.finish)

    def log(self, entry: dict[str, float], step: int) -> None:
        """Pass an entry on."""
        for log in self._log:
            log(entry, step=step)

    def close(self) -> None:
        """End all."""
        for close in self._close:
            close()


def tracker_of(name: str) -> Any:
    """The module of a key of TRACKERS.

    Raises:
        FinetuneError: it is not installed.
    """
    try:
        return import_module(TRACKERS[name])
    except ModuleNotFoundError as error:
        raise FinetuneError(f"report_to: {name} is not installed: pip install {name}") from error


def _add_scalars(writer: Any, entry: dict[str, float], step: int) -> None:
    for name, value in entry.items():
        writer.add_scalar(name, value, step)
