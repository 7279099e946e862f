"""One figure style: legible in greyscale, to colour-blind readers, and as a diff.

A colour means one thing in all figures: `METHODS` names one per method, ranks have Okabe and Ito's palette (reordered
so that neighbours also differ in lightness) with a hatch, hops grow darker in one hue. `save` writes SVGs that are
equal byte for byte when the data are. `met` is the one window through which pictures look into the engine.
"""

import os
import re
from collections import defaultdict
from functools import wraps
from math import ceil, cos, floor, log10, pi, sin
from pathlib import Path

import numpy as np
from matplotlib import colormaps, colors
from matplotlib import path as paths
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Patch, PathPatch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..engine import visits as engine

COLOURS = ("#0072B2", "#F0E442", "#000000", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7")
HATCHES = ("", "//", "", "..", "xx", "\\\\", "oo", "++")
INKS = ("#7F7F7F", "#882255", "#999933", "#44AA99", "#AA4499", "#661100", "#6699CC", "#DDCC77")  # for what has no name
METHODS = {  # a method's colour, marker and dash, by the first word of a label
    "dense": ("#000000", "D", ":"),
    "dilated": ("#009E73", "^", "-."),
    "grouped": ("#117733", "p", "-."),
    "dilated-attention-pytorch": ("#CC6677", "^", "-."),
    "collective": ("#E69F00", "s", "--"),
    "ring": ("#0072B2", "o", "-"),
    "ulysses": ("#CC79A7", "v", (0, (5, 1))),
    "ring×ulysses": ("#332288", "P", (0, (3, 1, 1, 1))),
    "compute": ("#BBBBBB", "s", "-"),
    "message": ("#D55E00", "o", "-"),
}
ALIASES = {"longnet": "dilated", "gather": "collective"}
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


def met(queries, keys, *, causal=False, dilation=None, h=1):
    """What the engine computes where a rank's queries meet a rank's keys: its own pieces, not what should happen.

    Args:
        queries, keys: shards, of which the one's queries meet the other's keys.
        h: heads; each piece names those that it serves.

    Yields:
        `(heads, kind, q_at, k_at)`: kind is "full", "causal" or "mask"; the global positions of the queries and the
        keys of m segments, `m c` and `m k`.
    """
    bounds = (None, 0 if causal else None)
    for strand in engine.strands(dilation, h):
        for visit in engine.visits(strand, queries.queries, keys.keys, bounds):
            yield strand.heads, visit.kind, visit.q_positions, visit.k_positions


def colour(i, palette="ranks"):
    """Fill for rank or hop i: keyword arguments of a patch. Ranks repeat after eight, hops darken up to eight."""
    if palette == "hops":
        shade = colors.to_hex(colormaps["magma_r"](0.08 + 0.84 * min(i, 7) / 7))
        return {"facecolor": shade, "hatch": "", "edgecolor": "black", "linewidth": 0.4}
    i %= len(COLOURS)
    edge = "white" if COLOURS[i] == "#000000" else "black"
    return {"facecolor": COLOURS[i], "hatch": HATCHES[i], "edgecolor": edge, "linewidth": 0.4}


def named(label):
    """The colour, marker and dash of the method that a label begins with, or None."""
    word = re.split(r"[ ,:(_]", label.strip().lower())[0]
    return METHODS.get(ALIASES.get(word, word))


def _fill(label, i):
    """A patch's look: the rank's, the hop's or the method's that the label names, else one of its own. A variant of a
    method ("ring, captured") is hatched.
    """
    numbered = re.match(r"(rank|hop) (\d+)", label)
    if numbered:
        return colour(int(numbered[2]), f"{numbered[1]}s")
    known, variant = named(label), HATCHES[bool(re.match(r"[^\s:(]+,", label))]
    return {**colour(0), "facecolor": known[0] if known else INKS[i % 8], "hatch": variant if known else HATCHES[i % 8]}


@_styled
def figure(width=6.4, height=3.6, columns=1, rows=1, **kwargs):
    """A figure and its axes in the style, sizes in inches; see `matplotlib.pyplot.subplots`."""
    return plt.subplots(rows, columns, figsize=(width, height), **kwargs)


@_styled
def save(fig, name, folder=None):
    """Write `folder`/`name`.svg; the same figure gives the same bytes. Returns the path.

    Without a folder it goes where the environment variable RINGREF_FIGURES says, and nowhere (None) where that is
    not set: an experiment in a notebook does not overwrite the published picture.
    """
    folder = folder or os.environ.get("RINGREF_FIGURES")
    if not folder:
        return None
    path = Path(folder, f"{name}.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Date": None, "Creator": None})
    return path


