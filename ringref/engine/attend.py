"""One loop for all methods: forward and backward meet the same blocks of keys, in the order in which a conductor
brings them.

A *conductor* is a generator. It posts its messages, yields the blocks that are here, and is sent their dK and dV in
the backward (None in the forward); when only messages are left it yields None, and once resumed it returns what came
home. It decides in which order keys travel and nothing else.

Running out, lse and gradients are float32 (float64 for float64). K and V travel in their own dtype; so do one rank's
dK and dV, which kernels return in it, and sums over ranks in the accumulating one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from ..comm.ring import Message
from ..shard import Agreed, Attended, Otherwise, once, unseen
from . import kernels
from .call import Call, agreeing, exactly, recomputed
from .plan import Part, parts, visits_of
from .route import Block, Load, Trip, heads_of
from .sums import Gradients, Running, Sum
from .visits import Visit

# yields blocks, is sent their gradients, and returns what came home: a load of mine with its dK and dV
Conductor = Callable[[Trip], Generator["Sequence[Block] | None", "Gradients | None", "Sequence[tuple[Load, Message]]"]]


def attend(conduct: Conductor, method: str, q: Tensor, k: Tensor, v: Tensor, **arguments) -> Attended:
    """Validate, agree with the other ranks, and carry out the call: where it is one that they have agreed on before,
    its own block while the header travels.
    """
    header, made = agreeing(method, q, k, v, able=kernels.check, **arguments)

    def run(agreed: Agreed) -> Attended:
        call = made(agreed)
        results = _Attend.apply(q, k, v, call.anchor, call, conduct)
        header.number()  # of a call that needed no other rank as well
        return Attended(*results)

    if header.likely is None or torch._C._len_torch_dispatch_stack():  # what begins anew would show to a mode
        return run(header.agreed())
    try:
        return run(header.likely)
    except Otherwise:
        pass
    except Exception:
        if header.heard:
            raise
    return run(header.agreed())


class _Attend(torch.autograd.Function):
    """Forward and backward of every method: two loops over the same visits, part by part."""

    @staticmethod
    @recomputed
    @exactly
    def forward(ctx, q, k, v, anchor, call: Call, conduct: Conductor):
        ctx.call, ctx.conduct = call, conduct
        out, lse = _results(call, conduct, q, k, v)
        # `out += x` is the caller's right, which autograd would refuse in the backward if it knew what is kept here
        ctx.save_for_backward(q, k, v, out.data, lse.data)
        ctx.marks = [] if out.is_inference() else [_mark(out), _mark(lse)]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once
    @exactly
    def backward(ctx, dout, dlse):
        (q, k, v, out, lse), call = ctx.saved_tensors, ctx.call.during(backward=True)
        if any(mark._version != version for mark, version in ctx.marks):
            out = lse = None
            out, lse = _results(ctx.call, ctx.conduct, q, k, v)
        dout = torch.zeros_like(out) if dout is None else dout
        # exp(score − inf) is the 0 of a query that saw nothing
        lse = lse.nan_to_num(torch.nan, torch.inf, torch.inf).transpose(1, 2)
        dlse = None if dlse is None else dlse.transpose(1, 2)  # b s h
        found = []
        for part in plan(call, q, k, forward=False):
            some = _cut(part.heads, q, dout, dlse, out, lse), _cut(part.kv_heads, k, v)
            found.append(_backward(call, ctx.conduct, part, *some))
        return *(_joined([some.pop(0) for some in found]) for _ in range(3)), None, None, None


def _results(call: Call, conduct: Conductor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out b s h d and lse b h s of the whole call."""
    call, found = call.during(backward=False), []
    for part in plan(call, q, k, forward=True):
        found.append(_forward(call, conduct, part, *_cut(part.heads, q), *_cut(part.kv_heads, k, v)))
    out, lse = (_joined([some.pop(0) for some in found]) for _ in range(2))
    return _owned(out), _owned(lse.transpose(1, 2).contiguous())


@unseen
def plan(call: Call, q: Tensor, k: Tensor, forward: bool) -> tuple[Part, ...]:
    """The parts of a call."""
    (b, _, h, d), g, (*bounds, documents) = q.shape, k.shape[2], call.sight
    row_bytes, table, rank = b * h * d * q.element_size(), call.table, call.ring.rank
    return parts(call.dilation, documents, tuple(bounds), call.exact, h, g, row_bytes, table, rank, forward)


def meet(call: Call, part: Part, block: Block, q: Tensor, **backward) -> tuple[Visit, ...]:
    """Everything that a part's queries do with one block of keys."""
    uneven = call.exact and not call.masked and call.q_chunk is None
    return _meet(call, part, block, uneven and kernels.ragged(q, block.v, call, **backward))


