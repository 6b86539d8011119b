"""What a request must pass before any route of the server: the key, the size of its body, the time that takes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from icl_ft_fast.integrations.protocol import RefusedError, error_response
from icl_ft_fast.runtime.printable import printable

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    Attributes:
        body_bytes: of a request.
        body_s: seconds a body may take to arrive.
        choices: of a question, and prompts of a request.
        new_tokens: written after a prompt.
    """

    body_bytes: int = 8 * 2**20
    body_s: float = 30.0
    choices: int = 1024
    new_tokens: int = 4096


class Guard:
    """Before any route: the key, how large a body may be and how long it may take. Logs a line for each request."""

    def __init__(self, app: ASGIApp, key: str | None, limits: Limits) -> None:
        self.app, self.key, self.limits = app, None if key is None else key.encode(), limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body read, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._pass(scope, receive, noted)
        finally:  # neither the text of a request nor its key
            client, ms = (scope.get("client") or ("?",))[0], 1e3 * (time.perf_counter() - began)
            _log.info("%s %s %s %s %.0f ms", client, scope["method"], printable(scope["path"]), status, ms)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = self.key is None or (hmac.compare_digest(given.strip(), self.key) and scheme.lower() == b"bearer")
        if not right and scope["path"] != "/health":
            await error_response(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")(
                scope, receive, send
            )
            return
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.limits.body_bytes:
                        raise RefusedError(413, f"the body has more than {self.limits.body_bytes:,} bytes")
        except TimeoutError:
            await error_response(408, f"the body took more than {self.limits.body_s:g} seconds")(scope, receive, send)
            return
        except RefusedError as refused:
            await error_response(refused.status, str(refused))(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)
