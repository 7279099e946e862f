"""Swap the word, keep the result: all methods, on every rank, find what dense finds on one rank.

float64, out, lse, dq, dk and dv with random dO and dlse, errors relative to norms, over an
adversarial network.
"""

import itertools
from functools import partial

import pytest
import torch
from common import (
    DILATIONS,
    LAYOUTS,
    METHODS,
    OTHERS,
    Inputs,
    Results,
    Split,
    assert_close,
    both_ways,
    documents,
    inputs,
    layout,
    swap,
    window,
)
from conftest import skipped, taken

from ringref import Dilation, Shard, dense_attention, partition, ring_attention, simulate
from ringref.engine import plan

RANKS = (1, 2, 3, 4, 5, 8)
MASKS = (None, documents, window)
CHUNKS = (None, 1, 3, 7)
HEADS = ((4, 2), (3, 1), (2, 2), (6, 2))
BACKENDS = ("auto", "math")


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_swap(name, p):
    """The product of methods, layouts, p, dilations and causal (with many ranks causal takes turns
    with the layouts, p and dilations); the other arguments take turns with all of them."""
    i, j = LAYOUTS.index(name), RANKS.index(p)
    split = Split(layout(name, 23, p))
    m = sum(len(queries) for queries, _ in split.positions)
    for (x, dilation), causal in itertools.product(enumerate(DILATIONS), (False, True)):
        if p > 4 and (i + j + x + causal) % 2:
            continue
        turn = 2 * i + j + x + causal
        h, g = HEADS[(i + 2 * j + x + 2 * causal) % len(HEADS)]
        arguments = {
            "causal": causal,
            "dilation": DILATIONS[dilation],
            "mask_mod": MASKS[turn % len(MASKS)],
            "q_chunk": CHUNKS[(turn + 2 * i + j) % len(CHUNKS)],
            "scale": (None, 0.7)[(i + j + x) % 2],
        }
        given = inputs(m, 23, b=1 + turn % 2, h=h, g=g, seed=turn)
        true = split.true(given, **arguments)
        for method in METHODS:
            backend = BACKENDS[(turn // 3 + i) % 2] if method != "dense" else "auto"
            what = f"{method} {name} p={p} h={h} g={g} {backend} {dilation} {arguments}"
            try:
                found = split.found(METHODS[method], given, backend=backend, **arguments)
            except NotImplementedError as error:
                skipped.append(f"{what}: {error}")
                continue
            for rank, (one, other) in enumerate(zip(found, true, strict=True)):
                assert_close(one, other, f"rank {rank}, {what}")
            taken.append(what)


def test_nothing_was_skipped():
    assert taken and not skipped


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("n", [0, 1, 5, 24, 31])
def test_partition(name, n):
    for p in RANKS:
        for rank, (positions, _) in enumerate(layout(name, n, p)):
            shard = simulate(lambda ring: partition(n, ring, name), p)[rank]
            assert shard.positions.equal(positions) and shard.kv_positions.equal(positions)


def swapped(given, split, **arguments):
    swap(given, split, OTHERS | {"dense": dense_attention}, **arguments)


CASES = {
    "three, one and two tokens": lambda: (split_of([[0, 1, 2], [3], [4, 5]]), {}),
    "an empty shard": lambda: (split_of([[4, 5, 6], [], [0, 1, 2, 3]]), {}),
    "all but one shard empty": lambda: (split_of([[], [0, 1, 2], [], []]), {}),
    "fewer tokens than ranks": lambda: (Split(layout("zigzag", 3, 5)), {}),
    "one token": lambda: (Split(layout("striped", 1, 4)), {}),
    "no tokens": lambda: (Split(layout("contiguous", 0, 3)), {}),
    "no queries": lambda: (split_of([[], []], [[0, 1, 2], [3]]), {}),
    "no keys": lambda: (split_of([[3, 1], [0]], [[], []]), {}),
    "reversed rows": lambda: (split_of([[7, 6, 5, 4], [3, 2, 1, 0]]), {}),
    "keys on other ranks than queries": lambda: (
        split_of([[9, 11], [], [10]], [[], [5, 3, 1, 7, 9], [0, 2, 4, 6, 8]]),
        {},
    ),
    "queries beyond the keys": lambda: (split_of([[100], [7, 40]], [[2, 0], [1]]), {}),
    "more queries than keys": lambda: (split_of([list(range(9)), list(range(9, 13))], [[0], [1, 2]]), {}),
    "tail": lambda: (Split(layout("contiguous", 22, 3)), {"dilation": Dilation([8], [2])}),
    "segments longer than all": lambda: (Split(layout("striped", 11, 3)), {"dilation": Dilation([99, 1000], [3, 5])}),
    "r does not divide w": lambda: (Split(layout("zigzag", 26, 4)), {"dilation": Dilation([7, 11], [3, 4])}),
    "r = w": lambda: (Split(layout("uneven", 19, 3)), {"dilation": Dilation([3, 7], [3, 7])}),
    "more rates than heads": lambda: (Split(layout("contiguous", 24, 3)), {"dilation": Dilation([16, 24], [8, 12])}),
    "the same branch twice": lambda: (Split(layout("contiguous", 12, 2)), {"dilation": Dilation([6, 6], [2, 2])}),
    "more groups than heads": lambda: (
        Split(layout("contiguous", 20, 3)),
        {"dilation": Dilation([4, 6, 8, 10, 12, 14, 20], [1, 2, 3, 1, 2, 1, 4], heads="grouped")},
    ),
    "uneven documents": lambda: (Split(layout("zigzag", 29, 3)), {"mask_mod": documents}),
    "nobody sees anything": lambda: (Split(layout("zigzag", 9, 2)), {"mask_mod": lambda b, h, q, k: (q < 0) & (k < 0)}),
    "a mask of the keys only": lambda: (Split(layout("zigzag", 9, 2)), {"mask_mod": lambda b, h, q, k: k % 3 > 0}),
    "a mask that is a constant": lambda: (Split(layout("zigzag", 9, 2)), {"mask_mod": lambda b, h, q, k: True}),
    "a mask without all dimensions": lambda: (
        Split(layout("zigzag", 9, 2)),
        {"mask_mod": lambda b, h, q, k: (q >= k)[0, 0]},
    ),
    "a chunk larger than all": lambda: (Split(layout("zigzag", 9, 2)), {"q_chunk": 10**6}),
    "scale 0": lambda: (Split(layout("striped", 9, 2)), {"scale": 0.0}),
    "negative scale": lambda: (Split(layout("striped", 9, 2)), {"scale": -1.0}),
}


def split_of(queries, keys=None) -> Split:
    index = [torch.tensor(x, dtype=torch.int64) for x in queries]
    others = index if keys is None else [torch.tensor(x, dtype=torch.int64) for x in keys]
    return Split(list(zip(index, others, strict=True)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_corner(name, causal):
    split, arguments = CASES[name]()
    m, n = (sum(map(len, side)) for side in zip(*split.positions, strict=True))
    for backend in BACKENDS:
        methods = {x: partial(method, backend=backend) for x, method in METHODS.items()}
        swap(inputs(m, n, h=6, g=2), split, methods, causal=causal, **arguments)


@pytest.mark.parametrize("heads", [(6, 2), (6, 3), (12, 4), (5, 5), (8, 1), (9, 3), (1, 1)])
@pytest.mark.parametrize("dilation", ["longnet", "odd", "grouped"])
def test_grouped_query_heads_under_dilation(heads, dilation):
    given, split = inputs(20, h=heads[0], g=heads[1]), Split(layout("uneven", 20, 3))
    swap(given, split, OTHERS, causal=True, dilation=DILATIONS[dilation])


@pytest.mark.parametrize("dilation", ["none", "longnet", "odd", "grouped"])
@pytest.mark.parametrize("masked", [None, documents])
def test_parts(dilation, masked, monkeypatch):
    """Large inputs are worked on in parts of the heads; make every input large."""
    for name in ("_PART_BYTES", "_PART_BYTES_OF_TWO"):
        monkeypatch.setattr(plan, name, 1)
    plan.parts.cache_clear()
    try:
        for h, g in ((6, 6), (12, 3), (10, 5)):
            split, arguments = Split(layout("zigzag", 21, 3)), {"dilation": DILATIONS[dilation]}
            swap(inputs(21, h=h, g=g), split, OTHERS, causal=True, mask_mod=masked, **arguments)
    finally:
        plan.parts.cache_clear()


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_large_logits(size):
    for dilation in (None, DILATIONS["longnet"]):
        swap(inputs(17, size=size), Split(layout("zigzag", 17, 3)), causal=True, dilation=dilation)


@pytest.mark.parametrize("method", METHODS)
def test_two_forwards_before_two_backwards(method):
    split, attention = Split(layout("zigzag", 14, 3)), METHODS[method]
    cases = [(inputs(14, seed=1), {"causal": True}), (inputs(14, seed=2), {"dilation": DILATIONS["odd"]})]

    def on(ring):
        mine, leaves, results = [], [], []
        for given, arguments in cases:
            mine.append(given.cut(*split.rows[ring.rank]))
            leaves.append([x.clone().requires_grad_() for x in mine[-1][:3]])
            results.append(attention(*leaves[-1], shard=split.shard(ring), **arguments))
        for given, result in zip(mine, results, strict=True):
            torch.autograd.backward(result, (given.dout, given.dlse))
        return [
            Results(*(x.detach() for x in result), *(x.grad for x in leaf))
            for result, leaf in zip(results, leaves, strict=True)
        ]

    found = simulate(on, 3, adversarial=True)
    for i, (given, arguments) in enumerate(cases):
        for rank, true in enumerate(split.true(given, **arguments)):
            assert_close(found[rank][i], true, f"call {i}, rank {rank}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", ["out", "lse", "sum"])
def test_gradient_of_one_result_only(method, loss):
    """`sum` sends an expanded dO; the other result gets none."""
    given, split = inputs(13), Split(layout("uneven", 13, 3))
    ones = given._replace(dout=torch.ones_like(given.dout))
    zero = [torch.zeros_like(x) for x in given[3:]]
    given = {"out": given._replace(dlse=zero[1]), "lse": given._replace(dout=zero[0])}.get(
        loss, ones._replace(dlse=zero[1])
    )

    def on(ring):
        mine = given.cut(*split.rows[ring.rank])
        leaves = [x.clone().requires_grad_() for x in mine[:3]]
        out, lse = METHODS[method](*leaves, shard=split.shard(ring), causal=True)
        if loss == "sum":
            out.sum().backward()
        elif loss == "out":
            out.backward(mine.dout)
        else:
            lse.backward(mine.dlse)
        return Results(out.detach(), lse.detach(), *(x.grad for x in leaves))

    for rank, true in enumerate(split.true(given, causal=True)):
        assert_close(simulate(on, 3, adversarial=True)[rank], true, f"rank {rank}")


STRIDES = {
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "head dim first": lambda x: x.movedim(3, 0).contiguous().movedim(0, 3),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "cut from a wider tensor": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded heads": lambda x: x[:, :, :1].expand(x.shape),
    "expanded tokens": lambda x: x[:, :1].expand(x.shape),
    "expanded head dim": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("dilation", ["none", "odd"])
def test_strides(name, method, dilation):
    """Any strides will do, of q, k, v, dO and dlse, and none of them is written to."""
    strided, split = STRIDES[name], Split(layout("uneven", 12, 2))
    whole, arguments = inputs(12), {"causal": True, "dilation": DILATIONS[dilation]}

    def on(ring):
        mine = whole.cut(*split.rows[ring.rank])
        mine = Inputs(*map(strided, mine[:4]), strided(mine.dlse[..., None])[..., 0])
        before = [x.clone() for x in mine]
        leaves = [x.detach().requires_grad_() for x in mine[:3]]
        out, lse = METHODS[method](*leaves, shard=split.shard(ring), **arguments)
        torch.autograd.backward((out, lse), mine[3:])
        assert all(map(torch.equal, mine, before)), "an input was written to"
        return Inputs(*before), Results(out.detach(), lse.detach(), *(x.grad for x in leaves))

    found = simulate(on, 2, adversarial=True)
    dims = (1, 1, 1, 1, 2)
    given = Inputs(*(torch.cat(x, i) for i, x in zip(dims, zip(*(x for x, _ in found), strict=True), strict=True)))
    for rank, true in enumerate(split.true(given, **arguments)):
        assert_close(found[rank][1], true, f"rank {rank}")


@pytest.mark.parametrize("method", METHODS)
def test_who_needs_gradients(method):
    """Each rank asks for other gradients, one for none at all; all get what they asked for."""
    wants = [(True, True, True), (False, False, False), (True, False, True), (False, True, False)]
    given, split = inputs(15), Split(layout("zigzag", 15, 4))

    def on(ring):
        mine = given.cut(*split.rows[ring.rank])
        leaves = [x.clone().requires_grad_(want) for x, want in zip(mine[:3], wants[ring.rank], strict=True)]
        result = METHODS[method](*leaves, shard=split.shard(ring), causal=True)
        torch.autograd.backward(result, mine[3:])
        return [x.grad for x in leaves]

    true = split.true(given, causal=True)
    for rank, grads in enumerate(simulate(on, 4, adversarial=True)):
        for grad, one, want in zip(grads, true[rank][2:], wants[rank], strict=True):
            assert (grad is None) == (not want)
            if want:
                assert (grad - one).norm() <= 1e-10 * one.norm()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_needs_gradients(method):
    given, split = inputs(9), Split(layout("zigzag", 9, 2))

    def on(ring):
        mine = given.cut(*split.rows[ring.rank])
        free = METHODS[method](*mine[:3], shard=split.shard(ring))
        leaves = [x.clone().requires_grad_() for x in mine[:3]]
        with torch.no_grad():
            frozen = METHODS[method](*leaves, shard=split.shard(ring))
        with torch.inference_mode():
            METHODS[method](*leaves, shard=split.shard(ring))
        return [*free, *frozen]

    for results in simulate(on, 2, adversarial=True):
        assert not any(x.requires_grad for x in results)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_one_and_three_of_four(method):
    """A ring among some of the ranks, while the others form their own."""
    given, split = inputs(13), Split(layout("zigzag", 13, 2))

    def on(ring):
        mine = ring.among([1, 3] if ring.rank % 2 else [0, 2])
        rows = given.cut(*split.rows[mine.rank])
        return both_ways(METHODS[method], rows, shard=split.shard(mine), causal=True)

    true = split.true(given, causal=True)
    for rank, one in enumerate(simulate(on, 4, adversarial=True)):
        assert_close(one, true[rank // 2], f"rank {rank}")


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method):
    """Mixed precision is the caller's choice of q, k and v, not of what is computed with them."""
    given, split = inputs(16, dtype=torch.float32), Split(layout("zigzag", 16, 2))
    attention = METHODS[method]

    def cast(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(*args, **kwargs)

    for backend in ("auto", "math"):
        plain, mixed = (split.found(f, given, causal=True, backend=backend) for f in (attention, cast))
        for one, other in zip(mixed, plain, strict=True):
            assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing(method):
    """Recomputed in the backward, hops and all."""
    given, split = inputs(16), Split(layout("zigzag", 16, 3))

    def on_demand(q, k, v, **arguments):
        again = partial(METHODS[method], **arguments)
        return torch.utils.checkpoint.checkpoint(again, q, k, v, use_reentrant=False)

    for rank, (one, true) in enumerate(
        zip(split.found(on_demand, given, causal=True), split.true(given, causal=True), strict=True)
    ):
        assert_close(one, true, f"rank {rank}")


def test_a_layer_shares_its_keys():
    """k and v the same tensor, and q too: their gradients add up."""
    x = inputs(10, h=2, g=2)

    def on(ring):
        shard = partition(10, ring, "zigzag")
        mine = shard.take(x.q).requires_grad_()
        result = ring_attention(mine, mine, mine, shard=shard, causal=True)
        torch.autograd.backward(result, (shard.take(x.dout), shard.take(x.dlse, 2)))
        return shard.gather(mine.grad)

    whole = x.q.clone().requires_grad_()
    result = dense_attention(whole, whole, whole, causal=True, shard=Shard(torch.arange(10), None))
    torch.autograd.backward(result, (x.dout, x.dlse))
    for grad in simulate(on, 3, adversarial=True):
        assert (grad - whole.grad).norm() < 1e-10 * whole.grad.norm()
