"""Streams say what the whole answer says, and end when nobody reads them."""

import json
import socket
import threading

import pytest
from serving import ask, assert_scores, openai, serving

from icl_ft_fast.integrations import scheduler as scheduler_module
from icl_ft_fast.integrations.streaming import StreamedText


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
