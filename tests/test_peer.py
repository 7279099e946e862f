"""The protocol of the peer transport, over a device of this process: slots, signals, a rank that is late, one that is
gone.
"""

import ctypes
import gc
import queue
import random
import threading
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from common import OTHERS, Results, Seen, assert_close, both_ways, everything, inputs

import ringref
from ringref import Shard, partition
from ringref.comm.peer import _WAIT, Line, Mailbox, Peers, Unreachable, _pool
from ringref.comm.ring import Pending, Ring, Traffic
from ringref.comm.simulate import simulate
from ringref.engine import kernels


class Mark:
    def __init__(self, device):
        self._device, self._event = device, threading.Event()
        self.set, self.done = self._event.set, self._event.is_set

    def join(self):
        """A stream of the CPU is this thread: it waits itself."""
        while not self._event.wait(0.01):
            if self._device.lost:
                raise RuntimeError("the device is lost")


class Host:
    """A device whose stream is a thread, and whose memory every rank of this process can reach."""

    def __init__(self, reach=True, lateness=0.0):
        self.lost, self._reach, self._lateness = False, reach, lateness
        self._tasks, self._dice = queue.Queue(), random.Random(int(lateness * 1e6))
        self.opened, self.closed, self.line = 0, 0, Line()
        threading.Thread(target=_live, args=(self._tasks,), daemon=True).start()

    def __del__(self):
        self._tasks.put(None)

    def signals(self, count):
        return torch.zeros(count, dtype=torch.int32)

    def locate(self, address):
        return address // 64, address % 64

    def alive(self, key):
        return self._dice.random() < 0.5

    def export(self, key):
        if not self._reach:
            raise RuntimeError("this memory cannot be shared")
        return key.to_bytes(8, "big")

    def open(self, handle):
        self.opened += 1
        return int.from_bytes(handle, "big") * 64

    def close(self, base):
        self.closed += 1

    def space(self, make):
        return make()

    def capturing(self):
        return False

    def begin(self):
        return time.sleep, self._dice.random() * self._lateness

    def follow(self, start):
        sleep, seconds = start
        self._tasks.put(lambda: sleep(seconds))

    def prepare(self, operations):
        return operations

    def signal(self, operations):
        def task():
            for op, address, value in operations:
                flag = ctypes.c_int32.from_address(address)
                while op == _WAIT and flag.value != value:
                    if self.lost:
                        raise RuntimeError("lost")
                    time.sleep(1e-5)
                if op != _WAIT:
                    flag.value = value

        self._tasks.put(task)

    def copy(self, copies):
        self._tasks.put(lambda: [ctypes.memmove(*x) for x in copies])

    def end(self):
        mark = Mark(self)
        self._tasks.put(mark.set)
        return mark

    def watch_only(self):
        pass

    def fail(self):
        self.lost = True


def _live(tasks):
    try:
        while (task := tasks.get()) is not None:
            task()
    except RuntimeError:
        pass  # a lost device does nothing any more


class PeerRing(Ring):
    """A rank of a ring over `Peers` and a `Host`."""

    def __init__(self, rank, size, store, timeout=20.0, **how):
        self.rank, self.size, self.traffic = rank, size, Traffic()
        self.peers = Peers(rank, size, store, lambda: how.get("device") or Host(**how), timeout)

    def _post(self, outgoing, into, number=0, moment=None):
        return self.peers.post(outgoing, into, number, f"rank {self.rank}'s exchange", moment)

    def numbers(self, outgoing, into):
        return True

    def moment(self):
        return self.peers.moment()

    def _tell(self, row):
        told, every = self.peers.tell(row), []
        return Pending(lambda: every.extend(told()), every)


def ranks(fn, p, each=lambda rank: {}, **how):
    """fn(ring) on p threads; results, or the exceptions, in rank order."""
    store, results = dist.HashStore(), [None] * p

    def live(rank):
        try:
            results[rank] = fn(PeerRing(rank, p, store, **how, **each(rank)))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=live, args=(r,), daemon=True) for r in range(p)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return results


def good(results):
    for x in results:
        if isinstance(x, Exception):
            raise x
    return results


