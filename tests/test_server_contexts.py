"""What contexts save the server: kept ones, those of a store, and slots behind their key."""

import pytest
from serving import CHOICES, CONTEXT, TEMPLATE, ask, assert_scores, cached, call, chat, serving

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.generate import Reuse, Sampling, generate, iter_generations
from icl_ft_fast.engine.likelihood import loglikelihood, prefill
from icl_ft_fast.engine.slots import LABEL, key_of, slots_context


@pytest.fixture
def with_template(llama, monkeypatch):
    monkeypatch.setattr(llama.tokenizer, "chat_template", TEMPLATE)


def test_choices_are_scored_and_a_context_is_forwarded_once(llama):
    with serving(llama) as (port, scheduler):
        (context,) = encoding.encode(llama.tokenizer, [CONTEXT])
        cached = []
        for prompt in (" who", " that", " who", "."):
            status, answer = ask(port, prompt)
            assert status == 200
            assert_scores(llama, answer, prompt)
            assert answer["predicted"] == max(range(3), key=lambda c: answer["scores"][c]["logprob"])
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0
        assert min(cached[1:]) >= len(context) - 1  # the last token may be merged with the prompt's first
        assert scheduler.ledger.forwarded_tokens < len(context) + 4 * 40
        assert scheduler.ledger.cached_tokens >= 3 * (len(context) - 1)


def test_a_context_beyond_the_budget_is_not_kept_and_scores_the_same(llama):
    with serving(llama, context_bytes=1000) as (port, scheduler):
        for prompt in (" who", " that"):
            assert_scores(llama, ask(port, prompt)[1], prompt)
        assert len(scheduler.contexts) == 0


def test_a_second_start_maps_what_the_first_one_saved(llama, tmp_path, caplog):
    store = ContextStore(tmp_path, llama, 10**9)
    (context,) = encoding.encode(llama.tokenizer, [CONTEXT])
    answers, forwarded, cached = [], [], []
    for _ in range(2):
        with serving(llama, store=store) as (port, scheduler):
            status, answer = ask(port)
            assert status == 200
        answers.append(answer["scores"])
        forwarded.append(scheduler.ledger.forwarded_tokens)
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert answers[0] == answers[1]
    assert_scores(llama, {"scores": answers[0]}, " who")
    assert len(context) - 1 <= forwarded[0] - forwarded[1] == cached[1] <= len(context)
    assert cached[0] == 0
    assert not caplog.records
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with serving(llama, store=store) as (port, scheduler):
        assert ask(port)[1]["scores"] == answers[0]
        assert scheduler.ledger.forwarded_tokens == forwarded[0]
    assert f"{file}: damaged" in caplog.text
    with serving(llama, store=ContextStore(tmp_path / "small", llama, 1000)) as (port, _):
        assert ask(port)[1]["scores"] == answers[0]
    assert "is over the limit of 0 MB" in caplog.text


def test_slots_in_the_store_answer_behind_their_key(llama, tmp_path):
    store = ContextStore(tmp_path, llama, 10**9)
    key, ids = key_of(llama, "slots", 6)
    other = prefill(llama, [0, *range(20, 25)])
    slots = slots_context(llama, other.cache.layers(6), other.hidden[-1], ids)
    with serving(llama, store=store) as (port, _):
        assert_scores(llama, ask(port, context=key)[1], " who", key)
        path = store.add(slots, f"{LABEL}{key}")
        found = ask(port, context=key)[1]
        asked = {"model": "tiny", "prompt": f"{key} who", "max_tokens": 6, "temperature": 0}
        written = call(port, "POST", "/v1/completions", asked)[1]
        path.unlink()
        assert_scores(llama, ask(port, context=key)[1], " who", key)
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    assert cached(written) == 6
    ((_, behind),) = iter_generations(llama, [f"{key} who"], Sampling(6), reuse=Reuse({0: slots}))
    assert written["choices"][0]["text"] == behind.text != generate(llama, [f"{key} who"], Sampling(6))[0].text
    pairs = encoding.encode_pairs(llama.tokenizer, [(f"{key} who", choice) for choice in CHOICES])
    expected = [one.logp for one in loglikelihood(llama, pairs, start=slots)]
    assert [one["logprob"] for one in found["scores"]] == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx([one.logp for one in loglikelihood(llama, pairs)], abs=1e-3)


def test_chat_and_completions_start_from_kept_contexts(llama, with_template):
    with serving(llama) as (port, scheduler):
        first = chat(port, CONTEXT, "who knows")
        again = chat(port, CONTEXT, "why that mat")
        told = first["choices"][0]["message"]["content"]
        further = chat(port, CONTEXT, "who knows", told, "why " * 70)
        last = chat(port, CONTEXT, "who knows", told, "why " * 70, "the", "who", logprobs=True)
        assert cached(first) == 0
        known = len(encoding.encode(llama.tokenizer, ["<system>" + CONTEXT])[0]) - 1
        assert known <= cached(again) < known + 10
        assert cached(again) < first["usage"]["prompt_tokens"] <= cached(further) + 1 < cached(last) - 60
        assert len(scheduler.contexts) == 1  # a turn replaces the one before
        assert scheduler.ledger.cached_tokens == cached(again) + cached(further) + cached(last)
        body = {"model": "tiny", "prompt": "<system>" + CONTEXT + " who", "max_tokens": 4, "temperature": 0, "n": 3}
        completed = call(port, "POST", "/v1/completions", body)[1]
        assert known <= cached(completed) < known + 5
        whole = chat(port, CONTEXT, "who knows")  # whole, and then its last token again
        assert cached(whole) == whole["usage"]["prompt_tokens"] - 1
    with serving(llama, context_bytes=0) as (port, _):
        for turns, answer in (((CONTEXT, "why that mat"), again), ((CONTEXT, "who knows"), whole)):
            plain = chat(port, *turns)
            assert plain["choices"] == answer["choices"]
            assert cached(plain) == 0
        assert call(port, "POST", "/v1/completions", body)[1]["choices"] == completed["choices"]


def test_chats_begin_from_what_another_start_saved(llama, with_template, tmp_path):
    store, answers = ContextStore(tmp_path, llama, 10**9), []
    for question in ("who knows", "why that mat"):
        with serving(llama, store=store) as (port, _):
            answers.append(chat(port, CONTEXT, question))
            assert chat(port, CONTEXT, question)["choices"] == answers[-1]["choices"]
        assert len(list(tmp_path.glob("*.safetensors"))) == 1  # what comes before the last turn
    known = len(encoding.encode(llama.tokenizer, ["<system>" + CONTEXT])[0])
    assert cached(answers[0]) == 0
    assert known <= cached(answers[1]) < known + 5
    for _ in range(2):  # one turn has no beginning that is known; two that begin alike have
        with serving(llama, store=store) as (port, _):
            for tail in ("who knows", "why that"):
                body = {"model": "tiny", "prompt": CONTEXT + tail, "max_tokens": 1, "temperature": 0}
                status, answer = call(port, "POST", "/v1/completions", body)
                assert status == 200
                answers.append(answer)
    assert [cached(answer) > 64 for answer in answers[2:]] == [False, True, True, True]
