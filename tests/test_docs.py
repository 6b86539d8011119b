"""README and docs/ against the code: commands, options, links, places in the code, figures, the tree of rooms."""

import argparse
import ast
import importlib.util
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

import icl_ft_fast
from icl_ft_fast import _C, cli
from icl_ft_fast.ops import cpu
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.markdown import markdown

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}

# Options that pages name and that belong to other programs: torchrun, the harnesses, the benchmarks.
OF_OTHERS = """--nnodes --nproc-per-node --max-restarts --max-samples --custom-tasks --num_fewshot --use_cache
    --model_args --stage
    --tasks --batch_size --costs --parts --minutes --small --only --kills --quick --hypothesis-profile""".split()


def figures():
    """The module that draws them."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIGURES = figures()


@pytest.mark.parametrize("name", FIGURES.FIGURES)
def test_a_figure_is_what_the_script_draws(name):
    committed = (ROOT / "docs" / "figures" / name).read_text(encoding="utf-8")
    assert committed == FIGURES.FIGURES[name](), f"docs/figures/{name}: run `make figures` and look at it"


def test_no_figure_is_left_over():
    assert {path.name for path in (ROOT / "docs" / "figures").iterdir()} == FIGURES.FIGURES.keys()


# Places in the code.


def names_in(path):
    """Functions, classes and methods of a Python file; words before a bracket or brace in native code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r"\b(\w+)(?=\s*[({])", text)) | set(re.findall(r"(?:struct|#define) (\w+)", text))
    found = set()

    def walk(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    walk(ast.parse(text).body, "")
    return found


def places():
    """(page, file, name) for every file:name that a page or the path of a request speaks of."""
    found = [(page, *match) for page, text in TEXTS.items() for match in PLACE.findall(text)]
    return found + [("docs/figures.py", *where.split(":")) for where, _, _ in FIGURES.PATH]


PLACE = re.compile(r"\b([\w/]+\.(?:py|cpp|h)):([A-Za-z_][\w.]*\w)")


@pytest.mark.parametrize(("page", "file", "name"), sorted(set(places())))
def test_places_in_the_code_exist(page, file, name):
    assert (ROOT / file).is_file(), f"{page}: there is no {file}"
    assert name in names_in(ROOT / file), f"{page}: {file} has no {name}"


def test_the_path_of_a_request_is_ten_boxes():
    assert len(FIGURES.PATH) == 10
    assert sum(bool(jump) for _, _, jump in FIGURES.PATH) == 3


def test_a_request_takes_that_path(llama, monkeypatch):
    """The Python boxes but the tree's, which is built before, are on the stack in their order when C++ is called."""
    stacks = []

    class Native:
        def __getattr__(self, name):
            return getattr(_C, name)

        def trie_attention(self, *arguments):
            frame, stack = sys._getframe(1), []
            while frame is not None:
                path = Path(frame.f_code.co_filename)
                if path.is_relative_to(ROOT):
                    stack.append(f"{path.relative_to(ROOT)}:{frame.f_code.co_qualname}")
                frame = frame.f_back
            stacks.append(stack[::-1])
            return _C.trie_attention(*arguments)

    monkeypatch.setattr(cpu, "_OPS", Native())
    icl_ft_fast.score(llama, [icl_ft_fast.Question("q", "the cat", (" sat on", " by the"))], context="the mat ")
    called = iter(stacks[-1])
    for where, _, _ in FIGURES.PATH:
        if where.split(":")[0].endswith(".py") and not where.endswith(":build_from_lists"):
            assert where in called, f"{where}: not called, or not after the box before; called: {stacks[-1]}"


FILE = re.compile(r"`((?:icl_ft_fast|csrc|tests|benchmarks|docs|examples|fuzz)/[\w/.-]*)`")


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_folders_exist(page):
    for name in FILE.findall(TEXTS[page]):
        assert "NAME" in name or (ROOT / name).exists(), f"{page}: there is no {name}"


# The tree of rooms.


def test_the_readme_s_tree_is_true():
    tree = TEXTS["README.md"].partition("## The tree")[2].partition("\n## ")[0]
    named = re.findall(r"(?<![\w/])(?:[\w.-]+/)+", re.sub(r"(?m)(?<=\S)  .*$", "", tree))
    for name in named:
        assert (ROOT / name).is_dir(), f"README.md's tree: there is no {name}"
    for room in FIGURES.rooms():
        folder = {"": "icl_ft_fast/", "_C": "csrc/"}.get(room, f"icl_ft_fast/{room.replace('.', '/')}/")
        assert folder in named, f"README.md's tree: {folder} is missing"


def test_the_architecture_names_every_room():
    page = TEXTS["docs/architecture.md"]
    for room in FIGURES.rooms():
        assert f"`{FIGURES.title(room)}/`" in page or f"`{FIGURES.title(room)}`" in page, f"{room}: not in the page"


def test_the_floors_hold_every_room_above_what_it_imports():
    level = {name: number for number, names in enumerate(FIGURES.floors()) for name in names}
    assert level.keys() == FIGURES.rooms().keys()
    for mine, theirs in FIGURES.imports().items():
        assert all(level[other] < level[mine] for other in theirs), mine


# Commands.


def blocks(text):
    """Lines of code blocks, fenced or indented; those that end in a backslash with the next."""
    lines, fenced, before = [], False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            before += line.strip()
            if before.endswith("\\"):
                before = before[:-1] + " "
            else:
                lines.append(before)
                before = ""
    return lines


def commands():
    """(page, arguments) of every icl-ft-fast command of the pages."""
    for page, text in TEXTS.items():
        inline = re.findall(r"`((?:\w+=\S+ )*icl-ft-fast [^`]+)`", text)
        for line in [*blocks(text), *(one.replace("\n", " ") for one in inline)]:
            for part in re.split(r";\s|\s[|&]+\s|\s&&\s", line):
                if match := re.search(r"(?:^|\s)(?:icl-ft-fast|-m icl_ft_fast\.cli)\s(.*)", part):
                    yield page, re.sub(r"\s+#\s.*| *2>.*", "", match[1]).strip()


PARSER = cli.parser()


def parser_of(words):
    """The parser of the command that these words begin with, and the words after its name."""
    parser = PARSER
    while words:
        (nested,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)] or [None]
        if nested is None or words[0] not in nested.choices:
            break
        parser, words = nested.choices[words[0]], words[1:]
    return parser, words


