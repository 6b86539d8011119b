"""The command line, as it is called: what it writes, and the one line it says about each bad input."""

import argparse
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import icl_ft_fast
from icl_ft_fast import cli, integrations
from icl_ft_fast.cli import main
from icl_ft_fast.cli.options import load_model
from icl_ft_fast.engine.encoding import vocabulary_words
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.machine import ceilings
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.engine.score import score
from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.shipped.tokenizer import build_tokenizer
from icl_ft_fast.study import compare
from icl_ft_fast.study.settings import ARM_NAMES
from icl_ft_fast.tasks.files import write_jsonl
from icl_ft_fast.tasks.generated import GENERATORS
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document, Question, Task
from icl_ft_fast.tasks.words import ENGLISH

SOME_SEEDS = "expected a whole number from 0 to 2^63 - 1"
SOME_ARMS = f"--arms: expected some of {', '.join(ARM_NAMES)}, a trained one with +icl or +rag, or a size such as rag@8"

DOCUMENTS = (Document("d1", "the cat sat on the mat."), Document("d2", "who knows why?"))
QUESTIONS = (
    Question("q1", "the cat sat", (" on", " on the mat", " near"), 1, "recall"),
    Question("q2", "who knows", (" why", " that it is"), None, "other"),
    Question("q3", "", ("ice", "cat"), 0),
)

CEILINGS = functools.cache(ceilings)


class Files:
    """A folder with a model, documents and questions, and the arguments that name them."""

    def __init__(self, folder, model):
        self.folder, self.model, self.out = folder, model, folder / "out" / "scores.jsonl"
        self.task = folder / "task"
        Task(DOCUMENTS, QUESTIONS).write(self.task)
        self.documents, self.questions = self.task / "documents.jsonl", self.task / "questions.jsonl"

    def score(self, *more, **named):
        options = {"model": self.model, "questions": self.questions, "out": self.out} | named
        return ["score", "--quiet", *pairs(options), *map(str, more)]

    def compare(self, *more, **named):
        options = {"model": self.model, "task": self.task, "arms": "base", "steps": 1, "out": self.folder / "run"}
        return ["compare", "--quiet", *pairs(options | named), *map(str, more)]


