"""The notebooks run from a clean state on the embedded model."""

import re
from pathlib import Path

import nbformat
import pytest
from hub_server import Account, running_hub
from nbclient import NotebookClient

REPO, TOKEN = "me/first-dictionary", "hf_ofnotebookstests"
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PRINTED = {  # by notebook: what it prints or shows as HTML, and at least how often
    "1-hook-gpt2": {"ce_loss_score": 1, "fires on": 3, ">>": 3, "The old man looked at": 2},
    "2-train-and-publish": {
        "ce_loss_score": 2,
        "## Load it": 1,
        "nothing was sent": 1,
        f"{REPO}: 0 bytes new or changed, commit ": 1,
        "the same weights: True": 1,
        f"hf://{REPO}/blocks.2.hook_resid_pre@": 1,
    },
    "3-analyse-and-steer": {
        "1,536 latents on": 1,
        "latents by activation": 1,
        "latents by activation / largest activation": 1,
        "latents by effect on logit of": 1,
        "Spearman": 6,
        "strongest</summary>": 1,
        "clamped: This function opens the file and": 1,
        "controls": 1,
        "features.html: 1536 latents": 1,
    },
    "4-write-a-plugin": {
        "ce_loss_score": 2,
        "latents a token": 2,
        "largest relative error": 2,
        "define rescale_": 2,
        "output changed by at most": 1,
        "status='ok', found='standard": 1,
    },
    "5-compare-two-models": {
        " nats per token": 2,
        "of differences: {'tuned only'": 1,
        "fires on": 3,
        ">>": 3,
        "models.html: 1024 latents": 1,
        "added:": 1,
    },
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine for the notebook that publishes."""
    with running_hub() as running:
        running.accounts[TOKEN] = Account("me")
        own = {"HF_ENDPOINT": running.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        for name, value in (own | {"SAELENS_LITE_REPO": REPO}).items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("SAELENS_LITE_MODEL", "tiny")
    monkeypatch.setenv("SAELENS_LITE_TOKENS", "12000")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # fewer tokens to evaluate and to look for examples in, as in the examples of the guides
        cell.source = re.sub(r"(?<=n_tokens=)(10_000|20_000|30_000)\b", "6_000", cell.source)
        cell.source = cell.source.replace('(d, lm, "python-docs:held-out")', '(d, lm, "python-docs:held-out", n_tokens=6_000)')
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "") + output.get("data", {}).get("text/html", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    for text, times in PRINTED[path.stem].items():
        assert printed.count(text) >= times, text
    assert TOKEN not in nbformat.writes(notebook)
    assert list(hub.repositories) == ([REPO] if path.stem == "2-train-and-publish" else [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
