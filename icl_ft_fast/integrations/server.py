"""The server's HTTP layer: OpenAI's completions and chat, the score of choices, tokens; everything is checked here.

What a client asks and is not served is refused with an error in OpenAI's shape, never ignored. Knows no tensors.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import jinja2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import GenerateError, Generation, end_tokens
from icl_ft_fast.engine.likelihood import ScoreError
from icl_ft_fast.integrations.guard import Guard, Limits
from icl_ft_fast.integrations.protocol import (
    ChatMessage,
    ChatRequest,
    ChoicesRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    RefusedError,
    ScoredToken,
    TokenizeRequest,
    completion_choice,
    error_response,
    sampling,
    usage,
)
from icl_ft_fast.integrations.scheduler import (
    Choices,
    Prompts,
    RequestResult,
    Scheduler,
    SchedulerBusyError,
    SchedulerClosedError,
    Sequences,
)
from icl_ft_fast.runtime.templates import render_chat

STATUS = {SchedulerBusyError: 429, SchedulerClosedError: 503, ScoreError: 400, GenerateError: 400}


async def _refusal(_: Request, error: Exception) -> JSONResponse:
    """What the client is told; what nobody foresaw is told to the log only."""
    if isinstance(error, RequestValidationError):
        place = str([*error.errors()[0]["loc"], "body"][1])
        reasons = dict.fromkeys(fault["msg"] for fault in error.errors() if place in map(str, fault["loc"]))
        return error_response(400, f"{place}: {'; or: '.join(reasons)}", place)  # a union's members each have a reason
    if isinstance(error, RefusedError):
        return error_response(error.status, str(error), error.param, error.code)
    if isinstance(error, HTTPException):
        return error_response(error.status_code, error.detail)
    status = STATUS.get(type(error), 500)
    return error_response(status, "internal error; the server's log has more" if status == 500 else str(error))


def make_app(scheduler: Scheduler, name: str, *, key: str | None = None, limits: Limits | None = None) -> FastAPI:
    """The application; it closes the scheduler when it shuts down.

    Args:
        scheduler: answers the questions.
        name: the model's, as clients give it.
        key: what clients must give as bearer token; None lets everyone in.
        limits: of what one client may ask for.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)
        service.tokenizing.shutdown()

    limits = limits or Limits()
    service = _Service(scheduler, name, limits)
    app = FastAPI(
        title="icl_ft_fast",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.add_middleware(Guard, key=key, limits=limits)
    app.get("/health")(service.health)
    app.get("/v1/models")(service.models)
    app.get("/tokenizer_info")(service.tokenizer_info)
    app.post("/tokenize")(service.tokenize)
    app.post("/v1/score_choices")(service.score_choices)
    app.post("/v1/completions")(service.completions)
    app.post("/v1/chat/completions")(service.chat)

    for kind in (RequestValidationError, HTTPException, RefusedError, *STATUS, Exception):
        app.add_exception_handler(kind, _refusal)
    return app


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt[0], int)


Result = TypeVar("Result")


