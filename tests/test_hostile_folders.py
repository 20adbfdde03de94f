"""Folders of runs, caches, stores and dictionaries from strangers: nothing they say is believed before it is checked."""

import json
import os
import shutil
import struct
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saelens_lite as sl
from saelens_lite import files, tensor_files
from saelens_lite.cache import TensorSource, open_source
from saelens_lite.cache import stored as cache_stored
from saelens_lite.config import read_toml
from saelens_lite.dictionary.folder import slice_without
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.evaluation.sums import Metric
from saelens_lite.features import store_files as features_stored
from saelens_lite.features.explaining.scores import Judged, LabelScore
from saelens_lite.kinds import RUN, foreign
from saelens_lite.schemas import Checked, PlainName, checked
from saelens_lite.training import checkpoint, trainer

TERABYTE = 1 << 40
HOOK = "blocks.1.hook_resid_pre"


class Broken(Exception):
    """The function that interrupts `run`."""


class Breaking(TensorSource):
    """Activations in memory that end after five batches."""

    def batches(self, hooks, batch_size, seed, start=0):
        for number, batch in enumerate(super().batches(hooks, batch_size, seed, start)):
            if number == 5:
                raise Broken
            yield batch


@pytest.fixture
def x():
    return torch.randn(100, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(x, tmp_path):
    """An interrupted run with one checkpoint."""
    with pytest.raises(Broken):
        sl.train(
            Breaking(x), sl.TrainConfig(d_sae=12, batch_size=8, n_tokens=160, log_every=8, options={"k": 2}), tmp_path / "run"
        )
    return tmp_path / "run"


@pytest.fixture
def saved(tmp_path):
    """The folder of a dictionary with a density and tensors of its own."""
    d = sl.Dictionary.create("jumprelu", reads=sl.Port(hook=HOOK, width=6), d_sae=10)
    d.density = torch.full((10,), 0.125)
    return d.save(tmp_path / "dictionary")


@pytest.fixture
def captured(cache_folder, tmp_path):
    return shutil.copytree(cache_folder, tmp_path / "cache")


@pytest.fixture(scope="session")
def store_folder(random_lm, documents, tmp_path_factory):
    d = sl.Dictionary.create(
        "topk", reads=sl.Port(hook=HOOK, width=48), d_sae=20, options={"k": 3}, origin=sl.Origin(model="random")
    )
    scores = sl.stability(d, [sl.Dictionary.create("topk", reads=48, d_sae=20, options={"k": 3}, seed=1)])
    out = tmp_path_factory.mktemp("stores") / "store"
    store = sl.FeatureStore.build(d, random_lm, documents, out=out, stability=scores, control=True, top_n=2, n_silent=2)
    store.label(3, "a label")
    store.write_labels()
    result = Judged(Metric(0.9, 0.8, 1.0), Metric(0.8, 0.7, 0.9))
    store.record_scores([LabelScore(3, "a label", "detection", "a judge", 9, 9, result, by_tokens=result)])
    store.write_scores()
    return out


@pytest.fixture
def store(store_folder, tmp_path):
    return shutil.copytree(store_folder, tmp_path / "store")


def change(path: Path, *keys, **values) -> None:
    """Change values of the object in a JSON file, or of one in it."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys:
        inner = inner[key]
    inner.update(values)
    path.write_text(json.dumps(content))


def folder_of(run: Path) -> Path:
    (folder,) = (path for path in (run / "checkpoints").iterdir() if path.is_dir())
    return folder


def sign(folder: Path) -> None:
    """Make the checksums of a checkpoint fit what is there."""
    names = json.loads((folder / "checksums.json").read_text())["sha256"]
    change(folder / "checksums.json", sha256={name: files.file_hash(folder / name) for name in names})


LOADERS = {
    "run": lambda folder: checkpoint.load_checkpoint(folder),
    "captured": lambda folder: sl.ActivationCache.open(folder).verify(),
    "store": sl.FeatureStore.load,
    "saved": sl.Dictionary.load,
}
FILES = [
    *(("run", f"checkpoints/000000000040/{name}") for name in ("checksums.json", "state.json", "0.safetensors")),
    ("run", "checkpoints/history-0.jsonl"),
    *(("captured", name) for name in ("manifest.json", "shard-00001.safetensors")),
    *(
        ("store", name)
        for name in (
            "features.json", "features.safetensors", "weights.safetensors", "control.safetensors", "labels.json",
            "scores.json", "stability.safetensors",
        )
    ),
    *(("saved", name) for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "plugin.safetensors")),
]  # fmt: skip


@pytest.fixture(params=FILES, ids=" ".join)
def named(request):
    """Return the loader of a folder, the folder, and a file that the loader reads."""
    kind, name = request.param
    folder = request.getfixturevalue(kind)
    LOADERS[kind](folder)
    return LOADERS[kind], folder, folder / name


def test_a_link_out_of_the_folder_is_not_followed(named, tmp_path):
    load, folder, file = named
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptFileError, match=r"is a link to .*elsewhere, outside of its folder"):
        load(folder)


def test_links_in_the_folder_and_to_the_folder_are_followed(named, tmp_path):
    load, folder, file = named
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")
    (tmp_path / "link").symlink_to(folder)
    load(tmp_path / "link")


def test_a_pipe_is_not_waited_for(named):
    load, folder, file = named
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CorruptFileError, match=r"is not a file"):
        load(folder)


def test_a_terabyte_of_holes_is_refused_unread(named, monkeypatch):
    """By its size where that is known; by its first bytes where it is not."""
    load, folder, file = named
    hashed = []
    for module in (checkpoint, cache_stored, features_stored):
        monkeypatch.setattr(module, "file_hash", lambda path: hashed.append(path) or files.file_hash(path))
    os.truncate(file, TERABYTE)
    with nullcontext() if file.suffix == ".jsonl" else pytest.raises(CorruptFileError):  # only the checkpoint's part is read
        load(folder)
    assert file not in hashed
    file.unlink()
    file.touch()
    os.truncate(file, TERABYTE)
    with pytest.raises(CorruptFileError):
        load(folder)
    assert file not in hashed


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(saved, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123/sub"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(saved.iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../../blobs/{i}")
    assert sl.load(snapshot).d_sae == 10


def test_a_link_that_the_user_names_is_the_users(tmp_path):
    file = tmp_path / "file.safetensors"
    d = sl.Dictionary.create("topk", reads=6, d_sae=10, options={"k": 2})
    sl.convert(d.save(tmp_path / "d"), tmp_path / "foreign", "saelens")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cfg").symlink_to(tmp_path / "d" / "cfg.json")
    assert files.named_file(tmp_path / "links" / "cfg") == (tmp_path / "d" / "cfg.json").resolve()
    assert files.named_file(file) == file


# --- runs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_sae", [10**9, 13, 0, -1, 2**70, "many", 12.5, None])
def test_more_latents_than_the_tensors_have_are_not_allocated(run, x, monkeypatch, d_sae):
    folder = folder_of(run)
    change(folder / "state.json", "configs", 0, d_sae=d_sae)
    sign(folder)
    monkeypatch.setattr(trainer, "Dictionary", None)
    with pytest.raises(CorruptFileError, match=r"d_sae|TrainConfig"):
        sl.resume(run, TensorSource(x))


@pytest.mark.parametrize(
    ("keys", "values", "said"),
    [
        (["request"], {"device": "gpu of mine"}, "request.device = 'gpu of mine'"),
        (["request"], {"trust_remote_code": True}, "unknown key 'request.trust_remote_code'"),
        (["dictionaries", 0], {"n_seen": 10**30}, "dictionaries.0.n_seen = 1000000"),
        (["dictionaries", 0], {"n_seen": 41}, "41 tokens in 5 steps of 8"),
        (["dictionaries", 0], {"scale": float("nan")}, "NaN is not a number of JSON"),
        (["configs", 0], {"batch_size": 10**12}, None),
        (["configs", 0], {"batch_size": 2}, "40 tokens in 5 steps of 2"),
        (["configs", 0], {"betas": [2.0, 3.0]}, r"TrainConfig: betas\.0 = 2\.0"),
        ([], {"n_batches": 7}, "n_batches = 7, but no dictionary has seen that many"),
        ([], {"dropped": [None, None]}, "expected equal numbers"),
        ([], {"loggers": ["jsonl"] * 5000}, "a logger is named twice"),
        ([], {"loggers": "jsonl"}, "loggers = 'jsonl': input should be a valid list"),
    ],
)
def test_a_forged_state(run, x, keys, values, said):
    folder = folder_of(run)
    change(folder / "state.json", *keys, **values)
    sign(folder)
    with pytest.raises(CorruptFileError, match=said or "a batch of 1,000,000,000,000 takes .* bytes of memory"):
        sl.resume(run, TensorSource(x))


@pytest.mark.parametrize("name", ["../../../secret", "/etc/hostname", "a/b", "..", "", "x\0y", "n" * 300, "other.json"])
def test_checksums_of_files_elsewhere_are_not_computed(run, name, monkeypatch):
    folder, hashed = folder_of(run), []
    monkeypatch.setattr(checkpoint, "file_hash", lambda path: hashed.append(path) or "0" * 64)
    change(folder / "checksums.json", "sha256", **{name: "0" * 64})
    with pytest.raises(CorruptFileError, match=r"checksums\.json (is damaged: sha256|names other files)"):
        checkpoint.load_checkpoint(run)
    assert not hashed


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("dictionary.b_enc", torch.zeros(1), r"dictionary\.b_enc is \(1,\) torch\.float32, expected \(12,\)"),
        ("adam.b_enc.exp_avg", torch.zeros(12, dtype=torch.float64), r"adam\.b_enc\.exp_avg is \(12,\) torch\.float64"),
        ("adam.b_enc.step", torch.zeros(3), r"adam\.b_enc\.step is \(3,\)"),
        ("random.0", torch.zeros(5056, dtype=torch.uint8), "does not fit"),
        ("random.0", torch.zeros(7, dtype=torch.uint8), r"random\.0 is \(7,\)"),
        ("fire_count", torch.full((12,), -1), "fire_count is below 0"),
        ("surplus", torch.zeros(1), r"not expected: \['surplus'\]"),
        ("dictionary.W_dec", torch.zeros(12, 7), r"W_dec has shape \(12, 7\), expected \(12, 6\)"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_tensors_that_are_not_those_of_the_run(run, x, name, tensor, said):
    folder = folder_of(run)
    save_file(load_file(folder / "0.safetensors") | {name: tensor}, folder / "0.safetensors")
    sign(folder)
    with pytest.raises(ConfigError, match=said):
        sl.resume(run, TensorSource(x))


def test_a_log_that_is_a_link_is_not_cut(run, x, tmp_path):
    (tmp_path / "precious").write_text("what somebody wrote\n")
    (run / "log.jsonl").unlink(missing_ok=True)
    (run / "log.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(sl.errors.PluginError, match="outside of its folder"):
        sl.resume(run, TensorSource(x))
    assert (tmp_path / "precious").read_text() == "what somebody wrote\n"


def sign_history(run: Path, content: bytes) -> None:
    """Replace a run's history, and make its checkpoint fit that."""
    (run / "checkpoints/history-0.jsonl").write_bytes(content)
    part = {"bytes": len(content), "sha256": files.file_hash(content)}
    change(folder_of(run) / "state.json", histories=[part])
    sign(folder_of(run))


def test_lines_of_a_log_are_numbers(run):
    content = (run / "checkpoints/history-0.jsonl").read_bytes()
    *before, last = content.splitlines(keepends=True)
    for bad, said in (
        (json.dumps(json.loads(last) | {"fvu": "low"}).encode() + b"\n", r"history-0\.jsonl, line 5 is damaged: fvu = 'low'"),
        (b"[1]\n", r"history-0\.jsonl, line 5 is damaged"),
        (b'{"step": 1,\xff}\n', r"history-0\.jsonl, line 5 is damaged"),
        (last[:-1], "line 5: expected .* bytes of at most 5 complete lines"),
        (last * 50, "line 6: expected .* bytes of at most 5 complete lines"),
    ):
        sign_history(run, b"".join(before) + bad)
        with pytest.raises(CorruptFileError, match=said):
            checkpoint.load_checkpoint(run)
    sign_history(run, b"".join(before) + last.replace(b": ", b":\r", 1))  # is JSON too
    (history,) = checkpoint.load_checkpoint(run)[1]["histories"]
    assert list(history) == [json.loads(line) for line in content.splitlines()]
    sign_history(run, content)
    change(folder_of(run) / "state.json", histories=[[]])
    sign(folder_of(run))
    with pytest.raises(CorruptFileError, match="not those of format 5"):
        checkpoint.load_checkpoint(run)


def test_a_history_that_is_a_link_is_not_written_to(run, x, tmp_path):
    (tmp_path / "precious").write_text("what somebody wrote\n")
    folder, log = folder_of(run), run / "checkpoints/history-0.jsonl"
    log.rename(folder / "0.jsonl")  # as format 4 has it
    state = json.loads((folder / "state.json").read_text())
    del state["histories"]
    (folder / "state.json").write_text(json.dumps(state))
    names = ("0.safetensors", "0.jsonl", "state.json")
    change(folder / "checksums.json", format=4, sha256={name: files.file_hash(folder / name) for name in names})
    log.symlink_to(tmp_path / "precious")
    with pytest.raises(CorruptFileError, match="outside of its folder"):
        sl.resume(run, TensorSource(x), checkpoint_seconds=0.0)
    assert (tmp_path / "precious").read_text() == "what somebody wrote\n"


def test_a_folder_of_a_sweep_that_is_a_link_is_not_written_to(x, tmp_path):
    configs = [sl.TrainConfig(d_sae=12, batch_size=8, n_tokens=160, options={"k": 2}, seed=seed) for seed in (0, 1)]
    with pytest.raises(Broken):
        sl.train(Breaking(x), configs, tmp_path / "run")
    shutil.move(tmp_path / "run" / "1-topk", tmp_path / "elsewhere")
    (tmp_path / "run" / "1-topk").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptFileError, match="1-topk is a link to"):
        sl.resume(tmp_path / "run", TensorSource(x))
    assert not (tmp_path / "elsewhere" / "dictionary").exists()


