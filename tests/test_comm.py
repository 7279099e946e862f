"""Messages between simulated ranks: what arrives, what may not be relied upon, what is counted."""

import math
import os
import signal
import threading
import time
import weakref
from functools import partial

import pytest
import torch
from common import METHODS, OTHERS, Inputs, Split, both_ways, inputs, layout
from torch.utils._python_dispatch import TorchDispatchMode

from ringref import Dilation, partition, ring_attention, simulate
from ringref.comm.ring import MixedUp
from ringref.comm.simulate import Deadlock, ThreadRing
from ringref.engine.visits import strands, visits
from ringref.shard import counted

RANKS = (1, 2, 3, 5, 8)
both_networks = pytest.mark.parametrize("adversarial", [False, True])


def numbered(rank, *shape, dtype=torch.float64):
    return torch.full(shape, float(rank), dtype=dtype)


# --------------------------------------------------------------------------------- what arrives


@both_networks
@pytest.mark.parametrize("p", RANKS)
def test_rotate(p, adversarial):
    """What comes is from the rank before, of any shape, also none at all."""

    def on(ring):
        x = numbered(ring.rank, ring.rank, 2)
        for hop in range(1, 2 * p):
            x = ring.rotate(x).wait()
            source = (ring.rank - hop) % p
            assert x.equal(numbered(source, source, 2))

    simulate(on, p, adversarial)


@both_networks
@pytest.mark.parametrize("p", RANKS)
def test_many_in_flight(p, adversarial):
    """Messages to one peer arrive in the order of posting, whatever the order of waiting."""

    def on(ring):
        posted = [ring.rotate(numbered(10 * i + ring.rank, 3)) for i in range(4)]
        for i in (2, 0, 3, 1):
            assert posted[i].wait().equal(numbered(10 * i + (ring.rank - 1) % p, 3))
            assert posted[i].wait() is posted[i].wait()

    simulate(on, p, adversarial)


@both_networks
@pytest.mark.parametrize("p", RANKS)
def test_rotate_a_message(p, adversarial):
    """K and V as one message, into buffers of the receiver; of several dtypes."""

    def on(ring):
        before = (ring.rank - 1) % p
        message = numbered(ring.rank, 2), torch.tensor([ring.rank]), torch.tensor([True, False])
        into = tuple(map(torch.empty_like, message))
        got = ring.rotate(message, into).wait()
        assert got[0].equal(numbered(before, 2)) and int(got[1]) == before and got[2][0]
        assert ring.traffic.messages == (p > 1) and ring.traffic.sent == 26 * (p > 1)

    simulate(on, p, adversarial)


@both_networks
@pytest.mark.parametrize("p", RANKS)
def test_gather_and_reduce(p, adversarial):
    def on(ring):
        every = ring.gather(numbered(ring.rank, ring.rank))
        assert all(x.equal(numbered(r, r)) for r, x in enumerate(every))
        parts = [(numbered(ring.rank + 10 * r, r), numbered(1, 2)) for r in range(p)]
        one, other = ring.reduce(parts)
        assert one.equal(numbered(sum(range(p)) + 10 * ring.rank * p, ring.rank))
        assert other.equal(numbered(p, 2))

    simulate(on, p, adversarial)


@both_networks
def test_exchange(adversarial):
    """Any pattern, messages to oneself and empty ones included; all that was asked for comes."""

    def on(ring):
        wanted = {(0, 2): 3, (2, 0): 1, (1, 1): 2, (0, 0): 0, (2, 1): 0, (1, 0): 4}  # from, to: size
        mine = {t: (numbered(f, n),) for (f, t), n in wanted.items() if f == ring.rank}
        into = {f: (torch.empty(n).double(),) for (f, t), n in wanted.items() if t == ring.rank}
        got = ring.exchange(mine, into).wait()
        assert got.keys() == into.keys()
        for source, (x,) in got.items():
            assert x.equal(numbered(source, wanted[source, ring.rank]))
        others = [n for (f, t), n in wanted.items() if f == ring.rank != t]
        assert ring.traffic.sent == 8 * sum(others)
        assert ring.traffic.messages == sum(n > 0 for n in others)

    simulate(on, 3, adversarial)


