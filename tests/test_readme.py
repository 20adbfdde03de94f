"""What the README shows works, and its plugin table is complete."""

import re
from pathlib import Path

import torch

from saelens_lite.sparsity import registry

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


def test_the_plugin_table_lists_every_rule():
    section = README.split("## Sparsity rules are plugins")[1].split("##")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, flags=re.M)) == [
        p.name for p in registry.plugins() if p.distribution == "saelens-lite"
    ]


def test_the_tree_names_what_is_there():
    tree = README.split("## The tree")[1]
    root = Path(__file__).parent.parent
    for place in re.findall(r"^(saelens_lite/\w+(?:\.py)?|plugins/\w+|scripts/)", tree, flags=re.M):
        assert (root / place).exists(), place
    listed = set(re.findall(r"saelens_lite/(\w+)", tree)) | set(re.findall(r"\b(\w+)\.py", tree))
    there = {p.stem for p in (root / "saelens_lite").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there - {"__init__"} <= listed
