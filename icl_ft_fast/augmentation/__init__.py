"""Augmentation: statements that follow from the documents, written by a model or by rule.

strategies (what is asked for, and how replies become rows) -> prompts -> generators -> store; run ties them for the
command, batches for a study; steps filters rows.
"""

from icl_ft_fast.augmentation.batches import PromptBatch, augment, augment_by_model, augment_by_rule, prompt_batches
from icl_ft_fast.augmentation.strategy import Augmentation, Augmented, AugmentError, Strategy

__all__ = [
    "AugmentError",
    "Augmentation",
    "Augmented",
    "PromptBatch",
    "Strategy",
    "augment",
    "augment_by_model",
    "augment_by_rule",
    "prompt_batches",
]
