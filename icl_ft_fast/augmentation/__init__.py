"""Augmentation: statements that follow from the documents, written by a model or by rule.

prompts -> generators -> store (run ties them) -> steps; rules needs no model. Strategies: local (a sentence), document,
global (a document with the others in context), self-qa, rules, reverse.
"""

from icl_ft_fast.augmentation.prompts import AugmentError
from icl_ft_fast.augmentation.rules import augment_reverse, augment_rules
from icl_ft_fast.augmentation.run import Part, augment_by_model, parts_of
from icl_ft_fast.augmentation.steps import Augmentation, Augmented

__all__ = [
    "AugmentError",
    "Augmentation",
    "Augmented",
    "Part",
    "augment_by_model",
    "augment_reverse",
    "augment_rules",
    "parts_of",
]
