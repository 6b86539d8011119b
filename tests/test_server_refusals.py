"""Clients that ask for what is not served, or mean harm: each is refused by name, and harms nobody else."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import VOCABULARY
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError
from serving import ASKED, CHOICES, CONTEXT, KEY, ask, assert_scores, call, openai, schemathesis, serving

from icl_ft_fast import cli
from icl_ft_fast.cli.serve import KEY_VARIABLE
from icl_ft_fast.engine import encoding
from icl_ft_fast.integrations import protocol
from icl_ft_fast.integrations.scheduler import Choices, Scheduler

jsonschema_rs = pytest.importorskip("jsonschema_rs")  # schemathesis brings it


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
        ({"stream_options": {"x": 1}}, "stream_options.x: Extra inputs are not permitted"),
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


def test_other_refusals(live, client):
    port = live[0]
    assert call(port, "POST", "/v1/score_choices", {"prompt": "a", "choices": ["b"] * 10_000})[0] == 400
    assert call(port, "POST", "/v1/completions", {"prompt": "a", "temperature": 0})[1]["error"]["param"] == "model"
    assert call(port, "GET", "/nothing")[1]["error"]["message"] == "GET /nothing: Not Found"
    assert call(port, "GET", "/v1/completions")[0] == 405
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served, 'tiny' is"):
        client.completions.create(model="gpt-4", prompt="a", temperature=0)
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text"}]}]
    answer = call(port, "POST", "/v1/chat/completions", {"model": "tiny", "messages": turns})[1]
    assert answer["error"]["message"].startswith("messages[1].content")
    for body, told in (
        (b'{"model": "tiny",}', "body: not valid JSON at character 17: "),
        (b"[1]", "body: expected a JSON object, sent with content-type: application/json"),
    ):
        assert call(port, "POST", "/v1/completions", body)[1]["error"]["message"].startswith(told)
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


BODIES = [each for each in vars(protocol).values() if isinstance(each, type) and issubclass(each, protocol.Body)]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_a_boolean_is_no_number_and_a_number_no_boolean(body):
    """Python's False == 0; the document's const does not say so."""
    schema = body.model_json_schema()
    for name, field in schema.get("properties", {}).items():
        allowed = jsonschema_rs.Draft202012Validator(field | {"$defs": schema.get("$defs", {})})
        for value in (False, True, 0, 1):
            try:
                body.model_validate({name: value})
                refused = False
            except ValidationError as error:
                refused = any(each["loc"][0] == name for each in error.errors())
            assert refused or allowed.is_valid(value), (name, value)


@pytest.fixture(scope="module")
def document(live):
    return schemathesis.openapi.from_dict(call(live[0], "GET", "/openapi.json")[1])


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("path", ["/tokenize", "/v1/score_choices", "/v1/completions", "/v1/chat/completions"])
def test_whatever_the_document_allows_or_forbids_gets_an_answer(path, mode, document, live):
    options = {"base_url": f"http://127.0.0.1:{live[0]}", "headers": {"Authorization": f"Bearer {KEY}"}}

    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=document[path]["POST"].as_strategy(generation_mode=mode))
    def check(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # else all would end at the name
        # What the document allows may still be refused: a choice that has no token, a prompt that is too long.
        case.call_and_validate(**options, excluded_checks=[schemathesis.specs.openapi.checks.positive_data_acceptance])

    check()


def test_an_address_in_use_is_refused_before_the_model_is_loaded(llama_directory, monkeypatch, capsys):
    monkeypatch.setattr("icl_ft_fast.cli.run.serve.load_model", lambda _: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for more, told in (
            ((), f"127.0.0.1:{port}: Address already in use"),
            (("--host", "203.0.113.1"), "203.0.113.1:"),
        ):
            assert cli.main(["serve", str(llama_directory), "--port", port, *more]) == 2
            assert f"icl-ft-fast serve: --host, --port: {told}" in capsys.readouterr().err


def test_the_key_is_no_argument(tmp_path, monkeypatch, capsys, llama_directory):
    empty = tmp_path / "key"
    empty.write_text("\n")
    monkeypatch.setenv(KEY_VARIABLE, "")
    for arguments, named in (((), f"${KEY_VARIABLE}"), (("--key-file", str(empty)), str(empty))):
        assert cli.main(["serve", str(llama_directory), *arguments]) == 2
        assert f"icl-ft-fast serve: {named}: the key is empty" in capsys.readouterr().err
    empty.write_bytes(b"\xff")
    assert cli.main(["serve", str(llama_directory), "--key-file", str(empty)]) == 2
    assert f"icl-ft-fast serve: {empty}:1: not UTF-8 text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["serve", str(llama_directory), "--api-key", "x"])
