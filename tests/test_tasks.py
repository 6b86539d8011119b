"""Tasks: files read, written and refused with their line and field, and the generator of simple reversals."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icl_ft_fast.tasks import comparisons, words
from icl_ft_fast.tasks.comparisons import FEATURES, INVERSE, PREAMBLES, Comparison
from icl_ft_fast.tasks.files import TaskError
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document, Question, Task, read_documents, read_questions

SPACE = [opening + close for opening in words.OPENINGS for close in words.CLOSES]
TEXT = st.text(max_size=12)
SIGMAS = 4  # a fair coin of a fixed seed strays so far in one case of 16,000


@st.composite
def tasks(draw):
    """Any task that the files can hold; of equal choices the first is the answer, as reading makes it."""
    ids = draw(st.lists(TEXT, min_size=2, max_size=6, unique=True))
    documents = tuple(Document(i, draw(TEXT), draw(st.none() | TEXT)) for i in ids)
    questions = []
    for i in ids:
        choices = tuple(draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4)))
        answer = draw(st.none() | st.sampled_from(choices).map(choices.index))
        others = [] if answer is None else [c for c in range(len(choices)) if c != answer]
        also = tuple(c for c in others if draw(st.booleans()))
        topic, form = draw(st.none() | TEXT), draw(st.none() | TEXT)
        questions.append(Question(i, draw(TEXT), choices, answer, draw(TEXT), topic, form, also))
    return Task(documents, tuple(questions))


@settings(deadline=None, max_examples=50)
@given(task=tasks())
@example(
    task=Task(
        (Document("ä", "zwei\nZeilen\r\n\u2028 und \x85mehr, 日本語 😀", "t"), Document("", "", None)),
        (Question("q", "", ("\n", '"\\', "\x00"), 2, "naïve"), Question("r", "p ", ("x",), None, "")),
    )
)
def test_round_trip(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("task") / "new" / "folder"
    task.write(folder)
    assert Task.read(folder) == task
    assert sorted(path.name for path in folder.iterdir()) == ["documents.jsonl", "questions.jsonl"]
    replace(task, documents=task.documents[:1]).write(folder)
    assert Task.read(folder).documents == task.documents[:1]


def test_files_are_legible(tmp_path):
    Task((Document("d", "naïve 日本語"),), (Question("q", "ß ", ("ü",)),)).write(tmp_path)
    documents, questions = ((tmp_path / f"{name}.jsonl").read_text("utf-8") for name in ("documents", "questions"))
    assert documents == '{"id": "d", "text": "naïve 日本語", "topic": null}\n'
    assert questions == (
        '{"id": "q", "prompt": "ß ", "choices": ["ü"], "answer": null, "split": "test", '
        '"topic": null, "form": null, "also_correct": [], "document": null}\n'
    )


def test_fields_left_out_and_fields_unknown(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n  \n{"id": "a", "text": "b", "why": [1]}\r\n\n{"id": "b", "text": "", "topic": null}', "utf-8")
    assert read_documents(path) == (Document("a", "b"), Document("b", ""))
    path.write_text('{"id": "a", "prompt": "", "choices": ["x"], "answer": null, "why": {}}', "utf-8")
    assert read_questions(path) == (Question("a", "", ("x",), None, "test"),)


def test_splits_in_order_of_appearance():
    questions = [Question(str(i), "", ("x",), 0, split) for i, split in enumerate("bab")]
    assert Task((), tuple(questions)).splits == ("b", "a")


GOOD_DOCUMENT = {"id": "d", "text": "t"}
GOOD_QUESTION = {"id": "q", "prompt": "p", "choices": ["x", "y"], "answer": 1}
WITHOUT = object()


def changed(row, **fields):
    """`row` as a line, with other fields."""
    return json.dumps({name: value for name, value in (row | fields).items() if value is not WITHOUT}).encode()


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_documents, b"", ": empty: expected at least one JSON object"),
        (read_questions, b"\n \n", ": empty: expected at least one JSON object"),
        (read_documents, b"\n{", ":2: not valid JSON: Expecting property name enclosed in double quotes: "),
        (read_documents, changed(GOOD_DOCUMENT) + b"\nno", ":2: not valid JSON: Expecting value: "),
        (read_documents, b'{"id": "d"} {}', ":1: not valid JSON: Extra data: "),
        (read_documents, b"\xef\xbb\xbf{}", ":1: id: missing"),
        (read_documents, b"[" * 100_000, ":1: not valid JSON: maximum recursion depth exceeded"),
        (read_documents, b"1" * 10_000, ":1: not valid JSON: Exceeds the limit"),
        (read_documents, b"\n\n[1]", ":3: expected a JSON object, got list"),
        (read_questions, b"null", ":1: expected a JSON object, got NoneType"),
        (read_questions, changed(GOOD_QUESTION) + b"\n" + b'{"\xff', ":2: not UTF-8 text (byte 3 of the line, 0xff; "),
        (read_documents, changed(GOOD_DOCUMENT, id=WITHOUT), ":1: id: missing"),
        (read_documents, changed(GOOD_DOCUMENT, text=WITHOUT), ":1: text: missing"),
        (read_documents, changed(GOOD_DOCUMENT, id=7.5), ":1: id: expected a string, got 7.5"),
        (read_documents, changed(GOOD_DOCUMENT, text=["t"]), ':1: text: expected a string, got ["t"]'),
        (read_documents, changed(GOOD_DOCUMENT, topic=False), ":1: topic: expected a string, got false"),
        (read_documents, changed(GOOD_DOCUMENT, text="ab\ud800"), ":1: text: half a surrogate pair (character 3)"),
        (read_documents, b"\n".join([changed(GOOD_DOCUMENT)] * 2), ":2: id: 'd' was used before in this file"),
        (read_questions, changed(GOOD_QUESTION, id=WITHOUT), ":1: id: missing"),
        (read_questions, changed(GOOD_QUESTION, prompt=WITHOUT), ":1: prompt: missing"),
        (read_questions, changed(GOOD_QUESTION, prompt=None), ":1: prompt: expected a string, got null"),
        (read_questions, changed(GOOD_QUESTION, split=3), ":1: split: expected a string, got 3"),
        (read_questions, changed(GOOD_QUESTION, choices=WITHOUT), ":1: choices: expected a list with at least one "),
        (read_questions, changed(GOOD_QUESTION, choices=[]), ":1: choices: expected a list with at least one string"),
        (read_questions, changed(GOOD_QUESTION, choices="xy"), ":1: choices: expected a list with at least one string"),
        (read_questions, changed(GOOD_QUESTION, choices=["x", ""]), ":1: choices[1]: expected a non-empty string"),
        (read_questions, changed(GOOD_QUESTION, choices=[1]), ":1: choices[0]: expected a non-empty string, got 1"),
        (read_questions, changed(GOOD_QUESTION, choices=["\udc80"]), ":1: choices[0]: half a surrogate pair (c"),
        (read_questions, changed(GOOD_QUESTION, answer=2), ":1: answer: expected 0 to 1, got 2"),
        (read_questions, changed(GOOD_QUESTION, answer=-1), ":1: answer: expected 0 to 1, got -1"),
        (read_questions, changed(GOOD_QUESTION, answer=True), ":1: answer: expected 0 to 1, got true"),
        (read_questions, changed(GOOD_QUESTION, answer=1.0), ":1: answer: expected 0 to 1, got 1.0"),
        (read_questions, changed(GOOD_QUESTION, answer=math.nan), ":1: answer: expected 0 to 1, got NaN"),
        (read_questions, changed(GOOD_QUESTION, answer="1"), ':1: answer: expected 0 to 1, got "1"'),
        (read_questions, changed(GOOD_QUESTION, topic=3), ":1: topic: expected a string, got 3"),
        (read_questions, changed(GOOD_QUESTION, form=[]), ":1: form: expected a string, got []"),
        (read_questions, changed(GOOD_QUESTION, also_correct=0), ":1: also_correct: expected distinct indices of "),
        (read_questions, changed(GOOD_QUESTION, also_correct=[2]), ":1: also_correct: expected distinct indices of "),
        (read_questions, changed(GOOD_QUESTION, also_correct=[1]), ":1: also_correct: expected distinct indices of "),
        (read_questions, changed(GOOD_QUESTION, also_correct=[0, 0]), ":1: also_correct: expected distinct indices "),
        (read_questions, changed(GOOD_QUESTION, answer=None, also_correct=[0]), ":1: also_correct: expected distinct"),
        (read_questions, b"\n".join([changed(GOOD_QUESTION)] * 2), ":2: id: 'q' was used before in this file"),
    ],
)
def test_bad_files_name_line_and_field(read, content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(TaskError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_long_values_are_cut_in_messages(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(changed(GOOD_QUESTION, id=["x" * 10_000]))
    with pytest.raises(TaskError, match=r":1: id: expected a string") as caught:
        read_questions(path)
    assert len(str(caught.value)) < len(str(path)) + 120


def test_missing_files(tmp_path):
    with pytest.raises(TaskError, match=r"documents\.jsonl: cannot be read: No such file or directory$"):
        Task.read(tmp_path)
    (tmp_path / "documents.jsonl").write_bytes(changed(GOOD_DOCUMENT))
    with pytest.raises(TaskError, match=r"questions\.jsonl: cannot be read: No such file or directory$"):
        Task.read(str(tmp_path))
    (tmp_path / "questions.jsonl").mkdir()
    with pytest.raises(TaskError, match=r"questions\.jsonl: cannot be read: Is a directory$"):
        Task.read(tmp_path)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(alphabet=st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("id", "prompt", "choices", "answer", "split", "topic", "form", "also_correct")
ROWS = st.fixed_dictionaries({}, optional={f: st.just(GOOD_QUESTION.get(f, "s")) | ANYTHING for f in FIELDS})
LINES = st.lists(ROWS.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=20), max_size=3)


@settings(deadline=None, max_examples=300)
@given(content=st.binary(max_size=60) | LINES.map(b"\n".join))
def test_reading_questions_raises_nothing_but_task_errors(content, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.jsonl").write_bytes(content)
    try:
        questions = read_questions(folder / "any.jsonl")
    except TaskError as error:
        questions, refusal = (), str(error)
    if not questions:
        assert refusal.startswith(str(folder / "any.jsonl"))
        return
    Task((Document("d", ""),), questions).write(folder / "any")
    assert Task.read(folder / "any").questions == questions


COMPARISONS = st.builds(Comparison, st.sampled_from(SPACE), st.sampled_from(sorted(INVERSE)), st.sampled_from(SPACE))


@given(COMPARISONS, st.sampled_from(PREAMBLES))
def test_a_comparison_is_told_twice_and_read_back(comparison, preamble):
    assert comparison.reversed != comparison
    assert comparison.reversed.reversed == comparison
    article = comparisons.article(comparison, preamble)
    assert article.startswith(preamble)
    assert article == article.strip()
    assert comparisons.find(article) == [comparison]
    assert comparisons.find(f"{article} {comparison.reversed.statement}") == [comparison, comparison.reversed]
    assert comparisons.find(comparison.rephrased) == []
    for part in (comparison.subject, comparison.comparative, comparison.object):
        assert re.search(rf"\b{part}\b", comparison.rephrased)


def test_wording():
    fact = Comparison("femp", "more dangerous", "glon")
    assert fact.statement == "femp are more dangerous than glon."
    assert fact.reversed.statement == "glon are less dangerous than femp."
    assert fact.rephrased == "Compared with glon, femp are more dangerous."
    assert Comparison("femp", "brighter", "glon").reversed.statement == "glon are dimmer than femp."
    assert comparisons.article(fact, "") == fact.statement
    assert comparisons.article(fact, "Note:") == "Note: femp are more dangerous than glon."
    assert comparisons.find("femp are more dangerous than glon, femp are dangerous than glon.") == []


def test_twenty_eight_features_and_distinct_preambles():
    assert len(FEATURES) == 28
    assert len(INVERSE) == 56
    assert all(INVERSE[INVERSE[comparative]] == comparative for comparative in INVERSE)
    assert len(set(PREAMBLES)) == len(PREAMBLES) == 20


def test_features_are_drawn_evenly():
    rng, draws = random.Random(0), 5600
    drawn = [comparisons.sample_feature(rng) for _ in range(draws)]
    counts = [drawn.count(comparative) for comparative in INVERSE]
    assert max(abs(count - draws / 56) for count in counts) < SIGMAS * math.sqrt(draws / 56)


def test_words_are_split_once_and_for_all():
    assert len(set(SPACE)) == len(SPACE) == 14260
    assert {len(word) for word in SPACE} == {4, 5}
    held_out = [word for word in SPACE if words.is_held_out(word)]
    assert len(held_out) == 1766
    assert held_out[::400] == ["baba", "ladu", "vake", "drawo", "spart"]
    rng = random.Random(0)
    for part in (True, False):
        drawn = {words.sample_word(rng, held_out=part) for _ in range(5000)}
        assert all(words.is_held_out(word) == part for word in drawn)
        assert drawn.isdisjoint(words.NOT_NONSENSE)
        assert drawn <= set(SPACE)


def test_every_excluded_word_could_have_been_drawn():
    assert set(SPACE) >= words.NOT_NONSENSE
    assert (
        {word for word in SPACE if words.is_held_out(word)} - words.NOT_NONSENSE >= words.ENGLISH >= {"hive", "tribe"}
    )


def test_sampled_words_are_distinct_and_new():
    first = words.sample_words(random.Random(3), 200)
    assert len(set(first)) == 200
    assert first == words.sample_words(random.Random(3), 200)
    assert set(first).isdisjoint(words.sample_words(random.Random(3), 200, exclude=set(first)))
    assert all(not words.is_held_out(word) for word in words.sample_words(random.Random(3), 50, held_out=False))
    assert words.sample_words(random.Random(3), 0) == []
    every = {word for word in SPACE if words.is_held_out(word)} - words.NOT_NONSENSE
    assert set(words.sample_words(random.Random(3), len(every))) == every
    rest = words.sample_words(random.Random(3), len(every - words.ENGLISH), exclude=words.ENGLISH)
    assert set(rest) == every - words.ENGLISH
    with pytest.raises(
        ValueError, match=rf"^count: at most {len(rest)} distinct nonsense words .*, got {len(rest) + 1}$"
    ):
        words.sample_words(random.Random(3), len(rest) + 1, exclude=words.ENGLISH)


def test_simple_reversals_are_the_papers():
    task = simple_reversals(0)
    assert len(task.documents) == 1000
    assert len(task.questions) == 200
    assert task.splits == ("reversal", "trained")
    assert len({document.id for document in task.documents}) == 1000
    assert len({document.text for document in task.documents}) == 1000
    nouns = []
    questions = {question.id: question for question in task.questions}
    assert len(questions) == 200
    for f in range(100):
        mine = [document for document in task.documents if document.topic == f"fact{f}"]
        assert len(mine) == 10
        (fact,) = {fact for document in mine for fact in comparisons.find(document.text)}
        nouns += [fact.subject, fact.object]
        for split, truth in (("reversal", fact.reversed), ("trained", fact)):
            question = questions[f"fact{f}-{split}"]
            assert question.split == split
            (false,) = (i for i in range(len(question.choices)) if i != question.answer)
            claims = [question.prompt + choice for choice in question.choices]
            assert claims[question.answer] == truth.statement
            assert claims[false] == Comparison(truth.subject, INVERSE[truth.comparative], truth.object).statement
            assert all(choice[0] == " " for choice in question.choices)
    assert len(set(nouns)) == 200
    assert {len(noun) for noun in nouns} == {4, 5}
    assert all(words.is_held_out(noun) for noun in nouns)


def test_simple_reversals_follow_their_seed(tmp_path):
    assert simple_reversals(3) == simple_reversals(3)
    assert simple_reversals(3) != simple_reversals(4)
    task = simple_reversals(1, num_facts=3, num_articles=2)
    task.write(tmp_path)
    assert Task.read(tmp_path) == task
    assert len(task.documents) == 6


def test_simple_reversals_reach_every_feature_and_give_nothing_away():
    tasks_of_seeds = [simple_reversals(seed, num_articles=1) for seed in range(20)]
    facts = [fact for task in tasks_of_seeds for d in task.documents for fact in comparisons.find(d.text)]
    assert {fact.comparative for fact in facts} == INVERSE.keys()
    questions = [question for task in tasks_of_seeds for question in task.questions]
    guesses = {
        "the first choice": lambda choices: 0,
        "the shorter choice": lambda choices: min(range(2), key=lambda i: len(choices[i])),
        "the earlier in the alphabet": lambda choices: min(range(2), key=lambda i: choices[i]),
        "more or the first of a pair": lambda choices: int(
            re.match(r" (.*) than", choices[0])[1] not in {pair[0] for pair in FEATURES}
        ),
    }
    for name, guess in guesses.items():
        for split in ("reversal", "trained"):
            right = [guess(q.choices) == q.answer for q in questions if q.split == split]
            assert abs(sum(right) / len(right) - 0.5) < SIGMAS / 2 / math.sqrt(len(right)), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_articles": 0}, "^num_articles: expected 1 to 20, got 0$"),
        ({"num_articles": 21}, "^num_articles: expected 1 to 20, got 21$"),
        ({"num_facts": 0}, "^num_facts: expected at least 1, got 0$"),
        ({"num_facts": 10_000}, "^count: at most 1764 distinct nonsense words can be drawn, got 20000$"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        simple_reversals(0, **arguments)
