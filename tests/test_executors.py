"""Executors: one process, torchrun's ranks and Ray's actors write the same bytes, however often they are killed."""

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from unittest import mock

import pytest
import study
import torch
import yaml
from crash import TASK
from forked import forked
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import scaling
from icl_ft_fast import cli
from icl_ft_fast.augmentation.batches import PromptBatch
from icl_ft_fast.augmentation.generators import LocalGenerator
from icl_ft_fast.augmentation.self_study import ConversationBatch
from icl_ft_fast.augmentation.strategies import STRATEGIES
from icl_ft_fast.cli import main
from icl_ft_fast.engine import shards
from icl_ft_fast.finetuning import distributed
from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.runtime.durable import DamagedError, LockedError, ResultJournal, locked
from icl_ft_fast.runtime.executors import (
    LAUNCHER,
    ExecutorError,
    InProcess,
    Job,
    cores,
    pull,
    run_journaled,
    threads_wanted,
)
from icl_ft_fast.study import runs, workers
from icl_ft_fast.study.results import unmeasured
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks.files import write_jsonl
from icl_ft_fast.tasks.reversals import simple_reversals

TESTS = Path(__file__).parent
RNG = random.Random(0)
WORDS = "the cat sat on that mat who knows why".split()


def text(words):
    return " ".join(RNG.choices(WORDS, k=words))


CONTEXTS = [text(40), text(40)]
QUESTIONS = [
    {"id": f"{c}.{n}", "prompt": f"{context} {text(4)}", "choices": [" " + text(2), " " + text(3)], "answer": 0}
    for n in range(12)
    for c, context in enumerate(CONTEXTS)
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the processes that are started here: sums may be rounded otherwise among more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case(llama_directory, tmp_path_factory):
    """A function from an output to the command that writes it, and the bytes that one process writes."""
    folder = tmp_path_factory.mktemp("case")
    write_jsonl(folder / "questions.jsonl", QUESTIONS)
    files = ["--model", str(llama_directory), "--questions", str(folder / "questions.jsonl")]

    def command(out, *more):
        return ["score", "--quiet", "--shard-tokens", "16", *files, "--out", str(out), *more]

    assert main(command(folder / "whole.jsonl")) == 0
    return command, (folder / "whole.jsonl").read_bytes()


def run(command, **environment):
    """Run a command in a process of one thread; its exit code and what it said."""
    told = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"} | environment
    told["RAY_worker_niceness"] = "0"  # Ray's own choice would starve its workers on a busy machine
    done = subprocess.run(list(map(str, command)), env=told, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def rows_in(folder):
    """Lines of all files of results."""
    return [json.loads(line)["row"] for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


# Pulling ----------------------------------------------------------------------------------------------------------


def jobs_in(*sizes, start_flops=5):
    return [Job(f"{g}.{n}", n, 10, str(g), start_flops) for g, size in enumerate(sizes) for n in range(size)]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), max_size=6),
    workers=st.integers(1, 5),
    seed=st.integers(0, 99),
    start_flops=st.sampled_from([0, 15, 10**9]),
)
def test_every_task_is_pulled_once_in_whatever_order_workers_come(sizes, workers, seed, start_flops):
    jobs, counters, rng = jobs_in(*sizes, start_flops=start_flops), Counter(), random.Random(seed)

    def take(group, n):
        counters[group] += n
        return counters[group] - n

    waiting, pulled = [pull(jobs, w, workers, take) for w in range(workers)], []
    while waiting:
        one = rng.choice(waiting)
        if (i := next(one, None)) is None:
            waiting.remove(one)
        else:
            pulled.append(i)
    assert sorted(pulled) == list(range(len(jobs)))


