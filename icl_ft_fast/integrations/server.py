"""The server's HTTP layer: OpenAI's completions and chat, the score of choices, tokens; everything is checked here.

What a client asks and is not served is refused with an error in OpenAI's shape, never ignored. Knows no tensors.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from threading import Event
from typing import Any, TypeVar

import jinja2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.detokenize import pieces
from icl_ft_fast.engine.generate import GenerateError, Generation, NewToken, end_tokens
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
    chat_logprobs,
    error_response,
    logprobs,
    prompt_logprobs,
    samplings,
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
from icl_ft_fast.integrations.streaming import DONE, Chunks, StreamedText, event
from icl_ft_fast.runtime.reasoning import opened, split_reasoning
from icl_ft_fast.runtime.templates import ChatText, fix_date, render_chat, set_template_arguments

_log = logging.getLogger(__name__)

STATUS = {SchedulerBusyError: 429, SchedulerClosedError: 503, ScoreError: 400, GenerateError: 400}
# What a chat template, and transformers before it, make of messages and arguments that they do not expect.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    """What the client is told; what nobody foresaw is told to the log only."""
    if isinstance(error, RequestValidationError):
        return _wrong_field(error)
    if isinstance(error, RefusedError):
        return error_response(error.status, str(error), error.param, error.code)
    if isinstance(error, HTTPException):
        at = f"{request.method} {request.url.path}: " if error.status_code in (404, 405) else ""
        return error_response(error.status_code, f"{at}{error.detail}")
    status = STATUS.get(type(error), 500)
    return error_response(status, "internal error; the server's log has more" if status == 500 else str(error))


def _wrong_field(error: RequestValidationError) -> JSONResponse:
    """The refusal of a body: the place in it, and why; where several kinds are taken, why it is none of them."""
    first = error.errors()[0]
    field = str([*first["loc"], "body"][1])
    if first["type"] == "json_invalid":
        return error_response(400, f"body: not valid JSON at character {field}: {first['ctx']['error']}", "body")
    if field == "body":
        return error_response(400, "body: expected a JSON object, sent with content-type: application/json", "body")
    place, node = field, error.body.get(field) if isinstance(error.body, dict) else None
    for part in first["loc"][2:]:
        if isinstance(part, int) and isinstance(node, list) and part < len(node):
            place, node = f"{place}[{part}]", node[part]
        elif isinstance(node, dict) and (part in node or first["type"] == "missing"):
            place, node = f"{place}.{part}", node.get(part)
        else:
            break  # the name of one of the kinds
    reasons = dict.fromkeys(fault["msg"] for fault in error.errors() if field in map(str, fault["loc"]))
    return error_response(400, f"{place}: {'; or: '.join(reasons)}", field)


def make_app(
    scheduler: Scheduler,
    name: str,
    *,
    key: str | None = None,
    limits: Limits | None = None,
    allow_origins: Sequence[str] = (),
    template_date: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The application; it closes the scheduler when it shuts down.

    Args:
        scheduler: serves the requests.
        name: the model's, as clients give it.
        key: what clients must give as bearer token; None lets everyone in.
        limits: of what one client may ask for.
        allow_origins: of web pages whose scripts may use the server; "*" is all.
        template_date: YYYY-MM-DD that a chat template writes; None is the day on which this is called.
        template_arguments: of the chat template, where a request gives no others.

    Raises:
        DateError: template_date is no date.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)
        service.tokenizing.shutdown()

    limits = limits or Limits()
    service = _Service(scheduler, name, limits, template_date, template_arguments or {})
    app = FastAPI(
        title="icl_ft_fast",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.add_middleware(Guard, key=key, limits=limits)
    if allow_origins:  # added last, so it is met first: a preflight has no key
        app.add_middleware(CORSMiddleware, allow_origins=allow_origins, allow_methods=["*"], allow_headers=["*"])
    gets = {"/health": service.health, "/v1/models": service.models, "/tokenizer_info": service.tokenizer_info}
    for path, endpoint in (*gets.items(), ("/v1/models/{name:path}", service.one_model)):
        app.get(path)(endpoint)
        app.head(path, include_in_schema=False)(endpoint)
    app.post("/tokenize")(service.tokenize)
    app.post("/v1/score_choices")(service.score_choices)
    app.post("/v1/completions", response_model=None, responses=STREAM)(service.completions)
    app.post("/v1/chat/completions", response_model=None, responses=STREAM)(service.chat)
    for path in (*gets, "/tokenize", "/v1/score_choices", "/v1/completions", "/v1/chat/completions"):
        methods = "GET, HEAD, OPTIONS" if path in gets else "POST, OPTIONS"
        app.options(path, include_in_schema=False)(functools.partial(_options, methods))

    for kind in (RequestValidationError, HTTPException, RefusedError, *STATUS, Exception):
        app.add_exception_handler(kind, _refusal)
    return app


async def _options(methods: str) -> Response:
    return Response(status_code=204, headers={"allow": methods})


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt[0], int)


Result = TypeVar("Result")


class _Service:
    """The endpoints."""

    def __init__(
        self, scheduler: Scheduler, name: str, limits: Limits, date: str | None, arguments: Mapping[str, Any]
    ) -> None:
        self.scheduler, self.name, self.limits = scheduler, name, limits
        self.tokenizer = copy.deepcopy(scheduler.model.tokenizer)  # a tokenizer belongs to one thread
        self.template_date = fix_date(self.tokenizer, date)
        set_template_arguments(self.tokenizer, arguments)
        self.reader = copy.deepcopy(scheduler.model.tokenizer)  # the event loop's
        self.tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self.created = int(time.time())
        self.ends_text = end_tokens(scheduler.model)
        self._anchor = self._encode(["a"], False)[0]  # a token behind a text, where it keeps its space
        self._name = functools.cache(lambda token: pieces(self.tokenizer, [token], self._anchor)[0])
        self._streamed_name = functools.cache(lambda token: pieces(self.reader, [token], self._anchor)[0])

    async def health(self) -> dict[str, str]:
        """Whether the server is up; needs no key."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [await self.one_model(self.name)]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """What is told of the one model."""
        self._check_model(name)
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "icl_ft_fast"}
        return model | {"max_model_len": self.scheduler.model.max_positions}

    async def tokenizer_info(self) -> dict[str, Any]:
        """Special tokens, the chat template and the date that it writes."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        info = {name: getattr(self.tokenizer, name, None) for name in names}
        return {"tokenizer_class": type(self.tokenizer).__name__, "template_date": self.template_date, **info}

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a text."""
        self._check_model(body.model)
        text = self._one_of(body.prompt, body.messages)
        if body.messages is not None:
            arguments = {"add_generation_prompt": body.add_generation_prompt} | (body.chat_template_kwargs or {})
            text, _ = await self._in_tokenizer(self._rendered, body.messages, arguments)
        (tokens,) = await self._in_tokenizer(self._encode, [text], body.add_special_tokens)
        return {"count": len(tokens), "max_model_len": self.scheduler.model.max_positions, "tokens": tokens}

    async def score_choices(self, body: ChoicesRequest, request: Request) -> dict[str, Any]:
        """Log-likelihood of each choice after context + prompt; the context stays cached."""
        self._check_model(body.model)
        self._check_number("choices", len(body.choices))
        context, prompt = body.context, self._one_of(body.prompt, body.messages)
        if body.messages is not None:
            if body.context:
                raise RefusedError(400, "context: not with messages", "context")
            text, known = await self._in_tokenizer(self._rendered, body.messages, body.chat_template_kwargs or {})
            context, prompt = ChatText(text[:known]), text[known:]
        found = await self._result(request, Choices(context, prompt, tuple(body.choices)))
        scores = [
            {"index": c, "logprob": result.logp, "num_tokens": num_tokens, "is_greedy": result.is_greedy}
            for c, (result, (_, num_tokens)) in enumerate(zip(found.results, found.num_tokens, strict=True))
        ]
        best = max(range(len(scores)), key=lambda c: found.results[c].logp)
        prompt_tokens = found.num_tokens[0][0] + sum(num_tokens for _, num_tokens in found.num_tokens)
        counts = usage(prompt_tokens, 0, found.cached_tokens)
        return {"object": "score_choices", "model": self.name, "scores": scores, "predicted": best, "usage": counts}

    async def completions(self, body: CompletionRequest, request: Request) -> dict[str, Any] | StreamingResponse:
        """Continuations of prompts, the prompts' and continuations' log-probabilities, or both."""
        self._check_model(body.model)
        given: list[Any] = [body.prompt] if isinstance(body.prompt, str) or _is_ids(body.prompt) else list(body.prompt)
        n = body.n or 1
        drawn = body.best_of or n
        if drawn < n:
            raise RefusedError(400, f"best_of: expected at least n = {n}, got {drawn}", "best_of")
        self._check_number("prompt", len(given) * drawn)
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        encoded = iter(await self._in_tokenizer(self._encode, texts, body.add_special_tokens))
        prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in given]
        repeated = [prompt for prompt in prompts for _ in range(drawn)]
        new_tokens = [self._check_new_tokens(body.max_tokens, 16)] * len(repeated)
        of_prompt = body.prompt_logprobs is not None or (bool(body.echo) and body.logprobs is not None)
        scored = of_prompt or body.logprobs is not None
        if body.stream:
            if of_prompt or drawn > n or not new_tokens[0]:
                with_prompt = "prompt_logprobs, echo with logprobs"
                raise RefusedError(400, f"stream: not with {with_prompt}, best_of above n or max_tokens 0", "stream")
            befores = await self._in_tokenizer(self._texts, given)
            starts = [{"text": before} for before in befores for _ in range(n)]
            return await self._stream(request, body, repeated, new_tokens, starts)
        top = max(1, body.logprobs or 0, body.prompt_logprobs or 0) if scored else None
        completions, cached = await self._complete(request, repeated, new_tokens, body, of_prompt, top)
        counts = usage(sum(map(len, prompts)), sum(one.num_tokens for one in completions), cached)
        groups = [completions[first : first + drawn] for first in range(0, len(completions), drawn)]
        if drawn > n:
            groups = [sorted(one, key=lambda c: -c.logp / max(1, c.num_tokens))[:n] for one in groups]
        choices = await self._in_tokenizer(self._choices, body, given, prompts, groups)
        return self._envelope("text_completion", "cmpl") | {"choices": choices, "usage": counts}

    async def chat(self, body: ChatRequest, request: Request) -> dict[str, Any] | StreamingResponse:
        """The next turn of a conversation, put to the model through the tokenizer's chat template."""
        self._check_model(body.model)
        if len({body.max_tokens, body.max_completion_tokens} - {None}) > 1:
            raise RefusedError(400, "max_tokens: give either it or max_completion_tokens", "max_tokens")
        if body.top_logprobs and not body.logprobs:
            raise RefusedError(400, "top_logprobs: needs logprobs", "top_logprobs")
        n = body.n or 1
        self._check_number("n", n)
        prompt, declared, mark = await self._in_tokenizer(self._conversation, body)
        room = self.scheduler.model.max_positions - len(prompt) + 1  # the last token needs no position
        new_tokens = self._check_new_tokens(
            body.max_completion_tokens or body.max_tokens, max(1, min(room, self.limits.new_tokens))
        )
        if body.stream:
            starts: list[dict[str, str]] = [{"role": "assistant", "content": ""}] * n
            return await self._stream(request, body, [prompt] * n, [new_tokens] * n, starts, mark, declared)
        top = max(1, body.top_logprobs or 0) if body.logprobs else None
        completions, cached = await self._complete(request, [prompt] * n, [new_tokens] * n, body, False, top, declared)
        choices = []
        for index, one in enumerate(completions):
            reasoning, answer = split_reasoning(mark + one.text)
            message = {"role": "assistant", "content": one.text, "refusal": None}
            if reasoning:
                message |= {"content": answer.lstrip("\n"), "reasoning_content": reasoning}
            choice = {"index": index, "message": message, "logprobs": None, "finish_reason": one.finish_reason}
            if body.logprobs:
                tokens = one.tokens[len(prompt) :]
                texts = await self._in_tokenizer(pieces, self.tokenizer, [token.id for token in tokens], prompt)
                listed = self._in_tokenizer(chat_logprobs, tokens, texts, body.top_logprobs or 0, self._name)
                choice["logprobs"] = await listed
            choices.append(choice)
        counts = usage(len(prompt), sum(one.num_tokens for one in completions), cached)
        return self._envelope("chat.completion", "chatcmpl") | {"choices": choices, "usage": counts}

    async def _complete(
        self,
        request: Request,
        prompts: Sequence[list[int]],
        new_tokens: Sequence[int],
        body: CompletionRequest | ChatRequest,
        of_prompt: bool,
        top: int | None,
        declared: int = 0,
    ) -> tuple[list[Completion], int]:
        """Continue prompts; with `top`, tell of what is generated, with `of_prompt` score it all; cached tokens."""
        # One greedy token is the likeliest behind the prompt: nothing is decoded.
        read_off = top is not None and body.temperature == 0 and max(new_tokens) == 1 and not body.repetition_penalty
        generated = [Generation("", (), (), "length")] * len(prompts)
        cached, lists = 0, [[ScoredToken(token) for token in prompt] for prompt in prompts]
        if max(new_tokens) and not read_off:
            found = await self._generated(request, prompts, body, new_tokens, top or 0, declared)
            generated, cached = found.results, found.cached_tokens
            for p, one in enumerate(generated):
                lists[p] += [ScoredToken(*token) for token in one.tokens]
        if top is not None and (of_prompt or read_off):
            first = [1 if of_prompt else len(prompt) for prompt in prompts]
            pairs = [(p[:f], [*p[f:], *one.ids]) for p, f, one in zip(prompts, first, generated, strict=True)]
            with_after = read_off or not all(rest for _, rest in pairs)
            found = await self._result(request, Sequences(pairs, top, with_after))
            cached = cached if max(new_tokens) and not read_off else found.cached_tokens
            for p, ((context, rest), result) in enumerate(zip(pairs, found.results, strict=True)):
                scored = [ScoredToken(*one) for one in zip(rest, result.logp, result.rank, result.top, strict=True)]
                if read_off:
                    likeliest, logp = result.after[0]
                    scored.append(ScoredToken(likeliest, logp, 1, result.after))
                    (text,) = await self._in_tokenizer(pieces, self.tokenizer, [likeliest], prompts[p])
                    ended = Generation("", (), (), "eos")
                    is_end = likeliest in self.ends_text
                    generated[p] = ended if is_end else Generation(text, (likeliest,), (logp,), "length")
                lists[p] = [*(ScoredToken(token) for token in context), *scored]
        return [
            Completion(one.text, "length" if one.finish == "length" else "stop", len(one.ids), tokens, sum(one.logp))
            for one, tokens in zip(generated, lists, strict=True)
        ], cached

    async def _generated(
        self,
        request: Request,
        prompts: Sequence[list[int]],
        body: CompletionRequest | ChatRequest,
        new_tokens: Sequence[int],
        top: int,
        declared: int,
    ) -> RequestResult:
        """Generations; none goes on when the client has gone."""
        gone = Event()
        made = samplings(body, prompts, new_tokens)
        asked = Prompts(prompts, made, lambda *_: not gone.is_set(), top, declared)
        try:
            return await self._result(request, asked)
        finally:
            gone.set()

    async def _stream(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[list[int]],
        new_tokens: Sequence[int],
        starts: Sequence[dict[str, str]],
        mark: str | None = None,
        declared: int = 0,
    ) -> StreamingResponse:
        """Server-sent events: what choices start with, what each token adds, and at last why each choice ended."""
        loop, events, gone = asyncio.get_running_loop(), asyncio.Queue[tuple[int, NewToken] | None](), Event()
        made = samplings(body, prompts, new_tokens)
        texts = [StreamedText(self.reader, p, how.stop, mark) for p, how in zip(prompts, made, strict=True)]

        def on_token(r: int, token: NewToken) -> bool:
            loop.call_soon_threadsafe(events.put_nowait, (r, token))
            return not gone.is_set()

        chunks = Chunks(body, self._envelope, texts, self._streamed_name, starts)
        future = self.scheduler.submit(Prompts(prompts, made, on_token, chunks.top, declared))
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(events.put_nowait, None))
        try:
            first = await self._unless_gone(request, asyncio.ensure_future(events.get()))
        except BaseException:
            gone.set()
            future.cancel()
            raise
        if first is None and future.exception() is not None:
            future.result()  # refused like any request: nothing was sent

        async def sent() -> AsyncIterator[str]:
            try:
                for begun in chunks.begin():
                    yield begun
                one = first
                while one is not None:
                    if new := chunks.push(*one):
                        yield new
                    one = await events.get()
                try:
                    result = future.result()
                except Exception as error:
                    status = STATUS.get(type(error), 500)
                    if status == 500:
                        _log.exception("a stream ended with an error")
                    message = str(error) if status < 500 else "internal error; the server's log has more"
                    yield event({"error": {"message": message, "code": status}})
                    return
                for index, generation in enumerate(result.results):
                    for new in chunks.finish(index, generation):
                        yield new
                if body.stream_options is not None and body.stream_options.include_usage:
                    written = sum(len(generation.ids) for generation in result.results)
                    num_prompt = sum(map(len, prompts)) // (body.n or 1)
                    counts = usage(num_prompt, written, result.cached_tokens)
                    yield event(chunks.envelope | {"choices": [], "usage": counts})
                yield DONE
            finally:
                gone.set()
                future.cancel()

        return StreamingResponse(sent(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    def _choices(
        self,
        body: CompletionRequest,
        given: Sequence[str | list[int]],
        prompts: Sequence[list[int]],
        groups: Sequence[Sequence[Completion]],
    ) -> list[dict[str, Any]]:
        """The entries of /v1/completions' choices."""
        choices: list[dict[str, Any]] = []
        for before, prompt, group in zip(self._texts(given), prompts, groups, strict=True):
            for one in group:
                choice: dict[str, Any] = {"index": len(choices), "text": before + one.text if body.echo else one.text}
                choice |= {"finish_reason": one.finish_reason, "logprobs": None}
                if body.logprobs is not None:
                    tokens = one.tokens if body.echo else one.tokens[len(prompt) :]
                    ids = [token.id for token in tokens]
                    texts = self._echoed(ids, before) if body.echo else pieces(self.tokenizer, ids, prompt)
                    outside = body.echo and len(texts) > 1 and not before.startswith(texts[0])
                    offset = (-len(texts[0]) if outside else 0) if body.echo else len(before)
                    choice["logprobs"] = logprobs(tokens, texts, body.logprobs, offset, self._name)
                if body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = [
                        prompt_logprobs(token, body.prompt_logprobs, self._name) for token in one.tokens[: len(prompt)]
                    ]
                choices.append(choice)
        return choices

    def _echoed(self, ids: list[int], before: str) -> list[str]:
        """The text of each token of an echoed prompt and what follows it, without spaces that the tokenizer added."""
        texts, at = pieces(self.tokenizer, ids), 0
        for i, text in enumerate(texts):
            if at < len(before) and not before.startswith(text, at) and text[:1] == " ":
                texts[i] = text[1:] if before.startswith(text[1:], at) else text
            at += len(texts[i]) if before.startswith(texts[i], at) else 0
        return texts

    def _texts(self, given: Sequence[str | list[int]]) -> list[str]:
        return [prompt if isinstance(prompt, str) else str(self.tokenizer.decode(prompt)) for prompt in given]

    async def _result(self, request: Request, asked: Choices | Sequences | Prompts) -> RequestResult:
        """The scheduler's result; what a client that has gone asked is dropped."""
        future: asyncio.Future[Any] = asyncio.wrap_future(self.scheduler.submit(asked))
        result: RequestResult = await self._unless_gone(request, future)
        return result

    async def _unless_gone(self, request: Request, future: asyncio.Future[Any]) -> Any:
        """What a future gives; it is cancelled if the client leaves before."""
        # The body is read, so only a disconnection can come.
        gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise RefusedError(499, "the client has gone")
            return future.result()
        finally:
            gone.cancel()
            future.cancel()

    async def _in_tokenizer(self, call: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, call, *arguments)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return encoding.encode(self.tokenizer, texts, bos=None if add_special_tokens else False)

    def _one_of(self, prompt: str | None, messages: Sequence[ChatMessage] | None) -> str:
        if (prompt is None) == (messages is None):
            raise RefusedError(400, "prompt: give either it or messages", "prompt")
        return prompt or ""

    def _conversation(self, body: ChatRequest) -> tuple[list[int], int, str]:
        """Token ids of a conversation, how many come before its last turn, and the mark of reasoning it ends in."""
        arguments = dict(body.chat_template_kwargs or {})
        for name, value in (("enable_thinking", body.enable_thinking), ("reasoning_effort", body.reasoning_effort)):
            if value is not None:
                if value and name not in str(self.tokenizer.chat_template):
                    raise RefusedError(400, f"{name}: this model's chat template does not read it", name)
                arguments.setdefault(name, value)
        text, known = self._rendered(body.messages, arguments)
        (ids,) = self._encode([text], True)
        (before,) = self._encode([ChatText(text[:known])], True) if known else ([],)
        return ids, encoding.common(ids, before), opened(text)

    def _rendered(self, messages: Sequence[ChatMessage], arguments: Mapping[str, Any]) -> tuple[ChatText, int]:
        """What the chat template makes of a conversation, and how many characters of it come before the last turn."""
        template = self.tokenizer.chat_template
        if not template:
            raise RefusedError(400, "messages: this model's tokenizer has no chat template; use /v1/completions")
        turns = [_turn(message, "developer" in str(template)) for message in messages]
        options = dict(arguments)
        if taken := options.keys() & {"tokenize", "messages", "conversation", "chat_template", "return_dict"}:
            name = "chat_template_kwargs"
            raise RefusedError(400, f"{name}: {', '.join(sorted(taken))} cannot be set", name)
        try:
            text = render_chat(self.tokenizer, turns, **options)
        except REFUSALS as error:
            raise RefusedError(400, f"messages: the model's chat template refuses them: {error}", "messages") from error
        try:  # a template may refuse turns that end so
            before = render_chat(self.tokenizer, turns[:-1], **options | {"add_generation_prompt": False})
        except REFUSALS:
            before = ChatText("")
        return text, encoding.common(text, before)

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

    def _envelope(self, kind: str, prefix: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}


def _turn(message: ChatMessage, knows_developer: bool) -> dict[str, Any]:
    """A message as templates take it: one text, and of the rest what is there."""
    content = message.content or ""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    role = "system" if message.role == "developer" and not knows_developer else message.role
    names = ("name", "reasoning_content", "tool_call_id")
    turn = {"role": role, "content": text} | {name: value for name in names if (value := getattr(message, name))}
    return turn | ({"tool_calls": [_tool_call(call) for call in message.tool_calls]} if message.tool_calls else {})


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call as templates take it: its arguments, which clients give as the text of an object, as that object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call
