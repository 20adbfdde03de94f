"""Files and plugins of strangers: they decide neither what code is run nor what a terminal or a card does."""

import json
import logging
import shutil
from importlib.metadata import EntryPoint

import pytest
import torch

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.cache.live import ActivationStream
from saelens_lite.cli import options
from saelens_lite.cli.base import console, visible
from saelens_lite.errors import ConfigError, CorruptFileError, ModelNotFoundError, PluginError
from saelens_lite.format_detection import format_of
from saelens_lite.formats import Format
from saelens_lite.hub.card import _line, _literal, _load_model_call, cell
from saelens_lite.model import EMBEDDED

HOOK = "blocks.2.hook_resid_pre"
HOSTILE = "x\x1b]0;title\x07\x9b31m\u202ey\x7f"
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import GPT2Config, GPT2LMHeadModel
class Config(GPT2Config):
    model_type = "stranger"
class Model(GPT2LMHeadModel):
    config_class = Config
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A model folder whose model is defined by Python code in it; running the code leaves the file "was_run"."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    folder = tmp_path / "model"
    shutil.copytree(str(EMBEDDED["tiny"]), folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "code_of_a_stranger.Config", "AutoModelForCausalLM": "code_of_a_stranger.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "stranger", "auto_map": classes}))
    (folder / "code_of_a_stranger.py").write_text(CODE.format(marker=str(tmp_path / "was_run")))
    return folder


def dictionary(**origin) -> sl.Dictionary:
    given = sl.Origin(**origin)
    return sl.Dictionary.from_tensors(W_enc=torch.rand(4, 8), W_dec=torch.rand(8, 4), origin=given, hook=given.hook)


def test_code_of_a_model_is_not_run_and_nobody_is_asked(stranger, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"which was not run.* say load_model\(.*, trust_remote_code=True\)"):
        sl.load_model(stranger, device="cpu")
    assert not (tmp_path / "was_run").exists()


def test_a_description_of_a_stream_cannot_allow_code(stranger, tmp_path, lm):
    (tmp_path / "book.txt").write_text("Once upon a time. " * 100)
    description = ActivationStream(lm, tmp_path / "book.txt", HOOK, buffer_tokens=64).describe()
    description["model"] |= {"name": str(stranger), "trust_remote_code": True}
    with pytest.raises(ModelNotFoundError, match="which was not run"):
        ActivationStream.reopen(description)
    assert not (tmp_path / "was_run").exists()


def test_processing_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="processing"):
        sl.Origin(processing=("trust_remote_code",))
    dictionary(hook=HOOK).save(tmp_path / "d")
    config = json.loads((tmp_path / "d/cfg.json").read_text())
    config["metadata"]["saelens_lite"]["origin"]["processing"] = ["trust_remote_code"]
    (tmp_path / "d/cfg.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match="processing"):
        sl.Dictionary.load(tmp_path / "d")


def test_commands_load_the_commit_that_the_dictionary_was_trained_on(monkeypatch):
    asked = []
    monkeypatch.setattr(sl, "load_model", lambda name, **settings: asked.append((name, settings["revision"])))
    trained = dictionary(model="gpt2", revision="abc", hook=HOOK)
    for given in ({}, {"model": "gpt2"}, {"model": "gpt2", "model_revision": "def"}, {"model": "other"}):
        options.OfModel(**given).model_of(trained)
    assert asked == [("gpt2", "abc"), ("gpt2", "abc"), ("gpt2", "def"), ("other", None)]


def test_the_command_line_runs_only_code_of_a_model_the_user_named():
    with pytest.raises(ConfigError, match="name the model as well: --model evil/model"):
        options.OfModel(trust_remote_code=True).model_of(dictionary(model="evil/model", hook=HOOK))


@pytest.mark.parametrize("text", ['a"); import os #', HOSTILE, "\U000e0001é`'\n", "abc"])
def test_code_on_a_card_holds_fields_of_files_as_quoted_strings(text):
    assert eval(_literal(text), {}) == text
    assert _literal(text).isprintable()
    call = _load_model_call(sl.Origin(model="gpt2", revision=text, hook=HOOK))
    assert eval(call.removeprefix("sl."), {"load_model": lambda name, revision: (name, revision)}) == ("gpt2", text)


@pytest.mark.parametrize("write", [_line, cell])
def test_a_card_passes_on_no_link_image_or_html(write):
    shown = write(f"![a](http://t/p.png) [b](javascript:alert(1)) \\](c) <script>{HOSTILE}")
    assert "](" not in shown
    assert "<" not in shown
    assert shown.isprintable()


def test_a_terminal_is_not_steered_by_text(capsys):
    shown = visible(HOSTILE)
    assert shown == r"x\u001b]0;title\u0007\u009b31m\u202ey\u007f"
    console().print(HOSTILE + "[bold]")
    assert capsys.readouterr().out == f"{shown}[bold]\n"
    assert visible("日本\u3000é 😀\n\t") == "日本\u3000é 😀\n\t"
    assert json.loads(visible(json.dumps({HOSTILE + "\U000e0001": 1}, ensure_ascii=False))) == {HOSTILE + "\U000e0001": 1}


def test_inspect_and_errors_show_text_of_files_visibly(command, tmp_path):
    dictionary(model=HOSTILE, hook=HOOK).save(tmp_path / "d")
    said = command("inspect", tmp_path / "d")
    assert json.loads(said.out)["metadata"]["saelens_lite"]["origin"]["model"] == HOSTILE
    failed = command("inspect", tmp_path / HOSTILE)
    for text in (said.out, failed.err):
        assert r"\u202e" in text
        assert not set(text) & set("\x1b\x07\x9b\u202e\x7f")


def test_a_format_whose_detection_fails_is_named_and_left_out(tmp_path, caplog):
    @registry.register("clumsy")
    class Clumsy(Format):
        def detect(self, path):
            raise RuntimeError("no idea")

    try:
        sl.convert(_saved(tmp_path), tmp_path / "theirs", "saelens")
        with caplog.at_level(logging.WARNING):
            assert format_of(tmp_path / "theirs").plugin_name == "saelens"
        assert "'clumsy' of this session was left out" in caplog.text
        assert "RuntimeError: no idea" in caplog.text
    finally:
        registry.unregister("clumsy", "formats")


def test_two_distributions_with_one_format_are_an_error_that_names_both(tmp_path, monkeypatch):
    sl.convert(_saved(tmp_path), tmp_path / "theirs", "saelens")
    points = registry.entry_points

    def doubled(**wanted):
        more = [EntryPoint("saelens", "evil:Format", "saelens_lite.formats")]
        return [*points(**wanted), *(more if wanted.get("group") == "saelens_lite.formats" else [])]

    monkeypatch.setattr(registry, "entry_points", doubled)
    with pytest.raises(PluginError, match=r"'saelens' is supplied by .*\(evil:Format\) and saelens-lite"):
        format_of(tmp_path / "theirs")


def _saved(tmp_path):
    trained = dictionary(model="gpt2", hook=HOOK)
    trained.save(tmp_path / "ours")
    return tmp_path / "ours"
