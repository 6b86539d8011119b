"""The work of `icl-ft-fast context`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich import box
from rich.table import Table

from icl_ft_fast.cli.options import (
    Terminal,
    UsageError,
    load_model,
)
from icl_ft_fast.engine import contexts, encoding
from icl_ft_fast.engine.likelihood import stored_context
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.tasks.task import read_documents


def run_save(options: argparse.Namespace) -> None:
    """`icl-ft-fast context save`."""
    documents = read_documents(options.documents)
    model = load_model(options)
    (token,) = encoding.encode(model.tokenizer, [prompt_context(model, documents).rstrip()])
    store = contexts.ContextStore(options.store, model, int(options.store_limit * 1e9))
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


def run_list(options: argparse.Namespace) -> None:
    """`icl-ft-fast context list`."""
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


def run_verify(options: argparse.Namespace) -> None:
    """`icl-ft-fast context verify`."""
    saved = _saved(options)
    for context in saved:
        contexts.verify(context.path)
    print(f"{len(saved)} checked, none damaged")


def run_remove(options: argparse.Namespace) -> None:
    """`icl-ft-fast context remove`."""
    saved = _saved(options)
    for given in options.ids:
        matching = [context.id for context in saved if context.id.startswith(given)]
        if len(matching) != 1:
            raise UsageError(f"ID: {given!r} begins {len(matching)} of the ids in {options.store}; expected one")
        contexts.remove(options.store, matching[0])
        print(f"removed {matching[0]}")
