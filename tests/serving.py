"""A live server in a thread, and what tests ask of it."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager

import pytest

openai = pytest.importorskip("openai", reason="comes with the extras serve and test-serve, which `make test` installs")
schemathesis = pytest.importorskip("schemathesis", reason="comes with the extra test-serve")

import uvicorn

from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.integrations.scheduler import Scheduler
from icl_ft_fast.integrations.server import make_app

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


def chat(port, *turns, path="/v1/chat/completions", **fields):
    """The answer to a conversation of a system's turn and a user's and an assistant's by turns."""
    roles = ["system", *("user", "assistant") * len(turns)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    asked = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 4} | fields
    status, answer = call(port, "POST", path, asked)
    assert status == 200, answer
    return answer
