"""Progress lines fit the terminal, and keep their counts and times."""

import io
import re

import pytest

from saelens_lite import progress
from saelens_lite.terminal import console


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(
    ("what", "total", "unit", "note"),
    [
        ("train", 30_000_000, "tokens", "topk fvu 0.1234, jumprelu fvu 0.1234, " * 5),
        ("compare", 3, "dictionaries", ""),
        ("evaluate with the weights shuffled and a long name", 100_000, "tokens", "a note"),
    ],
)
def test_a_line_fits_the_terminal_with_its_counts_and_times(what, total, unit, note, width, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    screen = console(stderr=True)
    screen.file = io.StringIO()
    screen._force_terminal = screen.is_interactive = True
    monkeypatch.setattr(progress, "console", lambda stderr: screen)
    with progress.progress_bar(what, total, unit) as advance:
        advance(total // 3, note)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue()).replace("\r", "\n")
    lines = [line.rstrip() for line in shown.split("\n") if line.strip()]
    assert max(map(len, lines)) <= width
    assert re.search(rf"{total // 3}/{total} {unit} +0:00:0\d left: (-:--:--|\d:\d\d:\d\d)", lines[-1])
    assert lines[-1].startswith(what[:8])
