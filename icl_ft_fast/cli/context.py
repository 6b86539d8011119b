"""`icl-ft-fast context`: save what a model makes of documents, and list, verify or remove what was saved."""

from __future__ import annotations

from pathlib import Path

from icl_ft_fast.cli.compare import add_prefix_options
from icl_ft_fast.cli.options import (
    Commands,
    add_memory_options,
    add_model_options,
    add_store_options,
    add_template_option,
    command,
    later,
    seed,
)


def add(commands: Commands) -> None:
    """Add the command with its subcommands."""
    parser = command(
        commands,
        "context",
        lambda _: None,
        "save the KV cache of documents to a folder, for --store of other commands",
        "icl-ft-fast context save --model DIR --documents documents.jsonl --store contexts/\n"
        "icl-ft-fast context train --model DIR --documents documents.jsonl --prefix-tokens 64 --store contexts/\n"
        "icl-ft-fast context compact --model DIR --documents documents.jsonl --ratio 8 --store contexts/\n"
        "icl-ft-fast context list --store contexts/\n"
        "icl-ft-fast context verify --store contexts/\n"
        "icl-ft-fast context remove --store contexts/ 3f2a",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    save = command(actions, "save", later("context", "run_save"), "compute the KV cache of documents and save it")
    add_model_options(save)
    help = "train key/value slots that stand for documents (a prefix), and save them as a context"
    train = command(actions, "train", later("context", "run_train"), help)
    add_model_options(train)
    help = "compact documents into fewer key/value slots without training, and save them as a context"
    compact = command(actions, "compact", later("context", "run_compact"), help)
    add_model_options(compact)
    for action in (save, train, compact):
        data = action.group("data")
        help = "JSON lines file with id and text"
        data.add_argument("--documents", type=Path, required=True, metavar="FILE", help=help)
        help = "name shown by list (default: the documents' file)"
        data.add_argument("--label", default="", help=help)
        add_store_options(action, required=True)
        add_memory_options(action)
    add_prefix_options(train)
    add_template_option(train.group("trained prefix"))
    train.group("trained prefix").add_argument("--seed", type=seed, default=0, metavar="SEED", help="random seed")
    help = "show no progress bars"
    train.group("display").add_argument("--quiet", action="store_true", help=help)
    help = "tokens of the documents that a slot stands for"
    compact.group("compaction").add_argument("--ratio", default="8", metavar="N[,N...]", help=help)
    add_template_option(compact.group("compaction"))
    listing = command(actions, "list", later("context", "run_list"), "list saved contexts, most recently used first")
    check = command(actions, "verify", later("context", "run_verify"), "check every file against its checksum")
    remove = command(actions, "remove", later("context", "run_remove"), "delete saved contexts")
    help = "id as shown by list; its first characters suffice"
    remove.group("prefix cache on disk").add_argument("ids", nargs="+", metavar="ID", help=help)
    for action in (listing, check, remove):
        help = "folder of saved contexts"
        action.group("prefix cache on disk").add_argument("--store", type=Path, required=True, metavar="DIR", help=help)
