"""What the three conductors share: one autograd Function, two loops over the same visits.

A *conductor* is a generator of blocks of keys. It posts its messages, yields the next block that is here, and is sent that
block's dK and dV in the backward (None in the forward); when only messages are left it yields None, and once resumed it
returns what came home. It decides in which order keys travel and nothing else.

The work is done part by part: a part is a contiguous range of key/value heads with their query heads, so what is in flight
and what accumulates is a part's share. Running out, lse and gradients are float32 (float64 for float64); K and V travel in
their own dtype, dK and dV in the accumulating one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .block import weigh
from .comm import Message, Ring
from .layout import Attended, Call, Positions, Rows, Strand, Visit, agree, regular, route, serving, strands, visits, wide


class Block(NamedTuple):
    """Keys and values `b k g d` that are here, and the global positions of their rows."""

    positions: Positions
    k: Tensor
    v: Tensor


class Sum:
    """A running sum of blocks of rows, `b s h d`. A first block that covers everything is kept as it came: no copy."""

    def __init__(self, like: Tensor, rows: int, heads: int):
        self.shape, self.like, self.total = (like.shape[0], rows, heads, like.shape[3]), like, None

    def add(self, rows: Rows, heads: slice, x: Tensor) -> None:
        if self.total is None and rows.all_of(self.shape[1]) and x.shape[3] == self.shape[2]:
            self.total = x.flatten(1, 2)
            return
        with rows.opened(self.wide()[:, :, heads]) as total:
            total += x

    def wide(self) -> Tensor:
        """The sum, in the accumulating dtype and free to be added to."""
        dtype = wide(self.like.dtype)
        if self.total is None:
            self.total = self.like.new_zeros(self.shape, dtype=dtype)
        self.total = self.total.to(dtype)
        return self.total

    def narrow(self) -> Tensor:
        return (self.wide() if self.total is None else self.total).to(self.like.dtype)


class Running:
    """The running merge of blocks, `out` b s h d and `lse` b s h. A first block that covers everything is kept as it came."""

    def __init__(self, like: Tensor, heads: int):
        self.shape, self.like = (*like.shape[:2], heads, like.shape[3]), like
        self.out = self.lse = None

    def merge(self, rows: Rows, heads: slice, out: Tensor, lse: Tensor) -> None:
        if self.out is None and rows.all_of(self.shape[1]) and out.shape[3] == self.shape[2]:
            self.out, self.lse = out.flatten(1, 2), lse.flatten(1, 2)
            return
        self._open()
        with rows.opened(self.lse[:, :, heads]) as running:
            merged, share = weigh(running, lse)
            running.copy_(merged)
        with rows.opened(self.out[:, :, heads]) as running:
            running.lerp_(out.to(running.dtype), share[..., None])

    def _open(self) -> None:
        dtype = wide(self.like.dtype)
        if self.out is None:
            self.out = self.like.new_zeros(self.shape, dtype=dtype)
            self.lse = self.out.new_full(self.shape[:3], -torch.inf)
        self.out = self.out.to(dtype)

    def result(self) -> Attended:
        if self.out is None:
            self._open()
        return Attended(self.out.to(self.like.dtype), self.lse)  # lse b s h


class Gradients(NamedTuple):
    """dK and dV of one block, on their way to the rank that owns it."""

    dk: Sum
    dv: Sum

    def onto(self, arrived: Message | None) -> Message:
        """Added to what came from the rank before, in place; on the first stop they are the beginning of the sum."""
        if arrived is None:
            return self.dk.wide(), self.dv.wide()
        for total, mine in zip(arrived, self, strict=True):
            if mine.total is not None:
                total += mine.total
        return arrived


class Trip:
    """One strand's keys as a conductor sees them: the ranks that share a segment, and what to send and receive."""

    def __init__(self, job: Job, strand: Strand, kv_heads: range, k: Tensor, v: Tensor):
        rank, self._keys = job.call.ring.rank, job.call.table.keys
        self._route = route(strand, job.call.table, rank, job.call.causal)
        self.ring: Ring = job.call.ring.among(self._route.members)
        self._k, self._v = (x[:, :, kv_heads.start : kv_heads.stop : kv_heads.step] for x in (k, v))
        self.own = Block(self._keys[rank], self._k, self._v)

    def load(self, member: int) -> Tensor:
        """The rows of this member that any other one needs."""
        return self._route.load[self._route.members[member]]

    def wanted(self, by: int, of: int) -> Tensor:
        """The rows of member `of` that member `by` needs."""
        return self._route.wanted[self._route.members[by]][self._route.members[of]]

    def pack(self, rows: Tensor) -> Message:
        """My K and V at these rows, ready to be sent."""
        if len(rows) == self._k.shape[1]:
            return self._k.contiguous(), self._v.contiguous()
        rows = rows.to(self._k.device)
        return self._k.index_select(1, rows), self._v.index_select(1, rows)

    def space(self, rows: Tensor, gradients: bool = False) -> Message:
        """Buffers for the K and V, or dK and dV, of that many rows."""
        dtype = wide(self._k.dtype) if gradients else self._k.dtype
        shape = (self._k.shape[0], len(rows), *self._k.shape[2:])
        return tuple(self._k.new_empty(shape, dtype=dtype) for _ in range(2))

    def block(self, member: int, rows: Tensor, message: Message) -> Block:
        keys = self._keys[self._route.members[member]]
        return Block(keys if len(rows) == len(keys) else keys[rows], *message)


