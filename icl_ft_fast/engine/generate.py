"""Many prompts continued together: shared prefixes are forwarded once, and a place that falls free is refilled.

Prompts enter in the order of their tokens; allocator.py says which row of the KV cache holds which token. A step
forwards the newest token of every running sequence and the prompts that enter, through the loop of forward.py.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from icl_ft_fast import ops
from icl_ft_fast.engine import encoding, memory, trie
from icl_ft_fast.engine.allocator import RowAllocator
from icl_ft_fast.engine.decoding import NewestTokens
from icl_ft_fast.engine.detokenize import Detokenizer, pieces
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.forward import chunk_tokens_of, footprint_of, in_chunks, temporary_bytes_of
from icl_ft_fast.engine.kv_cache import Context, KVCache, common_tokens, num_staying
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model, Rows
from icl_ft_fast.engine.transfer import copied, is_late
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.progress import Activity

_log = logging.getLogger(__name__)

RUNNING = 64  # sequences decoded together; bounds the cache, and on the CPU more at a time is not faster


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


class NewToken(NamedTuple):
    """A generated token: its natural-log probability under the model, its rank, and the likeliest at its place.

    The rank is 1 for the likeliest, and 0 where no likeliest tokens were asked for.
    """

    id: int
    logp: float
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Generation:
    """A continuation.

    Attributes:
        text: what was generated, up to the first stop string, as it stands behind the prompt.
        ids: its tokens: EOS left out, those of a stop string included.
        logp: natural-log probability of each under the model itself, whatever the sampling.
        finish: "eos", "stop" (a stop string), "length", or "dropped" (on_token asked for it).
        tokens: what on_token was told of each token.
    """

    text: str
    ids: tuple[int, ...]
    logp: tuple[float, ...]
    finish: str
    tokens: tuple[NewToken, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Reuse:
    """What a run reads of kept contexts and what it keeps, by prompt, and what it tells of each token.

    Attributes:
        starts: contexts; what a prompt and its context begin with alike is copied, all but the prompt's last token.
        keep: how many leading tokens of a prompt on_context is given as a Context, when they have been forwarded.
        on_context: called with (index of the prompt, context).
        top: how many of the likeliest tokens come with each NewToken.
    """

    starts: Mapping[int, Context] = field(default_factory=dict)
    keep: Mapping[int, int] = field(default_factory=dict)
    on_context: Callable[[int, Context], None] | None = None
    top: int = 0


@dataclass(eq=False)
class _Sequence:
    """One prompt under one Sampling, with what has been generated so far."""

    prompt: tuple[int, ...]
    sampling: Sampling
    random: random.Random
    reader: Detokenizer
    index: int  # of a prompt of the call that it belongs to
    text: str = ""
    ids: list[int] = field(default_factory=list)
    told: list[NewToken] = field(default_factory=list)

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
        GenerateError: an empty prompt, more tokens than the model has positions, or too little memory.

    A continuation does not depend on the prompts beside it, nor on their order or number, beyond the rounding of the
    logits (which can decide between two tokens as likely as each other).

    Examples:
        >>> model = iff.load("shipped")
        >>> (reply,) = iff.generate(model, ["glon are wider than"], iff.Sampling(max_new_tokens=4))
        >>> len(reply.ids)
        4
    """
    written = dict(iter_generations(model, prompts, sampling, ledger=ledger, progress=progress))
    return [written[p] for p in range(len(prompts))]


