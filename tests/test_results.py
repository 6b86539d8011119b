"""results.json: what is written reads back, older editions come up to date, bad ones are named."""

import copy
import json
import math
import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.study.compare import write_results
from icl_ft_fast.study.results import Results, ResultsError, read_results, unmeasured


def run_of(arm, **more):
    return {
        "arm": arm,
        "seed": 0,
        "accuracy": {"test": {"correct": 30, "total": 40}},
        "setup_s": 0.0,
        "query_s": 0.02,
        "query_tokens": 20.0,
        "query_rows": 5.0,
        "uncached_query_s": 0.1,
        "counts": {"forwarded_tokens": 7, "seconds": {"query": 0.8}},
        "notes": {},
    } | more


ANSWER = {
    "question_id": "q",
    "split": "test",
    "form": None,
    "topic": "t",
    "predicted": 0,
    "probability": [0.75, 0.25],
    "correct": [0],
}
OLD = {
    "schema_version": 1,
    "model": "m",
    "parameters": 9,
    "task": "t",
    "settings": {"seeds": [0]},
    "machine": {"device": "cpu", "torch": "2.13"},
    "runs": [
        run_of("base"),
        run_of(
            "icl",
            query_tokens=520.0,
            setup_s=2.0,
            uncached_query_s=2.5,
            query_s=0.25,
            counts={"forwarded_tokens": 500, "seconds": {"prefill": 2.0, "query": 10.0}},
        ),
        run_of("ft", setup_s=30.0, counts={"forwarded_tokens": 7, "seconds": {"train": 30.0, "query": 0.8}}),
    ],
}


@pytest.fixture
def written(tmp_path):
    """A function that writes an object as results.json and returns the path."""

    def write(found):
        path = tmp_path / "results.json"
        path.write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("version", [1, 2])
def test_older_editions_come_up_to_date(version, written):
    old = copy.deepcopy(OLD) | {"schema_version": version}
    if version == 2:
        for run in old["runs"]:
            run["answers"] = [ANSWER]
    results = read_results(written(old))
    assert results.schema_version == 3
    assert [len(run.answers) for run in results.runs] == [version - 1] * 3
    assert [run.setup_s for run in results.runs] == [0.0, 0.0, 30.0]  # reading is no longer part of it
    assert results.runs[1].counts["phases"]["prefill"]["wall_s"] == 2.0
    assert results.sweep.context_tokens == 500
    costs = {(p.context_tokens, p.batch): (p.prefill_s, p.query_s) for p in results.sweep.points}
    assert costs == {
        (0, 1): ((), (0.1, 0.1)),
        (0, 40): ((), (0.02, 0.02)),
        (500, 1): ((2.0,), (0.5,)),
        (500, 40): ((2.0,), (0.25,)),
    }
    evens = Derived(results, "old").break_evens["seconds"]
    assert evens["fine-tuned", "ICL"].queries == pytest.approx(30 / (2.5 - 0.1))
    assert evens["fine-tuned", "ICL kept"].queries == pytest.approx((30 - 2) / (0.5 - 0.1))
    assert list(Derived(results, "old").resources) == ["seconds"]


def spoiled(change):
    found = copy.deepcopy(OLD)
    change(found)
    return found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("nonsense", "not UTF-8 JSON: Expecting value"),
        ([], "schema_version: expected 1 to 3, got None"),
        ({"schema_version": 4}, "schema_version: expected 1 to 3, got 4"),
        ({"schema_version": True}, "schema_version: expected 1 to 3, got True"),
        ({"schema_version": 3}, "model: Field required (and "),
        ({"schema_version": 2}, "not a results file of schema 2: KeyError('runs')"),
        (spoiled(lambda f: f.update(runs=[])), "not a results file of schema 1: ValueError("),
        (spoiled(lambda f: f.update(runs={"a": 1})), "not a results file of schema 1: TypeError("),
        (spoiled(lambda f: f["runs"][1].update(seed="x")), "runs[1].seed: Input should be a valid integer"),
        (spoiled(lambda f: f["runs"][0].pop("notes")), "runs[0].notes: Field required"),
        (spoiled(lambda f: f.update(parameters=None)), "parameters: Input should be a valid integer"),
    ],
)
def test_a_bad_file_is_named_with_its_field(found, message, written):
    path = written(found)
    with pytest.raises(ResultsError) as caught:
        read_results(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_file_that_is_not_utf_8(tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ResultsError, match="not UTF-8 JSON"):
        read_results(path)


def test_every_flipped_bit_and_cut_is_named_or_changes_nothing(tmp_path):
    path, named = tmp_path / "results.json", 0
    write_results(path, copy.deepcopy(NEW))
    whole, expected = path.read_bytes(), read_results(path)
    for place in random.Random(0).sample(range(8 * len(whole)), 300):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert read_results(path) == expected  # white space, or the name of the checksum's own field
        except ResultsError as error:
            named += str(error).startswith(f"{path}: ")
    assert named > 200
    for length in random.Random(1).sample(range(len(whole) - 1), 20):
        path.write_bytes(whole[:length])
        with pytest.raises(ResultsError, match=f"^{path}: not UTF-8 JSON"):
            read_results(path)


def test_what_is_left_when_measurements_go():
    found = unmeasured(NEW)
    (run,) = found["runs"]
    assert not {"setup_s", "query_s"} & run.keys()
    assert run["counts"] == {"phases": {"query": {"how": {}}}}
    assert run["answers"] == [ANSWER]
    assert "sweep" not in found


NEW = {
    "schema_version": 3,
    "model": "m",
    "parameters": 9,
    "task": "t",
    "settings": {},
    "machine": {"versions": {}},
    "sweep": {"context_tokens": 5, "points": [{"context_tokens": 5, "batch": 1, "prefill_s": [2.0], "query_s": [0.5]}]},
    "questions": [{"seeds": [0], "questions": [{"id": "q", "prompt": "p", "choices": ["a", "b"]}]}],
    "runs": [
        run_of(
            "icl",
            counts={"phases": {"query": {"wall_s": 0.8, "how": {}}}},
            answers=[ANSWER],
            losses=[2.0],
            samples=[{"source": "a", "kind": "b", "text": "c"}],
        )
    ],
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
JSON = st.recursive(SCALARS, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(), of, max_size=3))


@st.composite
def damaged(draw):
    """A results file of any schema in which up to three values are others, or gone."""
    found = copy.deepcopy(draw(st.sampled_from([OLD, OLD | {"schema_version": 2}, NEW])))
    for _ in range(draw(st.integers(1, 3))):
        at, places = found, []
        while isinstance(at, dict | list) and at and (not places or draw(st.integers(0, 4))):
            key = draw(st.sampled_from(range(len(at)) if isinstance(at, list) else sorted(at)))
            places.append((at, key))
            at = at[key]
        if places:
            inside, key = places[-1]
            if draw(st.booleans()):
                inside[key] = draw(JSON)
            else:
                del inside[key]
    return found


@given(JSON | damaged())
@example(OLD | {"runs": [run_of("icl", query_tokens=math.inf), run_of("base")]})
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_gives_results_or_an_error_that_names_the_file(written, found):
    path = written(found)
    try:
        results = read_results(path)
    except ResultsError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017
    else:
        assert isinstance(results, Results)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "1" * 5000, "\ufeff{}", ""])
def test_texts_that_break_a_parser(text, written):
    path = written(text)
    with pytest.raises(ResultsError, match="not UTF-8 JSON"):
        read_results(path)
