"""Inspect AI: the models `icl-ft-fast/...`, a solver that finds the likelihoods of choices, a scorer of what it found.

    inspect eval TASK.py --model icl-ft-fast//path/to/checkpoint -M dtype=float32 --max-samples 1000

Inspect runs samples concurrently and each asks by itself: what is asked while the engine is busy goes through one trie.
"""

from __future__ import annotations

import math
from typing import Any

from inspect_ai.model import (
    ChatMessage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    get_model,
    modelapi,
)
from inspect_ai.scorer import CORRECT, INCORRECT, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.scorer import Score as SampleScore
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import ToolChoice, ToolInfo

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import GenerateError, Generation, Sampling, generate
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import LogLikelihood, iter_loglikelihood
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.prompting import ProtocolError
from icl_ft_fast.engine.score import Score
from icl_ft_fast.integrations.batcher import Batcher
from icl_ft_fast.integrations.window import OVERFLOW, Window
from icl_ft_fast.runtime.reasoning import opened, split_reasoning
from icl_ft_fast.runtime.templates import fix_date, render_chat, set_template_arguments
from icl_ft_fast.study.evaluate import choice_scores
from icl_ft_fast.study.settings import NORMALIZATIONS
from icl_ft_fast.tasks.task import Question

MAX_TOKENS = 256
TOGETHER = 1000  # samples that Inspect may run at a time
FOUND = "icl_ft_fast"  # where the solver leaves a sample's likelihoods for the scorer, in the sample's store
SERVED = {"max_tokens", "stop_seqs"}
WITHOUT_EFFECT = {
    "adaptive_connections",
    "attempt_timeout",
    "cache",
    "max_connections",
    "max_retries",
    "system_message",
    "timeout",
}
Pair = tuple[list[int], list[int]]


@modelapi(name="icl-ft-fast")
def icl_ft_fast() -> type[ModelAPI]:
    """The model API that Inspect finds under the name icl-ft-fast."""
    return IclFtFastAPI


class IclFtFastAPI(ModelAPI):
    """The engine behind Inspect's model API.

    Args:
        model_name: checkpoint directory, hub id or "shipped"; what follows `icl-ft-fast/`.
        base_url, api_key: Inspect's, without effect.
        config: Inspect's.
        tokenizer, revision, dtype, device, adapter, trust_remote_code: see load(); dtype is auto by default.
        max_length, overflow: see Window.
        template_date: YYYY-MM-DD, what a chat template that writes the date writes; default today. Outputs' metadata
            have it.
        chat_template_kwargs: arguments of the chat template, such as {"enable_thinking": false}.

    What a model writes before its answer, between the marks of a reasoning, is reasoning in the output and no answer.

    Raises:
        ValueError: an argument cannot be followed, or the model cannot be loaded.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - Inspect's own signature
        *,
        tokenizer: str | None = None,
        revision: str = "main",
        dtype: str = "auto",
        device: str = "cpu",
        adapter: str | None = None,
        trust_remote_code: bool = False,
        max_length: int | None = None,
        overflow: str = OVERFLOW[0],
        template_date: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.model = load(
            model_name,
            tokenizer=tokenizer,
            revision=revision,
            dtype=dtype,
            device=device,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
        )
        day = None if template_date is None else str(template_date)  # Inspect reads -M values as YAML, dates among them
        self.date = fix_date(self.model.tokenizer, day)
        set_template_arguments(self.model.tokenizer, chat_template_kwargs or {})
        self._window = Window(self.model.max_positions, max_length, overflow)
        self._scores, self._texts = Batcher(self._score), Batcher(self._write)
        self.ledger = Ledger()

    def max_connections(self) -> int:
        """How many samples Inspect runs at a time, unless told otherwise."""
        return TOGETHER

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """What is written after the conversation, up to EOS, a stop string or max_tokens (256); greedy unless asked.

        Raises:
            GenerateError: tools, or settings that are not served.
        """
        asked = config.model_dump(exclude_none=True)
        given = {name: asked.pop(name) for name in ("temperature", "top_k", "top_p", "seed") if name in asked}
        if unknown := sorted(asked.keys() - SERVED - WITHOUT_EFFECT) + ["tools"] * bool(tools):
            raise GenerateError(f"{', '.join(unknown)}: not served")
        sampling = Sampling(config.max_tokens or MAX_TOKENS, stop=tuple(config.stop_seqs or ()), **given)
        prompt = self.prompt(input)
        (ids,) = encoding.encode(self.model.tokenizer, [prompt])
        fitting = self._window.fit(["input"], [ids], [sampling.max_new_tokens])
        if not fitting:
            return ModelOutput.from_content(self.model_name, "", "model_length")
        written = await self._texts.ask((fitting[0], sampling))
        reason = "max_tokens" if written.finish == "length" else "stop"
        reasoning, text = split_reasoning(opened(prompt) + written.text)
        thought = [ContentReasoning(reasoning=reasoning)] if reasoning else []
        answer = [*thought, ContentText(text=text)] if thought else text
        output = ModelOutput.from_content(self.model_name, answer, reason)
        output.metadata = {"template_date": self.date} if self.date else None
        output.usage = ModelUsage(input_tokens=len(fitting[0]), output_tokens=len(written.ids))
        return output

    def prompt(self, messages: list[ChatMessage]) -> str:
        """The text of a conversation: by the tokenizer's template, or else the messages with empty lines between."""
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            return "\n\n".join(message.text for message in messages)
        spoken = [{"role": message.role, "content": message.text} for message in messages]
        return render_chat(tokenizer, spoken)

    async def score_choices(self, name: str, prompt: str, choices: list[str]) -> Score:
        """Log-likelihoods of choices after a prompt; `name` is what errors call them.

        Raises:
            ScoreError: a choice without a token of its own, or with overflow=error a prompt beyond max_length.
        """
        pairs = encoding.encode_pairs(self.model.tokenizer, [(prompt, choice) for choice in choices])
        fitting = self._window.fit_pairs([f"{name}: choices[{c}]" for c in range(len(choices))], pairs)
        found = dict(zip(fitting, await self._scores.ask(list(fitting.values())), strict=True))
        results = [found.get(c, LogLikelihood(-math.inf, False)) for c in range(len(choices))]
        logp = tuple(result.logp for result in results)
        return Score(
            question_id=name,
            logp=logp,
            num_tokens=tuple(len(continuation) for _, continuation in pairs),
            is_greedy=tuple(result.is_greedy for result in results),
            predicted=max(range(len(logp)), key=logp.__getitem__),
            answer=None,
        )

    def _score(self, asked: list[list[Pair]]) -> list[list[LogLikelihood]]:
        """Results of each group of pairs, all through one trie."""
        pairs = [pair for group in asked for pair in group]
        results = dict(iter_loglikelihood(self.model, pairs, ledger=self.ledger))
        ordered = iter(range(len(pairs)))
        return [[results[next(ordered)] for _ in group] for group in asked]

    def _write(self, asked: list[tuple[list[int], Sampling]]) -> list[Generation]:
        """Continuations of prompts of token ids, decoded together."""
        return generate(self.model, [ids for ids, _ in asked], [each for _, each in asked], ledger=self.ledger)


