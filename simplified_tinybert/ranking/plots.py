"""The look of this project's pictures, and the one of effectiveness against speed; matplotlib is imported to draw."""
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simplified_tinybert.common.files import atomic_writer

INK, FAINT = "#333333", "#dddddd"
POINT, TEACHER, LINE = "#1f6fb4", "#d9822b", "#8c8c8c"
# Where the name of a point may stand: to the right, left, above, below it, and at the corners
PLACES = [(9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top"),
          (7, 7, "left", "bottom"), (-7, 7, "right", "bottom"), (7, -7, "left", "top"), (-7, -7, "right", "top"),
          (0, 22, "center", "bottom"), (0, -22, "center", "top")]


@dataclass
class Point:
    """A system of the picture; without a speed it becomes a horizontal line."""
    name: str
    value: float
    speed: float | None = None          # pairs per second
    teacher: bool = False


def new_figure(panels: int, width: float = 5.0, height: float = 3.4) -> Any:
    """A figure of so many panels side by side (inches each), whose axes are `figure.axes`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(1, panels, squeeze=False)
    return figure


def style(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def save(figure: Any, path: Path) -> None:
    """As a PNG that is legible at the width of a README."""
    with atomic_writer(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=110)


def plain_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """1, 2, 5, 10, 20, ... from `low` to `high` as they are usually written; of a long range 1, 10, 100, ... only."""
    for digits in ((1, 2, 5), (1,)):
        ticks = [digit * 10.0 ** power for power in range(-6, 10) for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 9:
            break
    return ticks, [f"{tick:,g}" if tick < 1e6 else f"{tick:,.0f}" for tick in ticks]


def effectiveness_figure(points: list[Point], measure: str, title: str) -> Any:
    """Points of (speed, value), speed on a logarithmic axis, lines for what has no speed, each with its name.

    One of them at least has a speed.
    """
    figure = new_figure(1, width=6.4, height=4.2)
    axes, = figure.axes
    placed, lines = [point for point in points if point.speed], [point for point in points if not point.speed]
    slowest, fastest = (choose(point.speed for point in placed) for choose in (min, max))
    low, high = slowest / 2, fastest * max(2.0, (fastest / slowest) ** 0.45)                # room for the names
    axes.set_xscale("log")
    axes.set_xticks(*plain_ticks(low, high))
    axes.minorticks_off()
    axes.set_xlim(low, high)
    values = [point.value for point in points]
    margin = 0.12 * (max(values) - min(values)) or 0.05
    axes.set_ylim(min(values) - margin, max(values) + margin)
    for point in lines:
        axes.axhline(point.value, color=LINE, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    for point in placed:
        axes.plot(point.speed, point.value, marker="D" if point.teacher else "o", markersize=8 if point.teacher else 7,
                  color=TEACHER if point.teacher else POINT, zorder=3)
    axes.grid(color=FAINT, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("pairs per second", fontsize=9.5, color=INK)
    axes.set_ylabel(measure, fontsize=9.5, color=INK)
    style(axes, title)
    _name_all(figure, axes, placed, lines)
    return figure


def _name_all(figure: Any, axes: Any, points: list[Point], lines: list[Point]) -> None:
    """Write the names where they cover neither each other nor a point nor, if it can be had, a line."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()                                # settles where everything stands, in pixels
    pixels = {point.name: axes.transData.transform((point.speed, point.value)) for point in points}
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in pixels.values()]
    lined = []
    for line in lines:
        y = axes.transData.transform((1, line.value))[1]
        lined.append(Bbox.from_extents(axes.bbox.x0, y - 2, axes.bbox.x1, y + 2))
    for line in sorted(lines, key=lambda line: -line.value):                    # at the left end, above or below it
        places = [(x, dy, side, "bottom" if dy > 0 else "top")
                  for x, side in ((0.01, "left"), (0.99, "right"), (0.5, "center")) for dy in (2, -2)]
        choices = [dict(xy=(x, line.value), xycoords=axes.get_yaxis_transform(), xytext=(0, dy), ha=ha, va=va)
                   for x, dy, ha, va in places]
        taken.append(_write(axes, line.name, LINE, choices, taken, lined))
    for point in sorted(points, key=lambda point: -point.value):
        choices = [dict(xy=(point.speed, point.value), xytext=(dx, dy), ha=ha, va=va) for dx, dy, ha, va in PLACES]
        name = f"{point.name} (teacher)" if point.teacher and "teacher" not in point.name.lower() else point.name
        taken.append(_write(axes, name, TEACHER if point.teacher else POINT, choices, taken, lined))


def _write(axes: Any, name: str, colour: str, choices: list[dict], taken: list, lined: list) -> Any:
    """Write a name in the first place of least overlap, and return its box."""
    def text(choice: dict) -> Any:
        return axes.annotate(name, textcoords="offset points", fontsize=9, color=colour, parse_math=False, zorder=4,
                             annotation_clip=False, in_layout=False, **choice)

    def cost(box: Any) -> float:
        inside = _overlap(box, [axes.bbox])
        return 10 * (box.width * box.height - inside) + 10 * _overlap(box, taken) + _overlap(box, lined)

    costs = []
    for choice in choices:
        tried = text(choice)
        costs.append(round(cost(tried.get_window_extent()), 3))
        tried.remove()
    return text(choices[costs.index(min(costs))]).get_window_extent()


def _overlap(box: Any, others: Iterable[Any]) -> float:
    """Square pixels that `box` shares with the others."""
    return sum(max(0.0, min(box.x1, other.x1) - max(box.x0, other.x0))
               * max(0.0, min(box.y1, other.y1) - max(box.y0, other.y0)) for other in others)
