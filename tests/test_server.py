"""The server, live in a thread: what OpenAI's client gets, what contexts save, and that hostile clients harm nobody."""

import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tokenizer_kinds
import torch
from conftest import VOCABULARY, sentences
from hypothesis import HealthCheck, given, settings

openai = pytest.importorskip("openai", reason="comes with the extras serve and test-serve, which `make test` installs")
schemathesis = pytest.importorskip("schemathesis", reason="comes with the extra test-serve")

import uvicorn
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from icl_ft_fast import cli
from icl_ft_fast.cli.serve import KEY_VARIABLE
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.generate import Reuse, Sampling, generate, iter_generations
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import ScoreError, loglikelihood, prefill
from icl_ft_fast.engine.slots import LABEL, key_of, slots_context
from icl_ft_fast.integrations import scheduler as scheduler_module
from icl_ft_fast.integrations.guard import Limits
from icl_ft_fast.integrations.scheduler import (
    Choices,
    Prompts,
    Scheduler,
    SchedulerBusyError,
    SchedulerClosedError,
    Sequences,
)
from icl_ft_fast.integrations.server import _Service, make_app
from icl_ft_fast.integrations.streaming import StreamedText

KEY = "a key that nobody guesses"
CONTEXT = " ".join(["the cat sat on that mat, who knows why?"] * 6)
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHOICES = (" sat on that mat", " knows", " why who")
ASKED = {"model": "tiny", "prompt": "the cat", "temperature": 0}


@contextmanager
def serving(model, *, context_bytes=2**26, store=None, **options):
    """Port and scheduler of a live server."""
    scheduler = Scheduler(model, context_bytes=context_bytes, store=store)
    listening = socket.create_server(("127.0.0.1", 0))
    app = make_app(scheduler, "tiny", **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1], scheduler
    finally:
        server.should_exit = True
        thread.join()
    assert scheduler._closed
    assert not scheduler._thread.is_alive()


@pytest.fixture(scope="module")
def live(llama):
    limits = Limits(body_bytes=100_000, body_s=0.3, choices=100, new_tokens=50)
    template, llama.tokenizer.chat_template = llama.tokenizer.chat_template, TEMPLATE
    try:
        with serving(llama, key=KEY, limits=limits) as (port, scheduler):
            yield port, scheduler
    finally:
        llama.tokenizer.chat_template = template


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{live[0]}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def call(port, method, path, body=None, key=KEY):
    """Status and parsed body of one request; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def ask(port, prompt=" who", context=CONTEXT, choices=CHOICES):
    return call(port, "POST", "/v1/score_choices", {"context": context, "prompt": prompt, "choices": choices})


def assert_scores(llama, answer, prompt, context=CONTEXT, choices=CHOICES):
    expected = loglikelihood(llama, [(context + prompt, choice) for choice in choices])
    assert [score["logprob"] for score in answer["scores"]] == pytest.approx([e.logp for e in expected], abs=1e-4)
    assert [score["is_greedy"] for score in answer["scores"]] == [e.is_greedy for e in expected]


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


# What is served


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


def test_what_waits_together_is_one_trie(llama, monkeypatch):
    begun, go_on, batches = threading.Event(), threading.Event(), []

    def encode(self, jobs):
        batches.append(len(jobs))
        begun.set()
        assert go_on.wait(60)
        return original(self, jobs)

    original = Scheduler._encode
    monkeypatch.setattr(Scheduler, "_encode", encode)
    scheduler = Scheduler(llama, context_bytes=0)
    prompts = [" " + text.strip() for text in sentences(8)]
    first = scheduler.submit(Choices("", "the cat", (" sat",)))
    assert begun.wait(60)
    futures = [scheduler.submit(Choices(CONTEXT, prompt, CHOICES)) for prompt in prompts]
    dropped = scheduler.submit(Choices(CONTEXT, " nobody waits for this", CHOICES))
    wrong = scheduler.submit(Choices(CONTEXT, "", ("",)))
    assert dropped.cancel()
    go_on.set()
    before = Ledger()
    loglikelihood(llama, [("the cat", " sat")], ledger=before)
    loglikelihood(llama, [(CONTEXT + prompt, choice) for prompt in prompts for choice in CHOICES], ledger=before)
    for prompt, future in zip(prompts, futures, strict=True):
        expected = loglikelihood(llama, [(CONTEXT + prompt, choice) for choice in CHOICES])
        assert [r.logp for r in future.result().results] == pytest.approx([e.logp for e in expected], abs=1e-4)
    with pytest.raises(ScoreError, match=r"^choices\[0\]: no token of its own"):
        wrong.result()
    assert first.done()
    scheduler.close()
    assert batches == [1, len(prompts) + 1]
    assert scheduler.ledger == before


def test_a_beginning_that_batches_had_in_common_is_kept(llama):
    scheduler, expected = Scheduler(llama, context_bytes=2**26), []
    ids = encoding.encode(llama.tokenizer, [CONTEXT + text for text in (" who", " knows", " that", " mat")])
    try:
        for token in ids:
            answer = scheduler.submit(Sequences([(token[:1], token[1:])], 1)).result()
            expected.append(answer.cached_tokens)
            alone = loglikelihood(llama, [(token[:1], token[1:])])[0].logp
            assert sum(answer.results[0].logp) == pytest.approx(alone, abs=1e-3)
    finally:
        scheduler.close()
    assert expected[:2] == [0, 0]  # the second sees that the first began alike, and keeps that
    assert min(expected[2:]) >= 64
    assert len(scheduler.contexts) == 1


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


def chat(port, *turns, path="/v1/chat/completions", **fields):
    """The answer to a conversation of a system's turn and a user's and an assistant's by turns."""
    roles = ["system", *("user", "assistant") * len(turns)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    asked = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 4} | fields
    status, answer = call(port, "POST", path, asked)
    assert status == 200, answer
    return answer


