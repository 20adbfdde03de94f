"""The rules of the tree: who may import whom, what importing costs, and which names the package offers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saelens_lite as sl

ROOT = Path(sl.__file__).parent

# From the bottom up: a module imports only modules that stand before it in this list.
# The order is DESIGN.md's table, except that tokens stands before model, because `lm.run("text")` has to tokenise.
ORDER = [
    "tokens",
    "model",
    "cache",
    "codes",
    "sparsity",
    "dictionary",
    "formats",
    "loggers",
    "training",
    "evaluation",
    "features",
    "interventions",
    "views",
    "hub",
    "adapters",
    "demo",
    "testing",
    "cli",
]
LEAVES = {
    "arrays",
    "config",
    "devices",
    "errors",
    "files",
    "format_detection",
    "kinds",
    "locks",
    "markdown",
    "outputs",
    "paths",
    "places",
    "ports",
    "prefetch",
    "progress",
    "registry",
    "resumable",
    "schemas",
    "state_dicts",
    "terminal",
}  # import nothing of ours but each other; everyone may import them
ONLY_IN = {"transformer_lens": "model", "huggingface_hub": "hub"}
DOORS = {"saelens_lite", "sparsity", "codes", "formats", "errors"}  # what a plugin may import from
HEAVY = [
    *("transformer_lens", "transformers", "datasets", "matplotlib", "scipy", "sklearn", "wandb", "tensorboard", "trackio"),
    *("pyarrow", "duckdb", "anywidget"),
]


def public_names() -> dict[str, str]:
    """Return the module of each public name, by the stub that editors and `__init__.py` read."""
    tree = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or alias.name for node in imports for alias in node.names}


PUBLIC = public_names()


def part_of(path: Path) -> str:
    """Return the row of the table a file belongs to: its first folder, or its own name."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def type_checking_blocks(tree: ast.AST) -> set[ast.AST]:
    """Return all nodes that only a type checker sees."""
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {inner for node in guarded for statement in node.body for inner in ast.walk(statement)}


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Return (dotted name, whether at module level) of everything that a file imports at run time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = type_checking_blocks(tree)
    in_functions = {
        inner for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for inner in ast.walk(node)
    }
    package = ["saelens_lite", *path.relative_to(ROOT).with_suffix("").parts]
    found = []
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in in_functions) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            found += [(f"{module}.{alias.name}", node not in in_functions) for alias in node.names]
    return found


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
FILE_IDS = [str(path.relative_to(ROOT)) for path in FILES]


def own_parts(path: Path, module_level_only: bool = False) -> set[str]:
    """Return the parts of saelens_lite that a file imports, other than its own."""
    names = [name.split(".") for name, top in imports_of(path) if top or not module_level_only]
    known = set(ORDER) | LEAVES
    parts = {name[1] for name in names if name[0] == "saelens_lite" and len(name) > 1}
    return {part if part in known else PUBLIC.get(part, part).partition(".")[0] for part in parts} - {part_of(path)}


def test_every_file_has_its_place():
    assert {part_of(path) for path in FILES} <= set(ORDER) | LEAVES


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


@pytest.mark.parametrize("path", FILES, ids=FILE_IDS)
def test_the_core_never_imports_its_plugins(path):
    assert not [name for name, _ in imports_of(path) if name.startswith("saelens_lite_plugins")]
    assert "saelens_lite_plugins" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=FILE_IDS)
def test_each_outside_library_has_one_home(path):
    for library, home in ONLY_IN.items():
        if part_of(path) != home:
            assert library not in {name.split(".")[0] for name, _ in imports_of(path)}


def test_plugins_use_the_strangers_door():
    """A built-in plugin imports what a stranger's may: nothing private, and nothing of the modules that run it."""
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


def test_importing_the_package_costs_nothing():
    assert (
        in_a_fresh_process(f"import sys, saelens_lite; print([m for m in {[*HEAVY, 'torch']!r} if m in sys.modules])") == "[]"
    )


def test_the_names_and_training_load_no_heavy_library():
    code = (
        "import sys, torch, saelens_lite as sl\n"
        "for name in sl.__all__: getattr(sl, name)\n"
        "d = sl.fit(torch.eye(4).repeat(5, 1), d_sae=8, batch_size=5, options={'k': 1})\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert in_a_fresh_process(code) == "[]"


def test_the_package_offers_these_names():
    assert sl.__all__ == sorted([
        "Ablate", "ActivationCache", "ActivationStream", "Add", "Clamp", "Dictionary", "EvalReport", "FeatureStore", "Format",
        "LanguageModel", "LivePrompt", "Logger", "Origin", "Port", "PublishedForm", "RuleConfig", "SaelensLiteError", "Scale",
        "SparseCodes", "Sparsity", "TextConfig", "TrainConfig", "__version__", "adapters", "attribute", "capture", "compare",
        "convert", "dose_response", "errors", "evaluate", "fit", "load_model", "probe", "prompt_view", "pull", "push",
        "python_docs", "register", "resume", "stability", "train",
    ])  # fmt: skip
    assert dir(sl) == sl.__all__


@pytest.mark.parametrize("name", sl.__all__)
def test_every_name_resolves(name):
    value = getattr(sl, name)
    assert value == getattr(sl, name)
    if name not in ("__version__", "adapters", "errors"):
        assert callable(value)
        assert value.__doc__


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="module 'saelens_lite' has no attribute 'trian'"):
        sl.trian
