"""Asking and keeping: kills at seeded moments, what is asked again, prices; endpoints against a local fake server."""

import json
import os
import random
import signal
import threading
import time
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from forked import forked

from icl_ft_fast.augmentation.batches import prompts
from icl_ft_fast.augmentation.generators import Endpoint, Recorded, Reply
from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.run import AugmentationRun, Price, reply_key
from icl_ft_fast.augmentation.store import StoredReply
from icl_ft_fast.augmentation.strategies import STRATEGIES
from icl_ft_fast.augmentation.strategy import AugmentError
from icl_ft_fast.cli import main
from icl_ft_fast.engine.generate import Sampling
from icl_ft_fast.runtime.durable import DamagedError, Journal
from icl_ft_fast.tasks.files import TaskError, write_jsonl
from icl_ft_fast.tasks.task import Document

DOCUMENTS = [Document(str(d), f"cat{d} are taller than mat.") for d in range(12)]


# Answers each prompt; the process kills itself at answer number argv[2] or, if argv[3], in the middle of writing it.
class Echo:
    """Answers with a line that holds the prompt's last word but one and the seed."""

    prompts_per_call = None

    def __init__(self, fingerprint="echo"):
        self.fingerprint, self.asked = fingerprint, 0

    def prompt_tokens(self, text):
        return 100

    def replies(self, requests):
        for i, (prompt, sampling) in enumerate(requests):
            self.asked += 1
            yield i, Reply(f"Inferred: {prompt.source} {sampling.seed}", 100, 10, None)


def run_of(folder, generator, template="{{ document }}", samples=2, **how):
    prompting = Prompting(STRATEGIES["local"], template, "here")
    made, _ = prompts(prompting, DOCUMENTS, generator, 50, samples=samples)
    return AugmentationRun(prompting, made, generator, Sampling(50, temperature=1.0, **how), folder)


def lines(folder):
    """Every whole line of every shard."""
    raw = [line for path in sorted(folder.rglob("*.jsonl")) for line in path.read_bytes().splitlines(keepends=True)]
    return [json.loads(line)["row"] for line in raw if line.endswith(b"\n")]


def without_time(rows):
    return [{**asdict(row), "origin": {k: v for k, v in row.origin.items() if k != "time"}} for row in rows]


def killed(folder, last, how):
    """Run until the last reply, then die; torn: in the middle of a line."""
    asked = []

    class Mortal(Echo):
        def replies(self, requests):
            for i, reply in super().replies(requests):
                asked.append(i)
                if len(asked) == last:
                    if how == "torn":
                        with run.store._shard.path.open("ab") as shard:
                            shard.write(b'{"key": "half')
                    os.kill(os.getpid(), signal.SIGKILL)
                yield i, reply

    run = run_of(folder, Mortal())
    run.collect()


def test_killed_at_any_moment_it_goes_on_and_repeats_nothing(tmp_path):
    rng = random.Random(0)
    finished = 0
    for how in ("torn", "whole", "torn"):
        last = rng.randint(2, 8)
        codes, told = forked(partial(killed, tmp_path, last, how))
        assert codes == [-signal.SIGKILL], told
        finished += last - 1
        assert len(lines(tmp_path)) == finished  # all but the one in flight
    run = run_of(tmp_path, Echo())
    assert run.estimate(Price()).stored == finished
    assert run.estimate(Price()).seconds is not None
    run.collect()
    assert run.generator.asked == 24 - finished
    kept = lines(tmp_path)
    assert len(kept) == len({line["key"] for line in kept}) == 24
    whole = run_of(None, Echo())
    whole.collect()
    assert without_time(run.read().rows) == without_time(whole.read().rows)
    again = run_of(tmp_path, Echo())
    again.collect()
    assert again.generator.asked == 0
    assert run.read() == again.read()


