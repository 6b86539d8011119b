"""Score, augment, fine-tune and compare language models on documents: `import icl_ft_fast as iff`.

Everything in `__all__` is public and documented, and stays (docs/stability.md). Each name is imported when it is first
used: importing the package alone loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icl_ft_fast.augmentation.batches import augment as augment
    from icl_ft_fast.augmentation.strategy import Augmentation as Augmentation
    from icl_ft_fast.augmentation.strategy import Augmented as Augmented
    from icl_ft_fast.augmentation.strategy import AugmentError as AugmentError
    from icl_ft_fast.engine.compaction import CompactionError as CompactionError
    from icl_ft_fast.engine.contexts import ContextError as ContextError
    from icl_ft_fast.engine.contexts import ContextStore as ContextStore
    from icl_ft_fast.engine.contexts import load_context as load_context
    from icl_ft_fast.engine.contexts import save_context as save_context
    from icl_ft_fast.engine.generate import GenerateError as GenerateError
    from icl_ft_fast.engine.generate import Generation as Generation
    from icl_ft_fast.engine.generate import Sampling as Sampling
    from icl_ft_fast.engine.generate import generate as generate
    from icl_ft_fast.engine.kv_cache import Context as Context
    from icl_ft_fast.engine.ledger import Ledger as Ledger
    from icl_ft_fast.engine.likelihood import LogLikelihood as LogLikelihood
    from icl_ft_fast.engine.likelihood import ScoreError as ScoreError
    from icl_ft_fast.engine.likelihood import loglikelihood as loglikelihood
    from icl_ft_fast.engine.likelihood import prefill as prefill
    from icl_ft_fast.engine.loading import load as load
    from icl_ft_fast.engine.model import Model as Model
    from icl_ft_fast.engine.model import ModelError as ModelError
    from icl_ft_fast.engine.score import Score as Score
    from icl_ft_fast.engine.score import iter_scores as iter_scores
    from icl_ft_fast.engine.score import score as score
    from icl_ft_fast.finetuning.data import Example as Example
    from icl_ft_fast.finetuning.data import read_examples as read_examples
    from icl_ft_fast.finetuning.prefix import TrainedPrefix as TrainedPrefix
    from icl_ft_fast.finetuning.prefix import train_prefix as train_prefix
    from icl_ft_fast.finetuning.run import Finetuned as Finetuned
    from icl_ft_fast.finetuning.run import finetune as finetune
    from icl_ft_fast.finetuning.settings import FinetuneError as FinetuneError
    from icl_ft_fast.finetuning.settings import FinetuneSettings as FinetuneSettings
    from icl_ft_fast.finetuning.settings import LoraSettings as LoraSettings
    from icl_ft_fast.finetuning.settings import PrefixSettings as PrefixSettings
    from icl_ft_fast.finetuning.settings import RunOptions as RunOptions
    from icl_ft_fast.report.study import Study as Study
    from icl_ft_fast.runtime.errors import UserError as UserError
    from icl_ft_fast.study.compaction import CompactedContext as CompactedContext
    from icl_ft_fast.study.compaction import compact as compact
    from icl_ft_fast.study.compare import StudyOptions as StudyOptions
    from icl_ft_fast.study.compare import compare as compare
    from icl_ft_fast.study.evaluate import Accuracy as Accuracy
    from icl_ft_fast.study.evaluate import evaluate as evaluate
    from icl_ft_fast.study.prices import Prices as Prices
    from icl_ft_fast.study.prices import read_prices as read_prices
    from icl_ft_fast.study.results import Results as Results
    from icl_ft_fast.study.results import ResultsError as ResultsError
    from icl_ft_fast.study.retrieval import Bm25 as Bm25
    from icl_ft_fast.study.retrieval import Dense as Dense
    from icl_ft_fast.study.retrieval import EmbeddingEndpoint as EmbeddingEndpoint
    from icl_ft_fast.study.retrieval import RetrievalError as RetrievalError
    from icl_ft_fast.study.retrieval import StaticEmbeddings as StaticEmbeddings
    from icl_ft_fast.study.retrieval import hit_rate as hit_rate
    from icl_ft_fast.study.retrieval import retrieve as retrieve
    from icl_ft_fast.study.service import Service as Service
    from icl_ft_fast.study.settings import StudySettings as StudySettings
    from icl_ft_fast.tasks.chunks import Passage as Passage
    from icl_ft_fast.tasks.chunks import split_documents as split_documents
    from icl_ft_fast.tasks.files import TaskError as TaskError
    from icl_ft_fast.tasks.task import Document as Document
    from icl_ft_fast.tasks.task import Question as Question
    from icl_ft_fast.tasks.task import Task as Task

__version__ = "0.1.0"

# Where each public name lives. The imports above say the same to type checkers and editors; a test holds them equal.
_NAMES = {
    "augmentation.batches": "augment",
    "augmentation.strategy": "AugmentError Augmentation Augmented",
    "engine.compaction": "CompactionError",
    "engine.contexts": "ContextError ContextStore load_context save_context",
    "engine.generate": "GenerateError Generation Sampling generate",
    "engine.kv_cache": "Context",
    "engine.ledger": "Ledger",
    "engine.loading": "load",
    "engine.model": "Model ModelError",
    "engine.likelihood": "LogLikelihood ScoreError loglikelihood prefill",
    "engine.score": "Score iter_scores score",
    "finetuning.data": "Example read_examples",
    "finetuning.prefix": "TrainedPrefix train_prefix",
    "finetuning.run": "Finetuned finetune",
    "finetuning.settings": "FinetuneError FinetuneSettings LoraSettings PrefixSettings RunOptions",
    "report.study": "Study",
    "runtime.errors": "UserError",
    "study.compaction": "CompactedContext compact",
    "study.compare": "StudyOptions compare",
    "study.evaluate": "Accuracy evaluate",
    "study.prices": "Prices read_prices",
    "study.results": "Results ResultsError",
    "study.retrieval": "Bm25 Dense EmbeddingEndpoint RetrievalError StaticEmbeddings hit_rate retrieve",
    "study.service": "Service",
    "study.settings": "StudySettings",
    "tasks.chunks": "Passage split_documents",
    "tasks.files": "TaskError",
    "tasks.task": "Document Question Task",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # type checkers would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"icl_ft_fast.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
