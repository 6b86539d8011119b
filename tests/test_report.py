"""The HTML report: escaped, self-contained, within its size; and in a browser: charts, sorting, themes, no requests."""

import csv
import html
import html.parser
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks import real_results
from icl_ft_fast.report import charts, page, table
from icl_ft_fast.report.derived import FORM_NOTE, Derived
from icl_ft_fast.report.markdown import accuracy_table, gap_table, markdown
from icl_ft_fast.report.rows import RowsError, answer_rows, write_rows
from icl_ft_fast.report.sensitivity import cheapest_map, tornado
from icl_ft_fast.report.study import Study
from icl_ft_fast.report.verdict import verdict_of
from icl_ft_fast.study.evaluate import Answer, accuracies
from icl_ft_fast.study.prices import Prices, read_prices
from icl_ft_fast.study.records import CurvePoint, Run, Sample
from icl_ft_fast.study.results import AskedQuestion, QuestionsOfSeeds, Results, write_results
from icl_ft_fast.study.service import Service
from icl_ft_fast.study.sweep import Point, Sweep

HOSTILE = "</script><script>hacked=1</script><img src=x onerror=hacked=2>\"'&{{ 7*7 }}$x^2$"
POINTS = tuple(
    Point(
        length,
        batch,
        ((length / 1e4, length / 1e4 * 1.1) if length else ()),
        (0.002 + length * 1e-6 / batch, 0.0021 + length * 1e-6 / batch),
        1e6 * length,
        1e6,
        save_s=(0.01,) * bool(length),
        load_s=(0.002,) * bool(length),
    )
    for length in (0, 512, 700, 1024)
    for batch in (1, 8)
)
PHASE = {
    "request_tokens": 10,
    "forwarded_tokens": 10,
    "head_tokens": 1,
    "scored_tokens": 1,
    "decoded_tokens": 0,
    "trained_tokens": 5,
    "flops": 10**9,
    "moved_bytes": 10**8,
    "kv_bytes": 10**6,
    "wall_s": 2.0,
    "device_s": 1.5,
    "joules": None,
    "activation_bytes": 10**6,
}


def results_of(number, text="the cat", arms=("base", "icl", "ft", "augmented-ft"), seeds=(0, 1)):
    """A made-up study of `number` questions a seed in which ICL is right most often."""
    wrong_every = {"base": 2, "icl": 10, "ft": 3, "augmented-ft": 9}
    runs = []
    for seed in seeds:
        for arm in arms:
            answers = tuple(
                Answer(
                    f"q{i}",
                    f"{text} split{i % 2}",
                    None,
                    f"t{i}",
                    int((i + seed) % wrong_every[arm] == 0),
                    (0.8, 0.2),
                    (0,),
                )
                for i in range(number)
            )
            trained = arm.endswith("ft")
            runs.append(
                Run(
                    arm,
                    seed,
                    accuracies(answers),
                    answers,
                    20.0 * trained,
                    0.002,
                    20.0,
                    5.0,
                    {"phases": {"train": PHASE, "query": PHASE} if trained else {"query": PHASE}},
                    {},
                    tuple(3 / (step + 1) for step in range(50)) if trained else (),
                    (Sample(text, text, text),) if arm == "augmented-ft" else (),
                )
            )
    questions = tuple(
        AskedQuestion(f"q{i}", f"{text} {i} is", (f" {text} more", f" {text} less")) for i in range(number)
    )
    machine = {
        "processor": text,
        "versions": {"torch": "2"},
        "ceilings": {"dtype": "float32", "flops_per_s": 1e11, "bytes_per_s": 1e10},
    }
    return Results(
        4,
        text,
        1000,
        text,
        {"template": text, "seeds": [0, 1]},
        machine,
        Sweep(700, POINTS),
        tuple(runs),
        weight_bytes=4000,
        questions=(QuestionsOfSeeds(tuple(seeds), questions),),
        load={"phases": {"load": PHASE}},
    )


