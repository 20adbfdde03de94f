"""Export a feature store: the contract of an exporter, which writes a store for another tool.

    class CsvOptions(ExporterConfig):
        separator: str = Field(",", description="Character between two cells.")

    @register("csv")
    class Csv(Exporter):
        "A table with one line for each latent."

        Config = CsvOptions

        def write(self, store, dictionary, folder):
            rows = [["latent", "label", "density"]]
            rows += [[i, store.labels.get(i, ""), float(density)] for i, density in enumerate(store.density)]
            lines = (self.config.separator.join(map(str, row)) + "\\n" for row in rows)
            (folder / "latents.csv").write_text("".join(lines), encoding="utf-8")

    store.export("csv", "out/", separator=";")

A package names the class in the entry-point group `saelens_lite.exporters`. A store has methods that answer questions
(`top_examples`, `promoted`, `partners`, …), and its numbers are in `store.info`, `store.tensors` and `store.weights`.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from saelens_lite import registry
from saelens_lite.config import FrozenConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.features.queries import StoreQueries
from saelens_lite.kinds import Kind
from saelens_lite.outputs import new_folder
from saelens_lite.progress import progress_bar
from saelens_lite.tokens.display import PART

__all__ = ["PART", "Exporter", "ExporterConfig", "export", "progress_bar"]


class ExporterConfig(FrozenConfig):
    """Base of an exporter's options."""


class Exporter:
    """Base of all exporters. One object makes one export, with the options in `config`."""

    plugin_kind: ClassVar[str] = "exporters"
    plugin_name: ClassVar[str]  # set by the registry
    Config: ClassVar[type[ExporterConfig]] = ExporterConfig
    files: ClassVar[tuple[str, ...]] = ()  # regular expressions of paths in the folder, for names that differ between exports

    def __init__(self, config: ExporterConfig):
        self.config = config

    def subfolder(self, store: StoreQueries) -> str:
        """Return the subfolder for the files in the folder that the user names. Do all checks that need no writing."""
        return "."

    def write(self, store: StoreQueries, dictionary: Dictionary | None, folder: Path) -> None:
        """Fill an empty folder. The export appears when this returns, and not at all if it raises.

        Args:
            dictionary: the dictionary of the store, if the user gave it.
            folder: a temporary folder; its name has no meaning.

        Raises:
            ConfigError: the tool's format cannot hold a part of the store.
        """
        raise NotImplementedError(f"{type(self).__name__} must define write(store, dictionary, folder)")


def export(
    store: StoreQueries,
    name: str,
    folder: str | Path,
    *,
    dictionary: Dictionary | None = None,
    exists: Literal["error", "overwrite"] = "error",
    **options: Any,
) -> Path:
    """Write a store with the exporter of that name, and return its folder; see `FeatureStore.export`."""
    exporter_class = registry.load(name, "exporters")
    exporter = exporter_class(exporter_class.Config(**options))
    if dictionary is not None:
        store.info.check_dictionary(dictionary)
    out = Path(folder) / exporter.subfolder(store)
    with new_folder(out, Kind(f"{name} export", exporter.files, ()), exists, any_format=True) as new:
        exporter.write(store, dictionary, new)
    return out
