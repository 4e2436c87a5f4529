"""Curves of a run as small SVG pictures that stay small however long the run was."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

MOST_POINTS = 400
"""of a curve; a picture of it is some 300 pixels wide"""

INK, FAINT = "#24292f", "#57606a"
COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df")

_STYLE = {
    # Text as text: it is small, sharp and can be read by machines.
    "svg.fonttype": "none",
    # Names in the picture that depend on nothing but the picture.
    "svg.hashsalt": "pixloom",
    "font.size": 8,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}


@dataclass(frozen=True)
class Curve:
    """Values over steps, in the order in which they were logged. Some may not be finite."""

    name: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, name: str, points: Sequence[float]) -> "Curve":
        """`points` are step, value, step, value."""
        pairs = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        return cls(name, pairs[:, 0], pairs[:, 1])

    @property
    def finite(self) -> "Curve":
        kept = np.isfinite(self.values) & np.isfinite(self.steps)
        return Curve(self.name, self.steps[kept], self.values[kept])


@dataclass(frozen=True)
class Thinned:
    """A curve in at most `MOST_POINTS` places: in each the mean, and between which values."""

    steps: NDArray[np.float64]
    means: NDArray[np.float64]
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]


def thinned(curve: Curve, most: int = MOST_POINTS) -> Thinned:
    """Equally many neighbours become one place; up to `most` points stay as they are.

    The curve must be finite. Its lowest and highest value are always among `lows` and `highs`, so
    that no spike is lost.
    """
    count = len(curve.steps)
    if count <= most:
        return Thinned(curve.steps, curve.values, curve.values, curve.values)
    starts = np.arange(most) * count // most
    sizes = np.diff(starts, append=count)
    return Thinned(
        np.add.reduceat(curve.steps, starts) / sizes,
        np.add.reduceat(curve.values, starts) / sizes,
        np.minimum.reduceat(curve.values, starts),
        np.maximum.reduceat(curve.values, starts),
    )


def draw(curves: Sequence[Curve], last: float, *, may_be_log: bool) -> bytes:
    """An SVG picture of the curves, which share both axes, over steps 0 to `last`.

    They must be finite, none of them empty. With `may_be_log`, values that span decades are drawn
    on a logarithmic scale.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 2.3), facecolor="none")
        # matplotlib would take longer to find this than for all the rest. On the right is room for
        # half of the last label.
        axes: Any = figure.add_axes((0.14, 0.19, 0.81, 0.78))
        for curve, colour in zip(curves, COLOURS, strict=False):
            drawn = thinned(curve)
            if len(curve.steps) > len(drawn.steps):
                axes.fill_between(
                    drawn.steps, drawn.lows, drawn.highs, color=colour, alpha=0.2, lw=0
                )
            marker = "." if len(drawn.steps) <= 40 else None
            axes.plot(
                drawn.steps, drawn.means, color=colour, lw=1.2, marker=marker, label=curve.name
            )
        if may_be_log and _spans_decades(curves):
            axes.set_yscale("log")
        axes.set_xlim(0, max(last, *(float(curve.steps.max()) for curve in curves)) * 1.02 or 1)
        axes.set_xlabel("step", color=FAINT, fontsize=8)
        axes.tick_params(labelsize=8, colors=FAINT)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        out = io.BytesIO()
        # Neither a date nor the tool's name: the same run gives the same bytes.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    return out.getvalue()


def _spans_decades(curves: Sequence[Curve]) -> bool:
    low = min(float(curve.values.min()) for curve in curves)
    high = max(float(curve.values.max()) for curve in curves)
    return low > 0 and math.log10(high / low) > 1.5
