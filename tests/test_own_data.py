"""Feature stores of activations without a model or a text: rows by name, in groups, and what such stores refuse."""

import math
import re

import numpy as np
import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, OutputExistsError, ShapeError, UserError
from saelens_lite.features.rows import ExampleRow, evidence

D_IN, D_SAE, N, N_SEEN = 12, 8, 90, 5
SILENT = 7
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "\ud800", "line\u2028end", "{{7*7}}", ""]


def planted() -> tuple[sl.Dictionary, torch.Tensor, np.ndarray]:
    """Return a dictionary, activations, and the codes that were planted: latent i reads direction i, one or two a row."""
    rng = np.random.default_rng(0)
    directions = torch.linalg.qr(torch.randn(D_IN, D_SAE, generator=torch.Generator().manual_seed(1))).Q.T.contiguous()
    d = sl.Dictionary.create("topk", reads=D_IN, d_sae=D_SAE, options={"k": 2}, seed=0)
    d.W_enc.data, d.W_dec.data = directions.T.contiguous(), directions.clone()
    codes = np.zeros((N, D_SAE), np.float32)
    for row in range(N):
        codes[row, row % N_SEEN] = rng.uniform(1, 2)
        codes[row, 5 + row % 2] = rng.uniform(0.2, 0.4)
    d.b_enc.data[SILENT] = -1e4
    return d, torch.from_numpy(codes) @ directions, codes


@pytest.fixture(scope="module")
def made():
    return planted()


@pytest.fixture(scope="module")
def names() -> list[str]:
    return [f"protein {i}" for i in range(N)]


@pytest.fixture(scope="module")
def groups() -> list[str]:
    """A group of latent 0's rows only, three groups across everything else."""
    return ["zero" if i % N_SEEN == 0 else f"g{i % 3}" for i in range(N)]


@pytest.fixture(scope="module")
def store(made, names, groups) -> sl.FeatureStore:
    return sl.FeatureStore.from_activations(made[0], made[1], names, groups, batch_tokens=7, top_n=6)


def test_strongest_rows_are_the_planted_ones(made, store, names, groups):
    codes = made[2]
    for latent in range(7):
        order = np.argsort(-codes[:, latent], kind="stable")[:6]
        found = store.top_examples(latent)
        assert [(row.name, row.group, row.row) for row in found] == [(names[i], groups[i], i) for i in order]
        assert [row.value for row in found] == pytest.approx(codes[order, latent].tolist(), rel=1e-5)
    assert store.top_examples(SILENT) == []
    name, value, group, row = store.top_examples(0)[0]
    assert (name, value, group) == (names[row], pytest.approx(codes[:, 0].max()), "zero")


def test_statistics_agree_with_the_planted_codes(made, store):
    codes = made[2].astype(np.float64)
    for latent in range(7):
        fires = codes[:, latent][codes[:, latent] > 0]
        summary = store.latent(latent)
        assert (summary.count, summary.density) == (len(fires), len(fires) / N)
        assert (summary.max, summary.mean, summary.std) == pytest.approx((fires.max(), fires.mean(), fires.std()), rel=1e-5)
        counts = np.histogram(fires, 32, (0, summary.max * (1 + 1e-6)))[0]
        assert summary.histogram == counts.tolist()
        for group in summary.groups:
            assert all(group.low - 1e-6 <= row.value <= group.high + 1e-6 for row in group.examples)
        assert sum(group.share for group in summary.groups) == pytest.approx(1)
        assert all(codes[row.row, latent] > 0 for row in summary.random)
        assert all(codes[row.row, latent] == 0 == row.value for row in store.silent_examples(latent))
        together = ((codes > 0) & (codes[:, [latent]] > 0)).sum(0)
        assert all(partner.count == together[partner.latent] for partner in store.partners(latent, "count"))
    assert store.never_fires.tolist() == [i == SILENT for i in range(D_SAE)]
    cosines = made[0].W_dec @ made[0].W_dec.T
    nearest = store.weights.decoder_neighbours[0]
    assert torch.allclose(store.weights.decoder_cosine[0], cosines[0, nearest.long()], atol=1e-6)


def test_group_profile_agrees_with_counting(made, store, groups):
    codes, labels = made[2], np.array(groups)
    for latent in range(7):
        found = store.group_profile(latent)
        assert {rate.group for rate in found} == set(labels[codes[:, latent] > 0])
        for rate in found:
            own = codes[labels == rate.group, latent]
            expected = (len(own), (own > 0).sum(), (own > 0).mean(), own[own > 0].mean())
            assert (rate.n_rows, rate.count, rate.firing_rate, rate.mean_activation) == pytest.approx(expected, rel=1e-5)
    assert [(rate.group, rate.firing_rate) for rate in store.group_profile(0)] == [("zero", 1.0)]


