"""Feature stores of several dictionaries, with a control, interrupted, continued, as a table, labelled, exported."""

import copy
import errno
import gzip
import json
import math
import sys
from datetime import UTC, datetime

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    DiskFullError,
    LockedError,
    OutputExistsError,
    TextError,
    UserError,
)
from saelens_lite.features import DetectionTask, Example, Scorer, collect, token_baseline, words_of_label
from saelens_lite.features.code_log import CodeLog
from saelens_lite.features.compare import Stability
from saelens_lite.features.sampling import uniform
from saelens_lite.files import file_hash
from saelens_lite.tokens import TokenRows, token_rows
from saelens_lite_plugins.exporters.neuronpedia import _context

HOOK, OTHER_HOOK = "blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"
D_SAE, N_TOKENS = 40, 500
CREATED = datetime(2025, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def dictionaries(random_lm) -> list[sl.Dictionary]:
    """One of another rule, size and hook than the other."""
    made = []
    for seed, (rule, d_sae, options, hook) in enumerate([("topk", D_SAE, {"k": 6}, HOOK), ("l1", 24, {}, OTHER_HOOK)]):
        d = sl.Dictionary.create(
            rule,
            reads=sl.Port(hook=hook, width=48),
            d_sae=d_sae,
            options=options,
            seed=seed,
            origin=sl.Origin(model="random", n_ctx=24),
        )
        d.b_enc.data[5] = -1e4
        made.append(d)
    return made


@pytest.fixture(scope="module")
def rows(random_lm, documents) -> TokenRows:
    return token_rows(random_lm, documents, n_ctx=24, n_tokens=N_TOKENS)


@pytest.fixture(scope="module")
def folder(dictionaries, random_lm, rows, tmp_path_factory):
    """The folder of a store with everything in it; copy it before changing anything."""
    out = tmp_path_factory.mktemp("stores") / "it's a store"
    sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, codes=True, control=True, batch_tokens=96)
    return out


@pytest.fixture
def store(folder) -> sl.FeatureStore:
    return sl.FeatureStore.load(folder)


def same(a: sl.FeatureStore, b: sl.FeatureStore) -> bool:
    pairs = (*zip(a.tensors, b.tensors, strict=True), *zip(a.weights, b.weights, strict=True))
    return a.info == b.info and all(torch.equal(x, y) for x, y in pairs)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_several_are_each_alone(dictionaries, random_lm, rows, tmp_path):
    together = sl.FeatureStore.build(dictionaries, random_lm, rows, out=tmp_path / "all", codes=True, batch_tokens=96)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["0-topk", "1-l1"]
    for name, d, store in zip(("0-topk", "1-l1"), dictionaries, together, strict=True):
        alone = sl.FeatureStore.build(d, random_lm, rows, out=tmp_path / name, codes=True, batch_tokens=96)
        assert same(store, alone)
        assert contents(tmp_path / "all" / name) == contents(tmp_path / name)
        assert store.sql("select count(*) n from codes").to_pylist() == [{"n": int(store.tensors.count.sum())}]


def test_one_hook_for_several(dictionaries, random_lm, rows):
    stores = sl.FeatureStore.build(dictionaries, random_lm, rows, hook=HOOK)
    assert [store.info.reads for store in stores] == [(HOOK,), (HOOK,)]


def test_control_is_the_store_on_a_redrawn_model(dictionaries, random_lm, rows, store):
    with random_lm.redrawn(0) as other:
        redrawn = sl.FeatureStore.build(dictionaries[0], other, rows, batch_tokens=96)
    assert all(torch.equal(a, b) for a, b in zip(store.control.tensors, redrawn.tensors, strict=True))
    assert "shuffled" in store.control.info.model
    assert not torch.equal(store.control.tensors.count, store.tensors.count)
    assert store.control.control is None
    assert store.control.top_examples(int(store.control.tensors.count.argmax()))