def pairs(options):
    """--name value of each."""
    return [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture(autouse=True)
def _ceilings_measured_once(monkeypatch):
    """Every comparison measures the machine; here the first does."""
    monkeypatch.setattr(compare, "ceilings", CEILINGS)


@pytest.fixture
def files(tmp_path, llama_directory):
    return Files(tmp_path, llama_directory)


@pytest.fixture
def run(capsys, monkeypatch):
    """A function that runs a command and returns exit code, lines of stdout and lines of stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(arguments):
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return call


@pytest.fixture
def refused(run):
    """A function that runs a command, asserts that it is refused in one line and returns the line."""

    def call(arguments):
        code, _, errors = run(arguments)
        assert code == 2
        assert len(errors) == 1, errors
        prefix = f"icl-ft-fast {arguments[0]}: "
        assert errors[0].startswith(prefix)
        return errors[0].removeprefix(prefix)

    return call


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_score_writes_a_line_a_question_and_prints_the_counters(files, run, llama):
    code, printed, errors = run(files.score(documents=files.documents))
    assert (code, errors) == (0, [])
    ledger = Ledger()
    expected = score(llama, QUESTIONS, context=icl_context(DOCUMENTS), ledger=ledger)
    rows = {row["question_id"]: row for row in read_lines(files.out)}
    assert len(rows) == len(QUESTIONS)
    for result in expected:
        row = rows[result.question_id]
        assert row.keys() == {"question_id", "logp", "num_tokens", "is_greedy", "predicted", "answer", "also_correct"}
        assert row["logp"] == pytest.approx(result.logp, abs=1e-5)
        assert row["num_tokens"] == list(result.num_tokens)
        assert row["is_greedy"] == list(result.is_greedy)
        assert (row["predicted"], row["answer"]) == (result.predicted, result.answer)
    (line,) = printed
    correct = sum(result.is_correct is True for result in expected)
    assert re.fullmatch(
        rf"3 questions in \d+\.\d s, {correct} of 2 correct: {ledger.request_tokens:,} tokens requested, "
        rf"{ledger.forwarded_tokens:,} computed "
        rf"\(1 in {ledger.request_tokens / ledger.forwarded_tokens:.0f}\), "
        rf"{ledger.head_tokens:,} through the output head\. Written to {re.escape(str(files.out))}",
        line,
    )


def test_score_without_documents_or_answers(files, run, llama, monkeypatch):
    budgets = []

    def spy(*arguments, chunk_tokens, **options):
        budgets.append(chunk_tokens)
        return loglikelihood(*arguments, chunk_tokens=chunk_tokens, **options)

    monkeypatch.setattr("icl_ft_fast.engine.shards.loglikelihood", spy)
    write_jsonl(files.questions, [{"id": "a", "prompt": "the cat", "choices": [" sat", " is"]}])
    code, (line,), errors = run(files.score("--chunk-tokens", 1))
    assert (code, errors) == (0, [])
    assert "correct" not in line
    (result,) = score(llama, [Question("a", "the cat", (" sat", " is"))])
    (row,) = read_lines(files.out)
    assert row["logp"] == pytest.approx(result.logp, abs=1e-5)
    assert row["answer"] is None
    assert budgets == [1]


def test_the_terminal_is_left_alone(files, run):
    logging.enable_progress_bar()
    try:
        _, _, errors = run(files.score())
    finally:
        logging.disable_progress_bar()
    assert errors == []


GOOD = {"id": "a", "prompt": "p", "choices": ["x", "y"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[]", "expected a JSON object, got list"),
        (b"\xff", "not UTF-8 text (byte 1 of the line, 0xff; cp1252 reads 'ÿ' there)"),
        ({"prompt": 3}, "prompt: expected a string, got 3"),
        ({"choices": []}, "choices: expected a list with at least one string"),
        ({"choices": ["x", ""]}, 'choices[1]: expected a non-empty string, got ""'),
        ({"answer": 2}, "answer: expected 0 to 1, got 2"),
        ({"answer": True}, "answer: expected 0 to 1, got true"),
        ({"id": "a"}, "id: 'a' was used before in this file"),
    ],
)
def test_a_bad_questions_file(line, message, files, refused):
    line = json.dumps(GOOD | {"id": "b"} | line).encode() if isinstance(line, dict) else line
    files.questions.write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    assert refused(files.score()) == f"{files.questions}:2: {message}"
    assert not files.out.exists()


def test_a_bad_documents_file(files, refused):
    files.documents.write_text('{"id": "a", "text": "t"}\n{"id": "b"}\n')
    assert refused(files.score(documents=files.documents)) == f"{files.documents}:2: text: missing"
    assert refused(files.compare()) == f"{files.documents}:2: text: missing"
    files.documents.write_text("")
    assert refused(files.score(documents=files.documents)).startswith(f"{files.documents}: empty")


def test_a_missing_file(files, refused):
    missing = files.folder / "missing.jsonl"
    for arguments in (files.score(questions=missing), files.score(documents=missing)):
        assert refused(arguments) == f"{missing}: cannot be read: No such file or directory"
    files.questions.unlink()
    assert refused(files.compare()) == f"{files.questions}: cannot be read: No such file or directory"


def merging_pair(tokenizer):
    """A prompt and a choice that the tokenizer writes as one token."""
    ids = {piece: i for piece, i in tokenizer.get_vocab().items() if piece.isascii() and piece.isalpha()}
    piece = max(ids, key=len)
    assert tokenizer.encode(piece, add_special_tokens=False) == [ids[piece]]
    return piece[0], piece[1:]


def test_a_choice_without_a_token_of_its_own(files, refused, tokenizer):
    prompt, choice = merging_pair(tokenizer)
    rows = [
        {"id": "ok", "prompt": "the", "choices": [" cat"]},
        {"id": "bad", "prompt": prompt, "choices": ["42", choice]},
    ]
    write_jsonl(files.questions, rows)
    line = refused(files.score())
    assert line.startswith("question 'bad': choices[1]: no token of its own: ")
    assert not files.out.exists()


def test_a_context_longer_than_the_positions(files, refused, tokenizer, llama):
    documents = (Document("long", "the cat sat on that mat " * 60),)
    write_jsonl(files.documents, [{"id": d.id, "text": d.text} for d in documents])
    context = len(tokenizer((icl_context(documents) + "the cat sat").rstrip())["input_ids"])
    choice = len(tokenizer(" on", add_special_tokens=False)["input_ids"])
    over = context + choice - 1 - llama.max_positions
    assert over > 0
    line = refused(files.score(documents=files.documents))
    expected = (
        f"question 'q1': {context} tokens of context and {choice} of continuation are {over} tokens over the model's"
    )
    assert line == f"{expected} {llama.max_positions} positions"
    assert refused(files.compare(arms="icl")).startswith("icl_tokens: documents and the longest question take ")
    assert not files.out.exists()


def test_a_refused_score_leaves_the_earlier_output(files, run, refused, tokenizer):
    assert run(files.score())[0] == 0
    before = files.out.read_bytes()
    prompt, choice = merging_pair(tokenizer)
    write_jsonl(files.questions, [{"id": "bad", "prompt": prompt, "choices": [choice]}])
    refused(files.score("--overwrite"))
    assert files.out.read_bytes() == before


def test_an_output_that_exists(files, run, refused):
    assert run(files.score())[0] == 0
    before = files.out.read_bytes()
    files.out.write_bytes(b"mine")
    assert refused(files.score()) == f"--out: {files.out}: exists already; choose another or give --overwrite"
    assert files.out.read_bytes() == b"mine"
    assert run(files.score("--overwrite"))[0] == 0
    assert files.out.read_bytes() == before


def test_an_output_that_cannot_be(files, refused):
    for arguments in (files.score(out=files.task), files.score("--overwrite", out=files.task)):
        assert refused(arguments) == f"--out: {files.task}: is a folder"
    below = files.questions / "a" / "b"
    for arguments in (
        files.score(out=below),
        files.compare(out=below),
        ["task", "simple-reversals", "--out", str(below)],
    ):
        assert refused(arguments) == f"--out: {files.questions}: is a file, not a folder"


def test_what_the_system_refuses_is_one_line_too(files, refused, monkeypatch):
    def full(path, results):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(compare, "write_results", full)
    path, then = files.folder / "run" / "results.json", "free some space and run the same command again"
    assert refused(files.compare()) == f"{path}: No space left on device; {then}"


def test_an_interruption_is_one_line_and_leaves_no_lock(files, run, monkeypatch):
    def interrupted(_):
        assert (files.folder / "run" / ".lock").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("icl_ft_fast.cli.run.compare.load_model", interrupted)
    assert run(files.compare()) == (130, [], ["icl-ft-fast compare: interrupted"])
    assert not (files.folder / "run" / ".lock").exists()


@pytest.fixture
def broken(files):
    """A function that copies the checkpoint, spoils it and returns its folder."""

    def call(change):
        folder = files.folder / "broken"
        shutil.copytree(files.model, folder)
        change(folder)
        return folder

    return call


def to_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def to_bloom(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bloom"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "{}: no checkpoint here: config.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "{}: no checkpoint here: no *.safetensors file"),
        (to_pickle, "{}: pytorch_model.bin: pickle weights can run code when they are read and are refused; "),
        (lambda folder: (folder / "config.json").write_text("{"), "{}/config.json: not valid JSON: "),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), "{}/model.safetensors: damaged, or"),
        (to_bloom, "bloom: this family cannot be served: ALiBi position biases"),
    ],
    ids=["no config", "no weights", "pickle", "bad config", "bad weights", "refused family"],
)
def test_a_directory_that_is_no_checkpoint(change, message, broken, files, refused):
    folder = broken(change)
    for arguments in (files.score(model=folder), files.compare(model=folder)):
        assert refused(arguments).startswith(message.format(folder))
    assert not files.out.exists()


def test_no_directory_at_all(files, refused):
    assert refused(files.score(model=files.questions)).startswith(f"{files.questions}: neither a directory with a ch")
    assert refused(files.score(model=files.folder / "no")).startswith(f"{files.folder / 'no'}: no such directory or")
    assert refused(files.score(model="nobody/nothing")).startswith("nobody/nothing: cannot be loaded")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("arms", "base,lora", f"{SOME_ARMS}, got 'lora'"),
        ("arms", "", f"{SOME_ARMS}, got ''"),
        ("arms", "icl,base,icl", "--arms: icl is given twice"),
        ("seeds", "0,x", f"--seeds: {SOME_SEEDS}, got 'x'; separate several by commas"),
        ("seeds", "", f"--seeds: {SOME_SEEDS}, got ''; separate several by commas"),
        ("seeds", "-1", f"--seeds: {SOME_SEEDS}, got '-1'; separate several by commas"),
        ("seeds", "1,2,1", "--seeds: 1 is given twice"),
        ("prefix_tokens", "9999999", "--prefix-tokens: expected at most 1,048,576, got 9,999,999"),
        ("template", "no_file", "--template: no_file: neither auto, base, chat nor a file: No such file or directory"),
        ("task", "no_such_task", f"--task: no_such_task: neither a folder nor one of {', '.join(GENERATORS)}"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(option, value, message, files, refused, monkeypatch):
    monkeypatch.setattr("icl_ft_fast.engine.loading.load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert refused(files.compare(**{option: value})) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--weight_decay nan", "--weight_decay: expected a number from 0 to 10, got nan"),
        ("--lora_alpha inf", "--lora_alpha: expected a number above 0 and at most 1e+15, got inf"),
        ("--lora_r 0", "--lora_r: expected at least 1, got 0"),
        ("--steps 9999999999", "--steps: expected at most 1,000,000,000"),
        ("--prefix-steps 9999999999", "--prefix-steps: expected at most 1,000,000,000"),
        ("--general nowhere", "general: nowhere: cannot be read: No such file or directory"),
    ],
)
def test_numbers_of_a_training_are_refused_by_their_option(given, message, files, refused, monkeypatch):
    monkeypatch.setattr("icl_ft_fast.engine.loading.load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert refused([*files.compare(), *given.split()]) == message


def test_a_device_that_is_not_there_is_refused_and_the_default_is_the_one_there_is(files, refused, monkeypatch):
    given = []
    monkeypatch.setattr("icl_ft_fast.engine.loading.load", lambda *_, device, **__: given.append(device) or 1 / 0)
    score = files.score()
    for device, message in (
        ("cuda", "cuda: torch finds no such device here"),
        ("cuda:99", "cuda:99: torch finds no such device here"),
        ("meta", "meta: torch finds no such device here"),
        ("gpu", "'gpu' is no torch device"),
    ):
        if device != "cuda" or not torch.cuda.is_available():
            assert refused([*score, "--device", device]) == f"--device: {message}"
    assert not given
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: 2 * there)
        for more in ([], ["--device", "auto"]):
            with pytest.raises(ZeroDivisionError):
                main([*score, *more])
            assert given.pop() == expected
    with pytest.raises(ZeroDivisionError):
        main([*score, "--device", "cuda:1"])
    assert given.pop() == "cuda:1"
    assert refused([*score, "--device", "cuda:2"]) == "--device: cuda:2: torch finds no such device here"


def test_more_facts_than_words(files, refused):
    line = refused(files.compare(task="simple-reversals", facts=5000))
    assert line == "--facts, --exclude-words: count: at most 1446 distinct nonsense words can be drawn, got 10000"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "process", "preset": "tiny"}, "--preset: process has paper, small; got 'tiny'"),
        ({"task": "process", "facts": 3}, "--facts: is an option of simple-reversals, not of process"),
        ({"task": "process", "data": "."}, "--data: process reads no folder"),
        ({"task": "reversal-curse"}, "--data: reversal-curse reads a folder of "),
        (
            {"task": "reversal-curse", "data": "no"},
            "no: neither a folder nor a dataset on the hub with name_description_",
        ),
        ({"task": "process", "exclude_words": "no"}, "--exclude-words: no: neither english, a file nor a checkpoint"),
    ],
)
def test_presets_and_data_that_a_task_has_not(options, message, files, refused):
    assert refused(files.compare(**options)).startswith(message)


@pytest.mark.parametrize("name", [name for name, generator in GENERATORS.items() if generator.reads is None])
def test_every_task_by_name_is_written_and_compared(name, files, run, monkeypatch):
    arguments = ["task", name, "--preset", "small", "--seed", "3", "--out", str(files.folder / name)]
    assert run(arguments)[0] == 0
    generator = GENERATORS[name]
    preset = generator.presets["small"]
    task = generator.make(3, **preset.arguments)
    assert Task.read(files.folder / name) == task
    few = Task(task.documents[:2], task.questions[:4])
    monkeypatch.setitem(GENERATORS, name, replace(generator, make=lambda seed, **_: few))
    code, printed, errors = run(files.compare(task=name, preset="small"))
    assert (code, errors) == (0, [])
    assert any(line.startswith("base ") for line in printed)
    assert strategy_and_samples(files.folder / "run") == (
        preset.study.get("strategy", "local"),
        preset.study.get("samples", 1),
    )
    assert schedule(files.folder / "run") == preset.finetune.get("lr_scheduler_type", "constant")
    if preset.study.get("samples", 1) > 1:  # of its own strategy
        other = files.folder / "other"
        options = {"strategy": "self-qa", "lr_scheduler_type": "cosine", "out": other}
        assert run(files.compare(task=name, preset="small", **options))[0] == 0
        assert strategy_and_samples(other) == ("self-qa", 1)
        assert schedule(other) == "cosine"


def strategy_and_samples(folder):
    settings = json.loads((folder / "results.json").read_text())["settings"]
    return settings["strategy"], settings["samples"]


def schedule(folder):
    return json.loads((folder / "results.json").read_text())["settings"]["finetune"]["lr_scheduler_type"]


def test_all_tasks_by_name_end_in_one_table(files, run, refused, monkeypatch):
    question = Question("q", "the cat", (" sat", " mat"), 0, "asked")
    few = Task((Document("d", "the cat sat"),), (question,))
    names = [name for name, generator in GENERATORS.items() if generator.reads is None]
    for name in names:
        monkeypatch.setitem(GENERATORS, name, replace(GENERATORS[name], make=lambda seed, **_: few))
    loads = []
    monkeypatch.setattr(
        "icl_ft_fast.cli.run.compare.load_model", lambda options: loads.append(load_model(options)) or loads[-1]
    )
    code, printed, errors = run(files.compare(task="all", preset="small", seeds="0,1"))
    assert (code, errors) == (0, [])
    assert len(loads) == 1
    table = (files.folder / "run" / "table.md").read_text().splitlines()
    assert printed[: len(table)] == table
    assert table[0] == "| task: split (answers) | chance | base | seconds |"
    assert [row.split(" | ")[:2] for row in table[2:]] == [[f"| {name}: asked (2)", "0.50"] for name in names]
    for name in names:
        study = Derived.read(files.folder / "run" / name)
        accuracy = study.accuracy("base", "asked")
        low, high = study.interval("base", "asked")
        assert f"| {name}: asked (2) | 0.50 | {accuracy.value:.2f} ({low:.2f}-{high:.2f}) | " in "\n".join(table)
    assert refused(files.compare(task="all", facts=2)).startswith("--facts: is an option of simple-reversals, not of ")


def test_a_document_too_long_for_the_augmentation_prompt(files, refused):
    assert re.fullmatch(
        r"document 'd1' with its prompt: \d+ tokens over the model's 256 positions",
        refused(files.compare(arms="augmented-ft")),
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["score", "--model", "m", "--questions", "q", "--out", "o", "--chunk-tokens", "0"],
            "--chunk-tokens: expected a ",
        ),
        (
            ["compare", "--model", "m", "--task", "t", "--steps", "-3"],
            "--steps: expected a whole number above 0, got '-3'",
        ),
        (
            ["compare", "--model", "m", "--task", "t", "--train-batch-size", "2.5"],
            "--train-batch-size: expected a whole number",
        ),
        (
            ["compare", "--model", "m", "--task", "t", "--learning-rate", "fast"],
            "--learning-rate: expected a number above 0",
        ),
        (["compare", "--model", "m", "--task", "t", "--checkpoint-minutes", "inf"], "--checkpoint-minutes: expected a"),
        (["compare", "--model", "m", "--task", "t", "--steps", "9" * 5000], "--steps: expected at most 1,000,000,"),
        (["compare", "--model", "m", "--task", "t", "--template-date", "today"], "--template-date: expected YYYY-MM"),
        (["report", "r", "--tolerance", "nan"], "--tolerance: expected a number from 0 to 100, got 'nan'"),
        (["augment", "--task", "t", "--out", "o", "--temperature", "nan"], "--temperature: expected a number from 0"),
        (
            ["augment", "--task", "t", "--out", "o", "--price", "inf,0"],
            "--price: expected a number from 0 on",
        ),
        (["augment", "--task", "t", "--out", ""], "--out: expected a path, got ''"),
        (["serve", "m", "--chat-template-kwargs", "[" * 99_999], "--chat-template-kwargs: expected a JSON object"),
        (["serve", "m", "--port", "65536"], "--port: expected a whole number from 0 to 65535, got '65536'"),
        (["task", "check", "t", "--ngr", "3"], "icl-ft-fast task check: unrecognized arguments: --ngr 3; `icl-ft-"),
        (["report", "r", "--queries-per-day", "1e18"], "--queries-per-day: expected at most 1e+15, got '1e18'"),
        (["report", "r", "--changes-per-month", "nan"], "--changes-per-month: expected a number from 0 on, got 'nan'"),
        (["report", "r", "--cost-of-wrong", "-1"], "--cost-of-wrong: expected a number from 0 on, got '-1'"),
        (["report", "r", "--max-latency", "inf"], "--max-latency: expected a number above 0, got 'inf'"),
        (["compare", "--model", "m", "--task", "t", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["score", "--model", "m"], "the following arguments are required: --questions, --out"),
        (["task", "riddles", "--out", "o"], "invalid choice: 'riddles'"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_usage_errors(arguments, named, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert named in line
    assert line.endswith(" --help` shows the options")


def test_no_command_takes_an_abbreviated_option(capsys):
    def parsers(parser):
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for each in action.choices.values():
                    yield from parsers(each)

    every = list(parsers(cli.parser()))
    assert len(every) > len(cli.COMMANDS) + 8
    assert not any(parser.allow_abbrev for parser in every)
    for arguments in (["serve", "m", "--key", "k"], ["task", "check", "t", "--ngr", "3"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert f"unrecognized arguments: {arguments[-2]}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "compare", "report", "score", "task", "doctor"])
def test_help_shows_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    examples = [line.split() for line in text.partition("examples:\n")[2].splitlines()]
    assert examples
    for example in examples:
        assert example[:2] == ["icl-ft-fast", command]
        cli.parser().parse_args(example[1:])


@pytest.mark.parametrize(("page", "least"), [("tasks", 3), ("results", 2)])
def test_commands_of_the_documentation_are_taken(page, least):
    text = (Path(__file__).parents[1] / "docs" / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^    icl-ft-fast (.*)$", text, re.MULTILINE)
    assert len(commands) >= least
    for line in commands:
        cli.parser().parse_args(shlex.split(line))


def parsers(parser):
    """A parser and those of its commands, by the words that call them."""
    found = {parser.prog: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices:
                found |= parsers(action.choices[name])
    return found


PARSERS = parsers(cli.parser())


@pytest.mark.parametrize("name", PARSERS)
def test_help_stands_in_groups_and_each_text_alone(name):
    parser = PARSERS[name]
    text = parser.format_help()
    assert not re.search(r"\(None\)|\(\)|default: (None|\(|False)|%\(", text)
    named = {id(action) for group in parser._named.values() for action in group._group_actions}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction | argparse._HelpAction | argparse._VersionAction):
            continue
        what = action.option_strings or action.dest
        assert id(action) in named, f"{what}: in no named group"
        assert action.help, f"{what}: no help"
        first = action.help.split()[0]
        assert first not in ("of", "default:", "for", "in", "to"), f"{what}: {action.help}"


def test_limit_and_template_mean_one_thing():
    meanings = {}
    for name, parser in PARSERS.items():
        for action in parser._actions:
            for option in {"--limit", "--template"} & set(action.option_strings):
                meanings.setdefault(option, {}).setdefault(action.help, []).append(name)
    assert {option: len(texts) for option, texts in meanings.items()} == {"--limit": 1, "--template": 1}, meanings


@pytest.mark.parametrize("line", ["--help", "--version", "compare --help", "score --nonsense", "nonsense"])
def test_help_and_usage_errors_load_nothing_heavy(line):
    code = "import sys; from icl_ft_fast.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "icl_ft_fast.cli.compare" in loaded
    assert {"torch", "transformers", "tokenizers", "numpy", "pandas", "pydantic"}.isdisjoint(loaded)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"icl-ft-fast {icl_ft_fast.__version__}\n"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("demo", "compare", "report", "score", "task", "doctor"):
        assert re.search(rf"^    {command} ", text, re.MULTILINE), command


def test_task_writes_a_folder_that_reads(tmp_path, run, refused):
    arguments = ["task", "simple-reversals", "--facts", "4", "--seed", "2", "--out", str(tmp_path / "t")]
    code, printed, errors = run(arguments)
    assert (code, errors) == (0, [])
    assert printed == [f"40 documents and 8 questions written to {tmp_path / 't'}"]
    assert Task.read(tmp_path / "t") == simple_reversals(2, num_facts=4, exclude=ENGLISH)
    existing = tmp_path / "t" / "documents.jsonl"
    assert refused(arguments) == f"--out: {existing}: exists already; choose another or give --overwrite"
    arguments[arguments.index("2")] = "3"
    assert run([*arguments, "--overwrite"])[0] == 0
    assert Task.read(tmp_path / "t") == simple_reversals(3, num_facts=4, exclude=ENGLISH)


def test_nonsense_words_keep_out_of_what_they_are_told(files, run, tokenizer):
    listed = files.folder / "list.txt"
    (first, *_, last) = simple_reversals(2, num_facts=4, exclude=ENGLISH).questions
    listed.write_text(f"{first.prompt.split()[0].upper()}\n\n x {last.prompt.split()[0]}\n")
    out = files.folder / "t"
    arguments = ["task", "simple-reversals", "--facts", "4", "--seed", "2", "--out", str(out)]
    assert run([*arguments, "--exclude-words", "english", str(listed), str(files.model)])[0] == 0
    unwanted = {first.prompt.split()[0], last.prompt.split()[0], "x", *vocabulary_words(tokenizer), *ENGLISH}
    assert Task.read(out) == simple_reversals(2, num_facts=4, exclude=unwanted)
    assert {"the", "cat", "sat", "that"} <= vocabulary_words(tokenizer)
    assert {word.lower() for word in vocabulary_words(tokenizer)} == vocabulary_words(tokenizer)
    assert run([*arguments, "--overwrite", "--exclude-words", "shipped"])[0] == 0
    assert Task.read(out) == simple_reversals(2, num_facts=4, exclude=ENGLISH | vocabulary_words(build_tokenizer()))


def test_compare_writes_results_and_prints_the_table(files, run, refused):
    arguments = files.compare(arms="base,icl,ft", seeds="0,1", icl_subsample=2, train_batch_size=2)
    code, printed, errors = run(arguments)
    assert (code, errors) == (0, [])
    path = files.folder / "run" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["seed"], row["arm"]) for row in results["runs"]] == [
        (seed, arm) for seed in (0, 1) for arm in ("base", "icl", "ft")
    ]
    shown = ["/".join(path.parts[-2:]) for path in (files.task, files.model)]  # no path of this machine
    assert [results["task"], results["model"]] == shown
    expected = FinetuneSettings(steps=1, batch_size=2, learning_rate=3e-4)
    assert results["settings"]["finetune"] == json.loads(json.dumps(vars(expected)))
    assert {run["notes"].get("context_documents") for run in results["runs"]} == {None, 1}
    assert results["runs"][0]["accuracy"].keys() == {"recall", "test"}  # the split "other" has no answers
    assert printed[-1] == f"Written to {path}"
    assert any(line.startswith("fine-tuned ") for line in printed)
    assert max(map(len, printed[:-1])) <= 80
    assert {point["context_tokens"] for point in results["sweep"]["points"]} >= {0, results["sweep"]["context_tokens"]}
    assert results["load"]["phases"]["load"]["wall_s"] > 0
    assert results["machine"]["ceilings"]["flops_per_s"] > 0
    before = path.read_bytes()
    assert run(arguments)[0] == 0  # all is kept
    assert path.read_bytes() == before
    arguments[arguments.index("--train-batch-size") + 1] = "3"
    assert refused(arguments) == f"--out: {path}: exists already; choose another or give --overwrite"
    assert run([*arguments, "--overwrite"])[0] == 0
    assert json.loads(path.read_text(encoding="utf-8"))["settings"]["finetune"]["batch_size"] == 3


def test_one_generated_task_under_every_seed_and_a_context_that_fits(files, run):
    arguments = {"task": "simple-syllogisms", "arms": "icl", "seeds": "0,1", "icl_tokens": 150}
    code, printed, _ = run(files.compare("--task-seed", 4, **arguments))
    assert code == 0
    runs = json.loads((files.folder / "run" / "results.json").read_text())["runs"]
    assert len({tuple(answer["question_id"] for answer in run["answers"]) for run in runs}) == 1
    assert len({tuple(map(tuple, (a["correct"] for a in run["answers"]))) for run in runs}) == 1
    first = runs[0]["notes"]
    assert first["context_documents"] + first["left_out_documents"] == 69
    assert first["context_documents"] >= 1
    assert runs[0]["answers"] != runs[1]["answers"]  # the documents come in another order
    assert [line for line in printed if line.endswith(" more did not fit --icl-tokens.")]
    results = json.loads((files.folder / "run" / "results.json").read_text())
    assert results["settings"]["icl_tokens"] == 150
    assert results["settings"]["finetune"]["splitting"] == "independent"  # the paper's preset


def test_score_compares_models_in_one_table(files, run, refused, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(files.model, other)
    code, printed, errors = run(files.score("--model", other))
    assert (code, errors) == (0, [])
    assert sum(line.endswith(("scores.jsonl", "scores.jsonl.2")) for line in printed) == 2
    rows = [line for line in printed if "+0.000 1.000" in line]
    assert len(rows) == 1
    assert files.out.read_bytes() == files.out.with_name("scores.jsonl.2").read_bytes()
    assert refused(files.score("--model", other)) == f"--out: {files.out}: exists already; choose another or give " + (
        "--overwrite"
    )
    code, printed, _ = run(files.score("--overwrite", "--json", "--model", other))
    first, second = json.loads(printed[0])
    assert (second["changed"], second["mean_logp_distance"], first["model"]) == (0, 0.0, str(files.model))
    assert refused(files.score("--overwrite", "--model", files.model)) == "--model: a model is given twice"


PRICES = '{"currency": "EUR", "machine_per_hour": 2.5}'
BARE = {"arms": "base,icl,ft", "train_batch_size": 2, "measure_seconds": 0.1}


def test_compare_ends_with_a_decision(files, run, refused, monkeypatch):
    prices = files.folder / "prices.json"
    prices.write_text(PRICES)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(Derived, "not_above_chance", "")  # a random model is at chance, and would not be ranked
    volume = {"queries_per_day": 100, "days": 7, "prices": prices, "tolerance": 100}
    code, printed, errors = run(files.compare(**BARE, **volume))
    assert (code, errors) == (0, [])
    text = "\n".join(printed)
    assert "\x1b" not in text
    assert "cheapest first" in text
    assert "For 700 queries the cheapest way within 100 points of the best accuracy is" in " ".join(text.split())
    assert " EUR)" in text
    again = run(["report", str(files.folder / "run"), *pairs(volume)])
    assert again[1][1:] == printed[:-2]  # the same tables from the file
    for option, value, message in [
        ("prices", files.folder / "none.json", f"{files.folder / 'none.json'}: No such file or directory"),
    ]:
        assert refused(files.compare("--overwrite", **BARE, **volume | {option: value})) == message
    prices.write_text("{}")
    assert refused(files.compare("--overwrite", **BARE, **volume)).startswith(f"{prices}: currency: Field required")
    assert refused(["report", str(prices)]) == f"{prices}: schema_version: expected 3 or 4, got None"


def test_a_service_that_makes_no_sense_is_refused_before_any_work(files, refused):
    for options, message in (
        ({"cost_of_wrong": 1}, "--cost-of-wrong: needs --prices, in whose currency it is"),
        ({"queries_per_day": 0.001}, "--queries-per-day: expected at least one query in all --days"),
        ({"weights": "nosuch=1"}, "weights: 'nosuch' is no split of this study; it has "),
        ({"weights": "a=1", "weights_file": "w.json"}, "--weights: give it or --weights-file, not both"),
    ):
        assert refused(files.compare(**options)).startswith(message)
        assert not (files.folder / "run" / "results.json").exists()


def test_machines_get_json(files, run, monkeypatch):
    monkeypatch.setattr(Derived, "not_above_chance", "")
    code, printed, errors = run(files.compare("--json", **BARE, queries_per_day=10))
    assert (code, errors, len(printed)) == (0, [], 1)
    summary = json.loads(printed[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert summary["accuracy"].keys() == {"base", "icl", "ft"}
    assert summary["costs"]["seconds"].keys() == {"base", "ICL", "ICL cached", "ICL from file", "fine-tuned"}
    assert summary["decision"]["queries"] == 300
    assert sum(summary["decision"]["chosen_in"].values()) == pytest.approx(1.0)
    assert {(row["way"], row["rival"]) for row in summary["break_even"]} == {
        ("fine-tuned", rival) for rival in ("ICL", "ICL cached", "ICL from file")
    }
    (told,) = run(files.score("--json"))[1]
    assert json.loads(told)["known"] == 2
    assert json.loads(told)["served_by"] == "C++"
    assert json.loads(told)["phases"]["query"]["how"]["joules"] in ("unavailable", "measured")


def test_doctor(run, refused, monkeypatch):
    monkeypatch.setattr("icl_ft_fast.engine.machine.ceilings", functools.cache(ceilings))  # a second each
    code, printed, errors = run(["doctor"])
    assert (code, errors) == (0, [])
    assert any(line.startswith("float32 matmul ") for line in printed)
    assert max(map(len, printed)) <= 80
    (told,) = run(["doctor", "--json"])[1]
    assert [ceiling["dtype"] for ceiling in json.loads(told)["ceilings"]] == ["float32", "bfloat16"]
    assert json.loads(told)["attention"] == {"float32": "C++", "bfloat16": "C++"}
    assert {"FlashAttention 2", "FlashAttention 4"} <= json.loads(told)["extras"].keys()
    assert refused(["doctor", "--device", "nonsense"]) == "--device: 'nonsense' is no torch device"
    assert refused(["doctor", "--device", "meta"]) == "--device: meta: torch finds no such device here"


def test_compare_follows_the_protocol_it_is_given(files, run, refused):
    template = files.folder / "template.txt"
    template.write_text("Read this:\n{documents}\n{prompt}\n")
    options = {"normalization": "pmi", "splitting": "independent", "template": template, "arms": "icl"}
    assert run(files.compare(**options))[0] == 0
    results = json.loads((files.folder / "run" / "results.json").read_text())
    assert results["settings"]["normalization"] == "pmi"
    assert results["settings"]["finetune"]["splitting"] == "independent"
    assert results["settings"]["template"] == "Read this:\n{documents}\n{prompt}"
    (answer, _) = results["runs"][0]["answers"]
    assert (answer["question_id"], answer["topic"], answer["correct"]) == ("q1", "q1", [1])
    template.write_text("Read this")
    assert refused(files.compare(**options)).startswith(
        f"--template: {template}: template: expected auto, base, chat or a"
    )
    template.write_bytes(b"ab\xff")
    assert refused(files.compare(**options)) == (
        f"--template: {template}:1: not UTF-8 text (byte 3 of the line, 0xff; cp1252 reads 'ÿ' there)"
    )
    assert "has no chat template" in refused(files.compare("--overwrite", arms="icl", template="chat"))


def test_augment_on_a_generated_task(files, run):
    arguments = ["--task", "simple-reversals", "--preset", "small", "--facts", 2, "--strategy", "rules", "--quiet"]
    code, printed, errors = run(["augment", *map(str, arguments), "--out", str(files.folder / "rows")])
    assert (code, errors) == (0, [])
    assert printed[0].startswith("4 rows of ")
    assert {row["kind"] for row in read_lines(files.folder / "rows" / "rows.jsonl")} == {"reversed", "rephrased"}


def test_compare_on_a_generated_task(files, run):
    code, printed, errors = run(files.compare(task="simple-reversals", facts=2, seeds="5"))
    assert (code, errors) == (0, [])
    assert any("reversal" in line for line in printed)
    (row,) = json.loads((files.folder / "run" / "results.json").read_text())["runs"]
    assert row["accuracy"]["trained"]["total"] == 2


def test_demo_is_a_comparison_on_the_shipped_model(run, llama, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    loaded = []
    monkeypatch.setattr(
        "icl_ft_fast.engine.loading.load", lambda name, **options: loaded.append((name, options)) or llama
    )
    code, printed, errors = run(
        ["demo", "--quiet", "--facts", "2", "--seeds", "0", "--steps", "1", "--arms", "base,icl"]
    )
    assert (code, errors) == (0, [])
    assert [str(name) for name, _ in loaded] == [str(cli.compare.SHIPPED)]
    assert printed[0].startswith("Simple reversals: 2 facts such as 'femp are more dangerous than glon.'")
    assert any(line.startswith("ICL ") for line in printed)
    assert max(map(len, printed)) <= 80
    assert printed[-1] == "Written to out/demo/report.html"
    assert "ICL" in (tmp_path / "out" / "demo" / "report.html").read_text()


def test_a_harness_that_is_not_installed_is_named(refused, monkeypatch):
    monkeypatch.delitem(sys.modules, "icl_ft_fast.integrations.lm_eval", raising=False)
    monkeypatch.delattr(integrations, "lm_eval", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refused(["lm-eval", "run"]) == "needs lm_eval.api: pip install 'icl_ft_fast[lm-eval]'"


def test_the_home_folder_where_no_shell_has_put_it(llama_directory, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(llama_directory)
    (tmp_path / "d.txt").write_text("the cat sat on that mat")
    assert main(["task", "new", "~/task", "--documents", "~/d.txt"]) == 0
    question = {"id": "q", "prompt": "the cat", "choices": [" sat", " who"], "answer": 0}
    (tmp_path / "task" / "questions.jsonl").write_text(json.dumps(question) + "\n")
    files = ["--questions=~/task/questions.jsonl", "--documents=~/task/documents.jsonl", "--out=~/scores.jsonl"]
    assert main(["score", "--model=~/model", *files]) == 0
    assert (tmp_path / "scores.jsonl").exists()
    (tmp_path / "run.yaml").write_text("train_file: ~/task/documents.jsonl\noutput_dir: ~/tuned\nmax_steps: 1\n")
    assert main(["finetune", "--config", "~/run.yaml", "--model_name_or_path", "~/model"]) == 0
    assert (tmp_path / "tuned" / "model.safetensors").exists()
    assert load("~/model").name == str(tmp_path / "model")
    os.mkfifo(tmp_path / "pipe")
    assert main(["score", "--model=~/model", *files[:2], "--out=~/pipe", "--overwrite"]) == 2
    assert "pipe: is no file that could be replaced" in capsys.readouterr().err


def test_letters_that_the_locale_has_not_are_spelt_out(tmp_path):
    (tmp_path / "documents.jsonl").write_text('{"id": "d\u00fc", "text": ""}\n', encoding="utf-8")
    question = {"id": "q", "prompt": "a", "choices": [" b", " c"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    command = [sys.executable, "-m", "icl_ft_fast.cli", "task", "check", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "documents without text: 1 (d\\xfc)" in done.stdout
