"""Tasks of one's own: documents from every kind of file, what each refusal names, and what the check finds."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_ft_fast.cli import main
from icl_ft_fast.tasks import own
from icl_ft_fast.tasks.check import check
from icl_ft_fast.tasks.files import TaskError
from icl_ft_fast.tasks.own import iter_documents
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.tables import Format
from icl_ft_fast.tasks.task import Document, Question, Task, read_documents, read_questions

ROOT = Path(__file__).parents[1]
SQUAD = ROOT.parent / "shared" / "data" / "squad"


def test_the_check_shows_prompts_counts_tokens_and_warns_of_merged_choices(tmp_path, capsys, llama_directory):
    folder, model = tmp_path / "t", tmp_path / "model"
    shutil.copytree(llama_directory, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    documents = [Document(f"d{n}", f"the cat {n} sat on that mat") for n in range(9)]
    rows = [Question("q", "the cat sat on", (" that mat", " the cat"), answer=0), Question("m", "the c", ("at", "ow"))]
    Task(tuple(documents), tuple(rows)).write(folder)
    code, out, _ = call(capsys, "check", folder, "--model", model)
    assert code == 0
    assert "== template chat, the default for this model: with documents at most " in out
    assert "<Complete the statement.>the cat sat on[ that mat]" in out
    assert "- the cat 0 sat on that mat\n- [... 7 more documents ...]\n- the cat 8 sat on that mat\n" in out
    assert re.search(r"tokens \| those of the choice: \.\.\. .* \| ' that' ' mat'", out)
    assert "questions whose prompt swallows the beginning of a choice: 1 (m)" in out
    assert "does not fit" not in out
    Task(tuple(documents) + tuple(Document(f"e{n}", documents[0].text) for n in range(60)), tuple(rows)).write(folder)
    found = re.findall(
        r"does not fit: give compare --icl-tokens (\d+)", call(capsys, "check", folder, "--model", model)[1]
    )
    assert len(found) == 2
    assert all(0 < int(tokens) < 256 for tokens in found)


def test_every_kind_of_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.jsonl").write_text('{"id": "x", "text": "one"}\n\n{"text": "zwei ü", "topic": "t"}\n', "utf-8")
    (tmp_path / "b.csv").write_text('topic,text,more\r\nu,"three,\n""3""",\r\n\r\n,four,5\r\n', "utf-8")
    (tmp_path / "deep" / "c.txt").write_bytes(b"five\r\nlines\n")
    (tmp_path / "deep" / "d.md").write_text("# six")
    (tmp_path / "deep" / "e.pdf").write_bytes(b"\xff")
    expected = [
        Document("x", "one"),
        Document("a.jsonl:3", "zwei ü", "t"),
        Document("b.csv:3", 'three,\n"3"', "u"),
        Document("b.csv:5", "four"),
        Document("deep/c.txt", "five\nlines\n"),
        Document("deep/d.md", "# six"),
    ]
    assert list(iter_documents([tmp_path])) == expected
    assert list(iter_documents([tmp_path / "b.csv", tmp_path / "deep"])) == [
        *expected[2:4],
        Document("c.txt", "five\nlines\n"),
        Document("d.md", "# six"),
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig", "utf-32", "cp1252"])
def test_other_encodings(encoding, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ü"}', encoding)
    (tmp_path / "b.csv").write_text("text\nß", encoding)
    (tmp_path / "c.txt").write_text("é", encoding)
    assert [document.text for document in iter_documents([tmp_path], Format(encoding))] == ["ü", "ß", "é"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', ":2: text: expected a string, got 3"),
        ("a.jsonl", b'{"id": "x"}', ":1: text: missing"),
        ("a.jsonl", b'{"id": "x", "text": ""}\n{"id": "x", "text": ""}', ":2: id: 'x' was used before"),
        ("a.jsonl", b"\nno", ":2: not valid JSON: Expecting value: "),
        ("a.jsonl", '{"text": "ü'.encode() + b'\xff"}', ":1: not UTF-8 text (byte 13 of the line, 0xff; cp1252 reads"),
        ("a.csv", b"id,words\n", ":1: text: missing from the heading 'id,words'"),
        ("a.csv", b"", ":1: text: missing from the heading ''"),
        ("a.csv", b"text,id\na,b\nc\n", ":3: column 2: expected 2 columns, got 1"),
        ("a.csv", b"text,id\na,b,c\n", ":2: column 3: expected 2 columns, got 3"),
        ("a.csv", b'text\n"a', ":2: not valid CSV: unexpected end of data"),
        ("a.csv", b'text\n"a"b', ":2: not valid CSV: ',' expected after '\"'"),
        ("a.csv", "text\nä\nb".encode() + b"\xff", ":3: not UTF-8 text (byte 2 of the line, 0xff;"),
        ("a.csv", b"text,id\na,b\nc,b", ":3: column 2: id: 'b' was used before"),
        ("a.csv", b"text,id,text\n", ":1: column 3: 'text' is there twice"),
        ("a.txt", b"one\ntwo\0three\n", ":2: a zero byte, which no text has"),
        ("a.csv", b"text\n" + b"\0" * 5000, ":2: a zero byte, which no text has"),
        ("a.txt", "one\ntwö ".encode() + b"\xe9\n", ":2: not UTF-8 text (byte 6 of the line, 0xe9; cp1252 reads 'é'"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ": a Git LFS pointer, not the file"),
        ("a.pdf", b"", ": expected a folder or a file that ends in .jsonl, .json, .csv, .tsv, .txt, .md"),
        ("a.jsonl", b"\n", ": no documents: expected .jsonl, .json, .csv, .tsv, .txt, .md files with some"),
    ],
)
def test_bad_files_name_line_and_field(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError) as caught:
        list(iter_documents([tmp_path / name]))
    assert str(caught.value).startswith(f"{tmp_path / name}{message}")
    assert "\n" not in str(caught.value)


def test_an_article_in_a_cell_and_the_marks_of_joined_files_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "a" * 200_000)
    (tmp_path / "b.jsonl").write_text('\ufeff{"text": "b"}\n\ufeff{"text": "c\ufeff"}\n')
    assert [len(document.text) for document in iter_documents([tmp_path])] == [200_000, 1, 2]


