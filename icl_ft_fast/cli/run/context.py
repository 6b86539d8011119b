"""The work of `icl-ft-fast context`."""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from icl_ft_fast.cli.options import (
    Terminal,
    UsageError,
    load_model,
    show_progress,
)
from icl_ft_fast.cli.run.compare import prefix_settings, prefix_tokens, sizes_of_option
from icl_ft_fast.engine import contexts, encoding
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import stored_context
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.engine.slots import LABEL
from icl_ft_fast.finetuning.prefix import train_prefix
from icl_ft_fast.finetuning.settings import RunOptions
from icl_ft_fast.runtime.durable import digest
from icl_ft_fast.study.compaction import compact
from icl_ft_fast.study.settings import CHECKPOINT_S
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


def run_train(options: argparse.Namespace) -> None:
    """`icl-ft-fast context train`: a prefix of each size, in turn; one that was killed goes on."""
    documents, settings = read_documents(options.documents), prefix_settings(options)
    sizes = prefix_tokens(options.prefix_tokens)
    model = load_model(options)
    store = contexts.ContextStore(options.store, model, int(options.store_limit * 1e9))
    for size in sizes:
        texts = [[document.id, document.text] for document in documents]
        name = digest(model.fingerprint(), texts, asdict(settings), options.template, options.seed, size)
        folder, start, ledger = options.store / f".training-{name[:16]}", time.perf_counter(), Ledger()
        run = RunOptions(folder, resume=True, checkpoint_s=CHECKPOINT_S, progress=show_progress(options))
        made = train_prefix(
            model, documents, size, settings, template=options.template, seed=options.seed, options=run, ledger=ledger
        )
        path = store.add(made.context, f"{LABEL}{made.key} | {options.label or options.documents}")
        shutil.rmtree(folder)
        teach = ledger.phases["teach"]
        print(
            f"{path.stem[:8]}: {size} slots for {len(documents)} documents, {made.context.nbytes / 1e6:,.1f} MB, in "
            f"{time.perf_counter() - start:.1f} s; loss {made.losses[0]:.3f} to {made.losses[-1]:.3f} nats a token; "
            f"the teacher read 1 in {teach.request_tokens / teach.forwarded_tokens:.1f} of its tokens; in "
            f"{options.store}"
        )


def run_compact(options: argparse.Namespace) -> None:
    """`icl-ft-fast context compact`: documents at each ratio, in turn."""
    documents, ratios = read_documents(options.documents), sizes_of_option("--ratio", options.ratio)
    model = load_model(options)
    store = contexts.ContextStore(options.store, model, int(options.store_limit * 1e9))
    for ratio in ratios:
        start, ledger = time.perf_counter(), Ledger()
        made = compact(model, documents, ratio, template=options.template, ledger=ledger)
        path = store.add(made.context, f"{LABEL}{made.key} | {options.label or options.documents}")
        print(
            f"{path.stem[:8]}: {len(made.context.token)} slots for {len(documents)} documents, "
            f"{made.context.nbytes / 1e6:,.1f} MB, in {time.perf_counter() - start:.1f} s; error of attention's output "
            f"{made.error:.3f}; in {options.store}"
        )


def named_context(store: Path, given: str, option: str) -> contexts.SavedContext:
    """The saved context whose id begins so; raises UsageError."""
    matching = [saved for saved in contexts.contexts_in(store) if saved.id.startswith(given)]
    if len(matching) != 1:
        raise UsageError(f"{option}: {given!r} begins {len(matching)} of the ids in {store}; expected one")
    return matching[0]


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
    _saved(options)
    for given in options.ids:
        found = named_context(options.store, given, "ID").id
        contexts.remove(options.store, found)
        print(f"removed {found}")
