"""Crosscoders of two models in other tools' files: what they compute, which models they name, and how they are written."""

import json
import logging

import pytest
import torch
from foreign import normal
from foreign_crosscoders import BOTH, CASES, HOOK, LATENTS, MODELS, WIDTH, N
from safetensors.torch import load_file, save_file

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import inspect


def load(name: str, folder, **facts) -> sl.Dictionary:
    """Return the dictionary of a case; pickles are asked for by name."""
    case = CASES[name]
    return sl.load(case.write(folder / "foreign"), format=case.format if case.pickled else None, **case.facts | facts)


def inputs(d: sl.Dictionary) -> torch.Tensor:
    return normal(60, d.d_in, seed=99).double() * 1.5 + 0.3


def agree(d: sl.Dictionary, case, x: torch.Tensor) -> None:
    wanted, output = case.codes(x), case.x_hat(x)
    assert 0 < (wanted != 0).double().mean() < 1
    codes = d.encode(x).to_dense()
    assert torch.equal(codes != 0, wanted != 0)
    for ours, theirs in ((codes, wanted), (d(x), output)):  # weights are rounded to float32 after folding
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_codes_outputs_ports_and_models_are_those_of_the_tool(name, tmp_path, caplog):
    case = CASES[name]
    with caplog.at_level(logging.WARNING):
        d = load(name, tmp_path)
    agree(sl.load(d.save(tmp_path / "own")).double(), case, inputs(d))
    assert d.rule.plugin_name == case.rule
    assert tuple(port.key for port in d.reads) == case.keys
    assert d.writes_what_it_reads
    assert tuple((facts.name, facts.model) for facts in d.origin.models) == case.models
    assert d.origin.model is None
    assert ("the dictionary names none" in caplog.text) == (set(case.keys) == {None})
    assert ("does not state its code normalisation" in caplog.text) == ("batch topk, older" in name)
    assert ("threshold was never set" in caplog.text) == ("never set" in name)
    assert d.training_record["read_from"]["format"] == case.format


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("model diff") and "MIXED" not in name])
def test_written_again_it_computes_the_same(name, tmp_path):
    case, d = CASES[name], load(name, tmp_path)
    path = sl.convert(d.save(tmp_path / "own"), tmp_path / "theirs", "crosscoder_learning")
    again = sl.load(path)
    agree(again.double(), case, inputs(d))
    assert (again.ports, again.origin.models) == (d.ports, d.origin.models)
    held = load_file(path / "model.safetensors")
    if "threshold" in held:
        assert held["k"].item() == 3
        assert held["threshold"].ndim == 0


@pytest.mark.parametrize(
    "name", ["crosscoder, batch topk", "crosscoder, batch topk, SAE", "crosscoder, relu, older", "differences, older"]
)
def test_numbers_that_are_not_folded_come_back_to_the_bit(name, tmp_path):
    d = load(name, tmp_path)
    theirs = load_file(tmp_path / "foreign/model.safetensors")
    again = load_file(sl.convert(d.save(tmp_path / "own"), tmp_path / "theirs", "crosscoder_learning") / "model.safetensors")
    exact = theirs.keys() - {"encoder.bias", "threshold"} - {key for key in theirs if key.startswith(("activation", "target"))}
    for key in exact:
        assert torch.equal(again[key], theirs[key]), key
    torch.testing.assert_close(again["encoder.bias"], theirs["encoder.bias"], rtol=0, atol=1e-6)  # b + W b_dec − W b_dec


@pytest.mark.parametrize("rule", ["batch_topk", "jumprelu", "l1"])
def test_our_crosscoder_of_two_models_is_written_and_keeps_its_models(rule, tmp_path):
    origin = sl.Origin(models=[{"name": name, "model": model} for name, model in MODELS.items()])
    reads = [sl.Port.of(key, WIDTH) for key in BOTH]
    d = sl.Dictionary.create(rule, reads=reads, d_sae=LATENTS, options={"k": 4} if rule == "batch_topk" else {}, origin=origin)
    for seed, parameter in enumerate(d.parameters()):
        if parameter.ndim > 1 or parameter is d.b_enc or parameter is d.b_dec:
            parameter.data.copy_(normal(*parameter.shape, seed=seed))
    if rule == "batch_topk":
        d.rule.threshold.fill_(0.7)
    d.density = torch.full((LATENTS,), 0.25)
    path = sl.convert(d.save(tmp_path / "own"), tmp_path / "theirs", "crosscoder_learning")
    again = sl.load(path)
    x = inputs(d)
    torch.testing.assert_close(again.double().encode(x).to_dense(), d.double().encode(x).to_dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again(x), d(x), rtol=1e-5, atol=1e-5)
    assert (again.ports, again.origin.models) == (d.ports, d.origin.models)
    assert json.loads((path / "trainer_config.json").read_text())["trainer"]["layer"] == 13


def crosscoder(rule: str = "l1", widths=(WIDTH, WIDTH), **more) -> sl.Dictionary:
    reads = [sl.Port.of(key, width) for key, width in zip(BOTH, widths, strict=True)]
    return sl.Dictionary.create(rule, reads=reads, d_sae=LATENTS, **more)