class Interruption(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def failing(monkeypatch):
    """failing(n): the model's nth call from now on, and all later ones, fail; failing(None) ends that. Returns the calls."""
    calls = []
    run = sl.LanguageModel.run

    def make(n: int | None) -> list[int]:
        calls.clear()

        def counted(self, *args):
            calls.append(len(calls))
            if n is not None and len(calls) >= n:
                raise Interruption
            return run(self, *args)

        monkeypatch.setattr(sl.LanguageModel, "run", counted)
        return calls

    return make


def test_interrupted_and_continued_is_uninterrupted(folder, dictionaries, random_lm, rows, tmp_path, failing):
    out, settings = tmp_path / "store", {"codes": True, "control": True, "batch_tokens": 96}
    unfinished = tmp_path / ".store.unfinished"
    for call in (4, 3):  # after 3 batches, and after 2 more
        failing(call)
        with pytest.raises(Interruption):
            sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, **settings)
        assert not out.exists()
        with open(unfinished / "0" / "0" / "latents.bin", "ab") as file:
            file.write(b"a batch that never became whole")
    assert json.loads((unfinished / "0" / "progress.json").read_text())["n_batches"] == 5
    calls = failing(None)
    sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, **settings)
    n_left = len(calls)
    calls = failing(None)
    sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=tmp_path / "again", **settings)
    assert n_left == len(calls) - 5 > 5
    assert contents(out) == contents(folder) == contents(tmp_path / "again")
    assert not unfinished.exists()


def test_interrupted_in_the_control_or_the_reduction(folder, dictionaries, random_lm, rows, tmp_path, failing, monkeypatch):
    out, settings = tmp_path / "store", {"codes": True, "control": True, "batch_tokens": 96}
    failing(8)
    with pytest.raises(Interruption):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, **settings)
    failing(None)

    def fail(*args, **kwargs):
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr("saelens_lite.features.store.latent_weights", fail)
        with pytest.raises(Interruption):
            sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, **settings)
    calls = failing(1)  # every batch is there by now
    sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, **settings)
    assert calls == []
    assert contents(out) == contents(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_unfinished_store_is_not_gone_on_with_by_others(dictionaries, random_lm, rows, tmp_path, failing):
    out, unfinished = tmp_path / "store", tmp_path / ".store.unfinished"
    failing(3)
    with pytest.raises(Interruption):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, batch_tokens=96)
    failing(None)
    with pytest.raises(OutputExistsError, match="batch_tokens = 96"):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, batch_tokens=48)
    with pytest.raises(OutputExistsError, match=r"rule = 'topk' \(now 'l1'"):
        sl.FeatureStore.build(dictionaries[1], random_lm, rows, out=out, batch_tokens=96)
    (unfinished / "0" / "0" / "lists.bin").write_bytes(b"")
    with pytest.raises(CorruptFileError, match="delete"):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, batch_tokens=96)
    again = sl.FeatureStore.build(dictionaries[1], random_lm, rows, out=out, exists="overwrite")
    assert same(again, sl.FeatureStore.build(dictionaries[1], random_lm, rows))
    assert not unfinished.exists()


def test_an_unfinished_store_is_of_its_batches_and_of_its_rule(dictionaries, random_lm, rows, tmp_path, failing, monkeypatch):
    """Another device has other batches by default; dictionaries of other options may have the same weights."""
    out = tmp_path / "store"
    monkeypatch.setattr("saelens_lite.features.store.default_batch_tokens", lambda lm: 96)
    failing(3)
    with pytest.raises(Interruption):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out)
    failing(None)
    other = sl.Dictionary.create(
        "topk", reads=dictionaries[0].reads, d_sae=D_SAE, options={"k": 7}, origin=dictionaries[0].origin
    )
    other.load_state_dict(dictionaries[0].state_dict())
    with pytest.raises(OutputExistsError, match=r"options = .*'k': 6.* \(now .*'k': 7"):
        sl.FeatureStore.build(other, random_lm, rows, out=out)
    monkeypatch.setattr("saelens_lite.features.store.default_batch_tokens", lambda lm: 192)
    with pytest.raises(OutputExistsError, match=r"batch_tokens = 96 \(now 192\)"):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out)
    found = sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, batch_tokens=96)
    assert same(found, sl.FeatureStore.build(dictionaries[0], random_lm, rows, batch_tokens=96))


def test_an_unfinished_store_is_of_the_weights_of_its_model(dictionaries, random_lm, rows, tmp_path, failing):
    """A model that was trained since has the same name."""
    out = tmp_path / "store"
    failing(3)
    with pytest.raises(Interruption):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, batch_tokens=96)
    failing(None)
    trained = sl.LanguageModel(copy.deepcopy(random_lm.module), random_lm.tokenizer, name=random_lm.name)
    assert trained.fingerprint() == random_lm.fingerprint()
    trained.module.transformer.h[0].mlp.c_fc.weight.data.mul_(1.001)
    with pytest.raises(
        OutputExistsError, match=r"settings: weights = 'every entry: [0-9a-f]{64}' \(now 'every entry: [0-9a-f]{64}'\);"
    ):
        sl.FeatureStore.build(dictionaries[0], trained, rows, out=out, batch_tokens=96)


