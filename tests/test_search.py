"""Search in stores with planted contexts, labels written at once, and latents in a terminal of 80 columns."""

import copy
import json
import re

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import UserError
from saelens_lite.features.tensors import NONE
from saelens_lite.locks import locked

HOOK = "blocks.1.hook_resid_pre"
TEXTS = [
    "Read the license first. The License says that",
    "It was the best of times, it was the worst of times",
    "A driver and his licenses, unlicensed and free",
]
HOSTILE = "<blink>\x1b[31m\u202eevil</blink>"
ON, NEAR, PROMOTES, LABELLED, NONE_OF_IT = 3, 4, 5, 6, 7


@pytest.fixture(scope="module")
def built(random_lm):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=48), d_sae=12, options={"k": 3})
    return d, sl.FeatureStore.build(d, random_lm, TEXTS, window=(3, 2), top_n=2, seed=0)


def places_of(store: sl.FeatureStore, text: str) -> list[int]:
    """Return the places of the tokens with a text, in the order of the text."""
    ids = torch.tensor(store.vocabulary.ids_of(text))
    return torch.isin(store.tensors.tokens, ids).flatten().nonzero().flatten().tolist()


@pytest.fixture
def store(built):
    """A store in which five latents have planted contexts, labels and promoted tokens, and the others have nothing."""
    store = copy.copy(built[1])
    t, w = store.tensors, store.weights
    place, value = torch.full_like(t.top_place, NONE), torch.zeros_like(t.top_value)
    words = {word: places_of(store, f" {word}") for word in ("the", "times", "first", "says")}
    license = words["first"][0] - 1  # the last token of "license"
    planted = {
        ON: [license, words["times"][0]],
        NEAR: [words["first"][0], words["says"][0]],  # "The License says"
        PROMOTES: [words["times"][0], words["times"][1]],
        LABELLED: [words["times"][1], words["times"][0]],
        NONE_OF_IT: [words["times"][0], words["times"][1]],
    }
    for latent, here in planted.items():
        place[latent], value[latent] = torch.tensor(here), torch.tensor([2.0, 1.0])
    plain = store.vocabulary.ids_of(" man")[0]
    promoted = torch.full_like(w.promoted, plain)
    promoted[PROMOTES, 2] = store.vocabulary.ids_of(" times")[0]
    store.tensors = t._replace(top_place=place, top_value=value)
    store.weights = w._replace(promoted=promoted)
    store.labels = {LABELLED: "LICENSE texts"}
    return store


def test_search_ranks_labels_then_firing_tokens_then_near_ones(store):
    found = store.search("license")
    assert found.latents == [LABELLED, ON, NEAR]
    assert [(hit.on_token, hit.near, hit.n_contexts) for hit in found] == [(0, 0, 2), (1, 0, 2), (0, 2, 2)]
    assert [hit.score for hit in found] == [2.0, 0.5, 0.25]
    assert found[1].example.position == found[2].example.position - 1  # the strongest context with the text
    assert (found.n_found, found.inside_words) == (3, False)
    assert len(store.search("license", 1)) == 1
    assert store.search("license", 1).n_found == 3


def test_search_finds_promoted_tokens(store):
    found = store.search("TIMES")
    assert found.latents[:2] == [PROMOTES, LABELLED]  # 1 and ¼, then 1: the earlier of equals
    assert found[0].promoted == " times"
    assert found[1].promoted is None


def test_search_looks_for_words_and_then_inside_them(store):
    assert store.search("the license").latents == [ON, NEAR]
    assert store.search("the  LICENSE").latents == [ON, NEAR]
    inside = store.search("icens")
    assert (inside.latents, inside.inside_words) == ([LABELLED, ON, NEAR], True)
    assert store.search("it was the").hits[0].on_token == 0
    nothing = store.search("xyzzy")
    assert (len(nothing), nothing.n_found, nothing.to_frame().empty) == (0, 0, True)
    assert "no latent has 'xyzzy'" in str(nothing)
    assert store.search("(").latents == []  # not a pattern


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_search_is_refused(store, text):
    with pytest.raises(UserError, match="the text is empty"):
        store.search(text)


def test_counts_agree_with_the_contexts_themselves(built):
    """Against a search of each context as Python text, in a store as it was built."""
    store = built[1]
    pattern = re.compile(r"(?<![^\W_])the(?![^\W_])", re.IGNORECASE)
    found = {hit.latent: hit for hit in store.search("the", store.info.d_sae)}
    assert found
    for latent in range(store.info.d_sae):
        n_on = n_near = 0
        for example in store.top_examples(latent):
            row = store.vocabulary.row(store.tensors.tokens[example.row, : int(store.tensors.length[example.row])].tolist())
            spans = [match.span() for match in pattern.finditer("".join(row))]
            first = example.position - example.peak
            starts = [len("".join(row[:i])) for i in range(len(row) + 1)]
            covered = [any(a < starts[i + 1] and starts[i] < b for a, b in spans) for i in range(len(row))]
            n_on += covered[example.position]
            n_near += any(covered[first : first + len(example.tokens)]) and not covered[example.position]
        promotes = any(pattern.search(token) for token, _ in store.promoted(latent))
        if latent in found:
            assert (found[latent].on_token, found[latent].near) == (n_on, n_near)
            assert (found[latent].promoted is not None) == promotes
        else:
            assert (n_on, n_near, promotes) == (0, 0, False)


