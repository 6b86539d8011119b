"""What a study compares and how: everything here decides its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings, PrefixSettings

# Of arms.ARMS, for help without torch.
ARM_NAMES = (
    *("base", "icl", "rag", "oracle", "compacted", "prefix"),
    *("ft", "ft+icl", "ft+rag", "augmented-ft", "augmented-ft+icl", "augmented-ft+rag", "rules-ft", "repeated-ft"),
    "distilled",
)
FAMILIES = ("trained", "all")  # pairs of arms that are tested together: see paired.family_of()
SELF_ASK = "self-ask"  # the strategy of questions that a model asks itself
DEFAULT_ARMS = ("base", "icl", "ft", "augmented-ft")
NORMALIZATIONS = ("sum", "token", "character", "byte", "pmi")
RETRIEVERS = ("bm25", "dense")
CHECKPOINT_S = 600.0  # between checkpoints of an arm in training
PREFIX_SIZES = (16, 64)  # that the arm "prefix" stands for
TOLERANCE = 2.0  # percentage points of accuracy that may be lost
MEASURE_S = 30.0  # of measuring what a query costs
LORA_FROM = 100_000_000  # parameters from which on adapters are trained unless all weights are asked for

# Settings of training that an arm may have of its own.
OWN = ("steps", "batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "splitting")


@dataclass(frozen=True)
class StudySettings:
    """What to compare and how.

    Attributes:
        arms: names of arms, see arms.ARMS.
        seeds: every arm runs once under each; a generated task is generated anew for each seed.
        icl_per_topic: documents of each topic in the context; None for all.
        icl_subsample: of those, one in this many.
        icl_tokens: of those, the ones that fit into so many tokens; None if all must fit.
        normalization: what the choices' log-likelihoods are divided by, one of NORMALIZATIONS.
        template: the prompt around documents and question, see prompt_context(); augmentation asks with chat prompts
            unless it is "base" or the tokenizer has no chat template.
        template_date: YYYY-MM-DD, what a chat template that writes the date writes; None is the day the study began.
        chat_template_kwargs: arguments of the chat template, such as enable_thinking; None gives none.
        special_tokens: "text" or "keep", what control tokens are that documents or questions spell, see load().
        strategy: how the model augments documents, see augmentation.
        samples: answers about each document, in strategies that sample.
        generator: model that writes the augmentations, as load() takes it; "" for the model itself.
        generator_url: OpenAI-compatible chat server where `generator` is the model's name; "" to load it here.
        questions: the strategy that writes the questions of `mix` and of the distilled arm; "" is "self-ask" for a
            generator that is asked as a chat, else `strategy`.
        mix: (questions, documents), the parts of each in the synthetic tokens of augmented arms; None for what
            `strategy` writes alone.
        replay: the model's own general text, as a fraction of all tokens that an arm is trained on.
        synthetic_tokens: budgets; arms that train on what the model writes run once with each.
        general: a general task to measure harm on, "shipped" or a folder with questions.jsonl; "" measures no harm.
        retriever: how passages are found, "bm25" or "dense" (embeddings).
        embedding_url: the OpenAI-compatible server of "dense"; "" for a static model in a folder.
        embedding_model: its name there, or that folder.
        finetune: steps, batch size, learning rate and the rest of the training.
        use_peft: train LoRA adapters; False trains all weights, None does so below LORA_FROM parameters.
        arm_training: by name of an arm that trains, with or without its size: settings of its own out of OWN, in place
            of those in `finetune`.
        eval_steps: training steps after which the questions are answered, for accuracy by step; None for the end alone.
        prefix_tokens: sizes that the arm "prefix" stands for.
        prefix: conversations, steps and learning rate of a trained prefix.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    icl_per_topic: int | None = None
    icl_subsample: int = 1
    icl_tokens: int | None = None
    normalization: str = "sum"
    template: str = "auto"
    template_date: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    special_tokens: str = "text"
    strategy: str = "local"
    samples: int = 1
    generator: str = ""
    generator_url: str = ""
    questions: str = ""
    mix: tuple[int, int] | None = None
    replay: float = 0.0
    synthetic_tokens: tuple[int, ...] = ()
    general: str = ""
    retriever: str = "bm25"
    embedding_url: str = ""
    embedding_model: str = ""
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    use_peft: bool | None = None
    arm_training: Mapping[str, Mapping[str, Any]] | None = None
    eval_steps: int | None = None
    prefix_tokens: tuple[int, ...] = PREFIX_SIZES
    prefix: PrefixSettings = field(default_factory=PrefixSettings)

    def own_training(self, arm: str) -> dict[str, Any]:
        """The settings of training that an arm has of its own; arms that ask the same weights have the same."""
        sized, given = arm.partition("+")[0], self.arm_training or {}
        return dict(given.get(sized.partition("@")[0], {})) | dict(given.get(sized, {}))

    def training_of(self, arm: str) -> FinetuneSettings:
        """How an arm is trained.

        Raises:
            FinetuneError: an own setting that is none of OWN, of another type, or out of range.
        """
        own = self.own_training(arm)
        for name, value in own.items():
            if name not in OWN:
                raise FinetuneError(f"{arm}: {name}: expected one of {', '.join(OWN)}")
            kind = type(getattr(self.finetune, name))
            if type(value) not in ((int, float) if kind is float else (kind,)):
                raise FinetuneError(f"{arm}: {name}: expected {kind.__name__}, got {value!r}")
        return replace(self.finetune, **own)
