"""The options of sparsity rules. They are read from a rule's source where that is possible, because importing it imports torch.

`config_of` runs only the class `Config` of a rule and the classes that it derives from. If these use anything other than the
standard library, pydantic and our own settings, the rule is imported after all.
"""

import ast
import builtins
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from saelens_lite import registry
from saelens_lite.config import FrozenConfig
from saelens_lite.errors import ConfigError

LIGHT = {*sys.stdlib_module_names, "annotated_types", "pydantic", "pydantic_core", "typing_extensions"}
OURS = {"saelens_lite.config", "saelens_lite.errors"}
STUB = Path(__file__).with_name("__init__.pyi")
ROOT = ("saelens_lite.sparsity", "Sparsity")  # the class that all rules derive from
KEPT = ("Config", "paper")  # what is read of a rule, beside its docstring


class Option(NamedTuple):
    """An option of a rule, as text for a table."""

    name: str
    type: str
    default: str
    meaning: str


class _NotPlain(Exception):
    """The source needs more than is read here."""


def rule_of(plugin: registry.Plugin) -> Any:
    """Return the class of a rule, or a class with its `Config`, `paper` and docstring alone if that spares the import of torch.

    Raises:
        PluginError: see `registry.load`.
    """
    if plugin.allowed and plugin.entry_point is not None and "torch" not in sys.modules:
        try:
            return read_rule(plugin.target)
        except Exception:  # source that this module does not understand, or with an error: the import reports it
            pass
    return registry.load(plugin.name)


def config_of(name: str) -> type[FrozenConfig]:
    """Return the class of a rule's options. Raise PluginError as `registry.load` does."""
    return rule_of(registry.find(name)).Config


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise ConfigError if a rule does not take these options, and PluginError if there is no such rule."""
    config = config_of(name)
    try:
        config(**options)
    except ConfigError:
        raise
    except Exception:  # a check of its values that needs more than is read here
        registry.load(name).Config(**options)


def options_of(config: type[FrozenConfig]) -> list[Option]:
    """Return the options of a rule as text."""
    return [
        Option(name, _type(field), "required" if field.is_required() else text_of(field.default), field.description or "")
        for name, field in config.model_fields.items()
    ]


def text_of(value: Any) -> str:
    """Return a value in a short form for tables."""
    if isinstance(value, tuple | list):
        return " ".join(map(text_of, value))
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _type(field: Any) -> str:
    """Return a field's type and bounds, such as «float ≥ 0»."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [f"{sign} {getattr(m, side):g}" for m in field.metadata for side, sign in signs.items() if hasattr(m, side)]
    name, *others = _name(field.annotation).split(" | ") if get_origin(field.annotation) is not Literal else [""]
    return " | ".join([" ".join([name, ", ".join(bounds)]).strip() or _name(field.annotation), *others])


def _name(annotation: Any) -> str:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, arguments))
    if get_origin(annotation) is tuple:
        return f"{_name(arguments[0])}s" if arguments[-1] is ... else " ".join(map(_name, arguments))
    if type(None) in arguments:
        return " | ".join([*(_name(inner) for inner in arguments if inner is not type(None)), "none"])
    return getattr(annotation, "__name__", str(annotation))


def read_rule(target: str) -> Any:
    """Return a class with the `Config`, `paper` and docstring of the rule at «module:class», without importing the module.

    Raises:
        Exception: of any kind, if the source is missing, damaged or not plain.
    """
    module, _, name = target.partition(":")
    rule = _source(module).rule(name)
    if not rule.Config.__pydantic_complete__:
        raise _NotPlain(f"{target}: types that are not known here")
    return rule


@cache
def _source(module: str) -> "_Source":
    return _Source(module)