def test_rows_of_distinct_groups_are_the_best_of_each(made, store, groups):
    codes, labels = made[2], np.array(groups)
    for latent in range(7):
        best = {label: max(np.flatnonzero(labels == label), key=lambda i: (codes[i, latent], -i)) for label in set(groups)}
        order = sorted((i for i in best.values() if codes[i, latent] > 0), key=lambda i: -codes[i, latent])
        assert [row.row for row in store.top_examples(latent, one_per_group=True)] == order


def test_groups_are_ordered_by_evidence_not_by_size():
    """A small group on which a latent always fires comes before large ones that it hits by chance, or one lucky row."""
    count, size = torch.tensor([20, 25, 1, 10]), torch.tensor([20, 2500, 1, 2500])
    found = evidence(count, size, torch.full((4,), 250), 25_000)
    p = 0.01
    expected = [
        20 * math.log(1 / p),
        0.0,
        math.log(1 / p),
        -(10 * math.log(10 / 25) + 2490 * math.log(2490 / 2475)),
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    always = evidence(torch.tensor([3]), torch.tensor([3]), torch.tensor([9]), 9)
    assert always.tolist() == [0.0]


@pytest.mark.parametrize("kind", ["numpy", "frame", "list", "memmap", "batches"])
def test_every_kind_of_array_gives_the_same_store(made, store, names, groups, kind, tmp_path):
    d, x, _ = made
    given, batch = x.numpy(), 7
    if kind == "frame":
        pandas = pytest.importorskip("pandas")
        given, names = pandas.DataFrame(given, index=names), None
        groups = pandas.Series(groups)
    elif kind == "list":
        given = given.tolist()
    elif kind == "memmap":
        np.save(tmp_path / "x.npy", given)
        given = np.load(tmp_path / "x.npy", mmap_mode="r")
    elif kind == "batches":
        batch = 1000
    again = sl.FeatureStore.from_activations(d, given, names, groups, batch_tokens=batch, top_n=6)
    pairs = [*zip(again.tensors, store.tensors, strict=True), *zip(again.rows.tensors, store.rows.tensors, strict=True)]
    assert all(a.dtype == b.dtype and torch.allclose(a.double(), b.double(), rtol=1e-6) for a, b in pairs)
    assert again.vocabulary == store.vocabulary


def test_a_saved_store_is_the_same(made, store, names, groups, tmp_path):
    store.label(3, "a guess")
    folder = store.save(tmp_path / "saved")
    loaded = sl.FeatureStore.load(folder, made[0])
    assert (loaded.info, loaded.labels, repr(loaded)) == (store.info, {3: "a guess"}, repr(store))
    for latent in range(D_SAE):
        assert loaded.latent(latent) == store.latent(latent)
        assert loaded.top_examples(latent, one_per_group=True) == store.top_examples(latent, one_per_group=True)
    store.label(3, "")
    out = tmp_path / "built"
    sl.FeatureStore.from_activations(*made[:2], names, groups, batch_tokens=7, top_n=6, out=out)
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {name: (folder / name).read_bytes() for name in written} == written
    with pytest.raises(OutputExistsError):
        sl.FeatureStore.from_activations(*made[:2], out=out)
    sl.FeatureStore.from_activations(*made[:2], out=out, exists="overwrite")
    assert sl.FeatureStore.load(out).top_examples(0)[0].group is None


def test_hostile_names_and_groups_survive_a_round_trip(made, tmp_path):
    names = [HOSTILE[i % len(HOSTILE)] for i in range(N)]
    folder = tmp_path / "store"
    sl.FeatureStore.from_activations(*made[:2], names, names[::-1], out=folder)
    loaded = sl.FeatureStore.load(folder)
    written = [name.replace("\ud800", "\\ud800") for name in names]
    assert list(loaded.vocabulary) == written
    assert all((row.name, row.group) == (written[row.row], written[::-1][row.row]) for row in loaded.top_examples(0))


def test_without_names_rows_are_numbered_and_without_groups_there_are_none(made):
    store = sl.FeatureStore.from_activations(*made[:2])
    assert all(row == ExampleRow(str(row.row), row.value, None, row.row) for row in store.top_examples(0))
    for ask in (lambda: store.group_profile(0), lambda: store.top_examples(0, one_per_group=True)):
        with pytest.raises(UserError, match="no groups"):
            ask()


def test_the_codes_table_has_rows_by_name(made, names, tmp_path):
    pytest.importorskip("duckdb")
    store = sl.FeatureStore.from_activations(*made[:2], names, codes=True, out=tmp_path / "store")
    found = store.sql("select text, value from codes join tokens using (token) where latent = 2 order by value desc limit 10")
    assert list(zip(*found.to_pydict().values(), strict=True)) == [(row.name, row.value) for row in store.top_examples(2)]


def test_a_transcoder_needs_only_its_input(made):
    _, x, _ = made
    d = sl.Dictionary.create("topk", reads=D_IN, writes=sl.Port(width=5), d_sae=D_SAE, options={"k": 2}, seed=0)
    store = sl.FeatureStore.from_activations(d, x)
    dense = d.encode(x).to_dense()
    assert store.tensors.count.tolist() == (dense > 0).sum(0).tolist()


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda store: store.promoted(0), "effects on tokens"),
        (lambda store: store.suppressed(0), "effects on tokens"),
        (lambda store: store.promoting(" the"), "effects on tokens"),
        (lambda store: store.position_profile(0), "positions"),
        (lambda store: store.detection(0), "detection"),
        (lambda store: store.export("neuronpedia", "out"), "neuronpedia"),
    ],
)
def test_what_needs_a_text_says_that_there_is_none(store, ask, what):
    with pytest.raises(UserError, match=f"{what}.*built from activations"):
        ask(store)


