"""Tables in Markdown, aligned for a terminal, and in LaTeX. The first column is text, the others are numbers."""
from collections.abc import Sequence

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
