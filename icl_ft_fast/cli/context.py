"""`icl-ft-fast context`: save what a model makes of documents, and list, verify or remove what was saved."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich import box
from rich.table import Table

from icl_ft_fast.cli.options import (
    Commands,
    Terminal,
    UsageError,
    add_memory_options,
    add_model_options,
    amount,
    command,
    load_model,
)
from icl_ft_fast.engine import contexts, encoding
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.engine.score import stored_context
from icl_ft_fast.tasks.task import read_documents


def add(commands: Commands) -> None:
    """Add the command with its subcommands."""
    parser = command(
        commands,
        "context",
        lambda _: None,
        "contexts read once and kept in a folder, for `score --store`",
        "icl-ft-fast context save --model DIR --documents documents.jsonl --store contexts/\n"
        "icl-ft-fast context list --store contexts/\n"
        "icl-ft-fast context verify --store contexts/\n"
        "icl-ft-fast context remove --store contexts/ 3f2a",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    save = actions.add_parser("save", help="read documents with a model and keep what it made of them")
    add_model_options(save)
    add_memory_options(save)
    save.add_argument("--documents", type=Path, required=True, help="JSON lines with id, text")
    save.add_argument("--label", default="", help="shown by list (default: the file of documents)")
    save.add_argument("--limit", type=amount, default=20, metavar="GB", help="of all contexts (default: %(default)s)")
    listing = actions.add_parser("list", help="what there is, the last used first")
    check = actions.add_parser("verify", help="read every file and hold it against its checksum")
    remove = actions.add_parser("remove", help="delete contexts")
    remove.add_argument("ids", nargs="+", metavar="ID", help="as listed; its beginning is enough")
    for action, run in ((save, _save), (listing, _list), (check, _verify), (remove, _remove)):
        action.add_argument("--store", type=Path, required=True, metavar="DIR", help="the folder")
        action.set_defaults(run=run)


def _save(options: argparse.Namespace) -> None:
    documents = read_documents(options.documents)
    model = load_model(options)
    (token,) = encoding.encode(model.tokenizer, [icl_context(documents).rstrip()])
    store = contexts.ContextStore(options.store, model, int(options.limit * 1e9))
    start = time.perf_counter()
    context = stored_context(model, token, store, label=options.label or str(options.documents))
    print(
        f"{len(context.token):,} tokens, {context.nbytes / 1e6:,.0f} MB, in {time.perf_counter() - start:.2f} s; "
        f"in {options.store}"
    )


def _saved(options: argparse.Namespace) -> list[contexts.SavedContext]:
    if not options.store.is_dir():
        raise UsageError(f"--store: {options.store}: no such folder")
    return list(contexts.contexts_in(options.store))


def _list(options: argparse.Namespace) -> None:
    saved = sorted(_saved(options), key=lambda saved: -saved.used)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("id", "tokens", "MB", "last used", "model", "label"):
        table.add_column(name, justify="right" if name in ("tokens", "MB") else "left", overflow="fold")
    for context in saved:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(context.used))
        size = f"{context.num_bytes / 1e6:,.1f}"
        table.add_row(context.id[:8], f"{context.num_tokens:,}", size, used, Path(context.model).name, context.label)
    Terminal(markup=False).print(table)
    print(f"{len(saved)} contexts, {sum(context.num_bytes for context in saved) / 1e6:,.1f} MB")


def _verify(options: argparse.Namespace) -> None:
    saved = _saved(options)
    for context in saved:
        contexts.verify(context.path)
    print(f"{len(saved)} contexts are whole")


def _remove(options: argparse.Namespace) -> None:
    saved = _saved(options)
    for given in options.ids:
        matching = [context.id for context in saved if context.id.startswith(given)]
        if len(matching) != 1:
            raise UsageError(f"ID: {given!r} begins {len(matching)} of the ids in {options.store}; expected one")
        contexts.remove(options.store, matching[0])
        print(f"removed {matching[0]}")
