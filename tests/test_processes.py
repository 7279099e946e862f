"""The same over real processes: a launch per number of ranks, and many cases in each."""

import itertools

import pytest
import torch
import torch.distributed as dist
from common import DILATIONS, METHODS, Split, assert_close, both_ways, documents, inputs, layout

from ringref import ProcessRing, Shard, partition, simulate
from ringref.comm.launch import launch

ARGUMENTS = {
    "plain": {},
    "causal": {"causal": True, "q_chunk": 3},
    "dilated": {"causal": True, "dilation": DILATIONS["odd"]},
    "grouped, masked": {"dilation": DILATIONS["grouped"], "mask_mod": documents},
}
PACKED = {
    "window": {"window": (3, 1)},
    "causal window in documents": {"window": (2, None), "causal": True},
    "documents, score_mod": {
        "causal": True,
        "score_mod": lambda s, b, h, q, k: 2 * torch.tanh(s / 2) - 0.1 * h * (q - k),
    },
    "documents, dilated": {"dilation": DILATIONS["odd"]},
}
SPLITS = {
    **{x: lambda p, x=x: Split(layout(x, 13, p)) for x in ("zigzag", "striped", "permuted")},
    "uneven": lambda p: Split(layout("uneven", 7, p)),
    "decoding": lambda p: Split(layout("decoding", 11, p)),
    "fewer tokens than ranks": lambda p: Split(layout("contiguous", max(1, p - 1), p)),
    "no tokens": lambda p: Split(layout("contiguous", 0, p)),
}


def sizes(split):
    return (sum(map(len, side)) for side in zip(*split.positions, strict=True))


def compare_all(ring):
    """Every case against dense on one rank, twice with one ring; returns how many."""
    compared = 0
    for (name, make), what, method in itertools.product(SPLITS.items(), ARGUMENTS, METHODS):
        split, arguments = make(ring.size), ARGUMENTS[what]
        given = inputs(*sizes(split))
        true = split.true(given, **arguments)[ring.rank]
        mine, shard = given.cut(*split.rows[ring.rank]), split.shard(ring)
        found = both_ways(METHODS[method], mine, shard=shard, **arguments)
        assert_close(found, true, f"{method}, {name}, {what}, rank {ring.rank} of {ring.size}")
        compared += 1
    return compared


def packed(ring):
    """Windows, documents, score_mod and value heads of another size."""
    ends = torch.tensor([0, 1, 1, 6, 13])
    for name, what, method in itertools.product(("zigzag", "permuted", "uneven"), PACKED, METHODS):
        split, given = Split(layout(name, 13, ring.size)), inputs(13, dv=5)
        arguments = PACKED[what] | ({"cu_seqlens": ends} if "documents" in what else {})
        true = split.true(given, **arguments)[ring.rank]
        mine, shard = given.cut(*split.rows[ring.rank]), split.shard(ring)
        found = both_ways(METHODS[method], mine, shard=shard, **arguments)
        assert_close(found, true, f"{method}, {name}, {what}, rank {ring.rank} of {ring.size}")


def low_precision(ring):
    """Bit for bit what a simulation finds."""
    for method, dtype in itertools.product(METHODS, (torch.float32, torch.bfloat16, torch.float16)):
        split = Split(layout("zigzag", 24, ring.size))
        given, arguments = inputs(24, d=8, dtype=dtype), {"causal": True}
        simulated = split.found(METHODS[method], given, adversarial=False, **arguments)
        mine, shard = given.cut(*split.rows[ring.rank]), split.shard(ring)
        found = both_ways(METHODS[method], mine, shard=shard, **arguments)
        assert all(map(torch.equal, found, simulated[ring.rank])), (method, dtype)


def who_needs_gradients(ring):
    """A rank that asks for none, beside ranks that ask for some."""
    split, given = Split(layout("zigzag", 11, ring.size)), inputs(11)
    true = split.true(given, causal=True)[ring.rank]
    for method in METHODS:
        mine = given.cut(*split.rows[ring.rank])
        leaves = [x.clone().requires_grad_(ring.rank != 1) for x in mine[:3]]
        leaves[0].requires_grad_(False)
        result = METHODS[method](*leaves, shard=split.shard(ring), causal=True)
        if result.out.requires_grad:
            torch.autograd.backward(tuple(result), mine[3:])
        assert leaves[0].grad is None
        if ring.rank != 1:
            for leaf, other in zip(leaves[1:], true[3:], strict=True):
                assert (leaf.grad - other).norm() < 1e-10 * other.norm()


def take_and_gather(ring):
    x = torch.arange(22.0).view(2, 11).double()
    shard = partition(11, ring, "striped")
    mine = shard.take(x).requires_grad_()
    whole = shard.gather(mine)
    assert whole.equal(x)
    whole.backward(x + ring.rank)
    assert mine.grad.equal(shard.take(x * ring.size + sum(range(ring.size))))


