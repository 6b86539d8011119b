"""Generate replies to prompts: what is stored already is not generated again, and a price bounds what is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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
    """A worker that replies to lists of requests."""

    generator: TextGenerator

    def __call__(self, requests: Sequence[Request]) -> list[tuple[int, dict[str, Any]]]:
        """(index, fields of the reply) of each reply."""
        return [(i, asdict(reply)) for i, reply in self.generator.replies(requests)]


@dataclass(frozen=True)
class ReplyingElsewhere:
    """Makes a Replying in another process, with the model that load_same() gives there."""

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
        return Replying(LocalGenerator(model, self.is_chat, template_options=options, template_date=date))


class AugmentationRun:
    """Prompts, their sampling, the generator of their replies and where replies are stored.

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
        self.prompting, self.generator, self.folder = prompting, generator, folder
        self.requests: list[Request] = [
            (prompt, replace(sampling, seed=sampling.seed + prompt.sample * SAMPLES_APART)) for prompt in prompts
        ]
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

    def missing(self) -> list[tuple[str, Request]]:
        """(key, request) of the replies that are not stored."""
        keyed = ((reply_key(*request), request) for request in self.requests)
        return [(key, request) for key, request in keyed if not self._has(key)]

    def _has(self, key: str) -> bool:
        """Whether a reply is stored; an empty one counts only where it would be generated alike again."""
        reply = self.store.replies.get(key)
        return reply is not None and (self.generator.prompts_per_call is not None or bool(reply.text.strip()))

    def estimate(self, price: Price, limit: int | None = None) -> Estimate:
        """What collect() would generate at most; seconds at the rate of the replies stored here."""
        requests = [request for _, request in self.missing()[:limit]]
        prompt_tokens = sum(self.generator.prompt_tokens(prompt.text) for prompt, _ in requests)
        completion_tokens = sum(sampling.max_new_tokens for _, sampling in requests)
        times = [reply.time for reply in self.store.replies.values()]
        elapsed_s = max(times, default=0) - min(times, default=0)
        return Estimate(
            stored=len(self.store.replies),
            replies=len(requests),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            usd=price.of(prompt_tokens, completion_tokens),
            seconds=elapsed_s / (len(times) - 1) * len(requests) if elapsed_s else None,
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
        price, missing = price or Price(), self.missing()[:limit]
        with Activity("augmenting", total=len(missing), unit="reply", shown=progress) as bar:
            while missing:
                spent = sum(price.of(r.prompt_tokens, r.completion_tokens) for r in self.store.replies.values())
                count = 0
                for _, (prompt, sampling) in missing:
                    spent += price.of(self.generator.prompt_tokens(prompt.text), sampling.max_new_tokens)
                    if max_usd is not None and spent > max_usd:
                        break
                    count += 1
                affordable, missing = missing[:count], missing[count:]
                if not affordable:
                    return
                for call in self._calls(affordable):
                    for i, reply in self.generator.replies([request for _, request in call]):
                        key, (_, sampling) = call[i]
                        if not self._has(key):
                            self.store.append(StoredReply(key, seed=sampling.seed, time=time.time(), **asdict(reply)))
                            bar.update()

    def collect_by(self, executor: Executor, start: Callable[[], Worker]) -> bool:
        """Generate all missing replies in an executor's workers, in the same calls as collect() makes.

        Args:
            executor: runs the calls.
            start: makes a Replying with this run's generator.

        Returns:
            Whether this process is the one that continues, with all replies.
        """
        size = self.generator.prompts_per_call or 1
        jobs, done = [], set()
        for first in range(0, len(self.requests), size):
            requests = self.requests[first : first + size]
            keys = [reply_key(*request) for request in requests]
            jobs.append(Job(digest(keys), requests, len(requests), str(first)))
            if all(key in self.store.replies for key in keys):
                done.add(jobs[-1].name)
        for job, replies in executor.run(start, jobs, done):
            for i, reply in replies:
                prompt, sampling = job.work[i]
                if (key := reply_key(prompt, sampling)) not in self.store.replies:
                    self.store.append(StoredReply(key, seed=sampling.seed, time=time.time(), **reply))
        if not executor.is_last():
            return False
        self.store = Store(self.folder, self.identity)
        return True

    def _calls(self, missing: list[tuple[str, Request]]) -> Iterator[list[tuple[str, Request]]]:
        """The missing requests in calls of the generator.

        Where a reply's rounding depends on the call, a call holds its stored requests too.
        """
        size = self.generator.prompts_per_call
        if size is None:
            yield missing
            return
        wanted = {key for key, _ in missing}
        keyed = [(reply_key(*request), request) for request in self.requests]
        for first in range(0, len(keyed), size):
            call = keyed[first : first + size]
            if any(key in wanted for key, _ in call):
                yield [(key, request) for key, request in call if key in wanted or key in self.store.replies]

    def read(self) -> Augmented:
        """The rows of the stored replies, in the order of the prompts; prompts without a reply are counted."""
        rows: list[Augmentation] = []
        dropped = {"unanswered": 0, "unparsed": 0, "repeats": 0}
        described = {name: value for name, value in self.identity.items() if name != "template"}
        in_form = productive = 0
        for prompt, sampling in self.requests:
            reply = self.store.replies.get(reply_key(prompt, sampling))
            if reply is None:
                dropped["unanswered"] += 1
                continue
            text = answer_in(reply.text)
            if reply.is_cut and self.prompting.strategy.is_lines:
                text = text.rpartition("\n")[0]
                dropped["cut_off"] = dropped.get("cut_off", 0) + 1
            if not text.strip():
                dropped["unanswered"] += not reply.is_cut
                continue
            parsed = self.prompting.strategy.read(prompt.source, completed(prompt.begun, text))
            in_form += bool(parsed.statements or parsed.repeats)
            dropped["unparsed"] += parsed.unparsed
            dropped["repeats"] += parsed.repeats
            statements = parsed.statements
            fresh = [(kind, text) for kind, text in statements if prompt.copied.isdisjoint(words_of(text))]
            ended = [(kind, text) for kind, text in fresh if not is_looping(text)]
            for step, before, after in (("copied_from_example", statements, fresh), ("looping", fresh, ended)):
                if len(after) < len(before):
                    dropped[step] = dropped.get(step, 0) + len(before) - len(after)
            statements = ended
            productive += bool(statements)
            facts = {name: value for name, value in asdict(reply).items() if name not in ("text", "is_cut")}
            origin = described | facts | {"source_ids": list(prompt.source_ids)}
            rows += (Augmentation(prompt.source_ids[0], kind, text, origin) for kind, text in statements)
        return Augmented(tuple(rows), dropped, len(self.requests), in_form, productive)


def reply_key(prompt: Prompt, sampling: Sampling) -> str:
    """What a reply is stored under, beside what its Store stands for."""
    asked = prompt.text + (f"\n{prompt.begun}" if prompt.begun else "")
    return sha256(f"{sampling.seed}\n{prompt.sample}\n{prompt.id}\n{asked}".encode()).hexdigest()