@pytest.mark.parametrize(
    "description",
    [
        {"cache": "x"},
        {"cache": "x", "manifest_sha256": "0", "held_out_chunks": 0},
        {"cache": "x", "manifest_sha256": "0" * 64, "held_out_chunks": -1},
        {"text": "python-docs"},
        {
            "text": "python-docs",
            "text_bytes": None,
            "text_config": {},
            "held_out": 0,
            "model": {"name": "tiny", "revision": None, "center_writing_weights": False, "device": "cpu", "dtype": "int8"},
            "stream": {"hooks": [HOOK], "buffer_tokens": 128, "batch_tokens": 64, "text_name": None},
        },
    ],
)
def test_sources_that_are_described_wrongly(description):
    with pytest.raises(CorruptFileError, match="the activations of the run"):
        open_source(description)


# --- caches ----------------------------------------------------------------------------------------------------------------


def test_a_shard_listed_again_and_again(captured):
    shards = json.loads((captured / "manifest.json").read_text())["shards"]
    change(captured / "manifest.json", shards=shards[:1] * 51)
    with pytest.raises(CorruptFileError, match=r"shard number 1 is in 'shard-00000\.safetensors', expected shard-00001"):
        sl.ActivationCache.open(captured)


@pytest.mark.parametrize(
    ("keys", "values", "said"),
    [
        (["shards", 0], {"file": "../elsewhere"}, r"shards\.0\.file = '\.\./elsewhere': expected the plain name of a file"),
        (["shards", 0], {"n_tokens": 10**9}, "the manifest says 1,000,000,000 tokens"),
        (["shards", 0], {"n_tokens": 10**11}, "a cache has at most"),
        (["shards", 0], {"bytes": TERABYTE}, "expected 1,099,511,627,776 bytes"),
        (["shards", 0], {"bytes": True}, r"shards\.0\.bytes = True"),
        (["hooks", HOOK], {"d_in": 10**9}, "has 192 entries, expected d_in = 1000000000"),
        (["hooks", HOOK], {"rms_norm": float("nan")}, "NaN is not a number of JSON"),
        (["hooks", HOOK], {"rms_norm": 1e300}, "less than or equal"),
        (["origin"], {"n_ctx": 2**60}, "n_ctx = 1152921504606846976"),
        ([], {"balance": {"share": float("inf")}}, "Infinity is not a number of JSON"),
        ([], {"dtype": "float64"}, "dtype = 'float64'"),
        ([], {"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_a_forged_manifest(captured, keys, values, said):
    change(captured / "manifest.json", *keys, **values)
    with pytest.raises(CorruptFileError, match=said):
        sl.ActivationCache.open(captured)


def test_numbers_too_large_to_be_finite_are_refused(captured):
    text = (captured / "manifest.json").read_text()
    (captured / "manifest.json").write_text(text.replace('"rms_norm": ', '"rms_norm": 1e999, "x": ', 1))
    with pytest.raises(CorruptFileError, match="1e999 is too large for a number"):
        sl.ActivationCache.open(captured)


def test_many_small_values_are_refused_before_they_are_made(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [' + "{}," * files.MAX_JSON_VALUES + "{}]}")
    with pytest.raises(CorruptFileError, match="more than 6,000,000 values"):
        files.read_json(tmp_path / "a.json")


# --- headers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "n_bytes", "said"),
    [
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, 12, "overlap, or leave a gap"),
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [12, 20])}, 20, "overlap, or leave a gap"),
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [0, 8])}, 8, "overlap, or leave a gap"),
        ({"a": ("F32", [2], [4, 12])}, 12, "overlap, or leave a gap"),
        ({"a": ("F32", [-2], [0, 8])}, 8, "has shape"),
        ({"a": ("F32", [0, 2**70], [0, 0])}, 0, "has shape"),
        ({"a": ("F32", [3], [0, 8])}, 8, "has shape"),
        ({"a": ("I4", [2], [0, 8])}, 8, "of a type not read"),
        ({"a": ("F32", [2], [8, 0])}, 0, "is damaged"),
        ({"a": ("F32", [2.0], [0, 8])}, 8, "has shape"),
    ],
    ids=str,
)
def test_headers_that_contradict_themselves(tmp_path, entries, n_bytes, said):
    header = {name: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True)) for name, entry in entries.items()}
    written = json.dumps(header).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(written)) + written + bytes(n_bytes))
    with pytest.raises(CorruptFileError, match=said):
        tensor_files.read_tensors(file)


