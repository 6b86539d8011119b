"""Templates around documents and question."""

import copy
from dataclasses import replace

import pytest

from icl_ft_fast.engine.prompting import ProtocolError, icl_context, prompt_context
from icl_ft_fast.tasks.task import Document


def test_templates(llama):
    documents = [Document("a", "x {prompt} {documents}"), Document("b", "y")]
    assert prompt_context(llama, documents) == icl_context(documents)
    assert prompt_context(llama, []) == prompt_context(llama, [], "Read {documents} and {prompt}") == ""
    assert prompt_context(llama, documents[1:], "Read\n{documents}\nand {prompt}") == "Read\n- y\nand "
    with pytest.raises(ProtocolError, match=r"^template: .* has no chat template; use base or a text of your own$"):
        prompt_context(llama, documents, "chat")
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chatty = replace(llama, tokenizer=tokenizer)
    before, after = "<user>", "</><assistant>"
    assert prompt_context(chatty, [], "chat") == f"{before}Complete the statement.{after}"
    assert prompt_context(chatty, documents[1:], "chat") == (
        f"{before}Documents:\n- y\n\nGiven these documents, complete the statement.{after}"
    )


@pytest.mark.parametrize(
    "text", ["", "{prompt}", "{documents}", "{documents}{prompt}.", "{documents}" * 2 + "{prompt}"]
)
def test_bad_templates(text, llama):
    with pytest.raises(
        ProtocolError, match=r"^template: expected auto, base, chat or a text with one \{documents\} that"
    ):
        prompt_context(llama, [], text)