@pytest.mark.parametrize(
    "progress",
    [
        {},
        {"n_batches": 2},
        {"n_batches": "x", "sizes": [{}]},
        {"n_batches": 2, "sizes": []},
        {"n_batches": 2, "sizes": [{}, {}]},
        {"n_batches": 2, "sizes": [5]},
        {"n_batches": 2, "sizes": [{"lists.bin": "x"}]},
        {"n_batches": 2, "sizes": [{}]},  # batches that are said to be whole, but are not there
        {"n_batches": 1000, "sizes": [{}]},
    ],
    ids=str,
)
def test_a_damaged_note_of_progress(dictionaries, random_lm, rows, tmp_path, failing, progress):
    out, file = tmp_path / "store", tmp_path / ".store.unfinished" / "0" / "progress.json"
    failing(3)
    with pytest.raises(Interruption):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, batch_tokens=96)
    failing(None)
    file.write_text(json.dumps(progress))
    with pytest.raises(CorruptFileError, match="delete"):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, batch_tokens=96)
    assert not out.exists()


def test_a_damaged_request_can_be_overwritten(dictionaries, random_lm, rows, tmp_path, failing):
    out, file = tmp_path / "store", tmp_path / ".store.unfinished" / "request.json"
    failing(3)
    with pytest.raises(Interruption):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, batch_tokens=96)
    failing(None)
    file.write_text("{")
    with pytest.raises(CorruptFileError, match=r"unfinished store.*delete .*unfinished or set exists='overwrite'"):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, batch_tokens=96)
    found = sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, batch_tokens=96, exists="overwrite")
    assert same(found, sl.FeatureStore.build(dictionaries[0], random_lm, rows, batch_tokens=96))


def test_a_full_disk_keeps_what_is_whole(folder, dictionaries, random_lm, rows, tmp_path, monkeypatch):
    out, settings = tmp_path / "store", {"codes": True, "control": True, "batch_tokens": 96}
    append, n_left = CodeLog._append, iter(range(4))

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    def filling(self, pieces):
        if next(n_left, None) is None:
            self._files["latents.bin"] = Full(self._files["latents.bin"])
        append(self, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(CodeLog, "_append", filling)
        with pytest.raises(DiskFullError, match="free some space"):
            sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, **settings)
    assert json.loads((tmp_path / ".store.unfinished/0/progress.json").read_text())["n_batches"] == 4
    sl.FeatureStore.build(dictionaries[0], random_lm, rows, out=out, **settings)
    assert contents(out) == contents(folder)


def test_a_store_in_the_making_is_locked(dictionaries, random_lm, rows, tmp_path):
    with (
        collect.working_folder(tmp_path / "store", {}, "error"),
        pytest.raises(LockedError),
        collect.working_folder(tmp_path / "store", {}, "error"),
    ):
        pass


