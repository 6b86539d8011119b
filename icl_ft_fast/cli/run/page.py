"""The report as one page: written by `icl-ft-fast report --out` and at the end of `icl-ft-fast demo`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from icl_ft_fast.cli.options import UsageError
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.markdown import markdown
from icl_ft_fast.runtime.durable import replacing


def check_page(path: Path) -> None:
    """Raise UsageError where the extra `report` is missing, which a page needs."""
    try:
        import_module("icl_ft_fast.report.page")
    except ModuleNotFoundError as error:
        raise UsageError(f"{path}: a report needs {error.name}: pip install 'icl_ft_fast[report]'") from error


def write_page(path: Path, studies: list[Derived], queries: float | None, tolerance: float) -> None:
    """Write the report of studies as one page, of Markdown where the name ends in .md; raises as check_page() does."""
    if path.suffix == ".md":
        text = markdown(studies, queries, tolerance)
    else:
        check_page(path)
        from icl_ft_fast.report import page

        text = page.render(studies, queries, tolerance)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"Written to {path}")
