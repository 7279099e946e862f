"""Figures: reproducible files, neighbours told apart without colour, and all of the data drawn."""

import matplotlib

matplotlib.use("agg")

import numpy as np
import pytest
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from ringref.lab import draw


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def example():
    owner = np.repeat(np.arange(6)[:, None] // 2, 6, axis=1)
    ax = draw.square(owner, ["a", "b", "c"], title="t", visible=np.tril(np.ones((6, 6), bool)))
    return owner, ax


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    first, second = (draw.save(example()[1].figure, "x", tmp_path / f).read_bytes() for f in "ab")
    assert first == second and b"<dc:date>" not in first


def test_a_square_covers_every_pair_once_and_marks_what_is_hidden():
    owner, ax = example()
    drawn, faint = np.full((6, 6), -1), np.zeros((6, 6), bool)
    for patch in ax.patches:
        assert isinstance(patch, Rectangle)
        x, y, w = int(patch.get_x()), int(patch.get_y()), int(patch.get_width())
        assert (drawn[y, x : x + w] == -1).all()
        rgb = colors.to_hex(patch.get_facecolor()).upper()
        drawn[y, x : x + w], faint[y, x : x + w] = draw.COLOURS.index(rgb), patch.get_alpha()
    assert (drawn == owner).all() and (faint == np.triu(np.ones((6, 6), bool), 1)).all()


def test_neighbours_differ_without_colour():
    looks = [draw.colour(i) for i in range(8)]
    grey = [np.dot(colors.to_rgb(look["facecolor"]), (0.299, 0.587, 0.114)) for look in looks]
    for a, b in zip(range(8), [*range(1, 8), 0], strict=True):
        assert abs(grey[a] - grey[b]) > 0.1 or looks[a]["hatch"] != looks[b]["hatch"]
    assert abs(np.diff(grey[:5])).min() > 0.15  # up to five ranks even without the hatch


def test_curves_put_points_on_their_own_line():
    ax = draw.curves({"ring": ([1, 2, 4], [8, 16, 32])}, {"ring": ([2], [17]), "dense": ([4], [9])})
    line, points, dense = ax.lines
    assert line.get_color() == points.get_color() != dense.get_color()
    assert points.get_ydata() == [17] and points.get_linestyle() == "None"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ring", "dense"]


def test_timeline_and_bars_draw_what_they_are_given():
    ax = draw.timeline([("rank 0", 0, 2, "block"), ("rank 1", 1, 4, "wait")])
    assert [(p.get_x(), p.get_width()) for p in ax.patches] == [(0, 2), (1, 3)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    ax = draw.bars({"fwd": {"dense": 1, "ring": 2}, "bwd": {"dense": 3, "ring": 4}})
    assert [p.get_height() for p in ax.patches] == [1, 2, 3, 4]


def test_sizes_read_as_people_say_them():
    assert [draw.short(x) for x in (8, 1536, 2**20, 3 * 2**30)] == ["8", "1.5k", "1M", "3G"]