@pytest.fixture(scope="module")
def study():
    return Derived(results_of(60), "a study", Prices(currency="EUR", machine_per_hour=2.0), cache_lifetime=1000.0)


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, and each script's text."""

    def __init__(self):
        super().__init__()
        self.tags, self.scripts = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


class Recorder:
    """A tracker that keeps what it is told; trackio 0.43 and wandb 0.31 take the same calls (the test below)."""

    def __init__(self, **about):
        self.about, self.logged, self.finished = about, [], False

    def log(self, entry, step):
        self.logged.append((step, entry))

    def finish(self):
        self.finished = True


def test_a_tracker_gets_each_run_with_its_curves_and_answers(monkeypatch):
    runs, results = [], results_of(6)
    ft = next(i for i, run in enumerate(results.runs) if run.arm == "ft")
    curve = (CurvePoint(25, {"a": 0.25}),)
    results = replace(
        results, runs=(*results.runs[:ft], replace(results.runs[ft], curve=curve), *results.runs[ft + 1 :])
    )

    def init(**about):
        runs.append(Recorder(**about))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init, Table=lambda columns, data: (columns, data)))
    assert Study.of(results, "mine").track("trackio") == len(results.runs) == len(runs)
    run, of_run = runs[ft], results.runs[ft]
    assert run.about["name"] == "mine, fine-tuned, seed 0"
    assert (run.about["group"], run.about["config"]["arm"]) == ("mine", "ft")
    assert [entry["train/loss"] for _, entry in run.logged[:-1]] == list(of_run.losses)
    assert run.logged[24] == (25, {"train/loss": 3 / 25, "train/accuracy/a": 0.25})
    step, final = run.logged[-1]
    right = sum(answer.is_correct for answer in of_run.answers)
    assert (step, final["accuracy"], final["setup_s"]) == (51, right / 6, 20.0)
    columns, data = final["answers"]
    assert [row[columns.index("question_id")] for row in data] == [f"q{i}" for i in range(6)]
    assert data[0][columns.index("choices")] == '[" the cat more", " the cat less"]'
    assert all(run.finished for run in runs)
    assert runs[0].logged[0][0] == 1  # the base model: no training, its figures alone
    with pytest.raises(ValueError, match=r"^name: expected trackio or wandb, got 'mlflow'$"):
        Study.of(results).track("mlflow")


def test_markdown_has_accuracies_gaps_and_the_verdict():
    study = Derived(results_of(30), "mine")
    assert markdown([study]) == f"{accuracy_table([study])}\n\n{gap_table([study])}\n"
    text = markdown([study], 1000, 5)
    test = next(t for t in study.paired if (t.first, t.second) == ("ft", "icl"))
    p = "p < 0.001" if test.p < 0.001 else f"p {test.p:.3f}"
    cell = f" {test.difference:+.2f} ({test.low:+.2f} to {test.high:+.2f}), {p}: {test.word(5)} |"
    assert [line for line in text.splitlines() if line.startswith(f"| mine: {test.split} |") and cell in line]
    assert text.endswith(f"**mine**: {verdict_of(study, 1000, 5).text}\n")
    assert gap_table([Derived(results_of(4, arms=("base",)), "alone")]) == ""


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_real_trackers_keep_it_offline(name, tmp_path):
    pytest.importorskip(name)
    write_results(tmp_path / "results.json", asdict(results_of(6, arms=("base", "ft"), seeds=(0,))))
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "icl_ft_fast.cli", "report", str(tmp_path / "results.json"), "--report_to", name]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"2 runs logged to {name}" in ended.stdout
    kept = b"".join(
        path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.suffix in (".db", ".wal", ".wandb", ".json", ".db-wal", ".parquet")
    )
    assert b"train/loss" in kept
    assert b"the cat 5 is" in kept  # the last question's prompt, in the table