def test_what_is_larger_than_memory_is_not_read(saved, monkeypatch):
    monkeypatch.setattr(files, "_memory", lambda: 100)
    with pytest.raises(CorruptFileError, match="and this machine has 100 bytes of memory"):
        sl.load(saved)


# --- dictionaries and stores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_metadata_that_could_not_be_saved_is_not_loaded(saved, number):
    text = (saved / "cfg.json").read_text()
    (saved / "cfg.json").write_text(text.replace('"training": {', f'"training": {{"loss": {number}', 1))
    with pytest.raises(CorruptFileError, match="number"):
        sl.load(saved)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"colour": 3}, "unknown key 'metadata.saelens_lite.colour'; was it written by another version"),
        ({"skip": "no"}, "metadata.saelens_lite.skip = 'no'"),
        ({"training": [1]}, "metadata.saelens_lite.training = \\[1\\]"),
        ({"origin": {"n_ctx": 2**60}}, "n_ctx = 1152921504606846976"),
        ({"origin": {"excluded_positions": [-1]}}, "excluded_positions.0 = -1"),
    ],
)
def test_forged_settings_of_a_dictionary(saved, values, said):
    change(saved / "cfg.json", "metadata", "saelens_lite", **values)
    with pytest.raises(CorruptFileError, match=said):
        sl.load(saved)


