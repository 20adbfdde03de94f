"""The examples of the README work, and its plugin table is complete."""

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saelens_lite import registry

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_python_blocks_run_in_order(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    known = {"x": torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))}
    try:
        for block in PYTHON:
            smaller = re.sub(r"\b(300_000|50_000|20_000|1_000_000)\b", "6_000", block).replace("4096", "64")
            exec(compile(smaller, "README.md", "exec"), known)
    finally:
        registry.unregister("soft_threshold")
    assert len(PYTHON) == 3
    assert "ce_loss_score" in capsys.readouterr().out
    assert (tmp_path / "features.html").stat().st_size > 100_000
    assert (tmp_path / "runs/1-gated/dictionary/cfg.json").exists()
    assert known["d"].rule.plugin_name == "soft_threshold"
    assert (known["codes"].l0 <= 32).all()


@pytest.fixture
def plugin_table(monkeypatch):
    """plugin_table(arguments) runs the script that writes the table; its complaint, or None."""
    monkeypatch.setitem(sys.modules, "trackio", ModuleType("trackio"))
    monkeypatch.delitem(sys.modules, "saelens_lite_plugins.loggers.trackio", raising=False)

    def run(*args: object) -> str | None:
        monkeypatch.setattr(sys, "argv", ["plugin_table.py", *map(str, args)])
        try:
            runpy.run_path(str(Path(__file__).parent.parent / "scripts/plugin_table.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return None

    yield run
    sys.modules.pop("saelens_lite_plugins.loggers.trackio", None)


def test_the_plugin_table_is_what_the_plugins_say(plugin_table):
    assert plugin_table("--check") is None
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| \S.* \| (.*?) ?\|$", README, flags=re.M)
    own = [(p.name, kind) for kind in registry.KINDS for p in registry.plugins(kind) if p.distribution == "saelens-lite"]
    assert [row[:2] for row in rows] == own
    assert [paper for _, kind, paper in rows if kind == "sparsity"] == [
        registry.load(n).paper for n, k in own if k == "sparsity"
    ]


def test_a_stale_plugin_table_is_found_and_written_anew(plugin_table, tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(re.sub(r"^\| `topk` .*\n", "", README, flags=re.M), encoding="utf-8")
    assert plugin_table("--check", copy) == f"the plugin table of {copy} is stale: run python scripts/plugin_table.py"
    assert plugin_table(copy) is None
    assert copy.read_text(encoding="utf-8") == README
    copy.write_text("# No place for it")
    assert plugin_table(copy) == f"{copy} has 0 places for the table; expected one"


def test_the_tree_names_what_is_there():
    tree = README.split("## The tree")[1]
    root = Path(__file__).parent.parent
    for place in re.findall(r"^(saelens_lite/\w+(?:\.py)?|plugins/\w+|scripts/)", tree, flags=re.M):
        assert (root / place).exists(), place
    listed = set(re.findall(r"saelens_lite/(\w+)", tree)) | set(re.findall(r"\b(\w+)\.py", tree))
    there = {p.stem for p in (root / "saelens_lite").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there - {"__init__"} <= listed
