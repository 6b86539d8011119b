"""study/retrieval.py: BM25 as it is defined, embeddings from an endpoint, the same order for the same set."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from icl_ft_fast.study.retrieval import (
    K1,
    B,
    Bm25,
    Dense,
    EmbeddingEndpoint,
    RetrievalError,
    embedder_of,
    hit_rate,
    in_shared_order,
    retrieve,
    source_documents,
    words,
)
from icl_ft_fast.tasks.chunks import split_documents
from icl_ft_fast.tasks.task import Document, Question, Task

TEXTS = [
    "The lighthouse keeper counts ships; ships that pass by night count twice.",
    "Ships carry grain.",
    "Grain is stored in the old mill, and the mill has no keeper.",
    "Nothing here.",
    "...",
]


def bm25(texts, query):
    """The definition in the docstring, term by term."""
    terms = [words(text) for text in texts]
    mean = sum(map(len, terms)) / len(terms)
    scores = []
    for its in terms:
        score = 0.0
        for term in words(query):
            n, f = sum(term in other for other in terms), its.count(term)
            if f:
                score += math.log(1 + (len(terms) - n + 0.5) / (n + 0.5)) * f / (f + K1 * (1 - B + B * len(its) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["ships", "the keeper of the mill", "Grain grain SHIPS unknown", "unknown", "", "?!"])
def test_bm25_is_what_it_says(query):
    assert Bm25(TEXTS).scores([query, "ships"])[0] == pytest.approx(bm25(TEXTS, query), rel=1e-6)


def test_the_best_come_first_and_equals_in_their_order():
    found = retrieve(Bm25(TEXTS), ["grain mill", "unknown"], 3, len(TEXTS))
    assert found[0][:2] == (2, 1)
    assert found[1] == (0, 1, 2)
    assert in_shared_order(found)[0] == tuple(sorted(found[0]))
    assert retrieve(Bm25(TEXTS), ["grain mill"], 1, len(TEXTS)) == [(2,)]


@pytest.mark.parametrize("k", [0, len(TEXTS) + 1])
def test_k_is_of_the_passages(k):
    with pytest.raises(RetrievalError, match=f"k: expected 1 to the {len(TEXTS)} passages of the documents, got {k}"):
        retrieve(Bm25(TEXTS), ["x"], k, len(TEXTS))


@pytest.mark.parametrize("texts", [["...", " "], []])
def test_a_corpus_without_words(texts):
    with pytest.raises(RetrievalError, match="documents: no passage has a word"):
        Bm25(texts)
    with pytest.raises(RetrievalError, match="documents: no passage has a word"):
        Dense(texts, Letters())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop, Straße 12a!", ["don", "t", "stop", "strasse", "12a"]),
        ("ﬁve ＡＢＣ", ["five", "abc"]),
        ("Ελληνικά слово", ["ελληνικά", "слово"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ไม้ไทย", ["ไม้", "ม้ไ", "ไท", "ทย"]),
        ("东京大学 a", ["东京", "京大", "大学", "a"]),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("人", ["人"]),
        ("한국어 말", ["한국어", "말"]),
        ("a_b", ["a", "b"]),
        ("", []),
    ],
)
def test_words_of_many_scripts(text, expected):
    assert words(text) == expected


def test_retrieval_without_spaces():
    texts = ["东京是日本的首都。", "巴黎是法国的首都。", "กรุงเทพเป็นเมืองหลวงของไทย", "ปารีสอยู่ในฝรั่งเศส"]
    found = retrieve(Bm25(texts), ["法国的首都是", "日本首都", "เมืองหลวง", "ฝรั่งเศส"], 1, len(texts))
    assert found == [(1,), (0,), (2,), (3,)]


class Letters:
    """Embeds a text as the counts of its letters."""

    fingerprint = "letters"

    def embed(self, texts):
        return np.array([[text.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)


def test_dense_is_the_cosine():
    retriever = Dense(["aab", "b", "zz z"], Letters())
    assert retriever.fingerprint == "dense letters"
    assert retriever.scores(["ab", "", "z"]) == pytest.approx(
        np.array([[3 / math.sqrt(10), 1 / math.sqrt(2), 0], [0, 0, 0], [0, 0, 1]])
    )


SECRET = "sk-very-secret-0123456789"


class Fake(BaseHTTPRequestHandler):
    """An embeddings server that answers in another order than asked, after what server.trouble says."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        status = server.trouble.pop(0) if server.trouble else 200
        server.seen.append(body["input"])
        width = server.width(len(server.seen))
        data = [{"object": "embedding", "index": i, "embedding": [len(t)] * width} for i, t in enumerate(body["input"])]
        answer = {"object": "list", "model": body["model"], "data": data[::-1][server.lost :]}
        raw = json.dumps(answer if status == 200 else {"error": {"message": f"refused {SECRET}"}}).encode()
        raw = raw if server.instead is None else server.instead
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with ThreadingHTTPServer(("127.0.0.1", 0), Fake) as running:
        running.seen, running.trouble, running.lost, running.width, running.instead = [], [], 0, lambda _: 2, None
        running.url = f"http://127.0.0.1:{running.server_port}/v1"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_an_endpoint_embeds_in_batches_and_is_asked_again(server):
    server.trouble = [429, 503]
    endpoint = EmbeddingEndpoint(server.url, "small", batch_size=2)
    assert endpoint.embed(["a", "bb", "", "dddd", "eeeee"]).tolist() == [[1, 1], [2, 2], [1, 1], [4, 4], [5, 5]]
    assert server.seen[2:] == [["a", "bb"], [" ", "dddd"], ["eeeee"]]
    assert SECRET not in repr(endpoint) + endpoint.fingerprint