@pytest.mark.parametrize("p", [2, 3, 5])
@pytest.mark.parametrize("lateness", [0.0, 0.003])
def test_every_exchange(p, lateness):
    good(ranks(everything, p, lambda rank: {"lateness": lateness * rank}))


def test_the_same_exchanges_over_threads():
    simulate(everything, 3, adversarial=True)


def test_two_rings_of_the_same_ranks_are_apart():
    store = dist.HashStore()

    def both(ring):
        other = PeerRing(ring.rank, ring.size, dist.PrefixStore("other", store))
        first = ring.rotate((torch.full((9,), ring.rank),), (torch.empty(9, dtype=torch.int64),))
        second = other.rotate((torch.full((5,), -ring.rank),), (torch.empty(5, dtype=torch.int64),))
        before = (ring.rank - 1) % ring.size
        assert (second.wait()[0] == -before).all() and (first.wait()[0] == before).all()

    good(ranks(both, 3))


def test_rings_whose_streams_share_a_hardware_queue_do_not_lock_each_other():
    """What is posted first is queued first, whichever ring is waited for: a device of one queue shows it."""
    store = dist.HashStore()

    def both(ring):
        other = PeerRing(ring.rank, ring.size, dist.PrefixStore("other", store), device=ring.peers._device)
        for turn in range(10):
            if turn % ring.size == ring.rank:
                time.sleep(0.02)  # a host that comes late is the first to find every offer
            posted = other.rotate((torch.full((9,), ring.rank),), (torch.empty(9, dtype=torch.int64),))
            everything(ring, rounds=1)
            assert (posted.wait()[0] == (ring.rank - 1) % ring.size).all()

    good(ranks(both, 3))


def test_a_late_rank_is_waited_for():
    def late(ring):
        if ring.rank == 1:
            time.sleep(0.5)
        return ring.rotate((torch.full((7,), ring.rank),), (torch.empty(7, dtype=torch.int64),)).wait()[0][0].item()

    assert good(ranks(late, 3)) == [2, 0, 1]


def test_who_does_not_wait_for_what_it_posted_holds_nobody_up():
    came = threading.Event()

    def dawdle(ring):
        if ring.rank == 1:
            time.sleep(0.2)  # so that the others find no offer of its when they post
        posted = ring.rotate((torch.full((7,), ring.rank),), (torch.empty(7, dtype=torch.int64),))
        if ring.rank == 0:
            assert came.wait(20)
        found = posted.wait()[0][0].item()
        if ring.rank == 1:
            came.set()
        return found

    assert good(ranks(dawdle, 3)) == [2, 0, 1]


def test_a_host_need_not_wait_to_post():
    def ahead(ring):
        if ring.rank == 1:
            time.sleep(0.5)
        start = time.monotonic()
        posted = [
            ring.rotate((torch.full((7,), i + ring.rank),), (torch.empty(7, dtype=torch.int64),)) for i in range(3)
        ]
        taken = time.monotonic() - start
        return taken, [x.wait()[0][0].item() for x in reversed(posted)]  # in whatever order

    found = good(ranks(ahead, 3))
    assert all(taken < 0.4 for taken, _ in found)
    assert [came for _, came in found] == [[4, 3, 2], [2, 1, 0], [3, 2, 1]]


def test_short_rows_are_told_by_the_hosts():
    def tell(ring):
        rows = [[r, 10**18 + r] for r in range(3)]
        assert all(ring.peers.tell(rows[ring.rank])() == rows for _ in range(20))
        everything(ring, rounds=1)
        assert ring.peers.tell([])() == [[]] * 3

    good(ranks(tell, 3))


def hurry(ring, seconds):
    """From now on (a busy machine may need longer to come here)."""
    ring.peers.timeout = ring.peers._mailbox._timeout = seconds


def around(ring, size=9):
    """Post one's rank to the next one."""
    return ring.rotate((torch.full((size,), ring.rank),), (torch.empty(size, dtype=torch.int64),))


def beside(ring, store, **how):
    """Another ring of the same ranks, whose exchanges are in one line with the first one's."""
    how.setdefault("device", ring.peers._device)
    return PeerRing(ring.rank, ring.size, dist.PrefixStore("beside", store), **how)