def test_hostile_texts_stay_texts():
    plain, hostile = (Tags(), Tags())
    texts = {}
    for parser, text in ((plain, "the cat"), (hostile, HOSTILE)):
        texts[text] = page.render([Derived(results_of(20, text), text)], 100.0)
        parser.feed(texts[text])
    for name in ("script", "img", "style", "link", "a", "button", "input", "table", "svg", "figure"):
        assert [tag for tag, _ in hostile.tags].count(name) == [tag for tag, _ in plain.tags].count(name), name
    assert "49" not in re.findall(r"\{\{.{0,9}", texts[HOSTILE])
    assert texts[HOSTILE].count("{{ 7*7 }}") > 10
    assert hostile.scripts[-1] == plain.scripts[-1]  # the page's own
    (data,) = (script for script in hostile.scripts if script.startswith("{"))
    assert json.loads(data)["rows"][0]["prompt"].startswith(HOSTILE)
    for _, attributes in hostile.tags:
        assert not any(name.startswith("on") for name in attributes)


def test_what_acts_in_a_text_is_spelt_out():
    acting = "\x1b[31m\x00\x07\x9b \u202egnp.exe\u2066 \u200f\ud800"
    text = page.render([Derived(results_of(20, acting), acting)], 100.0)
    assert not set(text) & (set(acting) - set("[31m gnp.exe"))
    assert r"\x1b[31m\x00\x07\x9b \u202egnp.exe\u2066 \u200f\ud800" in text
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text)
    assert json.loads(data)["rows"][0]["prompt"].startswith(r"\x1b[31m\x00")


