"""What must hold without an oracle, finite differences, and budgets of low precision."""

import itertools
import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from common import DILATIONS, METHODS, OTHERS, Inputs, Results, Split, assert_close, both_ways, error, inputs, layout
from hypothesis import given as drawn
from torch.nn.functional import scaled_dot_product_attention

from ringref import Attended, Dilation, merge, partition, simulate
from ringref.engine.visits import Rows

# --------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("w", [17, 1000])
@pytest.mark.parametrize("heads", ["all", "grouped"])
def test_one_full_branch_is_dense(method, w, heads):
    given, split = inputs(17), Split(layout("zigzag", 17, 3))
    one = split.found(METHODS[method], given, dilation=Dilation([w], [1], heads), causal=True)
    for rank, true in enumerate(split.true(given, causal=True)):
        assert_close(one[rank], true, f"rank {rank}")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_branch_twice_is_one(method):
    """Each key counts twice, and so does the sum that divides: only lse knows, by log 2."""
    given, split = inputs(15), Split(layout("striped", 15, 2))
    given = given._replace(dlse=torch.zeros_like(given.dlse))
    once, twice = (split.found(METHODS[method], given, dilation=Dilation([6] * i, [1] * i)) for i in (1, 2))
    for one, two in zip(once, twice, strict=True):
        assert_close(two._replace(lse=two.lse - math.log(2)), one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dilation", ["none", "odd"])
def test_one_rank_is_no_shard(method, dilation):
    given, arguments = inputs(14), {"causal": True, "dilation": DILATIONS[dilation]}
    split = Split(layout("contiguous", 14, 1))
    (one,) = split.found(METHODS[method], given, **arguments)
    assert_close(one, both_ways(METHODS[method], given, **arguments), tolerance=1e-15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dilation", DILATIONS)
def test_the_future_changes_nothing(method, dilation):
    """Another token at position t: nothing before t changes, not by one bit; t itself does."""
    n, t = 20, 11
    given, split = inputs(n), Split(layout("zigzag", n, 3))
    rows = torch.cat([x for x, _ in split.positions])  # the split's rows, end to end
    k, v = (x.clone() for x in (given.k, given.v))
    k[:, rows == t] += 1.0
    v[:, rows == t] -= 1.0
    arguments = {"causal": True, "dilation": DILATIONS[dilation]}
    ends = []
    for one in (given, given._replace(k=k, v=v)):
        found = split.found(METHODS[method], one, **arguments)
        ends.append((torch.cat([x.out for x in found], 1), torch.cat([x.lse for x in found], 2)))
    (out, lse), (other_out, other_lse) = ends
    assert out[:, rows < t].equal(other_out[:, rows < t])
    assert lse[..., rows < t].equal(other_lse[..., rows < t])
    assert not out[:, rows == t].equal(other_out[:, rows == t])


@pytest.mark.parametrize("method", METHODS)
def test_later_queries_send_no_gradient_to_the_future(method):
    """dO of one query alone: keys after it get exactly nothing, and all others something."""
    n, t = 18, 7
    split = Split(layout("striped", n, 3))
    rows = torch.cat([x for x, _ in split.positions])
    given = inputs(n)
    given = given._replace(dout=given.dout * (rows == t)[:, None, None], dlse=given.dlse * (rows == t))
    found = split.found(METHODS[method], given, causal=True)
    for grads in ([x.dk for x in found], [x.dv for x in found]):
        whole = torch.cat(grads, 1)
        assert not whole[:, rows > t].any() and whole[:, rows <= t].all()


@pytest.mark.parametrize("p", [1, 2, 4])
def test_take_and_gather(p):
    """gather undoes take, and its gradient is the sum over ranks of what each asks of the whole."""
    x = torch.randn(2, 11, 3, dtype=torch.float64)
    weights = torch.randn(p, 2, 11, 3, dtype=torch.float64)

    def on(ring, name):
        shard = partition(11, ring, name)
        for dim in (1, -2):
            mine = shard.take(x, dim).requires_grad_(ring.rank != 1)
            whole = shard.gather(mine, dim)
            assert whole.equal(x)
            whole.backward(weights[ring.rank])
            true = shard.take(weights.sum(0))
            assert ring.rank == 1 or (mine.grad - true).norm() < 1e-14 * true.norm()
        return True

    for name in ("contiguous", "zigzag", "striped"):
        assert all(simulate(partial(on, name=name), p, adversarial=True))


# -------------------------------------------------------------------------------------------- merge

# −inf: saw no key
lses = st.lists(st.sampled_from([-math.inf, -700.0, -1.0, 0.0, 2.5, 600.0]), min_size=4, max_size=4)


def attended(lse, seed) -> Attended:
    out = torch.randn(1, 4, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    lse = torch.tensor(lse, dtype=torch.float64).view(1, 1, 4)
    return Attended(out.masked_fill((lse == -math.inf).view(1, 4, 1, 1), 0.0), lse)


def alike(one: Attended, other: Attended) -> bool:
    return error(one.out, other.out) < 1e-14 and error(one.lse, other.lse) < 1e-14


@drawn(lses, lses, lses)
def test_merge_is_associative_and_commutative(x, y, z):
    a, b, c = (attended(lse, i) for i, lse in enumerate((x, y, z)))
    assert alike(merge(a, b), merge(b, a))
    assert alike(merge(merge(a, b), c), merge(a, merge(b, c)))
    nothing = attended([-math.inf] * 4, 9)
    assert alike(merge(a, nothing), a)


@drawn(lses, lses)
def test_merge_has_no_nan_gradients(x, y):
    leaves = [t.clone().requires_grad_() for i, lse in enumerate((x, y)) for t in attended(lse, i)]
    out, lse = merge(Attended(*leaves[:2]), Attended(*leaves[2:]))
    torch.autograd.backward((out, lse), (torch.ones_like(out), torch.ones_like(lse)))
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
    saw_nothing = (leaves[1] == -math.inf) & (leaves[3] == -math.inf)
    share = leaves[1].grad + leaves[3].grad
    assert torch.allclose(share.masked_fill(saw_nothing, 1.0), torch.ones_like(share), atol=1e-9) or (
        (out.detach() != 0).any()
    )


def test_merge_is_attention_over_the_union():
    """Keys in three sets, merged, with gradients through merge, is attention over all of them."""
    given = inputs(5, 12)
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    q, k, v = leaves
    parts = [METHODS["ring"](q, k[:, a:b], v[:, a:b]) for a, b in ((0, 5), (5, 5), (5, 12))]
    out, lse = merge(merge(parts[0], parts[1]), parts[2])
    torch.autograd.backward((out, lse), given[3:])
    found = Results(out.detach(), lse.detach(), *(x.grad for x in leaves))
    assert_close(found, both_ways(METHODS["dense"], given))


def test_merge_in_low_precision_keeps_float32():
    a, b = (Attended(x.out.bfloat16(), x.lse.float()) for x in (attended([0.0] * 4, i) for i in (0, 1)))
    assert merge(a, b).out.dtype == merge(a, b).lse.dtype == torch.float32


# ------------------------------------------------------------------------------- finite differences


class Simulated(torch.autograd.Function):
    """The whole of a simulated ring as one function: gradcheck runs all nodes on one thread."""

    @staticmethod
    def forward(ctx, q, k, v, found):
        ctx.save_for_backward(q, k, v)
        ctx.found = found
        ends = found(Inputs(q, k, v, torch.zeros_like(q), torch.zeros_like(q[..., 0]).mT))
        return torch.cat([x.out for x in ends], 1), torch.cat([x.lse for x in ends], 2)

    @staticmethod
    def backward(ctx, dout, dlse):
        ends = ctx.found(Inputs(*ctx.saved_tensors, dout, dlse))
        return *(torch.cat([x[i] for x in ends], 1) for i in (2, 3, 4)), None


def softcap_and_bias(score, b, h, q_idx, kv_idx):
    return 1.5 * torch.tanh(score / 1.5) - 0.3 * (h + 1) * (q_idx - kv_idx).abs()


GRADCHECKS = {
    "causal": {"causal": True},
    "dilated": {"causal": True, "dilation": Dilation([3, 6], [2, 3])},
    "grouped, chunked": {"dilation": Dilation([2, 5], [1, 2], heads="grouped"), "q_chunk": 2},
    "softcap, a bias by head and distance": {"causal": True, "score_mod": softcap_and_bias},
    "softcap in a window in documents": {
        "window": (2, 1), "cu_seqlens": torch.tensor([0, 4, 6]), "score_mod": softcap_and_bias
    },
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(method, name):
    given, split = inputs(6, b=1, h=2, g=1, d=2), Split(layout("uneven", 6, 3))
    leaves = [x.requires_grad_() for x in given[:3]]

    @torch.enable_grad()
    def found(given):
        return split.found(METHODS[method], given, **GRADCHECKS[name])

    def finite(out, lse):  # −inf has no differences; its gradient is shown to be zero elsewhere
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    def whole(*leaves):
        return finite(*Simulated.apply(*leaves, found))

    def alone(*leaves):
        return finite(*METHODS[method](*leaves, **GRADCHECKS[name]))

    for function in (whole, alone):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharded", [False, True])
def test_double_backward_raises(method, sharded):
    def on(ring):
        shard = partition(8, ring, "zigzag") if sharded else None
        given = inputs(4 if sharded else 8)
        q, k, v = (x.requires_grad_() for x in given[:3])
        out, _ = METHODS[method](q, k, v, shard=shard)
        (dq,) = torch.autograd.grad((out**2).sum(), q, create_graph=True)
        if method == "dense" and not sharded:  # plain autograd: test_errors shows that its second derivative is right
            return dq.requires_grad
        with pytest.raises(RuntimeError, match="once_differentiable|differentiate twice"):
            dq.sum().backward()
        return True

    assert all(simulate(on, 2 if sharded else 1))


# ------------------------------------------------------------------------------------ low precision


def plain(q, k, v, dout, dlse, causal) -> Results:
    """What PyTorch finds in this dtype: its attention for out, einsum and logsumexp for lse."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    heads = [x.transpose(1, 2) for x in leaves]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True)
    keys = heads[1].repeat_interleave(q.shape[2] // k.shape[2], 1)
    scores = heads[0] @ keys.mT / math.sqrt(q.shape[3])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    lse = scores.logsumexp(-1)
    torch.autograd.backward((out.transpose(1, 2), lse), (dout, dlse.to(lse.dtype)))
    return Results(out.transpose(1, 2).detach(), lse.detach(), *(x.grad for x in leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["math", "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_error_budget(method, backend, dtype):
    """On every rank, of every tensor: at most three times the error of plain PyTorch attention."""
    n, p = 96, 3
    attention = partial(METHODS[method], backend=backend)
    for name, causal, seed in itertools.product(("zigzag", "uneven"), (False, True), (0, 1)):
        split = Split(layout(name, n, p))
        given = inputs(n, h=4, g=2, d=32, dtype=dtype, seed=seed)
        rows = torch.cat([x for x, _ in split.positions])
        order = rows.argsort()
        exact = split.true(Inputs(*(x.double() for x in given)), causal=causal)
        whole = plain(*given.cut(order, order), causal)
        for rank, one in enumerate(split.found(attention, given, causal=causal)):
            mine = rows[split.rows[rank][0]]
            yardstick = Results(*(x.index_select(2 if i == 1 else 1, mine) for i, x in enumerate(whole)))
            for what, ours, theirs, true in zip(Results._fields, one, yardstick, exact[rank], strict=True):
                assert ours.dtype == (torch.float32 if what == "lse" else dtype)
                budget = 3 * error(theirs, true)
                assert error(ours, true) <= budget, (what, rank, name, causal, error(ours, true), budget)


def assert_within_budget(found, yardstick, exact, where=""):
    """On every rank, of every tensor: at most three times the yardstick's error, and one rounding."""
    for one, theirs, true in zip(found, yardstick, exact, strict=True):
        for what, x, y, z in zip(Results._fields, one, theirs, true, strict=True):
            budget = 3 * error(y, z) + torch.finfo(x.dtype).eps
            assert error(x, z) <= budget, (where, what, error(x, z), budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", OTHERS)
def test_many_branches_do_not_lose_bits(method, dtype):
    """The error of many merges stays within three of dense in this dtype, and one rounding."""
    split = Split(layout("striped", 64, 4))
    dilation = Dilation([4, 8, 16, 32, 64], [1, 2, 2, 4, 4])
    arguments = {"causal": True, "dilation": dilation, "q_chunk": 3}
    given = inputs(64, d=16, dtype=dtype)
    exact = split.true(Inputs(*(x.double() for x in given)), **arguments)
    yardstick = split.true(given, **arguments)
    found = split.found(OTHERS[method], given, backend="math", **arguments)
    assert_within_budget(found, yardstick, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", ["all", "grouped"])
@pytest.mark.parametrize("method", OTHERS)
def test_awkward_dilations_keep_the_budget_on_fused_kernels(method, heads, dtype):
    """Fewer heads than offsets, rates that do not divide, a tail of one token, w > n, a segment over all ranks."""
    n, p = 97, 4
    dilation = Dilation([32, 48, 200], [1, 5, 7], heads)
    for name, (h, g) in (("contiguous", (4, 4)), ("zigzag", (4, 2)), ("striped", (3, 3)), ("uneven", (6, 2))):
        split, arguments = Split(layout(name, n, p)), {"causal": True, "dilation": dilation}
        given = inputs(n, b=1, h=h, g=g, d=32, dtype=dtype)
        exact = split.true(Inputs(*(x.double() for x in given)), **arguments)
        yardstick = split.true(given, **arguments)
        found = split.found(OTHERS[method], given, backend="auto", **arguments)
        # as attention written out in this dtype has it at best
        yardstick = [theirs._replace(lse=true.lse.to(dtype)) for theirs, true in zip(yardstick, exact, strict=True)]
        assert_within_budget(found, yardstick, exact, name)


def test_only_views_are_slanted_together():
    """Rows that agree in all but a gap are not the neighbour's one further: there is no view of both."""
    even, gap, after = (Rows(torch.tensor([rows])) for rows in ([0, 2, 4], [0, 2, 5], [1, 3, 5]))
    assert after.follows(even) and not after.follows(gap) and not even.follows(after)


@pytest.mark.parametrize("mine", [[9, 16, 17], [3, 10, 17], [9, 10, 17]], ids=str)
@pytest.mark.parametrize("method", OTHERS)
def test_offsets_that_ask_for_other_segments_of_one_pack(method, mine):
    """One query of each offset, in segments that are not alike or one after the other: the first two and the last two
    are neighbours, all three only where each sees keys as many rows after those of the one before.
    """
    queries = [[], mine, [x for x in range(18) if x not in mine]]
    keys = [[0, 1, 2, 6, 7, 8, 12, 13, 14], [3, 4, 5, 9], [10, 11, 15, 16, 17]]
    split = Split([tuple(torch.tensor(x, dtype=torch.int64) for x in both) for both in zip(queries, keys, strict=True)])
    given, dilation = inputs(18, h=3, g=3), Dilation([6], [3])
    each = zip(split.found(OTHERS[method], given, dilation=dilation), split.true(given, dilation=dilation), strict=True)
    for one, true in each:
        assert_close(one, true)
