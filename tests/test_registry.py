"""Plugins by name: built-in, of other distributions (real metadata on the path), and of this session."""

import sys

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import PluginError
from saelens_lite.sparsity import registry


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """distribution(name, version, entry points) puts an installed package's metadata on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, version: str, points: dict[str, str], kind: str = "sparsity") -> None:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = "".join(f"{plugin} = {target}\n" for plugin, target in points.items())
        (info / "entry_points.txt").write_text(f"[saelens_lite.{kind}]\n{lines}")

    return install


@pytest.fixture
def relu():
    """A rule registered for the length of a test."""

    @sl.register("relu")
    class Relu(sl.Sparsity):
        def activation(self, pre):
            return pre.relu()

    yield Relu
    registry.unregister("relu")


def test_built_in_rules_come_by_entry_points():
    assert {"gated", "l1", "topk"} <= set(registry.names())
    assert registry.names() == sorted(registry.names())
    found = {plugin.name: plugin for plugin in registry.plugins()}
    assert found["topk"].target == "saelens_lite_plugins.sparsity.topk:TopK"
    assert {plugin.distribution for plugin in found.values()} == {"saelens-lite"}
    assert {plugin.version for plugin in found.values()} == {sl.__version__}


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
    d = sl.Dictionary.create("relu", d_in=4, d_sae=6)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(d.encode(x).to_dense(), torch.relu(x @ d.W_enc))
    trained = sl.fit(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), "relu", d_sae=6, batch_size=16)
    assert type(trained.rule) is relu
    registry.unregister("relu")
    assert "relu" not in registry.names()
    with pytest.raises(PluginError, match="no sparsity plugin is called 'relu'"):
        registry.load("relu")
    registry.unregister("relu")


def test_registering_again_replaces_ones_own(relu):
    @sl.register("relu")
    class Other(sl.Sparsity):
        pass

    assert registry.load("relu") is Other
    assert [plugin.name for plugin in registry.plugins()].count("relu") == 1


def test_a_built_in_name_cannot_be_registered():
    with pytest.raises(PluginError, match="sparsity plugin 'topk' is already supplied by saelens-lite"):
        sl.register("topk")


def test_kinds_are_kept_apart(relu):
    assert "relu" not in registry.names("formats")
    with pytest.raises(PluginError, match=r"unknown kind of plugin 'rules'; kinds are sparsity, formats, loggers"):
        sl.register("x", kind="rules")


def test_an_unknown_name_lists_near_matches():
    with pytest.raises(PluginError, match=r"no sparsity plugin is called 'top_k'; did you mean topk\?$"):
        registry.load("top_k")
    with pytest.raises(PluginError, match=f"no sparsity plugin is called 'zzz'; known: {', '.join(registry.names())}$"):
        registry.load("zzz")


def test_who_wrote_it_is_named():
    with pytest.raises(
        PluginError, match=r"'top_k'; did you mean topk\?; the file was written with top-k-sae 0\.3, which supplies it"
    ):
        registry.load("top_k", written_by="top-k-sae 0.3")


def test_another_distributions_rule_is_loaded_when_asked_for(distribution, tmp_path):
    (tmp_path / "stranger_of_tests.py").write_text(
        "import saelens_lite as sl\n\nclass Rule(sl.Sparsity):\n    def activation(self, pre):\n        return pre.relu()\n"
    )
    distribution("stranger-sparsity", "2.1", {"stranger": "stranger_of_tests:Rule"})
    try:
        assert "stranger" in registry.names()
        found = registry.find("stranger")
        assert (found.distribution, found.version, found.target) == ("stranger-sparsity", "2.1", "stranger_of_tests:Rule")
        assert "stranger_of_tests" not in sys.modules
        d = sl.Dictionary.create("stranger", d_in=4, d_sae=6)
        assert type(d.rule).__module__ == "stranger_of_tests"
        d.save(tmp_path / "d")
        assert '"stranger-sparsity 2.1"' in (tmp_path / "d" / "cfg.json").read_text()
    finally:
        sys.modules.pop("stranger_of_tests", None)


def test_a_name_claimed_twice_names_both(distribution):
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
        ("x = 1", "AttributeError: module 'broken_of_tests' has no attribute 'Rule'"),
    ],
)
def test_a_broken_plugin_fails_only_when_asked_for(distribution, tmp_path, source, cause):
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