def test_what_cannot_be_begun_leaves_nothing(dictionaries, random_lm, rows, tmp_path):
    narrow = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=16), d_sae=8, options={"k": 2})
    with pytest.raises(sl.errors.ShapeError, match="16"):
        sl.FeatureStore.build([dictionaries[0], narrow], random_lm, rows, out=tmp_path / "store")
    mute = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=48), d_sae=8, options={"k": 2})
    mute.b_enc.data.fill_(-1e6)
    with pytest.raises(TextError, match="fires"):
        sl.FeatureStore.build([dictionaries[0], mute], random_lm, rows, out=tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_codes_are_a_sorted_table_of_all_activations(store, dictionaries, random_lm, rows):
    found = store.sql("select latent, row, position, token, value from codes").to_pylist()
    expected = []
    for row, (tokens, keep) in enumerate(zip(rows.tokens, rows.keep, strict=True)):
        codes = dictionaries[0].encode(random_lm.run(tokens[None], HOOK)[HOOK])
        dense = codes.to_dense()[0].detach() * keep[:, None]
        expected += [(int(i), row, int(p), int(tokens[p]), float(dense[p, i])) for p, i in dense.nonzero()]
    assert len(found) == len(expected) > 1000
    for one, (latent, row, position, token, value) in zip(found, sorted(expected), strict=True):
        assert tuple(one.values()) == (latent, row, position, token, pytest.approx(value, rel=1e-4))


def test_questions_in_sql(store):
    counts = store.sql("select latent, count(*) as n, max(value) as largest from codes group by latent order by latent")
    assert counts.column_names == ["latent", "n", "largest"]
    fires = store.tensors.count.nonzero().squeeze(1)
    assert counts["latent"].to_pylist() == fires.tolist()
    assert counts["n"].to_pylist() == store.tensors.count[fires].tolist()
    assert counts["largest"].to_pylist() == store.tensors.top_value[fires, 0].tolist()
    latent = int(store.tensors.count.argmax())
    best = store.sql(
        f"select text from codes join tokens using (token) where latent = {latent} order by value desc, row, position limit 1"
    )
    example = store.top_examples(latent)[0]
    assert best.to_pylist() == [{"text": example.tokens[example.peak]}]
    assert store.sql("with n as (select count(*) c from codes) select c from n").num_rows == 1


@pytest.mark.parametrize(
    "query",
    [
        "create table x as select 1",
        "insert into tokens values (1, 'a')",
        "delete from tokens",
        "with gone as (delete from tokens returning *) select * from gone",
        "with gone as (delete from codes returning *) select * from gone",
        "copy codes to '{}/stolen.csv'",
        "copy (select 1) to '{}/stolen.csv'",
        "export database '{}/stolen'",
        "attach '{}/other.db'",
        "set enable_external_access = true",
        "reset enable_external_access",
        "pragma enable_external_access = true",
        "install httpfs",
        "load httpfs",
        "select * from read_csv('{}/secret.csv')",
        "select * from '{}/secret.csv'",
        "select * from read_text('{}/secret.csv')",
        "select * from read_blob('{}/secret.csv')",
        "select * from glob('{}/*')",
        "select 1; select 2",
        "select 1; copy codes to '{}/stolen.csv'",
        "select * from nowhere",
        "selec 1",
        "",
    ],
)
def test_sql_that_does_more_than_read_the_codes(store, folder, tmp_path, query):
    (tmp_path / "secret.csv").write_text("a,b\n1,2\n")
    before = contents(folder)
    with pytest.raises(UserError):
        store.sql(query.format(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]
    assert contents(folder) == before


def test_sql_cannot_write_over_the_codes(store, folder):
    before = contents(folder)
    with pytest.raises(UserError):
        store.sql(f"copy (select 1) to '{folder}/codes.parquet'".replace("it's", "it''s"))
    assert contents(folder) == before


def test_sql_needs_an_extra(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ConfigError, match=r"saelens-lite\[sql\]"):
        store.sql("select 1")


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "one byte"])
def test_damaged_codes(store, tmp_path, damage):
    path = store.save(tmp_path / "store") / "codes.parquet"
    content = path.read_bytes()
    path.unlink()
    middle = len(content) // 2
    changed = {
        "truncated": content[:middle],
        "longer": content + b"x",
        "one byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    if damage in changed:
        path.write_bytes(changed[damage])
    with pytest.raises(CorruptFileError, match="build the store again"):
        sl.FeatureStore.load(tmp_path / "store").sql("select sum(value) from codes")


def test_codes_that_are_no_table(store, tmp_path):
    """Even when the checksum has been adapted to them."""
    folder = store.save(tmp_path / "store")
    (folder / "codes.parquet").write_bytes(b"no table at all")
    content = json.loads((folder / "features.json").read_text())
    content["codes"] = {"n_bytes": 15, "sha256": file_hash(folder / "codes.parquet")}
    (folder / "features.json").write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="DuckDB"):
        sl.FeatureStore.load(folder).sql("select 1")


