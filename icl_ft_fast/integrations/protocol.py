"""What goes over the wire: the requests' fields, the errors, and log-probabilities as OpenAI and vLLM write them."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from icl_ft_fast.engine.generate import Sampling

Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(max_length=2**24)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TopK = Annotated[int, Field(ge=0, le=20)]


class Body(BaseModel):
    """What all requests have in common: unknown fields, other types, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerationBody(Body):
    """Fields of both OpenAI endpoints; those that name one value refuse every other."""

    model: Text
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(1.0, description="0 is greedy decoding")
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="no effect on greedy decoding")
    seed: int | None = Field(None, description="of the draws; a new one each time by default")
    user: Text | None = Field(None, description="not read")
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None


class CompletionRequest(GenerationBody):
    """/v1/completions."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool | None = False
    logprobs: TopK | None = None
    prompt_logprobs: TopK | None = None
    add_special_tokens: bool = Field(True, description="whether a text begins as the tokenizer begins one (BOS)")
    best_of: Literal[1] | None = None


class TextPart(Body):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn."""

    role: Annotated[str, Field(min_length=1, max_length=100)]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]


class ChatRequest(GenerationBody):
    """/v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None


class ChoicesRequest(Body):
    """/v1/score_choices."""

    model: Text | None = None
    context: Text = Field("", description="cached for later requests that begin with it")
    prompt: Text
    choices: Annotated[list[Text], Field(min_length=1)]


class TokenizeRequest(Body):
    """/tokenize."""

    model: Text | None = None
    prompt: Text
    add_special_tokens: bool = True


def sampling(body: CompletionRequest | ChatRequest, new_tokens: int) -> Sampling:
    """How to write what is asked; whoever leaves out the temperature gets OpenAI's default of 1."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = body.top_p if body.top_p and temperature else 1.0
    seed = secrets.randbits(63) if body.seed is None else body.seed
    return Sampling(max_new_tokens=new_tokens, temperature=temperature, top_p=top_p, stop=stop, seed=seed)


class Fault(BaseModel):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every 4xx and 5xx."""

    error: Fault


class RefusedError(Exception):
    """A request that is not followed."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """A refusal in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    fault = Fault(message=message, type=kind, param=param, code=code)
    headers = {429: {"retry-after": "1"}, 401: {"www-authenticate": "Bearer"}}.get(status)
    return JSONResponse(ErrorBody(error=fault).model_dump(), status, headers)


class ScoredToken(NamedTuple):
    """A token with its log-probability, rank and the likeliest tokens at its place; none where it was not scored."""

    id: int
    logp: float | None = None
    rank: int | None = None
    top: Sequence[tuple[int, float]] = ()


def logprobs(tokens: Sequence[ScoredToken], top: int, offset: int, piece: Callable[[int], str]) -> dict[str, Any]:
    """OpenAI's lists; of tokens that read alike the likeliest is named.

    Args:
        tokens: to be listed.
        top: how many of the likeliest tokens are named beside each.
        offset: characters before the first.
        piece: the text of a token id.
    """
    pieces = [piece(token.id) for token in tokens]
    likeliest: list[dict[str, float | None] | None] = []
    for token in tokens:
        named: dict[str, float | None] = {}
        for token_id, logp in (*token.top[:top], (token.id, token.logp)):
            named.setdefault(piece(token_id), logp)
        likeliest.append(None if token.logp is None else named)
    return {
        "tokens": pieces,
        "token_logprobs": [token.logp for token in tokens],
        "top_logprobs": likeliest,
        "text_offset": list(itertools.accumulate(map(len, pieces), initial=offset))[:-1],
    }


def prompt_logprobs(token: ScoredToken, top: int, piece: Callable[[int], str]) -> dict[str, Any] | None:
    """The entry of a prompt's token as vLLM has it: itself first, then the likeliest; the first token has none."""
    if token.logp is None:
        return None
    ranked = [(token.id, token.logp, token.rank), *((*one, rank) for rank, one in enumerate(token.top[:top], 1))]
    return {
        str(token_id): {"logprob": logp, "rank": rank, "decoded_token": piece(token_id)}
        for token_id, logp, rank in ranked
    }


class Completion(NamedTuple):
    """A continuation; `tokens` are the prompt's and its own, those that were scored with log-probabilities."""

    text: str
    finish_reason: str
    num_tokens: int
    tokens: list[ScoredToken]


def completion_choice(
    body: CompletionRequest, index: int, before: str, num_prompt: int, written: Completion, piece: Callable[[int], str]
) -> dict[str, Any]:
    """An entry of /v1/completions' choices.

    Args:
        body: what was asked.
        index: the prompt's place among those asked.
        before: the prompt's text.
        num_prompt: its tokens, the first of written.tokens.
        written: what follows it.
        piece: the text of a token id.
    """
    text = before + written.text if body.echo else written.text
    choice = {"index": index, "text": text, "finish_reason": written.finish_reason, "logprobs": None}
    if body.logprobs is not None:
        tokens, offset = (written.tokens, 0) if body.echo else (written.tokens[num_prompt:], len(before))
        choice["logprobs"] = logprobs(tokens, body.logprobs, offset, piece)
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [
            prompt_logprobs(token, body.prompt_logprobs, piece) for token in written.tokens[:num_prompt]
        ]
    return choice


def usage(prompt_tokens: int, completion_tokens: int, reused: int) -> dict[str, Any]:
    """OpenAI's counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reused},
    }