@pytest.fixture
def with_template(llama, monkeypatch):
    monkeypatch.setattr(llama.tokenizer, "chat_template", TEMPLATE)


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


def test_a_second_attempt_at_a_batch_tells_no_token_again(llama, monkeypatch):
    written, failed = [], []

    def iter_generations(*arguments, on_token, **options):
        def breaks(p, token):
            if len(written) == 3 and not failed:
                failed.append(token)
                raise RuntimeError("the device is lost")
            return on_token(p, token)

        return original(*arguments, on_token=breaks, **options)

    original = scheduler_module.iter_generations
    scheduler = Scheduler(llama, context_bytes=2**26)
    how = Sampling(max_new_tokens=6, temperature=1.0, seed=3)
    prompts = encoding.encode(llama.tokenizer, ["the cat", "who"])
    expected = generate(llama, prompts, how)
    monkeypatch.setattr(scheduler_module, "iter_generations", iter_generations)
    with scheduler._changed:  # both wait together
        told = scheduler.submit(Prompts(prompts[:1], [how], lambda _, token: written.append(token.id) or True))
        other = scheduler.submit(Prompts(prompts[1:], [how]))
    assert [future.result().results[0].ids for future in (told, other)] == [one.ids for one in expected]
    assert failed
    assert written == list(expected[0].ids)
    scheduler.close()


def test_completions_through_the_client(client, llama):
    expected = [one.text for one in generate(llama, ["the cat", "who"], Sampling(max_new_tokens=6))]
    got = client.completions.create(model="tiny", prompt=["the cat", "who"], max_tokens=6, temperature=0)
    assert [choice.text for choice in got.choices] == expected
    assert [choice.finish_reason for choice in got.choices] == ["length", "length"]
    assert got.usage.completion_tokens == 12
    stop = expected[0][2:4]
    got = client.completions.create(model="tiny", prompt="the cat", max_tokens=6, temperature=0, stop=stop)
    assert got.choices[0].text == expected[0].split(stop)[0]
    assert got.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("max_tokens", "echo"), [(0, True), (1, True), (1, False), (5, True), (5, False)])
def test_log_probabilities_are_those_of_a_plain_forward(max_tokens, echo, client, llama, plain_llama):
    text, tokenizer = "the cat sat on that", llama.tokenizer
    ids = tokenizer.encode(text)
    got = client.completions.create(
        model="tiny",
        prompt=[ids],
        max_tokens=max_tokens,
        temperature=0,
        echo=echo,
        logprobs=3,
        extra_body={"prompt_logprobs": 2},
    ).choices[0]
    with torch.no_grad():
        for _ in range(max_tokens):
            ids = [*ids, int(plain_llama(torch.tensor([ids])).logits[0, -1].argmax())]
        logp = plain_llama(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    first = 0 if echo else len(ids) - max_tokens
    want = [None, *(logp[i, token].item() for i, token in enumerate(ids[1:]))]
    shown = got.logprobs
    assert len(shown.tokens) == len(ids) - first
    assert "".join(shown.tokens) == got.text == tokenizer.decode(ids[first:])
    places = [got.text[at - (0 if echo else len(text)) - 3 * (not echo) :] for at in shown.text_offset]
    assert all(place.startswith(piece) for place, piece in zip(places, shown.tokens, strict=True))
    assert [v is None for v in shown.token_logprobs] == [v is None for v in want[first:]]
    assert [v or 0 for v in shown.token_logprobs] == pytest.approx([v or 0 for v in want[first:]], abs=1e-4)
    for i, (top, value) in enumerate(zip(shown.top_logprobs, shown.token_logprobs, strict=True), first):
        if i:
            best = logp[i - 1].max().item()
            assert max(top.values()) == pytest.approx(best, abs=1e-4)
            assert (value == max(top.values())) == (int(logp[i - 1].argmax()) == ids[i])  # what lm-eval calls greedy
    prompt = got.prompt_logprobs
    assert prompt[0] is None
    assert len(prompt) == len(ids) - max_tokens
    for i, entry in enumerate(prompt[1:], 1):
        own = entry[str(ids[i])]
        assert next(iter(entry)) == str(ids[i])  # where Inspect AI looks for it
        assert own["logprob"] == pytest.approx(want[i], abs=1e-4)
        assert own["rank"] == 1 + int((logp[i - 1] > logp[i - 1, ids[i]]).sum())
    assert got.text.startswith("<s>the cat") == echo


@pytest.mark.parametrize("kind", ["llama 2", "mistral", "llama 3"])
@pytest.mark.parametrize("prompt", ["<s>the fox", "the  fox", " the fox ", "über 日本"])
def test_an_echo_has_the_spaces_of_its_prompt(kind, prompt):
    tokenizer = tokenizer_kinds.make(kind)
    (ids,) = encoding.encode(tokenizer, [prompt])
    texts = _Service._echoed(SimpleNamespace(tokenizer=tokenizer), ids, prompt)
    assert "".join(texts).removeprefix(tokenizer.bos_token) == prompt.removeprefix(tokenizer.bos_token)


def test_sampling_follows_temperature_top_p_and_seed(client, llama):
    asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 8, "seed": 5}
    for fields, how in (
        ({}, Sampling(max_new_tokens=8, temperature=1.0, seed=5)),
        ({"temperature": 0.5, "top_p": 0.4}, Sampling(max_new_tokens=8, temperature=0.5, top_p=0.4, seed=5)),
        ({"top_k": 5, "min_p": 0.02}, Sampling(max_new_tokens=8, temperature=1.0, top_k=5, min_p=0.02, seed=5)),
        ({"temperature": 0, "top_p": 0.4, "top_k": 3, "min_p": 0.5}, Sampling(max_new_tokens=8)),
        ({"temperature": 0, "repetition_penalty": 1.5}, Sampling(max_new_tokens=8, repetition_penalty=1.5)),
    ):
        (expected,) = generate(llama, ["the cat"], how)
        extra = {name: fields.pop(name) for name in ("top_k", "min_p", "repetition_penalty") if name in fields}
        got = client.completions.create(**asked, **fields, extra_body=extra, logprobs=0).choices[0]
        assert got.text == expected.text
        assert got.logprobs.token_logprobs == pytest.approx(list(expected.logp), abs=1e-4)