@both_networks
def test_among(adversarial):
    """Rings of some ranks, in any order, rings of rings; traffic is the whole's."""

    def on(ring):
        mine = [3, 1] if ring.rank % 2 else [0, 4, 2]
        small = ring.among(mine)
        assert (small.rank, small.size) == (mine.index(ring.rank), len(mine))
        got = small.rotate(numbered(ring.rank, 2)).wait()
        assert got.equal(numbered(mine[small.rank - 1], 2))
        assert [x[0] for x in small.announce([ring.rank])] == mine
        if len(mine) == 3:
            least = small.among([2, 1]) if small.rank else small.among([0])
            assert least.rotate(numbered(ring.rank, 1)).wait().item() == {0: 0, 4: 2, 2: 4}[ring.rank]
        assert ring.traffic.messages == {0: 1, 4: 2, 2: 2}.get(ring.rank, 1)
        assert ring.among(range(5)) is ring
        for bad in ([], [(ring.rank + 1) % 5], [ring.rank, 7], [ring.rank] * 2):
            with pytest.raises(ValueError, match="members"):
                ring.among(bad)

    simulate(on, 5, adversarial)


def test_results_come_in_rank_order():
    assert simulate(lambda ring: (ring.rank, ring.size), 6, adversarial=True) == [(r, 6) for r in range(6)]


def test_the_callers_grad_mode():
    with torch.no_grad():
        assert simulate(lambda ring: torch.is_grad_enabled(), 2) == [False, False]
    assert simulate(lambda ring: torch.is_grad_enabled(), 2) == [True, True]


@both_networks
def test_a_simulation_repeats(adversarial):
    """The order in which ranks run is the same each time."""

    def trace():
        steps = []

        def on(ring):
            for hop in range(5):
                steps.append((ring.rank, hop))
                ring.rotate(torch.zeros(1)).wait()

        simulate(on, 4, adversarial)
        return steps

    first = trace()
    assert first == trace() and len(first) == 20


def test_sixteen_ranks_are_quick():
    split, given = Split(layout("zigzag", 64, 16)), inputs(64, h=2, g=1)
    begin = time.process_time()
    split.found(ring_attention, given, causal=True)
    assert time.process_time() - begin < 5


# ------------------------------------------------------------ what a network may do to the careless


def test_reading_before_the_wait():
    def on(ring):
        posted = ring.rotate((numbered(ring.rank, 3),), into := (torch.zeros(3).double(),))
        early = into[0].clone()
        return early, posted.wait()[0]

    for rank, (early, late) in enumerate(simulate(on, 2, adversarial=True)):
        assert early.isnan().all() and late.equal(numbered(1 - rank, 3))


def test_writing_to_what_is_being_sent():
    """It is read as late as is allowed, so the new values may arrive."""

    def on(ring):
        x = numbered(ring.rank, 2)
        posted = ring.rotate(x)
        x.fill_(99.0)
        return posted.wait()

    assert any((x == 99).all() for x in simulate(on, 2, adversarial=True))


def test_receiving_into_what_is_being_sent():
    def on(ring):
        x = numbered(ring.rank, 2)
        return ring.rotate((x,), (x,)).wait()[0].clone()

    found = simulate(on, 3, adversarial=True)
    assert not all(x.equal(numbered((rank - 1) % 3, 2)) for rank, x in enumerate(found))


def test_receiving_k_and_v_into_one_buffer():
    def on(ring):
        buffer = torch.zeros(2).double()
        k, v = ring.rotate((numbered(ring.rank, 2), numbered(ring.rank + 10, 2)), (buffer,) * 2).wait()
        return k.clone(), v.clone()

    assert all(k.equal(v) for k, v in simulate(on, 2, adversarial=True))


def test_a_send_ends_when_it_is_received():
    """Waiting for one's own send waits for the receiver."""
    order = []

    def on(ring):
        if ring.rank == 0:
            ring.exchange({1: (torch.zeros(1),)}, {}).wait()
            order.append("sent")
        else:
            order.append("asked")
            ring.exchange({}, {0: (torch.zeros(1),)}).wait()

    simulate(on, 2, adversarial=True)
    assert order == ["asked", "sent"]


# ------------------------------------------------------------------------------------------- errors


def raises_quickly(fn, p, kind, *words):
    for adversarial in (False, True):
        begin = time.monotonic()
        with pytest.raises(kind) as caught:
            simulate(fn, p, adversarial)
        assert time.monotonic() - begin < 5
        assert all(word in str(caught.value) for word in words), caught.value


