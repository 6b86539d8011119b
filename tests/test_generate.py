"""Decoding over the trie against transformers' own generate, a prompt at a time."""

import copy
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import sentences

from icl_ft_fast import ops
from icl_ft_fast.engine import decoding, memory
from icl_ft_fast.engine import generate as generate_module
from icl_ft_fast.engine.encoding import encode
from icl_ft_fast.engine.generate import GenerateError, Reuse, Sampling, generate, iter_generations
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import prefill
from icl_ft_fast.engine.loading import from_network

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


def texts(model, prompts, new_tokens=NEW_TOKENS, stop=(), **options):
    return [written.text for written in generate(model, prompts, Sampling(new_tokens, stop=stop), **options)]


def text_of(tokenizer, ids, stop=(), ends=(1,)):
    """What is written before the first end token and the first stop string."""
    ends_at = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:ends_at])
    return text[: min([text.find(mark) for mark in stop if mark in text], default=len(text))]


@pytest.fixture(params=["as rows come", "constant shapes"])
def forwards(request, monkeypatch):
    """Sizes of the batches of constant shapes, which a GPU would replay as graphs; none where rows go as they come."""
    sizes, is_constant = [], request.param == "constant shapes"
    logits = decoding._Batch.logits
    monkeypatch.setattr(generate_module, "is_late", lambda device: is_constant)
    monkeypatch.setattr(
        decoding._Batch, "logits", lambda self, numbers: sizes.append(self._sizes[0]) or logits(self, numbers)
    )
    yield sizes
    assert bool(sizes) == is_constant


@pytest.mark.parametrize(("chunk_tokens", "running"), [(512, 64), (5, 64), (512, 3), (5, 1)])
def test_continuations_are_those_of_each_prompt_alone(
    llama, alone, tokenizer, monkeypatch, chunk_tokens, running, forwards
):
    monkeypatch.setattr(generate_module, "chunk_tokens_of", lambda _: chunk_tokens)
    monkeypatch.setattr(generate_module, "RUNNING", running)
    expected = [text_of(tokenizer, alone(prompt)) for prompt in PROMPTS]
    assert texts(llama, PROMPTS, NEW_TOKENS) == expected
    assert len(set(expected)) > len(PROMPTS) // 2


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_few_new_tokens(llama, alone, tokenizer, new_tokens):
    expected = [text_of(tokenizer, alone(prompt)[:new_tokens]) for prompt in PROMPTS]
    assert texts(llama, PROMPTS, new_tokens) == expected


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
    assert texts(model, prompts, 8) == expected


