"""The repository's laws: layers, what an import loads, the line budget, forbidden names, docstrings, the README."""

import ast
import doctest
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import icl_ft_fast
from icl_ft_fast import _C

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "icl_ft_fast"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


class Lazily(dict):
    """What a function makes of each module, made when asked for: a worker parses what its own tests look at."""

    def __init__(self, make):
        self.make = make
        super().__init__()

    def __missing__(self, name):
        self[name] = self.make(name)
        return self[name]

    def items(self):
        return [(name, self[name]) for name in MODULES]


TREES = Lazily(lambda name: ast.parse(MODULES[name].read_text(encoding="utf-8")))

# The rooms of the package, lowest first: imports go to an earlier line, or stay in their room. "" is the facade, which
# `import icl_ft_fast` opens.
ROOMS = {
    "_C": "the native code of csrc/: the trie and both ops for every instruction set of a CPU",
    "ops.triton": "both ops for GPUs, imported with the first CUDA tensor",
    "ops": "what the two ops promise, their definition in plain PyTorch, and who serves which device",
    "runtime": "processes, machines and files that survive; knows nothing of models",
    "tasks": "documents and questions, one's own and the paper's; knows no model",
    "engine": "prefix tree, KV cache, model, log-likelihoods, generation, and the ledger of work done",
    "augmentation": "inferences about documents, written by a model, an endpoint or rules",
    "finetuning": "training on documents: data, batches, runs, LoRA, checkpoints, processes, distillation",
    "study": "ways of answering over tasks and seeds: results, statistics, cost, decision",
    "shipped": "the model that comes with the package, and how it is made",
    "report": "a study's results as tables, charts, a page and a notebook's object",
    "integrations": "the engine behind other harnesses and behind a server",
    "": "the public names",
    "cli": "a module a command",
}
ORDER = list(ROOMS)
IMPORTS_NATIVE = {"ops.cpu", "engine.trie"}
BUDGET = 27_020


def room(module):
    """The room of a module, by its dotted name without the package's."""
    return "ops.triton" if module.startswith("ops.triton") else module.partition(".")[0]


def imported(name, tree, path):
    """What a module imports: (ours, dotted, without the package's name; others, by their first name)."""
    ours, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in found:
            first, _, rest = target.partition(".")
            if first != "icl_ft_fast":
                others.add(first)
                continue
            while rest and rest != "_C" and rest not in MODULES:  # a name inside a module
                rest = rest.rpartition(".")[0]
            ours.add(rest)
    return ours - {name}, others


IMPORTS = Lazily(lambda name: imported(name, TREES[name], MODULES[name]))


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downward(name):
    mine = room(name)
    assert mine in ROOMS, f"{name}: give {mine} a line in this file's table"
    for target in IMPORTS[name][0]:
        theirs = room(target)
        is_below = ORDER.index(theirs) < ORDER.index(mine) or mine == theirs
        assert is_below, f"{name} ({mine}) imports {target or 'the facade'} ({theirs or 'the facade'})"
        assert theirs != "_C" or name in IMPORTS_NATIVE or mine in IMPORTS_NATIVE, f"{name} imports _C"
        assert target != "ops.reference" or mine == "ops", f"{name} imports {target}"
        assert theirs != "ops.triton" or mine == "ops.triton", f"{name} imports {target}"
    if name == "ops.reference" or mine == "ops.triton":
        others = IMPORTS[name][1] - sys.stdlib_module_names
        assert others <= {"torch"} | ({"triton"} if mine == "ops.triton" else set()), f"{name} knows {sorted(others)}"


def test_no_circle_of_imports():
    left = {name: ours & MODULES.keys() for name, (ours, _) in IMPORTS.items()}
    while leaves := [name for name, ours in left.items() if not ours]:
        left = {name: ours - set(leaves) for name, ours in left.items() if ours}
    assert not left, f"imports go in a circle among {sorted(left)}"