def test_a_tensor_in_both_files_is_refused(saved):
    name = next(iter(load_file(saved / "plugin.safetensors")))
    tensors = load_file(saved / "sae_weights.safetensors")
    save_file(tensors | {name: load_file(saved / "plugin.safetensors")[name]}, saved / "sae_weights.safetensors")
    with pytest.raises(CorruptFileError, match="both hold"):
        sl.load(saved)


@pytest.mark.parametrize(
    ("keys", "values", "said"),
    [
        (["info"], {"d_sae": 10**12}, "count has shape|expected"),
        (["info"], {"top_n": 10**30}, "top_n = 1000"),
        (["info"], {"options": {"k": float("nan")}}, "NaN is not a number"),
        (["sha256"], {"../outside": "0" * 64}, "outside.*expected"),
        ([], {"codes": {"n_bytes": -1, "sha256": "0" * 64}}, "codes.n_bytes = -1"),
        ([], {"parts": {"99999": "ff"}}, "parts has .* not in the vocabulary"),
        ([], {"parts": {"1": "x"}}, "parts.1 = 'x'"),
        ([], {"vocabulary": ["a", 3]}, "vocabulary.1 = 3"),
    ],
)
def test_a_forged_store(store, keys, values, said):
    change(store / "features.json", *keys, **values)
    with pytest.raises(CorruptFileError, match=said):
        sl.FeatureStore.load(store)


