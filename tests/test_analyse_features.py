"""The script that analyses the latents of a dictionary, on one of the embedded model."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import saelens_lite as sl

SCRIPT = Path(__file__).parent.parent / "scripts/analyse_features.py"
HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def dictionary(lm, tmp_path_factory):
    """The folder of a dictionary of random directions, one latent of which never fires."""
    d = sl.Dictionary.create(
        "topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=64, options={"k": 2}, origin=sl.Origin(model="tiny", n_ctx=32)
    )
    d.b_enc.data[5] = -1e6
    return d.save(tmp_path_factory.mktemp("analysed") / "dictionary")


def run(monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, args)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_it_writes_store_plots_and_dashboard(dictionary, monkeypatch, tmp_path, capsys):
    args = (dictionary, "--out", tmp_path / "out", "--n-tokens", 400, "--control", "--examples", 3)
    run(monkeypatch, *args)
    printed = " ".join(capsys.readouterr().out.split())
    store = sl.FeatureStore.load(tmp_path / "out/store", sl.load(dictionary))
    assert (store.info.n_tokens, store.control is not None) == (400, True)
    assert (
        f"latents that never fire {int(store.never_fires.sum())} of 64 {int(store.control.never_fires.sum())} of 64" in printed
    )
    assert "latents that fire on a token 2.0 2.0" in printed
    for name in ("density.png", "positions.png", "neighbours.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/dashboard.html").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="already exists"):
        run(monkeypatch, *args)


def test_a_store_in_which_nothing_fires_has_no_median(dictionary, lm):
    median = runpy.run_path(str(SCRIPT))["median_density"]
    store = sl.FeatureStore.build(sl.load(dictionary), lm, "It was the best of times.")
    firing = store.density[~store.never_fires]
    assert median(store) == f"{100 * float(firing.median()):.3g} %"
    store.tensors = store.tensors._replace(count=torch.zeros(64, dtype=torch.int64))
    assert median(store) == "none fires"
