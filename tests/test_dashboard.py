"""The dashboard: its data, decoded here as a browser does, against the store; and what its markup may and may not contain."""

import base64
import copy
import hashlib
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch

import saelens_lite as sl
from saelens_lite.features.dashboard import block
from saelens_lite.features.dashboard.block import CHUNK
from saelens_lite.features.dashboard.content import N_CONTROL, ShownText
from saelens_lite.features.label import Label
from saelens_lite.tokens import token_rows

HOOK, D_MODEL, D_SAE = "blocks.1.hook_resid_pre", 48, CHUNK + 20
WINDOW = (5, 2)
SILENT = 70
DEAD = 33  # in the comparison with another seed: nothing is known of it, which is not 0
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    '"><svg onload=alert(3)>',
    "{{7*7}}",
    "{% raw %}",
    "line\u2028separator",
    "\u202eright to left\u200f",
    "\ud800",
    "\x00\x1b",
    "<!--",
]


def made(seed: int) -> sl.Dictionary:
    origin, reads = sl.Origin(n_ctx=20), sl.Port(hook=HOOK, width=D_MODEL)
    d = sl.Dictionary.create("topk", reads=reads, d_sae=D_SAE, options={"k": 8}, seed=seed, origin=origin)
    d.b_enc.data[SILENT] = -1e4
    return d


@pytest.fixture(scope="module")
def store(random_lm, documents) -> sl.FeatureStore:
    """With all there can be: a control, scores of stability, labels."""
    d = made(0)
    rows = token_rows(random_lm, documents, n_ctx=20, n_tokens=600)
    scores = sl.stability(d, made(1))
    scores = replace(scores, live=torch.arange(D_SAE) != DEAD, score=scores.score.index_fill(0, torch.tensor(DEAD), 0))
    store = sl.FeatureStore.build(d, random_lm, rows, top_n=7, window=WINDOW, control=True, stability=scores)
    store.labels |= {3: "the third", 65: "naïve"}
    return store


class Page(HTMLParser):
    """The elements of a page as a browser would find them, and the text of its scripts and style."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.is_open = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = False

    def handle_data(self, data):
        if self.is_open:
            self.texts[-1] += data

    def text(self, tag: str, name: str | None = None) -> str:
        """Return the text of the only element of its kind with this id, or without id."""
        pairs = zip(self.elements, self.texts, strict=True)
        (found,) = [text for (kind, attrs), text in pairs if kind == tag and attrs.get("id") == name]
        return found


class Data:
    """The numbers of a page."""

    def __init__(self, page: Page):
        self.layout = json.loads(page.text("script", "layout"))
        list_parts = self._parts(page.text("script", "list-block"), "list_starts")
        details = self._parts(page.text("script", "details-block"), "details_starts")
        self.words = json.loads(next(list_parts))
        self.tokens, self.spans, self.index = (
            self._columns(part, name) for part, name in zip(list_parts, ("tokens", "spans", "index"), strict=True)
        )
        chunks = [self._columns(part, "details") for part in details]
        self.details = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        self.n_chunks = len(chunks)

    def _parts(self, text: str, starts: str):
        bounds = self.layout[starts]
        assert bounds[-1] == len(text)
        for start, stop in pairwise(bounds):
            yield zlib.decompress(base64.b64decode(text[start:stop], validate=True))

    def _columns(self, part: bytes, name: str) -> dict[str, np.ndarray]:
        described = self.layout["columns"][name]
        n, left = divmod(len(part), sum(np.dtype(kind).itemsize * width for _, kind, width in described))
        assert left == 0
        columns, offset = {}, 0
        for column, kind, width in described:
            numbers = np.frombuffer(part, np.dtype(kind).newbyteorder("<"), n * width, offset)
            columns[column], offset = numbers.reshape(n, width), offset + numbers.nbytes
        return columns

    def contexts(self, at: np.ndarray, nearby: np.ndarray) -> list[tuple]:
        """Return (tokens, values, peak, row, position) of each context, decoded as in the page's script."""
        before, after = self.layout["before"], self.layout["after"]
        starts, found = self.spans["at"][:, 0], []
        for peak, values in zip(at, nearby.reshape(len(at), -1), strict=True):
            if values[before] > 0:
                j = np.searchsorted(starts, peak, side="right") - 1
                end = starts[j + 1] if j + 1 < len(starts) else len(self.tokens["token"])
                begin, end = max(starts[j], int(peak) - before), min(end, int(peak) + after + 1)
                tokens = tuple(self.words["vocabulary"][i] for i in self.tokens["token"][begin:end, 0])
                first = before - (peak - begin)
                shown = values[first : first + len(tokens)]
                position = int(self.spans["position"][j, 0]) + int(peak) - int(starts[j])
                found.append((tokens, shown.tolist(), int(peak - begin), int(self.spans["row"][j, 0]), position))
        return found


