"""Compare the index of public dictionaries with the registry of SAELens: are all its names accepted, for the same files?

    python scripts/comparisons/releases_saelens.py path/to/sae_lens/pretrained_saes.yaml

Prints the share of the registry's releases and dictionaries that the index knows under their own names, with the same
repository and path, and the dictionaries that differ. The exit code is 1 unless the share is 100 %.
"""

import argparse
import sys
from pathlib import Path

import yaml

from saelens_lite.errors import HubNotFoundError
from saelens_lite.releases import entry


def place(name: str) -> tuple[str, str] | None:
    """Return the repository and the path of a dictionary of the index."""
    try:
        one = entry(name)
    except HubNotFoundError:
        return None
    return None if one is None else (one.repo, one.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registry", type=Path)
    registry = yaml.load(parser.parse_args().registry.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    expected = {
        (release, f"{release}/{sae['id']}"): (value["repo_id"], str(sae["path"]))
        for release, value in registry.items()
        for sae in value["saes"]
    }
    different = {key: its for key, its in expected.items() if place(key[1]) != its}
    for (_, name), its in list(different.items())[:20]:
        print(f"{name}: {place(name)} in the index, {its} in the registry")
    n_releases = len({release for release, _ in expected})
    complete = n_releases - len({release for release, _ in different})
    print(f"releases: {complete} of {n_releases} ({complete / n_releases:.2%})")
    same = len(expected) - len(different)
    print(f"dictionaries: {same:,} of {len(expected):,} ({same / len(expected):.2%})")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