def test_neighbouring_seeds_share_no_draw():
    drawn = [
        {sampling.seed for _, sampling in run_of(None, Echo(), samples=4, seed=seed).requests} for seed in range(9)
    ]
    assert len(set.union(*drawn)) == 9 * 4
    assert max(map(max, drawn)) < 2**31  # some endpoints cut a seed to so many bits


@pytest.mark.parametrize(
    "other", [{"template": "{{ document }}!"}, {"generator": Echo("other")}, {"top_p": 0.5}, {"seed": 100}]
)
def test_another_prompt_model_sampling_or_seed_reads_nothing_stale(tmp_path, other):
    run_of(tmp_path, Echo()).collect()
    other = {"generator": Echo()} | other
    run = run_of(tmp_path, other.pop("generator"), **other)
    assert len(run.missing()) == 24
    run.collect()
    assert len(lines(tmp_path)) == 48
    for path in tmp_path.rglob("manifest.json"):
        assert json.loads(path.read_text())["strategy"] == "local"


def test_more_samples_keep_those_there_are(tmp_path):
    run_of(tmp_path, Echo(), samples=1).collect()
    assert len(run_of(tmp_path, Echo(), samples=3).missing()) == 24


def test_a_shard_that_something_else_wrote_to_is_refused(tmp_path):
    run_of(tmp_path, Echo()).collect()
    (path,) = tmp_path.rglob("*.jsonl")
    path.write_bytes(b'{"key": 1}\n' + path.read_bytes())
    with pytest.raises(DamagedError, match=r"00000\.jsonl:1: damaged, or not written by icl-ft-fast"):
        run_of(tmp_path, Echo())
    path.unlink()
    Journal(path).append({"key": 1})
    with pytest.raises(AugmentError, match=r"00000\.jsonl:1: not a reply: .*; move the file away$"):
        run_of(tmp_path, Echo())


def test_the_price_bounds_what_is_asked():
    price = Price(prompt_usd=10_000, completion_usd=20_000)  # a dollar a prompt, 20 cents an answer, a dollar at most
    run = run_of(None, Echo())
    estimate = run.estimate(price)
    assert (estimate.replies, estimate.prompt_tokens, estimate.completion_tokens) == (24, 2400, 1200)
    assert estimate.usd == pytest.approx(48)
    run.collect(price=price, max_usd=9.0)
    spent = 1.2 * len(run.store.replies)
    assert 9 - 2 < spent <= 9  # it stops where one more might cost too much
    assert run.read().dropped["unanswered"] == 24 - len(run.store.replies)
    run.collect(price=price, limit=3)
    assert len(run.store.replies) == 24 - run.read().dropped["unanswered"] == round(spent / 1.2) + 3