def test_missing_files_and_wrong_encodings(tmp_path):
    with pytest.raises(TaskError, match=r"no\.txt: cannot be read: No such file or directory$"):
        list(iter_documents([tmp_path / "no.txt"]))
    for encoding, content in (
        ("utf-7", b"a\n" * 40_000 + b"a\xff\nb"),
        ("shift_jis", b"\x82\xa0\n" * 40_000 + b"\x82"),
        ("utf-16-le", "ü\n".encode("utf-16-le") * 40_000 + b"\x00\xd8\x00\x00"),
    ):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(TaskError, match=rf"a\.txt:40001: not {encoding} text: "):
            list(iter_documents([tmp_path / "a.txt"], Format(encoding)))
    with pytest.raises(TaskError, match=r": no documents: expected "):
        list(iter_documents([tmp_path / "a.txt"][:0]))


SHEET = """Nr;Question;A;B;C;Correct answer
1;Wer baute die Mühle?;Anna;Karl;;A
2;Wann?;1871;1872;1873;B
3;Wo?;Lund;Malmö;Ö;Ö
"""


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "cp1252", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_a_sheet_saved_by_excel_goes_in(encoding, ends, tmp_path):
    path, notes = tmp_path / "sheet.csv", []
    path.write_bytes(SHEET.replace("\n", ends).encode(encoding))
    assert own.read_questions(path, Format(tell=notes.append)) == (
        Question("sheet.csv:2", "Wer baute die Mühle?", ("Anna", "Karl"), 0),
        Question("sheet.csv:3", "Wann?", ("1871", "1872", "1873"), 1),
        Question("sheet.csv:4", "Wo?", ("Lund", "Malmö", "Ö"), 2),
    )
    assert f"{path}: cells are separated by ';'" in notes
    assert f"{path}: prompt = Question, answer = Correct answer, choices = A, B, C" in notes
    assert f"{path}: not used: Nr" in notes
    assert any("read as" in note for note in notes) == (encoding in ("cp1252", "utf-16-le"))


