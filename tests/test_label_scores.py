"""Scores of labels in files, in cards and tables, on the page, and labels in exports for Neuronpedia."""

import base64
import copy
import gzip
import json
import math
import re
import statistics
import zlib
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise

import pytest

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError, LockedError, OutputExistsError, UserError
from saelens_lite.evaluation.metrics import Metric
from saelens_lite.features import StoreInfo
from saelens_lite.features.explaining.scores import Judged, LabelScore, Scores
from saelens_lite.features.explaining.scoring import made_from_shown
from saelens_lite.features.label import Label
from saelens_lite.features.label_scores import exceeds_controls, write_scores
from saelens_lite.hub import model_card
from saelens_lite.hub.label_card import PublishedLabels, labels_text
from saelens_lite.hub.upload import _prepare
from saelens_lite.locks import locked

D_SAE = 24
CREATED = datetime(2026, 1, 2, tzinfo=UTC)
HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\x1b[31m"
KEYS = {
    "id", "modelId", "layer", "index", "description", "typeName", "explanationModelName", "createdAt",  # documented
    "authorId",
}  # fmt: skip


@pytest.fixture(scope="module")
def d() -> sl.Dictionary:
    return sl.Dictionary.create("topk", reads=sl.Port(hook="blocks.1.hook_resid_pre", width=48), d_sae=D_SAE, options={"k": 4})


@pytest.fixture(scope="module")
def built(d, random_lm) -> sl.FeatureStore:
    texts = ["It was the best of times, it was the worst of times", "Read the license before you use it"]
    return sl.FeatureStore.build(d, random_lm, texts, window=(3, 2), top_n=3, seed=0)


@pytest.fixture
def store(built, tmp_path) -> sl.FeatureStore:
    return sl.FeatureStore.load(built.save(tmp_path / "store"))


def judged(auroc: float, balanced: float | None = None, half: float | None = 0.05, unusable: int = 0) -> Judged:
    """Return a result with intervals of this half width; None stands for no interval."""

    def metric(value: float) -> Metric:
        return Metric(value, math.nan, math.nan) if half is None else Metric(value, value - half, value + half)

    return Judged(metric(auroc), metric(auroc if balanced is None else balanced), unusable)


def score(
    latent: int, label: str, auroc: float = 0.9, kind: str = "detection", judge: str = "a judge", **results
) -> LabelScore:
    controls = {"by_tokens": judged(0.7), "of_random_latent": judged(0.5), "shuffled": judged(0.4)}
    return LabelScore(latent, label, kind, judge, 20, 30, judged(auroc, auroc - 0.1), **(controls | results))


FULL = [
    score(3, "by a model", hard=judged(0.6), n_hard=9, recall=(1.0, None, 0.25), is_graded=True, made_elsewhere=True),
    score(3, "by a model", 0.72, "fuzzing", judge="another"),
    score(5, "mine", 0.55, by_tokens=None, of_random_latent=None, shuffled=None),
]


@pytest.fixture
def scored(store) -> sl.FeatureStore:
    store.label_all({3: Label("by a model", "max_act 1", "gpt-4o-mini"), 8: Label("not scored", "max_act 1", "gpt-4o-mini")})
    store.label(5, "mine")
    assert store.record_scores(FULL) == 3
    return store


def test_scores_are_the_same_after_a_round_trip_through_the_store(scored, tmp_path):
    wanted = {3: {"detection": FULL[0], "fuzzing": FULL[1]}, 5: {"detection": FULL[2]}}
    assert scored.label_scores == wanted
    again = sl.FeatureStore.load(scored.save(tmp_path / "copy"))
    assert again.label_scores == wanted
    assert again.labels == scored.labels
    assert (again.labels[3].source, again.labels[3].author, type(again.labels[5])) == ("max_act 1", "gpt-4o-mini", str)
    scored.write_labels()
    path = scored.write_scores()
    assert path == scored.folder / "scores.json"
    assert path.read_bytes() == (tmp_path / "copy" / "scores.json").read_bytes()
    assert sl.FeatureStore.load(scored.folder).label_scores == wanted
    assert scored.scores_of(3) == FULL[:2]
    assert scored.scores_of(8) == []


def test_results_without_an_interval_come_back_without_one(store):
    store.label(2, "x")
    store.record_scores([LabelScore(2, "x", "fuzzing", "j", 3, 4, judged(1.0, half=None))])
    store.write_labels()
    store.write_scores()
    (one,) = sl.FeatureStore.load(store.folder).scores_of(2)
    assert (one.score.auroc.value, one.score.auroc.has_interval) == (1.0, False)
    assert exceeds_controls(one) is None


def test_a_score_belongs_to_one_text(scored):
    assert scored.record_scores([score(8, "another text"), score(9, "no label at all")]) == 0
    scored.label(3, "a better one")
    assert scored.scores_of(3) == []
    assert set(scored.label_scores) == {5}
    scored.label(3, "by a model")
    assert scored.scores_of(3) == FULL[:2]
    scored.label(3, "")
    assert 3 not in scored.label_scores
    assert scored.record_scores([score(5, "mine", 0.8)]) == 1
    assert scored.scores_of(5)[0].score.auroc.value == 0.8


def test_a_label_that_was_edited_by_hand_has_no_score(scored):
    scored.write_labels()
    scored.write_scores()
    path = scored.folder / "labels.json"
    content = json.loads(path.read_text())
    content["labels"]["5"] = "edited"
    path.write_text(json.dumps(content))
    again = sl.FeatureStore.load(scored.folder)
    assert set(again.label_scores) == {3}
    assert again.latent(5).scores == []


def test_scores_that_another_process_wrote_are_kept(scored):
    scored.write_labels()
    scored.write_scores()
    other = sl.FeatureStore.load(scored.folder)
    other.label(11, "theirs")
    other.record_scores([score(11, "theirs")])
    other.write_labels()
    other.write_scores()
    scored.record_scores([score(5, "mine", 0.6)])
    scored.write_scores()
    again = sl.FeatureStore.load(scored.folder)
    assert set(again.label_scores) == {3, 5, 11}
    assert again.scores_of(5)[0].score.auroc.value == 0.6


def test_scores_that_cannot_be_are_refused(store):
    store.labels |= {2: "x", D_SAE + 4: "y"}
    for wrong, message in (
        (score(D_SAE + 4, "y"), f"latent {D_SAE + 4}; this dictionary has latents 0 to {D_SAE - 1}"),
        (score(2, "x", kind="guessing"), "is not a kind of score; expected detection or fuzzing"),
        (score(2, "x", shuffled=judged(1.2)), "not between 0 and 1"),
        (score(2, "x", shuffled=judged(math.nan)), "not between 0 and 1"),
    ):
        with pytest.raises(UserError, match=message):
            store.record_scores([wrong])
    assert store.label_scores == {}


def test_writing_scores_needs_a_folder_and_the_lock(built, scored, monkeypatch):
    monkeypatch.setattr("saelens_lite.features.label_scores.PATIENCE", 0.01)
    homeless = copy.copy(built)
    homeless.folder = None
    with pytest.raises(ConfigError, match="the store has no folder"):
        homeless.write_scores()
    with locked(scored.folder / "scores.json", "scores"), pytest.raises(LockedError):
        scored.write_scores()


def test_scores_survive_the_overwriting_of_a_store(built, scored, d, random_lm):
    scored.write_scores()
    with pytest.raises(OutputExistsError, match=r"'scores\.json'"):
        built.save(scored.folder, exists="overwrite")
    with pytest.raises(OutputExistsError, match=r"'scores\.json'"):
        sl.FeatureStore.build(d, random_lm, ["text"], out=scored.folder, exists="overwrite")
    scored.save(scored.folder, exists="overwrite")
    assert sl.FeatureStore.load(scored.folder).label_scores == scored.label_scores


def line(**changes) -> dict:
    plain = {"auroc": [0.9, 0.8, 1.0], "balanced_accuracy": [0.5], "n_unusable": 0}
    base = {"latent": 3, "label": "x", "kind": "detection", "judge": "j", "n_firing": 1, "n_silent": 1, "score": plain}
    return base | changes


@pytest.mark.parametrize(
    "scores",
    [
        [line(latent=D_SAE)], [line(latent=-1)], [line(latent="3")], [line(latent=2**70)], [line(kind="truth")],
        [line(judge=None)], [line(judge="j" * (1 << 17))], [line(n_firing=1.5)], [line(more=1)], [line(), line()],
        [line(recall=[2.0])], [line(recall=[0.5] * 1001)], [line(is_graded=1)], [line(n_hard=-1)],
        {"3": line()},
        [line(score={"auroc": [0.9], "balanced_accuracy": [0.5, 0.4], "n_unusable": 0})],
        [line(score={"auroc": [2], "balanced_accuracy": [0.5], "n_unusable": 0})],
        [line(score={"auroc": [], "balanced_accuracy": [0.5], "n_unusable": 0})],
        [line(score={"auroc": ["0.5"], "balanced_accuracy": [0.5], "n_unusable": 0})],
        [line(shuffled={"auroc": [0.9] * 100, "balanced_accuracy": [0.5], "n_unusable": 0})],
        [[]], "text", None,
    ],
    ids=lambda scores: str(scores)[:60],
)  # fmt: skip
def test_hostile_score_files_are_typed_errors(store, scores):
    content = {"format": 1, "dictionary_sha256": store.info.dictionary_sha256, "scores": scores}
    (store.folder / "scores.json").write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match=r"scores\.json"):
        sl.FeatureStore.load(store.folder)
    with pytest.raises(CorruptFileError, match=r"scores\.json"):
        store.write_scores()


