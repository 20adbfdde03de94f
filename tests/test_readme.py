"""The examples of the README work, and it stays short."""

import re
import shlex
from pathlib import Path

import pytest
from chat_server import running_chat

import saelens_lite.cli  # noqa: F401 (its commands register with the app)
from saelens_lite.cli.base import _parsed, app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    known = {}
    exec(compile(re.sub(r"\b(300_000|50_000|20_000)\b", "6_000", block).replace("1536", "64"), "README.md", "exec"), known)
    assert "ce_loss_score" in capsys.readouterr().out
    assert (tmp_path / "features.html").stat().st_size > 100_000
    assert (tmp_path / "runs/1-gated/dictionary/cfg.json").exists()
    assert (known["codes"].l0 <= 32).all()


def commands(text: str) -> list[list[str]]:
    """Return the arguments of each saelens-lite command in shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "saelens-lite"]


def test_the_command_line_example_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "other.txt"):
        (tmp_path / name).write_text("The old man looked at the sea and said nothing. " * 600, encoding="utf-8")
    run = {words[0]: words for words in commands(README)}
    assert list(run) == ["hooks", "capture", "train", "plot", "eval", "features", "search", "explain", "score", "push"]
    run["train"] += ["--n-tokens", "6000", "--batch-size", "256"]
    run["eval"] += ["--n-tokens", "1000"]
    run["features"] += ["--n-tokens", "1000"]
    with running_chat() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("SAELENS_LITE_ANSWERS", str(tmp_path / "kept"))
        for words in run.values():
            with pytest.raises(SystemExit, match=r"^0$"):
                app.meta(["192" if word == "1536" else word for word in words], exit_on_error=False, print_error=False)
    assert "reply" in (tmp_path / "store/labels.json").read_text(encoding="utf-8")
    assert (tmp_path / "runs/topk/dictionary/eval.json").exists()
    assert (tmp_path / "book.html").stat().st_size > 50_000


GUIDES = [*(ROOT / "saelens_lite").glob("*/__init__.py"), *(ROOT / "saelens_lite").glob("*.py"), ROOT / "README.md"]
SHOWN = [words for path in GUIDES for words in commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_a_command_that_is_shown_names_commands_and_settings_that_exist(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for word in words:  # files and folders must exist
        if "/" in word or word.endswith((".txt", ".csv")):
            folder = tmp_path / word
            (folder.parent if folder.suffix else folder).mkdir(parents=True, exist_ok=True)
            if folder.suffix:
                folder.touch()
    _parsed(words)


def test_many_commands_are_shown():
    assert {"capture", "train", "eval", "features", "steer", "push", "convert"} <= {words[0] for words in SHOWN}


def test_the_readme_is_at_most_a_thousand_words():
    assert len(README.split()) <= 1000


def test_the_picture_is_small():
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert 10_000 < (ROOT / picture).stat().st_size <= 200_000


def test_the_map_names_every_module():
    tree = re.search(r"## Layout\n.*?```\n(.*?)```", (ROOT / "AGENTS.md").read_text(encoding="utf-8"), flags=re.S)[1]
    places = re.findall(r"^(\S+?)/? {2,}", tree, flags=re.M)
    for place in places:
        assert list(ROOT.glob(place)), place
    parts = {p.stem for p in (ROOT / "saelens_lite").iterdir() if (p / "__init__.py").exists()}
    assert parts <= {Path(place).stem for place in places if place.startswith("saelens_lite/")}
