"""What this model takes on this machine, tried for some seconds: reading, answering, writing, a step of training.

Each figure is measured when it is first asked for, on the study's own texts, and may take its part of the time that is
left. Nothing is begun that would take longer by its FLOPs: what could not be tried is taken from FLOPs at the rate of
reading, and `guessed` names it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median
from typing import Any, TypeVar

import numpy as np
import torch

from icl_ft_fast.augmentation.batches import PromptBatch
from icl_ft_fast.augmentation.generators import LocalGenerator, Reply
from icl_ft_fast.augmentation.prompts import Prompt, completed
from icl_ft_fast.augmentation.self_study import Conversation, ConversationBatch
from icl_ft_fast.augmentation.strategy import Strategy
from icl_ft_fast.engine import encoding, trie
from icl_ft_fast.engine.compaction import compacting_flops
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.generate import RUNNING, Reuse, Sampling, iter_generations
from icl_ft_fast.engine.kv_cache import Context, common_tokens
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood, prefill
from icl_ft_fast.engine.model import Model
from icl_ft_fast.finetuning.data import encode
from icl_ft_fast.finetuning.prefix import SlotsRun, read_best, train_slots
from icl_ft_fast.finetuning.run import RunState, prepare, train_step
from icl_ft_fast.finetuning.settings import FinetuneSettings, PrefixSettings, RunOptions
from icl_ft_fast.runtime.reasoning import answer_in
from icl_ft_fast.study.decode_rate import Decoding, DecodingClock
from icl_ft_fast.study.synthetic import token_count
from icl_ft_fast.tasks.task import Question

Found = TypeVar("Found")
Write = Callable[[int, DecodingClock], Iterator[tuple[int, tuple[int, bool]]]]
CALIBRATION_S = 20.0
# Each figure's part of the time that is left when it is asked for.
READING, ANSWERING, TRAINING, WRITING, CONVERSING, PREFIX, PRODUCTS = 0.15, 0.15, 0.35, 0.7, 0.5, 0.7, 0.1
WARM_TOKENS, FIRST_TOKENS = 16, 64  # that are read in any case: once untimed, and once timed
READ_TOKENS = 512  # of a reading that rates are taken from, where there is time for it
ALONE = 8  # questions that are asked one by one
FIRST_PAIRS = 4  # of questions and choices in the first answering that is timed
TEACHING_TOKENS = 64  # before the conversations that a teacher reads
PASSES, SLOT_PASSES = 3, 2  # forwards that a step's matrix products are worth; of a prefix, whose weights are frozen
READ_FIRST = 0.4  # of the time for replies: the most that reading their prompts may take
FEWEST = 4  # replies, where prompts are short enough
WIDE_TOKENS = 4  # of each of many replies at once, which tell what a step of so many rows takes
OWN_TOKENS = 8  # of the model's own text


@dataclass(frozen=True)
class Counted:
    """Tokens that are forwarded once for some requests, and the FLOPs."""

    tokens: int
    flops: int


@dataclass(frozen=True)
class Writing:
    """What a strategy's replies are like, and what they take.

    Attributes:
        prompt_tokens: that a prompt adds to those before it.
        prompt_s: seconds of reading these.
        decoding: replies that were written.
        limit: tokens of a reply at most.
        reply_tokens: of a reply on average.
        flops: of a prompt and its reply.
        row_tokens: of the rows of a reply, all together.
        rows: of a reply.
        follow_ups: prompts that follow a first one.
    """

    prompt_tokens: float
    prompt_s: float
    decoding: Decoding
    limit: int
    reply_tokens: float
    flops: float
    row_tokens: float
    rows: float
    follow_ups: float

    def seconds(self, num_replies: float) -> float:
        """Seconds of so many replies."""
        return num_replies * self.prompt_s + self.decoding.seconds(num_replies, self.limit)


@dataclass
class Calibration:
    """Measurements, made when they are first asked for.

    Attributes:
        model: from load().
        seconds: of all measurements together, about.
        clock: for tests.
        processor: seconds that the calling thread had a core; for tests.
        spent: seconds so far.
        processor_s: of these, those with a core.
        guessed: what was taken from FLOPs, because there was no time to try it.
    """

    model: Model
    seconds: float = CALIBRATION_S
    clock: Callable[[], float] = time.perf_counter
    processor: Callable[[], float] = time.thread_time
    spent: float = 0.0
    processor_s: float = 0.0
    guessed: list[str] = field(default_factory=list)
    _readings: dict[int, float] = field(default_factory=dict)
    _context: Context | None = None  # of the longest reading
    _known: dict[object, Any] = field(default_factory=dict)

    def counted(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Counted:
        """What scoring requests forwards."""
        tree = trie.build_from_lists([(list(before), list(after)) for before, after in requests])
        heads = len(tree.scored_row.unique())
        return Counted(len(tree.token), work_of(self.model).flops(tree.depth, heads))

    # Reading and answering --------------------------------------------------------------------------------------------

    def read_s(self, token: Sequence[int], flops: float | None = None) -> float:
        """Seconds of reading tokens, or of as many FLOPs as are read at that length."""
        path = work_of(self.model).path_flops(max(len(token), 1))
        if len(token):
            rate = self._flop_s()
            for length in (min(READ_TOKENS, len(token)), len(token)):
                has_time = path[length] * rate <= READING * self._left_s()
                if length > 1.5 * max(self._readings) and has_time:
                    self._read(token[:length])
        length = min(self._readings, key=lambda n: abs(n - len(token)), default=0)
        return self._rate_at(length) * float(path[len(token)] if flops is None else flops) if length else 0.0

    def _flop_s(self) -> float:
        """Seconds a FLOP of the longest reading, one of FIRST_TOKENS at least."""
        if not self._readings:
            token = [encoding.prefix_token_id(self.model.tokenizer)] * FIRST_TOKENS
            self._timed(
                lambda: prefill(self.model, token[:WARM_TOKENS])
            )  # a first forward takes longer than later ones
            self._read(token[: self.model.max_positions - 1])
        return self._rate_at(max(self._readings))

    def _read(self, token: Sequence[int]) -> None:
        begun = self.spent
        self._context = self._timed(lambda: prefill(self.model, token))
        self._readings[len(token)] = self.spent - begun

    def _rate_at(self, length: int) -> float:
        return self._readings[length] / float(work_of(self.model).path_flops(length)[length])

    def answer_rate(self, questions: Sequence[Question]) -> float:
        """Seconds a FLOP of questions that are scored together without documents."""

        def measure() -> float:
            first = self._flop_s()
            pairs = [(question.prompt, choice) for question in questions for choice in question.choices]
            count, left, rate = FIRST_PAIRS, ANSWERING * self._left_s(), 0.0
            while True:
                asked, ledger, begun = pairs[:count], Ledger(), self.spent
                flops = self.counted(encoding.encode_pairs(self.model.tokenizer, asked)).flops
                if flops * (rate or first) > left:
                    break
                self._timed(partial(loglikelihood, self.model, asked, ledger=ledger))
                rate, left = (self.spent - begun) / max(1, ledger.flops), left - (self.spent - begun)
                if count >= len(pairs):
                    break
                count *= 4
            return rate or self._guess("answers", first)

        return self._once("answer", measure)

    def query_s(self, questions: Sequence[Question]) -> float:
        """Seconds of one question by itself, without documents."""

        def measure() -> float:
            rate, taken, left = self.answer_rate(questions), list[float](), ANSWERING * self._left_s()
            for question in questions[:ALONE]:
                asked, begun = [(question.prompt, choice) for choice in question.choices], self.spent
                expected = self.counted(encoding.encode_pairs(self.model.tokenizer, asked)).flops * rate
                if sum(taken) + max(expected, *taken, 0.0) > left:
                    break
                self._timed(partial(loglikelihood, self.model, asked))
                taken.append(self.spent - begun)
            return median(taken) if taken else self._guess("a question by itself", expected)

        return self._once("query", measure)

    def query_tokens(self, questions: Sequence[Question]) -> float:
        """Tokens that a question forwards on average."""
        some = questions[:ALONE]
        pairs = [[(question.prompt, choice) for choice in question.choices] for question in some]
        encoded = (encoding.encode_pairs(self.model.tokenizer, choices) for choices in pairs)
        return fmean(self.counted(requests).tokens for requests in encoded)

    # Training ---------------------------------------------------------------------------------------------------------

    def step_s(self, texts: Sequence[str], settings: FinetuneSettings, seed: int) -> tuple[float, float]:
        """(seconds, seconds a token) of a step of training; the first are those of a step without tokens."""

        def measure() -> tuple[float, float]:
            left, begun, work = TRAINING * self._left_s(), self.spent, work_of(self.model)
            tokens = math.ceil(self.example_tokens(texts, settings))
            example_s = PASSES * (float(work.path_flops(tokens)[-1]) + tokens * work.head_flops) * self._flop_s()
            if 2 * example_s > left:
                return 0.0, self._guess("training", example_s / tokens)
            # What only several processes, validation or a folder can do takes no part in a step.
            alone = replace(settings, fsdp=False, report_to=())
            how = {"validation": (), "teacher_context": None, "options": RunOptions()}
            state = self._timed(
                lambda: prepare(self.model, texts, alone, seed=seed, ledger=Ledger(), **how)  # type: ignore[arg-type]
            )
            taken = self._steps(state, left - (self.spent - begun))
            points = [(tokens, median(its)) for tokens, its in taken]
            if len(points) < 2 or points[0][0] == points[1][0]:
                return 0.0, points[0][1] / points[0][0]
            (short, brief), (long, whole_s) = sorted(points)
            slope = max(0.0, (whole_s - brief) / (long - short))
            return max(0.0, whole_s - slope * long), slope

        return self._once(("step", replace(settings, steps=1)), measure)

    def _steps(self, state: RunState, left: float) -> list[tuple[float, list[float]]]:
        """Tokens on average and seconds of steps of one example, and of steps of as many as there is time for."""
        taken, lengths = dict[int, list[float]](), dict[int, list[int]]()
        size, until = 1, self.spent + left
        for step in range(64):
            indices = [(step * state.examples_per_step + i) % len(state.examples) for i in range(size)]

            def take(indices: list[int] = indices) -> None:
                train_step(state, indices)
                state.optimizer.step(state.settings.rate(0))

            begun = self.spent
            self._timed(take)
            if step == 1:  # the first one allocates: it counts only where there is time for no other
                taken, lengths = {}, {}
            taken.setdefault(size, []).append(self.spent - begun)
            lengths.setdefault(size, []).append(sum(len(state.examples[i].ids) for i in indices))
            one_s, room_s = median(taken[1]), until - self.spent
            whole = max(taken) if len(taken) > 1 else max(1, min(state.examples_per_step, int(room_s / one_s)))
            size = whole if step % 3 != 2 and step else 1
            if room_s < (median(taken[size]) if size in taken else size * one_s):
                break
        return [(fmean(lengths[size]), its) for size, its in taken.items()]

    def example_tokens(self, texts: Sequence[str], settings: FinetuneSettings) -> float:
        """Mean tokens of the examples that texts make."""
        limit = self.model.max_positions
        encoded = encode(self.model.tokenizer, texts, max_positions=limit, splitting=settings.splitting)
        return fmean(len(example.ids) for example in encoded)

    # Writing ----------------------------------------------------------------------------------------------------------

    def own_token_s(self) -> float:
        """Seconds of a token of the model's own text, written as one of RUNNING."""

        def measure() -> float:
            begin = [encoding.prefix_token_id(self.model.tokenizer)]
            draws = [Sampling(OWN_TOKENS, temperature=1.0, seed=n) for n in range(RUNNING)]
            write = partial(self._continue, [begin] * RUNNING, draws, Reuse())
            found = self._written("the model's own text", self.model, [begin] * RUNNING, OWN_TOKENS, WRITING, write)
            return found.step_s / RUNNING + found.token_s

        return self._once("own text", measure)

    def writing(self, generator: LocalGenerator, batches: Sequence[PromptBatch], num_strategies: int = 1) -> Writing:
        """What the replies to a strategy's batches are like, by some of them, written as long as time allows."""
        strategy, sampling = batches[0].prompting.strategy, batches[0].sampling
        prompts = [prompt for batch in batches for prompt in batch.prompts]

        def measure() -> Writing:
            encoded, replies = generator.encoded(prompts), dict[int, Reply]()
            some = random.Random(0).sample(range(len(prompts)), min(RUNNING, len(prompts)))

            def write(count: int, clock: DecodingClock) -> Iterator[tuple[int, tuple[int, bool]]]:
                asked = [(prompts[n], sampling) for n in some[:count]]
                for n, reply in replace(generator, on_token=clock).replies(asked):
                    replies[n] = reply
                    yield n, (reply.completion_tokens, reply.is_cut)

            name, part = f"replies of {strategy.name}", WRITING / num_strategies
            limit = sampling.max_new_tokens
            decoding = self._written(name, generator.model, [encoded[n] for n in some], limit, part, write)
            mean, _ = decoding.reply(limit)
            its = [(prompts[some[n]], reply) for n, reply in replies.items()]
            rows, row_tokens, follow = self._rows_of(strategy, its, mean, limit)
            tree, work = trie.build_from_lists([(ids, []) for ids in encoded], whole=True), work_of(generator.model)
            reading, rate = work.flops(tree.depth, len(encoded)) / len(encoded), self._flop_s()
            if decoding.reading_s is not None:
                rate = decoding.reading_s / _tree_flops(generator.model, [encoded[n] for n in some[: len(replies)]])
            before = round(fmean(map(len, encoded)))
            path = work.path_flops(before + math.ceil(mean))
            return Writing(
                prompt_tokens=len(tree.token) / len(encoded),
                prompt_s=reading * rate,
                decoding=decoding,
                limit=limit,
                reply_tokens=mean,
                flops=reading + float(path[-1] - path[before]) + mean * work.head_flops,
                row_tokens=row_tokens,
                rows=rows,
                follow_ups=min(float(strategy.follow_ups), follow),
            )

        return self._once(("writing", strategy.name), measure)

    def _rows_of(
        self, strategy: Strategy, written: Sequence[tuple[Prompt, Reply]], mean: float, limit: int
    ) -> tuple[float, float, float]:
        """(rows, their tokens, follow-up prompts) of a reply of `mean` tokens, by those that were not cut short."""
        whole = [one for one in written if not one[1].is_cut or one[1].completion_tokens >= limit]
        told, texts, follow = whole or written, list[str](), 0
        if not told:  # there was no time for any: a row as long as a reply
            return 1.0, mean, 0.0
        for prompt, reply in told:
            text = completed(prompt.begun, answer_in(reply.text))
            texts += (statement for _, statement in strategy.parse(prompt.unit, text).statements)
            follow += len(strategy.follow_up(prompt.unit, text))
        missing = 0.0 if whole else mean - fmean(reply.completion_tokens for _, reply in told)
        rows = len(texts) / len(told)
        return rows, token_count(self.model, texts) / len(told) + min(1.0, rows) * missing, follow / len(told)

    def _written(
        self,
        name: str,
        model: Model,
        prompts: Sequence[list[int]],
        limit: int,
        part: float,
        write: Write,
        known: int = 0,
    ) -> Decoding:
        """Some replies: `write` gives (tokens, cut) of the first ones, as many as there is time for to their ends."""
        left, rate, work = part * self._left_s(), self._flop_s(), work_of(model)
        path = work.path_flops(max(map(len, prompts)) + 1)
        row_s = rate * (float(path[-1] - path[-2]) + work.head_flops)
        count = len(prompts)
        while count > FEWEST and count * limit * row_s > left / 2:  # steps of few rows take longer than their FLOPs
            count //= 2
        while count and rate * (_tree_flops(model, prompts[:count]) - float(path[known])) > READ_FIRST * left:
            count //= 2
        if not count:
            self._guess(name, 0.0)
            return Decoding((), (), None, 0.0, row_s)
        begun, wider = self.spent, None
        if count < len(prompts):
            wider = self._wide(model, prompts[0], len(prompts), known, READ_FIRST * left)
        clock = DecodingClock(self.clock, left - (self.spent - begun))
        ended = self._timed(lambda: dict(write(count, clock)))
        lengths, is_cut = zip(*(ended[n] for n in range(count)), strict=True)
        if all(is_cut) and max(lengths) < limit:
            self._guess(f"how long {name} get (as long as they may)", 0.0)
        return clock.decoding(lengths, is_cut, row_s, wider)

    def _wide(self, model: Model, prompt: list[int], rows: int, known: int, left: float) -> tuple[float, float] | None:
        """Rows and seconds of a step of many replies to a prompt, or its end; None where there is no time for it."""
        rate, work = self._flop_s(), work_of(model)
        seen = prompt if known else prompt[-FIRST_TOKENS:]
        path = work.path_flops(len(prompt) + 1)
        here, there = (float(path[n + 1] - path[n]) + work.head_flops for n in (len(seen), len(prompt)))
        if rate * (float(path[len(seen)] - path[known]) + WIDE_TOKENS * rows * here) > left:
            return None
        clock, starts = DecodingClock(self.clock, left), {}
        if known and self._context is not None:
            starts = dict.fromkeys(range(rows), self._context)
        draws = [Sampling(WIDE_TOKENS, temperature=1.0, seed=n) for n in range(rows)]
        asked = partial(iter_generations, model, [seen] * rows, draws, on_token=clock, reuse=Reuse(starts))
        self._timed(lambda: list(asked()))
        found = clock.width()
        return None if found is None else (found[0], found[1] * there / here)

    def _continue(
        self, prompts: Sequence[list[int]], sampling: Sequence[Sampling], reuse: Reuse, count: int, clock: DecodingClock
    ) -> Iterator[tuple[int, tuple[int, bool]]]:
        some = iter_generations(self.model, prompts[:count], sampling[:count], on_token=clock, reuse=reuse)
        return ((p, (len(made.ids), made.finish in ("length", "dropped"))) for p, made in some)

    # Slots ------------------------------------------------------------------------------------------------------------

    def compacting_s(self, token: Sequence[int], num_slots: int, followers: Sequence[Sequence[int]]) -> float:
        """Seconds of compaction: its reading at the rate of reading, its matching at that of float64 products."""
        reading, matching = compacting_flops(self.model, len(token), num_slots, sum(map(len, followers)))

        def measure() -> float:
            flops, left, rate = 2 * 2048 * 1024**2, PRODUCTS * self._left_s(), self._flop_s()
            if 2 * 3 * flops * rate > left:  # float64 goes at half the rate
                return self._guess("products in float64", 2 * rate)
            a = torch.rand(2048, 1024, dtype=torch.float64, device=self.model.device)
            taken = []
            for _ in range(3):
                begun = self.spent
                self._timed(lambda: a.T @ a)
                taken.append(self.spent - begun)
            return median(taken) / flops

        return self.read_s(token, reading) + matching * self._once("float64", measure)

    def conversing(self, batch: ConversationBatch, part: Sequence[int]) -> Decoding:
        """A turn of conversations behind documents, written behind READ_TOKENS of them."""

        def measure() -> Decoding:
            starts = [start.text for start in batch.beginnings()[:RUNNING]]
            seen, encoded = list(part[:READ_TOKENS]), encoding.encode(self.model.tokenizer, starts, bos=False)
            prompts = [[*seen, *start] for start in encoded]
            self.read_s(seen)
            known = 0 if self._context is None else common_tokens(self._context.token, np.asarray(seen, np.int32))
            kept = {} if self._context is None else dict.fromkeys(range(len(prompts)), self._context)
            draws = [batch.sampling(n, batch.temperature) for n in range(len(prompts))]
            write = partial(self._continue, prompts, draws, Reuse(kept))
            found = self._written("conversations", self.model, prompts, batch.tokens, CONVERSING, write, known)
            work = work_of(self.model)
            path = work.path_flops(max(len(part), len(seen)) + 1)
            here, there = (float(path[n + 1] - path[n]) + work.head_flops for n in (len(seen), len(part)))
            return replace(found, token_s=found.token_s * there / here)

        return self._once(("conversations", batch.name), measure)

    def prefix_rates(
        self, part: Sequence[int], num_slots: int, settings: PrefixSettings, length: int
    ) -> tuple[float, float]:
        """Seconds a FLOP of what a teacher makes of conversations of that length, and of a step on them."""

        def measure() -> tuple[float, float]:
            left, rate, work = PREFIX * self._left_s(), self._flop_s(), work_of(self.model)
            path = work.path_flops(num_slots + length)
            one = float(path[-1] - path[num_slots]) + length * work.head_flops
            begin = float(path[num_slots]) + TEACHING_TOKENS * work.row_flops
            size = settings.batch_size
            while size and rate * 2 * (begin + (1 + SLOT_PASSES) * size * one) > left:
                size //= 2
            if not size:
                return self._guess("a prefix's training", rate), rate
            made = [Conversation(0, tuple([*part[n % len(part) :], *part][:length])) for n in range(size)]
            text, teaching, training = self.model.tokenizer.decode(part[:TEACHING_TOKENS]), Ledger(), Ledger()
            begun = self.spent
            self._timed(lambda: read_best(self.model, [text], made, settings.top, teaching))
            teach_s = self.spent - begun
            run = SlotsRun(part[:num_slots], [text], made, replace(settings, steps=2, batch_size=size))
            ends = list[float]()
            options = RunOptions(on_step=lambda step, steps: ends.append(self.clock()))
            self._timed(lambda: train_slots(self.model, run, options=options, ledger=training))
            teach, train = teaching.phases["teach"].flops, training.phases["train"].flops
            return teach_s / teach, (ends[1] - ends[0]) / (train / 2)  # the first step allocates

        return self._once("prefix", measure)

    # Time -------------------------------------------------------------------------------------------------------------

    def _left_s(self) -> float:
        return max(0.0, self.seconds - self.spent)

    def _timed(self, what: Callable[[], Found]) -> Found:
        begun, on_core = self.clock(), self.processor()
        found = what()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.spent += self.clock() - begun
        self.processor_s += self.processor() - on_core
        return found

    def _guess(self, name: str, value: float) -> float:
        """A figure by FLOPs."""
        if name not in self.guessed:
            self.guessed.append(name)
        return value

    def _once(self, key: object, measure: Callable[[], Found]) -> Found:
        if key not in self._known:
            self._known[key] = measure()
        found: Found = self._known[key]
        return found


def _tree_flops(model: Model, prompts: Sequence[list[int]]) -> float:
    """FLOPs of reading prompts, what they share once."""
    tree = trie.build_from_lists([(ids, []) for ids in prompts], whole=True)
    return float(work_of(model).flops(tree.depth, len(prompts)))