@_styled
def square(owner, labels=None, ax=None, title="", visible=None, palette="ranks"):
    """The attention square: row = query, column = key, coloured by rank or by hop.

    owner: (queries, keys) integers, who computes this pair; −1 is nobody and stays white.
    labels: legend text per owner. visible: (queries, keys) bool, pairs that the mask lets through;
    the others are drawn faintly: work that is done for nothing, or skipped. palette: "ranks" or "hops".
    """
    owner = np.asarray(owner)
    visible = np.ones(owner.shape, bool) if visible is None else np.asarray(visible, bool)
    ax = figure(4.4, 3.6)[1] if ax is None else ax
    plain = {"linewidth": 0, "antialiased": False}  # areas that touch leave no seam
    for who in np.unique(owner[owner >= 0]):
        for faint in (False, True):
            area = (owner == who) & (visible != faint)
            if area.any():
                style = {**colour(int(who), palette), **plain, **({"alpha": 0.18, "hatch": ""} if faint else {})}
                ax.add_patch(PathPatch(_outline(area), **style))
    ax.set(xlim=(0, owner.shape[1]), ylim=(owner.shape[0], 0), aspect="equal")
    ax.set(xlabel="key position", ylabel="query position", title=title)
    ax.spines[["top", "right"]].set_visible(True)
    if labels is not None:
        _legend(ax, handles=[Patch(label=text, **colour(i, palette)) for i, text in enumerate(labels)])
    return ax


def _legend(ax, **kwargs):
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handleheight=1.2, **kwargs)


def _outline(area):
    """The border of the True cells as one path: along each edge with True on one side only, inside to the right."""
    padded, edges = np.pad(area, 1).astype(np.int8), defaultdict(list)
    for y, x in np.argwhere(np.diff(padded, axis=0)[:, 1:-1]):  # between rows y − 1 and y
        ends = ((x, y), (x + 1, y)) if y < len(area) and area[y, x] else ((x + 1, y), (x, y))
        edges[ends[0]].append(ends[1])
    for y, x in np.argwhere(np.diff(padded, axis=1)[1:-1]):  # between columns x − 1 and x
        ends = ((x, y + 1), (x, y)) if x < area.shape[1] and area[y, x] else ((x, y), (x, y + 1))
        edges[ends[0]].append(ends[1])
    points, codes = [], []
    while edges:
        start = point = next(iter(edges))
        loop = [start]
        while not (len(loop) > 1 and point == start):
            after = edges[point].pop()
            if not edges[point]:
                del edges[point]
            point = after
            loop.append(point)
        points += loop
        codes += [paths.Path.MOVETO, *[paths.Path.LINETO] * (len(loop) - 2), paths.Path.CLOSEPOLY]
    return paths.Path(points, codes)


@_styled
def ring(hands, ax=None, title=""):
    """Ranks on a circle, what each has in hand, and arrows from each rank to the next.

    hands: for each rank, a list of `(text, owner)`: parcels in its hands, each in the colour of the rank that owns it.
    """
    ax = figure(3.2, 3.2)[1] if ax is None else ax
    p = len(hands)
    # clockwise from the top
    at = [(sin(2 * pi * r / p), cos(2 * pi * r / p)) for r in range(p)]
    for r, (x, y) in enumerate(at):
        if p > 1:
            bend = f"arc3,rad={-0.12 if p > 2 else -0.3}"
            look = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 17, "shrinkB": 17, "color": "black"}
            ax.add_patch(FancyArrowPatch((x, y), at[(r + 1) % p], connectionstyle=bend, **look))
        ax.text(x, y, f"rank\n{r}", ha="center", va="center", fontsize=8, bbox=_box("white", "circle"), zorder=3)
        for i, (text, owner) in enumerate(hands[r]):
            outward = 0.34 * (i if y > 0.1 else -i if y < -0.1 else (len(hands[r]) - 1) / 2 - i)
            ink = "white" if owner % 8 in (0, 2) else "black"
            middle = {"ha": "center", "va": "center", "fontsize": 8, "color": ink, "zorder": 4}
            ax.text(1.72 * x, 1.48 * y + outward, text, bbox=_box(COLOURS[owner % 8], "round"), **middle)
    ax.set(xlim=(-2.1, 2.1), ylim=(-1.9, 1.9), title=title, aspect="equal")
    ax.set_axis_off()
    return ax


def _box(fill, shape):
    return {"boxstyle": f"{shape},pad=0.3", "facecolor": fill, "edgecolor": "black", "linewidth": 0.6}


@_styled
def timeline(bars, ax=None, title="", unit="ms"):
    """Lanes of what happens when: one lane per rank, or per rank and stream.

    bars: (lane, start, end, kind) with lane and kind as text; lanes are drawn in order of
    appearance, top first.
    """
    bars = list(bars)
    lanes = list(dict.fromkeys(lane for lane, *_ in bars))
    kinds = list(dict.fromkeys(kind for *_, kind in bars))
    looks = {}
    for i, kind in enumerate(kinds):
        look = _fill(kind, i)
        again = any(look["facecolor"] == other["facecolor"] for other in looks.values())
        looks[kind] = {**look, "hatch": "//"} if again else look
    ax = figure(6.4, 0.9 + 0.38 * len(lanes))[1] if ax is None else ax
    for lane, start, end, kind in bars:
        if end > start:
            ax.barh(lanes.index(lane), end - start, left=start, height=0.7, **looks[kind])
    ax.set(xlabel=unit, title=title, yticks=range(len(lanes)), yticklabels=lanes)
    ax.set_ylim(len(lanes) - 0.4, -0.6)
    _legend(ax, handles=[Patch(label=kind, **look) for kind, look in looks.items()])
    return ax


