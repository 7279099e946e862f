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

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .block import share
from .comm import Message, Ring
from .layout import (
    EVERYTHING,
    Attended,
    Call,
    Dilation,
    Load,
    Positions,
    Route,
    Rows,
    Strand,
    Table,
    Visit,
    agree,
    exactly,
    regular,
    route,
    serving,
    strands,
    travels,
    visits,
    wide,
)  # fmt: skip

# --------------------------------------------------------------------------------- what accumulates


class Running:
    """The running merge of blocks, `out` b s h d and `lse` b s h.

    The first block is kept as it came; later ones wait, up to one result's size of them, and are
    merged together, the last as the result is written: so two blocks cost no extra copy, and many
    cost one rescaling for all.
    """

    def __init__(self, like: Tensor, heads: int):
        self.shape, self.like = (*like.shape[:2], heads, like.shape[3]), like
        self.out = self.lse = None
        # the lse that out is normalised by; self.lse counts the waiting blocks too
        self.before = None
        self.waiting: list[tuple[Rows, slice, Tensor, Tensor]] = []

    def merge(self, rows: Rows, heads: slice, out: Tensor, lse: Tensor) -> None:
        if self.out is None and _covers(rows, out, self.shape):
            self.out, self.lse = out.flatten(1, 2), lse.flatten(1, 2)
            return
        self._start()
        rows.change(self.lse, heads, lambda merged: torch.logaddexp(merged, lse, out=merged))
        self.waiting.append((rows, heads, out, lse))
        if sum(x[2].numel() for x in self.waiting) > self.out.numel():
            self._settle()

    def _start(self) -> None:
        if self.out is None:
            self.out = self.like.new_zeros(self.shape)
            self.lse = torch.full(self.shape[:3], -torch.inf, dtype=wide(self.like.dtype), device=self.like.device)
        if self.before is None:
            self.before = self.lse.clone()

    def _settle(self) -> None:
        """Merge all waiting blocks but the last."""
        *some, last = self.waiting
        if some:
            kept = share(self.before, self.lse)[..., None]
            self.out = _scaled(self.out, kept)
            self.before = self.lse.clone()
        for rows, heads, out, lse in some:
            weight = share(lse, rows.of(self.lse, heads))[..., None]
            rows.change(self.out, heads, lambda part, out=out, weight=weight: part.addcmul_(out, weight))
        self.waiting = [last]

    def result(self, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
        """out and lse (b s h), written into these if they are given."""
        if self.out is None:
            self._start()
        if self.waiting:
            self._settle()
        if out is None and (not self.waiting or self.out.dtype == self.like.dtype):
            out = self.out = self.out.to(self.like.dtype)
        out = self.like.new_empty(self.shape) if out is None else out
        if out is not self.out and not (self.waiting and _covers(*self.waiting[0][:3:2], self.shape)):
            out.copy_(self.out)
        for rows, heads, x, its in self.waiting:
            merged = rows.of(self.lse, heads)
            kept, weight = (share(a, merged)[..., None] for a in (rows.of(self.before, heads), its))
            kept = _scaled(rows.of(self.out, heads), kept)
            rows.change(out, heads, lambda part, a=kept, b=x, c=weight: torch.addcmul(a, b, c, out=part))
        return out, self.lse if lse is None else lse.copy_(self.lse)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor in the factor's dtype, in place where that is x's own."""
    return x.mul_(factor) if x.dtype == factor.dtype else x * factor


class Sum:
    """A running sum of blocks of rows, `b s h d`.

    The first block is kept as it came, and the second is added as the result is written: so up to
    two cost no copy. More are added up in the accumulating dtype.
    """

    def __init__(self, like: Tensor, rows: int, heads: int):
        self.shape, self.like, self.dtype = (like.shape[0], rows, heads, like.shape[3]), like, wide(like.dtype)
        self.total = self.last = None

    def add(self, rows: Rows, heads: slice, x: Tensor) -> None:
        if self.total is None and _covers(rows, x, self.shape):
            self.total = x.flatten(1, 2)
        elif self.last is None and (self.total is None or self.total.dtype != self.dtype):
            self.last = rows, heads, x
        else:
            rows.change(self.wide(), heads, lambda part: part.add_(x))

    def wide(self) -> Tensor:
        """The sum, in the accumulating dtype and free to be added to."""
        nothing = self.total is None
        self.total = self.like.new_zeros(self.shape, dtype=self.dtype) if nothing else self.total.to(self.dtype)
        self._add_last(self.total)
        return self.total

    def _add_last(self, into: Tensor) -> None:
        if self.last is not None:
            (rows, heads, x), self.last = self.last, None
            rows.change(into, heads, lambda part: part.add_(x))

    def onto(self, total: Tensor) -> Tensor:
        """The sum added to a whole tensor, in place where that is in the accumulating dtype."""
        total = total.to(self.dtype)
        if self.total is not None:
            total += self.total
        self._add_last(total)
        return total

    def result(self, into: Tensor | None) -> Tensor:
        """The sum in the inputs' dtype, written into this tensor if it is given."""
        if self.total is None:
            self.total = self.like.new_zeros(self.shape)
        into = self.total.to(self.like.dtype) if into is None else into.copy_(self.total)
        self._add_last(into)
        return into


def _covers(rows: Rows, x: Tensor, shape: Sequence[int]) -> bool:
    """Whether a block is the whole: every row and every head of `b s h d`."""
    return rows.all_of(shape[1]) and x.shape[3] == shape[2]


class Gradients(NamedTuple):
    """dK and dV of one block, on their way to the rank that owns it."""

    dk: Sum
    dv: Sum

    def alone(self) -> Message:
        """One rank's share, in the inputs' dtype: float32 would add nothing to what a kernel returned."""
        return self._let_go(tuple(mine.result(None) for mine in self))

    def onto(self, arrived: Message) -> Message:
        """Added to what came from the rank before, in the accumulating dtype."""
        return self._let_go(tuple(mine.onto(total) for mine, total in zip(self, arrived, strict=True)))

    def _let_go(self, message: Message) -> Message:
        for mine in self:  # before the next buffers are made
            mine.total = mine.last = None
        return message


# ----------------------------------------------------------------------------------------- the plan


class Leg(NamedTuple):
    """Strands of a part whose keys travel together (one), or not at all (all such); their key/value
    heads, and between whom.
    """

    strands: tuple[Strand, ...]
    kv_heads: range
    route: Route


class Part(NamedTuple):
    """A contiguous range of key/value heads and the query heads that use them."""

    heads: range
    kv_heads: range
    legs: tuple[Leg, ...]


class Meeting(NamedTuple):
    """A visit of some heads in even steps: which query heads, of the whole and of the part; which
    key/value heads, of what travels and of the part.
    """

    visit: Visit
    heads: range
    whole: slice
    in_part: slice
    used: slice
    used_in_part: slice


def _cut(heads: range, of: range) -> slice:
    """These heads as a slice of those."""
    return slice((heads[0] - of.start) // of.step, (heads[-1] - of.start) // of.step + 1, max(1, heads.step // of.step))


# of q; where up to two ranks share keys, one rank's gradients are in flight and no sums, else both
_PART_BYTES_OF_TWO, _PART_BYTES, _MOST_PARTS = 2**30, 10 * 2**20, 4


def part_count(q_bytes: int, g: int, ranks: int, dilated: bool, forward: bool) -> int:
    """In how many parts a rank with so many bytes of q works: what is in flight stays small, each part fills a GPU,
    and messages of one travel under the next.
    """
    # one strand has nothing to add up on one rank, and in a forward holds less whole than a backward in parts
    if not dilated and (ranks == 1 or forward):
        return 1
    return max(1, min(q_bytes // (_PART_BYTES if ranks > 2 else _PART_BYTES_OF_TWO), g, _MOST_PARTS))


@lru_cache(maxsize=64)
def _plan(
    dilation: Dilation | None, h: int, g: int, row_bytes: int, table: Table, rank: int, causal: bool, forward: bool
) -> tuple[Part, ...]:
    """The parts of a call, alike on every rank."""
    group, longest = h // g, max(map(len, (*table.queries, *table.keys)))
    order = strands(dilation, h)
    ranks = len(table.keys) if any(travels(strand, table) for strand in order) else 1
    count = part_count(longest * row_bytes, g, ranks, dilation is not None, forward)
    # the widest strand first, which may cover all rows; then the narrow ones, for the last is the
    # cheapest to add
    order = order[:1] + sorted(order[1:], key=lambda strand: -strand.r)

    def serves(kv_head: int) -> list[tuple[int, int]]:
        heads = range(kv_head * group, (kv_head + 1) * group)
        return [x[:2] for x in order if any(j in x.heads for j in heads)]

    parts = []
    for some in torch.arange(g).tensor_split(count):
        for _, alike in groupby(some.tolist(), serves):
            kv_heads = range((few := list(alike))[0], few[-1] + 1)
            parts.append(
                _part(order, range(kv_heads.start * group, kv_heads.stop * group), kv_heads, table, rank, causal)
            )
    return tuple(parts)


def _part(order: list[Strand], heads: range, kv_heads: range, table: Table, rank: int, causal: bool) -> Part:
    legs, local, group = [], [], len(heads) // len(kv_heads)
    for strand in order:
        mine = [j for j in strand.heads if j in heads]
        for each in _even(range(mine[0], mine[-1] + 1, strand.heads.step), group) if mine else ():
            one = strand._replace(heads=each)
            if travels(one, table):  # a leg on every rank, so that all post their messages in one order
                legs.append(Leg((one,), serving(each, group), route(one, table, rank, causal)))
            else:
                local.append(one)
    if local:
        stay = Route((rank,), {rank: Load(table.keys[rank], torch.empty(0, dtype=torch.int64))}, {rank: {}})
        legs.insert(0, Leg(tuple(local), kv_heads, stay))
    return Part(heads, kv_heads, tuple(legs))


def _even(heads: range, group: int) -> list[range]:
    """Split heads whose key/value heads are not evenly spaced, so that what travels is a strided
    view.
    """
    used = sorted({j // group for j in heads})
    even = len({b - a for a, b in zip(used, used[1:], strict=False)}) < 2
    return [heads] if even else regular(heads, group)


@lru_cache(maxsize=2048)
def _meetings(
    some: tuple[Strand, ...], kv_heads: range, part_heads: range, part_kv_heads: range, group: int,
    queries: Positions, keys: Positions, causal: bool, masked: bool, q_chunk: int | None,
) -> tuple[Meeting, ...]:  # fmt: skip
    """Everything that some strands of one part do with one block of keys."""

    def meeting(visit: Visit, heads: range) -> Meeting:
        used = serving(heads, group)
        whole = slice(heads.start, heads[-1] + 1, heads.step)
        return Meeting(visit, heads, whole, _cut(heads, part_heads), _cut(used, kv_heads), _cut(used, part_kv_heads))

    met = [(strand, visits(strand, queries, keys, causal, masked, q_chunk)) for strand in some]
    found = []
    while met:
        run = 1
        while group == 1 and run < len(met) and _neighbours(*met[run - 1], *met[run]):
            run += 1
        found += _slanted(met[:run], group)
        met = met[run:]
    return tuple(meeting(visit, heads) for visit, heads in found)


def _neighbours(strand: Strand, met: list[Visit], after: Strand, met_after: list[Visit]) -> bool:
    """Whether the next strand does the same one row and one head further on."""
    shifted = after[:2] == strand[:2] and list(after.heads) == [j + 1 for j in strand.heads]
    return shifted and len(met) == len(met_after) and all(
        x.kind == y.kind != "mask" and y.queries.follows(x.queries) and y.keys.follows(x.keys)
        for x, y in zip(met, met_after, strict=True)
    )  # fmt: skip


def _slanted(offsets: list[tuple[Strand, list[Visit]]], group: int) -> Iterator[tuple[Visit, range]]:
    """Visits of strands of neighbouring offsets: a visit a strand, or, where that is fewer, one a
    head of the first strand.

    Head j has offset j % r, so neighbouring heads start at neighbouring rows: together they are one
    strided view too.
    """
    (first, met), count = offsets[0], len(offsets)
    if count > len(first.heads):
        for visit in met:
            rows, keys = (x.slanted() for x in visit[:2])
            for head in first.heads:
                yield visit._replace(queries=rows, keys=keys), range(head, head + count)
        return
    for strand, met in offsets:
        for visit in met:
            for heads in regular(strand.heads, group):
                yield visit, heads


# ------------------------------------------------------------------------------------ the conductor


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


def _seen(call: Call, meeting: Meeting, like: Tensor) -> backends.Seen:
    """What of a visit's square is seen: a kind that kernels know, or a mask b m h q k
    (broadcastable).
    """
    visit = meeting.visit
    if visit.kind != "mask":
        return backends.Seen(visit.kind, None)
    q_idx, kv_idx = visit.q_positions.to(like.device), visit.k_positions.to(like.device)
    keep = (kv_idx[:, None, :] <= q_idx[:, :, None])[None, :, None] if call.causal else None
    if call.mask_mod is not None:
        batch = torch.arange(like.shape[0], device=like.device)[:, None, None, None]
        head = torch.tensor(meeting.heads, device=like.device)[None, :, None, None]
        segments = zip(q_idx[:, None, None, :, None], kv_idx[:, None, None, None, :], strict=True)
        kept = torch.stack([call.keep(batch, head, x, y) for x, y in segments], 1)
        keep = kept if keep is None else keep & kept
    return backends.Seen("mask", keep)


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
                        piece = backends.forward(rows.of(q, meeting.whole), *there, seen, job.call)
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
        dq, dk, dv = backends.backward(*mine[:3], *there, *mine[3:], seen, job.call)
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
    call = agree(method, q, k, v, able=backends.check, **arguments)
    return Attended(*_Attend.apply(q, k, v, call.anchor, _job(call, conduct, q, k)))


def _job(call: Call, conduct: Conductor | None, q: Tensor, k: Tensor) -> Job:
    (b, _, h, d), g = q.shape, k.shape[2]
    plan = call.dilation, h, g, b * h * d * q.element_size(), call.table, call.ring.rank, call.causal
    return Job(call, conduct, _plan(*plan, forward=True), _plan(*plan, forward=False), h // g)


def paths(q: Tensor, k: Tensor, **arguments) -> tuple[set[tuple[str, bool]], list[str]]:
    """What a call would do: the kinds of its visits and whether any is of one query and one key; and
    how its keys travel and its rows are read, a line per strand or set of strands. Every rank must ask.
    """
    call = agree("explain", q, k, k, able=lambda *_: None, **arguments)
    job, me, kinds, lines = _job(call, None, q, k), call.ring.rank, set(), []
    for part in job.forward:
        for leg in part.legs:
            branches = sorted({(x.w, x.r) for x in leg.strands})
            named = ", ".join("all keys" if w == EVERYTHING else f"w={w} r={r}" for w, r in branches)
            members = leg.route.members
            where = "stay" if len(members) == 1 else f"travel among ranks {list(members)}"
            blocks = [call.table.keys[me], *(leg.route.load[j].positions for j in members if j != me)]
            met = [x.visit for keys in blocks for x in job.meetings(part, leg, keys)]
            read = {"strided views" if x.queries.strided and x.keys.strided else "copied rows" for x in met}
            kinds |= {(x.kind, x.queries.c == x.keys.c == 1) for x in met}
            visited = f"{len(met)} visits ({', '.join(sorted({x.kind for x in met}))}) of {', '.join(sorted(read))}"
            lines.append(f"{named}: keys {where}; {visited if met else 'none are seen here'}")
    return kinds, list(dict.fromkeys(lines))
