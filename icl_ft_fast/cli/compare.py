"""`icl-ft-fast compare` and `icl-ft-fast demo`: arms x seeds on a task."""

from __future__ import annotations

from pathlib import Path

from icl_ft_fast.augmentation.strategies import BY_MODEL
from icl_ft_fast.cli.finetune import add_training_options
from icl_ft_fast.cli.options import (
    OUTPUT,
    Commands,
    Parser,
    add_executor_options,
    add_json_option,
    add_memory_options,
    add_model_options,
    add_output_options,
    add_store_options,
    add_template_arguments_option,
    add_template_option,
    amount,
    amount_or_0,
    between,
    command,
    day,
    json_object,
    later,
    place,
    positive,
    seed,
)
from icl_ft_fast.cli.task import add_task_options
from icl_ft_fast.engine.defaults import SHIPPED
from icl_ft_fast.finetuning.settings import MOST_RATE, SCHEDULES, FinetuneSettings, PrefixSettings
from icl_ft_fast.study.settings import (
    ARM_NAMES,
    CHECKPOINT_S,
    DEFAULT_ARMS,
    FAMILIES,
    LORA_FROM,
    MEASURE_S,
    NORMALIZATIONS,
    OWN,
    PREFIX_SIZES,
    RETRIEVERS,
    SELF_ASK,
    TOLERANCE,
)
from icl_ft_fast.tasks.sentences import SPLITTINGS

