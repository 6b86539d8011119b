"""Questions written by a model: what is kept and what is dropped, where each comes from, and runs that go on."""

import json
import re
from dataclasses import asdict

import pytest

from icl_ft_fast.cli import main
from icl_ft_fast.engine.generate import Generation
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.runtime.durable import DamagedError, digest
from icl_ft_fast.study import questions
from icl_ft_fast.study.questions import QuestionSettings, write_questions
from icl_ft_fast.tasks.files import write_jsonl
from icl_ft_fast.tasks.task import Document, Question, Task, read_questions

TEMPLATE = "{statement}\n"
WHO = {"the cat": "w", "that mat": "x", "who knows": "y", "why that": "z"}
DOCUMENTS = [Document(f"d{d}", f"# Heading\n{name} sat on {thing}.") for d, (name, thing) in enumerate(WHO.items())]


def question_about(document):
    """(sentence, question, answer) of a document."""
    sentence = document.text.splitlines()[1]
    name, thing = re.fullmatch(r"(\w+ \w+) sat on (.*)\.", sentence).groups()
    return sentence, f"{name} on?", thing


@pytest.fixture(scope="module")
def writer(llama):
    """The tiny llama, taught to write the question of each document and to answer it with the document in context."""
    texts = []
    for document in DOCUMENTS:
        sentence, asked, answer = question_about(document)
        written = f"Question: {asked}\nAnswer: {answer}"
        texts += [f"{sentence}\n{written}\n\n", icl_context([document]) + written]
    return finetune(llama, texts, FinetuneSettings(steps=60, batch_size=8, learning_rate=1e-2)).model


def test_a_model_writes_questions_that_it_can_answer(writer, tmp_path):
    found = write_questions(writer, DOCUMENTS, tmp_path / "journal", QuestionSettings(TEMPLATE, max_new_tokens=40))
    assert (found.statements, found.dropped) == (len(DOCUMENTS), {})
    template, model = digest(TEMPLATE), writer.fingerprint()
    answers = {document.id: question_about(document)[2] for document in DOCUMENTS}
    for (question, origin), document in zip(found.rows, DOCUMENTS, strict=True):
        sentence, asked, answer = question_about(document)
        assert (question.id, question.topic) == (f"{document.id}-q1", document.id)
        assert question.prompt == f"Question: {asked}\nAnswer:"
        assert question.choices[question.answer] == f" {answer}"
        wrong = {choice[1:] for c, choice in enumerate(question.choices) if c != question.answer}
        others = {other for name, other in answers.items() if name != document.id and f" {other}." not in document.text}
        assert len(wrong) == 3
        assert wrong <= others
        logp = origin.pop("logp")
        assert origin == {"document": document.id, "sentence": sentence, "template": template, "model": model}
        assert max(range(4), key=logp.__getitem__) == question.answer


class Scripted:
    """Stands for generate(): gives each prompt's text, counts prompts, and may be stopped."""

    def __init__(self, monkeypatch, texts):
        self.texts, self.prompts, self.most = texts, [], 10**6
        monkeypatch.setattr(questions, "generate", self)

    def __call__(self, model, prompts, sampling):
        if len(self.prompts) + len(prompts) > self.most:
            raise KeyboardInterrupt
        self.prompts += prompts
        return [Generation(self.texts[prompt.removesuffix("\n")], (), (), "stop") for prompt in prompts]


def test_what_is_dropped_is_counted(llama, tmp_path, monkeypatch):
    good = {f"the cat sat {n} times.": f"Question: q{n}?\nAnswer: a{n}" for n in range(6)}
    bad = {
        "who knows not why.": "Question: why?",
        "who knows not that.": "Answer: x",
        "on the mat again.": "",
        "that cat again sat.": " Question: q0?\n\n Answer:  a0 \nAnswer: b",
    }
    Scripted(monkeypatch, good | bad)
    documents = [Document(f"d{n}", text) for n, text in enumerate(good)]
    documents[0] = Document("d0", " ".join([*list(good)[:1], *bad, "too short."]) + " " + "mat " * 300 + ".")
    found = write_questions(llama, documents, tmp_path / "journal", QuestionSettings(TEMPLATE, max_new_tokens=40))
    assert found.statements == 11
    kept = {question.topic for question, _ in found.rows}
    assert "d0" not in kept  # its document does not fit the context
    assert found.dropped.pop("not supported", 0) + len(kept) == 5
    assert found.dropped == {"too long": 2, "without question and answer": 3, "repeated": 1}
    rows = [json.loads(line)["row"] for line in (tmp_path / "journal").read_text().splitlines()]
    checks = {row["key"]: row["value"] for row in rows if isinstance(row["value"], list)}
    best = [max(range(4), key=logp.__getitem__) for logp in checks.values()]
    assert len(checks) == 5
    assert sorted(logp for _, origin in found.rows for logp in [origin["logp"]]) == sorted(
        logp
        for logp, question in zip(checks.values(), all_questions(llama, documents[1:], tmp_path), strict=True)
        if max(range(4), key=logp.__getitem__) == question.answer
    )
    assert best


