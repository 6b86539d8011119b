"""Many prompts continued over the trie: shared prefixes are forwarded once, and a place that falls free is refilled.

Prompts enter in the order of their tokens, so what they share is still on the cache: each appends its own rows and the
rows reserved for what it will write. A prompt row stays open (end beyond every row) until a prompt that is not below
it enters; an unfilled row has end 0, so nobody sees it. When the cache is full, the rows that no running sequence and
no coming prompt sees are squeezed out.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from icl_ft_fast.engine import encoding, trie
from icl_ft_fast.engine.defaults import CHUNK_TOKENS
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.kv_cache import KVCache
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model, Rows
from icl_ft_fast.runtime.errors import UserError

RUNNING = 64  # sequences decoded together; bounds the cache, and on the CPU more at a time is not faster
OPEN = 2**31 - 1  # the end of a row that rows to come may see


class GenerateError(UserError):
    """A prompt that cannot be continued, or settings that make no sense; the message names it."""


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt; what is not greedy is worked out by transformers' logits processors, in its order.

    Attributes:
        max_new_tokens: at least 1.
        temperature: divides the logits; 0 takes the most likely token, and then top_k, top_p and min_p must be off.
        top_k: keep this many most likely tokens; 0 for all.
        top_p: keep the fewest most likely tokens that together have this probability; 1 for all.
        min_p: keep tokens at least this probable relative to the most likely one; 0 for all.
        repetition_penalty: divides positive logits of tokens in the prompt or continuation, multiplies negative ones.
        no_repeat_ngram: no n-gram of this many tokens comes twice, prompt included; 0 for off.
        stop: strings that end the continuation, none empty.
        seed: of the draws. They depend on it and on the prompt's tokens alone, not on what runs beside.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 or more"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "non-empty strings"),
        ):
            if not valid:
                raise GenerateError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if not self.temperature and (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0):
            raise GenerateError("temperature: 0 is greedy, where top_k, top_p and min_p mean nothing")


@dataclass(frozen=True)
class Generation:
    """A continuation.

    Attributes:
        text: what was written, up to the first stop string.
        ids: its tokens: EOS left out, those of a stop string included.
        logp: natural-log probability of each under the model itself, whatever the sampling.
        finish: "eos", "stop" (a stop string) or "length".
    """

    text: str
    ids: tuple[int, ...]
    logp: tuple[float, ...]
    finish: str


@dataclass(eq=False)
class _Sequence:
    """One prompt under one Sampling, with what has been written so far."""

    prompt: tuple[int, ...]
    sampling: Sampling
    random: random.Random
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    first: int = 0  # cache position of its first reserved row

    @property
    def reserved(self) -> int:
        """Rows for what it writes; the last new token is never forwarded."""
        return self.sampling.max_new_tokens - 1


def generate(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> list[Generation]:
    """Continue each prompt until EOS, a stop string or max_new_tokens.

    Args:
        model: from load().
        prompts: texts, encoded with BOS where the tokenizer adds it, or token ids, taken as they are.
        sampling: one for all prompts (greedy if None), or one a prompt.
        ledger: counts of this call are added to it.
        progress: show a bar of finished prompts.

    Returns:
        The continuations, in the order of the prompts; equal prompts of equal sampling are decoded once.

    Raises:
        GenerateError: an empty prompt, or more tokens than the model has positions.

    A continuation does not depend on the prompts beside it, nor on their order or number, beyond the rounding of the
    logits (which can decide between two tokens as likely as each other).
    """
    written = dict(iter_generations(model, prompts, sampling, ledger=ledger, progress=progress))
    return [written[p] for p in range(len(prompts))]


def iter_generations(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    names: Sequence[str] | None = None,
    on_token: Callable[[int, int, float], None] | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, Generation]]:
    """Continue prompts as generate() does, each (index of the prompt, continuation) yielded as soon as it is done.

    Args:
        model: from load().
        prompts: see generate().
        sampling: see generate().
        names: what errors call each prompt.
        on_token: called with (index of the prompt, token id, its logp) as each token is written; EOS is not.
        ledger: counts of this call are added to it.
        progress: show a bar of finished prompts.

    Raises:
        GenerateError: see generate().
    """
    if sampling is None or isinstance(sampling, Sampling):
        sampling = [sampling or Sampling()] * len(prompts)
    if len(sampling) != len(prompts):
        raise GenerateError(f"sampling: expected one for each of {len(prompts)} prompts, got {len(sampling)}")
    texts = iter(encoding.encode(model.tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)]))
    equal: dict[tuple[tuple[int, ...], Sampling], list[int]] = {}
    for p, (prompt, how) in enumerate(zip(prompts, sampling, strict=True)):
        ids = tuple(next(texts) if isinstance(prompt, str) else prompt)
        over = len(ids) + how.max_new_tokens - 1 - model.max_positions  # the last new token is never forwarded
        if not ids or over > 0:
            called = names[p] if names else f"prompt {prompt[:40]!r}..." if isinstance(prompt, str) else f"prompts[{p}]"
            reason = f"{over} tokens over the model's {model.max_positions} positions" if ids else "no tokens"
            raise GenerateError(f"{called}: {reason}")
        equal.setdefault((ids, how if how.temperature else replace(how, seed=0)), []).append(p)
    owners = {}
    for (ids, how), indices in sorted(equal.items(), key=lambda item: item[0][0]):  # neighbours share prefixes
        owners[_Sequence(ids, how, random.Random(f"{how.seed} {ids}"))] = indices

    def on_written(sequence: _Sequence) -> None:
        for p in owners[sequence] if on_token else ():
            on_token(p, sequence.ids[-1], sequence.logp[-1])  # type: ignore[misc]

    with tqdm(total=len(prompts), desc="generating", unit="prompt", disable=not progress, delay=1) as bar:
        for sequence, generation in _Decoder(model, list(owners), ledger or Ledger(), on_written).run():
            bar.update(len(owners[sequence]))
            yield from ((p, generation) for p in owners[sequence])


class _Decoder:
    """Sequences, ascending by prompt, on their way through one cache."""

    def __init__(
        self, model: Model, sequences: list[_Sequence], ledger: Ledger, on_written: Callable[[_Sequence], None]
    ) -> None:
        self.model, self.ledger, self.on_written = model, ledger, on_written
        self.queue = deque(sequences)
        self.running: list[_Sequence] = []
        prompts = list(dict.fromkeys(sequence.prompt for sequence in sequences))
        # A placeholder child makes each prompt's last token a row; it is itself a leaf and takes none.
        self.tree = trie.build_from_lists([(prompt, [0]) for prompt in prompts])
        ends = (self.tree.scored_row[self.tree.path] + 1).tolist()
        # In pre-order, the rows that a prompt does not share with earlier ones end with its last token.
        self.rows = {p: slice(a, b) for p, a, b in zip(prompts, [0, *ends], ends, strict=False)}
        self.ends_text = end_tokens(model)
        self.controls: dict[Sampling, tuple[list[Any], list[Any]]] = {}
        self.cache, self.work = KVCache(self._capacity(sequences)), work_of(model)
        with ledger.phase("generate"):
            ledger.kv_bytes += self.cache.capacity * self.work.kv_row_bytes
        self.end_k = torch.zeros(self.cache.capacity, dtype=torch.int32)
        self.depth_k = torch.zeros(self.cache.capacity, dtype=torch.int32)
        self.top = 0  # cache rows in use, reserved ones included
        self.path = torch.empty(0, dtype=torch.int64)  # cache positions of the last prompt that entered
        self.entered: tuple[int, ...] = ()  # that prompt
        self.logits = torch.empty(0, 0)  # after it, [1, V], where the next sequence needs them
        self.can_squeeze = True  # whether anything may have become free since the cache was last squeezed

    def _capacity(self, sequences: list[_Sequence]) -> int:
        """Twice the rows of any RUNNING neighbours, so that squeezing is rare; at most what all take."""
        prompts = [(), *(sequence.prompt for sequence in sequences)]
        needs = [self._need(sequence, before) for sequence, before in zip(sequences, prompts, strict=False)]
        most = window = 0
        for s, need in enumerate(needs):
            window += need - (needs[s - RUNNING] if s >= RUNNING else 0)
            most = max(most, window + max(map(len, prompts[max(0, s - RUNNING) : s + 2])))
        return min(2 * most, sum(needs))

    def _need(self, sequence: _Sequence, before: tuple[int, ...]) -> int:
        """Rows that a sequence appends to the cache after the prompt `before`."""
        rows = self.rows[sequence.prompt]
        return sequence.reserved + (0 if sequence.prompt == before else rows.stop - rows.start)

    def run(self) -> Iterator[tuple[_Sequence, Generation]]:
        """Yield each sequence as it ends."""
        while self.queue or self.running:
            with self.ledger.phase("generate"):
                ended = self._step()
            yield from ended

    @torch.inference_mode()
    def _step(self) -> list[tuple[_Sequence, Generation]]:
        """Forward each running sequence's newest token and the prompts that enter, then write a token to each."""
        if self._waits_for_room() and self.can_squeeze:
            self._squeeze()
        tree, running = self.tree, self.running
        token = [torch.tensor([s.ids[-1] for s in running], dtype=torch.int32)]
        depth = [torch.tensor([len(s.prompt) + len(s.ids) - 1 for s in running], dtype=torch.int32)]
        slots = [torch.tensor([s.first + len(s.ids) - 1 for s in running], dtype=torch.int64)]
        self.end_k[slots[0]] = torch.tensor([s.first + s.reserved for s in running], dtype=torch.int32)
        self.depth_k[slots[0]] = depth[0]
        kept = len(self.logits)
        needed = list(range(len(running)))  # rows whose logits are wanted
        place = [kept + s for s in needed]  # of each sequence among them, behind those kept
        while self.queue and len(running) < RUNNING and not self._waits_for_room():
            sequence = self.queue.popleft()
            if sequence.prompt != self.entered:
                rows = self.rows[sequence.prompt]
                positions = torch.arange(self.top, self.top + rows.stop - rows.start)
                shared = int(tree.depth[rows.start])
                self.end_k[self.path[shared:]] = self.top
                self.end_k[positions] = OPEN
                self.depth_k[positions] = tree.depth[rows]
                self.path = torch.cat([self.path[:shared], positions])
                self.entered, self.top = sequence.prompt, self.top + len(positions)
                token.append(tree.token[rows])
                depth.append(tree.depth[rows])
                slots.append(positions)
                needed.append(sum(map(len, slots)) - 1)
                self.ledger.request_tokens += len(sequence.prompt)
            place.append(kept + len(needed) - 1 if len(slots) > 1 else 0)
            sequence.first, self.top = self.top, self.top + sequence.reserved
            self.end_k[sequence.first : self.top] = 0
            running.append(sequence)
        logits = self._logits(torch.cat(token), torch.cat(depth), torch.cat(slots), torch.tensor(needed))
        logits = torch.cat([self.logits.to(logits), logits]) if kept else logits
        if not self.queue or self.queue[0].prompt != self.entered:
            self.logits = logits[:0]
        elif len(slots) > 1:
            self.logits = logits[-1:]
        return self._write(logits[torch.tensor(place)])

    def _waits_for_room(self) -> bool:
        """Whether the next sequence, if there is one, does not fit on the cache."""
        return bool(self.queue) and self.top + self._need(self.queue[0], self.entered) > self.cache.capacity

    def _squeeze(self) -> None:
        """Keep the rows that a running sequence or the next prompt sees, and what is reserved for the running ones."""
        coming = self.queue[0].prompt
        shared = len(self.path) if coming == self.entered else int(self.tree.depth[self.rows[coming].start])
        self.end_k[self.path[shared:]] = self.top
        keep = torch.zeros(self.top, dtype=torch.bool)
        keep[self.path[:shared]] = True
        for sequence in self.running:
            end = sequence.first + sequence.reserved
            keep[:end] |= self.end_k[:end] >= end
            keep[sequence.first : end] = True
        moved = torch.nn.functional.pad(keep.cumsum(0), (1, 0))  # rows kept before each
        position = keep.nonzero()[:, 0]
        self.cache.compact(position)
        ends = self.end_k[position]
        self.end_k[: len(position)] = torch.where(ends == OPEN, ends, moved[ends.clamp(max=self.top)].int())
        self.depth_k[: len(position)] = self.depth_k[position]
        self.path = moved[self.path[:shared]]
        for sequence in self.running:
            sequence.first = int(moved[sequence.first])
        self.top, self.can_squeeze = len(position), False

    def _logits(
        self, token: torch.Tensor, depth: torch.Tensor, slots: torch.Tensor, needed: torch.Tensor
    ) -> torch.Tensor:
        """Forward rows in chunks; float32 logits [len(needed), V] after the rows `needed`, which ascend."""
        device, hidden = self.model.device, []
        for first in range(0, len(token), CHUNK_TOKENS):
            part = slice(first, first + CHUNK_TOKENS)
            rows = Rows(
                token[part].long().to(device),
                depth[part].to(device),
                slots[part].int().to(device),
                self.end_k[: self.top].to(device),
                self.depth_k[: self.top].to(device),
                self.cache,
                slots[part].to(device),
            )
            wanted = needed[(needed >= first) & (needed < first + CHUNK_TOKENS)] - first
            hidden.append(self.model.forward(rows)[wanted.to(device)])
            self.ledger.ran(self.work, depth[part], self.top - len(depth[part]), len(wanted))
        self.ledger.forwarded_tokens += len(token)
        self.ledger.head_tokens += len(needed)
        return self.model.head.logits(torch.cat(hidden)) if hidden else self.logits[:0]

    def _write(self, logits: torch.Tensor) -> list[tuple[_Sequence, Generation]]:
        """Give each running sequence its next token; returns those that end with it and lets them go."""
        chosen = self._choose(logits)
        logp = (logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
        running, ended = self.running, []
        self.running = []
        for sequence, token, token_logp in zip(running, chosen.tolist(), logp, strict=True):
            finish = "eos" if token in self.ends_text else ""
            if not finish:
                sequence.ids.append(token)
                sequence.logp.append(token_logp)
                self.on_written(sequence)
            stop = sequence.sampling.stop
            text = self.model.tokenizer.decode(sequence.ids) if stop else ""
            if any(mark in text for mark in stop):
                finish = "stop"
            elif not finish and len(sequence.ids) == sequence.sampling.max_new_tokens:
                finish = "length"
            if finish:
                text = text or self.model.tokenizer.decode(sequence.ids)
                text = min((text.split(mark)[0] for mark in stop), key=len, default=text)
                ended.append((sequence, Generation(text, tuple(sequence.ids), tuple(sequence.logp), finish)))
            else:
                self.running.append(sequence)
        self.ledger.decoded_tokens += len(running)
        self.can_squeeze = self.can_squeeze or bool(ended)
        return ended

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        """A token for each running sequence from logits [R, V], int64 [R]."""
        chosen = logits.argmax(-1)
        alike: dict[Sampling, list[int]] = {}
        for s, sequence in enumerate(self.running):
            alike.setdefault(replace(sequence.sampling, max_new_tokens=1, stop=(), seed=0), []).append(s)
        for sampling, members in alike.items():
            if sampling == Sampling(max_new_tokens=1):
                continue
            if sampling not in self.controls:
                self.controls[sampling] = _controls(sampling)
            history, warpers = self.controls[sampling]
            scores = logits[members]
            if history:
                for m, s in enumerate(members):
                    seen = torch.tensor([[*self.running[s].prompt, *self.running[s].ids]], device=logits.device)
                    for processor in history:
                        scores[m : m + 1] = processor(seen, scores[m : m + 1])
            for warper in warpers:
                scores = warper(None, scores)
            if not sampling.temperature:
                chosen[members] = scores.argmax(-1)
                continue
            below = scores.double().softmax(-1).cumsum(-1)
            drawn = torch.tensor([[self.running[s].random.random()] for s in members], device=logits.device)
            chosen[members] = torch.searchsorted(below, drawn.double() * below[:, -1:], right=True)[:, 0]
        return chosen


def _controls(sampling: Sampling) -> tuple[list[Any], list[Any]]:
    """Transformers' logits processors: those that look at the tokens so far, and those that do not."""
    from transformers.generation import logits_process as hf

    history, warpers = [], []
    if sampling.repetition_penalty != 1:
        history.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram:
        history.append(hf.NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram))
    if sampling.temperature not in (0.0, 1.0):
        warpers.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(hf.MinPLogitsWarper(sampling.min_p))
    return history, warpers


def end_tokens(model: Model) -> set[int]:
    """The tokens that end a text: the tokenizer's EOS and those of the checkpoint's generation settings."""
    listed = getattr(getattr(model.network, "generation_config", None), "eos_token_id", None)
    ids = [model.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return {int(token_id) for token_id in ids if token_id is not None}