# yields the blocks, is sent their gradients; returns the gradients of my own rows that came home
Homecoming = Sequence[tuple[Tensor, Message]]
Conductor = Callable[[Trip], Generator["Block | None", "Gradients | None", Homecoming]]


class Part(NamedTuple):
    """A contiguous range of key/value heads and the query heads that use them."""

    heads: slice
    kv_heads: slice
    strands: list[Strand]


class Job(NamedTuple):
    """A call and the conductor that carries it out."""

    call: Call
    conduct: Conductor
    parts: list[Part]
    group: int  # query heads per key/value head

    def walks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Part, Strand, range, Generator]]:
        """Every strand of every part, its key/value heads, and its walk."""
        for part in self.parts:
            for strand in part.strands:
                kv_heads = serving(strand.heads, self.group)
                yield part, strand, kv_heads, self.conduct(Trip(self, strand, kv_heads, k, v))

    def visits(self, strand: Strand, block: Block, own: int) -> Iterator[tuple[Visit, range, range]]:
        """The visits of a strand to a block, with query heads and the key/value heads they use, each in even steps."""
        call = self.call
        mine = call.table.queries[own]
        for visit in visits(strand, mine, block.positions, call.causal, call.mask_mod is not None, call.q_chunk):
            for heads in regular(strand.heads, self.group):
                yield visit, heads, serving(heads, self.group)


_PART_BYTES, _MOST_PARTS = 8 * 2**20, 4


