"""Files and plugins of strangers: they decide neither what code is run nor what a terminal or a card does."""

import ast
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from rich.table import Table
from rich.text import Text

import saelens_lite as sl
import saelens_lite_plugins
from saelens_lite import registry
from saelens_lite.cache.live import ActivationStream
from saelens_lite.cli import options
from saelens_lite.cli.base import console, visible
from saelens_lite.errors import ConfigError, CorruptFileError, ModelNotFoundError, PluginError
from saelens_lite.evaluation.metrics import Metric
from saelens_lite.formats import Format
from saelens_lite.formats.detection import format_of
from saelens_lite.hub import write_card
from saelens_lite.hub.card import _literal, _load_model_call
from saelens_lite.markdown import cell, one_line
from saelens_lite.model import EMBEDDED
from saelens_lite.progress import progress_bar
from saelens_lite.tokens.sources import named_text, read_pieces

HOOK = "blocks.2.hook_resid_pre"
HOSTILE = "x\x1b]0;title\x07\x9b31m\u202ey\x7f"
TRICKY = "\x1b]0;title\x07\x9b31m\u202ey\u2066\u200f\u200b\u2028"
EVIL = (
    "![i](http://t/p.png) [j](javascript:alert(1)) <img src=x onerror=alert(1)> <javascript:alert(1)> "
    "<!-- /saelens_lite: load -->\n---\nlicense: evil\n---\n```python\nimport os\n```\n[r]: javascript:1\n# h `c` "
    "\\](x) \\| | a | b |\n===\n    x"
) + TRICKY
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import GPT2Config, GPT2LMHeadModel
class Config(GPT2Config):
    model_type = "stranger"
class Model(GPT2LMHeadModel):
    config_class = Config
"""
PLUGIN = """
from pathlib import Path
Path({marker!r}).touch()
import saelens_lite as sl
class Plugin(sl.Format):
    def detect(self, path):
        return True
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


def dictionary(hook: str | None = None, **origin) -> sl.Dictionary:
    given = sl.Origin(**origin)
    return sl.Dictionary.from_tensors(W_enc=torch.rand(4, 8), W_dec=torch.rand(8, 4), d_in=4, origin=given, reads=hook)


def test_code_of_a_model_is_not_run_and_nobody_is_asked(stranger, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"which was not run.* load_model\(.*, trust_remote_code=True\)"):
        sl.load_model(stranger, device="cpu")
    assert not (tmp_path / "was_run").exists()


def test_a_description_of_a_stream_cannot_allow_code(stranger, tmp_path, lm):
    (tmp_path / "book.txt").write_text("Once upon a time. " * 100)
    description = ActivationStream(lm, tmp_path / "book.txt", HOOK, buffer_tokens=64).describe()
    description["model"] |= {"name": str(stranger), "trust_remote_code": True}
    with pytest.raises(CorruptFileError, match=r"unknown key 'model\.trust_remote_code'"):
        ActivationStream.reopen(description)
    del description["model"]["trust_remote_code"]
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
        sl.load(tmp_path / "d")


def test_code_of_a_model_is_run_when_the_user_allows_it(stranger, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    lm = sl.load_model(stranger, device="cpu", trust_remote_code=True)
    assert (tmp_path / "was_run").exists()
    assert type(lm.module).__name__ == "Model"
    tokens = torch.tensor([[5, 6, 7]])
    expected = sl.load_model("tiny", device="cpu").module(tokens).logits
    torch.testing.assert_close(lm.module(tokens).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("part", ["tokenizer_config.json", "config.json"])
def test_code_of_a_tokenizer_or_of_settings_is_not_run(part, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    folder = Path(shutil.copytree(str(EMBEDDED["tiny"]), tmp_path / "model"))
    (folder / "code_of_a_stranger.py").write_text(CODE.format(marker=str(tmp_path / "was_run")))
    settings = json.loads((folder / part).read_text()) if (folder / part).exists() else {}
    if part == "config.json":
        settings |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code_of_a_stranger.Config"}}
    else:
        classes = ["code_of_a_stranger.Tokenizer", "code_of_a_stranger.Tokenizer"]
        settings |= {"tokenizer_class": "StrangerTokenizer", "auto_map": {"AutoTokenizer": classes}}
    (folder / part).write_text(json.dumps(settings))
    known = part == "tokenizer_config.json"  # the class that transformers has for GPT-2 is used instead
    with nullcontext() if known else pytest.raises(ModelNotFoundError, match="which was not run"):
        sl.load_model(folder, device="cpu")
    assert not (tmp_path / "was_run").exists()


def test_attention_code_on_the_hub_is_not_fetched(tmp_path):
    folder = Path(shutil.copytree(str(EMBEDDED["tiny"]), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "stranger/attention"}))
    with pytest.raises(ModelNotFoundError, match="which was not run"):
        sl.load_model(folder, device="cpu")


@pytest.mark.parametrize("takes_the_argument", [True, False])
def test_code_of_a_dataset_is_refused(takes_the_argument, monkeypatch):
    """Versions before 4 of datasets ask on the terminal when they are told nothing; later ones run no code."""
    asked = []

    def old(name, config=None, *, split, streaming, trust_remote_code=None):
        asked.append(trust_remote_code)
        return [{"text": "Once upon a time."}]

    def new(name, config=None, *, split, streaming):
        return old(name, config, split=split, streaming=streaming)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=old if takes_the_argument else new))
    assert [piece.content for piece in read_pieces(named_text("hf:stranger/texts"), sl.TextConfig())] == ["Once upon a time."]
    assert asked == [False if takes_the_argument else None]