def said(numbers) -> list[str]:
    """Return numbers as they are shown, with three digits."""
    return [f"{float(x):.3g}" for x in numbers]


def check_contexts(found: list[tuple], examples: list) -> None:
    assert [(f[0], f[2], f[3], f[4]) for f in found] == [(e.tokens, e.peak, e.row, e.position) for e in examples]
    for (_, values, *_), example in zip(found, examples, strict=True):
        assert said(values) == said(example.values)


@pytest.fixture(scope="module")
def html(store, tmp_path_factory) -> str:
    return store.dashboard(tmp_path_factory.mktemp("page") / "features.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(html) -> Data:
    return Data(Page(html))


def test_list_says_what_the_store_says(store, data):
    assert data.layout["n_tokens"] == store.info.n_tokens
    assert data.words["labels"] == {"3": "the third", "65": "naïve"}
    assert data.index["count"][:, 0].tolist() == store.tensors.count.tolist()
    stability = [np.nan if i == DEAD else float(x) for i, x in enumerate(store.stability)]
    np.testing.assert_allclose(data.index["stability"][:, 0], stability, rtol=2e-5)
    assert data.index["cosine"][:, 0] == pytest.approx(store.weights.encoder_decoder_cosine.numpy(), rel=2e-5)
    for i in range(D_SAE):
        latent = store.latent(i)
        assert said(data.index["max"][i]) == said([latent.max])
        assert said(data.index["mean"][i]) == said([latent.mean])
        assert [data.words["vocabulary"][t] for t in data.index["promoted"][i]] == [text for text, _ in latent.promoted]
        n = int(data.index["n_top"][i, 0])
        assert n == len(latent.examples)
        check_contexts(data.contexts(data.index["top"][i][:1], data.index["first_nearby"][i]), latent.examples[:1])
    assert data.words["vocabulary"][data.layout["bos"]] == store.vocabulary[store.info.bos_id]


def test_every_context_is_there(store, data):
    group_size, width = store.info.group_size, sum(WINDOW) + 1
    n_shown = 0
    for i in range(D_SAE):
        row = {name: column[i] for name, column in data.details.items()}
        check_contexts(data.contexts(data.index["top"][i], row["top_nearby"]), store.top_examples(i))
        check_contexts(data.contexts(row["random"], row["random_nearby"]), store.random_examples(i))
        check_contexts(data.contexts(row["control"], row["control_nearby"]), store.control.top_examples(i)[:N_CONTROL])
        filled = np.flatnonzero(row["group_count"])
        for j, group in zip(filled, store.quantile_examples(i), strict=True):
            at, nearby = row["group"].reshape(-1, group_size)[j], row["group_nearby"].reshape(-1, group_size, width)[j]
            check_contexts(data.contexts(at, nearby), group.examples)
            n_shown += len(group.examples)
            assert row["group_count"][j] / store.tensors.count[i] == pytest.approx(group.share)
            assert said([row["group_low"][j], row["group_high"][j]]) == said([group.low, group.high])
    assert n_shown > 10 * D_SAE


def test_details_say_what_the_store_says(store, data):
    assert data.n_chunks == 2
    for i in range(D_SAE):
        row, latent = {name: column[i] for name, column in data.details.items()}, store.latent(i)
        assert row["histogram"].tolist() == latent.histogram
        assert float(row["bin_width"][0]) == pytest.approx(latent.bin_width, rel=2e-5)
        suppressed = zip(row["suppressed"], row["suppressed_effect"].tolist(), strict=True)
        for (token, effect), (text, exact) in zip(suppressed, latent.suppressed, strict=True):
            assert (data.words["vocabulary"][token], said([effect])) == (text, said([exact]))
        assert said(row["promoted_effect"]) == said([effect for _, effect in latent.promoted])
        assert data.layout["bands"] == [[p.first, p.last] for p in latent.positions]
        assert said(row["band_rate"]) == said([p.firing_rate for p in latent.positions])
        for kind, by in (("frequent", "count"), ("specific", "pmi")):
            partners = store.partners(i, by=by)
            shown = [(int(j), int(n)) for j, n in zip(row[kind], row[f"{kind}_count"], strict=True) if n > 0]
            assert shown == [(p.latent, p.count) for p in partners]
        assert int(row["control_count"][0]) == int(store.control.tensors.count[i])
    for name in ("decoder_neighbours", "encoder_neighbours", "logit_histogram"):
        assert data.details[name].tolist() == getattr(store.weights, name).tolist()
    for name in ("decoder_cosine", "encoder_cosine", "logit_low", "logit_width", "logit_skew", "logit_kurtosis"):
        exact = getattr(store.weights, name).numpy()
        np.testing.assert_allclose(data.details[name], exact.reshape(D_SAE, -1), rtol=2e-5)


def test_a_latent_that_never_fires_has_no_context(store, data):
    assert store.latent(SILENT).count == data.index["n_top"][SILENT, 0] == 0
    for name, column in data.details.items():
        if name.endswith("_nearby") and name != "control_nearby":
            assert not column[SILENT].any()


def test_vocabulary_is_what_appears(store, data):
    columns = (data.tokens["token"], data.index["promoted"], data.details["suppressed"])
    used = {int(i) for column in columns for i in column.flat}
    assert used | {data.layout["bos"]} == set(range(len(data.words["vocabulary"])))
    assert len(data.words["vocabulary"]) < len(store.vocabulary)


def test_page_is_self_contained(html):
    page = Page(html)
    assert [attrs for tag, attrs in page.elements if tag == "script"] == [
        {"type": "application/json", "id": "layout"},
        {"type": "text/plain", "id": "list-block"},
        {},
        {"type": "text/plain", "id": "details-block"},
    ]
    loads = [attrs[name] for _, attrs in page.elements for name in ("src", "href", "srcset", "data", "style") if name in attrs]
    assert loads == ["#"]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    program = page.text("script").replace("http://www.w3.org/2000/svg", "") + page.text("style")
    assert not re.search(
        r"https?:|@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|fetch\(|eval\(", program
    )


def test_only_our_script_and_style_may_run(html):
    page = Page(html)
    (policy,) = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.text(kind).encode()).digest()).decode()
        assert rules.pop(f"{kind}-src") == f"'sha256-{digest}'"
    assert not rules


