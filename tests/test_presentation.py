"""Tables in Markdown and LaTeX; the figure of effectiveness against speed: its content and legibility."""
import re

from hypothesis import given
from hypothesis import strategies as st

from simplified_tinybert.ranking import presentation
from simplified_tinybert.ranking.presentation import Point


def test_markdown():
    assert presentation.markdown(["a", "b"], [["x", 1]]) == "| a | b |\n|---|--:|\n| x | 1 |"
    assert presentation.markdown(["", "long"], [["x|y", "–"]]) == "|      | long |\n|------|-----:|\n| x\\|y |    – |"


def test_numbers_have_three_digits():
    assert [presentation.number(value) for value in (0.5, 9.87654, 12.345, 1234.5, 1e6)] == [
        "0.50", "9.88", "12.3", "1,234", "1,000,000"]


def test_latex_by_hand():
    rows = [["a_b & 50%", "0.5†‡"], ["c", "–"]]
    assert presentation.latex(["system", "AP"], rows, "50% of {it}", ["p < 0.05"]) == r"""
% needs \usepackage{booktabs}
\begin{table}
  \centering
  \caption{50\% of \{it\}}
  \begin{tabular}{lr}
    \toprule
    system & AP \\
    \midrule
    a\_b \& 50\% & 0.5$^{\dagger}$$^{\ddagger}$ \\
    c & -- \\
    \bottomrule
  \end{tabular}
  \par\smallskip\footnotesize p $<$ 0.05
\end{table}
""".lstrip()


def test_names_that_look_like_arguments_of_a_line_end():
    text = presentation.latex(["x", "y"], [["[BM25]", 1], ["*starred", 2], ["a|b", 3]], "c")
    rows = text[text.index(r"\midrule"):]
    assert not re.search(r"(\\\\|\\midrule)\s*[\[*]", rows)
    assert "{[}BM25] & 1" in rows and "{*}starred & 2" in rows and r"a\textbar{}b & 3" in rows


@given(st.lists(st.lists(st.text("ab\\&%$#_{}~^†‡<>×–é ", max_size=8), min_size=3, max_size=3), min_size=1, max_size=4))
def test_latex_is_valid_for_any_names(rows):
    lines = presentation.latex(["x", "y", "z"], rows, "caption").splitlines()
    body = lines[lines.index(r"    \midrule") + 1:lines.index(r"    \bottomrule")]
    assert len(body) == len(rows)
    for line, row in zip(body, rows):
        assert line.endswith(r" \\")
        cells = re.split(r"(?<!\\) & ", line[4:-3])
        assert cells == [presentation.escape_latex(cell) for cell in row]
        for cell in cells:
            plain = re.sub(r"\\text(backslash|asciitilde|asciicircum)\{\}|\$(<|>|\\times|\^\{\\d?dagger\})\$", "", cell)
            assert not re.search(r"[~^<>†‡×–]|(?<!\\)[&%$#_{}]|\\(?![&%$#_{}])", plain), cell


def drawn(points):
    """Return the axes, and the bounding boxes of the legend's texts by name."""
    figure = presentation.effectiveness_figure(points, "nDCG@10", "title")
    figure.canvas.draw()
    axes, = figure.axes
    return axes, {text.get_text(): text.get_window_extent() for text in axes.get_legend().get_texts()}


def test_names_cover_neither_each_other_nor_the_points():
    points = [Point("Teacher 12/768", 0.65, 5.0, True), Point("student 6/768", 0.64, 10.0),
              Point("student 3/384", 0.61, 98.0), Point("student 3/384 --bf16", 0.6105, 151.0),
              Point("standard KD 3/384", 0.600, 99.0), Point("student 3/384 --int8", 0.609, 191.0),
              Point("BM25", 0.52), Point("BM25 + RM3", 0.525)]
    axes, boxes = drawn(points)
    assert boxes.keys() == {point.name for point in points}
    listed = list(boxes.items())
    for number, (name, box) in enumerate(listed):
        assert all(not box.overlaps(other) for _, other in listed[number + 1:]), name
        assert axes.bbox.x1 <= box.x0 and box.x1 <= axes.figure.bbox.x1, name
        assert 0 <= box.y0 and box.y1 <= axes.figure.bbox.y1, name
    handles = axes.get_legend().legend_handles
    assert len({(handle.get_color(), handle.get_marker(), handle.get_linestyle()) for handle in handles}) == len(points)


def test_figures_of_odd_systems():
    """A single point; names that look like formulas or start with _; a teacher with another name; equal values."""
    assert drawn([Point("$x_1$ ü", 0.5, 3.0, True)])[1].keys() == {"$x_1$ ü (teacher)"}
    axes, boxes = drawn([Point("_a", 0.5, 1e5), Point("b", 0.5, 2.0), Point("c", 0.5)])
    assert boxes.keys() == {"_a", "b", "c"}
    low, high = axes.get_xlim()
    labels = [text.get_text() for tick, text in zip(axes.get_xticks(), axes.get_xticklabels()) if low <= tick <= high]
    assert labels == ["1", "10", "100", "1,000", "10,000", "100,000"]


def test_ticks():
    assert presentation.plain_ticks(1.5, 60) == ([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    assert presentation.plain_ticks(0.5, 2000)[1] == ["1", "10", "100", "1,000"]