def test_what_was_posted_is_queued_while_rows_are_awaited():
    """The others may not come to their rows before what this rank has posted and not waited for is there."""

    def tell(ring):
        if ring.rank == 1:
            time.sleep(0.2)  # rank 0 finds no offer of its when it posts
        posted = around(ring)
        if ring.rank:
            posted.wait()
        rows = ring.peers.tell([ring.rank])()
        return rows, posted.wait()[0][0].item()

    assert good(ranks(tell, 3)) == [([[0], [1], [2]], before) for before in (2, 0, 1)]


def test_a_host_that_is_held_up_takes_what_others_say_meanwhile():
    """Or who is far ahead, and finds its mailbox full, does not queue what it is held up by."""
    store = dist.HashStore()

    def ahead(ring):
        other = beside(ring, store)
        if ring.rank == 1:
            time.sleep(0.2)
        first = around(other)
        if ring.rank == 1:
            first.wait()
        start = time.monotonic()
        posted = [around(ring) for _ in range(40)]
        taken = time.monotonic() - start
        assert all(x.wait()[0][0] == 1 - ring.rank for x in (first, *posted))
        return taken

    assert max(good(ranks(ahead, 2))) < 2.0


def test_two_threads_may_use_a_ring_each_in_any_order():
    store = dist.HashStore()

    def both(ring):
        device = Host()
        device.line = ring.peers._device.line
        rings, found = [ring, beside(ring, store, device=device)], [None, None]

        def use(i):
            time.sleep(0.2 * (i != ring.rank))
            found[i] = around(rings[i]).wait()[0][0].item()

        threads = [threading.Thread(target=use, args=(i,), daemon=True) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return found

    assert good(ranks(both, 2)) == [[1, 1], [0, 0]]


def test_an_error_of_one_ring_is_no_error_of_another():
    store = dist.HashStore()

    def differ(ring):
        other = beside(ring, store)
        if ring.rank == 0:  # it finds out when it uses the other ring, or its thread does
            around(ring, 4)
        else:
            time.sleep(0.1)
            with pytest.raises(RuntimeError, match="not in the same exchange"):
                around(ring, 5).wait()
        assert around(other).wait()[0][0] == 1 - ring.rank
        everything(other)
        with pytest.raises(RuntimeError, match="broke off before: the ranks are not in the same exchange"):
            around(ring)

    good(ranks(differ, 2))


@pytest.mark.parametrize("waits", [True, False])
def test_what_others_never_post_breaks_its_ring_in_time_and_no_other(waits):
    store, ends = dist.HashStore(), {}

    def forget(ring):
        other = beside(ring, store)
        if ring.rank == 0:
            hurry(ring, 0.5)
            around(ring)  # on this rank alone, and never waited for
        ends[ring.rank] = weakref.ref(ring.peers)
        posted = around(other)
        if ring.rank == 0 and not waits:
            time.sleep(1.5)
        start = time.monotonic()
        posted.wait()
        return time.monotonic() - start

    took = good(ranks(forget, 2))
    assert max(took) < 1.4, took
    time.sleep(0.2)
    assert not any(end() for end in ends.values()), "what is posted keeps its ring"


class Failing(Host):
    fails = False

    def copy(self, copies):
        if self.fails:
            raise RuntimeError("no copy")
        super().copy(copies)


@pytest.mark.parametrize("late", [0, 1])
def test_an_error_of_the_device_is_an_error_for_who_waits(late):
    """Whether its own post finds it, or the thread that takes the offers."""

    def fail(ring):
        if ring.rank == 1:
            ring.peers._device.fails = True
        time.sleep(0.2 * (ring.rank == late))
        if ring.rank == 0:
            around(ring)
            return
        with pytest.raises(RuntimeError, match="no copy"):
            posted = around(ring)
            time.sleep(0.4)
            posted.wait()
        with pytest.raises(RuntimeError, match="broke off before: no copy"):
            around(ring)

    good(ranks(fail, 2, lambda rank: {"device": Failing()}))


def test_a_ring_may_end_by_garbage_collection_in_the_thread_that_looks_after_it():
    def use(ring):
        ring.itself = ring  # a cycle
        return weakref.ref(ring.peers)

    gc.disable()
    usual = gc.get_threshold()
    try:
        found = good(ranks(use, 2))
        gc.set_threshold(1, 1, 1)
        gc.enable()
        time.sleep(1.0)  # this thread collects nothing meanwhile
    finally:
        gc.set_threshold(*usual)
        gc.enable()
    use.itself, use = use, weakref.ref(use)
    gc.collect()
    assert use() is None, "a collection hangs, and there will never be another"
    assert all(x() is None for x in found)


METHODS = [ringref.dilated_attention, ringref.collective_attention, ringref.ring_attention]


@pytest.mark.parametrize("how", [{"causal": True}, {"cu_seqlens": torch.tensor([0, 1, 9, 30, 36])}, {"window": (5, 0)}])
@pytest.mark.parametrize("p", [2, 4])
def test_every_method(p, how):
    given = inputs(36, d=4)
    true = both_ways(ringref.dense_attention, given, **how)

    def on_a_rank(ring):
        found = []
        for method, layout in product(METHODS, ("contiguous", "zigzag")):
            shard = ringref.partition(36, ring, layout)
            mine = given.cut(shard.positions, shard.positions)
            both_ways(method, mine, shard=shard, **how)
            method(*mine[:3], shard=shard, **how)  # a forward whose backward never comes
            found.append((both_ways(method, mine, shard=shard, **how), shard.positions))
        return found

    for found in good(ranks(on_a_rank, p, lambda rank: {"lateness": 0.002 * rank})):
        for one, at in found:
            assert_close(one, Results(true.out[:, at], true.lse[:, :, at], *(x[:, at] for x in true[2:])))


def test_a_rank_that_is_gone_is_an_error_for_the_others_in_time():
    def leave(ring):
        everything(ring)
        if ring.rank == 1:
            return
        hurry(ring, 0.5)
        with pytest.raises((RuntimeError, TimeoutError), match="rank 1"):
            ring.exchange({1: (torch.ones(3),)}, {1: (torch.empty(3),)}).wait()
        with pytest.raises(RuntimeError, match="broke off before"):  # a ring is not used on as if nothing had been
            ring.exchange({1: (torch.ones(3),)}, {1: (torch.empty(3),)})

    good(ranks(leave, 3))


def test_a_message_that_never_leaves_is_an_error_for_who_waits_for_it():
    """The hosts agreed, and then one rank's stream stood still: nothing but the clock can tell."""
    told = threading.Event()

    def stop(ring):
        other = 1 - ring.rank
        if ring.rank == 1:
            ring.peers._offer(0, (torch.empty(3),), 0)  # what it posts before it stands still
            assert told.wait(60)
            return
        posted = ring.exchange({other: (torch.ones(3),)}, {other: (torch.empty(3),)})
        hurry(ring, 0.5)
        with pytest.raises(RuntimeError, match="the device is lost"):
            posted.wait()
        with pytest.raises(RuntimeError, match="rank 0's exchange was not done after 0.5 s"):
            ring.exchange({other: (torch.ones(3),)}, {other: (torch.empty(3),)})
        told.set()

    good(ranks(stop, 2))


@pytest.mark.parametrize("what", ["bytes", "pass"])
def test_ranks_in_different_exchanges_get_an_error(what):
    def differ(ring):
        everything(ring)
        if what == "pass":
            ring = ring.numbered(1 + ring.rank)
        size = 4 + (what == "bytes") * ring.rank
        ring.rotate((torch.ones(size),), (torch.empty(size),)).wait()

    found = ranks(differ, 2)
    assert all(isinstance(x, RuntimeError) and "not in the same exchange" in str(x) for x in found), found


def test_ranks_that_cannot_reach_each_other_all_know():
    found = ranks(everything, 3, lambda rank: {"reach": rank != 1})
    assert all(isinstance(x, Unreachable) and "rank 1 (offer): this memory cannot be shared" in str(x) for x in found)


def test_an_exception_in_the_middle_leaves_a_ring_of_use_if_all_posted_alike():
    def stumble(ring):
        try:
            ring.rotate((torch.ones(1000),), (torch.empty(1000),))
            raise KeyError("in the caller, on every rank")
        except KeyError:
            gc.collect()
        everything(ring)

    good(ranks(stumble, 3))


def test_memory_that_is_gone_is_no_longer_mapped_and_a_ring_lets_go_of_everything():
    counts = []

    def use(ring):
        everything(ring)
        counts.append((ring.peers._device, threading.active_count()))

    good(ranks(use, 3))
    gc.collect()
    for device, _ in counts:
        assert device.opened == device.closed > 2  # the last by the ring's end


def test_memory_that_is_received_in_does_not_end_with_its_rings(monkeypatch):
    """PyTorch ends a process in which a pool's end fails."""

    class Pool:
        def __init__(self, use_on_oom):
            self.lent = use_on_oom

    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    pool = weakref.ref(_pool(-1)[0])
    assert _pool(-1)[0] is pool() and pool().lent
    _pool.cache_clear()  # as at the end of the process
    gc.collect()
    assert pool() is not None


def test_a_full_mailbox_is_emptied_by_who_waits_for_a_place_in_another():
    boxes = [Mailbox(10.0) for _ in range(2)]
    for mine, other in ((0, 1), (1, 0)):
        boxes[mine].meet(other, boxes[other].name)

    def flood(mine):
        other = 1 - mine
        for i in range(3000):
            boxes[mine].send(other, f'[{mine}, "offer", {i}]')
        found = []
        while len(found) < 3000:
            if not boxes[mine].late([other], "offer") or boxes[mine].take(10.0):
                found.append(boxes[mine].receive(other, "offer"))
        return found

    found = [None, None]
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, flood(i)), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [[[i] for i in range(3000)]] * 2


