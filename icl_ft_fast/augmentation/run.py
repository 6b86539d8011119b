"""Generate replies to prompts: what is stored already is not generated again, and a price bounds what is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from icl_ft_fast.augmentation.generators import LocalGenerator, TextGenerator
from icl_ft_fast.augmentation.prompts import Prompt, Prompting, completed
from icl_ft_fast.augmentation.store import Store, StoredReply
from icl_ft_fast.augmentation.strategy import Augmentation, Augmented, is_looping
from icl_ft_fast.engine.generate import Sampling
from icl_ft_fast.engine.loading import load_same
from icl_ft_fast.runtime.durable import digest
from icl_ft_fast.runtime.executors import Executor, Job, Worker
from icl_ft_fast.runtime.progress import Activity
from icl_ft_fast.runtime.reasoning import answer_in
from icl_ft_fast.tasks.sentences import words_of

Request: TypeAlias = tuple[Prompt, Sampling]

LOOPING_SHARE = 0.2  # of the words of a whole text, which may come back to a few of them
SAMPLES_APART = 1_000_003  # seeds between the samples of a prompt, so that neighbouring seeds of a study share no draw


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    prompt_usd: float = 0.0
    completion_usd: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars."""
        return (prompt_tokens * self.prompt_usd + completion_tokens * self.completion_usd) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What is still to be generated.

    Attributes:
        stored: replies that are stored.
        replies: replies to generate.
        prompt_tokens: of their prompts.
        completion_tokens: of these replies, at most.
        usd: their price in US dollars, at most.
        seconds: their time, at most; None where no rate is known.
    """

    stored: int
    replies: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    seconds: float | None


@dataclass(frozen=True)
class Replying:
    """A worker that replies to the prompts of one call, and to those that follow from its replies."""

    generator: TextGenerator
    prompting: Prompting
    sampling: Sampling

    def __call__(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """The fields of each StoredReply."""
        run = AugmentationRun(self.prompting, prompts, self.generator, self.sampling)
        run.collect()
        return [asdict(reply) for reply in run.store.replies.values()]


@dataclass(frozen=True)
class ReplyingElsewhere:
    """Makes a Replying in another process, with the model that load_same() gives there."""

    prompting: Prompting
    sampling: Sampling
    name: str
    loading: dict[str, Any]
    fingerprint: str
    is_chat: bool
    template_options: dict[str, Any] = field(default_factory=dict)
    template_date: str | None = None

    def __call__(self) -> Replying:
        """Load, check, make."""
        model = load_same(self.name, self.loading, self.fingerprint)
        options, date = self.template_options, self.template_date
        generator = LocalGenerator(model, self.is_chat, template_options=options, template_date=date)
        return Replying(generator, self.prompting, self.sampling)


class AugmentationRun:
    """Prompts, their sampling, the generator of their replies and where replies are stored.

    Where a strategy asks on after a reply (Strategy.follow), those prompts are the run's too, round after round.

    Args:
        prompting: the strategy and its template.
        prompts: from prompts().
        generator: see generators.
        sampling: of each reply; that of sample n has the seed sampling.seed + n * SAMPLES_APART.
        folder: where replies are stored; None for in memory only.
    """

    def __init__(
        self,
        prompting: Prompting,
        prompts: Sequence[Prompt],
        generator: TextGenerator,
        sampling: Sampling,
        folder: Path | None = None,
    ) -> None:
        self.prompting, self.generator, self.sampling, self.folder = prompting, generator, sampling, folder
        self.requests: list[Request] = [self._request(prompt) for prompt in prompts]
        how = {name: value for name, value in asdict(sampling).items() if name != "seed"}
        self.identity = {
            "strategy": prompting.strategy.name,
            "template_sha256": prompting.digest,
            "template": prompting.source,
            "generator": generator.fingerprint,
            "sampling": how,
        }
        if date := generator.date if isinstance(generator, LocalGenerator) else None:
            self.identity["template_date"] = date
        self.store = Store(folder, self.identity)

    def _request(self, prompt: Prompt) -> Request:
        return prompt, replace(self.sampling, seed=self.sampling.seed + prompt.sample * SAMPLES_APART)

    def _followed(self, request: Request) -> list[Request]:
        """What is asked after the stored reply to a request; nothing where there is none."""
        reply = self.store.replies.get(reply_key(*request))
        if reply is None or not self.prompting.strategy.follow_ups:
            return []
        text = answer_in(reply.text)
        return [self._request(prompt) for prompt in self.prompting.follow_ups(request[0], text, is_cut=reply.is_cut)]

    def _all(self, requests: Sequence[Request]) -> Iterator[Request]:
        """The requests, each before those that follow from its stored reply."""
        for request in requests:
            yield request
            yield from self._all(self._followed(request))

    def _rounds(self) -> Iterator[list[Request]]:
        """What is asked, round by round; a round is known once the one before has its replies.

        The calls of a generator whose replies depend on what is beside them are cut first, and each has rounds of its
        own, which begin when its last round is whole: its calls are then the same ones however it was interrupted.
        """
        size = self.generator.prompts_per_call
        for first in range(0, len(self.requests), size or max(1, len(self.requests))):
            asked = self.requests[first : first + size] if size else self.requests
            while asked:
                for start in range(0, len(asked), size or len(asked)):
                    yield asked[start : start + size] if size else asked
                if size and not all(self._has(reply_key(*request)) for request in asked):
                    break
                asked = [follow for request in asked for follow in self._followed(request)]

    def known(self) -> Iterator[Request]:
        """All requests, those that follow from stored replies behind these."""
        return self._all(self.requests)

    def missing(self) -> list[tuple[str, Request]]:
        """(key, request) of the replies that are not stored, as far as it is known what will be asked."""
        keyed = ((reply_key(*request), request) for request in self._all(self.requests))
        return [(key, request) for key, request in keyed if not self._has(key)]

    def _has(self, key: str) -> bool:
        """Whether a reply is stored; an empty one counts only where it would be generated alike again."""
        reply = self.store.replies.get(key)
        return reply is not None and (self.generator.prompts_per_call is not None or bool(reply.text.strip()))

    def estimate(self, price: Price, limit: int | None = None) -> Estimate:
        """What collect() would generate at most; seconds at the rate of the replies stored here.

        Prompts that will follow from replies are taken for as many as there can be, as long as the known ones.
        """
        known = [request for _, request in self.missing()]
        most = len(self.requests) * (1 + self.prompting.strategy.follow_ups)
        unknown = most - sum(1 for _ in self._all(self.requests)) if known else 0
        count = min(len(known) + unknown, limit or len(known) + unknown)
        lengths = [self.generator.prompt_tokens(prompt.text) for prompt, _ in known[:count]]
        prompt_tokens = round(sum(lengths) / max(1, len(lengths)) * count)
        completion_tokens = count * self.sampling.max_new_tokens
        times = [reply.time for reply in self.store.replies.values()]
        elapsed_s = max(times, default=0) - min(times, default=0)
        return Estimate(
            stored=len(self.store.replies),
            replies=count,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            usd=price.of(prompt_tokens, completion_tokens),
            seconds=elapsed_s / (len(times) - 1) * count if elapsed_s else None,
        )

    def collect(
        self,
        *,
        price: Price | None = None,
        limit: int | None = None,
        max_usd: float | None = None,
        progress: bool = False,
    ) -> None:
        """Generate the replies that are missing, each stored as it comes.

        Args:
            price: of the tokens.
            limit: the most replies to generate.
            max_usd: limit of the price of all stored replies together: a request is made only if its prompt and its
                longest reply fit what is left.
            progress: show a bar of replies.

        Raises:
            AugmentError, GenerateError: what the generator raises; what came before is stored.
        """
        price, most = price or Price(), len(self.store.replies) + (limit or sys.maxsize)
        total = None if self.prompting.strategy.follow_ups else len(self.missing())
        with Activity("augmenting", total=total, unit="reply", shown=progress) as bar:
            for asked in self._rounds():
                keyed = [(reply_key(*request), request) for request in asked]
                missing = [(key, request) for key, request in keyed if not self._has(key)]
                missing = missing[: max(0, most - len(self.store.replies))]
                while missing:
                    count = len(missing) if max_usd is None else self._affordable(missing, price, max_usd)
                    affordable, missing = missing[:count], missing[count:]
                    if not affordable:
                        return
                    for _ in self._store(keyed, {key for key, _ in affordable}):
                        bar.update()

    def collect_by(self, executor: Executor, start: Callable[[], Worker]) -> bool:
        """Generate all missing replies in an executor's workers, in the same calls as collect() makes.

        Args:
            executor: runs the calls.
            start: makes a Replying with what this run has.

        Returns:
            Whether this process is the one that continues, with all replies.
        """
        size = self.generator.prompts_per_call or 1
        jobs, done = [], set()
        for first in range(0, len(self.requests), size):
            requests = self.requests[first : first + size]
            keys = [reply_key(*request) for request in requests]
            jobs.append(Job(digest(keys), [prompt for prompt, _ in requests], len(requests), str(first)))
            if all(reply_key(*request) in self.store.replies for request in self._all(requests)):
                done.add(jobs[-1].name)
        for _, replies in executor.run(start, jobs, done):
            for reply in replies:
                if reply["key"] not in self.store.replies:
                    self.store.append(StoredReply(**reply))
        if not executor.is_last():
            return False
        self.store = Store(self.folder, self.identity)
        return True

    def _affordable(self, missing: Sequence[tuple[str, Request]], price: Price, max_usd: float) -> int:
        """How many of the missing replies fit what is left of the money, each at its longest."""
        spent = sum(price.of(r.prompt_tokens, r.completion_tokens) for r in self.store.replies.values())
        for count, (_, (prompt, sampling)) in enumerate(missing):
            spent += price.of(self.generator.prompt_tokens(prompt.text), sampling.max_new_tokens)
            if spent > max_usd:
                return count
        return len(missing)

    def _store(self, asked: Sequence[tuple[str, Request]], wanted: Collection[str]) -> Iterator[StoredReply]:
        """Generate the wanted replies of a call, and yield each once it is stored.

        Where a reply's rounding depends on the call, those that are stored are generated beside them again.
        """
        beside = self.store.replies if self.generator.prompts_per_call is not None else ()
        call = [(key, request) for key, request in asked if key in wanted or key in beside]
        for i, reply in self.generator.replies([request for _, request in call]):
            key, (_, sampling) = call[i]
            if not self._has(key):
                stored = StoredReply(key, seed=sampling.seed, time=time.time(), **asdict(reply))
                self.store.append(stored)
                yield stored

    def read(self) -> Augmented:
        """The rows of the stored replies, in the order of the prompts; prompts without a reply are counted."""
        rows: list[Augmentation] = []
        dropped = {"unanswered": 0, "unparsed": 0, "repeats": 0}
        described = {name: value for name, value in self.identity.items() if name != "template"}
        in_form = productive = num_prompts = 0
        earlier: dict[str, set[str]] = {}  # what a document's earlier rounds wrote
        for request in self._all(self.requests):
            prompt, sampling = request
            num_prompts += 1
            reply = self.store.replies.get(reply_key(prompt, sampling))
            if reply is None:
                dropped["unanswered"] += 1
                continue
            text = answer_in(reply.text)
            strategy = self.prompting.strategy
            if reply.is_cut and (strategy.is_lines or prompt.unit.kind):
                dropped["cut_off"] = dropped.get("cut_off", 0) + 1
            if not text.strip():
                dropped["unanswered"] += not reply.is_cut
                continue
            parsed = strategy.parse(prompt.unit, completed(prompt.begun, text), is_cut=reply.is_cut)
            in_form += bool(parsed.statements or parsed.repeats)
            dropped["unparsed"] += parsed.unparsed
            dropped["repeats"] += parsed.repeats
            statements = parsed.statements
            fresh = [(kind, text) for kind, text in statements if prompt.copied.isdisjoint(words_of(text))]
            share = LOOPING_SHARE if prompt.unit.kind else 0.0
            ended = [(kind, text) for kind, text in fresh if not is_looping(text, share)]
            for step, before, after in (("copied_from_example", statements, fresh), ("looping", fresh, ended)):
                if len(after) < len(before):
                    dropped[step] = dropped.get(step, 0) + len(before) - len(after)
            statements, follow = ended, bool(self._followed(request))
            if strategy.follow_ups:
                written = earlier.setdefault(prompt.source_ids[0], set())
                dropped["repeats"] += sum(text in written for _, text in statements)
                statements = [(kind, text) for kind, text in statements if text not in written]
                written.update(text for _, text in statements)
            in_form += follow and not parsed.statements and not parsed.repeats
            productive += bool(statements) or follow
            facts = {name: value for name, value in asdict(reply).items() if name not in ("text", "is_cut")}
            origin = described | facts | {"source_ids": list(prompt.source_ids)}
            rows += (Augmentation(prompt.source_ids[0], kind, text, origin) for kind, text in statements)
        return Augmented(tuple(rows), dropped, num_prompts, in_form, productive)


def reply_key(prompt: Prompt, sampling: Sampling) -> str:
    """What a reply is stored under, beside what its Store stands for."""
    asked = prompt.text + (f"\n{prompt.begun}" if prompt.begun else "")
    return sha256(f"{sampling.seed}\n{prompt.sample}\n{prompt.id}\n{asked}".encode()).hexdigest()
