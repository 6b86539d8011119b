"""The charts, by matplotlib: drawn once in the light theme's colours, which the page replaces by its variables."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from icl_ft_fast.report.derived import ON, Derived
from icl_ft_fast.report.sensitivity import cheapest_map, tornado
from icl_ft_fast.report.table import count, interval_words
from icl_ft_fast.runtime.printable import amount, printable
from icl_ft_fast.study.arm import SYNTHETIC_TOKENS
from icl_ft_fast.study.arms import recorded_arm
from icl_ft_fast.study.settings import ARM_NAMES

# CSS variable -> its value in the light theme; each value once, so that it can be found again in the SVG.
LIGHT = {
    "ink": "#1b1f27",
    "muted": "#5a6270",
    "grid": "#dde1e8",
    "arm0": "#6a6f7b",
    "arm1": "#1f5fc4",
    "arm2": "#b4540a",
    "arm3": "#0b7a67",
    "arm4": "#7a3fd1",
    "arm5": "#b81f5c",
}
MARKS = "osD^vP"
COLOURED_FIRST = ("base", "icl", "ft", "augmented-ft", "rag@4", "rules-ft")  # often side by side: a colour each
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 2), (1, 1.5), (6, 2, 1, 2))  # of an arm's ways, in their order
PAIR_WIDTH = 34  # characters of a line beside the chart of differences
SIZE = (4.5, 3.2)  # inches: on a phone the text is still readable, on a desktop two are side by side
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "icl_ft_fast",
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["muted"],
    "axes.axisbelow": True,
    "axes.labelcolor": LIGHT["ink"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "grid.color": LIGHT["grid"],
    "axes.grid": True,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 1.6,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Chart:
    """A figure, its heading, and in words what it shows."""

    name: str
    title: str
    alt: str
    figure: Figure


def draw(study: Derived, queries: float | None = None, points: float = 2.0) -> list[Chart]:
    """Every chart that the study's results have data for; `queries` is marked where costs grow with them.

    With `queries`, also what would change the choice among ways within `points` of the best accuracy.
    """
    with mpl.rc_context(STYLE):
        made = [_accuracy(study), _paired(study), _synthetic(study), _curves(study), _by_step(study), _sweep(study)]
        made += [_amortisation(study, resource, queries) for resource in study.resources]
        priced = [resource for resource in study.resources if resource in ("seconds", "money")]
        made += [_pareto(study, resource, queries or 1e6) for resource in priced]
        if queries and study.decision_ways(study.decided_by[0]):
            made += [_tornado(study, queries, points), _map(study, queries, points)]
    return [chart for chart in made if chart is not None]


def svg(chart: Chart, *, variables: bool = False) -> str:
    """The chart as SVG; with `variables`, to be put into a page whose CSS sets the colours."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        FigureCanvasSVG(chart.figure).print_svg(buffer, metadata={"Date": None, "Title": chart.title})
    text = buffer.getvalue()
    if not variables:
        return text
    text = text[text.index("<svg") :]
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    # One page holds many of these: names are made the chart's own, and its size the page's.
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{chart.name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>", "", text, flags=re.DOTALL)
    return re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=2)


