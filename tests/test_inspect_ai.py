"""Inspect AI's eval(), end to end, against the engine asked directly and a plain forward of every request."""

import re
import shutil
import string
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import sentences

inspect_ai = pytest.importorskip("inspect_ai", reason="has an environment of its own: make harnesses")

from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, get_model
from inspect_ai.scorer import choice, includes
from inspect_ai.solver import generate

import icl_ft_fast as iff
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import Generation, Sampling
from icl_ft_fast.engine.generate import generate as generate_texts
from icl_ft_fast.engine.prompting import ProtocolError
from icl_ft_fast.integrations import inspect_ai as ours
from icl_ft_fast.integrations.inspect_ai import choice_likelihoods, most_likely_choice

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

LINES = [line.strip() for line in sentences(40, seed=3)]
QUESTIONS = [f"who knows {line}" for line in LINES[:12]]
CHOICES = [LINES[12 + 2 * q : 15 + 2 * q] for q in range(12)]
TEMPLATE = "{{ '<s>' }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }} {% endfor %}<assistant>"


@pytest.fixture
def model(llama_directory):
    return get_model(f"icl-ft-fast/{llama_directory}", dtype="float32", memoize=False)


def run(model, folder, samples, **options):
    (log,) = inspect_ai.eval(
        inspect_ai.Task(samples, **options), model=model, log_dir=str(folder), display="none", max_samples=1000
    )
    return log


def samples(targets):
    return [Sample(q, choices=c, target=t) for q, c, t in zip(QUESTIONS, CHOICES, targets, strict=True)]


def expected(llama):
    questions = [
        iff.Question(str(q), f"Documents. {text}\nAnswer:", tuple(f" {c}" for c in CHOICES[q]))
        for q, text in enumerate(QUESTIONS)
    ]
    return iff.score(llama, questions)


@pytest.mark.parametrize("normalization", ["sum", "token", "character", "byte"])
def test_an_evaluation_gives_the_engine_s_likelihoods(normalization, model, llama, plain_llama, plain, tmp_path):
    reference = expected(llama)
    lengths = {
        "sum": lambda q: [1] * 3,
        "token": lambda q: reference[q].num_tokens,
        "character": lambda q: map(len, CHOICES[q]),
        "byte": lambda q: [len(c.encode()) for c in CHOICES[q]],
    }
    best = []
    for q, result in enumerate(reference):
        scores = [logp / n for logp, n in zip(result.logp, lengths[normalization](q), strict=True)]
        best.append("ABC"[scores.index(max(scores))])
    targets = [mark if q % 3 else "ABC".replace(mark, "") for q, mark in enumerate(best)]  # every third is wrong
    log = run(
        model,
        tmp_path,
        samples(targets),
        solver=choice_likelihoods("Documents. {question}\nAnswer:"),
        scorer=[most_likely_choice(normalization), choice()],
    )
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(8 / 12)
    for q, sample in enumerate(log.samples):
        found = sample.scores["most_likely_choice"]
        assert found.answer == best[q]
        assert found.metadata["logp"] == pytest.approx(reference[q].logp, rel=0, abs=1e-4)
        assert tuple(found.metadata["is_greedy"]) == reference[q].is_greedy
        assert sample.scores["choice"].answer == "ABC"[reference[q].predicted]  # Inspect's scorer reads the marks
        if normalization == "sum":
            for text, logp in zip(CHOICES[q], found.metadata["logp"], strict=True):
                pair = (f"Documents. {QUESTIONS[q]}\nAnswer:", f" {text}")
                ((context, continuation),) = encoding.encode_pairs(llama.tokenizer, [pair])
                assert logp == pytest.approx(plain(plain_llama, context, continuation)[0].sum().item(), rel=0, abs=1e-4)
    assert model.api.ledger.forwarded_tokens < model.api.ledger.request_tokens / 3  # one trie, or nearly


def test_a_conversation_is_written_in_the_template(model, llama, tmp_path):
    model.api.model.tokenizer.chat_template = TEMPLATE
    conversation = [ChatMessageSystem(content="the mat"), ChatMessageUser(content="who sat")]
    log = run(
        model,
        tmp_path,
        [Sample(conversation, choices=["the cat", "that"], target="A")],
        solver=choice_likelihoods(chat=True),
        scorer=most_likely_choice(),
    )
    (result,) = iff.score(llama, [iff.Question("", "<system>the mat <user>who sat <assistant>", (" the cat", " that"))])
    assert log.samples[0].scores["most_likely_choice"].metadata["logp"] == pytest.approx(result.logp, abs=1e-4)