def test_no_other_place_loads_models_or_datasets():
    """Everything goes through the two functions above."""
    calls = re.compile(r"\b(?:Auto\w+|\w+ForCausalLM|\w+Config)\.from_pretrained\(|\bload_dataset\(|\bhf_pipeline\(")
    root = Path(sl.__file__).parent
    files = [*root.rglob("*.py"), *Path(saelens_lite_plugins.__file__).parent.rglob("*.py")]
    found = {path.parent.name + "/" + path.name for path in files if calls.search(path.read_text(encoding="utf-8"))}
    assert found == {"model/loading.py", "model/hook_list.py", "tokens/sources.py"}
    listing = (root / "model/hook_list.py").read_text(encoding="utf-8")  # reads the configuration alone, and runs no code of it
    assert len(re.findall(r"from_pretrained\(|from_config\(", listing)) == listing.count("trust_remote_code=False") == 2


@pytest.fixture
def loaded(monkeypatch, lm):
    """Note the arguments of `load_model`, which returns the embedded model whatever it is asked for."""
    asked = []

    def noted(name, **settings):
        asked.append({"name": name, **settings})
        return lm

    monkeypatch.setattr("saelens_lite.model.loading.load_model", noted)
    return asked


def test_commands_load_the_commit_that_the_dictionary_was_trained_on(loaded):
    trained = dictionary(model="gpt2", revision="abc", hook=HOOK)
    for given in ({}, {"model": ["gpt2"]}, {"model": ["gpt2"], "model_revision": "def"}, {"model": ["other"]}):
        options.OfModel(**given).model_of(trained)
    assert [(asked["name"], asked["revision"]) for asked in loaded] == [
        ("gpt2", "abc"), ("gpt2", "abc"), ("gpt2", "def"), ("other", None)
    ]  # fmt: skip
    assert not any(asked["trust_remote_code"] for asked in loaded)


def test_dictionaries_of_several_models_or_commits_need_a_choice(loaded):
    one, other = (dictionary(model="gpt2", revision=commit, hook=HOOK) for commit in ("abc", "def"))
    with pytest.raises(ConfigError, match="several commits of one model: gpt2 at abc, gpt2 at def"):
        options.OfModel().model_of(one, other)
    with pytest.raises(ConfigError, match="several models: gpt2 at abc, tiny"):
        options.OfModel().model_of(one, dictionary(model="tiny", hook=HOOK))
    options.OfModel(model_revision="def").model_of(one, other)
    options.OfModel(model=["other"]).model_of(one, other)
    options.OfModel().model_of(one, one)
    assert [(asked["name"], asked["revision"]) for asked in loaded] == [("gpt2", "def"), ("other", None), ("gpt2", "abc")]