def test_results_fit_80_columns_and_hostile_labels_stay_text(store):
    store.labels[ON] = HOSTILE + "x" * 200
    for shown in (store.search("license"), store.latent(ON), store.latent(NONE_OF_IT)):
        lines = str(shown).splitlines()
        assert lines
        assert max(map(len, lines)) <= 80
        assert not set(str(shown)) & set("\x1b\u202e")
        assert "<blink>" not in shown._repr_html_()
    assert "«" in str(store.latent(ON))


def test_a_latent_as_a_frame_has_its_contexts(store):
    summary = store.latent(NEAR)
    frame = summary.to_frame()
    assert frame["position"].tolist() == [example.position for example in summary.examples]
    assert frame["token"].tolist() == [" first", " says"]
    assert [token in context for token, context in zip(frame["token"], frame["context"], strict=True)] == [True, True]
    assert [other for other, _ in summary.similar] == store.weights.decoder_neighbours[NEAR].tolist()


def test_found_latents_as_a_frame_and_as_json(store):
    found = store.search("license")
    hits = json.loads(json.dumps(found.to_dict()))["hits"]
    frame = found.to_frame()
    for name in ("latent", "score", "on_token", "near", "n_contexts"):
        assert frame[name].tolist() == [hit[name] for hit in hits]
    assert frame["example"].tolist() == ["".join(hit["example"]["tokens"]) for hit in hits]


def test_a_strength_is_a_multiple_of_the_largest_activation(store):
    assert store.strength(ON, 0.5) == 1.0
    assert store.about(ON) == (None, " man", 2.0)
    with pytest.raises(UserError, match="latent 0 never fires on the text of the store, so it has no maximum"):
        store.strength(0, 2)
    with pytest.raises(UserError, match="no latent 12; this dictionary has latents 0 to 11"):
        store.strength(12, 2)


@pytest.fixture
def folder(built, tmp_path):
    return built[1].save(tmp_path / "store")


def test_a_label_is_written_at_once_and_removed(folder, command):
    assert command("label", folder, ON, "a license").out == f"latent {ON}: a license\n"
    assert command("label", folder, NEAR, HOSTILE).code == 0
    assert sl.FeatureStore.load(folder).labels == {ON: "a license", NEAR: HOSTILE}
    code, out, _ = command("label", folder, "--list")
    assert (code, "a license" in out, "\x1b" in out) == (0, True, False)
    assert command("label", folder, NEAR, "").out == f"latent {NEAR} has no label\n"
    assert command("label", folder, NEAR).out == f"latent {NEAR} has no label\n"
    assert sl.FeatureStore.load(folder).labels == {ON: "a license"}
    assert command("search", folder, "license", "--top", 1).out.count("a license") == 1
    assert "a license" in command("latent", folder, ON, NEAR).out


def test_labels_that_cannot_be(folder, command):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for args, message in (
        ((12, "x"), "no latent 12; this dictionary has latents 0 to 11"),
        ((3, "x" * 1001), "the label has 1,001 characters; at most 1,000 are allowed"),
        ((3, "\udcff"), "holds bytes that are not text"),
        ((), "give the number of a latent and its label, or --list"),
    ):
        code, _, err = command("label", folder, *args)
        assert (code, message in err) == (2, True), err
    with locked(folder / "labels.json", "labels"):
        code, _, err = command("label", folder, 3, "x")
        assert (code, "is being written by process" in err) == (2, True), err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    code, _, err = command("label", folder.parent, 3, "x")
    assert (code, "features.json is missing" in err) == (2, True)


def test_rows_without_a_text_are_found_by_name():
    d = sl.Dictionary.create("topk", reads=sl.Port(width=4), d_sae=4, options={"k": 1})
    d.W_enc.data.copy_(torch.eye(4))
    d.W_dec.data.copy_(torch.eye(4))
    d.b_enc.data.zero_()
    d.b_dec.data.zero_()
    x, names = torch.eye(4).repeat(3, 1), [f"{animal} {n}" for n in range(3) for animal in ("cat", "dog", "cow", "category")]
    store = sl.FeatureStore.from_activations(d, x, names, groups=[HOSTILE, "b"] * 6)
    assert (store.search("CAT").latents, store.search("cat")[0].on_token) == ([0], 3)
    assert store.search("dog 2").latents == [1]
    assert store.search("dog").to_frame()["example"].tolist() == ["dog 0"]
    assert "«cat 0»" in str(store.latent(0))
    assert "in groups" in str(store.latent(0))
    assert store.latent(0).to_frame()["name"].tolist() == ["cat 0", "cat 1", "cat 2"]
    assert store.about(0) == (None, None, 1.0)
    assert not set(str(store.latent(0)) + str(store.search("cat"))) & set("\x1b\u202e")
