"""The embedded corpus: text that every CPython carries.

The demo and the tests must work without a network. They read the topics of `help()` (`pydoc_data.topics`) and the docstrings
of the standard library, about 2 MB in all.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from saelens_lite.errors import TextError

# Test suites, generated tables and vendored third-party code are not documentation.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "pydoc_data", "_vendor"}


class Document(NamedTuple):
    """A text with a name. Documents never share the context of a row."""

    name: str
    text: str


def _docstrings(source: str) -> list[tuple[str, str]]:
    """Return (qualified name, docstring) of a module and all definitions in it, in source order."""
    docstrings: list[tuple[str, str]] = []

    def visit(node: ast.AST, path: str) -> None:
        doc = ast.get_docstring(node)  # type: ignore[arg-type]
        if doc:
            docstrings.append((path, doc))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{path}.{child.name}".lstrip("."))

    visit(ast.parse(source), "")
    return docstrings


@cache
def python_docs() -> tuple[Document, ...]:
    """Return the help topics and the standard library's docstrings of the running Python, sorted by name.

    Each topic is one document, and each module is one: its docstrings, each below the qualified name of its object.
    """
    from pydoc_data.topics import topics

    documents = [Document(f"topic:{name}", text.strip()) for name, text in topics.items()]
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if _LEFT_OUT & set(parts):
            continue
        try:
            pieces = _docstrings(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a few files hold deliberately odd text
            continue
        text = "\n\n".join(f"{name}\n\n{doc}" if name else doc for name, doc in pieces).strip()
        if text:
            documents.append(Document(f"module:{'.'.join(parts)}", text))
    return tuple(sorted(documents))


def is_held_out(name: str, percent: int = 10) -> bool:
    """Return whether a document is held out. A hash of its name decides, so it never changes sides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < percent


class PythonDocs:
    """The embedded corpus as a text with a name: "python-docs", or its part "python-docs:train" or "python-docs:held-out".

    Raises:
        TextError: another name.
    """

    NAMES = ("python-docs", "python-docs:train", "python-docs:held-out")

    def __init__(self, name: str = "python-docs"):
        if name not in self.NAMES:
            raise TextError(f"the embedded corpus has no part {name!r}; use {', '.join(self.NAMES[:-1])} or {self.NAMES[-1]}")
        self.name = name

    def __iter__(self) -> Iterator[Document]:
        for document in python_docs():
            if self.name == "python-docs" or is_held_out(document.name) == self.name.endswith("held-out"):
                yield document
