"""Run the tutorials of docs/tutorials and write each, with what it prints and draws, as a page: `make tutorials`.

Then examples/whole_study.py, which must give compare's answers.

A tutorial is plain Python in jupytext's percent format: `# %%` begins a cell of code, `# %% [markdown]` one of text.
Each runs in a process of its own, on one core, offline, as it would run in a notebook: the value of a cell's last line
is shown. A cell that draws says in words what is to be seen: `# %% alt="..."`. An error in a cell ends it all.
"""

import ast
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
OUT = ROOT / "build" / "tutorials"
LIMIT_S = 300  # of one tutorial; each takes less than 30 on a free core
CELL = re.compile(r'^# %%(?P<text> \[markdown\])?(?: alt="(?P<alt>[^"]*)")?$')
LINK = re.compile(r"(\]\()(\w+)\.py\)")


@dataclass
class Cell:
    """Lines of one cell; `alt` says in words what its picture shows."""

    is_text: bool
    alt: str
    lines: list[str]

    @property
    def body(self) -> str:
        """The cell without empty lines around it; of a text without its comment marks."""
        lines = [re.sub("^# ?", "", line) for line in self.lines] if self.is_text else self.lines
        return "\n".join(lines).strip("\n")


def cells(text: str) -> list[Cell]:
    """The cells of a tutorial.

    Raises:
        ValueError: something stands before the first cell, or a cell's head is not understood.
    """
    found: list[Cell] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("# %%"):
            head = CELL.match(line)
            if head is None:
                raise ValueError(f'line {number}: {line}: expected # %%, # %% [markdown] or # %% alt="..."')
            found.append(Cell(head["text"] is not None, head["alt"] or "", []))
        elif found:
            found[-1].lines.append(line)
        elif line:
            raise ValueError(f"line {number}: stands before the first cell")
    return found


def run(cell: Cell, names: dict[str, object], pictures: Path) -> str:
    """What a cell of code prints, and the value of its last line, as Markdown."""
    tree = ast.parse(cell.body)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    if hasattr(value, "savefig"):
        if not cell.alt:
            raise ValueError('a cell that draws needs alt="what is to be seen"')
        picture = pictures.with_name(
            f"{pictures.name}-{len(list(pictures.parent.glob(f'{pictures.name}-*.svg'))) + 1}.svg"
        )
        value.savefig(picture, facecolor="white", metadata={"Date": None})
        shown = f"![{cell.alt}]({picture.name})"
    else:
        shown = ""
        if value is not None:
            printed.write(repr(value))
    said = "\n".join(line.rstrip() for line in printed.getvalue().splitlines()).strip("\n")
    return "\n\n".join(part for part in (f"```text\n{said}\n```" if said else "", shown) if part)


def render(path: Path) -> str:
    """Run a tutorial; its page."""
    names: dict[str, object] = {"__name__": "__main__"}
    parts = []
    for cell in cells(path.read_text(encoding="utf-8")):
        if cell.is_text:
            parts.append(LINK.sub(r"\1\2.md)", cell.body))
        elif cell.body:
            parts += [f"```python\n{cell.body}\n```", run(cell, names, OUT / path.stem)]
    return "\n\n".join(part for part in parts if part)


def main() -> int:
    """Run each tutorial in a process of its own; with one's name, that one here."""
    if len(sys.argv) == 3 and sys.argv[1] == "--here":
        path = Path(sys.argv[2])
        (OUT / f"{path.stem}.md").write_text(render(path) + "\n", encoding="utf-8")
        return 0
    chosen = [path for path in TUTORIALS if not sys.argv[1:] or path.stem[0] in sys.argv[1:]]
    if chosen == TUTORIALS:
        shutil.rmtree(OUT, ignore_errors=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "84"}
    environment = os.environ | offline | {"PYTHONPATH": str(ROOT)}
    total_s = 0.0
    for path in chosen:
        for old in OUT.glob(f"{path.stem}-*.svg"):
            old.unlink()
        work = OUT / "work" / path.stem  # where it writes; the examples are found there as in the repository
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / "examples").symlink_to(ROOT / "examples")
        began = time.monotonic()
        command = [sys.executable, __file__, "--here", str(path)]
        done = subprocess.run(command, cwd=work, env=environment, timeout=LIMIT_S, check=False)
        if done.returncode:
            print(f"{path.relative_to(ROOT)}: failed", file=sys.stderr)
            return 1
        total_s += (seconds := time.monotonic() - began)
        print(f"{path.stem}: {seconds:.1f} s", flush=True)
        with (OUT / f"{path.stem}.md").open("a", encoding="utf-8") as page:
            page.write(f"\n[This page as a program]({path.name}). It ran in {seconds:.0f} seconds on one core.\n")
    print(f"{len(chosen)} tutorials: {total_s:.1f} s")
    if chosen != TUTORIALS:
        return 0
    command = [sys.executable, str(ROOT / "examples" / "whole_study.py"), "--check"]
    return subprocess.run(command, cwd=OUT, env=environment, timeout=LIMIT_S, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
