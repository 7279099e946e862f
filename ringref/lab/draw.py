"""One figure style: legible in greyscale, to colour-blind readers, and as a diff.

Ranks and series differ in hue (Okabe and Ito's palette, reordered so that neighbours also differ in
lightness), in hatch, in line style and in marker. `save` writes SVGs that are equal byte for byte
when the data are.
"""

from functools import wraps
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

COLOURS = ("#0072B2", "#F0E442", "#000000", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7")
HATCHES = ("", "//", "", "..", "xx", "\\\\", "oo", "++")
INKS = ("#0072B2", "#D55E00", "#000000", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#7F7F7F")  # lines: no yellow
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (8, 3)))
STYLE = {
    "svg.hashsalt": "ringref",  # element ids are otherwise random
    "svg.fonttype": "path",  # the same letters on machines with other fonts
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,  # nothing overlaps and nothing is cut off
    "savefig.dpi": 150,
}


def _styled(draw):
    """Run in the style; a notebook's backend, loaded by the first figure, stays interactive."""

    @wraps(draw)
    def styled(*args, **kwargs):
        with plt.rc_context(STYLE):
            drawn, interactive = draw(*args, **kwargs), plt.isinteractive()
        plt.interactive(interactive)
        return drawn

    return styled


def colour(i):
    """Fill for rank or series i: keyword arguments of a patch. They repeat after eight."""
    i %= len(COLOURS)
    edge = "white" if COLOURS[i] == "#000000" else "black"
    return {"facecolor": COLOURS[i], "hatch": HATCHES[i], "edgecolor": edge, "linewidth": 0.4}


@_styled
def figure(width=6.4, height=3.6, columns=1, rows=1, **kwargs):
    """A figure and its axes in the style, sizes in inches; see `matplotlib.pyplot.subplots`."""
    return plt.subplots(rows, columns, figsize=(width, height), **kwargs)


@_styled
def save(fig, name, folder="figures"):
    """Write `folder`/`name`.svg; the same figure gives the same bytes. Returns the path."""
    path = Path(folder, f"{name}.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Date": None, "Creator": None})
    return path


@_styled
def square(owner, labels=None, ax=None, title="", visible=None):
    """The attention square: row = query, column = key, coloured by rank or by hop.

    owner: (queries, keys) integers, who computes this pair; −1 is nobody and stays white.
    labels: legend text per owner. visible: (queries, keys) bool, pairs that the mask lets through;
    the others are drawn faintly: work that is done for nothing, or skipped.
    """
    owner = np.asarray(owner)
    visible = np.ones(owner.shape, bool) if visible is None else np.asarray(visible, bool)
    ax = figure(4.4, 3.6)[1] if ax is None else ax
    plain = {"linewidth": 0, "antialiased": False}  # no seams between rectangles of one owner
    for who in np.unique(owner[owner >= 0]):
        for faint in (False, True):
            style = {**colour(who), **plain, **({"alpha": 0.18, "hatch": ""} if faint else {})}
            for row, first, length in _runs((owner == who) & (visible != faint)):
                ax.add_patch(Rectangle((first, row), length, 1, **style))
    ax.set(xlim=(0, owner.shape[1]), ylim=(owner.shape[0], 0), aspect="equal")
    ax.set(xlabel="key position", ylabel="query position", title=title)
    ax.spines[["top", "right"]].set_visible(True)
    if labels is not None:
        _legend(ax, handles=[Patch(label=text, **colour(i)) for i, text in enumerate(labels)])
    return ax


def _legend(ax, **kwargs):
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handleheight=1.2, **kwargs)


def _runs(where):
    """Horizontal runs of True as (row, first, length)."""
    padded = np.pad(where.astype(np.int8), ((0, 0), (1, 1)))
    edges = np.diff(padded, axis=1)
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)
    return zip(rows.tolist(), starts.tolist(), (ends - starts).tolist(), strict=True)


@_styled
def timeline(bars, ax=None, title="", unit="ms"):
    """Lanes of what happens when: one lane per rank, or per rank and stream.

    bars: (lane, start, end, kind) with lane and kind as text; lanes are drawn in order of
    appearance, top first.
    """
    bars = list(bars)
    lanes = list(dict.fromkeys(lane for lane, *_ in bars))
    kinds = list(dict.fromkeys(kind for *_, kind in bars))
    ax = figure(6.4, 0.9 + 0.38 * len(lanes))[1] if ax is None else ax
    for lane, start, end, kind in bars:
        if end > start:
            style = colour(kinds.index(kind))
            ax.barh(lanes.index(lane), end - start, left=start, height=0.7, **style)
    ax.set(xlabel=unit, title=title, yticks=range(len(lanes)), yticklabels=lanes)
    ax.set_ylim(len(lanes) - 0.4, -0.6)
    _legend(ax, handles=[Patch(label=kind, **colour(i)) for i, kind in enumerate(kinds)])
    return ax


@_styled
def curves(lines, points=None, ax=None, title="", x="", y="", log=True):
    """Predictions as lines, measurements as points of the same colour, on log₂ axes.

    lines, points: {label: (xs, ys)}. A label in both is one series and one legend entry.
    """
    points = points or {}
    ax = figure()[1] if ax is None else ax
    for i, label in enumerate(dict.fromkeys([*lines, *points])):
        look = {"color": INKS[i % 8], "zorder": 2}
        marker = {"marker": MARKERS[i % 8], "markeredgecolor": "black", "markersize": 5}
        if label in lines:
            ax.plot(*lines[label], linestyle=DASHES[i % 8], label=label, linewidth=1.6, **look)
        if label in points:
            shown = "_nolegend_" if label in lines else label
            ax.plot(*points[label], linestyle="", label=shown, **{**look, "zorder": 3}, **marker)
    if log:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(base=2, numticks=9))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ax.set(xlabel=x, ylabel=y, title=title)
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


@_styled
def bars(groups, ax=None, title="", y="", log=False):
    """Grouped bars. groups: {series: {label: value}}; every series has a bar at every label."""
    ax = figure()[1] if ax is None else ax
    labels = list(dict.fromkeys(label for values in groups.values() for label in values))
    width = 0.8 / len(groups)
    for i, (series, values) in enumerate(groups.items()):
        at = [labels.index(label) - 0.4 + (i + 0.5) * width for label in values]
        ax.bar(at, list(values.values()), width, label=series, **colour(i))
    if log:
        ax.set_yscale("log")
    ax.set(xticks=range(len(labels)), xticklabels=labels, ylabel=y, title=title)
    _legend(ax)
    return ax


def short(value):
    """1536 -> 1.5k, 1048576 -> 1M: powers of two as people say them."""
    for power, suffix in ((2**40, "T"), (2**30, "G"), (2**20, "M"), (2**10, "k")):
        if abs(value) >= power:
            scaled = value / power  # 1000 to 1023 need a fourth digit
            return f"{scaled:.0f}{suffix}" if abs(scaled) >= 999.5 else f"{scaled:.3g}{suffix}"
    return f"{value:.3g}"


@_styled
def cells(ax, texts, x, y):
    """Write into the cells of a small square and number its rows and columns."""
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    middle = {"ha": "center", "va": "center", "fontsize": 8, "bbox": box}
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            if text:
                ax.text(column + 0.5, row + 0.5, text, **middle)
    for axis, count in ((ax.xaxis, len(texts[0])), (ax.yaxis, len(texts))):
        axis.set_ticks([i + 0.5 for i in range(count)], [str(i) for i in range(count)])
        axis.set_tick_params(length=0)
    ax.set(xlabel=x, ylabel=y, aspect="auto")