def all_questions(llama, documents, folder):
    """The questions before they are checked."""
    drafts = [
        questions._Draft(document, document.text, 0, f"q{n}?", f"a{n}") for n, document in enumerate(documents, 1)
    ]
    drafts.insert(0, questions._Draft(Document("d0", ""), "", 0, "q0?", "a0"))
    return [question for draft, question in questions._with_wrong_choices(drafts, 0) if draft.document.id != "d0"]


def test_wrong_choices_are_near_in_length_and_not_in_the_document():
    answers = ["blue", "A.", "two", "the whole of it and much more", "four", "a!", "five"]
    drafts = [
        questions._Draft(Document(str(a), f"They say {a}, or {b}."), "", 0, "?", b) for a, b in enumerate(answers)
    ]
    drafts[0] = questions._Draft(Document("0", "Blue is FOUR; five-fold."), "", 0, "?", "blue")
    made = {draft.document.id: question for draft, question in questions._with_wrong_choices(drafts, 0)}
    assert set(made["0"].choices) == {" blue", " two", " A.", " the whole of it and much more"}
    assert set(made["6"].choices) == {" five", " blue", " two", " four"}
    assert made["0"].choices[made["0"].answer] == " blue"
    assert len({question.answer for question in made.values()}) > 1
    assert questions._with_wrong_choices(drafts[:3], 0) == []


def test_a_run_that_was_stopped_goes_on_and_a_torn_line_is_written_again(llama, tmp_path, monkeypatch):
    good = {f"the cat sat {n} times.": f"Question: q{n}?\nAnswer: a{n}" for n in range(150)}
    documents = [Document(f"d{n}", text) for n, text in enumerate(good)]
    journal, settings = tmp_path / "journal", QuestionSettings(TEMPLATE, max_new_tokens=40)
    whole = write(Scripted(monkeypatch, good), llama, documents, tmp_path / "whole", settings)
    script = Scripted(monkeypatch, good)
    script.most = 130
    with pytest.raises(KeyboardInterrupt):
        write_questions(llama, documents, journal, settings)
    assert len(journal.read_text().splitlines()) == 128
    journal.write_bytes(journal.read_bytes()[:-9])
    before = journal.read_bytes()
    script.most = 10**6
    assert write_questions(llama, documents, journal, settings) == whole
    assert len(script.prompts) == 128 + 1 + 22  # the line that was torn, and the rest
    assert journal.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    monkeypatch.setattr(questions, "score", lambda *_: pytest.fail("scored again"))
    assert write_questions(llama, documents, journal, settings) == whole
    assert len(script.prompts) == 151
    write_jsonl(journal, [{"key": "a", "value": [1.0]}])
    with pytest.raises(DamagedError, match=r"journal:1: damaged, or not written by icl-ft-fast; move the file away"):
        write_questions(llama, documents, journal, settings)


def write(script, *arguments):
    return write_questions(*arguments)


def test_some_sentences_of_each_document(llama, tmp_path, monkeypatch):
    texts = {f"the cat sat {n} times.": f"Question: q{n}?\nAnswer: a{n}" for n in range(12)}
    documents = [Document(f"d{d}", " ".join(list(texts)[4 * d : 4 * d + 4])) for d in range(3)]
    chosen = []
    for seed in (0, 0, 1):
        script = Scripted(monkeypatch, texts)
        write_questions(llama, documents, tmp_path / f"{len(chosen)}", QuestionSettings(TEMPLATE, 2, seed=seed))
        chosen.append(script.prompts)
        assert [sum(prompt[:-1] in d.text for prompt in script.prompts) for d in documents] == [2, 2, 2]
    assert chosen[0] == chosen[1] != chosen[2]
    with pytest.raises(ValueError, match=r"^template: expected a text with one \{statement\}, got 'x'$"):
        QuestionSettings("x")


def test_questions_from_the_command_line(writer, tmp_path, capsys, monkeypatch):
    folder, template = tmp_path / "mine", tmp_path / "template.txt"
    Task(tuple(DOCUMENTS), ()).write(folder)
    (folder / "questions.jsonl").unlink()
    template.write_text(TEMPLATE)
    monkeypatch.setattr("icl_ft_fast.cli.run.task.load_model", lambda _: writer)
    arguments = ["task", "questions", str(folder), "--model", "any", "--quiet", "--prompt-template", str(template)]
    assert main([*arguments, "--max-new-tokens", "40"]) == 0
    found = write_questions(writer, DOCUMENTS, tmp_path / "journal", QuestionSettings(TEMPLATE, max_new_tokens=40))
    out = folder / "questions.jsonl"
    assert capsys.readouterr().out == f"4 questions from 4 statements; dropped: none. Written to {out}\n"
    assert read_questions(out) == tuple(question for question, _ in found.rows)
    assert [json.loads(line)["provenance"] for line in out.read_text().splitlines()] == [o for _, o in found.rows]
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    Task((Document("a", "the cat sat on that."),), (Question("q", "", ("x",)),)).write(folder)
    assert main([*arguments, "--overwrite", "--max-new-tokens", "1"]) == 2
    assert "0 questions from 1 statements; dropped: 1 without question and answer\n" in capsys.readouterr().err
    assert [asdict(q)["id"] for q in read_questions(out)] == ["q"]  # left as it was
    template.write_text("no place")
    assert main([*arguments, "--overwrite"]) == 2
    assert "--prompt-template: template: expected a text with one {statement}" in capsys.readouterr().err
