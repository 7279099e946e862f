"""What the three conductors share: one autograd Function, two loops over the same visits.

A *conductor* is a generator of blocks of keys. It posts its messages, yields the next block that is
here, and is sent that block's dK and dV in the backward (None in the forward); when only messages
are left it yields None, and once resumed it returns what came home. It decides in which order keys
travel and nothing else.

A backward, and a forward of many strands, works part by part: a part is a contiguous range of
key/value heads with their query heads, so what is in flight and what accumulates is a part's share.
Running out, lse and gradients are float32 (float64 for float64). K and V travel in their own dtype; so do
one rank's dK and dV, which kernels return in it, and sums over ranks in the accumulating one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..comm.ring import Message, Ring
from ..shard import Attended, Positions, wide
from . import kernels
from .call import Call, agree, exactly
from .plan import Leg, Meeting, Part, _cut, _meetings, _plan
from .route import Load
from .sums import Gradients, Running, Sum


class Block(NamedTuple):
    """Keys and values `b k g d` that are here, and the global positions of their rows."""

    positions: Positions
    k: Tensor
    v: Tensor


class Trip:
    """One strand's keys as a conductor sees them: the ranks that share a segment, and what to send
    and receive.
    """

    def __init__(self, call: Call, leg: Leg, k: Tensor, v: Tensor):
        self._route = leg.route
        self.ring: Ring = call.ring.among(leg.route.members)
        heads = _cut(leg.kv_heads, range(k.shape[2]))
        self._k, self._v = k[:, :, heads], v[:, :, heads]
        self.own = Block(call.table.keys[call.ring.rank], self._k, self._v)

    def load(self, member: int) -> Load:
        """The keys of this member that any other one needs."""
        return self._route.load[self._route.members[member]]

    def wanted(self, by: int, of: int) -> Load:
        """The keys of member `of` that member `by` needs; one of the two is me."""
        return self._route.wanted[self._route.members[by]][self._route.members[of]]

    def pack(self, load: Load) -> Message:
        """My K and V of this load, ready to be sent."""
        return tuple(load.rows.of(x, slice(None))[:, 0].contiguous() for x in (self._k, self._v))

    def space(self, load: Load, summed: bool = False) -> Message:
        """Buffers for the K and V of this load, or its dK and dV, which may be summed already."""
        dtype = wide(self._k.dtype) if summed else self._k.dtype
        shape = (self._k.shape[0], len(load), *self._k.shape[2:])
        return tuple(self._k.new_empty(shape, dtype=dtype) for _ in range(2))

    def block(self, load: Load, message: Message) -> Block:
        """A load that has arrived."""
        return Block(load.positions, *message)


# yields the blocks, is sent their gradients, and returns what came home: loads of mine with their dK and dV
Homecoming = Sequence[tuple[Load, Message]]
Conductor = Callable[[Trip], Generator["Block | None", "Gradients | None", Homecoming]]


class Job(NamedTuple):
    """A call and the conductor that carries it out."""

    call: Call
    conduct: Conductor | None
    forward: tuple[Part, ...]
    backward: tuple[Part, ...]
    group: int  # query heads per key/value head

    def meetings(self, part: Part, leg: Leg, keys: Positions) -> tuple[Meeting, ...]:
        call, where = self.call, (leg.strands, leg.kv_heads, part.heads, part.kv_heads, self.group)
        mine, masked = call.table.queries[call.ring.rank], call.mask_mod is not None
        return _meetings(*where, mine, keys, call.causal, masked, call.q_chunk)


def _seen(call: Call, meeting: Meeting, like: Tensor) -> kernels.Seen:
    """What of a visit's square is seen: a kind that kernels know, or a mask b m h q k
    (broadcastable).
    """
    visit = meeting.visit
    if visit.kind != "mask":
        return kernels.Seen(visit.kind, None)
    q_idx, kv_idx = visit.q_positions.to(like.device), visit.k_positions.to(like.device)
    keep = (kv_idx[:, None, :] <= q_idx[:, :, None])[None, :, None] if call.causal else None
    if call.mask_mod is not None:
        batch = torch.arange(like.shape[0], device=like.device)[:, None, None, None]
        head = torch.tensor(meeting.heads, device=like.device)[None, :, None, None]
        segments = zip(q_idx[:, None, None, :, None], kv_idx[:, None, None, None, :], strict=True)
        kept = torch.stack([call.keep(batch, head, x, y) for x, y in segments], 1)
        keep = kept if keep is None else keep & kept
    return kernels.Seen("mask", keep)


class _Attend(torch.autograd.Function):
    """Forward and backward of every method: two loops over the same visits."""

    @staticmethod
    @exactly
    def forward(ctx, q, k, v, anchor, job: Job):
        whole = len(job.forward) == 1
        out = None if whole else torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = None if whole else q.new_empty(q.shape[:3], dtype=wide(q.dtype))
        for part in job.forward:
            running = Running(q, len(part.heads))
            for leg in part.legs:
                walk = job.conduct(Trip(job.call, leg, k, v))
                block = next(walk)
                while block is not None:
                    for meeting in job.meetings(part, leg, block.positions):
                        rows, keys = meeting.visit[:2]
                        there = (keys.of(x, meeting.used) for x in (block.k, block.v))
                        seen = _seen(job.call, meeting, block.k)
                        piece = kernels.forward(rows.of(q, meeting.whole), *there, seen, job.call)
                        running.merge(rows, meeting.in_part, *piece)
                    block = None  # let go of it, or it lives on beside the next two
                    block = walk.send(None)
                walk.close()
            heads = slice(part.heads.start, part.heads.stop)
            some = running.result(*(None if x is None else x[:, :, heads] for x in (out, lse)))
        out, lse = some if whole else (out, lse)
        lse = lse.transpose(1, 2).contiguous()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    @exactly
    def backward(ctx, dout, dlse):
        (q, k, v, out, lse), job = ctx.saved_tensors, ctx.job
        dout = torch.zeros_like(out) if dout is None else dout
        # exp(score − inf) is the 0 of a query that saw nothing
        lse = lse.masked_fill(lse == -torch.inf, torch.inf).transpose(1, 2)
        dlse = None if dlse is None else dlse.transpose(1, 2)  # b s h
        wholes, travelling = [None, None, None], None
        for part in job.backward:
            sums = [
                Sum(x, x.shape[1], len(heads))
                for x, heads in zip((q, k, v), (part.heads, *[part.kv_heads] * 2), strict=True)
            ]
            for leg in part.legs:
                walk = job.conduct(Trip(job.call, leg, k, v))
                block = own = next(walk)
                while block is not None:
                    theirs = None
                    if block is not own:
                        theirs = Gradients(*(Sum(k, x.shape[1], x.shape[2]) for x in (block.k, block.v)))
                    _differentiate(job, part, leg, block, (dout, dlse, q, out, lse), sums, theirs)
                    if travelling:  # the gradients of the strand before have travelled under this computation
                        _come_home(*travelling)
                        travelling = None
                    block = None
                    block = walk.send(theirs)
                left = walk, part, leg, sums, wholes, (q, k, v)
                if len(leg.route.members) > 1:
                    travelling = left
                else:  # nothing is on its way
                    _come_home(*left)
        if travelling:
            _come_home(*travelling)
        return *wholes, None, None


def _differentiate(
    job: Job, part: Part, leg: Leg, block: Block, saved: tuple, sums: list[Sum], theirs: Gradients | None
) -> None:
    """Add one block's dQ to `sums`, and its dK and dV to `theirs`, or to `sums` where the block is
    my own.

    A function of its own so that what it worked with is let go of before the next block's buffers
    are made.
    """
    for meeting in job.meetings(part, leg, block.positions):
        rows, keys = meeting.visit[:2]
        seen = _seen(job.call, meeting, block.k)
        mine = [None if x is None else rows.of(x, meeting.whole) for x in saved]
        there = (keys.of(x, meeting.used) for x in (block.k, block.v))
        dq, dk, dv = kernels.backward(*mine[:3], *there, *mine[3:], seen, job.call)
        sums[0].add(rows, meeting.in_part, dq)
        for total, x in zip(theirs or sums[1:], (dk, dv), strict=True):
            total.add(keys, meeting.used if theirs else meeting.used_in_part, x)
        del dq, dk, dv, x  # before the next visit's are made


def _come_home(walk: Generator, part: Part, leg: Leg, sums: list[Sum], wholes: list[Tensor | None], inputs) -> None:
    """Add the gradients that other ranks computed for my rows; a part's gradients are complete
    after its last strand.
    """
    try:
        next(walk)
    except StopIteration as end:
        for load, message in end.value:
            for total, x in zip(sums[1:], message, strict=True):
                total.add(load.rows, _cut(leg.kv_heads, part.kv_heads), x[:, None])
    if leg is not part.legs[-1]:
        return
    for i, (heads, x) in enumerate(zip((part.heads, part.kv_heads, part.kv_heads), inputs, strict=True)):
        total, sums[i] = sums[i], None  # let go of one before the next is written
        if len(heads) == x.shape[2]:
            wholes[i] = total.result(None)
            continue
        if wholes[i] is None:
            wholes[i] = torch.empty_like(x, memory_format=torch.contiguous_format)
        total.result(wholes[i][:, :, heads.start : heads.stop])


def attend(conduct: Conductor, method: str, q: Tensor, k: Tensor, v: Tensor, **arguments) -> Attended:
    """Validate, agree with the other ranks, and carry out the call."""
    call = agree(method, q, k, v, able=kernels.check, **arguments)
    return Attended(*_Attend.apply(q, k, v, call.anchor, _job(call, conduct, q, k)))


def _job(call: Call, conduct: Conductor | None, q: Tensor, k: Tensor) -> Job:
    (b, _, h, d), g = q.shape, k.shape[2]
    plan = call.dilation, h, g, b * h * d * q.element_size(), call.table, call.ring.rank, call.causal
    return Job(call, conduct, _plan(*plan, forward=True), _plan(*plan, forward=False), h // g)
