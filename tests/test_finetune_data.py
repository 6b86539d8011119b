"""Training data: every shape of row, the mask token by token, batches as prefix trees, and what is refused."""

import copy
import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icl_ft_fast.finetuning.batches import order, pack
from icl_ft_fast.finetuning.data import EncodedExample, Example, encode, read_examples, split_validation
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings

CHAT = (
    "{{ '<s>' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = (
    ("system", "be the cat"),
    ("user", "who sat?"),
    ("assistant", "the cat."),
    ("user", "on?"),
    ("assistant", "mat"),
)


@pytest.fixture
def chatty(tokenizer):
    """A copy of the tokenizer that has a chat template."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    return chatty


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def messages(turns, role="role", content="content", names=None):
    return [{role: (names or {}).get(who, who), content: text} for who, text in turns]


def learned(tokenizer, example, **options):
    """The text of an example's tokens, [in brackets] where a loss is taken."""
    (tokens,) = encode(tokenizer, [example], 256, **options)
    text = ""
    for is_target, run in itertools.groupby(zip(tokens.is_target, tokens.ids, strict=True), key=lambda pair: pair[0]):
        piece = tokenizer.decode([token for _, token in run])
        text += f"<{piece}>" if is_target else piece
    return text


def test_shapes(tmp_path):
    names = {"user": "human", "assistant": "gpt"}
    read = read_examples(
        write(
            tmp_path / "a.jsonl",
            {"text": "the cat"},
            {"prompt": "who", "completion": " sat"},
            {"messages": messages(TURNS)},
            {"conversations": messages(TURNS, "from", "value", names)},
            {"prompt": messages(TURNS[:3]), "completion": messages(TURNS[3:])},
            {"instruction": "who", "output": "cat"},
            {"instruction": "who", "input": "mat", "output": "cat"},
        )
    )
    where = [f"{tmp_path / 'a.jsonl'}:{line}" for line in range(1, 8)]
    assert read == [
        Example("the cat", where=where[0]),
        Example(" sat", "who", where=where[1]),
        Example(turns=TURNS, where=where[2]),
        Example(turns=TURNS, where=where[3]),
        Example(turns=TURNS, context_turns=3, where=where[4]),
        Example("cat", "who\n\n", (("user", "who"), ("assistant", "cat")), where=where[5]),
        Example("cat", "who\n\nmat\n\n", (("user", "who\n\nmat"), ("assistant", "cat")), where=where[6]),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txet": "a", "n": 1}, "expected text, prompt and completion, .*, got the fields 'txet', 'n'"),
        ({}, "expected text, .*, got the fields of an empty object"),
        ({"text": 3}, "text: expected a string, got 3"),
        ({"prompt": "a"}, "completion: missing"),
        ({"prompt": messages(TURNS), "completion": "a"}, "completion: expected a list with at least one message"),
        ({"messages": []}, "messages: expected a list with at least one message"),
        ({"messages": ["a"]}, 'messages[0]: expected an object, got "a"'),
        ({"messages": [{"role": "user"}]}, "messages[0]: content: missing"),
        ({"conversations": [{"from": "bard", "value": ""}]}, "conversations[0]: from: expected one of human, gpt, .*"),
        ({"instruction": "a"}, "output: missing"),
        ({"instruction": "a", "input": None, "output": "b"}, "input: expected a string, got null"),
        ([1], "expected a JSON object, got list"),
    ],
)
def test_errors_name_file_line_and_field(row, message, tmp_path):
    path = write(tmp_path / "bad.jsonl", {"text": "fine"}, row)
    pattern = message.replace("[0]", r"\[0\]")
    with pytest.raises(FinetuneError, match=f"^{path}:2: {pattern}"):
        read_examples(path)


def test_no_rows(tmp_path, tokenizer):
    with pytest.raises(FinetuneError, match="empty: expected at least one JSON object"):
        read_examples(write(tmp_path / "a.jsonl"))
    with pytest.raises(FinetuneError, match="cannot be read: No such file"):
        read_examples(tmp_path / "none.jsonl")


def test_the_mask_token_by_token(tokenizer, tokenizer_without_bos, chatty):
    only = {"completion_only": True}
    assert learned(tokenizer, Example("the cat")) == "<s><the cat</s>>"
    assert learned(tokenizer, Example("the cat"), **only) == "<s><the cat</s>>"
    assert learned(tokenizer, Example(" the cat", "who knows")) == "<s><who knows the cat</s>>"
    assert learned(tokenizer, Example(" the cat", "who knows"), **only) == "<s>who knows< the cat</s>>"
    # "s " + "t" is never one token here, but " the" is: the token that spans the join is learned, not dropped
    assert learned(tokenizer, Example("the cat", "who knows "), **only) == "<s>who knows< the cat</s>>"
    assert learned(tokenizer, Example(" über", "über"), **only) == "<s>über< über</s>>"
    assert learned(tokenizer_without_bos, Example(" the cat", "42"), **only) == "</s>42< the cat</s>>"
    assert learned(chatty, Example(turns=TURNS), **only) == (
        "<s>[system]be the cat\n[user]who sat?\n[assistant]<the cat.\n>[user]on?\n[assistant]<mat\n>"
    )
    assert learned(chatty, Example(turns=TURNS, context_turns=3), **only).count("<") == 2  # BOS, and the last turn
    assert learned(chatty, Example(turns=TURNS)).startswith("<s><[system]be the cat\n[user]")


