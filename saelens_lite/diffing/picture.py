"""The picture of a model diff, drawn by matplotlib."""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from saelens_lite.errors import ConfigError
from saelens_lite.files import write_file
from saelens_lite.paths import check_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INSTALL = "pip install 'saelens-lite[plots]'"
COLOURS = ("tab:red", "tab:blue", "tab:gray", "tab:olive")
EDGE = (-0.5, 1.5)  # of ν; dots outside are drawn at the edge


def save_picture(
    values: Mapping[str, Float[Tensor, " d_sae"]], classes: Sequence[str], models: tuple[str, str], path: str | Path
) -> Path:
    """Write the picture of a report to a .png or .svg file. Equal numbers give equal bytes; see `DiffReport.plot`."""
    path = check_output(Path(path))
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"{path} has the ending {path.suffix or 'of no format'!r}; expected .png or .svg")
    if find_spec("matplotlib") is None:
        raise ConfigError(f"pictures need matplotlib: {INSTALL}")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    base, tuned = (name.replace("$", r"\$") for name in models)
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    if "delta_norm" in values:
        delta = values["delta_norm"][(values["frequency"] > 0) & ~values["delta_norm"].isnan()]
        left.hist(delta.tolist(), bins=50, range=(0, 1), color="tab:gray")
        left.set(xlabel=f"Δ_norm: 0 is {tuned} only, 1 is {base} only", ylabel="latents", yscale="symlog")
        _scatter(right, values["nu_error"], values["nu_reconstruction"], classes, models)
        right.set(xlabel=f"ν^ε: {base} / {tuned}", ylabel=f"ν^r: {base} / {tuned}")
    else:
        alive = values["norm"][values["frequency"] > 0]
        left.hist(alive.tolist(), bins=50, color="tab:gray")
        left.set(xlabel="norm of the direction", ylabel="latents", yscale="symlog")
        _scatter(right, values["beta_activation_base"], values["beta_activation_tuned"], classes, models)
        right.set(xlabel=f"β in {base}", ylabel=f"β in {tuned}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer, format = io.BytesIO(), path.suffix.lower()[1:]
    with rc_context({"svg.hashsalt": "saelens_lite", "svg.fonttype": "none"}):
        figure.savefig(
            buffer, format=format, metadata={"Software": None} if format == "png" else {"Date": None, "Creator": None}
        )
    write_file(path, lambda new: new.write_bytes(buffer.getvalue()))
    return path


def _scatter(axes: "Axes", x: Tensor, y: Tensor, classes: Sequence[str], models: tuple[str, str]) -> None:
    """Draw a dot for each latent, coloured by its class; those of unknown class are left out."""
    kinds = (f"{models[1]} only", f"{models[0]} only", "shared", "other")
    for kind, colour in zip(kinds, COLOURS, strict=True):
        chosen = [i for i, name in enumerate(classes) if name == kind]
        xs, ys = (values[chosen].clamp(*EDGE).tolist() for values in (x, y))
        axes.plot(xs, ys, ".", color=colour, markersize=4, label=f"{kind.replace('$', chr(92) + '$')}: {len(chosen):,}")
    axes.grid(color="0.92")
    axes.legend(fontsize=7, frameon=False)
