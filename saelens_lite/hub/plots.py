"""The figures of a card, as PNG files. Equal numbers give equal bytes. Without matplotlib there are no figures."""

import io
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from saelens_lite.training.run import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

CURVES = {"FVU": ("fvu", "val_fvu"), "L0": ("l0", "val_l0")}


def density_plot(density: Float[Tensor, " d_sae"] | None) -> bytes | None:
    """Return a histogram of log10 firing frequencies, or None without densities or matplotlib."""
    if density is None or not (density > 0).any():
        return None
    alive = density[density > 0].double().log10().tolist()

    def draw(axes: "Axes") -> None:
        axes.hist(alive, bins=50, range=(-8, 0), color="tab:blue")
        axes.set(xlabel="log10 of the share of tokens a latent fires on", ylabel="latents", yscale="symlog")
        axes.set_title(f"{len(alive):,} of {len(density):,} latents fire", fontsize=10)

    return _png(draw)


def log_plot(log: Path) -> bytes | None:
    """Plot error and sparsity over tokens from the log of a run. Return None without a readable log or matplotlib."""
    lines = read_log(log)

    def points(name: str) -> list[tuple[float, float]]:
        return [(float(line["tokens"]), float(line[name])) for line in lines if _drawable(line, name)]

    curves = {title: {name: curve for name in names if len(curve := points(name)) > 1} for title, names in CURVES.items()}
    curves = {title: named for title, named in curves.items() if named}
    if not curves:
        return None

    def draw(*panels: "Axes") -> None:
        for axes, (title, named) in zip(panels, curves.items(), strict=True):
            for name, curve in named.items():
                axes.plot(*zip(*curve, strict=True), label=name)
            axes.set(xlabel="tokens trained on", ylabel=title, yscale="log")
            axes.legend(fontsize=8)

    return _png(draw, panels=len(curves))


def frontier_plot(points: Sequence[tuple[str, str, float, float]]) -> bytes | None:
    """Plot FVU over L0 of dictionaries, given as (name, hook, l0, fvu). Return None for fewer than two, or without matplotlib.

    Each hook has its own colour, because dictionaries of different hooks cannot be compared."""
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
    """Escape text so that matplotlib reads no formula in it."""
    return text.replace("$", r"\$")


def _png(draw: Callable[..., None], panels: int = 1) -> bytes | None:
    """Return the PNG that `draw` makes on `panels` pairs of axes, or None without matplotlib."""
    if find_spec("matplotlib") is None:
        logger.info("the card has no figures, because matplotlib is not installed: pip install 'saelens-lite[plots]'")
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


def _drawable(line: dict[str, Any], name: str) -> bool:
    """Return whether a line of the log has a positive value of a curve, which a logarithmic axis can show."""
    numbers = [line.get(key) for key in ("tokens", name)]
    return all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < float("inf") for x in numbers)