def test_recorded_answers_belong_to_their_ids(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [("1", "Inferred: one."), ("1", "Inferred: two."), ("1", "Inferred: three."), ("3", "Inferred: more.")]
    path.write_text("".join(json.dumps({"source_id": name, "text": text}) + "\n" for name, text in rows))
    run = run_of(tmp_path / "store", Recorded(path))
    run.collect()
    assert [(row.source_id, row.text) for row in run.read().rows] == [("1", "one."), ("1", "two."), ("3", "more.")]
    assert run.read().dropped["unanswered"] == 21
    path.write_text('{"source_id": "1"}\n')
    with pytest.raises(TaskError, match=r"answers\.jsonl:1: text: missing"):
        Recorded(path)


SLOW = 599  # comes after a second


class Fake(BaseHTTPRequestHandler):
    """Completions that echo; each prompt meets the statuses of server.trouble first."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        is_chat = self.path.endswith("/chat/completions")
        prompt = body["messages"][0]["content"] if is_chat else body["prompt"]
        with server.lock:
            server.seen.append((self.path, prompt, body, self.headers["Authorization"]))
            tries = sum(seen == prompt for _, seen, _, _ in server.seen)
            server.running += 1
            server.most = max(server.most, server.running)
        status = server.trouble[tries - 1] if tries <= len(server.trouble) else 200
        if status == SLOW:
            time.sleep(1.0)
        text = f"Inferred: {prompt} {body['seed']}"
        choice = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        answer = {"id": "x", "choices": [{"index": 0, "finish_reason": "stop", **choice}], "usage": usage}
        answer = answer if server.instead is None else server.instead
        data = json.dumps(answer if status == 200 else {"error": {"message": f"refused {SECRET}"}}).encode()
        with server.lock:
            server.running -= 1
        self.send_response(status)
        is_page = isinstance(server.instead, str) and server.instead.startswith("<")
        data = server.instead.encode() if isinstance(server.instead, str) else data
        self.send_header("Content-Type", "text/html" if is_page else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with ThreadingHTTPServer(("127.0.0.1", 0), Fake) as running:
        running.instead = None
        running.seen, running.trouble, running.lock, running.running, running.most = [], [], threading.Lock(), 0, 0
        running.url = f"http://127.0.0.1:{running.server_port}/v1"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("is_chat", [False, True])
def test_an_endpoint_is_asked_again_after_429_and_5xx(server, tmp_path, is_chat):
    server.trouble = [429, 500, 503]
    run = run_of(tmp_path, Endpoint(server.url, "some-model", is_chat, concurrency=3), samples=1, seed=5)
    run.collect()
    assert [row.text for row in run.read().rows] == [f"{document.text} 5" for document in DOCUMENTS]
    assert len(server.seen) == 4 * 12
    assert server.most <= 3
    path, _, body, authorization = server.seen[0]
    assert path == ("/v1/chat/completions" if is_chat else "/v1/completions")
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("some-model", 1.0, 50, 5)
    assert authorization == f"Bearer {SECRET}"
    answers = run.store.replies.values()
    assert {(answer.prompt_tokens, answer.completion_tokens, answer.logp) for answer in answers} == {(7, 3, None)}
    assert all(SECRET not in path.read_text() for path in tmp_path.rglob("*.json*"))


def test_an_endpoint_that_takes_too_long_is_asked_again(server, tmp_path):
    server.trouble = [SLOW]
    endpoint = Endpoint(server.url, "some-model", concurrency=12, timeout_s=0.3)
    run = run_of(tmp_path, endpoint, samples=1)
    run.collect(limit=2)
    assert len(run.store.replies) == 2
    assert len(server.seen) == 4
    server.trouble = [SLOW] * 2
    with pytest.raises(AugmentError, match=r"^endpoint: .*: document '\d+': APITimeoutError$"):
        run_of(tmp_path, Endpoint(server.url, "some-model", timeout_s=0.3, retries=1), samples=1).collect(limit=1)


def test_an_endpoint_that_refuses_for_good_is_named_and_loses_nothing(server, tmp_path):
    endpoint = Endpoint(server.url, "some-model", concurrency=2, retries=1)
    run = run_of(tmp_path, endpoint, samples=1)
    run.collect(limit=4)
    server.seen.clear()
    server.trouble = [400]
    with pytest.raises(AugmentError, match=rf"^endpoint: {server.url}: document '\d+': status 400$") as caught:
        run_of(tmp_path, endpoint, samples=1).collect()
    assert SECRET not in str(caught.value)
    assert len(server.seen) <= 2  # no new request after the failure
    assert len(run_of(tmp_path, endpoint, samples=1).missing()) == 8
    server.seen.clear()
    server.trouble = [500] * 5
    with pytest.raises(AugmentError, match=r"status 500$"):
        run_of(tmp_path, endpoint, samples=1).collect(limit=1)
    assert len(server.seen) == 2  # the request and its retry


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, "cut off in its reasoning"),
        ({"choices": [{"message": {"content": " "}, "finish_reason": "stop"}]}, "empty"),
        ({"choices": [{"message": {"content": "<think>a</think>"}, "finish_reason": "stop"}]}, "empty"),
        ({"choices": [{"message": {"content": "a"}, "finish_reason": "content_filter"}]}, "filtered"),
        ({"choices": []}, "of another schema"),
        ({"result": "a"}, "of another schema"),
        ({"choices": "none"}, "of another schema"),
        ({"choices": [{"finish_reason": "stop"}]}, "of another schema"),
        ({"error": {"message": "overloaded"}}, "an error instead"),
        ({"choices": [{"message": {"content": None, "refusal": "No."}}]}, "refused"),
        ({"choices": [{"message": {"content": None, "tool_calls": [{"id": "a"}]}}]}, "a tool call instead"),
        ({"choices": [{"message": {"content": 7}}]}, "empty"),
        ("<html>Log in</html>", "of another schema"),
        ("{", "not JSON"),
        pytest.param("[" * 100_000, "not JSON", id="nested"),
        ({"choices": [{"message": {"content": "\u200b\ufeff"}}]}, "empty"),
    ],
)
def test_what_is_no_reply_is_told_and_asked_for_again(server, tmp_path, body, reason):
    server.instead, notes = body, []
    endpoint = Endpoint(server.url, "some-model", tell=notes.append)
    run = run_of(tmp_path, endpoint, samples=1)
    run.collect(limit=2)
    assert notes == [f"endpoint: 2 requests without a reply (2 {reason}); the same command asks again"]
    assert run.read().dropped["unanswered"] == 12
    server.instead = None
    again = run_of(tmp_path, endpoint, samples=1)
    assert len(again.missing()) == 12
    again.collect()
    assert len(again.read().rows) == 12


def test_replies_in_parts_with_half_characters_and_without_counts_are_read(server, tmp_path):
    parts = [{"type": "text", "text": "Inferred: a \ud800"}, {"type": "image_url"}, {"type": "text", "text": " cat"}]
    message = {"message": {"content": parts}, "finish_reason": None}
    server.instead = {"choices": [message], "usage": {"prompt_tokens": "many", "completion_tokens": -1}}
    run = run_of(tmp_path, Endpoint(server.url, "some-model"), samples=1)
    run.collect(limit=1, price=Price(1.0, 1.0), max_usd=1.0)
    (row,) = run.read().rows
    assert row.text == "a ? cat"
    assert row.origin["prompt_tokens"] > 0 < row.origin["completion_tokens"]
    write_jsonl(tmp_path / "rows.jsonl", [{"text": row.text}])


def test_an_empty_reply_that_was_stored_is_asked_for_again(tmp_path):
    run = run_of(tmp_path, Echo(), samples=1)
    run.store.append(StoredReply(reply_key(*run.requests[0]), " ", 0, 1, 1, None, 1.0))
    again = run_of(tmp_path, Echo(), samples=1)
    assert len(again.missing()) == 12
    again.collect()
    assert len(again.read().rows) == 12
    assert not run_of(tmp_path, Echo(), samples=1).missing()


def test_an_endpoint_needs_a_key_and_a_plain_address(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(AugmentError, match=r"^endpoint: set OPENAI_API_KEY in the environment"):
        run_of(None, Endpoint("http://127.0.0.1:9/v1", "m")).collect()
    for url in ("localhost:8000", "http://me:word@host/v1", "http://host/v1?key=1"):
        with pytest.raises(AugmentError, match=r"^endpoint: expected http\(s\)://host/path without user"):
            Endpoint(url, "m")


@pytest.fixture
def task(tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    texts = ["femp are taller than glon.", "All zota are yazo. All yazo are blata."]
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts))
    )
    question = {"id": "q", "prompt": "glon are", "choices": [" shorter than femp.", " taller than femp."], "answer": 0}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    return folder


def test_the_command_by_rule_reports_what_the_rows_give_away(task, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["augment", "--task", str(task), "--strategy", "rules", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [
        "glon are shorter than femp.",
        "Compared with glon, femp are taller.",
        "All zota are blata.",
    ]
    assert rows[0]["strategy"] == "rules"
    report = json.loads((out / "report.json").read_text())
    assert report["questions_contained"] == {"test": 1}
    assert report["dropped"] == dict.fromkeys(("unparsed", "repeats", "length", "duplicates", "near_duplicates"), 0)
    assert "answers found in the rows, split test: 1 of the questions" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.iterdir()}
    arguments = ["augment", "--task", str(task), "--strategy", "rules", "--out", str(out)]
    assert main(arguments) == 0  # what a kill between the two files, or after them, would lead to
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    for lost in ("none", "report.json"):
        (out / lost).unlink(missing_ok=True)
        capsys.readouterr()
        assert main([*arguments, "--words", "3-9"]) == 2
        assert "exists already; choose another or give --overwrite" in capsys.readouterr().err


def test_the_command_with_recorded_answers_and_a_model(task, tmp_path, capsys, llama_directory):
    recorded, out = tmp_path / "recorded.jsonl", tmp_path / "out"
    replies = [("d0", "Inferred: a b.\nInferred: A b.\nnothing"), ("d7", "of another task")]
    recorded.write_text("".join(json.dumps({"source_id": name, "text": text}) + "\n" for name, text in replies))
    arguments = ["augment", "--task", str(task), "--quiet", "--strategy", "document"]
    assert main([*arguments, "--recorded", str(recorded), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"replies of 1 source_ids belong to no prompt and were not used: {recorded}:2: 'd7' first" in told
    (row,) = (json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines())
    assert (row["text"], row["kind"], row["source_ids"], row["strategy"]) == ("a b.", "inferred", ["d0"], "document")
    assert {"template_sha256", "generator", "sampling", "seed", "time", "logp", "prompt_tokens"} <= row.keys()
    assert row["sampling"]["temperature"] == 0
    drawn = ["augment", "--task", str(task), "--quiet", "--strategy", "global", "--recorded", str(recorded)]
    assert main([*drawn, "--out", str(tmp_path / "drawn")]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "drawn" / "rows.jsonl").read_text().splitlines())
    assert row["sampling"]["temperature"] == 1
    dropped = json.loads((out / "report.json").read_text())["dropped"]
    assert (dropped["unanswered"], dropped["unparsed"], dropped["duplicates"]) == (1, 1, 1)
    template = tmp_path / "short.jinja"
    template.write_text("{{ document }}")
    arguments += ["--model", str(llama_directory), "--prompt-template", str(template), "--max-new-tokens", "5"]
    capsys.readouterr()
    assert main([*arguments, "--dry-run", "--price", "1,1e6", "--out", str(tmp_path / "dry")]) == 0
    assert "2 replies to generate, 0 stored; at most" in (told := capsys.readouterr().out)
    assert "10 completion tokens; at most $10.00" in told
    assert not (tmp_path / "dry").exists()
    assert main([*arguments, "--self-consistent", "--out", str(tmp_path / "asked")]) == 2  # a random model: no row
    assert "asked: no row of 2 prompts; report.json counts what was dropped" in capsys.readouterr().err
    assert len(lines(tmp_path / "asked" / "replies")) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--strategy local", "--model: needed for the strategy local, or --recorded"),
        ("--strategy rules --dry-run", "--dry-run: rules needs no model"),
        ("--recorded x.jsonl --model m", "--recorded: replies come from the file"),
        ("--strategy rules --self-consistent", "--self-consistent: needs a strategy of a --model"),
        ("--recorded x.jsonl --supported", "--supported: needs a strategy of a --model"),
        ("--model m --endpoint nowhere", "endpoint: expected http"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(task, tmp_path, capsys, given, message):
    assert main(["augment", "--task", str(task), *given.split(), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"icl-ft-fast augment: {message}")