def test_scores_on_the_contexts_of_another_store_are_left_out_and_stay_in_the_file(scored, caplog):
    other = scored.label_scores[3]["detection"]._replace(store="0" * 8)
    assert scored.record_scores([other]) == 0
    assert "1 scores are left out: they are on the contexts of another store" in caplog.text
    mine = scored.label_scores[5]["detection"]._replace(store=scored.info.contexts)
    write_scores(
        scored.folder / "scores.json", {3: {"detection": other}, 5: {"detection": mine}}, scored.info.dictionary_sha256
    )
    scored.write_labels()
    again = sl.FeatureStore.load(scored.folder)
    assert again.label_scores == {5: {"detection": mine}}
    again.write_scores()
    assert '"store": "00000000"' in (scored.folder / "scores.json").read_text()


def test_labels_remember_the_contexts_that_they_were_made_from(store):
    store.labels |= {1: Label("a", "max_act 1", "gpt", "1a2b3c4d"), 2: Label("b", "max_act 1", "gpt"), 3: "mine"}
    store.write_labels()
    again = sl.FeatureStore.load(store.folder).labels
    assert [getattr(again[i], "store", None) for i in (1, 2, 3)] == ["1a2b3c4d", "", None]
    assert copy.deepcopy(again[1]).store == "1a2b3c4d"