def test_an_end_of_text_that_is_predicted_is_no_text(llama, monkeypatch):
    scheduler = Scheduler(llama, context_bytes=0)
    ids = llama.tokenizer.encode("the cat")
    likeliest = scheduler.submit(Sequences([(ids, [])], 1, with_after=True)).result().results[0].after[0][0]
    scheduler.close()
    monkeypatch.setattr("icl_ft_fast.integrations.server.end_tokens", lambda model: {likeliest})
    with serving(llama) as (port, _):
        body = {**ASKED, "max_tokens": 1, "logprobs": 1}
        choice = call(port, "POST", "/v1/completions", body)[1]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert len(choice["logprobs"]["tokens"]) == 1


def test_chat_through_the_client(client, llama):
    turns = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]}]
    got = client.chat.completions.create(model="tiny", messages=turns, temperature=0, max_completion_tokens=4)
    (expected,) = generate(llama, ["<user>the cat <assistant>"], Sampling(max_new_tokens=4))
    assert got.choices[0].message.content == expected.text
    asked = {
        "temperature": 0,
        "logprobs": False,
        "max_tokens": 4,
        "extra_body": {"top_logprobs": None},
    }  # OpenCompass's
    again = client.chat.completions.create(model="tiny", messages=turns, **asked)
    assert again.choices[0].message.content == expected.text
    with pytest.raises(openai.BadRequestError, match="the model's chat template refuses them: no such role"):
        client.chat.completions.create(model="tiny", messages=[{"role": "nobody", "content": ""}], temperature=0)


@pytest.mark.parametrize("echo", [False, True])
def test_a_streamed_completion_is_the_whole_one(echo, client):
    asked = {"model": "tiny", "prompt": ["the cat", "who knows"], "max_tokens": 9, "temperature": 0, "echo": echo}
    whole = client.completions.create(**asked)
    stop = whole.choices[0].text[-4:-2]
    for more in ({}, {"stop": stop}, {"n": 2}):
        expected = client.completions.create(**asked, **more)
        streamed = list(client.completions.create(**asked, **more, stream=True, stream_options={"include_usage": True}))
        assert not echo or streamed[0].choices[0].text in asked["prompt"]
        assert streamed[-1].choices == []
        assert streamed[-1].usage == expected.usage
        texts, ends = [""] * len(expected.choices), {}
        for chunk in streamed[:-1]:
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
        assert texts == [choice.text for choice in expected.choices]
        assert ends == {choice.index: choice.finish_reason for choice in expected.choices}


@pytest.mark.parametrize(
    ("stop", "left"), [(("at",), "the c"), ((" w",), "the cat"), (("t w",), "the ca"), (("knows", "o k"), "the cat wh")]
)
def test_a_stream_ends_before_its_stop_string(stop, left, tokenizer):
    stream, written, sent = StreamedText(tokenizer, [0], stop), [], ""
    for token in tokenizer("the cat who knows", add_special_tokens=False)["input_ids"]:
        written.append(token)
        sent += stream.push(token).get("content", "")
        if any(mark in tokenizer.decode(written) for mark in stop):  # the decoder's last token
            break
    assert sent + stream.finish(left).get("content", "") == left


