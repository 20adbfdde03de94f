"""The rules of the tree: allowed imports, the cost of importing, and the names that the package offers."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import saelens_lite as sl

ROOT = Path(sl.__file__).parent
PLUGINS = ROOT.parent / "plugins"

# From the bottom up: a module imports only modules that come before it in this list.
# tokens comes before model, because `lm.run("text")` tokenises.
ORDER = [
    "tokens",
    "model",
    "chat",
    "cache",
    "codes",
    "sparsity",
    "rule_options",
    "settings_file",
    "dictionary",
    "formats",
    "releases",
    "find_releases",
    "names",
    "loggers",
    "training",
    "estimator",
    "evaluation",
    "synthesis",
    "features",
    "diffing",
    "interventions",
    "views",
    "hub",
    "addresses",
    "judges",
    "demo",
    "testing",
    "cli",
    "__main__",
]
LEAVES = {
    "arrays",
    "config",
    "cuda_streams",
    "devices",
    "embedded_hooks",
    "errors",
    "files",
    "fingerprints",
    "hub_client",
    "kinds",
    "locks",
    "markdown",
    "outputs",
    "paths",
    "keys",
    "ports",
    "prefetch",
    "processes",
    "progress",
    "registry",
    "resumable",
    "schemas",
    "seeds",
    "tables",
    "tensor_files",
    "terminal",
}  # these import only each other, and every module may import them
# Models need the Hub too, so requests are in hub_client, which is low. hub knows dictionaries, so it is high; it uses the same
# library.
ONLY_IN = {"transformer_lens": ("model",), "huggingface_hub": ("hub_client", "hub"), "openai": ("chat",), "keyring": ("chat",)}
COMPUTED = "(computed)"  # a module whose name is computed when the program runs
DOORS = {
    "saelens_lite",
    "sparsity",
    "codes",
    "formats",
    "features",
    "features.exporters",
    "features.explainers",
    "judges",
    "errors",
}  # the modules that a plugin may import from
HEAVY = [
    *("transformer_lens", "transformers", "datasets", "matplotlib", "scipy", "sklearn", "wandb", "tensorboard", "trackio"),
    *("pyarrow", "duckdb", "anywidget", "openai", "keyring"),
]


def public_names() -> dict[str, str]:
    """Return the module of each public name, from the stub that editors and `__init__.py` read."""
    tree = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or alias.name for node in imports for alias in node.names}


PUBLIC = public_names()


def part_of(path: Path) -> str:
    """Return the part that a file belongs to: its first folder, or its own name."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


class Import(NamedTuple):
    """A module that source code imports by a statement, a string or an attribute of the package."""

    name: str
    at_module_level: bool = True
    for_types_only: bool = False


