"""Draw docs/layer.svg: a dense decoder layer and the sliced one beside it.

python docs/layer_figure.py docs/layer.svg
"""

import sys
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

GREY, BLUE, ORANGE = "#555555", "#0072B2", "#D55E00"
ROWS = {
    "input": 10.0,
    "norm1": 8.7,
    "attention": 7.5,
    "add1": 6.2,
    "norm2": 4.9,
    "mlp": 3.7,
    "add2": 2.4,
    "output": 1.1,
}


def box(axes: Any, x: float, y: float, text: str, colour: str, width: float = 2.6, height: float = 0.86) -> None:
    """A labelled box, centred."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.02", fc="white", ec=colour, lw=1.4, zorder=3)
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour, linespacing=1.35, zorder=4)


def arrow(axes: Any, *places: tuple[float, float]) -> None:
    """A line through the places, with a head at the last one."""
    for start, end in pairwise(places[:-1]):
        axes.plot(*zip(start, end, strict=True), color=GREY, lw=1.2, solid_capstyle="round")
    axes.annotate("", places[-1], places[-2], arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.2, "shrinkB": 0})


def layer(
    axes: Any, x: float, title: str, texts: dict[str, str], colour: str, shortcuts: tuple[str, str] | None
) -> None:
    """A layer: its branch at x, its residual connection on the left."""
    side = x - 2.4
    axes.text(x - 1.0, 11.0, title, ha="center", fontsize=10.5, weight="bold", color=colour)
    for name in ("input", "add1", "add2", "output"):
        y = ROWS[name]
        if name.startswith("add"):
            axes.text(
                x,
                y,
                "+",
                ha="center",
                va="center",
                fontsize=13,
                color=colour,
                bbox={"boxstyle": "circle,pad=0.1", "fc": "white", "ec": colour},
            )
            axes.text(x + 0.45, y, texts[name], ha="left", va="center", fontsize=8.5)
        else:
            axes.text(x, y, texts[name], ha="center", va="center", fontsize=9)
    for name in ("norm1", "attention", "norm2", "mlp"):
        box(axes, x, ROWS[name], texts[name], colour, height=0.62 if name.startswith("norm") else 0.95)
    arrow(axes, (x, 9.7), (x, 9.05))
    arrow(axes, (x, 8.36), (x, 8.0))
    arrow(axes, (x, 7.0), (x, 6.5))
    arrow(axes, (x, 5.9), (x, 5.25))
    arrow(axes, (x, 4.56), (x, 4.2))
    arrow(axes, (x, 3.2), (x, 2.7))
    arrow(axes, (x, 2.1), (x, 1.4))
    for top, bottom, index in ((9.5, 6.2, 0), (5.7, 2.4, 1)):
        arrow(axes, (x, top), (side, top), (side, bottom), (x - 0.3, bottom))
        if shortcuts is not None:
            box(axes, side, (top + bottom) / 2, shortcuts[index], ORANGE, width=1.75)


def draw(path: str) -> None:
    """Write the figure."""
    figure = Figure(figsize=(7.4, 6.4), layout="constrained")
    axes = figure.subplots()
    dense = {
        "input": "$x$  ($D$)",
        "norm1": "norm, $D$",
        "attention": "attention\n$q, k, v$: $D \\to$ heads\n$o$: heads $\\to D$",
        "add1": "$h$  ($D$)",
        "norm2": "norm, $D$",
        "mlp": "MLP, inner width $F$\ngate, up: $D \\to F$\ndown: $F \\to D$",
        "add2": "$y$  ($D$)",
        "output": "to the next layer",
    }
    sliced = {
        "input": "$x E_i$  ($d_i$)",
        "norm1": "RMSNorm, $d_i$",
        "attention": "attention\n$q, k, v$: $d_i \\to$ heads\n$o$: heads $\\to d_i$",
        "add1": "$h M_i$  ($d_i$)",
        "norm2": "RMSNorm, $d_i$",
        "mlp": "MLP, inner width $F$\ngate, up: $d_i \\to F$\ndown: $F \\to d_{i+1}$",
        "add2": "$y E_{i+1}$  ($d_{i+1}$)",
        "output": "to the next layer",
    }
    layer(axes, 3.6, "a decoder layer", dense, GREY, None)
    layer(
        axes,
        10.6,
        "layer $i$, sliced (two rotations)",
        sliced,
        BLUE,
        ("shortcut\n$E_i^{\\top}\\,M_i$", "shortcut\n$M_i^{\\top}\\,E_{i+1}$"),
    )
    axes.set_xlim(0.6, 13.0)
    axes.set_ylim(0.6, 11.5)
    axes.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    draw(*sys.argv[1:])
