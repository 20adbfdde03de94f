"""Curves of training logs over tokens, as a picture by matplotlib or as text by plotext. Both come with the extra `plots`."""

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saelens_lite.errors import ConfigError
from saelens_lite.files import write_file
from saelens_lite.paths import check_output
from saelens_lite.tables import short_names
from saelens_lite.terminal import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
COLUMNS, PANEL_COLUMNS, PANEL_LINES = 80, 40, 11  # of the terminal and of a panel
INSTALL = "pip install 'saelens-lite[plots]'"
LOG_FROM = 4  # ratio of the largest to the smallest number from which an axis is logarithmic
MOST_POINTS = 2000  # of a curve; a picture has fewer columns
MARKERS = "abcdefghijklmnopqrstuvwxyz"
Points = tuple[list[float], list[float]]


class Panel(NamedTuple):
    """One pair of axes: the number of the log that it shows, its title, and whether its axis may be logarithmic."""

    name: str
    title: str
    is_log: bool = False


PANELS = (
    Panel("loss", "loss", True),
    Panel("fvu", "FVU in training", True),
    Panel("val_fvu", "FVU in validation", True),
    Panel("l0", "L0", True),
    Panel("dead", "share of dead latents"),
    Panel("lr", "learning rate"),
)


class Curves:
    """The curves of one or several runs: a picture in a notebook, text of 80 columns in a terminal.

    Args:
        names: the names of the runs; paths lose the folders that they share.
        histories: the lines of the log of each run.
    """

    def __init__(self, names: Sequence[str], histories: Sequence[list[dict[str, Any]]]):
        self.names = [visible(name) for name in short_names(names)]
        if len(set(self.names)) < len(self.names):
            self.names = [f"{i}-{name}" for i, name in enumerate(self.names)]
        self.points = {panel: [points(lines, panel) for lines in histories] for panel in PANELS}
        self.panels = [panel for panel in PANELS if any(xs for xs, _ in self.points[panel])]
        if not self.panels:
            raise ConfigError(f"there is nothing to plot: the log of {', '.join(self.names)} is empty or missing (log.jsonl)")

    def figure(self) -> "Figure":
        """Return a matplotlib figure.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        if find_spec("matplotlib") is None:
            raise ConfigError(f"pictures need matplotlib: {INSTALL}")
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter

        n_runs, n_rows = len(self.names), -(-len(self.panels) // 3)
        palette = colormaps["tab10" if n_runs <= 10 else "turbo"]
        colours = [palette(i if n_runs <= 10 else i / (n_runs - 1)) for i in range(n_runs)]
        figure = Figure(figsize=(11, 2.9 * n_rows + 0.25 * n_runs / 4), dpi=110, layout="constrained")
        all_axes = figure.subplots(n_rows, 3, squeeze=False).flatten()
        for axes, panel in zip(all_axes, self.panels, strict=False):
            for (xs, ys), colour in zip(self.points[panel], colours, strict=True):
                axes.plot(xs, ys, color=colour, linewidth=1.4, marker="o" if len(xs) < 3 else None, markersize=4)
            axes.set_title(panel.title, fontsize=10, loc="left")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(color="0.92", which="both" if panel.is_log else "major")
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            axes.set_xlim(left=0)
            _set_scale(axes, panel, self._values(panel))
        for axes in all_axes[len(self.panels) :]:
            axes.set_visible(False)
        figure.supxlabel("tokens", fontsize=9)
        handles = [all_axes[0].plot([], [], color=colour)[0] for colour in colours]
        names = [name.replace("$", r"\$") for name in self.names]  # else matplotlib reads formulas
        figure.legend(handles, names, loc="outside upper left", ncols=min(n_runs, 4), fontsize=9, frameon=False)
        return figure

    def _values(self, panel: Panel) -> list[float]:
        """Return the values that the range of a panel covers. Both panels of FVU have one range, so that they compare."""
        panels = [one for one in PANELS if one.title.startswith("FVU")] if panel.title.startswith("FVU") else [panel]
        return [y for one in panels for _, ys in self.points[one] for y in ys]

    def save(self, path: str | Path) -> Path:
        """Write the picture to a .png or .svg file, replacing an earlier one. Equal numbers give equal bytes.

        Raises:
            ConfigError: the file has another ending, or matplotlib is not installed.
        """
        path = check_output(path)
        if path.suffix.lower() not in ENDINGS:
            raise ConfigError(f"{path} has the ending {path.suffix or 'of no format'!r}; expected {' or '.join(ENDINGS)}")
        content = self._drawn(path.suffix.lower()[1:])
        write_file(path, lambda new: new.write_bytes(content))
        return path

    def _drawn(self, format: str) -> bytes:
        """Return the bytes of the picture."""
        figure = self.figure()
        from matplotlib import rc_context

        buffer = io.BytesIO()
        fixed = {"Software": None} if format == "png" else {"Date": None, "Creator": None}
        with rc_context({"svg.hashsalt": "saelens_lite", "svg.fonttype": "none"}):
            figure.savefig(buffer, format=format, metadata=fixed)
        return buffer.getvalue()

    def _repr_svg_(self) -> str | None:
        return None if find_spec("matplotlib") is None else self._drawn("svg").decode()

    def __str__(self) -> str:
        """Return the curves as text of 80 columns.

        Raises:
            ConfigError: plotext is not installed.
        """
        if find_spec("plotext") is None:
            raise ConfigError(f"curves in a terminal need plotext: {INSTALL}; or give a file, for matplotlib: curves.png")
        shown = [self._panel(panel) for panel in self.panels]
        rows = [shown[i : i + 2] for i in range(0, len(shown), 2)]
        lines = ["".join(parts).rstrip() for row in rows for parts in zip(*row, strict=True)]
        several = [f"  {mark} {name}" for mark, name in zip(self._marks(), self.names, strict=True)]
        return "\n".join([*lines, *(several if len(several) > 1 else [f"  {self.names[0]}"])])

    def __repr__(self) -> str:
        return f"<Curves of {', '.join(self.names)}>" if find_spec("plotext") is None else str(self)

    def _marks(self) -> list[str]:
        """Return the letter of each run; with a single run, a line of dots takes its place."""
        return ["braille"] if len(self.names) == 1 else [MARKERS[i % len(MARKERS)] for i in range(len(self.names))]

    def _panel(self, panel: Panel) -> list[str]:
        """Return the lines of one panel, each of PANEL_COLUMNS columns."""
        import plotext

        figure = plotext.figure
        figure.clear()
        figure.plot_size(PANEL_COLUMNS, PANEL_LINES)
        figure.title(panel.title)
        shape = math.log10 if panel.is_log else float
        for (xs, ys), mark in zip(self.points[panel], self._marks(), strict=True):
            if xs:
                figure.draw(figure.signal(xs, [shape(y) for y in ys], marker=mark).lines())
        values = self._values(panel)
        most = max(x for xs, _ in self.points[panel] for x in xs)
        heights = [min(values), (min(values) * max(values)) ** 0.5 if panel.is_log else sum((min(values), max(values))) / 2]
        heights = sorted({*heights, max(values)})
        figure.ruler("y").ticks([shape(y) for y in heights], [_short(y) for y in heights])
        if min(values) < max(values):
            figure.ruler("y").lim(shape(min(values)), shape(max(values)))
        figure.ruler("x").lim(0, most)
        figure.ruler("x").ticks([0, most / 2, most], ["0", f"{_short(most / 2)} tokens", _short(most)])
        drawn = plotext.uncolorize(str(figure.build())).rstrip("\n").split("\n")
        figure.clear()
        return [line.ljust(PANEL_COLUMNS)[:PANEL_COLUMNS] for line in drawn]


def points(lines: Sequence[dict[str, Any]], panel: Panel) -> Points:
    """Return the tokens and the values of a number of the log, without values that the axis cannot show.

    Of a long log they are the first, the last, and the lowest and the highest of each piece of equally many.
    """
    pairs = [(line.get("tokens"), line.get(panel.name)) for line in lines]
    kept = [(float(x), float(y)) for x, y in pairs if _is_number(x) and _is_number(y) and (y > 0 or not panel.is_log)]
    if len(kept) > MOST_POINTS:
        size = -(-2 * len(kept) // MOST_POINTS)
        pieces = [kept[start : start + size] for start in range(0, len(kept), size)]
        ends = [point for piece in pieces for point in (min(piece, key=lambda p: p[1]), max(piece, key=lambda p: p[1]))]
        kept = sorted({kept[0], *ends, kept[-1]})
    return [x for x, _ in kept], [y for _, y in kept]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(number: float) -> str:
    """Return a number in few characters: 1.2M, 350k, 0.031, 6.2e-05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.1e}" if 0 < abs(number) < 1e-4 else f"{number:.3g}"


def _set_scale(axes: Any, panel: Panel, values: list[float]) -> None:
    """Choose scale and range of the vertical axis, with plain numbers at its ticks. A narrow range is clearer if linear."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(values), max(values)
    if not panel.is_log:
        axes.set_ylim(0, 1.05 * high or 1)
    elif high > LOG_FROM * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    else:
        margin = 0.05 * (high - low) or 0.5 * high
        axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))
