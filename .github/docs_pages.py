"""Write the pages of the documentation site into a folder: README, notebooks, guides, plugins, the command line.

    python .github/docs_pages.py build/pages

A module's page is its docstring, followed by the API of the public names that it defines or imports. A paragraph that begins
with bold words gets them as its heading. Modules are read, not imported; only the table of plugins asks the registry.
"""

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "saelens_lite"
DOCUMENTS = {
    "README.md": "index.md",
    "AGENTS.md": "agents.md",
    ".github/CONTRIBUTING.md": "contributing.md",
    ".github/CHANGELOG.md": "changelog.md",
}
CSS = """.md-grid {max-width: 78rem}
.md-typeset pre > code {font-size: .78em}
.md-typeset img {border: 1px solid var(--md-default-fg-color--lightest); border-radius: 4px}
.md-typeset td code {white-space: nowrap}
.jupyter-wrapper .jp-RenderedMarkdown .highlight pre {font-size: .68rem}
"""


def modules() -> list[str]:
    """Return the modules that have a page, by the navigation of mkdocs.yml: "cache", "training.step"."""
    nav = yaml.safe_load((ROOT / ".github/mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = (Path(page) for page in _leaves(nav))
    return [page.stem for page in pages if page.suffix == ".md" and source(page.stem).exists()]


def _leaves(nav: Any) -> Iterator[str]:
    """Yield the pages of a navigation tree."""
    if isinstance(nav, str):
        yield nav
    else:
        for child in nav if isinstance(nav, list) else nav.values():
            yield from _leaves(child)


def source(module: str) -> Path:
    """Return the file of a module of the package."""
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_names(module: str) -> list[str]:
    """Return the full names of what a module offers: those of `__all__`, or else the classes and functions it defines."""
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    defined = {n.name: f"saelens_lite.{module}" for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    imported = {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("saelens_lite")
        for alias in node.names
    }
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    ]
    names = listed[0] if listed else [name for name in defined if not name.startswith("_")]
    home = imported | defined
    offered = [f"{home[name]}.{name}" for name in names if name in home]
    return list(dict.fromkeys(offered + _of_the_package(module)))


def _of_the_package(module: str) -> list[str]:
    """Return the full names of what saelens_lite itself offers from the submodules of a package."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(f"{module}.")]
    return [f"saelens_lite.{node.module}.{alias.name}" for node in imports for alias in node.names]


def module_page(module: str, seen: set[str]) -> str:
    """Return the page of a module. Names in `seen` are left out; new ones are added to it."""
    docstring = ast.get_docstring(ast.parse(source(module).read_text(encoding="utf-8")))
    first, _, rest = docstring.partition("\n\n")
    own = [name for name in public_names(module) if name not in seen]
    seen.update(own)
    title = re.fullmatch(r"(.+?)[.:]( .+)?", " ".join(first.split()), flags=re.S)
    heading, more = (title[1], (title[2] or "").strip()) if title else (first, "")
    api = "".join(f"::: {name}\n\n" for name in own)
    rest = re.sub(r"^\*\*([^*\n]+)\.\*\*\s+", r"## \1\n\n", rest, flags=re.M)
    path = source(module).relative_to(ROOT).as_posix()
    return f"# {heading}\n\n{more[:1].upper() + more[1:]}\n\n{rest}\n\n*From `{path}`.*\n\n" + (
        f"## API\n\n{api}" if own else ""
    )


def document(name: str) -> str:
    """Return a Markdown file of the repository with its links to other files turned into links to their pages."""
    text = (ROOT / name).read_text(encoding="utf-8")
    here = (ROOT / name).parent

    def page_of(match: re.Match) -> str:
        file = (here / match[1]).resolve()
        inside = file.relative_to(ROOT).as_posix()
        if inside in DOCUMENTS:
            return f"]({DOCUMENTS[inside]})"
        if file.is_relative_to(PACKAGE):
            parts = file.relative_to(PACKAGE).with_suffix("").parts
            return f"]({'.'.join(part for part in parts if part != '__init__')}.md)"
        return f"]({inside})"

    return re.sub(r"\]\((?!\w+:|#)([^)#]+)\)", page_of, text)


def plugin_table() -> str:
    """Return a Markdown table of the built-in plugins: name, kind, first line of documentation, paper."""
    from saelens_lite import registry

    sys.modules.setdefault("trackio", ModuleType("trackio"))  # only the docstring is read; it does not fit the pinned versions
    rows = [("name", "kind", "what it does", "paper"), ("---", "---", "---", "---")]
    for kind in registry.kinds():
        for plugin in registry.plugins(kind):
            if plugin.distribution == registry.OWN_DISTRIBUTION:
                state = registry.check(plugin)
                if state.status != "ok":
                    sys.exit(f"{plugin} {state.why}")
                rows.append((f"`{plugin.name}`", kind, state.summary.removesuffix("."), state.paper))
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n" for row in rows)


def plugins_page() -> str:
    """Return the page that lists the built-in plugins."""
    docstring = ast.get_docstring(ast.parse((ROOT / "plugins/__init__.py").read_text(encoding="utf-8")))
    return f"# Plugins\n\n{docstring}\n\n{plugin_table()}"


def write(folder: Path) -> None:
    """Write all pages into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("*.html", ".ipynb_checkpoints"))
    pages = {page: document(name) for name, page in DOCUMENTS.items()}
    pages |= {"plugins.md": plugins_page(), "site.css": CSS}
    seen: set[str] = set()
    pages |= {f"{module}.md": module_page(module, seen) for module in modules()}
    for page, text in pages.items():
        (folder / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