def test_codes_that_are_gone_cannot_be_saved(store, tmp_path):
    again = sl.FeatureStore.load(store.save(tmp_path / "store"))
    (tmp_path / "store" / "codes.parquet").unlink()
    with pytest.raises(CorruptFileError, match=r"codes\.parquet"):
        again.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_everything_survives_saving(store, folder, tmp_path):
    store.label(3, "brackets <b> \" ' ümlaut")
    store.scores = Stability(
        score=torch.rand(D_SAE),
        n_shared=torch.ones(D_SAE, dtype=torch.long),
        live=torch.arange(D_SAE) != 4,
        sha256=store.info.dictionary_sha256,
        other_sha256=("x",),
        threshold=0.7,
        method="mutual",
    )
    again = sl.FeatureStore.load(store.save(tmp_path / "copy"))
    assert same(again, store)
    assert same(again.control, store.control)
    assert again.labels == store.labels == {3: "brackets <b> \" ' ümlaut"}
    assert torch.equal(again.stability, store.scores.score)
    assert again.latent(3).label == store.labels[3]
    assert again.latent(3).stability == pytest.approx(store.scores.score[3].item())
    assert again.latent(4).stability is None  # dead when dictionaries were compared
    assert again.sql("select count(*) from codes") == store.sql("select count(*) from codes")
    assert set(contents(tmp_path / "copy")) == {*contents(folder), "labels.json", "stability.safetensors"}
    assert sl.FeatureStore.load(folder).stability is None


def test_stores_labels_and_scores_of_other_dictionaries(store, dictionaries, random_lm, rows, folder, tmp_path):
    assert sl.FeatureStore.load(folder, dictionaries[0]).info == store.info
    with pytest.raises(ConfigError, match="another dictionary"):
        sl.FeatureStore.load(folder, dictionaries[1])
    fewer = copy.deepcopy(dictionaries[0])
    fewer.rule.config = fewer.rule.config.replace(k=1)  # the same weights, other codes
    with pytest.raises(ConfigError, match=r"another dictionary .*options"):
        sl.FeatureStore.load(folder, fewer)
    other = sl.FeatureStore.build(dictionaries[1], random_lm, rows)
    other.label(2, "something")
    path = other.write_labels(tmp_path / "labels.json")
    with pytest.raises(ConfigError, match="another dictionary"):
        store.read_labels(path)
    scores = sl.stability(dictionaries[1], [dictionaries[1]])
    with pytest.raises(ConfigError, match="another dictionary"):
        sl.FeatureStore.build(dictionaries[0], random_lm, rows, stability=scores)
    with pytest.raises(ConfigError, match="1 stability scores for 2"):
        sl.FeatureStore.build(dictionaries, random_lm, rows, stability=scores)
    both = sl.FeatureStore.build(dictionaries, random_lm, rows, stability=[None, scores])
    assert both[0].stability is None
    assert torch.equal(both[1].stability, scores.score)


def test_labels(store, tmp_path):
    for latent, text in ((7, "seven"), (30, "thirty"), (7, "better"), (8, "eight"), (8, "")):
        store.label(latent, text)
    path = store.write_labels(tmp_path / "new" / "labels.json")
    store.labels.clear()
    store.label(30, "other")
    store.label(1, "one")
    store.read_labels(path)
    assert store.labels == {1: "one", 7: "better", 30: "thirty"}
    path.write_text(path.read_text().replace("better", ""))
    store.read_labels(path)
    assert store.labels == {1: "one", 30: "thirty"}
    with pytest.raises(UserError, match="0 to 39"):
        store.label(D_SAE, "too far")


@pytest.mark.parametrize(
    "labels",
    [{"-1": "x"}, {"40": "x"}, {"07": "x"}, {"9" * 5000: "x"}, {"x": "x"}, {"3": 5}, {"²": "x"}, ["x"], None],
    ids=lambda labels: str(labels)[:20],
)
def test_damaged_labels(store, tmp_path, labels):
    path = tmp_path / "labels.json"
    content = {"format": 1, "dictionary_sha256": store.info.dictionary_sha256, "labels": labels}
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError):
        store.read_labels(path)


def context(peak: str, *others: str, row: int = 0, position: int = 1) -> Example:
    """Return a context of three tokens, the middle one at the peak."""
    return Example((others[0], peak, others[1]), (0.0, 1.0, 0.0), 1, 1.0, row, position)


def test_token_baseline_counts_peaks():
    shown = [context("a", "x", "y"), context("a", "x", "y"), context("b", "x", "y")]
    contexts = [("a", "z", "z"), ("z", "b", "z"), ("x", "y", "z"), ("b", "a", "x")]
    assert token_baseline(DetectionTask(None, shown, contexts)) == [0.75, 0.5, 0, 0.75]


