"""What this model takes on this machine, tried for some seconds: reading, answering, writing, a step of training.

Each figure is measured when it is first asked for, on the study's own texts, and ends at its part of the time; a single
step that takes longer is finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median
from typing import Any, TypeVar

import torch

from icl_ft_fast.augmentation.batches import PromptBatch
from icl_ft_fast.augmentation.generators import TextGenerator
from icl_ft_fast.augmentation.prompts import completed
from icl_ft_fast.augmentation.self_study import Conversation, ConversationBatch
from icl_ft_fast.engine import encoding, trie
from icl_ft_fast.engine.compaction import compacting_flops
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.generate import RUNNING
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood, prefill
from icl_ft_fast.engine.model import Model
from icl_ft_fast.finetuning.data import encode
from icl_ft_fast.finetuning.prefix import SlotsRun, train_slots
from icl_ft_fast.finetuning.run import prepare, train_step
from icl_ft_fast.finetuning.settings import FinetuneSettings, PrefixSettings, RunOptions
from icl_ft_fast.runtime.reasoning import answer_in
from icl_ft_fast.study.own_texts import own_texts
from icl_ft_fast.study.synthetic import token_count
from icl_ft_fast.tasks.task import Question

Found = TypeVar("Found")
CALIBRATION_S = 20.0
READING, ANSWERING, TRAINING, WRITING = 0.15, 0.15, 0.35, 0.35  # parts of the time
FIRST_TOKENS = 512  # of the first reading that is timed
ALONE = 8  # questions that are asked one by one


@dataclass(frozen=True)
class Counted:
    """Tokens that are forwarded once for some requests, and the FLOPs."""

    tokens: int
    flops: int


@dataclass(frozen=True)
class Writing:
    """What a strategy's replies are like, and what they take.

    Attributes:
        prompt_tokens: of a prompt.
        prompt_s: seconds of reading one.
        reply_tokens, longest_tokens: of a reply on average, and of the longest; as far as they were not seen, by how
            many ended.
        step_s: seconds of a step of decoding, of all replies that are written at once.
        token_s: seconds of decoding a token, while so many are written at once.
        row_tokens: of the rows of a reply, all together.
        rows: of a reply.
        follow_ups: prompts that follow a first one.
    """

    prompt_tokens: float
    prompt_s: float
    reply_tokens: float
    longest_tokens: float
    step_s: float
    token_s: float
    row_tokens: float
    rows: float
    follow_ups: float

    def seconds(self, num_replies: float) -> float:
        """Seconds of so many replies."""
        decoding = self.longest_tokens * self.step_s
        if num_replies > RUNNING:  # whoever ends is replaced at once
            decoding = max(decoding, num_replies * self.reply_tokens * self.token_s)
        return num_replies * self.prompt_s + decoding


@dataclass(frozen=True)
class Conversing:
    """What a conversation about the documents takes, see self_study.py, and a step of a prefix's training on some.

    Attributes:
        written_tokens: that the model writes.
        tokens: of the whole.
        write_s: seconds of writing it, without reading the documents.
        teach_s: seconds of what the model that read the documents makes of it.
        step_s: seconds of a step.
    """

    written_tokens: float
    tokens: float
    write_s: float
    teach_s: float
    step_s: float


@dataclass
class Calibration:
    """Measurements, made when they are first asked for.

    Attributes:
        model: from load().
        seconds: of all measurements together, about.
        clock: for tests.
    """

    model: Model
    seconds: float = CALIBRATION_S
    clock: Callable[[], float] = time.perf_counter
    _readings: dict[int, float] = field(default_factory=dict)
    _known: dict[object, Any] = field(default_factory=dict)

    def counted(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Counted:
        """What scoring requests forwards."""
        tree = trie.build_from_lists([(list(before), list(after)) for before, after in requests])
        heads = len(tree.scored_row.unique())
        return Counted(len(tree.token), work_of(self.model).flops(tree.depth, heads))

    def read_s(self, token: Sequence[int], flops: float | None = None) -> float:
        """Seconds of reading tokens, or of as many FLOPs as are read at that length."""
        path = work_of(self.model).path_flops(max(len(token), 1))
        if not self._readings and len(token):
            first = list(token[:FIRST_TOKENS])
            self._warm()
            self._readings[len(first)] = self._timed(lambda: prefill(self.model, first))
            expected = self._readings[len(first)] * path[len(token)] / path[len(first)]
            if len(token) > len(first) and expected < READING * self.seconds:
                self._readings[len(token)] = self._timed(lambda: prefill(self.model, list(token)))
        if not self._readings:
            return 0.0
        length = min(self._readings, key=lambda n: abs(n - len(token)))
        rate = self._readings[length] / float(work_of(self.model).path_flops(length)[length])
        return rate * float(path[len(token)] if flops is None else flops)

    def answer_rate(self, questions: Sequence[Question]) -> float:
        """Seconds a FLOP of questions that are scored together without documents."""

        def measure() -> float:
            self._warm()
            pairs = [(question.prompt, choice) for question in questions for choice in question.choices]
            count, taken, rate = 16, 0.0, 0.0
            while taken < ANSWERING / 2 * self.seconds:
                asked = pairs[:count]
                ledger = Ledger()
                took = self._timed(partial(loglikelihood, self.model, asked, ledger=ledger))
                rate, taken = took / max(1, ledger.flops), taken + took
                if count >= len(pairs):
                    break
                count *= 4
            return rate

        return self._once("answer", measure)

    def query_s(self, questions: Sequence[Question]) -> float:
        """Seconds of one question by itself, without documents."""

        def measure() -> float:
            taken = []
            for question in questions[:ALONE]:
                asked = [(question.prompt, choice) for choice in question.choices]
                taken.append(self._timed(partial(loglikelihood, self.model, asked)))
                if sum(taken) > ANSWERING / 2 * self.seconds:
                    break
            return median(taken)

        return self._once("query", measure)

    def query_tokens(self, questions: Sequence[Question]) -> float:
        """Tokens that a question forwards on average."""
        some = questions[:ALONE]
        pairs = [[(question.prompt, choice) for choice in question.choices] for question in some]
        encoded = (encoding.encode_pairs(self.model.tokenizer, choices) for choices in pairs)
        return fmean(self.counted(requests).tokens for requests in encoded)

    def own_token_s(self) -> float:
        """Seconds of a token of the model's own text."""

        def measure() -> float:
            ledger = Ledger()
            took = self._timed(lambda: own_texts(self.model, 0, num_texts=RUNNING, tokens=8, ledger=ledger))
            return took / max(1, ledger.decoded_tokens)

        return self._once("own text", measure)

    def step_s(self, texts: Sequence[str], settings: FinetuneSettings, seed: int) -> tuple[float, float]:
        """(seconds, seconds a token) of a step of training; the first are those of a step without tokens."""

        def measure() -> tuple[float, float]:
            # What only several processes, validation or a folder can do takes no part in a step.
            alone = replace(settings, fsdp=False, report_to=())
            how = {"validation": (), "teacher_context": None, "options": RunOptions()}
            state = prepare(self.model, texts, alone, seed=seed, ledger=Ledger(), **how)  # type: ignore[arg-type]
            whole = state.examples_per_step
            taken: dict[int, list[float]] = {}
            lengths = dict.fromkeys((1, whole), 0.0)
            begun, order = self.clock(), list(range(len(state.examples)))
            for step in range(64):
                size = 1 if step % 3 == 1 and whole > 1 else whole
                indices = [order[(step * whole + i) % len(order)] for i in range(size)]

                def take(indices: list[int] = indices) -> None:
                    train_step(state, indices)
                    state.optimizer.step(settings.rate(0))

                took = self._timed(take)
                tokens = sum(len(state.examples[i].ids) for i in indices)
                if step == 0:  # allocates: it counts only where there is time for no other
                    first = tokens, took
                else:
                    taken.setdefault(size, []).append(took)
                    lengths[size] += tokens
                if self.clock() - begun > TRAINING * self.seconds and (step > 1 or took > self.seconds):
                    break
            points = [(lengths[n] / len(its), median(its)) for n, its in taken.items()] or [first]
            if len(points) < 2 or points[0][0] == points[1][0]:
                return 0.0, points[0][1] / points[0][0]
            (short, brief), (long, whole_s) = sorted(points)
            slope = max(0.0, (whole_s - brief) / (long - short))
            return max(0.0, whole_s - slope * long), slope

        return self._once(("step", replace(settings, steps=1)), measure)

    def example_tokens(self, texts: Sequence[str], settings: FinetuneSettings) -> float:
        """Mean tokens of the examples that texts make."""
        limit = self.model.max_positions
        encoded = encode(self.model.tokenizer, texts, max_positions=limit, splitting=settings.splitting)
        return fmean(len(example.ids) for example in encoded)

    def writing(self, generator: TextGenerator, batches: Sequence[PromptBatch], num_strategies: int = 1) -> Writing:
        """What the replies to a strategy's batches are like: the first of them, longer each time, as time allows."""
        prompting, sampling = batches[0].prompting, batches[0].sampling
        prompts = [prompt for batch in batches for prompt in batch.prompts][:RUNNING]
        limits = [n for n in (4, 16, 64, 256, 1024) if n < sampling.max_new_tokens] + [sampling.max_new_tokens]

        def measure() -> Writing:
            begun, taken = self.clock(), list[tuple[float, int, int]]()  # seconds, longest reply, tokens
            for limit in limits:
                since = self.clock()
                asked = [(prompt, replace(sampling, max_new_tokens=limit)) for prompt in prompts]
                replies = dict(generator.replies(asked))
                took, lengths = self.clock() - since, [reply.completion_tokens for reply in replies.values()]
                taken.append((took, max(lengths), sum(lengths)))
                if self.clock() - begun + 4 * took > WRITING * self.seconds / num_strategies:
                    break
            (before_s, before_longest, before_tokens), (all_s, longest, tokens) = ([(0.0, 0, 0), *taken])[-2:]
            step_s = (all_s - before_s) / max(1, longest - before_longest)
            token_s = (all_s - before_s) / max(1, tokens - before_tokens)
            is_cut = any(reply.is_cut for reply in replies.values()) and limit < sampling.max_new_tokens
            mean = tokens / len(prompts)
            if is_cut:  # replies end as often at every token as they did so far
                ended = sum(not reply.is_cut for reply in replies.values())
                rate, most = ended / max(1, tokens), sampling.max_new_tokens
                mean = (1 - math.exp(-rate * most)) / rate if ended else float(most)
            texts, follow, rows = list[str](), 0, 0
            for p, prompt in enumerate(prompts):
                text = completed(prompt.begun, answer_in(replies[p].text))
                statements = prompting.strategy.parse(prompt.unit, text).statements
                texts, rows = [*texts, *(statement for _, statement in statements)], rows + len(statements)
                follow += len(prompting.strategy.follow_up(prompt.unit, text))
            scale = mean * len(prompts) / max(1, tokens) / len(prompts)
            return Writing(
                prompt_tokens=sum(reply.prompt_tokens for reply in replies.values()) / len(prompts),
                prompt_s=max(0.0, taken[0][0] - step_s * taken[0][1]) / len(prompts),
                reply_tokens=mean,
                longest_tokens=sampling.max_new_tokens if is_cut else longest,
                step_s=step_s,
                token_s=token_s,
                row_tokens=scale * token_count(self.model, texts),
                rows=scale * rows,
                follow_ups=min(float(prompting.strategy.follow_ups), scale * follow),
            )

        return self._once(("writing", prompting.strategy.name), measure)

    def compacting_s(self, token: Sequence[int], num_slots: int, followers: Sequence[Sequence[int]]) -> float:
        """Seconds of compaction: its reading at the rate of reading, its matching at that of float64 products."""
        reading, matching = compacting_flops(self.model, len(token), num_slots, sum(map(len, followers)))

        def measure() -> float:
            a = torch.rand(2048, 1024, dtype=torch.float64, device=self.model.device)
            return min(self._timed(lambda: a.T @ a) for _ in range(3)) / (2 * 2048 * 1024**2)

        return self.read_s(token, reading) + matching * self._once("float64", measure)

    def conversing(
        self, batch: ConversationBatch, part: Sequence[int], num_slots: int, settings: PrefixSettings
    ) -> Conversing:
        """What conversations take, by some of the batch that are cut short, and by two steps on as many tokens."""
        write_s, written, whole = self._once(("conversations", batch.name), partial(self._conversations, batch))
        return self._once(
            ("prefix", batch.name, num_slots),
            partial(self._prefix, part, num_slots, settings, write_s, written, whole),
        )

    def _conversations(self, batch: ConversationBatch) -> tuple[float, float, float]:
        """Seconds of writing a conversation, the tokens written, and all of its tokens."""
        few = replace(batch, count=min(batch.count, RUNNING))
        limits = sorted({max(1, batch.tokens // 8), max(2, batch.tokens // 2)})
        found = []
        for limit in limits:
            ledger = Ledger()
            made = replace(few, tokens=limit).generate(self.model, ledger)["conversations"]
            found.append((ledger.phases["generate"].wall_s, ledger.decoded_tokens, fmean(len(ids) for _, ids in made)))
        (first_s, first, _), (second_s, second, length) = found[0], found[-1]
        token_s = max(0.0, second_s - first_s) / max(1, second - first)
        written = batch.tokens / limits[-1] * second / few.count
        return written * token_s, written, length + written - second / few.count

    def _prefix(
        self,
        part: Sequence[int],
        num_slots: int,
        settings: PrefixSettings,
        write_s: float,
        written: float,
        whole: float,
    ) -> Conversing:
        """With the teacher's and the training's seconds, behind at most FIRST_TOKENS of the documents."""
        seen, size = list(part[:FIRST_TOKENS]), settings.batch_size
        length = min(round(whole), len(part))
        text = self.model.tokenizer.decode(seen)
        taken = []
        for steps in (1, 3):
            made = [
                Conversation(0, tuple(part[n % max(1, len(part) - length) :][:length])) for n in range(size * steps)
            ]
            alone, ledger = replace(settings, steps=steps), Ledger()
            run = SlotsRun(part[:num_slots], [text], made, alone)
            train_slots(self.model, run, options=RunOptions(), ledger=ledger)
            taken.append([ledger.phases[phase].wall_s for phase in ("teach", "train")])
        (short_teach, short_train), (long_teach, long_train) = taken
        work = work_of(self.model)
        after, here = (work.path_flops(n + length) for n in (len(part), len(seen)))
        longer = float(after[-1] - after[len(part)]) / float(here[-1] - here[len(seen)])
        teach_s = max(0.0, long_teach - short_teach) / (2 * size) * longer
        return Conversing(written, whole, write_s, teach_s, max(0.0, long_train - short_train) / 2)

    def _warm(self) -> None:
        """A first forward, which takes longer than those after it."""
        self._once("warm", lambda: prefill(self.model, [encoding.prefix_token_id(self.model.tokenizer)] * 16))

    def _timed(self, what: Callable[[], object]) -> float:
        begun = self.clock()
        what()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return self.clock() - begun

    def _once(self, key: object, measure: Callable[[], Found]) -> Found:
        if key not in self._known:
            self._known[key] = measure()
        found: Found = self._known[key]
        return found
