"""Results as plain text of 80 columns, as HTML, and as data frames with the numbers of `to_dict`; the store beside them."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import ConfigError, UserError
from saelens_lite.interventions import Steered, steer
from saelens_lite.tables import as_html, as_text, grid

HOOK = "blocks.1.hook_resid_pre"
PROMPT = "The old man said that"
HOSTILE = "<blink>\x1b[31m\u202eevil</blink>"


def made(seed: int = 0) -> sl.Dictionary:
    return sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=48), d_sae=64, options={"k": 4}, seed=seed)


@pytest.fixture(scope="module")
def dictionary():
    return made()


@pytest.fixture(scope="module")
def store(dictionary, random_lm):
    store = sl.FeatureStore.build(dictionary, random_lm, [PROMPT, "It was the best of times"])
    for latent in range(64):
        store.label(latent, f"{HOSTILE} {latent}")
    return store


@pytest.fixture(scope="module")
def live(dictionary, random_lm) -> list[int]:
    """The latents that fire on the prompt, the most frequent first."""
    codes = dictionary.encode(random_lm.run(PROMPT, HOOK)[HOOK][0, 1:])
    return codes.latent.bincount(minlength=64).argsort(descending=True, stable=True).tolist()


@pytest.fixture(scope="module")
def results(dictionary, random_lm, store, live):
    """A result of each kind, most of them with a store."""
    edits = [sl.Clamp(live[0], store.strength(live[0], 2)), sl.Ablate(live[1]), sl.Scale(live[2], 0.5), sl.Add(live[3], -1)]
    texts = [f"{word} {n}" for n in range(12) for word in ("good", "bad")]
    return {
        "attribution": sl.attribute(dictionary, random_lm, PROMPT, store=store),
        "doses": sl.dose_response(
            dictionary, random_lm, live[0], [store.strength(live[0], 0.5), 3], PROMPT, n_controls=2, store=store
        ),
        "steered": steer(dictionary, random_lm, PROMPT, edits, max_new_tokens=3, store=store),
        "probe": sl.probe(dictionary, random_lm, texts, ["good", "bad"] * 12, ks=(2,), n_bootstrap=20, store=store),
        "prompt": sl.prompt_view(dictionary, random_lm, PROMPT, store=store),
        "evaluation": sl.evaluate(dictionary, random_lm, [PROMPT * 3], n_bootstrap=20),
        "hook": sl.check_hook(dictionary, random_lm, [PROMPT * 3], n_tokens=20),
        "comparison": sl.compare(dictionary, made(1)),
        "stability": sl.stability(dictionary, [made(1), made(2)]),
    }


def test_text_has_80_columns_and_no_control_characters(results):
    for name, result in results.items():
        lines = str(result).splitlines()
        if name != "evaluation":
            assert max(map(len, lines)) <= 80, name
        assert len(lines) > 2
        assert not set(str(result)) & set("\x1b\u202e"), name
        assert "<blink>" not in result._repr_html_(), name
        assert result.to_frame().shape == (len(next(iter(result.columns().values()))), len(result.columns()))


def test_frames_have_the_numbers_of_the_dictionary_form(results, live, store):
    attribution = results["attribution"]
    frame, plain = attribution.to_frame(), json.loads(json.dumps(attribution.to_dict()))
    for name in ("row", "position", "latent", "activation", "gradient", "ablation", "direct"):
        assert frame[name].tolist() == plain[name]
    assert frame["token"].tolist() == [plain["tokens"][0][i] for i in plain["position"]]
    largest = store.tensors.top_value[plain["latent"], 0]
    assert frame["of_max"].tolist() == pytest.approx((torch.tensor(plain["activation"]) / largest).tolist())
    assert plain["about"][str(live[0])]["label"] == f"{HOSTILE} {live[0]}"

    doses = results["doses"]
    assert doses.to_frame().drop(columns="of_max").to_dict("records") == doses.to_dict()["doses"]
    assert doses.to_frame()["of_max"].tolist() == pytest.approx([0.5, 3 / float(store.tensors.top_value[live[0], 0])])
    assert results["prompt"].to_frame().to_dict("records") == results["prompt"].to_dict()["rows"]

    probe = results["probe"].to_frame().set_index("probe")
    for name, one in results["probe"].to_dict()["probes"].items():
        assert (probe.loc[name, "auc"], probe.loc[name, "auc_low"]) == (one["auc"]["value"], one["auc"]["low"])
    metrics = results["evaluation"].to_frame().set_index("metric")
    assert metrics["value"].to_dict() == {name: m["value"] for name, m in results["evaluation"].to_dict()["metrics"].items()}
    stability = results["stability"]
    assert stability.to_frame()["score"].tolist() == stability.score.tolist()


def test_steering_says_the_edits_in_words(results, store, live):
    steered = results["steered"]
    largest = store.about(live[0]).max
    lines = steered.to_dict()["edits"]
    assert lines[0].startswith(f"latent {live[0]}: code ← {2 * largest:.4g} (2 × its maximum of {largest:.3g}); ")
    assert [line.partition(";")[0].partition(" (")[0] for line in lines[1:]] == [
        f"latent {live[1]}: code ← 0",
        f"latent {live[2]}: code ← 0.5 · code",
        f"latent {live[3]}: code ← code − 1",
    ]
    assert steered.to_frame()["kl"].tolist() == [steered.kl]
    plain = Steered("a", "b", 0.5, (sl.Add((2, 3), 0), sl.Clamp(4, 0)))
    assert plain.to_dict()["edits"] == ["latent 2: code ← code + 0", "latent 3: code ← code + 0", "latent 4: code ← 0"]


def test_without_a_store_nothing_is_added(dictionary, random_lm, results):
    bare = sl.attribute(dictionary, random_lm, PROMPT, ablation=False)
    assert set(bare.columns()) == {"row", "position", "latent", "activation", "gradient", "direct", "token"}
    assert "about" not in bare.to_dict()
    assert "of max" not in str(bare)
    assert "of max" in str(results["attribution"])
    nothing = bare.only(torch.zeros(len(bare.latent), dtype=torch.bool))
    assert nothing.to_frame().columns.tolist() == list(bare.columns())
    controlled = replace(results["evaluation"], controls={"PCA": results["evaluation"]})
    assert controlled.to_frame()["of"].unique().tolist() == ["this dictionary", "PCA"]


def test_the_store_of_another_dictionary_is_refused(random_lm, store):
    other = made(1)
    for ask in (
        lambda: sl.attribute(other, random_lm, PROMPT, store=store),
        lambda: sl.dose_response(other, random_lm, 7, [1], PROMPT, store=store),
        lambda: steer(other, random_lm, PROMPT, sl.Ablate(7), store=store),
        lambda: sl.probe(other, random_lm, ["a", "b"] * 10, [0, 1] * 10, ks=(1,), store=store),
    ):
        with pytest.raises(ConfigError, match="the store is of another dictionary"):
            ask()


def test_frames_need_pandas(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="to_frame needs pandas: pip install pandas"):
        results["prompt"].to_frame()


def test_tables_as_html_and_text():
    table = grid(("a <i>", "b"), [(HOSTILE, "2"), None, ("[red]3", "4")], title="title & co", caption="one\ntwo " + "w " * 60)
    assert as_html(table) == (
        "<p>title &amp; co</p><table><tr><th>a &lt;i&gt;</th><th>b</th></tr>"
        "<tr><td>&lt;blink&gt;\\u001b[31m\\u202eevil&lt;/blink&gt;</td><td>2</td></tr><tr><td>[red]3</td><td>4</td></tr></table>"
        f"<p>one<br>two {'w ' * 60}</p>"
    )
    text = as_text(table)
    assert max(map(len, text.splitlines())) <= 80
    assert text.split().count("w") == 60  # nothing is cut off


def test_multiples_of_the_maximum_on_the_command_line(dictionary, store, live, tmp_path, command, monkeypatch, random_lm):
    monkeypatch.setattr("saelens_lite.cli.options.OfModel.model_of", lambda self, *dictionaries: random_lm)
    d, folder, latent = dictionary.save(tmp_path / "d"), store.save(tmp_path / "store"), live[0]
    largest = store.about(latent).max
    args = ("--prompt", PROMPT, "--store", folder)
    code, out, err = command("steer", d, *args, "--clamp", f"{latent}=2max", "--max-new-tokens", 2)
    assert (code, f"latent {latent}: code ← {2 * largest:.4g} (2 × its maximum of {largest:.3g})" in out) == (0, True), err
    doses = ("doses", d, latent, *args, "--controls", 1, "--json", tmp_path / "doses.json", "--doses", "0.5max", "max", "-3")
    code, _, err = command(*doses)
    assert code == 0, err
    content = json.loads((tmp_path / "doses.json").read_text())
    assert [line["dose"] for line in content["doses"]] == pytest.approx([0.5 * largest, largest, -3])
    assert content["about"]["max"] == pytest.approx(largest)
    code, out, err = command("attribute", d, *args, "--top", 2)
    assert (code, "of max" in out) == (0, True), err
    silent = int(store.never_fires.nonzero()[0])
    for args, message in (
        (
            ("steer", d, "--prompt", PROMPT, "--add", "3=0.5max"),
            "--add: 0.5max is a multiple of the latent's largest",
        ),
        (("doses", d, 3, "--prompt", PROMPT, "--doses", "1max"), "add --store"),
        (("doses", d, 3, "--prompt", PROMPT, "--doses", "1mx"), "--doses 1mx: expected numbers"),
        (("steer", d, "--prompt", PROMPT, "--scale", "3=2max"), "expected LATENT=NUMBER, such as --scale 7=0.5"),
        (("steer", d, "--prompt", PROMPT, "--clamp", "3=2max", "--store", folder.parent), "features.json is missing"),
        (("steer", d, *doses[3:7], "--clamp", f"{silent}=2max"), f"latent {silent} never fires"),
    ):
        code, _, err = command(*args)
        assert (code, message in err) == (2, True), err
    with pytest.raises(UserError, match="never fires"):
        store.strength(silent, 1)
