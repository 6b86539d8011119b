"""`icl-ft-fast serve`: a server of one model, with OpenAI's endpoints and one for choices."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from icl_ft_fast.cli.options import (
    Commands,
    UsageError,
    add_memory_options,
    add_model_options,
    add_store_options,
    command,
    load_model,
    open_store,
    positive,
)

KEY_VARIABLE = "ICL_FT_FAST_API_KEY"


def add(commands: Commands) -> None:
    """Add the command."""
    serving = command(
        commands,
        "serve",
        _serve,
        "serve a model over HTTP: OpenAI's completions and chat, and likelihoods of choices",
        "icl-ft-fast serve DIR --port 8000\n"
        f"{KEY_VARIABLE}=$(cat key) icl-ft-fast serve DIR --host 0.0.0.0 --context-memory 8000",
    )
    add_model_options(serving, positional=True)
    server = serving.group("server")
    server.add_argument("--name", help="model name in the API (default: the last part of MODEL)")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on")
    server.add_argument("--port", type=int, default=8000, help="port to listen on; 0 picks a free one")
    help = f"file whose first line is the API key (default: the environment variable {KEY_VARIABLE})"
    server.add_argument("--key-file", type=Path, metavar="FILE", help=help)
    limits: dict[str, tuple[int, str, str]] = {
        "--max-waiting": (256, "N", "requests in the queue; further ones get status 429"),
        "--max-connections": (1024, "N", "simultaneous connections; further ones get status 503"),
        "--max-body": (8, "MB", "size of a request body"),
        "--max-choices": (1024, "N", "choices or prompts per request"),
        "--max-new-tokens": (4096, "N", "generated tokens per prompt"),
        "--shutdown-timeout": (30, "SECONDS", "time for running requests to finish when the server is stopped"),
    }
    for option, (default, unit, help) in limits.items():
        serving.group("limits").add_argument(option, type=positive, default=default, metavar=unit, help=help)
    help = "memory for the KV caches of recent contexts"
    serving.group("memory").add_argument("--context-memory", type=positive, default=2000, metavar="MB", help=help)
    add_memory_options(serving)
    add_store_options(serving)


def _serve(options: argparse.Namespace) -> None:
    try:
        import uvicorn

        from icl_ft_fast.integrations.engine import Engine
        from icl_ft_fast.integrations.guard import Limits
        from icl_ft_fast.integrations.server import make_app
    except ModuleNotFoundError as error:
        raise UsageError(f"needs {error.name}: pip install 'icl_ft_fast[serve]'") from error
    key = _key(options.key_file)
    name = options.name or Path(options.model).name or options.model
    if key is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"icl-ft-fast serve: whoever reaches {options.host} may use this server: no key is set", file=sys.stderr)
    model = load_model(options)
    engine = Engine(
        model,
        context_bytes=options.context_memory * 10**6,
        max_waiting=options.max_waiting,
        store=open_store(options, model),
    )
    limits = Limits(body_bytes=options.max_body * 10**6, choices=options.max_choices, new_tokens=options.max_new_tokens)
    app = make_app(engine, name, key=key, limits=limits)
    print(f"serving {name!r} on http://{options.host}:{options.port}", file=sys.stderr)
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        limit_concurrency=options.max_connections,
        server_header=False,
        timeout_graceful_shutdown=options.shutdown_timeout,
        log_level="warning",
        access_log=False,
    )


def _key(file: Path | None) -> str | None:
    """The bearer key of a file or of the environment; it is no option, since command lines are seen by everyone."""
    text = os.environ.get(KEY_VARIABLE) if file is None else (file.read_text(encoding="utf-8").splitlines() or [""])[0]
    if text is not None and not text.strip():
        raise UsageError(f"{file or '$' + KEY_VARIABLE}: the key is empty")
    return None if text is None else text.strip()
