"""Tasks of one's own: documents from every kind of file, what each refusal names, and what the check finds."""

import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_ft_fast.cli import main
from icl_ft_fast.tasks.own import check, iter_documents
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document, Question, Task, TaskError, read_documents, read_questions

SQUAD = Path(__file__).parents[2] / "shared" / "data" / "squad"


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
        Document("deep/c.txt", "five\r\nlines\n"),
        Document("deep/d.md", "# six"),
    ]
    assert list(iter_documents([tmp_path])) == expected
    assert list(iter_documents([tmp_path / "b.csv", tmp_path / "deep"])) == [
        *expected[2:4], Document("c.txt", "five\r\nlines\n"), Document("d.md", "# six")
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig", "utf-32", "cp1252"])
def test_other_encodings(encoding, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ü"}', encoding)
    (tmp_path / "b.csv").write_text("text\nß", encoding)
    (tmp_path / "c.txt").write_text("é", encoding)
    assert [document.text for document in iter_documents([tmp_path], encoding=encoding)] == ["ü", "ß", "é"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', ":2: text: expected a string, got 3"),
        ("a.jsonl", b'{"id": "x"}', ":1: text: missing"),
        ("a.jsonl", b'{"id": "x", "text": ""}\n{"id": "x", "text": ""}', ":2: id: 'x' was used before"),
        ("a.jsonl", b"\nno", ":2: not valid JSON: Expecting value: "),
        ("a.jsonl", b'{"text": "\xff"}', ":1: not UTF-8 text (byte 11 of the line)"),
        ("a.csv", b"id,words\n", ":1: text: missing from the heading 'id,words'"),
        ("a.csv", b"", ":1: text: missing from the heading ''"),
        ("a.csv", b"text,id\na,b\nc\n", ":3: column 2: expected 2 columns, got 1"),
        ("a.csv", b"text\na,b\n", ":2: column 2: expected 1 columns, got 2"),
        ("a.csv", b'text\n"a', ":2: not valid CSV: unexpected end of data"),
        ("a.csv", b'text\n"a"b', ":2: not valid CSV: ',' expected after '\"'"),
        ("a.csv", b"text\na\nb\xff", ":3: not UTF-8 text (byte 2 of the line)"),
        ("a.csv", b"text\n" + b"a" * 200_000, ":2: not valid CSV: field larger than field limit (131072)"),
        ("a.txt", b"one\ntwo \xe9\n", ":2: not UTF-8 text (byte 5 of the line)"),
        ("a.md", "ü".encode("utf-16"), ": begins with the mark of utf-16, not of utf-8; give --encoding utf-16"),
        ("a.jsonl", b"\xef\xbb\xbf{}", ": begins with the mark of utf-8-sig, not of utf-8; give --encoding utf-8-sig"),
        ("a.pdf", b"", ": expected a folder or a file that ends in .jsonl, .csv, .txt, .md"),
        ("a.jsonl", b"\n", ": no documents: expected .jsonl, .csv, .txt, .md files with some"),
    ],
)
def test_bad_files_name_line_and_field(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError) as caught:
        list(iter_documents([tmp_path / name]))
    assert str(caught.value).startswith(f"{tmp_path / name}{message}")
    assert "\n" not in str(caught.value)


def test_missing_files_and_wrong_encodings(tmp_path):
    with pytest.raises(TaskError, match=r"no\.txt: cannot be read: No such file or directory$"):
        list(iter_documents([tmp_path / "no.txt"]))
    (tmp_path / "a.txt").write_bytes(b"a\xff")
    with pytest.raises(TaskError, match=r"a\.txt: not utf-7 text: "):
        list(iter_documents([tmp_path / "a.txt"], encoding="utf-7"))
    with pytest.raises(TaskError, match=r": no documents: expected "):
        list(iter_documents([tmp_path / "a.txt"][:0]))


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
    suffix=st.sampled_from([".jsonl", ".csv", ".txt", ".md"]),
    encoding=st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-7", "ascii", "latin-1"]),
)
def test_reading_raises_nothing_but_task_errors(content, suffix, encoding, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        documents = tuple(iter_documents([path], encoding=encoding))
    except TaskError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
    else:
        Task(documents, ()).write(path.parent / "written")
        assert read_documents(path.parent / "written" / "documents.jsonl") == documents


def test_documents_are_streamed(tmp_path):
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for i in range(40):
            file.write(json.dumps({"id": str(i), "text": f"{i} " + "x" * 500_000}) + "\n")
    tracemalloc.start()
    assert sum(len(document.text) for document in iter_documents([path])) > 20_000_000
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5_000_000


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
        Document("a", "One two three four five six."), Document("b", "one TWO, three four five six"), Document("c", "")
    ]  # fmt: skip
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
        0, f"1 documents and 0 questions written to {folder}; questions.jsonl is yours to add\n", ""
    )  # fmt: skip
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
    assert out.splitlines() == [
        "documents that repeat another: none",
        "questions that repeat another: none",
        "answers found in the documents, split test, of 1: 1 (q)",
        "right by picking the longest choice: 1.000; by chance: 0.500",
        "position of the answer among 2 choices: 1, 0",
    ]
    notes.write_bytes(b"\xff")
    before = existing.read_bytes()
    code, _, errors = call(capsys, *new, "--overwrite")
    assert (code, errors) == (2, f"icl-ft-fast task: {notes}:1: not UTF-8 text (byte 1 of the line)\n")
    assert existing.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["documents.jsonl", "questions.jsonl"]
    assert "unknown encoding: klingon" in call(capsys, *new, "--overwrite", "--encoding", "klingon")[2]
    assert "--encoding: 'hex' is not a text encoding" in call(capsys, *new, "--overwrite", "--encoding", "hex")[2]


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
