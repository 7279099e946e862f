"""Bad input is an error that names the argument, on every rank, and never a hang."""

import copy
import itertools
import math
import pickle
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from common import METHODS, documents, inputs
from torch.utils.checkpoint import checkpoint

from ringref import Attended, Dilation, Shard, dense_attention, merge, partition, ring_attention, simulate, sink
from ringref.comm.ring import Elsewhere
from ringref.comm.simulate import Deadlock

P, N = 3, 9


def errors(fn, p=P, adversarial=True) -> list[Exception | None]:
    """What each rank raised; a rank that was left waiting raises Deadlock."""

    def on(ring):
        try:
            fn(ring)
        except Exception as error:
            return error

    return simulate(on, p, adversarial=adversarial)


def shards(ring, n=N):
    shard, given = partition(n, ring, "zigzag"), inputs(n)
    return shard, [shard.take(x).requires_grad_() for x in given[:3]]


def everywhere(found, *words, kinds=(ValueError, TypeError, NotImplementedError)):
    for rank, error in enumerate(found):
        assert isinstance(error, kinds) and not isinstance(error, Deadlock), f"rank {rank}: {error!r}"
    assert any(all(word in str(error) for word in words) for error in found), found


# name: what replaces an argument, and words of the message
BAD_TENSORS = {
    "q of three dimensions": (lambda q, k, v: (q[0], k, v), ["q", "b s h d"]),
    "k no tensor": (lambda q, k, v: (q, k.tolist(), v), ["k", "list"]),
    "integers": (lambda q, k, v: (q.long(), k.long(), v.long()), ["q", "int64"]),
    "k of another dtype": (lambda q, k, v: (q, k.float(), v), ["k", "float32", "float64"]),
    "v of another dtype": (lambda q, k, v: (q, k, v.half()), ["v", "float16"]),
    "k on meta": (lambda q, k, v: (q, k.to("meta"), v), ["k", "meta", "cpu"]),
    "k and v of other lengths": (lambda q, k, v: (q, k, v[:, :-1]), ["k and v", "shape"]),
    "no value head dim": (lambda q, k, v: (q, k, v[..., :0]), ["v's, 0"]),
    "k and v of other heads": (lambda q, k, v: (q, k, v[:, :, :1]), ["k and v", "shape"]),
    "another batch": (lambda q, k, v: (q, k[:1], v[:1]), ["k", "batch"]),
    "another head dim": (lambda q, k, v: (q, k[..., :1], v[..., :1]), ["k", "head dim"]),
    "heads do not divide": (lambda q, k, v: (q[:, :, :3], k, v), ["2 heads", "3"]),
    "no key heads": (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), ["0 heads"]),
    "more key heads": (lambda q, k, v: (q[:, :, :1], k, v), ["heads"]),
    "no head dim": (lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), ["d = 0"]),
    "a row too few": (lambda q, k, v: (q[:, 1:], k, v), ["shard", "q has"]),
    "a key too many": (lambda q, k, v: (q, torch.cat([k, k], 1), torch.cat([v, v], 1)), ["k has"]),
}
TRANSFORMED = {
    "sparse": (lambda x: x.to_sparse(), "sparse_coo"),
    "mkldnn": (lambda x: x.float().to_mkldnn(), "mkldnn"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested"),
}
BAD_ARGUMENTS = {
    "causal": [1, None, "yes", torch.tensor(True)],
    "window": [4, (4,), (1, 2, 3), (-1, 0), (1.0, 0), (True, 0), "12", {1, 2}, torch.tensor([1, 2])],
    "cu_seqlens": [
        [0, N],
        (0, N),
        torch.tensor([0, N]).numpy(),
        torch.tensor([0.0, N]),
        torch.tensor([False, True]),
        3,
        torch.tensor([[0, N]]),
        torch.tensor(0),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([1, N]),
        torch.tensor([0, 5, 4, N]),
        torch.tensor([0, N]).to("meta"),
        torch.tensor([0, N]).to_sparse(),
        torch.nested.nested_tensor([torch.tensor([0, N])] * 2, layout=torch.jagged),
    ],
    "dilation": [(4, 2), [[4], [2]], 4],
    "mask_mod": [3, torch.ones(9, 9)],
    "score_mod": [3, torch.ones(9, 9)],
    "scale": [math.nan, math.inf, "1", True, torch.tensor(1.0), 10**400, -(10**400), 1j],
    "q_chunk": [0, -1, 2.0, True, "2"],
    "backend": ["cuda", "flash", None, 3, np.array(["math", "auto"]), ["auto"]],
}
ALL_BAD = [(name, value) for name, values in BAD_ARGUMENTS.items() for value in values]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(method, name):
    change, words = BAD_TENSORS[name]
    if "shard" not in words and words != ["k has"]:
        with pytest.raises((TypeError, ValueError), match=words[0]):
            METHODS[method](*change(*inputs(N)[:3]))
    for whose in (range(P), [1]):  # all ranks, or one whose neighbours are right

        def on(ring, whose=whose):
            shard, leaves = shards(ring)
            METHODS[method](*(change(*leaves) if ring.rank in whose else leaves), shard=shard)

        everywhere(errors(on), *words)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name, value", ALL_BAD, ids=[f"{a}={b!r}"[:30] for a, b in ALL_BAD])
def test_bad_arguments(method, name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        METHODS[method](*inputs(N)[:3], **{name: value})

    def on(ring):
        shard, leaves = shards(ring)
        METHODS[method](*leaves, shard=shard, **({name: value} if ring.rank == 1 else {}))

    everywhere(errors(on), name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_tensors_of_another_kind(method, name):
    change, word = TRANSFORMED[name]
    with pytest.raises(TypeError, match=f"q .*{word}|{word} .*"):
        METHODS[method](*map(change, inputs(N)[:3]))


@pytest.mark.parametrize("method", METHODS)
def test_transforms_of_torch_func(method):
    stacked = [torch.stack([x, x]) for x in inputs(N)[:3]]
    with pytest.raises(TypeError, match="q must be a plain dense tensor, got one that vmap"):
        torch.func.vmap(METHODS[method])(*stacked)
    with pytest.raises(TypeError, match="q must be a plain dense tensor"):
        torch.func.grad(lambda q: METHODS[method](q, *inputs(N)[1:3]).out.sum())(inputs(N).q)


@pytest.mark.parametrize("method", METHODS)
def test_inference_tensors_where_a_gradient_is_needed(method):
    """Alone: an error that says so; on one rank of several: on all of them. Where none is needed they are fine."""
    with torch.inference_mode():
        q, k, v = (x.clone() for x in inputs(N)[:3])
    METHODS[method](q, k, v)
    with pytest.raises(ValueError, match="q, k, v: one was made in inference mode"):
        METHODS[method](q, k.clone().requires_grad_(), v)

    def on(ring):
        shard, leaves = shards(ring)
        if ring.rank == 1:
            with torch.inference_mode():
                leaves = [x.clone() for x in leaves]
        METHODS[method](*leaves, shard=shard)

    everywhere(errors(on), "inference tensors differs between ranks")


def test_another_ranks_mistake_is_told_in_its_words():
    def on(ring):
        shard, leaves = shards(ring)
        ring_attention(*leaves, shard=shard, q_chunk=0 if ring.rank == 1 else None)

    for rank, error in enumerate(errors(on)):
        assert "q_chunk must be a positive number of query rows or None, got 0" in str(error)
        assert isinstance(error, Elsewhere) == (rank != 1)
        assert rank == 1 or error.rank == 1 and "rank 1 rejected its own arguments: ValueError" in str(error)


def test_whatever_an_argument_raises_is_an_error_on_every_rank():
    """Also what is no TypeError or ValueError."""

    class Odd(float):
        def __le__(self, other):
            raise ZeroDivisionError("of scale's own")

        __ge__ = __le__

    def on(ring):
        shard, leaves = shards(ring)
        ring_attention(*leaves, shard=shard, scale=Odd(1.0) if ring.rank == 1 else None)

    everywhere(errors(on), "of scale's own", kinds=(ZeroDivisionError, Elsewhere))


@pytest.mark.parametrize("method", METHODS)
def test_shard_of_another_kind(method):
    with pytest.raises(TypeError, match="shard"):
        METHODS[method](*inputs(N)[:3], shard=torch.arange(N))


DIFFERENT = {
    "causal": [{"causal": True}, {}],
    "scale": [{"scale": 0.25}, {"scale": 0.2500001}],
    "scale of nought": [{"scale": 0.0}, {"scale": -0.0}],  # equal to Python, and a cache
    "dilation": [{"dilation": Dilation([4], [2])}, {"dilation": Dilation([4], [1])}, {}],
    "dilation heads": [{"dilation": Dilation([4], [2], x)} for x in ("all", "grouped")],
    "mask_mod": [{"mask_mod": documents}, {}],
    "backend": [{"backend": "math"}, {"backend": "auto"}],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DIFFERENT)
def test_arguments_differ_between_ranks(method, name):
    def on(ring):
        shard, leaves = shards(ring)
        arguments = DIFFERENT[name][min(ring.rank, len(DIFFERENT[name]) - 1)]
        METHODS[method](*leaves, shard=shard, **arguments)

    everywhere(errors(on), name.split()[0], "differs between ranks")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name, change",
    [
        ("batch", lambda x: x[:1]),
        ("head dim", lambda x: x[..., :2]),
        ("heads", lambda x: x[:, :, :2]),
        ("dtype", lambda x: x.float()),
        ("device", lambda x: x.to("meta")),
    ],
)
def test_tensors_differ_between_ranks(method, name, change):
    def on(ring):
        shard, leaves = shards(ring)
        METHODS[method](*(map(change, leaves) if ring.rank == 2 else leaves), shard=shard)

    everywhere(errors(on), name, "differs between ranks")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["no_grad", "inference_mode"])
def test_grad_mode_differs(method, name):
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[name]

    def on(ring):
        shard, leaves = shards(ring)
        with mode() if ring.rank == 1 else nullcontext():
            METHODS[method](*leaves, shard=shard)

    everywhere(errors(on), "grad mode", "differs between ranks")


@pytest.mark.parametrize("method", METHODS)
def test_a_backend_that_one_rank_lacks(method):
    def on(ring):
        shard, leaves = shards(ring)
        METHODS[method](*leaves, shard=shard, backend="xformers" if ring.rank == 0 else "math")

    everywhere(errors(on), "backend")


@pytest.mark.parametrize("backend", ["torch", "xformers"])
@pytest.mark.parametrize("method", METHODS)
def test_a_backend_cannot_do_it(method, backend):
    """Asked for by name, it raises; `auto` finds another."""
    for arguments in ({"mask_mod": documents}, {"scale": -1.0}):
        with pytest.raises(NotImplementedError, match="backend"):
            METHODS[method](*inputs(N)[:3], backend=backend, **arguments)
        METHODS[method](*inputs(N)[:3], **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "scale", [0, -0.0, 5e-324, 1e-320, 1e-46, 1e-40, 1e-30, -1e-320, -3.0, 1e30, 1e37, 1e39, -1e300]
)
def test_extreme_scales(scale, dtype):
    """One that the working dtype does not hold is refused; with any other all methods find the same, though a kernel
    may multiply the −inf of a masked key by it.
    """
    given = [x.to(dtype) for x in inputs(5)[:3]]
    if abs(scale) > torch.finfo(torch.promote_types(dtype, torch.float32)).max:
        for method in METHODS.values():
            with pytest.raises(ValueError, match="scale must be None .* or a number that is finite in float32"):
                method(*given, scale=scale)
        return
    dense, *others = (method(*given, causal=True, scale=scale) for method in METHODS.values())
    for out, lse in others:
        for x, true in ((out, dense.out), (lse, dense.lse)):
            assert torch.allclose(x, true, rtol=2e-2, atol=2e-2)


MASKS = {
    "numbers": (lambda b, h, q, k: (q >= k).to(torch.float64), TypeError),
    "integers": (lambda b, h, q, k: (q >= k).long(), TypeError),
    "another shape": (lambda b, h, q, k: torch.ones(7, 5, 3, dtype=torch.bool), ValueError),
    "five dimensions": (lambda b, h, q, k: (q >= k)[None], ValueError),
    "nothing": (lambda b, h, q, k: None, TypeError),
    "a tuple": (lambda b, h, q, k: (q >= k, q < k), TypeError),
    "text": (lambda b, h, q, k: "all", TypeError),
    "a nested list": (lambda b, h, q, k: [[True, False]], TypeError),
    "a sparse tensor": (lambda b, h, q, k: (q >= k).to_sparse(), TypeError),
    "a meta tensor": (lambda b, h, q, k: (q >= k).to("meta"), TypeError),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MASKS)
def test_mask_mod_returns_something_else(method, name):
    mask, kind = MASKS[name]
    with pytest.raises(kind, match="mask_mod"):
        METHODS[method](*inputs(N)[:3], mask_mod=mask)


class Table(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, b, h, q, k):
        return self.table[q, k]


class Plain:
    def __init__(self, table):
        self.table, self.inner, self.step = table, Table(table), 0

    def own(self, b, h, q, k):
        return self.table[q, k]

    def of_an_inner_module(self, b, h, q, k):
        return self.inner.table[q, k]


def mask_forms(table):
    closure, plain = lambda b, h, q, k: table[q, k], Plain(table)
    listed, named, module = [table], {"table": table}, types.ModuleType("of_masks")
    module.table = table
    return {
        "closure": closure,
        "default": lambda b, h, q, k, table=table: table[q, k],
        "partial": partial(lambda table, b, h, q, k: table[q, k], table),
        "partial of an object": partial(lambda plain, b, h, q, k: plain.table[q, k], plain),
        "module": Table(table),
        "method": Table(table).forward,
        "method of an object": plain.own,
        "of an inner module": plain.of_an_inner_module,
        "object": lambda b, h, q, k: plain.table[q, k],
        "list": lambda b, h, q, k: listed[0][q, k],
        "dict": lambda b, h, q, k: named["table"][q, k],
        "imported": lambda b, h, q, k: module.table[q, k],
        "two deep": lambda b, h, q, k: closure(b, h, q, k) & (q >= k),
    }


@pytest.mark.parametrize("form", mask_forms(None))
def test_what_a_mask_does_not_name_may_change(form):
    """A counter, a running statistic, the rest of a model."""
    table = torch.ones(N, N, dtype=torch.bool).tril()
    rest = Plain(table)
    rest.other, rest.inner.count = torch.zeros(3), torch.zeros(())
    mask = mask_forms(table)[form]
    leaves = [x.clone().requires_grad_() for x in inputs(N)[:3]]
    out = ring_attention(*leaves, mask_mod=lambda *at: mask(*at) & rest.own(*at)).out
    rest.step += 1
    rest.other += 1
    rest.inner.count += 1
    out.sum().backward()


@pytest.mark.parametrize("q_chunk", [None, 4])
@pytest.mark.parametrize("form", mask_forms(None))
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_changed_between_forward_and_backward(method, form, q_chunk):
    """Whatever asks again must be told the same; a plain autograd graph does not ask."""
    table = torch.ones(N, N, dtype=torch.bool).tril()
    mask = mask_forms(table)[form]
    before, after = (
        [x.clone().requires_grad_() for x in inputs(N)[:3]] for _ in range(2)
    )  # what is not changed in place is no concern
    METHODS[method](*before, mask_mod=mask, q_chunk=q_chunk).out.sum().backward()
    out = METHODS[method](*after, mask_mod=mask, q_chunk=q_chunk).out
    table.zero_()
    if method == "dense" and q_chunk is None:
        out.sum().backward()
        assert all(map(torch.equal, (x.grad for x in after), (x.grad for x in before)))
    else:
        with pytest.raises(RuntimeError, match="mask_mod.*changed in place since the call began"):
            out.sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_mask_mod_raises_on_one_rank(method):
    """Its own error comes out, and the others do not wait for ever."""

    def on(ring):
        def mask(b, h, q, k):
            if ring.rank == 1:
                raise ZeroDivisionError("of mine")
            return q >= k

        shard, leaves = shards(ring)
        METHODS[method](*leaves, shard=shard, mask_mod=mask)

    with pytest.raises(ZeroDivisionError, match="of mine"):
        simulate(on, P, adversarial=True)


# ---------------------------------------------------------------------------------------- positions

BAD_POSITIONS = {
    "overlap": ([[0, 1], [1, 2], [3]], None, ["positions overlap", "[1]"]),
    "held twice by one": ([[0, 0], [1], [2]], None, ["positions overlap", "[0]"]),
    "gap": ([[0, 1], [3], [4]], None, ["positions leave gaps", "[2]"]),
    "does not begin at 0": ([[1], [2], [3]], None, ["positions leave gaps", "[0]"]),
    "keys overlap": ([[0], [1], [2]], [[0, 1], [1, 2], []], ["kv_positions overlap"]),
    "keys leave gaps": ([[0], [1], [2]], [[0], [2], [5]], ["kv_positions leave gaps", "[1, 3, 4]"]),
    "queries overlap": ([[7], [7], [2]], [[0], [1], [2]], ["positions overlap", "[7]"]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BAD_POSITIONS)
def test_positions(method, name):
    queries, keys, words = BAD_POSITIONS[name]

    def on(ring):
        q_index = torch.tensor(queries[ring.rank])
        k_index = q_index if keys is None else torch.tensor(keys[ring.rank], dtype=torch.int64)
        shard = Shard(q_index, ring, None if keys is None else k_index)
        given = inputs(len(q_index), len(k_index))
        METHODS[method](*given[:3], shard=shard)

    everywhere(errors(on), *words)


def test_positions_are_checked_again():
    """A shard that was refused is refused a second time, also in between good ones."""

    def on(ring):
        good, leaves = shards(ring, n=6)
        bad = Shard(torch.tensor([[0, 1], [1, 2], [3, 4]][ring.rank]), ring)
        seen = []
        for shard in (good, bad, bad, good, bad, good):
            try:
                ring_attention(*leaves, shard=shard)
                seen.append(None)
            except ValueError as error:
                seen.append(str(error))
        return seen

    for seen in simulate(on, P, adversarial=True):
        assert [x is None for x in seen] == [True, False, False, True, False, True]
        assert len(set(filter(None, seen))) == 1


def test_a_shard_that_one_rank_changed():
    """The first call's positions are remembered, and a rank that comes with others is noticed."""

    def on(ring):
        shard, leaves = shards(ring, n=6)
        ring_attention(*leaves, shard=shard)
        if ring.rank == 1:
            shard = Shard(torch.tensor([0, 1]), ring)
        ring_attention(*leaves, shard=shard)

    everywhere(errors(on), "positions overlap")


@pytest.mark.parametrize(
    "positions",
    [[0, 1], torch.arange(3.0), torch.arange(3).int(), torch.arange(4).view(2, 2), None, torch.arange(2).to("meta")],
    ids=str,
)
def test_positions_of_another_kind(positions):
    with pytest.raises(TypeError, match="positions must be a 1-D int64 CPU tensor"):
        Shard(positions, None)
    if positions is not None:
        with pytest.raises(TypeError, match="kv_positions must be"):
            Shard(torch.arange(2), None, positions)


def test_negative_positions():
    with pytest.raises(ValueError, match="kv_positions: positions count from 0, got -1"):
        Shard(torch.arange(2), None, torch.tensor([-1, 0]))


@pytest.mark.parametrize("last", [10**8, 2**40, 2**62 - 1])
def test_positions_cost_what_their_number_costs(last):
    """And not what the last of them is."""
    bad = Shard(torch.arange(2), None, torch.tensor([0, last]))
    for method in METHODS.values():
        with pytest.raises(ValueError, match=r"kv_positions leave gaps: .*\[1, 2, 3, 4, 5\] …"):
            method(*inputs(2)[:3], shard=bad)
        method(*inputs(1, 2)[:3], shard=Shard(torch.tensor([last]), None, torch.arange(2)), causal=True)
    with pytest.raises(ValueError, match="positions must be below 2\\*\\*62"):
        Shard(torch.tensor([2**62]), None)


def test_positions_changed_after_the_fact_change_nothing():
    """Neither those that were given nor those that a shard shows."""
    index = torch.arange(4)
    shard = Shard(index, None)
    index[0] = shard.positions[1] = shard.kv_positions[2] = 7
    assert shard.positions.equal(torch.arange(4)) and shard.kv_positions.equal(torch.arange(4))
    ring_attention(*inputs(4)[:3], shard=shard)


def test_a_shard_is_copied_with_its_ring_and_travels_only_without():
    whole = Shard(torch.arange(4), None, torch.tensor([1, 0, 3, 2]))
    for copied in (copy.copy(whole), copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert copied.positions.equal(whole.positions) and copied.kv_positions.equal(whole.kv_positions)
        ring_attention(*inputs(4)[:3], shard=copied)

    def on(ring):
        module = torch.nn.Linear(2, 2)
        module.shard = partition(6, ring)
        copied = copy.deepcopy(module).shard
        assert copied.ring is ring and copied is not module.shard
        ring_attention(*inputs(2)[:3], shard=copied)
        with pytest.raises(TypeError, match="ThreadRing cannot be pickled: .* make the ring and its shards anew"):
            pickle.dumps(module)

    simulate(on, P)


def test_many_threads_use_shards_at_once():
    def calls(seed):
        for i in range(40):
            order = torch.randperm(6, generator=torch.Generator().manual_seed(1000 * seed + i % 7))
            METHODS[("dense", "ring")[i % 2]](*inputs(6)[:3], shard=Shard(order, None))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(calls, range(8)))


def test_ring_of_another_kind():
    class LookAlike:
        rank, size, exchange = 0, 1, None

    with pytest.raises(TypeError, match="ring"):
        Shard(torch.arange(2), LookAlike())
    with pytest.raises(TypeError, match="ring"):
        Shard(torch.arange(2), 4)
    with pytest.raises(TypeError, match="ring"):
        partition(8, 4)


@pytest.mark.parametrize("layout", ["zig-zag", None, 3, ["striped"], np.array(["zigzag", "striped"])])
def test_unknown_layout(layout):
    with pytest.raises(ValueError, match="layout must be one of"):
        simulate(lambda ring: partition(4, ring, layout), 2)


@pytest.mark.parametrize("n", [-1, 2.0, None, True, 2**62, 2**63, 10**30])
def test_number_of_tokens(n):
    with pytest.raises(ValueError, match="n must be"):
        simulate(lambda ring: partition(n, ring), 2)


# ----------------------------------------------------------------------------------------- dilation


@pytest.mark.parametrize(
    "arguments, word",
    [
        (([4, 8], [1]), "same length"),
        (([], []), "segment_lengths"),
        ((4, 2), "segment_lengths"),
        (([4], 2), "dilation_rates"),
        (([4], [5]), "r = 5 is larger than its segment length w = 4"),
        (([0], [1]), "segment_lengths"),
        (([2**62], [1]), "segment_lengths must be positive integers below 2\\*\\*62"),
        (([4], [0]), "dilation_rates"),
        (([4.0], [1]), "segment_lengths"),
        (([torch.tensor(4.5)], [1]), "segment_lengths"),
        (([4], [True]), "dilation_rates"),
        (("44", "11"), "segment_lengths"),
        (([4], [1], "some"), "heads"),
        (([4], [1], None), "heads"),
        (([4], [1], np.array(["all", "grouped"])), "heads"),
    ],
)
def test_dilation(arguments, word):
    with pytest.raises((TypeError, ValueError), match=word):
        Dilation(*arguments)


@pytest.mark.parametrize("layout, p", [("contiguous", 2), ("striped", 5)])
@pytest.mark.parametrize("h", [1, 2, 4])
@pytest.mark.parametrize("w, r", [(2**62 - 1, 2**62 - 1), (2**62 - 1, 2**61), (2**40, 7)])
def test_the_largest_dilations(h, w, r, layout, p):
    """Work as any other: position 0 of head 0 is kept, and nothing else of so few tokens by so large a rate."""

    def on(ring):
        shard, given = partition(2 * p + 1, ring, layout), inputs(2 * p + 1, h=h, g=1)[:3]
        mine = [shard.take(x) for x in given]
        for method in METHODS.values():
            out, lse = method(*mine, dilation=Dilation([w], [r]), shard=shard)
            true = dense_attention(*given, dilation=Dilation([16], [min(r, 16)]))
            assert torch.allclose(out, shard.take(true.out)) and torch.allclose(lse, shard.take(true.lse, 2))

    simulate(on, p)


def test_dilation_of_lists_and_tuples_is_alike():
    assert Dilation([4, 8], (1, 2)) == Dilation((4, 8), [1, 2]) == Dilation(torch.tensor([4, 8]).unbind(), [1, 2])
    assert hash(Dilation([4, 8], [1, 2])) == hash(Dilation((4, 8), (1, 2)))


# ----------------------------------------------------------------------------- ranks that go astray


@pytest.mark.parametrize("one", METHODS)
@pytest.mark.parametrize("other", METHODS)
def test_different_methods(one, other):
    def on(ring):
        shard, leaves = shards(ring)
        METHODS[one if ring.rank == 1 else other](*leaves, shard=shard)

    if one != other:
        everywhere(errors(on), "method differs")


@pytest.mark.parametrize("of, words", [("shard", "method differs between ranks"), ("ring", "not in the same call")])
def test_a_call_and_a_gather(of, words):
    def on(ring):
        shard, leaves = shards(ring)
        if ring.rank == 1:
            {"shard": shard, "ring": ring}[of].gather(leaves[0])
        else:
            ring_attention(*leaves, shard=shard)

    everywhere(errors(on), words)


def test_a_call_less():
    """The rank that left cannot be told, but those that wait are."""

    def on(ring):
        shard, leaves = shards(ring)
        ring_attention(*leaves, shard=shard)
        if ring.rank != 1:
            ring_attention(*leaves, shard=shard)

    found = errors(on)
    assert found[1] is None
    assert all(isinstance(found[r], Deadlock) and "rank 1" in str(found[r]) for r in (0, 2))


def test_gather_and_take():
    def wrong_length(ring):
        shard, (q, *_) = shards(ring)
        shard.gather(q[:, 1:] if ring.rank == 1 else q)

    def wrong_dim(ring):
        shard, (q, *_) = shards(ring)
        shard.gather(q, 7 if ring.rank == 1 else 1)

    def no_tensor(ring):
        shard, (q, *_) = shards(ring)
        shard.gather(q.tolist() if ring.rank == 1 else q)

    def other_dtype(ring):
        shard, (q, *_) = shards(ring)
        shard.gather(q.float() if ring.rank == 1 else q)

    def other_shape(ring):
        shard, (q, *_) = shards(ring)
        shard.gather(q[:, :, :1] if ring.rank == 1 else q)

    def other_grad_mode(ring):
        shard, (q, *_) = shards(ring)
        with torch.set_grad_enabled(ring.rank != 1):
            shard.gather(q)

    everywhere(errors(wrong_length), "x has", "rows along dim 1")
    everywhere(errors(wrong_dim), "x must be a tensor that has dim 7")
    everywhere(errors(no_tensor), "x must be a tensor", "list")
    everywhere(errors(other_dtype), "dtype of x differs")
    everywhere(errors(other_shape), "shape of x differs")
    everywhere(errors(other_grad_mode), "grad mode differs")
    with pytest.raises(ValueError, match="x has 4 rows along dim 1"):
        simulate(lambda ring: partition(9, ring).take(torch.zeros(2, 4)), 2)


def test_merge():
    good = Attended(torch.zeros(1, 4, 2, 3), torch.zeros(1, 2, 4))
    for bad in (Attended(good.out[:, :3], good.lse[..., :3]), Attended(good.out, good.lse.transpose(1, 2))):
        with pytest.raises(ValueError, match="a and b must be results for the same queries"):
            merge(good, bad)
    for bad in (None, 3, {}, good.out, (1, 2), (good.out,), (good.out, None)):
        for call, name in ((merge, "a"), (lambda x, _: merge(good, x), "b"), (sink, "attended")):
            with pytest.raises(TypeError, match=f"{name} must be Attended"):
                call(bad, torch.zeros(2))
    with pytest.raises(TypeError, match="logits must be .*sparse"):
        sink(good, torch.zeros(2).to_sparse())


@pytest.mark.parametrize("bad", [None, 3, 1j, "ab", (torch.zeros(2), torch.zeros(2)), len])
def test_rotate_and_among(bad):
    with pytest.raises(TypeError, match="x must be a tensor"):
        simulate(lambda ring: ring.rotate(bad), 2)
    with pytest.raises((TypeError, ValueError), match="members must be"):
        simulate(lambda ring: ring.among(bad), 2)


@pytest.mark.parametrize("p", [0, -1, 2.0, None, True, 10**9, 10**400])
def test_simulate(p):
    with pytest.raises(ValueError, match="p must be a positive number"):
        simulate(lambda ring: None, p)
    with pytest.raises(TypeError, match="fn must be a function"):
        simulate(p, 2)
    with pytest.raises(TypeError, match="adversarial must be True or False"):
        simulate(lambda ring: None, 2, "yes")


# ------------------------------------------------------------- what attention is expected to do besides


def second_derivative(attention, q, *rest):
    out = attention(q, *rest)
    (g,) = torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)
    return torch.autograd.grad(out.sum() + g.pow(2).sum(), q)[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_second_derivative_raises(method):
    """Also where `grad` is asked for one input, which passes by what once_differentiable leaves behind."""

    def on(ring):
        shard, leaves = shards(ring)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            second_derivative(lambda *x: METHODS[method](*x, shard=shard).out, *leaves)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            second_derivative(lambda x: shard.gather(x), leaves[0])

    simulate(on, P)
    q, k, v = inputs(N)[:3]
    if method != "dense":
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            second_derivative(lambda *x: METHODS[method](*x).out, q.requires_grad_(), k, v)


@pytest.mark.parametrize("q_chunk", [None, 4])
def test_dense_on_one_rank_is_differentiable_twice(q_chunk):
    q, k, v = inputs(N)[:3]

    def written_out(q, k, v):
        k, v = (x.repeat_interleave(2, 2) for x in (k, v))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    one, other = (
        second_derivative(f, q.clone().requires_grad_(), k, v)
        for f in (lambda *x: dense_attention(*x, q_chunk=q_chunk).out, written_out)
    )
    assert (one - other).norm() < 1e-10 * other.norm()


@pytest.mark.parametrize("method", METHODS)
def test_results_can_be_changed_in_place(method):
    """A residual is added as `out += x`, whatever the word."""
    change_results(method, (4, 2))


@pytest.mark.parametrize("method", METHODS)
def test_results_of_one_head_can_be_changed_in_place(method):
    change_results(method, (1, 1))


def change_results(method, heads):
    """The gradients are those of what is not changed in place, on every rank, for out, lse and a part of one."""

    def through(attend, leaves, in_place):
        out, lse = attend(*leaves)
        weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
        if in_place:
            out *= weight
            out[:, :1] += 1
            lse -= 1
        else:
            out = out * weight
            out = torch.cat([out[:, :1] + 1, out[:, 1:]], 1)
            lse = lse - 1
        (out.square().sum() + lse.sin().sum()).backward()
        return [x.grad for x in leaves]

    def compare(attend, given):
        ways = []
        for in_place in (False, True):
            leaves = [x.clone().requires_grad_() for x in given]
            ways.append(through(attend, leaves, in_place))
        assert all(map(torch.allclose, *ways))

    def on(ring):
        shard, given = partition(N, ring), inputs(N, h=heads[0], g=heads[1])[:3]
        attend = partial(METHODS[method], shard=shard)
        mine = [shard.take(x) for x in given]
        compare(attend, mine)
        compare(partial(checkpoint, attend, use_reentrant=False), mine)
        compare(lambda *x: sink(attend(*x), torch.zeros(heads[0])), mine)
        whole = shard.gather(attend(*mine).out)
        whole *= 2
        with torch.inference_mode():
            for x in attend(*mine):
                x += 1

    simulate(on, P)
    compare(METHODS[method], inputs(N, h=heads[0], g=heads[1])[:3])


@pytest.mark.parametrize("method", ["dilated", "collective", "ring"])
def test_results_changed_in_place_on_one_rank_only(method):
    """Its backward is another pass than its neighbours', and all are told."""

    def on(ring):
        shard, leaves = shards(ring)
        out = METHODS[method](*leaves, shard=shard).out
        if ring.rank == 1:
            out += 1
        out.sum().backward()

    for error in errors(on):
        assert "of another pass" in str(error) and "in place on all of them or on none" in str(error), error


def test_what_tells_of_a_change_in_place_holds_nothing():
    """After the caller has let go of out, what the backward needs of it is all that is left of it, once."""
    q, k, v = (x.requires_grad_() for x in inputs(N)[:3])
    out, lse = ring_attention(q, k, v)
    kept = [x.untyped_storage().data_ptr() for x in out.grad_fn.saved_tensors]
    assert kept[3:] == [out.untyped_storage().data_ptr(), lse.untyped_storage().data_ptr()]
    assert not any(mark.untyped_storage().nbytes() for mark, _ in out.grad_fn.marks)


@pytest.mark.parametrize("n", [1, 3, 7, 9, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_nan_counts_where_it_is_seen(n, dtype):
    """A query that sees a NaN, in q, k or v, has one in its result, by every method, kernel and number of ranks, in q
    or k in every feature and in lse; and no other query has.
    """
    for which, causal, p in itertools.product(range(3), (False, True), (1, 2)):
        given, at = inputs(n, b=1, h=2, g=2, d=4, dtype=dtype), n // 2
        given[which][0, at, 0, 0] = float("nan")
        sees = torch.arange(n) == at if which == 0 else (torch.arange(n) >= at) | (not causal)

        def on(ring, given=given, sees=sees, causal=causal, which=which):
            shard = partition(n, ring)
            mine = sees[shard.positions]
            for method in METHODS.values():
                out, lse = method(*(shard.take(x) for x in given[:3]), shard=shard, causal=causal)
                assert out[0, :, 0, 0].isnan().equal(mine) and out[0, :, 1].isfinite().all(), (method, which)
                assert out[0, :, 0, 1:].isnan().equal((mine & (which < 2))[:, None].expand(-1, 3)), (method, which)
                assert lse[0, 0].isnan().equal(mine & (which < 2)) and lse[0, 1].isfinite().all(), (method, which)

        simulate(on, p)


ODD_FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "causal in chunks": {"causal": True, "q_chunk": 3},
    "window": {"window": (3, 1)},
    "documents": {"cu_seqlens": torch.tensor([0, 5, 17])},
    "dilation": {"dilation": Dilation([4, 17], [1, 2])},
    "mask_mod": {"mask_mod": lambda b, h, q, k: (q + k) % 3 != 0},
    "score_mod": {"causal": True, "score_mod": lambda s, b, h, q, k: s - (q - k)},
}


@pytest.mark.parametrize("feature", ODD_FEATURES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_nan_or_an_infinity_means_the_same_to_all(feature, value, dtype):
    """What is not finite, but for an lse of −inf, is so in all four methods on every rank, and all else is alike."""
    arguments = ODD_FEATURES[feature]

    def odd(x):
        return ~x.isfinite() & ~((x == -float("inf")) & (torch.arange(5) == 4))

    for which, p in itertools.product(range(3), (1, 3)):
        given = inputs(17, b=1, h=2, g=1, d=4, dtype=dtype)
        given[which][0, 11, 0, 1] = value

        def on(ring, given=given):
            shard, found = partition(17, ring, "zigzag"), []
            for method in METHODS.values():
                out, lse = method(*(shard.take(x) for x in given[:3]), shard=shard, **arguments)
                found.append(torch.cat([out.transpose(1, 2), lse[..., None]], 3))  # b h s (d and lse)
            dense = found[0]
            for other in found[1:]:
                assert odd(other).equal(odd(dense))
                assert torch.allclose(other[~odd(dense)], dense[~odd(dense)], rtol=2e-2, atol=2e-2)
            return odd(dense)

        whole = torch.cat(simulate(on, p, adversarial=True), 2)
        assert whole.any() and not (feature == "causal" and whole.all(3).all(2).any())


SEES = {  # which keys each of n queries sees
    "plain": lambda i, j: i == i,
    "causal": lambda i, j: j <= i,
    "causal in chunks": lambda i, j: j <= i,
    "window": lambda i, j: (i - j <= 3) & (j - i <= 1),
    "documents": lambda i, j: (i < 5) == (j < 5),
    "mask_mod": lambda i, j: (i + j) % 3 != 0,
    "score_mod": lambda i, j: j <= i,
}


@pytest.mark.parametrize("feature", SEES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_gradient_loses_a_nan(feature, dtype):
    """It is in dq of the queries that see it and in dk of the keys that these see; in dv if a score is NaN."""
    i = torch.arange(17)
    sees = SEES[feature](i[:, None], i) & torch.ones(17, 17, dtype=torch.bool)
    for which, p in itertools.product(range(3), (1, 3)):
        given = [x.requires_grad_(False) for x in inputs(17, b=1, h=2, g=1, d=4, dtype=dtype)[:3]]
        given[which][0, 8, :, 1] = math.nan
        queries = i == 8 if which == 0 else sees[:, 8]
        keys = sees[queries].any(0)

        def on(ring, given=given, queries=queries, keys=keys, which=which):
            shard = partition(17, ring, "zigzag")
            for method in METHODS.values():
                leaves = [shard.take(x).requires_grad_() for x in given]
                method(*leaves, shard=shard, **ODD_FEATURES[feature]).out.sum().backward()
                rows = shard.take(queries, 0), shard.take(keys, 0), shard.take(keys, 0) & (which < 2)
                for x, odd in zip(leaves, rows):
                    assert x.grad[0, odd].isnan().all(), (method, which)

        simulate(on, p)


def test_arguments_are_keywords():
    with pytest.raises(TypeError):
        dense_attention(*inputs(N)[:3], True)
    for method in METHODS.values():
        with pytest.raises(TypeError, match="dropout"):
            method(*inputs(N)[:3], dropout=0.1)


def test_what_is_right_is_not_refused():
    def on(ring):
        for method in METHODS.values():
            shard, leaves = shards(ring)
            method(*leaves, shard=shard, q_chunk=ring.rank + 1)

    assert errors(on) == [None] * P
