"""The plan before the run: what each arm will read, write, train on, compute, take and leave on the disk.

Tokens and FLOPs are counted from the task's own texts; seconds are these at the rates of a short calibration. What the
model will write is not known: its length is taken from the calibration's replies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from icl_ft_fast.augmentation.batches import PromptBatch
from icl_ft_fast.augmentation.generators import LocalGenerator, TextGenerator
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.control_tokens import behind, set_mode
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.runtime.templates import fix_date
from icl_ft_fast.study.amortise import break_even
from icl_ft_fast.study.arm import (
    CONTEXT_TOKENS,
    Arm,
    ArmJob,
    Expected,
    Prepared,
    Training,
    Workspace,
    all_documents,
    writer_of,
)
from icl_ft_fast.study.arms import arm_named, expand_arms, sizes_of
from icl_ft_fast.study.calibration import CALIBRATION_S, Calibration
from icl_ft_fast.study.compare import settled
from icl_ft_fast.study.costs import ANSWERING, ArmCosts, waited
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.runs import PlannedRun, is_made_once, plan
from icl_ft_fast.study.settings import CHECKPOINT_S, StudySettings
from icl_ft_fast.study.slotted import SLOTS
from icl_ft_fast.study.sweep import Point, Sweep
from icl_ft_fast.study.synthetic import writers
from icl_ft_fast.tasks.task import Task

CHECKPOINT_BYTES = 12  # a trained weight: itself and the optimizer's two moments, in float32
ANSWER_BYTES, CHOICE_BYTES = 400, 50  # of results.json and of the journal together, for each answer
SPECIAL_TOKENS = 2  # around an example


@dataclass(frozen=True)
class ArmForecast:
    """What an arm is expected to take under one seed.

    Attributes:
        arm: its name.
        seeds: it runs under.
        read_tokens: forwarded to read documents, prompts and questions.
        written_tokens: generated.
        trained_tokens: forwarded and differentiated.
        flops: of all that.
        setup_s: seconds before the first question.
        seconds: of all, the task's questions included.
        disk_bytes: at most at once.
        break_even: queries from which on it costs less than the first arm that takes documents to each question; None
            if never, or if there is none.
        is_planned: whether anything here is known: an arm may have no plan.
    """

    arm: str
    seeds: int
    read_tokens: int = 0
    written_tokens: int = 0
    trained_tokens: int = 0
    flops: int = 0
    setup_s: float = 0.0
    seconds: float = 0.0
    disk_bytes: int = 0
    break_even: float | None = None
    is_planned: bool = True


@dataclass(frozen=True)
class Forecast:
    """A study's plan.

    Attributes:
        arms: in their order.
        rival: the arm that break-evens are taken with; "" for none.
        calibration_s: seconds that the model was tried for.
        seconds: of all arms under all seeds, what they share counted once, without measuring queries.
        planning_s: seconds that the plan took, the calibration included.
        guessed: what there was no time to try: its seconds are FLOPs at the rate of reading.
        processor_s: of the calibration's seconds, those in which its thread had a core; None on a GPU.
        beside: a sentence, if the calibration waited for other processes; "" if it did not.
    """

    arms: tuple[ArmForecast, ...]
    rival: str
    calibration_s: float
    seconds: float
    planning_s: float = 0.0
    guessed: tuple[str, ...] = ()
    processor_s: float | None = None
    beside: str = ""


def forecast(
    model: Model,
    task: Task | Callable[[int], Task],
    settings: StudySettings,
    *,
    has_store: bool = False,
    checkpoint_s: float = CHECKPOINT_S,
    calibration_s: float = CALIBRATION_S,
) -> Forecast:
    """Plan a study by its first seed.

    Args:
        model: from load(); left as it is.
        task: as compare() takes it.
        settings: of the study.
        has_store: whether contexts are kept in a store.
        checkpoint_s: seconds between the checkpoints of a training.
        calibration_s: seconds that may be spent on trying this model on this machine, about; all arms together.

    Raises:
        ProtocolError: an arm that cannot take the task.
        ValueError: an unknown arm, or whatever scoring, generating or training raises.
    """
    begun = time.perf_counter()
    first = task(settings.seeds[0]) if callable(task) else task
    set_mode(model.tokenizer, settings.special_tokens)
    date = fix_date(model.tokenizer, settings.template_date)
    arms = expand_arms(settings.arms, first, sizes_of(settings))
    settings = settled(model, replace(settings, arms=arms, template_date=date))
    writer, one = writer_of(model, settings), replace(settings, seeds=settings.seeds[:1])
    planned = plan(model, lambda _: first, one, ResultJournal(None), writer=writer)
    calibration = Calibration(model, calibration_s)
    planner = _Planner(model, first, settings, writer, has_store, checkpoint_s, calibration)
    found = [planner.arm(one) for one in planned]
    rival = next((one.arm for one in planned if arm_named(one.arm).is_rival and one.arm in planner.ways), "")
    made = [replace(each, break_even=planner.break_even(each.arm, rival)) for each in found]
    more, seconds = len(settings.seeds) - 1, planner.seconds
    if more and (not callable(task) or task(settings.seeds[-1]) == first):  # else every run is of another task
        names = [each.arm for each in made if is_made_once(arm_named(each.arm), settings, has_store)]
        seconds += more * (planner.seconds - math.fsum(each.seconds for each in made if each.arm in names))
    else:
        seconds += more * planner.seconds
    spent, processor_s = calibration.spent, calibration.processor_s if model.device.type == "cpu" else None
    beside = ""
    if processor_s is not None and waited(spent, processor_s):
        beside = (
            f"Other processes took the cores while the model was tried: it had one for {processor_s:,.1f} s of "
            f"{spent:,.1f} s. On a quiet machine the arms take fewer seconds than planned."
        )
    took_s = time.perf_counter() - begun
    guessed = tuple(calibration.guessed)
    return Forecast(tuple(made), rival, spent, seconds, took_s, guessed, processor_s, beside)


def taken_s(run: Run) -> float:
    """Seconds that a run took, by its ledger: what a forecast's seconds are of."""
    return math.fsum(phase["wall_s"] for phase in run.counts["phases"].values())


