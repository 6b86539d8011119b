"""Fine-tuning through the same trie forward and target_logprob as scoring: `finetune()` and what it takes.

settings: what can be set. data: rows and texts to tokens with a mask. batches: the order of examples, and a batch as
one tree. optimizer: AdamW on float32 weights. lora, distillation, distributed: adapters, a teacher with documents in
context, many processes. checkpoint, trackers: files, and metrics elsewhere. loop: the training itself.
"""

from icl_ft_fast.finetune.data import Example, read_examples, split_validation
from icl_ft_fast.finetune.loop import Finetuned, InterruptedRunError, finetune
from icl_ft_fast.finetune.settings import FinetuneError, FinetuneSettings, LoraSettings

__all__ = [
    "Example",
    "FinetuneError",
    "FinetuneSettings",
    "Finetuned",
    "InterruptedRunError",
    "LoraSettings",
    "finetune",
    "read_examples",
    "split_validation",
]