def test_a_spanning_token_is_one_of_the_vocabulary(tokenizer):
    whole = tokenizer("who knows the cat", add_special_tokens=False)["input_ids"]
    assert tokenizer("who knows ", add_special_tokens=False)["input_ids"] != whole[: len(whole) - 2]


def test_alpaca_without_a_chat_template_is_prompt_and_completion(tmp_path, tokenizer, chatty):
    (example,) = read_examples(write(tmp_path / "a.jsonl", {"instruction": "who", "output": "cat"}))
    assert learned(tokenizer, example, completion_only=True) == "<s>who\n\n<cat</s>>"
    assert learned(chatty, example, completion_only=True) == "<s>[user]who\n[assistant]<cat\n>"


def test_what_cannot_be_encoded(tokenizer, chatty, tokenizer_without_bos):
    chat = Example(turns=TURNS, where="f:3")
    with pytest.raises(FinetuneError, match=r"^f:3: messages: the tokenizer has no chat template"):
        encode(tokenizer, [chat], 256)
    with pytest.raises(FinetuneError, match=r"^f:3: \d+ tokens over the model's 9 positions$"):
        encode(chatty, [chat], 9)
    chatty.chat_template = "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"
    encode(chatty, [chat], 256)
    with pytest.raises(FinetuneError, match=r"^f:3: messages\[2\]: completion_only: the chat template does not show"):
        encode(chatty, [chat], 256, completion_only=True)
    chatty.chat_template = CHAT
    with pytest.raises(FinetuneError, match=r"^f:3: no tokens to predict$"):
        encode(chatty, [Example(turns=TURNS[:2], where="f:3")], 256, completion_only=True)


def test_groups(tokenizer):
    examples = [Example(" cat", "who"), "the mat", Example(" sat", "who"), "the mat. who sat?"]
    groups = [tokens.group for tokens in encode(tokenizer, examples, 256, splitting="independent")]
    assert groups == [0, 1, 0, 3, 3]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 5))
def test_order_takes_every_example_once_an_epoch(groups, seed):
    examples = [EncodedExample([0, 1], [False, True], group) for group in groups]
    for together in (False, True):
        taken = list(itertools.islice(order(examples, seed, group_by_prompt=together), 2 * len(groups)))
        for epoch in (taken[: len(groups)], taken[len(groups) :]):
            assert sorted(epoch) == list(range(len(groups)))
            if together:
                runs = [group for group, _ in itertools.groupby(groups[e] for e in epoch)]
                assert len(runs) == len(set(groups))


def test_validation_is_held_out_by_prompt():
    examples = [Example(f" {a}", f"p{p}") for p in range(10) for a in "ab"] + [Example("t")] * 2
    train, held = split_validation(examples, 0.3, 1)
    assert {e.shared_prefix for e in train}.isdisjoint(e.shared_prefix for e in held)
    assert sorted(train + held, key=str) == sorted(examples, key=str)
    assert len(held) == 6
    assert split_validation(examples, 0.3, 1) == (train, held)
    assert split_validation(examples, 0.3, 2) != (train, held)
    with pytest.raises(FinetuneError, match="leaves no example to train on"):
        split_validation(examples[:2], 0.5, 0)


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_batch_holds_each_target_of_each_example(rows):
    examples = [EncodedExample([9, *(t for t, _ in row)], [False, *(flag for _, flag in row)], 0) for row in rows]
    batch = pack(examples)
    assert batch.head_row.tolist() == sorted(set(batch.head_row.tolist()))
    expected = [tuple(e.ids[: i + 1]) for e in examples for i in range(len(e.ids)) if e.is_target[i]]
    nodes = {}  # node of the tree -> its path
    for row in range(len(batch.tree.token)):
        parent = int(batch.tree.parent[row])
        nodes[row] = (*nodes.get(parent, ()), int(batch.tree.token[row]))
    rows_of, target = batch.head_row[batch.row].tolist(), batch.target.tolist()
    assert [(*nodes[rows_of[m]], target[m]) for m in batch.target_index.tolist()] == expected


def test_shared_prompts_train_as_they_would_apart(llama, plain_llama, monkeypatch):
    """Continuations of one document in one trie, completion only, in micro-batches: the gradient of each alone."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr))
    document = "the cat sat on that mat who knows why."
    examples = [Example(f" {text}", document) for text in ("the cat", "the mat sat", "who", "the cat", "why knows")]
    exact = copy.deepcopy(plain_llama).double()
    total = 0
    for tokens in encode(llama.tokenizer, examples, 256, completion_only=True):
        ids = torch.tensor([tokens.ids])
        logp = exact(ids[:, :-1], use_cache=False).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        loss, count = -logp[torch.tensor(tokens.is_target[1:])].sum(), sum(tokens.is_target)
        loss.backward()
        total += count
    for accumulation, checkpointing in ((1, False), (5, True)):
        settings = FinetuneSettings(
            steps=1,
            batch_size=5 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=1.0,
            warmup_steps=0,
            clip_norm=1e9,
            completion_only=True,
            gradient_checkpointing=checkpointing,
        )
        tuned = finetune(llama, examples, settings)
        after = dict(tuned.model.network.named_parameters())
        for name, parameter in llama.network.named_parameters():
            gradient = (parameter - after[name]).detach()
            assert (gradient - dict(exact.named_parameters())[name].grad / total).abs().max() < 1e-5, name
        patched = [module for module in tuned.model.network.modules() if "forward" in vars(module)]
        assert all(type(module) is torch.nn.Linear for module in patched)  # by register_linear, not checkpointing
