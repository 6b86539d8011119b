"""The benchmarks' own tests: pytest-benchmark cases of the ops (`pytest --benchmark-enable tests/test_benchmarks.py`),
the end-to-end suite on a tiny model, and the tables made of the results. Nothing here asserts a time.
"""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from benchmarks import __main__ as command
from benchmarks import batch_invariant, finetune, peers, readme, real_results, score, timing, trie_attention
from icl_ft_fast import ops
from icl_ft_fast.engine import trie

ATTENTION = trie_attention.cases(quick=True)
TINY = {"vocab_size": 8000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("case", ATTENTION)
def test_trie_attention(case, benchmark):
    trie_attention._check(case, ATTENTION[case][-1])
    benchmark(trie_attention._each, trie_attention._trie_attention, ATTENTION[case])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 128])
def test_target_logprob(rows, dtype, benchmark):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=generator).to(dtype) for n in (rows, 4000))
    row, target = torch.arange(rows, dtype=torch.int32), torch.randint(4000, (rows,), generator=generator).int()
    logp, _, _ = benchmark(ops.target_logprob, hidden, weight, row, target)
    exact = log_softmax(hidden.double() @ weight.double().T, -1)[row, target]
    torch.testing.assert_close(logp.double(), exact, rtol=1e-4, atol=1e-4)


def test_trie_build(benchmark):
    context = list(range(1000))
    built = benchmark(trie.build_from_lists, [(context, [c, 1]) for c in range(100)])
    assert len(built.token) == 1000 + 100


def test_the_end_to_end_suite_runs_and_gates(monkeypatch, capsys):
    monkeypatch.setattr(score, "SIZES", {"tiny": TINY})
    monkeypatch.setattr(score, "article", lambda *_: _article(score.simple_reversals(0, num_facts=30, num_articles=1)))
    rows = score.run(quick=True)
    assert {row.variant for row in rows} == {"icl_ft_fast", "encode, plan", "floor", "KV loop (12)"}
    assert len(rows) == 4 * len(score.DTYPES)
    assert all(row.ms > 0 for row in rows)
    monkeypatch.setattr(score, "kv_loop", lambda case, n: peers.Sample(0.0, [1.0], [[-1.0] * len(case.choices[0])]))
    with pytest.raises(AssertionError, match="log-likelihoods differ"):
        score.run(quick=True)


def test_the_suite_of_invariant_scores_runs_and_gates(monkeypatch):
    monkeypatch.setattr(batch_invariant, "SIZES", {"tiny": TINY})
    monkeypatch.setattr(
        batch_invariant, "article", lambda *_: _article(score.simple_reversals(0, num_facts=5, num_articles=1))
    )
    rows = batch_invariant.run(quick=True)
    assert [row.variant for row in rows] == ["as usual", "batch_invariant"] * len(score.DTYPES)
    monkeypatch.setattr(batch_invariant, "TOLERANCE", dict.fromkeys(score.DTYPES, 0.0))
    with pytest.raises(AssertionError, match=r"invariant, .* as usual"):
        batch_invariant.run(quick=True)


def test_the_suite_of_training_names_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(SystemExit, match=r"^finetune: needs trl, peft, datasets: pip install '.*\[trl,lora\]'$"):
        finetune.run(quick=True, work="lora")
    monkeypatch.setattr(command.sys, "argv", ["benchmarks", "score", "--work", "lora"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "--work lora: expected a part of a suite that runs (" in capsys.readouterr().err


def _article(task):
    return score.icl_context(task.documents), list(task.questions[:15])


def test_a_job_splits_every_request_where_the_contexts_part(monkeypatch, tmp_path):
    text, questions = _article(score.simple_reversals(0, num_facts=30, num_articles=1))
    score.save_model(tmp_path, TINY, [text])
    case = score.Case.of(score.iff.load(tmp_path), text, questions)
    rebuilt = [
        (case.context + prompt, choice)
        for prompt, choices in zip(case.prompts, case.choices, strict=True)
        for choice in choices
    ]
    assert rebuilt == case.requests
    assert len({tuple(prompt[:1]) for prompt in case.prompts}) > 1


def test_a_missing_peer_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    with pytest.raises(peers.PeerMissingError, match=r"^llama\.cpp: .*`python -m benchmarks\.peers llama-cpp`$"):
        peers.interpreter("llama.cpp")
    (tmp_path / "llama-cpp" / "bin").mkdir(parents=True)
    (tmp_path / "llama-cpp" / "bin" / "python").touch()
    python, script = peers.interpreter("llama.cpp")
    assert python.startswith(str(tmp_path))
    assert script.endswith("llama_cpp_loop.py")


def test_tables_are_made_of_the_newest_rows(monkeypatch, tmp_path):
    def row(suite, case, variant, ms):
        return timing.Row(suite, case, variant, ms, ms, ms, 1.0, "x")

    on = timing.machine()
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    timing.append_csv(tmp_path, [row("score", "a", "icl_ft_fast", 9000.0), row("score", "a", "KV loop (12)", 1.0)], on)
    rows = [
        row("score", "a", "icl_ft_fast", 2000.0),
        row("score", "a", "floor", 1600.0),
        row("score", "a", "KV loop (12)", 40_000.0),
        row("score", "b", "icl_ft_fast", 500.0),
        *(
            row("trie_attention", f"dense, {t} threads", v, ms)
            for t, v, ms in (
                (1, "trie_attention", 10.0),
                (1, "torch SDPA", 25.0),
                (2, "trie_attention", 6.0),
                (2, "torch SDPA", 12.0),
            )
        ),
    ]
    timing.append_csv(tmp_path, rows, on)
    text = readme.BLOCKS["score"][1]() + readme.BLOCKS["ops"][1]()
    assert "| seconds (times ours) | icl_ft_fast | floor | KV loop (12) |" in text
    assert "| a | 2.0 | 1.6 (0.80x) | 40.0 (20x) |" in text
    assert "| b | 0.5 |  |  |" in text
    assert "| trie_attention: dense | torch SDPA | 2.50 | 2.00 |" in text
    assert json.dumps(on["device"])[1:-1] in text
    assert not re.search(r"\b9\.0\b", text)


def test_every_kept_row_is_whole():
    for path in readme.RESULTS.glob("*.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                assert None not in {*row, *row.values()}, f"{path.name}: {row}"
                assert float(row["ms"]) > 0


def test_results_of_a_real_model_are_what_the_published_files_give():
    """Every table, anew from each answer: docs/results-real.md names the command. No text of others is in a file."""
    page = (Path(__file__).parents[1] / "docs" / "results-real.md").read_text(encoding="utf-8")
    names = [path.stem for path in real_results.PUBLISHED.glob("*.json")]
    assert sorted(re.findall(r"^<!-- (\w[\w-]*) -->$", page, re.MULTILINE)) == sorted(names)
    for name in names:
        study = real_results.published(name)
        assert f"<!-- {name} -->\n{real_results.block(study)}\n<!-- /{name} -->" in page, name
        assert not any(run.samples for run in study.results.runs)
        assert all(re.fullmatch(r"\d+", a.question_id + a.topic) for run in study.results.runs for a in run.answers)
        assert not study.results.settings.keys() & {*real_results.TEXTS}