ALL = "all"
# Of `finetune`'s options, those that a study takes under the same names.
IN_A_STUDY = (
    *("warmup_steps", "weight_decay", "gradient_accumulation_steps", "gradient_checkpointing", "optim"),
    *("bf16", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora"),
)


DEMO_FACTS = 40


def add(commands: Commands) -> None:
    """Add both commands."""
    demo = command(
        commands,
        "demo",
        later("compare", "run_demo"),
        "run the whole comparison on the shipped model",
        "icl-ft-fast demo",
    )
    demo.group("data").add_argument("--facts", type=positive, default=DEMO_FACTS, metavar="N", help="number of facts")
    _add_comparison_options(
        demo, arms=",".join((*DEFAULT_ARMS, "rules-ft", "rag@4")), seeds="0,1,2", out=Path("out/demo")
    )
    demo.set_defaults(model=SHIPPED, dtype="float32", device="cpu", task="simple-reversals", preset="small", data=None)
    demo.set_defaults(task_seed=None, exclude_words=(), executor="in-process", workers=None, ray_address=None)

    comparison = command(
        commands,
        "compare",
        later("compare", "run_compare"),
        "compare in-context learning and fine-tuning on a task: accuracy, cost, break-even",
        "icl-ft-fast compare --model shipped --task simple-reversals --preset small --out out/run1\n"
        "icl-ft-fast compare --model shipped --task all --preset small --out out/all\n"
        "icl-ft-fast compare --model DIR --task my_task_folder --arms base,icl,ft --seeds 0 --out out/run2\n"
        "icl-ft-fast compare --model DIR --task my_task_folder --queries-per-day 1000 --days 30 --prices prices.json\n"
        "icl-ft-fast compare --executor torchrun --workers 2 --model DIR --task my_task_folder --seeds 0,1,2",
    )
    add_model_options(comparison)
    add_task_options(comparison, more=f"; {ALL} for every one of them that is made from a seed")
    comparison.group("data").add_argument(
        "--task-seed",
        type=seed,
        metavar="SEED",
        help="generate the task from this seed only; --seeds then vary the documents' order and the training (default: "
        "a task per seed)",
    )
    _add_comparison_options(comparison, arms=None, seeds="0", out=Path("out/compare"))
    add_memory_options(comparison)
    add_executor_options(comparison)


def _add_comparison_options(parser: Parser, *, arms: str | None, seeds: str, out: Path | None) -> None:
    defaults = FinetuneSettings()
    study = parser.group("study")
    usual = arms or f"the preset's, or {','.join(DEFAULT_ARMS)}"
    study.add_argument(
        "--arms", default=arms, help=f"ways of answering, comma-separated, of {','.join(ARM_NAMES)} (default: {usual})"
    )
    study.add_argument("--seeds", default=seeds, help="comma-separated random seeds")
    help = "how choices' log-likelihoods are compared"
    study.add_argument("--normalization", choices=NORMALIZATIONS, default="sum", help=help)
    add_template_option(study, files=True)
    help = "day that a chat template writes as today's (default: the day the study began)"
    study.add_argument("--template-date", type=day, metavar="YYYY-MM-DD", help=help)
    add_template_arguments_option(study)
    context = parser.group("in-context learning")
    help = "documents per topic in the context (default: the preset's, or all)"
    context.add_argument("--icl-per-topic", type=positive, metavar="N", help=help)
    help = "put one in K of those documents into the context, at random (default: the preset's, or 1)"
    context.add_argument("--icl-subsample", type=positive, metavar="K", help=help)
    help = "context limit; documents beyond it are left out and counted (default: all documents must fit)"
    context.add_argument("--icl-tokens", type=positive, metavar="N", help=help)
    help = "task to measure harm elsewhere on: shipped (100 general questions) or a folder with questions.jsonl"
    help = f"{help} (default: harm is not measured)"
    study.add_argument("--general", type=place, default="", metavar="FOLDER", help=help)
    retrieval = parser.group("retrieval")
    help = "how passages are found: bm25 (words) or dense (embeddings)"
    retrieval.add_argument("--retriever", choices=RETRIEVERS, default=RETRIEVERS[0], help=help)
    help = "embedding model for --retriever dense: a folder with a static one (model2vec), or a name at --embedding-url"
    retrieval.add_argument("--embedding-model", default="", metavar="MODEL", help=help)
    help = "OpenAI-compatible embeddings server for --retriever dense; OPENAI_API_KEY holds its key"
    retrieval.add_argument("--embedding-url", default="", metavar="URL", help=help)
    training = parser.group("fine-tuning")
    help = f"training steps (default: the preset's, or {defaults.steps})"
    training.add_argument("--steps", type=positive, metavar="N", help=help)
    help = "examples per training step"
    training.add_argument("--train-batch-size", type=positive, default=defaults.batch_size, metavar="N", help=help)
    help = f"peak learning rate (default: the preset's, or {defaults.learning_rate})"
    training.add_argument("--learning-rate", type=between(0, MOST_RATE, above=True), metavar="RATE", help=help)
    help = f"learning rate schedule (default: the preset's, or {defaults.lr_scheduler_type})"
    training.add_argument("--lr-scheduler-type", choices=SCHEDULES, help=help)
    help = "how documents are split into training examples (default: the preset's, or none)"
    training.add_argument("--splitting", choices=SPLITTINGS, help=help)
    help = f"train LoRA adapters instead of all weights (default: true from {LORA_FROM:,} parameters on)"
    training.add_argument("--use_peft", nargs="?", const="true", choices=("true", "false"), metavar="BOOL", help=help)
    add_training_options(training, IN_A_STUDY)
    help = 'settings of an arm\'s own in place of these as JSON, such as \'{"augmented-ft": {"steps": 900}}\', out of '
    help = f"{help}{', '.join(OWN)}"
    training.add_argument("--arm-training", type=json_object, default={}, metavar="JSON", help=help)
    help = "training steps after which the questions are answered, for accuracy by step (default: at the end only)"
    training.add_argument("--eval-steps", type=positive, metavar="N", help=help)
    help = "time between checkpoints in --out"
    minutes = CHECKPOINT_S / 60
    training.add_argument("--checkpoint-minutes", type=amount_or_0, default=minutes, metavar="MINUTES", help=help)
    add_prefix_options(parser)
    augmentation = parser.group("augmentation")
    help = "how statements are generated (default: the preset's, or local)"
    augmentation.add_argument("--strategy", choices=BY_MODEL, help=help)
    help = "model that writes the statements: a checkpoint folder or hub id, or its name at --generator-url (default: "
    augmentation.add_argument("--generator", default="", metavar="NAME", help=f"{help}the model itself)")
    help = "OpenAI-compatible chat server of --generator; OPENAI_API_KEY holds its key"
    augmentation.add_argument("--generator-url", default="", metavar="URL", help=help)
    help = "replies per document in strategies that sample (default: the preset's, or 1)"
    augmentation.add_argument("--samples", type=positive, metavar="N", help=help)
    help = "tokens that the model writes for an arm to train on; with several budgets arms run once with each"
    augmentation.add_argument("--synthetic-tokens", metavar="N[,N...]", help=f"{help} (default: --samples decide)")
    help = "questions and what --strategy writes, in parts of the synthetic tokens, such as 1:1 (default: no questions)"
    augmentation.add_argument("--mix", metavar="QUESTIONS:DOCUMENTS", help=help)
    help = "strategy of the questions of --mix and of the arm distilled"
    more = f"{SELF_ASK} for a model with a chat template, else --strategy"
    augmentation.add_argument("--questions", choices=BY_MODEL, default="", help=f"{help} (default: {more})")
    help = "the model's own general text, as a fraction of the tokens to train on, such as 0.1, against forgetting"
    augmentation.add_argument("--replay", type=float, default=0.0, metavar="FRACTION", help=help)
    parser.group(OUTPUT).add_argument(
        "--out",
        type=Path,
        default=out,
        metavar="DIR",
        help="folder for results.json and finished work, from which the same command resumes, see docs/durability.md",
    )
    help = "folder that each arm's trained weights or adapter are left in, as DIR/ARM-seedN (default: none are)"
    parser.group(OUTPUT).add_argument("--keep-models", type=Path, metavar="DIR", help=help)
    add_output_options(parser)
    add_decision_options(parser)
    help = "time limit for measuring query costs"
    seconds = parser.group("cost and decision")
    seconds.add_argument("--measure-seconds", type=amount, default=MEASURE_S, metavar="SECONDS", help=help)
    help = "plan only: tokens, FLOPs, seconds, disk, break-even of each arm, after 20 s of trials at most; no arm runs"
    seconds.add_argument("--dry-run", action="store_true", help=help)
    add_store_options(parser)
    add_json_option(parser)


def add_prefix_options(parser: Parser) -> None:
    """How a prefix is trained."""
    group, defaults = parser.group("trained prefix"), PrefixSettings()
    help = "key/value slots that stand for the documents; several sizes are trained one after the other"
    sizes = ",".join(map(str, PREFIX_SIZES))
    group.add_argument("--prefix-tokens", default=sizes, metavar="P[,P...]", help=help)
    help = "conversations about the documents that the model writes to train the prefix on"
    group.add_argument("--conversations", type=positive, default=defaults.conversations, metavar="N", help=help)
    help = "most tokens of documents that one conversation is about; a longer document stands alone"
    default = "(default: 512, or 128 for a chat model below 1e9 parameters)"
    group.add_argument("--part-tokens", type=positive, metavar="N", help=f"{help} {default}")
    help = "training steps of the prefix"
    group.add_argument("--prefix-steps", type=positive, default=defaults.steps, metavar="N", help=help)
    help = "peak learning rate of the prefix"
    group.add_argument(
        "--prefix-rate",
        type=between(0, MOST_RATE, above=True),
        default=defaults.learning_rate,
        metavar="RATE",
        help=help,
    )


def add_decision_options(parser: Parser) -> None:
    """What decision() and study_settings() read."""
    cost = parser.group("cost and decision")
    cost.add_argument("--queries-per-day", type=amount, metavar="N", help="recommend an arm for this volume")
    cost.add_argument("--days", type=amount, default=30.0, help="duration of the service")
    help = "times a month that the documents change, after each of which every setup and reading is paid anew"
    cost.add_argument("--changes-per-month", type=amount_or_0, default=0.0, metavar="N", help=help)
    help = "cost of one wrong answer in the currency of --prices; accuracy then has its price, and no tolerance is used"
    cost.add_argument("--cost-of-wrong", type=amount_or_0, metavar="COST", help=f"{help} (default: none)")
    help = "tokens of a query's answer: compare measures their decoding, hosted models bill them as output"
    cost.add_argument("--answer-tokens", type=positive, default=0, metavar="N", help=f"{help} (default: not counted)")
    help = "queries that come at once, for latencies; the nearest measured batch is taken"
    cost.add_argument("--concurrency", type=positive, default=1, metavar="N", help=help)
    help = "seconds within which 95%% of queries must be answered by a recommended way"
    cost.add_argument("--max-latency", type=amount, metavar="SECONDS", help=f"{help} (default: any)")
    help = "fraction of queries of each split, such as reversal=0.5,trained=0.5"
    cost.add_argument("--weights", metavar="SPLIT=WEIGHT,...", help=f"{help} (default: as many as questions)")
    help = "the same as --weights, from a JSON file with an object of splits and weights"
    cost.add_argument("--weights-file", type=Path, metavar="FILE", help=help)
    help = "price file for a decision by cost, see docs/cost.md (default: decide by seconds)"
    cost.add_argument("--prices", type=Path, metavar="FILE", help=help)
    help = "accuracy that may be lost against the best arm, or against ICL, in percentage points"
    cost.add_argument("--tolerance", type=between(0, 100), default=TOLERANCE, metavar="POINTS", help=help)
    help = "pairs of arms that are tested together: trained arms against ICL and plain fine-tuning, or every two arms"
    cost.add_argument("--family", choices=FAMILIES, default="trained", help=help)
    help = "accuracy on the general task (see --general) that a recommended arm may lose, in percentage points"
    cost.add_argument("--max-harm", type=amount_or_0, metavar="POINTS", help=f"{help} (default: any)")
    help = "queries answered before a cached context expires (default: --queries-per-day, or no limit)"
    cost.add_argument("--queries-per-cache-lifetime", type=amount, metavar="N", help=help)
    help = "queries scored in one batch"
    cost.add_argument("--batch-size", type=positive, default=1, metavar="N", help=help)
