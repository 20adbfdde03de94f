"""The frame of the command line: options of rules, settings files, --import, hooks, messages in flags, and early answers."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.cli.flags import in_flags, with_aliases
from saelens_lite.config import RunConfig, TextConfig, TrainConfig, parse_options, read_toml, train_configs
from saelens_lite.embedded_hooks import hooks_of_embedded
from saelens_lite.errors import ConfigError, PluginError
from saelens_lite.rule_options import config_of, options_of, read_rule
from saelens_lite.settings_file import run_config

HOOK = "blocks.1.hook_resid_pre"
SMALL = ("--hook", HOOK, "--d-sae", 16, "--n-tokens", 512, "--batch-size", 128)
RULE = '''
import saelens_lite as sl


@sl.register("shifted_by_import")
class Shifted(sl.Sparsity):
    """ReLU of the pre-activation less a shift."""

    homogeneous = False

    class Config(sl.RuleConfig):
        shift: float = 0.25

    def activation(self, pre):
        return (pre - self.config.shift).relu()
'''


@pytest.fixture
def rule_file(tmp_path):
    (tmp_path / "my_rule.py").write_text(RULE)
    yield tmp_path / "my_rule.py"
    registry.unregister("shifted_by_import")


# --- options of rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.names())
def test_a_rule_read_from_its_source_is_the_rule(name):
    plugin, rule = registry.find(name), registry.load(name)
    read = read_rule(plugin.target)
    assert read is not rule
    assert read.Config.model_json_schema() == rule.Config.model_json_schema()
    assert read.Config() == read.Config(**rule.Config().model_dump())
    assert (read.paper, read.__doc__.split()) == (rule.paper, rule.__doc__.split())
    with pytest.raises(ConfigError, match=f"^{rule.__name__}: unknown key 'nothing'"):
        read.Config(nothing=3)


def test_the_rule_of_another_package_is_read_from_its_source(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "stranger")
    assert read_rule("log_sum_sae:LogSum").Config(epsilon=2).epsilon == 2
    assert "log_sum_sae" not in sys.modules


@pytest.mark.parametrize(
    "config",
    [
        "k: int = int(torch.tensor(3))",
        "k: int = 3\n\n        @field_validator('k')\n        def _odd(cls, k):\n            return int(torch.tensor(k))",
        "k: Unknown = 3",
    ],
    ids=["default", "validator", "type"],
)
def test_settings_that_need_torch_are_not_guessed(tmp_path, monkeypatch, config):
    """They are left to the import of the rule."""
    imports = "import torch\nfrom pydantic import field_validator\nfrom saelens_lite import RuleConfig, Sparsity\n\n\n"
    source = f"{imports}class Odd(Sparsity):\n    class Config(RuleConfig):\n        {config}\n"
    name = f"odd_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Exception, match=r"torch|Unknown"):
        read_rule(f"{name}:Odd")


def test_plugins_shows_the_options_of_a_rule(command):
    code, out, err = command("plugins", "jumprelu")
    assert code == 0, err
    for field, option in zip(config_of("jumprelu").model_fields.values(), options_of(config_of("jumprelu")), strict=True):
        assert option.name in out
        assert option.default in out
        assert field.description.split()[0] in out
    assert "Rajamanoharan et al. 2024" in out
    shown = json.loads(command("plugins", "sparsity:topk", "--json").out)
    k = next(option for option in shown["options"] if option["name"] == "k")
    assert (k["type"], k["default"], shown["status"]) == ("int > 0", "32", "ok")
    code, _, err = command("plugins", "jumpreluu")
    assert (code, "no plugin is called 'jumpreluu'; did you mean jumprelu" in err) == (2, True)


def test_the_list_of_plugins_fits_80_columns():
    done = subprocess.run(
        [sys.executable, "-m", "saelens_lite", "plugins"], capture_output=True, text=True, check=True, env=_narrow()
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in registry.names():
        assert f"  {name} " in done.stdout
    assert "arXiv:2404.16014" in done.stdout
    assert "ok" not in done.stdout.split()


def _narrow() -> dict[str, str]:
    import os

    return os.environ | {"COLUMNS": "80"}


def test_help_of_train_lists_options(command):
    out = command("train", "--sparsity", "matryoshka", "--help").out
    assert all(option.name in out for option in options_of(config_of("matryoshka")))
    assert "float ≥ 0, < 1" in out
    every = command("train", "--help").out
    assert all(name in every for name in registry.names())
    assert "threshold_speed" in every


@pytest.mark.parametrize("flags", [("--options.k", "3"), ("--k", "3"), ("--k=3",)], ids=str)
def test_options_may_leave_out_their_prefix(cache_folder, tmp_path, command, flags):
    code, _, err = command("train", cache_folder, *flags, *SMALL, "--out", tmp_path / "run")
    assert code == 0, err
    assert read_toml(tmp_path / "run" / "config.toml")["options"] == {"k": 3}


def test_dashes_in_options():
    assert parse_options({"target-l0": "32", "penalty": "l0"}) == {"target_l0": 32, "penalty": "l0"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ("--k", "3", "--sparsity", "l1"),
            "it is an option of batch_topk, group_max, matching_pursuit, matryoshka, topk, not of l1",
        ),
        (("--kk", "3"), "Unknown option: --kk"),
        (("--options.target-l0", "3"), "unknown key 'target_l0'"),
        (("--options.k", "-3"), "saelens-lite: --options.k -3: input should be greater than 0"),
        (("--d-sae", "-3"), "saelens-lite: --d-sae -3: input should be greater than 0"),
    ],
    ids=str,
)
def test_wrong_options(cache_folder, tmp_path, command, flags, says):
    code, _, err = command("train", cache_folder, "--out", tmp_path / "run", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert says in err


# --- settings files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["cache", "text"])
def test_the_settings_of_a_run_train_it_again(cache_folder, tmp_path, command, source):
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    text = ("--text", tmp_path / "book.txt", "--n-ctx", 32, "--buffer-tokens", 512, "--exclude-positions", 1)
    asked = (*((cache_folder,) if source == "cache" else text), "--sparsity", "jumprelu", "--threshold", 0.02, "--seed", 3)
    more = ("--data-seed", 5, "--validation-tokens", 64, "--log-every", 256, "--betas", 0.8, 0.99)
    code, _, err = command("train", *asked, *more, *SMALL, "--out", tmp_path / "first")
    assert code == 0, err
    code, _, err = command("train", "--config", tmp_path / "first" / "config.toml", "--out", tmp_path / "again")
    assert code == 0, err
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.toml", "log.jsonl", "sae_weights.safetensors"}
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def test_every_flag_is_a_key(tmp_path, cache_folder, command):
    """And a flag overrides the file."""
    tables = f'cache = "{cache_folder}"\nout = "{tmp_path}/run"\nloggers = "jsonl,tensorboard"\ndata_seed = 4\ndevice = "cpu"\n'
    (tmp_path / "run.toml").write_text(
        tables + f'hook = "{HOOK}"\nd_sae = 16\nn_tokens = 256\nbatch_size = 128\nn_ctx = 64\nexists = "overwrite"\n'
    )
    code, _, err = command("train", "--config", tmp_path / "run.toml", "--loggers", "jsonl", "--d-sae", 24)
    assert code == 0, err
    written = read_toml(tmp_path / "run" / "config.toml")
    assert (written["data_seed"], written["loggers"], written["d_sae"]) == (4, ["jsonl"], 24)
    run, text = run_config({"n_ctx": 64, "out": "a", "loggers": ["a, b", "c"]}, {"out": "b"})
    assert (run.out, run.loggers, text.n_ctx) == ("b", ("a", "b", "c"), 64)


def test_keys_of_a_settings_file_have_one_meaning():
    parts = [set(part.model_fields) for part in (RunConfig, TextConfig, TrainConfig)]
    assert len(set.union(*parts)) == sum(map(len, parts))


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"k": 3}, r"'k' in the settings file; it is an option of topk: options = {k = …}"),
        ({"sparsity": "gated", "coefficient": 3}, "'coefficient' .* it is an option of gated"),
        ({"d-sae": 3}, "'d-sae' in the settings file; write d_sae"),
        ({"d_saee": 3}, "did you mean d_sae"),
        ({"resume": "x"}, "it is only a flag, --resume"),
        ({"trust_remote_code": True}, "it is only a flag, --trust-remote-code"),
        ({"train": {"d_sae": 3}}, r"without the line \[train\]"),
        ({"dictionary": [{"data_seed": 3}]}, r"data_seed is a setting of the whole run; write it above"),
        ({"dictionary": [{"k": 3}]}, "unknown key 'k'; options of the sparsity rule are written"),
        ({"loggers": 3}, "loggers"),
        ({"buffer_tokens": 0}, "buffer_tokens = 0: input should be greater than 0"),
    ],
    ids=str,
)
def test_misplaced_keys_are_told_their_place(tables, says):
    def read():
        run_config(tables)
        train_configs(tables)

    with pytest.raises(ConfigError, match=says):
        read()


def test_python_is_told_where_an_option_belongs():
    with pytest.raises(
        ConfigError, match=r"unknown key 'p'; options of the sparsity rule are written .* options={'p': …} in Python"
    ):
        TrainConfig(sparsity="l1", p=0.5)
    with pytest.raises(ConfigError, match="unknown key 'data_seed'; it is a setting of the whole run"):
        TrainConfig(data_seed=1)


# --- plugins from files ------------------------------------------------------------------------------------------------------


def test_a_rule_is_imported_from_a_file(rule_file, cache_folder, tmp_path, command):
    train = ("train", cache_folder, "--sparsity", "shifted_by_import", "--shift", 0.5, *SMALL, "--out", tmp_path / "run")
    code, _, err = command("--import", rule_file, *train)
    assert code == 0, err
    registry.unregister("shifted_by_import")
    code, _, err = command("inspect", tmp_path / "run", "--import", rule_file)
    assert (code, err) == (0, "")
    assert sl.load(tmp_path / "run" / "dictionary").rule.config.shift == 0.5
    registry.unregister("shifted_by_import")
    with pytest.raises(
        PluginError, match=r"known: .*; import the module that registers it \(--import FILE, or import it before"
    ):
        sl.load(tmp_path / "run" / "dictionary")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nowhere.py", None, "nowhere.py: no such file"),
        ("notes.txt", "a", r"notes.txt: expected a Python file \(.py\)"),
        ("bad.py", "a = 1\nb = (\n", "SyntaxError"),
        ("raises.py", "a = 1\n\nraise ValueError('of mine')\n", "ValueError in line 3: of mine"),
        ("exits.py", "raise SystemExit(3)", "SystemExit in line 1: 3"),
        ("empty.py", "a = 1", "empty.py registers no plugin; put @sl.register"),
        ("taken.py", RULE.replace("shifted_by_import", "topk"), "'topk' is already supplied by saelens-lite"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, command, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(PluginError, match=says):
        registry.import_file(tmp_path / name)
    code, _, err = command("--import", tmp_path / name, "plugins", "topk")
    assert (code, err.count("\n")) == (2, 1)


# --- hooks -------------------------------------------------------------------------------------------------------------------


def test_hooks_of_the_embedded_model_are_those_of_the_loaded_model(lm):
    from saelens_lite.model.hook_list import list_hooks

    known = hooks_of_embedded("tiny")
    assert known == list_hooks("tiny")
    floats = {name: width for name, width in known.items() if width is not None}
    assert set(lm.hook_names) < set(floats)
    acts = lm.run("It was the best", hooks=list(floats))
    assert {name: x[0, 0].numel() for name, x in acts.items()} == floats


def test_hooks_command(command):
    code, out, err = command("hooks", "tiny")
    assert code == 0, err
    assert "blocks.N.mlp.hook_post" in out
    assert "N is 0 to 3" in out
    shown = json.loads(command("hooks", "tiny", "--layer", 2, "--json").out)
    assert shown["blocks.2.mlp.hook_post"] == 768
    assert all(name.startswith("blocks.2.") for name in shown)
    code, _, err = command("hooks", "tiny", "--layer", 4)
    assert (code, "tiny has no block 4; its blocks are 0 to 3" in err) == (2, True)
    code, _, err = command("hooks", "./nowhere")
    assert (code, "no model folder at ./nowhere" in err) == (2, True)


# --- texts -------------------------------------------------------------------------------------------------------------------


def test_capture_reads_csv(tmp_path, command):
    rows = ["It was the best of times", 'so "they" said,\nover two lines', "and the worst"]
    quoted = ['"{}"'.format(row.replace('"', '""')) for row in rows]
    (tmp_path / "book.csv").write_text("number,body\n" + "".join(f"{i},{row}\n" for i, row in enumerate(quoted)))
    (tmp_path / "book.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    for kind, flag in (("csv", "--hook"), ("jsonl", "--hooks")):
        args = ("capture", tmp_path / f"book.{kind}", flag, HOOK, "--column", "body", "--out", tmp_path / kind)
        code, _, err = command(*args)
        assert code == 0, err
    shard = "shard-00000.safetensors"
    assert (tmp_path / "csv" / shard).read_bytes() == (tmp_path / "jsonl" / shard).read_bytes()
    code, _, err = command("capture", tmp_path / "book.csv", "--hook", HOOK, "--out", tmp_path / "other")
    assert (code, "it has number, body; say which with --column" in err) == (2, True), err


# --- messages ----------------------------------------------------------------------------------------------------------------

FLAGS = {name: f"--{name.replace('_', '-')}" for name in ("exists", "column", "n_ctx", "private", "d_sae", "trust_remote_code")}


@pytest.mark.parametrize(
    ("message", "tokens", "says"),
    [
        ("choose another place or set exists='overwrite'", [], "choose another place or set --exists overwrite"),
        ("say which with column=", [], "say which with --column"),
        ("repeat with n_ctx=64.", [], "repeat with --n-ctx 64."),
        ("set trust_remote_code=True", [], "set --trust-remote-code"),
        ("call load('x', trust_remote_code=True)", [], "call load('x', trust_remote_code=True)"),
        ("leave out private", [], "leave out --private"),
        ("leave out the folder", [], "leave out the folder"),
        ("give source=", [], "give source="),
        ("TrainConfig: d_sae = '-4': too small", ["--d-sae", "-4"], "--d-sae -4: too small"),
        ("TrainConfig: d_sae = -4: too small", ["--config", "a"], "TrainConfig: d_sae = -4: too small"),
        ("TopK: k = 0: too small", ["--options.k=0"], "--options.k 0: too small"),
        ("positions = [-1]; expected more", ["--positions", "-1"], "--positions -1; expected more"),
    ],
)
def test_messages_speak_in_flags(message, tokens, says):
    assert in_flags(message, FLAGS, tokens) == says


def test_hooks_is_another_name_of_hook():
    assert with_aliases(["a", "--hooks", "b", "--hooks=c", "hooks"]) == ["a", "--hook", "b", "--hook=c", "hooks"]


def test_only_what_is_meant_is_positional():
    from saelens_lite.cli import base

    positional = {
        name: [a.parameter.name[0] for a in base.app[name].assemble_argument_collection() if a.index is not None]
        for name in ("train", "capture", "plugins", "hooks")
    }
    assert {name: len(found) for name, found in positional.items()} == dict.fromkeys(positional, 1)


def test_help_speaks_of_what_a_command_has(command):
    assert "dictionary's training length" not in " ".join(command("capture", "--help").out.split())
    assert "dictionary's training length" in " ".join(command("eval", "--help").out.replace("│", " ").split())


EARLY = [
    ["train", "CACHE", "--hook", "blocks.1.hook_resid_prre"],
    ["train", "CACHE", "--sparsity", "topkk"],
    ["train", "CACHE", "--options.kk", "3"],
    ["train", "CACHE", "--kk", "3"],
    ["train", "CACHE", "--d-sae", "-4"],
    ["train", "CACHE", "--out", "CACHE"],
    ["train", "CACHE", "--loggers", "jsonl,tensorbord"],
    ["train", "nowhere"],
    ["train", "--config", "nowhere.toml"],
    ["train", "--resume", "nowhere"],
    ["train", "--text", "nowhere.txt", "--hook", HOOK],
    ["train", "--text", "python-docs", "--hook", "blocks.9.hook_resid_pre"],
    ["capture", "nowhere.txt", "--hook", HOOK],
    ["capture", "python-docs", "--hook", "blocks.9.hook_resid_pre"],
    ["capture", "python-docs", "--hook", HOOK, "--out", "CACHE"],
    ["capture", "python-docs", "--hook", HOOK, "--model", "./nowhere"],
    ["eval", "nowhere"],
    ["eval", "CACHE", "--text", "nowhere.txt"],
    ["eval", "CACHE", "--model", "tiny", "--hook", "blocks.9.hook_resid_pre"],
    ["eval", "CACHE", "--model", "base=tiny", "--model", "tiny"],
    ["eval", "CACHE", "--model", "base=tiny", "--model", "chat=./nowhere"],
    ["compare", "nowhere", "nowhere"],
    ["diff", "nowhere", "CACHE"],
    ["diff", "CACHE"],
    ["diff", "CACHE", "nowhere"],
    ["diff", "CACHE", "--text", "nowhere.txt"],
    ["diff", "CACHE", "CACHE", "--plot", "picture.pdf"],
    ["explain", "nowhere"],
    ["explain", "nowhere", "--model", "judge", "--latents", "3-1"],
    ["explain", "nowhere", "--model", "judge", "--by", "nothing"],
    ["plugins", "nothing"],
    ["plugins", "--check", "nothing"],
    ["hooks", "./nowhere"],
    ["--import", "nowhere.py", "plugins"],
]


def test_wrong_input_is_told_before_torch_is_imported(cache_folder, tmp_path):
    calls = [[str(cache_folder) if token == "CACHE" else token for token in call] for call in EARLY]
    program = f"""
        import sys
        from saelens_lite import cli
        for call in {calls!r}:
            sys.argv = ["saelens-lite", *call]
            try:
                cli.main()
            except SystemExit as stop:
                print(stop.code, "torch" in sys.modules, *call)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == [" ".join(["2", "False", *call]) for call in calls]
    assert done.stderr.count("\n") == len(calls)
    assert list(tmp_path.iterdir()) == []
