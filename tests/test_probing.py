"""Sparse probing: planted labels are found, shuffled ones are not, every number against a loop or a formula."""

import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import saelens_lite as sl
from saelens_lite.errors import ConfigError, HookError, NonFiniteError, ShapeError, TextError
from saelens_lite.evaluation import probing
from saelens_lite.evaluation.labelled import read_labelled
from saelens_lite.evaluation.probing import Pooled, best_latents, probe_table, weighted_auc
from saelens_lite.ports import Hooks

HOOK = "blocks.0.hook_resid_pre"
D_SAE, MARKED = 24, 7
FILLERS = ["time", "house", "water", "people", "king", "night", "hand", "world", "river", "street", "morning", "light"]


@pytest.fixture(scope="module", autouse=True)
def few_fits():
    """Two penalties in three folds: the same code, a fifth of the regressions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "INVERSE_PENALTIES", (1e-2, 10.0))
        patch.setattr(probing, "N_FOLDS", 3)
        yield


@pytest.fixture(scope="module")
def labelled() -> tuple[list[str], list[str]]:
    """Texts of uneven length; those of class "yes" hold the word "great" once."""
    draw = torch.Generator().manual_seed(0)
    texts, labels = [], []
    for number in range(120):
        words = [FILLERS[i] for i in torch.randint(len(FILLERS), (3 + number % 9,), generator=draw)]
        if number % 2:
            words.insert(1 + int(torch.randint(len(words), (1,), generator=draw)), "great")
        texts.append("A " + " ".join(words))
        labels.append("yes" if number % 2 else "no")
    return texts, labels


@pytest.fixture(scope="module")
def planted(random_lm) -> sl.Dictionary:
    """Random latents, but for one that fires at the token " great" only."""
    d = sl.Dictionary.create("l1", reads=sl.Port(hook=HOOK, width=random_lm.d_model), d_sae=D_SAE, origin=sl.Origin(n_ctx=16))
    (token,) = random_lm.tokenizer(" great", add_special_tokens=False)["input_ids"]
    direction = random_lm.module.get_input_embeddings().weight[token]
    d.W_enc.data.mul_(0.1)
    d.W_enc.data[:, MARKED] = direction
    d.b_enc.data[MARKED] = -0.7 * float(direction.square().sum())
    return d


def binomial_noise(n: int) -> float:
    """Four standard deviations of an AUC of n texts whose score knows nothing: √((n + 1) / 12 n₊ n₋)."""
    return 4 * math.sqrt((n + 1) / (12 * (n / 2) ** 2))


@pytest.fixture(scope="module")
def report(planted, random_lm, labelled) -> probing.ProbeReport:
    return sl.probe(planted, random_lm, *labelled, ks=(4, 1))


def test_the_planted_latent_is_found(report):
    assert list(report.probes) == ["k = 1", "k = 4", "all latents", "activations"]
    assert report["k = 1"].latents == (MARKED,)
    assert report["k = 4"].latents[0] == MARKED
    assert report["all latents"].latents is report["activations"].latents is None
    for name in ("k = 1", "k = 4"):
        assert report[name].auc == (1, 1, 1)
        assert report[name].accuracy.value > 0.9  # the code is a mean over texts of 4 to 13 words
    assert report.classes == ("no", "yes")
    assert (report.n_train, report.n_test, report.majority) == (90, 30, 0.5)


def test_shuffled_labels_are_at_chance(report):
    for found in report.probes.values():
        assert abs(found.shuffled_auc.value - 0.5) < binomial_noise(30)
        assert abs(found.shuffled_accuracy.value - 0.5) < 4 * math.sqrt(0.25 / 30)
        assert found.shuffled_auc.low < found.shuffled_auc.value < found.shuffled_auc.high


def test_both_classes_may_be_swapped(planted, random_lm, labelled):
    texts, labels = labelled
    swapped = sl.probe(planted, random_lm, texts, torch.tensor([label == "no" for label in labels]), ks=(1,))
    assert swapped.classes == ("False", "True")
    assert swapped["k = 1"].latents == (MARKED,)
    assert swapped["k = 1"].auc.value == 1


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_pooling_and_choice_equal_plain_loops(planted, random_lm, labelled, pooling):
    texts, labels = labelled
    texts, labels = [*texts, "A " + "night " * 40], [*labels, "yes"]  # longer than the 16 tokens of a row
    rows = probing._rows(planted, random_lm, "texts", texts, pooling)
    pooled = probing._pool(planted, random_lm, rows, Hooks((HOOK,), (HOOK,)), pooling, batch_tokens=50)
    x, acts = [], []
    for text in texts:
        tokens = random_lm.to_tokens(text).tokens[:, :16]
        found = random_lm.run(tokens, HOOK)[HOOK][0, 1:]  # without BOS
        codes = planted.encode(found).to_dense().detach().double()
        for columns, values in ((x, found.double()), (acts, codes)):
            columns.append({"mean": values.mean(0), "max": values.amax(0), "last": values[-1]}[pooling])
    x, acts = torch.stack(x), torch.stack(acts)
    torch.testing.assert_close(pooled.x.double(), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled.acts.double(), acts, atol=1e-5, rtol=1e-5)

    y = torch.tensor([label == "yes" for label in labels])
    train, _ = train_test_split(range(len(y)), test_size=0.25, stratify=y.numpy(), random_state=3)
    sums = torch.zeros(2, D_SAE, dtype=torch.float64)
    for i in train:
        sums[int(y[i])] += acts[i] / sum(bool(y[j]) == bool(y[i]) for j in train)
    expected = sorted(range(D_SAE), key=lambda latent: -abs(float(sums[1, latent] - sums[0, latent])))[:5]
    chosen = probing._split(y, 0.25, seed=3).train
    assert chosen.tolist() == train
    assert best_latents(pooled.acts[chosen], y[chosen], 5).tolist() == expected


def test_the_first_of_equal_latents_is_taken():
    acts = torch.tensor([[0.0, 1, 2, 5], [0.0, 1, 2, 5], [3.0, 1, 5, 2], [3.0, 1, 5, 2]])
    assert best_latents(acts, torch.tensor([False, False, True, True]), 3).tolist() == [0, 2, 3]


def test_held_out_texts_have_no_say_in_the_choice():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2 == 0
    acts = torch.rand(200, 10, generator=generator)
    acts[:, 4] += y  # a difference that training texts show
    split = probing._split(y, 0.25, seed=0)
    acts[split.test, 8] += 100 * y[split.test]
    probes, _ = probing._probes(Pooled(torch.rand(200, 3, generator=generator), acts), y, split, [1], 10, 0)
    assert probes["k = 1"].latents == (4,)


def test_noise_is_at_chance_and_a_direction_is_not():
    """Latents that know nothing of the labels, beside activations in which they are a direction among stronger ones."""
    generator = torch.Generator().manual_seed(0)
    n = 400
    y = torch.rand(n, generator=generator) < 0.5
    x = torch.randn(n, 20, generator=generator) * torch.linspace(20, 1, 20)
    x[:, 19] += 12 * y
    pooled, split = Pooled(x, torch.randn(n, 30, generator=generator)), probing._split(y, 0.25, 0)
    probes, _ = probing._probes(pooled, y, split, [1, 4], 200, 0)
    assert probes["activations"].auc.value > 0.99
    assert abs(probes["activations"].shuffled_auc.value - 0.5) < binomial_noise(100)
    for name in ("k = 1", "k = 4", "all latents"):
        assert abs(probes[name].auc.value - 0.5) < binomial_noise(100)


def test_auc_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(12, (50,), generator=generator).double()  # many ties
    y = torch.rand(50, generator=generator) < 0.4
    weights = torch.randint(4, (6, 50), generator=generator).double()
    expected = [roc_auc_score(y, score, sample_weight=row) for row in weights]
    assert weighted_auc(score, y, weights).tolist() == pytest.approx(expected)


def test_the_interval_of_the_accuracy_is_that_of_a_share():
    """Against √(p (1 − p) / n): a latent that agrees with the label on 80 % of the texts."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(2000) % 2 == 0
    acts = (y ^ (torch.rand(2000, generator=generator) < 0.2)).float()[:, None]
    found = probing._probes(Pooled(acts, acts), y, probing._split(y, 0.5, 0), [1], 2000, 0)[0]["k = 1"].accuracy
    assert found.value == pytest.approx(0.8, abs=0.04)
    half = 1.96 * math.sqrt(found.value * (1 - found.value) / 1000)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.low < found.value < found.high


