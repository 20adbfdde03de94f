"""The guides in docstrings show code that works, and the documentation site lists every plugin and every public name."""

import ast
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import saelens_lite as sl
from saelens_lite import registry

ROOT = Path(__file__).parent.parent
GUIDES = (
    "model",
    "tokens",
    "cache",
    "training",
    "evaluation",
    "synthesis",
    "features",
    "chat",
    "features/explaining",
    "diffing",
    "views",
    "interventions",
    "hub",
    "hub/upload",
    "formats",
    "sparsity",
)


@pytest.fixture
def site(monkeypatch):
    """The functions of the script that writes the pages of the site."""
    monkeypatch.setitem(sys.modules, "trackio", ModuleType("trackio"))
    monkeypatch.delitem(sys.modules, "saelens_lite_plugins.loggers.trackio", raising=False)
    yield SimpleNamespace(**runpy.run_path(str(ROOT / ".github/docs_pages.py")))
    sys.modules.pop("saelens_lite_plugins.loggers.trackio", None)


def python_blocks(module: str) -> list[str]:
    """Return the fenced Python of a module's docstring."""
    path = ROOT / "saelens_lite" / module
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return re.findall(r"```python\n(.*?)```", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), flags=re.S)


def test_the_code_of_the_guides_runs_in_the_order_of_the_site(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    known = {"sl": sl, "x": torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))}
    ran = 0
    try:
        for module in (*GUIDES, "loggers"):
            trained = known.get("runs")
            if module in ("evaluation", "formats"):  # after `fit`, on the dictionary of a hook again
                known["d"] = trained[0].dictionary
            for block in python_blocks(module):
                smaller = (
                    re.sub(r"\b(300_000|50_000|20_000|1_000_000)\b", "6_000", block)
                    .replace("d_sae=4096)", "d_sae=64, n_tokens=6_000)")
                    .replace("4096", "64")
                    .replace("8192", "512")
                )
                exec(compile(smaller, f"the guide of {module}", "exec"), known)
                ran += 1
    finally:
        for kind, name in (("sparsity", "soft_threshold"), ("loggers", "stderr")):
            registry.unregister(name, kind)
    assert ran >= len(GUIDES)
    assert known["report"].metrics["l0"].value > 0
    assert (tmp_path / "page.html").stat().st_size > 100_000
    assert (tmp_path / "my-dictionary/README.md").exists()
    assert (tmp_path / "converted/sae.safetensors").exists()
    assert known["d"].rule.plugin_name == "soft_threshold"


def test_every_built_in_plugin_is_in_the_table(site):
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| \S.* \| (.*?) ?\|$", site.plugin_table(), flags=re.M)
    own = [(p.name, kind) for kind in registry.kinds() for p in registry.plugins(kind) if p.distribution == "saelens-lite"]
    assert [row[:2] for row in rows] == own
    assert {"topk", "saelens", "jsonl"} <= {name for name, _ in own}
    assert [paper for _, kind, paper in rows if kind == "sparsity"] == [
        registry.load(n).paper for n, k in own if k == "sparsity"
    ]


def test_every_public_class_and_function_has_an_entry_on_the_site(site, tmp_path):
    site.write(tmp_path)
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md")}
    entries = [name for page in pages.values() for name in re.findall(r"^::: (\S+)$", page, flags=re.M)]
    assert len(entries) == len(set(entries))
    for name in set(sl.__all__) - {"__version__", "errors", "adapters", "labels"}:
        value = getattr(sl, name)
        assert f"{value.__module__}.{value.__name__}" in entries, name


def test_links_of_the_readme_lead_to_files_and_to_pages(site, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)\)", readme)
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link
    site.write(tmp_path)
    for link in re.findall(r"\]\((?!\w+:|#)([^)#]+)\)", (tmp_path / "index.md").read_text(encoding="utf-8")):
        assert (tmp_path / link).exists(), link
