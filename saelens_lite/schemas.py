"""Schemas of files: models that refuse everything else, and one kind of message for errors.

Folders may come from strangers. The schema of a file is a subclass of `Checked`, in the module that writes the file.
`read_checked` reads the file before anything that it describes is allocated, hashed or opened.
"""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from saelens_lite.errors import ConfigError, CorruptFileError, near_matches
from saelens_lite.files import read_json

MAX_COUNT = 2**53  # larger whole numbers are not exact in every tool that reads JSON
MOST_FAULTS = 3  # per message

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Number = Annotated[float, Field(ge=-3.4e38, le=3.4e38)]  # the range of float32
String = Annotated[str, Field(max_length=1 << 16)]


def _plain_name(name: str) -> str:
    """Return the name, or raise if it is not a plain file name on every system."""
    if not 0 < len(name) <= 200 or not name.isprintable() or re.search(r'[/\\:*?"<>|]', name) or name.rstrip(" .") != name:
        raise ValueError("expected the plain name of a file, without a folder")
    return name


PlainName = Annotated[str, AfterValidator(_plain_name)]


class Checked(BaseModel):
    """Base of all schemas: without unknown keys, conversions, NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


Schema = TypeVar("Schema", bound=Checked)


def read_checked(path: Path, schema: type[Schema], limit: int | float | None = None) -> Schema:
    """Read a JSON file and check it against a schema. `limit` is as for `read_json`.

    Raises:
        CorruptFileError: the file cannot be read, or does not fit the schema. The message names the fields.
    """
    return checked(path, read_json(path, limit, finite=True), schema)


def checked(place: str | Path, value: Any, schema: type[Schema]) -> Schema:
    """Check a value that was read at `place` against a schema. Raise CorruptFileError if it does not fit."""
    try:
        return schema.model_validate(value)
    except ConfigError as error:  # from settings inside the file
        raise CorruptFileError(f"{place} is damaged: {error}") from None
    except ValidationError as error:
        raise CorruptFileError(explained(place, schema, error)) from None


def explained(place: str | Path, schema: type[Checked], error: ValidationError) -> str:
    """Return one line with each field that does not fit, its value and the expectation."""
    faults = error.errors(include_url=False)
    for fault in faults:
        if fault["loc"] == ("format",) and "format" in schema.model_fields:
            value = None if fault["type"] == "missing" else fault["input"]
            wanted = fault.get("ctx", {}).get("expected") or schema.model_fields["format"].annotation.__args__[-1]
            return f"{place}: format {value!r:.40}, this version reads {wanted}"
    lines = []
    for fault in faults[:MOST_FAULTS]:
        where = ".".join(str(part)[:80] for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = near_matches(str(fault["loc"][-1])[:80], schema.model_fields)
            lines.append(f"unknown key {where!r}{known}; was it written by another version?")
        elif fault["type"] == "missing":
            lines.append(f"{where!r} is required")
        elif fault["type"] == "value_error":
            prefix = f"{where} = {fault['input']!r:.80}: " if isinstance(fault["input"], str) else f"{where}: " if where else ""
            lines.append(f"{prefix}{fault['ctx']['error']}")
        else:
            lines.append(f"{where} = {fault['input']!r:.80}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
    return f"{place} is damaged: {'; '.join(lines)}{more}"