def test_workers_begin_apart_and_help_where_it_pays():
    def begun(sizes, workers, start_flops, flops=()):
        jobs, counters = jobs_in(*sizes, start_flops=start_flops), Counter()
        jobs = [replace(job, flops=own) for job, own in zip(jobs, flops or [10] * len(jobs), strict=True)]

        def take(group, n):
            counters[group] += n
            return counters[group] - n

        order = [pull(jobs, w, workers, take) for w in range(workers)]
        turns = [[jobs[i].group for one in order if (i := next(one, None)) is not None] for _ in range(len(jobs))]
        return [turn for turn in turns if turn]

    assert begun((3, 3), 2, 5) == [["0", "1"]] * 3
    assert begun((2, 2), 2, 5, (11, 10, 10, 10)) == begun((2, 2), 2, 5, (10, 10, 10, 11)) == [["0", "1"]] * 2
    assert begun((2, 2), 4, 5) == [["0", "0", "1", "1"]]
    assert begun((2, 6), 2, 5) == [["0", "1"], ["0", "1"], ["1", "1"], ["1", "1"]]
    assert begun((1, 4), 2, 100) == [["0", "1"], ["1"], ["1"], ["1"]]  # what is left is less than a start


# Keeping ----------------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


class Doubler:
    """A worker that counts its calls and fails at one of them."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, work):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KilledError
        return 2 * work


def keep(folder, jobs, worker):
    with run_journaled(InProcess(), lambda: worker, jobs, folder) as results:
        return results


def test_what_is_kept_is_not_done_again(tmp_path):
    jobs, calls = jobs_in(3, 4), 0
    for fails_at in (3, 1, 2):
        worker = Doubler(fails_at)
        with pytest.raises(KilledError):
            keep(tmp_path, jobs, worker)
        calls += worker.calls - 1
    worker = Doubler()
    assert keep(tmp_path, jobs, worker) == [2 * job.work for job in jobs]
    assert calls + worker.calls == len(jobs) == len(rows_in(tmp_path))
    assert keep(tmp_path, jobs, Doubler(fails_at=1)) == [2 * job.work for job in jobs]
    other = [Job("other", 21, 1)]
    assert keep(tmp_path, other, Doubler()) == [42]


def test_a_line_cut_anywhere_is_done_again_and_said(tmp_path, caplog):
    jobs = jobs_in(2)
    keep(tmp_path, jobs, Doubler())
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        caplog.clear()
        worker = Doubler()
        assert keep(tmp_path, jobs, worker) == [0, 2]
        assert worker.calls == (2 if length < first else 1)
        torn = length not in (0, first)
        assert [record.getMessage() for record in caplog.records] == [
            f"{path}: its last line was cut short by a kill; that part is done again"
        ] * torn
        assert path.read_bytes() == whole


def test_a_damaged_line_and_a_second_run_are_refused(tmp_path):
    jobs = jobs_in(2)
    keep(tmp_path, jobs, Doubler())
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"value": 2', b'"value": 3'))
    with pytest.raises(DamagedError, match=rf"^{path}:2: damaged"):
        keep(tmp_path, jobs, Doubler())
    with locked(tmp_path / ".lock"), pytest.raises(LockedError, match=f"lock: locked by process {os.getpid()} on "):
        keep(tmp_path, jobs, Doubler())


# The command ------------------------------------------------------------------------------------------------------


def test_score_goes_on_where_it_was_killed(case, tmp_path, monkeypatch):
    command, whole = case
    real, calls, out = shards.Scorer.__call__, [], tmp_path / "scores.jsonl"

    def dies(self, shard):
        calls.append(shard)
        if len(calls) % 4 == 0:
            raise KilledError
        return real(self, shard)

    monkeypatch.setattr(shards.Scorer, "__call__", dies)
    kills = 0
    while not out.exists():
        try:
            assert main(command(out)) == 0
        except KilledError:
            kills += 1
            assert len(rows_in(tmp_path / "scores.jsonl.shards")) == 3 * kills
    assert kills > 2
    assert len(set(calls)) == len(calls) - kills
    assert out.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


def test_another_model_or_other_questions_reuse_nothing(case, tmp_path, monkeypatch, tiny_network, tokenizer):
    command, whole = case
    out, calls = tmp_path / "scores.jsonl", []
    tiny_network("llama", num_hidden_layers=2, rms_norm_eps=0.5).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    write_jsonl(tmp_path / "questions.jsonl", [row | {"prompt": "who " + row["prompt"]} for row in QUESTIONS])
    monkeypatch.setattr("icl_ft_fast.cli.run.score.shutil", SimpleNamespace(rmtree=lambda folder: None))
    real = shards.Scorer.__call__
    monkeypatch.setattr(shards.Scorer, "__call__", lambda self, shard: calls.append(shard) or real(self, shard))
    changes = (
        [],
        ["--model", str(tmp_path / "other")],
        ["--questions", str(tmp_path / "questions.jsonl")],
        ["--chunk-tokens", "7"],
        ["--dtype", "bfloat16"],
        [],
    )
    written, scored = [], []
    for change in changes:
        given = command(out, "--overwrite", *change)
        if "--model" in change:  # in place of the first, or both would be compared
            at = given.index("--model")
            del given[at : at + 2]
        assert main(given) == 0
        written.append(out.read_bytes())
        scored.append(len(calls))
    assert written[0] == written[-1] == whole
    assert len(set(written[:3])) == 3
    assert scored == [scored[0], 2 * scored[0], scored[2], scored[2] + scored[0], scored[4], scored[4]]
    assert scored[2] > scored[1]
    assert scored[4] == scored[3] + scored[0]


def test_a_second_run_is_refused_by_name(case, tmp_path, capsys):
    command, _ = case
    out = tmp_path / "scores.jsonl"
    with locked(tmp_path / "scores.jsonl.shards" / ".lock"):
        assert main(command(out)) == 2
    told = capsys.readouterr().err
    assert f"{out}.shards/.lock: locked by process {os.getpid()} on " in told
    assert not out.exists()


def test_killed_at_its_very_end(case, tmp_path, monkeypatch, capsys):
    command, whole = case
    out, kept = tmp_path / "scores.jsonl", tmp_path / "scores.jsonl.shards"
    with monkeypatch.context() as patch:
        patch.setattr("icl_ft_fast.cli.run.score.shutil", SimpleNamespace(rmtree=lambda folder: None))
        assert main(command(out)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(shards.Scorer, "__call__", None)  # nothing is left to be scored
        assert main(command(out)) == 0
    assert out.read_bytes() == whole
    assert not kept.exists()
    monkeypatch.setattr("icl_ft_fast.cli.run.score.shutil", SimpleNamespace(rmtree=lambda folder: None))
    assert main(command(out, "--overwrite")) == 0
    out.write_text("mine")
    assert main(command(out)) == 2  # what was there before a run with --overwrite is not replaced by one without
    assert out.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


# Several processes ------------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
KILL_ONE = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from icl_ft_fast.engine import shards
from icl_ft_fast.cli import main
from icl_ft_fast.cli.run import score

MARKS = Path(sys.argv[1])

class Mortal(shards.Scorer):
    calls = 0

    def __call__(self, shard):
        self.calls += 1
        (MARKS / str(os.getpid())).touch()
        while len(list(MARKS.iterdir())) < 2:  # both are at work before one dies
            time.sleep(0.01)
        try:
            if self.calls == 2:
                (MARKS / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
        return super().__call__(shard)

class Elsewhere(shards.ScorerElsewhere):
    def __call__(self):
        made = super().__call__()
        return Mortal(made.model, made.chunk_tokens, made.store)

if __name__ == "__main__":
    shards.Scorer, shards.ScorerElsewhere = Mortal, Elsewhere
    score.shutil = SimpleNamespace(rmtree=lambda folder: None)
    sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def killed(case, tmp_path):
    """A function that has `score` launched, where one of two workers is killed, and checks what comes of it."""
    command, whole = case
    script, marks, out = tmp_path / "killing.py", tmp_path / "marks", tmp_path / "scores.jsonl"
    script.write_text(KILL_ONE)
    marks.mkdir()

    def call(launch, *more):
        code, told = launch([script, marks, *command(out, *more)])
        assert code == 0, told
        assert (marks / "killed").exists()
        assert out.read_bytes() == whole
        names = [row["key"] for row in rows_in(Path(f"{out}.shards"))]
        assert len(names) == len(set(names)) > 4

    return call


def test_two_ranks_one_of_them_killed(killed):
    def launch(command):
        """As torchrun with --max-restarts 1, which is itself started below."""
        script, *arguments = map(str, command)
        rank = partial(run_path, script, run_name="__main__")
        with mock.patch.object(sys, "argv", [script, *arguments]):
            codes, _ = forked(rank, rank, as_ranks=True)
            assert -signal.SIGKILL in codes
            codes, told = forked(rank, rank, as_ranks=True)
        return max(codes), told

    killed(launch)


def test_augment_asks_two_ranks_what_it_asks_one(llama_directory, tmp_path, monkeypatch):
    template = tmp_path / "template.jinja"
    template.write_text("{{ document }}\nReversed:")
    (tmp_path / "task").mkdir()
    write_jsonl(tmp_path / "task" / "documents.jsonl", [{"id": str(n), "text": f"{text(5)}."} for n in range(10)])
    write_jsonl(tmp_path / "task" / "questions.jsonl", QUESTIONS[:1])
    asked = ["augment", "--model", llama_directory, "--task", tmp_path / "task", "--quiet"]
    asked += ["--prompt-template", template, "--strategy", "document"]
    asked += shlex.split("--max-new-tokens 6 --temperature 1 --samples 2 --near-duplicates 1")

    def answers(folder):
        rows = [row for kept in (folder / "replies").iterdir() for row in rows_in(kept)]
        assert len(rows) == 20
        return {row["key"]: (row["text"], row["logp"], row["seed"]) for row in rows}

    monkeypatch.setattr(LocalGenerator, "prompts_per_call", 4)
    strategy = replace(STRATEGIES["document"], read=study.any_text, is_lines=False)
    monkeypatch.setitem(STRATEGIES, "document", strategy)
    assert main([*map(str, asked), "--out", str(tmp_path / "one")]) == 0
    codes, told = forked(*[partial(main, [*map(str, asked), "--out", str(tmp_path / "two")])] * 2, as_ranks=True)
    assert codes == [0, 0], told
    assert told.count(f"written to {tmp_path / 'two'}") == 1
    assert answers(tmp_path / "one") == answers(tmp_path / "two")


@pytest.mark.parametrize("more", [("--strategy", "rules"), ("--limit", "3"), ("--max-cost", "1")])
def test_several_workers_augment_by_a_model_and_without_limits(tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr("icl_ft_fast.cli.run.augment.executor_of", lambda options: SimpleNamespace(rank=0))
    assert main(["augment", "--model", "m", "--task", "simple-reversals", "--out", str(tmp_path / "out"), *more]) == 2
    told = "--executor: workers load --model here for all replies: no --endpoint, --recorded, --limit, --max-cost\n"
    assert capsys.readouterr().err == f"icl-ft-fast augment: {told}"


@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install 'icl_ft_fast[ray]'")
def test_two_actors_of_ray_one_of_them_killed(killed):
    killed(lambda command: run([sys.executable, *command]), "--executor", "ray", "--workers", "2")


def test_ray_is_named_where_it_is_missing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(case[0](tmp_path / "scores.jsonl", "--executor", "ray", "--workers", "2")) == 2
    assert "ray: not installed: pip install 'icl_ft_fast[ray]'" in capsys.readouterr().err


def test_workers_starts_torchrun(case, tmp_path, monkeypatch):
    started = []

    def execve(program, arguments, environment):
        started[:] = arguments, environment
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = case[0](tmp_path / "scores.jsonl", "--executor", "torchrun", "--workers", "2")
    with pytest.raises(SystemExit):
        main(command)
    arguments, environment = started
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m icl_ft_fast.cli"
    assert arguments == [sys.executable, *launch.split(), *command]
    assert environment["OMP_NUM_THREADS"] == str(max(1, cores() // 2))
    launch_as(monkeypatch, 1, 2)  # what each of its processes then makes of the same options
    monkeypatch.setattr(cli.options, "Torchrun", lambda: "a rank")
    assert cli.options.executor_of(cli.parser().parse_args(command)) == "a rank"


def launch_as(patch, rank, size, port=29500):
    """Set what torchrun sets in the environment of one of its processes."""
    for name, value in zip(LAUNCHER, (rank, size, rank, "localhost", port), strict=True):
        patch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 in the environment, and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is two in the environment, and LOCAL_RANK, MASTER_ADDR"),
        ({"RANK": "3", "LOCAL_RANK": "3"}, None),  # left over in a shell
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            None,
        ),  # a cluster's, for one process
        ({"OMP_NUM_THREADS": "2,4"}, None),
        ({"OMP_NUM_THREADS": "many"}, None),
    ],
)
def test_what_a_cluster_leaves_in_the_environment(environment, message, case, tmp_path, monkeypatch, capsys):
    """Part of what a launcher sets starts no workers and ends in no traceback; alone, the answers are the same."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = case[0](tmp_path / "scores.jsonl")
    if message:
        assert main(command) == 2
        assert f"icl-ft-fast score: {message}" in capsys.readouterr().err
    else:
        assert isinstance(cli.options.executor_of(cli.parser().parse_args(command)), InProcess)
        assert distributed.num_launched() == 1
    assert threads_wanted() == (2 if environment.get("OMP_NUM_THREADS") == "2,4" else None)


