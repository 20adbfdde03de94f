"""Public dictionaries by their names, and one file of many, from a Hub on the loopback interface."""

import json
import logging

import pytest
import releases_hub
import torch
from hub_server import Blob, Fault, running_hub
from huggingface_hub import close_session
from test_hub import connect

import saelens_lite as sl
from saelens_lite import releases
from saelens_lite.errors import ConfigError, CorruptFileError, HubNotFoundError, ModelNotFoundError
from saelens_lite.hub import Address, describe, fetch
from saelens_lite.hub.layouts import choose, dictionaries
from saelens_lite.model import loading
from saelens_lite.model.nicknames import hub_id

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's, of its client
JB = "gpt2-small-res-jb/blocks.8.hook_resid_pre"
FAMILIES = (  # of dictionaries: a part of the repository's name, and a part of the path
    ("jbloom/GPT2-Small-SAEs", "blocks.8"),
    ("google/gemma-scope-2b-pt-res", "layer_20/width_16k"),
    ("google/gemma-scope-2-1b-pt", "resid_post/layer_17"),
    ("google/gemma-scope-2-1b-pt", "transcoder/layer_17_width_16k_l0_small_affine"),
    ("andyrdt/saes-llama-3.1-8b-instruct", "resid_post_layer_3/"),
    ("canrager/saebench", "resid_post_layer_5/"),
    ("EleutherAI/sae-pythia-70m-32k", "layers.3"),
    ("mwhanna/qwen3-4b-transcoders", "layer_3.safetensors"),
)


