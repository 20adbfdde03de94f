"""Plugins by name: built-in ones, those of other distributions (real metadata on the path), and those of this session."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.errors import PluginError


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """A function that puts the metadata of an installed package on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, version: str, points: dict[str, str], kind: str = "sparsity", extras: tuple[str, ...] = ()) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        provides = "".join(f"Provides-Extra: {extra}\n" for extra in extras)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{provides}")
        lines = "".join(f"{plugin} = {target}\n" for plugin, target in points.items())
        (info / "entry_points.txt").write_text(f"[saelens_lite.{kind}]\n{lines}")

    return install


@pytest.fixture
def stranger(distribution, tmp_path):
    """A package "stranger-sparsity" 2.1 with the rule "stranger"."""
    (tmp_path / "stranger_of_tests.py").write_text(
        "import saelens_lite as sl\n\nclass Rule(sl.Sparsity):\n"
        "    'Positive ones.\\n\\nMore.'\n    paper = 'Nobody 2020'\n"
        "    def activation(self, pre):\n        return pre.relu()\n"
    )
    distribution("stranger-sparsity", "2.1", {"stranger": "stranger_of_tests:Rule"})
    yield
    sys.modules.pop("stranger_of_tests", None)


@pytest.fixture
def relu():
    """A rule that is registered during a test."""

    @sl.register("relu")
    class Relu(sl.Sparsity):
        def activation(self, pre):
            return pre.relu()

    yield Relu
    registry.unregister("relu")


def test_built_in_rules_are_entry_points():
    assert {"gated", "l1", "topk"} <= set(registry.names())
    assert registry.names() == sorted(registry.names())
    found = {plugin.name: plugin for plugin in registry.plugins()}
    assert found["topk"].target == "saelens_lite_plugins.sparsity.topk:TopK"
    assert {plugin.distribution for plugin in found.values()} == {"saelens-lite"}
    assert {plugin.version for plugin in found.values()} == {sl.__version__}


def test_built_in_loggers_are_entry_points():
    assert {"jsonl", "tensorboard", "trackio", "wandb"} <= set(registry.names("loggers"))
    assert {plugin.distribution for plugin in registry.plugins("loggers")} == {"saelens-lite"}


def test_listing_imports_nothing():
    code = (
        "import sys\nfrom saelens_lite import registry\nfor kind in registry.kinds(): registry.names(kind)\n"
        "print([m for m in sys.modules if m.startswith(('torch', 'wandb', 'saelens_lite_plugins'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_built_in_rule_loads_and_cites_its_paper():
    for name in registry.names():
        rule = registry.load(name)
        assert issubclass(rule, sl.Sparsity)
        assert rule.plugin_name == name
        assert "20" in rule.paper
        defaults = rule.Config()
        assert all(field.description for field in type(defaults).model_fields.values())


def test_register_use_unregister(relu):
    assert "relu" in registry.names()
    assert registry.find("relu").distribution == "this session"
    d = sl.Dictionary.create("relu", reads=4, d_sae=6)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(d.encode(x).to_dense(), torch.relu(x @ d.W_enc))
    trained = sl.fit(
        torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), "relu", d_sae=6, batch_size=16, n_tokens=640
    )
    assert type(trained.rule) is relu
    registry.unregister("relu")
    assert "relu" not in registry.names()
    with pytest.raises(PluginError, match="no sparsity plugin is called 'relu'"):
        registry.load("relu")
    registry.unregister("relu")


def test_registering_again_replaces_the_own_class(relu):
    @sl.register("relu")
    class Other(sl.Sparsity):
        pass

    assert registry.load("relu") is Other
    assert [plugin.name for plugin in registry.plugins()].count("relu") == 1


def test_a_built_in_name_cannot_be_registered():
    built_in = registry.load("topk")
    with pytest.raises(PluginError, match="sparsity plugin 'topk' is already supplied by saelens-lite"):
        sl.register("topk")(sl.Sparsity)
    assert registry.load("topk") is built_in


