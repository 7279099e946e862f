"""Windows, documents, score_mod, sinks and value heads of another size, judged by an einsum of this file's own.

The judge counts how often a query sees a key pair by pair, in Python, calls the caller's functions as FlexAttention
does, one pair at a time under vmap, and adds up exponentials without a shift. Nothing of it is the package's.
"""

import itertools
import math
import random
from functools import partial

import pytest
import torch
from common import (
    DILATIONS,
    LAYOUTS,
    METHODS,
    Inputs,
    Results,
    Split,
    assert_close,
    both_ways,
    documents,
    error,
    inputs,
    layout,
)

from ringref import Attended, Shard, block, dense_attention, merge, partition, simulate, sink
from ringref.comm.simulate import Deadlock
from ringref.engine.call import Call
from ringref.shard import Table, alone, counted

N = 23


def softcap_and_bias(score, b, h, q_idx, kv_idx):
    """Gemma's softcap, ALiBi's slopes by head, and a little of each batch."""
    return 1.5 * torch.tanh(score / 1.5) - 0.05 * (h + 1) * (q_idx - kv_idx).abs() + 0.1 * b


def masking(score, b, h, q_idx, kv_idx):
    """−inf for every third distance: counts as masked."""
    return torch.where((q_idx - kv_idx) % 3 == 1, -math.inf, score**3 / 10)


