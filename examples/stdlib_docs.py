"""Read the docstrings of the running interpreter's standard library. Used by build_collection.py.

    for module in read_library():          # Module(name, doc, entries), sorted by name
        for entry in module.entries:       # Entry(name, heading, summary, rest), in the order of the source
            ...

Modules written in Python are parsed with `ast` and never imported, so none of their code runs. Modules written in C
(math, zlib, ...) have no source to parse; the public ones are imported and read with `inspect`.
"""

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Tests, demonstrations, and code that does not belong to the library
SKIPPED = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "__pycache__",
           "ensurepip", "antigravity", "this", "__phello__", "__hello__", "_vendor", "config"}
MIN_DOCSTRINGS = 1000


@dataclass
class Entry:
    """A documented class, function or method. Its docstring is `summary` and `rest`."""

    name: str
    heading: str
    summary: str
    rest: str
    is_function: bool


@dataclass
class Module:
    name: str
    doc: str
    entries: list[Entry] = field(default_factory=list)


def plain_text(text: str) -> str:
    """Turn a docstring into plain text without doctests and markup. camelCase is split into words."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith((">>>", "..."))]
    text = re.sub(r"[-=*~_#]{3,}|``|\s+", lambda match: "" if match[0] == "``" else " ", "\n".join(lines))
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", text).strip()


def split_summary(doc: str) -> tuple[str, str]:
    """Return the first sentence of the first paragraph, and everything after it.

    >>> split_summary("Return a copy. Shallow.\\n\\nMore.")
    ('Return a copy.', 'Shallow. More.')
    """
    first, _, rest = doc.strip().partition("\n\n")
    first = plain_text(first)
    sentence = re.match(r".*?[.!?](?=\s+[A-Z]|$)", first)
    end = sentence.end() if sentence else len(first)
    return first[:end].strip(), " ".join(filter(None, [first[end:].strip(), plain_text(rest)]))


def make_entry(module: str, path: str, arguments: list[str], doc: str, is_function: bool) -> Entry:
    names = [name.lstrip("*_") for name in arguments if name not in ("self", "cls", "args", "kwargs")]
    heading = plain_text(f"{path}({', '.join(names)})" if is_function else f"class {path}")
    summary, rest = split_summary(doc)
    return Entry(f"{module}.{path}", heading, summary, rest, is_function)


def python_entries(module: str, body: list[ast.stmt], prefix: str = "") -> Iterator[Entry]:
    """Yield entries for classes, functions and methods, but not for functions inside functions."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from python_entries(module, node.body, prefix)
        elif isinstance(node, ast.ClassDef):
            if doc := ast.get_docstring(node):
                yield make_entry(module, prefix + node.name, [], doc, False)
            yield from python_entries(module, node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node)):
            arguments = [argument.arg for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            yield make_entry(module, prefix + node.name, arguments, doc, True)


def read_python_modules(root: Path) -> Iterator[Module]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts) or any(part.startswith("config-") for part in parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # for example templates
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield Module(name, ast.get_docstring(tree) or "", list(python_entries(name, tree.body)))


def c_entries(module: str, owner: object, prefix: str = "") -> Iterator[Entry]:
    """Yield entries for the callables of a C module or of one of its classes, sorted by name."""
    for name, value in sorted(vars(owner).items()):
        doc = inspect.cleandoc(value.__doc__) if isinstance(getattr(value, "__doc__", None), str) else ""
        if name.startswith("__") or getattr(value, "__module__", module) not in (module, None):
            continue
        if inspect.isclass(value) and not prefix:
            if doc:
                yield make_entry(module, name, [], doc, False)
            yield from c_entries(module, value, f"{name}.")
        elif callable(value) and not inspect.isclass(value) and doc:
            yield make_entry(module, prefix + name, [], doc, True)


def read_c_modules(known: set[str]) -> Iterator[Module]:
    for name in sorted(sys.stdlib_module_names | set(sys.builtin_module_names)):
        if name in known or name in SKIPPED or name.startswith("_"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated modules
                module = importlib.import_module(name)
        except Exception:  # not available on this system: winreg, nis, ...
            continue
        if not getattr(module, "__file__", None) or not str(module.__file__).endswith(".py"):
            yield Module(name, inspect.cleandoc(module.__doc__ or ""), list(c_entries(name, module)))


def read_library() -> list[Module]:
    """Return all modules with documentation, sorted by name. Raises ValueError if there are none."""
    if sys.flags.optimize >= 2:
        raise ValueError("this Python runs without docstrings (-OO): drop -OO and unset PYTHONOPTIMIZE")
    root = Path(sysconfig.get_path("stdlib"))
    modules = list(read_python_modules(root))
    modules += read_c_modules({module.name for module in modules})
    modules = [module for module in modules if module.doc or module.entries]
    found = sum(len(module.entries) for module in modules)
    if found < MIN_DOCSTRINGS:
        raise ValueError(f"found only {found} docstrings in the standard library at {root}, because its sources are "
                         "missing or stripped; use a complete Python 3.11 or newer")
    return sorted(modules, key=lambda module: module.name)