def traffic(ring):
    """The bytes that a simulation counts."""
    split, given = Split(layout("contiguous", 24, ring.size)), inputs(24)
    for method in METHODS:

        def on(ring, method=method):
            before = ring.traffic.received, ring.traffic.messages
            mine = given.cut(*split.rows[ring.rank])
            both_ways(METHODS[method], mine, shard=split.shard(ring), dilation=DILATIONS["odd"])
            return ring.traffic.received - before[0], ring.traffic.messages - before[1]

        assert on(ring) == simulate(on, ring.size)[ring.rank]


def mistakes(ring):
    """Errors on all ranks, after which the ring still works."""
    last = ring.rank == ring.size - 1
    shard = partition(9, ring)
    q, k, v, *_ = (shard.take(x) for x in inputs(9)[:3])
    overlap = Shard(torch.arange(3), ring)
    gap = Shard(torch.arange(3) + 10 * ring.rank, ring)
    one = [x[:, :1] for x in (q, k, v)]
    three = [x[:, :1].expand(2, 3, *x.shape[2:]) for x in (q, k, v)]
    cases = {
        "causal": lambda f: f(q, k, v, shard=shard, causal=last),
        "scale": lambda f: f(q, k, v, shard=shard, scale=0.5 + last),
        "dilation": lambda f: f(q, k, v, shard=shard, dilation=DILATIONS["odd"] if last else None),
        "mask_mod": lambda f: f(q, k, v, shard=shard, mask_mod=documents if last else None),
        "q_chunk": lambda f: f(q, k, v, shard=shard, q_chunk=0 if last else None),
        "backend": lambda f: f(q, k, v, shard=shard, backend="xformers" if last else "auto"),
        "q has": lambda f: f(q[:, 1:] if last else q, k, v, shard=shard),
        "batch": lambda f: f(*(x[: 2 - last] for x in (q, k, v)), shard=shard),
        "dtype": lambda f: f(*(x.float() if last else x for x in (q, k, v)), shard=shard),
        "positions overlap": lambda f: f(*three, shard=overlap),
        "positions leave gaps": lambda f: f(*three, shard=gap),
        "x has": lambda f: shard.gather(one[0] if last else q),
        "method differs": lambda f: shard.gather(q) if last else f(q, k, v, shard=shard),
        "not in the same call": lambda f: ring.gather(q) if last else f(q, k, v, shard=shard),
        "method": lambda f: METHODS["dense" if last else "ring"](q, k, v, shard=shard),
    }
    raised = []
    for (word, case), method in itertools.product(cases.items(), ("dense", "ring")):
        try:
            case(METHODS[method])
            raised.append((word, method, None))
        except (ValueError, TypeError, NotImplementedError) as error:
            raised.append((word, method, str(error)))
    METHODS["ring"](q, k, v, shard=shard)
    return raised


def everything(ring):
    compared = compare_all(ring)
    for test in (packed, low_precision, who_needs_gradients, take_and_gather, traffic):
        test(ring)
    return compared, mistakes(ring) if ring.size > 1 else []


@pytest.mark.parametrize("p", [1, 2, 3])
def test_processes(p):
    ends = launch(everything, p)
    assert [n for n, _ in ends] == [len(SPLITS) * len(ARGUMENTS) * len(METHODS)] * p
    for answers in zip(*(raised for _, raised in ends), strict=True):
        word, method, _ = answers[0]
        assert all(message is not None for *_, message in answers), answers
        assert any(word in message for *_, message in answers), answers


def test_ranks_one_and_three_of_four():
    """A group of some ranks, and `among`, each while the others have a ring of their own."""

    def on(ring):
        groups = [dist.new_group(x) for x in ([0, 2], [1, 3])]
        members = [0, 2] if ring.rank % 2 == 0 else [1, 3]
        for part in (ProcessRing(groups[ring.rank % 2]), ring.among(members)):
            split, given = Split(layout("zigzag", 9, 2)), inputs(9)
            true = split.true(given, causal=True)[part.rank]
            for method in METHODS.values():
                mine = given.cut(*split.rows[part.rank])
                assert_close(both_ways(method, mine, shard=split.shard(part), causal=True), true)
            nothing = inputs(0)  # nobody's rows: no message is posted
            assert both_ways(METHODS["ring"], nothing, shard=partition(0, part)).dq.shape[1] == 0
            assert part.transport == "gloo"
        with pytest.raises(ValueError, match="transport: 'peer' needs a group with NCCL, this one has gloo"):
            ProcessRing(transport="peer")
        with pytest.raises(ValueError, match="transport: expected 'auto', 'peer' or 'nccl', got 'pigeon'"):
            ProcessRing(transport="pigeon")
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
        return ProcessRing(mesh["context"]).rank, ProcessRing(mesh["data"]).rank

    assert launch(on, 4) == [(0, 0), (1, 0), (0, 1), (1, 1)]
