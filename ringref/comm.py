"""Messages between ranks, over threads of one process or over `torch.distributed`.

Everything is one primitive, `exchange`: post some sends and some receives, compute, `wait()`.
`rotate`, `gather` and `reduce` are a few lines each on top of it. A message is a tuple of tensors
that leave together (one batch, so NCCL launches one kernel for K and V). Both sides know every
size, so an empty tensor is never sent, and a message to oneself never leaves. Two transports:
`ThreadRing` (made by `simulate`) and `ProcessRing`.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Message = Sequence[Tensor]
log = logging.getLogger(__name__)  # at DEBUG: every hop, so that a survivor's log names its last
watchers: list[Callable[[str], Any]] = []  # told the same, whatever is logged
_HEADER = 32  # integers in a header
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


@dataclass
class Traffic:
    """What a rank has moved, in bytes and messages; headers and positions (metadata) are not
    counted.
    """

    sent: int = 0
    received: int = 0
    messages: int = 0


class Pending:
    """A posted exchange. Neither its sends may be written nor its receives read before `wait()`
    returns.
    """

    def __init__(self, finish: Callable[[], None], value: Any = None):
        self._finish, self.value = finish, value

    def wait(self) -> Any:
        """Block until everything posted has arrived and left; returns what came."""
        if self._finish is not None:
            self._finish()
            self._finish = None
        return self.value


class Ring:
    """Ranks 0 … size−1, each of which sends to the next one round. `traffic` counts what this rank
    has moved.
    """

    rank: int
    size: int
    traffic: Traffic

    def _post(self, outgoing: dict[int, Message], into: dict[int, Message]) -> Callable[[], None]:
        """Post sends to and receives from other ranks; returns the function that waits for all of
        them.
        """
        raise NotImplementedError

    def exchange(self, outgoing: dict[int, Message], into: dict[int, Message]) -> Pending:
        """Send `outgoing[peer]` and receive `into[peer]`, buffers that the peer's tensors match one
        by one.

        `wait()` returns `into`, filled.
        """
        given, outgoing, into = into, _solid(outgoing), _solid(into)
        for there, here in zip(outgoing.pop(self.rank, ()), into.pop(self.rank, ()), strict=True):
            here.copy_(there)
        self.traffic.messages += len(outgoing)
        self.traffic.sent += sum(x.nbytes for message in outgoing.values() for x in message)
        self.traffic.received += sum(x.nbytes for message in into.values() for x in message)
        return Pending(self._post(outgoing, into) if outgoing or into else None, given)

    def share(self, row: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Every rank's 1-D int64 CPU tensor, in rank order; lengths are known. Metadata: not
        counted as traffic.
        """
        rows = [row if r == self.rank else row.new_empty(lengths[r]) for r in range(self.size)]
        others = [r for r in range(self.size) if r != self.rank]
        self._post(_solid(dict.fromkeys(others, (row,))), _solid({r: (rows[r],) for r in others}))()
        return rows

    def announce(self, row: Sequence[int]) -> list[list[int]]:
        """Every rank's row of integers, in rank order: the one fixed-size header of a call.

        One size for all calls, so that ranks that are not in the same one get an error and not a
        short message.
        """
        mine = [len(row), *row, *[0] * (_HEADER - 1 - len(row))]
        rows = [x.tolist() for x in self.share(torch.tensor(mine, dtype=torch.int64), [_HEADER] * self.size)]
        if len({x[0] for x in rows}) > 1:
            raise ValueError(f"the ranks are not in the same call: they announce {[x[0] for x in rows]} integers")
        return [x[1 : 1 + len(row)] for x in rows]

    def _shapes(self, x: Tensor) -> list[tuple[int, ...]]:
        if x.dim() > 8:
            raise ValueError(f"x has {x.dim()} dimensions; at most 8 can be announced")
        if x.dtype not in DTYPES:
            raise TypeError(f"x: only {', '.join(map(str, DTYPES))} can be announced, got {x.dtype}")
        row = [DTYPES.index(x.dtype), x.dim(), *x.shape, *[0] * (8 - x.dim())]
        rows = self.announce(row)
        if len({r[0] for r in rows}) > 1:
            raise ValueError(f"x: dtypes differ between ranks: {[DTYPES[r[0]] for r in rows]}")
        return [tuple(r[2 : 2 + r[1]]) for r in rows]

    def rotate(self, x: Tensor | Message, into: Message | None = None) -> Pending:
        """Post `x` to rank + 1 and a receive from rank − 1; `wait()` returns what came.

        With `into` (buffers that fit what comes) nothing else is said; without it `x` is one tensor
        and its shape is announced first, so uneven shards rotate as well. At size 1 what comes is
        `x` itself.
        """
        if self.size == 1:
            return Pending(None, x)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        if into is not None:
            posted = self.exchange({after: x}, {before: into})
            return Pending(posted.wait, into)
        arriving = x.new_empty(self._shapes(x)[before])
        return Pending(self.exchange({after: (x,)}, {before: (arriving,)}).wait, arriving)

    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """Every rank's `x`, in rank order; shapes may differ, and are announced where they are not
        given.
        """
        shapes = shapes or self._shapes(x)
        every = [x if r == self.rank else x.new_empty(shapes[r]) for r in range(self.size)]
        others = [r for r in range(self.size) if r != self.rank]
        self.exchange(dict.fromkeys(others, (x,)), {r: (every[r],) for r in others}).wait()
        return every

    def reduce(self, parts: Sequence[Message]) -> Message:
        """The sum over ranks of what each holds for me (reduce-scatter): `parts[r]` is this rank's
        share for rank r.

        Neighbour by neighbour, so that one share is in flight at a time; my own part is added to in
        place, and its dtype, which may be wider than that of the shares, is the sum's.
        """
        total = parts[self.rank]
        for step in range(1, self.size):
            to, come = (self.rank + step) % self.size, (self.rank - step) % self.size
            arriving = tuple(torch.empty_like(x, dtype=y.dtype) for x, y in zip(total, parts[to], strict=True))
            self.exchange({to: parts[to]}, {come: arriving}).wait()
            for x, y in zip(total, arriving, strict=True):
                x += y
            del arriving, y  # before the next buffers are made
        return total

    def among(self, members: Sequence[int]) -> Ring:
        """The smaller ring of these ranks, in this order; I must be one of them."""
        if self.rank not in members or sorted(set(members) & set(range(self.size))) != sorted(members):
            raise ValueError(
                f"members must be different ranks of {self.size}, {self.rank} among them, got {list(members)}"
            )
        return self if list(members) == list(range(self.size)) else SubRing(self, members)


