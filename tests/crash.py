"""Commands killed at random moments, on disks that fill up or are read-only, against the same ones left alone.

    python tests/crash.py MODEL FOLDER --kills 30 [--disk]

Every command runs in a child of this one process, in a folder of its own; --disk needs to be able to mount. A moment is
one of the child's accesses to its files, its waits for the disk, its forwards and its training steps, so that all of
them are seeded. Prints one JSON object; an assertion that fails ends it.
"""

import argparse
import contextlib
import io
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from icl_ft_fast import cli
from icl_ft_fast.augmentation import strategies
from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.strategy import Parsed
from icl_ft_fast.cli.run import augment as run_augment
from icl_ft_fast.cli.run import compare as run_compare
from icl_ft_fast.cli.run import finetune as run_finetune
from icl_ft_fast.cli.run import score as run_score
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.machine import Ceilings
from icl_ft_fast.engine.model import Model
from icl_ft_fast.finetuning import run as finetune_run
from icl_ft_fast.runtime.durable import Journal, ResultJournal
from icl_ft_fast.study import compare, sweep
from icl_ft_fast.study.results import read_results, unmeasured

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree"}
TASK = {
    "documents.jsonl": [{"id": f"d{n}", "text": f"cat{n} are taller than mat{n}.", "topic": f"t{n}"} for n in range(3)],
    "questions.jsonl": [
        {
            "id": f"q{n}",
            "prompt": f"mat{n} are",
            "choices": [" shorter than", " taller than"],
            "answer": 0,
            "document": f"d{n}",
        }
        for n in range(3)
    ],
}
COMMANDS = {
    "compare": "--task ../task --arms icl,augmented-ft,augmented-ft@60,repeated-ft,distilled,rag@1,oracle,compacted@2,"
    "prefix@4 --seeds 0,1 --replay 0.3 --mix 1:1 --questions local --steps 2 --train-batch-size 2 "
    "--conversations 3 --prefix-steps 2 --store store --icl-subsample 2 --strategy document "
    "--checkpoint-minutes 0 --measure-seconds 0.1 --out out",
    "finetune": "--train_file ../task/documents.jsonl --output_dir out --max_steps 4 --save_steps 1 --eval_steps 2 "
    "--per_device_train_batch_size 2 --save_total_limit 2 --validation_file ../task/documents.jsonl",
    "augment": "--task ../task --strategy document --prompt-template ../short.jinja --max-new-tokens 6 "
    "--samples 4 --temperature 1 --near-duplicates 1 --out out",
    "score": "--questions ../task/questions.jsonl --documents ../task/documents.jsonl --shard-tokens 1 "
    "--out out/scores.jsonl",
}
# Two numbers that outlive a child: moments so far, training steps so far.
SHARED = memoryview(mmap.mmap(-1, 16)).cast("Q")


def prepare(model: Model, folder: Path) -> None:
    """The task's files; what would take seconds and decides nothing here is cut short."""
    (folder / "task").mkdir(parents=True)
    (folder / "short.jinja").write_text("{{ document }}\nReversed:")
    for name, rows in TASK.items():
        (folder / "task" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (run_compare, run_augment, run_score):
        command.load_model = lambda _: model
    run_finetune.load = lambda *_, **__: model
    compare.ceilings = lambda *_: Ceilings("float32", 1.0, 1.0)
    sweep.LENGTHS = ()
    sweep.sweep = partial(sweep.sweep, rounds=1, batches=(1,))
    Prompting.of = partial(short, Prompting.of)
    for name in ("document", "local"):
        cut = replace(strategies.STRATEGIES[name], max_new_tokens=6, read=any_text, is_lines=False)
        strategies.STRATEGIES[name] = cut


def warm(folder: Path) -> None:
    """The longest command once in this process: what it imports and sets up, each of a hundred children has from it."""
    folder.mkdir()
    link(folder.parent, folder)
    (folder / "here").mkdir()
    with contextlib.chdir(folder / "here"), contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["compare", "--model", "MODEL", *COMMANDS["compare"].split(), "--quiet"]) == 0


def any_text(source: str, reply: str) -> Parsed:
    """A row of whatever the model replied: a random model obeys no form."""
    return Parsed([("document", f"{source} {reply}")], 0, 0)


def short(of: Callable[..., Prompting], strategy: str, **how: object) -> Prompting:
    """A prompting for which the tiny model has positions."""
    return of(strategy, **how | {"template": Path("../short.jinja")})


def run(command: str, folder: Path, dies_at: int = 0) -> tuple[int, str]:
    """Run a command in a folder, to its dies_at-th moment at most; its exit status, negative a signal, and stderr."""
    folder.mkdir(exist_ok=True)
    SHARED[0], told = 0, os.memfd_create("stderr")
    child = os.fork()
    if not child:
        code = 1
        try:
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(told, 2)
            ticking(folder, dies_at)
            model = "--model_name_or_path" if command == "finetune" else "--model"
            code = cli.main([command, model, "MODEL", *COMMANDS[command].split(), "--quiet"])
        except BaseException:  # os._exit() below would end the child without a word
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(told, "rb") as file:
        file.seek(0)
        return code, file.read().decode()


