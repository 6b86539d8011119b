"""Greedy decoding over the trie against transformers' own generate, a prompt at a time."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import VOCABULARY, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_ft_fast import generate as generate_module
from icl_ft_fast.cost import Ledger
from icl_ft_fast.encoding import encode
from icl_ft_fast.generate import GenerateError, _lay_out, generate, iter_tokens
from icl_ft_fast.model import from_network

NEW_TOKENS = 12
# Shared prefixes, prompts that begin others, one twice, one that BOS makes equal to another, and BOS alone.
PROMPTS = [
    "the cat sat on that mat",
    "the cat sat on that mat who knows why",
    "the cat",
    "the",
    "the cat sat on that ice",
    "the cat",
    "<s>the cat",
    "",
    *sentences(6, seed=3),
]


@pytest.fixture(scope="module")
def alone(plain_llama, tokenizer):
    """A function from a prompt to the token ids transformers continues it with."""

    @cache
    def continue_one(prompt, new_tokens=NEW_TOKENS):
        return plain_greedy(plain_llama, tokenizer, prompt, new_tokens)

    return continue_one


def plain_greedy(network, tokenizer, prompt, new_tokens, **options):
    bare = prompt.startswith("<s>")
    ids = tokenizer(prompt, add_special_tokens=not bare, return_tensors="pt")["input_ids"]
    options = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "use_cache": False} | options
    written = network.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, **options
    )
    return written[0, ids.shape[1] :].tolist()


def text_of(tokenizer, ids, stop=(), ends=(1,)):
    """What is written before the first end token and the first stop string."""
    ends_at = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:ends_at])
    return text[: min([text.find(mark) for mark in stop if mark in text], default=len(text))]


@pytest.mark.parametrize(("chunk_rows", "group_prompts"), [(512, 64), (5, 64), (512, 3), (5, 1)])
def test_continuations_are_those_of_each_prompt_alone(llama, alone, tokenizer, monkeypatch, chunk_rows, group_prompts):
    monkeypatch.setattr(generate_module, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(generate_module, "GROUP_PROMPTS", group_prompts)
    expected = [text_of(tokenizer, alone(prompt)) for prompt in PROMPTS]
    assert generate(llama, PROMPTS, max_new_tokens=NEW_TOKENS) == expected
    assert len(set(expected)) > len(PROMPTS) // 2


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_few_new_tokens(llama, alone, tokenizer, new_tokens):
    expected = [text_of(tokenizer, alone(prompt)[:new_tokens]) for prompt in PROMPTS]
    assert generate(llama, PROMPTS, max_new_tokens=new_tokens) == expected


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": 4}),
        ("gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    ],
)
def test_windows_and_learned_positions_hold_while_decoding(family, options, tiny_network, tokenizer):
    options = {"num_hidden_layers": 2} | options if family != "gpt2" else options
    network = tiny_network(family, **options)
    model = from_network(tiny_network(family, **options), tokenizer, family)
    prompts = PROMPTS[:5]
    expected = [text_of(tokenizer, plain_greedy(network, tokenizer, prompt, 8)) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=8) == expected


def test_a_stop_string_ends_a_continuation_and_is_cut_off(llama, alone, tokenizer):
    texts = [text_of(tokenizer, alone(prompt)) for prompt in PROMPTS]
    middles = [text[len(text) // 2 :][:2] for text in texts]
    stop = tuple(dict.fromkeys(middle for middle in middles[:3] if "\ufffd" not in middle)) or tuple(middles[:1])
    expected = [text_of(tokenizer, alone(prompt), stop) for prompt in PROMPTS]
    assert any(short != whole for short, whole in zip(expected, texts, strict=True))
    ledger, whole = Ledger(), Ledger()
    assert generate(llama, PROMPTS, max_new_tokens=NEW_TOKENS, stop=stop, ledger=ledger) == expected
    generate(llama, PROMPTS, max_new_tokens=NEW_TOKENS, ledger=whole)
    assert ledger.decoded_tokens < whole.decoded_tokens


def test_the_earliest_of_several_stop_strings_counts(llama, alone, tokenizer):
    text = text_of(tokenizer, alone("the"))
    early, late = text[2:4], text[-2:]
    assert 0 < text.find(early) < text.find(late)
    for stop in ((early, late), (late, early)):
        assert generate(llama, ["the"], max_new_tokens=NEW_TOKENS, stop=stop) == [text[: text.find(early)]]


@pytest.fixture(scope="module")
def ending(tiny_network, tokenizer):
    """A network that writes EOS now and then, plain and served."""
    networks = [tiny_network("llama", num_hidden_layers=2) for _ in range(2)]
    for network in networks:
        with torch.no_grad():
            network.lm_head.weight[tokenizer.eos_token_id] *= 2
    return networks[0], from_network(networks[1], tokenizer, "ending")


def test_eos_ends_a_continuation_and_is_not_part_of_it(ending, tokenizer):
    network, model = ending
    ids = [plain_greedy(network, tokenizer, prompt, NEW_TOKENS) for prompt in PROMPTS]
    lengths = [len(written) for written in ids]
    assert min(lengths) < NEW_TOKENS == max(lengths)  # some end early, some do not
    ledger = Ledger()
    assert generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, ledger=ledger) == [
        text_of(tokenizer, written) for written in ids
    ]
    distinct = {tuple(prompt): len(new) for prompt, new in zip(encode(tokenizer, PROMPTS), ids, strict=True)}
    assert ledger.decoded_tokens == sum(distinct.values())  # EOS included


def test_every_end_token_of_the_generation_settings_ends_a_continuation(llama, alone, plain_llama, tokenizer):
    other = alone("the")[NEW_TOKENS // 2]
    network = copy.deepcopy(llama.network)
    network.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    model = from_network(network, tokenizer, "here")
    ends = [tokenizer.eos_token_id, other]
    ids = [plain_greedy(plain_llama, tokenizer, prompt, NEW_TOKENS, eos_token_id=ends) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=NEW_TOKENS) == [
        text_of(tokenizer, written, ends=ends) for written in ids
    ]
    assert any(len(written) < NEW_TOKENS for written in ids)


def test_the_ledger_counts_shared_prefixes_and_equal_prompts_once(llama, tokenizer):
    distinct = {tuple(ids) for ids in encode(tokenizer, PROMPTS)}
    assert len(distinct) < len(set(PROMPTS))  # BOS makes two prompts equal
    nodes = {ids[:n] for ids in distinct for n in range(1, len(ids) + 1)}
    ledger = Ledger(decoded_tokens=1)
    generate(llama, PROMPTS, max_new_tokens=4, ledger=ledger)
    assert ledger == Ledger(
        request_tokens=sum(map(len, distinct)),
        forwarded_rows=len(nodes) + 3 * len(distinct),
        head_rows=4 * len(distinct),
        decoded_tokens=1 + 4 * len(distinct),
    )


def test_token_ids_are_yielded_group_by_group(llama, alone, tokenizer, monkeypatch):
    monkeypatch.setattr(generate_module, "GROUP_PROMPTS", 3)
    ledger, done, yielded = Ledger(), [], {}
    for p, ids in iter_tokens(llama, encode(tokenizer, PROMPTS), max_new_tokens=NEW_TOKENS, ledger=ledger):
        yielded[p] = ids
        done.append(ledger.decoded_tokens)
    eos = tokenizer.eos_token_id
    expected = [[token for token in alone(prompt) if token != eos] for prompt in PROMPTS]
    assert [yielded[p] for p in range(len(PROMPTS))] == expected
    assert done == sorted(done)
    assert done[0] <= 3 * NEW_TOKENS < done[-1]


def test_the_tokens_of_a_stop_string_are_part_of_what_is_yielded(llama, alone, tokenizer):
    ids = alone("the")
    stop = tokenizer.decode(ids[:3])[-1]
    ((_, written),) = iter_tokens(llama, encode(tokenizer, ["the"]), max_new_tokens=NEW_TOKENS, stop=[stop])
    assert written == ids[: len(written)]
    assert stop in tokenizer.decode(written)
    assert stop not in tokenizer.decode(written[:-1])


@pytest.mark.parametrize(("names", "message"), [(None, r"^prompts\[1\]: no tokens$"), (["a", "b"], r"^b: no tokens$")])
def test_a_prompt_of_token_ids_is_named_by_its_place_or_as_told(llama, names, message):
    with pytest.raises(GenerateError, match=message):
        list(iter_tokens(llama, [[5], []], max_new_tokens=1, names=names))


def test_no_prompts_are_no_continuations(llama):
    ledger = Ledger()
    assert generate(llama, [], ledger=ledger) == []
    assert ledger == Ledger()


def test_a_prompt_may_fill_every_position(llama, alone, tokenizer):
    prompt = "the"
    while len(tokenizer.encode(prompt)) < 254:
        prompt += " cat"
    assert generate(llama, [prompt], max_new_tokens=3) == [text_of(tokenizer, alone(prompt, 3))]
    with pytest.raises(GenerateError, match=r"^prompt 'the cat.*'\.\.\.: 1 tokens over the model's 256 positions$"):
        generate(llama, ["why", prompt], max_new_tokens=4)


def test_a_prompt_without_tokens_is_refused(llama, tokenizer_without_bos):
    model = replace(llama, tokenizer=tokenizer_without_bos)
    with pytest.raises(GenerateError, match=r"^prompt ''\.\.\.: no tokens$"):
        generate(model, ["why", ""])


@pytest.mark.parametrize("new_tokens", [0, -1])
def test_at_least_one_new_token(llama, new_tokens):
    with pytest.raises(GenerateError, match=f"^max_new_tokens: expected at least 1, got {new_tokens}$"):
        generate(llama, ["the"], max_new_tokens=new_tokens)


@pytest.mark.parametrize("stop", [("",), ("x", ""), "the"])
def test_stop_strings_are_strings_that_are_not_empty(llama, stop):
    with pytest.raises(GenerateError, match=r"^stop: expected non-empty strings, got "):
        generate(llama, ["the"], stop=stop)


PROMPT = st.lists(st.sampled_from([0, 1, VOCABULARY - 1]), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(prompts=st.lists(PROMPT, min_size=1, max_size=7), reserved=st.integers(1, 4))
def test_a_layout_shows_every_row_its_own_sequence_and_nothing_else(prompts, reserved):
    layout = _lay_out(prompts, reserved)
    distinct = sorted({tuple(prompt) for prompt in prompts})
    nodes = sorted({prompt[:n] for prompt in distinct for n in range(1, len(prompt) + 1)})
    # What stands at each position of the stack: a prefix, or a prompt and the number of the row it will write.
    stack = {}
    for node, position in zip(nodes, layout.position.tolist(), strict=True):
        stack[position] = (node, 0)
    for prompt, last in zip(map(tuple, prompts), layout.last, strict=True):
        assert nodes[last] == prompt
        for step in range(reserved):
            slot = int(layout.position[last]) + 1 + step
            assert stack.setdefault(slot, (prompt, 1 + step)) == (prompt, 1 + step)
    assert sorted(stack) == list(range(layout.rows))
    assert [stack[position][0] for position in sorted(stack) if not stack[position][1]] == nodes  # still in pre-order
    end = dict(zip(layout.position.tolist(), layout.end.tolist(), strict=True))
    for last in layout.last:
        block_end = int(layout.position[last]) + 1 + reserved
        end |= dict.fromkeys(range(block_end - reserved, block_end), block_end)
    for i, (mine, written) in stack.items():
        seen = {stack[j] for j in stack if j <= i < end[j]}
        prefix = {(mine[:n], 0) for n in range(1, len(mine) + 1)}
        assert seen == prefix | {(mine, step) for step in range(1, written + 1)}