def test_a_dictionary_without_a_model_runs_on_no_model_that_was_not_named(loaded):
    """Nothing falls back on the embedded model, also not beside a dictionary that names its model."""
    unknown, known = dictionary(model=None, hook=HOOK), dictionary(model="gpt2", hook=HOOK)
    with pytest.raises(ConfigError, match="this dictionary does not say which model it was trained on; give --model"):
        options.OfModel().model_of(unknown)
    with pytest.raises(ConfigError, match="one of the dictionaries does not say which model it was trained on"):
        options.OfModel().model_of(known, unknown)
    assert loaded == []
    options.OfModel(model=["tiny"]).model_of(unknown)
    options.OfModel(model=["gpt2"]).model_of(known, unknown)
    assert [asked["name"] for asked in loaded] == ["tiny", "gpt2"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "d"],
        ["features", "d"],
        ["probe", "d", "--data", "x.csv"],
        ["steer", "d", "--prompt", "a"],
        ["doses", "d", "1", "--prompt", "a", "--doses", "2"],
        ["attribute", "d", "--prompt", "a"],
        ["prompt", "d", "--prompt", "a"],
    ],
)
def test_commands_ask_for_the_model_of_a_dictionary_that_does_not_name_it(arguments, loaded, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("text,label\na,0\nb,1\n")
    dictionary(model=None, hook=HOOK).save("d")
    said = command(*arguments)
    assert said.code == 2
    assert "which model it was trained on; give --model" in said.err
    assert loaded == []


def test_the_command_line_runs_only_code_of_a_model_the_user_named(loaded):
    evil = dictionary(model="evil/model", hook=HOOK)
    with pytest.raises(ConfigError, match=r"trust_remote_code needs the name .* evil/model"):
        options.OfModel(trust_remote_code=True).model_of(evil)
    options.OfModel(model=["evil/model"], trust_remote_code=True).model_of(evil)
    assert [asked["trust_remote_code"] for asked in loaded] == [True]


def test_a_folder_that_a_dictionary_names_as_its_model_is_mentioned_and_its_code_not_run(stranger, tmp_path, caplog):
    folder = dictionary(model=str(stranger), hook=HOOK).save(tmp_path / "d")
    with pytest.raises(ModelNotFoundError, match="which was not run"):
        options.OfModel().load(folder)
    assert f"the folder {stranger}, as a file says" in caplog.text
    assert not (tmp_path / "was_run").exists()
    caplog.clear()
    with pytest.raises(ModelNotFoundError):
        options.OfModel(model=[str(stranger)]).load(folder)
    assert not caplog.text


@pytest.mark.parametrize("text", ['a"); import os #', HOSTILE, "\U000e0001é`'\n", "abc"])
def test_code_on_a_card_holds_fields_of_files_as_quoted_strings(text):
    assert eval(_literal(text), {}) == text
    assert _literal(text).isprintable()
    call = _load_model_call(sl.Origin(model="gpt2", revision=text))
    assert eval(call.removeprefix("sl."), {"load_model": lambda name, revision: (name, revision)}) == ("gpt2", text)


@pytest.mark.parametrize("write", [one_line, cell])
def test_a_card_passes_on_no_link_image_or_html(write):
    shown = write(f"![a](http://t/p.png) [b](javascript:alert(1)) \\](c) <script>{HOSTILE}")
    assert "](" not in shown
    assert "<" not in shown
    assert shown.isprintable()


def hostile(folder: Path, hook: str = EVIL, **origin: str) -> Path:
    """Return a dictionary folder with hostile text in every field that takes text."""
    dictionary(hook=HOOK).save(folder)
    config = json.loads((folder / "cfg.json").read_text())
    fields = dict.fromkeys(("model", "revision", "model_class", "text", "text_sha256"), EVIL)
    config["metadata"]["saelens_lite"]["origin"] |= fields | origin
    config["metadata"]["saelens_lite"]["reads"][0]["hook"] = hook
    config["metadata"]["saelens_lite"]["training"] = {"tokens": 10, "config": {EVIL: EVIL, "options": {EVIL: EVIL}}}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def evil_report() -> sl.EvalReport:
    texts = dict.fromkeys(("text", "text_sha256", "disjoint_why", "model", "hook", "excluded"), EVIL)
    metrics = dict.fromkeys(("l0", "fvu", "ce_loss_score", "kl_div_score", "frac_alive", EVIL), Metric(0.5, 0.4, 0.6))
    report = sl.EvalReport(metrics=metrics, n_tokens=10, n_sequences=2, disjoint=True, **texts)
    return replace(report, controls={EVIL: report})


@pytest.mark.parametrize("origin", [{}, {"model": "tiny", "hook": HOOK}], ids=["hostile", "tiny"])
def test_a_card_made_of_hostile_fields_holds_them_as_text(origin, tmp_path):
    folder = hostile(tmp_path / "d", **origin)
    card = write_card(folder, sl.load(folder), evil_report(), tags=[EVIL], license="mit").read_text()
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    facts = yaml.safe_load(front)
    assert set(facts) == {"library_name", "license", "tags", "model-index"}
    assert facts["license"] == "mit"
    assert all(isinstance(tag, str) for tag in facts["tags"])
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    tokens += [inner for token in tokens for inner in token.children or ()]
    assert [token.content.strip() for token in tokens if token.type.startswith("html")] == [
        f"<!-- {slash}saelens_lite: {name} -->" for name in ("load", "evaluation") for slash in ("", "/")
    ]
    assert not {"link_open", "hr", "code_block"} & {token.type for token in tokens}
    assert {token.attrs["src"] for token in tokens if token.type == "image"} <= {"density.png", "training.png"}
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", *["h2"] * 5]
    rows = "".join({"tr_open": "\n", "th_open": "|", "td_open": "|"}.get(token.type, "") for token in tokens)
    assert set(rows.split()) == {"|||", "||", "||||||"}
    assert all(char.isprintable() or char == "\n" for char in card)
    blocks = [ast.parse(token.content) for token in tokens if token.type == "fence"]
    assert len(blocks) == 2
    (loading,) = [
        node for node in ast.walk(blocks[0]) if isinstance(node, ast.Call) and "load_model" in ast.dump(node.func)
    ] or [None]
    assert (loading is None) is (not origin)
    if loading is not None:
        assert ast.literal_eval(loading.args[0]) == "tiny"
        assert {key.arg: ast.literal_eval(key.value) for key in loading.keywords} == {"revision": EVIL}
    imported = {
        alias.name for block in blocks for node in ast.walk(block) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported == {"saelens_lite"}


STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "D"],
        ["inspect", "N"],
        ["eval", "D"],
        ["eval", "D", "--model", "tiny"],
        ["--verbose", "eval", "D", "--model", "tiny", "--hook", HOOK, "--n-tokens", "100"],
        ["convert", "D", "OUT", "--format", "sparsify"],
        ["push", "D", EVIL],
        ["plugins", "--check", EVIL],
    ],
)
def test_no_command_lets_text_of_files_steer_the_terminal(arguments, tmp_path, command, lm):
    d = sl.Dictionary.create("l1", reads=lm.d_model, d_sae=8).save(tmp_path / f"d{TRICKY}")
    config = json.loads((d / "cfg.json").read_text())
    config["metadata"]["saelens_lite"]["origin"] |= dict.fromkeys(("model", "model_class", "text"), EVIL)
    (d / "cfg.json").write_text(json.dumps(config))
    evil_report().to_json(d / "eval.json")
    places = {"D": d, "N": tmp_path / f"none{TRICKY}", "OUT": tmp_path / f"out{TRICKY}"}
    said = command(*(places.get(argument, argument) for argument in arguments))
    assert said.out + said.err
    assert not STEERS.search(said.out + said.err)
    assert "Traceback" not in said.err