def test_a_class_is_registered_under_the_kind_of_its_base(relu):
    assert "relu" not in registry.names("loggers")
    try:

        @sl.register("relu")
        class Log(sl.Logger):
            pass

        assert registry.load("relu", "loggers") is Log
        assert registry.load("relu") is relu
    finally:
        registry.unregister("relu", "loggers")


@pytest.mark.parametrize("target", [object, torch.nn.Module])
def test_classes_without_a_kind_cannot_be_registered(target):
    with pytest.raises(PluginError, match="cannot be registered as 'x': derive it from the base class of its kind of plugin"):
        sl.register("x")(target)
    assert "x" not in registry.names()


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(PluginError, match=r"unknown kind of plugin 'logger'; did you mean loggers\?; kinds are "):
        registry.plugins("logger")


def test_a_kind_is_declared_with_its_contract():
    for kind, target in registry.kinds().items():
        contract = EntryPoint(kind, target, registry.DECLARED).load()
        assert contract.plugin_kind == kind
        assert contract.__doc__
        for name in registry.names(kind):
            if (found := registry.check(registry.find(name, kind))).status == "ok":
                assert issubclass(registry.load(name, kind), contract), found


def test_a_base_class_of_this_session_adds_a_kind():
    class Namer:
        plugin_kind = "namers"

    try:

        @sl.register("first_word")
        class FirstWord(Namer):
            "The first word."

        assert registry.kinds()["namers"].endswith("Namer")
        assert registry.load("first_word", "namers") is FirstWord
        assert registry.names("namers") == ["first_word"]
    finally:
        registry.unregister("first_word", "namers")
    assert "namers" not in registry.kinds()


@pytest.fixture
def kind_of_a_stranger(distribution, tmp_path):
    """A package with a new kind, "explainers_of_tests", and another package with a plugin of it."""
    (tmp_path / "explaining_of_tests.py").write_text(
        "class Explainer:\n    'Base of explainers.'\n    plugin_kind = 'explainers_of_tests'\n"
    )
    (tmp_path / "by_words_of_tests.py").write_text(
        "from explaining_of_tests import Explainer\n\n"
        "class ByWords(Explainer):\n    'The most common word.'\n\nclass Bare:\n    pass\n"
    )
    kind = "explainers_of_tests"
    distribution("explaining", "1.0", {kind: "explaining_of_tests:Explainer"}, kind="kinds")
    distribution("by-words", "2.0", {"by_words": "by_words_of_tests:ByWords", "bare": "by_words_of_tests:Bare"}, kind=kind)
    yield kind
    for module in ("explaining_of_tests", "by_words_of_tests"):
        sys.modules.pop(module, None)


def test_one_package_adds_a_kind_and_another_a_plugin_of_it(kind_of_a_stranger, command):
    assert registry.kinds()[kind_of_a_stranger] == "explaining_of_tests:Explainer"
    assert registry.names(kind_of_a_stranger) == ["bare", "by_words"]
    assert "explaining_of_tests" not in sys.modules
    assert "by_words_of_tests" not in sys.modules
    assert registry.load("by_words", kind_of_a_stranger).__name__ == "ByWords"
    with pytest.raises(PluginError, match="Bare is not a class derived from explaining_of_tests:Explainer"):
        registry.load("bare", kind_of_a_stranger)
    rows = {row["name"]: row for row in json.loads(command("plugins", "--json").out)}
    assert (rows["by_words"]["kind"], rows["by_words"]["distribution"]) == (kind_of_a_stranger, "by-words")
    assert (rows["by_words"]["summary"], rows["by_words"]["status"]) == ("The most common word.", "ok")
    assert rows["bare"]["status"] == "broken"
    with pytest.raises(PluginError, match="did you mean explainers_of_tests"):
        registry.plugins("explainer_of_tests")