def test_a_streamed_chat_is_the_whole_one(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "temperature": 0, "max_tokens": 9}
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert len(chunks) > 3


@pytest.mark.parametrize("stop", [None, " s"])
def test_a_stream_tells_the_log_probabilities_of_the_whole_one(stop, client):
    asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 12, "temperature": 1, "seed": 3, "n": 2, "stop": stop}
    whole, parts = client.completions.create(**asked, logprobs=2), {0: [], 1: []}
    for chunk in client.completions.create(**asked, logprobs=2, stream=True):
        if told := chunk.choices[0].logprobs:
            parts[chunk.choices[0].index].append(told)
    for choice in whole.choices:
        told, expected = parts[choice.index], choice.logprobs
        assert len(told) > 2
        for name in ("tokens", "text_offset", "top_logprobs"):
            assert [one for part in told for one in getattr(part, name)] == getattr(expected, name)
        logp = [one for part in told for one in part.token_logprobs]
        assert logp == pytest.approx(expected.token_logprobs, abs=1e-5)
    turns = [{"role": "user", "content": "the cat"}]
    asked = {"model": "tiny", "messages": turns, "temperature": 0, "max_tokens": 7, "logprobs": True, "top_logprobs": 2}
    expected = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = client.chat.completions.create(**asked, stream=True)
    told = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert told == expected


def test_what_a_stream_cannot_begin_is_an_error_with_a_status(client):
    with pytest.raises(openai.BadRequestError, match=r"prompt\[0\]: 300 tokens"):
        client.completions.create(model="tiny", prompt=[[5] * 300], stream=True)


def test_a_stream_that_nobody_reads_ends(llama, monkeypatch):
    gone, written = threading.Event(), []

    class Watched(threading.Event):
        def set(self):
            super().set()
            gone.set()

    def iter_generations(*arguments, on_token, **options):
        def waits(*one):
            written.append(one)
            if len(written) == 3:
                assert gone.wait(60)
            return on_token(*one)

        return original(*arguments, on_token=waits, **options)

    original = scheduler_module.iter_generations
    monkeypatch.setattr(scheduler_module, "iter_generations", iter_generations)
    monkeypatch.setattr("icl_ft_fast.integrations.server.Event", Watched)
    monkeypatch.setattr("icl_ft_fast.engine.generate.end_tokens", lambda model: set())
    with serving(llama) as (port, _):
        asked = {"model": "tiny", "prompt": "the", "max_tokens": 200, "temperature": 0, "stream": True, "echo": True}
        body = json.dumps(asked).encode()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
            connection.sendall(head.encode() + b"%d\r\n\r\n" % len(body) + body)
            received = b""
            while b"data: " not in received:
                received += connection.recv(10_000)
        assert_scores(llama, ask(port)[1], " who")
    assert len(written) <= 3


def test_repeated_prompts_are_drawn_again_and_a_seed_repeats_them(client):
    asked = {"model": "tiny", "max_tokens": 12, "temperature": 1}
    texts = [choice.text for choice in client.completions.create(**asked, prompt=["the cat"] * 3).choices]
    assert len(set(texts)) == 3
    several = [client.completions.create(**asked, prompt="the cat", n=3, seed=7) for _ in range(2)]
    drawn = [[choice.text for choice in one.choices] for one in several]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 3
    assert drawn[0][0] == client.completions.create(**asked, prompt="the cat", seed=7).choices[0].text
    scored = client.completions.create(**asked, prompt="the cat", n=3, seed=7, logprobs=0)
    mean = {choice.text: sum(choice.logprobs.token_logprobs) / 12 for choice in scored.choices}
    best = client.completions.create(**asked, prompt="the cat", n=1, best_of=3, seed=7).choices
    assert [choice.text for choice in best] == [max(mean, key=mean.get)]


def test_log_probabilities_of_chat(client):
    turns = [{"role": "user", "content": "the cat"}]
    asked = {"model": "tiny", "messages": turns, "temperature": 0, "max_tokens": 5, "logprobs": True}
    choice = client.chat.completions.create(**asked, top_logprobs=2).choices[0]
    listed = choice.logprobs.content
    assert "".join(token.token for token in listed) == choice.message.content
    for token in listed:
        assert [token.top_logprobs[0].token, len(token.top_logprobs)] == [token.token, 2]
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="top_logprobs: needs logprobs"):
        client.chat.completions.create(**asked | {"logprobs": False}, top_logprobs=2)


def test_a_chat_without_max_tokens_has_all_that_is_left(llama, monkeypatch):
    monkeypatch.setattr("icl_ft_fast.engine.generate.end_tokens", lambda model: set())
    before, llama.tokenizer.chat_template = llama.tokenizer.chat_template, TEMPLATE
    try:
        with serving(llama) as (port, _):
            asked = {"model": "tiny", "messages": [{"role": "user", "content": "the cat " * 30}], "temperature": 0}
            counts = call(port, "POST", "/v1/chat/completions", asked)[1]["usage"]
            assert counts["total_tokens"] == llama.max_positions + 1
    finally:
        llama.tokenizer.chat_template = before


