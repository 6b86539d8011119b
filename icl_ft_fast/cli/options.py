"""What several commands share: their options, the model they load, the outputs they must not overwrite."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from rich.console import Console
from rich.text import Text

from icl_ft_fast.engine.defaults import DTYPE_NAMES, KV_DTYPE_NAMES, SHIPPED, parse_bytes
from icl_ft_fast.runtime.durable import digest, locked
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.executors import Executor, InProcess, Ray, Torchrun, cores, launched, threads_wanted
from icl_ft_fast.runtime.printable import printable
from icl_ft_fast.runtime.ranges import outside
from icl_ft_fast.runtime.templates import DateError, check_date

if TYPE_CHECKING:
    import torch

    from icl_ft_fast.engine.contexts import ContextStore
    from icl_ft_fast.engine.model import Model

OUTPUT = "output and resuming"  # the group of what is written where

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class UsageError(UserError):
    """Arguments that cannot be followed; the message names the argument."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Ends the help of an option with its default, unless it has none, is a switch, or the help names it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or default is False or default in ((), "", argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A parser whose options stand in named groups; options given twice are an error, and abbreviated ones too.

    An abbreviation such as `--key SECRET` would be read as --key-file, and shown.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Help} | settings, allow_abbrev=False)
        self.register("type", Path, path)
        self._named: dict[str, argparse._ArgumentGroup] = {}

    def group(self, name: str) -> argparse._ArgumentGroup:
        """The group of this name; help shows groups in the order in which they were first asked for."""
        if name not in self._named:
            self._named[name] = self.add_argument_group(name)
        return self._named[name]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what this parser does not know: a command's own error names the command, not the program."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """End the process by one line on standard error and exit code 2."""
        told = printable(" ".join(message.removeprefix("argument ").split()))
        self.exit(2, f"{self.prog}: {told}; `{self.prog} --help` shows the options\n")


def command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], summary: str, examples: str = ""
) -> Parser:
    """A parser that runs `run`.

    Args:
        commands: what the command is added to.
        name: of the command.
        run: what main() calls with the parsed options.
        summary: a phrase in the list of commands, and the first sentence of the command's own help.
        examples: a line each, at the end of the help.
    """
    indented = "\n".join("  " + line for line in examples.splitlines())
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[:1].upper() + summary[1:] + ".",
        epilog=f"examples:\n{indented}" if examples else None,
    )
    parser.set_defaults(run=run)
    return parser


def later(module: str, function: str) -> Callable[[argparse.Namespace], None]:
    """A function of cli/run/, whose module is imported when it is called: help and usage errors load no torch."""

    def run(options: argparse.Namespace) -> None:
        getattr(import_module(f"icl_ft_fast.cli.run.{module}"), function)(options)

    return run


def add_model_options(
    parser: Parser, *, positional: bool = False, required: bool = True, several: bool = False
) -> None:
    """What load_model() reads: --model with --special-tokens, or MODEL; --dtype, --device and more.

    With `several`, --model may be repeated, and is a list.
    """
    group = parser.group("model")
    help = f"checkpoint folder, adapter folder, GGUF file, id on the Hugging Face hub, or '{SHIPPED}'"
    if positional:
        group.add_argument("model", type=place, metavar="MODEL", help=help)
    else:
        more: dict[str, Any] = {"action": "append"} if several else {}
        help += "; repeat it to compare models" * several
        group.add_argument("--model", type=place, required=required, help=help, **more)
        help = "read control tokens spelled in documents, questions and choices as text, or keep them in force"
        group.add_argument("--special-tokens", choices=["text", "keep"], default="text", help=help)
    help = "folder of a LoRA adapter, such as finetune writes, which is merged into the weights"
    group.add_argument("--adapter", type=place, metavar="DIR", help=help)
    help = "dtype of the weights, auto for the checkpoint's own (default: float32 on the CPU, auto on a GPU)"
    group.add_argument("--dtype", choices=(*DTYPE_NAMES, "auto"), help=help)
    add_device_option(parser)
    help = "folder that GGUF files are read into, once each (default: $ICL_FT_FAST_CACHE, or ~/.cache/icl_ft_fast)"
    group.add_argument("--cache", type=place, metavar="DIR", help=help)
    group.add_argument("--trust-remote-code", action="store_true", help="run the Python code of the checkpoint")
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="make a score's bits independent of what else is scored, see docs/determinism.md",
    )