# ---------------------------------------------------------------- own keys while the header travels


def journaled(ring, journal):
    """Write down when this rank hears a header and when keys leave."""
    announcing, post = ring.announcing, ring._post

    def told(row):
        posted = announcing(row)
        return Pending(lambda: (posted.wait(), journal.append("header")), posted.value)

    def sent(outgoing, into, *how):
        if any(x.dim() == 4 for message in outgoing.values() for x in message):
            journal.append("keys")
        return post(outgoing, into, *how)

    ring.announcing, ring._post = told, sent


@pytest.mark.parametrize("lateness", [0.0, 0.003])
@pytest.mark.parametrize("method", OTHERS)
def test_own_keys_while_the_header_travels(method, lateness, monkeypatch):
    """From a call's second time on the own block does not wait for it; no key ever leaves before."""
    given, journals, forward = inputs(6), {}, kernels.forward

    def computed(*args):
        journals[threading.get_ident()].append("block")
        return forward(*args)

    monkeypatch.setattr(kernels, "forward", computed)

    def on(ring):
        journals[threading.get_ident()] = journal = []
        shard = partition(6, ring)
        journaled(ring, journal)
        found = []
        for scale in (0.3, 0.5, 0.3, 0.5):
            journal.append("|")
            out = OTHERS[method](*[shard.take(x) for x in given[:3]], scale=scale, shard=shard).out
            found.append(shard.gather(out))
        return found

    for found in good(ranks(on, 2, lateness=lateness)):
        assert all(x.equal(y) for x, y in zip(found[:2], found[2:]))
    assert len(journals) == 2
    for journal in journals.values():
        calls = "".join(word[0] for word in journal).split("|")[1:]
        assert [call[:3] for call in calls] == ["hkb", "hkb", "bhk", "bhk"], journal