def test_an_empty_label_takes_none_away_on_load(store):
    change(store / "labels.json", labels={"3": "", "4": "x"})
    assert sl.FeatureStore.load(store).labels == {4: "x"}


# --- the rest ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", [1, 2, 7, 8])
def test_slices_leave_out_exactly_what_is_excluded(n_ctx):
    """For every set of positions, against the slice itself; and where n_ctx is too large to be counted through."""
    for bits in range(1 << n_ctx):
        excluded = [i for i in range(n_ctx) if bits >> i & 1]
        slices = {
            tuple(range(n_ctx)[start:stop:step]): 0
            for start in range(n_ctx)
            for stop in range(start + 1, n_ctx + 1)
            for step in range(1, n_ctx + 1)
        }
        kept = tuple(sorted(set(range(n_ctx)) - set(excluded)))
        found = slice_without(excluded, n_ctx)
        assert (found is not None) == (bool(excluded) and kept in slices)
        if found is not None:
            assert tuple(range(n_ctx)[slice(*found)]) == kept
    assert slice_without([0, 2**50 - 1], 2**50) == [1, 2**50 - 1]
    assert slice_without([0, 5], 2**50) is None


def test_settings_files_have_limits(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="not a TOML file"):
        read_toml(file)
    os.truncate(file, TERABYTE)
    with pytest.raises(ConfigError, match="more than 1,048,576 bytes"):
        read_toml(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="is not a file"):
        read_toml(file)