def add_template_option(group: Any, *, files: bool = False) -> None:
    """--template; `files`: a text of one's own is taken too."""
    names = ("auto", "chat", "base")
    how: dict[str, Any] = {"metavar": "auto|chat|base|FILE", "type": place} if files else {"choices": names}
    help = "prompts: chat (through the model's chat template), base (plain text), or auto, which is chat if there is a "
    group.add_argument("--template", default="auto", help=f"{help}template", **how)


def add_device_option(parser: Parser) -> None:
    """--device: what device_of() reads."""
    parser.group("model").add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 or auto, which is cuda if there is a GPU (default: auto)"
    )


def device_of(options: argparse.Namespace) -> torch.device:
    """The device of --device; refuses one that torch does not find here."""
    import torch

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


def add_memory_options(parser: Parser) -> None:
    """--memory, --kv-dtype, --offload: what scoring may take; load_model() reads them."""
    group = parser.group("memory")
    group.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="memory limit of the process, such as 4GB (default: what it holds and most of what is free)",
    )
    group.add_argument(
        "--kv-dtype",
        choices=KV_DTYPE_NAMES,
        help="dtype of the KV cache; int8 and bfloat16 save memory and change scores slightly (default: --dtype)",
    )
    group.add_argument(
        "--offload",
        type=Path,
        metavar="DIR",
        help="folder for the part of the KV cache that exceeds the memory limit (default: the system's temporary one)",
    )


def add_executor_options(parser: Parser) -> None:
    """--executor, --workers, --ray-address: what executor_of() reads, beside --device."""
    group = parser.group("workers")
    group.add_argument(
        "--executor",
        choices=["in-process", "torchrun", "ray"],
        help="how work is distributed, see docs/executors.md (default: torchrun when started by it, else in-process)",
    )
    group.add_argument("--workers", type=positive, metavar="N", help="number of torchrun processes or Ray actors")
    group.add_argument("--ray-address", metavar="ADDRESS", help="address of a Ray cluster (default: start one here)")


def executor_of(options: argparse.Namespace) -> Executor:
    """The executor that is asked for; --executor torchrun outside of torchrun starts the command again under it.

    Each worker has as many threads as OMP_NUM_THREADS says, else its share of the cores.
    """
    is_launched = launched()
    kind = options.executor or ("torchrun" if is_launched else "in-process")
    if is_launched and kind != "torchrun":
        raise UsageError(f"--executor: {kind}: torchrun started this process; leave the option out")
    if kind != "ray" and options.ray_address:
        raise UsageError("--ray-address: needs --executor ray")
    if kind == "in-process":
        if (options.workers or 1) > 1:
            raise UsageError("--workers: needs --executor torchrun or ray")
        return InProcess()
    if is_launched:
        if options.workers not in (None, int(os.environ["WORLD_SIZE"])):
            raise UsageError("--workers: torchrun's --nproc-per-node and --nnodes say how many")
        return Torchrun()
    threads = threads_wanted() or max(1, cores() // (options.workers or 1))
    if kind == "torchrun":
        if options.workers is None:
            raise UsageError("--workers: say how many, or start the command with torchrun")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.workers)]
        command = [sys.executable, *torchrun, "-m", "icl_ft_fast.cli", *options.given]
        os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": str(threads)})
    import torch

    torch.set_num_threads(threads)  # here too: what is measured here and there is one machine's
    return Ray(options.workers, address=options.ray_address, cpus=threads, gpus=int(device_of(options).type == "cuda"))


def add_output_options(parser: Parser) -> None:
    """--overwrite, --quiet."""
    parser.group(OUTPUT).add_argument("--overwrite", action="store_true", help="replace existing output")
    parser.group("display").add_argument("--quiet", action="store_true", help="show no progress bars")


def add_json_option(parser: Parser) -> None:
    """--json."""
    help = "print one JSON object instead of text and tables"
    parser.group("display").add_argument("--json", action="store_true", help=help)


def add_store_options(parser: Parser, *, required: bool = False) -> None:
    """--store, --store-limit: what open_store() reads."""
    group = parser.group("prefix cache on disk")
    help = "folder of saved contexts; a context found there is not computed again, a new one is saved"
    group.add_argument("--store", type=Path, required=required, metavar="DIR", help=help)
    help = "size limit of the folder; contexts unused for longest are removed"
    group.add_argument("--store-limit", type=amount, default=20.0, metavar="GB", help=help)


def open_store(options: argparse.Namespace, model: Model) -> ContextStore | None:
    """The store of --store."""
    from icl_ft_fast.engine.contexts import ContextStore

    return None if options.store is None else ContextStore(options.store, model, int(options.store_limit * 1e9))


