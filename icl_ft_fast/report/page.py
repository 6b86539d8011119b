"""The study as one HTML file that needs nothing else: charts inline, no script, style or font from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from statistics import fmean, median
from typing import Any

import jinja2
import markupsafe

from icl_ft_fast.engine.ledger import HOW
from icl_ft_fast.report import charts
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.table import break_even_words, count, interval_words
from icl_ft_fast.report.verdict import verdict_of, why_none
from icl_ft_fast.runtime.printable import amount, printable
from icl_ft_fast.study.arms import recorded_arm
from icl_ft_fast.study.settings import NORMALIZATIONS

FIGURES = {
    "wall_s": "wall s",
    "device_s": "device s",
    "request_tokens": "request tokens",
    "forwarded_tokens": "forwarded tokens",
    "trained_tokens": "trained tokens",
    "decoded_tokens": "decoded tokens",
    "flops": "FLOP",
    "moved_bytes": "bytes moved",
    "kv_bytes": "KV bytes",
    "activation_bytes": "activation bytes",
    "joules": "J",
}
LISTED = 4000  # questions in the page's table; the rest are counted
LIFETIMES = (1, 10, 100, 1000, float("inf"))  # queries per cache lifetime in the sensitivity tables


def render(studies: Sequence[Derived], queries: float | None = None, points: float = 2.0) -> str:
    """The page of one study, or of several side by side; `queries` and `points` are decide()'s."""
    parts = [_part(study, f"s{i}", queries, points, LISTED // len(studies)) for i, study in enumerate(studies)]
    return _environment().get_template("page.html").render(parts=parts, title=" · ".join(s.name for s in studies))


def fragment(study: Derived) -> str:
    """A study's charts and decision for a notebook, without the page around them."""
    return _environment().get_template("fragment.html").render(part=_part(study, "n", None, 2.0, 0))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icl_ft_fast.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.policies["json.dumps_function"] = lambda value, **options: json.dumps(_shown(value), **options)
    environment.filters |= {"count": count, "title_of": _title, "figure": _figure, "amount": amount, "told": _told}
    environment.filters |= {"break_even_words": break_even_words, "interval_words": interval_words}
    return environment


def _shown(value: Any) -> Any:
    """A value with every text in it made printable(); texts that are markup already stay so."""
    if isinstance(value, str):
        return type(value)(printable(value))
    if isinstance(value, dict):
        return {_shown(name): _shown(each) for name, each in value.items()}
    return [_shown(each) for each in value] if isinstance(value, list | tuple) else value


def _part(study: Derived, key: str, queries: float | None, points: float, limit: int) -> dict[str, Any]:
    """What the template needs of a study; every text in it is escaped there."""
    wrong, num_wrong = study.wrong(limit)
    verdict = verdict_of(study, queries, points) if queries else None
    drawn = charts.draw(study, queries, points)
    fits = study.fits()
    pairs = study.break_evens.get("seconds", ())
    trained, rivals = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    phases = _phases(study)
    by_normalization = [(arm, [study.accuracy_by(arm, name) for name in NORMALIZATIONS]) for arm in study.arms]
    known = [name for name in FIGURES if any(phase[name] is not None for *_, phase in phases)]
    return {
        "key": key,
        "study": study,
        "results": study.results,
        "charts": {chart.name: {"title": chart.title, "alt": chart.alt, "svg": _inline(chart, key)} for chart in drawn},
        "ceilings": study.results.machine.get("ceilings"),
        "phases": phases,
        "figures": {name: FIGURES[name] for name in known},
        "unavailable": [title for name, title in FIGURES.items() if name not in known],
        "how": HOW,
        "paired": study.paired,
        "normalizations": NORMALIZATIONS,
        "by_normalization": [(arm, its) for arm, its in by_normalization if None not in its],
        "harms": [(arm, harm) for arm in study.arms if (harm := study.harm(arm)) is not None],
        "rivals": rivals,
        "break_evens": [
            (resource, way, study.against_icl(way, points), [found.get((way, rival)) for rival in rivals])
            for way in trained
            for resource, found in study.break_evens.items()
        ],
        "lifetimes": LIFETIMES,
        "sensitivity": [(way, study.sensitivity(way, LIFETIMES)) for way in trained] if fits else [],
        "by_batch": [(way, study.sensitivity_to_batch(way, LIFETIMES)) for way in trained],
        "points": points,
        "fits": fits
        and [(name, f.coefficients, f.residuals) for name, f in zip(("reading", "query"), fits, strict=True)],
        "decision": verdict and verdict.decision,
        "verdict": verdict,
        "why_none": why_none(study) if queries and verdict is None else "",
        "num_seeds": len({run.seed for run in study.results.runs}),
        "best": _best(study),
        "unit": study.decided_by[1],
        "wrong": wrong,
        "num_wrong": num_wrong,
        "samples": [(run, sample) for run in study.results.runs for sample in run.samples],
    }


def _best(study: Derived) -> str:
    """The most accurate arm that can be chosen, with its accuracy."""
    arms = [arm for arm in study.arms if not recorded_arm(arm).asking.is_control]
    found = {arm: accuracy for arm in arms if (accuracy := study.mixed_accuracy(arm, study.common_seeds)) is not None}
    if not found:
        return "-"
    arm = max(found, key=found.__getitem__)
    return f"{_title(arm)} ({found[arm]:.3f})"


def _phases(study: Derived) -> list[tuple[str, str, dict[str, float | None]]]:
    """(arm, phase, mean of each figure over seeds, None where one is lacking); saving and loading from the sweep."""
    found: dict[tuple[str, str], list[dict[str, float | None]]] = {}
    for run in study.results.runs:
        for name, phase in run.counts["phases"].items():
            found.setdefault((run.arm, name), []).append(phase)
    rows = []
    for (arm, name), phases in found.items():
        values = {figure: [phase.get(figure) for phase in phases] for figure in FIGURES}
        means = {
            figure: None if None in some else fmean(v for v in some if v is not None) for figure, some in values.items()
        }
        rows.append((arm, name, means))
    if (own := study.own_point) is not None and own.load_s:
        files = {"load": own.load_s, "save": own.save_s}
        way = study.ways_of(study.in_context_arm or "")[-1]
        rows += [(way, name, dict.fromkeys(FIGURES) | {"wall_s": median(s)}) for name, s in files.items()]
    return rows


def _inline(chart: charts.Chart, key: str) -> markupsafe.Markup:
    """The chart's SVG, hidden from screen readers: its figure has the words. matplotlib escapes the texts in it."""
    text = charts.svg(charts.Chart(f"{key}-{chart.name}", chart.title, chart.alt, chart.figure), variables=True)
    return markupsafe.Markup(text.replace("<svg ", '<svg aria-hidden="true" ', 1))


def _figure(value: float | int | None) -> str:
    """A figure with a prefix: 12.3 G; a dash where it is unavailable."""
    if value is None:
        return "-"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:,.3g} {prefix}"
    return f"{value:,.3g}"


def _told(text: str) -> markupsafe.Markup:
    """A sentence of ours with its `code` in marks of HTML, all else escaped."""
    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def _title(arm: str) -> str:
    return recorded_arm(arm).title