@pytest.mark.parametrize("ask", [registry.plugins, registry.names, lambda kind: registry.load("topk", kind)])
def test_an_unknown_kind(ask):
    with pytest.raises(
        PluginError,
        match=r"unknown kind of plugin 'rules'; kinds are explainers, exporters, formats, judges, loggers, sparsity$",
    ):
        ask("rules")


def test_a_kind_without_plugins(monkeypatch):
    declared = [EntryPoint("loggers", "saelens_lite.loggers:Logger", registry.DECLARED)]
    monkeypatch.setattr(registry, "_points_on", lambda search_path: EntryPoints(declared))
    monkeypatch.setattr(registry, "_installed", registry._installed.__wrapped__)
    with pytest.raises(PluginError, match="no loggers plugin is called 'jsonl'; none is known: reinstall saelens-lite"):
        registry.load("jsonl", "loggers")


def test_an_unknown_name_lists_near_matches():
    with pytest.raises(PluginError, match=r"no sparsity plugin is called 'top_k'; did you mean topk\?$"):
        registry.load("top_k")
    with pytest.raises(PluginError, match=f"no sparsity plugin is called 'zzz'; known: {', '.join(registry.names())}$"):
        registry.load("zzz")


def test_an_unknown_name_in_a_file_names_its_distribution():
    with pytest.raises(
        PluginError, match=r"'top_k'; did you mean topk\?; the file was written with top-k-sae 0\.3, which supplies it"
    ):
        registry.load("top_k", written_by="top-k-sae 0.3")


def test_a_rule_of_another_distribution_is_imported_only_when_used(stranger, tmp_path):
    assert "stranger" in registry.names()
    found = registry.find("stranger")
    assert (found.distribution, found.version, found.target) == ("stranger-sparsity", "2.1", "stranger_of_tests:Rule")
    assert "stranger_of_tests" not in sys.modules
    d = sl.Dictionary.create("stranger", reads=4, d_sae=6)
    assert type(d.rule).__module__ == "stranger_of_tests"
    d.save(tmp_path / "d")
    assert '"stranger-sparsity 2.1"' in (tmp_path / "d" / "cfg.json").read_text()


def test_a_name_of_two_distributions_names_both(distribution):
    distribution("other-sparsity", "1.0", {"topk": "other_sparsity:TopK"})
    assert registry.names().count("topk") == 1
    both = (
        r"'topk' is supplied by other-sparsity \(other_sparsity:TopK\) and saelens-lite \(saelens_lite_plugins\..*\); uninstall"
    )
    with pytest.raises(PluginError, match=both):
        registry.load("topk")
    assert registry.load("l1").plugin_name == "l1"


def test_a_name_of_this_session_that_is_installed_later(distribution, relu):
    distribution("relu-sparsity", "1.0", {"relu": "relu_sparsity:Relu"})
    with pytest.raises(PluginError, match=r"is supplied by relu-sparsity .* and this session"):
        registry.load("relu")


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (None, "ModuleNotFoundError: No module named 'broken_of_tests'"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("def f(:", "SyntaxError: "),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = 1", "AttributeError: module 'broken_of_tests' has no attribute 'Rule'"),
    ],
)
def test_a_broken_plugin_fails_only_when_it_is_loaded(distribution, tmp_path, source, cause):
    if source is not None:
        (tmp_path / "broken_of_tests.py").write_text(source)
    distribution("broken-sparsity", "0.9", {"broken": "broken_of_tests:Rule"})
    try:
        assert "broken" in registry.names()
        assert registry.load("topk").plugin_name == "topk"
        with pytest.raises(PluginError) as caught:
            registry.load("broken")
        message = str(caught.value)
        assert "'broken' of broken-sparsity 0.9 cannot be loaded from broken_of_tests:Rule: " in message
        assert cause in message
    finally:
        sys.modules.pop("broken_of_tests", None)


