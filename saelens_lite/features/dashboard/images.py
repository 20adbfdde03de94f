"""Thumbnails of rows whose names are paths of image files. Only files on this machine are read."""

import logging
import warnings
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saelens_lite.errors import UserError
from saelens_lite.features.queries import StoreQueries
from saelens_lite.features.tensors import NONE
from saelens_lite.progress import progress_bar

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
SIDE = 128  # pixels of the longer side
MAX_TOTAL = 20 << 20  # bytes of all thumbnails of a page
MAX_WHOLE = 32 << 10  # bytes of a file that is embedded as it is, without Pillow
MAX_FILE = 64 << 20  # bytes of a file that is read
MAX_PIXELS = 1 << 26
log = logging.getLogger(__name__)


def is_image(name: str) -> bool:
    """Return whether a name is that of an image file."""
    return name.lower().endswith(SUFFIXES)


def thumbnails(store: StoreQueries, folder: Path | None = None, limit: int = MAX_TOTAL) -> dict[int, str]:
    """Return the thumbnails of rows as data URIs: of the strongest rows of all latents first, until `limit` bytes.

    Rows without a thumbnail are shown by name; a warning says how many these are.

    Args:
        folder: Folder that names are relative to; files outside of it are not read. Default: the current one, and any file.

    Raises:
        UserError: a folder is given, and no image is in it.
    """
    rows = [row for row in _by_rank(store) if is_image(store.vocabulary[row])]
    uris: dict[int, str] = {}
    failed, total = [], 0
    with progress_bar("thumbnails", len(rows), "images") as advance:
        for row in rows:
            advance(1)
            uri = _data_uri(store.vocabulary[row], folder)
            total += len(uri or "")
            if uri is None:
                failed.append(store.vocabulary[row])
            elif total <= limit:
                uris[row] = uri
            else:
                break
    if failed and not uris and folder is not None:
        raise UserError(
            f"none of the {len(failed):,} images can be read, such as {failed[0]!r} in {folder}; is it the right folder?"
        )
    if failed:
        log.warning(
            "%d of %d images cannot be read, such as %r; their rows show the name (check the path; without Pillow, files above "
            "%d KB are not shown)", len(failed), len(rows), failed[0], MAX_WHOLE >> 10,
        )  # fmt: skip
    if total > limit:
        log.warning("the page has room for %d of %d thumbnails; the other rows show the name", len(uris), len(rows))
    return uris


def _by_rank(store: StoreQueries) -> list[int]:
    """Return the rows that the page shows, the strongest of each latent first."""
    t = store.tensors
    places = [t.top_place, t.random_place, t.group_place.flatten(1)]
    if store.rows is not None:
        places.insert(1, store.rows.tensors.distinct_place)
    every = np.concatenate([place.T.flatten().numpy() for place in places])
    return [row for row in dict.fromkeys(every.tolist()) if row != NONE]


def _data_uri(name: str, folder: Path | None) -> str | None:
    """Return the thumbnail of an image, or None if it cannot be read."""
    if name.startswith(("//", "\\\\")):  # a path that some systems look for in the network
        return None
    try:
        path = Path(folder or ".", name)
        if folder is not None and not path.resolve().is_relative_to(folder.resolve()):
            return None
        if not path.is_file() or path.stat().st_size > MAX_FILE:
            return None
        raw = path.read_bytes()
    except (OSError, ValueError):  # also of names that no file can have
        return None
    image = _small(raw)
    return None if image is None else f"data:image/{image[0]};base64,{b64encode(image[1]).decode()}"


def _small(raw: bytes) -> tuple[str, bytes] | None:
    """Return the format and the bytes of a small image: encoded anew by Pillow, or without it, the file itself if small."""
    try:
        from PIL import Image
    except ImportError:
        kind = next((kind for start, kind in SIGNATURES.items() if raw.startswith(start)), None)
        return (kind, raw) if kind is not None and len(raw) <= MAX_WHOLE else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        try:
            with Image.open(BytesIO(raw), formats=("PNG", "JPEG", "GIF", "WEBP")) as image:
                return ("webp", _encoded(image)) if image.width * image.height <= MAX_PIXELS else None
        except Exception as error:  # Pillow raises many types for damaged files
            log.debug("not an image that Pillow reads: %s", error)
            return None


def _encoded(image: "Image.Image") -> bytes:
    """Return an image in at most SIDE pixels each way, upright, without its metadata."""
    from PIL import ImageOps

    if image.mode.startswith(("I", "F")):  # more than 8 bits: from its darkest to its brightest pixel
        image = image.convert("F")
        low, high = image.getextrema()
        image = image.point(lambda x: x * (255 / ((high - low) or 1)) + (-low * 255 / ((high - low) or 1))).convert("L")
    elif image.mode not in ("RGB", "RGBA", "L"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    shrinks = max(image.size) > SIDE
    image.thumbnail((SIDE, SIDE))
    small, written = ImageOps.exif_transpose(image), BytesIO()
    small.save(written, "WEBP", quality=80, method=2, lossless=not shrinks, exif=b"")
    return written.getvalue()