@_styled
def curves(lines, points=None, ax=None, title="", x="", y="", log=True, hollow=None):
    """Predictions as lines, measurements as points of the same colour, on log₂ axes.

    lines, points, hollow: {label: (xs, ys)}; hollow are points of what was only allocated, not computed. A label in
    several of them is one series and one legend entry; a label that begins with a method's name has its colour.
    """
    points, hollow = points or {}, hollow or {}
    ax = figure()[1] if ax is None else ax
    used = set()
    for i, label in enumerate(dict.fromkeys([*lines, *points, *hollow])):
        ink, shape, dash = named(label) or (INKS[i % 8], MARKERS[i % 8], DASHES[i % 8])
        if (ink, dash) in used:  # a second series of one method
            free = [j % 8 for j in range(i + 4, i + 12) if (ink, DASHES[j % 8]) not in used]
            shape, dash = MARKERS[free[0] - 1], DASHES[free[0]]
        used.add((ink, dash))
        marker = {"marker": shape, "markeredgecolor": "black", "markersize": 5}
        if label in lines:
            ax.plot(*lines[label], linestyle=dash, label=label, linewidth=1.6, color=ink, zorder=2)
        for series, face, others in ((points, ink, [lines]), (hollow, "white", [lines, points])):
            if label in series:
                shown = "_nolegend_" if any(label in x for x in others) else label
                ax.plot(*series[label], linestyle="", label=shown, color=ink, mfc=face, zorder=3, **marker)
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
def power(ax, xs, name, start, slope):
    """A thin grey line of a known power of x, from `start` at xs[0] on, named at its end."""
    ys = [start * (x / xs[0]) ** slope for x in xs]
    ax.plot(xs, ys, color="0.6", linewidth=0.8, zorder=1)
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of a line that it would lie on
    at = {"textcoords": "offset points", "xytext": (3, -2)}
    ax.annotate(name, (xs[-1], ys[-1]), color="0.35", fontsize=8, bbox=clear, **at)
    return ax


@_styled
def bars(groups, ax=None, title="", y="", log=False):
    """Grouped bars. groups: {series: {label: value}}; every series has a bar at every label. In a single series a label
    that begins with a method's name has the method's colour.

    On a logarithmic axis they are points, because a bar's length would depend on where the axis happens to begin.
    """
    ax = figure()[1] if ax is None else ax
    labels = list(dict.fromkeys(label for values in groups.values() for label in values))
    width = 0.8 / len(groups)
    for i, (series, values) in enumerate(groups.items()):
        at, look = [labels.index(label) - 0.4 + (i + 0.5) * width for label in values], _fill(series, i)
        if log:
            fill = {"color": look["facecolor"], "markeredgecolor": "black"}
            ax.plot(at, list(values.values()), MARKERS[i % 8], label=series, **fill)
            continue
        for bar, label in zip(ax.bar(at, list(values.values()), width, label=series, **look), values, strict=True):
            if len(groups) == 1 and named(label):  # one series: what it compares stands below it
                bar.set_facecolor(named(label)[0])
    if log:
        ax.set_yscale("log")
        ax.grid(axis="y", alpha=0.25, linewidth=0.5)
    ax.set(xticks=range(len(labels)), xticklabels=labels, ylabel=y, title=title)
    _legend(ax)
    return ax


@_styled
def dots(rows, ax=None, title="", x="", within=(0, 1)):
    """Points in rows on a logarithmic axis, what lies `within` two numbers shaded.

    rows: {row: {series: value}}; the first row is at the top. What is infinite stands at the right edge.
    """
    ax = figure(6.6, 0.6 + 0.55 * len(rows))[1] if ax is None else ax
    series = list(dict.fromkeys(name for values in rows.values() for name in values))
    known = [y for values in rows.values() for y in values.values() if y < float("inf")]
    first, last = floor(log10(min(known)) - 0.5), ceil(log10(max(known)) + 1)  # decades
    edge, ends = 10.0**last, any(y == float("inf") for values in rows.values() for y in values.values())
    for i, name in enumerate(series):
        at = [row + 0.8 * ((i + 0.5) / len(series) - 0.5) for row, values in enumerate(rows.values()) if name in values]
        values = [min(values[name], edge) for values in rows.values() if name in values]
        look = {"color": INKS[i % 8], "markeredgecolor": "black", "clip_on": False}
        ax.plot(values, at, MARKERS[i % 8], label=name, linestyle="", **look)
    ax.set(xscale="log", xlim=(10.0**first, edge), xlabel=x, title=title)
    ax.set_xticks([10.0**i for i in range(last, first - 1, -2)])
    ax.set_xticklabels(["NaN" if ends and i == last else f"$10^{{{i}}}$" for i in range(last, first - 1, -2)])
    ax.minorticks_off()
    ax.axvspan(max(within[0], 10.0**first), within[1], color="0.9", zorder=0)
    ax.hlines([row + 0.5 for row in range(len(rows) - 1)], *ax.get_xlim(), color="0.8", linewidth=0.5)
    ax.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
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