def test_the_contexts_of_stores_differ_in_all_that_decides_them(built):
    info = built.info
    assert info.model_sha256 is not None
    assert info.precision == "float32"
    others = {
        "top_n": 9, "window": (1, 1), "text_sha256": "x", "seed": 7, "options": info.options | {"k": 3}, "rule": "relu",
        "token_norm": "layer_norm", "revision": "1a2b", "model_sha256": "x", "precision": "bfloat16",
        "processing": ("center_writing_weights",), "writes": ("blocks.2.hook_resid_pre",),
    }  # fmt: skip
    assert len({info.contexts, *(info.replace(**{name: value}).contexts for name, value in others.items())}) == 13
    for name, value in {"raw_unembedding": True, "text": "another name", "neuronpedia": "a/1-b"}.items():
        assert info.replace(**{name: value}).contexts == info.contexts


@pytest.fixture
def of_other_k(d, built, random_lm, tmp_path) -> sl.FeatureStore:
    """A store of the same weights with another k, on the same text."""
    options = {"k": 2}
    other = sl.Dictionary.create("topk", reads=d.reads, d_sae=D_SAE, options=options)
    other.load_state_dict(d.state_dict())
    text = ["It was the best of times, it was the worst of times", "Read the license before you use it"]
    store = sl.FeatureStore.build(other, random_lm, text, window=(3, 2), top_n=3, seed=0, out=tmp_path / "other")
    assert store.info.dictionary_sha256 == built.info.dictionary_sha256
    assert not store.tensors.count.equal(built.tensors.count)
    return store