class _Source:
    """The source of a module, whose names are evaluated one by one, and only if they are plain."""

    def __init__(self, module: str):
        self.module = module
        self.names: dict[str, tuple[ast.AST, str]] = {}  # of the top level: the statement, and the name in it
        for node in ast.parse(_file_of(module).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.names[node.name] = node, node.name
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self.names[node.targets[0].id] = node, node.targets[0].id
            elif isinstance(node, ast.Import | ast.ImportFrom):
                if getattr(node, "module", None) == "__future__":
                    raise _NotPlain(f"{module}: other meaning of annotations")
                self.names |= {a.asname or a.name.partition(".")[0]: (node, a.name) for a in node.names}

    def rule(self, name: str) -> Any:
        """Return a rule with the names in KEPT and its docstring alone."""
        node, name = self.names[name]
        if isinstance(node, ast.ImportFrom):
            return self._other(node).rule(name)
        if not isinstance(node, ast.ClassDef):
            raise _NotPlain(f"{name} is not a class")
        body = [statement for statement in node.body if not KEPT_NAMES.isdisjoint(_defined(statement))]
        is_root = (self.module, node.name) == ROOT
        kept = ast.ClassDef(
            name=node.name, bases=[] if is_root else node.bases, keywords=[], body=body or [ast.Pass()], decorator_list=[],
            type_params=[],
        )  # fmt: skip
        rule = self._run(ast.copy_location(kept, node), node.name)
        rule.__doc__ = ast.get_docstring(node)
        return rule

    def value(self, name: str) -> Any:
        """Return the value of a name of the module."""
        node, original = self.names[name]
        if isinstance(node, ast.Import):
            if _is_light(original):
                return self._run(node, name)
            if original == STUB.parent.name:
                return _Attributes(original)
            raise _NotPlain(f"{self.module} uses {original}")
        if isinstance(node, ast.ImportFrom):
            if node.level == 0 and _is_light(node.module or ""):
                return self._run(node, name)
            return self._other(node).value(original)
        if isinstance(node, ast.ClassDef) and any("Config" in _defined(statement) for statement in node.body):
            return self.rule(name)
        return self._run(node, original)

    def _other(self, node: ast.ImportFrom) -> "_Source":
        if node.level > 1 or not node.module:
            raise _NotPlain(f"relative import in {self.module}")
        inside = self.module if _file_of(self.module).stem == "__init__" else self.module.rpartition(".")[0]
        return _source(f"{inside}.{node.module}" if node.level else node.module)

    def _run(self, node: Any, name: str) -> Any:
        """Run one statement with the names that it uses, and return the value that it gives to `name`."""
        inner = list(ast.walk(node))
        used = {n.id for n in inner if isinstance(n, ast.Name)}
        own = {n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {n.arg for n in inner if isinstance(n, ast.arg)} | {n.name for n in inner if isinstance(n, ast.FunctionDef)}
        values = {
            used_name: self.value(used_name)
            for used_name in used - own
            if used_name in self.names or not hasattr(builtins, used_name)
        }
        namespace = {**values, "__name__": self.module}
        exec(compile(ast.Module([ast.fix_missing_locations(node)], []), f"<{self.module}>", "exec"), namespace)
        return namespace[name]


class _Attributes:
    """A module that is not imported. Its names are read from its source."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return _source(self._module).value(name)


KEPT_NAMES = set(KEPT)


def _defined(statement: ast.AST) -> set[str]:
    """Return the names that a statement of a class defines."""
    if isinstance(statement, ast.ClassDef):
        return {statement.name}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _is_light(module: str) -> bool:
    return module in OURS or module.partition(".")[0] in LIGHT


def _file_of(module: str) -> Path:
    """Return the source file of a module without importing anything. For this package, that is its stub."""
    top, *inner = module.split(".")
    spec = find_spec(top)
    if spec is None:
        raise _NotPlain(f"no module {module}")
    if not inner:
        return STUB if module == STUB.parent.name else Path(spec.origin or "")
    for place in spec.submodule_search_locations or ():
        path = Path(place, *inner)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    raise _NotPlain(f"no source of {module}")
