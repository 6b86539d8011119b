"""`icl-ft-fast serve`: a server of one model, with OpenAI's endpoints and one for choices."""

from __future__ import annotations

from pathlib import Path

from icl_ft_fast.cli.options import (
    Commands,
    add_memory_options,
    add_model_options,
    add_store_options,
    add_template_arguments_option,
    command,
    day,
    later,
    port,
    positive,
)

KEY_VARIABLE = "ICL_FT_FAST_API_KEY"


def add(commands: Commands) -> None:
    """Add the command."""
    serving = command(
        commands,
        "serve",
        later("serve", "run_serve"),
        "serve a model over HTTP: OpenAI's completions and chat, and likelihoods of choices",
        "icl-ft-fast serve DIR --port 8000\n"
        f"{KEY_VARIABLE}=$(cat key) icl-ft-fast serve DIR --host 0.0.0.0 --context-memory 8000",
    )
    add_model_options(serving, positional=True)
    server = serving.group("server")
    server.add_argument("--name", help="model name in the API (default: the last part of MODEL)")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on")
    server.add_argument("--port", type=port, default=8000, help="port to listen on; 0 picks a free one")
    help = "origins of web pages whose scripts may use the server, such as https://example.org, or * for all"
    server.add_argument("--allow-origins", nargs="+", default=(), metavar="ORIGIN", help=help)
    help = "what is logged: info has a line for each request, without its text"
    levels = ("debug", "info", "warning", "error")
    serving.group("display").add_argument("--log-level", choices=levels, default="info", help=help)
    help = f"file whose first line is the API key (default: the environment variable {KEY_VARIABLE})"
    server.add_argument("--key-file", type=Path, metavar="FILE", help=help)
    help = "YYYY-MM-DD, the date that a chat template writes which reads it (default: the day of the start)"
    server.add_argument("--template-date", type=day, metavar="YYYY-MM-DD", help=help)
    add_template_arguments_option(server)
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