def test_words_of_a_label():
    contexts = [("The", " cat"), ("a", " dog"), ("ca", "t"), ("and", " so")]
    assert words_of_label(DetectionTask("“cat” or 'dog', not and", [], contexts)) == [1, 1, 1, 0]
    assert words_of_label(DetectionTask("so the Cats and the dog", [], [("the", " cats"), ("dog",), ("a dog",)])) == [1, 0, 0]
    assert isinstance(words_of_label, Scorer)


def test_detection_on_a_latent_of_one_token(random_lm, rows):
    """A latent that fires on one token and nothing else: the baseline finds it, a label of another word does not."""
    d = sl.Dictionary.create(
        "l1", reads=sl.Port(hook="blocks.0.hook_resid_pre", width=48), d_sae=2, options={}, origin=sl.Origin(n_ctx=24)
    )
    token = rows.tokens[rows.keep].mode().values
    embedding = random_lm.module.get_input_embeddings().weight
    own = embedding[token] / embedding[token].norm()
    d.W_enc.data[:, 0] = own
    others = embedding[torch.arange(len(embedding)) != token]
    d.b_enc.data.fill_(-float((others @ own).max()) - 0.9 * float(embedding[token] @ own - (others @ own).max()))
    d.W_enc.data[:, 1] = 0
    d.b_enc.data[1] = 1
    store = sl.FeatureStore.build(d, random_lm, rows, window=(2, 2))
    on = {(e.row, e.position) for e in store.random_examples(0)}
    assert on
    assert all(rows.tokens[place] == token for place in on)
    store.label(0, "nothing of the kind")
    store.label(1, "fires everywhere")
    scores = store.score(model=words_of_label, kinds=("detection",))
    (of_words,) = scores
    assert of_words.score[:2] == ((0.5, *of_words.score.auroc[1:]), (0.5, *of_words.score.balanced_accuracy[1:]))
    assert of_words.by_tokens.auroc.value > 0.9  # at some positions the token is not enough
    assert set(of_words.recall) <= {0.0, None}
    assert [(one.latent, one.kind) for one in scores.skipped] == [(1, "detection")]
    assert "0 in which it is silent" in scores.skipped[0].reason

    def perfect(task: DetectionTask) -> list[float]:
        return [float(store.vocabulary[int(token)] in tokens) for tokens in task.contexts]

    (of_token,) = store.score([0], model=perfect, kinds=("detection",))
    assert of_token.score.auroc == of_token.by_tokens.auroc
    assert set(of_token.recall) <= {1.0, None}
    for wrong in (math.nan, 1.0):
        with pytest.raises(UserError, match="finite number"):
            store.score([0], model=lambda task, wrong=wrong: [wrong])


def test_held_out_contexts_are_not_shown_and_truly_fire_or_not(store):
    tasks = []

    def scorer(task: DetectionTask) -> list[float]:
        tasks.append(task)
        return uniform(0, "guess", torch.arange(len(task.contexts))).tolist()

    latents = [i for i in range(D_SAE) if 20 < store.tensors.count[i] < 100]
    for latent in latents:
        store.label(latent, "a guess")
    scores = list(store.score(latents, model=scorer, kinds=("detection",), controls=False))
    assert len(scores) > 5
    assert 0.3 < sum(one.score.auroc.value for one in scores) / len(scores) < 0.7  # guesses
    for one, task in zip(scores, tasks, strict=True):
        assert one.n_firing + one.n_silent + one.n_hard == len(task.contexts)
        assert not {example.tokens for example in task.shown} & set(task.contexts)


def lines(path) -> list[dict]:
    content = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()]