@dataclass
class _Part:
    """Sums over what an arm does."""

    read_tokens: float = 0.0
    written_tokens: float = 0.0
    trained_tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, *, seconds: float = 0.0, flops: float = 0.0, **tokens: float) -> None:
        """Add to the sums."""
        self.seconds += seconds
        self.flops += flops
        for name, count in tokens.items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class _Planner:
    """Plans arm after arm; what was planned for one is known for the next."""

    model: Model
    task: Task
    settings: StudySettings
    writer: TextGenerator
    has_store: bool
    checkpoint_s: float
    calibration: Calibration
    ways: dict[str, ArmCosts] = field(default_factory=dict)
    seconds: float = 0.0  # of all arms, what they share counted once
    _shared: set[object] = field(default_factory=set)

    def arm(self, one: PlannedRun) -> ArmForecast:
        """An arm's plan."""
        arm, seeds = arm_named(one.arm), len(self.settings.seeds)
        setup, disk = _Part(), 0
        if arm.training is not None:
            if arm.training.generates and not isinstance(self.writer, LocalGenerator):  # a plan asks no server
                return ArmForecast(one.arm, seeds, is_planned=False)
            disk = self._train(arm.training, one, setup)
            self._count_once(one.training_key, setup.seconds)
        trained_s = setup.seconds
        asked, costs, kept = self._ask(arm, one, setup)
        if costs is None:
            return ArmForecast(one.arm, seeds, is_planned=False)
        self.ways[one.arm] = costs
        self.seconds += setup.seconds - trained_s + asked.seconds
        choices = sum(len(question.choices) for question in self.task.questions)
        disk = max(disk, kept) + len(self.task.questions) * ANSWER_BYTES + choices * CHOICE_BYTES
        return ArmForecast(
            arm=one.arm,
            seeds=seeds,
            read_tokens=round(setup.read_tokens + asked.read_tokens),
            written_tokens=round(setup.written_tokens),
            trained_tokens=round(setup.trained_tokens),
            flops=round(setup.flops + asked.flops),
            setup_s=setup.seconds,
            seconds=setup.seconds + asked.seconds,
            disk_bytes=disk,
        )

    def break_even(self, name: str, rival: str) -> float | None:
        """Queries from which on a trained arm's first way costs less than the rival's first."""
        arm = arm_named(name)
        if not rival or arm.training is None or arm.asking.is_control or name not in self.ways:
            return None
        lines = [next(iter(arm_named(each).asking.ways("", self.ways[each]).values()), None) for each in (name, rival)]
        own, other = lines
        return None if own is None or other is None else break_even(own.line, other.line)

    def _count_once(self, key: object, seconds: float) -> None:
        if key not in self._shared:
            self._shared.add(key)
            self.seconds += seconds

    # Training ---------------------------------------------------------------------------------------------------------

    def _train(self, training: Training, one: PlannedRun, setup: _Part) -> int:
        """Add writing and training; returns the bytes of a checkpoint, 0 where none will be written."""
        settings, calibration = self.settings.training_of(one.arm), self.calibration
        texts = [document.text for document in self.task.documents]
        own = calibration.example_tokens(texts, settings)
        count, tokens = float(len(texts)), own * len(texts)
        if training.generates:
            written = _Part()
            batches = [batch for batch in one.batches if isinstance(batch, PromptBatch)]
            rows, row_tokens = self._write(training, batches, written)
            if training.is_control:  # trains on the documents for as many tokens
                settings = replace(
                    settings, steps=max(1, round(settings.steps * _mean(count, tokens, rows, row_tokens) / own))
                )
            else:
                setup.add(**vars(written))
                count, tokens = count + rows, tokens + row_tokens
        elif training.augment is not None:  # by rule, which takes no time
            made = training.augment(self._job(one)).rows
            count, tokens = count + len(made), tokens + own * len(made)
        if share := self.settings.replay:
            more = tokens * share / (1 - share)
            setup.add(written_tokens=more, seconds=more * calibration.own_token_s())
            count, tokens = count + more / 64, tokens + more
        work, mean = work_of(self.model), max(1.0, tokens / max(1.0, count))
        per_step = settings.batch_size * settings.gradient_accumulation_steps
        example_flops = float(work.path_flops(math.ceil(mean))[-1]) + mean * work.head_flops
        if training.has_teacher:
            context = all_documents(self.model, self.task, one.seed, self.settings).text
            (before,) = encoding.encode(self.model.tokenizer, [context.rstrip()])
            ahead = float(work.path_flops(len(before) + math.ceil(mean))[-1] - work.path_flops(len(before))[-1])
            flops = float(work.path_flops(len(before))[-1]) + count * ahead
            setup.add(read_tokens=len(before) + tokens, flops=flops, seconds=calibration.read_s(before, flops=flops))
        fixed_s, token_s = calibration.step_s(texts, settings, one.seed)
        training_s = settings.steps * (fixed_s + token_s * per_step * mean)
        examples = settings.steps * per_step
        setup.add(trained_tokens=examples * mean, flops=3 * examples * example_flops, seconds=training_s)
        return CHECKPOINT_BYTES * self.model.num_parameters if training_s > self.checkpoint_s else 0

    def _write(self, training: Training, batches: Sequence[PromptBatch], setup: _Part) -> tuple[float, float]:
        """Add what the model writes; returns the rows that come of it and their tokens."""
        shares = writers(self.writer.is_chat, self.settings, asks_itself=training.asks_itself)
        found = {}
        for strategy, share in shares.items():
            its = [batch for batch in batches if batch.prompting.strategy.name == strategy]
            if not its:
                continue
            assert isinstance(self.writer, LocalGenerator)  # see arm()
            replies = self.calibration.writing(self.writer, its, len(shares))
            per_root = replies.row_tokens + replies.follow_ups * replies.reply_tokens
            roots = float(sum(len(batch.prompts) for batch in its))
            if training.tokens is not None and per_root:
                layer = sum(len(batch.prompts) for batch in its if not batch.prompts[0].sample)
                roots = min(roots, layer * math.ceil(training.tokens * share / per_root / layer))
            asked = roots * (1 + replies.follow_ups)
            setup.add(
                read_tokens=asked * replies.prompt_tokens,
                written_tokens=asked * replies.reply_tokens,
                flops=asked * replies.flops,
                seconds=replies.seconds(asked),
            )
            made = roots * per_root, roots * (replies.rows + replies.follow_ups)
            limit = math.inf if training.tokens is None else training.tokens * share
            found[strategy] = made if made[0] <= limit else (limit, made[1] * limit / made[0])
        if training.tokens is None and len(found) > 1:
            whole = min(tokens / shares[name] for name, (tokens, _) in found.items())
            found = {
                name: (whole * shares[name], rows * whole * shares[name] / tokens if tokens else 0.0)
                for name, (tokens, rows) in found.items()
            }
        rows = math.fsum(count for _, count in found.values())
        return rows, math.fsum(tokens for tokens, _ in found.values()) + SPECIAL_TOKENS * rows

    # Asking -----------------------------------------------------------------------------------------------------------

    def _job(self, one: PlannedRun) -> ArmJob:
        """A job that leaves nothing anywhere; any retriever's passages are as long as BM25's, which asks no server."""
        settings, workspace = replace(self.settings, retriever="bm25"), Workspace(ResultJournal(None))
        return ArmJob(self.model, self.task, one.seed, settings, Ledger(), workspace, one.key, batches=one.batches)

    def _ask(self, arm: Arm, one: PlannedRun, setup: _Part) -> tuple[_Part, ArmCosts | None, int]:
        """What answering takes, the arm's costs, and bytes that it keeps; no costs where the arm has no plan."""
        job, asking, notes, asked = self._job(one), arm.asking, dict[str, float](), _Part()
        ready = Prepared(self.model, prompt_context(self.model, [], self.settings.template))
        expected, kept, retrieve_s = Expected(), 0, 0.0
        row_bytes = work_of(self.model).kv_row_bytes
        if asking.expect is not None:
            expected = asking.expect(job, self.calibration)
            tokens = {name: getattr(expected, name) for name in ("read_tokens", "written_tokens", "trained_tokens")}
            setup.add(**tokens, flops=expected.flops, seconds=expected.seconds)
            self._count_once(expected.shared[0], expected.shared[1])
            self.seconds -= expected.shared[1]  # which arm() adds
            notes[SLOTS], kept = expected.slots, expected.slots * row_bytes
        elif asking.is_quick and asking.prepare is not None:
            ready = asking.prepare(job, ready)
            notes[CONTEXT_TOKENS] = ready.notes[CONTEXT_TOKENS]
            seconds = job.ledger.seconds
            setup.add(seconds=math.fsum(s for phase, s in seconds.items() if phase not in ANSWERING))
            retrieve_s = seconds.get("retrieve", 0.0)
        elif asking.context is not None:
            ready = replace(ready, context=asking.context(self.model, self.task, one.seed, self.settings).text)
        elif asking.prepare is not None:
            return asked, None, 0
        own = self._answer(ready, expected.slots, asked)
        asked.add(seconds=retrieve_s)
        if asking.context is not None and self.has_store:
            kept = own * row_bytes
        return asked, self._costs(arm, setup, notes, own if asking.context is not None else 0, retrieve_s), kept

    def _answer(self, ready: Prepared, slots: int, asked: _Part) -> int:
        """Add the task's questions; returns the tokens of the context that they share."""
        calibration, questions, tokenizer = self.calibration, self.task.questions, self.model.tokenizer
        before = ready.contexts or (ready.context,) * len(questions)
        texts = self._encoded(list(dict.fromkeys(before)))
        pairs = [
            (behind(tokenizer, own, question.prompt) if own else question.prompt, choice)
            for own, question in zip(before, questions, strict=True)
            for choice in question.choices
        ]
        requests = encoding.encode_pairs(tokenizer, pairs)
        whole = calibration.counted(requests)
        first = calibration.counted([(ids, [0]) for ids in texts if ids]) if any(texts) else None
        longest = max(texts, key=len)
        own_flops = 0 if first is None else first.flops
        question_flops = max(0, whole.flops - own_flops)
        if slots:  # behind slots, whose keys and values are there
            tokens, work = whole.tokens, work_of(self.model)
            seen = math.fsum(min(slots, window or slots) * flops for window, flops in work.attention)
            question_flops += round(tokens * seen)
        seconds = (own_flops + question_flops) * calibration.answer_rate(questions)
        if first and ready.contexts is None:  # what all questions share is read before them, in one go
            seconds += calibration.read_s(longest, own_flops) - own_flops * calibration.answer_rate(questions)
        asked.add(read_tokens=whole.tokens, flops=own_flops + question_flops, seconds=seconds)
        return len(longest) if ready.contexts is None else 0

    def _encoded(self, contexts: Sequence[str]) -> list[list[int]]:
        texts = [context.rstrip() for context in contexts]
        found = iter(encoding.encode(self.model.tokenizer, [text for text in texts if text]))
        return [next(found) if text else [] for text in texts]

    def _costs(
        self, arm: Arm, setup: _Part, notes: dict[str, float], context_tokens: int, retrieve_s: float
    ) -> ArmCosts:
        """The costs of an arm as a study would have measured them."""
        calibration, questions, work = self.calibration, self.task.questions, work_of(self.model)
        alone = calibration.query_s(questions)
        rows = calibration.query_tokens(questions)
        points = []
        for length in sorted({0, context_tokens, *(round(count) for count in notes.values())}):
            seen = math.fsum(min(length, window or length) * flops for window, flops in work.attention)
            more = rows * seen * calibration.answer_rate(questions)
            reading = (calibration.read_s([0] * length),) if length else ()
            points.append(Point(length, 1, reading, (alone + more,)))
        phases = {"retrieve": {"wall_s": retrieve_s / max(1, len(questions))}}
        run = Run(arm.name, 0, {}, (), setup.seconds, 0.0, 0.0, 0.0, {"phases": phases}, dict(notes))
        return ArmCosts("seconds", (run,), Sweep(context_tokens, tuple(points)))


def _mean(count: float, tokens: float, more: float, more_tokens: float) -> float:
    return (tokens + more_tokens) / (count + more)
