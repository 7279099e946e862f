"""Where queries meet keys, decided from global positions alone.

A *strand* is a set of heads that keep the same positions and attend within the same segments. Dense attention is one
strand; LongNet (2307.02486, eq. 8–10) is a strand per branch and offset; packed documents are segments with lengths of
their own. A *visit* is a strand on one block of keys, cut so that each piece is full, causal or masked; for a kernel
that takes them, segments of many lengths, and windows, are one ragged visit instead.

`bounds` are the pair (left, right): a query at position i sees the keys at i − left … i + right of its segment, None
is no bound. Causal attention is (None, 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..shard import EVERYTHING, Dilation, Positions, _runs, unseen

Bounds = tuple["int | None", "int | None"]


class Strand(NamedTuple):
    """Heads that keep the positions with `(pos % w) % r == offset` and attend within the segment `pos // w`, where
    positions count from the start of their document: `documents` is cu_seqlens without its last entry.
    """

    w: int
    r: int
    offset: int
    heads: range
    documents: Positions | None = None

    @property
    def pattern(self) -> Strand:
        """The strand without its heads: what is kept, seen and met is known for all of them."""
        return self._replace(heads=range(0)) if self.heads else self

    def follows(self, other: Strand) -> bool:
        """Whether it is the other one row and one head further on."""
        shifted = list(self.heads) == [j + 1 for j in other.heads] and self.offset == other.offset + 1
        return shifted and self[:2] == other[:2]

    def held(self, positions: Positions) -> Held:
        """The rows that this strand keeps."""
        return _held(self.pattern, positions)


class Held:
    """The rows that a strand keeps among some positions, in order of position.

    Known as stretches, of which regular positions have few: `count` rows one `every` further, at positions one `step`
    further, from `row` and `at` on, all in the segment from `start` up to `end`. `segment` and `length`: where each
    segment starts that has rows, which is its name, and how many they are.
    """

    def __init__(self, strand: Strand, positions: Positions):
        parts = _kept if strand.r > 1 else _whole
        self.every, self.step, stretches = parts(strand, positions)
        self.row, self.at, self.count, self.start, self.end = stretches
        self.segment, of = self.start.unique_consecutive(return_inverse=True)
        self.length = torch.zeros_like(self.segment).index_add_(0, of, self.count)

    @cached_property
    def rows(self) -> Tensor:
        return joined(self.row, self.count, self.every)

    @cached_property
    def in_order(self) -> Tensor:
        """The rows, in the order of the tensors."""
        return self.rows if ascending(self.row) else self.rows.sort().values

    @cached_property
    def positions(self) -> Tensor:
        return joined(self.at, self.count, self.step)

    @cached_property
    def even(self) -> bool:
        """Whether positions are evenly spaced from the first to the last."""
        origins = _origins(self.at, self.count, self.step)
        return bool((origins == origins[:1]).all())

    def some(self, first: Tensor, inside: range) -> Rows:
        """Of segments that begin at these places among the rows, those inside."""
        index = _segmented(self.rows, first + min(inside[0], inside[-1]), len(inside))
        return Rows(index if inside.step > 0 else index.flip(1))


_held = lru_cache(maxsize=256)(Held)  # n rows each, written out; what is kept for long is plans, which are small


def _whole(strand: Strand, positions: Positions) -> tuple[int, int, Tensor]:
    """The stretches that a strand has if it keeps every position, 5 m."""
    step, row, at, count = positions.runs
    if step > strand.w:  # each row is alone in its segment
        row, at, count, step = joined(row, count), joined(at, count, step), at.new_ones(int(count.sum())), 1
    found = torch.stack([row, at, count, torch.zeros_like(at), torch.full_like(at, EVERYTHING)])
    if strand.documents is not None:
        edges = torch.nn.functional.pad(strand.documents.index, (0, 1), value=EVERYTHING)
        which = partial(torch.searchsorted, edges, right=True)
        found = _cut_up(found, step, lambda x, start: which(x) - 1, lambda i, start: edges[i])
    if (w := strand.w) < EVERYTHING:
        found = _cut_up(found, step, lambda x, start: (x - start) // w, lambda i, start: start + i * w)
    return 1, step, found


def _cut_up(stretches: Tensor, step: int, number: Callable, begins: Callable) -> Tensor:
    """Stretches, cut where the parts of a document or of the sequence begin: `number(position, start)` says which of
    its parts a position is in, and `begins(number, start)` where that part begins.
    """
    _, at, count, start, _ = stretches
    first = number(at, start)
    times = number(at + (count - 1) * step, start) - first + 1
    of, part = torch.arange(len(at), device="cpu").repeat_interleave(times), joined(first, times)
    row, at, count, start, end = stretches[:, of]
    start, end = begins(part, start), torch.minimum(end, begins(part + 1, start))
    # of a stretch, the rows that are here
    skip = -((at - start) // step).clamp(max=0)
    count = torch.minimum(count, -((at - end) // step)) - skip
    return torch.stack([row + skip, at + skip * step, count, start, end])[:, count > 0]


def _kept(strand: Strand, positions: Positions) -> tuple[int, int, Tensor]:
    """What a dilated strand keeps of them: the rows i of a stretch with at + step·i ≡ start + offset (mod r)."""
    whole, r = strand._replace(r=1, offset=0).held(positions), strand.r
    every = r // (common := math.gcd(whole.step, r))
    ahead, inverse = (strand.offset - (whole.at - whole.start)) % r, pow(whole.step // common, -1, every)
    skip = ahead // common
    # the product of larger ones has no room in an int64
    skip = skip * inverse % every if every < 2**31 else skip.apply_(lambda x: x * inverse % every)
    count = torch.where(ahead % common == 0, -((skip - whole.count) // every), 0)
    found = torch.stack([whole.row + skip, whole.at + skip * whole.step, count, whole.start, whole.end])
    # two rows are never further apart, and an int64 has no room for more
    return every, min(whole.step * every, EVERYTHING), found[:, count > 0]


def _origins(begin: Tensor, count: Tensor, step: int) -> Tensor:
    """Where each of these runs of numbers, a step apart, would have begun before the first number of all: alike where
    the runs go on from each other.
    """
    return begin - step * (count.cumsum(0) - count)


def joined(begin: Tensor, count: Tensor, step: int = 1) -> Tensor:
    """Runs of numbers, a step apart, end to end."""
    origins, total = _origins(begin, count, step), int(count.sum())
    if total and bool((origins == origins[0]).all()):
        origin = int(origins[0])
        return torch.arange(origin, origin + step * (total - 1) + 1, step, device="cpu")
    return origins.repeat_interleave(count, output_size=total) + step * torch.arange(total, device="cpu")


def ascending(x: Tensor) -> bool:
    """Whether each is at least as large as the one before; sorting what is sorted takes ten times as long."""
    return bool((x[1:] >= x[:-1]).all())


def strands(dilation: Dilation | None, h: int, documents: Positions | None = None) -> list[Strand]:
    """The strands of a call: each (head, branch) pair is in exactly one (`heads="grouped"`: each
    head).
    """
    if dilation is None:
        return [Strand(EVERYTHING, 1, 0, range(h), documents)]
    branches = list(zip(dilation.segment_lengths, dilation.dilation_rates, strict=True))
    if dilation.heads == "grouped":
        groups = [range(x[0], x[-1] + 1) if len(x := part.tolist()) else range(0) for part in _runs(h, len(branches))]
        found = [Strand(w, r, i % r, heads) for i, ((w, r), heads) in enumerate(zip(branches, groups, strict=True))]
    else:
        found = [Strand(w, r, i, range(i, h, min(r, h))) for w, r in branches for i in range(min(r, h))]
    return [strand._replace(documents=documents) for strand in found if strand.heads]


def serving(heads: Sequence[int], group: int) -> range:
    """The key/value heads of evenly spaced query heads: j // group, which must be evenly spaced
    too.
    """
    used = sorted({j // group for j in heads})
    return range(used[0], used[-1] + 1, used[1] - used[0] if len(used) > 1 else 1)


def regular(heads: range, group: int) -> list[range]:
    """Query heads in sets whose key/value heads (j // group) are evenly spaced and serve equally
    many heads each.
    """
    used = [j // group for j in heads]
    distinct = sorted(set(used))
    even = used == [x for x in distinct for _ in range(len(used) // len(distinct))]
    if even and len({b - a for a, b in zip(distinct, distinct[1:], strict=False)}) < 2:
        return [heads]
    step = math.lcm(heads.step, group)
    return [range(j, heads.stop, step) for j in heads[: step // heads.step]]


class Rows:
    """m segments of c rows of some heads of a tensor `b s h …`, seen as `b m c h …`: a strided view
    where the indices allow it, else a copy. `slant`: how many rows further each next head starts. `a_range`: rows one
    after the other, the same of all heads.
    """

    def __init__(self, index: Tensor):
        (self.m, self.c), self.slant, some = index.shape, 0, index.numel() > 0
        self.start = int(index[0, 0]) if some else 0
        self.step = int(index[0, 1] - index[0, 0]) if some and self.c > 1 else 1
        self.hop = int(index[1, 0] - index[0, 0]) if some and self.m > 1 else self.c * self.step
        self.strided = self.step > 0 and self.hop > 0 and torch.equal(self._even(), index)
        self.a_range = self.strided and self.step == 1 and self.hop == self.c
        self._uneven = None if self.strided else index.clone()  # plans live long: a view needs no indices
        self._on: dict = {}

    def _even(self) -> Tensor:
        if self.hop == self.c * self.step:
            end = self.start + self.m * self.hop
            return torch.arange(self.start, end, self.step, device="cpu").view(self.m, self.c)
        segments, rows = torch.arange(self.m, device="cpu")[:, None], torch.arange(self.c, device="cpu")
        return self.start + self.hop * segments + self.step * rows

    @property
    def index(self) -> Tensor:
        """The rows of the first head, m c."""
        return self._even() if self._uneven is None else self._uneven

    def slanted(self, by: int) -> Rows:
        """The same, but each next head starts so many rows further on."""
        other = copy(self)
        other.slant, other.a_range = by, self.a_range and not by
        return other

    def follows(self, other: Rows, by: int = 1) -> bool:
        """Whether these are the other's rows, each so much further on, and both are views."""
        mine, its = ((x.step, x.hop, x.m, x.c, x.slant) for x in (self, other))
        return self.strided and other.strided and self.start == other.start + by and mine == its

    def of(self, x: Tensor, heads: slice = slice(None)) -> Tensor:
        if not self.strided:
            return x[:, :, heads].index_select(1, self.flat(x.device)).unflatten(1, (self.m, self.c))
        (b, row, head, *rest), shape = x.stride(), x.shape
        first, stop, every = heads.indices(shape[2])
        return x.as_strided(
            (shape[0], self.m, self.c, len(range(first, stop, every)), *shape[3:]),
            (b, self.hop * row, self.step * row, every * head + self.slant * row, *rest),
            x.storage_offset() + self.start * row + first * head,
        )

    @unseen
    def flat(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self.index.flatten().to(device)
        return self._on[device]

    def change(self, x: Tensor, heads: slice, write: Callable[[Tensor], Any]) -> None:
        """Let `write` write to `of(x, heads)`; what it wrote is in x afterwards."""
        part = self.of(x, heads)
        write(part)
        if not self.strided:
            x[:, :, heads].index_copy_(1, self.flat(x.device), part.flatten(1, 2))


# ------------------------------------------------------------------------------------------- visits


class Ragged:
    """Segments of lengths of their own, end to end. Query i of a segment's c sees, of its k keys, those from
    i + k − c − left to i + k − c + right (None: no bound), which is at least one: FlashAttention's alignment.

    lengths: m 2, of the queries and of the keys.
    """

    def __init__(self, lengths: Tensor, left: int | None, right: int | None):
        self.lengths, self.left, self.right = lengths, left, right
        self.longest = tuple(lengths.max(0).values.tolist())
        self._on: dict = {}

    @unseen
    def ends(self, b: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where queries and keys of b such rows of segments begin and end, each int32, b·m + 1."""
        if (b, device) not in self._on:
            ends = torch.nn.functional.pad(self.lengths.repeat(b, 1).cumsum(0), (0, 0, 1, 0))
            self._on[b, device] = tuple(x.contiguous() for x in ends.to(device, torch.int32).unbind(1))
        return self._on[b, device]

    def keep(self) -> Tensor:
        """Which queries see which keys, written out: a mask of all by all."""
        parts = []
        for c, k in self.lengths.tolist():
            ahead = torch.arange(k, device="cpu") - torch.arange(c, device="cpu")[:, None] - (k - c)
            most = [EVERYTHING if x is None else x for x in (self.left, self.right)]
            parts.append((ahead >= -most[0]) & (ahead <= most[1]))
        return torch.block_diag(*parts)


class Visit(NamedTuple):
    """Queries that meet keys: `m` segments at once, alike in shape and kind.

    kind "full": each query sees each key; "causal": square, query i sees keys 0 … i; "mask": decided by positions;
    "ragged": one row of segments of lengths of their own, for a kernel that takes them.

    heads, used: which query heads of a part, in even steps, and which key/value heads of a block; plan.py says it.
    """

    queries: Rows
    keys: Rows
    kind: str
    at: tuple[Positions, Positions]  # of all rows of queries and keys
    ragged: Ragged | None = None
    heads: range = range(0)
    used: slice = slice(0)

    @property
    def q_positions(self) -> Tensor:
        """m c"""
        return self.at[0].index[self.queries.index]

    @property
    def k_positions(self) -> Tensor:
        """m k"""
        return self.at[1].index[self.keys.index]


_PIECES = 8  # a staircase of more pieces than this is masked rather than cut


def staircase(q_positions: Tensor, k_positions: Tensor) -> list[tuple[slice, slice, str]]:
    """Cut what sorted queries see of sorted keys under a causal mask into full rectangles and
    triangles.

    First the keys that nobody sees are dropped and the queries that see nobody, so a zigzag ring's
    off-diagonal hops are full rectangles. Returns [] when nothing is left.
    """
    blind = int(torch.searchsorted(q_positions, k_positions[:1])) if len(k_positions) else len(q_positions)
    if blind == len(q_positions):
        return []
    least, most = torch.searchsorted(k_positions, q_positions[[blind, -1]], right=True).tolist()
    if least == most:  # known without a look at the rows between
        return [(slice(blind, len(q_positions)), slice(0, most), "full")]
    seen = _up_to(k_positions, q_positions[blind:])
    rise = seen.diff()
    cuts = [0, *((rise[1:] != rise[:-1]).nonzero()[:, 0] + 1).tolist()]
    pieces, a = [], 0
    while a < len(seen) and len(pieces) <= _PIECES:
        # a run of rows that each see as many keys as the last one, or one more
        b, run = a + 1, int(rise[a]) if a < len(rise) else 0
        if run in (0, 1):
            b = min((x for x in cuts if x > a), default=len(rise)) + 1
        rows, first = slice(blind + a, blind + b), int(seen[a])
        if run != 1 or b - a == 1:
            pieces.append((rows, slice(0, first), "full"))
        else:
            if first > 1:
                pieces.append((rows, slice(0, first - 1), "full"))
            pieces.append((rows, slice(first - 1, int(seen[b - 1])), "causal"))
        a = b
    if len(pieces) > _PIECES:
        return [(slice(blind, blind + len(seen)), slice(0, most), "mask")]
    return pieces


def _up_to(k_positions: Tensor, q_positions: Tensor) -> Tensor:
    """How many sorted keys lie up to each sorted query: searched for, unless each query has one more than the query
    before it, which is seen ten times as fast.
    """
    n, first = len(q_positions), int(torch.searchsorted(k_positions, q_positions[:1], right=True))
    here, after = k_positions[max(first - 1, 0) : first + n - 1], k_positions[first : first + n]
    if first and len(here) == n and bool((here <= q_positions).all() & (after > q_positions[: len(after)]).all()):
        return torch.arange(first, first + n, device="cpu")
    return torch.searchsorted(k_positions, q_positions, right=True)


def _cut(q_at: Tensor, k_at: Tensor, bounds: Bounds) -> Iterator[tuple[range, range, str]]:
    """What sorted queries see of sorted keys: the rows of both, and the kind.

    A bound on the left is a bound on the right with queries and keys in reverse: its triangles are causal, too.
    """
    (left, right), q, k = bounds, range(len(q_at)), range(len(k_at))
    if left is None and right is None:
        yield q, k, "full"
    elif left is None:
        yield from ((q[a], k[b], kind) for a, b, kind in staircase(q_at + right, k_at))
    elif right is None:
        q, k = q[::-1], k[::-1]
        for a, b, kind in staircase(left - q_at.flip(0), -k_at.flip(0)):
            yield *((q[a], k[b]) if kind == "causal" else (q[a][::-1], k[b][::-1])), kind
    elif len(q_at) and len(k_at):
        # keys up to about where the first query's end are bounded on the left only, those after them on the right only
        first = torch.searchsorted(k_at, q_at - left)
        end = int(torch.searchsorted(k_at, q_at[:1] + right, right=True))
        rows = int((first <= end).sum())  # of which that holds; the others see nothing before it
        middle = max(int(first[rows - 1]), end - 1) if rows else 0
        for some, these in (((left, None), slice(0, middle)), ((None, right), slice(middle, len(k)))):
            yield from ((a, _on(b, these.start), kind) for a, b, kind in _cut(q_at[:rows], k_at[these], some))
        rest = max(rows, 1)  # the first query may see nothing at all
        yield from ((_on(a, rest), b, kind) for a, b, kind in _cut(q_at[rest:], k_at, bounds))


def _on(rows: range, by: int) -> range:
    """These rows, so many further on."""
    return range(rows.start + by, rows.stop + by, rows.step)


def _hull(pieces: list[tuple[range, range, str]]) -> list[tuple[range, range, str]]:
    """The one rectangle that holds all pieces, in which positions say what is seen."""
    ends = [[i for x in side if x for i in (x[0], x[-1])] for side in list(zip(*pieces, strict=True))[:2]]
    return [(*(range(min(some), max(some) + 1) for some in ends), "mask")] if pieces else []


@lru_cache(maxsize=2048)
def visits(
    strand: Strand, queries: Positions, keys: Positions, bounds: Bounds, masked=False, q_chunk=None, ragged=False
) -> list[Visit]:
    """Where a strand's queries meet a block of keys; masked: what is seen is not decided by positions alone; ragged:
    whether a kernel takes segments of lengths of their own.
    """
    found: list[Visit] = []
    held = q, k = strand.held(queries), strand.held(keys)
    q_at, k_at = q.positions, k.positions
    start, shape = _segments(q, k)
    if ragged:
        start, shape, some = _uneven(start, shape, q_at, k_at, bounds)
        for begin, how in some:
            each = zip(held, begin.unbind(1), how.lengths.unbind(1), strict=True)
            rows, others = (Rows(side.rows[joined(first, count)][None]) for side, first, count in each)
            found.append(Visit(rows, others, "ragged", (queries, keys), how))
    if None not in bounds:
        start, shape = _banded(start, shape, q_at, k_at, bounds, strand.r, q_chunk)
    for c, kc in shape.unique(dim=0).tolist() if len(shape) else ():
        # segments of one shape, then of one pattern of positions: all but a tail are usually alike
        firsts = start[(shape == shape.new_tensor([c, kc])).all(1)]
        while len(firsts):
            alike = _like_the_first(held, firsts, (c, kc))
            pieces = _alike(held, firsts[alike], (c, kc), bounds, masked, q_chunk)
            found += (Visit(rows, others, kind, (queries, keys)) for rows, others, kind in pieces)
            firsts = firsts[~alike]
    return found


def _like_the_first(held: tuple[Held, Held], firsts: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which segments have the first one's positions, counted from a segment's first query."""
    if len(firsts) == 1:
        return torch.ones(1, dtype=torch.bool, device="cpu")
    # of positions that are evenly spaced throughout, the first says all
    each = zip(held, firsts.unbind(1), shape, strict=True)
    at = [_segmented(x.positions, first, 1 if x.even else count) for x, first, count in each]
    pattern = torch.cat([x - at[0][:, :1] for x in at], 1)
    return (pattern == pattern[0]).all(1)


def _segmented(x: Tensor, first: Tensor, count: int) -> Tensor:
    """Segments of as many entries each, m count: a view where they begin at even distances."""
    if len(first) == 1:
        return x[(begin := int(first)) : begin + count][None]
    hop = first.diff()
    if bool((hop == hop[:1]).all()):
        return x.as_strided((len(first), count), (int(hop[0]), 1), int(first[0]))
    return x[first[:, None] + torch.arange(count, device="cpu")]


def _segments(q: Held, k: Held) -> tuple[Tensor, Tensor]:
    """Of each segment that has queries and keys: where both start among the rows, and how many there are."""
    shared = [(x, torch.isin(x.segment, other.segment)) for x, other in ((q, k), (k, q))]
    start = torch.stack([(x.length.cumsum(0) - x.length)[some] for x, some in shared], 1)
    return start, torch.stack([x.length[some] for x, some in shared], 1)


_SHAPES = 4  # so many shapes of segments are a launch each, of the fastest kernel; more of them are ragged


def _uneven(
    start: Tensor, shape: Tensor, q_at: Tensor, k_at: Tensor, bounds: Bounds
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Ragged]]]:
    """Segments of evenly spaced rows that see alike, where they have many shapes or two bounds; and those that are
    left.
    """
    (left, right), end = (EVERYTHING if x is None else x for x in bounds), start + shape
    (q, k), (q_end, k_end), ats = start.unbind(1), end.unbind(1), (q_at, k_at)
    # the keys that some query sees, then the queries that see some key
    k = torch.maximum(k, torch.searchsorted(k_at, q_at[q] - left))
    k_end = torch.minimum(k_end, torch.searchsorted(k_at, q_at[q_end - 1] + right, right=True))
    some = k < k_end
    q, q_end, k, k_end, start, shape = (x[some] for x in (q, q_end, k, k_end, start, shape))
    q = torch.maximum(q, torch.searchsorted(q_at, k_at[k] - right))
    q_end = torch.minimum(q_end, torch.searchsorted(q_at, k_at[k_end - 1] + left, right=True))
    begin, count = torch.stack([q, k], 1), torch.stack([q_end - q, k_end - k], 1)
    steps, even = zip(*(_spacing(*x) for x in zip(ats, begin.unbind(1), count.unbind(1), strict=True)), strict=True)
    step = torch.maximum(*steps).clamp(min=1)
    even = even[0] & even[1] & ((steps[0] == steps[1]) | (count == 1).any(1)) & (count > 0).all(1)
    ahead, longer = k_at[k] - q_at[q.clamp(max=len(q_at) - 1)], count[:, 1] - count[:, 0]
    # how far query i sees from key i + longer, in steps
    sees = torch.stack([(left + ahead) // step + longer, (right - ahead) // step - longer], 1)
    for i, bound in enumerate(bounds):
        sees[:, i] = EVERYTHING if bound is None else sees[:, i]
    even &= (sees >= 0).all(1)
    found, rest = [], torch.ones_like(even)
    for pair in sees[even].unique(dim=0):
        mine = even & (sees == pair).all(1)
        lengths = count[mine]
        # the left bounds nothing if the last query sees the first key, the right if the first sees the last
        free = [int(x) >= int(lengths[:, 1 - i].max()) - 1 for i, x in enumerate(pair)]
        if not any(free) or len(lengths.unique(dim=0)) > _SHAPES:
            sides = (None if no else int(x) for no, x in zip(free, pair, strict=True))
            found.append((begin[mine], Ragged(lengths, *sides)))
            rest &= ~mine
    return start[rest], shape[rest], found


def _spacing(at: Tensor, begin: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """How far apart rows lie of these runs of rows, 0 for a single one; and whether it is the same all along."""
    apart = torch.nn.functional.pad(at.diff(), (0, 1))
    changes = torch.nn.functional.pad((apart[1:] != apart[:-1]).cumsum(0), (1, 0))
    last = (begin + count - 2).clamp(min=0)
    some = begin.clamp(max=len(at) - 1)
    return torch.where(count > 1, apart[some], 0), (count < 3) | (changes[last] == changes[some])


_BAND = 64  # query rows that a piece of a window has at least, so that a narrow one is no thousand tiny pieces


def _banded(
    start: Tensor, shape: Tensor, q_at: Tensor, k_at: Tensor, bounds: Bounds, r: int, q_chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Cut segments under a window: left + right query rows at a time and the keys that any of them sees, which are
    two triangles; so work grows with what is seen.
    """
    left, right = bounds
    rows = min(max(_BAND, (left + right) // r), q_chunk or EVERYTHING)
    times = -(-shape[:, 0] // rows)
    of = torch.arange(len(times), device="cpu").repeat_interleave(times)
    ahead = (torch.arange(len(of), device="cpu") - (times.cumsum(0) - times)[of]) * rows
    begin, end = start[of].clone(), (start + shape)[of]
    begin[:, 0] += ahead
    end[:, 0] = torch.minimum(end[:, 0], begin[:, 0] + rows)
    begin[:, 1] = torch.maximum(begin[:, 1], torch.searchsorted(k_at, q_at[begin[:, 0]] - left))
    end[:, 1] = torch.minimum(end[:, 1], torch.searchsorted(k_at, q_at[end[:, 0] - 1] + right, right=True))
    seen = (begin < end).all(1)
    return begin[seen], (end - begin)[seen]


def _alike(
    held: tuple[Held, Held], firsts: Tensor, shape: tuple[int, int], bounds: Bounds, masked: bool, q_chunk: int | None
) -> Iterator[tuple[Rows, Rows, str]]:
    """Segments that are alike, `q_chunk` query rows at a time, whole segments if they fit, else
    parts: which queries meet which keys, and the kind.
    """
    (q, k), (c, kc), (first, k_first) = held, shape, firsts[0].tolist()
    rows = min(c, q_chunk or c)
    some, cuts = max(1, (q_chunk or len(firsts) * c) // c), []
    for j in range(0, c, rows):
        pieces = list(_cut(q.positions[first:][j : min(j + rows, c)], k.positions[k_first : k_first + kc], bounds))
        cuts += ((_on(a, j), b, kind) for a, b, kind in (_hull(pieces) if masked or len(pieces) > _PIECES else pieces))
    for m in firsts.split(some):
        yield from ((q.some(m[:, 0], a), k.some(m[:, 1], b), kind) for a, b, kind in cuts)
