"""The text before a question: documents in a template of one's own or the model's chat template, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.control_tokens import as_text, behind, plain
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.templates import render_chat
from icl_ft_fast.tasks.task import Document, Question

ICL_TEMPLATE = "Documents:\n{documents}\n\nGiven these documents: {prompt}"
CHAT_WITH_DOCUMENTS = "Documents:\n{documents}\n\nGiven these documents, complete the statement."
CHAT_WITHOUT_DOCUMENTS = "Complete the statement."


SHOWN_DOCUMENTS, SHOWN_TOKENS = 3, 6


class ProtocolError(UserError):
    """A way of asking that cannot be followed; the message names the argument."""


def icl_context(documents: Sequence[Document], template: str = ICL_TEMPLATE) -> str:
    """What stands before each prompt when the documents are given in context; the template ends in {prompt}."""
    listed = "\n".join(f"- {document.text}" for document in documents)
    return template.removesuffix("{prompt}").replace("{documents}", listed)


def prompt_context(model: Model, documents: Sequence[Document], template: str = "base") -> str:
    """What stands before each prompt, with documents or, if there are none, without.

    Args:
        model: whose tokenizer's chat template is used, if `template` asks for it.
        documents: to be read in context; may be empty.
        template: "base" (ICL_TEMPLATE, nothing without documents), "chat" (documents and a request in the user's
            turn, the question begins the assistant's), "auto" (chat where the tokenizer has a chat template, else
            base), or a text of one's own that holds {documents} and ends in {prompt} (nothing without documents).

    Raises:
        ProtocolError: a text without {documents} or a last {prompt}, or a tokenizer without a chat template.
    """
    template = chosen_template(model, template)
    if template == "chat":
        if not has_chat_template(model):
            raise ProtocolError(f"template: {model.name} has no chat template; use base or a text of your own")
        return render_chat(model.tokenizer, [documents_turn(model, documents)])
    text = check_template(template)
    return icl_context(_as_text(model, documents), text) if documents else ""


def documents_turn(model: Model, documents: Sequence[Document]) -> dict[str, str]:
    """The user's turn of the template "chat": documents, if there are any, and a request."""
    shown = _as_text(model, documents)
    request = icl_context(shown, CHAT_WITH_DOCUMENTS) if documents else CHAT_WITHOUT_DOCUMENTS
    return {"role": "user", "content": request}


def _as_text(model: Model, documents: Sequence[Document]) -> list[Document]:
    return [replace(document, text=as_text(model.tokenizer, document.text)) for document in documents]


@dataclass(frozen=True)
class ShownPrompt:
    """A question as the model reads it, for a person to look at.

    Attributes:
        text: context and prompt; of more than SHOWN_DOCUMENTS documents the first and the last.
        choice: the correct one, or the first.
        before: the prompt's last tokens, each as text.
        after: the choice's tokens.
    """

    text: str
    choice: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def boundary(self) -> str:
        """The tokens on both sides of where the choice begins."""
        return f"... {' '.join(map(repr, self.before))} | {' '.join(map(repr, self.after))}"


def shown_prompt(
    model: Model, documents: Sequence[Document], question: Question, template: str = "auto"
) -> ShownPrompt:
    """A question's prompt behind documents, or behind none.

    Raises:
        ProtocolError: see prompt_context().
    """
    shown = list(documents)
    if len(shown) > SHOWN_DOCUMENTS:
        shown = [shown[0], Document("", f"[... {len(shown) - 2:,} more documents ...]"), shown[-1]]
    context = behind(model.tokenizer, prompt_context(model, shown, template), question.prompt)
    choice = as_text(model.tokenizer, question.choices[question.answer or 0])
    ((before, after),) = encoding.encode_pairs(model.tokenizer, [(context, choice)])
    tokens = [tuple(model.tokenizer.decode([i]) for i in ids) for ids in (before[-SHOWN_TOKENS:], after)]
    return ShownPrompt(plain(context), plain(choice), *tokens)


@dataclass(frozen=True)
class PromptCheck:
    """A task's prompts under a template.

    Attributes:
        context_tokens: of what stands before every question, all documents included.
        longest_tokens: of the longest question with its choice, behind that.
        room: tokens that documents may take beside the longest question and the template, by the model's positions.
        merged: ids of questions whose prompt's last token swallows the beginning of a choice.
    """

    context_tokens: int
    longest_tokens: int
    room: int
    merged: tuple[str, ...]


def check_prompts(
    model: Model, documents: Sequence[Document], questions: Sequence[Question], template: str = "auto"
) -> PromptCheck:
    """Count a task's tokens and look at where its choices begin, before anything is forwarded.

    Raises:
        ProtocolError: see prompt_context().
    """
    tokenizer, context = model.tokenizer, prompt_context(model, documents, template)
    prompts = [behind(tokenizer, prompt_context(model, [], template), question.prompt) for question in questions]
    alone = encoding.encode(tokenizer, prompts)
    wholes = [prompt + as_text(tokenizer, c) for prompt, q in zip(prompts, questions, strict=True) for c in q.choices]
    encoded, merged, longest = iter(encoding.encode(tokenizer, wholes)), [], 0
    for question, ids in zip(questions, alone, strict=True):
        its = [next(encoded) for _ in question.choices]
        longest = max(longest, *map(len, its))
        if any(encoding.common(ids, choice) < len(ids) for choice in its):
            merged.append(question.id)
    empty = len(encoding.encode(tokenizer, [prompt_context(model, [], template) or " "])[0])
    num_context = len(encoding.encode(tokenizer, [context])[0])
    positions = model.max_positions + 1  # the last token of a request is predicted only
    return PromptCheck(num_context, num_context + longest - empty, positions - (longest - empty), tuple(merged))


def has_chat_template(model: Model) -> bool:
    """Whether the model's tokenizer has a chat template."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def chosen_template(model: Model, template: str) -> str:
    """The template, "auto" being "chat" where the tokenizer has a chat template and "base" elsewhere."""
    return ("chat" if has_chat_template(model) else "base") if template == "auto" else template


def check_template(template: str) -> str:
    """The text that a template other than "chat" and "auto" stands for; raises ProtocolError."""
    text = ICL_TEMPLATE if template == "base" else template
    if text.count("{documents}") != 1 or text.count("{prompt}") != 1 or not text.endswith("{prompt}"):
        raise ProtocolError(
            "template: expected auto, base, chat or a text with one {documents} that ends in its only {prompt}, "
            f"got {template[:60]!r}"
        )
    return text
