"""The words that people read: docstrings, messages, help texts, comments, README and notebooks.

This holds the mechanical part of plain English. A person's ear holds the rest.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("saelens_lite", "plugins", "tests", "scripts")

QUESTION_WORDS = {"what", "whatever", "whether", "how", "where", "which", "when", "whenever", "why", "who"}

# First words of a noun phrase. A function's docstring begins with a verb: "Return the …".
NO_VERBS = {"a", "an", "all", "another", "any", "both", "each", "every", "everything", "its", "no", "none", "nothing", "one"}
NO_VERBS |= {"our", "some", "something", "that", "the", "there", "these", "they", "this", "those", "two", "three", "within"}

BANNED = (
    "are none of",
    "does not say theirs",
    "for nobody",
    "gone on with",
    "goes on with",
    "has to be had",
    "have to be had",
    "in the mean,",
    "in the mean ",
    "in the mean:",
    "in the meantime",
    "is no file",
    "is no json",
    "is no number",
    "is no safetensors",
    "is then gone",
    "is to be had",
    "let alone",
    "of one's own",
    "on it goes",
    "one after the other",
    "or that is none",
    "put away",
    "taken up again",
    "that are none",
    "that is none",
    "there are none",
    "there is none",
    "unless told",
    "what x_hat is",
    "what is asked of",
    "where there is one",
)


class Words(NamedTuple):
    """A text that people read, and its place."""

    place: str
    text: str


class Docstring(NamedTuple):
    """A docstring, its place and whether it may be a noun phrase."""

    place: str
    text: str
    may_be_noun: bool


def files() -> list[Path]:
    """Return the Python files whose language is checked."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in paths if path != Path(__file__)]


@cache
def docstrings() -> list[Docstring]:
    """Return all docstrings of the code."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        Docstring(f"{path.relative_to(ROOT)}:{node.body[0].lineno}", text, is_noun(node))
        for path in files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
    ]


def words_of_code(path: Path) -> Iterator[Words]:
    """Yield the strings and comments of a file. Adjacent strings of one expression are one text."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Words(f"{path.relative_to(ROOT)}:{node.lineno}", node.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Words(f"{path.relative_to(ROOT)}:{token.start[0]}", token.string)


def words_of_pages() -> Iterator[Words]:
    """Yield the lines of README and of the notebooks' cells."""
    yield from (Words(f"README.md:{n}", line) for n, line in enumerate((ROOT / "README.md").read_text().splitlines(), 1))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for n, cell in enumerate(json.loads(path.read_text())["cells"]):
            yield Words(f"{path.name}, cell {n}", "".join(cell["source"]))


def is_noun(node: ast.AST) -> bool:
    """Return whether a docstring may be a noun phrase: modules, classes, properties, fixtures and tests."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return True
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return node.name.startswith("test") or "property" in decorators or "fixture" in decorators


def first_word(text: str) -> str:
    """Return the first word of a docstring in small letters, or its first symbol."""
    return re.match(r"\W*(\w*)", text)[1].lower()


def test_no_docstring_begins_with_a_question_word():
    bad = [f"{place}: {text.splitlines()[0]}" for place, text, _ in docstrings() if first_word(text) in QUESTION_WORDS]
    assert not bad, "\n".join(["docstrings that begin with a question word:", *bad])


def test_docstrings_of_functions_begin_with_a_verb():
    bad = [
        f"{place}: {text.splitlines()[0]}"
        for place, text, may_be_noun in docstrings()
        if not may_be_noun and (first_word(text) in NO_VERBS or not text[0].isupper())
    ]
    assert not bad, "\n".join(["docstrings of functions that do not begin with a verb in a capital letter:", *bad])


def test_docstrings_begin_with_a_whole_sentence():
    bad = [
        f"{place}: {text.splitlines()[0]}"
        for place, text, _ in docstrings()
        if not text.split("\n\n")[0].rstrip().endswith((".", ":", "?", "!", ")")) and "│" not in text
    ]
    assert not bad, "\n".join(["docstrings whose first paragraph does not end with a period or colon:", *bad])


@pytest.mark.parametrize("phrase", BANNED)
def test_no_text_holds_a_banned_phrase(phrase: str):
    bad = [f"{place}: {match}" for (place, text), small in all_words() if phrase in small and (match := _match(phrase, text))]
    assert not bad, "\n".join([f"texts that hold {phrase!r}; see the list of better sentences in STYLE.md:", *bad])


@cache
def all_words() -> list[tuple[Words, str]]:
    """Return every checked text with single spaces, and again in small letters."""
    texts = [*(words for path in files() for words in words_of_code(path)), *words_of_pages()]
    spaced = [Words(place, " ".join(text.split()) + " ") for place, text in texts]
    return [(words, words.text.lower()) for words in spaced]


def _match(phrase: str, text: str) -> str | None:
    if phrase not in text.lower():
        return None
    match = re.search(rf"(?<!\w){re.escape(phrase)}.{{0,30}}", text, re.IGNORECASE)
    return match[0] if match else None


def test_variables_are_not_called_found():
    fields = {"saelens_lite/testing/report.py:29"}  # Check.found, the outcome of a check
    bad = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files()
        if path.relative_to(ROOT).parts[0] in ("saelens_lite", "plugins")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Name) and node.id == "found" and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.arg) and node.arg == "found")
    ]
    bad = sorted(set(bad) - fields)
    assert not bad, "\n".join(["variables called found; name the thing itself:", *bad])


def test_the_check_of_phrases_sees_split_strings_and_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "code.py"
    path.write_text('x = f"{y} is no "\\\n    f"file"  # this goes on\n\n\ndef f():\n    """Go on\n    and on."""\n')
    texts = {" ".join(text.split()) for _, text in words_of_code(path)}
    assert {"# this goes on", "Go on and on.", "is no file"} <= texts
    assert _match("is no file", "that is no file ")
    assert not _match("is no file", "this no file ")