@pytest.mark.parametrize(
    ("more", "launched", "message"),
    [
        (("--workers", "2"), False, "--workers: needs --executor torchrun or ray"),
        (("--ray-address", "auto"), False, "--ray-address: needs --executor ray"),
        (("--executor", "torchrun"), False, "--workers: say how many, or start the command with torchrun"),
        (("--executor", "ray"), True, "--executor: ray: torchrun started this process; leave the option out"),
        (("--workers", "2"), True, "--workers: torchrun's --nproc-per-node and --nnodes say how many"),
    ],
)
def test_options_that_do_not_go_together(case, tmp_path, monkeypatch, capsys, more, launched, message):
    if launched:
        launch_as(monkeypatch, 0, 3)
    assert main(case[0](tmp_path / "scores.jsonl", *more)) == 2
    assert capsys.readouterr().err == f"icl-ft-fast score: {message}\n"


# A study ----------------------------------------------------------------------------------------------------------


COMPARED = ("base", "icl", "ft", "augmented-ft", "distilled", "prefix@4")


def unmeasured_bytes(out):
    return json.dumps(unmeasured(json.loads((out / "results.json").read_bytes())))


@pytest.fixture(scope="module")
def compared(llama_directory, tmp_path_factory):
    """A function from an output to the command that compares, and what one process writes less what it measures."""
    folder = tmp_path_factory.mktemp("study")
    for name, rows in TASK.items():
        write_jsonl(folder / name, rows)
    options = f"--arms {','.join(COMPARED)} --seeds 0,1 --steps 3 --train-batch-size 2 --strategy document"
    limits = "--conversations 3 --prefix-steps 2 --checkpoint-minutes 0 --measure-seconds 0.1 --quiet"

    def command(out, *more):
        files = ["--model", llama_directory, "--task", folder, "--out", out]
        return ["compare", *map(str, files), *options.split(), *limits.split(), *map(str, more)]

    with pytest.MonkeyPatch.context() as patch:
        study.prepare(patch.setattr)
        assert main(command(folder / "out")) == 0
    return command, unmeasured_bytes(folder / "out")


