"""The threat model of docs/security.md: every row names tests that exist, and those that no other file has are here."""

import ast
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from safetensors.torch import save_file
from test_repo import IMPORTS, MODULES, ROOT

from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.strategy import AugmentError
from icl_ft_fast.cli import main
from icl_ft_fast.cli.options import Terminal
from icl_ft_fast.engine.contexts import ContextError, read_header, save_context
from icl_ft_fast.engine.likelihood import prefill
from icl_ft_fast.runtime import templates
from icl_ft_fast.runtime.printable import printable
from icl_ft_fast.tasks import files, own, task
from icl_ft_fast.tasks.files import TaskError, write_jsonl
from icl_ft_fast.tasks.task import Document

ACTING = "\x1b[2J\x07\x9b31m\r\u202egnp.exe\u2069"
SPELT = r"\x1b[2J\x07\x9b31m\r\u202egnp.exe\u2069"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def rows():
    """(threat, names of tests) of each row of the page's table."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [pytest.param(re.findall(r"`(test_\w+)(?:\.py)?::(test_\w+)`", row[-1]), id=row[0]) for row in cells[1:]]


@pytest.mark.parametrize("named", rows())
def test_every_row_of_the_page_names_tests_that_exist(named):
    assert named
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}: {test}"


def test_the_page_has_a_row_for_each_kind_of_input():
    assert len(rows()) >= 25


# What is read


@pytest.mark.parametrize("name", MODULES)
def test_nothing_unpacks_an_archive(name):
    assert IMPORTS[name][1].isdisjoint({"zipfile", "tarfile", "gzip", "bz2", "lzma"})


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE", 1000)
    path = tmp_path / "documents.jsonl"
    lines = [json.dumps({"text": "x" * size}) for size in (900, 500, 1000)]
    path.write_text("\n".join(lines[:2]))
    assert len(list(own.iter_documents([path], own.Format(encoding)))) == 2
    path.write_text("\n".join(lines))
    with pytest.raises(TaskError, match=rf"^{path}:3: a line of 1,000 bytes or more$"):
        list(own.iter_documents([path], own.Format(encoding)))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
def test_a_device_that_never_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE", 2**20)
    with pytest.raises(TaskError, match=r"^/dev/zero: begins with zero bytes"):
        task.read_documents("/dev/zero")
    (tmp_path / "noise.txt").symlink_to("/dev/urandom")
    monkeypatch.setattr(files, "SCANNED", 2**20)
    with pytest.raises(TaskError, match=r"noise\.txt"):
        list(own.iter_documents([tmp_path / "noise.txt"]))


def test_a_folder_of_documents_does_not_lead_out_of_it(tmp_path):
    folder, secret = tmp_path / "folder", tmp_path / "secret.txt"
    folder.mkdir()
    secret.write_text("the key")
    (folder / "inside.txt").write_text("a text")
    (folder / "again.txt").symlink_to("inside.txt")
    assert len(list(own.iter_documents([folder]))) == 2
    (folder / "notes.txt").symlink_to(secret)
    with pytest.raises(TaskError, match=rf"^{folder / 'notes.txt'}: a link out of {folder}; name what it leads to"):
        list(own.iter_documents([folder]))


def test_a_header_nested_too_deep_is_no_saved_context(tmp_path, llama):
    path = tmp_path / "deep.safetensors"
    tensors = {"token": llama.network.model.norm.weight.detach()}
    save_file(tensors, path, metadata={"icl_ft_fast": '{"a":' * 100_000 + "1" + "}" * 100_000})
    with pytest.raises(ContextError, match=f"^{path}: not a saved context$"):
        read_header(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nlora_target_modules: [*b, *b]", "b: expected a value or a list of values"),
        ("learning_rate: {a: 1}", "learning_rate: expected a value or a list of values"),
        ("a: " + "[" * 20_000, "not valid YAML: "),
        ("max_steps: " + "9" * 5_000, "not valid YAML: "),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML: could not determine a constructor"),
    ],
)
def test_a_configuration_that_grows_or_runs_is_refused(text, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["finetune", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"icl-ft-fast finetune: --config: {path}: {message}")
    assert error.count("\n") == 1


# Templates


def test_a_template_without_end_is_cut_off(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "STEPS", 200_000)
    path = tmp_path / "mine.jinja"
    path.write_text(ENDLESS)
    with pytest.raises(AugmentError, match=r"mine.jinja: document 'd': not done after 200,000 steps"):
        Prompting.of("document", template=path).prompts([Document("d", "text")])
    monkeypatch.setattr(tokenizer, "chat_template", ENDLESS)
    with pytest.raises(templates.TemplateError, match="not done after"):
        templates.render_chat(tokenizer, [{"role": "user", "content": "who"}])


@pytest.mark.parametrize(
    "source", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ range(10**9) }}"]
)
def test_a_chat_template_stays_in_the_sandbox(source, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", source)
    with pytest.raises((templates.TemplateError, OverflowError)):
        templates.render_chat(tokenizer, [{"role": "user", "content": "who"}])


def test_a_long_conversation_is_far_from_the_bound(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "STEPS", templates.STEPS // 20)
    template = "{% for m in messages %}{% if m['role'] == 'user' %}<{{ m['content'] }}>{% endif %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert templates.render_chat(tokenizer, [{"role": "user", "content": "a"}] * 1000) == "<a>" * 1000


# The terminal


@given(st.text(st.characters() | st.sampled_from(ACTING)))
def test_a_printable_text_acts_on_nothing_and_says_the_same(text):
    told = printable(text)
    told.encode()
    assert not any(0x7F <= ord(letter) < 0xA0 or (letter < " " and letter not in "\t\n") for letter in told)
    assert not set(told) & set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert printable(told) == told
    if text.isprintable():
        assert told == text


def test_what_a_saved_context_says_of_itself_does_not_reach_the_terminal(llama, tmp_path, capsys):
    save_context(tmp_path / "a.safetensors", llama, prefill(llama, [2, 3]), label=ACTING)
    assert main(["context", "list", "--store", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert not set(shown) & (set(ACTING) - set("[2J31mgnp.exe"))
    assert r"\x1b" in shown


def test_what_a_task_says_does_not_reach_the_terminal(tmp_path, capsys):
    document = {"id": ACTING, "text": "a b c d e f g h"}
    question = {"id": ACTING, "prompt": "a", "choices": [" b", " c"], "answer": 0, "split": ACTING}
    write_jsonl(tmp_path / "documents.jsonl", [document, document | {"id": "2" + ACTING}])
    write_jsonl(tmp_path / "questions.jsonl", [question, question | {"id": "2" + ACTING}])
    assert main(["task", "check", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert not set(shown) & (set(ACTING) - set("[2J31mgnp.exe"))
    assert SPELT in shown
    write_jsonl(tmp_path / "documents.jsonl", [document | {"text": None}])
    assert main(["task", "check", str(tmp_path / ACTING)]) == 2
    error = capsys.readouterr().err
    assert SPELT in error
    assert error.count("\n") == 1


def test_tables_spell_out_what_acts(capsys):
    table = Table(ACTING, caption=ACTING)
    table.add_row(ACTING)
    console = Terminal(width=200)
    console.print(table)
    console.print(ACTING, markup=False)
    shown = capsys.readouterr().out
    assert shown.count(SPELT) == 4
    assert not set(shown) & (set(ACTING) - set("[2J31mgnp.exe"))
