"""The server's scheduler: one thread owns the model, and scores what arrived while it worked as one prefix tree.

Contexts stay prefilled: one that a request declares, a prefix that prompts of earlier batches shared, or a prompt that
was continued. Knows no HTTP.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextError, ContextStore
from icl_ft_fast.engine.forward import footprint_of
from icl_ft_fast.engine.generate import NewToken, Reuse, Sampling, iter_generations
from icl_ft_fast.engine.kv_cache import Context, ContextCache, common_tokens
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import (
    ScoreError,
    ScoringOptions,
    check_fit,
    iter_loglikelihood,
    iter_token_logprobs,
    prefill,
)
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.slots import SavedSlots
from icl_ft_fast.integrations.shared_prefixes import WORTH_TOKENS

REMEMBERED = 1024  # prefixes of WORTH_TOKENS tokens whose last prompt is remembered
BATCH_CHARACTERS = 16_000_000  # of all choices with what comes before each; bounds the memory that encoding takes

_log = logging.getLogger(__name__)

Pair: TypeAlias = tuple[list[int], list[int]]
Result = TypeVar("Result")


class SchedulerBusyError(RuntimeError):
    """Too many requests are waiting."""


class SchedulerClosedError(RuntimeError):
    """The scheduler is shutting down."""


class Choices(NamedTuple):
    """Asks for a LogLikelihood of each choice after context + prompt."""

    context: str
    prompt: str
    choices: Sequence[str]


class Sequences(NamedTuple):
    """Asks for the TokenLogprobs of each pair's continuation, with the `top` likeliest tokens at each place.

    With `with_after`, also for the likeliest tokens behind each pair, whose continuation may then be empty.
    """

    pairs: Sequence[Pair]
    top: int
    with_after: bool = False


class Prompts(NamedTuple):
    """Asks for a Generation after each prompt, under a sampling each.

    Attributes:
        prompts: token ids.
        samplings: one a prompt.
        on_token: called in the scheduler's thread with (index of the prompt, token), once for each token; where it
            returns False, that continuation ends.
        top: how many of the likeliest tokens come with each, at least.
        declared: leading tokens of every prompt that later prompts will begin with, such as a chat's earlier turns.
    """

    prompts: Sequence[list[int]]
    samplings: Sequence[Sampling]
    on_token: Callable[[int, NewToken], bool] | None = None
    top: int = 0
    declared: int = 0


@dataclass
class RequestResult:
    """What a request's future holds.

    Attributes:
        results: one a choice, pair or prompt, in the order asked.
        num_tokens: tokens of each (context, continuation).
        cached_tokens: tokens that came from cached contexts; what choices share counts once.
    """

    results: list[Any]
    num_tokens: list[tuple[int, int]]
    cached_tokens: int = 0


@dataclass(eq=False)
class _PendingRequest:
    """A request, its sequences as token ids, and the future of its result."""

    asked: Choices | Sequences | Prompts
    characters: int
    future: Future[RequestResult] = field(default_factory=Future)
    pairs: list[Pair] = field(default_factory=list)
    result: RequestResult = field(default_factory=lambda: RequestResult([], []))
    waiting: int = 0
    told: dict[int, list[int]] = field(default_factory=dict)  # by place, the tokens that the client has
    retold: dict[int, int] = field(default_factory=dict)  # how many of them this attempt has come to

    def take(self, pairs: Sequence[Pair]) -> None:
        self.pairs, self.waiting, self.retold = list(pairs), len(pairs), {}
        self.result = RequestResult([None] * len(pairs), [(len(context), len(rest)) for context, rest in pairs])

    def tell(self, r: int, new: NewToken) -> bool:
        """Pass a token on, unless an attempt that failed did so before; whether the continuation goes on."""
        assert isinstance(self.asked, Prompts)
        told, place = self.told.setdefault(r, []), self.retold.get(r, 0)
        self.retold[r] = place + 1
        if place < len(told):
            if told[place] != new.id:
                raise RuntimeError("a second attempt at a batch that failed wrote other tokens than the first")
            return True
        told.append(new.id)
        return self.asked.on_token is None or self.asked.on_token(r, new)

    def done(self, r: int, result: Any) -> None:
        self.result.results[r] = result
        self.waiting -= 1
        if not self.waiting:
            self.future.set_result(self.result)


@dataclass(frozen=True)
class _Unit:
    """Sequences of a request that share a prefix: the choices of a question, or one sequence."""

    request: _PendingRequest
    members: range
    token: NDArray[np.int32]
    kind: str  # only units of one kind can be run together


class Scheduler:
    """Serves requests in batches, in a thread of its own, from its construction until close().

    Args:
        model: used by no other thread meanwhile.
        context_bytes: memory of the cached contexts; one more may be in use beyond it. 0 caches none.
        max_waiting: requests that may wait.
        store: prefix caches on disk: contexts are read from it, or saved there.
        merge: whether waiting requests are scored as one batch; False is for comparison.
        chunk_tokens: tokens per forward; None for what suits the model's device.

    `ledger` counts everything.
    """

    def __init__(
        self,
        model: Model,
        *,
        context_bytes: int,
        max_waiting: int = 256,
        store: ContextStore | None = None,
        merge: bool = True,
        chunk_tokens: int | None = None,
    ) -> None:
        self.model, self.max_waiting, self.merge, self.chunk_tokens = model, max_waiting, merge, chunk_tokens
        self.ledger, self.contexts = Ledger(), ContextCache(context_bytes)
        self.store = store
        self._slots = None if store is None else SavedSlots(store)
        self._too_long = math.inf  # tokens of the shortest context that went over the budget by itself
        self._seen: OrderedDict[bytes, NDArray[np.int32]] = OrderedDict()
        self._of_prompts = weakref.WeakSet[Context]()  # kept after a prompt was continued
        self._saved: deque[NDArray[np.int32]] = deque(maxlen=REMEMBERED)  # what prompts begin with that the store has
        self._counted: set[Context | None] = set()  # contexts whose tokens the ledger has, and that no run began from
        self._declared = functools.lru_cache(64)(self._encode_context)
        self._queue: deque[_PendingRequest] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, asked: Choices | Sequences | Prompts) -> Future[RequestResult]:
        """Ask; a future that is cancelled before its batch begins costs nothing.

        Raises:
            SchedulerBusyError, SchedulerClosedError: the question is not taken.
            ScoreError: its text is too long, or empty where the tokenizer has no token to stand for that.

        The future raises ScoreError for what only the tokens tell.
        """
        characters = 0
        if isinstance(asked, Choices):
            before = asked.context + asked.prompt
            characters = sum(len(before) + len(choice) for choice in asked.choices)
            if characters > BATCH_CHARACTERS:
                raise ScoreError(
                    f"choices: {characters:,} characters, counting context and prompt with each choice; "
                    f"{BATCH_CHARACTERS:,} are taken"
                )
            if not before.strip():
                try:
                    encoding.prefix_token_id(self.model.tokenizer)
                except ValueError as error:
                    raise ScoreError(f"prompt: {error}") from error
        request = _PendingRequest(asked, characters)
        with self._changed:
            if self._closed:
                raise SchedulerClosedError("the server is shutting down")
            if len(self._queue) >= self.max_waiting:
                raise SchedulerBusyError(f"{self.max_waiting} requests are waiting already; try again later")
            self._queue.append(request)
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Finish the batch at work, refuse what waits, and end the thread."""
        with self._changed:
            self._closed = True
            refused = list(self._queue)
            self._queue.clear()
            self._changed.notify()
        for request in refused:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(SchedulerClosedError("the server is shutting down"))
        self._thread.join()

    def _work(self) -> None:
        while pending := self._take():
            self._attempt([request for request in pending if request.future.set_running_or_notify_cancel()])
            self.contexts.trim()

    def _attempt(self, pending: list[_PendingRequest]) -> None:
        """Serve a batch; if it fails, each of its requests by itself, so that only the failing one gets the error."""
        try:
            self._run(pending)
        except Exception as error:  # from torch or the tokenizer, of any kind; the thread goes on
            left = [request for request in pending if not request.future.done()]
            if len(pending) == 1:
                for request in left:
                    request.future.set_exception(error)
            else:
                for request in left:
                    self._attempt([request])

    def _take(self) -> list[_PendingRequest]:
        """The next batch: what waits, up to a size; none once closed."""
        batch: list[_PendingRequest] = []
        size = 0
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            while self._queue and (not batch or (self.merge and size + self._queue[0].characters <= BATCH_CHARACTERS)):
                batch.append(self._queue.popleft())
                size += batch[-1].characters
        return batch

    def _run(self, pending: list[_PendingRequest]) -> None:
        units = [unit for request in self._encode(pending) for unit in _units(request)]
        units.sort(key=lambda unit: (unit.kind, unit.token.byteswap().tobytes()))  # what begins alike is together
        for (start, _), group in itertools.groupby(units, lambda unit: (self._start(unit), unit.kind)):
            members = [(unit.request, r) for unit in group for r in unit.members]
            for i, result in self._results(members, start):
                request, r = members[i]
                request.done(r, result)
        before = None
        for unit in units:
            again = before and before.request is unit.request and np.array_equal(before.token, unit.token)  # n above 1
            if isinstance(unit.request.asked, Prompts) and not again:
                self._save_beginning(unit.token, unit.request.asked.declared)
            before = unit
            prefix = unit.token[:WORTH_TOKENS].tobytes()
            self._seen[prefix] = unit.token
            self._seen.move_to_end(prefix)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def _results(self, members: list[tuple[_PendingRequest, int]], start: Context | None) -> Iterator[tuple[int, Any]]:
        """Yield (place among members, result) of sequences of one kind that begin with `start`."""
        model, ledger, count_start = self.model, self.ledger, start not in self._counted
        self._counted.discard(start)
        asked, pairs = members[0][0].asked, [request.pairs[r] for request, r in members]
        if isinstance(asked, Choices):
            return iter_loglikelihood(
                model, pairs, chunk_tokens=self.chunk_tokens, ledger=ledger, start=start, count_start=count_start
            )
        if isinstance(asked, Sequences):
            options = ScoringOptions(self.chunk_tokens)
            return iter_token_logprobs(
                model,
                pairs,
                top=asked.top,
                with_after=asked.with_after,
                options=options,
                ledger=ledger,
                start=start,
                count_start=count_start,
            )
        of_prompts: list[tuple[Prompts, int]] = [(request.asked, r) for request, r in members]  # type: ignore[misc]

        def on_token(i: int, new: NewToken) -> bool:
            request, r = members[i]
            return request.tell(r, new)

        samplings, top = [asked.samplings[r] for asked, r in of_prompts], max(asked.top for asked, _ in of_prompts)
        prompts, reuse = [prompt for prompt, _ in pairs], self._reuse(members, top, start)
        return iter_generations(model, prompts, samplings, on_token=on_token, ledger=ledger, reuse=reuse)

    def _encode(self, pending: list[_PendingRequest]) -> list[_PendingRequest]:
        """The requests that can be served, with their token ids; the others get their error."""
        choices = [request.asked for request in pending if isinstance(request.asked, Choices)]
        texts = [(asked.context + asked.prompt, choice) for asked in choices for choice in asked.choices]
        encoded = iter(encoding.encode_pairs(self.model.tokenizer, texts))
        valid = []
        for request in pending:
            if isinstance(request.asked, Choices):
                request.take([next(encoded) for _ in request.asked.choices])
            elif isinstance(request.asked, Sequences):
                request.take(request.asked.pairs)
            else:
                request.take([(prompt, []) for prompt in request.asked.prompts])
            try:
                self._check(request)
                valid.append(request)
            except ScoreError as error:
                request.future.set_exception(error)
        return valid

    def _check(self, request: _PendingRequest) -> None:
        """Raise ScoreError unless the model can serve the request."""
        what = "choices" if isinstance(request.asked, Choices) else "prompt"
        asked, pairs, names = request.asked, request.pairs, [f"{what}[{r}]" for r in range(len(request.pairs))]
        may_be_empty = isinstance(asked, Prompts) or (isinstance(asked, Sequences) and asked.with_after)
        for (context, continuation), name in zip(pairs, names, strict=True):
            if not context:
                raise ScoreError(f"{name}: no token")
            if not continuation and not may_be_empty:
                raise ScoreError(
                    f"{name}: no token of its own: empty, or merged into the end of the prompt by the tokenizer"
                )
        check_fit(self.model, pairs, names, whole=may_be_empty)
        for (context, _), name, sampling in zip(pairs, names, getattr(asked, "samplings", ()), strict=False):
            over = len(context) + sampling.max_new_tokens - 1 - self.model.max_positions
            if over > 0:
                raise ScoreError(
                    f"{name}: {len(context)} tokens and {sampling.max_new_tokens} new ones are {over} tokens over the "
                    f"model's {self.model.max_positions} positions"
                )

    def _encode_context(self, text: str) -> NDArray[np.int32]:
        return np.asarray(encoding.encode(self.model.tokenizer, [text])[0], np.int32)

    def _start(self, unit: _Unit) -> Context | None:
        """The longest context that the unit begins with, prefilled now where it is new and worth it."""
        asked = unit.request.asked
        if isinstance(asked, Prompts):
            return self._slots_before(unit.token[:-1])  # a run of their own: others may begin with their key's tokens
        if (slots := self._slots_before(unit.token)) is not None:
            unit.request.result.cached_tokens += len(slots.token)
            return slots
        if not self.contexts.max_bytes:
            return None
        start = self.contexts.find(unit.token)
        found = len(start.token) if start else 0
        unit.request.result.cached_tokens += found
        known = [self._seen.get(unit.token[:WORTH_TOKENS].tobytes())]
        known.append(self._declared(asked.context) if isinstance(asked, Choices) and asked.context else None)
        shared = max((common_tokens(token, unit.token) for token in known if token is not None), default=0)
        if shared - found >= WORTH_TOKENS and shared < self._too_long:
            forwarded = self.ledger.forwarded_tokens
            start = self._prefilled(unit.token[:shared])
            if self.ledger.forwarded_tokens == forwarded:
                unit.request.result.cached_tokens += shared - found
            if start.nbytes > self.contexts.max_bytes:
                self._too_long = shared
            self.contexts.add(start)
        return start

    def _slots_before(self, token: NDArray[np.int32]) -> Context | None:
        """The slots of the store whose key the tokens begin with, whatever their number."""
        slots = self._slots
        return None if slots is None else self._in_store(lambda _: slots.before(token))

    def _reuse(self, members: list[tuple[_PendingRequest, int]], top: int, slots: Context | None) -> Reuse:
        """The contexts that prompts, ascending by tokens, begin from, and those of them that are kept.

        All begin from `slots` where there are some, and none is kept: what stands behind slots is no text's.
        """
        starts: dict[int, Context] = {}
        keep: dict[int, int] = {}
        kept, new_bytes = np.empty(0, np.int32), 0  # the last prompt to be kept, and the memory of all of them
        counted = set()
        row_bytes = footprint_of(self.model).kv_row_bytes + 4 * self.model.head.weight.shape[1]
        for i, (request, r) in enumerate(members):
            token = np.asarray(request.pairs[r][0], np.int32)
            if slots is None and (not self.contexts.max_bytes or len(token) <= WORTH_TOKENS):
                continue
            start, known = self._nearest(token[:-1]) if slots is None else (slots, len(slots.token))
            if start is not None:
                starts[i] = start
            if (request, token.tobytes()) not in counted:  # a prompt that a request repeats is forwarded once
                counted.add((request, token.tobytes()))
                request.result.cached_tokens += known
            more = len(token) * row_bytes
            is_worth = len(token) - max(known, common_tokens(kept, token)) >= WORTH_TOKENS
            if slots is None and is_worth and new_bytes + more <= self.contexts.max_bytes:
                keep[i], kept, new_bytes = len(token), token, new_bytes + more

        def on_context(i: int, context: Context) -> None:
            near = starts.get(i)
            was_whole = near is not None and common_tokens(near.token, context.token) == len(near.token)
            if near is not None and was_whole and near in self._of_prompts:
                self.contexts.remove(near)  # the turn before of the same conversation
            self._of_prompts.add(context)
            self.contexts.add(context)

        return Reuse(starts, keep, on_context, top)

    def _nearest(self, token: NDArray[np.int32]) -> tuple[Context | None, int]:
        """The kept context that shares most of its beginning with a prompt, and how much; not less than is worth it."""
        near = self.contexts.find(token, whole=False)
        known = common_tokens(near.token, token) if near else 0
        if token[:WORTH_TOKENS].tobytes() not in self._seen:  # else what is saved was found before, or saved here
            saved = self._in_store(lambda store: store.find(token.tolist(), like=self._like(token)))
            if saved is not None and len(saved.token) >= known + WORTH_TOKENS:
                near, known = saved, len(saved.token)
                self._saved.append(saved.token)
                self.contexts.add(saved)
        if near is None or known < WORTH_TOKENS:
            return None, 0
        self.contexts.use(near)
        return near, known

    def _save_beginning(self, token: NDArray[np.int32], declared: int) -> None:
        """Save what a prompt begins with and later ones will or do, unless half of that is saved already."""
        if self.store is None or not self.contexts.max_bytes:
            return
        before = self._seen.get(token[:WORTH_TOKENS].tobytes())
        shared = max(declared, 0 if before is None else common_tokens(before, token[:-1]))
        least = max([WORTH_TOKENS, *(2 * len(s) for s in self._saved if common_tokens(s, token) == len(s))])
        near = self.contexts.find(token, whole=False)
        shared = min(shared, common_tokens(near.token, token) if near else 0)
        if near is not None and shared >= least:
            self._saved.append(token[:shared])
            self._in_store(lambda store: store.add(near.prefix(shared)))

    def _like(self, token: NDArray[np.int32]) -> Context:
        return prefill(self.model, token[:1].tolist())

    def _prefilled(self, token: NDArray[np.int32]) -> Context:
        """The context of these tokens: mapped from the store, or forwarded and, if there is a store, saved there."""
        ids = token.tolist()
        saved = self._in_store(lambda store: store.find(ids, like=self._like(token)))
        if saved is not None and len(saved.token) == len(ids):
            return saved
        near = saved or self.contexts.find(token, whole=False)
        made = prefill(self.model, ids, reuse_from=near, chunk_tokens=self.chunk_tokens, ledger=self.ledger)
        self._counted.add(made)
        self._in_store(lambda store: store.add(made))
        return made

    def _in_store(self, use: Callable[[ContextStore], Result | None]) -> Result | None:
        """What the store gives; a damaged file or a full disk is logged, and no reason to refuse a client."""
        try:
            return None if self.store is None else use(self.store)
        except (ContextError, OSError) as error:
            _log.error("the store of contexts could not be used: %s", error)
            return None


def _units(request: _PendingRequest) -> list[_Unit]:
    if isinstance(request.asked, Choices):
        return [_Unit(request, range(len(request.pairs)), np.asarray(request.pairs[0][0], np.int32), "choices")]
    kind = "prompts" if isinstance(request.asked, Prompts) else repr(request.asked[1:])
    return [
        _Unit(request, range(r, r + 1), np.asarray(a + b, np.int32), kind) for r, (a, b) in enumerate(request.pairs)
    ]