def test_a_stop_string_ends_a_continuation_and_is_cut_off(llama, alone, tokenizer):
    wholes = [text_of(tokenizer, alone(prompt)) for prompt in PROMPTS]
    middles = [text[len(text) // 2 :][:2] for text in wholes]
    stop = tuple(dict.fromkeys(middle for middle in middles[:3] if "\ufffd" not in middle)) or tuple(middles[:1])
    expected = [text_of(tokenizer, alone(prompt), stop) for prompt in PROMPTS]
    assert any(short != whole for short, whole in zip(expected, wholes, strict=True))
    ledger, whole = Ledger(), Ledger()
    assert texts(llama, PROMPTS, NEW_TOKENS, stop=stop, ledger=ledger) == expected
    texts(llama, PROMPTS, NEW_TOKENS, ledger=whole)
    assert ledger.decoded_tokens < whole.decoded_tokens


def test_the_earliest_of_several_stop_strings_counts(llama, alone, tokenizer):
    text = text_of(tokenizer, alone("the"))
    early, late = text[2:4], text[-2:]
    assert 0 < text.find(early) < text.find(late)
    for stop in ((early, late), (late, early)):
        assert texts(llama, ["the"], NEW_TOKENS, stop=stop) == [text[: text.find(early)]]


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
    assert texts(model, PROMPTS, NEW_TOKENS, ledger=ledger) == [text_of(tokenizer, written) for written in ids]
    distinct = {tuple(prompt): len(new) for prompt, new in zip(encode(tokenizer, PROMPTS), ids, strict=True)}
    assert ledger.decoded_tokens == sum(distinct.values())  # EOS included


def test_every_end_token_of_the_generation_settings_ends_a_continuation(llama, alone, plain_llama, tokenizer):
    other = alone("the")[NEW_TOKENS // 2]
    network = copy.deepcopy(llama.network)
    network.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    model = from_network(network, tokenizer, "here")
    ends = [tokenizer.eos_token_id, other]
    ids = [plain_greedy(plain_llama, tokenizer, prompt, NEW_TOKENS, eos_token_id=ends) for prompt in PROMPTS]
    assert texts(model, PROMPTS, NEW_TOKENS) == [text_of(tokenizer, written, ends=ends) for written in ids]
    assert any(len(written) < NEW_TOKENS for written in ids)


def test_the_ledger_counts_shared_prefixes_and_equal_prompts_once(llama, tokenizer):
    distinct = {tuple(ids) for ids in encode(tokenizer, PROMPTS)}
    assert len(distinct) < len(set(PROMPTS))  # BOS makes two prompts equal
    nodes = {ids[:n] for ids in distinct for n in range(1, len(ids) + 1)}
    ledger = Ledger(decoded_tokens=1)
    texts(llama, PROMPTS, 4, ledger=ledger)
    assert ledger == Ledger(
        request_tokens=sum(map(len, distinct)),
        forwarded_tokens=len(nodes) + 3 * len(distinct),
        head_tokens=4 * len(distinct),
        decoded_tokens=1 + 4 * len(distinct),
    )


def test_continuations_are_yielded_as_they_end_and_free_places_are_refilled(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(generate_module, "RUNNING", 3)
    prompts, steps, step = encode(tokenizer, PROMPTS), [], generate_module._Decoder._step
    monkeypatch.setattr(generate_module._Decoder, "_step", lambda self: steps.append(1) or step(self))
    lengths = [1 + 5 * (p % 3) for p in range(len(prompts))]
    ledger, done, written = Ledger(), {}, {}
    for p, generation in iter_generations(
        llama,
        prompts,
        [Sampling(n) for n in lengths],
        ledger=ledger,
        on_token=lambda p, token: written.setdefault(p, []).append((token.id, token.logp)),
    ):
        done[p] = (ledger.decoded_tokens, generation)
    assert [list(zip(done[p][1].ids, done[p][1].logp, strict=True)) for p in range(len(prompts))] == [
        written[p] for p in range(len(prompts))
    ]
    decoded = [count for count, _ in done.values()]
    assert decoded == sorted(decoded)
    assert decoded[0] < decoded[-1]
    assert len(steps) <= (ledger.decoded_tokens + 2) // 3 + max(lengths)  # no place waits for its neighbours


@pytest.mark.parametrize("running", [1, 4, 64])
def test_prompts_start_from_contexts_and_are_kept_as_contexts(llama, monkeypatch, running, forwards):
    monkeypatch.setattr(generate_module, "RUNNING", running)
    tails = [[9, 4, 7], [9, 5], [9], [8, 6, 5, 4], []]
    first, second = [3 + i % 50 for i in range(70)], [5 + i % 40 for i in range(50)]
    prompts = [[*document, *tail] for document in (first, second) for tail in tails] + [[3, 3]]
    how = Sampling(max_new_tokens=6)
    expected = generate(llama, prompts, how)
    starts = {p: prefill(llama, first if p < 5 else [*second, 9, 9]) for p in range(10)}
    kept, ledger = {}, Ledger()
    keep = {0: 73, 5: 40, 9: 50, 10: 2}  # a whole prompt, beginnings that a context has, and one that none has
    told = dict(
        iter_generations(llama, prompts, how, ledger=ledger, reuse=Reuse(starts, keep, kept.__setitem__, top=3))
    )
    assert [told[p].ids for p in range(len(prompts))] == [one.ids for one in expected]
    # Each document is copied once, but what an earlier prompt begins with and the last token of a prompt.
    assert ledger.cached_tokens == 70 - 2 + 50 - 1
    assert ledger.forwarded_tokens < 60 + ledger.decoded_tokens
    assert kept.keys() == keep.keys()
    for p, context in kept.items():
        plain = prefill(llama, prompts[p][: keep[p]])
        assert context.token.tolist() == plain.token.tolist()
        torch.testing.assert_close(context.hidden, plain.hidden, atol=1e-4, rtol=1e-4)
        for layer, (keys, values) in context.cache.layers(keep[p]).items():
            for mine, others in zip((keys, values), plain.cache.layers(keep[p])[layer], strict=True):
                torch.testing.assert_close(mine, others, atol=1e-4, rtol=1e-4)
    again = dict(iter_generations(llama, prompts, how, reuse=Reuse(dict.fromkeys(range(11), kept[5]))))
    assert [again[p].ids for p in range(len(prompts))] == [one.ids for one in expected]
    for new in told[0].tokens:
        assert (new.rank, len(new.top)) == (1, 3)
        assert new.top[0] == pytest.approx((new.id, new.logp), abs=1e-5)


@pytest.mark.parametrize("running", [1, 4, 64])
def test_squeezing_the_stack_changes_nothing(llama, plain, plain_llama, monkeypatch, running, forwards):
    rng = random.Random(running)
    alphabet = [5, 6, 7]
    prompts = [rng.choices(alphabet, k=rng.randint(1, 7)) for _ in range(24)]
    prompts += [rng.choices(alphabet, k=12) + [8] * rng.randint(0, 2) for _ in range(12)]
    sampling = [Sampling(rng.randint(1, 6), temperature=1.0, seed=rng.randint(0, 2)) for _ in prompts]
    alone = [generate(llama, [prompt], how)[0] for prompt, how in zip(prompts, sampling, strict=True)]
    squeezed = []
    squeeze = generate_module._Decoder._squeeze
    monkeypatch.setattr(generate_module, "RUNNING", running)
    monkeypatch.setattr(generate_module._Decoder, "_squeeze", lambda self: squeezed.append(1) or squeeze(self))
    together = generate(llama, prompts, sampling)
    assert bool(squeezed) == (running < 64)
    assert [written.ids for written in together] == [written.ids for written in alone]
    assert {written.finish for written in together} <= {"length", "eos"}
    for prompt, written in zip(prompts, together, strict=True):
        if written.ids:
            logp, _ = plain(plain_llama, prompt, written.ids)
            torch.testing.assert_close(torch.tensor(written.logp).double(), logp, rtol=0, atol=1e-5)


CONTROLS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.2, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "no_repeat_ngram": 2},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram": 1},
]


def draw_as_we_do(rng):
    """torch.multinomial by the next number of `rng`."""

    def multinomial(probabilities, num_samples):
        below = probabilities[0].double().cumsum(0)
        return (below > rng.random() * below[-1]).nonzero()[:1]

    return multinomial


def test_draws_are_those_of_transformers_under_every_control(llama, plain_llama, tokenizer, monkeypatch):
    """One call with every control at once, against transformers' generate alone for each, drawing the same numbers."""
    ids = encode(tokenizer, PROMPTS[:2])
    cases = [(prompt, {"seed": 3} | control) for control in CONTROLS for prompt in ids]
    written = generate(llama, [p for p, _ in cases], [Sampling(NEW_TOKENS, **how) for _, how in cases])
    greedy = []
    for (prompt, how), ours in zip(cases, written, strict=True):
        options = {"temperature": 1.0, "top_k": 0} | how
        seed, ngram = options.pop("seed"), options.pop("no_repeat_ngram", 0)
        monkeypatch.setattr(torch, "multinomial", draw_as_we_do(random.Random(f"{seed} {tuple(prompt)}")))
        if "temperature" not in how:
            options = {"repetition_penalty": how.get("repetition_penalty", 1.0)}
        theirs = plain_llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample="temperature" in how,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=1,
            pad_token_id=0,
            no_repeat_ngram_size=ngram,
            **options,
        )[0, len(prompt) :].tolist()
        assert list(ours.ids) == (theirs[: theirs.index(1)] if 1 in theirs else theirs), how
        greedy.append(ours.ids == generate(llama, [prompt], Sampling(NEW_TOKENS))[0].ids)
    assert not any(greedy)  # every control shows


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(llama, monkeypatch):
    cases = [(prompt, Sampling(NEW_TOKENS, temperature=1.0, seed=seed)) for prompt in PROMPTS for seed in range(4)]
    whole = generate(llama, *zip(*cases, strict=True))
    assert len({written.ids for written in whole}) > 0.9 * 4 * (len(PROMPTS) - 2)
    for running in (3, 64):
        monkeypatch.setattr(generate_module, "RUNNING", running)
        order = random.Random(running).sample(range(len(cases)), len(cases) // 2)
        part = generate(llama, *zip(*(cases[i] for i in order), strict=True))
        assert [written.ids for written in part] == [whole[i].ids for i in order]


def test_samples_of_a_prompt_share_its_rows(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(generate_module, "RUNNING", 2)
    ((*prompt,),) = encode(tokenizer, ["the cat sat"])
    ledger = Ledger()
    generate(llama, [prompt] * 5, [Sampling(3, temperature=1.0, seed=seed) for seed in range(5)], ledger=ledger)
    assert ledger.forwarded_tokens == len(prompt) + ledger.decoded_tokens - 5
    assert ledger.request_tokens == len(prompt)


def test_what_ends_a_continuation_is_told(ending, llama, alone, tokenizer):
    _, model = ending
    written = generate(model, PROMPTS, Sampling(NEW_TOKENS))
    assert {w.finish for w in written} == {"eos", "length"}
    assert all((len(w.ids) < NEW_TOKENS) == (w.finish == "eos") for w in written)
    ids = alone("the")
    stop = tokenizer.decode(ids[:3])[-1]
    (stopped,) = generate(llama, ["the"], Sampling(NEW_TOKENS, stop=(stop,)))
    assert stopped.finish == "stop"
    assert list(stopped.ids) == ids[: len(stopped.ids)]
    assert stop in tokenizer.decode(list(stopped.ids))  # what is written holds the stop string, the text does not
    assert stop not in tokenizer.decode(list(stopped.ids[:-1])) + stopped.text


@pytest.mark.parametrize(("names", "message"), [(None, r"^prompts\[1\]: no tokens$"), (["a", "b"], r"^b: no tokens$")])
def test_a_prompt_of_token_ids_is_named_by_its_place_or_as_told(llama, names, message):
    with pytest.raises(GenerateError, match=message):
        list(iter_generations(llama, [[5], []], Sampling(1), names=names))


def test_no_prompts_are_no_continuations(llama):
    ledger = Ledger()
    assert generate(llama, [], ledger=ledger) == []
    assert ledger == Ledger()


def test_a_prompt_may_fill_every_position(llama, alone, tokenizer):
    prompt = "the"
    while len(tokenizer.encode(prompt)) < 254:
        prompt += " cat"
    assert texts(llama, [prompt], 3) == [text_of(tokenizer, alone(prompt, 3))]
    with pytest.raises(GenerateError, match=r"^prompt 'the cat.*'\.\.\.: 1 tokens over the model's 256 positions$"):
        texts(llama, ["why", prompt], 4)


def test_a_prompt_without_tokens_is_refused(llama, tokenizer_without_bos):
    model = replace(llama, tokenizer=tokenizer_without_bos)
    with pytest.raises(GenerateError, match=r"^prompt ''\.\.\.: no tokens$"):
        generate(model, ["why", ""])


@pytest.mark.parametrize("new_tokens", [0, -1])
def test_at_least_one_new_token(llama, new_tokens):
    with pytest.raises(GenerateError, match=f"^max_new_tokens: expected at least 1, got {new_tokens}$"):
        texts(llama, ["the"], new_tokens)


@pytest.mark.parametrize("stop", [("",), ("x", ""), "the"])
def test_stop_strings_are_strings_that_are_not_empty(llama, stop):
    with pytest.raises(GenerateError, match=r"^stop: expected non-empty strings, got "):
        texts(llama, ["the"], stop=stop)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k: expected 0 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: expected above 0, at most 1"),
        ({"temperature": 1.0, "min_p": 2.0}, "min_p: expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected above 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram: expected 0 or more"),
        ({"top_p": 0.9}, "temperature: 0 is greedy, where top_k, top_p and min_p mean nothing"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(GenerateError, match=f"^{message}"):
        Sampling(**settings)


def test_one_sampling_or_one_a_prompt(llama):
    with pytest.raises(GenerateError, match=r"^sampling: expected one for each of 2 prompts, got 1$"):
        generate(llama, ["the", "cat"], [Sampling()])


def test_a_small_memory_takes_fewer_tokens_at_a_time_and_generates_the_same(llama, monkeypatch):
    expected, needs, fit = generate(llama, PROMPTS, Sampling(NEW_TOKENS)), [], memory.fit
    monkeypatch.setattr(memory, "held_bytes", lambda _: 0)
    monkeypatch.setattr(memory, "fit", lambda *a, **k: needs.append(fit(*a, **k)) or needs[-1])
    generate(llama, PROMPTS, Sampling(NEW_TOKENS))
    small = replace(llama, memory=memory.Memory(needs[0][1].total_bytes - 1))
    got = generate(small, PROMPTS, Sampling(NEW_TOKENS))
    assert needs[1][0] < needs[0][0] == 512
    assert [one.ids for one in got] == [one.ids for one in expected]
    with pytest.raises(GenerateError, match=r"^memory: too little: "):
        generate(replace(llama, memory=memory.Memory(10**6)), PROMPTS)


def test_a_step_is_captured_once_a_size_and_then_replayed(llama, monkeypatch):
    """A graph that replays by running the forward again on the tensors that it was captured with."""
    how = [Sampling(2 + p) for p in range(len(PROMPTS))]  # so that ever fewer are running
    expected = generate(llama, PROMPTS, how)
    captured, replayed = [], []

    class Graph:
        def replay(self):
            replayed.append(self.batch)
            self.batch._logits.copy_(self.batch._forward())

    @contextmanager
    def capture(graph):
        yield
        graph.batch = next(batch for batch in batches if batch._graph is graph)
        captured.append(graph.batch._sizes[0])

    batches, begin = [], decoding._Batch.__init__
    monkeypatch.setattr(decoding._Batch, "__init__", lambda self, *rest: batches.append(self) or begin(self, *rest))
    monkeypatch.setattr(decoding._Batch, "_can_be_replayed", lambda self: True)
    monkeypatch.setattr(generate_module, "is_late", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    got = generate(llama, PROMPTS, how)
    assert [one.ids for one in got] == [one.ids for one in expected]
    assert captured == [16, 8]
    assert len(replayed) > 4


def test_batches_of_constant_shapes_have_few_sizes():
    sizes = [decoding.batch_size(rows, 48) for rows in range(1, 49)]
    assert sizes == [8] * 8 + [16] * 8 + [32] * 16 + [48] * 16
    assert decoding.batch_size(1, 3) == 3


def test_a_step_that_memory_runs_out_on_is_halved_and_generates_the_same(llama, monkeypatch, caplog, forwards):
    expected, attention, failed = generate(llama, PROMPTS, Sampling(NEW_TOKENS)), ops.trie_attention, []

    def failing(q, *rest, **options):
        if len(q) > 4:
            failed.append(len(q))
            raise MemoryError
        return attention(q, *rest, **options)

    monkeypatch.setattr(ops, "trie_attention", failing)
    got = generate(llama, PROMPTS, Sampling(NEW_TOKENS))
    assert [one.ids for one in got] == [one.ids for one in expected]
    assert 1 < len(failed) <= 8  # each size once, not once a step
    assert "ran out" in caplog.text