def test_a_log_line_does_not_steer_the_terminal(tmp_path):
    folder = dictionary(hook=HOOK).save(tmp_path / "d")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["saelens_lite"] |= {"sparsity": f"none{TRICKY}", "distribution": f"x{TRICKY}"}
    (folder / "cfg.json").write_text(json.dumps(config))
    code = "import logging, sys; from saelens_lite.cli import main; from saelens_lite.cli.base import app\n"
    code += f"@app.command\ndef warn():\n    logging.getLogger('saelens_lite').warning('%s', {TRICKY!r})\nmain()"
    for arguments, expected in (
        [["-c", code, "warn"], ""],
        [["-m", "saelens_lite.cli", "inspect", str(folder)], "cannot be loaded"],
    ):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
        assert r"\u001b]0;title\u0007" in done.stderr
        assert r"\u202e" in done.stderr
        assert expected in done.stderr
        assert not STEERS.search(done.stdout + done.stderr)


def test_a_progress_bar_shows_text_as_text(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with progress_bar("a[red]b\u202e", 3) as advance:
        advance(3, "[bold]c\u202e")
    assert "a[red]b\\u202e" in shown.getvalue()
    assert "[bold]c\\u202e" in shown.getvalue()


def test_a_terminal_is_not_steered_by_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = visible(HOSTILE)
    assert shown == r"x\u001b]0;title\u0007\u009b31m\u202ey\u007f"
    console().print(HOSTILE + "[bold]")
    assert capsys.readouterr().out == f"{shown}[bold]\n"
    grid = Table("a", HOSTILE)
    grid.add_row(HOSTILE, Text("[bold]b\u202e"))
    console().print(grid)
    said = capsys.readouterr().out
    assert not STEERS.search(said)
    assert said.count(shown) == 2
    assert r"[bold]b\u202e" in said
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


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(distribution, plugin, kind, *endings) puts a package's metadata on the path; importing it leaves a file."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    modules = []

    def put(name: str, plugin: str, kind: str, *endings: str) -> Path:
        marker, module = tmp_path / f"{name} was imported", name.replace("-", "_")
        modules.append(module)
        (site / f"{module}.py").write_text(PLUGIN.format(marker=str(marker)))
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        groups = [f"saelens_lite.{kind}", *(f"saelens_lite.{kind}.{ending}" for ending in endings)]
        (info / "entry_points.txt").write_text("".join(f"[{group}]\n{plugin} = {module}:Plugin\n" for group in groups))
        return marker

    yield put
    for module in modules:
        sys.modules.pop(module, None)


def test_a_format_is_imported_only_for_files_it_says_it_reads(install, tmp_path, monkeypatch):
    marker = install("strange-format", "strange", "formats", "weights.strange")
    theirs = sl.convert(_saved(tmp_path), tmp_path / "theirs", "saelens")
    empty, named = tmp_path / "empty", tmp_path / "named"
    empty.mkdir()
    named.mkdir()
    sl.load(theirs)
    sl.load(theirs, format="saelens")
    with pytest.raises(CorruptFileError, match=r"no files of .*strange.* either"):
        sl.load(empty)
    with pytest.raises(CorruptFileError, match="holds a dictionary of saelens, not of sparsify"):
        sl.load(theirs, format="sparsify")
    with pytest.raises(CorruptFileError, match=r"below it .*several dictionaries"):
        sl.load(tmp_path)
    (named / "weightsXstrange").touch()
    with pytest.raises(CorruptFileError):
        sl.load(named)
    assert not marker.exists()

    (named / "my.weights.strange").touch()
    monkeypatch.setenv("SAELENS_LITE_PLUGINS", "")
    with pytest.raises(CorruptFileError):
        sl.load(named)
    with pytest.raises(PluginError, match="may not be loaded"):
        sl.load(named, format="strange")
    assert not marker.exists()

    monkeypatch.delenv("SAELENS_LITE_PLUGINS")
    with pytest.raises(ConfigError, match="strange files can be written, not read"):
        sl.load(named)
    assert marker.exists()


def test_a_format_without_endings_is_imported_by_name_only(install, tmp_path):
    marker = install("shy-format", "shy", "formats")
    theirs = sl.convert(_saved(tmp_path), tmp_path / "theirs", "saelens")
    sl.load(theirs)
    assert not marker.exists()
    with pytest.raises(ConfigError, match="shy files can be written, not read"):
        sl.load(theirs, format="shy")
    assert marker.exists()


def test_a_format_that_cannot_be_imported_is_named_and_left_out(install, tmp_path, caplog):
    install("broken-format", "broken", "formats", "cfg.json")
    (tmp_path / "site/broken_format.py").write_text("raise SystemExit('no')")
    theirs = sl.convert(_saved(tmp_path), tmp_path / "theirs", "saelens")
    assert format_of(theirs).plugin_name == "saelens"
    assert "'broken' of broken-format 1.0 was left out: cannot be loaded" in caplog.text


@pytest.mark.parametrize("kind", registry.kinds())
def test_two_distributions_with_one_name_are_an_error_that_names_both(kind, install):
    first, second = (install(name, "twin", kind, "twin") for name in ("first-one", "second-one"))
    with pytest.raises(PluginError, match=r"'twin' is supplied by first-one \(.*\) and second-one \(.*\); uninstall one"):
        registry.load("twin", kind)
    assert {
        (f.status, f.plugin.distribution) for f in map(registry.check, registry.plugins(kind)) if f.plugin.name == "twin"
    } == {
        ("broken", "first-one"),
        ("broken", "second-one"),
    }
    assert not first.exists()
    assert not second.exists()


def test_two_distributions_with_one_format_are_an_error_where_it_could_apply(install, tmp_path):
    theirs = sl.convert(_saved(tmp_path), tmp_path / "theirs", "saelens")
    marker = install("evil-format", "saelens", "formats", "safetensors")
    with pytest.raises(PluginError, match=r"'saelens' is supplied by evil-format \(.*\) and saelens-lite"):
        format_of(theirs)
    assert not marker.exists()


def _saved(tmp_path):
    trained = dictionary(model="gpt2", hook=HOOK)
    trained.save(tmp_path / "ours")
    return tmp_path / "ours"
