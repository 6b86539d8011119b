"""The work of `icl-ft-fast report`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from icl_ft_fast.cli.options import Terminal, UsageError, check_new
from icl_ft_fast.cli.run.compare import derived_settings, prices_of, print_decision, service_of
from icl_ft_fast.cli.run.page import write_page
from icl_ft_fast.report import table
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.rows import check_format, write_rows
from icl_ft_fast.report.tracking import track
from icl_ft_fast.report.verdict import summary


def run_report(options: argparse.Namespace) -> None:
    """`icl-ft-fast report`."""
    prices = prices_of(options)
    if options.out is not None:
        check_new(options.out, options.overwrite)
    if options.rows is not None:
        check_format(options.rows)
        check_new(options.rows, options.overwrite, option="--rows")
    settings = derived_settings(options, prices, service_of(options))
    studies = [Derived.read(path, **settings) for path in options.results]
    names = [study.name for study in studies]
    studies = [
        replace(s, name=str(p)) if names.count(s.name) > 1 else s for s, p in zip(studies, options.results, strict=True)
    ]
    queries = options.queries_per_day and options.queries_per_day * options.days
    if options.json:
        print(json.dumps([summary(study, queries, options.tolerance) for study in studies]))
    elif options.out is options.charts is options.rows is options.report_to is None:
        console = Terminal()
        for study in studies:
            console.print(f"{study.name}:", highlight=False, markup=False)
            table.print_study(study, console, options.tolerance)
            print_decision(study, options, console)
    if options.rows is not None:
        print(f"{write_rows(studies, options.rows):,} rows written to {options.rows}")
    if options.report_to is not None:
        print(f"{track(studies, options.report_to):,} runs logged to {options.report_to}")
    if options.charts is not None:
        try:
            from icl_ft_fast.report.study import Study
        except ModuleNotFoundError as error:
            raise UsageError(f"--charts: needs {error.name}: pip install 'icl_ft_fast[report]'") from error
        for study in studies:
            Study(study).export(options.charts, queries, overwrite=options.overwrite)
        print(f"Charts written to {options.charts}")
    if options.out is not None:
        write_page(options.out, studies, queries, options.tolerance)
