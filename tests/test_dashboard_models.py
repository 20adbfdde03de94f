"""The page of a store of several models: its columns against the store, the classes, and a report of `sl.diff`."""

import copy
import json

import pytest
import torch
from test_dashboard import Data, Page

import saelens_lite as sl
from saelens_lite.config import ModelFacts
from saelens_lite.errors import ConfigError
from saelens_lite.features.dashboard.content import content
from saelens_lite.model import Models
from saelens_lite.tokens import token_rows

HOOK, D_SAE = "blocks.1.hook_resid_pre", 24


@pytest.fixture(scope="module")
def store(random_lm, documents) -> sl.FeatureStore:
    """Return a store of a model and a copy of it; latents 0 to 2 have no direction in the first, 3 has none in the second."""
    other = sl.LanguageModel(copy.deepcopy(random_lm.module), random_lm.tokenizer, name="other")
    models, width = Models({"base": random_lm, "chat": other}), random_lm.d_model
    ports = [sl.Port(hook=HOOK, width=width, model=name) for name in ("base", "chat")]
    d = sl.Dictionary.create("topk", reads=ports, d_sae=D_SAE, options={"k": 6}, origin=sl.Origin(n_ctx=20))
    d.W_dec.data = d.W_dec.data[:, :width].repeat(1, 2)
    d.W_dec.data[:3, :width] = 0
    d.W_dec.data[3, width:] = 0
    d.W_dec.data[4, width:] *= 0.5
    rows = token_rows(random_lm, documents, n_ctx=20, n_tokens=600)
    return sl.FeatureStore.build(d, models, rows, top_n=4, window=(3, 2))


def report(store: sl.FeatureStore, **changed) -> sl.DiffReport:
    from saelens_lite.diffing.report import CROSSCODER

    n = store.info.d_sae
    values = {name: torch.rand(n, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(CROSSCODER)}
    facts = {"base": "base", "tuned": "chat", "place": "", "source": "", "n_tokens": 9, "n_units": 9, "units": "rows"}
    return sl.DiffReport(**facts | {"values": values} | changed)


@pytest.fixture(scope="module")
def page(store, tmp_path_factory) -> Data:
    return Data(Page(store.dashboard(tmp_path_factory.mktemp("page") / "page.html").read_text(encoding="utf-8")))


def test_classes_follow_from_the_norms_without_a_diff(page, store):
    assert page.layout["classes"] == ["chat only", "base only", "shared", "other", "unknown"]
    assert (page.layout["models"], page.layout["compared"], page.layout["by_diff"]) == (
        ["base", "chat"],
        ["base", "chat"],
        False,
    )
    names = [page.layout["classes"][i] for i in page.index["class"][:, 0]]
    fires = (store.tensors.count > 0).tolist()
    wanted = ["chat only"] * 3 + ["base only", "other"] + ["shared"] * (D_SAE - 5)
    assert names == [name if there else "unknown" for name, there in zip(wanted, fires, strict=True)]
    assert sum(fires) > 15
    assert page.index["delta_norm"][:5, 0].tolist() == pytest.approx([0, 0, 0, 1, 0.75], abs=1e-3)


def test_a_latents_own_columns_are_those_of_the_store(page, store):
    details, m = page.details, store.models
    for name, wanted in (("norm", m.norm), ("mean_part", m.mean_part), ("best_part", m.best_part), ("top_part", m.top_part)):
        assert details[name].reshape(wanted.shape) == pytest.approx(wanted.numpy(), rel=1e-2), name
    words = page.words["vocabulary"]
    for latent in range(D_SAE):
        for at, model in enumerate(("base", "chat")):
            shown = [words[i] for i in details["model_promoted"][latent].reshape(2, -1)[at]]
            assert shown == [token for token, _ in store.promoted(latent, model)]
            best = details["best"][latent].reshape(2, -1)[at], details["best_nearby"][latent].reshape(2, -1)[at]
            wanted = [(one.tokens, one.peak, one.row, one.position) for one in store.top_examples(latent, model=model)]
            assert [(one[0], *one[2:]) for one in page.contexts(*best)] == wanted


def test_a_diff_replaces_the_numbers_and_classes(store):
    diff = report(store)
    shown = content(store, diff=diff)
    assert (shown.facts["by_diff"], shown.facts["compared"]) == (True, ["base", "chat"])
    assert [shown.facts["classes"][i] for i in shown.index["class"]] == diff.classes()
    for name in ("delta_norm", "nu_error", "nu_reconstruction", "mirror_error"):
        assert torch.equal(torch.from_numpy(shown.index[name]), diff[name])
    assert torch.equal(torch.from_numpy(shown.index["model_cosine"]), diff["cosine"])


def test_a_diff_of_something_else_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match="the diff is of base and tuned, but the store is of base, chat"):
        store.dashboard(tmp_path / "page.html", diff=report(store, tuned="tuned"))
    few = {name: x[:5] for name, x in report(store).values.items()}
    with pytest.raises(ConfigError, match="the diff is of 5 latents, but the store of 24"):
        store.dashboard(tmp_path / "page.html", diff=report(store, values=few))


def test_names_of_models_do_not_become_markup(store, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    other = copy.copy(store)
    facts = (ModelFacts(name="base", model=hostile), ModelFacts(name=hostile))
    other.info = store.info.replace(models=facts, model=hostile)
    page = Page(other.dashboard(tmp_path / "page.html").read_text(encoding="utf-8"))
    assert json.loads(page.text("script", "layout"))["models"] == ["base", hostile]
    assert not [tag for tag, attrs in page.elements if tag in ("img", "iframe") or any(name.startswith("on") for name in attrs)]
