"""What a model is asked for: a prompt for each document or sentence, from jinja2 templates that a user may replace.

Templates are rendered in a sandbox; see Strategy for what they see.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from icl_ft_fast.augmentation import strategies
from icl_ft_fast.augmentation.strategy import AugmentError, Strategy, Unit
from icl_ft_fast.runtime.templates import bounded
from icl_ft_fast.tasks.files import TaskError, read_text
from icl_ft_fast.tasks.task import Document

_NAMES_BEGINNING = re.compile(r"\b(label|begun)\b")
BASE_STOP = ("\n\n",)  # an empty line ends a worked example


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: the document's id, followed by the unit's suffix, such as #2 for its third sentence.
        source_ids: ids of the documents that the prompt shows, the one it is about first.
        unit: what it is about.
        text: the rendered template.
        sample: number of this prompt among those about the same unit, from 0.
        begun: how the reply begins; the generator continues from there.
        copied: words of its worked examples, in lower case, that none of its documents has.
    """

    id: str
    source_ids: tuple[str, ...]
    unit: Unit
    text: str
    sample: int = 0
    begun: str = ""
    copied: frozenset[str] = frozenset()

    @property
    def source(self) -> str:
        """The sentence or document that it is about."""
        return self.unit.source


@dataclass(frozen=True)
class Prompting:
    """A strategy and the template of its prompts.

    Attributes:
        strategy: see Strategy.
        source: the template's text.
        name: the template's name in errors.
        begins: how replies begin, each in a prompt of its own; see Strategy.
        stop: strings that end a reply.
    """

    strategy: Strategy
    source: str
    name: str
    begins: tuple[str, ...] = ("",)
    stop: tuple[str, ...] = BASE_STOP

    @classmethod
    def of(
        cls, strategy: str, *, is_chat: bool = False, template: Path | None = None, is_small: bool = False
    ) -> Prompting:
        """The strategy's template for base or chat models, or the user's.

        Replies to the strategy's template for chat models are begun, and to the user's if it names `label` or `begun`.
        A small chat model is asked by `Strategy.small` where there is one, unless the template is the user's.

        Raises:
            AugmentError: an unknown strategy or one without a model, or a template that cannot be read or is no jinja2.
        """
        found = strategies.find(strategy)
        if found.infer is not None:
            raise AugmentError(f"strategy: {strategy} has no prompts; {', '.join(strategies.BY_MODEL)} have")
        is_replaced = found.small is not None and is_small and is_chat and template is None
        found = found.small if found.small is not None and is_replaced else found
        path = template or found.template(is_chat=is_chat)
        try:
            source = read_text(path)
            names_it = template is None or _NAMES_BEGINNING.search(source) is not None
            is_begun = is_chat and bool(found.begins) and names_it
            made = cls(
                found,
                source,
                str(path),
                found.begins if is_begun else ("",),
                found.begun_stop if is_begun or is_replaced else () if is_chat else BASE_STOP,
            )
            made._template()
        except TaskError as error:
            raise AugmentError(f"template: {error}") from error
        except TemplateError as error:
            raise AugmentError(f"template: {path}:{getattr(error, 'lineno', '?')}: {error}") from error
        return made

    @property
    def digest(self) -> str:
        """Hex digest of strategy, template and how replies begin."""
        begins = "" if self.begins == ("",) else f"\n{self.begins}"
        return hashlib.sha256(f"{self.strategy.name}\n{self.source}{begins}".encode()).hexdigest()

    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
        )
        return environment.from_string(self.source)

    def prompts(self, documents: Sequence[Document], shown: Sequence[Document] = ()) -> list[Prompt]:
        """The prompts about each document, in order.

        Args:
            documents: what the prompts are about.
            shown: documents that every prompt shows too, in this order.

        Raises:
            AugmentError: a template that fails on a document.
        """
        template, texts, made = self._template(), [document.text for document in shown], []
        for document in documents:
            ids = tuple(dict.fromkeys((document.id, *(other.id for other in shown))))
            for unit, begun in itertools.product(self.strategy.units(document), self.begins):
                made.append(self._prompt(template, document.id + unit.suffix, ids, unit, texts, begun))
        return made

    def follow_ups(self, prompt: Prompt, reply: str, *, is_cut: bool = False) -> list[Prompt]:
        """The prompts that follow a reply to a prompt, in order; they show no other documents.

        Raises:
            AugmentError: a template that fails.
        """
        units = self.strategy.follow_up(prompt.unit, reply, is_cut=is_cut)
        template = self._template() if units else None
        return [
            replace(self._prompt(template, prompt.id + unit.suffix, prompt.source_ids[:1], unit), sample=prompt.sample)
            for unit in units
            if template is not None
        ]

    def _prompt(
        self,
        template: Template,
        id: str,
        source_ids: tuple[str, ...],
        unit: Unit,
        documents: Sequence[str] = (),
        begun: str = "",
    ) -> Prompt:
        begun = begun or unit.begun
        seen = {**unit.variables, "label": label_of(begun), "begun": begun}
        try:
            with bounded():
                text = template.render({**seen, "document": unit.source, "documents": documents})
        except TemplateError as error:
            raise AugmentError(f"template: {self.name}: document {source_ids[0]!r}: {error}") from error
        whole, own = text.casefold(), " ".join((unit.source, *documents)).casefold()
        copied = frozenset(word for word in self.strategy.examples if word in whole and word not in own)
        return Prompt(id, source_ids, unit, text, begun=begun, copied=copied)


def label_of(begun: str) -> str:
    """The label that a reply begins with; empty where it begins with none."""
    label, colon, _ = begun.partition(":")
    return label if colon else ""


def completed(begun: str, reply: str) -> str:
    """A reply with the label that it was to begin with, which an endpoint's model may have left out."""
    label = label_of(begun)
    return reply if not label or reply.lstrip().startswith(f"{label}:") else f"{label}: {reply.lstrip()}"


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
