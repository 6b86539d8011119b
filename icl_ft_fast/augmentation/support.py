"""Whether a row follows from its sources, as far as its names, its numbers and the model can tell.

Two questions a row. Do its names and numbers stand in its sources? Does the model, shown these, find it likelier than
with its key words exchanged? Neither shows that it is true: docs/augment.md has what was found by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise

from icl_ft_fast.augmentation.strategy import Augmentation
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.tasks.sentences import split_sentences
from icl_ft_fast.tasks.task import Document

EXCHANGES = 8  # of a row, at most
LEAST_LETTERS = 4  # of a word that is neither name nor number and may be exchanged
_WORD = re.compile(r"[^\W\d_]+|\d+(?:[.,:]\d+)*")
_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_NUMBERS = {word: str(n) for n, word in enumerate(_UNITS)}
_NUMBERS |= {"seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20", "thirty": "30", "forty": "40"}
_NUMBERS |= {"fifty": "50", "sixty": "60", "seventy": "70", "eighty": "80", "ninety": "90"}
_NUMBERS.pop("one")  # mostly a pronoun


def supported(
    model: Model, rows: Sequence[Augmentation], documents: Sequence[Document], ledger: Ledger | None = None
) -> tuple[list[Augmentation], dict[str, int]]:
    """Rows whose names and numbers stand in their sources, and that the model finds likelier than with words exchanged.

    A row passes if logp(row | sources) > logp(exchanged | sources) for each of its exchanges, see exchanged(). A row
    that has none says nothing of its sources and does not pass.

    Args:
        model: scores the rows and their exchanges, behind the sources as plain text.
        rows: to filter; origin["source_ids"] names their sources.
        documents: of the task; what is a name is learned from them.
        ledger: counts the work.

    Returns:
        The rows that pass, and how many each question dropped.
    """
    texts = {document.id: document.text for document in documents}
    names = names_of(texts.values())
    sources = [[texts[name] for name in row.origin["source_ids"]] for row in rows]
    known = [not unknown(row.text, "\n".join(own), names) for row, own in zip(rows, sources, strict=True)]
    pairs, counts = [], []
    for row, own, is_known in zip(rows, sources, known, strict=True):
        others = list(islice(exchanged(row.text, "\n".join(own), names), EXCHANGES)) if is_known else []
        context = icl_context([Document("", text) for text in own])
        pairs += [(context, text) for text in ((row.text, *others) if others else ())]
        counts.append(len(others))
    logp = iter([result.logp for result in loglikelihood(model, pairs, ledger=ledger)])
    kept = []
    for row, count in zip(rows, counts, strict=True):
        if count and next(logp) > max(list(islice(logp, count))):
            kept.append(row)
    return kept, {"unknown_names_or_numbers": known.count(False), "unsupported": sum(known) - len(kept)}


def names_of(texts: Iterable[str]) -> set[str]:
    """Words that the texts write with a capital and never without."""
    words = {word for text in texts for word in _WORD.findall(text)}
    return {word for word in words if word[0].isupper() and word.casefold() not in words}


def unknown(text: str, source: str, names: set[str]) -> list[str]:
    """Names and numbers of a text that do not stand in its source; a sentence's first word is a name if `names` has it.

    Numbers are compared by value: thirty is 30.
    """
    told = {_key(word) for word in _WORD.findall(source)}
    return [word for word in _names(text, names) + _numbers(text) if _key(word) not in told]


def exchanged(text: str, source: str, names: set[str]) -> Iterator[str]:
    """The text with one key word replaced by another of its source; if it has both, they trade places.

    Key words are names and numbers, each replaced by its like. Where that gives nothing, two neighbours among the other
    words that the source has too, of at least four letters, trade places.
    """
    made = dict.fromkeys([text])
    for mine, its in ((_names(text, names), _names(source, names)), (_numbers(text), _numbers(source))):
        told = {_key(word) for word in its}
        for one in dict.fromkeys(word for word in mine if _key(word) in told):
            made |= dict.fromkeys(
                _exchange(text, one, other) for other in dict.fromkeys(its) if _key(other) != _key(one)
            )
    if len(made) == 1:
        told = {word for word in _WORD.findall(source) if word[0].islower() and len(word) >= LEAST_LETTERS}
        plain = dict.fromkeys(word for word in _WORD.findall(text) if word in told)
        made |= dict.fromkeys(_exchange(text, one, other) for one, other in pairwise(plain))
    yield from islice(made, 1, None)


def _names(text: str, names: set[str]) -> list[str]:
    found = []
    for sentence in split_sentences(text, "independent"):
        words = _WORD.findall(sentence)
        found += [word for w, word in enumerate(words) if word in names or (w and len(word) > 1 and word[0].isupper())]
    return found


def _numbers(text: str) -> list[str]:
    return [word for word in _WORD.findall(text) if word[0].isdigit() or word.casefold() in _NUMBERS]


def _key(word: str) -> str:
    return _NUMBERS.get(word.casefold(), word.casefold())


def _exchange(text: str, one: str, other: str) -> str:
    trade = {one: other, other: one}
    return _WORD.sub(lambda match: trade.get(match[0], match[0]), text)
