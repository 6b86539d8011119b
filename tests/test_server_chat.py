"""Chats through the server: templates and their arguments, reasoning, tool calls, and what a client leaves out."""

import pytest
from serving import ASKED, CHOICES, TEMPLATE, call, openai, serving

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.likelihood import loglikelihood


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


def test_a_chat_template_without_end_is_cut_off(llama, monkeypatch):
    monkeypatch.setattr("icl_ft_fast.runtime.templates.STEPS", 100_000)
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
