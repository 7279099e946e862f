"""Ranks as processes: the exchange over `torch.distributed`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist

from .peer import Cuda, Peers, Unreachable, together
from .ring import BrokenOff, Pending, Ring, Traffic, _tell

_made: dict[str, int] = {}  # how many rings each group has had


class ProcessRing(Ring):
    """The ranks of a process group, or of a one-dimensional `DeviceMesh` slice, as a ring.

    A subgroup's own ranks 0 … size−1 are the ring's ranks, whatever their global ranks are. `None`
    is the whole world.

    In a group with NCCL, CUDA tensors travel by copy engines ("peer", peer.py) where all its GPUs can reach each
    other, over NCCL ("nccl") where not; `transport`, or else the environment variable RINGREF_TRANSPORT, asks for one
    of the two. The attribute `transport` says which it is, `unreachable` why not "peer". Making such a ring is
    collective: every member makes it, and several rings of a group in one order.
    """

    def __init__(self, group_or_mesh: Any = None, transport: str | None = None):
        if group_or_mesh is not None and not hasattr(group_or_mesh, "get_group"):
            outside = dist.GroupMember.NON_GROUP_MEMBER  # a number, in some releases
            if not isinstance(group_or_mesh, dist.ProcessGroup) and group_or_mesh is not outside:
                got = type(group_or_mesh).__name__
                raise TypeError(f"group_or_mesh: expected a process group, a DeviceMesh slice or None, got {got}")
        if not dist.is_initialized():
            raise RuntimeError("ProcessRing needs torch.distributed.init_process_group() first")
        if hasattr(group_or_mesh, "get_group"):
            if group_or_mesh.ndim != 1:
                raise ValueError(f"group_or_mesh: a ring is one-dimensional, this mesh has {group_or_mesh.ndim}")
            group_or_mesh = group_or_mesh.get_group()
        self._group = group_or_mesh
        if self.group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group_or_mesh: this process is not a member of the group")
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.traffic, self._hop, self._side = Traffic(), 0, None
        self._world_ranks = dist.get_process_group_ranks(self.group)
        self._peers, self.unreachable = None, None
        self._under_way, self._thread = 0, threading.get_ident()
        self.transport = self._connect(transport)

    @property
    def group(self) -> Any:
        """The process group. The world's is not held here: leaving it must end its threads, or they abort the exit."""
        return dist.group.WORLD if self._group is None else self._group

    def _connect(self, transport):
        """Find out, together with the other ranks, how CUDA tensors travel."""
        wish, backend = transport or os.environ.get("RINGREF_TRANSPORT") or "auto", dist.get_backend(self.group)
        if wish not in ("auto", "peer", "nccl"):
            raise ValueError(f"transport: expected 'auto', 'peer' or 'nccl', got {wish!r}")
        if "nccl" not in dist.get_backend_config(self.group):
            if transport not in (None, "auto"):
                raise ValueError(f"transport: {wish!r} needs a group with NCCL, this one has {backend}")
            return backend
        if self.size == 1:
            return "nccl" if wish == "auto" else wish
        name = f"ringref {self.group.group_name} {self._world_ranks}"
        _made[name] = _made.get(name, 0) + 1
        store = dist.PrefixStore(f"{name} {_made[name]}", self.group.get_group_store())
        wishes = together(self.rank, self.size, store, "transport", lambda: wish)
        if len(set(wishes)) > 1:
            raise ValueError(f"transport: the ranks ask for different ones: {wishes}")
        if wish == "nccl":
            return wish
        timeout = self.group._get_backend(torch.device("cuda")).options._timeout.total_seconds()
        try:
            self._peers = Peers(self.rank, self.size, store, Cuda, timeout)
            return "peer"
        except Unreachable as why:
            if wish == "peer":
                raise
            self.unreachable = str(why)
            return "nccl"

    def _post(self, outgoing, into, number=0, moment=None):
        self._hop += 1
        where = f"rank {self.rank}, hop {self._hop}: the exchange with ranks {sorted({*outgoing, *into})}"
        self._begin(where)
        with self._named(where):
            if self.numbers(outgoing, into):
                wait = self._peers.post(outgoing, into, number, where, moment)
            else:
                wait = self._over_group(outgoing, into)

        def finish():
            with self._named(where):
                wait()
            self._end(where, "is done")

        return finish

    def numbers(self, outgoing, into):
        return self._peers is not None and all(
            x.is_cuda for message in (*outgoing.values(), *into.values()) for x in message
        )

    def moment(self):
        return self._peers and self._peers.moment()

    def space(self, make):
        return make() if self._peers is None else self._peers.space(make)

    def _over_group(self, outgoing, into):
        sends = [(r, x.contiguous()) for r, message in outgoing.items() for x in message]
        for device in {x.device for _, x in sends} if self.transport == "gloo" else ():
            if device.type != "cpu":  # it would take its address for one of the host's, and end the process
                raise ValueError(f"gloo cannot send tensors on {device}; launch(fn, p, 'nccl') makes a group that can")
        ops = [dist.P2POp(dist.isend, x, self._world_ranks[r], self.group) for r, x in sends]
        ops += [dist.P2POp(dist.irecv, x, self._world_ranks[r], self.group) for r, m in into.items() for x in m]
        works = dist.batch_isend_irecv(ops)

        def wait():
            for work in works:
                work.wait()
            sends.clear()  # the buffers had to live until here

        return wait

    def _tell(self, row):
        if self._peers is None:
            return super()._tell(row)
        where = f"rank {self.rank}, hop {self._hop}: the header after it"
        self._begin(where)
        with self._named(where):
            told, every = self._peers.tell(row), []  # over gloo a header takes five times as long

        def hear():
            with self._named(where):
                every.extend(told())
            self._end(where, "is done")

        return Pending(hear, every)

    def share(self, row, lengths):
        if self.size == 1:
            return [row]
        where = f"rank {self.rank}, hop {self._hop}: the header after it"
        self._begin(where)
        device = "cpu" if "cpu" in dist.get_backend_config(self.group) else "cuda"
        if device == "cuda" and self._side is None:
            self._side = torch.cuda.Stream()
        # a stream of its own, so that reading a header does not wait for the computation queued
        # before it
        with torch.cuda.stream(self._side) if self._side else nullcontext(), self._named(where):
            mine = torch.nn.functional.pad(row, (0, max(lengths) - len(row))).to(device)
            rows = mine.new_empty(self.size, len(mine))
            dist.all_gather(list(rows), mine, group=self.group)
            every = rows.cpu()
        self._end(where, "is done")
        return [every[r, : lengths[r]] for r in range(self.size)]

    def _begin(self, where: str) -> None:
        """Tell what is posted, and count what is under way, which is one thread's: the messages of two would be taken
        for each other's. On a GPU autograd goes backward in a thread of its own, and what was broken off before is no
        second user.
        """
        me = threading.get_ident()
        if self._under_way and self._thread != me and self.transport == "gloo":
            raise RuntimeError(
                f"{where}: two threads of rank {self.rank} use its ring at once; give each its own group"
            )
        self._under_way, self._thread = self._under_way + 1, me
        _tell(f"{where} is posted")

    def _end(self, where: str, how: str) -> None:
        """Tell how it has ended, and count it no more."""
        self._under_way -= 1
        _tell(f"{where} {how}")

    @contextmanager
    def _named(self, where: str) -> Iterator[None]:
        """Say where a transport's error broke in, and after a timeout who did not come."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            self._end(where, "broke off")
            late = self._late(where) if "timed out" in str(error).lower() else ""
            told = "".join(f"; {word}" for word in _notes(self._world_ranks))
            raise BrokenOff(f"{where} broke off: {error}{late}{told}") from error
        except BaseException:
            self._under_way -= 1
            raise

    def _report(self, words):
        _leave_note(words)

    def _late(self, where: str) -> str:
        """Of the other ranks, who tells within two seconds that it waited in vain as well, and who does not."""
        heard: dict[int, str] = {}

        def ask():
            store = self.group.get_group_store()
            store.set(f"ringref broke off {self.rank}", where)
            end = time.monotonic() + 2.0
            while time.monotonic() < end and len(heard) < self.size:
                for r in (r for r in range(self.size) if r not in heard):
                    if store.check([f"ringref broke off {r}"]):
                        heard[r] = store.get(f"ringref broke off {r}").decode()
                time.sleep(0.05)

        _at_most(4.0, ask)
        silent = [r for r in range(self.size) if r not in heard and r != self.rank]
        told = "".join(f"; {text} broke off too" for r, text in sorted(heard.items()) if r != self.rank)
        return f"{told}; of ranks {silent} nothing was heard: they did not come" if silent else told


def _at_most(seconds: float, ask: Callable[[], None]) -> None:
    """Let `ask` speak with the store, which may be behind the same cut link, or gone with its rank."""

    def run():
        with suppress(RuntimeError):
            ask()

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(seconds)


def _leave_note(words: str) -> None:
    """Tell, of this process, what the errors of ranks that wait for it in vain are to say."""
    _at_most(1.0, lambda: dist.group.WORLD.get_group_store().set(f"ringref note {dist.get_rank()}", words))


def _notes(ranks: list[int]) -> list[str]:
    """The notes that these global ranks have left."""
    found: list[str] = []

    def ask():
        store = dist.group.WORLD.get_group_store()
        for name in (f"ringref note {r}" for r in ranks):
            if store.check([name]):
                found.append(store.get(name).decode())

    _at_most(1.0, ask)
    return found


def world_size() -> int:
    """How many ranks this process is one of; 1 where nobody has initialised a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def forgot(size: int) -> None:
    """Note that this process, one of `size`, has attended by itself, where others may wait for it."""
    _leave_note(f"rank {dist.get_rank()} of {size} has attended without a shard")