def test_nobody_sends():
    def on(ring):
        ring.rotate(torch.zeros(2)).wait()
        if ring.rank == 1:
            ring.exchange({}, {2: (torch.zeros(2),)}).wait()

    raises_quickly(on, 3, Deadlock, "rank 1", "hop", "from rank 2", "nobody sends")


def test_nobody_receives():
    def on(ring):
        if ring.rank == 2:
            ring.exchange({0: (torch.zeros(2),)}, {}).wait()

    raises_quickly(on, 3, Deadlock, "rank 2", "hop", "to rank 0", "never receives")


def test_a_hop_less():
    def on(ring):
        for _ in range(2 if ring.rank == 1 else 3):
            ring.rotate((torch.zeros(2),), (torch.zeros(2),)).wait()

    raises_quickly(on, 3, Deadlock, "rank", "hop", "rank 1")


def test_everyone_waits_for_the_next():
    """A circle: all wait before they send."""

    def on(ring):
        before, after = (ring.rank - 1) % 4, (ring.rank + 1) % 4
        ring.exchange({}, {before: (torch.zeros(2),)}).wait()
        ring.exchange({after: (torch.zeros(2),)}, {}).wait()

    raises_quickly(on, 4, Deadlock, "waits for a message from rank")


@pytest.mark.parametrize(
    "sent, asked",
    [
        (torch.zeros(3), torch.zeros(2)),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2).double()),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
    ],
)
def test_sizes_and_dtypes_that_differ(sent, asked):
    def on(ring):
        if ring.rank == 0:
            ring.exchange({1: (sent,)}, {}).wait()
        else:
            ring.exchange({}, {0: (asked.clone(),)}).wait()

    words = str(tuple(asked.shape)), str(tuple(sent.shape)), "rank 1", "of rank 0"
    raises_quickly(on, 2, ValueError, *words)


def test_two_tensors_for_one():
    def on(ring):
        if ring.rank == 0:
            ring.exchange({1: (torch.zeros(2), torch.zeros(2))}, {}).wait()
        else:
            ring.exchange({}, {0: (torch.zeros(2),)}).wait()

    raises_quickly(on, 2, ValueError, "rank 1", "of rank 0")


@both_networks
@pytest.mark.parametrize("when", range(4))
def test_one_rank_raises(when, adversarial):
    """Its error comes out, not those of the ranks that were left waiting."""

    def on(ring):
        for hop in range(4):
            if ring.rank == 1 and hop == when:
                raise KeyError(f"at hop {hop}")
            ring.rotate(torch.zeros(1)).wait()

    with pytest.raises(KeyError, match=f"at hop {when}"):
        simulate(on, 4, adversarial)


def test_a_rank_may_catch_its_deadlock():
    def on(ring):
        if ring.rank == 0:
            with pytest.raises(Deadlock):
                ring.exchange({}, {1: (torch.zeros(1),)}).wait()
        return ring.rank

    assert simulate(on, 2) == [0, 1]


@both_networks
def test_a_buffer_with_gaps(adversarial):
    """An error over every transport, as over gloo and NCCL, which cannot fill one."""

    def on(ring):
        with pytest.raises(ValueError, match="into: what is received from another rank must be contiguous"):
            ring.exchange({1 - ring.rank: (torch.ones(2, 3),)}, {1 - ring.rank: (torch.empty(3, 2).t(),)})

    simulate(on, 2, adversarial)


def test_what_is_received_lies_where_the_transport_wants_it(monkeypatch):
    """Else other ranks would map, and hold, memory that has nothing to do with them."""
    made, post = [], ThreadRing._post

    def space(ring, make):
        made.extend(found := make())
        return found

    def checked(ring, outgoing, into):
        storages = {x.untyped_storage().data_ptr() for x in made}
        arriving = [x for message in into.values() for x in message if x.is_floating_point()]
        assert all(x.untyped_storage().data_ptr() in storages for x in arriving)
        return post(ring, outgoing, into)

    def on(ring):
        shard = partition(12, ring, "striped")
        leaves = [shard.take(x).requires_grad_() for x in inputs(12)[:3]]
        for attention in METHODS.values():
            for how in ({"causal": True}, {"window": (3, 1)}, {"dilation": Dilation([4, 12], [1, 3])}):
                shard.gather(attention(*leaves, shard=shard, **how).out).sum().backward()
        return len(made)

    monkeypatch.setattr(ThreadRing, "space", space)
    monkeypatch.setattr(ThreadRing, "_post", checked)
    assert min(simulate(on, 3)) > 0