def test_scores_and_labels_of_the_same_weights_with_another_k_are_of_another_store(store, of_other_k, caplog):
    assert store.info.contexts == sl.FeatureStore.load(store.folder).info.contexts
    label = Label("made here", "max_act 1", "gpt", store.info.contexts)
    assert made_from_shown(label, store.info.contexts)
    assert not made_from_shown(label, of_other_k.info.contexts)
    of_other_k.label_all({3: label})
    assert of_other_k.record_scores([score(3, "made here")._replace(store=store.info.contexts)]) == 0
    assert "1 scores are left out: they are on the contexts of another store" in caplog.text


def test_scores_of_another_k_are_neither_read_nor_published(store, of_other_k, d, tmp_path):
    for one, auroc in ((store, 0.9), (of_other_k, 0.6)):
        one.label(3, "x")
        one.record_scores([score(3, "x", auroc)._replace(store=one.info.contexts)])
        one.write_labels()
        one.write_scores()
    assert sl.labels.load(store.folder / "labels.json", d).scores[3]["detection"].score.auroc.value == 0.9
    assert sl.labels.load(of_other_k.folder / "labels.json", d).scores == {}
    dictionary = sl.Dictionary.create("topk", reads=d.reads, d_sae=D_SAE, options={"k": 2})
    dictionary.load_state_dict(d.state_dict())
    folders = {4: d.save(tmp_path / "4"), 2: dictionary.save(tmp_path / "2")}
    both = [store.folder, of_other_k.folder]
    with pytest.raises(ConfigError, match="the store of another dictionary"):
        model_card(folders[2], stores=[store.folder])
    assert "| AUROC, the label | 1 | 0.60 |" in model_card(folders[2], stores=[of_other_k.folder])
    assert "| AUROC, the label | 1 | 0.90 |" in model_card(folders[4], stores=[store.folder])
    entries, _ = _prepare({"4": folders[4], "2": folders[2]}, "a/b", tmp_path, license=None, tags=(), stores=both)
    assert len(entries) == 2  # each has its own store


def test_the_contexts_of_older_versions_are_known_but_do_not_say_which_options_they_are_of():
    info = StoreInfo(
        model="m", revision=None, reads=("h",), writes=("h",), rule="topk", d_sae=4, n_tokens=9, top_n=3, n_groups=2,
        group_size=2, n_random=2, n_silent=2, window=(3, 2), seed=1, bos_id=0, text="t", text_sha256="a" * 64,
        dictionary_sha256="b" * 64, options={"k": 4}, token_norm=None,
    )  # fmt: skip
    assert info.older_contexts == "07dba5c0"  # as they were written
    assert info.contexts != info.replace(options={"k": 8}).contexts
    assert info.replace(options={"k": 8}).older_contexts == "07dba5c0"
    assert not made_from_shown(Label("x", "max_act 1", "gpt", "07dba5c0"), info.contexts)


def test_stores_and_scores_of_older_versions_are_read_with_what_they_do_not_know(store, scored):
    older = scored.info.older_contexts
    scored.record_scores([FULL[2]._replace(store=older)])
    scored.write_labels()
    scored.write_scores()
    path = scored.folder / "features.json"
    content = json.loads(path.read_text())
    for name in ("model_sha256", "precision"):
        del content["info"][name]
    path.write_text(json.dumps(content | {"format": 4}))
    again = sl.FeatureStore.load(scored.folder)
    assert (again.info.model_sha256, again.info.precision) == (None, None)
    assert again.info.older_contexts == older
    assert again.info.contexts != scored.info.contexts
    assert again.label_scores[5]["detection"] == FULL[2]._replace(store=older, made_elsewhere=True)
    assert sl.FeatureStore.load(again.save(scored.folder.parent / "saved")).info == again.info


