"""Segments of many lengths, and windows, in one call of a kernel that takes them: a stand-in on the CPU keeps
FlashAttention's rules, and what the plan makes of positions is judged through it. On a GPU: tests/test_gpu.py.
"""

import itertools
import random
import time

import pytest
import torch
from common import DILATIONS, OTHERS, Split, inputs, layout, swap

from ringref import Dilation, block, explain, simulate
from ringref.engine import kernels, route, visits
from ringref.engine.call import Sight
from ringref.shard import Positions, counted


def _mask(ragged, b):
    """What FlashAttention's varlen call sees: segments by their ends, aligned at their last query and last key."""
    (q_ends, k_ends), longest = ragged.ends(b, torch.device("cpu")), ragged.longest
    assert q_ends.dtype == k_ends.dtype == torch.int32
    assert (int(q_ends.diff().max()), int(k_ends.diff().max())) == longest
    keep = torch.zeros(int(q_ends[-1]), int(k_ends[-1]), dtype=torch.bool)
    for (q, q_end), (k, k_end) in zip(itertools.pairwise(q_ends.tolist()), itertools.pairwise(k_ends.tolist())):
        ahead = torch.arange(k, k_end) - k_end - (torch.arange(q, q_end)[:, None] - q_end)
        for bound, beyond in ((ragged.left, -ahead), (ragged.right, ahead)):
            assert bound is None or bound >= 0  # FlashAttention takes what is below 0 for no bound
            ahead = ahead if bound is None else ahead.masked_fill(beyond > bound, 10**9)
        keep[q:q_end, k:k_end] = ahead < 10**9
    return keep


def _packed(x):
    """b h s d → 1 1 (b s) h d"""
    return x.transpose(1, 2).flatten(0, 1)[None, None]


@pytest.fixture
def calls(monkeypatch):
    """A CPU kernel that takes ragged segments, however few shapes they have; what it was called for."""
    made = []

    def forward(q, k, v, ragged, scale):
        made.append(ragged)
        keep = _mask(ragged, len(q))
        assert keep.any(1).all() and len(ragged.lengths)  # or FlashAttention's lse would be +inf
        out, lse = block.forward(*map(_packed, (q, k, v)), scale, keep)
        return (x[0, 0].unflatten(0, (len(q), -1)).transpose(1, 2) for x in (out, lse))

    def backward(dout, q, k, v, out, lse, ragged, scale):
        made.append(ragged)
        given = [_packed(x) for x in (q, k, v, out, lse[..., None])]
        given[-1] = given[-1][..., 0]
        grads = block.backward(_packed(dout), None, *given, scale, _mask(ragged, len(q)))
        return (x[0, 0].unflatten(0, (len(q), -1)).transpose(1, 2) for x in grads)

    how = ("cpu", (torch.float64, torch.float32), 2**16, 1, True)
    only = lambda task: "is for ragged segments" if task.kind != "ragged" else kernels._limit(task, *how)
    stand_in = kernels.KERNELS[-1]._replace(name="stand_in", why_not=only, ragged=(forward, backward))
    monkeypatch.setattr(kernels, "KERNELS", (stand_in, *kernels.KERNELS))
    monkeypatch.setattr(visits, "_SHAPES", 0)
    _forget()
    yield made
    _forget()


def _forget():
    """Plans and choices were made for other kernels."""
    for cached in (kernels._admitted, visits.visits):
        cached.cache_clear()


def documents(n, seed):
    """cu_seqlens of random lengths, some of one token, some of none."""
    dice = random.Random(seed)
    return torch.tensor(sorted([0, n, 1, 1, *(dice.randrange(n + 1) for _ in range(4))]))


CALLS = {
    "window": {"window": (5, 2)},
    "narrow window": {"window": (0, 0)},
    "causal window": {"window": (4, None), "causal": True},
    "documents": {"packed": True},
    "causal documents": {"packed": True, "causal": True},
    "windows in documents": {"packed": True, "window": (3, 3)},
    "windows in branches": {"window": (6, 1), "dilation": DILATIONS["odd"]},
    "documents in branches": {"packed": True, "causal": True, "dilation": DILATIONS["longnet"]},
    "all of it": {"packed": True, "window": (7, 0), "dilation": DILATIONS["grouped"]},
}


@pytest.mark.parametrize("name", ["zigzag", "striped", "permuted"])
@pytest.mark.parametrize("what", CALLS)
def test_one_call_of_many_segments(what, name, calls):
    """The methods through the stand-in against dense, on one rank and on several, with value heads of another size."""
    arguments, n = dict(CALLS[what]), 29
    if arguments.pop("packed", False):
        arguments["cu_seqlens"] = documents(n, len(what) + len(name))
    for p, dv in ((1, 3), (3, 5)):
        swap(inputs(n, h=3, g=3, dv=dv), Split(layout(name, n, p)), OTHERS, **arguments)
        assert calls