def test_hostile_tokens_labels_and_names_stay_text(store, html, tmp_path):
    n = len(store.vocabulary)
    words = [HOSTILE[i % len(HOSTILE)] + str(i) for i in range(n)]
    labels = {i: HOSTILE[i % len(HOSTILE)] for i in range(D_SAE)}
    labels |= {i: Label(labels[i], HOSTILE[i + 1], HOSTILE[i]) for i in range(2, 4)}
    info = store.info.replace(
        text=HOSTILE[6], model=HOSTILE[0], revision=HOSTILE[1], reads=(HOSTILE[2],), rule=HOSTILE[3], writes=(HOSTILE[9],)
    )
    hostile = sl.FeatureStore(info, store.tensors, store.weights, words, labels=labels, control=store.control)
    found = hostile.dashboard(tmp_path / "features.html").read_text(encoding="utf-8")
    assert Page(found).elements == Page(html).elements
    assert found.count("</script>") == 4
    assert not re.search("[\u202e\u200f]", found)
    assert not re.search("<img|<svg|49", found.split("<script", 1)[0])
    shown = Data(Page(found)).words
    assert shown["labels"] == {str(i): label for i, label in labels.items()}
    assert shown["origins"] == ["", *sorted(label.origin for label in labels.values() if isinstance(label, Label))]
    assert set(shown["vocabulary"]) <= set(words)
    for one in HOSTILE:
        assert any(word.startswith(one) for word in shown["vocabulary"])


def test_the_page_names_the_origin_of_imported_labels(store, tmp_path):
    twin = copy.copy(store)
    by = {5: ("a", "Neuronpedia"), 9: ("b", "Neuronpedia"), 11: ("a", "Neuronpedia"), 65: ("", "elsewhere")}
    twin.labels = store.labels | {i: Label(f"label {i}", source, author) for i, (author, source) in by.items()}
    data = Data(Page(twin.dashboard(tmp_path / "features.html").read_text(encoding="utf-8")))
    shown = {i: data.words["origins"][number] for i, number in enumerate(data.index["origin"].flatten().tolist()) if number}
    assert shown == {5: "a, Neuronpedia", 9: "b, Neuronpedia", 11: "a, Neuronpedia", 65: "elsewhere"}
    assert data.words["labels"]["5"] == "label 5"