@pytest.mark.parametrize("by_tokens", [0.5, None])
def test_cards_name_only_the_floors_that_were_measured(by_tokens):
    one = score(1, "x", by_tokens=None if by_tokens is None else judged(by_tokens), of_random_latent=None)
    told = labels_text(PublishedLabels({1: "x"}, {1: {"detection": one}}, 5))
    assert "another latent's explanation:" not in told
    assert ("1 of 1 labels are better than the token baseline: the" in told) == (by_tokens is not None)
    assert ("1 labels were not compared with a control." in told) == (by_tokens is None)
    assert ("0 of 1 scores are not better than token baseline." in str(Scores((one,), (), "j"))) == (by_tokens is not None)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "[" * 5000, '{"format": 9}', "\0" * 100])
def test_score_files_that_are_not_one(store, text):
    (store.folder / "scores.json").write_text(text)
    with pytest.raises(CorruptFileError, match=r"scores\.json"):
        sl.FeatureStore.load(store.folder)


def test_scores_of_another_dictionary_and_links_out_of_the_store_are_refused(store, tmp_path):
    path = store.folder / "scores.json"
    path.write_text(json.dumps({"format": 1, "dictionary_sha256": "0" * 64, "scores": []}))
    with pytest.raises(ConfigError, match="scores of another dictionary's labels"):
        sl.FeatureStore.load(store.folder)
    (tmp_path / "outside.json").write_text("{}")
    path.unlink()
    path.symlink_to(tmp_path / "outside.json")
    with pytest.raises(CorruptFileError, match="outside of its folder"):
        sl.FeatureStore.load(store.folder)


@pytest.mark.parametrize(
    ("auroc", "by_tokens", "of_random_latent", "verdict"),
    [
        (0.9, 0.7, 0.5, True),
        (0.75, 0.7, 0.5, False),  # only the value is better: √(0.05² + 0.05²) > 0.05
        (0.9, 0.5, 0.86, False),  # each control counts
        (0.9, None, 0.5, True),
        (0.9, None, None, None),
    ],
)
def test_a_score_exceeds_its_controls_if_the_difference_to_each_is_above_zero(auroc, by_tokens, of_random_latent, verdict):
    results = [None if value is None else judged(value) for value in (by_tokens, of_random_latent)]
    one = LabelScore(1, "x", "detection", "j", 5, 5, judged(auroc), *results, shuffled=judged(0.99), hard=judged(0.99))
    assert exceeds_controls(one) is verdict


def test_cards_show_scores_beside_controls(scored):
    text = " ".join(str(scored.latent(3)).split())
    assert "detection AUROC 0.90 [0.85, 0.95], balanced accuracy 0.80 [0.75, 0.85]" in text
    beside = (
        "against the nearest latent 0.60, token baseline 0.70, another latent's explanation 0.50, its words in another order"
    )
    assert f"AUROC beside it: {beside} 0.40; the label may have been made from these contexts; judge a judge" in text
    assert text.count("not better than: token baseline;") == 1  # fuzzing: 0.72 [0.67, …] beside 0.70
    html = scored.latent(3)._repr_html_()
    assert "AUROC 0.90 [0.85, 0.95]" in html
    assert "not scored" in str(scored.latent(8))
    assert "The label was not scored." in scored.latent(8)._repr_html_()
    assert "scored" not in str(scored.latent(9)) + scored.latent(9)._repr_html_()
    assert "3 have a label, 2 of them with a score" in scored._repr_html_()


def test_hostile_judges_stay_text_in_cards(store):
    store.label(2, "x")
    store.record_scores([score(2, "x", judge=HOSTILE)])
    html, text = store.latent(2)._repr_html_(), str(store.latent(2))
    assert "<img" not in html
    assert "&lt;img" in html
    assert not {"\u202e", "\x1b"} & set(html + text)


