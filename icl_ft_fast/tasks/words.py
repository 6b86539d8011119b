"""Pronounceable nonsense nouns of four or five letters: an opening (onset and vowel) and a close.

The space of words is split once and for all by a checksum: one word in eight is held out. Tasks draw from the
held-out words and the shipped model trains on the others, so no test word is ever in its training text. Knows
nothing of tokenizers, models or data sets.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Container

_ONSETS = "b d f g h j k l m n p r s t v w y z bl br cl dr fl gl gr pl sk sn sp st tr".split()
_VOWELS = "aeiou"
_CLOSING_ONSETS = "bdfgklmnprstvwxz"
_CODAS = "mp ff nk rt sk lm nd st lt rn ll ss".split()

OPENINGS = tuple(onset + vowel for onset in _ONSETS for vowel in _VOWELS)
CLOSES = tuple(onset + vowel for onset in _CLOSING_ONSETS for vowel in _VOWELS) + tuple(_CODAS)
HELD_OUT_FRACTION = 1 / 8

# What the pieces also spell and is never drawn: words of the templates' English, and words nobody wants in a table.
NOT_NONSENSE = frozenset(
    "have kind less more most none note rule same some were will "
    "dago homo kike nazi niga paki piss pube puss puta rape wank".split()
)


def is_held_out(word: str) -> bool:
    """Whether `word` is kept for tasks and out of the shipped model's training text."""
    return zlib.crc32(word.encode()) % round(1 / HELD_OUT_FRACTION) == 0


def sample_word(rng: random.Random, *, held_out: bool) -> str:
    """One word of the held-out part or of the training part, uniformly."""
    while True:
        word = rng.choice(OPENINGS) + rng.choice(CLOSES)
        if is_held_out(word) == held_out and word not in NOT_NONSENSE:
            return word


def sample_words(rng: random.Random, count: int, *, held_out: bool = True, exclude: Container[str] = ()) -> list[str]:
    """`count` distinct words, none of them in `exclude`.

    Raises:
        ValueError: more words than a quarter of the space has (the draw would take long or never end).
    """
    limit = int(len(OPENINGS) * len(CLOSES) * (HELD_OUT_FRACTION if held_out else 1 - HELD_OUT_FRACTION) / 4)
    if count > limit:
        raise ValueError(f"count: at most {limit} distinct nonsense words can be drawn, got {count}")
    words: dict[str, None] = {}
    while len(words) < count:
        word = sample_word(rng, held_out=held_out)
        if word not in exclude:
            words[word] = None
    return list(words)