def test_what_does_not_exist_has_no_column(random_lm, documents, tmp_path):
    """A hook whose width is not the stream's, no control, no scores, no labels."""
    d = sl.Dictionary.create(
        "topk", reads=sl.Port(hook="blocks.0.mlp.out.hook_in", width=4 * D_MODEL), d_sae=24, options={"k": 3}
    )
    store = sl.FeatureStore.build(d, random_lm, documents[:2])
    data = Data(Page(store.dashboard(tmp_path / "features.html").read_text(encoding="utf-8")))
    assert not {"promoted", "stability", "origin"} & data.index.keys()
    assert not [name for name in data.details if name.startswith(("control", "logit", "suppressed", "promoted"))]
    assert data.words["labels"] == {}
    assert data.layout["control_tokens"] is None
    check_contexts(data.contexts(data.index["top"][0], data.details["top_nearby"][0]), store.top_examples(0))


@pytest.mark.parametrize("n", [0, 1, 5, 60])
def test_shown_text_is_the_union_of_the_windows(n):
    generator = np.random.default_rng(n)
    n_seq, n_ctx, (before, after) = 12, 9, WINDOW
    tokens = generator.permutation(n_seq * n_ctx).reshape(n_seq, n_ctx)
    length = generator.integers(1, n_ctx + 1, n_seq)
    within = [row * n_ctx + position for row in range(n_seq) for position in range(length[row])]
    places = generator.choice(within, n)
    shown = ShownText.of(tokens, length, places, WINDOW)
    union = set()
    for place in places:
        row, position = divmod(int(place), n_ctx)
        last = min(position + after, int(length[row]) - 1)
        union |= {row * n_ctx + p for p in range(max(0, position - before), last + 1)}
    assert shown.tokens.tolist() == [int(tokens.flat[place]) for place in sorted(union)]
    assert shown.tokens[shown.index(places)].tolist() == tokens.flat[places].tolist()
    assert shown.index(np.array([-1, -1])).tolist() == [0, 0]
    ends = np.append(shown.at[1:], len(shown.tokens)) - shown.at + shown.start
    assert all(start // n_ctx == (end - 1) // n_ctx for start, end in zip(shown.start, ends, strict=True))


@pytest.mark.parametrize(
    ("largest", "kind"),
    [(0, "uint8"), (255, "uint8"), (256, "uint16"), (65536, "uint32"), (2**32 - 1, "uint32"), (2**32, "float64")],
)
def test_whole_numbers_keep_their_value(largest, kind):
    found = block._small(np.array([[0, largest]]))
    assert (found.dtype.name, found.tolist()) == (kind, [[0, largest]])


def test_other_numbers_keep_the_digits_that_are_shown():
    """The first is of those whose last digit depends on bits that are dropped."""
    drawn = torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,))
    exact = torch.cat([torch.tensor([1.3151641, 0, 1, -0.5, 9.996, 1e-38]), drawn]).numpy()
    shown, fine = block._float("max", exact), block._float("cosine", exact)
    assert said(shown) == said(exact)
    assert not (shown.view(np.uint32) & 0xFFF).any()
    np.testing.assert_allclose(fine, exact, rtol=2**-16)
    assert not (fine.view(np.uint32) & 0xFF).any()
    unknown = np.array([np.nan, 0.5], np.float32)
    np.testing.assert_array_equal(block._float("stability", unknown), unknown)


def test_the_page_shows_characters_of_several_tokens(random_lm, tmp_path):
    """Windows that begin or end inside a character, too; a query finds it in the text of the page."""
    text = "老人看着大海，说：สวัสดี👩‍💻é"
    store = sl.FeatureStore.build(made(0), random_lm, [text[i:] + text[:i] for i in range(8)], window=(3, 1), control=True)
    assert store.vocabulary.parts
    data = Data(Page(store.dashboard(tmp_path / "features.html").read_text(encoding="utf-8")))
    for latent in range(D_SAE):
        check_contexts(data.contexts(data.index["top"][latent], data.details["top_nearby"][latent]), store.top_examples(latent))
    shown = "".join(data.words["vocabulary"][i] for i in data.tokens["token"][:, 0].tolist())
    assert set(text) <= set(shown)
    assert "老人看" in shown
    assert not re.search(r"\\x[89a-f]|\ufffd", shown)
