"""The figures of a card, as PNG files of the same bytes for the same numbers; none where matplotlib is not installed."""

import io
import json
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

MAX_LOG_BYTES = 64 << 20
CURVES = {"FVU": ("fvu", "val_fvu"), "L0": ("l0", "val_l0")}


def density_plot(density: Float[Tensor, " d_sae"] | None) -> bytes | None:
    """Return a histogram of how often latents fire, log10; None without densities or matplotlib."""
    if density is None or not (density > 0).any():
        return None
    alive = density[density > 0].double().log10().tolist()

    def draw(axes: "Axes") -> None:
        axes.hist(alive, bins=50, range=(-8, 0), color="tab:blue")
        axes.set(xlabel="log10 of the share of tokens a latent fires on", ylabel="latents", yscale="symlog")
        axes.set_title(f"{len(alive):,} of {len(density):,} latents fire", fontsize=10)

    return _png(draw)


def log_plot(log: Path) -> bytes | None:
    """What the log of a run says of error and sparsity, over tokens; None without a readable log or matplotlib."""
    lines = _log_lines(log)

    def points(name: str) -> list[tuple[float, float]]:
        return [(float(line["tokens"]), float(line[name])) for line in lines if _drawable(line, name)]

    curves = {title: {name: found for name in names if len(found := points(name)) > 1} for title, names in CURVES.items()}
    curves = {title: named for title, named in curves.items() if named}
    if not curves:
        return None

    def draw(*panels: "Axes") -> None:
        for axes, (title, named) in zip(panels, curves.items(), strict=True):
            for name, found in named.items():
                axes.plot(*zip(*found, strict=True), label=name)
            axes.set(xlabel="tokens trained on", ylabel=title, yscale="log")
            axes.legend(fontsize=8)

    return _png(draw, panels=len(curves))


def frontier_plot(points: Sequence[tuple[str, str, float, float]]) -> bytes | None:
    """FVU over L0 of several dictionaries, given as (name, hook, l0, fvu), a colour for each hook, as those of different hooks
    cannot be compared; None for fewer than two, or without matplotlib."""
    if len(points) < 2:
        return None

    def draw(axes: "Axes") -> None:
        for hook in sorted({hook for _, hook, _, _ in points}):
            named = [(name, l0, fvu) for name, its_hook, l0, fvu in points if its_hook == hook]
            axes.plot([l0 for _, l0, _ in named], [fvu for _, _, fvu in named], "o", label=_plain(hook))
            for name, l0, fvu in named:
                axes.annotate(_plain(name), (l0, fvu), fontsize=7, xytext=(4, 4), textcoords="offset points")
        axes.margins(0.12)
        axes.legend(fontsize=8)
        axes.set(xlabel="L0: latents that fire for a token", ylabel="FVU: fraction of variance unexplained")

    return _png(draw)


def _plain(text: str) -> str:
    """Return text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _png(draw: Callable[..., None], panels: int = 1) -> bytes | None:
    """What `draw` puts on empty pairs of axes, one for each panel."""
    if find_spec("matplotlib") is None:
        logger.info("the card has no figures: pip install 'saelens-lite[plots]'")
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), dpi=110, layout="constrained")
    row = figure.subplots(1, panels, squeeze=False)[0]
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
    draw(*row)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _log_lines(log: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSON-lines file; lines that are none are left out, as a run may still be writing the last one."""
    if not log.is_file() or log.stat().st_size > MAX_LOG_BYTES:
        return []
    found = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _drawable(line: dict[str, Any], name: str) -> bool:
    """Return whether a line of the log has a point of the curve that a logarithmic axis can show."""
    numbers = [line.get(key) for key in ("tokens", name)]
    return all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < float("inf") for x in numbers)
