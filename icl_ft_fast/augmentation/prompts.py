"""What a model is asked for: a prompt for each document or sentence, from jinja2 templates that a user may replace.

Templates are rendered in a sandbox and see `document` and, in the global strategy, `documents`. An answer is lines of
`Label: text`; which labels count is the strategy's.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.templates import bounded
from icl_ft_fast.tasks.sentences import split_sentences
from icl_ft_fast.tasks.task import Document

# By strategy, the labels of the lines of an answer; a question's text is joined with the answer's that follows it.
LABELS = {
    "local": ("Reversed", "Rephrased", "Inferred"),
    "document": ("Rephrased", "Inferred"),
    "global": ("Rephrased", "Inferred"),
    "self-qa": ("Question", "Answer"),
}
# The label of a premise, which an answer may write down before what follows from it; the documents say it already.
PREMISE = "Given"
# Of an answer, unless asked otherwise. What follows from many documents comes in no order: asked for the most likely
# line after a line, a model soon repeats itself (LOG.md), so those answers are drawn.
MAX_NEW_TOKENS = {"local": 64, "document": 128, "global": 512, "self-qa": 128}
TEMPERATURE = {"local": 0.0, "document": 0.0, "global": 1.0, "self-qa": 0.0}
_FOLDER = Path(__file__).parent / "templates"


class AugmentError(UserError):
    """An augmentation that cannot be made; the message names the file, the argument or the request."""


@dataclass(frozen=True)
class Ask:
    """One prompt.

    Attributes:
        id: the document's id, followed by #number for a sentence of several.
        source_ids: ids of the documents that the prompt shows, the one asked about first.
        told: the sentence or document asked about.
        prompt: the rendered template.
        sample: counts the answers about this sentence or document.
    """

    id: str
    source_ids: tuple[str, ...]
    told: str
    prompt: str
    sample: int = 0


@dataclass(frozen=True)
class Prompting:
    """A strategy and its template.

    Attributes:
        strategy: a key of LABELS.
        source: the template's text.
        name: what errors call it.
    """

    strategy: str
    source: str
    name: str

    @classmethod
    def of(cls, strategy: str, *, is_chat: bool = False, template: Path | None = None) -> Prompting:
        """The project's template for base or chat models, or the user's.

        Raises:
            AugmentError: an unknown strategy, or a template that cannot be read or is no jinja2.
        """
        if strategy not in LABELS:
            raise AugmentError(f"strategy: expected one of {', '.join(LABELS)}, got {strategy!r}")
        path = template or _FOLDER / f"{strategy}.{'chat' if is_chat else 'base'}.jinja"
        try:
            made = cls(strategy, path.read_text(encoding="utf-8"), str(path))
            made._template()
        except (OSError, UnicodeError) as error:
            raise AugmentError(f"template: {path}: cannot be read: {error}") from error
        except TemplateError as error:
            raise AugmentError(f"template: {path}:{getattr(error, 'lineno', '?')}: {error}") from error
        return made

    @property
    def digest(self) -> str:
        """Hex digest of strategy and template."""
        return hashlib.sha256(f"{self.strategy}\n{self.source}".encode()).hexdigest()

    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
        )
        return environment.from_string(self.source)

    def asks(self, documents: Sequence[Document], shown: Sequence[Document] = ()) -> list[Ask]:
        """A prompt for each document or, in the local strategy, for each sentence, in order.

        Args:
            documents: to ask about.
            shown: global: the documents in context, which every prompt shows in this order.

        Raises:
            AugmentError: a template that fails on a document.
        """
        template, texts, made = self._template(), [document.text for document in shown], []
        for document in documents:
            text = " ".join(document.text.split()) if self.strategy == "local" else document.text
            parts = split_sentences(text, "independent") if self.strategy == "local" else [text]
            for number, part in enumerate(parts):
                ask_id = document.id + (f"#{number}" if len(parts) > 1 else "")
                ids = tuple(dict.fromkeys((document.id, *(other.id for other in shown))))
                try:
                    with bounded():
                        prompt = template.render(document=part, documents=texts)
                except TemplateError as error:
                    raise AugmentError(f"template: {self.name}: document {document.id!r}: {error}") from error
                made.append(Ask(ask_id, ids, part, prompt))
        return made


def fitting(documents: Sequence[Document], fits: Callable[[Sequence[Document]], bool], seed: int) -> Sequence[Document]:
    """All documents if they fit, else as many as fit of a seeded selection, in their own order.

    Raises:
        AugmentError: not even one fits.
    """
    order = random.Random(seed).sample(range(len(documents)), len(documents))

    def selection(count: int) -> list[Document]:
        return [documents[d] for d in sorted(order[:count])]

    low, high = 0, len(documents)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(selection(middle)) else (low, middle - 1)
    if not low:
        raise AugmentError("global: not one document fits the model's positions beside the longest and the answer")
    return selection(low)