def test_nothing_comes_from_elsewhere(study):
    text = page.render([study], 100.0)
    parser = Tags()
    parser.feed(text)
    for tag, attributes in parser.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), (tag, attributes)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\((?!#)", text)
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_every_chart_says_what_it_shows_and_is_not_empty(study, tmp_path):
    drawn = {chart.name: chart for chart in charts.draw(study, 100.0)}
    assert drawn.keys() == {
        "accuracy",
        "paired",
        "curves",
        "sweep",
        "amortised-seconds",
        "amortised-flops",
        "amortised-money",
        "pareto-seconds",
        "pareto-money",
        "tornado",
        "map",
    }
    accuracy = study.accuracy("icl", study.splits[0])
    assert f"ICL {accuracy.value:.2f}" in drawn["accuracy"].alt
    for chart in drawn.values():
        svg = charts.svg(chart, variables=True)
        assert svg.count("<path") > 5
        assert "var(--ink)" in svg
        assert not any(colour in svg for colour in charts.LIGHT.values())
        assert "mathdefault" not in svg
    paths = Study(study).export(tmp_path / "charts")
    assert sorted(path.suffix for path in paths) == [".png"] * 9 + [".svg"] * 9
    assert all(path.stat().st_size > 3000 for path in paths)
    with pytest.raises(FileExistsError):
        Study(study).export(tmp_path / "charts")


def test_in_a_notebook(study):
    pandas = pytest.importorskip("pandas")
    shown = Study(study)
    text = shown._repr_html_()
    assert text.count("<svg") == 9
    assert "<script" not in text
    frame = shown.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 60 * 8
    assert shown.verdict(3000, tolerance=5.0).text == verdict_of(study, 3000, 5.0).text
    costs, curves = shown.costs(), shown.curves()
    line = study.ways("seconds")["ICL cached"].line
    row = costs[(costs.way == "ICL cached") & (costs.resource == "seconds")].iloc[0]
    assert (row.reading, row["query"], row.cache_lifetime, row.unit) == (line.reading, line.query, 1000.0, "s")
    assert set(costs.resource) == {"seconds", "FLOPs", "money"}
    assert len(curves) == 4 * 50
    assert curves[(curves.arm == "ft") & (curves.step == 3)].loss.tolist() == [1.0, 1.0]
    means = frame.groupby(["arm", "split"]).is_correct.mean()
    assert means["icl", study.splits[0]] == pytest.approx(study.accuracy("icl", study.splits[0]).value)


def test_the_page_says_all_that_the_verdict_says(study):
    served = replace(study, service=Service(changes_per_month=3, cost_of_wrong=0.01, concurrency=8))
    second = replace(served, name="slow", service=Service(max_latency_s=1e-9))
    text = html.unescape(page.render([served, second], 3000.0))
    verdict = verdict_of(served, 3000.0, 2.0)
    for sentence in (*verdict.unknown, verdict.told, *verdict.served, verdict.certainty):
        assert sentence in text
    assert len(verdict.served) >= 3
    assert "No decision: no way answers 95% of queries within --max-latency." in text
    assert f'<a href="#s0">{served.name}</a>' in text
    assert '<a href="#s1">slow</a>' in text
    assert f'<td class="text">ICL (0.900)</td><td class="text">{verdict.decision.chosen.name}</td>' in text


def test_a_page_with_machines_and_hosted_models(study):
    prices = read_prices(Path(__file__).parents[1] / "examples" / "prices.json")
    priced = replace(study, prices=prices)
    assert priced.arm_of("ICL cached on small hosted") == "icl"
    text = page.render([priced], 3000.0)
    for way in ("ICL cached on small hosted", "base on held all day", "augmented on by the hour"):
        assert f'<th scope="row">{way}' in text
    assert text.count("<svg") == 11


def test_rows_hold_every_answer_in_every_format(study, tmp_path):
    hostile = replace(study, results=results_of(3, '=1+1,\n"x', ("icl",), (0,)), name="-2")
    expected = list(answer_rows(hostile))
    assert expected[0]["choices"] == [' =1+1,\n"x more', ' =1+1,\n"x less']
    assert write_rows([hostile, hostile], tmp_path / "a.jsonl") == 6
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected * 2
    write_rows([hostile], tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [json.loads(row["probability"]) for row in rows] == [row["probability"] for row in expected]
    assert [row["is_correct"] for row in rows] == [str(row["is_correct"]) for row in expected]
    assert (rows[0]["study"], rows[0]["task"]) == ("'-2", "'=1+1,\n\"x")  # no formula in a spreadsheet
    parquet = pytest.importorskip("pyarrow.parquet")
    write_rows([hostile], tmp_path / "a.parquet")
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == expected
    with pytest.raises(RowsError, match=r"expected a name that ends in \.csv, \.jsonl, \.parquet"):
        write_rows([hostile], tmp_path / "a.xls")


def test_figures_taken_beside_other_workers_say_so(study):
    def beside(*workers):
        runs = [replace(run, workers=n) for run, n in zip(study.results.runs, itertools.cycle(workers))]
        return replace(study, results=replace(study.results, runs=tuple(runs)))

    assert beside(1, 1).beside == ""
    assert len(beside(1, 1).summary()["notes"]) == 1  # fewer than four seeds
    assert "several workers" in beside(3, None).beside
    results = replace(study.results, machine={"device": "cpu"})
    for processor_s, is_told in ((7.0, True), (9.0, False)):
        counts = {"phases": {"train": {"wall_s": 10.0, "device_s": processor_s}, "index": {"wall_s": 9.0}}}
        runs = tuple(replace(run, counts=counts) for run in results.runs[:1])
        told = replace(study, results=replace(results, runs=runs)).beside
        assert ("while other processes took the cores" in told) == is_told
    noted, console = beside(1, 3, 2), Console(file=io.StringIO(), width=500)
    assert "while 3 workers ran at once" in noted.beside
    table.print_study(noted, console)
    shown = [page.render([noted]), page.fragment(noted), console.file.getvalue(), accuracy_table([noted, noted])]
    assert [text.count(noted.beside) for text in shown] == [1, 1, 1, 1]
    assert noted.summary()["notes"][0] == noted.beside


def test_being_asked_in_another_form_than_was_trained_is_told():
    def notes(template, *arms):
        results = results_of(4, arms=arms)
        return Derived(replace(results, settings=results.settings | {"template": template}), "a study").notes

    assert FORM_NOTE in notes("chat", "base", "ft")
    assert FORM_NOTE not in notes("base", "base", "ft")
    assert FORM_NOTE not in notes("chat", "base", "icl")


def test_a_page_shows_a_study_between_its_markers(study, tmp_path, monkeypatch):
    """Accuracies with intervals and the seeds' spread, what is paid, and the verdict or why there is none."""
    text = real_results.block(replace(study, prices=None))
    assert "60 questions, 2 seeds, 0.0 hours" in text
    right = study.accuracy("icl").value
    assert re.search(rf"^\| ICL \|.*\| {right:.2f} \(0\.\d\d-\d\.\d\d\) \| 0\.\d\d, 0\.\d\d \|$", text, re.MULTILINE)
    assert re.search(
        r"^\| fine-tuned \| 18 \| 2 \|  \| 0\.\d\d \| [\d,]+ \(.*\) \| [\d,]+ \(.*\) \|$", text, re.MULTILINE
    )
    assert "Verdict on 15,000 queries: " in text
    unmeasured = real_results.block(replace(study, results=replace(study.results, sweep=Sweep())))
    assert "Verdict on 15,000 queries: No decision: " in unmeasured
    page_md = tmp_path / "page.md"
    page_md.write_text("before\n<!-- study -->\nout of date\n<!-- /study -->\nafter")
    for name in ("study", "other"):
        write_results(tmp_path / name / "results.json", asdict(study.results))
    monkeypatch.setattr(real_results, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr("sys.argv", ["real_results", str(page_md), str(tmp_path / "study")])
    real_results.main()
    assert page_md.read_text().startswith("before\n<!-- study -->\n60 questions")
    assert page_md.read_text().endswith("\n<!-- /study -->\nafter")
    assert "out of date" not in page_md.read_text()
    runs = real_results.published("study").results.runs
    assert [run.accuracy for run in runs] == [run.accuracy for run in study.results.runs]
    kept = (tmp_path / "published" / "study.json").read_text()
    assert not any(text in kept for text in ("the cat 5 is", " the cat more", '"t5"', '"q5"', '"samples":[{'))
    monkeypatch.setattr("sys.argv", ["real_results", str(page_md), str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="expected one <!-- other --> block, found 0"):
        real_results.main()


def test_what_an_old_file_lacks_is_left_out(study):
    phases = {"phases": {"query": {"wall_s": 1.0, "how": {}}}}
    bare = replace(
        study.results,
        sweep=Sweep(),
        questions=(),
        load=None,
        machine={"versions": {}, "ceilings": None},
        runs=tuple(replace(run, answers=(), losses=(), samples=(), counts=phases) for run in study.results.runs),
    )
    text = page.render([Derived(bare, "old"), Derived(bare, "older")], 100.0)
    assert "This results file has no answers." in text
    assert text.count("<svg") == 2  # accuracies


@pytest.fixture(scope="module")
def many():
    """The page of a hundred thousand questions."""
    study = Derived(results_of(100_000, "a question of some length " * 4, ("icl", "ft"), (0,)), "many")
    return page.render([study], 1000.0)


def test_a_hundred_thousand_questions_stay_under_ten_megabytes(many):
    text = many
    assert len(text.encode()) < 10e6
    assert f"{len(range(0, 100_000, 3)) + len(range(0, 100_000, 10)) - len(range(0, 100_000, 30)):,} questions" in text


def test_arms_of_a_chart_are_told_apart():
    names = ("base", "icl", "rag@1", "rag@4", "rag@8", "prefix@16", "ft", "ft+icl", "augmented-ft", "rules-ft")
    looks = charts._looks(SimpleNamespace(arms=names))
    assert len({looks[arm] for arm in names}) == len(names)
    usual = ("base", "icl", "rag@4", "ft", "augmented-ft", "rules-ft")
    assert len({looks[arm][0] for arm in usual}) == len(usual)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("fine-tuned + RAG k=4 - ICL, reversal", "fine-tuned + RAG k=4 - ICL,\nreversal"),
        ("x" * 40, "x" * 34 + "\n" + "x" * 6),
        ("x " + "y" * 40, "x " + "y" * 32 + "\n" + "y" * 8),
        ("ICL - base, trained", "ICL - base, trained"),
    ],
)
def test_names_beside_the_chart_of_differences_are_cut_between_words(text, shown):
    assert charts._wrap(text, charts.PAIR_WIDTH) == shown


# In a browser.

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium through selenium."""
    if missing := [name for name, path in PROGRAMS.items() if path is None]:
        pytest.skip(f"no {' and no '.join(missing)} on this machine (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS["chromium"]
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(PROGRAMS["chromedriver"]))
    yield driver
    driver.quit()


def opened(browser, path, *, width=1280, theme="light"):
    """Load the page; returns what the browser asked for."""
    emulate = browser.execute_cdp_cmd
    emulate(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    emulate("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    browser.get_log("performance")
    browser.get(path.as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def file(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    second = Derived(results_of(30, HOSTILE), HOSTILE)
    path.write_text(page.render([study, second], 1000.0), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1280, "light")])
def test_the_page_opens_without_errors_or_requests(browser, file, width, theme):
    asked = opened(browser, file, width=width, theme=theme)
    assert [url for url in asked if not url.startswith("data:,")] == [file.as_uri()]
    assert browser.get_log("browser") == []
    script = browser.execute_script
    assert script("return window.hacked") is None
    assert script("return document.documentElement.scrollWidth") <= width
    sizes = script("""return [...document.querySelectorAll('figure svg')].map(svg => {
        const paper = svg.getBoundingClientRect(), marks = svg.querySelectorAll('path, use, text').length;
        return [paper.width, paper.height, marks]; })""")
    assert len(sizes) == 11 + 9  # the second study has no prices
    assert all(w > 250 and h > 150 and marks > 15 for w, h, marks in sizes)
    assert script(
        "return [...document.querySelectorAll('figure')].every(f => f.getAttribute('aria-label').length > 40)"
    )


def contrast(first, second):
    """WCAG's ratio of two CSS rgb() colours."""

    def luminance(colour):
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_themes_change_charts_too_and_can_be_read(browser, file):
    opened(browser, file)
    colours = {}
    for theme in ("light", "dark"):
        assert browser.execute_script("return document.documentElement.dataset.theme") == theme
        colours[theme] = browser.execute_script("""
            const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
            const arms = [0, 1, 2, 3, 4, 5].map(i => {
                const probe = document.createElement('i');
                probe.style.color = `var(--arm${i})`; document.body.append(probe);
                const colour = getComputedStyle(probe).color; probe.remove(); return colour; });
            return {card: of('figure', 'backgroundColor'), text: of('h2', 'color'), muted: of('.muted', 'color'),
                    page: of('body', 'backgroundColor'), chart: of('figure svg text', 'fill'), arms};""")
        found = colours[theme]
        assert contrast(found["text"], found["page"]) > 7
        assert contrast(found["muted"], found["page"]) > 4.5
        assert contrast(found["chart"], found["card"]) > 4.5
        assert all(contrast(arm, found["card"]) > 3 for arm in found["arms"])
        browser.find_element("id", "theme").click()
    assert all(colours["light"][name] != colours["dark"][name] for name in colours["light"])


def test_the_table_is_sorted_filtered_and_paged_by_keyboard(browser, file):
    from selenium.webdriver.common.keys import Keys

    opened(browser, file)

    def column(n):
        return browser.execute_script(
            "return [...document.querySelectorAll('#s0-table tbody tr')].map(r => r.cells[arguments[0]].innerText)", n
        )

    rows = column(0)
    assert len(rows) == 20
    header = browser.find_element("css selector", "#s0-table thead th:nth-child(4) button")  # the arm base
    header.send_keys(Keys.ENTER)
    assert all("✗" in cell for cell in column(3))
    header.send_keys(Keys.ENTER)
    assert all("✓" in cell for cell in column(3)) or "✓" in column(3)[0]
    assert header.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    back, after = browser.find_elements("css selector", "#s0-tools button")
    assert not back.is_enabled()
    first = column(0)
    after.send_keys(Keys.ENTER)
    assert column(0) != first
    assert browser.find_element("css selector", "#s0-tools [role=status]").text.startswith("page 2 of ")
    back.send_keys(Keys.ENTER)
    assert column(0) == first
    browser.find_element("id", "s0-filter").send_keys("the cat 7 is")
    assert all("the cat 7 is" in cell for cell in column(0))
    assert "questions)" in browser.find_element("css selector", "#s0-tools [role=status]").text


def test_a_filter_of_ways_is_a_link(browser, file):
    """ICL right and fine-tuned wrong: by its controls, by the address they leave, and one question by its own."""
    opened(browser, file)
    script = browser.execute_script

    def choose(name, value):
        script(
            "const box = document.getElementById(arguments[0]); box.value = arguments[1];"
            "box.dispatchEvent(new Event('input'))",
            name,
            value,
        )

    def rows():
        return script(
            "return [...document.querySelectorAll('#s0-table tbody tr')].map(r => [r.cells[4].innerText, "
            "r.cells[5].innerText, r.cells[1].innerText, r.querySelector('a').getAttribute('href')])"
        )

    choose("s0-way-icl", "right")
    choose("s0-way-ft", "wrong")
    found = rows()
    assert found
    assert all("✓" in icl and "✗" in tuned for icl, tuned, *_ in found)
    split = found[0][2]
    choose("s0-split", split)
    assert {row[2] for row in rows()} == {split}
    status = browser.find_element("css selector", "#s0-tools [role=status]").text
    address = script("return location.hash")
    assert address.startswith("#s0:")
    link = file.as_uri() + address
    opened(browser, file)
    assert len(rows()) == 20
    browser.get("about:blank")
    browser.get(link)
    assert browser.find_element("css selector", "#s0-tools [role=status]").text == status
    one = rows()[0][3]
    browser.get("about:blank")
    browser.get(file.as_uri() + one)
    assert [row[3] for row in rows()] == [one]
    box = browser.find_element("id", "s0-confidence")
    browser.get("about:blank")
    browser.get(file.as_uri())
    box = browser.find_element("id", "s0-confidence")
    box.send_keys("0.9")  # every answer of this study has 0.8 or, where it is wrong, 0.2
    assert rows() == []


def test_a_page_of_a_hundred_thousand_questions_opens_in_two_seconds(browser, many, tmp_path):
    path = Path(tmp_path) / "many.html"
    path.write_text(many, encoding="utf-8")
    opened(browser, path)
    # the page's own work: a machine that others use makes the clock longer, not this
    metrics = browser.execute_cdp_cmd("Performance.enable", {}) or browser.execute_cdp_cmd("Performance.getMetrics", {})
    spent = {metric["name"]: metric["value"] for metric in metrics["metrics"]}
    assert spent["TaskDuration"] < 2
    assert browser.execute_script("return document.querySelectorAll('#s0-table tbody tr').length") == 20


def test_a_study_without_training_has_no_table_of_break_evens(study):
    runs = tuple(run for run in study.results.runs if run.arm in ("base", "icl"))
    untrained = replace(study, results=replace(study.results, runs=runs))
    assert "<caption>Break-even: number of queries" in page.render([study])
    assert "<caption>Break-even: number of queries" not in page.render([untrained])


def test_the_tornado_and_the_map_say_what_the_decision_says(study):
    """Each end and each point of them is the choice of a study with that input."""
    for queries in (100.0, 1e6):
        chosen, factors = tornado(study, queries, 2.0)
        decision = verdict_of(study, queries, 2.0).decision
        assert chosen == decision.chosen.name
        (volume,) = (factor for factor in factors if factor.name.startswith("queries"))
        ends = [verdict_of(study, n, 2.0).decision.chosen.name for n in (queries / 10, queries * 10)]
        assert list(volume.cheapest) == ends
        same = [study.arm_of(end) == study.arm_of(chosen) for end in ends]
        assert [volume.low >= 0, volume.high >= 0] == same
    volumes, rates, named = cheapest_map(study, 1000.0, 2.0, size=4)
    for rate, row in zip(rates, named, strict=True):
        changed = replace(study, service=Service(changes_per_month=rate))
        assert row == [verdict_of(changed, n, 2.0).decision.chosen.name for n in volumes]
    assert len({name for row in named for name in row}) > 1