def test_reasoning_is_told_from_the_answer(llama, monkeypatch):
    before, llama.tokenizer.chat_template = llama.tokenizer.chat_template, TEMPLATE + "{{ '<think>' if deep }}"
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "who"}], "temperature": 0, "max_tokens": 6}
    try:
        with serving(llama) as (port, _):
            plain = call(port, "POST", "/v1/chat/completions", asked)[1]["choices"][0]["message"]
            assert "reasoning_content" not in plain
            deep = asked | {"chat_template_kwargs": {"deep": True}}
            message = call(port, "POST", "/v1/chat/completions", deep)[1]["choices"][0]["message"]
            assert message["content"] == ""
            assert message["reasoning_content"]
            refused = call(port, "POST", "/v1/chat/completions", asked | {"chat_template_kwargs": {"tokenize": True}})
            assert refused[0] == 400
    finally:
        llama.tokenizer.chat_template = before


DATED = TEMPLATE.replace("{{ '<s>' }}", "{{ '<s>' }}{{ strftime_now('%d %b') }}{{ ' why' if enable_thinking }}")


def test_template_arguments_reach_every_path(llama, monkeypatch):
    monkeypatch.setattr(llama.tokenizer, "chat_template", DATED)
    turns = [{"role": "user", "content": "the cat"}]
    plain, deep = (
        encoding.encode(llama.tokenizer, [f"03 Feb{mark}<user>the cat <assistant>"])[0] for mark in ("", " why")
    )
    asked = {"model": "tiny", "messages": turns}
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    with serving(llama, template_date="2025-02-03") as (port, _):
        assert call(port, "GET", "/tokenizer_info")[1]["template_date"] == "2025-02-03"
        assert call(port, "POST", "/tokenize", asked)[1]["tokens"] == plain
        assert call(port, "POST", "/tokenize", asked | thinking)[1]["tokens"] == deep
        for fields, ids in (({}, plain), (thinking, deep), ({"enable_thinking": True}, deep)):
            (expected,) = generate(llama, [ids], Sampling(max_new_tokens=4))
            body = asked | fields | {"temperature": 0, "max_tokens": 4}
            answer = call(port, "POST", "/v1/chat/completions", body)[1]
            assert answer["choices"][0]["message"]["content"] == expected.text
            assert answer["usage"]["prompt_tokens"] == len(ids)
        for fields, ids in (({}, plain), (thinking, deep)):
            scores = call(port, "POST", "/v1/score_choices", asked | fields | {"choices": CHOICES})[1]["scores"]
            text = llama.tokenizer.decode(ids[1:])
            expected = loglikelihood(llama, [(text, choice) for choice in CHOICES])
            assert [score["logprob"] for score in scores] == pytest.approx([e.logp for e in expected], abs=1e-4)
        for path, body, told in (
            ("/v1/chat/completions", {"reasoning_effort": "low"}, "reasoning_effort: this model's chat template does"),
            ("/v1/score_choices", {"choices": CHOICES, "prompt": "x"}, "prompt: give either it or messages"),
            ("/v1/score_choices", {"choices": CHOICES, "context": "x"}, "context: not with messages"),
        ):
            status, answer = call(port, "POST", path, asked | body)
            assert (status, answer["error"]["message"].startswith(told)) == (400, True)
        assert call(port, "POST", "/v1/score_choices", {"choices": CHOICES})[0] == 400
    with serving(llama, template_date="2025-02-03", template_arguments={"enable_thinking": True}) as (port, _):
        assert call(port, "POST", "/tokenize", asked)[1]["tokens"] == deep
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        assert call(port, "POST", "/tokenize", asked | off)[1]["tokens"] == plain


def test_streamed_reasoning_is_told_from_the_answer(tokenizer):
    text = "<think>Is it the cat? <no>.</think>\n\nThe cat</think"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream, told = StreamedText(tokenizer, [0], (), ""), {"content": "", "reasoning_content": ""}
    for token in ids:
        for name, new in stream.push(token).items():
            told[name] += new
    for name, new in stream.finish(text).items():
        told[name] += new
    assert told == {"reasoning_content": "Is it the cat? <no>.", "content": "The cat</think"}


def test_fields_that_ask_for_nothing_are_taken(client, llama):
    turns = [
        {"role": "developer", "content": "the "},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": [], "audio": None},
        {"role": "tool", "content": [], "tool_call_id": "x"},
        {"role": "user", "content": "cat", "name": None},
    ]
    nothing = {"stop": [], "tools": [], "logit_bias": {}, "response_format": {"type": "text"}, "tool_choice": "none"}
    nothing |= {"seed": None, "n": None, "stream_options": None, "metadata": {}, "store": False, "functions": []}
    nothing |= {"parallel_tool_calls": False, "function_call": None, "service_tier": "auto", "max_completion_tokens": 4}
    nothing |= {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "ignore_eos": False, "presence_penalty": 0.0}
    asked = {"model": "tiny", "messages": turns, "temperature": 0, "max_tokens": 4}
    got = client.chat.completions.create(**asked, extra_body=nothing)
    prompt = "<system>the <assistant> <tool> <user>cat <assistant>"
    (expected,) = generate(llama, [prompt], Sampling(max_new_tokens=4))
    assert got.choices[0].message.content == expected.text
    with pytest.raises(openai.BadRequestError, match="max_tokens: give either it or max_completion_tokens"):
        client.chat.completions.create(**asked, max_completion_tokens=5)
    for field in ({"stop": ""}, {"suffix": ""}, {"temperature": 1e-300}):
        assert client.completions.create(**ASKED | {"max_tokens": 3}, extra_body=field).choices[0].text