@solver
def choice_likelihoods(template: str = "{question}", delimiter: str = " ", chat: bool = False) -> Solver:
    """Find the log-likelihood of each of a sample's choices after its question; they are not shown to the model.

    Args:
        template: of the question, with {question} where it stands.
        delimiter: put before each choice.
        chat: write the conversation in the tokenizer's template; otherwise its texts with empty lines between.

    The most likely choice is marked, as Inspect's own scorer choice() reads it.
    """

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        api = get_model().api
        if not isinstance(api, IclFtFastAPI):
            raise ProtocolError(f"choice_likelihoods: needs a model icl-ft-fast/..., got {state.model}")
        if not state.choices:
            raise ProtocolError(f"sample {state.sample_id}: no choices")
        state.user_prompt.text = template.format(question=state.user_prompt.text)
        prompt = api.prompt(state.messages) if chat else "\n\n".join(message.text for message in state.messages)
        texts = [choice.value for choice in state.choices]
        result = await api.score_choices(f"sample {state.sample_id}", prompt, [delimiter + text for text in texts])
        state.store.set(FOUND, {"logp": result.logp, "num_tokens": result.num_tokens, "is_greedy": result.is_greedy})
        for c in range(len(texts)):
            state.choices.mark_choice(c, c == result.predicted)
        state.output = ModelOutput.from_content(api.model_name, texts[result.predicted])
        return state

    return solve


@scorer(metrics=[accuracy(), stderr()])
def most_likely_choice(normalization: str = "sum") -> Scorer:
    """Whether the most likely choice, of those that choice_likelihoods scored, is the target.

    Args:
        normalization: what a choice's log-likelihood is divided by: sum (nothing), token, or the choice's character or
            byte count, delimiter not counted.
    """
    if normalization not in NORMALIZATIONS[:4]:
        raise ProtocolError(f"normalization: expected one of {', '.join(NORMALIZATIONS[:4])}, got {normalization!r}")

    async def score(state: TaskState, target: Target) -> SampleScore:
        found: dict[str, Any] | None = state.store.get(FOUND)
        if found is None:
            raise ProtocolError(f"sample {state.sample_id}: not scored: the solver choice_likelihoods() comes first")
        texts = tuple(choice.value for choice in state.choices)
        result = Score(
            str(state.sample_id), **{name: tuple(values) for name, values in found.items()}, predicted=0, answer=None
        )
        scores = choice_scores(Question(result.question_id, "", texts), result, normalization)
        predicted = max(range(len(scores)), key=scores.__getitem__)
        letter = chr(ord("A") + predicted) if predicted < 26 else str(predicted - 25)  # as Inspect counts
        tokens = [token for text in target for token in text.replace(",", " ").split()]
        right = {mark for token in tokens for mark in ([token] if token.isnumeric() else token)}
        return SampleScore(
            value=CORRECT if letter in right else INCORRECT, answer=letter, metadata={"scores": scores} | found
        )

    return score