@pytest.mark.parametrize("lateness", [0.0, 0.003])
@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("what", ["positions", "gradient"])
def test_what_was_likely_and_is_not(method, what, lateness):
    """A rank that says the same as before, where another does not: it begins anew, and counts nothing twice."""
    given = inputs(6)

    def on(ring):
        every = [torch.arange(6).split([2, 4]), (torch.tensor([1, 0]), torch.arange(2, 6).flip(0))]
        found = []
        for i in range(2):
            own = Shard(every[i * (what == "positions") * ring.rank][ring.rank], ring)
            q, k, v = (own.take(x).requires_grad_(what == "gradient" and i * ring.rank == 1) for x in given[:3])
            before = ring.traffic.received, ring.traffic.messages
            out = OTHERS[method](q, k, v, causal=True, shard=own).out
            moved = ring.traffic.received - before[0], ring.traffic.messages - before[1]
            if what == "gradient" and i:
                assert out.requires_grad  # rank 0's is anchored: its keys' gradients are rank 1's to send
                out.sum().backward()
            found.append((own.gather(out.detach()), moved))
        return found

    for first, second in good(ranks(on, 2, lateness=lateness)):
        assert first[0].allclose(second[0], 0, 1e-12) and first[1] == second[1]


@pytest.mark.parametrize("lateness", [0.0, 0.003])
@pytest.mark.parametrize("method", OTHERS)
def test_what_fails_before_the_header_is_heard(method, lateness):
    """An error of the own block is that error, and one of the header comes first; the ring can be used on."""
    given = inputs(6)

    def on(ring):
        shard, wrong = partition(6, ring), []
        q, k, v = (shard.take(x) for x in given[:3])

        def seen(b, h, q_idx, kv_idx):
            if wrong:
                raise ArithmeticError(wrong[0])
            return q_idx >= kv_idx

        call = partial(OTHERS[method], q, k, v, shard=shard, mask_mod=seen)
        first = call().out
        wrong.append("mine")
        with pytest.raises(ArithmeticError, match="mine"):
            call()
        sent = replace(ring.traffic)
        with pytest.raises(ValueError, match="scale differs between ranks"):
            call(scale=0.5) if ring.rank else call()
        assert ring.traffic == sent, "nothing has left"
        wrong.clear()
        with pytest.raises(ValueError, match="scale differs between ranks"):
            call(scale=0.5) if ring.rank else call()
        assert ring.traffic == sent
        assert call().out.equal(first)

    good(ranks(on, 3, lateness=lateness))


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("what", ["positions", "scale"])
def test_what_begins_anew_keeps_nothing_of_what_it_began(method, what):
    """Nor what has failed: without a garbage collection, as memory on a GPU is to be free at once."""
    given = inputs(6)

    def on(ring):
        shard, other = partition(6, ring), Shard(torch.arange(5, 2, -1), ring)
        for turn in range(2):
            changed = turn * ring.rank
            q, k, v = (shard.take(x) for x in given[:3])
            how = {"shard": other if changed and what == "positions" else shard}
            how |= {"scale": 0.3} if changed and what == "scale" else {}
            with pytest.raises(ValueError, match="scale differs") if turn and what == "scale" else nullcontext():
                OTHERS[method](q, k, v, **how)
        kept = [weakref.ref(x) for x in (q, k, v)]
        del q, k, v
        return [x() is None for x in kept]

    gc.disable()
    try:
        found = good(ranks(on, 2))
    finally:
        gc.enable()
    assert all(map(all, found)), found