@pytest.mark.parametrize(
    "source",
    ["Rule = 3", "class Rule: pass", "from saelens_lite import Logger as Rule"],
)
def test_an_object_that_is_not_a_rule_is_not_usable(distribution, tmp_path, source):
    (tmp_path / "no_rule_of_tests.py").write_text(source)
    distribution("odd-sparsity", "0.9", {"odd": "no_rule_of_tests:Rule"})
    try:
        with pytest.raises(PluginError) as caught:
            sl.Dictionary.create("odd", reads=4, d_sae=6)
    finally:
        sys.modules.pop("no_rule_of_tests", None)
    assert str(caught.value) == (
        "sparsity plugin 'odd' of odd-sparsity 0.9 is not usable: no_rule_of_tests:Rule is not a class derived from "
        "saelens_lite.sparsity:Sparsity"
    )


@pytest.mark.parametrize(("extras", "remedy"), [(("needy", "docs"), "; pip install 'needy-log[needy]'"), (("docs",), "")])
def test_a_missing_package_names_the_extra_that_installs_it(distribution, tmp_path, extras, remedy):
    (tmp_path / "needy_of_tests.py").write_text("import a_package_of_nobody")
    distribution("needy-log", "1.0", {"needy": "needy_of_tests:Log"}, kind="loggers", extras=extras)
    with pytest.raises(PluginError) as caught:
        registry.load("needy", "loggers")
    assert str(caught.value) == (
        "loggers plugin 'needy' of needy-log 1.0 cannot be loaded from needy_of_tests:Log: "
        f"ModuleNotFoundError: No module named 'a_package_of_nobody'{remedy}"
    )


