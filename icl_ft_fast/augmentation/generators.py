"""Where replies come from: a loaded model, an OpenAI-compatible endpoint, or a file of replies; one protocol."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

from icl_ft_fast.augmentation.prompts import Prompt
from icl_ft_fast.augmentation.strategy import AugmentError
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.control_tokens import as_text
from icl_ft_fast.engine.generate import RUNNING, NewToken, Sampling, iter_generations
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.reasoning import answer_in, opened
from icl_ft_fast.runtime.templates import fix_date, render_chat
from icl_ft_fast.tasks.files import read_jsonl
from icl_ft_fast.tasks.tables import silent
from icl_ft_fast.tasks.task import text_field

KEY_VARIABLE = "OPENAI_API_KEY"
MOST_TOKENS = 2**31  # of one request; a server that tells more counts something else
CHARACTERS_PER_TOKEN = 3  # where the tokenizer is not here: estimates rather too many tokens than too few


@dataclass(frozen=True)
class Reply:
    """A generated text, its tokens, and its natural-log probability where the generator tells.

    `is_cut` says that it ended at the limit of new tokens: its last line may be half of one.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    logp: float | None
    is_cut: bool = False


class TextGenerator(Protocol):
    """What replies to prompts."""

    @property
    def is_chat(self) -> bool:
        """Whether prompts are a user's turns of a chat."""

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

    def counting(self, ledger: Ledger) -> TextGenerator:
        """The same generator, whose work this ledger counts."""

    def replies(self, requests: Sequence[tuple[Prompt, Sampling]]) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) as replies are ready; requests that it has no reply to are left out."""


@dataclass(frozen=True)
class LocalGenerator:
    """A loaded model.

    Attributes:
        model: from load().
        is_chat: whether prompts go through its chat template.
        ledger: counts the work, as phase "generate".
        template_options: arguments of the chat template, such as enable_thinking.
        template_date: YYYY-MM-DD, what a template that writes the date writes; None is today, or the date that the
            tokenizer's template writes already.
        on_token: called with (index of the request, token) as each token is written; where it returns False, the reply
            is cut.

    Raises:
        AugmentError: `is_chat`, and the tokenizer has no chat template.
        DateError: `template_date` is no date.
    """

    model: Model
    is_chat: bool = False
    ledger: Ledger | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    template_date: str | None = None
    on_token: Callable[[int, NewToken], bool | None] | None = field(default=None, compare=False)
    prompts_per_call: ClassVar[int] = 16 * RUNNING

    def __post_init__(self) -> None:
        if self.is_chat and not getattr(self.model.tokenizer, "chat_template", None):
            raise AugmentError(f"chat: {self.model.name} has no chat template")
        if self.is_chat:
            fix_date(self.model.tokenizer, self.template_date)

    @property
    def date(self) -> str | None:
        """The day that the chat template writes as today's; None where it writes none."""
        return fix_date(self.model.tokenizer) if self.is_chat else None

    @property
    def fingerprint(self) -> str:
        """The model's, whether prompts go through its chat template, and the date that this writes."""
        date = f" on {self.date}" if self.date else ""
        return f"{_way(self.is_chat, self.template_options)}{date} {self.model.fingerprint()}"

    def counting(self, ledger: Ledger) -> LocalGenerator:
        """See TextGenerator."""
        return replace(self, ledger=ledger)

    def prompt_tokens(self, text: str) -> int:
        """Counted."""
        return len(encoding.encode(self.model.tokenizer, [self._whole(text)])[0])

    def replies(self, requests: Sequence[tuple[Prompt, Sampling]]) -> Iterator[tuple[int, Reply]]:
        """See TextGenerator; raises GenerateError where a prompt does not fit the model's positions."""
        texts = [self._text(prompt) for prompt, _ in requests]
        encoded = encoding.encode(self.model.tokenizer, texts)
        names = [f"document {prompt.id!r} with its prompt" for prompt, _ in requests]
        for i, made in iter_generations(
            self.model,
            encoded,
            [sampling for _, sampling in requests],
            names=names,
            on_token=self.on_token,
            ledger=self.ledger,
        ):
            text = opened(texts[i]) + requests[i][0].begun + made.text  # the template may have begun the reasoning
            yield i, Reply(text, len(encoded[i]), len(made.ids), sum(made.logp), made.finish in ("length", "dropped"))

    def encoded(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts, with how their replies begin."""
        return encoding.encode(self.model.tokenizer, [self._text(prompt) for prompt in prompts])

    def _text(self, prompt: Prompt) -> str:
        return self._whole(prompt.text) + prompt.begun

    def _whole(self, text: str) -> str:
        text = as_text(self.model.tokenizer, text)  # of documents, in a prompt that spells no control token
        if not self.is_chat:
            return text
        turn = [{"role": "user", "content": text}]
        return render_chat(self.model.tokenizer, turn, **self.template_options)


def _way(is_chat: bool, template_options: Mapping[str, Any]) -> str:
    options = f" {json.dumps(dict(template_options), sort_keys=True)}" if template_options else ""
    return f"{'chat' if is_chat else 'base'}{options}"


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
        template_options: arguments of the server's chat template, such as enable_thinking.
        tell: called with a line of text for requests that ended without a reply.
        ledger: counts the tokens that the server tells, and the time, as phase "generate"; no FLOPs.
    """

    prompts_per_call: ClassVar[int | None] = None
    url: str
    model: str
    is_chat: bool = True
    concurrency: int = 8
    retries: int = 6
    timeout_s: float = 120.0
    template_options: Mapping[str, Any] = field(default_factory=dict)
    tell: Callable[[str], None] = field(default=silent, compare=False)
    ledger: Ledger | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise AugmentError("endpoint: expected http(s)://host/path without user, password or query")

    @property
    def fingerprint(self) -> str:
        """Server, model, and whether it is chat."""
        return f"{_way(self.is_chat, self.template_options)} {self.model} at {self.url}"

    def counting(self, ledger: Ledger) -> Endpoint:
        """See TextGenerator."""
        return replace(self, ledger=ledger)

    def prompt_tokens(self, text: str) -> int:
        """Estimated from the characters."""
        return -(-len(text) // CHARACTERS_PER_TOKEN)

    def replies(self, requests: Sequence[tuple[Prompt, Sampling]]) -> Iterator[tuple[int, Reply]]:
        """See TextGenerator; raises AugmentError when a request fails for good, after those in flight have ended.

        What comes with status 200 and is no reply (nothing, filtered, another schema) is left out and told.
        """
        try:
            import openai
        except ModuleNotFoundError as error:
            raise AugmentError("endpoint: needs openai: pip install 'icl_ft_fast[augment]'") from error
        if not os.environ.get(KEY_VARIABLE):
            raise AugmentError(f"endpoint: set {KEY_VARIABLE} in the environment (anything if none is wanted)")
        client = openai.OpenAI(base_url=self.url, max_retries=self.retries, timeout=self.timeout_s)
        failure: tuple[int, Exception] | None = None
        lost: Counter[str] = Counter()
        ledger = self.ledger or Ledger()
        with client, ledger.phase("generate"), ThreadPoolExecutor(self.concurrency) as pool:
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
                        reply = future.result()
                    except openai.OpenAIError as error:
                        failure = (i, error)
                        continue
                    if isinstance(reply, str):
                        lost[reply] += 1
                    else:
                        ledger.request_tokens += reply.prompt_tokens
                        ledger.decoded_tokens += reply.completion_tokens
                        yield i, reply
        if lost:
            reasons = ", ".join(f"{count} {reason}" for reason, count in lost.items())
            self.tell(f"endpoint: {lost.total()} requests without a reply ({reasons}); the same command asks again")
        if failure is not None:
            status = getattr(failure[1], "status_code", None)
            what = f"status {status}" if status else type(failure[1]).__name__  # a message may repeat the key
            raise AugmentError(f"endpoint: {self.url}: document {requests[failure[0]][0].id!r}: {what}") from None

    def _request(self, client: Any, prompt: Prompt, sampling: Sampling) -> Reply | str:
        """The reply, or why there is none."""
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
        if self.template_options:
            options["extra_body"] = {"chat_template_kwargs": dict(self.template_options)}
        try:
            if self.is_chat:
                made = client.chat.completions.create(messages=[{"role": "user", "content": prompt.text}], **options)
            else:
                made = client.completions.create(prompt=prompt.text, **options)
        except (ValueError, RecursionError):  # brackets without end are of no depth that a parser takes
            return "not JSON"
        choices = getattr(made, "choices", None)
        said = choices[0] if isinstance(choices, list) and choices else None
        finish = getattr(said, "finish_reason", None)
        said = getattr(said, "message", None) if self.is_chat else said
        if said is None:
            return "an error instead" if getattr(made, "error", None) else "of another schema"
        text = _text_of(getattr(said, "content" if self.is_chat else "text", None))
        if finish == "content_filter":
            return "filtered"
        if not any(character.isprintable() and not character.isspace() for character in answer_in(text)):
            if getattr(said, "refusal", None) or getattr(said, "tool_calls", None):
                return "refused" if getattr(said, "refusal", None) else "a tool call instead"
            return "cut off in its reasoning" if finish == "length" else "empty"
        usage = getattr(made, "usage", None)
        counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        prompt_tokens, completion_tokens = (
            count if type(count) is int and 0 < count < MOST_TOKENS else self.prompt_tokens(own)
            for count, own in zip(counts, (prompt.text, text), strict=True)
        )
        return Reply(text, prompt_tokens, completion_tokens, None, finish == "length")


def _text_of(content: object) -> str:
    """What a message says: a text, or its parts that are text; empty where it says nothing."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = (part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text")
    whole = "".join(text for text in texts if isinstance(text, str))
    return whole.encode("utf-8", "replace").decode()  # JSON can spell halves of characters, which no file can hold


class Recorded:
    """Replies from JSON lines of {"source_id", "text"}: the n-th of an id is its n-th sample.

    An id is a document's, followed by #number (from 0) for a sentence of several under the local strategy.

    Raises:
        TaskError: a file that is not such.
    """

    prompts_per_call: ClassVar[int | None] = None
    is_chat: ClassVar[bool] = False

    def __init__(self, path: Path) -> None:
        self.texts: dict[str, list[str]] = {}
        self._places: dict[str, str] = {}
        for where, row in read_jsonl(path):
            source = text_field(where, row, "source_id")
            self._places.setdefault(source, where)
            self.texts.setdefault(source, []).append(text_field(where, row, "text"))
        self.fingerprint = f"recorded {hashlib.sha256(path.read_bytes()).hexdigest()}"

    def counting(self, ledger: Ledger) -> Recorded:
        """Itself: there is nothing to count."""
        return self

    def prompt_tokens(self, text: str) -> int:
        """None are read."""
        return 0

    def unused(self, ids: Collection[str]) -> list[str]:
        """Where the replies to prompts begin that are not among these, each with its source_id."""
        return [f"{where}: {source!r}" for source, where in self._places.items() if source not in ids]

    def replies(self, requests: Sequence[tuple[Prompt, Sampling]]) -> Iterator[tuple[int, Reply]]:
        """See TextGenerator."""
        for i, (prompt, _) in enumerate(requests):
            if prompt.sample < len(texts := self.texts.get(prompt.id, [])):
                yield i, Reply(texts[prompt.sample], 0, 0, None)