@pytest.mark.parametrize(("page", "arguments"), sorted(set(commands())))
def test_a_command_parses(page, arguments, capsys):
    words = shlex.split(arguments)
    if words[0] == "lm-eval":  # the rest is the harness's command line
        return
    parser, rest = parser_of(words)
    assert len(rest) < len(words), f"{page}: {arguments}: no such command"
    if "..." in words or not rest:
        for word in rest:
            assert word[0] != "-" or word in parser._option_string_actions, f"{page}: {arguments}: {word}"
        return
    try:
        PARSER.parse_args(words)
    except SystemExit as end:
        assert not end.code, f"{page}: {arguments}: {capsys.readouterr().err.strip()}"  # noqa: PT017


def test_why_commands_are_not_run():
    """Each reason of `make commands` fits a command of a page, and names files of tests that are there."""
    from run_commands import NOT_RUN  # which imports this module

    found = [" ".join(arguments.split()) for _, arguments in commands()]
    for pattern, reason in NOT_RUN.items():
        assert any(re.search(pattern, arguments) for arguments in found), pattern
        for name in re.findall(r"[\w/]+\.py", reason):
            assert (ROOT / name).is_file(), f"{pattern}: there is no {name}"
    assert "make commands" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def options(parser):
    """All option names of a parser and of its commands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(options, action.choices.values()))
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_options_in_the_text_exist(page):
    known = options(PARSER) | set(OF_OTHERS)
    for code in re.findall(r"`([^`\n]+)`", TEXTS[page]):
        for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert name in known, f"{page}: `{code}`: no command has {name}"


def test_make_targets_and_modules_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page, text in TEXTS.items():
        for line in blocks(text) + re.findall(r"`([^`\n]+)`", text):
            if match := re.match(r"make ([a-z]\w*)", line):
                assert re.search(rf"^{match[1]}:", makefile, re.MULTILINE), f"{page}: {line}: no such target"
            for module, first in re.findall(r"python -m ((?:benchmarks|icl_ft_fast)[\w.]*)(?: ([a-z]\w+))?", line):
                path = ROOT / module.replace(".", "/")
                assert path.is_dir() or path.with_suffix(".py").is_file(), f"{page}: {line}: no such module"
                if module == "benchmarks" and first:
                    suite = ROOT / "benchmarks" / first
                    assert suite.is_dir() or suite.with_suffix(".py").is_file(), f"{page}: {line}: no such suite"


PYTHON = [
    pytest.param(page, textwrap.dedent(code), id=f"{page}-line{text[: text.index(code)].count(chr(10)) + 1}")
    for page, text in TEXTS.items()
    for code in re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize(("page", "code"), PYTHON)
def test_python_compiles(page, code):
    compile(code, page, "exec")


@pytest.mark.parametrize("page", TEXTS)
def test_public_names_exist(page):
    for name in re.findall(r"\biff\.(\w+)", TEXTS[page]):
        assert name in icl_ft_fast.__all__ or name in ("__all__", "__version__"), f"{page}: iff.{name}"


# Results.


def test_results_are_what_the_published_files_give():
    """Every line of tables and verdicts, anew from each answer: docs/results.md names the command."""
    files = sorted((ROOT / "docs" / "results").glob("*/results.json"))
    studies = [Derived.read(path.parent, cache_lifetime=1000) for path in files]  # --queries-per-day
    lines = markdown(studies, 30_000).splitlines()
    assert [line for line in lines if line not in TEXTS["docs/results.md"].splitlines()] == []
    assert len(studies) == 4


# Links.


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    text = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path):
    """Of a page's headings."""
    return {slug(line.lstrip("#")) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}: no such heading"


def test_every_page_and_tutorial_is_in_the_index():
    linked = set(re.findall(r"\]\(([\w/-]+\.(?:md|py))", TEXTS["docs/index.md"]))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked
    assert {f"tutorials/{path.name}" for path in (ROOT / "docs" / "tutorials").glob("*.py")} <= linked