@pytest.mark.parametrize("method", OTHERS)
def test_decoding_through_many_segments(method, calls):
    split = Split(layout("decoding", 29, 3))
    swap(inputs(4, 29), split, {method: OTHERS[method]}, window=(9, 4))
    assert calls


@pytest.mark.parametrize("count", [2, 5, 9])
@pytest.mark.parametrize("window", [(1, 0), (3, 2), (7, 0), (12, 1)])
def test_a_chunk_of_prefill_through_many_segments(window, count, calls):
    """More keys than queries, and queries that follow them or lie among them."""
    n = 29
    for last in (n, n - 4):
        for p in (1, 3):
            queries, keys = torch.arange(last - count, last).tensor_split(p), torch.arange(n).tensor_split(p)
            swap(inputs(count, n), Split(list(zip(queries, keys))), {"ring": OTHERS["ring"]}, window=window)
    assert calls


def test_what_cannot_be_ragged_is_not(calls):
    """Masks, chunks and a backend's name."""
    split, cu_seqlens = Split(layout("zigzag", 29, 2)), documents(29, 1)
    for how in (
        {"mask_mod": lambda b, h, q, k: q != k}, {"score_mod": lambda s, b, h, q, k: s / 2}, {"q_chunk": 5},
        {"backend": "math"}, {"scale": -1.0},
    ):  # fmt: skip
        before = len(calls)
        swap(inputs(29), split, {"ring": OTHERS["ring"]}, cu_seqlens=cu_seqlens, causal=True, **how)
        assert len(calls) == before, how


def test_explain_says_so(calls):
    q = torch.zeros(1, 29, 4, 8)
    said = explain(q, cu_seqlens=documents(29, 1), causal=True)
    assert said.startswith("ragged blocks: stand_in\n") and "not flash: runs on cuda, not on cpu" in said
    assert "not cpu_flash: takes no segments of lengths of their own here" in said
    assert said.endswith("all keys: keys stay; 1 visit (ragged) of strided views")
    assert explain(q, window=(3, 0)).endswith("1 visit (ragged) of strided views")
    assert "ragged" not in explain(q, cu_seqlens=documents(29, 1), causal=True, q_chunk=4)


# -------------------------------------------------------------------------------------------- plans


def planned(n, ends, bounds, **how):
    strand, every = visits.strands(None, 1, Positions(torch.tensor(ends)))[0], counted(n)
    return visits.visits(strand, every, every, bounds, **how)


def test_documents_of_equal_shape_fold_and_many_shapes_are_one_call():
    (one,) = planned(4096, list(range(0, 4097, 64)), (None, 0), ragged=True)
    assert (one.kind, one.queries.m, one.queries.c, one.queries.strided) == ("causal", 64, 64, True)
    dice = random.Random(0)
    lengths = [dice.choice((1, dice.randrange(1, 200))) for _ in range(3000)]
    ends = [0, *itertools.accumulate(lengths)]
    (one,) = planned(ends[-1], ends, (None, 0), ragged=True)
    assert one.kind == "ragged" and one.ragged.lengths.tolist() == [[x, x] for x in lengths]
    assert (one.ragged.left, one.ragged.right) == (None, 0) and one.queries.a_range and one.queries.c == ends[-1]
    assert len(planned(ends[-1], ends, (None, 0))) == len(set(lengths))  # a launch for each, where no kernel takes them


@pytest.mark.parametrize("ragged", [False, True])
def test_many_documents_are_planned_in_a_moment(ragged):
    """64k of them, over two million tokens."""
    ends = torch.nn.functional.pad(torch.randint(1, 64, (2**16,), generator=torch.manual_seed(0)).cumsum(0), (1, 0))
    begin = time.process_time()
    assert len(planned(int(ends[-1]), ends.tolist(), (None, 0), ragged=ragged)) == (1 if ragged else 63)
    assert time.process_time() - begin < 3  # 0.6 on one core


def test_a_window_is_one_call():
    for bounds in ((100, 0), (30, 70)):
        (one,) = planned(4096, [0, 4096], bounds, ragged=True)
        assert (one.kind, one.ragged.left, one.ragged.right) == ("ragged", *bounds)
        assert one.queries.a_range and one.queries.c == 4096
        cut = planned(4096, [0, 4096], bounds)
        assert {x.kind for x in cut} <= {"causal", "full"} and len(cut) < 12


def test_the_mask_written_out():
    """`Ragged.keep`, by which kernels are proved, is what the ends say."""
    dice = random.Random(1)
    for left, right in itertools.product((None, 0, 3), (None, 0, 2)):
        lengths = torch.tensor([[dice.randrange(1, 9), dice.randrange(1, 9)] for _ in range(5)])
        ragged = visits.Ragged(lengths, left, right)
        assert ragged.keep().equal(_mask(ragged, 1))