def entry_of(repo: str, path: str) -> releases.Entry:
    return next(e for e in releases.entries() if e.repo.startswith(repo) and path in e.path)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A Hub with a dictionary of each family, and one with a colon in its name."""
    chosen = [entry_of(*family) for family in FAMILIES] + [entry_of("tommmcgrath/", ":v")]
    beside = [entry_of("mwhanna/qwen3-4b-transcoders", f"layer_{layer}.safetensors") for layer in (4, 5)]
    with running_hub() as running:
        running.made = releases_hub.serve(running, [*chosen, *beside], tmp_path_factory.mktemp("made"))
        running.chosen = chosen
        yield running


@pytest.fixture
def hub(served, tmp_path, monkeypatch):
    connect(served, tmp_path / "hf-cache", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "")
    served.order()
    served.requests.clear()
    yield served
    close_session()


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=lambda n: FAMILIES[n][0])
def test_a_public_dictionary_loads_by_its_name_and_again_without_a_network(hub, number, caplog):
    caplog.set_level(logging.INFO, "saelens_lite.hub")
    entry = hub.chosen[number]
    made, repository = hub.made[entry.name], hub.repositories[entry.repo]
    d = sl.load(entry.name)
    assert releases_hub.error_of(d, made.case) < 1e-5
    assert d.source == f"hf://{entry.repo}/{entry.path}@{repository.head.id}"
    assert d.training_record["read_from"]["release"] == entry.name
    assert entry.name in repr(d)
    assert d.source in repr(d)
    assert d.origin.model == entry.model
    assert f"trained on {entry.model}" in caplog.text
    fetched = {r.path.partition(f"/{repository.head.id}/")[2] for r in hub.requests if "/resolve/" in r.path}
    assert {path.rpartition("/")[2] for path in fetched} - {"README.md"} == {p.rpartition("/")[2] for p in made.files}
    hub.order(Fault("GET", "/", "drop", times=99), Fault("HEAD", "/", "drop", times=99))
    again = sl.load(entry.name)
    assert torch.equal(again.W_dec, d.W_dec)
    assert (again.source, again.origin) == (d.source, d.origin)
    assert torch.equal(sl.load(d.source).W_dec, d.W_dec)  # the address has the same facts, also the format of a pickle


def test_facts_of_the_index_and_of_the_run_count(hub):
    by_name, by_address = sl.load(JB), sl.load("hf://jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre")
    assert by_name.origin.processing == by_address.origin.processing == ("center_writing_weights",)
    assert by_name.hook == "blocks.8.hook_resid_pre"
    pulled = sl.pull("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert (pulled.source, sl.pull(JB).source) == (by_name.source, by_name.source)
    sparsify = hub.chosen[6]
    assert sl.load(sparsify.name).origin.excluded_token_ids == (3, 7)  # config.json above the folder


def test_a_colon_in_a_folder_of_the_hub(hub):
    entry = hub.chosen[-1]
    assert ":v" in entry.path
    d = sl.load(f"hf://{entry.repo}/{entry.path}")
    assert (d.source, d.d_sae) == (sl.load(entry.name).source, releases_hub.CASES["standard"].exact["W_dec"].shape[0])


def test_a_name_that_is_neither_path_nor_public(hub, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        HubNotFoundError, match=r"no dictionary 'blocks\.99\.hook.*did you mean blocks.*is not a file or folder"
    ):
        sl.load("gpt2-small-res-jb/blocks.99.hook_resid_pre")
    with pytest.raises(CorruptFileError, match=r"is missing; is gpt2-smal-res-jb.*No public release.*gpt2-small-res-jb"):
        sl.load("gpt2-smal-res-jb/blocks.8.hook_resid_pre")
    with pytest.raises(CorruptFileError, match=r"is x/y the folder you meant.* A repository of the Hub is written hf://x/y\."):
        sl.load("./x/y")
    assert "No public release" in command("eval", "gpt2-smal-res-jb/blocks.8.hook_resid_pre").err
    assert hub.requests == []


def test_a_path_of_that_name_comes_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    d = sl.Dictionary.create("topk", reads=sl.Port(hook="x", width=4), d_sae=8)
    d.save(JB)
    assert (sl.load(JB).d_sae, sl.load(JB).source) == (8, JB)
    assert hub.requests == []


def test_commands_take_public_names(hub, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("inspect", JB)
    facts = json.loads(said.out)
    assert facts["known"]["hook"] == "blocks.8.hook_resid_pre"
    assert [facts["known"][name] for name in ("format", "rule", "width", "l0")] == ["saelens", "l1", 24576, 60]
    assert facts["files"]["sae_weights.safetensors"]["tensors"]["W_dec"]["dtype"] == "F32"
    assert command("convert", JB, "out", "--format", "saelens").code == 0
    assert sl.load("out").d_sae == sl.load(JB).d_sae
    entry = hub.chosen[4]
    assert command("pull", entry.name, "--out", "got").code == 0
    copy, whole = sl.load("got"), sl.load(entry.name)  # with the facts of the index, and without format=
    assert (copy.hook, copy.origin, copy.W_dec.tolist()) == (whole.hook, whole.origin, whole.W_dec.tolist())
    assert copy.training_record["read_from"]["release"] == entry.name
    release, _, id = entry.name.partition("/")
    assert command("pull", release, id, "--out", "got", "--exists", "overwrite").code == 0
    assert command("compare", JB, JB).code == 0


def test_a_format_that_is_not_read_is_refused_before_the_download(hub):
    entry = next(e for e in releases.entries() if e.format == "temporal")
    for name in (entry.name, f"hf://{entry.repo}/{entry.path}"):
        with pytest.raises(ConfigError, match="is a temporal dictionary: its codes depend on earlier tokens"):
            sl.load(name)
    assert hub.requests == []


def test_one_file_is_described_without_its_weights(hub):
    entry = hub.chosen[7]
    facts = describe(f"hf://{entry.repo}/{entry.path}")
    assert facts["files"].keys() == {"layer_3.safetensors", "config.yaml"}
    assert set(facts["files"]["layer_3.safetensors"]["tensors"]) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert facts["known"]["release"] == entry.name
    with pytest.raises(HubNotFoundError, match=r"name the folder of the dictionary; it has .*layer_3\.safetensors, layer_4"):
        fetch(f"hf://{entry.repo}")


def test_a_pickle_that_no_release_lists_needs_its_format(hub):
    entry = hub.chosen[4]
    there = hub.repositories[entry.repo].head.files
    files = {path.rpartition("/")[2]: blob for path, blob in there.items() if path.startswith(entry.path)}
    hub.create("me/copy").add("copy", {f"a/{name}": Blob(blob.content, blob.lfs) for name, blob in files.items()})
    with pytest.raises(ConfigError, match="pickles, which are read only on request"):
        sl.load("hf://me/copy/a")
    assert releases_hub.error_of(sl.load("hf://me/copy/a", format=entry.format), hub.made[entry.name].case) < 1e-5


# --- which files ------------------------------------------------------------------------------------------------------

LAYOUTS = {  # files of a repository → address: what is read, and its files
    "a set of layers": (
        ["config.yaml", "layer_0.safetensors", "layer_1.safetensors", "README.md"],
        {"layer_1.safetensors": ("layer_1.safetensors", {"config.yaml", "layer_1.safetensors"})},
    ),
    "layers without settings": (
        ["layer_0.safetensors", "layer_1.safetensors", "wanb-config.yaml"],
        {"layer_0.safetensors": ("layer_0.safetensors", {"layer_0.safetensors", "wanb-config.yaml"})},
    ),
    "settings by name": (
        ["a+1.pt", "a+1_cfg.json", "b+1.pt", "b+1_cfg.json"],
        {"a+1.pt": ("a+1.pt", {"a+1.pt", "a+1_cfg.json"})},
    ),
    "settings above the checkpoints": (
        [
            "L0R/hyperparams.json",
            "L0R/checkpoints/final.safetensors",
            "L0R/checkpoints/step_1.safetensors",
            "L0R/lm_config.json",
        ],
        {
            "L0R": ("L0R", {"L0R/hyperparams.json", "L0R/lm_config.json", "L0R/checkpoints/final.safetensors"}),
            "L0R/checkpoints/final.safetensors": (
                "L0R",
                {"L0R/hyperparams.json", "L0R/lm_config.json", "L0R/checkpoints/final.safetensors"},
            ),
        },
    ),
    "pickles with settings at the root": (
        ["config.json", "layer0.sae.pt", "layer1.sae.pt"],
        {"layer1.sae.pt": ("layer1.sae.pt", {"config.json", "layer1.sae.pt"})},
    ),
    "one pickle": (["x-l19.pth", "README.md"], {None: ("x-l19.pth", {"x-l19.pth", "README.md"})}),
    "a folder called .pt": (
        ["v5_layer_8.pt/cfg.json", "v5_layer_8.pt/sae_weights.safetensors"],
        {"v5_layer_8.pt": ("v5_layer_8.pt", {"v5_layer_8.pt/cfg.json", "v5_layer_8.pt/sae_weights.safetensors"})},
    ),
    "a run with seeds": (
        ["config.json", "h.3/seed0/cfg.json", "h.3/seed0/sae.safetensors", "h.3/seed0/state.pt", "h.3/seed1/cfg.json"],
        {"h.3/seed0": ("h.3/seed0", {"config.json", "h.3/seed0/cfg.json", "h.3/seed0/sae.safetensors"})},
    ),
    "a checkpoint": (
        ["a/cfg.json", "a/sae_weights.safetensors", "a/activations_store_state.safetensors", "a/trainer_state.pt"],
        {
            "a": ("a", {"a/cfg.json", "a/sae_weights.safetensors"}),
            "a/sae_weights.safetensors": ("a", {"a/cfg.json", "a/sae_weights.safetensors"}),
        },
    ),
    "layers of a cross-layer transcoder": (
        ["config.yaml", "W_enc_0.safetensors", "W_dec_0.safetensors", "W_enc_1.safetensors", "W_dec_1.safetensors"],
        {"1": ("W_enc_1.safetensors", {"config.yaml", "W_enc_1.safetensors", "W_dec_1.safetensors"})},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_files_of_a_dictionary(name):
    files, cases = LAYOUTS[name]
    for folder, (path, wanted) in cases.items():
        chosen = choose(Address("a/b", folder), dict.fromkeys(files, 1))
        assert (chosen.path, set(chosen.files)) == (path, wanted)


def test_errors_list_single_files_too():
    files = LAYOUTS["a set of layers"][0]
    assert dictionaries(files) == ["layer_0.safetensors", "layer_1.safetensors"]
    with pytest.raises(HubNotFoundError, match=r"no dictionary 'layer_9.safetensors'; did you mean layer_"):
        choose(Address("a/b", "layer_9.safetensors"), dict.fromkeys(files, 1))
    with pytest.raises(HubNotFoundError, match=r"'x' holds several dictionaries; name one; it has x/layer_0\.safetensors"):
        choose(Address("a/b", "x"), {f"x/{file}": 1 for file in files})


@pytest.mark.parametrize("folder", ["sae_gpt2_blocks.0.hook_mlp_out_24576:v1", "a+b=c, d (e).pt", "x@y/100%25", "_a/-b"])
def test_names_of_other_tools_can_be_addressed(folder):
    address = Address.of("me/x", folder, "v1")
    assert Address.parse(str(address)) == address
    assert address.folder == folder


@pytest.mark.parametrize("folder", ["a/../b", ".git", "a/.b", "C:x", "a\\b", "a?", "a\nb", "a//b", "%2e%2e/x", "a%2F..%2Fb"])
def test_names_that_are_no_plain_paths_are_refused(folder):
    with pytest.raises(ConfigError):
        Address.parse(f"hf://me/x/{folder}")


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("gpt2-small", "gpt2"),
        ("gpt2", "gpt2"),
        ("tiny", "tiny"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("llama-3-8b-it", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("somebody/gpt2-small", "somebody/gpt2-small"),
        ("no-such-model", "no-such-model"),
    ],
)
def test_short_names_of_models(name, id):
    assert hub_id(name) == id


def test_model_for_loads_what_the_dictionary_names(lm, monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "load_model", lambda name, **settings: asked.append((name, settings)) or lm)
    reads = sl.Port(hook="blocks.1.hook_resid_pre", width=lm.d_model)
    origins = {"model": "gpt2-small", "revision": "abc", "processing": ("center_writing_weights",)}, {"model": "gpt2"}
    one, other = (sl.Dictionary.create("topk", reads=reads, d_sae=8, origin=sl.Origin(**origin)) for origin in origins)
    assert sl.model_for(one, device="cpu", dtype="float64") is lm
    sl.model_for(one, name="gpt2")
    sl.model_for(other, name="gpt2-small")
    assert [(name, settings["revision"], settings["center_writing_weights"]) for name, settings in asked] == [
        ("gpt2", "abc", True),
        ("gpt2", "abc", True),
        ("gpt2", None, False),
    ]
    assert (asked[0][1]["device"], asked[0][1]["dtype"]) == ("cpu", "float64")
    assert one.origin.model == "gpt2-small"
    with pytest.raises(ConfigError, match="several commits of one model: gpt2 at abc, gpt2"):
        sl.model_for(one, other)


def test_a_short_name_is_looked_up_as_its_hub_id(hub):
    with pytest.raises(ModelNotFoundError, match="'google/gemma-2-2b'"):
        sl.load_model("gemma-2-2b")