class SubRing(Ring):
    """Some ranks of a ring as a ring of their own; traffic is counted by the whole."""

    def __init__(self, whole: Ring, members: Sequence[int]):
        self.whole, self.members = whole, list(members)
        self.rank, self.size, self.traffic = (self.members.index(whole.rank), len(self.members), whole.traffic)

    def _post(self, outgoing, into):
        return self.whole._post(*({self.members[r]: m for r, m in x.items()} for x in (outgoing, into)))


def _solid(messages: dict[int, Message]) -> dict[int, Message]:
    """Drop empty tensors and then empty messages."""
    kept = {r: tuple(x for x in message if x.numel()) for r, message in messages.items()}
    return {r: message for r, message in kept.items() if message}


class ProcessRing(Ring):
    """The ranks of a process group, or of a one-dimensional `DeviceMesh` slice, as a ring.

    A subgroup's own ranks 0 … size−1 are the ring's ranks, whatever their global ranks are. `None`
    is the whole world.
    """

    def __init__(self, group_or_mesh: Any = None):
        if not dist.is_initialized():
            raise RuntimeError("ProcessRing needs torch.distributed.init_process_group() first")
        if hasattr(group_or_mesh, "get_group"):
            if group_or_mesh.ndim != 1:
                raise ValueError(f"group_or_mesh: a ring is one-dimensional, this mesh has {group_or_mesh.ndim}")
            group_or_mesh = group_or_mesh.get_group()
        self.group = group_or_mesh if group_or_mesh is not None else dist.group.WORLD
        if self.group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group_or_mesh: this process is not a member of the group")
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.traffic, self._hop, self._side = Traffic(), 0, None
        self._world_ranks = dist.get_process_group_ranks(self.group)

    def _post(self, outgoing, into):
        self._hop += 1
        hop, peers = self._hop, sorted({*outgoing, *into})
        sends = [(r, x.contiguous()) for r, message in outgoing.items() for x in message]
        ops = [dist.P2POp(dist.isend, x, self._world_ranks[r], self.group) for r, x in sends]
        ops += [dist.P2POp(dist.irecv, x, self._world_ranks[r], self.group) for r, m in into.items() for x in m]
        where = f"rank {self.rank}, hop {hop}: the exchange with ranks {peers}"
        _tell(f"{where} is posted")
        with _named(where):
            works = dist.batch_isend_irecv(ops)

        def finish():
            with _named(where):
                for work in works:
                    work.wait()
            _tell(f"{where} is done")
            sends.clear()  # the buffers had to live until here

        return finish

    def share(self, row, lengths):
        if self.size == 1:
            return [row]
        device = "cpu" if "cpu" in dist.get_backend_config(self.group) else "cuda"
        if device == "cuda" and self._side is None:
            self._side = torch.cuda.Stream()
        # a stream of its own, so that reading a header does not wait for the computation queued
        # before it
        where = f"rank {self.rank}, hop {self._hop}: the header after it"
        with torch.cuda.stream(self._side), _named(where):
            mine = torch.nn.functional.pad(row, (0, max(lengths) - len(row))).to(device)
            rows = mine.new_empty(self.size, len(mine))
            dist.all_gather(list(rows), mine, group=self.group)
            every = rows.cpu()
        return [every[r, : lengths[r]] for r in range(self.size)]


