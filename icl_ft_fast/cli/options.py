"""What several commands share: their options, the model they load, the outputs they must not overwrite."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.text import Text

from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.memory import KV_DTYPES, parse_bytes
from icl_ft_fast.engine.model import DTYPES, SHIPPED, Model, load
from icl_ft_fast.runtime.durable import digest, locked
from icl_ft_fast.runtime.executors import Executor, InProcess, Ray, Torchrun, cores
from icl_ft_fast.runtime.printable import printable

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class UsageError(ValueError):
    """Arguments that cannot be followed; the message names the argument."""


def command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], summary: str, examples: str
) -> argparse.ArgumentParser:
    """A parser that runs `run`; its help ends with the examples, a line each."""
    indented = "\n".join("  " + line for line in examples.splitlines())
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{indented}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model_options(parser: argparse.ArgumentParser, *, positional: bool = False, required: bool = True) -> None:
    """--model, or MODEL; --dtype, --device, --trust-remote-code, --batch-invariant: what load_model() reads."""
    help = f"a checkpoint directory, a hub id, or '{SHIPPED}'"
    if positional:
        parser.add_argument("model", metavar="MODEL", help=help)
    else:
        parser.add_argument("--model", required=required, help=help)
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: %(default)s)"
    )
    add_device_option(parser)
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the checkpoint's own Python code (off by default)"
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="the same bits of a score whatever else is scored (docs/determinism.md)",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """--device: what device_of() reads."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto (the default): cuda where there is one, else cpu"
    )


def device_of(options: argparse.Namespace) -> torch.device:
    """The device of --device; refuses one that torch does not find here."""
    found = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if found else "cpu") if options.device == "auto" else options.device)
    except RuntimeError as error:
        raise UsageError(f"--device: {options.device!r} is no torch device") from error
    if device.type != "cpu" and not (
        device.type == "cuda" and found and (device.index or 0) < torch.cuda.device_count()
    ):
        raise UsageError(f"--device: {options.device}: torch finds no such device here")
    return device


class Terminal(Console):
    """The terminal, with every text that is put on it made printable()."""

    def render_str(self, text: str, **options: Any) -> Text:
        """A text, with rich's own markup if `options` say so."""
        return super().render_str(printable(text), **options)


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """--memory, --kv-dtype, --offload: what scoring may take; load_model() reads them."""
    parser.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="what the process may take while it scores, like 4GB (default: what it holds and most of what is free)",
    )
    parser.add_argument(
        "--kv-dtype", choices=list(KV_DTYPES), help="keep keys and values so: less memory, scores a little off"
    )
    parser.add_argument(
        "--offload", type=Path, metavar="DIR", help="folder for keys and values that do not fit (default: the system's)"
    )


def add_executor_options(parser: argparse.ArgumentParser) -> None:
    """--executor, --workers, --ray-address: what executor_of() reads, beside --device."""
    parser.add_argument(
        "--executor",
        choices=["in-process", "torchrun", "ray"],
        help="who works, see docs/executors.md (default: torchrun in processes that it started, else in-process)",
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="processes here, or actors of a Ray cluster")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="of a Ray cluster (default: one on this machine)")


def executor_of(options: argparse.Namespace) -> Executor:
    """The executor that is asked for; --executor torchrun outside of torchrun starts the command again under it.

    Each worker has as many threads as OMP_NUM_THREADS says, else its share of the cores.
    """
    launched = "RANK" in os.environ
    kind = options.executor or ("torchrun" if launched else "in-process")
    if launched and kind != "torchrun":
        raise UsageError(f"--executor: {kind}: torchrun started this process; leave the option out")
    if kind != "ray" and options.ray_address:
        raise UsageError("--ray-address: needs --executor ray")
    if kind == "in-process":
        if (options.workers or 1) > 1:
            raise UsageError("--workers: needs --executor torchrun or ray")
        return InProcess()
    if launched:
        if options.workers not in (None, int(os.environ["WORLD_SIZE"])):
            raise UsageError("--workers: torchrun's --nproc-per-node and --nnodes say how many")
        return Torchrun()
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // (options.workers or 1)))
    if kind == "torchrun":
        if options.workers is None:
            raise UsageError("--workers: say how many, or start the command with torchrun")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.workers)]
        command = [sys.executable, *torchrun, "-m", "icl_ft_fast.cli", *options.given]
        os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": str(threads)})
    torch.set_num_threads(threads)  # here too: what is measured here and there is one machine's
    return Ray(options.workers, address=options.ray_address, cpus=threads, gpus=int(device_of(options).type == "cuda"))


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """--overwrite, --quiet."""
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text and tables")


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """--store, --store-limit: what open_store() reads."""
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="folder of saved contexts: those there are mapped, new ones saved"
    )
    parser.add_argument(
        "--store-limit", type=amount, default=20.0, metavar="GB", help="of all contexts there (default: %(default)s)"
    )


def open_store(options: argparse.Namespace, model: Model) -> ContextStore | None:
    """The store of --store."""
    return None if options.store is None else ContextStore(options.store, model, int(options.store_limit * 1e9))


def show_progress(options: argparse.Namespace) -> bool:
    """Whether bars are drawn: on a terminal, unless --quiet; a log has no use for them."""
    return not options.quiet and sys.stderr.isatty()


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """What load() is called with, beside the model."""
    named = {name: getattr(options, name) for name in ("dtype", "trust_remote_code", "batch_invariant")}
    limits = {name: vars(options).get(name) for name in ("memory", "kv_dtype", "offload")}  # of commands that have them
    return named | {"device": str(device_of(options))} | limits


def load_model(options: argparse.Namespace) -> Model:
    """The model of --model; where torchrun started several processes, on the GPU of this one."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # other libraries' bars and notices; our own errors and bars remain
    logging.set_verbosity_error()
    how = loading(options)
    if how["device"] == "cuda" and "LOCAL_RANK" in os.environ:
        how["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    return load(options.model, **how)


def arguments_digest(options: argparse.Namespace) -> str:
    """A digest of all arguments but where the output goes, how it is shown and who takes what, for check_new()."""
    apart = {"run", "rest", "given", "out", "overwrite", "quiet", "json", "executor", "workers", "ray_address"}
    apart |= {"memory", "offload"}
    return digest(sorted((name, str(value)) for name, value in vars(options).items() if name not in apart))


def check_new(path: Path, overwrite: bool, arguments: str = "") -> None:
    """Refuse, before any work, an output that could not or must not be written.

    One of the same arguments, which it names under "arguments", is not refused: it is a rerun, and comes out the same.
    """
    if path.is_dir():
        raise UsageError(f"--out: {path}: is a folder")
    named = f'"arguments": "{arguments}"'
    if path.exists() and not overwrite and not (arguments and named in path.read_text(errors="replace")):
        raise UsageError(f"--out: {path}: exists already; choose another or give --overwrite")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UsageError(f"--out: {above}: is a file, not a folder")


@contextmanager
def alone(options: argparse.Namespace, *names: str) -> Iterator[None]:
    """Hold the lock of the folder --out, in which these files may be written; see check_new() and locked()."""

    def check() -> None:
        for name in names:
            check_new(options.out / name, options.overwrite, arguments_digest(options))

    check()
    with locked(options.out / ".lock"):
        check()  # another run may have ended meanwhile
        yield


def positive(text: str) -> int:
    """An argument's type: a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def memory_size(text: str) -> int:
    """An argument's type: bytes, as parse_bytes() reads them."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def amount(text: str) -> float:
    """An argument's type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
