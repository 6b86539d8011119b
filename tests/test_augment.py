"""Augmentation: what the rules write, and how the model's lines are read, counted and dropped."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icl_ft_fast import augment
from icl_ft_fast.augment import LOCAL_EXAMPLES, LOCAL_HEADER, Augmentation, augment_local, augment_rules
from icl_ft_fast.generate import Generation, Sampling
from icl_ft_fast.tasks.comparisons import find
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document

MODEL = object()  # augment_local only hands it on


@pytest.fixture
def writes(monkeypatch):
    """A function that replaces the model's continuations and returns the calls to generate()."""

    def replace(*texts):
        calls = []

        def generate(model, prompts, sampling, **options):
            assert model is MODEL
            calls.append((list(prompts), sampling))
            return [Generation(text, (), (), "eos") for text in texts]

        monkeypatch.setattr(augment, "generate", generate)
        return calls

    return replace


def test_rules_write_both_forms_of_every_comparison():
    documents = [
        Document("a", "Note: femp are more common than glon."),
        Document("b", "Nothing is compared here."),
        Document("c", "We found that zota are taller than blata. zota are less noisy than yazo."),
    ]
    written = augment_rules(documents)
    assert written.rows == (
        Augmentation("a", "reversed", "glon are less common than femp."),
        Augmentation("a", "rephrased", "Compared with glon, femp are more common."),
        Augmentation("c", "reversed", "blata are shorter than zota."),
        Augmentation("c", "rephrased", "Compared with blata, zota are taller."),
        Augmentation("c", "reversed", "yazo are more noisy than zota."),
        Augmentation("c", "rephrased", "Compared with yazo, zota are less noisy."),
    )
    assert (written.dropped_unparsed, written.dropped_repeats) == (0, 0)
    assert augment_rules([]).rows == ()


def test_rules_answer_the_generated_task():
    task = simple_reversals(0, num_facts=20, num_articles=1)
    answers = {q.prompt + q.choices[q.answer] for q in task.questions if q.split == "reversal"}
    assert {row.text for row in augment_rules(task.documents).rows if row.kind == "reversed"} == answers


def test_the_worked_examples_follow_their_own_rules():
    blocks = LOCAL_EXAMPLES.removesuffix("\n\n").split("\n\n")
    assert len(blocks) == 2
    for block in blocks:
        statement, *lines = block.split("\n")
        written = augment_rules([Document("", statement)]).rows
        assert lines == [f"{row.kind.capitalize()}: {row.text}" for row in written]


def test_prompts_hold_the_document_on_one_line(writes):
    calls = writes("", "", "")
    documents = [
        Document("a", "  femp are\n\nmore\tcommon  than glon.\r\n"),
        Document("b", "x {document} y"),
        Document("c", ""),
    ]
    augment_local(MODEL, documents, max_new_tokens=9)
    ((prompts, sampling),) = calls
    head = LOCAL_HEADER + LOCAL_EXAMPLES + "Statement: "
    assert prompts == [f"{head}{text}\n" for text in ("femp are more common than glon.", "x {document} y", "")]
    assert sampling == Sampling(9, stop=("\n\n",))


def test_lines_are_read_and_the_others_counted(writes):
    document = Document("a", " femp are more\ncommon than glon.")
    lines = {
        "Reversed: glon are less common than femp.": "row",
        "  Rephrased: Compared with glon, femp are more common. ": "row",
        "Reversed: femp are more common than glon.": "repeat",  # the document itself, but for its line break
        "Rephrased: glon are less common than femp.": "repeat",  # an earlier line
        "Rephrased: Glon are less common than femp.": "row",
        "reversed: glon are rarer.": "unparsed",
        "Reversed:": "unparsed",
        "Reversed: ": "unparsed",
        "Reversed:glon are rarer.": "unparsed",
        "Reversed:  glon are rarer.": "unparsed",
        "Opposite: glon are rarer.": "unparsed",
        "glon are rarer.": "unparsed",
        "So Reversed: glon are rarer.": "unparsed",
    }
    writes("\n".join(lines))
    written = augment_local(MODEL, [document])
    assert written.rows == (
        Augmentation("a", "reversed", "glon are less common than femp."),
        Augmentation("a", "rephrased", "Compared with glon, femp are more common."),
        Augmentation("a", "rephrased", "Glon are less common than femp."),
    )
    assert written.dropped_unparsed == list(lines.values()).count("unparsed")
    assert written.dropped_repeats == list(lines.values()).count("repeat")


def test_rows_stay_with_their_documents(writes):
    writes("Reversed: same.", "", "Reversed: same.\nRephrased: other.\nno", "\n\nReversed: b.\n")
    documents = [Document(name, name) for name in "abcd"]
    written = augment_local(MODEL, documents)
    assert [(row.source_id, row.kind, row.text) for row in written.rows] == [
        ("a", "reversed", "same."),
        ("c", "reversed", "same."),
        ("c", "rephrased", "other."),
        ("d", "reversed", "b."),
    ]
    assert (written.dropped_unparsed, written.dropped_repeats) == (1, 0)


LINE = st.sampled_from(["Reversed: ", "Rephrased: ", "Reversed:", ""]).flatmap(
    lambda label: st.sampled_from(["a", "b", "a b", " ", "Reversed: a"]).map(lambda text: label + text) | st.text()
)


@settings(deadline=None)
@given(st.lists(LINE).map("\n".join))
@example("Reversed: a\x0bReversed: a\u2028\x85Reversed: b")
def test_every_line_is_kept_or_counted(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "generate", lambda *_, **__: [Generation(text, (), (), "eos")])
        written = augment_local(MODEL, [Document("d", "a  b")])
    assert len(written.rows) + written.dropped_unparsed + written.dropped_repeats == len(text.strip().splitlines())
    texts = [row.text for row in written.rows]
    assert len(set(texts)) == len(texts)
    assert "a b" not in texts
    for row in written.rows:
        assert row.text == row.text.strip()
        assert f"{row.kind.capitalize()}: {row.text}" in text
        assert len(row.text.splitlines()) == 1


def test_no_documents(writes):
    writes()
    assert augment_local(MODEL, []).rows == ()


def test_what_the_rules_write_is_a_comparison_again():
    for row in augment_rules(simple_reversals(1, num_facts=5, num_articles=1).documents).rows:
        assert len(find(row.text)) == (row.kind == "reversed")