def some_positions(dice, n):
    """A run, a run with a gap, every so many, or anything, in any order."""
    a, b = sorted(dice.sample(range(n + 1), 2))
    found = list(range(a, b))
    found = dice.choice([found, found[: dice.randrange(b - a + 1)] + found[dice.randrange(b - a + 1) :]])
    found = dice.choice([found, found, found[:: dice.randrange(1, 5)], dice.sample(range(n), dice.randrange(n))])
    found = sorted(set(found))
    dice.random() < 0.1 and dice.shuffle(found)
    return Positions(torch.tensor(found, dtype=torch.int64))


@pytest.mark.parametrize("draws", [200, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shapes", [0, 2])
@pytest.mark.parametrize("ragged", [True, False])
def test_a_plan_meets_whoever_sees_each_other_once(ragged, shapes, draws, monkeypatch):
    """Any positions, bounds and documents: visits, written out, are the mask."""
    monkeypatch.setattr(visits, "_SHAPES", shapes)
    visits.visits.cache_clear()
    dice, kinds = random.Random(shapes), set()
    for _ in range(draws):
        n = dice.choice((8, 20, 150))
        queries, keys, ends = some_positions(dice, n), some_positions(dice, n), [0, n]
        for _ in range(dice.choice((0, 0, 3, 9))):
            ends.append(dice.randrange(n))
        ends = Positions(torch.tensor(sorted(set(ends))))
        bounds = tuple(dice.choice((None, 0, 1, 3, dice.randrange(n))) for _ in range(2))
        dilation = dice.choice((None, None, Dilation([5, 40], [2, 3]), Dilation([2, 12, 7], [2, 4, 7])))
        sight = Sight(*bounds, ends)
        for strand in visits.strands(dilation, 3, ends):
            met = torch.zeros(len(queries), len(keys), dtype=torch.int64)
            for visit in visits.visits(strand, queries, keys, bounds, ragged=ragged):
                kinds.add(visit.kind)
                for rows, others in zip(visit.queries.index, visit.keys.index):
                    seen = torch.ones(len(rows), len(others), dtype=torch.bool)
                    at = queries.index[rows][:, None], keys.index[others]
                    seen = seen.tril() if visit.kind == "causal" else seen
                    seen = sight.keeps(*at) if visit.kind == "mask" else seen
                    seen = visit.ragged.keep() if visit.kind == "ragged" else seen
                    met[rows[:, None], others] += seen
            at = queries.index[:, None], keys.index
            starts = [ends.index[torch.searchsorted(ends.index, x.contiguous(), right=True) - 1] for x in at]
            (q_in, k_in), (w, r, *_) = (x - y for x, y in zip(at, starts)), strand
            kept = (q_in % w % r == strand.offset) & (k_in % w % r == strand.offset)
            kept &= (starts[0] == starts[1]) & (q_in // w == k_in // w)
            seen, more = (kept & sight.keeps(*at)).any(0), some_positions(dice, n)
            needed = [route._needed(strand, keys, by, bounds) for by in ([queries], [more], [more, queries])]
            assert needed[0].equal(seen.nonzero()[:, 0]) and needed[2].equal(torch.cat(needed[:2]).unique())
            assert met.equal((kept & sight.keeps(*at)).long()), (strand, queries.index, keys.index, bounds, ends.index)
    assert kinds == {"full", "causal", "mask", *(["ragged"] if ragged else [])}


def test_a_kernel_that_is_wrong_about_segments_is_passed_over(calls, monkeypatch):
    """One that aligns at the first query and key, as some do, is found out by the proof."""

    def skewed(q, k, v, ragged, scale):
        lengths = ragged.lengths.flip(0)
        return kernels.KERNELS[0].ragged[0](q, k, v, visits.Ragged(lengths, ragged.left, ragged.right), scale)

    wrong = kernels.KERNELS[0]._replace(name="skewed", ragged=(skewed, kernels.KERNELS[0].ragged[1]))
    monkeypatch.setattr(kernels, "KERNELS", (wrong, *kernels.KERNELS))
    kernels._admitted.cache_clear()
    with pytest.warns(RuntimeWarning, match="skewed is passed over for .* ragged blocks: it "):
        assert kernels.choose("auto", kernels.Task("cpu", torch.float64, 8, "ragged")).name == "stand_in"


def test_simulated_ranks_plan_as_one(calls):
    """Four ranks of packed documents that no boundary cuts: nothing travels, and each makes one call."""
    n, p, split = 64, 4, Split(layout("contiguous", 64, 4))
    cu_seqlens, given = torch.tensor([0, 3, 16, 17, 32, 48, 63, 64]), inputs(n)

    def on(ring):
        mine = given.cut(*split.rows[ring.rank])
        OTHERS["ring"](*mine[:3], causal=True, cu_seqlens=cu_seqlens, shard=split.shard(ring))
        return ring.traffic.received

    simulate(on, p)  # which also proves the kernel
    del calls[:]
    assert simulate(on, p) == [0] * p and len(calls) == p
