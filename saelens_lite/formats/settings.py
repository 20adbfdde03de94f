"""Settings files of other tools, read key by key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelens_lite.errors import CorruptFileError
from saelens_lite.files import read_json

MAX_LATENTS = 2**31 - 1


class Settings:
    """A settings file of a stranger, read key by key: what is missing or of another type is a CorruptFileError."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """The settings in a JSON file."""
        return cls(path, read_json(path))

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string, or the default where the key is absent or null."""
        return self._of_type(key, (str,), default)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        return self._of_type(key, (bool,), default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number ≥ 0; without a default the key is required."""
        value = self._of_type(key, (int,), default)
        if value is None or not 0 <= value <= MAX_LATENTS:
            raise CorruptFileError(f"{self.path}: {key} = {value!r}; expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._of_type(key, (int, float), default)
        if value is None or not abs(value) < 1e30:
            raise CorruptFileError(f"{self.path}: {key} = {value!r}; expected a number")
        return float(value)

    def part(self, key: str) -> "Settings":
        """The settings under a key; none where it is absent."""
        return Settings(self.path, self._of_type(key, (dict,), {}))

    def _of_type(self, key: str, types: tuple[type, ...], default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(t.__name__ for t in types)
            raise CorruptFileError(f"{self.path}: {key} is {str(value)[:80]!r}; expected {wanted}")
        return value
