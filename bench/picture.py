"""The trade-off picture: quality against size and against seconds a pair, intervals drawn, Pareto front marked."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramlite.errors import GramliteError
from gramlite.storage import atomic_output
from gramlite.terminal import visible

from .comparison import RunComparison
from .folder import Run
from .measures import Measure
from .statistics import NOTHING, Estimate, pareto_front

INK, ACCENT, MUTED, LINE = "#1a1b1e", "#0b57d0", "#5a5f66", "#d6d9de"
THEME = {INK: "var(--ink)", ACCENT: "var(--accent)", MUTED: "var(--muted)", LINE: "var(--line)"}
STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
}
LABEL_PLACES = [(dx, dy) for dy in (5, -13, 17, -25, 29, -37) for dx in (6, -6)]  # in points from the marker


@dataclass(frozen=True)
class Point:
    """A model in a panel: its cost on the x axis, its quality with interval in percent."""

    name: str
    cost: float
    quality: Estimate
    is_base: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture: what lies on the axes, and the models that have both."""

    key: str
    title: str
    cost_label: str
    quality_label: str
    points: Sequence[Point]

    @property
    def front(self) -> list[int]:
        """Indices of the points on the Pareto front, by rising cost."""
        costs, qualities = [p.cost for p in self.points], [p.quality.value for p in self.points]
        return sorted(pareto_front(costs, qualities), key=lambda index: costs[index])

    def describe(self) -> str:
        """The picture in words, for those who do not see it."""
        best = ", ".join(self.points[index].name for index in self.front)
        return f"{self.title}: {len(self.points)} models. On the Pareto front: {best}."


def panels_of(base: Run, runs: Sequence[Run], comparisons: Sequence[RunComparison]) -> list[Panel]:
    """The panels for which there are at least two models with a cost and a quality."""
    found = []
    for quality, quality_label in (("accuracy", "accuracy %"), ("agreement", f"agreement with {shown(base.name)} %")):
        for cost, cost_label in (("size", "size MB"), ("seconds", "seconds a pair")):
            points = _points(base, runs, comparisons, quality, cost)
            if sum(not point.is_base for point in points) >= 1 and len(points) >= 2:
                title = f"{quality.capitalize()} against {cost_label.removesuffix(' MB')}"
                found.append(Panel(f"{quality}-{cost}", title, cost_label, quality_label, points))
    return found


def _points(
    base: Run, runs: Sequence[Run], comparisons: Sequence[RunComparison], quality: str, cost: str
) -> list[Point]:
    def cost_of(run: Run) -> float | None:
        return run.seconds_per_pair if cost == "seconds" else (run.size_bytes or 0) / 1e6 or None

    points = []
    first = comparisons[0].measures["accuracy"].base if comparisons else None
    base_cost = cost_of(base)
    if quality == "accuracy" and first and first.n and base_cost:
        still = Estimate(first.value, first.value, first.value, first.n)
        points.append(Point(base.name, base_cost, still, is_base=True))
    for run, comparison in zip(runs, comparisons, strict=True):
        measure = comparison.measures[quality]
        estimate = _beside_base(measure) if quality == "accuracy" else measure.change
        run_cost = cost_of(run)
        if estimate.n and run_cost:
            points.append(Point(run.name, run_cost, estimate))
    return points


def _beside_base(measure: Measure) -> Estimate:
    """A run's value with the interval of its change from the base, which is what tells the two apart."""
    if not measure.base or not measure.run:
        return NOTHING
    low, high = (measure.base.value + bound for bound in (measure.change.low, measure.change.high))
    return Estimate(measure.run.value, low, high, measure.change.n)