def png(chart: Chart) -> bytes:
    """The chart as PNG on white, 200 dots an inch."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        chart.figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def _axes(width: float = SIZE[0], height: float = SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _looks(study: Derived) -> dict[str, tuple[str, str]]:
    """Colour and mark of each arm, the same in every chart and every study of a page; no two arms share both."""
    known = dict.fromkeys((*COLOURED_FIRST, *ARM_NAMES, *sorted(study.arms)))
    return {arm: (LIGHT[f"arm{i % 6}"], MARKS[(i + i // 6) % 6]) for i, arm in enumerate(known)}


def _look(study: Derived, way: str) -> tuple[str, str]:
    return _looks(study)[study.arm_of(way)]


def _rank(study: Derived, way: str) -> int:
    """The place of a way among those of its arm: 0 for the plainest."""
    ways, plain = study.ways_of(study.arm_of(way)), way.partition(ON)[0]
    return ways.index(plain) if plain in ways else 0


def _accuracy(study: Derived) -> Chart | None:
    if not study.splits:
        return None
    figure, axes = _axes(height=max(_paired_height(study), 0.8 + 0.19 * len(study.splits) * (len(study.arms) + 1)))
    shown = []
    for s, split in enumerate(study.splits):
        for a, arm in enumerate(study.arms):
            if (accuracy := study.accuracy(arm, split)) is None:
                continue
            y = s + 0.7 * ((a + 0.5) / len(study.arms) - 0.5)
            low, high = study.interval(arm, split) or accuracy.interval
            colour, mark = _looks(study)[arm]
            label = recorded_arm(arm).title if s == 0 else None
            axes.plot([low, high], [y, y], color=colour)
            axes.plot([accuracy.value], [y], mark, color=colour, label=label, markersize=5)
            shown.append(f"{split}: {recorded_arm(arm).title} {accuracy.value:.2f} ({low:.2f} to {high:.2f})")
        if (chance := study.chance(split)) is not None:
            axes.plot([chance] * 2, [s - 0.42, s + 0.42], "--", color=LIGHT["ink"], label="chance" if s == 0 else None)
            shown.append(f"{split}: chance {chance:.2f}")
    axes.set(xlim=(-0.02, 1.02), ylim=(len(study.splits) - 0.5, -0.5), xlabel="accuracy")
    axes.set_yticks(range(len(study.splits)), [_wrap(split) for split in study.splits])
    axes.grid(axis="y", visible=False)
    _legend(figure, axes)
    return Chart("accuracy", "Accuracy by kind of question", "; ".join(shown), figure)


def _paired_height(study: Derived) -> float:
    """Of the chart of differences; that of accuracies beside it is no lower."""
    is_wrapped = any("\n" in _wrap(name, PAIR_WIDTH) for name in _pairs(study))
    return max(SIZE[1], 0.7 + (0.25 if is_wrapped else 0.16) * min(60, len(study.paired)))


def _pairs(study: Derived) -> list[str]:
    """What each test of differences is about."""
    return [f"{recorded_arm(t.first).title} - {recorded_arm(t.second).title}, {t.split}" for t in study.paired]


def _paired(study: Derived) -> Chart | None:
    tests = study.paired
    if not tests or len(tests) > 60:
        return None
    figure, axes = _axes(height=_paired_height(study))
    names = _pairs(study)
    for i, test in enumerate(tests):
        sure = test.p < 0.05
        colour = _looks(study)[test.first if test.difference >= 0 else test.second][0]
        axes.barh(i, test.difference, color=colour if sure else "none", edgecolor=colour, height=0.6)
        axes.plot([test.low, test.high], [i, i], color=LIGHT["ink"], linewidth=1)
    axes.axvline(0, color=LIGHT["ink"], linewidth=1)
    axes.set_yticks(range(len(tests)), [_wrap(name, PAIR_WIDTH) for name in names], fontsize=8)
    axes.set(
        xlim=(-1.05, 1.05),
        ylim=(len(tests) - 0.4, -0.6),
        xlabel="difference (filled: p < .05)",
    )
    axes.grid(axis="y", visible=False)
    shown = (f"{name} {test.difference:+.2f} (p {test.p:.3f})" for name, test in zip(names, tests, strict=True))
    return Chart("paired", "Differences on the same questions", "; ".join(shown), figure)


def _amortisation(study: Derived, resource: str, queries: float | None) -> Chart:
    unit, ways, figure_axes = study.resources[resource], study.ways(resource), _axes()
    figure, axes = figure_axes
    found = study.break_evens[resource]
    marks = [b.queries for b in found.values() if 1 <= b.queries < math.inf]
    top = 10 ** math.ceil(math.log10(max([1e4, *(3 * m for m in marks if m < 1e12), queries or 1.0])))
    n = np.geomspace(1, top, 200)
    for way, samples in ways.items():
        colour, _ = _look(study, way)
        dashes = DASHES[_rank(study, way) % len(DASHES)]
        axes.plot(n, [samples.line.cost(x) for x in n], color=colour, label=way, dashes=dashes)
    shown = []
    for (way, rival), even in found.items():
        shown.append(f"{way} against {rival}: {count(even.queries)} ({interval_words(even)})")
        if 1 <= even.queries <= top:
            colour, mark = _look(study, way)
            axes.plot([even.queries], [ways[way].line.cost(even.queries)], mark, color=colour, markersize=5)
    if queries is not None:
        axes.axvline(queries, color=LIGHT["ink"], linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="queries", ylabel=unit)
    _plain(axes.xaxis, axes.yaxis)
    _legend(figure, axes)
    alt = f"Cost in {unit} of n queries; cheaper from so many queries on: " + "; ".join(shown)
    return Chart(f"amortised-{resource.lower()}", f"Cost of n queries: {resource}", alt, figure)


def _pareto(study: Derived, resource: str, queries: float) -> Chart | None:
    ways = [way for way in study.decision_ways(resource) if not math.isinf(way.line.cost(queries))]
    if not ways:
        return None
    unit, shown = study.resources[resource], []
    figure, axes = _axes()
    for way in ways:
        colour, mark = _look(study, way.name)
        each = 1e3 * way.line.cost(queries) / queries
        hollow = "none" if _rank(study, way.name) else colour
        axes.plot([each], [way.accuracy], mark, color=colour, markerfacecolor=hollow, label=way.name, markersize=7)
        shown.append(f"{way.name}: accuracy {way.accuracy:.3f}, {amount(each)} {unit}")
    axes.set(
        xscale="log",
        ylim=(-0.03, 1.05),
        xlabel=f"{unit} per 1,000 queries, at {queries:,.0f} queries",
        ylabel="accuracy",
    )
    _plain(axes.xaxis)
    _legend(figure, axes)
    return Chart(f"pareto-{resource}", f"Accuracy against cost: {resource}", "; ".join(shown), figure)


def _tornado(study: Derived, queries: float, points: float) -> Chart | None:
    chosen, factors = tornado(study, queries, points)
    if not factors:
        return None
    figure, axes = _axes(height=0.8 + 0.42 * len(factors))
    colour, _ = _look(study, chosen)
    shown = []
    for i, one in enumerate(factors):
        low, high = sorted((one.low, one.high))
        axes.barh(i, high - low, left=low, color=colour, height=0.55)
        axes.plot([one.low], [i], "o", color=LIGHT["ink"], markersize=5, label="lower end" if i == 0 else None)
        axes.plot([one.high], [i], "D", color=LIGHT["ink"], markersize=4, label="upper end" if i == 0 else None)
        shown.append(f"{one.name}: {one.low:+.0f}% ({one.cheapest[0]}) to {one.high:+.0f}% ({one.cheapest[1]})")
    axes.axvline(0, color=LIGHT["ink"], linewidth=1)
    axes.set_yticks(range(len(factors)), [printable(one.name).replace(", ", "\n") for one in factors], fontsize=8)
    axes.set(ylim=(len(factors) - 0.4, -0.6), xlim=(-105, 105), xlabel=f"% that {printable(chosen)} saves")
    axes.grid(axis="y", visible=False)
    _legend(figure, axes)
    alt = (
        f"What {chosen} saves against the cheapest way of the other accurate arms, one input varied at a time: "
        + "; ".join(shown)
    )
    return Chart("tornado", "What would change the choice", alt, figure)


def _map(study: Derived, queries: float, points: float) -> Chart | None:
    volumes, rates, named = cheapest_map(study, queries, points)
    names = list(dict.fromkeys(name for row in named for name in row))
    figure, axes = _axes()
    counts = Counter(name for row in named for name in row)
    for i, name in enumerate(names):
        marked = [(n, k) for k, row in enumerate(named) for n, each in zip(volumes, row, strict=True) if each == name]
        known = name != "none"
        colour = _look(study, name)[0] if known else LIGHT["muted"]
        mark = MARKS[(_rank(study, name) if known else i) % len(MARKS)]
        axes.plot(*zip(*marked, strict=True), mark, color=colour, markersize=4, linestyle="none", label=printable(name))
    axes.plot([queries], [_place(rates, study.service.changes_per_month)], "x", color=LIGHT["ink"], markersize=9)
    ticks = list(range(0, len(rates), 6))
    axes.set_yticks(ticks, [f"{rates[k]:.3g}" for k in ticks])
    axes.set(xscale="log", xlabel=f"queries in {study.service.days:g} days", ylabel="changes a month")
    _plain(axes.xaxis)
    _legend(figure, axes)
    total = len(volumes) * len(rates)
    alt = "The cheapest accurate way by volume and changes of the documents: " + "; ".join(
        f"{name} in {counts[name] / total:.0%} of the map" for name in names
    )
    return Chart("map", "The cheapest way by volume and change", alt, figure)


def _place(rates: list[float], rate: float) -> float:
    """Where a rate lies on the map's axis, whose steps are one rate each."""
    return float(np.interp(rate, rates, range(len(rates))))


