"""A model of lm-evaluation-harness: `--model icl-ft-fast` with hf's arguments, hf's numbers, one trie for all requests.

Three ways in: the entry point group `lm_eval.models` (read by lm-eval after 0.4.13), `icl-ft-fast lm-eval run ...`, and
`lm_eval.simple_evaluate(model=IclFtFastLM(...))`. Knows the harness's contract; the engine knows nothing of it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from icl_ft_fast import encoding
from icl_ft_fast.cost import Ledger
from icl_ft_fast.generate import GenerateError, Sampling, iter_generations
from icl_ft_fast.model import CHUNK_ROWS, Model, load
from icl_ft_fast.score import ScoreError, iter_loglikelihood

_log = logging.getLogger(__name__)

MAX_GEN_TOKS = 256  # the harness's default
OVERFLOW = ("truncate_left", "error", "skip")
BOUNDARIES = ("harness", "whole_tokens")
WITHOUT_EFFECT_ON_GREEDY = ("temperature", "top_k", "top_p", "min_p", "typical_p")
FINGERPRINT_KEY = "icl-ft-fast"  # no key of the harness: those are SHA-256 digests


@register_model("icl-ft-fast")
class IclFtFastLM(TemplateLM):
    """The engine behind the harness's three request types.

    Args:
        pretrained: checkpoint directory, hub id, "shipped", or a loaded Model, which excludes the next seven.
        tokenizer: directory or hub id of another tokenizer.
        revision: branch, tag or commit of a hub id.
        dtype: float32, bfloat16 or auto (the checkpoint's own), which is the default.
        device: a torch device; default cpu.
        peft: directory or hub id of a PEFT adapter, merged into the weights.
        trust_remote_code: let the checkpoint's own Python code run.
        batch_size: accepted and without effect, like max_batch_size: results do not depend on batches, and memory on
            chunk_rows.
        chunk_rows: rows forwarded at a time.
        max_length: tokens of context and continuation that the network sees; at most, and by default, its positions.
        overflow: what happens to a request beyond max_length, reported by number in a warning and in the results file:
            truncate_left, what hf does, drops the first tokens of its context; error names it; skip answers minus
            infinity, or no text. The harness cannot leave a document out: if all of its choices are skipped, it counts
            as answered with the first.
        boundary: of a token that spans the join of context and continuation: harness cuts the continuation as hf does;
            whole_tokens counts it to the continuation and ends the context before it.
        add_bos_token: begin every text with BOS, or none; default the tokenizer's habit.
        prefix_token_id: stands for an empty context; default BOS, else EOS.
        chat_template_args: passed to the chat template.
        enable_thinking: passed to the chat template; needs think_end_token and generative tasks.
        think_end_token: token or token id; what is generated up to its last occurrence is cut off.

    Raises:
        ValueError: an argument cannot be followed, or the model cannot be loaded (ModelError).

    `ledger` counts what was computed; the results file shows it under config, icl_ft_fast.
    """

    def __init__(
        self,
        pretrained: str | Path | Model,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        peft: str | None = None,
        trust_remote_code: bool | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        chunk_rows: int = CHUNK_ROWS,
        max_length: int | None = None,
        overflow: str = OVERFLOW[0],
        boundary: str = BOUNDARIES[0],
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("icl-ft-fast runs in one process: start lm-eval without torchrun or accelerate launch")
        for name, value, allowed in (("overflow", overflow, OVERFLOW), ("boundary", boundary, BOUNDARIES)):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        if enable_thinking and think_end_token is None:
            raise ValueError("enable_thinking: needs think_end_token, to tell the answer from the reasoning")
        options = {
            "tokenizer": tokenizer, "revision": revision, "dtype": dtype, "device": device, "adapter": peft,
            "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if isinstance(pretrained, Model) and given:
            raise ValueError(f"{', '.join(given)}: has no effect on a model that is loaded already")
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained, **{"dtype": "auto"} | given)
        self.tokenizer = self.model.tokenizer
        self._device = self.model.device
        self.batch_size, self.max_batch_size, self.chunk_rows = batch_size, max_batch_size, chunk_rows
        self.max_length = self.model.max_positions if max_length is None else max_length
        if not 1 <= self.max_length <= self.model.max_positions:
            raise ValueError(f"max_length: expected 1 to {self.model.max_positions}, got {max_length}")
        self._prefix = prefix_token_id
        if prefix_token_id is not None and not 0 <= prefix_token_id < self.model.vocabulary:
            raise ValueError(f"prefix_token_id: expected 0 to {self.model.vocabulary - 1}, got {prefix_token_id}")
        self.overflow, self.boundary, self.add_bos_token = overflow, boundary, add_bos_token
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        is_id = isinstance(think_end_token, str) and think_end_token.isdecimal()
        self.think_end_token = int(think_end_token) if think_end_token and is_id else think_end_token
        self.ledger = Ledger()
        self.over_length = Counter(requests=0, tokens=0)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return encoding.prefix_token_id(self.tokenizer) if self._prefix is None else self._prefix

    @property
    def tokenizer_name(self) -> str:
        """The harness's name for requests that it keeps built."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with BOS by the tokenizer's habit unless one of the arguments says otherwise."""
        bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return encoding.encode(self.tokenizer, [string], bos=bos)[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without its system message where the template takes none, as hf does it."""

        def render(messages: list[dict[str, str]]) -> str:
            prompt: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt, **self.chat_template_args,
            )  # fmt: skip
            return prompt

        try:
            return render(chat_history)
        except jinja2.TemplateError as error:
            spoken = [message for message in chat_history if message["role"] != "system"]
            if len(spoken) == len(chat_history):
                raise
            _log.warning("the chat template refuses the system message, which is left out: %s", error)
            return render(spoken)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take the hook of --use_cache unless its file holds results of another model or other settings.

        The harness files results by request alone: a fine-tuned model would be given those of its base.
        """
        if cache_hook.dbdict is not None:
            settings = (self.max_length, self.overflow, self.boundary, self.add_bos_token, self.prefix_token_id)
            mine = repr((self.model.fingerprint(), *settings, self.think_end_token))
            theirs = cache_hook.dbdict.get(FINGERPRINT_KEY, None if len(cache_hook.dbdict) else mine)
            if theirs != mine:
                raise ValueError(
                    f"use_cache: {cache_hook.dbdict.filename}: holds results of another model or of other settings; "
                    "give this model a file of its own"
                )
            cache_hook.dbdict[FINGERPRINT_KEY] = mine
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each request's continuation after its context."""
        if self.chat_template_args.get("enable_thinking"):
            raise ValueError(f"enable_thinking: {_name(requests[0])}: a likelihood has no place for reasoning")
        texts = [request.args for request in requests]
        pairs = encoding.encode_pairs(
            self.tokenizer, texts, bos=self.add_bos_token, prefix=self.prefix_token_id,
            whole_tokens=self.boundary == "whole_tokens",
        )  # fmt: skip
        rows = [(text, *pair) for text, pair in zip(texts, pairs, strict=True)]
        return self._loglikelihood_tokens(rows, disable_tqdm, names=[_name(request) for request in requests])

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        names: Sequence[str] = (),
    ) -> list[tuple[float, bool]]:
        """Score (texts, context ids, continuation ids); a result is filed under its texts as soon as it is there."""
        names = names or [f"requests[{r}]" for r in range(len(requests))]
        for name, (_, _, continuation) in zip(names, requests, strict=True):
            if not continuation:
                raise ScoreError(
                    f"{name}: the continuation has no token of its own: it is empty, or the tokenizer merges it into "
                    "the end of the context (boundary=whole_tokens would score the merged token)"
                )
        rooms = [self.max_length + 1 - len(continuation) for _, _, continuation in requests]
        fitting = self._fitting(names, [context for _, context, _ in requests], rooms)
        place, results = list(fitting), [(-math.inf, False)] * len(requests)
        for i, result in self._scores([(fitting[r], requests[r][2]) for r in place], disable_tqdm):
            texts, results[place[i]] = requests[place[i]][0], tuple(result)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(result))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in windows of max_length that share no predicted token."""
        windows, owner = [], []
        for r, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                owner.append(r)
        totals, waiting = [0.0] * len(requests), Counter(owner)
        for i, result in self._scores(windows, disable_tqdm):
            r = owner[i]
            totals[r] += result.logp
            waiting[r] -= 1
            if not waiting[r]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[r].args, totals[r])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What greedy decoding writes after each context, up to EOS, a stop string or max_gen_toks."""
        settings = [_greedy_settings(request) for request in requests]
        contexts = encoding.encode(self.tokenizer, [request.args[0] for request in requests], bos=self.add_bos_token)
        rooms = [self.max_length - max_gen_toks for _, max_gen_toks in settings]
        names = [_name(request) for request in requests]
        fitting = self._fitting(names, [ids or [self.prefix_token_id] for ids in contexts], rooms)
        results = [""] * len(requests)
        for until, max_gen_toks in dict.fromkeys(settings):
            place = [r for r in fitting if settings[r] == (until, max_gen_toks)]
            written = iter_generations(
                self.model, [fitting[r] for r in place], Sampling(max_gen_toks, stop=tuple(until)), ledger=self.ledger,
                progress=not disable_tqdm,
            )  # fmt: skip
            for i, generation in written:
                results[place[i]] = text = self._text(list(generation.ids), until)
                self.cache_hook.add_partial("generate_until", requests[place[i]].args, text)
        return results

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes to the results file about the model and this run."""
        counts = {name: value for name, value in self.ledger.as_dict().items() if name != "seconds"}
        over = {f"over_length_{name}": count for name, count in self.over_length.items()}
        return {
            "model_num_parameters": self.model.num_parameters,
            "model_dtype": str(self.model.network.dtype),
            "icl_ft_fast": {"max_length": self.max_length, "overflow": self.overflow, **over, **counts},
        }

    def _scores(self, pairs: list[tuple[list[int], list[int]]], disable_tqdm: bool) -> Any:
        return iter_loglikelihood(
            self.model, pairs, chunk_rows=self.chunk_rows, ledger=self.ledger, progress=not disable_tqdm
        )

    def _fitting(
        self, names: Sequence[str], contexts: Sequence[list[int]], rooms: Sequence[int]
    ) -> dict[int, list[int]]:
        """By place, the contexts in at most their room of tokens, without those to skip; warns of what did not fit."""
        fitting, before = {}, self.over_length.copy()
        for r, (name, context, room) in enumerate(zip(names, contexts, rooms, strict=True)):
            over = len(context) - room
            if over > 0 and (self.overflow == "error" or (room < 1 and self.overflow == "truncate_left")):
                advice = "give overflow=truncate_left or skip" if room > 0 else "no context would be left"
                raise ScoreError(
                    f"{name}: {len(context)} tokens of context are {over} more than go into max_length "
                    f"{self.max_length} with what follows; {advice}"
                )
            if over > 0:
                self.over_length.update(requests=1, tokens=over)
            if over <= 0 or self.overflow == "truncate_left":
                fitting[r] = context[over:] if over > 0 else context
        if new := self.over_length - before:
            what = (new["requests"], self.max_length, new["tokens"], self.overflow)
            _log.warning("%d requests exceed max_length %d by %d tokens in all: overflow=%s", *what)
        return fitting

    def _text(self, ids: list[int], until: Sequence[str]) -> str:
        """The answer in what was written: after the reasoning, before the first stop string."""
        end = self.think_end_token
        if isinstance(end, int) and end in ids:
            ids = ids[len(ids) - ids[::-1].index(end) :]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        text = text.lstrip() if isinstance(end, int) else text
        answer: str = postprocess_generated_text(text, list(until), end if isinstance(end, str) else None)
        return answer


def _name(request: Instance) -> str:
    """What errors call a request."""
    return f"{request.task_name}, document {request.doc_id}, request {request.idx}"


def _greedy_settings(request: Instance) -> tuple[tuple[str, ...], int]:
    """Stop strings and the most tokens to write; raises GenerateError for what greedy decoding cannot follow."""
    settings = dict(normalize_gen_kwargs(request.args[1], MAX_GEN_TOKS))
    until, max_gen_toks = settings.pop("until"), settings.pop("max_gen_toks")
    if settings.pop("do_sample"):
        raise GenerateError(
            f"{_name(request)}: generation_kwargs: do_sample or temperature asks for sampling; only greedy decoding is "
            "served (do_sample=false)"
        )
    if unknown := sorted(settings.keys() - set(WITHOUT_EFFECT_ON_GREEDY)):
        raise GenerateError(f"{_name(request)}: generation_kwargs: {', '.join(unknown)}: not served")
    return tuple(text for text in until if text), max_gen_toks


def run(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with this model among its models."""
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
