"""Where replies come from: a loaded model, an OpenAI-compatible endpoint, or a file of replies; one protocol."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

from icl_ft_fast.augmentation.prompts import Prompt
from icl_ft_fast.augmentation.strategy import AugmentError
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import RUNNING, Sampling, iter_generations
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.templates import render_chat
from icl_ft_fast.tasks.files import read_jsonl
from icl_ft_fast.tasks.task import text_field

KEY_VARIABLE = "OPENAI_API_KEY"
CHARACTERS_PER_TOKEN = 3  # where the tokenizer is not here: estimates rather too many tokens than too few


@dataclass(frozen=True)
class Reply:
    """A generated text, its tokens, and its natural-log probability where the generator tells."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    logp: float | None


class TextGenerator(Protocol):
    """What replies to prompts."""

    @property
    def prompts_per_call(self) -> int | None:
        """Prompts a call, always the same ones, where a reply's last bits depend on what is decoded beside it.

        Where one of their replies is missing, all of them are generated again. None: missing replies alone are
        generated, all in one call.
        """

    @property
    def fingerprint(self) -> str:
        """Differs between generators that may reply differently; holds no secret."""

    def prompt_tokens(self, text: str) -> int:
        """Tokens of a prompt, estimated where they cannot be known."""

    def replies(self, requests: Sequence[tuple[Prompt, Sampling]]) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) as replies are ready; requests that it has no reply to are left out."""


@dataclass(frozen=True)
class LocalGenerator:
    """A loaded model; prompts go through its chat template if `is_chat`.

    Raises:
        AugmentError: `is_chat`, and the tokenizer has no chat template.
    """

    model: Model
    is_chat: bool = False
    ledger: Ledger | None = None
    prompts_per_call: ClassVar[int] = 16 * RUNNING

    def __post_init__(self) -> None:
        if self.is_chat and not getattr(self.model.tokenizer, "chat_template", None):
            raise AugmentError(f"chat: {self.model.name} has no chat template")

    @property
    def fingerprint(self) -> str:
        """The model's, and whether prompts go through its chat template."""
        return f"{'chat' if self.is_chat else 'base'} {self.model.fingerprint()}"

    def prompt_tokens(self, text: str) -> int:
        """Counted."""
        return len(encoding.encode(self.model.tokenizer, [self._whole(text)])[0])

    def replies(self, requests: Sequence[tuple[Prompt, Sampling]]) -> Iterator[tuple[int, Reply]]:
        """See TextGenerator; raises GenerateError where a prompt does not fit the model's positions."""
        encoded = encoding.encode(self.model.tokenizer, [self._whole(prompt.text) for prompt, _ in requests])
        names = [f"document {prompt.id!r} with its prompt" for prompt, _ in requests]
        for i, made in iter_generations(
            self.model, encoded, [sampling for _, sampling in requests], names=names, ledger=self.ledger
        ):
            yield i, Reply(made.text, len(encoded[i]), len(made.ids), sum(made.logp))

    def _whole(self, text: str) -> str:
        if not self.is_chat:
            return text
        turn = [{"role": "user", "content": text}]
        return render_chat(self.model.tokenizer, turn)


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server; the key is read from OPENAI_API_KEY and goes nowhere but to the server.

    Attributes:
        url: such as http://localhost:8000/v1.
        model: its name there.
        is_chat: chat completions instead of completions.
        concurrency: requests at a time.
        retries: of a request that met 408, 409, 429, 5xx, a timeout or a broken connection, with growing pauses.
        timeout_s: of one request.
    """

    prompts_per_call: ClassVar[int | None] = None
    url: str
    model: str
    is_chat: bool = True
    concurrency: int = 8
    retries: int = 6
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise AugmentError("endpoint: expected http(s)://host/path without user, password or query")

    @property
    def fingerprint(self) -> str:
        """Server, model, and whether it is chat."""
        return f"{'chat' if self.is_chat else 'base'} {self.model} at {self.url}"

    def prompt_tokens(self, text: str) -> int:
        """Estimated from the characters."""
        return -(-len(text) // CHARACTERS_PER_TOKEN)

    def replies(self, requests: Sequence[tuple[Prompt, Sampling]]) -> Iterator[tuple[int, Reply]]:
        """See TextGenerator; raises AugmentError when a request fails for good, after those in flight have ended."""
        try:
            import openai
        except ModuleNotFoundError as error:
            raise AugmentError("endpoint: needs openai: pip install 'icl_ft_fast[augment]'") from error
        if not os.environ.get(KEY_VARIABLE):
            raise AugmentError(f"endpoint: set {KEY_VARIABLE} in the environment (anything if none is wanted)")
        client = openai.OpenAI(base_url=self.url, max_retries=self.retries, timeout=self.timeout_s)
        failure: tuple[int, Exception] | None = None
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            waiting = iter(range(len(requests)))
            running: dict[Any, int] = {}
            while True:
                while failure is None and len(running) < self.concurrency and (i := next(waiting, -1)) >= 0:
                    running[pool.submit(self._request, client, *requests[i])] = i
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    i = running.pop(future)
                    try:
                        yield i, future.result()
                    except openai.OpenAIError as error:
                        failure = (i, error)
        if failure is not None:
            status = getattr(failure[1], "status_code", None)
            what = f"status {status}" if status else type(failure[1]).__name__  # a message may repeat the key
            raise AugmentError(f"endpoint: {self.url}: document {requests[failure[0]][0].id!r}: {what}") from None

    def _request(self, client: Any, prompt: Prompt, sampling: Sampling) -> Reply:
        unserved = Sampling(
            sampling.max_new_tokens, sampling.temperature, top_p=sampling.top_p, stop=sampling.stop, seed=sampling.seed
        )
        if sampling != unserved:
            raise AugmentError("endpoint: takes temperature, top_p, stop and seed; no other control of sampling")
        options: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
        }
        if self.is_chat:
            made = client.chat.completions.create(messages=[{"role": "user", "content": prompt.text}], **options)
            text = made.choices[0].message.content or ""
        else:
            made = client.completions.create(prompt=prompt.text, **options)
            text = made.choices[0].text
        usage = made.usage
        prompt_tokens = usage.prompt_tokens if usage else self.prompt_tokens(prompt.text)
        return Reply(text, prompt_tokens, usage.completion_tokens if usage else self.prompt_tokens(text), None)


class Recorded:
    """Replies from JSON lines of {"source_id", "text"}: the n-th of an id is its n-th sample.

    An id is a document's, followed by #number (from 0) for a sentence of several under the local strategy.

    Raises:
        TaskError: a file that is not such.
    """

    prompts_per_call: ClassVar[int | None] = None

    def __init__(self, path: Path) -> None:
        self.texts: dict[str, list[str]] = {}
        for where, row in read_jsonl(path):
            self.texts.setdefault(text_field(where, row, "source_id"), []).append(text_field(where, row, "text"))
        self.fingerprint = f"recorded {hashlib.sha256(path.read_bytes()).hexdigest()}"

    def prompt_tokens(self, text: str) -> int:
        """None are read."""
        return 0

    def replies(self, requests: Sequence[tuple[Prompt, Sampling]]) -> Iterator[tuple[int, Reply]]:
        """See TextGenerator."""
        for i, (prompt, _) in enumerate(requests):
            if prompt.sample < len(texts := self.texts.get(prompt.id, [])):
                yield i, Reply(texts[prompt.sample], 0, 0, None)