@pytest.mark.parametrize("method", OTHERS)
def test_an_interruption_before_the_header_is_heard(method):
    """What the others said of that call is not taken for what they say of the next."""
    given = inputs(8)
    true = ringref.dense_attention(*given[:3], causal=True)

    def on(ring):
        interrupted = []

        def seen(b, h, q_idx, kv_idx):
            if interrupted:
                raise KeyboardInterrupt
            return q_idx >= kv_idx

        def call(layout):
            shard = partition(8, ring, layout)
            out = OTHERS[method](*(shard.take(x) for x in given[:3]), mask_mod=seen, shard=shard).out
            return shard.gather(out)

        call("contiguous")
        for _ in range(2):
            interrupted.append(True)
            sent = replace(ring.traffic)
            with pytest.raises(KeyboardInterrupt):
                call("contiguous")
            assert ring.traffic == sent
            interrupted.clear()
        return [call(layout) for layout in ("zigzag", "striped", "zigzag", "contiguous")]

    for found in good(ranks(on, 2)):
        assert all(x.allclose(true.out, 0, 1e-12) for x in found)


@pytest.mark.parametrize("method", OTHERS)
def test_a_call_that_another_rank_changes_looks_like_any_to_a_mode(method):
    """One that replays what it has seen (selective checkpointing) must not see what begins anew."""
    given = inputs(6)

    def on(ring):
        parts, found = [torch.arange(3), torch.arange(3, 6)], []
        for other in (parts[1], parts[1], parts[1].flip(0), parts[1].flip(0)):
            own = Shard((parts[0], other)[ring.rank], ring)
            with Seen() as mode:
                OTHERS[method](*(own.take(x) for x in given[:3]), shard=own)
            found.append(mode.ops)
        return found

    same, _ = good(ranks(on, 2))
    assert same[0] == same[1] and same[2] == same[3], [len(ops) for ops in same]