class _Service:
    """The endpoints."""

    def __init__(self, scheduler: Scheduler, name: str, limits: Limits) -> None:
        self.scheduler, self.name, self.limits = scheduler, name, limits
        self.tokenizer = copy.deepcopy(scheduler.model.tokenizer)  # a tokenizer belongs to one thread
        self.tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self.created = int(time.time())
        self.ends_text = end_tokens(scheduler.model)
        self._piece = functools.cache(lambda token: self.tokenizer.decode([token]))

    async def health(self) -> dict[str, str]:
        """Whether the server is up; needs no key."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """The one model."""
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "icl_ft_fast"}
        return {"object": "list", "data": [model | {"max_model_len": self.scheduler.model.max_positions}]}

    async def tokenizer_info(self) -> dict[str, Any]:
        """Special tokens and chat template."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        info = {name: getattr(self.tokenizer, name, None) for name in names}
        return {"tokenizer_class": type(self.tokenizer).__name__, **info}

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a text."""
        self._check_model(body.model)
        (tokens,) = await self._in_tokenizer(self._encode, [body.prompt], body.add_special_tokens)
        return {"count": len(tokens), "max_model_len": self.scheduler.model.max_positions, "tokens": tokens}

    async def score_choices(self, body: ChoicesRequest, request: Request) -> dict[str, Any]:
        """Log-likelihood of each choice after context + prompt; the context stays prefilled."""
        self._check_model(body.model)
        self._check_number("choices", len(body.choices))
        answer = await self._answer(request, Choices(body.context, body.prompt, tuple(body.choices)))
        scores = [
            {"index": c, "logprob": result.logp, "num_tokens": num_tokens, "is_greedy": result.is_greedy}
            for c, (result, (_, num_tokens)) in enumerate(zip(answer.results, answer.num_tokens, strict=True))
        ]
        best = max(range(len(scores)), key=lambda c: answer.results[c].logp)
        prompt_tokens = answer.num_tokens[0][0] + sum(num_tokens for _, num_tokens in answer.num_tokens)
        counts = usage(prompt_tokens, 0, answer.cached_tokens)
        return {"object": "score_choices", "model": self.name, "scores": scores, "predicted": best, "usage": counts}

    async def completions(self, body: CompletionRequest, request: Request) -> dict[str, Any]:
        """Continuations of prompts, the prompts' and continuations' log-probabilities, or both."""
        self._check_model(body.model)
        given: list[Any] = [body.prompt] if isinstance(body.prompt, str) or _is_ids(body.prompt) else list(body.prompt)
        self._check_number("prompt", len(given))
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        encoded = iter(await self._in_tokenizer(self._encode, texts, body.add_special_tokens))
        prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in given]
        of_prompt = body.prompt_logprobs is not None or (bool(body.echo) and body.logprobs is not None)
        scored = of_prompt or body.logprobs is not None
        top = max(1, body.logprobs or 0, body.prompt_logprobs or 0)
        new_tokens = self._check_new_tokens(body.max_tokens, 16)
        written, reused = await self._write(request, prompts, new_tokens, body, of_prompt, top if scored else None)
        choices = await self._in_tokenizer(self._choices, body, given, prompts, written)
        counts = usage(sum(map(len, prompts)), sum(one.num_tokens for one in written), reused)
        return self._envelope("text_completion", "cmpl", choices, counts)

    async def chat(self, body: ChatRequest, request: Request) -> dict[str, Any]:
        """The next turn of a conversation, put to the model through the tokenizer's chat template."""
        self._check_model(body.model)
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise RefusedError(400, "max_tokens: give either it or max_completion_tokens", "max_tokens")
        prompt = await self._in_tokenizer(self._conversation, body.messages)
        new_tokens = self._check_new_tokens(body.max_completion_tokens or body.max_tokens, 256)
        (result,), reused = await self._write(request, [prompt], new_tokens, body, False, None)
        message = {"role": "assistant", "content": result.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": result.finish_reason}
        return self._envelope("chat.completion", "chatcmpl", [choice], usage(len(prompt), result.num_tokens, reused))

    async def _write(
        self,
        request: Request,
        prompts: Sequence[list[int]],
        new_tokens: int,
        body: CompletionRequest | ChatRequest,
        of_prompt: bool,
        top: int | None,
    ) -> tuple[list[Completion], int]:
        """Continue prompts, and score what is written with `top`, the prompts too with `of_prompt`; tokens reused."""
        read_off = new_tokens == 1 and top is not None and body.temperature == 0  # the likeliest token: no decoding
        written = [Generation("", (), (), "length")] * len(prompts)
        reused, lists = 0, [[ScoredToken(token) for token in prompt] for prompt in prompts]
        if new_tokens and not read_off:
            answer = await self._answer(request, Prompts(prompts, sampling(body, new_tokens)))
            written, reused = answer.results, answer.cached_tokens
        if top is not None:
            pairs = []
            for prompt, generation in zip(prompts, written, strict=True):
                first = 1 if of_prompt else len(prompt)
                rest = [*prompt[first:], *generation.ids]
                pairs.append((prompt[:first], rest if rest and not read_off else [*rest, 0]))  # 0: a placeholder
            answer = await self._answer(request, Sequences(pairs, top))
            reused += answer.cached_tokens
            for p, ((context, rest), result) in enumerate(zip(pairs, answer.results, strict=True)):
                scored = [ScoredToken(*one) for one in zip(rest, result.logp, result.rank, result.top, strict=True)]
                if read_off:
                    likeliest, logp = result.top[-1][0]
                    scored[-1] = ScoredToken(likeliest, logp, 1, result.top[-1])
                    text = await self._in_tokenizer(self._decode, [likeliest])
                    ended = Generation("", (), (), "eos")
                    written[p] = ended if likeliest in self.ends_text else Generation(text, (likeliest,), (), "length")
                elif len(context) + len(rest) > len(prompts[p]) + len(written[p].ids):
                    scored.pop()
                lists[p] = [*(ScoredToken(token) for token in context), *scored]
        return [
            Completion(one.text, "length" if one.finish == "length" else "stop", len(one.ids), tokens)
            for one, tokens in zip(written, lists, strict=True)
        ], reused

    def _choices(
        self,
        body: CompletionRequest,
        given: Sequence[str | list[int]],
        prompts: Sequence[list[int]],
        written: list[Completion],
    ) -> list[dict[str, Any]]:
        befores = [prompt if isinstance(prompt, str) else self._decode(prompt) for prompt in given]
        asked = zip(befores, map(len, prompts), written, strict=True)
        return [completion_choice(body, index, *one, self._piece) for index, one in enumerate(asked)]

    async def _answer(self, request: Request, asked: Choices | Sequences | Prompts) -> RequestResult:
        """The scheduler's answer; what a client that has gone asked is dropped."""
        answer: asyncio.Future[Any] = asyncio.wrap_future(self.scheduler.submit(asked))
        # The body is read, so only a disconnection can come.
        gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise RefusedError(499, "the client has gone")
            result: RequestResult = answer.result()
            return result
        finally:
            gone.cancel()
            answer.cancel()

    async def _in_tokenizer(self, call: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, call, *arguments)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return encoding.encode(self.tokenizer, texts, bos=None if add_special_tokens else False)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens)
        return text

    def _conversation(self, messages: Sequence[ChatMessage]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise RefusedError(400, "messages: this model's tokenizer has no chat template; use /v1/completions")
        turns = []
        for message in messages:
            content = message.content
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            turns.append({"role": message.role, "content": text})
        try:
            prompt = render_chat(self.tokenizer, turns)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RefusedError(400, f"messages: the model's chat template refuses them: {error}", "messages") from error
        return self._encode([prompt], True)[0]

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise RefusedError(404, f"model: {name!r} is not served, {self.name!r} is", "model", "model_not_found")

    def _check_number(self, what: str, number: int) -> None:
        if number > self.limits.choices:
            raise RefusedError(400, f"{what}: at most {self.limits.choices:,} are taken, got {number:,}", what)

    def _check_new_tokens(self, asked: int | None, default: int) -> int:
        if asked is not None and asked > self.limits.new_tokens:
            raise RefusedError(400, f"max_tokens: at most {self.limits.new_tokens:,}, got {asked:,}", "max_tokens")
        return default if asked is None else asked

    def _envelope(self, kind: str, prefix: str, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        made = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}
        return {**made, "choices": choices, "usage": usage}