def test_a_field_that_is_there_twice_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "prompt": "b", "choices": ["x", "y"]}\n')
    with pytest.raises(TaskError, match=r"a\.jsonl:1: not valid JSON: 'prompt' is there twice$"):
        own.read_questions(path)


def test_a_mark_that_excel_writes_for_itself_and_quoted_cells(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(b'\xef\xbb\xbfsep=;\r\nID;Text;\r\n7;"two\r\nlines; one cell";\r\n8;short;;\r\n')
    assert list(iter_documents([path])) == [Document("7", "two\nlines; one cell"), Document("8", "short")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.json",
            [{"question": "Q", "options": ["x", "y"], "answer": "y"}],
            Question("a.json:[1]", "Q", ("x", "y"), 1),
        ),
        ("a.json", {"data": [{"id": 3, "prompt": "Q", "choices": ["x", "y"]}]}, Question("3", "Q", ("x", "y"))),
        (
            "a.jsonl",
            [{"id": "e", "question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}],
            Question("e", "Q", ("x", "y"), 1),
        ),
        ("a.json", [{"question": "Q", "A": "x", "B": "y", "answer": "b"}], Question("a.json:[1]", "Q", ("x", "y"), 1)),
        (
            "a.json",
            [{"question": "Q", "correct_answer": "x", "distractor1": "y", "distractor2": "z"}],
            Question("a.json:[1]", "Q", ("x", "y", "z"), 0),
        ),
        *(
            ("a.jsonl", [{"id": "e", **row}], Question("e", "Q", ("x", "y"), 1))
            for row in (
                {"question": {"stem": "Q", "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]}}
                | {"answerKey": "2"},
                {"question": "Q", "choices": {"text": ["x", "y"], "label": ["C", "A"]}, "answer": "A"},
                {"ctx": "Q", "endings": ["x", "y"], "label": "1"},
                {"goal": "Q", "sol1": "x", "sol2": "y", "label": 1},
                {"prompt": "Q", "choices": ["x", "y"], "answer": 1.0},
                {"prompt": "Q", "choices": ["x", "y"], "answer": ["Y."]},
                {"prompt": "Q", "choices": ["x", "y"], "answer": "Option B"},
            )
        ),
        ("a.jsonl", [{"id": "e", "q": "Q", "options": [3, 4], "answer": 4}], Question("e", "Q", ("3", "4"), 1)),
        (
            "a.jsonl",
            [{"id": "e", "q": "Q", "options": [True, False], "answer": False}],
            Question("e", "Q", ("True", "False"), 1),
        ),
        (
            "a.jsonl",
            [{"id": "e", "q": "Q", "options": ["x", "y", "z"], "answer": [0, 2]}],
            Question("e", "Q", ("x", "y", "z"), 0, also_correct=(2,)),
        ),
        (
            "a.jsonl",
            [{"id": "e", "q": "Q", "options": ["Anna\u2019s", "no"], "answer": "anna's"}],
            Question("e", "Q", ("Anna\u2019s", "no"), 0),
        ),
    ],
)
def test_the_usual_fields_of_json(name, content, expected, tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    assert own.read_questions(tmp_path / name) == (expected,)


def test_columns_of_any_name_and_answers_that_count_from_one(tmp_path):
    path = tmp_path / "q.tsv"
    path.write_text("Frage\tchoice1\tchoice2\tLösung\ta\nq\tx\ty\t2\tno\nr\tx\ty\t1\tno\n")
    form = Format(columns={"prompt": "Frage", "answer": "Lösung"})
    with pytest.raises(TaskError, match=r"answer: none of 2 numbers is 0: do they count from 1\?"):
        own.read_questions(path, form)
    read = [(q.prompt, q.answer) for q in own.read_questions(path, form, first_answer=1)]
    assert read == [("q", 1), ("r", 0)]
    with pytest.raises(TaskError, match="prompt: missing from the heading"):
        own.read_questions(path)
    with pytest.raises(TaskError, match="columns: 'prompts' is no field"):
        own.read_questions(path, Format(columns={"prompts": "Frage"}))


def test_all_that_is_wrong_is_told_at_once(tmp_path, capsys):
    path = tmp_path / "q.csv"
    path.write_text("prompt,choice1,choice2,answer\na,b\nc,,d,0\ne,f,g,9\nh,i,j,0\n")
    (tmp_path / "d.jsonl").write_text('{"text": 1}\n{\n{"text": "x"}\n')
    folder = tmp_path / "deep" / "task"
    code, out, errors = call(capsys, "new", folder, "--documents", tmp_path / "d.jsonl", "--questions", path)
    assert (code, out) == (2, "")
    assert [line.partition(" ")[0] for line in errors.removeprefix("icl-ft-fast task: ").splitlines()] == [
        f"{path}:2:",
        f"{path}:3:",
        f"{path}:4:",
        f"{tmp_path / 'd.jsonl'}:1:",
        f"{tmp_path / 'd.jsonl'}:2:",
    ]
    assert not folder.parent.exists()  # a failed command leaves no folder behind
    path.write_text("prompt,choice1,choice2,answer\na,b,c,2\nd,e,f,0\ng,h,i,x\n")  # numbers are looked at last
    with pytest.raises(TaskError, match=r"(?s)q\.csv:2: .*\n.*q\.csv:4: "):
        own.read_questions(path)
    path.write_text("prompt,choice1\n" + "a,\n" * 30)
    with pytest.raises(TaskError, match=r"(?s)q\.csv:21: .*\n\.\.\. and 10 more$"):
        own.read_questions(path)


def test_what_is_doubtful_is_told(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    text = "The mill in Lund was built by Anna Brandt in the year 1872 and it still grinds rye every autumn."
    for name, more in (("a", ""), ("b", " So they say."), ("c", "")):
        (tmp_path / f"{name}.txt").write_text(text + more)
    rows = [{"prompt": "Who?", "choices": ["Anna", "Karl", "Anna"], "answer": 2}, {"prompt": "又", "choices": ["安娜"]}]
    rows += [{"prompt": " ", "choices": ["Anna", "Karl"], "document": "a"}]
    asked = tmp_path / "q.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [tmp_path / f"{name}.txt" for name in ("empty", "a", "b", "c")]
    code, out, _ = call(capsys, "new", tmp_path / "t", "--documents", *paths, "--questions", asked)
    assert code == 0
    assert out.splitlines()[:4] == [
        "documents without text: 1 (empty.txt)",
        "choices that run into the prompt, without a space between: 1 (q.jsonl:1)"
        "; begin such choices with a space, in tables too",
        "questions with equal choices: 1 (q.jsonl:1)",
        "questions whose document (field document) is not there: 1 (q.jsonl:3)"
        "; the documents have ids such as empty.txt",
    ]
    question = Task.read(tmp_path / "t").questions[0]
    assert (question.answer, question.correct) == (0, (0, 2))  # the right text is right wherever it stands
    pytest.importorskip("datasketch")
    code, out, _ = call(capsys, "check", tmp_path / "t")
    assert out.splitlines()[:8] == [
        "documents without text: 1 (empty.txt)",
        "documents that repeat another: 1 (c.txt)",
        "documents that nearly repeat another: 1 (b.txt)",
        "questions that repeat another: none",
        "questions with equal choices: 1 (q.jsonl:1)",
        "questions whose choices run into the prompt, without a space between: 1 (q.jsonl:1)"
        "; begin such choices with a space, in tables too",
        "questions without a prompt: 1 (q.jsonl:3)",
        "questions whose document (field document) is not there: 1 (q.jsonl:3)",
    ]


CELLS = st.text(alphabet='ab,"\n\r\0ü', max_size=6)
CONTENT = (
    st.binary(max_size=40)
    | st.lists(CELLS, max_size=4).map(lambda cells: ("text,id\n" + "\n".join(cells)).encode())
    | st.dictionaries(st.sampled_from(["id", "text", "topic"]), CELLS | st.none() | st.integers()).map(
        lambda row: json.dumps(row).encode()
    )
)


@settings(deadline=None, max_examples=300)
@given(
    content=CONTENT,
    suffix=st.sampled_from(own.SUFFIXES),
    encoding=st.sampled_from([None, None, "utf-8", "utf-16", "utf-7", "ascii", "latin-1"]),
)
def test_reading_raises_nothing_but_task_errors(content, suffix, encoding, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        documents = tuple(iter_documents([path], Format(encoding)))
    except TaskError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
    else:
        Task(documents, ()).write(path.parent / "written")
        assert read_documents(path.parent / "written" / "documents.jsonl") == documents


QUESTIONS = "topic,id,prompt,choice1,choice2,choice3,answer,also_correct,split,form,why"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_questions_from_csv(delimiter, tmp_path):
    rows = [QUESTIONS, "t,q1,Who?, me, you,,1,,,,x", ",,, a, b, c,0,1 2,s,f,"]
    path = tmp_path / "asked.csv"
    path.write_text("\n".join(row.replace(",", delimiter) for row in rows), "latin-1")
    assert own.read_questions(path, Format("latin-1", delimiter)) == (
        Question("q1", "Who?", (" me", " you"), 1, topic="t"),
        Question("asked.csv:3", "", (" a", " b", " c"), 0, "s", None, "f", (1, 2)),
    )
    (tmp_path / "asked.jsonl").write_text('{"prompt": "p", "choices": ["x"], "answer": 0}')
    assert own.read_questions(tmp_path / "asked.jsonl") == (Question("asked.jsonl:1", "p", ("x",), 0),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,choice1\n", ":1: prompt: missing from the heading 'id,choice1'"),
        ("prompt,answer\n", ":1: choice1: missing from the heading 'prompt,answer'"),
        ("prompt,choice1,choice2\na,,c", ":2: column 2: choice1: expected a non-empty string"),
        ("prompt,choice1,choice2\n", ": empty: expected at least one question"),
        ("prompt,answer,choice1,choice2\na,3,b,c", ":2: column 2: answer: expected 0 to 1, got '3'"),
        ("prompt,answer,choice1,choice2\na,0,b,\na,1,b,", ":3: column 2: answer: expected 0 to 0, got '1'"),
        ("prompt,answer,choice1\na,0 0,b", ":2: column 2: answer: expected 0 to 0, a letter or a choice, got '0 0'"),
        ("prompt,answer,choice1\na,c,b", ":2: column 2: answer: expected 0 to 0, a letter or a choice, got 'c'"),
        ("prompt,answer,choice1,choice2\na,2,b,c\nd,1,e,f", ": answer: none of 2 numbers is 0: do they count from 1?"),
        ("prompt,choice1,choice2,also_correct\na,b,c,x", ":2: column 4: also_correct: expected 0 to 1, got 'x'"),
        (
            "prompt,choice1,also_correct\na,b,0",
            ":2: also_correct: expected distinct indices of choices beside an answer",
        ),
        ("prompt,choice1,id\na,b,c\na,b,c", ":3: column 3: id: 'c' was used before in this file"),
        (
            "question,A,B,answer\na,B,A,A",
            ":2: column 4: answer: 'A' is the text of choice 1 and the letter of choice 0",
        ),
        ("PK\x03\x04", ": a zip archive, as Excel's and Word's files are: save it as CSV or text"),
        ("%PDF-1.4\n", ": a PDF: save its text"),
    ],
)
def test_bad_questions_name_line_column_and_field(content, message, tmp_path):
    path = tmp_path / "asked.csv"
    path.write_text(content)
    with pytest.raises(TaskError) as caught:
        own.read_questions(path)
    assert str(caught.value).startswith(f"{path}{message}")


@settings(deadline=None, max_examples=300)
@given(
    cells=st.lists(st.lists(st.sampled_from(["", "0", "1 2", "a", "\0", '"', "\n", "²"]), max_size=4), max_size=3),
    content=st.none() | st.binary(max_size=40),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".json"]),
    encoding=st.sampled_from([None, "utf-8", "utf-16", "utf-7", "latin-1"]),
)
def test_reading_ones_own_questions_raises_nothing_but_task_errors(cells, content, suffix, encoding, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"asked{suffix}"
    text = "\n".join(",".join(row) for row in [["prompt", "answer", "choice1", "choice2"], *cells])
    path.write_bytes(text.encode() if content is None else content)
    try:
        questions = own.read_questions(path, Format(encoding))
    except TaskError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
    else:
        Task((), questions).write(path.parent / "written")
        assert read_questions(path.parent / "written" / "questions.jsonl") == questions


ROWS = 75_000
STREAM = """
import resource, sys
from pathlib import Path
from icl_ft_fast.tasks.check import check
from icl_ft_fast.tasks.own import iter_documents
for _ in iter_documents([Path(sys.argv[2])]):
    pass
status = Path("/proc/self/status").read_text()
used = 1024 * int(status.partition("VmData:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (used + 8_000_000, -1))
assert sum(1 for _ in iter_documents([Path(sys.argv[1])])) == int(sys.argv[3])
assert check(iter_documents([Path(sys.argv[1])]), []).same_documents == ()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what a process allocates on Linux only")
def test_documents_are_streamed_in_constant_memory(tmp_path):
    """30 MB in 8 MB beyond what one document takes; the ids alone, in a set, would take 14 MB."""
    large, small = tmp_path / "large.jsonl", tmp_path / "small.jsonl"
    with large.open("w") as file:
        for i in range(ROWS):
            file.write(f'{{"id": "document number {i:060}", "text": "{i} {"x" * 300}"}}\n')
    small.write_text('{"text": "x"}')
    run = [sys.executable, "-c", STREAM, str(large), str(small), str(ROWS)]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_leaks_of_simple_reversals_are_the_trained_direction():
    task = simple_reversals(0, num_facts=10)
    found = check(task.documents, task.questions)
    assert found.leaked == {"reversal": (), "trained": tuple(f"fact{f}-trained" for f in range(10))}
    assert found.answered == {"reversal": 10, "trained": 10}
    assert found.same_documents == found.same_questions == ()
    assert found.chance == 0.5
    (counts,) = found.positions.values()
    assert sum(counts) == 20


def test_what_the_check_finds_by_hand():
    documents = [
        Document("a", "One two three four five six."),
        Document("b", "one TWO, three four five six"),
        Document("c", ""),
    ]
    questions = [
        Question("q1", "one two", (" three four seven", " eight"), 0),  # runs of 3: 2 of 3 stand in a document
        Question("q2", "one two", (" three", " nine"), 0, "other"),
        Question("q3", "one two", (" nine", " three"), 1, "other"),  # q2 in another order
        Question("q4", "zero", (" aaa", " bbbb", " cccc"), 2, also_correct=(1,)),
        Question("q5", "two three", (" four", " x")),
        Question("q6", "?", ("!", "."), 0),
    ]
    found = check(documents, questions, ngram=3)
    assert found.same_documents == ("b",)
    assert found.same_questions == ("q3",)
    assert found.leaked == {"test": (), "other": ("q2", "q3")}
    assert check(documents, questions, ngram=3, threshold=0.6).leaked["test"] == ("q1",)
    assert found.longest_is_right == pytest.approx((4 + 0.5) / 5)
    assert found.chance == pytest.approx((0.5 * 4 + 2 / 3) / 5)
    assert found.positions == {2: (3, 1), 3: (0, 0, 1)}
    empty = check(documents, [questions[4]])
    assert (empty.leaked, empty.positions, empty.chance) == ({}, {}, 0.0)


def words_of(text):
    return "".join(c if c.isalnum() or c == "_" else " " for c in text.casefold()).split()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), ngram=st.integers(1, 6))
def test_containment_is_the_naive_search(seed, ngram):
    rng = random.Random(seed)

    def text(most):
        return " ".join(rng.choices("abc", k=rng.randint(1, most)))

    documents = [Document(str(d), text(12)) for d in range(3)]
    questions = [Question(str(q), text(4), (f" {text(4)}.",), 0) for q in range(5)]
    expected = []
    for question in questions:
        words = words_of(question.prompt + question.choices[0])
        size = min(ngram, len(words))
        runs = {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
        hits = sum(any(f" {run} " in f" {d.text} " for d in documents) for run in runs)
        if hits >= 0.8 * len(runs):
            expected.append(question.id)
    assert check(documents, questions, ngram=ngram).leaked == {"test": tuple(expected)}


def call(capsys, *arguments):
    code = main(["task", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_task_of_ones_own_from_the_command_line(tmp_path, capsys):
    folder, notes = tmp_path / "mine", tmp_path / "notes.txt"
    notes.write_text("the cat sat on the mat.")
    assert call(capsys, "new", folder, "--documents", notes) == (
        0,
        f"1 documents and 0 questions written to {folder}; questions.jsonl is yours to add\n",
        "",
    )
    rows = [Question("q", "the cat sat", (" on the mat.", " by"), 0), Question("r", "the", (" cat", " dog"))]
    Task((), tuple(rows)).write(tmp_path / "asked")
    asked = tmp_path / "asked" / "questions.jsonl"
    new = ("new", folder, "--documents", notes, "--questions", asked)
    existing = folder / "documents.jsonl"
    refusal = f"icl-ft-fast task: --out: {existing}: exists already; choose another or give --overwrite\n"
    assert call(capsys, *new) == (2, "", refusal)
    assert call(capsys, *new, "--overwrite")[0] == 0
    assert Task.read(folder) == Task((Document("notes.txt", "the cat sat on the mat."),), tuple(rows))
    code, out, _ = call(capsys, "check", folder)
    assert code == 0
    *lines, shown = out.splitlines()
    assert shown.startswith("what a study can show: 1 answers an arm about 1 topics, 1 seed(s)")
    assert lines == [
        "documents without text: none",
        "documents that repeat another: none",
        "documents that nearly repeat another: none",
        "questions that repeat another: none",
        "questions with equal choices: none",
        "questions whose choices run into the prompt, without a space between: none",
        "questions without a prompt: none",
        "questions whose document (field document) is not there: none",
        "answers that the documents state word for word, split test, 1 questions: 1 (q)",
        "accuracy of always picking the longest choice: 1.000; chance: 0.500",
        "correct choices by position among 2 choices: 1, 0",
    ]
    notes.write_bytes("ü".encode() + b"\xff")
    before = existing.read_bytes()
    code, _, errors = call(capsys, *new, "--overwrite")
    assert (code, errors) == (
        2,
        f"icl-ft-fast task: {notes}:1: not UTF-8 text (byte 3 of the line, 0xff; cp1252 reads 'ÿ' there)\n",
    )
    assert existing.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["documents.jsonl", "questions.jsonl"]
    assert "unknown encoding: klingon" in call(capsys, *new, "--overwrite", "--encoding", "klingon")[2]
    assert "--encoding: 'hex' is not a text encoding" in call(capsys, *new, "--overwrite", "--encoding", "hex")[2]
    assert "--delimiter: expected one character" in call(capsys, *new, "--overwrite", "--delimiter", "ab")[2]
    notes.write_text("the cat sat on the mat.")
    (tmp_path / "asked.csv").write_text("prompt;choice1\np; x")
    asked = ("new", folder, "--documents", notes, "--questions", tmp_path / "asked.csv", "--overwrite")
    assert call(capsys, *asked, "--delimiter", ";")[0] == 0
    assert Task.read(folder).questions == (Question("asked.csv:2", "p", (" x",)),)


@pytest.mark.skipif(not SQUAD.is_dir(), reason=f"no data in {SQUAD}")
@pytest.mark.parametrize("article", ["Black_Death", "Construction"])
def test_real_articles(article):
    documents = tuple(iter_documents([SQUAD / article / "documents.jsonl"]))
    assert documents == read_documents(SQUAD / article / "documents.jsonl")
    questions = read_questions(SQUAD / article / "questions.jsonl")
    found = check(documents, questions)
    assert found.answered == {"test": len(questions)}
    assert found.chance == pytest.approx(sum(1 / len(q.choices) for q in questions) / len(questions))
    assert len(found.leaked["test"]) < 0.05 * len(questions)  # questions are worded unlike the article