def test_the_command_lists_labels_with_their_scores(scored, command):
    scored.write_labels()
    scored.write_scores()
    shown = command("label", scored.folder, "--list").out
    rows = {row.split()[0]: row for row in shown.splitlines() if row.split() and row.split()[0].isdigit()}
    assert rows["3"].split()[-2:] == ["0.90", "0.72*"]
    assert rows["5"].split()[-1] == "0.55"
    assert "gpt-4o-mini, max_act 1" in rows["3"]
    assert rows["8"].split()[-1] == "1"  # the end of max_act 1: no score
    assert "* not better than a control" in shown
    one = command("label", scored.folder, 3).out
    assert "latent 3: by a model" in one
    assert "detection: AUROC 0.90" in one
    assert command("label", scored.folder, 8).out.strip() == "latent 8: not scored"
    assert "not better than: token baseline" in " ".join(command("latent", scored.folder, 3).out.split())


def test_labels_that_were_read_with_their_scores(scored, d, tmp_path):
    scored.write_labels()
    scored.write_scores()
    labels = sl.labels.load(scored.folder / "labels.json", d)
    assert labels.scores == scored.label_scores
    assert labels.columns()["detection_auroc"] == [0.9, 0.55, None]
    assert labels.to_frame()["fuzzing_auroc"].isna().tolist() == [False, True, True]
    assert "0.72*" in str(labels)
    assert labels.search("mine").scores == {5: {"detection": FULL[2]}}
    alone = labels.save(tmp_path / "alone.json")
    assert "detection_auroc" not in sl.labels.load(alone, d).columns()


