"""Write README's table of the built-in plugins from their docstrings; with --check, only report whether it is up to date.

python scripts/plugin_table.py [--check] [README.md]
"""

import argparse
import re
import sys
from pathlib import Path
from types import ModuleType

from saelens_lite import registry

BETWEEN = re.compile(r"(?<=writes this table -->\n).*?(?=<!-- /plugins -->)", flags=re.S)


def table() -> str:
    """Return a Markdown table: name, kind, first line of documentation, paper."""
    sys.modules.setdefault("trackio", ModuleType("trackio"))  # only the docstring is read; it does not fit our pinned versions
    rows = [("name", "kind", "what it does", "paper"), ("---", "---", "---", "---")]
    for kind in registry.KINDS:
        for plugin in registry.plugins(kind):
            if plugin.distribution == registry.OWN_DISTRIBUTION:
                found = registry.check(plugin)
                if found.status != "ok":
                    sys.exit(f"{plugin} {found.why}")
                rows.append((f"`{plugin.name}`", kind, found.summary.removesuffix("."), found.paper))
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", nargs="?", type=Path, default=Path(__file__).parent.parent / "README.md")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = args.readme.read_text(encoding="utf-8")
    new, n_tables = BETWEEN.subn(lambda _: table(), old)
    if n_tables != 1:
        sys.exit(f"{args.readme} has {n_tables} places for the table; expected one")
    if not args.check:
        args.readme.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit(f"the plugin table of {args.readme} is stale: run python scripts/plugin_table.py")


if __name__ == "__main__":
    main()
