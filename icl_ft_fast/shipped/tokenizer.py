"""The shipped model's tokenizer: one token for a known English word, two for a nonsense word, bytes for the rest.

A byte-level unigram model with fixed scores, so that a known word is always one token, a nonsense word always two (a
held-out one its opening and its close), and any other UTF-8 text is encoded without loss. A space is put before the
text, so that a word is the same token wherever it stands on a line; a text that begins with one loses it.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.strategies import local
from icl_ft_fast.engine.prompting import ICL_TEMPLATE
from icl_ft_fast.tasks import semantic, syllogisms
from icl_ft_fast.tasks.comparisons import FEATURES, PREAMBLES
from icl_ft_fast.tasks.words import CLOSES, OPENINGS

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
STRATEGIES = ("local", "document", "global", "self-qa")  # whose prompts the vocabulary holds

# English beyond the templates, so that later statements (classes, relations, questions) need no new vocabulary.
_MORE_ENGLISH = """
a all also an and any are as at be because both but by called can cannot each every false for found from given has
have how if in include is it its kind kinds know less more most never no none nor not of on one only or other same so
some such than that the their them then there therefore these they thing things this those to true type types was
were what when where which who why will with yes Answer Question
""".split()


def english_words() -> list[str]:
    """Every English word that the corpus writes, each once, in a fixed order."""
    texts = [ICL_TEMPLATE, "than Compared with", " ".join(local.LABELS), *PREAMBLES]
    texts += [comparative for pair in FEATURES for comparative in pair]
    texts += [Prompting.of(strategy).source for strategy in STRATEGIES]
    texts += [syllogisms.opening(("", "")), *syllogisms.QUANTIFIERS.values()]
    texts += [wording for wordings in semantic.TOLD.values() for wording in wordings]
    for asked in (semantic.ASKED, semantic.PLAIN, semantic.REPHRASED, semantic.REVERSED):
        texts += asked.values()
    texts += [style("", []) for style in semantic.STYLES] + _MORE_ENGLISH
    spoken = re.sub(r"\{[^{}]*\}", " ", " ".join(texts))  # without the templates' fields
    return list(dict.fromkeys(re.findall(r"[A-Za-z]+", spoken)))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, from nothing but this project's own word lists."""
    space = "\u0120"  # how byte-level pieces write a leading space
    pieces: dict[str, float] = {END_OF_TEXT: 0.0, PADDING: 0.0}
    for word in english_words():
        pieces.setdefault(word, -1.0)
        pieces.setdefault(space + word, -1.0)
    for opening in OPENINGS:
        pieces.setdefault(opening, -2.0)
        pieces.setdefault(space + opening, -2.0)
    for close in CLOSES:
        pieces.setdefault(close, -2.5)
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        pieces.setdefault(byte, -20.0)
    pieces.setdefault("\u010a\u010a", -2.0)  # a blank line
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([END_OF_TEXT, PADDING])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )
