"""Retrieval: the passages of the documents that belong to a question, by words (BM25) or by embeddings.

    passages = split_documents(task.documents)
    found = retrieve(Bm25([passage.text for passage in passages]), [question.prompt for question in questions], 4)

Knows no model of the study's: what is done with the passages is the arms' business.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.tasks.chunks import Passage
from icl_ft_fast.tasks.task import Question, Task

# What the client raises of a page with status 200, of another schema, or of numbers that are none.
WRONG = (ValueError, TypeError, AttributeError, RecursionError, OverflowError)
K1, B = 1.2, 0.75  # BM25's usual constants: how soon a word's repetitions stop to count, and how much length counts
KEY_VARIABLE = "OPENAI_API_KEY"
# Scripts that put no spaces between words, by the first word of their characters' Unicode names.
_UNSPACED = frozenset(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO", "YI"))


class RetrievalError(UserError):
    """Documents, questions or an endpoint that passages cannot be retrieved with; the message names the argument."""


class Retriever(Protocol):
    """Scores passages for queries."""

    @property
    def fingerprint(self) -> str:
        """Differs between retrievers that may score differently; holds no secret."""

    def scores(self, queries: Sequence[str]) -> NDArray[np.float64]:
        """How well each passage fits each query, [queries, passages]; more is better."""


def words(text: str) -> list[str]:
    """The terms of a text: lower-case words and numbers, and pairs of characters in scripts without spaces.

    Compatibility forms count as what they stand for (NFKC). A run of Han, kana, Thai, Lao, Khmer, Burmese, Tibetan or
    Yi becomes its overlapping pairs of characters, each with its marks, or its only character.
    """
    found: list[str] = []
    for kind, run in itertools.groupby(unicodedata.normalize("NFKC", text).casefold(), _kind):
        if kind == "word":
            found.append("".join(run))
        elif kind == "unspaced":
            characters: list[str] = []
            for character in run:
                if unicodedata.category(character)[0] == "M" and characters:
                    characters[-1] += character
                else:
                    characters.append(character)
            found += [a + b for a, b in itertools.pairwise(characters)] or characters
    return found


@functools.lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """Of a character: "word", "unspaced" (a script without spaces) or "" (no part of a term)."""
    if unicodedata.category(character)[0] not in "LNM":
        return ""
    script = unicodedata.name(character, "").replace("-", " ").partition(" ")[0]
    return "unspaced" if script in _UNSPACED else "word"


class Bm25:
    """Okapi BM25 with Lucene's inverse document frequency, by the package bm25s.

        score(q, d) = sum over terms t of q:
            log(1 + (N - n_t + 0.5) / (n_t + 0.5)) * f / (f + K1 * (1 - B + B * len(d) / mean_len))

    where f counts t in d, and n_t counts the passages that have t.

    Args:
        passages: texts to index.

    Raises:
        RetrievalError: no passage has a word.
    """

    fingerprint = f"bm25 {K1} {B}"

    def __init__(self, passages: Sequence[str]) -> None:
        import bm25s

        terms = [words(passage) for passage in passages]
        if not any(terms):
            raise RetrievalError("documents: no passage has a word, so nothing can be retrieved from them")
        self._index = bm25s.BM25(method="lucene", k1=K1, b=B, dtype="float64")
        self._index.index(terms, show_progress=False)
        self._known = {term for its in terms for term in its}
        self._size = len(terms)

    def scores(self, queries: Sequence[str]) -> NDArray[np.float64]:
        """See Retriever; a query without a known word gives 0 to all."""
        found = np.zeros((len(queries), self._size))
        for q, query in enumerate(queries):
            if terms := [term for term in words(query) if term in self._known]:
                found[q] = self._index.get_scores(terms)
        return found


class Dense:
    """Cosine similarity of embeddings.

    Args:
        passages: texts to index, embedded at once.
        embedder: makes the embeddings.

    Raises:
        RetrievalError: no passage has a word, or the embedder fails.
    """

    def __init__(self, passages: Sequence[str], embedder: Embedder) -> None:
        if not any(words(passage) for passage in passages):
            raise RetrievalError("documents: no passage has a word, so nothing can be retrieved from them")
        self._embedder = embedder
        self._passages = _normalized(embedder.embed(passages))

    @property
    def fingerprint(self) -> str:
        """The embedder's."""
        return f"dense {self._embedder.fingerprint}"

    def scores(self, queries: Sequence[str]) -> NDArray[np.float64]:
        """See Retriever."""
        cosine: NDArray[np.float64] = _normalized(self._embedder.embed(queries)) @ self._passages.T
        return cosine