def _tell(what: str) -> None:
    log.debug("%s", what)
    for watch in watchers:
        watch(what)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Say where a transport's error broke in."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{where} broke off: {error}") from error


class Deadlock(RuntimeError):
    """Every live rank waits for a message that nobody sends."""


class Elsewhere(ValueError):
    """Another rank's mistake, which that rank's own error explains."""


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
        if ready() and not self.adversarial:
            return
        self.waiting[rank] = ready, what
        self.pass_on(rank)
        self.wake[rank].acquire()
        del self.waiting[rank]
        if not ready():
            raise Deadlock(what)

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

    def _post(self, outgoing, into):
        world, rank = self._world, self.rank
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
    error of the first that did is raised here.

    `adversarial=True` behaves as badly as a network may: receive buffers hold NaN from post to
    wait, a send's buffer is read as late as is allowed and its wait returns only when it was
    received, and ranks run in random (seeded) order.
    """
    if not isinstance(p, int) or p < 1:
        raise ValueError(f"p must be a positive number of ranks, got {p!r}")
    world, results = _World(p, adversarial), [None] * p
    grad, device = (torch.is_grad_enabled(), torch.cuda.current_device() if torch.cuda.is_initialized() else None)

    def live(rank: int) -> None:
        world.wake[rank].acquire()
        try:
            if device is not None:
                torch.cuda.set_device(device)
            # hops block inside backward, which must therefore run on the rank's own thread
            with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(grad):
                results[rank] = fn(ThreadRing(rank, world))
        except BaseException as error:
            world.errors[rank] = error
        world.live.discard(rank)
        world.pass_on(rank)

    threads = [threading.Thread(target=live, args=(r,), daemon=True, name=f"rank {r}") for r in range(p)]
    for thread in threads:
        thread.start()
    world.wake[0].release()
    world.done.wait()
    if world.errors:
        # a rank that was only left waiting is not the cause
        cause = [e for e in world.errors.values() if not isinstance(e, (Deadlock, Elsewhere))] or list(
            world.errors.values()
        )
        raise cause[0]
    return results
