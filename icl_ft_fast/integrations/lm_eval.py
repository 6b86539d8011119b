"""A model of lm-evaluation-harness: `--model icl-ft-fast` with hf's arguments, hf's numbers, one trie for all requests.

Three ways in: the entry point group `lm_eval.models` (read by lm-eval after 0.4.13), `icl-ft-fast lm-eval run ...`, and
`lm_eval.simple_evaluate(model=IclFtFastLM(...))`. Knows the harness's contract; the engine knows nothing of it.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.generate import iter_generations
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import LogLikelihood, iter_loglikelihood, stored_context
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.model import Model
from icl_ft_fast.integrations.lm_eval_requests import request_name, sampling_of
from icl_ft_fast.integrations.processes import Processes
from icl_ft_fast.integrations.shared_prefixes import group_by_prefix
from icl_ft_fast.integrations.window import OVERFLOW, Window
from icl_ft_fast.runtime.templates import fix_date, render_chat

_log = logging.getLogger(__name__)

BOUNDARIES = ("harness", "whole_tokens")
FINGERPRINT_KEY, DATE_KEY = "icl-ft-fast", "icl-ft-fast date"  # no keys of the harness: those are SHA-256 digests


@register_model("icl-ft-fast")
class IclFtFastLM(TemplateLM):
    """The engine behind the harness's three request types.

    Args:
        pretrained: checkpoint or adapter directory, GGUF file, hub id, "shipped", or a loaded Model, which excludes all
            up to spill.
        tokenizer: directory or hub id of another tokenizer.
        revision: branch, tag or commit of a hub id.
        dtype: float32, bfloat16 or auto (the checkpoint's own), which is the default.
        device: a torch device; default cpu. CUDA is the process's own GPU among several, and the CPU where there is
            none (the harness asks for cuda:0 unless told otherwise), which is logged.
        peft: directory or hub id of a PEFT adapter, merged into the weights.
        cache: folder that GGUF files are read into, see load().
        trust_remote_code: let the checkpoint's own Python code run.
        batch_invariant: scores have the same bits whatever else is scored; see load(). On the CPU only.
        memory: what scoring may take; with kv_dtype and spill as in load().
        batch_size: accepted and without effect, like max_batch_size: results do not depend on batches, and memory on
            chunk_tokens.
        chunk_tokens: rows forwarded at a time; what suits the device by default.
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
        template_date: YYYY-MM-DD, what a chat template that writes the date writes; default today, or the day that the
            file of --use_cache was begun on. The results file has it under config, icl_ft_fast.
        enable_thinking: passed to the chat template; needs think_end_token and generative tasks.
        store: folder of saved contexts: of a beginning that several contexts of a call have in common, see
            integrations/shared_prefixes.py, what the model made is taken from there, or saved there.
        store_limit: GB of all contexts there, beyond which the least recently used go.
        think_end_token: token or token id; what is generated up to its last occurrence is cut off.

    Raises:
        ValueError: an argument cannot be followed, or the model cannot be loaded (ModelError).

    `ledger` counts what was computed; the results file shows it under config, icl_ft_fast, summed over processes.
    Started by torchrun or accelerate launch, each process answers its share of the documents, as with hf; a loaded
    Model is evaluated by the one process that calls.
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
        cache: str | None = None,
        trust_remote_code: bool | None = None,
        batch_invariant: bool | None = None,
        memory: int | str | None = None,
        kv_dtype: str | None = None,
        offload: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        chunk_tokens: int | None = None,
        max_length: int | None = None,
        overflow: str = OVERFLOW[0],
        boundary: str = BOUNDARIES[0],
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        template_date: str | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        store: str | Path | None = None,
        store_limit: float = 20,
    ) -> None:
        super().__init__()
        if boundary not in BOUNDARIES:
            raise ValueError(f"boundary: expected one of {', '.join(BOUNDARIES)}, got {boundary!r}")
        if enable_thinking and think_end_token is None:
            raise ValueError("enable_thinking: needs think_end_token, to tell the answer from the reasoning")
        options = {
            "tokenizer": tokenizer,
            "revision": revision,
            "dtype": dtype,
            "device": device,
            "adapter": peft,
            "cache": cache,
            "trust_remote_code": trust_remote_code,
            "batch_invariant": batch_invariant,
            "memory": memory,
            "kv_dtype": kv_dtype,
            "offload": offload,
        }
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if isinstance(pretrained, Model) and given:
            raise ValueError(f"{', '.join(given)}: has no effect on a model that is loaded already")
        self._processes = Processes(alone=isinstance(pretrained, Model))
        self._rank, self._world_size = self._processes.rank, self._processes.size
        if device is not None:
            given["device"] = self._processes.device(device)
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained, **{"dtype": "auto"} | given)
        self.tokenizer = self.model.tokenizer
        self._device = self.model.device
        self.batch_size, self.max_batch_size, self.chunk_tokens = batch_size, max_batch_size, chunk_tokens
        self._window = Window(self.model.max_positions, max_length, overflow)
        self._prefix = prefix_token_id
        if prefix_token_id is not None and not 0 <= prefix_token_id < self.model.vocabulary:
            raise ValueError(f"prefix_token_id: expected 0 to {self.model.vocabulary - 1}, got {prefix_token_id}")
        self.boundary, self.add_bos_token = boundary, add_bos_token
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        self._given_date = None if template_date is None else str(template_date)
        self.template_date = fix_date(self.tokenizer, self._given_date)
        is_id = isinstance(think_end_token, str) and think_end_token.isdecimal()
        self.think_end_token = int(think_end_token) if think_end_token and is_id else think_end_token
        self._store = None if store is None else ContextStore(Path(store), self.model, int(store_limit * 1e9))
        self.ledger = Ledger()
        self._others: Counter[str] = Counter()  # what the other processes had counted when all last met

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def max_length(self) -> int:
        """Tokens that the network sees of a request, at most."""
        return self._window.max_length

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
            text = render_chat(
                self.tokenizer,
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_args,
            )
            return str(text)  # add_bos_token decides on BOS, as it does in hf

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
            settings = (self.max_length, self._window.overflow, self.boundary, self.add_bos_token, self.prefix_token_id)
            mine = repr((self.model.fingerprint(), *settings, self.think_end_token))
            theirs = cache_hook.dbdict.get(FINGERPRINT_KEY, None if len(cache_hook.dbdict) else mine)
            if theirs != mine:
                raise ValueError(
                    f"use_cache: {cache_hook.dbdict.filename}: holds results of another model or of other settings; "
                    "give this model a file of its own"
                )
            cache_hook.dbdict[FINGERPRINT_KEY] = mine
            begun = None if self._given_date else cache_hook.dbdict.get(DATE_KEY)
            self.template_date = fix_date(self.tokenizer, begun or self.template_date)
            cache_hook.dbdict[DATE_KEY] = self.template_date
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each request's continuation after its context."""
        if self.chat_template_args.get("enable_thinking"):
            raise ValueError(f"enable_thinking: {request_name(requests[0])}: a likelihood has no place for reasoning")
        texts = [request.args for request in requests]
        pairs = encoding.encode_pairs(
            self.tokenizer,
            texts,
            bos=self.add_bos_token,
            prefix=self.prefix_token_id,
            whole_tokens=self.boundary == "whole_tokens",
        )
        rows = [(text, *pair) for text, pair in zip(texts, pairs, strict=True)]
        return self._loglikelihood_tokens(rows, disable_tqdm, names=[request_name(request) for request in requests])

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        names: Sequence[str] = (),
    ) -> list[tuple[float, bool]]:
        """Score (texts, context ids, continuation ids); a result is filed under its texts as soon as it is there."""
        names = names or [f"requests[{r}]" for r in range(len(requests))]
        fitting = self._window.fit_pairs(names, [(context, continuation) for _, context, continuation in requests])
        place, results = list(fitting), [(-math.inf, False)] * len(requests)
        for i, result in self._scores(list(fitting.values()), disable_tqdm):
            texts, results[place[i]] = requests[place[i]][0], (result.logp, result.is_greedy)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[place[i]])
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
        """What is written after each context, up to EOS, a stop string or max_gen_toks; sampled anew in each repeat."""
        repeats: Counter[str] = Counter()
        samplings = []
        for request in requests:
            samplings.append(sampling_of(request, repeats[repr(request.args)]))
            repeats[repr(request.args)] += 1
        contexts = encoding.encode(self.tokenizer, [request.args[0] for request in requests], bos=self.add_bos_token)
        follow = [sampling.max_new_tokens for sampling in samplings]
        names = [request_name(request) for request in requests]
        fitting = self._window.fit(names, [ids or [self.prefix_token_id] for ids in contexts], follow)
        place, results = list(fitting), [""] * len(requests)
        written = iter_generations(
            self.model,
            list(fitting.values()),
            [samplings[r] for r in place],
            ledger=self.ledger,
            progress=not disable_tqdm,
        )
        for i, generation in written:
            r = place[i]
            results[r] = self._text(list(generation.ids), samplings[r].stop)
            self.cache_hook.add_partial("generate_until", requests[r].args, results[r])
        return results

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every process's tensor, one after the other."""
        return torch.cat([torch.atleast_1d(each) for each in self._processes.all(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Every process's object, on process dst only."""
        objects = self._processes.all(obj)
        return objects if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for the other processes, and learn what they have counted."""
        counts = self._processes.all(self._counts())
        self._others = sum(counts[: self.rank] + counts[self.rank + 1 :], Counter())

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes to the results file about the model and this run."""
        counts = self._counts()
        counts.update(self._others)
        return {
            "model_num_parameters": self.model.num_parameters,
            "model_dtype": str(self.model.network.dtype),
            "icl_ft_fast": {
                "max_length": self.max_length,
                "overflow": self._window.overflow,
                **({"template_date": self.template_date} if self.template_date else {}),
                **counts,
            },
        }

    def _counts(self) -> Counter[str]:
        """Of this process, for the results file."""
        over = {f"over_length_{name}": count for name, count in self._window.over.items()}
        return Counter(over | {name: count for name, count in self.ledger.as_dict().items() if isinstance(count, int)})

    def _scores(
        self, pairs: list[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> Iterator[tuple[int, LogLikelihood]]:
        """(index of the pair, result) as they are done; those that begin alike start from the store."""
        groups = [(list(range(len(pairs))), list[int]())] if self._store is None else group_by_prefix(pairs)
        for members, token in groups:
            start = None
            if self._store is not None and token:
                start = stored_context(
                    self.model, token, self._store, chunk_tokens=self.chunk_tokens, ledger=self.ledger
                )
            done = iter_loglikelihood(
                self.model,
                [pairs[m] for m in members],
                chunk_tokens=self.chunk_tokens,
                ledger=self.ledger,
                progress=not disable_tqdm,
                start=start,
                count_start=False,
            )
            yield from ((members[i], result) for i, result in done)

    def _text(self, ids: list[int], until: Sequence[str]) -> str:
        """The answer in what was written: after the reasoning, before the first stop string."""
        end = self.think_end_token
        if isinstance(end, int) and end in ids:
            ids = ids[len(ids) - ids[::-1].index(end) :]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        text = text.lstrip() if isinstance(end, int) else text
        answer: str = postprocess_generated_text(text, list(until), end if isinstance(end, str) else None)
        return answer


def run(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with this model among its models."""
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