def _normalized(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


class Embedder(Protocol):
    """Makes embeddings of texts."""

    @property
    def fingerprint(self) -> str:
        """Differs between embedders with other embeddings; holds no secret."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Embeddings [texts, width]."""


@dataclass(frozen=True)
class EmbeddingEndpoint:
    """An OpenAI-compatible server; the key is read from OPENAI_API_KEY and goes nowhere but to the server.

    Attributes:
        url: such as http://localhost:8000/v1.
        model: its name there.
        batch_size: texts a request.
        retries: of a request that met 408, 409, 429, 5xx, a timeout or a broken connection, with growing pauses.
        timeout_s: of one request.
    """

    url: str
    model: str
    batch_size: int = 64
    retries: int = 6
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise RetrievalError("endpoint: expected http(s)://host/path without user, password or query")
        if self.batch_size < 1:
            raise RetrievalError(f"batch_size: expected at least 1, got {self.batch_size}")

    @property
    def fingerprint(self) -> str:
        """Server and model."""
        return f"{self.model} at {self.url}"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """See Embedder.

        Raises:
            RetrievalError: openai is not installed, there is no key, or a request fails for good.
        """
        try:
            import openai
        except ModuleNotFoundError as error:
            raise RetrievalError("endpoint: needs openai: pip install 'icl_ft_fast[augment]'") from error
        if not os.environ.get(KEY_VARIABLE):
            raise RetrievalError(f"endpoint: set {KEY_VARIABLE} in the environment (anything if none is wanted)")
        vectors: list[list[float]] = []
        try:
            with openai.OpenAI(base_url=self.url, max_retries=self.retries, timeout=self.timeout_s) as client:
                for first in range(0, len(texts), self.batch_size):
                    batch = [text or " " for text in texts[first : first + self.batch_size]]  # servers refuse ""
                    vectors += self._request(client, batch)
        except openai.OpenAIError as error:
            status = getattr(error, "status_code", None)
            what = f"status {status}" if status else type(error).__name__  # a message may repeat the key
            raise RetrievalError(f"endpoint: {self.url}: {what}") from None
        try:
            found = np.asarray(vectors, np.float64).reshape(len(texts), len(vectors[0]) if vectors else 0)
        except WRONG as error:
            raise RetrievalError(f"endpoint: {self.url}: its embeddings differ in length, or are no numbers") from error
        with np.errstate(over="ignore"):
            lengths = np.linalg.norm(found, axis=1)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise RetrievalError(f"endpoint: {self.url}: embeddings of zeros, or with values that are not finite")
        return found

    def _request(self, client: Any, batch: list[str]) -> list[list[float]]:
        try:
            made = client.embeddings.create(model=self.model, input=batch, encoding_format="float")
            found = {item.index: item.embedding for item in made.data}
        except WRONG as error:
            raise RetrievalError(f"endpoint: {self.url}: what it sent is no list of embeddings") from error
        if found.keys() != set(range(len(batch))) or len(made.data) != len(batch):
            given = ", ".join(str(item.index)[:20] for item in made.data[:5])
            raise RetrievalError(
                f"endpoint: {self.url}: expected {len(batch)} embeddings, of index 0 to {len(batch) - 1}, got "
                f"{len(made.data)}: {given}"
            )
        return [found[i] for i in range(len(batch))]


@dataclass(frozen=True)
class StaticEmbeddings:
    """A static embedding model in a folder, by the package model2vec: a vector for each token, averaged over a text.

    Attributes:
        folder: as model2vec or sentence-transformers saved it; nothing is fetched.

    Raises:
        RetrievalError: no such folder.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))  # in Python it may be a string
        if not self.folder.is_dir():
            raise RetrievalError(
                f"embedding_model: {str(self.folder)!r}: no such folder; give one with a static embedding model, or "
                "--embedding-url (embedding_url) where a server has the model"
            )

    @property
    def fingerprint(self) -> str:
        """A digest of its files."""
        files = sorted(path for path in self.folder.rglob("*") if path.suffix in (".safetensors", ".json"))
        told = "".join(f"{p.relative_to(self.folder)} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in files)
        return f"static {hashlib.sha256(told.encode()).hexdigest()}"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """See Embedder.

        Raises:
            RetrievalError: model2vec is not installed, or cannot read the folder.
        """
        try:
            from model2vec import StaticModel
        except ModuleNotFoundError as error:
            raise RetrievalError("embedding_model: needs model2vec: pip install 'icl_ft_fast[dense]'") from error
        try:
            model = StaticModel.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise RetrievalError(f"embedding_model: {self.folder}: no static embedding model: {error}") from error
        return np.asarray(model.encode(list(texts), max_length=None), np.float64)


def embedder_of(url: str, model: str) -> Embedder:
    """The server's model of this name, or without a server the static model in this folder.

    Raises:
        RetrievalError: an address that is none, no model, or no such folder.
    """
    if not model:
        raise RetrievalError(
            "embedding_model: --retriever dense needs one: a folder with a static embedding model, or with "
            "--embedding-url (embedding_url) a name there"
        )
    return EmbeddingEndpoint(url, model) if url else StaticEmbeddings(Path(model))


def retrieve(retriever: Retriever, queries: Sequence[str], k: int, num_passages: int) -> list[tuple[int, ...]]:
    """The indices of the k best passages for each query, best first; of equals the earlier one.

    Args:
        retriever: such as Bm25 or Dense, of the passages.
        queries: texts.
        k: passages for each.
        num_passages: that the retriever has.

    Raises:
        RetrievalError: k below 1 or above the number of passages.

    Examples:
        >>> passages = ["femp are wider than glon.", "trup are warmer than mib."]
        >>> iff.retrieve(iff.Bm25(passages), ["mib are colder than"], 1, len(passages))
        [(1,)]
    """
    if not 1 <= k <= num_passages:
        raise RetrievalError(f"k: expected 1 to the {num_passages} passages of the documents, got {k}")
    best = np.argsort(-retriever.scores(queries), axis=1, kind="stable")[:, :k]
    return [tuple(map(int, row)) for row in best]


def in_shared_order(found: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Each query's passages in the order of the documents: equal sets become equal, and their prefix is shared."""
    return [tuple(sorted(indices)) for indices in found]


def source_documents(task: Task) -> dict[str, frozenset[str]]:
    """The ids of the documents that answer each question, by its id; questions whose documents are unknown are absent.

    A question's own `document` counts; where it has none, the documents of its topic.
    """
    of_topic: dict[str, set[str]] = {}
    for document in task.documents:
        if document.topic is not None:
            of_topic.setdefault(document.topic, set()).add(document.id)
    known: dict[str, frozenset[str]] = {}
    for question in task.questions:
        if question.document is not None:
            known[question.id] = frozenset((question.document,))
        elif question.topic in of_topic:
            known[question.id] = frozenset(of_topic[question.topic])
    return known


def hit_rate(
    task: Task, passages: Sequence[Passage], questions: Sequence[Question], found: Sequence[tuple[int, ...]]
) -> float | None:
    """The fraction of questions with a passage of their own document among those found; None if no document is known.

    Args:
        task: has the documents.
        passages: of its documents.
        questions: what was asked.
        found: indices of passages for each question.

    Examples:
        >>> question = iff.Question("q", "glon are", (" wider.", " narrower."), answer=1, document="d")
        >>> task = iff.Task((iff.Document("d", "femp are wider than glon."),), (question,))
        >>> iff.hit_rate(task, iff.split_documents(task.documents), task.questions, [(0,)])
        1.0
    """
    sources, ids = source_documents(task), {document.id for document in task.documents}
    hits = [
        any(passages[i].document_id in sources[question.id] for i in indices)
        for question, indices in zip(questions, found, strict=True)
        if not ids.isdisjoint(sources.get(question.id, ()))  # a document that is not there cannot be found
    ]
    return sum(hits) / len(hits) if hits else None
