"""Ranks as threads of one process: the exchange between them, deterministic and, on demand, adversarial."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .ring import Elsewhere, Message, MixedUp, Ring, Traffic

MOST = 4096  # ranks: each is a thread


class Deadlock(RuntimeError):
    """Every live rank waits for a message that nobody sends."""


class _Stopped(BaseException):
    """Ends a rank whose simulation was interrupted; no `except Exception` of fn's keeps it."""


class _Parcel:
    def __init__(self, tensors: Message):
        self.tensors, self.buffers, self.delivered = tensors, None, False


class _World:
    """Rank threads of which exactly one runs at a time; a rank gives way only where it waits.

    So a simulation is deterministic, and a deadlock is known without a clock: all wait and nobody
    can be served.
    """

    def __init__(self, size: int, adversarial: bool):
        self.size, self.adversarial, self.dice = size, adversarial, random.Random(size)
        self.wake = [threading.Semaphore(0) for _ in range(size)]
        self.waiting: dict[int, tuple[Callable[[], bool], str]] = {}
        self.parcels: dict[tuple[int, int, int], _Parcel] = {}
        self.live, self.errors, self.done = set(range(size)), {}, threading.Event()
        self.ranks: dict[int, int] = {}  # of the threads that are running
        self.stopped, self.reported = False, ""

    def check(self, rank: int) -> None:
        """Raise unless it is this rank that speaks: nobody would ever wake another thread."""
        by = self.ranks.get(threading.get_ident())
        if by == rank:
            return
        if self.done.is_set():
            raise RuntimeError(
                f"the ring of rank {rank}: this simulation has ended, nobody is there to answer; "
                "call backward, and all that sends messages, inside fn"
            )
        who = "a thread that is no rank" if by is None else f"rank {by}"
        raise RuntimeError(
            f"the ring of rank {rank} is used by {who}: ranks must not share a ring, nor a shard that holds one"
        )

    def stop(self, threads: list[threading.Thread]) -> None:
        """End every rank that still runs: at its next line of Python, or where it waits."""
        self.stopped = True
        for thread in threads:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stopped))
        for wake in self.wake:
            wake.release()
        end = time.monotonic() + 10.0  # a rank in a long kernel ends after it
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def pass_on(self, rank: int) -> None:
        """Let another rank run: the next one round that can, or any that can when the network is
        adversarial.
        """
        turn = [(rank + i) % self.size for i in range(1, self.size + 1)]
        can = [r for r in turn if r in self.live and (r not in self.waiting or self.waiting[r][0]())]
        if can:
            self.wake[self.dice.choice(can) if self.adversarial else can[0]].release()
        elif self.live:  # whoever wakes finds its own condition unmet and raises
            self.wake[min(self.live)].release()
        else:
            self.done.set()

    def wait(self, rank: int, ready: Callable[[], bool], what: str) -> None:
        self.check(rank)
        if ready() and not self.adversarial:
            return
        self.waiting[rank] = ready, what
        self.pass_on(rank)
        self.wake[rank].acquire()
        if self.stopped:
            raise _Stopped
        del self.waiting[rank]
        if not ready():
            raise MixedUp(f"{what}; {self.reported}") if self.reported else Deadlock(what)

    def parcel(self, edge: tuple[int, int, int]) -> _Parcel:
        return self.parcels.setdefault(edge, _Parcel(None))

    def deliver(self, edge: tuple[int, int, int]) -> None:
        """Copy from the sender's buffer into the receiver's: at the first of the two waits, as late
        as is allowed.
        """
        parcel = self.parcels[edge]
        if parcel.delivered:
            return
        source, to, hop = edge
        sent, asked = ([(tuple(x.shape), x.dtype) for x in side] for side in (parcel.tensors, parcel.buffers))
        if sent != asked:
            raise ValueError(f"rank {to}, message {hop} of rank {source}: {asked} was expected and {sent} was sent")
        # whichever rank waits first copies, which is nothing that this rank's dispatch modes may see
        with _disable_current_modes():
            for x, y in zip(parcel.buffers, parcel.tensors, strict=True):
                x.copy_(y)
        parcel.delivered, parcel.tensors, parcel.buffers = True, None, None