def test_the_same_seed_gives_the_same_report(planted, random_lm, labelled, report, tmp_path):
    again = sl.probe(planted, random_lm, *labelled, ks=(1, 4))
    assert again.to_dict() == report.to_dict()
    other = sl.probe(planted, random_lm, *labelled, ks=(1, 4), seed=1)
    assert other["all latents"] != report["all latents"]
    content = json.loads(report.to_json(tmp_path / "probe.json"))
    assert content == json.loads((tmp_path / "probe.json").read_text())
    assert content["probes"]["k = 1"]["auc"] == {"value": 1, "low": 1, "high": 1}
    assert content["majority"] == 0.5
    assert "'yes' against 'no': 90 texts to train" in str(report)


def test_a_report_without_intervals_is_still_json(planted, random_lm, labelled):
    found = sl.probe(planted, random_lm, *labelled, ks=(1,), n_bootstrap=0)
    assert math.isnan(found["k = 1"].auc.low)
    assert json.loads(found.to_json())["probes"]["k = 1"]["auc"] == {"value": 1, "low": None, "high": None}


def test_several_datasets(planted, random_lm, labelled, report):
    texts, labels = labelled
    as_numbers = np.array([label == "yes" for label in labels]).astype(int)
    found = sl.probe(planted, random_lm, {"words": (texts, labels), "numbers": (texts, as_numbers)}, ks=(1,))
    assert [one.classes for one in found.values()] == [("no", "yes"), ("0", "1")]
    for name in ("k = 1", "all latents", "activations"):
        assert found["words"][name] == found["numbers"][name] == report[name]
    assert probe_table(found).row_count == 9  # of the same held-out texts and labels, so with one noise floor


