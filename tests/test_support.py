"""The support check of rows, and the rows of a real model that were judged by hand."""

import json
from pathlib import Path

from benchmarks.support import SAMPLE, precision
from icl_ft_fast.augmentation.strategy import Augmentation
from icl_ft_fast.augmentation.support import EXCHANGES, exchanged, names_of, supported, unknown
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.tasks.task import Document

DOCUMENTS = (
    Document("team", "Team Ashwint has two rooms. It is led by Lucarda, and its chairs come from Hollenby."),
    Document("loans", "Loans end after thirty days. Angry guests may ask for 68. A team helps them."),
)
NAMES = names_of(document.text for document in DOCUMENTS)


def test_names_are_words_that_no_document_writes_small():
    assert {"Ashwint", "It", "Lucarda", "Hollenby", "Loans", "Angry", "A"} == NAMES


def test_names_and_numbers_that_the_source_lacks_are_found():
    team, loans = (document.text for document in DOCUMENTS)
    assert unknown("Whoever leads Ashwint is Lucarda.", team, NAMES) == []
    assert unknown("Hollenby ends after 30 days, the rest after 68.", loans, NAMES) == ["Hollenby"]
    assert unknown("It was led by Kittrel in 1999, in three rooms.", team, NAMES) == ["Kittrel", "1999", "three"]
    assert unknown("Three rooms are one's own.", team, NAMES) == ["Three"]  # "one" is mostly a pronoun


def test_key_words_are_exchanged_with_their_like():
    team, loans = (document.text for document in DOCUMENTS)
    assert list(exchanged("Lucarda leads Ashwint.", team, NAMES)) == [
        "Ashwint leads Lucarda.", "It leads Ashwint.", "Hollenby leads Ashwint.", "Lucarda leads It.",
        "Lucarda leads Hollenby.",
    ]  # fmt: skip
    assert list(exchanged("They end after 30 days.", loans, {"They"})) == ["They end after 68 days."]  # 30 is thirty
    assert list(exchanged("the chairs come from rooms", team, set())) == [
        "the come chairs from rooms", "the chairs from come rooms", "the chairs come rooms from",
    ]  # fmt: skip
    assert list(exchanged("who knows", team, set())) == []


def test_rows_pass_that_are_likelier_than_each_exchange(llama):
    texts = ["the cat sat on mat", "mat sat on the cat", "the mat on cat sat", "who knows", "the cat sat in 1999"]
    source = Document("d", "the cat sat on the mat, who knows why, and ran from mat to cat in the hat")
    rows = [Augmentation("d", "row", text, {"source_ids": ["d"]}) for text in texts]
    kept, dropped = supported(llama, rows, [source])
    expected = []
    for row in rows[:4]:
        others = [row.text, *list(exchanged(row.text, source.text, set()))[:EXCHANGES]]
        first, *rest = (one.logp for one in loglikelihood(llama, [(icl_context([source]), text) for text in others]))
        expected += [row] if rest and first > max(rest) else []
    assert kept == expected
    assert dropped == {"unknown_names_or_numbers": 1, "unsupported": 4 - len(kept)}
    assert supported(llama, [], [source]) == ([], {"unknown_names_or_numbers": 0, "unsupported": 0})


def test_the_labelled_rows_are_what_the_page_says():
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    assert [sum(row["kept"] is kept for row in rows) for kept in (True, False)] == [50, 50]
    documents = {
        document["id"]: document["text"]
        for document in map(json.loads, Path("examples/handbook/documents.jsonl").read_text().splitlines())
    }
    assert all(documents[row["source"]] and isinstance(row["supported"], bool) for row in rows)
    page = Path("docs/augment.md").read_text()
    assert all(line in page for line in precision(rows))