def _parts(call: Call, q: Tensor, k: Tensor) -> list[Part]:
    """As many parts as keep what is in flight small while a part still fills a GPU; alike on every rank."""
    h, g = q.shape[2], k.shape[2]
    found = [Strand(*x[:3], heads) for x in strands(call.dilation, h) for heads in _even(x.heads, h // g)]
    longest = max(map(len, (*call.table.queries, *call.table.keys)))
    count = q.shape[0] * longest * h * q.shape[3] * q.element_size() // _PART_BYTES
    if call.ring.size == 1 and call.dilation is None:
        count = 1  # nothing travels and nothing accumulates
    parts = []
    for some in torch.arange(g).tensor_split(max(1, min(count, g, _MOST_PARTS))):
        kv, group = slice(int(some[0]), int(some[-1]) + 1), h // g
        heads = slice(kv.start * group, kv.stop * group)
        cut = [x._replace(heads=_within(x.heads, heads)) for x in found]
        parts.append(Part(heads, kv, [x for x in cut if x.heads]))
    return parts


def _even(heads: range, group: int) -> list[range]:
    """Split heads whose key/value heads are not evenly spaced, so that what travels is a strided view."""
    used = torch.tensor(sorted({j // group for j in heads}))
    return [heads] if len(used.diff().unique()) < 2 else regular(heads, group)


def _within(heads: range, part: slice) -> range:
    first = heads.start + max(0, -(-(part.start - heads.start) // heads.step)) * heads.step
    return range(first, min(heads.stop, part.stop), heads.step)


def _relative(heads: range, to: int, step: int = 1) -> slice:
    return slice((heads.start - to) // step, (heads[-1] - to) // step + 1, max(1, heads.step // step))


class _Attend(torch.autograd.Function):
    """Forward and backward of every method: two loops over the same visits."""

    @staticmethod
    def forward(ctx, q, k, v, anchor, job: Job):
        call, results = job.call, [None, None]
        for part, strand, kv_heads, walk in job.walks(k, v):
            if strand is part.strands[0]:
                running = Running(q, part.heads.stop - part.heads.start)
            block = next(walk)
            while block is not None:
                for visit, heads, used in job.visits(strand, block, call.ring.rank):
                    piece = backends.forward(
                        visit.queries.of(q[:, :, heads.start : heads.stop : heads.step]),
                        *(visit.keys.of(x[:, :, _relative(used, kv_heads.start, kv_heads.step)]) for x in block[1:]),
                        _seen(call, visit, heads, q),
                        call,
                    )
                    running.merge(visit.queries, _relative(heads, part.heads.start), *piece)
                block = walk.send(None)
            walk.close()
            if strand is part.strands[-1]:
                _place(results, (q.shape[2], q.shape[2]), (part.heads, part.heads), running.result())
        out, lse = results[0], results[1].transpose(1, 2).contiguous()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        (q, k, v, out, lse), job = ctx.saved_tensors, ctx.job
        call, rank = job.call, job.call.ring.rank
        grads, sizes = [None, None, None], [x.shape[2] for x in (q, k, v)]
        dout = torch.zeros_like(out) if dout is None else dout
        by_row = [None if x is None else x.transpose(1, 2) for x in (dlse, lse)]  # b s h
        come_home: Callable[[], Any] = lambda: None  # noqa: E731
        for part, strand, kv_heads, walk in job.walks(k, v):
            if strand is part.strands[0]:
                dq, dk, dv = (
                    Sum(x, x.shape[1], heads.stop - heads.start)
                    for x, heads in ((q, part.heads), (k, part.kv_heads), (v, part.kv_heads))
                )
            block = own = next(walk)
            while block is not None:
                mine = block is own
                sums = Gradients(dk, dv) if mine else Gradients(*(Sum(k, x.shape[1], x.shape[2]) for x in block[1:]))
                first, step = (part.kv_heads.start, 1) if mine else (kv_heads.start, kv_heads.step)
                for visit, heads, used in job.visits(strand, block, rank):
                    some = slice(heads.start, heads.stop, heads.step)
                    one = backends.backward(
                        *(None if x is None else visit.queries.of(x[:, :, some]) for x in (dout, by_row[0], q)),
                        *(visit.keys.of(x[:, :, _relative(used, kv_heads.start, kv_heads.step)]) for x in block[1:]),
                        *(visit.queries.of(x[:, :, some]) for x in (out, by_row[1])),
                        _seen(call, visit, heads, q),
                        call,
                    )
                    dq.add(visit.queries, _relative(heads, part.heads.start), one[0])
                    for total, x in zip(sums, one[1:], strict=True):
                        total.add(visit.keys, _relative(used, first, step), x)
                # the gradients of the strand before have travelled under this computation
                come_home()
                come_home = lambda: None  # noqa: E731
                block = walk.send(None if mine else sums)
            come_home = partial(_come_home, walk, part, strand, kv_heads, (dq, dk, dv), grads, sizes)
        come_home()
        return *grads, None, None


def _come_home(walk, part: Part, strand: Strand, kv_heads: range, sums: tuple[Sum, Sum, Sum], grads: list, sizes) -> None:
    """Add the gradients that other ranks computed for my rows; after a part's last strand its gradients are complete."""
    try:
        next(walk)
    except StopIteration as end:
        for rows, message in end.value:
            for total, x in zip(sums[1:], message, strict=True):
                total.add(Rows(rows[None]), _relative(kv_heads, part.kv_heads.start), x[:, None])
    if strand is part.strands[-1]:
        _place(grads, sizes, (part.heads, part.kv_heads, part.kv_heads), [total.narrow() for total in sums])


def _place(wholes: list[Tensor | None], sizes: Sequence[int], heads: Sequence[slice], pieces: Sequence[Tensor]) -> None:
    """Put a part's results into the whole, b s h …; a part that has all heads is the whole, as it came."""
    for i, (whole, size, some, piece) in enumerate(zip(wholes, sizes, heads, pieces, strict=True)):
        if piece.shape[2] == size:
            wholes[i] = piece
            continue
        if whole is None:
            wholes[i] = whole = piece.new_empty(*piece.shape[:2], size, *piece.shape[3:])
        whole[:, :, some] = piece


def _seen(call: Call, visit: Visit, heads: range, q: Tensor) -> backends.Seen:
    """What of a visit's square is seen: a kind that kernels know, or a mask b m h q k (broadcastable)."""
    if visit.kind != "mask":
        return backends.Seen(visit.kind, None)
    q_idx, kv_idx = visit.q_positions.to(q.device), visit.k_positions.to(q.device)
    keep = (kv_idx[:, None, :] <= q_idx[:, :, None])[None, :, None] if call.causal else None
    if call.mask_mod is not None:
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        head = torch.tensor(heads, device=q.device)[None, :, None, None]
        segments = zip(q_idx[:, None, None, :, None], kv_idx[:, None, None, None, :], strict=True)
        kept = torch.stack([torch.as_tensor(call.mask_mod(batch, head, x, y), device=q.device) for x, y in segments], 1)
        keep = kept if keep is None else keep & kept
    return backends.Seen("mask", keep)


def attend(conduct: Conductor, method: str, q: Tensor, k: Tensor, v: Tensor, **arguments) -> Attended:
    """Validate, agree with the other ranks, and carry out the call."""
    call = agree(method, q, k, v, **arguments)
    backends.check(q, call)
    job = Job(call, conduct, _parts(call, q, k), q.shape[2] // k.shape[2])
    return Attended(*_Attend.apply(q, k, v, call.anchor, job))
