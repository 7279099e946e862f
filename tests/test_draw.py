"""Figures: reproducible files, neighbours told apart without colour, and all of the data drawn."""

import matplotlib

matplotlib.use("agg")

import numpy as np
import pytest
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.path import Path

from ringref import partition, simulate
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
    middles = np.stack(np.meshgrid(np.arange(6) + 0.5, np.arange(6) + 0.5), -1).reshape(-1, 2)
    for patch in ax.patches:
        inside = patch.get_path().contains_points(middles).reshape(6, 6)
        assert inside.any() and (drawn[inside] == -1).all()
        rgb = colors.to_hex(patch.get_facecolor()).upper()
        drawn[inside], faint[inside] = draw.COLOURS.index(rgb), patch.get_alpha() is not None
    assert (drawn == owner).all() and (faint == np.triu(np.ones((6, 6), bool), 1)).all()


@pytest.mark.parametrize("seed", range(5))
def test_an_outline_encloses_its_area_holes_and_islands_included(seed):
    area = np.random.default_rng(seed).random((7, 9)) < 0.6
    middles = np.stack(np.meshgrid(np.arange(9) + 0.5, np.arange(7) + 0.5), -1).reshape(-1, 2)
    loops = [Path(loop).contains_points(middles) for loop in draw._outline(area).to_polygons()]
    assert (np.logical_xor.reduce(loops).reshape(7, 9) == area).all()  # a point in a hole is in two loops


def test_neighbours_differ_without_colour():
    looks = [draw.colour(i) for i in range(8)]
    for a, b in zip(range(8), [*range(1, 8), 0], strict=True):
        assert abs(grey(looks[a]) - grey(looks[b])) > 0.1 or looks[a]["hatch"] != looks[b]["hatch"]
    assert abs(np.diff([grey(look) for look in looks[:5]])).min() > 0.15  # up to five ranks even without the hatch
    assert max(np.diff([grey(draw.colour(hop, "hops")) for hop in range(8)])) < -0.05  # later hops are darker


def grey(look):
    return np.dot(colors.to_rgb(look["facecolor"]), (0.299, 0.587, 0.114))


def test_curves_put_points_on_their_own_line():
    ax = draw.curves({"ring": ([1, 2, 4], [8, 16, 32])}, {"ring": ([2], [17]), "dense": ([4], [9])})
    line, points, dense = ax.lines
    assert line.get_color() == points.get_color() != dense.get_color()
    assert points.get_ydata() == [17] and points.get_linestyle() == "None"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ring", "dense"]


def test_what_was_only_allocated_is_hollow():
    hollow = {"ring": ([8], [65]), "dense": ([8], [9])}
    ax = draw.curves({"ring": ([1, 8], [8, 64])}, {"ring": ([1], [8])}, hollow=hollow)
    _, computed, allocated, _ = ax.lines
    assert computed.get_markerfacecolor() == computed.get_color() == allocated.get_color()
    assert allocated.get_markerfacecolor() == "white" and allocated.get_ydata() == [65]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ring", "dense"]


def test_a_method_has_one_colour_in_every_figure():
    ax = draw.curves({"collective: 2·n·d": ([1, 2], [1, 2]), "ring, forward": ([1, 2], [1, 2])})
    bar = draw.bars({"ring": {"a": 1}, "collective": {"a": 2}}).patches
    assert [x.get_color() for x in ax.lines] == [colors.to_hex(x.get_facecolor()).upper() for x in bar[::-1]]
    assert ax.lines[1].get_color() == draw.METHODS["ring"][0]
    alone = draw.bars({"MiB": {"ring,\nreported": 1, "robust ring": 2, "collective": 3}}).patches
    seen = [colors.to_hex(x.get_facecolor()).upper() for x in alone]
    assert seen == [draw.METHODS["ring"][0], draw.INKS[0], draw.METHODS["collective"][0]]
    inks = [*(ink for ink, *_ in draw.METHODS.values()), *draw.INKS]
    assert len(set(inks)) == len(inks)  # and no two things one colour


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RINGREF_FIGURES", raising=False)
    assert draw.save(example()[1].figure, "x") is None and list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RINGREF_FIGURES", str(tmp_path / "there"))
    assert draw.save(example()[1].figure, "x") == tmp_path / "there" / "x.svg"


