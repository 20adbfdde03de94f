"""The feature dashboard: a whole feature store as one HTML page that works from a file, without a network.

The page holds its data as compressed columns (see `block`), and the browser unpacks only those that it shows. The template
escapes names in the page's markup. Tokens and labels are only in the blocks and become text nodes. Only the page's own script
and style may run: the Content-Security-Policy lists them by their hashes. Thumbnails are images inside the page's data.
"""

import hashlib
from base64 import b64encode
from importlib.resources import files

from saelens_lite.features.dashboard.block import pack
from saelens_lite.features.dashboard.content import content
from saelens_lite.features.dashboard.models import Diff
from saelens_lite.features.html import visible
from saelens_lite.features.queries import StoreQueries

TEMPLATE, STYLE = "page.html.j2", "page.css"
SCRIPTS = ("data.js", "parts.js", "charts.js", "rows.js", "models.js", "scores.js", "list.js", "latent.js", "page.js")


def render(store: StoreQueries, images: dict[int, str] | None = None, diff: Diff | None = None) -> str:
    """Return the page as HTML. `images` has data URIs of rows, and `diff` is a report of `sl.diff`."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    packed = pack(content(store, images, diff))
    style, script = _source(STYLE), "\n".join(map(_source, SCRIPTS))
    loader = PackageLoader("saelens_lite", "features/dashboard")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["visible"] = visible
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    return environment.get_template(TEMPLATE).render(
        info=store.info,
        l0=f"{int(store.tensors.count.sum()) / store.info.n_tokens:.3g}",
        n_silent=int(store.never_fires.sum()),
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        layout=packed.layout,  # numbers and our own names; the tojson filter escapes each <
        list_block=Markup(packed.list_block),
        details_block=Markup(packed.details_block),
    )


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    """Return the hash by which a Content-Security-Policy names a source."""
    return f"sha256-{b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