def imports_in(source: str, package: Sequence[str] = ()) -> list[Import]:
    """Return everything that source code imports. `package` is its dotted name, to which relative imports refer.

    A string that is the name of one of our modules counts too, because tables of such names exist only to import from.
    After `import saelens_lite as sl`, `sl.name` imports the module of that public name.
    """
    tree = ast.parse(source)
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    typing_only = {inner for node in guarded for statement in node.body for inner in ast.walk(statement)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {inner for node in functions for inner in ast.walk(node)}
    imported = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    aliases = {alias.asname or "saelens_lite" for alias in imported if alias.name.split(".")[0] == "saelens_lite"}
    return [
        Import(name, node not in inside, node in typing_only)
        for node in ast.walk(tree)
        for name in names_in(node, aliases, package)
    ]


def names_in(node: ast.AST, aliases: set[str], package: Sequence[str]) -> list[str]:
    """Return the dotted names that one node of a syntax tree imports."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = ".".join(package[: len(package) - node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            return [f"{module}.{alias.name}" for alias in node.names]
        case ast.Attribute(value=ast.Name(id=name)) if name in aliases:
            return [f"saelens_lite.{node.attr}"]
        case ast.Constant(value=str(text)) if re.fullmatch(r"saelens_lite(\.\w+)+", text):
            return [text]
        case ast.Call() if ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            return [] if node.args and isinstance(node.args[0], ast.Constant) else [COMPUTED]
    return []


@cache
def imports_of(path: Path) -> list[Import]:
    """Return everything that a file of the package imports."""
    return imports_in(path.read_text(encoding="utf-8"), module_of(path).split("."))


def module_of(path: Path) -> str:
    """Return the dotted name of a file, including `__init__`, to which relative imports refer."""
    return ".".join(["saelens_lite", *path.relative_to(ROOT).with_suffix("").parts])


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
FILE_IDS = [str(path.relative_to(ROOT)) for path in FILES]


def own_parts(path: Path, module_level_only: bool = False) -> set[str]:
    """Return the parts of saelens_lite that a file imports, other than its own."""
    imports = [one for one in imports_of(path) if not module_level_only or (one.at_module_level and not one.for_types_only)]
    names = [one.name.split(".") for one in imports]
    known = set(ORDER) | LEAVES
    parts = {name[1] for name in names if name[0] == "saelens_lite" and len(name) > 1}
    return {part if part in known else PUBLIC.get(part, part).partition(".")[0] for part in parts} - {part_of(path)}


def test_every_file_belongs_to_a_known_part():
    assert {part_of(path) for path in FILES} <= set(ORDER) | LEAVES


def test_every_package_is_installed():
    packages = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    own = {path.parent.relative_to(ROOT.parent) for path in FILES}
    plugins = {"saelens_lite_plugins" / path.parent.relative_to(PLUGINS) for path in PLUGINS.rglob("*.py")}
    assert sorted(packages) == sorted(".".join(folder.parts) for folder in own | plugins)


def test_every_data_file_is_installed():
    """A wheel has the files that a pattern of a package names, seen from the folder of that package, and no others."""
    folders = {"saelens_lite": ROOT, "saelens_lite_plugins": PLUGINS}
    data = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    installed = set()
    for package, patterns in data.items():
        first, *rest = package.split(".")
        for pattern in patterns:
            files = {path for path in folders[first].joinpath(*rest).glob(pattern) if path.is_file()}
            assert files, f"no file of {package} matches {pattern}"
            installed |= files
    files = {path for folder in folders.values() for path in folder.rglob("*") if path.is_file()}
    assert installed == {path for path in files if path.suffix not in (".py", ".pyc")}


@pytest.mark.parametrize("path", FILES, ids=FILE_IDS)
def test_imports_go_one_way(path):
    part = part_of(path)
    allowed = set() if part in LEAVES else set(ORDER[: ORDER.index(part)])
    assert own_parts(path) <= allowed | LEAVES


def test_no_cycle_at_module_level():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(part_of(path), set()).update(own_parts(path, module_level_only=True))
    done: list[str] = []
    while len(done) < len(graph):
        ready = [part for part, needs in graph.items() if part not in done and needs & graph.keys() <= set(done)]
        assert ready, f"a cycle among {sorted(graph.keys() - set(done))}"
        done += ready


def circles(graph: dict[str, set[str]]) -> set[str]:
    """Return the nodes that can be reached from themselves."""
    reached = {node: set(near) for node, near in graph.items()}
    for middle in graph:
        for near in (near for near in reached.values() if middle in near):
            near.update(reached[middle])
    return {node for node, near in reached.items() if node in near}


def test_files_do_not_import_in_circles():
    """Imports inside functions, by string and for type checkers count too: an annotation also depends on its module."""
    known = {module_of(path).removesuffix(".__init__"): path for path in FILES}

    def file_of(name: str) -> str | None:
        parts = name.split(".")
        if name not in known and len(parts) == 2 and parts[1] in PUBLIC:
            return f"saelens_lite.{PUBLIC[parts[1]]}"
        return next((".".join(parts[:n]) for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in known), None)

    graph = {module: {file_of(one.name) for one in imports_of(path)} - {None, module} for module, path in known.items()}
    assert "saelens_lite.sparsity" in graph["saelens_lite.dictionary"]
    assert circles(graph) == set()


def test_circles_finds_circles():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == {"a", "b", "c"}
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import saelens_lite.hub.upload", "saelens_lite.hub.upload"),
        ("from saelens_lite import hub", "saelens_lite.hub"),
        ("from saelens_lite.hub import push as p", "saelens_lite.hub.push"),
        ("from ..hub import push", "saelens_lite.hub.push"),
        ("def f():\n    from saelens_lite.hub import push", "saelens_lite.hub.push"),
        ("import_module('saelens_lite.hub')", "saelens_lite.hub"),
        ("importlib.import_module('saelens_lite.hub')", "saelens_lite.hub"),
        ("__import__('saelens_lite.hub')", "saelens_lite.hub"),
        ("import_module('saelens_lite.' + name)", COMPUTED),
        ("importlib.import_module(f'saelens_lite.{name}')", COMPUTED),
        ("__import__(name)", COMPUTED),
        ("SCHEMES = {'hf': 'saelens_lite.hub'}\nimport_module(SCHEMES[scheme])", "saelens_lite.hub"),
        ("import saelens_lite as sl\nsl.push(d)", "saelens_lite.push"),
        ("def f():\n    import saelens_lite\n    return saelens_lite.push", "saelens_lite.push"),
        ("import saelens_lite.errors\nsaelens_lite.hub.push(d)", "saelens_lite.hub"),
    ],
)
def test_imports_in_finds_every_way_to_import(source, name):
    assert name in {one.name for one in imports_in(source, ["saelens_lite", "model", "hooks"])}


def test_imports_in_distinguishes_kinds_of_imports():
    source = "import a\ndef f():\n    import b\nif TYPE_CHECKING:\n    import c\n'Of saelens_lite.hub.'\nx.y"
    assert sorted(imports_in(source)) == [Import("a"), Import("b", at_module_level=False), Import("c", for_types_only=True)]


@pytest.mark.parametrize("path", FILES, ids=FILE_IDS)
def test_no_module_is_imported_by_a_computed_name(path):
    """Plugins are loaded through entry points, so no file needs to compute the name of a module."""
    assert COMPUTED not in {one.name for one in imports_of(path)}


@pytest.mark.parametrize("path", FILES, ids=FILE_IDS)
def test_the_core_never_imports_its_plugins(path):
    assert not [one for one in imports_of(path) if one.name.startswith("saelens_lite_plugins")]
    assert "saelens_lite_plugins" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=FILE_IDS)
def test_each_outside_library_is_imported_in_one_place(path):
    for library, homes in ONLY_IN.items():
        if part_of(path) not in homes:
            assert library not in {one.name.split(".")[0] for one in imports_of(path) if not one.for_types_only}


def test_built_in_plugins_import_only_what_other_plugins_may():
    """Nothing private, and nothing of the modules that run plugins."""
    import saelens_lite_plugins

    files = [path for path in Path(saelens_lite_plugins.__file__).parent.rglob("*.py") if path.name != "__init__.py"]
    assert len(files) >= 3
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("saelens_lite"):
                other_plugin = node.module.startswith("saelens_lite_plugins.")
                assert other_plugin or node.module.removeprefix("saelens_lite.") in DOORS, path
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], path


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_no_heavy_library():
    assert (
        in_a_fresh_process(f"import sys, saelens_lite; print([m for m in {[*HEAVY, 'torch']!r} if m in sys.modules])") == "[]"
    )


def test_public_names_and_training_load_no_heavy_library():
    """The base classes of SparseCoder are scikit-learn's, so this one name loads it."""
    code = (
        "import sys, torch, saelens_lite as sl\n"
        "for name in set(sl.__all__) - {'SparseCoder'}: getattr(sl, name)\n"
        "d = sl.fit(torch.eye(4).repeat(5, 1), d_sae=8, batch_size=5, n_tokens=200, options={'k': 1})\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert in_a_fresh_process(code) == "[]"


def test_the_package_offers_these_names():
    assert sl.__all__ == sorted([
        "Ablate", "ActivationCache", "ActivationStream", "Add", "Answer", "ChatConfig", "Clamp", "Dictionary",
        "DiffReport", "EvalReport", "Explainer", "ExplainerConfig", "Exporter", "ExporterConfig", "FeatureStore",
        "Format", "HookCheck", "Judge", "JudgeConfig", "LanguageModel", "LivePrompt", "Logger", "Models", "Origin",
        "PenaltyConfig", "Port", "PublishedForm", "Question", "RuleConfig", "Run", "SaelensLiteError", "Scale",
        "SparseCoder", "SparseCodes", "Sparsity", "StoreConfig", "Synthetic", "SyntheticReport", "TextConfig",
        "TrainConfig", "__version__", "attribute", "capture", "chat_model", "check_hook", "compare", "convert", "diff",
        "dose_response", "errors", "evaluate", "find", "fit", "judge", "labels", "load", "load_model",
        "local_chat_model", "model_for", "probe", "prompt_view", "pull", "push", "python_docs", "register", "resume",
        "stability", "synthetic", "train",
    ])  # fmt: skip
    assert dir(sl) == sl.__all__


@pytest.mark.parametrize("name", sl.__all__)
def test_every_name_resolves(name):
    value = getattr(sl, name)
    assert value == getattr(sl, name)
    if name not in ("__version__", "errors", "labels"):
        assert callable(value)
        assert value.__doc__


def test_a_wrong_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="module 'saelens_lite' has no attribute 'trian'"):
        sl.trian


def test_a_class_name_means_one_thing():
    """No two files of the core define classes of the same public name."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != "Bench":  # each kit has one
                homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