def judged(q, k, v, q_at, k_at, causal=False, window=None, cu_seqlens=None, dilation=None, mask_mod=None,
           score_mod=None, scale=None, sinks=None) -> Attended:  # fmt: skip
    """out = Σ c·eˢ·v / Σ c·eˢ and lse = log Σ c·eˢ, where c counts how often a query sees a key."""
    (b, m, h, d), n, g = q.shape, k.shape[1], k.shape[2]
    begins = [0, 10**9] if cu_seqlens is None else cu_seqlens.tolist()
    left, right = (math.inf if side is None else side for side in window or (None, None))
    branches = [(10**9, 1)] if dilation is None else list(zip(dilation.segment_lengths, dilation.dilation_rates))
    shares = [h // len(branches) + (i < h % len(branches)) for i in range(len(branches))]
    serves = [i for i, share in enumerate(shares) for _ in range(share)]  # the branch of a head, if grouped

    def begin(at):
        return max(x for x in begins if x <= at)

    def times(j, i, t):
        if begin(i) != begin(t) or (causal and t > i) or i - t > left or t - i > right:
            return 0
        x, y, count = i - begin(i), t - begin(t), 0
        for at, (w, r) in enumerate(branches):
            grouped = dilation is not None and dilation.heads == "grouped"
            offset = at % r if grouped else j % r
            mine = not grouped or serves[j] == at
            count += mine and x // w == y // w and (x % w) % r == (y % w) % r == offset
        return count

    pairs = [[[times(j, i, t) for t in k_at] for i in q_at] for j in range(h)]
    count = torch.tensor(pairs, dtype=q.dtype).view(1, h, m, n).expand(b, h, m, n)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(h // g, 2)) * (scale or 1 / math.sqrt(d))
    at = torch.arange(b), torch.arange(h), torch.tensor(q_at, dtype=torch.int64), torch.tensor(k_at, dtype=torch.int64)

    def each(function, *scores):

        for dim in (3, 2, 1, 0):
            index = (0 if i == dim else None for i in range(4))
            function = torch.vmap(function, in_dims=(*[0] * len(scores), *index))
        return function(*scores, *at)

    if score_mod is not None:
        scores = each(score_mod, scores)
    if mask_mod is not None:
        count = count * each(mask_mod)
    weights = torch.where(count > 0, count * scores.exp(), 0.0)
    total = weights.sum(-1)
    if sinks is not None:
        total = total + sinks.exp()[:, None]
    there = total > 0
    safe = torch.where(there, total, 1.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights / safe[..., None], v.repeat_interleave(h // g, 2))
    return Attended(out, torch.where(there, safe.log(), -math.inf))


# name: what it does to the call (see `case`); the judge and the method are given the same
ARGUMENTS = {
    "causal": {"causal": True},
    "window": {"window": (5, 2)},
    "window to the left": {"window": (4, None)},
    "documents": {"cu_seqlens": torch.tensor([0, 1, 1, 9, 14, N], dtype=torch.int32)},
    "longnet": {"dilation": DILATIONS["odd"]},
    "grouped": {"dilation": DILATIONS["grouped"]},
    "mask_mod": {"mask_mod": documents},
    "softcap": {"score_mod": softcap_and_bias},
    "masking": {"score_mod": masking},
    "scale": {"scale": 0.7},
    "d_v": {"dv": 5},
    "grouped heads": {"h": 6, "g": 2},
    "permuted": {"layout": "permuted"},
    "decoding": {"layout": "decoding"},
    "chunks": {"q_chunk": 3},
}
PAIRS = [
    (a, b) for a, b in itertools.combinations_with_replacement(ARGUMENTS, 2)
    if a == b or not ARGUMENTS[a].keys() & ARGUMENTS[b].keys()
]  # fmt: skip


def case(names, p, seed=0) -> tuple[Inputs, Split, dict]:
    """The inputs, the layout and the arguments of a call with all of these."""
    told = {name: value for one in names for name, value in ARGUMENTS[one].items()}
    where = told.pop("layout", "zigzag")
    if where == "decoding" and "cu_seqlens" in told:  # its queries go beyond the keys, which lie in no document
        where = "uneven"
    split = Split(layout(where, N, p))
    sizes = {x: told.pop(x) for x in ("dv", "h", "g") if x in told}
    return inputs(sum(len(x) for x, _ in split.positions), N, seed=seed, **sizes), split, told


def truth(given: Inputs, split: Split, **arguments) -> Results:
    """What the judge finds, for all rows end to end."""
    queries, keys = (torch.cat(side).tolist() for side in zip(*split.positions))
    arguments.pop("q_chunk", None)
    return both_ways(lambda *tensors: judged(*tensors, queries, keys, **arguments), given)


@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_every_pair_of_arguments(names):
    """Dense on one rank against the judge, then every method on three ranks against the judge, adversarially."""
    given, split, arguments = case(names, 3, seed=PAIRS.index(names))
    true = truth(given, split, **arguments)
    assert_close(both_ways(dense_attention, given, shard=split.whole, **arguments), true, names)
    for name, method in METHODS.items():
        for rank, (one, (q, k)) in enumerate(zip(split.found(method, given, **arguments), split.rows)):
            mine = Results(true.out[:, q], true.lse[:, :, q], true.dq[:, q], true.dk[:, k], true.dv[:, k])
            assert_close(one, mine, f"{name}, rank {rank}, {names}")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_every_pair_in_every_layout(names, name):
    """On one to four ranks, uneven and empty shards among them."""
    told = {what: value for one in names for what, value in ARGUMENTS[one].items() if what != "layout"}
    if name == "decoding" and "cu_seqlens" in told:
        pytest.skip("queries beyond the keys lie in no document, which is an error: test_documents_must_fit")
    sizes = {x: told.pop(x) for x in ("dv", "h", "g") if x in told}
    for p in (1, 2, 3, 4):
        split = Split(layout(name, N, p))
        given = inputs(sum(len(x) for x, _ in split.positions), N, seed=p, **sizes)
        true = truth(given, split, **told)
        for method in METHODS.values():
            for rank, (one, (q, k)) in enumerate(zip(split.found(method, given, **told), split.rows)):
                mine = Results(true.out[:, q], true.lse[:, :, q], true.dq[:, q], true.dk[:, k], true.dv[:, k])
                assert_close(one, mine, f"{method.__name__}, rank {rank} of {p}, {names}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_many_arguments_at_once(seed):
    dice = random.Random(seed)
    names = [dice.choice(some) for some in (
        ("causal", "scale"), ("window", "window to the left", "scale"), ("documents", "scale"),
        ("longnet", "grouped", "scale"), ("mask_mod", "scale"), ("softcap", "masking", "scale"), ("d_v", "scale"),
        ("grouped heads", "scale"), ("permuted", "decoding", "scale"), ("chunks", "scale"),
    )]  # fmt: skip
    for p in (1, 2, 4):
        given, split, arguments = case(names, p, seed=seed)
        true = truth(given, split, **arguments)
        for name, method in METHODS.items():
            for rank, (one, (q, k)) in enumerate(zip(split.found(method, given, **arguments), split.rows)):
                mine = Results(true.out[:, q], true.lse[:, :, q], true.dq[:, q], true.dk[:, k], true.dv[:, k])
                assert_close(one, mine, f"{name}, rank {rank} of {p}, {names}")


# ---------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("method", METHODS)
def test_arguments_that_say_nothing(method):
    """One document is none, an unbounded window is none, a causal window is causal: to the bit."""
    given, split = inputs(N), Split(layout("zigzag", N, 3))
    for arguments, plain in (
        ({"window": (None, None)}, {}),
        ({"window": (None, 0)}, {"causal": True}),
        ({"window": (None, 7), "causal": True}, {"causal": True}),
        ({"window": [N, N]}, {}),
        ({"cu_seqlens": torch.tensor([0, 0, N, N])}, {}),
        ({"score_mod": lambda score, b, h, q, k: score, "backend": "math"}, {"backend": "math"}),
    ):
        one, other = (split.found(METHODS[method], given, **x) for x in (arguments, plain))
        for mine, its in zip(one, other):
            assert all(map(torch.equal, mine, its)), arguments


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dilation", DILATIONS)
def test_packed_is_separate(method, dilation):
    """Documents packed into one sequence: each is what it is alone, its segments counted from its own start."""
    ends = [0, 4, 4, 5, 17, N]
    given, split = inputs(N), Split(layout("striped", N, 3))
    rows = torch.cat([x for x, _ in split.positions])
    arguments = {"causal": True, "dilation": DILATIONS[dilation], "window": (6, None)}
    found = split.found(METHODS[method], given, cu_seqlens=torch.tensor(ends), **arguments)
    whole = [torch.cat([x[i] for x in found], 2 if i == 1 else 1) for i in range(5)]
    for a, b in itertools.pairwise(ends):
        mine = ((rows >= a) & (rows < b)).nonzero()[:, 0]
        mine = mine[rows[mine].argsort()]
        alone = both_ways(dense_attention, given.cut(mine, mine), **arguments)
        assert_close(Results(*(x.index_select(2 if i == 1 else 1, mine) for i, x in enumerate(whole))), alone, (a, b))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "arguments, seen",
    [
        ({"cu_seqlens": torch.tensor([0, 8, 15, N])}, lambda q, t: q in range(8, 15)),
        ({"window": (3, 1)}, lambda q, t: t - 1 <= q <= t + 3),
        ({"window": (3, None), "causal": True}, lambda q, t: t <= q <= t + 3),
    ],
    ids=["documents", "window", "causal window"],
)
def test_what_is_not_seen_changes_nothing(method, arguments, seen):
    """Another token at position 10: whoever does not see it finds the same to the bit, whoever does another."""
    t, given, split = 10, inputs(N), Split(layout("zigzag", N, 3))
    rows = torch.cat([x for x, _ in split.positions])
    k, v = given.k.clone(), given.v.clone()
    k[:, rows == t] += 1.0
    v[:, rows == t] -= 1.0
    ends = []
    for one in (given, given._replace(k=k, v=v)):
        found = split.found(METHODS[method], one, **arguments)
        ends.append(torch.cat([x.out for x in found], 1))
    changed = (ends[0] != ends[1]).flatten(2).any(2).all(0)
    assert changed.tolist() == [seen(q, t) for q in rows.tolist()]


@pytest.mark.parametrize("method", METHODS)
def test_masked_scores_may_be_anything(method):
    """score_mod is nobody's concern where the masks hide the key: NaN and infinite slopes stay there."""

    def root(score, b, h, q_idx, kv_idx):
        return score * (q_idx - kv_idx).double().sqrt()

    given, split = inputs(9), Split(layout("zigzag", 9, 2))
    for one in split.found(METHODS[method], given, causal=True, score_mod=root):
        assert all(x.isfinite().all() for x in one)
    true = truth(given, split, causal=True, score_mod=lambda s, b, h, q, k: s * (q - k).clamp(min=0).double().sqrt())
    assert_close(both_ways(dense_attention, given, shard=split.whole, causal=True, score_mod=root), true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_score_mod_is_given_wide_scores_and_global_indices(dtype):
    seen = []

    def look(score, b, h, q_idx, kv_idx):
        seen.append((score.dtype, *(tuple(x.shape) for x in (score, b, h, q_idx, kv_idx))))
        seen.append(q_idx.flatten().tolist())
        return score.to(torch.bfloat16)

    given = inputs(3, 5, dtype=dtype)
    shard = Shard(torch.tensor([4, 0, 2]), None, torch.arange(5))
    out, lse = dense_attention(*given[:3], score_mod=look, shard=shard)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert seen[-2:] == [
        (torch.float32, (2, 4, 3, 5), (2, 1, 1, 1), (1, 4, 1, 1), (1, 1, 3, 1), (1, 1, 1, 5)),
        [4, 0, 2],
    ]


# ----------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("names", [("softcap", "d_v"), ("softcap", "window", "documents"), ("masking", "longnet")])
def test_gradcheck(names):
    told = {name: value for one in names for name, value in ARGUMENTS[one].items()}
    given = inputs(7, b=1, h=2, g=1, d=2, dv=told.pop("dv", 2))
    if "cu_seqlens" in told:
        told["cu_seqlens"] = torch.tensor([0, 3, 7])

    def finite(*leaves):
        out, lse = dense_attention(*leaves, **told)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(finite, [x.requires_grad_() for x in given[:3]], fast_mode=False)


def _ring_call(**arguments) -> Call:
    table = Table((counted(N),), (counted(N),))
    return Call(False, None, None, 0.6, None, "math", alone(), table, None)._replace(**arguments)


@pytest.mark.parametrize("score_mod", [None, softcap_and_bias, masking, lambda s, b, h, q, k: (q - k) * 0.1])
@pytest.mark.parametrize("mask_mod", [None, documents])
@pytest.mark.parametrize("window", [(None, None), (2, 1)])
def test_the_block_keeps_the_same_rules(score_mod, mask_mod, window):
    """Two segments at once, forward and backward, against dense on the two documents that they are."""
    given = inputs(12, h=4, g=2, dv=5)
    arguments = {"score_mod": score_mod, "mask_mod": mask_mod, "window": window}
    true = both_ways(dense_attention, given, cu_seqlens=torch.tensor([0, 6, 12]), scale=0.6, **arguments)
    at = torch.arange(12).view(2, 6)
    keep, modify = _ring_call(**arguments).rules(2, range(4), at, at)
    keep = None if keep is None else keep.expand(-1, -1, 4, -1, -1).unflatten(2, (2, 2))
    q, k, v, dout = (x.unflatten(1, (2, 6)) for x in given[:4])
    dlse = given.dlse.unflatten(2, (2, 6)).movedim(1, 3)
    out, lse = block.forward(q, k, v, 0.6, keep, modify)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    grads = block.backward(dout, dlse, q, k, v, out, lse, 0.6, keep, modify)
    lse = lse.masked_fill(lse == math.inf, -math.inf).movedim(3, 1).flatten(2)
    assert_close(Results(out.flatten(1, 2), lse, *(x.flatten(1, 2) for x in grads)), true)


def test_the_block_does_not_write_to_what_score_mod_returns():
    bias = torch.randn(1, 1, 2, 6, 6, dtype=torch.float64)
    before = bias.clone()
    given = [x.unflatten(1, (1, 6)) for x in inputs(6, b=1, h=2, g=1)[:4]]
    out, lse = block.forward(*given[:3], 1.0, None, lambda scores: bias)
    dq, dk, _ = block.backward(given[3], None, *given[:3], out, lse, 1.0, None, lambda scores: bias)
    assert bias.equal(before) and not dq.any() and not dk.any()


def test_masked_scores_may_be_anything_on_a_block():
    """NaN and slopes of NaN in the upper triangle."""
    bend = torch.ones(6, 6, dtype=torch.float64).tril().log()  # −inf where masked, and −inf · 0 is NaN
    given = [x.unflatten(1, (1, 6)) for x in inputs(6, b=1, h=2, g=1)[:4]]
    keep = torch.ones(6, 6, dtype=torch.bool).tril()
    ends = []
    for modify in (lambda scores: scores * (1 + bend), lambda scores: scores):
        out, lse = block.forward(*given[:3], 1.0, keep, modify)
        ends.append([out, lse, *block.backward(given[3], None, *given[:3], out, lse, 1.0, keep, modify)])
    assert all(map(torch.equal, *ends))


def captured(kind):
    slope = torch.ones(4, dtype=torch.float64, requires_grad=True)
    layer = torch.nn.Linear(1, 1, dtype=torch.float64)
    return {
        "a closure": lambda s, b, h, q, k: s * slope[h],
        "a partial": partial(lambda s, b, h, q, k, by: s + by[h], by=slope),
        "a module": lambda s, b, h, q, k: layer(s[..., None])[..., 0],
        "instead of the score": lambda s, b, h, q, k: slope[h],
    }[kind]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["a closure", "a partial", "a module", "instead of the score"])
def test_a_captured_tensor_that_requires_grad(method, grad, kind):
    """It would get no gradient from a ring, so nobody accepts it, not even where none is asked for."""
    mod, given, split = captured(kind), inputs(9), Split(layout("contiguous", 9, 3))

    def on(ring):
        mine = given.cut(*split.rows[ring.rank])
        mods = {0: mod}.get(ring.rank, lambda s, b, h, q, k: s)
        with grad(), pytest.raises(ValueError, match="score_mod uses a tensor that requires grad|rank 0 rejected"):
            METHODS[method](*mine[:3], shard=split.shard(ring), score_mod=mods)
        with grad():
            free = torch.ones(4, dtype=torch.float64, requires_grad=True).detach()
            METHODS[method](*mine[:3], shard=split.shard(ring), score_mod=lambda s, b, h, q, k: s * free[h])
        return True

    assert all(simulate(on, 3, adversarial=True))


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name, one, other",
    [
        ("window", {"window": (2, 0)}, {"window": (2, 1)}),
        ("window", {"window": (2, 0)}, {}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 9])}, {"cu_seqlens": torch.tensor([0, 5, 9])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 9])}, {}),
        ("score_mod", {"score_mod": masking}, {}),
        ("value head dim", {"dv": 2}, {}),
    ],
)
def test_ranks_differ(method, name, one, other):
    def on(ring):
        shard, told = partition(9, ring, "zigzag"), dict(one if ring.rank else other)
        given = inputs(9, dv=told.pop("dv", 3))
        with pytest.raises(ValueError, match=f"{name}.* differs between ranks"):
            METHODS[method](*(shard.take(x) for x in given[:3]), shard=shard, **told)
        return True

    assert all(simulate(on, 3, adversarial=True))