def test_a_message_names_file_field_value_and_what_is_expected():
    class Thing(Checked):
        file: PlainName
        n: int

    with pytest.raises(
        CorruptFileError, match=r"^the thing is damaged: 'file' is required; n = '3': input should be a valid integer$"
    ):
        checked("the thing", {"n": "3"}, Thing)
    for name in ("a", "a b.json", "é", ".hidden", "shard-00000.safetensors"):
        assert checked("x", {"file": name, "n": 1}, Thing).file == name
    for name in ("", ".", "..", "a/b", "a\\b", "/a", "C:a", "a\0", "a\n", "x" * 201, "a.", "a ", "\u202ea"):
        with pytest.raises(CorruptFileError, match="expected the plain name of a file, without a folder"):
            checked("x", {"file": name, "n": 1}, Thing)


def test_forged_folders_give_a_typed_error_or_work():
    """The first of those that scripts/forged_files.py makes: in bounds of time and memory, and nothing outside is touched."""
    script = Path(__file__).parents[1] / "scripts" / "forged_files.py"
    found = subprocess.run([sys.executable, script, "--n", "40"], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_pipe_for_the_settings_of_a_run_is_not_waited_for(run):
    (run / "config.toml").unlink()
    os.mkfifo(run / "config.toml")
    assert foreign(run, RUN)
