"""The server under load: 50 clients, 20 questions of four choices each, about one context of 4,000 tokens.

A random Llama of 30M parameters. Three servers: contexts kept and waiting questions merged; merged only; neither, which
is the same engine without prefix reuse (a question's own choices still share their prefix). The last two are asked
fewer questions, by fewer clients: their rate does not depend on it, the last one's latencies do. The first server also
writes answers of 32 tokens for the same clients, at once and as streams: no answer may be lost or differ.
"""

import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import torch
import uvicorn

import icl_ft_fast as iff
from benchmarks.score import SIZES, save_model
from benchmarks.timing import Row
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.integrations.scheduler import Scheduler
from icl_ft_fast.integrations.server import make_app
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Question

CLIENTS, CONTEXT_TOKENS = 50, 4000
# Server -> (engine options, at most so many clients, questions a client).
SERVERS = {
    "kept and merged": ({"context_bytes": 2 * 10**9}, 50, 20),
    "merged": ({"context_bytes": 0}, 50, 2),
    "no prefix reuse (16 clients)": ({"context_bytes": 0, "merge": False}, 16, 1),
}
ANSWERS, ANSWER_TOKENS = 2, 32  # a client's
TOLERANCE = 1e-4  # of a log-likelihood, against one plain call


def run(quick: bool) -> list[Row]:
    """Ask every server; `quick` asks 10 clients and the one of interest first."""
    clients = 10 if quick else CLIENTS
    tasks = [simple_reversals(seed, num_facts=200, num_articles=1) for seed in range(4)]
    text = "\n".join(icl_context(task.documents) for task in tasks)
    made = [question for task in tasks for question in task.questions]
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), SIZES["30M"], [text, *(q.prompt for q in made)])
        model = iff.load(folder)
    (ids,) = encoding.encode(model.tokenizer, [text])
    assert len(ids) > CONTEXT_TOKENS
    text = model.tokenizer.decode(ids[:CONTEXT_TOKENS])
    questions = [_question(made, i) for i in range(clients * 20)]
    expected = {score.question_id: score for score in iff.score(model, questions[:clients], context=text)}
    name = f"30M float32, {clients} clients over {CONTEXT_TOKENS:,} tokens, {torch.get_num_threads()} threads"
    rows = []
    for server, (options, most, each) in SERVERS.items():
        with _serving(model, options) as port:
            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                shares = [questions[c::clients][:each] for c in range(min(clients, most))]
                asked = list(pool.map(lambda share: _client(port, text, share), shares))
            seconds = time.perf_counter() - start
        for question, _, logp in (one for client in asked for one in client):
            if question.id in expected:
                worst = max(abs(a - b) for a, b in zip(logp, expected[question.id].logp, strict=True))
                assert worst < TOLERANCE, f"{server}: question {question.id}: log-likelihoods differ by {worst:.1e}"
        ms = [1e3 * took for client in asked for _, took, _ in client]
        p50, p90, p99, p20, p80 = np.percentile(ms, [50, 90, 99, 20, 80]).tolist()
        rows.append(Row("serve", name, server, p50, p20, p80, len(ms) / seconds, "questions/s"))
        rows += [
            Row("serve", name, f"{server}, p{p}", v, v, v, len(ms) / seconds, "questions/s")
            for p, v in ((90, p90), (99, p99))
        ]
    return rows + _answers(model, text, questions, clients, name)


def _answers(model: Model, text: str, questions: list[Question], clients: int, name: str) -> list[Row]:
    """Answers written at once and as streams, in turn; a stream's milliseconds are those to its first token."""
    found: dict[bool, list[tuple[float, dict[str, str], list[float]]]] = {False: [], True: []}
    with _serving(model, {"context_bytes": 2 * 10**9}) as port:
        for is_streamed in (False, False, True, True, False, True):  # the first round makes the context
            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                shares = [questions[c::clients][:ANSWERS] for c in range(clients)]
                asked = list(pool.map(lambda share, s=is_streamed: _written(port, text, share, s), shares))
            seconds = time.perf_counter() - start
            answers = {question: answer for client in asked for question, answer, _ in client}
            found[is_streamed].append((seconds, answers, [1e3 * took for client in asked for _, _, took in client]))
    expected = found[False][0][1]
    assert len(expected) == clients * ANSWERS
    for rounds in found.values():
        assert all(answers == expected for _, answers, _ in rounds), "an answer was lost, or differs"
    rows = []
    for what, rounds in (("written at once", found[False][1:]), ("streamed, to the first token", found[True][1:])):
        p50, p20, p80 = np.percentile([ms for _, _, times in rounds for ms in times], [50, 20, 80]).tolist()
        rate = len(rounds) * len(expected) * ANSWER_TOKENS / sum(seconds for seconds, _, _ in rounds)
        rows.append(Row("serve", f"{name}, {ANSWER_TOKENS} tokens", what, p50, p20, p80, rate, "tokens/s"))
    return rows


def _written(port: int, context: str, questions: list[Question], is_streamed: bool) -> list[tuple[str, str, float]]:
    """(question, answer, seconds to the first or only part of it), one after the other on one connection."""
    connection, done = HTTPConnection("127.0.0.1", port, timeout=600), []
    for question in questions:
        body = {"model": "30M", "prompt": context + question.prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        start = time.perf_counter()
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": is_streamed}), headers)
        response, texts, first = connection.getresponse(), [], 0.0
        for line in response if is_streamed else [b"data: " + response.read()]:
            first = first or time.perf_counter() - start
            if line.startswith(b"data: {"):
                texts.append(json.loads(line[6:])["choices"][0]["text"])
        done.append((question.id, "".join(texts), first))
    connection.close()
    return done


def _question(made: list[Question], i: int) -> Question:
    """Question i: no two alike, though the task has fewer."""
    question, other = made[i % len(made)], made[(i * 7 + 3) % len(made)]
    choices = (*question.choices, *(c + "?" for c in question.choices))[:4]
    return Question(f"q{i}", f"{other.prompt} {i}. {question.prompt}", choices)


@contextmanager
def _serving(model: Model, options: dict[str, object]) -> Iterator[int]:
    engine = Scheduler(model, **options)  # type: ignore[arg-type]
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    config = uvicorn.Config(make_app(engine, "30M"), log_level="warning", access_log=False, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def _client(port: int, context: str, questions: list[Question]) -> list[tuple[Question, float, list[float]]]:
    """(question, seconds, log-likelihoods) of questions asked one after the other on one connection."""
    connection, done = HTTPConnection("127.0.0.1", port, timeout=600), []
    for question in questions:
        body = json.dumps({"context": context, "prompt": question.prompt, "choices": question.choices})
        start = time.perf_counter()
        connection.request("POST", "/v1/score_choices", body, {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        done.append((question, time.perf_counter() - start, [score["logprob"] for score in answer["scores"]]))
    connection.close()
    return done
