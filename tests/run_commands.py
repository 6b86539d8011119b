"""Run the commands of README.md and docs/ as they stand there, on the shipped model: `make commands`.

Each page gets a folder of its own with the documents, questions and models that its commands name; what would take
minutes is bounded by options of MORE, which are added behind. A command that is not run has its reason in NOT_RUN; one
that is neither run nor named, or fails, ends it with exit code 1. All in one process: most of a command is importing.

    python tests/run_commands.py [PAGE ...]
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
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
MORE = STUDIES | {"context train": "--conversations 8 --prefix-steps 2", "finetune": "--max_steps 2"}
# Why a command is not run here, by what it has; the first that fits.
NOT_RUN = {
    r"\.\.\.|--batch-invariant \.\.\.": "stands for other options",
    r"^(augment|compare|context list|finetune|score)$": "names a command, without what it takes",
    r"--executor|--ray-address": "starts processes or a cluster; tests/test_executors.py",
    r"--device cuda": "needs a GPU",
    r"^serve (?!--help)": "serves until it is stopped; tests/test_server.py, tutorial 6",
    r"^lm-eval": "downloads hellaswag; tests/test_lm_eval.py and tutorial 6 have a task in files",
    r"\.gguf": "needs a GGUF file of a real model; tests/test_gguf.py makes small ones",
    r"reversal-curse|--task (curse|squad/|all)": "needs data of others, or hours; tests/test_tasks.py",
    r"^task questions": "needs a model that follows instructions; tests/test_questions.py",
    r"3f2a": "names an id of that day; tests/test_saved_contexts.py, tests/test_prefix.py",
    r"^compare .*(--arms all|,prefix)": "trains prefixes for minutes; tests/test_prefix.py, tests/test_compare.py",
    r"^(pause|resume) |--watch": "of a study that is running; tests/test_status.py",
    r"--nproc-per-node|--output_dir out/two": "starts two processes; tests/test_finetune_distributed.py",
    r"\$task|docs/results/": "a shell's loop or pattern, over studies of hours",
    r"--exclude-words english": "looks for English words in a list of the system",
}


def furnish(folder: Path) -> None:
    """What the commands name: documents, questions, models, and what other commands left."""
    task = simple_reversals(seed=0, num_facts=12, num_articles=1)
    task.write(folder / "FOLDER")
    for name in ("DIR", "MODEL", "MERGED", "QUANTISED"):
        (folder / name).symlink_to(SHIPPED)
    (folder / "examples").symlink_to(ROOT / "examples")
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
    if arguments.startswith("report out/run1") and not Path("out/run1").exists():
        return "of the study that another page makes"
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, arguments)), None)


def run(arguments: str) -> tuple[int, str]:
    """Exit code and output of a command."""
    words = shlex.split(arguments)
    names = next((name for name in MORE if words[: len(name.split())] == name.split()), None)
    if names is not None and "--dry-run" not in words:
        words += MORE[names].split()
    for option in ("--out", "--output_dir"):  # of another command of the page
        if option in words and words[0] not in ("finetune", "task"):
            left = Path(words[words.index(option) + 1])
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    if words[:2] == ["task", "new"]:
        shutil.rmtree(words[2], ignore_errors=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 2 if end.code else 0
        except Exception:
            traceback.print_exc(file=said)
            code = 1
    if words[:2] == ["task", "new"] and "--questions" not in words and not code:  # `task questions` is not run
        shutil.copyfile("questions.jsonl", Path(words[2]) / "questions.jsonl")
    return code, said.getvalue()


def main() -> int:
    """Run them page by page; whether one failed."""
    pages: dict[str, list[str]] = {}
    for page, arguments in test_docs.commands():
        if not sys.argv[1:] or page in sys.argv[1:]:
            pages.setdefault(page, []).append(" ".join(arguments.split()))
    ran, failed, left = 0, 0, dict[str, list[str]]()
    for page, commands in pages.items():
        with tempfile.TemporaryDirectory() as name:
            os.chdir(name)
            furnish(Path(name))
            write_files_of(page, Path(name))
            for arguments in dict.fromkeys(commands):
                if (reason := why_not(arguments)) is not None:
                    left.setdefault(reason, []).append(f"{page}: {arguments}")
                    continue
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
