"""Pictures of the benchmarks: line charts and bar charts. Not a command."""
from dataclasses import dataclass, field
from math import exp, inf, log
from pathlib import Path

from simplified_tinybert.ranking.presentation import FAINT, INK, new_figure, number, plain_ticks, save, style

COLOURS = {"original": "#8c8c8c", "sentence-transformers": "#d9822b", "sentence-transformers, bf16": "#e8b27a",
           "ours": "#1f6fb4", "ours, int8": "#b4457a", "ours, from texts": "#6ba3d6", "ours, bf16": "#2a9d6f",
           "ours, masked": "#6a4fb0", "ours, masked, bf16": "#a58fd8"}


@dataclass
class Panel:
    """`lines`: {name: {x: y}}, or `bars`: {group: {name: value}}. `y_label` names the values in both."""
    title: str
    y_label: str
    x_label: str = ""
    lines: dict[str, dict[float, float]] = field(default_factory=dict)
    bars: dict[str, dict[str, float]] = field(default_factory=dict)


def draw(path: Path, panels: list[Panel]) -> None:
    """Save panels side by side as a PNG."""
    figure = new_figure(len(panels))
    for axes, panel in zip(figure.axes, panels):
        _bars(axes, panel) if panel.bars else _lines(axes, panel)
        style(axes, panel.title)
    save(figure, path)


def _lines(axes: object, panel: Panel) -> None:
    xs = sorted({x for points in panel.lines.values() for x in points})
    for name, points in panel.lines.items():
        colour = COLOURS.get(name, INK)
        axes.plot(list(points), list(points.values()), marker="o", markersize=4, color=colour, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()
    ys = [y for points in panel.lines.values() for y in points.values()]
    low, high = min(ys) / 1.25, max(ys) * 1.25
    axes.set_yticks(*plain_ticks(low, high))
    axes.set_ylim(low, high)
    axes.set_xlim(xs[0] * 0.88, xs[-1] * max(xs[-1] / xs[0], 2.0) ** 0.65)       # leaves room for the names
    _label_ends(axes, panel.lines)
    axes.set_xlabel(panel.x_label, fontsize=9.5, color=INK)
    axes.set_ylabel(panel.y_label, fontsize=9.5, color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)


def _label_ends(axes: object, lines: dict[str, dict[float, float]]) -> None:
    """Write names at the ends of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, last = 0.085 * log(high / low), -inf
    for name, points in sorted(lines.items(), key=lambda item: list(item[1].values())[-1]):
        x, y = list(points.items())[-1]
        last = max(log(y), last + gap)
        axes.annotate(name, (x, y), xytext=(x * 1.1, exp(last)), fontsize=9, va="center", color=COLOURS.get(name, INK))


def _bars(axes: object, panel: Panel) -> None:
    position, ticks = 0.0, []
    longest = max(value for values in panel.bars.values() for value in values.values())
    for group, values in panel.bars.items():
        ticks.append((position + (len(values) - 1) / 2, group))
        for name, value in values.items():
            axes.barh(position, value, height=0.85, color=COLOURS.get(name, INK))
            axes.text(value + longest * 0.015, position, f"{number(value)}  {name}", va="center", fontsize=8.5,
                      color=INK)
            position += 1
        position += 0.7
    axes.set_yticks(*zip(*ticks))
    axes.set_xlim(0, longest * 1.5)
    axes.invert_yaxis()
    axes.set_xlabel(panel.y_label, fontsize=9.5, color=INK)
    axes.tick_params(axis="y", length=0)