def _synthetic(study: Derived) -> Chart | None:
    """Accuracy against the tokens that the model wrote, of arms that ran with several budgets of them."""
    budgets: dict[str, list[tuple[float, str]]] = {}
    for arm in study.arms:
        weights, plus, asked = arm.partition("+")
        name, at, _ = weights.partition("@")
        written = [run.notes[SYNTHETIC_TOKENS] for run in study.of(arm) if SYNTHETIC_TOKENS in run.notes]
        if at and written:
            budgets.setdefault(name + plus + asked, []).append((float(np.mean(written)), arm))
    budgets = {name: sorted(its) for name, its in budgets.items() if len(its) > 1}
    if not budgets:
        return None
    figure, axes = _axes()
    shown = []
    for name, its in budgets.items():
        for s, split in enumerate(study.splits):
            found = [(tokens, arm, accuracy) for tokens, arm in its if (accuracy := study.accuracy(arm, split))]
            bounds = [study.interval(arm, split) or accuracy.interval for _, arm, accuracy in found]
            values, tokens = [accuracy.value for *_, accuracy in found], [count for count, *_ in found]
            errors = np.array([[v - low, high - v] for v, (low, high) in zip(values, bounds, strict=True)]).T
            colour, mark = _looks(study)[its[0][1]]
            axes.errorbar(
                tokens,
                values,
                np.maximum(errors, 0),
                color=colour,
                marker=mark,
                markersize=5,
                linestyle=(0, DASHES[s % len(DASHES)] or (1, 0)),
                label=f"{recorded_arm(name).title}, {split}",
            )
            told = ", ".join(f"{value:.2f} with {count:,.0f}" for value, count in zip(values, tokens, strict=True))
            shown.append(f"{recorded_arm(name).title}, {split}: {told} tokens")
    for s, split in enumerate(study.splits):  # without it a flat line at chance looks like a way that needs no text
        if (chance := study.chance(split)) is not None:
            axes.axhline(chance, linestyle="--", color=LIGHT["ink"], label="chance" if s == 0 else None)
            shown.append(f"{split}: chance {chance:.2f}")
    axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="synthetic tokens", ylabel="accuracy")
    _plain(axes.xaxis)
    _legend(figure, axes)
    return Chart("synthetic", "Accuracy by what the model wrote to train on", "; ".join(shown), figure)