def test_two_workers_compare_and_one_is_killed_as_it_trains(compared, tmp_path):
    command, whole = compared
    launchers = {"torchrun": ([*TORCHRUN, "--max-restarts", "1"], ())}
    if find_spec("ray") is not None:
        launchers["ray"] = [sys.executable], ("--executor", "ray", "--workers", "2")

    def launch(name):
        launcher, more = launchers[name]
        (tmp_path / f"{name} marks").mkdir()
        return run([*launcher, TESTS / "study.py", tmp_path / f"{name} marks", *command(tmp_path / name, *more)])

    with ThreadPoolExecutor() as pool:  # most of their time is that of starting processes
        ended = dict(zip(launchers, pool.map(launch, launchers), strict=True))
    for name, (code, told) in ended.items():
        out, marks = tmp_path / name, tmp_path / f"{name} marks"
        assert code == 0, told
        assert unmeasured_bytes(out) == whole
        assert {made["workers"] for made in json.loads((out / "results.json").read_bytes())["runs"]} == {2}
        assert "Arms were timed while 2 workers ran at once" in told
        assert told.count("Written to") == 1
        assert sorted(path.name for path in out.iterdir()) == ["journal.jsonl", "results.json"]
        begun = Counter((marks / "begun").read_text().splitlines())
        arms = {f"{arm} {seed}" for arm in COMPARED for seed in (0, 1)} - {"base 1"}  # no seed changes base
        assert begun.keys() > arms
        parts = {written: times for written, times in begun.items() if written not in arms}
        assert list(parts.values()) == [1] * 4  # greedy ones for both seeds, and though a worker was killed
        assert begun[study.MORTAL] == 2
        assert max(begun.values()) <= 2
        assert (marks / "steps").read_text() == "." * (1 + 1 + 2)  # kept in a checkpoint, deadly, and those left