def test_what_cannot_be_announced():
    for x, word in ((torch.zeros([1] * 9), "dimensions"), (torch.zeros(1).cfloat(), "complex64")):
        with pytest.raises((TypeError, ValueError), match=word):
            simulate(lambda ring, x=x: ring.rotate(x), 2)
    with pytest.raises(ValueError, match="dtypes differ"):
        simulate(lambda ring: ring.rotate(torch.zeros(2, dtype=(torch.half, torch.float)[ring.rank])), 2)


def gone(name):
    return f"the ring of rank {name}: this simulation has ended"


def test_a_ring_whose_simulation_has_ended():
    """Its messages would never come: backward outside fn, a shard of a ring that fn returned, a wait."""
    given = inputs(4).q.requires_grad_()
    outs = simulate(lambda ring: ring_attention(*[partition(4, ring).take(given)] * 3, shard=partition(4, ring)).out, 2)
    with pytest.raises(RuntimeError, match=gone(0) + ".*call backward.*inside fn"):
        outs[0].sum().backward()
    rings = simulate(lambda ring: ring, 2)
    with pytest.raises(RuntimeError, match=gone(1)):
        ring_attention(*[given[:, :2]] * 3, shard=partition(4, rings[1]))
    posted = simulate(lambda ring: ring.exchange({}, {1 - ring.rank: (torch.zeros(1),)}), 2)
    with pytest.raises(RuntimeError, match=gone(0)):
        posted[0].wait()


@both_networks
def test_a_shard_that_ranks_share(adversarial):
    shared = {}

    def on(ring):
        shared["shard"] = partition(6, ring)
        ring.announce([0])
        ring_attention(*[inputs(2).q] * 3, shard=shared["shard"])

    with pytest.raises(RuntimeError, match="the ring of rank . is used by rank .: ranks must not share a ring"):
        simulate(on, 3, adversarial)


