"""Ranks as processes: the exchange over `torch.distributed`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from .ring import Ring, Traffic, _tell


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
        with torch.cuda.stream(self._side) if self._side else nullcontext(), _named(where):
            mine = torch.nn.functional.pad(row, (0, max(lengths) - len(row))).to(device)
            rows = mine.new_empty(self.size, len(mine))
            dist.all_gather(list(rows), mine, group=self.group)
            every = rows.cpu()
        return [every[r, : lengths[r]] for r in range(self.size)]


def world_size() -> int:
    """How many ranks this process is one of; 1 where nobody has initialised a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Say where a transport's error broke in."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{where} broke off: {error}") from error