class ThreadRing(Ring):
    """One rank of a simulation (see `simulate`)."""

    def __init__(self, rank: int, world: _World):
        self.rank, self.size, self.traffic, self._world = rank, world.size, Traffic(), world
        self._hop, self._counts = 0, {}

    def _edge(self, source: int, to: int) -> tuple[int, int, int]:
        self._counts[source, to] = self._counts.get((source, to), -1) + 1
        return source, to, self._counts[source, to]

    def _report(self, words):
        self._world.reported = self._world.reported or words

    def _post(self, outgoing, into):
        world, rank = self._world, self.rank
        world.check(rank)
        self._hop += 1
        hop, sends, receives = self._hop, {}, {}
        for peer, message in outgoing.items():
            sends[self._edge(rank, peer)] = peer
            world.parcel((rank, peer, self._counts[rank, peer])).tensors = message
        for peer, message in into.items():
            receives[self._edge(peer, rank)] = peer
            world.parcel((peer, rank, self._counts[peer, rank])).buffers = message
            if world.adversarial:  # whoever reads before the wait reads this
                for x in message:
                    x.fill_(float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else -99)

        def met(edge):
            parcel = world.parcels[edge]
            return parcel.delivered or (parcel.tensors is not None and parcel.buffers is not None)

        def finish():
            for edge, peer in receives.items():
                what = f"rank {rank}, hop {hop}: waits for a message from rank {peer}"
                what += " that nobody sends"
                world.wait(rank, lambda edge=edge: met(edge), what)
                world.deliver(edge)
                del world.parcels[edge]
            for edge, peer in sends.items():
                if edge in world.parcels:
                    what = f"rank {rank}, hop {hop}: sends to rank {peer}, which never receives it"
                    world.wait(rank, lambda edge=edge: edge not in world.parcels or met(edge), what)
                if edge in world.parcels:
                    world.deliver(edge)

        return finish


def simulate(fn: Callable[[Ring], Any], p: int, adversarial: bool = False) -> list:
    """Call `fn(ring)` on `p` ranks that are threads of this process; returns their results in rank
    order.

    One rank runs at a time, in rank order, until it waits: output is reproducible and a deadlock
    raises at once, naming rank, hop and peer. Works for CPU and single-GPU tensors. Call `backward`
    inside `fn`. The caller's grad mode and CUDA device hold in every rank. If ranks raise, the
    error of the first that did is raised here. Ctrl-C ends every rank before it is raised.

    `adversarial=True` behaves as badly as a network may: receive buffers hold NaN from post to
    wait, a send's buffer is read as late as is allowed and its wait returns only when it was
    received, and ranks run in random (seeded) order.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of one argument, the ring, got {type(fn).__name__}")
    if not isinstance(p, int) or isinstance(p, bool) or not 1 <= p <= MOST:
        raise ValueError(f"p must be a positive number of ranks, at most {MOST}, got {p!r}")
    if not isinstance(adversarial, bool):
        raise TypeError(f"adversarial must be True or False, got {adversarial!r}")
    world, results = _World(p, adversarial), [None] * p
    grad, device = (torch.is_grad_enabled(), torch.cuda.current_device() if torch.cuda.is_initialized() else None)

    def live(rank: int) -> None:
        world.wake[rank].acquire()
        if world.stopped:
            return
        world.ranks[threading.get_ident()] = rank
        try:
            if device is not None:
                torch.cuda.set_device(device)
            # hops block inside backward, which must therefore run on the rank's own thread
            with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(grad):
                results[rank] = fn(ThreadRing(rank, world))
        except BaseException as error:
            world.errors[rank] = error
        del world.ranks[threading.get_ident()]
        world.live.discard(rank)
        world.pass_on(rank)

    def rank_thread(rank: int) -> None:
        try:
            live(rank)
        except _Stopped:
            pass

    threads = [threading.Thread(target=rank_thread, args=(r,), daemon=True, name=f"rank {r}") for r in range(p)]
    for thread in threads:
        thread.start()
    world.wake[0].release()
    try:
        while not world.done.wait(0.2):  # not for ever: an outer simulation's end must get in
            pass
    except BaseException:  # Ctrl-C
        world.stop(threads)
        raise
    if world.errors:
        # a rank that was only left waiting is not the cause
        cause = [e for e in world.errors.values() if not isinstance(e, (Deadlock, Elsewhere))] or list(
            world.errors.values()
        )
        raise cause[0]
    return results
