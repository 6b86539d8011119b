"""What OpenAI's client gets from the server for completions, and the command that serves."""

import http.client
import socket
import threading
from types import SimpleNamespace

import pytest
import tokenizer_kinds
import torch
from serving import ASKED, KEY, TEMPLATE, ask, call, openai, serving, uvicorn

from icl_ft_fast import cli
from icl_ft_fast.cli.serve import KEY_VARIABLE
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.integrations.scheduler import Scheduler, Sequences
from icl_ft_fast.integrations.server import _Service


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
        ({"top_k": 5}, Sampling(max_new_tokens=8, temperature=1.0, top_k=5, seed=5)),
        ({"min_p": 0.5}, Sampling(max_new_tokens=8, temperature=1.0, min_p=0.5, seed=5)),
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