def test_a_prompt_view_needs_a_store_with_a_text(random_lm):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook="blocks.1.hook_resid_pre", width=48), d_sae=16, options={"k": 4})
    store = sl.FeatureStore.from_activations(d, torch.randn(50, 48, generator=torch.Generator().manual_seed(0)))
    assert "blocks.1.hook_resid_pre" in repr(store)
    with pytest.raises(UserError, match=r"prompt view.*built from activations"):
        sl.prompt_view(d, random_lm, "some text", store=store)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"names": ["a"]}, ShapeError, "names has 1 entries for 90 rows"),
        ({"groups": list(range(91))}, ShapeError, "groups has 91 entries for 90 rows"),
        ({"names": "abc"}, ConfigError, "names is 'abc'"),
        ({"groups": [*["a"] * 4, None, *["b"] * 85]}, ConfigError, r"groups\[4\] is missing"),
        ({"groups": np.array([*[1.0] * 89, np.nan])}, ConfigError, r"groups\[89\] is missing"),
        ({"names": ["x" * 70_000] * N}, ConfigError, "70,000 characters"),
        ({"x": torch.zeros(D_IN)}, ShapeError, "expected \\[n 12\\]"),
        ({"x": torch.zeros(0, D_IN)}, ShapeError, "at least one row"),
        ({"x": torch.zeros(N, 5)}, ShapeError, "takes"),
        ({"x": np.zeros((N, D_IN), int)}, ShapeError, "floating-point"),
        ({"x": torch.zeros(N, D_IN)}, UserError, "none of the 8 latents fires on x"),
        ({"control": True}, ConfigError, "control needs a model"),
        ({"window": (3, 3)}, ConfigError, "window needs a model"),
        ({"top": 3}, ConfigError, "top"),
        ({"codes": True}, ConfigError, "give out="),
    ],
)
def test_bad_input_is_named(made, change, error, text):
    given = {"x": made[1], **change}
    with pytest.raises(error, match=text):
        sl.FeatureStore.from_activations(made[0], **given)


def test_the_row_with_nan_is_named_and_nothing_is_written(made, names, tmp_path):
    x = made[1].clone()
    x[37, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=re.escape("row 37 (protein 37)")):
        sl.FeatureStore.from_activations(made[0], x, names, batch_tokens=16, out=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_damaged_rows_are_refused(store, tmp_path):
    folder = store.save(tmp_path / "store")
    whole = (folder / "rows.safetensors").read_bytes()
    (folder / "rows.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match="checksum"):
        sl.FeatureStore.load(folder)
    (folder / "rows.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"rows\.safetensors"):
        sl.FeatureStore.load(folder)


FORGED = {
    "a group that does not exist": {"group_of_row": lambda x: x + 100},
    "a row that does not exist": {"distinct_place": lambda x: x + N},
    "more firing rows than rows": {"rate_count": lambda x: x + 1000},
    "ends beyond the text": {"name_end": lambda x: x + 5},
    "ends that fall": {"name_end": lambda x: x.flip(0)},
    "bytes that are not text": {"label_text": lambda x: x | 0x80},
}


@pytest.mark.parametrize("what", FORGED)
def test_rows_that_contradict_the_store_do_not_fit(store, what):
    tensors, count = store.rows.tensors, store.tensors.count
    assert tensors.fit(count, N, 6)
    changed = {name: change(getattr(tensors, name)) for name, change in FORGED[what].items()}
    assert not tensors._replace(**changed).fit(count, N, 6)