@pytest.mark.parametrize("method", METHODS)
def test_documents_must_fit(method):
    def on(ring):
        shard, given = partition(9, ring), inputs(9)
        mine = [shard.take(x) for x in given[:3]]
        for ends in ([0, 4], [0, 4, 10]):
            with pytest.raises(ValueError, match=f"cu_seqlens must end with the number of keys, 9, got {ends[-1]}"):
                METHODS[method](*mine, shard=shard, cu_seqlens=torch.tensor(ends))
        late = Shard(shard.positions + 3, ring, shard.positions)
        with pytest.raises(ValueError, match="the query at position 11 is in none of its documents"):
            METHODS[method](*mine, shard=late, cu_seqlens=torch.tensor([0, 4, 9]))
        return True

    assert all(simulate(on, 3, adversarial=True))
    none = [x[:, :0] for x in inputs(3)[:3]]
    assert METHODS[method](*none, cu_seqlens=torch.tensor([0])).out.shape == (2, 0, 4, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "mod, kind, words",
    [
        (lambda s, b, h, q, k: q >= k, TypeError, "score_mod must return scores.*bool"),
        (lambda s, b, h, q, k: q - k, TypeError, "score_mod must return scores.*int64"),
        (lambda s, b, h, q, k: torch.ones(7, 5, 3), ValueError, "score_mod must return what broadcasts"),
        (lambda s, b, h, q, k: s[None], ValueError, "score_mod must return what broadcasts"),
        (lambda s, b, h, q, k: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_score_mod_returns_something_else(method, mod, kind, words):
    """On one rank of three; the others are told, and nobody waits."""
    seen = []

    def on(ring):
        shard, given = partition(9, ring), inputs(9)
        mods = mod if ring.rank == 1 else softcap_and_bias
        try:
            METHODS[method](*(shard.take(x) for x in given[:3]), shard=shard, score_mod=mods)
        except Exception as error:
            seen.append((ring.rank, error))

    simulate(on, 3, adversarial=True)
    assert len(seen) == 3 and not any(isinstance(x, Deadlock) for _, x in seen)
    with pytest.raises(kind, match=words):
        raise dict(seen)[1]


# -------------------------------------------------------------------------------------------- sinks


@pytest.mark.parametrize("name", ["causal", "documents", "mask_mod", "longnet"])
def test_sinks(name):
    """One more key of value 0 in the judge's sum; on the ranks of a ring, each rank's own rows."""
    given, split, arguments = case([name], 3)
    logits = torch.tensor([0.3, -math.inf, 2.0, -1.0], dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (*given[:3], logits)]
    queries, keys = (torch.cat(side).tolist() for side in zip(*split.positions))
    true = judged(*leaves[:3], queries, keys, sinks=leaves[3], **arguments)
    torch.autograd.backward(true, given[3:])
    assert name != "mask_mod" or (true.lse == -math.inf).any()

    def on(ring, method):
        mine = given.cut(*split.rows[ring.rank])
        leaves = [x.clone().requires_grad_() for x in (*mine[:3], logits)]
        found = sink(method(*leaves[:3], shard=split.shard(ring), **arguments), leaves[3])
        torch.autograd.backward(found, mine[3:])
        return Results(found.out.detach(), found.lse.detach(), *(x.grad for x in leaves[:3])), leaves[3].grad

    for method in METHODS:
        found = simulate(partial(on, method=METHODS[method]), 3, adversarial=True)
        for (one, _), (q, k) in zip(found, split.rows):
            whole = (
                true.out[:, q],
                true.lse[:, :, q],
                leaves[0].grad[:, q],
                leaves[1].grad[:, k],
                leaves[2].grad[:, k],
            )
            assert_close(one, Results(*(x.detach() for x in whole)), method)
        assert error(sum(x for _, x in found), leaves[3].grad) < 1e-10


def test_sink_gradcheck():
    given = inputs(5, b=1, h=2, g=1, d=2)
    leaves = [x.requires_grad_() for x in (*given[:3], torch.tensor([0.5, -1.0], dtype=torch.float64))]

    def function(q, k, v, logits):
        return tuple(sink(dense_attention(q, k, v, causal=True), logits))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sinks_of_nothing(dtype):
    """Keeps dtypes; −inf on a side is neutral, whatever out holds; on both it stays −inf; no gradient is NaN."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.ones(1, 2, 2, 3, dtype=dtype).requires_grad_()
    lse = torch.tensor([[[-math.inf, 1.0], [-math.inf, 1.0]]], dtype=wide).requires_grad_()
    logits = torch.tensor([2.0, -math.inf], dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        out[:, 0] = math.nan
    found = sink(Attended(out, lse), logits)
    assert found.out.dtype == dtype and found.lse.dtype == wide
    assert not found.out[:, 0].any() and found.out[0, 1, 1].eq(1).all() and (found.out[0, 1, 0] < 0.5).all()
    assert found.lse[0, 0, 0] == 2 and found.lse[0, 1, 0] == -math.inf and found.lse[0, 1, 1] == 1
    torch.autograd.backward(found, [torch.ones_like(x) for x in found])
    assert all(x.grad.isfinite().all() for x in (out, lse, logits)) and logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "logits, kind",
    [
        ([0.0, 0.0], TypeError), (torch.zeros(2, dtype=torch.int64), TypeError), (0.0, TypeError),
        (torch.zeros(3), ValueError), (torch.zeros(1, 2), ValueError), (torch.zeros(()), ValueError),
        (torch.zeros(2, device="meta"), ValueError),
    ],
)  # fmt: skip
def test_sinks_of_another_kind(logits, kind):
    with pytest.raises(kind, match="logits must be"):
        sink(dense_attention(*inputs(3, h=2, g=2)[:3]), logits)


@pytest.mark.parametrize("first", [False, True])
def test_a_part_that_saw_nothing_is_neutral_whatever_it_holds(first):
    """NaN and all: in the forward, and in what flows back."""
    seen = dense_attention(*inputs(4)[:3])
    nothing = Attended(torch.full_like(seen.out, math.nan), torch.full_like(seen.lse, -math.inf))
    leaves = [x.detach().requires_grad_() for x in (*seen, *nothing)]
    parts = [Attended(*leaves[:2]), Attended(*leaves[2:])]
    merged = merge(*(parts[::-1] if first else parts))
    assert merged.out.equal(seen.out) and merged.lse.equal(seen.lse)
    torch.autograd.backward(merged, [torch.ones_like(x) for x in merged])
    for one, ones in zip(leaves, (1, 1, 0, 0)):
        assert (one.grad - ones).abs().max() < 1e-14
