"""What goes over the wire: the requests' fields, the errors, and log-probabilities as OpenAI and vLLM write them."""

from __future__ import annotations

import itertools
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticKnownError

from icl_ft_fast.engine.generate import Sampling

Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(max_length=2**24)]
Stop = Annotated[str, Field(max_length=1000)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None  # a list that asks for nothing
TopK = Annotated[int, Field(ge=0, le=20)]
Zero = Annotated[int, Field(ge=0, le=0)]  # Literal[0] would take false, which Python calls equal
NoPenalty = Annotated[float, Field(ge=0, le=0)]


def _boolean(value: Any) -> Any:
    """value; Literal[True] by itself would take 1 as well."""
    if not isinstance(value, bool):
        raise PydanticKnownError("bool_type")
    return value


No = Annotated[Literal[False], BeforeValidator(_boolean)]
Yes = Annotated[Literal[True], BeforeValidator(_boolean)]


ALMOST_GREEDY = 1e-5  # a temperature below is greedy, as in vLLM: logits divided by it would overflow


class Body(BaseModel):
    """What all requests have in common: unknown fields, other types, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream says besides its text."""

    include_usage: bool | None = None
    include_obfuscation: No | None = None


class GenerationBody(Body):
    """Fields of both OpenAI endpoints; those that name one value refuse every other."""

    model: Text
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(1.0, description="0 is greedy decoding")
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="no effect on greedy decoding")
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 and -1 are all; no effect as top_p")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="no effect on greedy decoding")
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    seed: int | None = Field(None, description="of the draws; a new one each time by default")
    n: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="choices for each prompt")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="not read")
    metadata: dict[str, Any] | None = Field(None, description="not read")
    safety_identifier: Text | None = Field(None, description="not read")
    prompt_cache_key: Text | None = Field(None, description="not read: every prompt is looked up")
    service_tier: Literal["auto", "default"] | None = None
    ignore_eos: No | None = None
    min_tokens: Zero | None = None
    skip_special_tokens: Yes | None = None
    include_stop_str_in_output: No | None = None
    presence_penalty: NoPenalty | None = None
    frequency_penalty: NoPenalty | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


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
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="drawn for each prompt, n returned")
    suffix: Literal[""] | None = None


class TextPart(Body):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn."""

    role: Annotated[str, Field(min_length=1, max_length=100)]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Text | None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1)]
TemplateArguments = Annotated[
    dict[str, Any] | None, Field(description="arguments of the chat template, such as enable_thinking")
]


class TextFormat(Body):
    """The only form of a reply."""

    type: Literal["text"]


class ChatRequest(GenerationBody):
    """/v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopK | None = None
    chat_template_kwargs: TemplateArguments = None
    enable_thinking: bool | None = Field(None, description="an argument of the chat template")
    reasoning_effort: Text | None = Field(None, description="an argument of the chat template")
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="of tools, which are not served")
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    audio: None = None
    prediction: None = None
    verbosity: None = None
    web_search_options: None = None
    echo: No | None = None
    response_format: TextFormat | None = None
    store: No | None = None
    modalities: list[Literal["text"]] | None = None


class ChoicesRequest(Body):
    """/v1/score_choices."""

    model: Text | None = None
    context: Text = Field("", description="cached for later requests that begin with it")
    prompt: Text | None = Field(None, description="after the context")
    messages: Messages | None = Field(None, description="instead of context and prompt: choices are the next turn")
    chat_template_kwargs: TemplateArguments = None
    choices: Annotated[list[Text], Field(min_length=1)]


class TokenizeRequest(Body):
    """/tokenize."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = Field(None, description="instead of a prompt: what chat would put to the model")
    chat_template_kwargs: TemplateArguments = None
    add_special_tokens: bool = Field(True, description="of a prompt; a chat template writes its own")
    add_generation_prompt: bool = Field(True, description="of messages")


def samplings(
    body: CompletionRequest | ChatRequest, prompts: Sequence[list[int]], new_tokens: Sequence[int]
) -> list[Sampling]:
    """How to continue each prompt; whoever leaves out the temperature gets OpenAI's default of 1.

    A prompt that comes again is drawn again, under the next seed.
    """
    given = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    temperature = 1.0 if body.temperature is None else body.temperature
    temperature = temperature if temperature >= ALMOST_GREEDY else 0.0
    how = Sampling(1, temperature, repetition_penalty=body.repetition_penalty or 1.0)
    if temperature:
        how = replace(how, top_p=body.top_p or 1.0, top_k=max(0, body.top_k or 0), min_p=body.min_p or 0.0)
    seed = secrets.randbits(62) if body.seed is None else body.seed
    before: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt, most in zip(prompts, new_tokens, strict=True):
        repeats = before[tuple(prompt)]
        before[tuple(prompt)] += 1
        stop = tuple(mark for mark in given if mark)
        found.append(replace(how, max_new_tokens=most, stop=stop, seed=seed + repeats))
    return found


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


def logprobs(
    tokens: Sequence[ScoredToken], texts: Sequence[str], top: int, offset: int, name: Callable[[int], str]
) -> dict[str, Any]:
    """OpenAI's lists.

    Args:
        tokens: to be listed.
        texts: the text of each, which joined are the whole text.
        top: how many of the likeliest tokens are named beside each.
        offset: characters before the first.
        name: what a token that was not generated is called.
    """
    likeliest: list[dict[str, float | None] | None] = []
    for token, text in zip(tokens, texts, strict=True):
        named: dict[str, float | None] = {text: token.logp}
        for token_id, logp in token.top[:top]:
            if token_id != token.id:
                called = name(token_id)
                named[f"token_id:{token_id}" if called in named else called] = logp  # some read alike
        likeliest.append(None if token.logp is None else named)
    return {
        "tokens": list(texts),
        "token_logprobs": [token.logp for token in tokens],
        "top_logprobs": likeliest,
        "text_offset": list(itertools.accumulate(map(len, texts), initial=offset))[:-1],
    }


def chat_logprobs(
    tokens: Sequence[ScoredToken], texts: Sequence[str], top: int, name: Callable[[int], str]
) -> dict[str, Any]:
    """The same in the form of chat."""

    def entry(text: str, logp: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logp, "bytes": list(text.encode())}

    content = []
    for token, text in zip(tokens, texts, strict=True):
        best = [entry(text if i == token.id else name(i), logp) for i, logp in token.top[:top]]
        content.append(entry(text, token.logp) | {"top_logprobs": best})
    return {"content": content, "refusal": None}


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
    """A continuation of a prompt.

    Attributes:
        text, finish_reason: as the client gets them.
        num_tokens: generated.
        tokens: the prompt's and its own, those that were scored with log-probabilities.
        logp: natural-log probability of the generated tokens.
    """

    text: str
    finish_reason: str
    num_tokens: int
    tokens: list[ScoredToken]
    logp: float


def usage(prompt_tokens: int, completion_tokens: int, reused: int) -> dict[str, Any]:
    """OpenAI's counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reused},
    }
