"""The base class of file formats."""

from pathlib import Path
from typing import ClassVar

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.formats.outline import Outline


class Format:
    """Base of all formats. One that only writes leaves out `outline`, one that only reads leaves out `write`."""

    plugin_kind: ClassVar[str] = "formats"
    plugin_name: ClassVar[str]  # set by the registry
    pickled: ClassVar[bool] = False  # its files are pickles: they are read only where the format is asked for by name
    folders: ClassVar[bool] = False  # it reads folders, not single files
    architectures: ClassVar[frozenset[str]] = frozenset()  # names in cfg.json that its tool can load
    files: ClassVar[tuple[str, ...]] = ()  # patterns of the files that have to lie together in a folder, for error messages

    def detect(self, path: Path) -> bool:
        """Whether a file or folder is of this format, judged by what it holds. Never raises, never unpickles."""
        return False

    def outline(self, path: Path) -> Outline:
        """What the files say before any weight is read.

        Raises:
            CorruptFileError: they are damaged or contradict each other.
            ConfigError: what they hold cannot be represented here; the message says what would be lost.
        """
        raise ConfigError(f"{self.plugin_name} files can be written, not read")

    def read(self, path: Path) -> Dictionary:
        """The dictionary in a file or folder; raises what `outline` raises."""
        return self.outline(path).build(self.plugin_name)

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """Fill an empty folder with the files of a dictionary.

        Raises:
            ConfigError: the format has no place for something that would change the numbers.
        """
        raise ConfigError(f"{self.plugin_name} files can be read, not written")