class Scripts(HTMLParser):
    """The elements of a page, and the texts of its scripts by id."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts, self.at = [], {}, None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.at = dict(attrs).get("id", "program") if tag == "script" else None

    def handle_data(self, data):
        if self.at is not None:
            self.texts[self.at] = self.texts.get(self.at, "") + data

    @property
    def words(self) -> dict:
        start, stop = next(pairwise(json.loads(self.texts["layout"])["list_starts"]))
        return json.loads(zlib.decompress(base64.b64decode(self.texts["list-block"][start:stop])))


def page(store: sl.FeatureStore, path) -> tuple[str, Scripts]:
    html = store.dashboard(path, exists="overwrite").read_text(encoding="utf-8")
    return html, Scripts(html)


def test_the_page_has_the_scores_beside_their_controls(scored, tmp_path):
    _, parts = page(scored, tmp_path / "features.html")
    scores, judges = parts.words["scores"], parts.words["judges"]
    assert judges == ["a judge", "another"]
    assert scores.keys() == {"3", "5"}
    one = scores["3"]["detection"]
    assert one["score"] == pytest.approx([0.9, 0.85, 0.95, 0.8, 0.75, 0.85, 0])
    assert [one[name][0] for name in ("by_tokens", "of_random_latent", "shuffled", "hard")] == [0.7, 0.5, 0.4, 0.6]
    assert (judges[one["judge"]], one["n"], one["above"]) == ("a judge", [20, 30], True)
    assert scores["3"]["fuzzing"]["above"] is False
    assert scores["5"]["detection"]["above"] is None
    assert (one["elsewhere"], scores["5"]["detection"]["elsewhere"]) == (True, False)
    assert "by_tokens" not in scores["5"]["detection"]
    scored.label(3, "another")
    assert page(scored, tmp_path / "features.html")[1].words["scores"].keys() == {"5"}


def test_quartiles_on_the_page_are_those_of_the_card_and_the_table(store, tmp_path):
    areas = [0.5, 0.9, 0.62, 0.71]
    store.label_all({i: "x" for i in range(4)}, replace=True)
    ones = [score(i, "x", area, by_tokens=None if i else judged(0.7)) for i, area in enumerate(areas)]
    store.record_scores(ones)
    spreads = page(store, tmp_path / "features.html")[1].words["spreads"]
    assert spreads["detection"]["score"] == pytest.approx(statistics.quantiles(areas, n=4, method="inclusive"), abs=1e-4)
    assert spreads["detection"]["by_tokens"] == [0.7] * 3
    assert "hard" not in spreads["detection"]
    assert f"{Scores(tuple(ones), (), 'j').summary()[0].median:.4f}" == f"{spreads['detection']['score'][1]:.4f}"
    card = labels_text(PublishedLabels(store.labels, store.label_scores, D_SAE))
    _, low, middle, high, _ = re.search(r"AUROC, the label \| 4 \|(.*) \|", card)[1].split(" | ")
    assert [low, middle, high] == [f"{x:.2f}" for x in spreads["detection"]["score"]]


def test_hostile_labels_and_judges_stay_text_on_the_page(scored, tmp_path):
    plain, before = page(scored, tmp_path / "plain.html")
    scored.labels[3] = Label(HOSTILE, HOSTILE, HOSTILE)
    scored.record_scores([score(3, HOSTILE, judge=HOSTILE)])
    html, parts = page(scored, tmp_path / "hostile.html")
    assert parts.tags == before.tags
    assert html.count("</script>") == plain.count("</script>")
    assert "<img" not in html
    assert HOSTILE in parts.words["judges"]
    assert parts.words["labels"]["3"] == HOSTILE


def test_a_page_without_scores_has_none(store, tmp_path):
    store.label(3, "x")
    words = page(store, tmp_path / "features.html")[1].words
    assert (words["scores"], words["judges"]) == ({}, [])


def lines(path) -> list[dict]:
    return [json.loads(text) for text in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.fixture
def exported(scored, tmp_path, monkeypatch):
    monkeypatch.setattr("saelens_lite_plugins.exporters.neuronpedia.BATCH", 10)
    scored.labels[12] = Label("theirs", "Neuronpedia gpt2-small/8-res-jb", "gpt-4 (oai_token-act-pair)")
    scored.labels[13] = Label("a person's\n  label", "Neuronpedia gpt2-small/8-res-jb", "Ann")
    settings = {"set_name": "our-set", "creator_id": "someone", "model_id": "gpt2-small", "created": CREATED}
    return scored.export("neuronpedia", tmp_path / "out", **settings)


def test_exported_explanations_have_the_documented_keys(exported):
    batches = [lines(exported / f"explanations/batch-{i}.jsonl.gz") for i in range(3)]
    assert [[one["index"] for one in batch] for batch in batches] == [["3", "5", "8"], ["12", "13"], []]
    assert [len(lines(exported / f"features/batch-{i}.jsonl.gz")) for i in range(3)] == [10, 10, 4]
    every = {one["index"]: one for batch in batches for one in batch}
    assert {index: set(one) - KEYS for index, one in every.items() if set(one) != KEYS} == {"13": {"authorName"}}
    assert len({one["id"] for one in every.values()}) == 5
    assert {len(one["id"]) for one in every.values()} == {25}
    assert {(one["modelId"], one["layer"], one["authorId"], one["createdAt"]) for one in every.values()} == {
        ("gpt2-small", "1-our-set", "someone", CREATED.isoformat())
    }
    named = {index: (one["description"], one["explanationModelName"], one["typeName"]) for index, one in every.items()}
    assert named == {
        "3": ("by a model", "gpt-4o-mini", "max_act 1"),
        "5": ("mine", None, None),
        "8": ("not scored", "gpt-4o-mini", "max_act 1"),
        "12": ("theirs", "gpt-4", "oai_token-act-pair"),
        "13": ("a person's label", None, None),
    }
    assert every["13"]["authorName"] == "Ann"


def test_exported_explanations_come_back_through_the_reader(exported, d):
    labels = sl.labels.from_neuronpedia(d, exported)
    assert dict(labels) == {3: "by a model", 5: "mine", 8: "not scored", 12: "theirs", 13: "a person's label"}
    assert {i: label.author for i, label in labels.items()} == {
        3: "gpt-4o-mini (max_act 1)", 5: "", 8: "gpt-4o-mini (max_act 1)", 12: "gpt-4 (oai_token-act-pair)", 13: "Ann",
    }  # fmt: skip
    assert {label.source for label in labels.values()} == {"Neuronpedia gpt2-small/1-our-set"}
    assert sl.labels.from_neuronpedia(d, exported).table() is not None


def test_an_export_without_labels_has_no_explanations(store, tmp_path):
    out = store.export("neuronpedia", tmp_path / "out", set_name="s", creator_id="c", model_id="m")
    assert not (out / "explanations").exists()