def draw(panels: Sequence[Panel], *, columns: int = 2) -> Any:
    """A matplotlib figure of the panels; raises GramliteError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise GramliteError("Pictures need matplotlib. Type: pip install 'gramlite[bench]'") from error
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * min(columns, len(panels)), 3.7 * rows), layout="constrained")
        drawn = [figure.add_subplot(rows, min(columns, len(panels)), n + 1) for n in range(len(panels))]
        for axes, panel in zip(drawn, panels, strict=True):
            _draw_panel(axes, panel)
        figure.draw_without_rendering()  # lays the panels out, so that it is known where the points will be
        figure.set_layout_engine("none")
        for axes, panel in zip(drawn, panels, strict=True):
            _label(axes, panel)
        return figure


def _draw_panel(axes: Any, panel: Panel) -> None:
    front = panel.front
    axes.set_title(panel.title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(panel.cost_label)
    axes.set_ylabel(panel.quality_label, parse_math=False)
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    costs = [point.cost for point in panel.points]
    if max(costs) > 12 * min(costs):
        axes.set_xscale("log")
    steps = [panel.points[index] for index in front]
    values = [100 * point.quality.value for point in steps]
    axes.plot([p.cost for p in steps], values, color=ACCENT, linewidth=1.2, drawstyle="steps-post", alpha=0.6)
    for index, point in enumerate(panel.points):
        colour = ACCENT if index in front else MUTED
        value = 100 * point.quality.value
        span = [[value - 100 * point.quality.low], [100 * point.quality.high - value]]
        axes.errorbar([point.cost], [value], yerr=span, color=colour, linewidth=1.2, capsize=3, fmt="none")
        axes.plot(
            [point.cost], [value], marker="D" if point.is_base else "o", markersize=7, color=colour, linestyle="none",
            markerfacecolor=colour if index in front else "none",
        )  # fmt: skip
    for point in panel.points:
        if point.is_base:
            axes.axhline(100 * point.quality.value, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.margins(x=0.2, y=0.12)


def _label(axes: Any, panel: Panel) -> None:
    """Name each point where its name covers no other name or point, as far as that can be had."""
    scale = 72 / axes.figure.dpi

    def place(cost: float, quality: float) -> tuple[float, float]:
        x, y = axes.transData.transform((cost, 100 * quality)) * scale
        return float(x), float(y)

    at = [place(point.cost, point.quality.value) for point in panel.points]
    taken: list[tuple[float, ...]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    for (x, _), point in zip(at, panel.points, strict=True):
        low, high = place(point.cost, point.quality.low)[1], place(point.cost, point.quality.high)[1]
        taken.append((x - 1, low, x + 1, high))
    left_edge, right_edge = float(axes.bbox.x0) * scale, float(axes.bbox.x1) * scale
    for point, (x, y) in zip(panel.points, at, strict=True):
        width = 5.8 * len(shown(point.name))
        boxes = []
        for dx, dy in LABEL_PLACES:
            left = x + dx - (width if dx < 0 else 0)
            box = (left, y + dy - 2, left + width, y + dy + 9)
            outside = 1000.0 * max(0.0, left_edge - box[0], box[2] - right_edge)
            boxes.append((outside + sum(_overlap(box, other) for other in taken), dx, dy, box))
        _, dx, dy, box = min(boxes, key=lambda candidate: candidate[0])
        taken.append(box)
        axes.annotate(
            shown(point.name), (point.cost, 100 * point.quality.value), (dx, dy), textcoords="offset points",
            ha="right" if dx < 0 else "left", fontsize=9, color=INK,
            parse_math=False,
        )  # fmt: skip


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def shown(name: str) -> str:
    """A name short enough for a picture, its control characters gone."""
    text = "".join(character for character in name if character.isprintable())
    return text if len(text) <= 28 else f"{text[:27]}…"


def svg_of(figure: Any, salt: str) -> str:
    """A figure as SVG text, the same for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, **STYLE}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def inline_svg(panel: Panel) -> str:
    """A panel as SVG to be put into a page, its colours following the page's theme."""
    from html import escape

    svg = svg_of(draw([panel], columns=1), panel.key)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{panel.key}-", svg)  # ids are unique in a page
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    described = escape(visible(panel.describe()), quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{described}" ', 1)


def write_pictures(files: Sequence[Path], panels: Sequence[Panel]) -> list[Path]:
    """Write all panels to each of the files, as PNG or SVG by its name."""
    if not panels:
        return []
    figure = draw(panels)
    for path in files:
        with atomic_output(path, force=True) as temporary:
            if path.suffix == ".svg":
                temporary.write_text(svg_of(figure, "gramlite"), encoding="utf-8", errors="backslashreplace")
            else:
                figure.savefig(temporary, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return [*files]
