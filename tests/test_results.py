"""results.json: what is written reads back, version 3 is converted, bad ones are named."""

import copy
import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.study.results import Results, ResultsError, read_results, unmeasured, write_results


def run_of(arm, **more):
    return {
        "arm": arm,
        "seed": 0,
        "accuracy": {"test": {"correct": 30, "total": 40}},
        "answers": [ANSWER],
        "setup_s": 0.0,
        "query_s": 0.02,
        "query_request_tokens": 20.0,
        "query_forwarded_tokens": 5.0,
        "counts": {"forwarded_tokens": 7, "phases": {"query": {"wall_s": 0.8, "how": {}}}},
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
OLD = Path(__file__).parent / "data" / "results-3.json"  # three runs of a study that version 3 wrote


@pytest.fixture
def written(tmp_path):
    """A function that writes an object as results.json and returns the path."""

    def write(found):
        path = tmp_path / "results.json"
        path.write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")
        return path

    return write


def test_version_3_is_converted():
    old, results = json.loads(OLD.read_text()), read_results(OLD)
    assert results.schema_version == 4
    assert [run.arm for run in results.runs] == ["base", "icl", "augmented-ft"]
    for run, before in zip(results.runs, old["runs"], strict=True):
        assert run.query_request_tokens == before["query_tokens"]
        assert run.query_forwarded_tokens == before["query_rows"]
        assert run.setup_s == before["setup_s"]
        assert [answer.is_correct for answer in run.answers] == [
            a["predicted"] in a["correct"] for a in before["answers"]
        ]
        phases = before["counts"]["phases"]
        assert {name: phase["forwarded_tokens"] for name, phase in run.counts["phases"].items()} == {
            name: phase["forwarded_rows"] for name, phase in phases.items()
        }
        assert run.counts["cached_tokens"] == before["counts"]["reused_rows"]
        assert run.counts["head_tokens"] == before["counts"]["head_rows"]
    assert results.load["phases"]["load"]["wall_s"] == old["load"]["phases"]["load"]["wall_s"]
    assert len(results.questions[0].questions) == 12
    study = Derived.read(OLD)
    assert list(study.resources) == ["seconds", "FLOPs"]
    assert study.break_evens["seconds"].keys() == {
        ("augmented", rival) for rival in ("ICL", "ICL cached", "ICL from file")
    }


def spoiled(change):
    found = copy.deepcopy(NEW)
    change(found)
    return found


NEW = {
    "schema_version": 4,
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
            losses=[2.0],
            samples=[{"source": "a", "kind": "b", "text": "c"}],
        )
    ],
}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("nonsense", "not UTF-8 JSON: Expecting value"),
        ([], "schema_version: expected 3 or 4, got None"),
        ({"schema_version": 5}, "schema_version: expected 3 or 4, got 5"),
        ({"schema_version": 2}, "schema_version: expected 3 or 4, got 2"),
        ({"schema_version": True}, "schema_version: expected 3 or 4, got True"),
        ({"schema_version": 4}, "model: Field required (and "),
        ({"schema_version": 3}, "not a results file of schema 3: KeyError('runs')"),
        ({"schema_version": 3, "runs": 7}, "not a results file of schema 3: TypeError("),
        (spoiled(lambda f: f.update(runs=[])), "runs: Tuple should have at least 1 item"),
        (spoiled(lambda f: f["runs"][0].update(seed="x")), "runs[0].seed: Input should be a valid integer"),
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


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
JSON = st.recursive(SCALARS, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(), of, max_size=3))


@st.composite
def damaged(draw):
    """A results file of either schema in which up to three values are others, or gone."""
    found = copy.deepcopy(draw(st.sampled_from([json.loads(OLD.read_text()) | {"checksum": None}, NEW])))
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
@example(NEW | {"runs": [run_of("icl", query_request_tokens=math.inf), run_of("base")]})
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