@unseen
def _meet(call: Call, part: Part, block: Block, ragged: bool) -> tuple[Visit, ...]:
    mine, group, bounds = call.table.queries[call.ring.rank], len(part.heads) // len(part.kv_heads), call.sight[:2]
    told = bounds, call.masked, call.q_chunk, ragged
    return visits_of(block.strands, block.kv_heads, group, mine, block.positions, *told)


def _forward(call: Call, conduct: Conductor, part: Part, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """out and lse b s h of one part."""
    running = Running(q.shape[:3] + v.shape[3:], q)
    for route in part.routes:
        walk = conduct(Trip(call.ring, route, k, v))
        blocks = next(walk)
        while blocks is not None:
            for block in blocks:
                for visit in meet(call, part, block, q):
                    rows, heads = visit.queries, heads_of(visit.heads)
                    there = (visit.keys.of(x, visit.used) for x in (block.k, block.v))
                    piece = kernels.forward(rows.of(q, heads), *there, _seen(call, part, visit, q), call)
                    running.merge(rows, heads, *piece)
                    call.ring.release()  # something is under way, and what follows needs other ranks
            block = blocks = None  # let go of them, or they live on beside the next two
            blocks = walk.send(None)
        walk = walk.close()  # and gone: Python 3.12 keeps what a closed generator held
    return list(running.result())


def _backward(call: Call, conduct: Conductor, part: Part, mine: list, theirs: list) -> list[Tensor]:
    """dq, dk and dv of one part, from its q, dout, dlse, out and lse, and its k and v."""
    (q, *_), (k, v) = mine, theirs
    sums = [Sum(x.shape, x) for x in (q, k, v)]
    for route in part.routes:
        trip = Trip(call.ring, route, k, v, backward=True)
        walk = conduct(trip)
        blocks = next(walk)
        while blocks is not None:
            grads = None if blocks is trip.own else Gradients(blocks, k)
            for block, there in zip(blocks, grads.sums if grads else [sums[1:]], strict=True):
                _differentiate(call, part, block, mine, sums[0], there)
            block = blocks = there = None
            blocks = walk.send(grads)
        try:
            next(walk)
        except StopIteration as end:
            for load, message in end.value:
                for rows, heads, *both in trip.home(load, message):
                    for total, x in zip(sums[1:], both, strict=True):
                        total.add(rows, heads, x)
    return [sums.pop(0).result() for _ in range(3)]


def _differentiate(call: Call, part: Part, block: Block, saved: list, dq_sum: Sum, dkv_sums: list[Sum]) -> None:
    """Add one block's dQ, dK and dV to their sums.

    A function of its own so that what it worked with is let go of before the next block's buffers
    are made.
    """
    for visit in meet(call, part, block, saved[0], backward=True, lse_gradient=saved[2] is not None):
        rows, keys, heads = visit.queries, visit.keys, heads_of(visit.heads)
        q, dout, dlse, out, lse = (None if x is None else rows.of(x, heads) for x in saved)
        k, v = (keys.of(x, visit.used) for x in (block.k, block.v))
        seen = _seen(call, part, visit, k)
        dq, dk, dv = kernels.backward(dout, dlse, q, k, v, out, lse, seen, call)
        dq_sum.add(rows, heads, dq)
        for total, x in zip(dkv_sums, (dk, dv), strict=True):
            total.add(keys, visit.used, x)
        del dq, dk, dv, x  # before the next visit's are made


def _seen(call: Call, part: Part, visit: Visit, like: Tensor) -> kernels.Seen:
    """What of a visit's square is seen: a kind that kernels know, or a mask b m h q k
    (broadcastable).
    """
    if visit.kind != "mask":
        return kernels.Seen(visit.kind, ragged=visit.ragged)
    heads = part.heads[visit.heads.start : visit.heads.stop : visit.heads.step]
    at = (x.to(like.device) for x in (visit.q_positions, visit.k_positions))
    return kernels.Seen("mask", *call.rules(like.shape[0], heads, *at))


def _cut(heads: range, *tensors: Tensor | None) -> list[Tensor | None]:
    """These heads of tensors `b s h …`."""
    return [x if x is None or len(heads) == x.shape[2] else x[:, :, heads_of(heads)] for x in tensors]


def _joined(some: list[Tensor]) -> Tensor:
    """The parts' heads in one tensor."""
    return some[0] if len(some) == 1 else torch.cat(some, 2)


def _owned(x: Tensor) -> Tensor:
    """The same memory, but no view of another tensor, so that the caller may write to it."""
    return x.new_empty(0).set_(x) if x._is_view() else x


def _mark(x: Tensor) -> tuple[Tensor, int]:
    """A tensor without data that counts x's versions, and the count now: it tells whether x has been changed in place
    and holds nothing of it. What then happens costs time and no memory: the backward runs the forward again.
    """
    mark = x.detach()
    mark.data = x.new_empty(0)
    return mark, mark._version
