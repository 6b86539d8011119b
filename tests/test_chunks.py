"""tasks/chunks.py: passages hold all of a document, in order, within their length."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_ft_fast.tasks.chunks import MAX_CHARACTERS, split_documents
from icl_ft_fast.tasks.task import Document


def texts(text, max_characters):
    return [passage.text for passage in split_documents([Document("d", text)], max_characters)]


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("One. Two.", 20, ["One. Two."]),
        ("First one.\n\nSecond.\n \nThird one.", 20, ["First one.\n\nSecond.", "Third one."]),
        ("A line\nand another\nand a third", 18, ["A line\nand another", "and a third"]),
        ("It rains. It pours! Does it?", 20, ["It rains. It pours!", "Does it?"]),
        ("a paragraph of words.\n\nShort", 12, ["a paragraph", "of words.", "Short"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
        ("下雨了。很大！是吗", 4, ["下雨了。", "很大！", "是吗"]),
        ("  \n ", 5, []),
        ("", 5, []),
    ],
)
def test_cut_where_it_hurts_least(text, most, expected):
    assert texts(text, most) == expected


def test_passages_know_their_documents():
    documents = [Document("a", " x" * 700), Document("b", "short")]
    passages = split_documents(documents)
    assert [passage.document_id for passage in passages] == ["a", "a", "b"]
    assert max(len(passage.text) for passage in passages) <= MAX_CHARACTERS
    with pytest.raises(ValueError, match="max_characters"):
        split_documents(documents, 0)


@settings(deadline=None, max_examples=200)
@given(st.text("ab .\n。\t?", max_size=80), st.integers(1, 30))
def test_nothing_is_lost_or_said_twice(text, most):
    passages = split_documents([Document("d", text)], most)
    at = 0
    for passage in passages:
        assert 0 < len(passage.text) <= most
        assert passage.text == text[passage.start : passage.start + len(passage.text)]
        assert passage.text == passage.text.strip()
        assert not text[at : passage.start].strip(), "lost"
        assert passage.start >= at
        at = passage.start + len(passage.text)
    assert not text[at:].strip()