def test_the_type_check_needs_no_extra():
    """`make lint` checks types with the extras of `make setup` alone: what else is imported may be missing there."""
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [untyped] = [table["module"] for table in configured["tool"]["mypy"]["overrides"] if "follow_imports" in table]
    may_be_missing = {module.partition(".")[0] for module in untyped}
    needs = [*configured["project"]["dependencies"], *configured["project"]["optional-dependencies"]["report"]]
    installed = {re.match(r"[\w-]+", need).group().replace("-", "_") for need in needs}
    there = installed | set(sys.stdlib_module_names) | {"huggingface_hub", "markupsafe"}  # of transformers and jinja2
    for name, (_, others) in IMPORTS.items():
        unknown = others - there - may_be_missing
        assert not unknown, f"{name} imports {sorted(unknown)}: name it in pyproject.toml, [[tool.mypy.overrides]]"


IMPORTING = [
    path for folder in ("tests", "benchmarks", "docs/tutorials", "examples") for path in (ROOT / folder).glob("*.py")
]


@pytest.mark.parametrize("path", sorted(IMPORTING), ids=str)
def test_what_tests_benchmarks_and_examples_import_is_there(path):
    """Also in the programs that tests write out as text."""
    imports = r"^from (icl_ft_fast[\w.]*) import (?:\(([^)]*)\)|([\w, ]*))"
    for target, *names in re.findall(imports, path.read_text(encoding="utf-8"), re.MULTILINE):
        module = target.removeprefix("icl_ft_fast").lstrip(".")
        assert module in MODULES, f"{target}: no such module"
        there = {name for node in TREES[module].body for name in defined(node)} | MODULES.keys() | {"_C"}
        there |= set() if module else {*icl_ft_fast.__all__}
        for name in re.findall(r"(\w+)(?: as \w+)?", "".join(names)):
            assert {name, f"{module}.{name}"} & there, f"{target} has no {name}"


def defined(node):
    """Names that a statement of a module's top level defines."""
    for part in ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign | ast.If | ast.Try) else [node]:
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.ClassDef | ast.FunctionDef):
            yield part.name
        elif isinstance(part, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in part.names)


def test_the_oldest_constraints_are_the_lower_bounds():
    """What CONSTRAINTS=constraints-oldest.txt installs is what pyproject.toml says that it allows."""
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = "\n".join([*configured["dependencies"], *configured["optional-dependencies"]["test"]])
    pinned = re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    assert {name for name, _ in pinned} == {"torch", "triton", "transformers"}
    for name, version in pinned:
        [bound] = re.findall(rf"^{name}>=([\d.]+)", stated, re.MULTILINE)
        assert version in (bound, f"{bound}.0"), (
            f"{name}: {version} in constraints-oldest.txt, {bound} in pyproject.toml"
        )