def test_repeated_texts_are_warned_of(planted, random_lm, labelled, caplog):
    texts, labels = labelled
    with caplog.at_level(logging.WARNING):
        sl.probe(planted, random_lm, [*texts, *texts[:3]], [*labels, *labels[:3]], ks=(1,), n_bootstrap=0)
    assert "3 texts are repetitions" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"labels": ["no", "yes"] * 59}, ConfigError, "120 texts and 118 labels"),
        ({"labels": None}, ConfigError, "120 texts and 0 labels"),
        ({"labels": ["yes"] * 120}, ConfigError, r"1 classes \('yes'\); expected two"),
        ({"labels": ["a", "b", "c"] * 40}, ConfigError, r'3 classes .*labels=\[label == "x" for label in labels\]'),
        ({"labels": ["no"] * 111 + ["yes"] * 9}, ConfigError, "9 texts of class 'yes'; each class needs at least 10"),
        ({"labels": [0.0, 1.0] * 59 + [0.0, math.nan]}, ConfigError, "text 119 has no label"),
        ({"labels": ["no", "yes"] * 59 + ["no", None]}, ConfigError, "text 119 has no label"),
        ({"labels": [0, "yes"] * 60}, ConfigError, "all be of one kind"),
        ({"labels": [[0], [1]] * 60}, ConfigError, "all be of one kind"),
        ({"texts": "one long text"}, TextError, "expected a list of strings"),
        ({"texts": ["word"] * 119 + [" \n"]}, TextError, "text 119 is empty"),
        ({"texts": ["word"] * 119 + ["<|endoftext|>"]}, TextError, "text 119 has no token that counts"),
        ({"texts": {}, "labels": None}, ConfigError, "no dataset"),
        ({"texts": {"x": (["a"], [1])}}, ConfigError, "a mapping of datasets holds its own labels"),
        ({"ks": ()}, ConfigError, r"ks = \[\]; expected numbers of latents from 1 to 24"),
        ({"ks": (0, 3)}, ConfigError, "from 1 to 24"),
        ({"ks": (25,)}, ConfigError, "from 1 to 24"),
        ({"pooling": "sum"}, ConfigError, "pooling = 'sum'; expected one of mean, max, last"),
        ({"test_share": 0.9}, ConfigError, "test_share = 0.9"),
        ({"seed": -1}, ConfigError, "seed = -1"),
        ({"n_bootstrap": -1}, ConfigError, "n_bootstrap = -1"),
        ({"hook": "blocks.7.hook_resid_pre"}, HookError, "no hook 'blocks.7.hook_resid_pre'"),
    ],
)
def test_mistakes(planted, random_lm, labelled, change, error, says):
    texts, labels = labelled
    settings = {"texts": texts, "labels": labels} | change
    with pytest.raises(error, match=says):
        sl.probe(planted, random_lm, **settings)


def test_a_dataset_is_a_pair():
    with pytest.raises(ConfigError, match="expected a mapping name → "):
        probing._datasets({"x": (["a"], [1], 3)}, None)


