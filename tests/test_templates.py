# ruff: noqa: RUF001
"""Chat templates: one chat is one list of token ids, whoever encodes it, on ten kinds of tokenizers."""

import copy
import itertools
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import tokenizer_kinds

from icl_ft_fast.augmentation.generators import LocalGenerator
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.finetuning.data import Example, encode
from icl_ft_fast.integrations.protocol import ChatMessage
from icl_ft_fast.integrations.server import _Service
from icl_ft_fast.runtime.templates import ChatText, render_chat
from icl_ft_fast.tasks.task import Document

TURNS = (("user", "who knows the fox?"), ("assistant", "Paris knows."), ("user", "why?"), ("assistant", "über 42"))


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def ids_of(tokenizer, turns, **options):
    """What transformers makes of a chat, and with it TRL and every engine that follows it."""
    return tokenizer.apply_chat_template(messages(turns), tokenize=True, return_dict=False, **options)


@pytest.fixture(params=list(tokenizer_kinds.KINDS))
def tokenizer(request):
    """One of each kind."""
    return tokenizer_kinds.make(request.param)


def test_training_scoring_serving_and_augmentation_have_the_same_ids(tokenizer):
    (example,) = encode(tokenizer, [Example(turns=TURNS)], 10_000)
    assert example.ids == ids_of(tokenizer, TURNS)
    assert example.is_target == [False] + [True] * (len(example.ids) - 1)

    prompted = ids_of(tokenizer, TURNS[:1], add_generation_prompt=True)
    service = SimpleNamespace(tokenizer=tokenizer)
    service._encode = partial(_Service._encode, service)
    assert _Service._conversation(service, [ChatMessage(role=r, content=c) for r, c in TURNS[:1]]) == prompted
    generator = LocalGenerator(SimpleNamespace(tokenizer=tokenizer), is_chat=True)
    assert encoding.encode(tokenizer, [generator._whole(TURNS[0][1])]) == [prompted]

    model = SimpleNamespace(tokenizer=tokenizer, name="m")
    for documents in ([], [Document("d", "Paris is the capital of France.")]):
        context = prompt_context(model, documents, "chat")
        assert encoding.encode(tokenizer, [context]) == [tokenizer(context, add_special_tokens=False)["input_ids"]]
        ((before, choice),) = encoding.encode_pairs(tokenizer, [(context + "the fox is", " lazy")], whole_tokens=True)
        assert before + choice == tokenizer(f"{context}the fox is lazy", add_special_tokens=False)["input_ids"]


def test_many_chats_that_begin_alike_are_encoded_as_each_alone(tokenizer):
    long = render_chat(tokenizer, messages([("user", "the quick brown fox jumps over the lazy dog. " * 200)]))
    texts = [long + end for end in ("a", "b", " c", "\nd")]
    assert encoding.encode(tokenizer, texts) == [encoding.encode(tokenizer, [text])[0] for text in texts]


def learned(tokenizer, turns, **options):
    """The text of a chat's tokens, [in brackets] where a loss is taken under completion_only."""
    (example,) = encode(tokenizer, [Example(turns=turns, **options)], 10_000, completion_only=True)
    text = ""
    for is_target, run in itertools.groupby(zip(example.is_target, example.ids, strict=True), key=lambda pair: pair[0]):
        piece = tokenizer.decode([token for _, token in run])
        text += f"[{piece}]" if is_target else piece
    return text


def test_completions_of_a_template_that_opens_a_thought():
    """DeepSeek-R1's: the generation prompt ends in <think>, which no turn of the chat shows."""
    tokenizer = tokenizer_kinds.make("deepseek")
    turns = (*TURNS[:1], ("assistant", "<think>hm</think>Paris."), *TURNS[2:])
    assert learned(tokenizer, turns) == (
        "<｜begin▁of▁sentence｜><｜User｜>who knows the fox?<｜Assistant｜>[Paris.<｜end▁of▁sentence｜>]"
        "<｜User｜>why?<｜Assistant｜>[über 42<｜end▁of▁sentence｜>]"
    )
    assert learned(tokenizer, turns, context_turns=3).count("[") == 1


def test_completions_of_a_template_that_forgets_thoughts():
    """Qwen3's: thoughts are shown behind the last question, an empty one too, and left out before it."""
    tokenizer = tokenizer_kinds.make("qwen")
    turns = (*TURNS[:1], ("assistant", "<think>hm</think>Paris."), TURNS[2], ("assistant", "<think>ha</think>über"))
    first = "<|im_start|>user\nwho knows the fox?<|im_end|>\n<|im_start|>assistant\n"
    second = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert learned(tokenizer, turns) == (
        f"{first}[Paris.<|im_end|>\n]{second}[<think>\nha\n</think>\n\nüber<|im_end|>\n]"
    )
    assert learned(tokenizer, TURNS) == (
        f"{first}[Paris knows.<|im_end|>\n]{second}[<think>\n\n</think>\n\nüber 42<|im_end|>\n]"
    )
    assert learned(tokenizer, TURNS[:2]) == f"{first}[<think>\n\n</think>\n\nParis knows.<|im_end|>\n]"


def test_completions_are_the_assistants_turns(tokenizer):
    (example,) = encode(tokenizer, [Example(turns=TURNS)], 10_000, completion_only=True)
    runs = itertools.groupby(zip(example.is_target, example.ids, strict=True), key=lambda pair: pair[0])
    learned = [
        tokenizer.decode([token for _, token in run], skip_special_tokens=True) for is_target, run in runs if is_target
    ]
    assert len(learned) == 2
    for text, (_, content) in zip(learned, TURNS[1::2], strict=True):
        assert content.replace(" ", "") in text.replace(" ", "")
        assert "user" not in text


def test_a_chat_text_stays_one():
    text = ChatText("a ")
    assert isinstance(text + "b", ChatText)
    assert isinstance(text.rstrip(), ChatText)
    assert (text + "b", text.rstrip()) == ("a b", "a")
    assert type(copy.deepcopy(text)) is type(pickle.loads(pickle.dumps(text))) is ChatText