def test_the_arguments_of_a_tool_call_are_what_templates_take(llama, monkeypatch):
    calls = "{% for c in messages[0].tool_calls %}{{ c.function.arguments | tojson }};{% endfor %}"
    monkeypatch.setattr(llama.tokenizer, "chat_template", calls)
    given = ['{"a": 1}', {"a": 1}, "", "[1", "5"]
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": one}} for one in given]
    turns = [{"role": "assistant", "content": None, "tool_calls": calls}]
    with serving(llama) as (port, _):
        answer = call(port, "POST", "/tokenize", {"messages": turns})[1]
    assert llama.tokenizer.decode(answer["tokens"]) == '{"a": 1};{"a": 1};{};"[1";"5";'


def test_methods_and_origins(llama, live, caplog):
    with (
        caplog.at_level("INFO", "icl_ft_fast"),
        serving(llama, key=KEY, allow_origins=["https://a.example"]) as (port, _),
    ):
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {"origin": origin, "access-control-request-method": "POST"}
            connection.request("OPTIONS", "/v1/completions", headers=headers)
            assert connection.getresponse().headers["access-control-allow-origin"] == allowed
            connection.close()
        assert call(port, "POST", "/v1/completions", ASKED | {"max_tokens": 1})[0] == 200
    assert any("POST /v1/completions 200" in record.getMessage() for record in caplog.records)
    assert KEY not in caplog.text
    for method, path, status, allow in (
        ("HEAD", "/v1/models", 200, None),
        ("OPTIONS", "/v1/models", 204, "GET, HEAD, OPTIONS"),
        ("OPTIONS", "/v1/completions", 204, "POST, OPTIONS"),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", live[0], timeout=60)
        connection.request(method, path, headers={"authorization": f"Bearer {KEY}"})
        response = connection.getresponse()
        assert (response.status, response.headers["allow"], response.read()) == (status, allow, b"")
        connection.close()


def test_models_and_tokens(client, live, llama):
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with pytest.raises(openai.NotFoundError, match="'a/b' is not served, 'tiny' is"):
        client.models.retrieve("a/b")
    assert call(live[0], "POST", "/tokenize", {"prompt": "the cat"})[1]["tokens"] == llama.tokenizer.encode("the cat")
    bare = call(live[0], "POST", "/tokenize", {"prompt": "</s>", "add_special_tokens": False})[1]
    assert bare["tokens"] == [llama.tokenizer.eos_token_id]
    info = call(live[0], "GET", "/tokenizer_info")[1]
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<s>", "</s>", TEMPLATE)


# Clients that ask for what is not served, or mean harm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 2.1}, "temperature: "),
        ({"temperature": float("nan")}, "temperature: "),
        ({"temperature": float("inf")}, "temperature: "),
        ({"top_p": float("nan")}, "top_p: "),
        ({"n": 0}, "n: "),
        ({"n": 3, "best_of": 2}, "best_of: expected at least n = 3, got 2"),
        ({"stream": True, "echo": True, "logprobs": 1}, "stream: not with prompt_logprobs, echo with logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty: "),
        ({"logit_bias": {"5": 1}}, "logit_bias: "),
        ({"nonsense": 1}, "nonsense: Extra inputs are not permitted"),
        ({"max_tokens": -1}, "max_tokens: "),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 51}, "max_tokens: at most 50, got 51"),
        ({"max_tokens": 10**30}, "max_tokens: "),
        ({"stop": [5]}, "stop: "),
        ({"logprobs": 21}, "logprobs: "),
        ({"prompt": []}, "prompt: "),
        ({"prompt": {"a": 1}}, "prompt: "),
        ({"prompt": "\ud800"}, "prompt: "),
        ({"prompt": [2**31]}, "prompt: "),
        ({"prompt": [VOCABULARY]}, "prompt[0]: token id 300"),
        ({"prompt": [[5], [5] * 300]}, "prompt[1]: 300 tokens of context"),
        ({"prompt": ["x"] * 101}, "prompt: at most 100 are taken, got 101"),
        ({"prompt": "", "add_special_tokens": False}, "prompt[0]: no token"),
        ({"model": 5}, "model: Input should be a valid string"),
    ],
)
def test_what_cannot_be_followed_is_refused_and_named(change, message, live):
    status, body = call(live[0], "POST", "/v1/completions", ASKED | change)
    assert status == 400
    assert body["error"]["message"].startswith(message)
    assert (body["error"]["type"], set(body["error"])) == (
        "invalid_request_error",
        {"message", "type", "param", "code"},
    )


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
        b'{"model": "tiny", "prompt": "the", "max_tokens": ' + b"9" * 50_000 + b"}",
        b'{"model": "tiny", "prompt": [' + b"9" * 5_000 + b"]}",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "the", "seed": 1e999}',
        b"\xff\xfe",
        b"",
    ],
    ids=["nested", "number", "token", "half a pair", "infinity", "not UTF-8", "nothing"],
)
def test_documents_that_break_a_parser_are_refused(body, live):
    status, answer = call(live[0], "POST", "/v1/completions", body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert call(live[0], "GET", "/v1/models")[0] == 200


def test_a_chat_template_without_end_is_cut_off(llama):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    reaching = "{{ messages.__class__.__mro__ }}"
    for template, told in ((endless, "not done after"), (reaching, "access to attribute '__class__'")):
        before, llama.tokenizer.chat_template = llama.tokenizer.chat_template, template
        try:
            with serving(llama) as (port, _):
                asked = {"model": "tiny", "messages": [{"role": "user", "content": "who"}]}
                status, answer = call(port, "POST", "/v1/chat/completions", asked)
                assert (status, told in answer["error"]["message"]) == (400, True), answer
                assert call(port, "POST", "/tokenize", {"prompt": "the cat"})[0] == 200
        finally:
            llama.tokenizer.chat_template = before


def test_other_refusals(live, client):
    port = live[0]
    assert call(port, "POST", "/v1/score_choices", {"prompt": "a", "choices": ["b"] * 10_000})[0] == 400
    assert call(port, "POST", "/v1/completions", {"prompt": "a", "temperature": 0})[1]["error"]["param"] == "model"
    assert call(port, "GET", "/v1/nothing")[0] == 404
    assert call(port, "GET", "/v1/completions")[0] == 405
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served, 'tiny' is"):
        client.completions.create(model="gpt-4", prompt="a", temperature=0)
    for body in (b"{", b"", b"\xff", b"[" * 20_000, b"null", b'"a"', b'{"prompt": ' + b"9" * 5000 + b"}"):
        status, answer = call(port, "POST", "/v1/completions", body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + "x", "é"])