def iter_generations(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    names: Sequence[str] | None = None,
    on_token: Callable[[int, NewToken], bool | None] | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
    reuse: Reuse | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Continue prompts as generate() does, each (index of the prompt, continuation) yielded as soon as it is done.

    Args:
        model: from load().
        prompts: see generate().
        sampling: see generate().
        names: what errors call each prompt.
        on_token: called with (index of the prompt, token) as each token is generated; EOS is not. Where it returns
            False the continuation ends.
        ledger: counts of this call are added to it.
        progress: show a bar of finished prompts.
        reuse: contexts to begin from and to keep.

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
        draws = random.Random(f"{how.seed} {ids}")
        owners[_Sequence(ids, how, draws, Detokenizer(model.tokenizer, ids), indices[0])] = indices

    def on_written(sequence: _Sequence) -> bool:
        if on_token is None:
            return True
        wanted = [on_token(p, sequence.told[-1]) is not False for p in owners[sequence]]
        return any(wanted)

    with Activity("generating", total=len(prompts), unit="prompt", shown=progress) as bar:
        decoder = _Decoder(model, list(owners), ledger or Ledger(), on_written, reuse or Reuse())
        for sequence, generation in decoder.run():
            bar.update(len(owners[sequence]))
            yield from ((p, generation) for p in owners[sequence])


class _Prompts:
    """Distinct prompts as one tree, whose rows from one prompt to the next are what the next one adds."""

    def __init__(self, prompts: Sequence[tuple[int, ...]]) -> None:
        self.tree = trie.build_from_lists([(prompt, []) for prompt in prompts], whole=True)
        ends = (self.tree.last_row + 1).tolist()
        # In pre-order, the rows that a prompt does not share with earlier ones end with its last token.
        self.rows = {p: slice(a, b) for p, a, b in zip(prompts, [0, *ends], ends, strict=False)}

    def token(self, prompt: tuple[int, ...]) -> torch.Tensor:
        """What it adds to the prompt before it, int32."""
        return self.tree.token[self.rows[prompt]]

    def depth(self, prompt: tuple[int, ...]) -> torch.Tensor:
        """Depths of these tokens, int32."""
        return self.tree.depth[self.rows[prompt]]

    def needed(self, sequence: _Sequence, before: tuple[int, ...]) -> int:
        """Rows that a sequence takes of the cache after the prompt `before`."""
        rows = self.rows[sequence.prompt]
        return sequence.reserved + (0 if sequence.prompt == before else rows.stop - rows.start)

    def capacity(self, sequences: Sequence[_Sequence], running: int) -> int:
        """Twice the rows of any `running` neighbours, so that squeezing is rare; at most what all take."""
        prompts = [(), *(sequence.prompt for sequence in sequences)]
        needs = [self.needed(sequence, before) for sequence, before in zip(sequences, prompts, strict=False)]
        most = window = 0
        for s, need in enumerate(needs):
            window += need - (needs[s - running] if s >= running else 0)
            most = max(most, window + max(map(len, prompts[max(0, s - running) : s + 2])))
        return min(2 * most, sum(needs))


@dataclass
class _Step:
    """What a step forwards: tokens, depths and cache rows; which of them are followed by a new token, and whose."""

    token: list[torch.Tensor]
    depth: list[torch.Tensor]
    rows: list[torch.Tensor]
    needed: list[int]
    kept: list[tuple[_Sequence, torch.Tensor]]  # the cache rows of prompts that are kept
    place: list[int]  # of each running sequence in the logits: those kept from the step before, then the needed ones


class _Decoder:
    """Sequences, ascending by prompt, on their way through one cache."""

    def __init__(
        self,
        model: Model,
        sequences: list[_Sequence],
        ledger: Ledger,
        on_written: Callable[[_Sequence], bool],
        reuse: Reuse,
    ) -> None:
        self.model, self.ledger, self.on_written, self.reuse = model, ledger, on_written, reuse
        self.queue, self.running = deque(sequences), list[_Sequence]()
        self.prompts = _Prompts(list(dict.fromkeys(sequence.prompt for sequence in sequences)))
        self.ends_text, self.chooser, self.work = end_tokens(model), _Chooser(), work_of(model)
        self.has_constant_shapes = is_late(model.device)
        self.chunk_tokens, self.most_running, self.cache = self._fit(sequences)
        self.newest = NewestTokens(model, self.cache, self.most_running)
        ledger.note_served_by(ops.served_by(model.device, model.head.weight.dtype))
        with ledger.phase("generate"):
            ledger.kv_bytes += self.cache.capacity * footprint_of(model).kv_row_bytes
        self.rows = RowAllocator(self.cache.capacity - self.has_constant_shapes)
        self.hidden: torch.Tensor | None = None  # of every row of the cache, [S, E], where a prompt is to be kept
        self.entered: tuple[int, ...] = ()  # the prompt that entered last
        self.logits = torch.empty(0, 0)  # after it, [1, V], where the next sequence needs them

    def _fit(self, sequences: list[_Sequence]) -> tuple[int, int, KVCache]:
        """Tokens forwarded at a time, sequences decoded together and a cache that fit the memory."""
        model, num_rows = self.model, len(self.prompts.tree.token)

        def extent(size: int) -> tuple[int, int]:
            running = min(RUNNING, size)
            return min(size, num_rows + running), self.prompts.capacity(sequences, running) + self.has_constant_shapes

        vocabulary, width = model.head.weight.shape
        beside = 24 * min(RUNNING, len(sequences)) * vocabulary  # logits, their softmax in float64, ...
        if self.reuse.keep:
            beside += 4 * width * self.prompts.capacity(sequences, min(RUNNING, len(sequences)))
        try:
            size, need = memory.fit(
                extent,
                chunk_tokens_of(model),
                model.memory,
                footprint_of(model),
                model.device,
                extra_bytes=beside,
                temporary_bytes=partial(temporary_bytes_of, model),
            )
        except memory.BudgetError as error:
            raise GenerateError(str(error)) from error
        cache = model.new_cache(need.capacity, need.folder if need.offloaded_bytes else None)
        return size, min(RUNNING, size), cache

    def run(self) -> Iterator[tuple[_Sequence, Generation]]:
        """Yield each sequence as it ends."""
        while self.queue or self.running:
            with self.ledger.phase("generate"):
                ended = self._step()
            yield from ended

    @torch.inference_mode()
    def _step(self) -> list[tuple[_Sequence, Generation]]:
        """Forward each running sequence's newest token and the prompts that enter, then give each a token."""
        if self._waits_for_room():
            self._squeeze()
        num_kept, step = len(self.logits), self._newest()
        while self.queue and len(self.running) < self.most_running and not self._waits_for_room():
            self._enter(self.queue.popleft(), step)
        logits = self._forward_newest(step) if len(step.rows) == 1 else None
        logits = self._forward(step) if logits is None else logits
        logits = torch.cat([self.logits.to(logits), logits]) if num_kept else logits
        if not self.queue or self.queue[0].prompt != self.entered:
            self.logits = logits[:0]
        elif len(step.rows) > 1:
            self.logits = logits[-1:]
        first, num_places = step.place[0], len(step.place)
        if step.place == [*range(first, first + num_places)]:
            return self._write(logits[first : first + num_places])
        (place,) = copied((torch.tensor(step.place, dtype=torch.int32),), logits.device)
        return self._write(logits[place])

    def _newest(self) -> _Step:
        """The newest token of each running sequence."""
        running, number = self.running, range(len(self.running))
        depth = torch.tensor([len(s.prompt) + len(s.ids) - 1 for s in running], dtype=torch.int32)
        rows = self.rows.fill(running, [len(s.ids) - 1 for s in running], depth)
        token = torch.tensor([s.ids[-1] for s in running], dtype=torch.int32)
        return _Step([token], [depth], [rows], [*number], [], [len(self.logits) + s for s in number])

    def _enter(self, sequence: _Sequence, step: _Step) -> None:
        """Add a sequence to those running, with what its prompt adds to the one before it."""
        if sequence.prompt != self.entered:
            depth = self.prompts.depth(sequence.prompt)
            rows = self.rows.enter(depth)
            copied = self._copy_start(sequence, depth, rows)
            step.token.append(self.prompts.token(sequence.prompt)[copied:])
            step.depth.append(depth[copied:])
            step.rows.append(rows[copied:])
            if num_tokens := self.reuse.keep.get(sequence.index, 0):
                step.kept.append((sequence, self.rows.path[:num_tokens]))
            step.needed.append(sum(map(len, step.rows)) - 1)
            self.entered = sequence.prompt
            self.ledger.request_tokens += len(sequence.prompt)
        step.place.append(len(self.logits) + len(step.needed) - 1 if len(step.rows) > 1 else 0)
        self.rows.reserve(sequence, sequence.reserved)
        self.running.append(sequence)

    def _copy_start(self, sequence: _Sequence, depth: torch.Tensor, rows: torch.Tensor) -> int:
        """Copy what its context has of the tokens that a prompt adds, into their rows; returns how many it has."""
        start = self.reuse.starts.get(sequence.index)
        if start is None:
            return 0
        alike = common_tokens(start.token, np.asarray(sequence.prompt[:-1], np.int32))
        first, most = int(depth[0]), max(0, alike - int(depth[0]))
        if most:
            top = int(rows[0])
            start.cache.copy_rows(slice(first, alike), self.cache, slice(top, top + most))
            self.ledger.cached_tokens += most
            if self.reuse.keep:
                self._hidden_rows(start.hidden)[rows[:most].to(start.hidden.device)] = start.hidden[first:alike]
        return most

    def _hidden_rows(self, like: torch.Tensor) -> torch.Tensor:
        if self.hidden is None:
            self.hidden = like.new_zeros(self.cache.capacity, like.shape[1])
        return self.hidden

    def _keep(self, kept: Sequence[tuple[_Sequence, torch.Tensor]]) -> None:
        """Hand out the beginnings of prompts that have just been forwarded, as contexts."""
        for sequence, rows in kept:
            cache, here = KVCache(len(rows), kv_dtype=self.cache.kv_dtype), rows.to(self.model.device)
            self.cache.copy_rows(here, cache, slice(len(rows)))
            cache.commit(len(rows))
            assert self.hidden is not None  # the last token of every prompt is forwarded
            token = np.asarray(sequence.prompt[: len(rows)], np.int32)
            if self.reuse.on_context is not None:
                self.reuse.on_context(sequence.index, Context(token, self.hidden[here], cache))

    def _waits_for_room(self) -> bool:
        """Whether the next sequence, if there is one, does not fit into the cache."""
        return bool(self.queue) and not self.rows.has_room(self.prompts.needed(self.queue[0], self.entered))

    def _squeeze(self) -> None:
        """Keep what a running sequence or the next prompt sees, and what is reserved for the running ones."""
        coming = self.queue[0].prompt
        shared = len(self.rows.path) if coming == self.entered else int(self.prompts.depth(coming)[0])
        keep = self.rows.squeeze(shared)
        if keep is not None:
            (moved,) = copied((keep[num_staying(keep) :].int(),), self.model.device)
            self.cache.compact(keep, moved.long())
            if self.hidden is not None:
                self.hidden[: len(keep)] = self.hidden[keep.to(self.hidden.device)]

    def _forward(self, step: _Step) -> torch.Tensor:
        """Forward rows in chunks; float32 logits [len(needed), V] after the rows `needed`, which ascend."""
        token, depth, slots = torch.cat(step.token), torch.cat(step.depth), torch.cat(step.rows)
        needed, top, device = torch.tensor(step.needed, dtype=torch.int32), self.rows.top, self.model.device

        def run(chunk: trie.Slice) -> torch.Tensor:
            part = slice(chunk.first_row, chunk.last_row)
            wanted = needed[(needed >= chunk.first_row) & (needed < chunk.last_row)] - chunk.first_row
            numbers = token[part], depth[part], slots[part].int(), self.rows.end_k[:top], self.rows.depth_k[:top]
            its, depth_q, row_q, end_k, depth_k, wanted_rows = copied((*numbers, wanted), device)
            rows = Rows(its.long(), depth_q, row_q, end_k, depth_k, self.cache, row_q.long())
            hidden = self.model.forward(rows)
            if self.reuse.keep:
                self._hidden_rows(hidden)[row_q.long()] = hidden
            self.ledger.ran(self.work, depth[part], top - len(depth[part]), len(wanted))
            return hidden[wanted_rows]

        plan, hidden = trie.slices(len(token), self.chunk_tokens), []
        for chunk, its in in_chunks(plan, run):
            hidden.append(its)
            if chunk.last_row < len(token):  # smaller from now on where memory ran out
                self.chunk_tokens = min(self.chunk_tokens, chunk.last_row - chunk.first_row)
        self._keep(step.kept)
        self.ledger.forwarded_tokens += len(token)
        self.ledger.head_tokens += len(needed)
        return self.model.head.logits(torch.cat(hidden)) if hidden else self.logits[:0]

    def _forward_newest(self, step: _Step) -> torch.Tensor | None:
        """Logits after the newest tokens alone, in constant shapes; None where the device gains nothing by that."""
        (token,), (depth,), (rows,) = step.token, step.depth, step.rows
        if not self.has_constant_shapes or not len(token):
            return None
        try:
            logits = self.newest.logits(token, depth, rows, self.rows.end_k, self.rows.depth_k)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error):
                raise
            _log.warning("memory: ran out; resuming with tokens generated in changing shapes (%s)", error)
            self.has_constant_shapes = False
            return None
        self.ledger.ran(self.work, depth, self.rows.top - len(depth), len(depth))
        self.ledger.forwarded_tokens += len(depth)
        self.ledger.head_tokens += len(depth)
        return logits

    def _write(self, logits: torch.Tensor) -> list[tuple[_Sequence, Generation]]:
        """Give each running sequence its next token; returns those that end with it and lets them go."""
        chosen = self.chooser.choose(logits, self.running)
        running, ended = self.running, []
        self.running = []
        for sequence, new in zip(running, _told(logits, chosen, self.reuse.top), strict=True):
            token = new.id
            finish, is_wanted = "eos" if token in self.ends_text else "", True
            if not finish:
                sequence.ids.append(token)
                sequence.told.append(new)
                is_wanted = self.on_written(sequence)
            stop = sequence.sampling.stop
            if stop and not finish:
                sequence.text += sequence.reader.push(token)
            text = sequence.text + sequence.reader.rest if stop else ""
            if any(mark in text for mark in stop):
                finish = "stop"
            elif not finish and not is_wanted:
                finish = "dropped"
            elif not finish and len(sequence.ids) == sequence.sampling.max_new_tokens:
                finish = "length"
            if finish:
                text = text if stop else "".join(pieces(self.model.tokenizer, sequence.ids, sequence.prompt))
                text = min((text.split(mark)[0] for mark in stop), key=len, default=text)
                ids, logp = tuple(sequence.ids), tuple(one.logp for one in sequence.told)
                ended.append((sequence, Generation(text, ids, logp, finish, tuple(sequence.told))))
                self.rows.release(sequence)
            else:
                self.running.append(sequence)
        self.ledger.decoded_tokens += len(running)
        return ended


