"""The base class of file formats."""

from pathlib import Path
from typing import ClassVar

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.formats.known import Known
from saelens_lite.formats.outline import Outline


class Format:
    """Base class of all formats. A write-only format leaves out `outline`; a read-only format leaves out `write`."""

    plugin_kind: ClassVar[str] = "formats"
    plugin_name: ClassVar[str]  # set by the registry
    pickled: ClassVar[bool] = False  # its files are pickles, which are read only if the format is requested by name
    keeps_models: ClassVar[bool] = False  # it can say which models the activations are of, or which are subtracted
    folders: ClassVar[bool] = False  # it reads folders, not single files
    architectures: ClassVar[frozenset[str]] = frozenset()  # names in cfg.json that its tool can load
    files: ClassVar[tuple[str, ...]] = ()  # patterns of the files that a folder must have, for error messages

    def detect(self, path: Path) -> bool:
        """Return whether a file or folder has this format, judged by its content. Never raise or unpickle."""
        return False

    def outline(self, path: Path) -> Outline:
        """Return a description of the dictionary in the files, without reading its weights.

        Raises:
            CorruptFileError: the files are damaged or contradict each other.
            ConfigError: the dictionary cannot be represented here; the message says what would be lost.
        """
        raise ConfigError(f"{self.plugin_name} files can be written, not read")

    def read(self, path: Path, known: Known | None = None) -> Dictionary:
        """Return the dictionary in a file or folder. Raise as `outline` does.

        Args:
            known: Facts that the files may not state, if the dictionary is in the list of public releases.
        """
        outline = self.outline(path)
        return (outline.knowing(known) if known else outline).build(self.plugin_name)

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """Write the files of a dictionary into an empty folder.

        Raises:
            ConfigError: the format cannot hold something that changes the numbers.
        """
        raise ConfigError(f"{self.plugin_name} files can be read, not written")