def _curves(study: Derived) -> Chart | None:
    if not any(run.losses for run in study.results.runs):
        return None
    figure, axes = _axes()
    shown, named = [], set()
    for run in study.results.runs:
        if run.losses:
            colour, _ = _looks(study)[run.arm]
            title = recorded_arm(run.arm).title
            width = max(1, len(run.losses) // 100)
            losses = [float(np.mean(run.losses[i : i + width])) for i in range(0, len(run.losses), width)]
            steps = [min(i + width, len(run.losses)) for i in range(0, len(run.losses), width)]
            label = None if title in named else title
            axes.plot(
                steps, losses, color=colour, alpha=0.8, label=label, linewidth=1.2, marker="." * (len(steps) == 1)
            )
            named.add(title)
            shown.append(f"{title}, seed {run.seed}: from {losses[0]:.3f} to {losses[-1]:.3f}")
    axes.set(yscale="log", xlabel="training step", ylabel="loss, nats per token")
    _plain(axes.yaxis)
    _legend(figure, axes)
    return Chart("curves", "Training loss", "; ".join(shown), figure)


def _by_step(study: Derived) -> Chart | None:
    """Accuracy over all splits by training step, each split counting as often as it has questions."""
    if not any(run.curve for run in study.results.runs):
        return None
    figure, axes = _axes()
    shown, named = [], set()
    for run in study.results.runs:
        if not run.curve:
            continue
        total = sum(accuracy.total for accuracy in run.accuracy.values())
        values = [
            sum(point.accuracy[split] * accuracy.total for split, accuracy in run.accuracy.items()) / total
            for point in run.curve
        ]
        (colour, mark), title = _looks(study)[run.arm], recorded_arm(run.arm).title
        label = None if title in named else title
        axes.plot([point.step for point in run.curve], values, color=colour, marker=mark, markersize=4, label=label)
        named.add(title)
        listed = ", ".join(f"step {point.step} {value:.2f}" for point, value in zip(run.curve, values, strict=True))
        shown.append(f"{title}, seed {run.seed}: {listed}")
    axes.set(ylim=(-0.02, 1.02), xlabel="training step", ylabel="accuracy without documents")
    _legend(figure, axes)
    return Chart("by_step", "Accuracy by training step", "; ".join(shown), figure)


def _sweep(study: Derived) -> Chart | None:
    if (fits := study.fits()) is None:
        return None
    figure, axes = _axes()
    points = study.results.sweep.points
    lengths = np.linspace(0, max(p.context_tokens for p in points), 100)
    marks = iter(MARKS)
    for batch in study.batches:
        mine = [p for p in points if p.batch == batch]
        ms = [1e3 * float(np.median(p.query_s)) for p in mine]
        axes.plot(
            [p.context_tokens for p in mine], ms, next(marks), color=LIGHT["arm2"], label=f"query, batch of {batch}"
        )
    read = [p for p in points if p.prefill_s]
    ms = [1e3 * float(np.median(p.prefill_s)) for p in read]
    axes.plot([p.context_tokens for p in read], ms, "x", color=LIGHT["arm1"], label="reading the context")
    for fitted, colour, first in zip(fits, ("arm1", "arm2"), (min(p.context_tokens for p in read), 0), strict=True):
        within = lengths[lengths >= first]
        axes.plot(within, [1e3 * fitted(c) or math.nan for c in within], color=LIGHT[colour], linewidth=1)
    axes.set(yscale="log", xlabel="context length, tokens", ylabel="ms")
    _plain(axes.yaxis)
    _legend(figure, axes)
    off = [max(map(abs, fitted.residuals)) for fitted in fits]
    alt = (
        f"Milliseconds by context length; the fits are off by at most {off[0]:.0%} (reading) and {off[1]:.0%} (query)."
    )
    return Chart("sweep", "Query cost by context length, measured and fitted", alt, figure)


def _plain(*logarithmic: Axis) -> None:
    """Ticks of a logarithmic axis as 0.01, 10, 1k, 1M: words, not mathematics, so that they stay text in the SVG."""
    large = EngFormatter(sep="")
    words = FuncFormatter(lambda value, _: f"{value:g}" if value < 1000 else large(value))
    for axis in logarithmic:
        axis.set_major_formatter(words)
        low, high = axis.get_view_interval()
        few = high / low < 30
        axis.set_minor_formatter(words if few else NullFormatter())
        if few:
            axis.set_minor_locator(LogLocator(subs=(2, 5)))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    looks: dict[str, Any] = {"loc": "outside upper left", "fontsize": 8, "handlelength": 1.8, "columnspacing": 1.2}
    columns = 3
    while (legend := figure.legend(handles, labels, ncols=columns, **looks)).get_window_extent().x1 > figure.bbox.x1:
        if columns == 1:
            break
        legend.remove()  # its last column would be cut off
        columns -= 1
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, rows - 4))  # many ways leave no room for the axes


def _wrap(text: str, width: int = 16) -> str:
    text = printable(text)
    shown = text if len(text) <= 2 * width else text[: 2 * width - 1] + "…"
    if len(shown) <= width:
        return shown
    space = shown.rfind(" ", 0, width + 1)
    cut = space if space > 0 and len(shown) - space - 1 <= width else width
    return f"{shown[:cut]}\n{shown[cut:].lstrip()}"
