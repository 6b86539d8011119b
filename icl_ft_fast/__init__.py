"""In-context learning, fine-tuning or augmented fine-tuning: scored exactly, through one prefix trie."""

from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model, ModelError, load
from icl_ft_fast.engine.score import LogLikelihood, Score, ScoreError, iter_scores, loglikelihood, score
from icl_ft_fast.tasks.task import Document, Question, Task, TaskError

__version__ = "0.1.0"
__all__ = [
    "Document",
    "Ledger",
    "LogLikelihood",
    "Model",
    "ModelError",
    "Question",
    "Score",
    "ScoreError",
    "Task",
    "TaskError",
    "iter_scores",
    "load",
    "loglikelihood",
    "score",
]
