"""The text before a question: documents in a template of one's own or the model's chat template, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from icl_ft_fast.engine.control_tokens import as_text
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.templates import render_chat
from icl_ft_fast.tasks.task import Document

ICL_TEMPLATE = "Documents:\n{documents}\n\nGiven these documents: {prompt}"
CHAT_WITH_DOCUMENTS = "Documents:\n{documents}\n\nGiven these documents, complete the statement."
CHAT_WITHOUT_DOCUMENTS = "Complete the statement."


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
            turn, the question begins the assistant's), or a text of one's own that holds {documents} and ends in
            {prompt} (nothing without documents).

    Raises:
        ProtocolError: a text without {documents} or a last {prompt}, or a tokenizer without a chat template.
    """
    documents = [replace(document, text=as_text(model.tokenizer, document.text)) for document in documents]
    if template == "chat":
        if not getattr(model.tokenizer, "chat_template", None):
            raise ProtocolError(f"template: {model.name} has no chat template; use base or a text of your own")
        request = icl_context(documents, CHAT_WITH_DOCUMENTS) if documents else CHAT_WITHOUT_DOCUMENTS
        turn = [{"role": "user", "content": request}]
        return render_chat(model.tokenizer, turn)
    text = check_template(template)
    return icl_context(documents, text) if documents else ""


def check_template(template: str) -> str:
    """The text that a template other than "chat" stands for; raises ProtocolError."""
    text = ICL_TEMPLATE if template == "base" else template
    if text.count("{documents}") != 1 or text.count("{prompt}") != 1 or not text.endswith("{prompt}"):
        raise ProtocolError(
            "template: expected base, chat or a text with one {documents} that ends in its only {prompt}, "
            f"got {template[:60]!r}"
        )
    return text
