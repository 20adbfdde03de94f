"""Bad input gives a typed error that names the request, the finding and the remedy, and leaves no half-written files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.cache import TensorSource
from saelens_lite.config import FrozenConfig, read_toml, train_configs
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    HookError,
    ModelNotFoundError,
    NonFiniteError,
    OutputExistsError,
    PluginError,
    ShapeError,
    TextError,
)
from saelens_lite.training.step import SparseStep

HOOK = "blocks.1.hook_resid_pre"
QUICK = {"d_sae": 16, "batch_size": 20, "n_tokens": 200, "options": {"k": 2}}


class Spoilt(TensorSource):
    """A source whose batch number `at` holds one NaN."""

    def __init__(self, x: torch.Tensor, at: int):
        super().__init__(x)
        self.at = at

    def batches(self, hooks, batch_size, seed, start=0):
        for number, batch in enumerate(super().batches(hooks, batch_size, seed, start), start + 1):
            if number == self.at:
                batch["x"][3, 1] = torch.nan
            yield batch


@pytest.fixture
def x() -> torch.Tensor:
    """Activations without fault."""
    return torch.randn(100, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """The folder of a sound dictionary."""
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=8), d_sae=16, options={"k": 2})
    d.density = torch.full((16,), 0.125)
    return d.save(tmp_path / "dictionary")


@pytest.fixture
def copied(cache_folder, tmp_path):
    """Return a copy of a cache folder that the test may damage."""
    return shutil.copytree(cache_folder, tmp_path / "cache")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_unknown_hook(lm, tmp_path):
    wanted = r"no hook 'blocks\.2\.hook_resid_prre' in GPT2LMHeadModel with 4 blocks; did you mean blocks\.2\.hook_resid_pre, "
    with pytest.raises(HookError, match=wanted):
        lm.run("text", ["blocks.2.hook_resid_prre"])
    with pytest.raises(HookError, match=wanted):
        sl.capture(lm, "text", [HOOK, "blocks.2.hook_resid_prre"], tmp_path / "cache")
    with pytest.raises(HookError, match=wanted), lm.replace("blocks.2.hook_resid_prre", lambda x: x):
        pass
    with pytest.raises(HookError, match=r"no hook 'blocks\.4\.hook_resid_pre' in GPT2LMHeadModel with 4 blocks"):
        lm.run("text", "blocks.4.hook_resid_pre")
    with pytest.raises(HookError, match=r"no hook 'x' .*; for example blocks\.0\.hook_resid_pre, "):
        lm.run("text", "x")
    assert not names(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["", ".", "blocks", "blocks.1", "blocks.-1.hook_resid_pre", "blocks.1.attn", "hook_resid_pre", "blocks.1.hook_resid_pre.x"],
)
def test_names_that_are_no_hooks(lm, name):
    with pytest.raises(HookError, match="no hook"):
        lm.hook_point(name)


def test_unknown_plugin(x, tmp_path):
    with pytest.raises(PluginError, match=r"no sparsity plugin is called 'topkk'; did you mean topk\?"):
        sl.train(TensorSource(x), sl.TrainConfig(sparsity="topkk", **QUICK), tmp_path / "run")
    assert not names(tmp_path)


def test_unknown_config_key(x, tmp_path):
    with pytest.raises(ConfigError, match=r"^TrainConfig: unknown key 'n_token'; did you mean n_tokens\?$"):
        sl.TrainConfig(n_token=5)
    with pytest.raises(ConfigError, match=r"unknown key 'batchsize'; did you mean batch_size"):
        sl.fit(x, batchsize=5)
    (tmp_path / "settings.toml").write_text("d_sae = 5\n[[dictionary]]\nsparsty = 'l1'\n")
    with pytest.raises(ConfigError, match=r"unknown key 'sparsty'; did you mean sparsity"):
        train_configs(read_toml(tmp_path / "settings.toml"))
    with pytest.raises(ConfigError, match=r"TopK: unknown key 'kk'; did you mean k\?"):
        sl.train(TensorSource(x), sl.TrainConfig(**{**QUICK, "options": {"kk": 3}}), tmp_path / "run")
    assert names(tmp_path) == ["settings.toml"]


def test_config_values_out_of_range():
    for values, wanted in [
        ({"d_sae": 0}, r"d_sae = 0: input should be greater than 0"),
        ({"d_sae": "many"}, r"d_sae = 'many': input should be a valid integer"),
        ({"lr": float("nan")}, r"lr = nan: input should be"),
        ({"normalize": "layer"}, r"normalize = 'layer': input should be 'sqrt_d' or 'none'"),
        ({"warmup": 2, "d_sae": -1}, r"d_sae = -1: .*; warmup = 2: "),
    ]:
        with pytest.raises(ConfigError, match=wanted):
            sl.TrainConfig(**values)


def test_a_frozen_config_cannot_be_changed():
    config = sl.TrainConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.d_sae = 5
    with pytest.raises(ConfigError, match="unknown key 'd_sea'; did you mean d_sae"):
        config.replace(d_sea=5)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[dictionary]\nsparsity = 'l1'\n", "dictionary"),
        ("dictionary = 3\n", "dictionary"),
        ("options = 3\n", "options"),
        ("d_sae = \n", r"settings\.toml is not a TOML file"),
    ],
)
def test_settings_of_the_wrong_kind(tmp_path, text, wanted):
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(ConfigError, match=wanted):
        train_configs(read_toml(tmp_path / "settings.toml"))


def test_settings_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such settings file"):
        read_toml(tmp_path / "nowhere.toml")


def test_wrong_d_in(lm, saved):
    d = sl.Dictionary.load(saved)
    wanted = r"x has shape \(2, 9\); this dictionary takes \[\.\.\., 8\] \(blocks\.1\.hook_resid_pre\)"
    with pytest.raises(ShapeError, match=wanted):
        d.encode(torch.zeros(2, 9))
    with pytest.raises(ShapeError, match=r"192\); this dictionary takes \[\.\.\., 8\]"), lm.splice(d):
        lm.logits("text")
    lm.logits("text")


def test_empty_text(lm, tmp_path):
    for call in (lambda: lm.run("", HOOK), lambda: lm.logits(["text", ""]), lambda: lm.run([], HOOK), lambda: lm.generate("")):
        with pytest.raises(TextError, match=r"empty text: (text \d has no characters|give at least one text)"):
            call()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    for text in ("", [], ["", ""], tmp_path / "empty.txt", tmp_path / "empty.jsonl"):
        with pytest.raises(TextError, match="no text: nothing was left after tokenising"):
            sl.capture(lm, text, HOOK, tmp_path / "cache")
    with pytest.raises(TextError, match=r"no text file at .*nowhere\.txt"):
        sl.capture(lm, tmp_path / "nowhere.txt", HOOK, tmp_path / "cache")
    assert names(tmp_path) == ["empty.jsonl", "empty.txt"]


def test_tokens_the_model_cannot_take(lm):
    for tokens, wanted in [
        (
            torch.zeros(0, 5, dtype=torch.long),
            r"expected integer token ids \[batch pos\] or \[pos\], at least one; found a torch.Tensor of shape \(0, 5\)",
        ),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"found a torch.Tensor of shape \(1, 2, 3\)"),
        (torch.zeros(1, 257, dtype=torch.long), "rows of 257 tokens; tiny takes at most 256"),
        (torch.tensor([[0, 4096]]), r"token ids must be integers from 0 to 4095; found 0 … 4096"),
        (torch.tensor([[0, -1]]), r"found -1 … 0"),
        (torch.tensor([[0.0, 1.0]]), r"expected integer token ids .* found a torch.Tensor of shape .* dtype torch.float32"),
    ]:
        with pytest.raises(ShapeError, match=wanted):
            lm.run(tokens, HOOK)


def test_nan_activations_stop_training_and_leave_the_last_good_dictionary(x, tmp_path):
    with pytest.raises(NonFiniteError, match=r"the activations became NaN or infinite in step 4, topk on x"):
        sl.train(Spoilt(x, at=4), sl.TrainConfig(**QUICK), tmp_path / "run")
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["config.toml", "last_good"]
    good = sl.Dictionary.load(tmp_path / "run" / "last_good")
    assert good.training_record["steps"] == 3
    trainer = sl.train(Spoilt(x, at=4), sl.TrainConfig(**{**QUICK, "n_tokens": 60}))[0]
    assert good.W_dec.shape == trainer.dictionary.W_dec.shape
    assert torch.isfinite(good(x)).all()


def test_activations_that_are_all_the_same():
    with pytest.raises(NonFiniteError, match="are all the same"):
        sl.fit(torch.ones(100, 4) * torch.arange(1.0, 5.0), d_sae=8)


def test_nan_in_the_first_batch_leaves_no_dictionary(x, tmp_path):
    with pytest.raises(NonFiniteError, match="step 1"):
        sl.train(Spoilt(x, at=1), sl.TrainConfig(**QUICK), tmp_path / "run")
    assert names(tmp_path) == []


def test_nan_in_a_sweep_keeps_every_dictionary(x, tmp_path):
    configs = [sl.TrainConfig(**QUICK), sl.TrainConfig(**{**QUICK, "sparsity": "gated", "options": {}})]
    with pytest.raises(NonFiniteError, match="step 3"):
        sl.train(Spoilt(x, at=3), configs, tmp_path / "runs")
    for folder in ("0-topk", "1-gated"):
        assert sl.Dictionary.load(tmp_path / "runs" / folder / "last_good").training_record["steps"] == 2


@pytest.mark.parametrize("normalize", ["sqrt_d", "none"])
def test_nan_in_the_data_from_the_start(x, normalize):
    x[5, 5] = torch.nan
    with pytest.raises(NonFiniteError, match="activations"):
        sl.fit(x, normalize=normalize, **QUICK)


def test_nothing_but_zeros():
    with pytest.raises(NonFiniteError, match="are all zero; there is nothing to train on"):
        sl.fit(torch.zeros(10, 4), **QUICK)


def test_a_gradient_of_nan_is_caught_before_it_reaches_the_parameters(x, tmp_path):
    @sl.register("bad_gradient")
    class BadGradient(sl.Sparsity):
        def activation(self, pre):
            return pre.relu()

        def losses(self, step):
            nothing = step.codes.value.sum() * 0
            return {"bad": nothing.sqrt() if step.progress >= 0.3 else nothing}  # the derivative of sqrt at 0 is infinite

    try:
        settings = {**QUICK, "sparsity": "bad_gradient", "options": {}}
        with pytest.raises(NonFiniteError, match="step 4"):
            sl.train(TensorSource(x), sl.TrainConfig(**settings), tmp_path / "run")
        good = sl.Dictionary.load(tmp_path / "run" / "last_good")
        assert good.training_record["steps"] == 3
        assert torch.isfinite(good(x)).all()
    finally:
        registry.unregister("bad_gradient")


def test_an_existing_output_is_refused_or_replaced(lm, x, tmp_path):
    d = sl.Dictionary.create("topk", reads=8, d_sae=16, options={"k": 2})

    def train(out, **how):
        sl.train(TensorSource(x), sl.TrainConfig(**QUICK), out, **how)

    def capture(out, **how):
        sl.capture(lm, "The old man said that he would not go.", HOOK, out, **how)

    for number, write in enumerate((d.save, train, capture)):
        out = tmp_path / str(number)
        out.mkdir()
        write(out)  # an empty folder is no obstacle
        before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(OutputExistsError, match=rf"{out} already exists and is not empty; .* exists='overwrite'"):
            write(out)
        assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        write(out, exists="overwrite")
        assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("precious")
    for write in (d.save, train, capture):
        with pytest.raises(OutputExistsError, match="file already exists"):
            write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    assert names(tmp_path) == ["0", "1", "2", "file"]


@pytest.mark.parametrize("out", ["", ".", ".."])
def test_an_output_without_a_name_of_its_own(lm, saved, tmp_path, monkeypatch, out):
    """An empty working folder is no place for what is put there as a whole."""
    d = sl.Dictionary.load(saved)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for write in (
        lambda: d.save(out, exists="overwrite"),
        lambda: sl.capture(lm, "some text", HOOK, out, exists="overwrite"),
        lambda: sl.FeatureStore.build(d, lm, "some text", out=out, exists="overwrite"),
    ):
        with pytest.raises(ConfigError, match="cannot be written as a whole"):
            write()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b"]


def test_overwriting_that_fails_leaves_the_old_folder(lm, saved, copied):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    d = sl.Dictionary.load(saved)
    d.W_enc.data[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="W_enc holds NaN or infinity"):
        d.save(saved, exists="overwrite")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert "dictionary" in names(saved.parent)
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with lm.replace("blocks.1.hook_resid_pre", lambda x: x * torch.nan), pytest.raises(NonFiniteError, match="NaN"):
        sl.capture(lm, "text", "blocks.2.hook_resid_pre", copied, exists="overwrite")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert not [name for name in names(saved.parent) if name.startswith(".")]


def test_a_truncated_shard(copied):
    shard = copied / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        CorruptFileError, match=rf"{shard}: expected {len(content):,} bytes, found {len(content) // 2}; capture again"
    ):
        sl.ActivationCache.open(copied)
    shard.unlink()
    with pytest.raises(CorruptFileError, match=rf"{shard}: expected {len(content):,} bytes, found None"):
        sl.ActivationCache.open(copied)


def test_a_flipped_byte_in_a_shard(copied, tmp_path):
    shard = copied / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 0x10
    shard.write_bytes(content)
    cache = sl.ActivationCache.open(copied)
    wanted = r"shard-00001\.safetensors is damaged: the chunk of 'tokens' at row 0 does not match its checksum; capture again"
    with pytest.raises(CorruptFileError, match=wanted):
        cache.read_shard(1)
    cache.read_shard(0)
    next(cache.batches([HOOK], 10, 0))  # what is read is whole
    with pytest.raises(CorruptFileError, match=r"does not match the checksum in manifest\.json"):
        cache.verify()


def test_training_on_a_damaged_cache(copied, tmp_path):
    shard = copied / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0x10
    shard.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"shard-00001\.safetensors is damaged: the chunk of 'blocks.* capture again"):
        sl.train(sl.ActivationCache.open(copied), sl.TrainConfig(hook=HOOK, **QUICK), tmp_path / "run")
    assert names(tmp_path) == ["cache"]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda m: m.update(format=99), "format 99, this version reads 2"),
        (lambda m: m.pop("shards"), "is damaged: 'shards' is required"),
        (lambda m: m["hooks"][HOOK].pop("mean"), rf"is damaged: 'hooks\.{HOOK}\.mean' is required"),
        (lambda m: m["origin"].update(colour="red"), "is damaged: Origin: unknown key 'colour'"),
        (lambda m: m.update(shards=[]), "no shards|no activations|shards"),
    ],
)
def test_a_manifest_that_makes_no_sense(copied, change, wanted):
    manifest = json.loads((copied / "manifest.json").read_text())
    change(manifest)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match=wanted):
        sl.ActivationCache.open(copied)


def test_a_folder_that_is_no_cache(tmp_path):
    with pytest.raises(CorruptFileError, match=r"manifest\.json is missing; is .* the folder you meant\?"):
        sl.ActivationCache.open(tmp_path)


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_truncated_weights_file(saved, left):
    file = saved / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CorruptFileError, match=r"sae_weights\.safetensors: .*truncated"):
        sl.Dictionary.load(saved)


def test_weights_that_are_no_safetensors(saved):
    file = saved / "sae_weights.safetensors"
    for content in (
        b"PK\x03\x04" + bytes(500),
        (20).to_bytes(8, "little") + b"{not json at all...}",
        (2).to_bytes(8, "little") + b"[]",
    ):
        file.write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"sae_weights\.safetensors"):
            sl.Dictionary.load(saved)
    file.unlink()
    with pytest.raises(CorruptFileError, match=r"sae_weights\.safetensors is missing; is .*dictionary the folder you meant"):
        sl.Dictionary.load(saved)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_with_nan(saved, value):
    file = saved / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["W_dec"][2, 3] = value
    save_file(tensors, file)
    with pytest.raises(CorruptFileError, match=r"sae_weights\.safetensors: tensor 'W_dec' holds NaN or infinity"):
        sl.Dictionary.load(saved)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.update(W_dec=torch.zeros(16, 9)), r"W_dec has shape \(16, 9\), cfg\.json says \(16, 8\)"),
        (lambda t: t.update(W_enc=torch.zeros(16, 8)), r"W_enc has shape \(16, 8\), expected \(8, 16\)"),
        (lambda t: t.update(b_enc=torch.zeros(1)), r"b_enc has shape \(1,\), expected \(16,\)"),
        (lambda t: t.update(b_dec=torch.zeros(8, dtype=torch.int32)), r"b_dec has dtype torch\.int32; expected one of float32"),
        (lambda t: t.pop("b_enc"), r"tensors missing: \['b_enc'\]; not expected: none"),
        (lambda t: t.pop("W_enc"), r"tensors missing: \['W_enc'\]; not expected: none"),
        (lambda t: t.pop("W_dec"), r"tensors missing: \['W_dec'\]; not expected: none; found: \['W_enc', 'b_dec', 'b_enc'\]"),
        (lambda t: t.update(threshold=torch.zeros(16)), r"tensors missing: none; not expected: \['rule\.threshold'\]"),
    ],
)
def test_weights_that_do_not_fit(saved, change, wanted):
    file = saved / "sae_weights.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CorruptFileError, match=wanted):
        sl.Dictionary.load(saved)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("{'single': 'quotes'}", r"cfg\.json is not valid JSON: "),
        ("", r"cfg\.json is not valid JSON: "),
        ("[1, 2]", r"cfg\.json holds a list, not an object"),
        ("[" * 100_000, r"cfg\.json is not valid JSON: "),
        ('{"architecture": "topk"}', r"cfg\.json: d_in = None; expected a whole number"),
        ('{"metadata": 5}', r"cfg\.json: metadata is '5'; expected dict"),
    ],
)
def test_a_cfg_json_that_is_none(saved, content, wanted):
    (saved / "cfg.json").write_text(content)
    with pytest.raises(CorruptFileError, match=wanted):
        sl.load(saved)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda c: c.pop("d_in"), "cfg.json is damaged: 'd_in' is required"),
        (lambda c: c.update(d_sae="wide"), "cfg.json is damaged: d_sae = 'wide': input should be a valid integer"),
        (lambda c: c.update(dtype="int4"), "cfg.json is damaged: dtype = 'int4': input should be 'float32'"),
        (lambda c: c["metadata"]["saelens_lite"].update(format=3), "metadata.saelens_lite.format is 3, expected 1 or 2"),
        (lambda c: c["metadata"]["saelens_lite"].update(options={"k": -1}), "cfg.json: TopK: k = -1"),
        (
            lambda c: c["metadata"]["saelens_lite"].update(options=[1]),
            r"cfg.json is damaged: metadata\.saelens_lite\.options = \[1\]: input should be a valid dict",
        ),
        (lambda c: c.update(d_sae=10**12), r"W_dec has shape \(16, 8\), cfg\.json says \(1000000000000, 8\)"),
    ],
)
def test_a_cfg_json_that_makes_no_sense(saved, change, wanted):
    config = json.loads((saved / "cfg.json").read_text())
    change(config)
    (saved / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match=wanted):
        sl.Dictionary.load(saved)


def test_a_density_that_does_not_fit(saved):
    for tensors in ({"sparsity": torch.zeros(3)}, {"other": torch.zeros(16)}):
        save_file(tensors, saved / "sparsity.safetensors")
        with pytest.raises(CorruptFileError, match=r"sparsity\.safetensors: expected a tensor 'sparsity' of shape \(16,\)"):
            sl.Dictionary.load(saved)


def test_a_folder_that_is_no_dictionary(tmp_path):
    with pytest.raises(CorruptFileError, match=r"cfg\.json is missing; is .* the folder you meant\?"):
        sl.Dictionary.load(tmp_path / "nowhere")
    with pytest.raises(CorruptFileError, match=r"cfg\.json is missing; is .* the folder you meant\?"):
        sl.load(tmp_path / "nowhere")


def test_a_hub_id_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelNotFoundError, match=r"cannot load the model 'nobody/nothing-of-that-name': without a network use 'tiny' or"
    ):
        sl.load_model("nobody/nothing-of-that-name")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_missing_model_folder(name):
    with pytest.raises(
        ModelNotFoundError, match=rf"no model folder at {name}; give a folder with config\.json, a Hub id, or 'tiny'"
    ):
        sl.load_model(name)


def test_a_model_folder_that_is_empty_or_damaged(random_lm, tmp_path):
    with pytest.raises(
        ModelNotFoundError, match=rf"cannot load the model '{tmp_path}': check the folder\. transformers says: "
    ):
        sl.load_model(tmp_path)
    random_lm.module.save_pretrained(tmp_path)
    random_lm.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelNotFoundError, match="check the folder"):
        sl.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="check the folder"):
        sl.load_model(tmp_path)


def test_every_error_is_ours_and_says_how_to_exit():
    for name, error in vars(sl.errors).items():
        if isinstance(error, type) and issubclass(error, Exception):
            assert issubclass(error, sl.SaelensLiteError)
            assert error.__doc__
            refused = (sl.errors.HubNotFoundError, sl.errors.HubAccessError, sl.errors.ChatAccessError)
            asked_wrongly = (sl.errors.UserError, *refused)
            assert error.exit_code == (2 if issubclass(error, asked_wrongly) else 1)
            assert name in sl.errors.__doc__


def test_capture_of_nothing_that_counts(lm, tmp_path):
    rows = lm.to_tokens("some words")
    with pytest.raises(TextError, match="none of the positions of the token rows counts"):
        sl.capture(lm, rows._replace(keep=torch.zeros_like(rows.keep)), HOOK, tmp_path / "cache")
    with pytest.raises(ConfigError, match="shard_tokens = 0"):
        sl.capture(lm, rows, HOOK, tmp_path / "cache", shard_tokens=0)
    with pytest.raises(TextError, match="nothing was left"):
        sl.capture(lm, "<|endoftext|>", HOOK, tmp_path / "cache")
    assert names(tmp_path) == []


def test_a_separator_in_the_text_does_not_count(lm):
    rows = lm.to_tokens("one<|endoftext|>two")
    assert (rows.tokens[0, 1:] == lm.bos_id).any()
    assert torch.equal(rows.keep, rows.tokens != lm.bos_id)


def test_a_manifest_that_disagrees_with_its_shards(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["hooks"][HOOK]["d_in"] += 1
    manifest["hooks"][HOOK]["mean"].append(0.0)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match="the manifest says"):
        sl.ActivationCache.open(copied).read_shard(0)


def test_a_run_does_not_replace_a_file(x, tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(OutputExistsError):
        sl.train(TensorSource(x), sl.TrainConfig(**QUICK), tmp_path / "run")
    with pytest.raises(OutputExistsError, match="is not a folder"):
        sl.train(TensorSource(x), sl.TrainConfig(**QUICK), tmp_path / "run", exists="overwrite")
    assert (tmp_path / "run").read_text() == "not a folder"


def test_seeds_are_32_bits():
    with pytest.raises(ConfigError, match="seed = 4294967296: input should be less than 4294967296"):
        sl.TrainConfig(seed=2**32)


def test_generation_that_cannot_be(lm):
    with pytest.raises(ConfigError, match="temperature = -1"):
        lm.generate("text", temperature=-1)
    with pytest.raises(ConfigError, match="top_k = 0; expected 1 or more"):
        lm.generate("text", top_k=0)
    with pytest.raises(ShapeError, match=r"the prompt has .* tokens; tiny reads at most 256"):
        lm.generate("word " * 600)


def test_p_below_one_survives_a_decoder_row_of_zeros():
    d = sl.Dictionary.create("l1", reads=4, d_sae=8, options={"p": 0.5})
    d.W_dec.data[0] = 0
    step = SparseStep(d, torch.ones(3, 4), dead=torch.zeros(8, dtype=torch.bool), progress=0.5, warmup=1.0)
    sum(step.losses().values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in d.parameters())


def test_an_unknown_key_without_a_near_match_lists_the_keys():
    with pytest.raises(ConfigError, match=r"unknown key 'colour'; the keys are text_column, seed$"):
        type("Two", (FrozenConfig,), {"__annotations__": {"text_column": str, "seed": int}})(text_column="a", seed=0, colour=1)