@pytest.mark.parametrize("nested", [False, True])
def test_ctrl_c_ends_every_rank(nested):
    """One computes, one waits, one has not begun; also in a simulation inside another."""

    def on(ring):
        if ring.rank == 1:
            ring.exchange({}, {0: (torch.zeros(1),)}).wait()
        while ring.rank == 0:
            try:
                torch.ones(8, 8) @ torch.ones(8, 8)
                ring.announce([0]) if ring.size < 3 else None
            except Exception:
                pass

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            simulate((lambda ring: simulate(on, 3)) if nested else on, 3)
    finally:
        signal.signal(signal.SIGINT, before)
    end = time.monotonic() + 5  # an outer simulation's ranks end the inner one's
    while any(thread.name.startswith("rank ") for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(thread.name.startswith("rank ") for thread in threading.enumerate())


# ------------------------------------------------------------------------- which pass a message is of


@both_networks
@pytest.mark.parametrize("p", RANKS)
def test_numbered(p, adversarial):
    """The number goes with the first message to each rank and from each, and is not counted."""

    def on(ring):
        one = ring.numbered(7)
        for _ in range(2 * p):
            x = one.rotate((numbered(ring.rank, 2),), (torch.empty(2).double(),)).wait()[0]
            assert x.equal(numbered((ring.rank - 1) % p, 2))
        every = one.gather(numbered(ring.rank, ring.rank), [(r,) for r in range(p)])
        assert all(x.equal(numbered(r, r)) for r, x in enumerate(every))
        members = [r for r in range(p) if r % 2 == ring.rank % 2]
        assert len(one.among(members).gather(torch.zeros(1), [(1,)] * len(members))) == len(members)
        return ring.traffic.sent

    def plain(ring):
        for _ in range(2 * p):
            ring.rotate((numbered(ring.rank, 2),), (torch.empty(2).double(),)).wait()
        ring.gather(numbered(ring.rank, ring.rank), [(r,) for r in range(p)])
        members = [r for r in range(p) if r % 2 == ring.rank % 2]
        ring.among(members).gather(torch.zeros(1), [(1,)] * len(members))
        return ring.traffic.sent

    assert simulate(on, p, adversarial) == simulate(plain, p, adversarial)


@both_networks
def test_messages_of_another_pass(adversarial):
    """Whoever receives one of another pass raises, and says from whom."""

    def on(ring):
        with pytest.raises(RuntimeError, match=f"rank {ring.rank}: the messages of rank .* are of another pass"):
            ring.numbered(3 if ring.rank == 1 else 2).gather(torch.zeros(1), [(1,)] * 3)

    simulate(on, 3, adversarial)


def backwards_in_another_order(call, adversarial, p=3, lengths=(6, 6)):
    """Every rank is told when rank 1 goes backward through the second of two calls first."""

    def on(ring):
        shards = [partition(n, ring, "zigzag") for n in lengths]
        leaves = [[shard.take(x).requires_grad_() for x in inputs(n)[:3]] for shard, n in zip(shards, lengths)]
        first, second = (call(shard, *x) for shard, x in zip(shards, leaves))
        try:
            for out in (second, first) if ring.rank == 1 else (first, second):
                out.sum().backward()
        except RuntimeError as error:
            return error

    found = simulate(on, p, adversarial)
    assert all(isinstance(error, MixedUp) and "of another pass" in str(error) for error in found), found


@both_networks
@pytest.mark.parametrize("lengths", [(6, 6), (6, 12), (12, 6)])
@pytest.mark.parametrize("p", [2, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_backwards_in_another_order(method, p, lengths, adversarial):
    call = lambda shard, q, k, v: METHODS[method](q, k, v, shard=shard).out
    backwards_in_another_order(call, adversarial, p, lengths)


@both_networks
def test_backwards_of_gather_in_another_order(adversarial):
    backwards_in_another_order(lambda shard, q, k, v: shard.gather(q), adversarial)


def test_calls_of_rings_made_anew_are_told_apart():
    """The number of a call is the ranks' own to agree upon, whatever other calls each of them has taken part in."""

    def on(ring):
        if ring.rank:  # more calls than rank 0
            pair = ring.among([1, 2])
            partition(4, pair).gather(torch.zeros(2), 0)
        for _ in range(2):
            whole = partition(6, ring).gather(torch.zeros(2, requires_grad=True), 0)
            whole.sum().backward()

    simulate(on, 3, adversarial=True)


# ------------------------------------------------------------------------------------------ traffic


def received(method, given, split, **arguments) -> list[tuple[int, int]]:
    """Bytes that each rank receives, in the forward and in the backward."""

    def on(ring):
        mine, shard = given.cut(*split.rows[ring.rank]), split.shard(ring)
        leaves = [x.clone().requires_grad_() for x in mine[:3]]
        result = METHODS[method](*leaves, shard=shard, **arguments)
        forward = ring.traffic.received
        torch.autograd.backward(tuple(result), mine[3:])
        return forward, ring.traffic.received - forward

    return simulate(on, len(split.positions), adversarial=True)


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_bytes(method, name, dtype):
    """2·d·g·(n − s) elements forward; backward those again, and as many of dK and dV, whose sums over ranks, from
    the ring's second hop on, are float32."""
    b, h, g, d, p, s = 2, 4, 2, 8, 4, 6
    n, size = p * s, dtype.itemsize
    given = inputs(n, b=b, h=h, g=g, d=d, dtype=dtype)
    elements = b * 2 * d * g * (n - s)
    for forward, backward in received(method, given, Split(layout(name, n, p))):
        assert forward == elements * size
        sums = elements * (p - 2) // (p - 1) if method == "ring" else 0
        assert backward == elements * 2 * size + sums * (max(4, size) - size)


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("w", [0, 1, 5, 6, 15, 22])
def test_bytes_of_a_window(method, w):
    """A rank whose contiguous shard starts at a receives b·g·(d + d_v)·min(w, a) elements forward; backward those
    again, and dK and dV of its own rows from whoever sees them: a fetch from each, a ring's sum once they meet.
    """
    b, g, d, dv, p, s = 2, 2, 8, 3, 4, 6
    given = inputs(p * s, b=b, h=4, g=g, d=d, dv=dv)
    row, split = b * g * (d + dv) * 8, Split(layout("contiguous", p * s, p))
    found = received(method, given, split, causal=True, window=(w, None))
    assert [forward for forward, _ in found] == [row * min(w, r * s) for r in range(p)]
    again = sum(backward for _, backward in found)
    if method != "ring":  # the ring's gradients go home from hop to hop
        assert again == 2 * sum(forward for forward, _ in found)
    else:
        assert (again == 0) == (w == 0) and again <= 3 * sum(forward for forward, _ in found)


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("window", [None, (3, 3)])
def test_bytes_of_documents(method, window):
    """Nothing travels of documents that no boundary cuts; of one that is cut, what is before the boundary."""
    b, g, d, p, s = 2, 2, 8, 4, 6
    given, split = inputs(p * s, b=b, h=4, g=g, d=d), Split(layout("contiguous", p * s, p))
    arguments = {"causal": True, "window": window}
    ends = torch.tensor([0, 2, 6, 6, 12, 13, 18, 24])
    assert received(method, given, split, cu_seqlens=ends, **arguments) == [(0, 0)] * p
    ends = torch.tensor([0, 2, 10, 12, 13, 18, 24])
    found = [forward for forward, _ in received(method, given, split, cu_seqlens=ends, **arguments)]
    assert found == [0, b * g * 2 * d * 8 * (4 if window is None else 3), 0, 0]


def test_bytes_of_uneven_shards():
    given, split = inputs(12, b=1, h=2, g=1, d=4), Split(layout("uneven", 12, 4))
    for method in OTHERS:
        for rank, (forward, _) in enumerate(received(method, given, split)):
            s = len(split.positions[rank][1])
            assert forward == (2 * 4 * (12 - s) * 8 if s else 0)  # an empty shard stays outside


def test_dilated_fetches_nothing_after_the_last_query():
    given, split = inputs(12, b=1, h=2, g=2, d=4), Split(layout("contiguous", 12, 3))
    found = received("dilated", given, split, causal=True)
    assert [forward for forward, _ in found] == [0, 2 * 4 * 2 * 4 * 8, 2 * 4 * 2 * 8 * 8]


BRANCHES = [(4, 1), (4, 2), (8, 1), (8, 2), (8, 4), (8, 3), (16, 4), (16, 16), (32, 5), (64, 8), (99, 7)]


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1), (1, 1)])
@pytest.mark.parametrize("s", [4, 8])
def test_bytes_of_a_branch(method, heads, s):
    """Aligned shards: at most 2·d·g·min(r, h/g)·(⌈w/r⌉ − ⌊s/r⌋), none when w divides s."""
    (h, g), d, p = heads, 2, 4
    n = p * s
    given, split = inputs(n, b=1, h=h, g=g, d=d), Split(layout("contiguous", n, p))
    for w, r in BRANCHES:
        inside = min(w, n)
        if s % w and inside % s:
            continue  # not aligned
        bound = 2 * d * g * min(r, h // g) * (math.ceil(inside / r) - s // r) if w > s else 0
        found = received(method, given, split, dilation=Dilation([w], [r]))
        assert all(forward <= 8 * bound for forward, _ in found), (w, r, bound, found)
        if s % r == 0:
            assert all(forward == 8 * bound for forward, _ in found), (w, r, bound, found)
        assert all(backward <= 3 * 8 * bound for _, backward in found)


@pytest.mark.parametrize("method", OTHERS)
def test_bytes_of_shards_that_cut_segments(method):
    """Only rows that another rank's queries see travel: to those ranks, or round all that are linked by segments."""
    s, w, p, d = 10, 6, 4, 4  # 10 and 20 lie inside a segment, 30 begins one: ranks 0, 1, 2 are linked
    held = [set(range(i * s, i * s + s)) for i in range(p)]
    segments = [{x // w for x in rows} for rows in held]
    shared = {(i, j): {x for x in held[j] if x // w in segments[i]} for i in range(p) for j in range(p) if i != j}
    rows = [sum(len(shared[i, j]) for j in range(p) if j != i) for i in range(p)]
    if method != "dilated":
        loads = [len(set().union(*(shared[i, j] for i in range(p) if i != j))) for j in range(3)]
        rows = [sum(loads) - loads[i] for i in range(3)] + [0]
    given, split = inputs(p * s, b=1, h=1, g=1, d=d), Split(layout("contiguous", p * s, p))
    found = received(method, given, split, dilation=Dilation([w], [1]))
    assert [forward for forward, _ in found] == [2 * d * x * 8 for x in rows]


def test_branches_add_up():
    given, split = inputs(32, b=1, h=2, g=2, d=2), Split(layout("contiguous", 32, 4))
    for method in OTHERS:
        ends = [
            received(method, given, split, dilation=Dilation(w, r))[0][0]
            for w, r in (([4, 16, 32], [1, 2, 4]), ([16], [2]), ([32], [4]))
        ]
        assert ends[0] == ends[1] + ends[2] > 0


# ------------------------------------------------------------------------------------------- memory


class Storages(TorchDispatchMode):
    """What this thread's operators create: the largest storage, the most buffers of a size alive.

    A buffer is what `new_empty` and its like return: what messages arrive in.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size, self.live, self.most, self.largest, self.known = size, 0, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                if "empty" in func.__name__ and storage.nbytes() == self.size:
                    self.live += 1
                    self.most = max(self.most, self.live)
                    weakref.finalize(storage, self._gone)
        return result

    def _gone(self):
        self.live -= 1


def watched(method, p, s, d, **arguments):
    """Per rank: what forward and backward created."""
    given, split = inputs(p * s, b=1, h=2, g=1, d=d), Split(layout("contiguous", p * s, p))

    def on(ring):
        mine = Inputs(*(x.clone() for x in given.cut(*split.rows[ring.rank])))
        leaves = [x.requires_grad_() for x in mine[:3]]
        with Storages(8 * s * d) as forward:
            result = METHODS[method](*leaves, shard=split.shard(ring), backend="math", **arguments)
        with Storages(8 * s * d) as backward:
            torch.autograd.backward(tuple(result), mine[3:])
        return forward, backward

    return simulate(on, p, adversarial=True)


@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_a_ring_holds_three_blocks(p):
    """Beside its own the one in hand and the one arriving (p = 2: only that); dK and dV alike."""
    blocks = min(p, 3) - 1
    for forward, backward in watched("ring", p, 16, 64):
        assert forward.most == 2 * blocks
        assert backward.most <= 4 * blocks


@pytest.mark.parametrize("method", ["collective", "dilated"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_others_hold_what_they_fetched(method, p):
    """K and V of the others; in the backward as much again, and collective's sum and arriving."""
    for forward, backward in watched(method, p, 16, 64):
        assert forward.most == 2 * (p - 1)
        assert backward.most <= 4 * (p - 1) + 2


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("q_chunk", [None, 32, 8, 4])
@pytest.mark.parametrize("p", [1, 4])
def test_score_workspace(method, q_chunk, p):
    """h·(n/p)² scores, or h·c·(n/p) with a q_chunk of c; in the backward too."""
    s = 64
    for ends in watched(method, p, s, 1, q_chunk=q_chunk):
        assert all(end.largest == 8 * 2 * (q_chunk or s) * s for end in ends)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_kept_after_the_backward(method):
    """What the autograd graph held is let go of with the results."""
    split, given = Split(layout("zigzag", 12, 3)), inputs(12)

    def on(ring):
        mine = given.cut(*split.rows[ring.rank])
        leaves = [x.clone().requires_grad_() for x in mine[:3]]
        results = METHODS[method](*leaves, shard=split.shard(ring), causal=True)
        torch.autograd.backward(tuple(results), mine[3:])
        storages = [weakref.ref(x.untyped_storage()) for x in (*leaves, *results)]
        node = weakref.ref(results.out.grad_fn)
        del leaves, results, mine
        return [*storages, node]

    for refs in simulate(on, 3):
        assert all(ref() is None for ref in refs)


def test_plans_are_cached_by_content():
    """A call with equal positions repeats the first, one with others is not answered from it."""
    given = inputs(12)

    def on(ring, name):
        shard = partition(12, ring, name)
        mine = Inputs(*(shard.take(x) for x in given[:4]), shard.take(given.dlse, 2))
        first = both_ways(ring_attention, mine, shard=shard, causal=True)
        again = both_ways(ring_attention, mine, shard=partition(12, ring, name), causal=True)
        assert all(map(torch.equal, first, again))

    for name in ("contiguous", "striped", "contiguous"):
        simulate(partial(on, name=name), 3)


def test_plans_are_small():
    """What is remembered of a call: a few numbers a visit, however many chunks there are."""
    n, c = 4096, 8
    every, rows = counted(n), 0
    for visit in visits(strands(None, 1)[0], every, every, (None, 0), q_chunk=c):
        assert visit.queries.strided and visit.keys.strided
        held = [x for part in visit[:2] for x in vars(part).values() if torch.is_tensor(x)]
        assert not held
        rows += visit.queries.m * visit.queries.c
    assert rows >= n
