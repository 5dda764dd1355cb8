"""Tables in Markdown and LaTeX."""
import re

from hypothesis import given
from hypothesis import strategies as st

from simplified_tinybert.ranking import tables


def test_markdown():
    assert tables.markdown(["a", "b"], [["x", 1]]) == "| a | b |\n|---|--:|\n| x | 1 |"
    assert tables.markdown(["", "long"], [["x|y", "–"]]) == "|      | long |\n|------|-----:|\n| x\\|y |    – |"


def test_numbers_have_three_digits():
    assert [tables.number(value) for value in (0.5, 9.87654, 12.345, 1234.5, 1e6)] == [
        "0.50", "9.88", "12.3", "1,234", "1,000,000"]


def test_latex_by_hand():
    assert tables.latex(["system", "AP"], [["a_b & 50%", "0.5†‡"], ["c", "–"]], "50% of {it}", ["p < 0.05"]) == r"""
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
    text = tables.latex(["x", "y"], [["[BM25]", 1], ["*starred", 2], ["a|b", 3]], "c")
    rows = text[text.index(r"\midrule"):]
    assert not re.search(r"(\\\\|\\midrule)\s*[\[*]", rows)
    assert "{[}BM25] & 1" in rows and "{*}starred & 2" in rows and r"a\textbar{}b & 3" in rows


@given(st.lists(st.lists(st.text("ab\\&%$#_{}~^†‡<>×–é ", max_size=8), min_size=3, max_size=3), min_size=1, max_size=4))
def test_latex_is_valid_for_any_names(rows):
    lines = tables.latex(["x", "y", "z"], rows, "caption").splitlines()
    body = lines[lines.index(r"    \midrule") + 1:lines.index(r"    \bottomrule")]
    assert len(body) == len(rows)
    for line, row in zip(body, rows):
        assert line.endswith(r" \\")
        cells = re.split(r"(?<!\\) & ", line[4:-3])
        assert cells == [tables.escape_latex(cell) for cell in row]
        for cell in cells:
            plain = re.sub(r"\\text(backslash|asciitilde|asciicircum)\{\}|\$(<|>|\\times|\^\{\\d?dagger\})\$", "", cell)
            assert not re.search(r"[~^<>†‡×–]|(?<!\\)[&%$#_{}]|\\(?![&%$#_{}])", plain), cell
