"""Read the documentation of installed packages as plain English sentences: a module of build_collection.py.

    for entry in read_package("numpy", directory):      # Entry(name, summary, sentences), in the order of the source
        ...

The Python files are parsed with `ast`; nothing is imported and none of their code runs. What is read depends neither on
the Python version nor on the platform: docstrings are taken as they stand in the source and dedented here, because
`inspect.cleandoc` differs between versions, and files that differ between wheels are left out.
"""
import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Tests, repeated model code, and what differs between the wheels of different platforms and Python versions.
SKIPPED = {"tests", "test", "testing", "models", "distutils", "__config__.py", "version.py", "_version.py"}
LISTS = {"parameters", "other parameters", "returns", "yields", "attributes", "args", "arguments", "return"}
OTHERS = {"raises", "example", "examples", "usage"}                     # that end with a colon and are left out
PROSE = {"", "note", "notes", "description", "warnings"}                # "": outside of all sections
MARKUP = tuple((re.compile(pattern), shown) for pattern, shown in (
    (r":[\w:]+:`~?\.?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1"),               # :func:`~.Axes.plot`, :doc:`title <target>`
    (r"\[`~?\.?([^`]+)`\](?:\([^)]*\))?|\[([^`\]]+)\]\([^)]*\)", r"\1\2"),  # [`~Trainer.train`], [title](address)
    (r"`+([^`<]+?)(?:\s*<[^`>]*>)?`+_{0,2}", r"\1"),                    # ``code``, `name`, `title <target>`_
    (r"\*\*?([^*\s][^*]*?)\*\*?", r"\1"),                               # *emphasis*, **strong**
    (r"\s*\[[\w.,\s]+\]_", ""),                                         # [1]_
))
SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:.()'\"/_+*<>-]*[.!?]")       # one that is clean
BOUNDARY = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z])")
BREAK = re.compile(r"\s*(\.\. |[-*+] |\d+[.)] |[|+<]|:\w+.*?:\s|#)")     # lists, tables, fields, tags
TERM = re.compile(r"\s*[*\w`.\[\], ]{1,60}(\(.*\))?:(\s+|$)")           # name (type): of Google's style


class Entry(NamedTuple):
    """A documented class, function or method: the sentence that opens its docstring, and the other clean ones."""

    name: str
    summary: str
    sentences: list[str]


def read_package(package: str, directory: Path) -> Iterator[Entry]:
    """Entries of a package's Python files, those of a file in the order of its lines."""
    for path in sorted(directory.rglob("*.py"), key=lambda path: path.relative_to(directory).as_posix()):
        parts = path.relative_to(directory).parts
        if not SKIPPED.intersection(parts) and parts != ("__init__.py",):    # NumPy's and SciPy's differ on Windows
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                         # about invalid escapes in their strings
                tree = ast.parse(path.read_bytes())
            names = [package, *parts[:-1], *([path.stem] if path.stem != "__init__" else [])]
            yield from entries(tree.body, ".".join(names))


def entries(body: list[ast.stmt], prefix: str) -> Iterator[Entry]:
    """Entries of classes, functions and methods; functions inside functions are left out."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from entries(node.body, prefix)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}.{node.name}"
            if doc := ast.get_docstring(node, clean=False):
                yield Entry(name, *split_docstring(doc))
            if isinstance(node, ast.ClassDef):
                yield from entries(node.body, name)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from added_entry(node.value, prefix)


def added_entry(call: ast.Call, prefix: str) -> Iterator[Entry]:
    """The entry of add_newdoc(..., name, doc) or add_newdoc(..., name, (method, doc)): of compiled code."""
    if getattr(call.func, "id", "") == "add_newdoc":
        texts = [node.value for argument in call.args for node in getattr(argument, "elts", [argument])
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        if len(texts) > 1:
            yield Entry(".".join([prefix, *texts[-3 if isinstance(call.args[-1], ast.Tuple) else -2:-1]]),
                        *split_docstring(texts[-1]))


def split_docstring(doc: str) -> tuple[str, list[str]]:
    r"""The sentence that opens the docstring, and all other clean sentences.

    If the first paragraph opens with an unclean sentence, the second one's is taken; "" if neither is clean.

    >>> split_docstring("Return a copy of it. It is shallow.\n\n    Args:\n        x: A number, in fact.\n")
    ('Return a copy of it.', ['It is shallow.', 'A number, in fact.'])
    """
    found = [sentences(paragraph) for paragraph in paragraphs(dedent(doc))]
    place = next((number for number, paragraph in enumerate(found[:2]) if paragraph[0]), None)
    summary = "" if place is None else found[place].pop(0)
    return summary, [sentence for paragraph in found for sentence in paragraph if sentence]


def dedent(doc: str) -> list[str]:
    """The lines of a docstring without their common indentation, which the first line does not have."""
    first, *others = doc.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip()) for line in others if line.strip()), default=0)
    return [first.strip(), *(line[margin:].rstrip() for line in others)]


def paragraphs(lines: list[str]) -> Iterator[str]:
    """The running text of a docstring: without headings, code, formulas, tables, names and types of parameters."""
    section, google, skipped, fenced, doctest, held = "", False, None, False, False, []
    for line, following in zip(lines, [*lines[1:], ""]):
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("```"):
            fenced, line = not fenced, ""
        doctest = bool(line) and (doctest or line.lstrip().startswith(">>>"))      # with the output that follows
        if line and skipped is not None and indent <= skipped:
            skipped = None
        if line and google and indent == 0:
            section, google = "", False
        rule = re.fullmatch(r"[-=~]{3,}", following.strip()) is not None
        heading = line.strip().removesuffix(":").lower()
        if line and (rule or (line.endswith(":") and heading in LISTS | PROSE | OTHERS)):
            section, google, line = heading, not rule, ""
        term = TERM.match(line) if google and section in LISTS else None
        text = line[term.end():] if term else line
        named = section in LISTS and not google and indent == 0         # name : type
        ends = not text or doctest or term or named or BREAK.match(line) or re.fullmatch(r"\s*[-=~]{3,}", line)
        if held and (ends or fenced or skipped is not None):
            yield " ".join(held)
            held = []
        if re.match(r"\s*\.\. ", line) or line.endswith("::"):
            skipped = indent
        elif text and skipped is None and not fenced and section in LISTS | PROSE and (term or not ends):
            held.append(text.strip())
    if held:
        yield " ".join(held)


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph without markup; "" for one that is not clean."""
    for pattern, shown in MARKUP:
        paragraph = pattern.sub(shown, paragraph)
    return [part if SENTENCE.fullmatch(part) else "" for part in BOUNDARY.split(" ".join(paragraph.split()))]
