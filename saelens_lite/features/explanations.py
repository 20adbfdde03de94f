"""Neuronpedia's explanation files: lines of JSON, often gzipped, each with a text about one latent.

A public source of Neuronpedia, such as gpt2-small/8-res-jb, has them as explanations/batch-0.jsonl.gz, … in an S3 bucket. The
files may come from strangers: lines, the whole text and the files are limited in size, and nothing is unpacked beyond that.
"""

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from saelens_lite.errors import ConfigError, CorruptFileError, HubNotFoundError
from saelens_lite.files import MAX_LINE_BYTES, named_file, open_file
from saelens_lite.hub_client.web import bucket_files, web_files

BUCKET = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
FILE = r"batch-\d{1,18}\.jsonl(\.gz)?"
BYTES_PER_LATENT, LEAST_BYTES = 64 << 10, 64 << 20  # of text, most of which are embeddings; together the limit of all files
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PAGE = re.compile(r"https?://(?:www\.)?neuronpedia\.org/([\w.-]+/[\w.-]+)(?:/\d+)?/?")
_Short = Annotated[str, Field(max_length=1000)] | None


class _Author(BaseModel):
    name: _Short = None


class _Line(BaseModel):
    """The keys of a line that are read; embeddings and others are not."""

    index: Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")] | Annotated[int, Field(ge=0, strict=True)]
    description: str | None
    modelId: _Short = None
    layer: _Short = None
    typeName: _Short = None
    explanationModelName: _Short = None
    author: _Author | str | None = None
    authorName: _Short = None
    createdAt: _Short = None


class Explanation(NamedTuple):
    """An explanation of a latent; `source` is Neuronpedia's model and source, such as gpt2-small/8-res-jb, or empty."""

    latent: int
    text: str
    source: str
    author: str
    created: datetime | None


def neuronpedia_id(text: str | None) -> str | None:
    """Return the model and source in an id or in the address of a page of neuronpedia.org, None if it is neither."""
    page = _PAGE.fullmatch(text or "")
    name = page[1] if page else text
    return name if name and _ID.fullmatch(name) and ".." not in name else None


def read_explanations(place: str | Path, d_sae: int) -> Iterator[Explanation]:
    """Yield the explanations of a dictionary's latents that are in a file or folder, at a URL, or of a Neuronpedia id.

    Raises:
        CorruptFileError: a file is missing, damaged or too large.
        ConfigError: an explanation is of a latent that the dictionary lacks; the place is none of these.
        HubError: as for `web_files`.
    """
    left = LEAST_BYTES + d_sae * BYTES_PER_LATENT
    for name, content in _files(place):
        with content:
            for number, line in enumerate(_lines(name, content, left), 1):
                left -= len(line)
                if line.strip():
                    yield from _explanation(f"{name}, line {number}", line, d_sae)


def _files(place: str | Path) -> Iterator[tuple[str, BufferedReader]]:
    """Yield the name and the content of each file at a place."""
    name = neuronpedia_id(str(place))
    if re.match("https?://", str(place)) and not name:
        place = re.sub(r"/index\.html\?prefix=", "/", str(place))
        yield from _fetched([place] if re.search(r"\.jsonl(\.gz)?$", place) else _of_bucket(place))
    elif os.path.exists(place) or not name or isinstance(place, Path):
        for path in _local(named_file(place)):
            yield str(path), open_file(path)
    else:
        yield from _fetched(_of_bucket(f"{BUCKET}/v1/{name}/explanations/"))


def _fetched(urls: list[str]) -> Iterator[tuple[str, BufferedReader]]:
    for url, content in zip(urls, web_files(urls), strict=True):
        yield url, BufferedReader(BytesIO(content))


def _of_bucket(url: str) -> list[str]:
    """Return the URLs of the explanation files in a folder of a bucket, or in its folder explanations/."""
    urls = bucket_files(url, rf"(explanations/)?{FILE}")
    if not urls:
        raise HubNotFoundError(f"no files of explanations at {url}; see {BUCKET}/index.html?prefix=v1/ for those that exist")
    return sorted(urls, key=_number)


def _local(path: Path) -> list[Path]:
    """Return the explanation files of a folder, or a file itself."""
    if not path.is_dir():
        return [path]
    files = [file for folder in (path, path / "explanations") for file in folder.glob("*") if re.fullmatch(FILE, file.name)]
    if not files:
        raise CorruptFileError(f"{path} has no files of explanations; expected batch-0.jsonl.gz, …")
    return sorted(files, key=lambda file: _number(file.name))


def _number(name: str) -> int:
    return int(re.search(r"batch-(\d+)\.", name)[1])


def _lines(name: str, content: BufferedReader, most: int) -> Iterator[bytes]:
    """Yield the lines of a file of at most `most` bytes, unpacked as they are read if they are gzipped."""
    file = gzip.GzipFile(fileobj=content) if content.peek(2)[:2] == b"\x1f\x8b" else content
    try:
        while line := file.readline(MAX_LINE_BYTES + 1):
            most -= len(line)
            if len(line) > MAX_LINE_BYTES or most < 0:
                raise CorruptFileError(f"{name} holds more text than explanations of these latents can have")
            yield line
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptFileError(f"{name} is damaged: {error}; fetch it again") from None


def _explanation(place: str, line: bytes, d_sae: int) -> Iterator[Explanation]:
    """Yield the explanation in a line, if its text is not empty."""
    try:
        one = _Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        raise CorruptFileError(
            f"{place} is not an explanation of Neuronpedia: {where and where + ': '}{first['msg'][:200]}"
        ) from None
    latent, text = int(one.index), " ".join((one.description or "").split())
    if latent >= d_sae:
        raise ConfigError(f"{place} explains latent {latent}; this dictionary has latents 0 to {d_sae - 1}. Is it of this one?")
    if text:
        source = "/".join(part for part in (one.modelId, one.layer) if part)
        yield Explanation(latent, text, source, _author(one), _time(one.createdAt))


def _author(one: _Line) -> str:
    """Return the model that wrote an explanation, with the method, or else the person."""
    if one.explanationModelName:
        return one.explanationModelName + (f" ({one.typeName})" if one.typeName else "")
    person = one.author.name if isinstance(one.author, _Author) else one.author
    return one.authorName or person or one.typeName or ""


def _time(text: str | None) -> datetime | None:
    """Return a date, or None if it is missing or not a date."""
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
