"""A model of lighteval 0.13: `lighteval custom MODEL .../icl_ft_fast/integrations/lighteval.py TASK`.

lighteval takes the first LightevalModel that it finds in that file and hands it nothing but MODEL: a checkpoint, or
`pretrained=DIR,dtype=bfloat16,...` with the options that IclFtFastModel names.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import yaml
from lighteval.models.abstract_model import LightevalModel, ModelConfig
from lighteval.models.model_input import GenerationParameters
from lighteval.models.model_output import ModelResponse
from lighteval.models.utils import uses_chat_template
from lighteval.tasks.prompt_manager import PromptManager
from lighteval.tasks.requests import Doc, SamplingMethod
from lighteval.utils.cache_management import SampleCache, cached

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import GenerateError, Sampling, iter_generations
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import LogLikelihood, iter_loglikelihood
from icl_ft_fast.engine.loading import load
from icl_ft_fast.integrations.window import OVERFLOW, Window
from icl_ft_fast.runtime.templates import ChatText, fix_date, render_chat, set_template_arguments

_log = logging.getLogger(__name__)

LOAD = ("tokenizer", "revision", "dtype", "device", "adapter", "trust_remote_code")
Pair = tuple[list[int], list[int]]


class IclFtFastModel(LightevalModel):
    """The engine behind lighteval's three kinds of requests; all requests of a kind go through one trie.

    Args:
        config: its model_name is a checkpoint directory, hub id or "shipped", or NAME=VALUE pairs with commas between
            them: pretrained; tokenizer, revision, dtype (default auto), device, adapter and trust_remote_code as in
            load(); max_length and overflow as in Window; override_chat_template (true or false; by default prompts are
            chats where the tokenizer has a template); template_date (YYYY-MM-DD, default today) and enable_thinking for
            the chat template.

    A chat gets the token ids of its template.

    Context and choice are encoded apart, as lighteval's own transformers backend does it, and BOS is added by the
    tokenizer's habit, never twice. Generation is greedy. Cached samples are filed under the fingerprint of the weights.

    Raises:
        ValueError: an unknown option, or a model that cannot be loaded.
    """

    def __init__(self, config: ModelConfig) -> None:
        options = _options(config.model_name)
        to_load = {name: options.pop(name) for name in LOAD if name in options}
        self.model = load(options.pop("pretrained"), **{"dtype": "auto"} | to_load)
        max_length, overflow = options.pop("max_length", None), options.pop("overflow", OVERFLOW[0])
        chat = uses_chat_template(
            tokenizer=self.tokenizer, override_chat_template=options.pop("override_chat_template", None)
        )
        date = fix_date(self.tokenizer, _day(options.pop("template_date", None))) if chat else None
        if "enable_thinking" in options:
            set_template_arguments(self.tokenizer, {"enable_thinking": options.pop("enable_thinking")})
        if options:
            raise ValueError(f"MODEL: unknown options: {', '.join(options)}")
        self.config, self.ledger = config, Ledger()
        self._window = Window(self.model.max_positions, max_length, overflow)
        self._prompts = PromptManager(chat, _Chats(self.tokenizer), config.system_prompt)
        if date:
            _log.info("the chat template writes the date %s; template_date sets it", date)
        # lighteval files samples by the model's name, under which other weights may lie by now.
        mine = f"icl-ft-fast/{self.model.fingerprint()}/{self.max_length}-{overflow}-{chat}{date or ''}"
        self._cache = SampleCache(config.model_copy(update={"model_name": mine}))

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.model.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        """Whether prompts begin as the tokenizer begins a text."""
        return True

    @property
    def max_length(self) -> int:
        """Tokens that the network sees of a request, at most."""
        return self._window.max_length

    @cached(SamplingMethod.LOGPROBS)
    def loglikelihood(self, docs: list[Doc]) -> list[ModelResponse]:
        """Log-likelihoods of each document's choices; where it has an unconditioned query, then those after that."""
        bare = [doc for doc in docs if doc.unconditioned_query is not None]
        asked = [(doc, self._prompts.prepare_prompt(doc)) for doc in docs]
        asked += [(doc, doc.unconditioned_query) for doc in bare]
        names = [f"{_name(doc)}: choices[{c}]" for doc, _ in asked for c in range(len(doc.choices))]
        pairs = self._encode([(context, choice) for doc, context in asked for choice in doc.choices])
        results = self._scores(names, pairs)
        answered = iter(zip(pairs, results, strict=True))
        responses = []
        for doc, prompt in asked[: len(docs)]:
            mine = [next(answered) for _ in doc.choices]
            responses.append(
                ModelResponse(
                    input=prompt,
                    input_tokens=mine[0][0][0],
                    output_tokens=[ids for (_, ids), _ in mine],
                    logprobs=[result.logp for _, result in mine],
                    argmax_logits_eq_gold=[result.is_greedy for _, result in mine],
                )
            )
        for response, doc in zip(responses, docs, strict=True):
            if doc.unconditioned_query is not None:  # where the metrics look for them
                response.logprobs += [next(answered)[1].logp for _ in doc.choices]
        return responses

    # Not cached: of this kind lighteval 0.13 never finds what it has filed.
    def loglikelihood_rolling(self, docs: list[Doc]) -> list[ModelResponse]:
        """Log-likelihood of each document's text, in windows of max_length tokens that each see one token before."""
        texts = [self._prompts.prepare_prompt(doc) for doc in docs]
        first = encoding.prefix_token_id(self.tokenizer)
        encoded = encoding.encode(self.tokenizer, texts, bos=False)
        windows, owner = [], []
        for d, ids in enumerate(encoded):
            for start in range(0, len(ids), self.max_length):
                windows.append(([ids[start - 1] if start else first], ids[start : start + self.max_length]))
                owner.append(d)
        totals = [0.0] * len(docs)
        for d, result in zip(owner, self._scores([_name(docs[d]) for d in owner], windows), strict=True):
            totals[d] += result.logp
        return [
            ModelResponse(input=text, input_tokens=[first], output_tokens=[ids], logprobs=[total])
            for text, ids, total in zip(texts, encoded, totals, strict=True)
        ]

    @cached(SamplingMethod.GENERATIVE)
    def greedy_until(self, docs: list[Doc]) -> list[ModelResponse]:
        """What greedy decoding writes after each prompt, up to EOS, a stop sequence or the generation size."""
        parameters = self.config.generation_parameters
        if parameters != GenerationParameters(max_new_tokens=parameters.max_new_tokens):
            raise GenerateError("generation_parameters: only max_new_tokens is served; generation is greedy")
        samplings = []
        for doc in docs:
            size = parameters.max_new_tokens or doc.generation_size
            if doc.num_samples > 1 or doc.use_logits or not size:
                raise GenerateError(
                    f"{_name(doc)}: expected a generation_size, one sample and no logits: generation is greedy"
                )
            stop = () if self._prompts.use_chat_template else tuple(filter(None, doc.stop_sequences or ()))
            samplings.append(Sampling(size, stop=stop))  # a chat ends with EOS
        prompts = [self._prompts.prepare_prompt(doc) for doc in docs]
        encoded = encoding.encode(self.tokenizer, prompts)
        follow = [sampling.max_new_tokens for sampling in samplings]
        fitting = self._window.fit([_name(doc) for doc in docs], encoded, follow)
        responses = [ModelResponse(input=prompt, text=[""], output_tokens=[[]]) for prompt in prompts]
        place, asked = list(fitting), list(fitting.values())
        for i, written in iter_generations(
            self.model, asked, [samplings[d] for d in place], ledger=self.ledger, progress=True
        ):
            response = responses[place[i]]
            response.text, response.input_tokens, response.output_tokens = [written.text], asked[i], [list(written.ids)]
        return responses

    def _encode(self, pairs: list[tuple[str, str]]) -> list[Pair]:
        """Token ids of contexts and of continuations apart; spaces that end a context begin its continuation."""
        moved = [(context.rstrip(), context[len(context.rstrip()) :] + text) for context, text in pairs]
        contexts = encoding.encode(self.tokenizer, [context for context, _ in moved])
        continuations = encoding.encode(self.tokenizer, [text for _, text in moved], bos=False)
        first = [encoding.prefix_token_id(self.tokenizer)]
        end = self.tokenizer.eos_token_id
        contexts = [
            ids[:-1] if ids[-1:] == [end] and not isinstance(context, ChatText) else ids
            for (context, _), ids in zip(moved, contexts, strict=True)
        ]  # a tokenizer's EOS would end the text
        return [(ids or first, text) for ids, text in zip(contexts, continuations, strict=True)]

    def _scores(self, names: Sequence[str], pairs: list[Pair]) -> list[LogLikelihood]:
        """Results in order; a request that overflow=skip leaves out is infinitely unlikely."""
        fitting = self._window.fit_pairs(names, pairs)
        place, results = list(fitting), [LogLikelihood(-math.inf, False)] * len(pairs)
        for i, result in iter_loglikelihood(self.model, list(fitting.values()), ledger=self.ledger, progress=True):
            results[place[i]] = result
        return results


class _Chats:
    """The part of a tokenizer that lighteval writes chats with: their text remembers that a template wrote it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The text of a conversation."""
        return render_chat(self._tokenizer, messages, add_generation_prompt=add_generation_prompt)


def _day(value: object) -> str | None:
    """What YAML read of a date, as text."""
    return None if value is None else str(value)


def _name(doc: Doc) -> str:
    """What errors call a document."""
    return f"{doc.task_name}, document {doc.id}"


def _options(model: str) -> dict[str, Any]:
    """A model's name, or NAME=VALUE pairs, as options; values as in YAML."""
    if "=" not in model:
        return {"pretrained": model}
    pairs = [part.partition("=") for part in model.split(",")]
    options = {name: yaml.safe_load(value) for name, _, value in pairs}
    if "pretrained" not in options:
        raise ValueError(f"MODEL: {model}: no pretrained=... among its options")
    return options