def _told(logits: torch.Tensor, chosen: torch.Tensor, top: int) -> list[NewToken]:
    """What is told of the tokens chosen [R] from logits [R, V]."""
    of_chosen, total = logits.gather(1, chosen[:, None]), logits.logsumexp(-1, keepdim=True)
    taken = (of_chosen - total)[:, 0]
    tokens, logp = torch.stack([chosen.double(), taken.double()]).tolist()  # one copy; both are exact in float64
    ids = list(map(int, tokens))
    if not top:
        return [NewToken(*one) for one in zip(ids, logp, strict=True)]
    ranks = (1 + (logits > of_chosen).sum(-1)).tolist()
    best = logits.topk(min(top, logits.shape[1]), dim=-1)
    listed = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True)
    likeliest = [tuple(zip(*one, strict=True)) for one in listed]
    return [NewToken(*one) for one in zip(ids, logp, ranks, likeliest, strict=True)]


class _Chooser:
    """Takes a token for each sequence from logits, as its Sampling says."""

    def __init__(self) -> None:
        self._controls: dict[Sampling, tuple[list[Any], list[Any]]] = {}

    def choose(self, logits: torch.Tensor, running: Sequence[_Sequence]) -> torch.Tensor:
        """A token for each sequence from logits [R, V], int64 [R]."""
        chosen = logits.max(-1).indices  # as argmax, in half its time
        alike: dict[Sampling, list[int]] = {}
        for s, sequence in enumerate(running):
            alike.setdefault(replace(sequence.sampling, max_new_tokens=1, stop=(), seed=0), []).append(s)
        for sampling, members in alike.items():
            if sampling == Sampling(max_new_tokens=1):
                continue
            if sampling not in self._controls:
                self._controls[sampling] = _controls(sampling)
            history, warpers = self._controls[sampling]
            (index,) = copied((torch.tensor(members, dtype=torch.int32),), logits.device)
            index = index.long()
            scores = logits[index]
            if history:
                for m, s in enumerate(members):
                    seen = torch.tensor([[*running[s].prompt, *running[s].ids]], device=logits.device)
                    for processor in history:
                        scores[m : m + 1] = processor(seen, scores[m : m + 1])
            for warper in warpers:
                scores = warper(None, scores)
            if not sampling.temperature:
                chosen[index] = scores.argmax(-1)
                continue
            below = scores.double().softmax(-1).cumsum(-1)
            (drawn,) = copied((torch.tensor([running[s].random.random() for s in members]),), logits.device)
            chosen[index] = torch.searchsorted(below, drawn[:, None].double() * below[:, -1:], right=True)[:, 0]
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
