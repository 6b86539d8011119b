"""Fine-tuning through the prefix tree and head that also score: `finetune()` and the types it takes.

settings: what can be set. data: files and texts to token ids with a loss mask. batches: the order of examples, and a
batch as one prefix tree. run: the run itself, from preparing to finishing. network: what is trained, and its loss.
optimizer: AdamW on float32 weights. lora: adapters. distillation: a teacher with documents in context. distributed:
several processes. checkpoint, trackers: files, and metrics elsewhere.
"""

from icl_ft_fast.finetuning.data import Example, read_examples, split_validation
from icl_ft_fast.finetuning.run import Finetuned, InterruptedRunError, finetune
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings, LoraSettings, RunOptions

__all__ = [
    "Example",
    "FinetuneError",
    "FinetuneSettings",
    "Finetuned",
    "InterruptedRunError",
    "LoraSettings",
    "RunOptions",
    "finetune",
    "read_examples",
    "split_validation",
]