def of_different_thresholds() -> sl.Dictionary:
    d = crosscoder("jumprelu", options={"parameter": "plain"})
    d.rule.plain_threshold.data.copy_(torch.arange(1.0, LATENTS + 1))
    return d


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: crosscoder("topk", options={"k": 2}), "its codes are ReLU"),
        (lambda: crosscoder("gated"), "its codes are ReLU"),
        (lambda: crosscoder(widths=(WIDTH, WIDTH + 1)), "ports of one width"),
        (lambda: crosscoder(writes=sl.Port.of(BOTH[1], WIDTH)), "it writes what it reads"),
        (of_different_thresholds, "one threshold for all latents"),
        (lambda: crosscoder("jumprelu"), "states k"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(make, reason, tmp_path):
    with pytest.raises(ConfigError, match=f"cannot be written as crosscoder_learning: .*{reason}"):
        sl.convert(make().save(tmp_path / "own"), tmp_path / "theirs", "crosscoder_learning")
    assert not (tmp_path / "theirs").exists()


def change(path, config=None, **tensors):
    """Replace tensors of the file (None: remove) and settings."""
    file = path / "model.safetensors"
    names = {key.replace("__", "."): value for key, value in tensors.items()}
    save_file({key: value for key, value in (load_file(file) | names).items() if value is not None}, file)
    settings = json.loads((path / "config.json").read_text()) | (config or {})
    (path / "config.json").write_text(json.dumps(settings))


DECODER = torch.zeros(N, LATENTS, WIDTH)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        (
            {"config": {"code_normalization": "DECOUPLED"}, "code_normalization_id": torch.tensor(5)},
            ConfigError,
            "a code for each port",
        ),
        ({"config": {"code_normalization": "SAE"}}, CorruptFileError, "is SAE, but code_normalization_id says CROSSCODER"),
        ({"config": {"code_normalization": "OTHER"}}, CorruptFileError, "'OTHER'; expected one of"),
        ({"code_normalization_id": torch.tensor(9)}, CorruptFileError, "code_normalization_id is 9"),
        ({"threshold": None}, ConfigError, "codes depend on the other tokens of a batch"),
        ({"threshold": torch.zeros(N)}, ConfigError, "no number 'threshold'"),
        ({"activation_global_scale": None}, CorruptFileError, "lacks activation_global_scale"),
        ({"activation_mean": torch.zeros(WIDTH)}, CorruptFileError, "have shapes"),
        ({"activation_global_scale": torch.zeros(N)}, CorruptFileError, "expected numbers above 0"),
        (
            {"decoder__weight": DECODER[:1], "decoder__bias": torch.zeros(1, WIDTH)},
            ConfigError,
            "which of them it writes is not stated",
        ),
        ({"config": {"num_decoder_layers": 1}}, ConfigError, "which of them it writes is not stated"),
        ({"config": {"encoder_layers": [0, 2]}}, CorruptFileError, "encoder_layers is"),
        ({"config": {"encoder_layers": [0]}}, CorruptFileError, "encoder_layers is"),
        ({"config": {"num_layers": 3}}, ConfigError, "2 layers and 3 were read"),
        ({"config": {"dict_size": 7}}, CorruptFileError, "d_sae = 7"),
        ({"config": {"k": 7}}, CorruptFileError, "k = 3, but .* has k = 7"),
    ],
)
def test_files_that_contradict_themselves_or_need_more_are_refused(changes, error, reason, tmp_path):
    path = CASES["crosscoder, batch topk, statistics"].write(tmp_path / "foreign")
    change(path, **changes)
    with pytest.raises(error, match=reason):
        sl.load(path)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ({"ports": [BOTH[0]]}, "expected the keys of 2 ports"),
        ({"ports": 3}, "expected the keys of 2 ports"),
        ({"ports": list(BOTH), "models": ["a"]}, "expected ids by the names of models"),
        ({"layer": -3}, "layer = -3"),
    ],
)
def test_settings_of_a_run_that_cannot_be_are_refused(run, reason, tmp_path):
    path = CASES["crosscoder, relu, statistics"].write(tmp_path / "foreign")
    (path / "trainer_config.json").write_text(json.dumps({"trainer": run}))
    with pytest.raises(CorruptFileError, match=reason):
        sl.load(path)


# Facts that files do not state


def test_factors_that_are_not_in_the_files_are_asked_for(tmp_path):
    path = CASES["model diff"].write(tmp_path / "foreign")
    with pytest.raises(ConfigError, match=r"pickles.*format='crosscoder_model_diff'"):
        sl.load(path)
    with pytest.raises(ConfigError, match=r"factors of the activations are not in the files.* scale=\("):
        sl.load(path, format="crosscoder_model_diff")
    with pytest.raises(ConfigError, match=r"3 scales were given; it has 2 ports"):
        sl.load(path, format="crosscoder_model_diff", scale=(1.0, 1.0, 1.0))
    with pytest.raises(ConfigError, match="scale"):
        sl.load(path, format="crosscoder_model_diff", scale=(1.0, 0.0))


