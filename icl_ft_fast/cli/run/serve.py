"""The work of `icl-ft-fast serve`."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from pathlib import Path

from icl_ft_fast.cli.options import (
    UsageError,
    load_model,
    open_store,
)
from icl_ft_fast.cli.serve import KEY_VARIABLE
from icl_ft_fast.runtime.progress import tell_no_more
from icl_ft_fast.runtime.templates import fix_date
from icl_ft_fast.tasks.files import read_text


def run_serve(options: argparse.Namespace) -> None:
    """`icl-ft-fast serve`."""
    try:
        import uvicorn

        from icl_ft_fast.integrations.guard import Limits
        from icl_ft_fast.integrations.scheduler import Scheduler
        from icl_ft_fast.integrations.server import make_app
    except ModuleNotFoundError as error:
        raise UsageError(f"needs {error.name}: pip install 'icl_ft_fast[serve]'") from error
    key = _key(options.key_file)
    name = options.name or Path(options.model).name or options.model
    if key is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"icl-ft-fast serve: whoever reaches {options.host} may use this server: no key is set", file=sys.stderr)
    _check_address(options.host, options.port)
    model = load_model(options)
    if date := fix_date(model.tokenizer, options.template_date):
        print(f"The chat template writes the date {date}; --template-date sets it.", file=sys.stderr)
    scheduler = Scheduler(
        model,
        context_bytes=options.context_memory * 10**6,
        max_waiting=options.max_waiting,
        store=open_store(options, model),
    )
    limits = Limits(body_bytes=options.max_body * 10**6, choices=options.max_choices, new_tokens=options.max_new_tokens)
    app = make_app(
        scheduler,
        name,
        key=key,
        limits=limits,
        allow_origins=options.allow_origins,
        template_date=date,
        template_arguments=options.chat_template_kwargs,
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("icl_ft_fast").setLevel(options.log_level.upper())
    if options.log_level == "info":  # a line for each request, not another for each batch
        logging.getLogger("icl_ft_fast.engine.memory").setLevel("WARNING")
    tell_no_more()
    print(f"serving {name!r} on http://{options.host}:{options.port}", file=sys.stderr)
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        limit_concurrency=options.max_connections,
        server_header=False,
        timeout_graceful_shutdown=options.shutdown_timeout,
        log_level="debug" if options.log_level == "debug" else "warning",
        access_log=False,
        workers=1,  # WEB_CONCURRENCY, which hosts set, means processes; here one thread owns the model
    )


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before the model is loaded; raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn's own
            trial.bind(address)
    except OSError as error:
        raise UsageError(f"--host, --port: {host}:{port}: {error.strerror or error}") from error


def _key(file: Path | None) -> str | None:
    """The bearer key of a file or of the environment; it is no option, since command lines are seen by everyone."""
    text = os.environ.get(KEY_VARIABLE) if file is None else (read_text(file).splitlines() or [""])[0]
    if text is not None and not text.strip():
        raise UsageError(f"{file or '$' + KEY_VARIABLE}: the key is empty")
    return None if text is None else text.strip()