def test_neuronpedia_export(store, dictionaries, tmp_path, monkeypatch):
    monkeypatch.setattr("saelens_lite_plugins.exporters.neuronpedia.BATCH", 16)
    settings = {"set_name": "our-set", "creator_id": "someone", "dictionary": dictionaries[0], "created": CREATED}
    out = store.export("neuronpedia", tmp_path, model_id="gpt2-small", **settings)
    assert out == tmp_path / "gpt2-small" / "1-our-set"
    files = ["activations", "features", "model.jsonl", "release.jsonl", "source.jsonl", "sourceset.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == files
    (source,) = lines(out / "source.jsonl")
    assert (source["id"], source["setName"], source["modelId"]) == ("1-our-set", "our-set", "gpt2-small")
    features = [line for i in range(3) for line in lines(out / "features" / f"batch-{i}.jsonl.gz")]
    activations = [line for i in range(3) for line in lines(out / "activations" / f"batch-{i}.jsonl.gz")]
    assert len({line["id"] for line in activations}) == len(activations)
    assert {len(line["id"]) for line in activations} == {25}
    assert [line["index"] for line in features] == [str(i) for i in range(D_SAE)]
    for latent, line in enumerate(features):
        summary = store.latent(latent)
        assert line["frac_nonzero"] == summary.density  # not rounded
        assert line["maxActApprox"] == round(summary.max, 3)
        assert line["pos_str"] == [text for text, _ in summary.promoted]
        assert line["neg_values"] == [round(effect, 3) for _, effect in summary.suppressed]
        assert line["freq_hist_data_bar_heights"] == (summary.histogram if summary.count else [])
        assert sum(line["logits_hist_data_bar_heights"]) == len(store.vocabulary)
        assert line["topkCosSimIndices"][0] == latent
        assert line["vector"] == dictionaries[0].W_dec[latent].tolist()
        assert line["createdAt"] == CREATED.isoformat()
        own = [line for line in activations if line["index"] == str(latent)]
        groups = [(-1, summary.max, -1, summary.examples)] * bool(summary.examples) + summary.groups
        assert len(own) == sum(len(examples) for *_, examples in groups)
        expected = iter(own)
        for low, high, share, examples in groups:
            for example, shown in zip(examples, expected, strict=False):
                assert shown["tokens"] == list(example.tokens)
                assert shown["values"] == [round(value, 3) for value in example.values]
                assert shown["values"][shown["maxValueTokenIndex"]] == shown["maxValue"] == max(shown["values"])
                assert shown["qualifyingTokenIndex"] == example.peak
                assert (shown["binMin"], shown["binMax"], shown["binContains"]) == (round(low, 3), round(high, 3), share)
    again = store.export("neuronpedia", tmp_path / "again", model_id="gpt2-small", **settings)
    assert contents(again) == contents(out)


def test_the_largest_value_is_found_before_rounding():
    example = Example(("a", "b", "c"), (0.5001, 0.0, 0.5004), 2, 0.5004, 7, 2)
    found = _context(example)
    assert found["values"] == [0.5, 0, 0.5]
    assert (found["maxValue"], found["maxValueTokenIndex"], found["qualifyingTokenIndex"]) == (0.5, 2, 2)
    tiny = _context(Example(("a", "b"), (0.0, 1e-5), 1, 1e-5, 0, 1))
    assert tiny["maxValueTokenIndex"] == 1


def test_neuronpedia_refuses(store, dictionaries, tmp_path):
    good = {"set_name": "set", "creator_id": "me", "model_id": "m"}
    for bad in ({"set_name": "../x"}, {"model_id": "a/b"}, {"creator_id": ""}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            store.export("neuronpedia", tmp_path, **good | bad)
    with pytest.raises(ConfigError, match="dictionary"):
        store.export("neuronpedia", tmp_path, **good, dictionary=dictionaries[1])
    store.export("neuronpedia", tmp_path, **good)
    with pytest.raises(OutputExistsError):
        store.export("neuronpedia", tmp_path, **good)
    store.info = store.info.replace(reads=("embed.hook_out",), writes=("embed.hook_out",))
    with pytest.raises(ConfigError, match="not inside a block"):
        store.export("neuronpedia", tmp_path / "x", **good)


def test_a_summary_is_what_single_questions_answer(store):
    """And partners have the mutual information that their counts say."""
    latent = int(store.tensors.count.argmax())
    summary = store.latent(latent)
    assert summary.examples == store.top_examples(latent)
    assert summary.groups == store.quantile_examples(latent)
    assert summary.random == store.random_examples(latent)
    assert summary.partners == store.partners(latent)
    assert sum(group.share for group in summary.groups) == pytest.approx(1)
    assert sum(
        b.firing_rate * n for b, n in zip(summary.positions, store.tensors.band_tokens[1:], strict=True)
    ) == pytest.approx(summary.count)
    for by in ("pmi", "count"):
        for partner in store.partners(latent, by):
            n, n_other = int(store.tensors.count[latent]), int(store.tensors.count[partner.latent])
            assert partner.pmi == pytest.approx(math.log(partner.count / n / (n_other / N_TOKENS)))
    with pytest.raises(ConfigError, match="pmi or count"):
        store.partners(latent, "size")
