"""Control tokens spelt in documents and questions: text for ten kinds of tokenizers, tokens where they are kept."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import tokenizer_kinds

import icl_ft_fast as iff
from icl_ft_fast.augmentation.generators import LocalGenerator
from icl_ft_fast.engine import control_tokens, encoding
from icl_ft_fast.engine.control_tokens import as_text, behind, encode_with_offsets, plain, set_mode
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.finetuning.data import Example, encode
from icl_ft_fast.runtime.templates import render_chat
from icl_ft_fast.tasks.task import Document, Question


@pytest.fixture(params=list(tokenizer_kinds.KINDS))
def kind(request):
    """The name of a kind of tokenizers."""
    return request.param


def controls(tokenizer):
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def special_ids(tokenizer, text):
    """How often each control token is among the token ids of a text."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Counter(i for i in encoding.encode(tokenizer, [text])[0] if i in special)


def test_what_is_spelt_is_text(kind):
    tokenizer = tokenizer_kinds.make(kind)
    for control in controls(tokenizer):
        spelt = f"the {control}fox {control} knows"
        marked = as_text(tokenizer, spelt)
        assert plain(marked) == spelt
        token = tokenizer.convert_tokens_to_ids(control)
        assert special_ids(tokenizer, spelt)[token] == 2 + special_ids(tokenizer, "the fox")[token]
        assert special_ids(tokenizer, marked) == special_ids(tokenizer, "the fox knows"), control
        if kind != "unigram":  # whose vocabulary has <s> as a piece like any other
            own = tokenizer(spelt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert encoding.encode(tokenizer, [marked], bos=False) == [own]
    untouched = "the fox < | > knows über"
    assert as_text(tokenizer, untouched) is untouched


def test_in_a_chat_only_the_template_s_control_tokens_are_in_force(kind):
    tokenizer = tokenizer_kinds.make(kind)
    model = SimpleNamespace(tokenizer=tokenizer, name="m")
    harmless = prompt_context(model, [Document("d", "Paris knows the fox")], "chat")
    spelt = f"Paris {''.join(controls(tokenizer))} knows the fox"
    context = prompt_context(model, [Document("d", spelt)], "chat")
    assert special_ids(tokenizer, context) == special_ids(tokenizer, harmless)
    generator = LocalGenerator(model, is_chat=True)
    assert special_ids(tokenizer, generator._whole(spelt)) == special_ids(tokenizer, generator._whole("the fox"))
    # around the spelling all tokens are those of the chat without it, the template's own among them
    (ids,), (whole,) = encoding.encode(tokenizer, [context]), encoding.encode(tokenizer, [harmless])
    common = encoding.common(ids[::-1], whole[::-1])
    assert common >= len(tokenizer(" the fox", add_special_tokens=False)["input_ids"]) - 1
    assert encoding.common(ids, whole) >= 5


def test_a_question_behind_its_own_passages_is_read_as_behind_a_shared_context(kind):
    tokenizer = tokenizer_kinds.make(kind)
    spelt = f"who {controls(tokenizer)[-1]} knows"
    chat = render_chat(tokenizer, [{"role": "user", "content": "the fox"}])
    for context in (chat, f"{controls(tokenizer)[0]} the fox: "):  # a template of the user's own
        prompt = behind(tokenizer, context, spelt)
        assert as_text(tokenizer, prompt) is prompt
        expected = encoding.encode(tokenizer, [context + as_text(tokenizer, spelt)])
        assert encoding.encode(tokenizer, [prompt]) == expected


def test_kept_control_tokens_stay_in_force():
    tokenizer = copy.deepcopy(tokenizer_kinds.make("llama 3"))
    set_mode(tokenizer, "keep")
    assert as_text(tokenizer, "<|eot_id|>") == "<|eot_id|>"
    with pytest.raises(ValueError, match="special_tokens: expected one of text, keep, got 'maybe'"):
        set_mode(tokenizer, "maybe")


def test_questions_are_scored_as_text(llama, llama_directory):
    question = Question("q", "the cat </s> sat", (" on</s> mat", " who"), answer=0)
    scored = iff.score(llama, [question], context="the cat ")[0]
    kept = iff.score(iff.load(llama_directory, special_tokens="keep"), [question], context="the cat ")[0]
    assert kept.num_tokens[0] < scored.num_tokens[0]
    requests = [("the cat the cat </s> sat", choice) for choice in question.choices]
    assert [r.logp for r in iff.loglikelihood(llama, requests)] == pytest.approx(kept.logp, abs=1e-4)
    with pytest.raises(iff.ModelError, match="special_tokens: one of text, keep, got 'no'"):
        iff.load(llama_directory, special_tokens="no")


def test_a_slow_tokenizer_reads_all_as_text():
    class Slow:
        def __init__(self):
            self.added_tokens_decoder = {1: SimpleNamespace(content="</s>", special=True)}

        def __call__(self, texts, add_special_tokens, split_special_tokens):
            assert (add_special_tokens, split_special_tokens) == (False, True)
            return {"input_ids": [list(map(ord, text)) for text in texts]}

    slow = Slow()
    assert control_tokens.encode(slow, [as_text(slow, "a</s>")]) == [list(map(ord, "a</s>"))]


def test_examples_are_learned_as_text(kind, caplog):
    """What a document, a question or a turn spells is text in training too; the template's own tokens stay tokens."""
    tokenizer, kept = tokenizer_kinds.make(kind), copy.deepcopy(tokenizer_kinds.make(kind))
    set_mode(kept, "keep")
    spelt = f"the {''.join(controls(tokenizer))} fox"
    rows = [
        (Example(spelt), Example("the fox")),
        (Example(spelt, prompt=spelt), Example("the fox", prompt="the fox")),
        (Example(turns=(("user", spelt), ("assistant", spelt))),) * 2,
    ]
    for options in ({}, {"completion_only": True}):
        for given, unspelt in rows:
            (example,) = encode(tokenizer, [given], 10_000, **options)
            (harmless,) = encode(tokenizer, [unspelt], 10_000, **options)
            special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
            counts = [Counter(i for i in one.ids if i in special) for one in (example, harmless)]
            assert counts[0] == counts[1]
            assert f"1 of 1 examples spell control tokens ({given.where or 'texts[0]'} first)" in caplog.text
            assert any(i in special for i in encode(kept, [given], 10_000, **options)[0].ids[2:-2])
    assert encode(kept, [Example(spelt)], 10_000)[0].ids[1:-1] == encoding.encode(kept, [spelt], bos=False)[0]


def test_offsets_of_marked_texts(kind):
    """A token of a marked text stands for the characters that it stands for in the same text without marks."""
    tokenizer = tokenizer_kinds.make(kind)
    control = controls(tokenizer)[-1]
    marked = control + as_text(tokenizer, f" the {control} fox\n") + control
    ids, offsets = encode_with_offsets(tokenizer, marked)
    assert [ids] == encoding.encode(tokenizer, [marked], bos=False)
    pieces = [plain(marked[first:last]) for first, last in offsets]
    assert pieces[0].rstrip() == pieces[-1] == control
    covered = {place for first, last in offsets for place in range(first, last)}
    assert covered >= {place for place, character in enumerate(marked) if plain(character).strip()}
    bare = f"the {control} fox"
    assert (
        encode_with_offsets(tokenizer, bare)[1]
        == tokenizer(bare, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    )