def show_progress(options: argparse.Namespace) -> bool:
    """Whether progress is told on standard error: unless --quiet."""
    return not options.quiet


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """What load() is called with, beside the model."""
    named = {name: getattr(options, name) for name in ("dtype", "trust_remote_code", "batch_invariant")}
    # Of commands that have them.
    limits = {name: vars(options).get(name) for name in ("memory", "kv_dtype", "offload", "adapter", "cache")}
    spelt = {"special_tokens": vars(options).get("special_tokens", "text")}
    return named | {"device": str(device_of(options))} | limits | spelt


def load_model(options: argparse.Namespace) -> Model:
    """The model of --model; where torchrun started several processes, on the GPU of this one."""
    from transformers.utils import logging

    from icl_ft_fast.engine.loading import load

    logging.disable_progress_bar()  # other libraries' bars and notices; our own errors and bars remain
    logging.set_verbosity_error()
    how = loading(options)
    if how["device"] == "cuda" and launched():
        how["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    return load(options.model, **how)


def arguments_digest(options: argparse.Namespace) -> str:
    """A digest of all arguments but where the output goes, how it is shown and who takes what, for check_new()."""
    apart = {"run", "rest", "given", "out", "overwrite", "quiet", "json", "executor", "workers", "ray_address"}
    apart |= {"memory", "offload", "cache", "dry_run", "keep_models"}
    return digest(sorted((name, str(value)) for name, value in vars(options).items() if name not in apart))


def check_new(path: Path, overwrite: bool, arguments: str = "", *, option: str = "--out") -> None:
    """Refuse, before any work, an output that could not or must not be written.

    One of the same arguments, which it names under "arguments", is not refused: it is a rerun, and comes out the same.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{option}: {path}: is {'a folder' if path.is_dir() else 'no file that could be replaced'}")
    named = f'"arguments": "{arguments}"'
    if path.exists() and not overwrite and not (arguments and named in path.read_text(errors="replace")):
        raise UsageError(f"{option}: {path}: exists already; choose another or give --overwrite")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UsageError(f"{option}: {above}: is a file, not a folder")


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


def add_template_arguments_option(group: argparse._ArgumentGroup) -> None:
    """--chat-template-kwargs."""
    help = "arguments of the chat template as JSON, such as '{\"enable_thinking\": false}'"
    group.add_argument("--chat-template-kwargs", type=json_object, default={}, metavar="JSON", help=help)


def place(text: str) -> str:
    """An argument's type: a path, in which ~ is the home folder also where no shell has put it there, or a name."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """An argument's type: a path, see place(); what a Parser takes Path for."""
    if not text:  # as an unset variable of a shell gives it; it would be the folder one is in
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(place(text))


def json_object(text: str) -> dict[str, Any]:
    """An argument's type: a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {shortened(text)}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


MOST_WHOLE = 10**12  # of tokens, steps, questions: nobody means more


def positive(text: str) -> int:
    """An argument's type: a whole number above 0."""
    if not text.isdecimal() or not (value := _whole(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {shortened(text)}")
    if value > MOST_WHOLE:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_WHOLE:,}, got {shortened(text)}")
    return value


def seed(text: str) -> int:
    """An argument's type: a random seed; negative ones would draw what positive ones do."""
    if not text.isdecimal() or not (value := _whole(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {shortened(text)}")
    return value


def port(text: str) -> int:
    """An argument's type: a TCP port."""
    if not text.isdecimal() or not (value := _whole(text)) < 2**16:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 65535, got {shortened(text)}")
    return value


def day(text: str) -> str:
    """An argument's type: a date as YYYY-MM-DD."""
    try:
        check_date(text)
    except DateError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from error
    return text


def _whole(text: str) -> int:
    return int(text[:40])  # enough to know that it is too much, and no more digits than int() takes


def shortened(text: str) -> str:
    """What was given, for a message: its first characters where it is long."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def memory_size(text: str) -> int:
    """An argument's type: bytes, as parse_bytes() reads them."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def between(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """An argument's type: a number in a range, `above` its lower end or from it on."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if expected := outside(value, least, most, above=above):
            raise argparse.ArgumentTypeError(f"{expected}, got {shortened(text)}")
        return value

    return number


MOST = 1e15  # of any amount: beyond it sums lose their digits


def amount(text: str) -> float:
    """An argument's type: a finite number above 0."""
    return _number(text, above_0=True)


def amount_or_0(text: str) -> float:
    """An argument's type: a finite number of at least 0."""
    return _number(text, above_0=False)


def _number(text: str, *, above_0: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf or (above_0 and not value):
        raise argparse.ArgumentTypeError(f"expected a number {'above 0' if above_0 else 'from 0 on'}, got {text!r}")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"expected at most {MOST:.0e}, got {text!r}")
    return value