def test_compare_goes_on_alone_from_what_a_rank_left(compared, tmp_path, monkeypatch):
    command, _ = compared
    study.prepare(monkeypatch.setattr)
    assert main(command(tmp_path / "one", "--store", tmp_path / "store")) == 0
    (tmp_path / "store").rename(tmp_path / "store of one")
    real, begun, made = workers.StudyWorkers.do, [], []

    def dies(self, model, job):
        begun.append(job)
        if len(begun) == 7:
            raise KilledError
        return real(self, model, job)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        launch_as(patch, 0, 1, port)
        patch.setattr(workers.StudyWorkers, "do", dies)
        with pytest.raises(KilledError):
            main(command(out, "--store", tmp_path / "store"))
        with locked(out / ".lock"):
            assert main(command(out, "--store", tmp_path / "store")) == 2
    assert Counter(type(job) for job in begun[:4]) == {PromptBatch: 2, ConversationBatch: 2}
    assert [job[0].arm for job in begun[4:]] == ["ft", "augmented-ft", "distilled"]
    make_run = runs.make_run

    def making(model, planned, *arguments, **named):
        made.append((planned.seed, planned.arm))
        return make_run(model, planned, *arguments, **named)

    monkeypatch.setattr(runs, "make_run", making)
    monkeypatch.setattr(LocalGenerator, "replies", None)  # all is written
    assert main(command(out, "--store", tmp_path / "store")) == 0
    first = [(0, arm) for arm in ("base", "icl", "distilled", "prefix@4")]
    assert made == first + [(1, arm) for arm in COMPARED[1:]]
    assert unmeasured_bytes(out) == unmeasured_bytes(tmp_path / "one")
    assert not (out / "workers").exists()