def test_a_wrong_key_gets_nothing(key, live):
    key = None if key is None else key.encode().decode("latin-1")
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/openapi.json"), ("GET", "/x")):
        status, body = call(live[0], method, path, ASKED, key=key)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert KEY not in json.dumps(body)
    assert call(live[0], "GET", "/health", key=key) == (200, {"status": "ok"})


def begin(port, body, length, chunked=False):
    """A socket on which only a part of a request has been sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    framing = "transfer-encoding: chunked" if chunked else f"content-length: {length}"
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n{framing}\r\n\r\n"
    connection.sendall(head.encode() + (b"%x\r\n%s\r\n" % (len(body), body) if chunked else body))
    return connection


@pytest.mark.parametrize("chunked", [False, True])
def test_huge_and_slow_bodies_are_cut_off(chunked, live, llama):
    with begin(live[0], b"x" * 110_000, 10**9, chunked) as huge, begin(live[0], b'{"pro', 500, chunked) as slow:
        assert_scores(llama, ask(live[0])[1], " who")  # others are served meanwhile
        for connection, status in ((huge, b"413"), (slow, b"408")):
            assert connection.recv(100_000).split()[1] == status


def test_clients_that_disconnect_harm_nobody(llama, monkeypatch):
    begun, go_on, asked = threading.Event(), threading.Event(), []

    def encode(self, jobs):
        asked.extend(job.asked.prompt for job in jobs)
        begun.set()
        assert go_on.wait(60)
        return original(self, jobs)

    original = Scheduler._encode
    taken, cancelled = threading.Event(), threading.Event()
    monkeypatch.setattr(Scheduler, "_encode", encode)
    with serving(llama) as (port, scheduler), ThreadPoolExecutor() as pool:
        submit = scheduler.submit

        def submitted(question):
            future = submit(question)
            future.add_done_callback(lambda done: done.cancelled() and cancelled.set())
            taken.set()
            return future

        monkeypatch.setattr(scheduler, "submit", submitted)
        first = pool.submit(ask, port)
        assert begun.wait(60)
        taken.clear()
        body = json.dumps({"context": CONTEXT, "prompt": " gone", "choices": CHOICES}).encode()
        with socket.create_connection(("127.0.0.1", port)) as gone:
            head = "POST /v1/score_choices HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
            gone.sendall(head.encode() + b"%d\r\n\r\n" % len(body) + body)
            assert taken.wait(60)
            with begin(port, b"{", 50):
                pass  # one that leaves before its body is there
        assert cancelled.wait(60)  # the server has seen that the client is gone
        last = pool.submit(ask, port, " that")
        go_on.set()
        for prompt, future in ((" who", first), (" that", last)):
            assert_scores(llama, future.result()[1], prompt)
    assert " gone" not in asked


def test_more_than_may_wait_is_refused_and_shutting_down_answers_everyone(llama, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    original = Scheduler._encode

    def encode(self, jobs):
        begun.set()
        assert go_on.wait(60)
        return original(self, jobs)

    monkeypatch.setattr(Scheduler, "_encode", encode)
    scheduler = Scheduler(llama, context_bytes=0, max_waiting=2)
    at_work = scheduler.submit(Choices("", "the", CHOICES))
    assert begun.wait(60)
    waiting = [scheduler.submit(Choices("", "the", CHOICES)) for _ in range(2)]
    with pytest.raises(SchedulerBusyError, match=r"^2 requests are waiting already"):
        scheduler.submit(Choices("", "the", CHOICES))
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    wait(waiting)
    go_on.set()
    closing.join()
    assert len(at_work.result().results) == 3
    for future in waiting:
        assert isinstance(future.exception(), SchedulerClosedError)
    with pytest.raises(SchedulerClosedError):
        scheduler.submit(Choices("", "the", CHOICES))


def test_a_failure_is_the_culprits_alone_and_leaks_nothing(llama, monkeypatch):
    class SecretError(Exception):
        pass

    def encode_pairs(tokenizer, pairs, **options):
        if any("culprit" in context for context, _ in pairs):
            raise SecretError("/a/path")
        return original(tokenizer, pairs, **options)

    original = encoding.encode_pairs
    monkeypatch.setattr(encoding, "encode_pairs", encode_pairs)
    with serving(llama) as (port, scheduler):
        jobs = [scheduler.submit(Choices("", prompt, CHOICES)) for prompt in ("the", "culprit", "who")]
        assert isinstance(jobs[1].exception(), SecretError)
        assert len(jobs[0].result().results) == len(jobs[2].result().results) == 3
        status, body = ask(port, "culprit")
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert body["error"]["message"] == "internal error; the server's log has more"


def test_a_text_that_choices_repeat_too_often_is_refused(llama, monkeypatch):
    monkeypatch.setattr("icl_ft_fast.integrations.scheduler.BATCH_CHARACTERS", 100)
    scheduler = Scheduler(llama, context_bytes=0)
    with pytest.raises(ScoreError, match=r"^choices: 109 characters, counting context and prompt with each choice"):
        scheduler.submit(Choices("x" * 30, "y" * 5, ("a", "b", "cd")))
    scheduler.close()


def test_generation_and_scores_share_a_batch(llama):
    scheduler = Scheduler(llama, context_bytes=2**26)
    prompts = encoding.encode(llama.tokenizer, ["the cat", "who knows"])
    how = Sampling(max_new_tokens=5, temperature=1.0, seed=7)
    written, scored = scheduler.submit(Prompts(prompts, [how, how])), scheduler.submit(Choices("", "the cat", CHOICES))
    assert written.result().results == generate(llama, prompts, how)
    assert len(scored.result().results) == 3
    scheduler.close()


@pytest.fixture(scope="module")
def document(live):
    return schemathesis.openapi.from_dict(call(live[0], "GET", "/openapi.json")[1])


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ["/tokenize", "/v1/score_choices", "/v1/completions", "/v1/chat/completions"])
def test_whatever_the_document_allows_or_forbids_gets_an_answer(path, mode, document, live):
    options = {"base_url": f"http://127.0.0.1:{live[0]}", "headers": {"Authorization": f"Bearer {KEY}"}}

    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=document[path]["POST"].as_strategy(generation_mode=mode))
    def check(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # else all would end at the name
        # What the document allows may still be refused: a choice that has no token, a prompt that is too long.
        case.call_and_validate(**options, excluded_checks=[positive_data_acceptance])

    check()


# The command


def test_the_key_is_no_argument(tmp_path, monkeypatch, capsys, llama_directory):
    empty = tmp_path / "key"
    empty.write_text("\n")
    monkeypatch.setenv(KEY_VARIABLE, "")
    for arguments, named in (((), f"${KEY_VARIABLE}"), (("--key-file", str(empty)), str(empty))):
        assert cli.main(["serve", str(llama_directory), *arguments]) == 2
        assert f"icl-ft-fast serve: {named}: the key is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["serve", str(llama_directory), "--api-key", "x"])


def test_the_command_serves(llama_directory, monkeypatch, capsys, tmp_path):
    asked = {}
    (tmp_path / "key").write_text(KEY + "\n")

    def run(app, **options):
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, ws="none", **options))
        assert server.config.workers == 1  # whatever WEB_CONCURRENCY says
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        asked["models"] = call(listening.getsockname()[1], "GET", "/v1/models")
        assert ask(listening.getsockname()[1])[0] == 200
        server.should_exit = True
        thread.join()

    monkeypatch.setattr(uvicorn, "run", run)
    monkeypatch.setenv("WEB_CONCURRENCY", "3")
    command = ["serve", str(llama_directory), "--name", "mine", "--key-file", str(tmp_path / "key")]
    assert cli.main([*command, "--host", "0.0.0.0", "--store", str(tmp_path / "store"), "--store-limit", "0.5"]) == 0
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 1
    assert asked["models"][1]["data"][0]["id"] == "mine"
    assert "no key is set" not in capsys.readouterr().err
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert cli.main(["serve", str(llama_directory), "--host", "0.0.0.0"]) == 0
    assert asked["models"][0] == 200
    assert "whoever reaches 0.0.0.0 may use this server: no key is set" in capsys.readouterr().err