@pytest.mark.parametrize(
    ("trouble", "lost", "width", "message"),
    [
        ([401], 0, 2, "status 401$"),
        ([500] * 9, 0, 2, "status 500$"),
        ([], 1, 2, "expected 2 embeddings, of index 0 to 1, got 1: 0"),
        ([], 0, None, "differ in length"),
    ],
)
def test_an_endpoint_that_fails_is_named_without_its_key(server, trouble, lost, width, message):
    server.trouble, server.lost, server.width = trouble, lost, (lambda n: width or n)
    with pytest.raises(RetrievalError, match=message) as error:
        EmbeddingEndpoint(server.url, "small", batch_size=2, retries=1).embed(["a", "b", "c", "d"])
    assert server.url in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("instead", "message"),
    [
        (b"<html>Log in</html>", "what it sent is no list of embeddings"),
        (b"", "what it sent is no list of embeddings"),
        pytest.param(b"[" * 100_000, "what it sent is no list of embeddings", id="nested"),
        (b'{"data": null}', "what it sent is no list of embeddings"),
        (b'{"error": {"message": "overloaded"}}', "what it sent is no list of embeddings"),
        (
            b'{"data": [{"index": 0, "embedding": [NaN, 1.0]}]}',
            "embeddings of zeros, or with values that are not finite",
        ),
        (
            b'{"data": [{"index": 0, "embedding": [0.0, 0.0]}]}',
            "embeddings of zeros, or with values that are not finite",
        ),
        (b'{"data": [{"index": 0, "embedding": ["a"]}]}', "differ in length, or are no numbers"),
        (b'{"data": [{"index": 0, "embedding": [[1, 2], [3, 4]]}]}', "differ in length, or are no numbers"),
        pytest.param(
            b'{"data": [{"index": 0, "embedding": [1%s]}]}' % (b"0" * 400), "no list of embeddings", id="beyond a float"
        ),
        (b'{"data": [{"index": 0, "embedding": [1e308, 1e308]}]}', "with values that are not finite"),
        (b'{"data": [{"index": "0", "embedding": [1]}]}', "expected 1 embeddings, of index 0 to 0, got 1: 0"),
    ],
)
def test_what_is_no_list_of_embeddings_is_named(server, instead, message):
    server.instead = instead
    with pytest.raises(RetrievalError, match=message):
        EmbeddingEndpoint(server.url, "small", retries=0).embed(["a"])


def test_an_endpoint_needs_a_key_and_a_plain_url(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(RetrievalError, match="set OPENAI_API_KEY"):
        EmbeddingEndpoint("http://127.0.0.1:9/v1", "m").embed(["a"])
    for url in ("ftp://x/v1", "http://user:pass@x/v1", "http://x/v1?key=1", "x"):
        with pytest.raises(RetrievalError, match="endpoint: expected http"):
            EmbeddingEndpoint(url, "m")
    with pytest.raises(RetrievalError, match="batch_size"):
        EmbeddingEndpoint("http://x/v1", "m", batch_size=0)


def test_hits_are_passages_of_the_question_s_own_document():
    documents = (
        Document("a", "One. " * 300),
        Document("b", "Two."),
        Document("c", "Three.", "t"),
        Document("d", "4", "t"),
    )
    questions = (
        Question("own", "x", (" y",), document="a"),
        Question("topic", "x", (" y",), topic="t"),
        Question("none", "x", (" y",), topic="elsewhere"),
    )
    task = Task(documents, questions)
    passages = split_documents(documents)
    assert source_documents(task) == {"own": {"a"}, "topic": {"c", "d"}}
    last = len(passages) - 1
    assert passages[1].document_id == "a"
    assert hit_rate(task, passages, questions, [(1,), (last,), (0,)]) == 1.0
    assert hit_rate(task, passages, questions, [(1,), (0, 2), (0,)]) == 0.5
    assert hit_rate(task, passages, questions[2:], [(0,)]) is None
    lost = Question("lost", "x", (" y",), document="gone")
    assert hit_rate(task, passages, [lost], [(0,)]) is None
    assert hit_rate(Task(documents, (*questions, lost)), passages, [*questions[:1], lost], [(1,), (0,)]) == 1.0


def test_a_static_model_in_a_folder(tmp_path):
    model2vec = pytest.importorskip("model2vec")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1, "dog": 2, "sun": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.array([[0, 0, 0], [1, 0, 0], [0.9, 0.1, 0], [0, 0, 1]], np.float32)
    model2vec.StaticModel(vectors, tokenizer).save_pretrained(tmp_path / "static")
    embedder = embedder_of("", str(tmp_path / "static"))
    assert embedder.embed(["cat cat sun", "dog"]) == pytest.approx(np.array([[2 / 3, 0, 1 / 3], [0.9, 0.1, 0]]))
    assert retrieve(Dense(["sun", "cat"], embedder), ["dog", "sun sun"], 1, 2) == [(1,), (0,)]
    before = embedder.fingerprint
    (tmp_path / "static" / "config.json").write_text("{}")
    assert embedder.fingerprint != before
    (tmp_path / "static" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(RetrievalError, match="static: no static embedding model"):
        embedder.embed(["cat"])
    with pytest.raises(RetrievalError, match="embedding_model: 'nowhere': no such folder"):
        embedder_of("", "nowhere")
    with pytest.raises(RetrievalError, match="embedding_model: --retriever dense needs one"):
        embedder_of("http://x/v1", "")
