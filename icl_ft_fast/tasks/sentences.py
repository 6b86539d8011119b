"""Where sentences and words are, in scripts with and without spaces.

Sentences are found by sentencex (Wikimedia's segmenter: rules and abbreviations by language, no model).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SPLITTINGS = ("none", "independent", "cumulative")
_BREAK = re.compile(r"\s*\n\s*")
# Characters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, Han.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"[{UNSPACED}]")
_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
UNSPACED_PER_WORD = 2  # characters, on average
# The language of a script, the first whose characters a text has; of Latin script the one of most of its little words.
_SCRIPTS = (
    ("ja", re.compile("[\u3041-\u30ff]")),
    ("zh", re.compile("[\u3400-\u9fff]")),
    ("ko", re.compile("[\uac00-\ud7af]")),
    ("hi", re.compile("[\u0900-\u097f]")),
    ("bn", re.compile("[\u0980-\u09ff]")),
    ("th", re.compile("[\u0e00-\u0e7f]")),
    ("my", re.compile("[\u1000-\u109f]")),
    ("am", re.compile("[\u1200-\u137f]")),
    ("hy", re.compile("[\u0530-\u058f]")),
    ("ar", re.compile("[\u0600-\u06ff]")),
    ("el", re.compile("[\u0370-\u03ff]")),
    ("ru", re.compile("[\u0400-\u04ff]")),
)
_LITTLE_WORDS = {
    "en": "the of and to is was that with for are",
    "de": "der die das und ist nicht ein eine mit den von zu",
    "fr": "le la les des et est une dans pour que du",
    "es": "el los las una por con para del y es",
    "it": "il lo gli di che una per non con del",
    "pt": "o os as um uma para com do da não",
    "nl": "het een van en niet dat op zijn voor met",
}
_LANGUAGES = {
    word: [name for name, words in _LITTLE_WORDS.items() if word in words.split()]
    for words in _LITTLE_WORDS.values()
    for word in words.split()
}


def split_sentences(text: str, splitting: str) -> list[str]:
    """The examples that a text makes under one of SPLITTINGS; a line's end ends a sentence too."""
    if splitting == "none":
        return [text]
    parts = [(start, end) for start, end in _spans(text) if text[start:end].strip()]
    return [text[0 if splitting == "cumulative" else start : end] for start, end in parts] or [text]


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Where each sentence begins and ends, without the space after it."""
    from sentencex import segment

    language = language_of(text)
    starts, ends = [0], []
    for match in _BREAK.finditer(text):
        ends.append(match.start())
        starts.append(match.end())
    ends.append(len(text))
    for first, last in zip(starts, ends, strict=True):
        place = first
        for sentence in segment(language, text[first:last]):
            found = text.find(sentence, place, last)
            if found < 0:  # the segmenter changed the text: keep it whole
                break
            yield found, found + len(sentence.rstrip())
            place = found + len(sentence)
        if text[place:last].strip():
            yield place, last


def language_of(text: str) -> str:
    """The code of the language whose rules a text's sentences are found by; English where nothing else is likelier."""
    sample = text[:4000]
    for name, script in _SCRIPTS:
        if script.search(sample):
            return name
    votes = dict.fromkeys(_LITTLE_WORDS, 0)
    for word in re.findall(r"\w+", sample.casefold()):
        for name in _LANGUAGES.get(word, ()):
            votes[name] += 1
    return max(votes, key=lambda name: votes[name])


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; of a script without spaces each character."""
    return _WORD.findall(text.casefold())


def count_words(text: str) -> int:
    """How many words a text has: runs between spaces, and a word for every two characters of a script without."""
    unspaced = len(_UNSPACED.findall(text))
    return len(_UNSPACED.sub(" ", text).split()) + -(-unspaced // UNSPACED_PER_WORD) if unspaced else len(text.split())
