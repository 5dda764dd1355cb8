"""Tables in Markdown and LaTeX, and figures: how all results of this project are shown.

The first column of a table is text, the others are numbers. Matplotlib is imported on use.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simplified_tinybert.common.files import atomic_writer

INK, FAINT = "#333333", "#dddddd"
TEACHER, LINE = "#d9822b", "#8c8c8c"
LATEX = str.maketrans({"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
                       "–": "--", "×": r"$\times$", "†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$", "<": "$<$", ">": "$>$",
                       **{sign: "\\" + sign for sign in "&%$#_{}"},
                       "[": "{[}", "*": "{*}", "|": r"\textbar{}"})     # a [ or * after \\ would be its argument


def markdown(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table without a final line break; columns are padded to their widest cell."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    lines = ["| " + " | ".join(cell.rjust(width) if column else cell.ljust(width)
                               for column, (cell, width) in enumerate(zip(row, widths))) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + (":" if column else "-")
                                   for column, width in enumerate(widths)) + "|")
    return "\n".join(lines)


def number(value: float) -> str:
    """Format with three significant digits and commas for thousands."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def escape_latex(text: str) -> str:
    return text.translate(LATEX)


def latex(headings: Sequence[str], rows: Sequence[Sequence[object]], caption: str, notes: Sequence[str] = ()) -> str:
    """Return a table environment for the package booktabs, with `notes` in small print below."""
    def line(cells: Sequence[object]) -> str:
        return "    " + " & ".join(escape_latex(str(cell)) for cell in cells) + r" \\"

    footnotes = [f"  \\par\\smallskip\\footnotesize {escape_latex(note)}" for note in notes]
    columns = "l" + "r" * (len(headings) - 1)
    return "\n".join([r"% needs \usepackage{booktabs}", r"\begin{table}", r"  \centering",
                      f"  \\caption{{{escape_latex(caption)}}}", f"  \\begin{{tabular}}{{{columns}}}",
                      r"    \toprule", line(headings), r"    \midrule", *map(line, rows), r"    \bottomrule",
                      r"  \end{tabular}", *footnotes, r"\end{table}"]) + "\n"


@dataclass
class Point:
    """A system in the figure. Without a speed it is drawn as a horizontal line."""
    name: str
    value: float
    speed: float | None = None          # pairs per second
    teacher: bool = False


def new_figure(panels: int, width: float = 5.0, height: float = 3.4) -> Any:
    """Return a figure with panels side by side (`figure.axes`), each of this size in inches."""
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
    """Write a PNG that is legible at the width of a README."""
    with atomic_writer(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=110)


def plain_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return ticks 1, 2, 5, 10, 20, ... from `low` to `high` with their labels; powers of ten only in a long range."""
    for digits in ((1, 2, 5), (1,)):
        ticks = [digit * 10.0 ** power for power in range(-6, 10) for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 9:
            break
    return ticks, [f"{tick:,g}" if tick < 1e6 else f"{tick:,.0f}" for tick in ticks]


def effectiveness_figure(points: list[Point], measure: str, title: str) -> Any:
    """Plot value against speed (logarithmic); a legend names the systems. At least one of them needs a speed."""
    figure = new_figure(1, width=7.5, height=4.2)
    axes, = figure.axes
    handles = []
    for number, point in enumerate(points):
        colour, marker = (TEACHER, "D") if point.teacher else (f"C{number}", "osv^P*X"[number % 7])
        if point.speed:
            handles += axes.plot(point.speed, point.value, marker=marker, markersize=7, linestyle="none", color=colour,
                                 zorder=3)
        else:
            handles.append(axes.axhline(point.value, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1))
    speeds = [point.speed for point in points if point.speed]
    axes.set_xscale("log")
    axes.set_xticks(*plain_ticks(min(speeds) / 2, max(speeds) * 2))
    axes.minorticks_off()
    axes.set_xlim(min(speeds) / 2, max(speeds) * 2)
    axes.grid(color=FAINT, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("pairs per second", fontsize=9.5, color=INK)
    axes.set_ylabel(measure, fontsize=9.5, color=INK)
    style(axes, title)
    legend = axes.legend(handles, map(str, handles), fontsize=9, frameon=False, loc="center left",
                         bbox_to_anchor=(1.0, 0.5))
    for text, point in zip(legend.get_texts(), points):         # as plain text: names may contain $ or start with _
        teacher = " (teacher)" if point.teacher and "teacher" not in point.name.lower() else ""
        text.set(text=point.name + teacher, parse_math=False)
    return figure
