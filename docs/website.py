"""Build the documentation site into build/site: `make docs`. A broken link or an unknown reference is an error.

The pages of docs/, the README, the log and the results are gathered in build/pages, and the tutorials with their output
as `make tutorials` left them; a page for each part of the public API is made from its docstrings; the navigation is the
index's. Beside every page lies its Markdown, and llms.txt lists them for language models.
"""

import logging
import re
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"

# Pages from outside docs/ and what they are called in the site; the README is its first page.
OTHERS = {
    "README.md": "index.md",
    "docs/index.md": "contents.md",
    "LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/README.md": "speed.md",
}
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")
TUTORIALS = {f"docs/tutorials/{path.name}": path for path in sorted((ROOT / "docs" / "tutorials").glob("*.py"))}
RENDERED = ROOT / "build" / "tutorials"
# The public names by the room that they live in, as a reader looks for them.
TOPICS = {
    "engine": "Scoring and generation",
    "tasks": "Tasks",
    "augmentation": "Augmentation",
    "finetuning": "Fine-tuning",
    "study": "Study",
    "report": "Report",
    "runtime": "Errors",
}


def gather() -> None:
    """Copy every page, with its links turned to where their targets are in the site."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.py", "*.yml", "__pycache__"))
    (PAGES / "index.md").unlink()
    sources = {path.relative_to(ROOT).as_posix(): path.name for path in (ROOT / "docs").glob("*.md")} | OTHERS
    tutorials = {name: f"tutorials/{path.stem}.md" for name, path in TUTORIALS.items()}
    targets = sources | tutorials
    for path in TUTORIALS.values():
        if not (RENDERED / f"{path.stem}.md").exists():
            raise SystemExit(f"{path.stem}: has not been run; run `make tutorials`")
        for file in (path, *RENDERED.glob(f"{path.stem}*.*")):
            shutil.copyfile(file, PAGES / "tutorials" / file.name)
    for source, name in sources.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        folder = (ROOT / source).parent

        def turned(match: re.Match[str], folder: Path = folder, source: str = source) -> str:
            target = (folder / match[2]).resolve()
            if not target.exists() or not target.is_relative_to(ROOT):
                raise SystemExit(f"{source}: {match[2]}: there is no such file")
            path = target.relative_to(ROOT).as_posix()
            return f"{match[1]}{targets.get(path) or linked(path)}{match[3] or ''}{match[4]}"

        (PAGES / name).write_text(LINK.sub(turned, text), encoding="utf-8")


def linked(path: str) -> str:
    """A file that is no page: where it lies in the site; those outside docs/ are copied there as text."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        raise SystemExit(f"{path}: a folder has no page; link to a file in it")
    copy = PAGES / "source" / f"{path}.txt"
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / path, copy)
    return copy.relative_to(PAGES).as_posix()


def api() -> dict[str, str]:
    """Write a page for each topic of the public API; their titles and files."""
    spec = spec_from_file_location("public", ROOT / "icl_ft_fast" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    public = module_from_spec(spec)
    spec.loader.exec_module(public)
    names: dict[str, list[str]] = {}
    for name, module in public._HOMES.items():
        names.setdefault(TOPICS[module.partition(".")[0]], []).append(f"icl_ft_fast.{module}.{name}")
    pages = {title: f"api/{title.lower().replace(' ', '-')}.md" for title in TOPICS.values()}
    (PAGES / "api").mkdir()
    for title, file in pages.items():
        blocks = "\n\n".join(f"::: {name}" for name in sorted(names[title], key=lambda name: name.rpartition(".")[2]))
        (PAGES / file).write_text(f"# {title}\n\nEach name is an attribute of `icl_ft_fast`.\n\n{blocks}\n", "utf-8")
    return pages


def navigation(api_pages: dict[str, str]) -> list[dict[str, object]]:
    """The sections of the index, the API behind its guides and references."""
    nav: list[dict[str, object]] = [{"Overview": "index.md"}]
    for section in re.split(r"^## ", (PAGES / "contents.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        files = [name for name in re.findall(r"\]\(([\w/-]+\.md)", body) if (PAGES / name).exists()]
        nav.append({title.strip(): list(dict.fromkeys(files))})
    nav.insert(-1, {"API": [{title: file} for title, file in api_pages.items()]})
    return [*nav, {"All pages": "contents.md"}]


def for_models() -> None:
    """The Markdown of each page beside it, and llms.txt."""
    lines = [
        "# icl_ft_fast",
        "",
        "> In context, retrieved, fine-tuned or augmented? Measured on your model and documents.",
        "",
    ]
    for page in sorted(PAGES.rglob("*.md")):
        name = page.relative_to(PAGES)
        shutil.copyfile(page, SITE / name)
        text = page.read_text(encoding="utf-8")
        title = next((line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")), name.stem)
        lines.append(f"- [{title}]({name.as_posix()})")
    (SITE / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Build it."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    gather()
    nav = navigation(api())
    config = load_config(str(ROOT / "docs" / "mkdocs.yml"), docs_dir=str(PAGES), site_dir=str(SITE), nav=nav)
    build(config)
    for_models()
    print(f"{sum(1 for _ in SITE.rglob('index.html'))} pages in {SITE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