# SAELENS_LITE_PLUGINS


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (None, True),
        ("stranger-sparsity", True),
        ("Stranger_Sparsity", True),
        ("sparsity:stranger", True),
        ("other, stranger.sparsity ,loggers:x", True),
        ("", False),
        (" , ", False),
        ("other", False),
        ("stranger", False),
        ("loggers:stranger", False),
        ("stranger-sparsity-extra", False),
    ],
)
def test_the_variable_restricts_the_plugins_that_can_be_loaded(stranger, monkeypatch, value, allowed):
    if value is None:
        monkeypatch.delenv("SAELENS_LITE_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("SAELENS_LITE_PLUGINS", value)
    assert ("stranger" in registry.names()) == allowed
    assert "stranger" in [plugin.name for plugin in registry.plugins()]
    if allowed:
        assert registry.load("stranger").plugin_name == "stranger"
    else:
        with pytest.raises(PluginError) as caught:
            registry.load("stranger")
        assert str(caught.value) == (
            f"sparsity plugin 'stranger' of stranger-sparsity 2.1 may not be loaded: SAELENS_LITE_PLUGINS is {value!r}; "
            "add stranger-sparsity or sparsity:stranger to it"
        )
        assert "stranger_of_tests" not in sys.modules


@pytest.mark.parametrize("value", ["", "somebody-else"])
def test_built_in_plugins_and_those_of_this_session_are_never_restricted(relu, monkeypatch, value):
    monkeypatch.setenv("SAELENS_LITE_PLUGINS", value)
    assert registry.load("relu") is relu
    assert {"gated", "l1", "relu", "topk"} <= set(registry.names())
    assert registry.load("jsonl", "loggers").plugin_name == "jsonl"


def test_the_variable_decides_between_two_distributions(distribution, monkeypatch):
    distribution("other-sparsity", "1.0", {"topk": "other_sparsity:TopK"})
    monkeypatch.setenv("SAELENS_LITE_PLUGINS", "")
    assert registry.find("topk").distribution == "saelens-lite"
    monkeypatch.setenv("SAELENS_LITE_PLUGINS", "other-sparsity")
    with pytest.raises(PluginError, match="uninstall one of them or restrict SAELENS_LITE_PLUGINS"):
        registry.load("topk")


def test_the_backport_of_importlib_metadata_changes_nothing(tmp_path):
    """Packages such as keyring import the backport, which then answers for Python's own module."""
    (tmp_path / "bare-1.0.dist-info").mkdir()
    (tmp_path / "bare-1.0.dist-info/entry_points.txt").write_text("[saelens_lite.formats]\nbare = bare_of_tests:Format\n")
    code = "import importlib_metadata; from saelens_lite import registry; print(registry.find('bare', 'formats').distribution)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout == "?\n"


# The list of plugins, with all faults that a plugin can have


@pytest.fixture
def all_sorts(stranger, distribution, tmp_path, monkeypatch):
    """A good plugin, a broken one, one with two distributions, a restricted one, and one without metadata."""
    (tmp_path / "broken_of_tests.py").write_text("raise RuntimeError('[red]no GPU[/red]\\nat all')")
    distribution("broken-sparsity", "0.9", {"broken": "broken_of_tests:Rule"})
    distribution("double-a", "1", {"double": "double_a:Rule"})
    distribution("double-b", "2", {"double": "double_b:Rule"})
    distribution("secret-log", "3", {"secret": "secret_of_tests:Log"}, kind="loggers")
    (tmp_path / "bare-1.0.dist-info").mkdir()
    (tmp_path / "bare-1.0.dist-info/entry_points.txt").write_text("[saelens_lite.formats]\nbare = bare_of_tests:Format\n")
    allowed = "stranger-sparsity,broken-sparsity,double-a,double-b,formats:bare"
    monkeypatch.setenv("SAELENS_LITE_PLUGINS", allowed)
    return allowed


def test_the_list_as_json(all_sorts, relu, command):
    rows = json.loads(command("plugins", "--json").out)
    assert [(row["kind"], row["name"]) for row in rows] == [
        (kind, plugin.name) for kind in registry.kinds() for plugin in registry.plugins(kind)
    ]
    found = {row["name"]: row for row in rows}
    assert found["stranger"] == {
        "name": "stranger",
        "kind": "sparsity",
        "distribution": "stranger-sparsity",
        "version": "2.1",
        "target": "stranger_of_tests:Rule",
        "paper": "Nobody 2020",
        "summary": "Positive ones.",
        "status": "ok",
        "why": "",
    }
    assert found["topk"]["paper"] == registry.load("topk").paper
    assert (found["relu"]["distribution"], found["relu"]["version"], found["relu"]["status"]) == ("this session", "", "ok")
    assert found["broken"]["status"] == "broken"
    assert found["broken"]["why"] == "cannot be loaded from broken_of_tests:Rule: RuntimeError: [red]no GPU[/red] at all"
    doubles = [row for row in rows if row["name"] == "double"]
    assert [row["distribution"] for row in doubles] == ["double-a", "double-b"]
    for row in doubles:
        assert row["status"] == "broken"
        assert "is supplied by double-a (double_a:Rule) and double-b (double_b:Rule); uninstall one of them" in row["why"]
    assert found["secret"]["status"] == "restricted"
    assert found["secret"]["why"] == (
        f"may not be loaded: SAELENS_LITE_PLUGINS is {all_sorts!r}; add secret-log or loggers:secret to it"
    )
    assert (found["bare"]["distribution"], found["bare"]["version"], found["bare"]["status"]) == ("?", "?", "broken")


def test_the_list_as_a_table(all_sorts, command):
    lines = command("plugins").out.splitlines()
    rows = {line.split()[0]: " ".join(line.split()) for line in lines if line.strip()}
    assert rows["stranger"] == "stranger Positive ones; Nobody 2020; from stranger-sparsity 2.1"
    assert rows["jsonl"] == "jsonl log.jsonl in the run folder, with one JSON object per line"  # built in, and loads
    assert rows["broken"].startswith("broken from broken-sparsity 0.9; broken: cannot be loaded from")
    assert "[red]no GPU[/red]" in "".join(lines)
    assert rows["secret"].startswith("secret from secret-log 3; restricted: may not be loaded")
