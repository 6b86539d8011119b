"""The arms that a study compares: each an Arm, which knows how it trains, asks and costs.

An arm is one object in ARMS; nothing else in the package compares arms by name. It is made of two independent parts:
how its weights are made (Training, or none) and what stands before a question (Asking). To add one, write the part that
is new and add the Arm to ARMS and its name to settings.ARM_NAMES; docs/add-an-arm.md goes through it.

Names may be put together: "ft+rag" asks the weights of "ft" as "rag" asks, "rag@8" is "rag" in another size, and
"ft+rag@8" is both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from icl_ft_fast.augmentation.batches import PromptBatch, augment_by_rule
from icl_ft_fast.augmentation.strategy import Augmented
from icl_ft_fast.engine.prompting import ProtocolError
from icl_ft_fast.study.amortise import Samples
from icl_ft_fast.study.arm import CONTEXT_TOKENS, Arm, ArmJob, Asking, Training, all_documents, writer_of
from icl_ft_fast.study.costs import ArmCosts
from icl_ft_fast.study.passages import ORACLE, retrieved
from icl_ft_fast.study.settings import ARM_NAMES, PREFIX_SIZES, StudySettings
from icl_ft_fast.study.slotted import compacted, trained_prefix
from icl_ft_fast.study.synthetic import writers, written
from icl_ft_fast.tasks.task import Task

ALL = "all"
PASSAGES = 4  # of "rag" where no size is said
RATIO = 8  # of "compacted"


def ways_without_context(title: str, costs: ArmCosts) -> dict[str, Samples]:
    """A setup a run, then a query each."""
    point, setup = costs.point(0), costs.setup
    if point is None or setup is None or (query := costs.query(point)) is None:
        return {}
    return {title: Samples(setup, (), query)}


def ways_behind_context(title: str, costs: ArmCosts) -> dict[str, Samples]:
    """The context is read for each batch of queries; or cached in memory; or kept in a file that is read back."""
    # Results of versions that did not note the tokens have one context, the sweep's.
    point, setup = costs.point(costs.note(CONTEXT_TOKENS) or costs.sweep.context_tokens), costs.setup
    if point is None or setup is None or (query := costs.query(point)) is None:
        return {}
    reading = costs.reading(point)
    found = {title: Samples(setup, reading, query, float(point.batch))}
    if costs.cache_lifetime > point.batch:
        found[f"{title} cached"] = Samples(setup, reading, query, costs.cache_lifetime)
    if point.load_s and costs.resource != "joules":  # a file's joules were not measured
        load, save = costs.of_seconds(point.load_s), costs.of_seconds(point.save_s)
        once = Samples((), reading).line.reading + Samples((), save).line.reading
        saved = tuple(own + once for own in setup or (0.0,))
        found[f"{title} from file"] = Samples(saved, load, query, max(float(point.batch), costs.cache_lifetime))
    return found


CLOSED_BOOK = Asking(ways_without_context, ignores_seed=True)
IN_CONTEXT = Asking(ways_behind_context, context=all_documents)

# How to train ---------------------------------------------------------------------------------------------------------


def _by_model(job: ArmJob, *, tokens: int | None = None, asks_itself: bool = False) -> Augmented:
    writer = job.workspace.writer or writer_of(job.model, job.settings)
    return written(
        job.model,
        writer,
        [batch for batch in job.batches if isinstance(batch, PromptBatch)],
        writers(writer.is_chat, job.settings, asks_itself=asks_itself),
        tokens=tokens,
        journal=job.workspace.journal,
        ledger=job.ledger,
        progress=job.progress,
    )


def _by_rule(job: ArmJob) -> Augmented:
    with job.ledger.phase("filter"):
        return augment_by_rule(job.task.documents)


def _check_rules(task: Task) -> None:
    if not augment_by_rule(task.documents).rows:
        raise ProtocolError("arms: rules-ft: no document states a comparison, which is all that the rules know")


def _sized(name: str, title: str, of: Callable[[int], Asking], sizes: tuple[int, ...], usual: int) -> Arm:
    """An arm whose asking has a size; `title` has a place for it."""

    def sized(size: int) -> Arm:
        if size < 1:
            raise ProtocolError(f"arms: {name}@{size}: expected a size of at least 1")
        return Arm(f"{name}@{size}", title.format(size), of(size), sized=sized)

    return replace(sized(usual), name=name, sizes=sizes)


def _written(name: str, title: str, asking: Asking, made: Training) -> Arm:
    """An arm that trains on what the model writes; its size is a budget of tokens."""

    def training(tokens: int | None) -> Training:
        augment = partial(_by_model, tokens=tokens, asks_itself=made.asks_itself)
        return replace(made, augment=augment, generates=True, tokens=tokens)

    def sized(tokens: int) -> Arm:
        if tokens < 1:
            raise ProtocolError(f"arms: {name}@{tokens}: expected a budget of at least 1 token")
        return Arm(f"{name}@{tokens}", f"{title} {tokens:,} tokens", asking, training(tokens), sized=sized)

    return Arm(name, title, asking, training(None), sized=sized)


_ASKED = (
    Arm("base", "base", CLOSED_BOOK),
    Arm("icl", "ICL", IN_CONTEXT),
    _sized("rag", "RAG k={}", retrieved, (1, 4, 8), PASSAGES),
    Arm("oracle", "oracle", ORACLE),
    _sized("compacted", "compact {}x", compacted, (2, 8, 32), RATIO),
    _sized("prefix", "prefix {}", trained_prefix, PREFIX_SIZES, PREFIX_SIZES[-1]),
)
_TRAINED = (
    Arm("ft", "fine-tuned", CLOSED_BOOK, Training()),
    _written("augmented-ft", "augmented", CLOSED_BOOK, Training()),
    Arm("rules-ft", "by rule", CLOSED_BOOK, Training(_by_rule, check=_check_rules)),
    _written("repeated-ft", "repeated", Asking(ways_without_context, is_control=True), Training(is_control=True)),
    _written("distilled", "distilled", CLOSED_BOOK, Training(asks_itself=True, has_teacher=True)),
)
_BY_NAME = {arm.name: arm for arm in (*_ASKED, *_TRAINED)}
_COMBINED = ("icl", "rag")  # ways of asking that a trained arm may be put together with


def arm_named(name: str) -> Arm:
    """The arm of a name.

    Raises:
        ValueError: no arm has it.
    """
    trained, plus, asked = name.partition("+")
    arm, weights = _part(asked if plus else trained), _part(trained) if plus else None
    is_whole = weights is not None and weights.training is not None and asked.partition("@")[0] in _COMBINED
    if arm is None or (plus and not is_whole):
        raise ValueError(
            f"arms: expected some of {', '.join(ARM_NAMES)}, a trained one with +icl or +rag, or a size such as rag@8, "
            f"got {name!r}"
        )
    if weights is None:
        return arm
    return Arm(name, f"{weights.title} + {arm.title}", arm.asking, weights.training)


def _part(name: str) -> Arm | None:
    """The arm of a name without "+"; None if there is none."""
    plain, at, size = name.partition("@")
    arm = _BY_NAME.get(plain)
    if arm is None or not at:
        return arm
    return arm.sized(int(size)) if arm.sized is not None and size.isdecimal() else None


ARMS = tuple(map(arm_named, ARM_NAMES))


def expand_arms(
    names: Sequence[str], task: Task | None = None, sizes: Mapping[str, Sequence[int]] | None = None
) -> tuple[str, ...]:
    """The names with "all" and the plain names of arms in several sizes replaced by what they stand for.

    Arms that ask the same trained weights follow one another, so that these are trained once and then given up.

    Args:
        names: as arm_named() takes them, or "all": every arm that can take the task.
        task: needed for "all".
        sizes: by plain name, of an arm or of the trained one in a combination, in place of the arm's own.

    Raises:
        ValueError: an unknown arm.
    """
    found: list[str] = []
    for name in names:
        arms = ARMS if name == ALL else (arm_named(name),)
        for arm in arms:
            part, plus, asked = arm.name.partition("+")
            own = (sizes or {}).get(part, arm.sizes)
            its = [f"{part}@{size}{plus}{asked}" for size in own] or [arm.name]
            found += [one for one in its if name != ALL or task is None or _takes(one, task)]
    found = list(dict.fromkeys(found)) if ALL in names else found
    weights = [arm.name.partition("+")[0] if (arm := arm_named(name)).training is not None else name for name in found]
    return tuple(found[i] for i in sorted(range(len(found)), key=lambda i: weights.index(weights[i])))


def arms_of(settings: StudySettings, task: Task) -> tuple[str, ...]:
    """The arms that settings ask for, in their sizes; needs no model.

    Raises:
        ValueError: an unknown arm.
        UserError: an arm that cannot take the task.
    """
    names = expand_arms(settings.arms, task, sizes_of(settings))
    for name in names:
        arm_named(name).check(task)
    return names


def sizes_of(settings: StudySettings) -> dict[str, tuple[int, ...]]:
    """The sizes that settings ask for, by the plain names of the arms that have them."""
    written = [arm.name for arm in _TRAINED if arm.training is not None and arm.training.generates]
    budgets = dict.fromkeys(written, settings.synthetic_tokens) if settings.synthetic_tokens else {}
    return {"prefix": settings.prefix_tokens} | budgets


def _takes(name: str, task: Task) -> bool:
    try:
        arm_named(name).check(task)
    except ValueError:
        return False
    return True


def recorded_arm(name: str) -> Arm:
    """The arm of a name in a results file; one of another version of this package is a trained arm under its name."""
    try:
        return arm_named(name)
    except ValueError:
        return Arm(name, name, CLOSED_BOOK, Training())