def test_a_rank_that_is_not_the_first_writes_and_prints_nothing(compared, tmp_path, monkeypatch, capsys):
    second = SimpleNamespace(rank=1, workers=2, run=lambda *_, more: iter(()), is_last=lambda: False)
    monkeypatch.setattr("icl_ft_fast.cli.run.compare.executor_of", lambda options: second)
    command, _ = compared
    for more in ((), ("--task", "all", "--preset", "small")):
        assert main(command(tmp_path / "out", "--arms", "base,ft", *more)) == 0
        assert not list(tmp_path.iterdir())
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_worker_on_another_kind_of_machine_is_refused(llama_directory, llama, tmp_path, monkeypatch):
    settings = StudySettings(("ft",), (0,), finetune=FinetuneSettings(steps=1, batch_size=1))
    task = partial(simple_reversals, num_facts=2, num_articles=2)
    (planned,) = runs.plan(llama, task, settings, ResultJournal(None))
    here = runs.study_key(llama, settings)
    elsewhere = workers.StudyWorkers(str(llama_directory), {}, here, settings, 2, tmp_path / "none", 60.0)
    other = runs.fingerprint("cpu")
    monkeypatch.setattr(runs, "fingerprint", lambda device: other | {"memory_bytes": 1})
    assert elsewhere()((planned, {}))["workers"] == 2
    assert not list(tmp_path.iterdir())  # no checkpoint where the study's folder is not seen
    monkeypatch.setattr(runs, "fingerprint", lambda device: other | {"threads": 99})
    with pytest.raises(ExecutorError, match="its threads or the versions of libraries are not those of where the"):
        elsewhere()


# Examples and documentation -----------------------------------------------------------------------------------------