def test_reasoning_is_told_from_the_answer_and_the_date_is_set(llama_directory, tmp_path):
    shutil.copytree(llama_directory, tmp_path / "chatty")
    (tmp_path / "chatty" / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}{{ mood }}<think>")
    options = {"template_date": "1999-01-31", "chat_template_kwargs": {"mood": "why"}, "memoize": False}
    model = get_model(f"icl-ft-fast/{tmp_path / 'chatty'}", **options)
    assert model.api.prompt([ChatMessageUser(content="who")]) == "1999why<think>"

    async def ask(request):
        return Generation(text="a cat</think>the mat", ids=(2, 3), logp=(-1.0, -1.0), finish="stop")

    model.api._texts.ask = ask
    log = run(
        model, tmp_path / "logs", [Sample("who", target="the mat")], solver=generate(max_tokens=8), scorer=includes()
    )
    (sample,) = log.samples
    assert sample.output.completion == "the mat"
    assert sample.output.message.content[0].reasoning == "a cat"
    assert sample.output.metadata == {"template_date": "1999-01-31"}


def test_generation_is_transformers_greedy_one(model, llama, plain_llama, tmp_path):
    texts = []
    for text in QUESTIONS:
        ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
        written = plain_llama.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
        assert 1 not in written[0, ids.shape[1] :]  # EOS
        texts.append(llama.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    mark = next(each for each in string.printable if 0 < sum(each in text for text in texts) < len(texts))
    config = GenerateConfig(max_tokens=12, stop_seqs=[mark], temperature=0)
    samples = [Sample(text, target="the") for text in QUESTIONS]
    log = run(model, tmp_path, samples, solver=generate(), scorer=includes(), config=config)
    assert log.status == "success", log.error
    for text, question, sample in zip(texts, QUESTIONS, log.samples, strict=True):
        assert sample.output.completion == text.split(mark)[0]
        assert sample.output.usage.input_tokens == len(llama.tokenizer(question)["input_ids"])
        assert sample.output.stop_reason == ("stop" if mark in text else "max_tokens")


def test_sampling_is_the_engine_s(model, llama, tmp_path):
    config = GenerateConfig(max_tokens=9, temperature=0.8, top_k=40, top_p=0.9, seed=3)
    log = run(model, tmp_path, [Sample("who sat", target="a")], solver=generate(), scorer=includes(), config=config)
    sampling = Sampling(9, temperature=0.8, top_k=40, top_p=0.9, seed=3)
    assert log.samples[0].output.completion == generate_texts(llama, ["who sat"], sampling)[0].text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GenerateConfig(num_choices=2, logprobs=True), "logprobs, num_choices: not served"),
        (GenerateConfig(temperature=0.5, top_p=2), "top_p: expected above 0, at most 1"),
    ],
)
def test_what_generation_cannot_follow_is_refused(config, message, model, tmp_path):
    log = run(model, tmp_path, [Sample("the", target="the")], solver=generate(), scorer=includes(), config=config)
    assert log.status == "error"
    assert message in log.error.message


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        (Sample("the cat", choices=["sat", ""], target="A", id="s1"), {}, "sample s1: choices[1]: the continuation"),
        (Sample("the cat " * 300, choices=["a"], target="A", id="s2"), {"overflow": "error"}, "sample s2: choices[0]:"),
        (Sample("the cat", target="A", id="s3"), {}, "sample s3: no choices"),
    ],
)
def test_what_cannot_be_scored_is_named(sample, options, message, llama_directory, tmp_path):
    model = get_model(f"icl-ft-fast/{llama_directory}", memoize=False, **options)
    log = run(model, tmp_path, [sample], solver=choice_likelihoods(delimiter=""), scorer=most_likely_choice())
    assert message in log.error.message


def test_other_models_and_unknown_normalizations_are_refused(tmp_path):
    log = run("mockllm/model", tmp_path, samples("A" * 12), solver=choice_likelihoods(), scorer=most_likely_choice())
    assert "needs a model icl-ft-fast/..." in log.error.message
    with pytest.raises(ProtocolError, match=r"^normalization: expected one of sum, token, character, byte, got 'pmi'$"):
        most_likely_choice("pmi")


def test_the_documented_task_runs(model, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "harnesses.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names = {"__name__": "task"}
    exec(compile(code, "harnesses.md", "exec"), names)
    (log,) = inspect_ai.eval(names["reversals"](), model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error


def test_the_entry_point_is_this_module():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["inspect_ai"] == {"icl_ft_fast": ours.__name__}