def test_hosted_tests_run_on_every_python_that_is_stated():
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    stated = [c.rpartition(" ")[2] for c in configured["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["matrix"]["strategy"]["matrix"]
    assert matrix["python"] == stated
    assert all((ROOT / file).is_file() for file in matrix["constraints"])
    wheels = configured["tool"]["cibuildwheel"]["build"].split()
    assert wheels == [f"cp{version.replace('.', '')}-*" for version in stated]


def test_every_room_is_there_and_says_what_it_is():
    assert ROOMS.keys() == {room(name) for name in MODULES} | {"_C"}
    for name in ROOMS.keys() - {"_C"}:
        assert (ast.get_docstring(TREES[name]) or "").strip(), f"{name or 'the facade'}: no docstring"


def run_python(code):
    """Standard output of a fresh interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = {"torch", "transformers", "tokenizers", "triton", "numpy", "icl_ft_fast.engine.model"}


def test_importing_the_package_is_light():
    loaded = "import sys, icl_ft_fast as iff; {}; print(*sys.modules)"
    assert HEAVY.isdisjoint(run_python(loaded.format("dir(iff)")).split())
    assert HEAVY.isdisjoint(run_python(loaded.format("iff.Question, iff.TaskError, iff.UserError")).split())
    scoring = (
        "import sys, torch, icl_ft_fast as iff; iff.score; print(*sys.modules); print(torch.cuda.is_initialized())"
    )
    modules, cuda = run_python(scoring).splitlines()
    assert {"triton", "transformers", "tokenizers"}.isdisjoint(modules.split())
    assert cuda == "False"


def python_lines(path):
    """Lines of code: not blank, not comment, not docstring."""
    text = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and n not in docstrings for n, line in lines)


def native_lines(path):
    """Lines of C++ or CUDA: not blank, not comment."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return sum(bool(line.partition("//")[0].strip()) for line in text.splitlines())


def test_line_counters(tmp_path):
    python, native = tmp_path / "a.py", tmp_path / "a.cu"
    python.write_text(
        '"""Doc.\n\nMore.\n"""\n\n# note\nx = """a\nb"""  # two\n\n\ndef f():\n    """Doc."""\n    return x\n'
    )
    native.write_text('/* a\n b */ int x;\n// c\n\nint y; // d\n  /* e */\n#include "z"\n')
    assert python_lines(python) == 4
    assert native_lines(native) == 3


def test_line_budget():
    counts = {path: python_lines(path) for path in MODULES.values()}
    counts |= {path: native_lines(path) for path in sorted((ROOT / "csrc").iterdir())}
    assert len(counts) > 20
    largest = sorted(counts.items(), key=lambda item: -item[1])[:8]
    report = ", ".join(f"{path.relative_to(ROOT)} {count}" for path, count in largest)
    assert sum(counts.values()) <= BUDGET, f"{sum(counts.values())} lines of code, budget {BUDGET}: {report}, ..."


# What may be longer than MOST_LINES or take more than MOST_PARAMETERS, and why. A room stands for all of its functions.
MOST_LINES, MOST_PARAMETERS = 90, 8
LONG = {
    "ops.triton.trie_attention._forward": "a Triton kernel, which calls no function that holds state",
    "ops.triton.trie_attention._backward_q": "a Triton kernel, which calls no function that holds state",
    "ops.triton.trie_attention._backward_kv": "a Triton kernel, which calls no function that holds state",
    "engine.loading.load": "mostly its docstring",
}
WIDE = {
    "ops.triton": "kernels and their launchers take tensors, strides and sizes one by one",
    "ops.cpu": "the native functions' arguments",
    "ops.reference": "the signatures of the torch.library schemas",
    "engine.loading.load": "the keywords of the public API, one for each thing that a user can choose",
    "engine.model._trie_attention": "the signature of transformers' attention interface",
    "study.sweep.sweep": "a grid of lengths, batches and rounds, each of which has a default",
    "integrations.lm_eval.IclFtFastLM.__init__": "lm-evaluation-harness passes --model_args as parameters",
    "integrations.inspect_ai.IclFtFastAPI.__init__": "Inspect AI passes -M as parameters",
}


def functions(tree, prefix):
    """(dotted name, node) of every function in a tree, methods and inner functions included."""
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}.{node.name}" if hasattr(node, "name") else prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
        yield from functions(node, name)


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short_and_take_few_parameters(module):
    for name, node in functions(TREES[module], module):
        given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        parameters = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
        lines = node.end_lineno - node.lineno + 1
        assert lines <= MOST_LINES or name in LONG, f"{name}: {lines} lines"
        known = name in WIDE or room(module) in WIDE or module in WIDE
        assert len(parameters) <= MOST_PARAMETERS or known, f"{name}: {len(parameters)} parameters: {parameters}"


def test_one_class_a_name():
    homes = {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module)
    doubles = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not doubles


def test_what_the_quick_tests_leave_out_is_there():
    listed = re.search(r"^SLOW := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for name in listed.replace("\\", "").split():
        assert (ROOT / "tests" / f"test_{name}.py").exists(), name


def test_no_drawer_for_everything():
    generated = {"build", "out", "node_modules"}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name[0] != "." and name not in generated]
        for name in files:
            assert not re.fullmatch(r"(utils?|common|helpers?|misc)\.(py|h|cpp|cu)", name), f"{folder}/{name}"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_read_can_run_code(name):
    assert IMPORTS[name][1].isdisjoint({"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            assert called not in ("torch.load", "torch.save"), f"{MODULES[name].name}:{node.lineno}: {called}"
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert {alias.name for alias in node.names}.isdisjoint({"load", "save"}), f"{MODULES[name].name}"


# Writers that need no replacing(): what they write to, and why a reader never finds half of it.
WRITES_OTHERWISE = {
    ("engine.meters", "write_text"): "/proc/self/clear_refs, which is no file",
    ("finetuning.checkpoint", "write_text"): "a folder that gets its name when it is whole",
    ("finetuning.checkpoint", "save_file"): "the same folder",
}


def writes(tree):
    """(name of the call, line) of every call that writes a file outside of a `with replacing(...)` block."""
    inside = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.With)
        and any(getattr(getattr(item.context_expr, "func", None), "id", "") == "replacing" for item in block.items)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in inside:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            said = [part for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Constant)]
            is_open = name == "open" and any(re.fullmatch(r"[wx]\+?[bt]?", str(part.value)) for part in said)
            if is_open or name in ("write_text", "write_bytes", "save_file"):
                yield name, node.lineno


def test_the_finder_of_writers():
    tree = ast.parse(
        "p.write_text('a')\nwith replacing(p) as q:\n    q.write_bytes(b'')\np.open('wb')\np.open('a')\nopen(p)"
    )
    assert list(writes(tree)) == [("write_text", 1), ("open", 4)]


@pytest.mark.parametrize("name", MODULES)
def test_every_file_is_replaced_whole_or_left_alone(name):
    for call, line in writes(TREES[name]):
        assert (name, call) in WRITES_OTHERWISE, (
            f"{MODULES[name]}:{line}: {call}() may leave half a file; see replacing()"
        )


def test_public_names_are_the_same_for_type_checkers():
    checked = {
        (f"{node.module.removeprefix('icl_ft_fast.')}", alias.name)
        for block in TREES[""].body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname
    }
    assert checked == {(home, name) for name, home in icl_ft_fast._HOMES.items()}
    assert {*icl_ft_fast.__all__} <= {*dir(icl_ft_fast)}
    with pytest.raises(AttributeError, match="'nothing'"):
        icl_ft_fast.nothing  # noqa: B018


EXAMPLES = {
    name: doctest.DocTestParser().get_examples(inspect.getdoc(getattr(icl_ft_fast, name)) or "")
    for name in icl_ft_fast.__all__
}


def test_public_functions_have_an_example():
    functions = {name for name in icl_ft_fast.__all__ if inspect.isfunction(getattr(icl_ft_fast, name))}
    assert {name for name in functions if not EXAMPLES[name]} == set()


@pytest.mark.parametrize("name", [name for name, examples in EXAMPLES.items() if examples])
def test_public_example(name, tmp_path, monkeypatch):
    """With nothing but `import icl_ft_fast as iff`, on the shipped model."""
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTest(EXAMPLES[name], {"iff": icl_ft_fast}, name, None, None, None)
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize("name", icl_ft_fast.__all__)
def test_the_public_api_is_documented(name):
    public = getattr(icl_ft_fast, name)
    assert public.__module__.startswith("icl_ft_fast.")
    documented = {name: public}
    if inspect.isclass(public):
        documented |= {
            f"{name}.{attribute}": value
            for attribute, value in vars(public).items()
            if attribute[0] != "_" and (callable(value) or isinstance(value, property | staticmethod))
        }
    for what, value in documented.items():
        doc = value.__doc__ or ""
        # dataclass and NamedTuple write a docstring that only repeats the signature
        assert doc.strip(), f"{what} has no docstring"
        assert not doc.startswith(f"{public.__name__}("), f"{what} has no docstring of its own"


def readme_blocks():
    """(line, code) of the README's python blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [
        pytest.param(match[1], id=f"line{text[: match.start()].count(chr(10)) + 1}")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


def test_the_readme_shows_the_api():
    assert readme_blocks()


@pytest.mark.parametrize("code", readme_blocks())
def test_readme_block_runs(code, tmp_path, monkeypatch, llama_directory):
    if not (PACKAGE / "shipped" / "model").is_dir():  # an edition without weights: any model shows that the code runs
        load = icl_ft_fast.load
        monkeypatch.setattr(icl_ft_fast, "load", lambda name: load(llama_directory if name == "shipped" else name))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_stub_names_what_the_native_module_has():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    assert {node.name for node in stub.body if isinstance(node, ast.FunctionDef)} == {
        name for name in vars(_C) if not name.startswith("_")
    }