EXAMPLES = TESTS.parent / "examples"
SKYPILOT = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run"}
SKYPILOT_RESOURCES = {
    "infra",
    "accelerators",
    "accelerator_args",
    "cpus",
    "memory",
    "instance_type",
    "use_spot",
    "disk_size",
    "disk_tier",
    "network_tier",
    "max_hourly_cost",
    "image_id",
    "ports",
    "labels",
    "autostop",
    "any_of",
    "ordered",
    "job_recovery",
}


def check_script(script):
    """A shell script is one, and its `score` command has options that there are, and all that are needed."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (words,) = re.findall(r"(?:icl_ft_fast\.cli|icl-ft-fast) (score .*)", script.replace("\\\n", " "))
    numbers = re.sub(r"\$\(\(.*?\)\)", "2", words)
    options = cli.parser().parse_args(shlex.split(numbers))
    assert (options.device, options.dtype) == ("cuda", "bfloat16")
    return options


def test_the_slurm_example():
    script = (EXAMPLES / "score.sbatch").read_text()
    assert check_script(script).executor is None
    used = set(re.findall(r"^#SBATCH --([a-z-]+)(?:=\S+)?$", script, re.MULTILINE))
    assert used == {
        "job-name",
        "nodes",
        "ntasks-per-node",
        "gpus-per-node",
        "cpus-per-task",
        "time",
        "requeue",
        "open-mode",
    }
    assert len(re.findall("^#SBATCH", script, re.MULTILINE)) == len(used)


def test_the_skypilot_example():
    task = yaml.safe_load((EXAMPLES / "score.sky.yaml").read_text())
    assert task.keys() <= SKYPILOT
    assert task["resources"].keys() <= SKYPILOT_RESOURCES
    assert {"source", "mode"} == task["file_mounts"]["/data"].keys()
    assert check_script(task["run"]).executor == "ray"
    given = {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE", "head"}
    assert set(re.findall(r"\$(\w+)", task["run"])) <= given | task["envs"].keys()


def test_the_simulation_of_what_can_be_counted():
    jobs = jobs_in(4, 4)
    stems = {"0": 3.0, "1": 3.0}

    def simulate(workers, **costs):
        return scaling.simulate(jobs, [2.0] * 8, stems, workers, **costs)

    assert simulate(1) == 2 * 3 + 8 * 2
    assert simulate(2) == 3 + 4 * 2
    assert simulate(4) == 3 + 2 * 2
    assert simulate(8) == 3 + 2
    assert simulate(100, startup_s=7) == 7 + 3 + 2
    # One look at each group when it is met, one for every job, and one that finds the group at its end.
    assert simulate(1, pull_s=1) == 22 + 2 * (1 + 4 + 1)
    assert scaling.simulate([], [], {}, 3, startup_s=1) == 1


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), workers=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_simulation_keeps_within_bounds(sizes, workers, seed):
    rng, jobs = random.Random(seed), jobs_in(*sizes)
    seconds = [rng.uniform(1, 3) for _ in jobs]
    stems = {str(g): rng.uniform(0, 4) for g in range(len(sizes))}
    took = scaling.simulate(jobs, seconds, stems, workers)
    assert max(sum(seconds) / workers, max(seconds)) - 1e-9 <= took <= sum(seconds) + sum(stems.values()) + 1e-9
    if workers == 1:
        assert took == pytest.approx(sum(seconds) + sum(stems.values()))


def test_the_documented_scaling_is_what_the_measurements_give():
    text = (TESTS.parent / "docs" / "executors.md").read_text()
    assert f"<!-- scaling -->\n{scaling.table()}\n<!-- /scaling -->" in text
    commands = re.findall(r"^    icl-ft-fast ((?:(?!\.\.\.).)*?)(?:  +#.*)?$", text, re.MULTILINE)
    parsed = [cli.parser().parse_args(shlex.split(command)) for command in commands]
    assert [(options.command, options.executor) for options in parsed] == [
        ("score", None),
        ("score", "torchrun"),
        ("score", "ray"),
        ("compare", "torchrun"),
        ("compare", "ray"),
    ]
    measured = json.loads(scaling.MEASURED.read_text())
    assert measured["one"]["seconds"] / measured["two"]["seconds"] >= 1.6