@pytest.mark.parametrize("settings", [{"k": 3, "topk": True}, {"activation": "tanh"}])
def test_other_codes_of_a_fork_are_refused(settings, tmp_path):
    path = CASES["model diff"].write(tmp_path / "foreign")
    config = json.loads((path / "cfg.json").read_text()) | settings
    (path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="only ReLU codes are supported"):
        sl.load(path, format="crosscoder_model_diff", scale=1.0)


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("crosscoder, relu, statistics", {"models": {"chat": None}}, "1 models were named .*; it has 2 ports"),
        ("differences", {"hook": HOOK}, r"2 models were named \(base, chat\); it has 1 ports; for the difference .*chat-base:"),
        ("crosscoder, relu, statistics", {"modles": MODELS}, "modles can be set with format='state_dict' only"),
    ],
)
def test_facts_that_do_not_fit_the_files_are_refused(name, facts, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        load(name, tmp_path, **facts)


def test_models_can_be_named_where_the_hook_is_not_known(tmp_path):
    d = load("crosscoder, relu, statistics", tmp_path, models=MODELS)
    assert [(port.hook, port.model) for port in d.reads] == [(None, "base"), (None, "chat")]
    assert [facts.model for facts in d.origin.models] == list(MODELS.values())


def test_our_own_folder_takes_no_facts(tmp_path):
    folder = crosscoder().save(tmp_path / "own")
    with pytest.raises(ConfigError, match=r"hook can be set .* one of ours, which says this itself"):
        sl.load(folder, hook=HOOK)


def test_inspect_shows_hooks_and_models(tmp_path):
    facts = json.loads(json.dumps(inspect(CASES["crosscoder, named by its run"].write(tmp_path / "foreign"))))
    assert facts["reads"] == list(BOTH)
    assert facts["models"] == MODELS
    assert (facts["d_in"], facts["d_sae"], facts["architecture"]) == (N * WIDTH, LATENTS, "BatchTopKCrossCoder")


# Our own folder, as other tools see it


def of_differences(model: str | None = "chat", minus: str | None = "base") -> sl.Dictionary:
    port = sl.Port(hook=HOOK, width=WIDTH, model=model, minus=minus)
    origin = sl.Origin(models=[{"name": name, "model": MODELS[name]} for name in (minus, model) if name])
    d = sl.Dictionary.create("batch_topk", reads=port, d_sae=LATENTS, options={"k": 3}, origin=origin)
    d.rule.threshold.fill_(0.4)
    return d


def test_no_tool_takes_a_dictionary_of_differences_for_one_of_a_model(tmp_path):
    d = of_differences()
    metadata = json.loads((d.save(tmp_path / "own") / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["model_name"]) == (f"chat-base:{HOOK}", None)  # which no model has
    again = sl.load(tmp_path / "own")
    assert (again.ports, again.origin) == (d.ports, d.origin)
    foreign = sl.load(sl.convert(tmp_path / "own", tmp_path / "theirs", "saelens"))
    assert foreign.ports == d.ports
    x = inputs(d).float()
    assert torch.equal(foreign(x), d(x))
    alone = of_differences(minus=None).save(tmp_path / "alone")  # of one model
    metadata = json.loads((alone / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["model_name"]) == (HOOK, MODELS["chat"])


@pytest.mark.parametrize("format", ["dictionary_learning", "sparsify"])
def test_formats_that_cannot_say_so_refuse_a_dictionary_of_differences(format, tmp_path):
    with pytest.raises(ConfigError, match=rf"chat-base:{HOOK} cannot be written as {format}: .* not of their difference"):
        sl.convert(of_differences().save(tmp_path / "own"), tmp_path / "theirs", format)
    assert not (tmp_path / "theirs").exists()


def test_a_crosscoder_of_two_models_keeps_them_and_has_an_architecture_of_its_own(tmp_path):
    d = load("crosscoder, batch topk", tmp_path)
    again = sl.load(d.save(tmp_path / "own"))
    assert (again.ports, again.origin) == (d.ports, d.origin)
    config = json.loads((tmp_path / "own/cfg.json").read_text())
    assert config["architecture"] == "jumprelu_crosscoder"  # which SAELens does not know
    (tmp_path / "own/cfg.json").write_text(json.dumps(config | {"metadata": {}}))
    with pytest.raises(ConfigError, match="no rule computes the codes of architecture 'jumprelu_crosscoder'"):
        sl.load(tmp_path / "own")
    with pytest.raises(ConfigError, match="cannot be written as saelens"):
        sl.convert(d.save(tmp_path / "again"), tmp_path / "theirs", "saelens")


def test_older_versions_refuse_differences_and_read_the_rest():
    """They refuse keys that they do not know, and know hook, width and model."""
    known = {"hook", "width", "model"}
    assert sl.Port.of(BOTH[0], WIDTH).model_dump().keys() == known
    assert sl.Port.of(f"chat-base:{HOOK}", WIDTH).model_dump().keys() == {*known, "minus"}
