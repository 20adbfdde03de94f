"""Settings files of other tools, read key by key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelens_lite.errors import CorruptFileError
from saelens_lite.files import read_json

MAX_LATENTS = 2**31 - 1


class Settings:
    """An untrusted settings file, read key by key. Values that are missing or of another type raise CorruptFileError."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """Return the settings in a JSON file."""
        return cls(path, read_json(path))

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a string, or the default if the key is absent or null."""
        return self._of_type(key, (str,), default)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a boolean, or the default if the key is absent or null."""
        return self._of_type(key, (bool,), default)

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number ≥ 0. Without a default, the key is required."""
        value = self._of_type(key, (int,), default)
        if value is None or not 0 <= value <= MAX_LATENTS:
            raise CorruptFileError(f"{self.path}: {key} = {value!r}; expected a whole number ≥ 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number. Without a default, the key is required."""
        value = self._of_type(key, (int, float), default)
        if value is None or not abs(value) < 1e30:
            raise CorruptFileError(f"{self.path}: {key} = {value!r}; expected a number")
        return float(value)

    def part(self, key: str) -> "Settings":
        """Return the settings under a key; empty if the key is absent."""
        return Settings(self.path, self._of_type(key, (dict,), {}))

    def sizes(self, **keys: str) -> dict[str, int]:
        """Return the whole numbers under the keys that are present, by our names: sizes(d_in="activation_dim")."""
        return {ours: self.whole(theirs) for ours, theirs in keys.items() if theirs in self}

    def _of_type(self, key: str, types: tuple[type, ...], default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(t.__name__ for t in types)
            raise CorruptFileError(f"{self.path}: {key} is {str(value)[:80]!r}; expected {wanted}")
        return value