def test_dictionaries_that_do_not_fit(random_lm, labelled):
    narrow = sl.Dictionary.create("l1", reads=sl.Port(hook=HOOK, width=16), d_sae=D_SAE)
    with pytest.raises(ShapeError, match=r"this dictionary takes \[\.\.\., 16\]"):
        sl.probe(narrow, random_lm, *labelled)
    nameless = sl.Dictionary.create("l1", reads=random_lm.d_model, d_sae=D_SAE)
    with pytest.raises(ConfigError, match="give hook="):
        sl.probe(nameless, random_lm, *labelled)
    origin = sl.Origin(model="random", processing=("center_writing_weights",))
    centred = sl.Dictionary.create("l1", reads=sl.Port(hook=HOOK, width=48), d_sae=D_SAE, origin=origin)
    with pytest.raises(ConfigError, match="center_writing_weights=True"):
        sl.probe(centred, random_lm, *labelled)


def test_a_dictionary_of_two_models_that_reads_one_of_them_has_its_probes(planted, random_lm, labelled, report):
    ports = [sl.Port(hook=HOOK, width=random_lm.d_model, model=name) for name in ("base", "chat")]
    d = sl.Dictionary.create("l1", reads=ports, d_sae=D_SAE, origin=planted.origin)
    d.W_enc.data.copy_(torch.cat([torch.zeros_like(planted.W_enc), planted.W_enc]))
    d.b_enc.data.copy_(planted.b_enc)
    both = sl.probe(d, {"base": random_lm, "chat": random_lm}, *labelled, ks=(1, 4))
    assert {name: both[name] for name in ("k = 1", "k = 4")} == {name: report[name] for name in ("k = 1", "k = 4")}
    assert (both.hook, both.model) == (f"base:{HOOK} + chat:{HOOK}", "base = random, chat = random")


def test_numbers_that_are_none(planted, random_lm, labelled):
    with (
        random_lm.replace("blocks.0.hook_mlp_out", lambda x: x * torch.nan),
        pytest.raises(
            NonFiniteError, match=r"activations at blocks\.1\.hook_resid_pre or their codes are NaN or infinite in texts 0"
        ),
    ):
        sl.probe(planted, random_lm, *labelled, hook="blocks.1.hook_resid_pre")
    broken = sl.Dictionary.create("l1", reads=planted.reads, d_sae=D_SAE, origin=planted.origin)
    broken.b_enc.data[3] = torch.nan
    with pytest.raises(NonFiniteError, match="b_enc of the dictionary holds NaN"):
        sl.probe(broken, random_lm, *labelled)


def test_without_scikit_learn_the_error_names_the_extra(planted, random_lm, labelled, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"pip install 'saelens-lite\[analysis\]'"):
        sl.probe(planted, random_lm, *labelled)


def test_labelled_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": 1}\n\n{"text": "two\\n", "label": 0, "more": []}\n')
    assert read_labelled(tmp_path / "a.jsonl") == (["one", "two\n"], [1, 0])
    (tmp_path / "a.csv").write_text('\ufeffsentence,kind\n"one, or ""1""",x\n"two\nlines",y\n', encoding="utf-8")
    read = read_labelled(tmp_path / "a.csv", column="sentence", label_column="kind")
    assert read == (['one, or "1"', "two\nlines"], ["x", "y"])
    (tmp_path / "long.csv").write_text(f"text,label\n{'a ' * 100_000},1\n")
    assert len(read_labelled(tmp_path / "long.csv")[0][0]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("none.csv", None, TextError, "no labelled texts at"),
        ("a.txt", b"text", ConfigError, r"cannot read \.txt files"),
        ("a.csv", b"", TextError, "holds no texts"),
        ("a.csv", b"text,label\n", TextError, "holds no texts"),
        ("a.csv", b"text,labl\nx,y\n", TextError, r"line 2: no 'label'; did you mean labl\?; it has text, labl"),
        ("a.csv", b"text,label\nx,y\nz\n", TextError, "line 3: no 'label'"),
        ("a.csv", b'text,label\n"x" y,z\n', TextError, "damaged or not a UTF-8 CSV"),
        ("a.csv", b"text,label\n\xff,z\n", TextError, "damaged or not a UTF-8 CSV"),
        ("a.jsonl", b'{"text": "x", "label": 1}\n{"text"', TextError, "line 2: expected a JSON object"),
        ("a.jsonl", b"[1]\n", TextError, "line 1: expected a record with the key 'text'; found a list"),
        ("a.jsonl", b'{"text": 3, "label": 1}\n', TextError, "line 1: expected text under 'text'; found 3"),
        ("a.jsonl", b'{"text": "x", "label": null}\n', TextError, "expected a word or number under 'label'"),
        ("a.jsonl", b"\xff\n", TextError, "line 1: expected a JSON object"),
    ],
)
def test_labelled_files_that_cannot_be_read(tmp_path, name, content, error, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=says):
        read_labelled(tmp_path / name)
