"""Feature stores of activations without a model or a text: rows by name, in groups, and what such stores refuse."""

import base64
import math
import re
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from test_dashboard import Data, Page

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, OutputExistsError, ShapeError, UserError
from saelens_lite.features import words_of_label
from saelens_lite.features.dashboard import images
from saelens_lite.features.rows import ExampleRow, evidence
from saelens_lite.features.store_files import _are_rows

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
        (lambda store: store.score(model=words_of_label), "scores of labels"),
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


def test_a_store_of_rows_must_have_its_shape(store):
    rows, info, tensors = store.rows.tensors, store.info, store.tensors
    assert _are_rows(info, tensors, rows)
    assert not _are_rows(info.replace(window=(1, 0)), tensors, rows)
    assert not _are_rows(info, tensors._replace(tokens=tensors.tokens.flip(0)), rows)
    assert not _are_rows(info, tensors._replace(tokens=tensors.tokens.reshape(-1, 2)), rows)


def picture(path, size=(40, 30), kind="PNG", mode="RGB", colour=(200, 30, 60)) -> str:
    """Write an image of one colour and return its path."""
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, size, colour).save(path, kind)
    return str(path)


@pytest.fixture
def pictured(made, tmp_path) -> sl.FeatureStore:
    """Rows named by image files, of which every third is missing and one is damaged."""
    names = []
    for i in range(N):
        path = tmp_path / "photos" / f"{i}.png"
        names.append(picture(path, (300, 150), colour=(i, 0, 0)) if i % 3 else str(path))
    Path(names[1]).write_bytes(Path(names[1]).read_bytes()[:60])
    return sl.FeatureStore.from_activations(*made[:2], names, [f"<b>{i % 4}</b>" for i in range(N)])


def page_of(store: sl.FeatureStore, folder: Path, **options) -> Data:
    path = store.dashboard(folder / "page.html", exists="overwrite", **options)
    return Data(Page(path.read_text(encoding="utf-8")))


def image_of(uri: str):
    """Return the image in a data URI."""
    head, data = uri.split(",")
    assert head == "data:image/webp;base64"
    return pytest.importorskip("PIL.Image").open(BytesIO(base64.b64decode(data, validate=True)))


def test_the_page_says_what_the_store_says(store, tmp_path):
    store.labels[2] = "<b>a label</b>"
    data = page_of(store, tmp_path)
    del store.labels[2]
    words, layout = data.words["vocabulary"], data.layout
    assert (layout["unit"], layout["n_tokens"], layout["bos"], layout["images"]) == ("row", N, None, {})
    assert data.words["labels"] == {"2": "<b>a label</b>"}
    assert not {"promoted", "suppressed", "logit_histogram"} & (data.index.keys() | data.details.keys())

    def rows(at, values):
        """Return (name, value, group, row) of the shown rows, as the page's script reads them."""
        starts = data.spans["at"][:, 0].tolist()
        group = data.tokens["group"][:, 0]
        return [
            (words[data.tokens["token"][j, 0]], f"{value:.3g}", words[group[j]], int(data.spans["row"][starts.index(j), 0]))
            for j, value in zip(at.tolist(), values.tolist(), strict=True)
            if value > 0
        ]

    for latent in range(D_SAE):
        one = {name: column[latent] for name, column in data.details.items()}
        shown = {
            "top": (rows(data.index["top"][latent], one["top_nearby"]), store.top_examples(latent)),
            "random": (rows(one["random"], one["random_nearby"]), store.random_examples(latent)),
            "distinct": (rows(one["distinct"], one["distinct_nearby"]), store.top_examples(latent, one_per_group=True)),
        }
        for found, examples in shown.values():
            assert found == [(e.name, f"{e.value:.3g}", e.group, e.row) for e in examples]
        rates = store.group_profile(latent)
        columns = (one["rate_group"], one["rate_count"], one["rate_rows"])
        table = [(words[g], count, size) for g, count, size in zip(*columns, strict=True) if count]
        assert table == [(rate.group, rate.count, rate.n_rows) for rate in rates]
        if rates:
            assert words[data.index["group"][latent, 0]] == rates[0].group
            assert float(data.index["group_rate"][latent, 0]) == pytest.approx(rates[0].firing_rate, rel=1e-3)


def test_the_page_has_thumbnails_and_names_where_there_is_none(pictured, tmp_path, caplog):
    data = page_of(pictured, tmp_path)
    names = {data.words["vocabulary"][int(i)]: uri for i, uri in data.layout["images"].items()}
    shown = {data.words["vocabulary"][i] for i in data.tokens["token"][:, 0].tolist()}
    wanted = {name for name in shown if int(Path(name).stem) % 3 and Path(name).stem != "1"}
    assert names.keys() == wanted
    assert len(wanted) > 20
    for name, uri in names.items():
        image = image_of(uri)
        assert image.size == (128, 64)
        assert abs(image.convert("RGB").getpixel((60, 30))[0] - int(Path(name).stem)) <= 3
    assert f"{len(shown - wanted)} of {len(shown)} images cannot be read" in caplog.text


