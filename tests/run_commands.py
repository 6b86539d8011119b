"""Run the commands of README.md and docs/ as they stand there, on the shipped model: `make commands`.

Each page gets a folder of its own with the documents, questions and models that its commands name; what would take
minutes is bounded by options of MORE, which are added behind. A command that is not run has its reason in NOT_RUN; one
that is neither run nor named, or fails, ends it with exit code 1. All in one process: most of a command is importing.

    python tests/run_commands.py [PAGE ...]
"""

import contextlib
import glob
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import test_docs

from icl_ft_fast import cli
from icl_ft_fast.tasks.reversals import simple_reversals

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "icl_ft_fast" / "shipped" / "model"
STUDIES = {
    "compare": "--steps 2 --measure-seconds 1 --seeds 0",
    "demo": "--facts 4 --steps 2 --measure-seconds 1 --seeds 0",
}
MORE = STUDIES | {
    "augment --task simple-reversals": "--facts 8",
    "context train": "--conversations 8 --prefix-steps 2",
    "finetune": "--max_steps 2",
}
# Why a command is not run here, by what it has; the first that fits. Nothing else may stand on a page unrun.
NOT_RUN = {
    r"\.\.\.|^(augment|compare|context list|finetune|score)$": "named in a sentence, without all that it takes",
    r"--device cuda": "needs a GPU; tests/test_gpu.py",
    r"--executor ray": "starts a cluster; tests/test_executors.py",
    r"^finetune .*--output_dir out/two": "two processes, by torchrun; tests/test_finetune_distributed.py",
    r"hellaswag": "needs the network; tests/test_lm_eval.py, docs/tutorials/6_harness_and_server.py",
    r"^task questions": "needs a model that follows instructions; tests/test_questions.py",
    r"lberglund|--data (FOLDER|reversal_curse/)|--task squad/": "needs data of others; tests/test_tasks.py",
    r"smollm2|SmolLM2|gemma|out/models/": "needs a real model's GGUF file; tests/test_real.py, tests/test_gguf.py",
    r"\$task": "takes hours, in a shell's loop; tests/test_docs.py holds its results",
    r"--arms (all|\S*,prefix)": "trains prefixes for minutes; tests/test_prefix.py, docs/tutorials/5_trained_prefix.py",
    r"^(pause|resume) ": "needs a study that is at work; tests/test_status.py",
    r"--report_to": "needs the package trackio; tests/test_report.py",
}


def furnish(folder: Path) -> None:
    """What the commands name: documents, questions, models, and what other commands left."""
    task = simple_reversals(seed=0, num_facts=12, num_articles=1)
    task.write(folder / "FOLDER")
    for name in ("DIR", "MODEL", "MERGED", "QUANTISED"):
        (folder / name).symlink_to(SHIPPED)
    (folder / "seen.txt").write_text("brilu sosa rasca\n")
    (folder / "docs").symlink_to(ROOT / "docs")
    shutil.copytree(ROOT / "examples" / "handbook", folder / "examples" / "handbook")
    some = folder / "examples" / "handbook" / "questions.jsonl"
    some.write_text("".join(some.read_text().splitlines(keepends=True)[:20]))  # of 218, which take a minute
    (folder / "handbook").mkdir()
    for document in task.documents[:4]:
        (folder / "handbook" / f"{document.id}.md").write_text(document.text)
    rows = [json.dumps({"id": d.id, "text": d.text}) + "\n" for d in task.documents]
    (folder / "notes.jsonl").write_text("".join(rows[4:]))
    (folder / "documents.jsonl").write_text("".join(rows))
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in task.documents))
    shutil.copyfile(folder / "FOLDER" / "questions.jsonl", folder / "questions.jsonl")
    lines = [f'{q.prompt},"{q.choices[0]}","{q.choices[1]}",{q.answer}\n' for q in task.questions]
    (folder / "questions.csv").write_text("prompt,choice1,choice2,answer\n" + "".join(lines))
    lines = [f'{q.prompt},"{q.choices[0]}","{q.choices[1]}",{q.answer + 1}\n' for q in task.questions]
    (folder / "exam.csv").write_text("Frage,A,B,Richtig\n" + "".join(lines))