def test_the_pieces_that_are_drawn_are_all_pairs_that_a_mask_lets_through():
    mine = simulate(lambda ring: partition(12, ring, "zigzag"), 3)
    times = np.zeros((12, 12), int)
    for a in mine:
        for b in mine:
            for _, kind, q_at, k_at in draw.met(a, b, causal=True):
                seen = np.tril(np.ones((q_at.shape[1], k_at.shape[1]), int)) if kind == "causal" else 1
                times[q_at[0][:, None], k_at[0]] += seen
    assert (times == np.tril(np.ones((12, 12), int))).all()


def test_timeline_and_bars_draw_what_they_are_given():
    ax = draw.timeline([("rank 0", 0, 2, "block"), ("rank 1", 1, 4, "wait")])
    assert [(p.get_x(), p.get_width()) for p in ax.patches] == [(0, 2), (1, 3)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    kinds = "compute", "message: K, V", "message: dK, dV", "ring, captured"
    ax = draw.timeline([("rank 0", i, i + 1, kind) for i, kind in enumerate(kinds)])
    assert [p.get_hatch() for p in ax.patches] == ["", "", "//", "//"]
    ax = draw.bars({"fwd": {"dense": 1, "ring": 2}, "bwd": {"dense": 3, "ring": 4}})
    assert [p.get_height() for p in ax.patches] == [1, 2, 3, 4]
    ax = draw.bars({"fwd": {"dense": 1, "ring": 2}}, log=True)
    assert not ax.patches and [x.get_ydata().tolist() for x in ax.lines] == [[1, 2]]


def test_a_ring_has_an_arrow_from_every_rank_to_the_next():
    ax = draw.ring([[("K0", 0)], [("K1", 1), ("dK2", 2)], []])
    assert len(ax.patches) == 3
    assert [t.get_text() for t in ax.texts] == ["rank\n0", "K0", "rank\n1", "K1", "dK2", "rank\n2"]


def test_sizes_read_as_people_say_them():
    assert [draw.short(x) for x in (8, 1536, 2**20, 3 * 2**30)] == ["8", "1.5k", "1M", "3G"]


def test_dots_stand_in_their_rows_and_what_is_infinite_at_the_edge():
    ax = draw.dots({"a": {"x": 0.1, "y": float("inf")}, "b": {"x": 2000.0}}, title="t")
    (x, y) = (dict(zip(line.get_ydata(), line.get_xdata())) for line in ax.lines)
    assert [round(row) for row in x] == [0, 1] and list(x.values()) == [0.1, 2000.0]
    assert list(y.values()) == [ax.get_xlim()[1]] and ax.get_xticklabels()[0].get_text() == "NaN"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]


def test_series_of_one_method_have_its_colour_and_dashes_of_their_own():
    names = ["ring", "other", "ring, a", "dilated", "ring, b", "ring, c"]
    ax = draw.curves({name: ([1, 2], [1, 2]) for name in names})
    looks = {line.get_label(): (line.get_color(), str(line._dash_pattern)) for line in ax.lines}
    assert {looks[name][0] for name in names if name.startswith("ring")} == {draw.METHODS["ring"][0]}
    assert len(set(looks.values())) == len(names)


def test_a_power_is_drawn_from_where_it_starts_and_named():
    ax = draw.power(draw.figure()[1], (2, 4, 8), "n²", 3.0, 2)
    ((xs, ys),) = [line.get_data() for line in ax.lines]
    assert list(xs) == [2, 4, 8] and list(ys) == [3.0, 12.0, 48.0]
    assert [text.get_text() for text in ax.texts] == ["n²"]