def ticking(folder: Path, dies_at: int) -> None:
    """From now on count this process's moments, and die at one of them."""

    def tick() -> None:
        SHARED[0] += 1
        if SHARED[0] == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        path = str(arguments[0]) if event in EVENTS else "/"
        if str(folder) in path or not path.startswith("/"):
            tick()

    def before(call):
        def called(*arguments, **named):
            tick()
            return call(*arguments, **named)

        return called

    def step(*arguments):
        done = call(*arguments)
        SHARED[1] += 1
        return done

    call = before(finetune_run.train_step)
    finetune_run.train_step, os.fsync, Model.forward_chunk = step, before(os.fsync), before(Model.forward_chunk)
    sys.addaudithook(hook)


def outcome(command: str, out: Path) -> object:
    """What a command has written, less what it measured."""
    if command == "compare":
        return json.dumps(unmeasured(json.loads((out / "results.json").read_bytes())))
    if command == "augment":
        answers = [row for path in out.glob("replies/*/*.jsonl") for row in Journal(path).rows]
        assert len(answers) == len({row["key"] for row in answers}) == 12
        answers = sorted(({**row, "time": 0} for row in answers), key=lambda row: row["key"])
        rows = [json.loads(line) for line in (out / "rows.jsonl").read_bytes().splitlines()]
        return answers, [{**row, "time": 0} for row in rows], (out / "report.json").read_bytes()
    assert not list(out.rglob(".*"))
    written = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "progress.json":
            content = unmeasured(json.loads(content))
        elif path.name == "metrics.jsonl":
            content = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in content.splitlines()]
        written[str(path.relative_to(out))] = None if path.name == "SHA256SUMS" else content
    return written


def readable(command: str, out: Path) -> None:
    """Whatever is there is whole."""
    if command == "compare" and (out / "results.json").exists():
        read_results(out / "results.json")
    if command == "compare":
        ResultJournal(out / "journal.jsonl")
    for checkpoint in out.glob("checkpoint-*"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=checkpoint, check=True)


def kill(command: str, folder: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Kill a command so many times, again and again on what the last kill left, and let it end."""
    SHARED[1] = 0
    code, told = run(command, folder / "whole")
    assert code == 0, (command, code, told)
    moments, steps, expected = SHARED[0], SHARED[1], outcome(command, folder / "whole" / "out")
    cut, done, deaths, ended = folder / "cut", 0, 0, 0
    while done < kills or deaths:
        if not deaths:
            SHARED[1] = 0
        code, told = run(command, cut, rng.randrange(1, moments) if done < kills else 0)
        assert code in (0, -signal.SIGKILL), (command, told)
        if code:
            done, deaths = done + 1, deaths + 1
            readable(command, cut / "out")
        else:
            assert outcome(command, cut / "out") == expected, command
            assert SHARED[1] <= steps + deaths, (SHARED[1], steps, deaths)  # but the step in flight, none twice
            if command == "compare":  # the same bytes from what is kept
                before = (cut / "out" / "results.json").read_bytes()
                (cut / "out" / "results.json").unlink()
                code, told = run(command, cut)
                assert code == 0, (command, code, told)
                assert (cut / "out" / "results.json").read_bytes() == before
            shutil.rmtree(cut)
            deaths, ended = 0, ended + 1
    return {"moments": moments, "steps": steps, "kills": done, "ended": ended}


def fill(command: str, folder: Path, times: int, rng: random.Random) -> int:
    """Run a command on a disk with too little room, then with enough; then on a read-only one."""
    expected = outcome(command, folder / "whole" / "out")
    sizes = [path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file()]
    pages = sum(-(-size // 4096) for size in sizes)
    disk, filled = folder / "disk", 0
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    try:
        at = disk / "here"
        link(folder, disk)
        for _ in range(times):
            at.mkdir()
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / "ballast").write_bytes(bytes(free - 4096 * rng.randrange(pages)))
            code, told = run(command, at)
            (disk / "ballast").unlink()
            assert code in (0, 2), (command, code, told)
            if code:
                filled += 1
                assert "No space left on device" in told, told
                assert len(told.splitlines()) == 1, told
            readable(command, at / "out")
            code, told = run(command, at)
            assert code == 0, (command, code, told)
            assert outcome(command, at / "out") == expected
            shutil.rmtree(at)
        at.mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        code, told = run(command, at)
        assert (code, len(told.splitlines())) == (2, 1), told
        assert "Read-only file system" in told, told
    finally:
        subprocess.run(["umount", disk], check=True)
    return filled


def link(source: Path, folder: Path) -> None:
    """What a folder of runs needs beside them."""
    for name in ("task", "short.jinja"):
        (folder / name).symlink_to(source / name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    prepare(load(arguments.model, self_check=False), arguments.folder)
    warm(arguments.folder / "warm")
    report, rng = {}, random.Random(arguments.seed)
    for i, command in enumerate(COMMANDS):
        folder = arguments.folder / command
        folder.mkdir()
        link(arguments.folder, folder)
        kills = arguments.kills // len(COMMANDS) + (i < arguments.kills % len(COMMANDS))
        report[command] = kill(command, folder, kills, rng)
        if arguments.disk:
            report[command]["filled"] = fill(command, folder, 2, rng)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
