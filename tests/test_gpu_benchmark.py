"""The bring-up of a GPU, on the CPU at toy sizes: each minute of a lent machine counts, so nothing runs there first."""

import csv
import time

import pytest
import torch

from benchmarks.gpu import correctness, kernels, references, stages, table, workloads
from benchmarks.gpu.bench import BESIDE, OURS, SENSORS, Bench, Note
from benchmarks.timing import Row

# Whatever is not ours and needs CUDA or a package says so; these run here too.
RIVALS = {
    "ceilings": {"torch"},
    "gate": {"pytest"},
    "rectangle": {"SDPA FLASH_ATTENTION", "SDPA FLASH_ATTENTION, heads repeated"},
    "attention": {"SDPA FLASH_ATTENTION", "SDPA FLASH_ATTENTION, heads repeated"},
    "tiles": set(),
    "join": set(),
    "head": {"bare product", "all logits"},
    "squad_trie": {"FlexAttention", "per request, SDPA flash"},
    "mmlu": {"floor", "floor, chunks of 16", "hf as lm-eval, batch 2", "hf as lm-eval, batch 4"},
    "tests": {"pytest"},
    "head_training": {"all logits"},
    "long_context": {"floor", "KV loop"},
    "lora_step": {"transformers, SDPA"},
    "decode": {"transformers", "transformers, 2 at a time"},
}
SDPA = {f"SDPA {b}{h}" for b in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION") for h in ("", ", heads repeated")}
AWAY = {
    "rectangle": SDPA | {f"engine {name}" for name in references.ENGINES},
    "attention": SDPA | {f"engine {name}" for name in references.ENGINES},
    "squad_trie": {"per request, flash-attn varlen"},
    "head_training": {"liger-kernel", "cut-cross-entropy, exact"},
}


@pytest.fixture
def bench(tmp_path):
    told = []

    def tell(message, **beside):
        assert set(beside) <= set(BESIDE)
        told.append(message)

    return Bench(torch.device("cpu"), True, tmp_path, {"TFLOP/s": 1.0, "GB/s": 10.0}, tell), told


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("part", stages.PARTS)
def test_every_part_runs(part, bench, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_one.py").write_text("def test_one():\n    pass\n")
    for arguments in (correctness.GATE, correctness.TESTS):
        monkeypatch.setitem(arguments, False, ["-c", "/dev/null", str(tmp_path / "test_one.py")])
    setting, told = bench
    stages.PARTS[part][0](setting)
    rows = [x for x in told if isinstance(x, Row)]
    notes = [x for x in told if isinstance(x, Note)]
    assert {row.variant for row in rows if not row.variant.startswith(OURS)} == RIVALS[part]
    assert {(note.variant, note.reason) for note in notes} == {(name, "needs CUDA") for name in AWAY.get(part, ())}
    assert all(row.ms > 0 and (row.rate > 0 or row.unit == "% idle") for row in rows)
    assert not setting.wrong
    assert (tmp_path / "profile.txt").exists() == (part == "mmlu")
    ours = [row.case for row in rows if row.variant.startswith(OURS)]
    assert ours or part in ("ceilings", "gate", "tests")
    for case in {row.case for row in rows if row.variant.startswith(OURS)}:  # told before its rivals
        is_ours = [row.variant.startswith(OURS) for row in rows if row.case == case]
        assert is_ours == sorted(is_ours, reverse=True)
    text = table.report(told, {"device": "x"}, True)
    judged = [line for line in text.splitlines() if line.endswith("toy sizes |")]
    assert {line.split(" | ")[0].removeprefix("| ") for line in judged} <= set(ours)


def test_faults_are_told_and_the_anchors_still_measured(bench, monkeypatch):
    """A kernel that is wrong is a note, and so are scores that are another network's."""
    setting, told = bench
    attention, head = kernels.ops.trie_attention, kernels.ops.target_logprob
    monkeypatch.setattr(kernels.ops, "trie_attention", lambda *a, **k: attention(*a, **k) * 1.05)
    kernels.rectangle(setting)
    monkeypatch.setattr(kernels.ops, "target_logprob", lambda *a, **k: (head(*a, **k)[0] + 1e-3, *head(*a, **k)[1:]))
    kernels.head(setting)
    monkeypatch.undo()
    monkeypatch.setattr(workloads, "_profile", lambda *_: None)
    monkeypatch.setattr(workloads, "_logp", lambda case, *_, **__: torch.randn(len(case.requests)).tolist())
    workloads.mmlu(setting)
    wrong = {note.case: note.reason for note in told if isinstance(note, Note) and "WRONG" in note.reason}
    assert list(wrong) == ["rectangle d128: 32 x 128", "head of 96", "head of 32", "head of 8", "MMLU-like"]
    assert "target_logprob of 96 rows: off by" in wrong["head of 96"]
    assert "log-likelihoods differ" in wrong["MMLU-like"]
    assert setting.wrong == list(wrong)
    measured = {row.variant for row in told if isinstance(row, Row)}
    assert {"SDPA FLASH_ATTENTION", "bare product", "floor"} <= measured


def test_what_fails_is_told_and_only_ours_counts(bench):
    setting, told = bench

    def fail():
        raise RuntimeError("no kernel\nfor this\nshape\nand a long story")

    rows = setting.measure("a case", {"rival": fail, OURS: lambda: None}, 1.0, "GB/s")
    assert list(rows) == [OURS]
    assert told[1] == Note("a case", "rival", "RuntimeError: no kernel / for this / shape")
    assert setting.wrong == []
    assert list(setting.measure("a case", {f"{OURS}, otherwise": fail, "rival": lambda: 1}, 1.0, "GB/s")) == ["rival"]
    assert setting.wrong == ["a case"]


def test_stages_have_every_part_once_and_their_seconds():
    parts = [part for _, its in stages.STAGES.values() for part in its]
    assert sorted(["ceilings", *parts]) == sorted(stages.PARTS)
    assert [seconds for seconds, _ in stages.STAGES.values()] == [150, 240, 200]


def test_the_last_full_line_of_the_sensors_counts(tmp_path):
    path = tmp_path / "clocks.csv"
    assert stages.sensed(path) == {}
    path.write_text("clocks.sm [MHz], power.draw [W], temperature.gpu, clocks_event_reasons.active\n1980, 6")
    assert stages.sensed(path) == {}
    path.write_text(path.read_text() + "50.1, 61, 0x0000000000000004\n1755, 6")
    assert stages.sensed(path) == dict(zip(SENSORS, ("1980", "650.1", "61", "0x0000000000000004"), strict=True))


def test_a_sample_is_scaled_and_bars_are_judged():
    def row(case, variant, ms, rate=1.0, percent=None, peak=None):
        return Row("gpu", case, variant, ms, ms, ms, rate, "TFLOP/s", percent, peak)

    told = [
        row("rectangle d128: x", OURS, 1.0, 451.0),
        row("rectangle d64: x", OURS, 1.0, 349.0),
        row("chain: x", OURS, 1.0),
        row("chain: x", "SDPA a", 1.1),
        row("chain: x", "SDPA b", 0.9),
        row("head of 8,192: x", OURS, 1.0, 601.0, None, 65_000_000),
        row("MMLU-like: x", OURS, 1.0, 1.0, 61.0),
        row("MMLU-like: x", "hf 1", 8.5),
        row("head's: x", OURS, 1.0, 1.0, None, 5),
        row("head's: x", table.CUT[0], 2.0, 1.0, None, 6),
        Note("decode", "FAILED", "cut off after 3 s"),
    ]
    text = table.report(told, {"device": "An H200", "date": "today", "torch": "2.11"}, False)
    verdicts = {line.split(" | ")[0][2:]: line.split(" | ")[-1] for line in text.splitlines() if OURS in line}
    assert "| 450 TFLOP/s; anchor 600 | reached |" in text
    assert verdicts["rectangle d128: x"] == "reached |"
    assert verdicts["rectangle d64: x"] == verdicts["chain: x"] == verdicts["head of 8,192: x"] == "MISSED |"
    assert verdicts["MMLU-like: x"] == "reached |"
    assert verdicts["head's: x"] == "a rival is missing |"
    assert "- decode: FAILED: cut off after 3 s" in text
    assert "# An H200, today" in text


def _quick(bench):
    bench.tell(Row("gpu", "device copy", "torch", 1.0, 1.0, 1.0, 4000.0, "GB/s"))


def _slow(bench):
    bench.measure("a case", {OURS: lambda: None}, 1.0, "GB/s")
    time.sleep(600)


def _dies(bench):
    stages.os._exit(3)


def _raises(bench):
    raise ValueError("all wrong")


PARTS = {"ceilings": (_quick, 300), "dies": (_dies, 300), "raises": (_raises, 300), "slow": (_slow, 2)}


def test_what_is_cut_off_keeps_its_rows_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """The command itself; its parts are forked here, not started anew, to spare four imports."""
    monkeypatch.setattr(stages, "PARTS", PARTS)
    spawn = stages.multiprocessing.get_context
    monkeypatch.setattr(stages.multiprocessing, "get_context", lambda _: spawn("fork"))
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--small", "--parts", "dies,slow,raises"]
    assert stages.main(arguments, time.monotonic()) == 1
    assert "no time" not in (tmp_path / "gpu.md").read_text()
    text = (tmp_path / "gpu.md").read_text()
    assert "- dies: FAILED: its process died" in text
    assert "- raises: FAILED: ValueError: all wrong" in text
    assert "- slow: FAILED: cut off after 2 s" in text
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["device copy", "a case"]
    assert rows[0]["suite"] == "gpu"
    assert float(rows[1]["peak_percent"]) > 0
    assert float(rows[1]["compile_s"]) >= 0
    assert [rows[1][name] for name in ("host_ms", *SENSORS)] == [""] * 5
    began = time.monotonic()
    assert stages.main([*arguments, "--minutes", "1"], began - 61) == 1
    assert time.monotonic() - began < 60
    assert "- slow: FAILED: no time was left" in (tmp_path / "gpu.md").read_text()
    with pytest.raises(SystemExit):
        stages.main(["--out", str(tmp_path), "--parts", "nothing"], time.monotonic())
    assert "unknown nothing" in capsys.readouterr().err