def write_files_of(page: str, folder: Path) -> None:
    """The files that a page's own blocks write: `cat > NAME <<'END'` and `echo '...' > NAME`."""
    text = test_docs.TEXTS[page]
    for name, body in re.findall(r"^ *cat > (\S+) <<'\w+'\n(.*?)^ *\w+$", text, re.MULTILINE | re.DOTALL):
        (folder / name).write_text(body)
    for body, name in re.findall(r"^ *echo '(.*)' > (\S+)$", text, re.MULTILINE):
        (folder / name).write_text(body + "\n")


def why_not(arguments: str) -> str | None:
    """Why a command is not run; None for one that is."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, arguments)), None)


def words_of(arguments: str) -> list[str]:
    """The words of a command as a shell would give them, with what bounds it and names what is here."""
    words = []
    for word in shlex.split(arguments):
        if word == "3f2a":  # the id of a context of that day
            words.append(next(Path("contexts").glob("*.safetensors")).stem)
        else:
            words += sorted(glob.glob(word)) if "*" in word else [word]
    names = next((name for name in MORE if words[: len(name.split())] == name.split()), None)
    if names is not None and "--dry-run" not in words:
        words += MORE[names].split()
    if words[0] == "serve" and "--help" not in words:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            words += ["--port", str(free.getsockname()[1])]
    return words


def stop_serving(port: int, ended: threading.Event) -> None:
    """Stop the server of this process by an interrupt, as a person does, once it answers."""
    while not ended.wait(0.05):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            os.kill(os.getpid(), signal.SIGINT)
            return


def called(words: list[str]) -> tuple[int, str]:
    """Exit code and output of a command with these words, in this process unless it becomes another program."""
    if "torchrun" in words:
        command = [sys.executable, "-m", "icl_ft_fast.cli", *words]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
        )
        return done.returncode, done.stdout
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 2 if end.code else 0
        except Exception:
            traceback.print_exc(file=said)
            code = 1
    return code, said.getvalue()


def run(arguments: str) -> tuple[int, str]:
    """Exit code and output of a command."""
    words = words_of(arguments)
    for option in ("--out", "--output_dir"):  # of another command of the page
        if option in words and words[0] not in ("finetune", "task"):
            left = Path(words[words.index(option) + 1])
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    if words[:2] == ["task", "new"]:
        shutil.rmtree(words[2], ignore_errors=True)
    if words[:2] == ["report", "out/run1"] and not Path("out/run1").exists():  # which another page makes
        shutil.copytree(ROOT / "docs" / "results" / "simple-reversals", "out/run1")
    ended = threading.Event()
    if words[-2:-1] == ["--port"]:
        threading.Thread(target=stop_serving, args=(int(words[-1]), ended), daemon=True).start()
    code, said = called(words)
    ended.set()
    if words[:2] == ["task", "new"] and "--questions" not in words and not code:  # `task questions` is not run
        shutil.copyfile("questions.jsonl", Path(words[2]) / "questions.jsonl")
    return code, said


def main() -> int:
    """Run them page by page; whether one failed."""
    pages: dict[str, list[str]] = {}
    for page, arguments in test_docs.commands():
        if not sys.argv[1:] or page in sys.argv[1:]:
            pages.setdefault(page, []).append(" ".join(arguments.split()))
    ran, failed, left, done = 0, 0, dict[str, list[str]](), set[str]()
    for page, commands in pages.items():
        with tempfile.TemporaryDirectory() as name:
            os.chdir(name)
            furnish(Path(name))
            write_files_of(page, Path(name))
            for arguments in dict.fromkeys(commands):
                if (reason := why_not(arguments)) is not None:
                    left.setdefault(reason, []).append(f"{page}: {arguments}")
                    continue
                if arguments in done:
                    continue
                if arguments == "doctor" or "torchrun" in arguments:  # the same on every page
                    done.add(arguments)
                began = time.monotonic()
                code, said = run(arguments)
                if code == 130:
                    raise KeyboardInterrupt
                ran, failed = ran + 1, failed + bool(code)
                print(
                    f"{'FAILED' if code else 'ran':6} {time.monotonic() - began:5.1f} s  {page}: {arguments}",
                    flush=True,
                )
                if code:
                    print("\n".join(f"        {line}" for line in said.splitlines()[-12:]), flush=True)
            os.chdir(ROOT)
    for reason, commands in left.items():
        print(f"not run, {len(commands)}: {reason}")
        for command in commands:
            print(f"        {command}")
    print(f"{ran} commands ran, {failed} of them failed; {sum(map(len, left.values()))} are named with a reason")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