def test_only_images_in_the_data_may_be_shown(pictured, store, tmp_path):
    def policy(one: sl.FeatureStore) -> str:
        page = Page(one.dashboard(tmp_path / "page.html", exists="overwrite").read_text(encoding="utf-8"))
        assert not [tag for tag, _ in page.elements if tag in ("img", "b")]
        return next(attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs)

    assert "; img-src data:; " in policy(pictured)
    assert "img-src" not in policy(store)


def test_a_loaded_store_reads_only_files_in_the_given_folder(pictured, tmp_path, caplog):
    loaded = sl.FeatureStore.load(pictured.save(tmp_path / "store"))
    assert page_of(loaded, tmp_path).layout["images"] == {}
    assert "images=" in caplog.text
    assert page_of(loaded, tmp_path, images=tmp_path / "photos").layout == page_of(pictured, tmp_path).layout
    assert page_of(pictured, tmp_path, images=False).layout["images"] == {}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"none of the \d+ images can be read"):
        loaded.dashboard(tmp_path / "other.html", images=tmp_path / "empty")
    assert not (tmp_path / "other.html").exists()


@pytest.mark.parametrize("with_pillow", [True, False])
def test_which_files_become_thumbnails(tmp_path, monkeypatch, with_pillow):
    folder = tmp_path / "photos"
    files = {kind: picture(folder / f"a.{kind}", kind=kind) for kind in ("png", "jpeg", "gif", "webp")}
    picture(tmp_path / "outside.png")
    big = picture(folder / "big.png", (400, 400))
    with open(big, "ab") as file:
        file.write(bytes(images.MAX_WHOLE))
    (folder / "text.png").write_text("<svg onload=alert(1)>")
    (folder / "folder.png").mkdir()
    if not with_pillow:
        monkeypatch.setitem(sys.modules, "PIL", None)
    found = {kind: images._data_uri(Path(name).name, folder) for kind, name in files.items()}
    kinds = {kind: "webp" if with_pillow else kind for kind in files}
    assert all(uri.startswith(f"data:image/{kinds[kind]};base64,") for kind, uri in found.items())
    assert (images._data_uri("big.png", folder) is not None) == with_pillow
    assert images._data_uri(str(folder / "a.png"), folder) == found["png"]
    assert images._data_uri("../outside.png", folder) is None
    assert images._data_uri("../outside.png", None) is None
    strange = ["text.png", "folder.png", "missing.png", "https://example.org/a.png", "//host/share/a.png", "a\0.png"]
    for name in [*strange, "\\\\host\\share\\a.png", "x" * 5000 + ".png", "\ud800.png"]:
        assert images._data_uri(name, folder) is None


def test_thumbnails_keep_what_they_show(tmp_path):
    """Transparency, the turn that a camera notes, deep greys; a small image keeps every pixel."""
    image = pytest.importorskip("PIL.Image")

    def thumbnail(original, kind="PNG", **options):
        original.save(tmp_path / "one.png", kind, **options)
        return image_of(images._data_uri("one.png", tmp_path))

    clear = thumbnail(image.new("RGBA", (20, 20), (9, 8, 7, 0)))
    assert clear.mode == "RGBA"
    assert clear.getextrema()[3] == (0, 0)
    turned = image.Exif()
    turned[0x0112] = 6
    assert thumbnail(image.new("RGB", (40, 10)), "JPEG", exif=turned).size == (10, 40)
    deep = thumbnail(image.fromarray(np.array([[1000, 3000], [2000, 1000]], np.uint16)))
    assert np.asarray(deep.convert("L")).tolist() == [[0, 255], [127, 0]]
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert np.array_equal(np.asarray(thumbnail(image.fromarray(noise)).convert("RGB")), noise)


def test_thumbnails_beyond_the_limit_are_left_out_weakest_first(pictured, caplog):
    every = images.thumbnails(pictured)
    few = images.thumbnails(pictured, limit=sum(map(len, every.values())) // 2)
    assert 5 < len(few) < len(every)
    assert few.items() <= every.items()
    strongest = {pictured.top_examples(latent)[0].row for latent in range(D_SAE - 1)}
    assert strongest & every.keys() <= few.keys()
    assert "the page has room for" in caplog.text


def test_hostile_names_and_groups_stay_text_in_the_page_and_the_notebook(made, tmp_path):
    names = [HOSTILE[i % len(HOSTILE)] + str(i) for i in range(N)]
    store = sl.FeatureStore.from_activations(*made[:2], names, names)
    plain = sl.FeatureStore.from_activations(*made[:2], [f"row {i}" for i in range(N)], list(range(N)))
    pages = [one.dashboard(tmp_path / "page.html", exists="overwrite").read_text(encoding="utf-8") for one in (store, plain)]
    assert Page(pages[0]).elements == Page(pages[1]).elements
    views = [one.latent(0)._repr_html_() + one._repr_html_() for one in (store, plain)]
    assert [tag for tag, _ in Page(views[0]).elements] == [tag for tag, _ in Page(views[1]).elements]


def test_notebook_views_speak_of_rows(store, made):
    html = store.latent(0)._repr_html_() + store._repr_html_()
    assert "protein" in html
    assert "zero 100 %" in html
    assert not re.search("token|promotes", html)
