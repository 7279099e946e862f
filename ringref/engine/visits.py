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
from collections.abc import Callable, Iterator
from copy import copy
from functools import lru_cache
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

    def rows(self, positions: Positions) -> Tensor:
        """Which rows this strand keeps, in order of position."""
        return _kept(self._replace(heads=range(0)), positions)

    def _inside(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Where the document of each position starts, and where its segment does within the document."""
        starts = torch.zeros((), dtype=torch.int64, device="cpu")
        if self.documents is not None:
            starts = self.documents.index[torch.searchsorted(self.documents.index, at, right=True) - 1]
        return starts, (at - starts) // self.w * self.w if self.w < EVERYTHING else torch.zeros_like(at)

    def keeps(self, at: Tensor) -> Tensor:
        """Whether the strand keeps these positions."""
        starts, _ = self._inside(at)
        return (at - starts) % self.w % self.r == self.offset

    def segment(self, at: Tensor) -> Tensor:
        """Where the segment of each position starts, which is its name."""
        starts, inside = self._inside(at)
        return starts + inside

    def end(self, at: Tensor) -> Tensor:
        """Where the segment of each position ends: the first position after it."""
        starts, inside = self._inside(at)
        ends = starts + inside + self.w if self.w < EVERYTHING else torch.full_like(at, EVERYTHING)
        if self.documents is None:
            return ends
        last = torch.cat([self.documents.index, torch.tensor([EVERYTHING], device="cpu")])
        return torch.minimum(ends, last[torch.searchsorted(last, at, right=True)])


@lru_cache(maxsize=256)  # of n rows each; what is kept for long is plans, which are small
def _kept(strand: Strand, positions: Positions) -> Tensor:
    index = positions.index
    order = None if ascending(index) else index.argsort(stable=True)
    rows = strand.keeps(index if order is None else index[order]).nonzero()[:, 0]
    return rows if order is None else order[rows]


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


def serving(heads: range, group: int) -> range:
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
    where the indices allow it, else a copy. `slant`: how many rows further each next head starts.
    """

    def __init__(self, index: Tensor):
        (self.m, self.c), self.slant, some = index.shape, 0, index.numel() > 0
        self.start = int(index[0, 0]) if some else 0
        self.step = int(index[0, 1] - index[0, 0]) if some and self.c > 1 else 1
        self.hop = int(index[1, 0] - index[0, 0]) if some and self.m > 1 else self.c * self.step
        self.strided = self.step > 0 and self.hop > 0 and torch.equal(self._even(), index)
        self._uneven = None if self.strided else index  # plans live long: a view needs no indices
        self._on: dict = {}

    def _even(self) -> Tensor:
        segments, rows = torch.arange(self.m, device="cpu")[:, None], torch.arange(self.c, device="cpu")
        return self.start + self.hop * segments + self.step * rows

    @property
    def index(self) -> Tensor:
        """The rows of the first head, m c."""
        return self._even() if self._uneven is None else self._uneven

    def slanted(self) -> Rows:
        """The same, but each next head starts one row further."""
        other = copy(self)
        other.slant = 1
        return other

    def follows(self, other: Rows) -> bool:
        """Whether these are the other's rows, each one further, and both are views."""
        mine, its = ((x.step, x.hop, x.m, x.c) for x in (self, other))
        return self.strided and other.strided and self.start == other.start + 1 and mine == its

    def all_of(self, s: int) -> bool:
        """Whether these are rows 0 … s−1 in order."""
        whole = self.start == 0 and self.step == 1 and self.hop == self.c and self.m * self.c == s
        return whole and self.strided and not self.slant

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
    """

    queries: Rows
    keys: Rows
    kind: str
    at: tuple[Positions, Positions]  # of all rows of queries and keys
    ragged: Ragged | None = None

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
    seen = torch.searchsorted(k_positions, q_positions[blind:], right=True)
    rise = seen.diff()
    cuts = [0, *((rise[1:] != rise[:-1]).nonzero()[:, 0] + 1).tolist()] if len(rise) else [0]
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


def _cut(q_at: Tensor, k_at: Tensor, bounds: Bounds) -> Iterator[tuple[Tensor, Tensor, str]]:
    """What sorted queries see of sorted keys: the rows of both, and the kind.

    A bound on the left is a bound on the right with queries and keys in reverse: its triangles are causal, too.
    """
    (left, right), q, k = bounds, *(torch.arange(len(x), device="cpu") for x in (q_at, k_at))
    if left is None and right is None:
        yield q, k, "full"
    elif left is None:
        yield from ((q[a], k[b], kind) for a, b, kind in staircase(q_at + right, k_at))
    elif right is None:
        q, k = q.flip(0), k.flip(0)
        for a, b, kind in staircase(left - q_at[q], -k_at[k]):
            yield *((q[a], k[b]) if kind == "causal" else (q[a].flip(0), k[b].flip(0))), kind
    elif len(q_at) and len(k_at):
        # keys up to about where the first query's end are bounded on the left only, those after them on the right only
        first = torch.searchsorted(k_at, q_at - left)
        end = int(torch.searchsorted(k_at, q_at[:1] + right, right=True))
        rows = int((first <= end).sum())  # of which that holds; the others see nothing before it
        middle = max(int(first[rows - 1]), end - 1) if rows else 0
        for some, these in (((left, None), slice(0, middle)), ((None, right), slice(middle, None))):
            yield from ((a, k[these][b], kind) for a, b, kind in _cut(q_at[:rows], k_at[these], some))
        rest = max(rows, 1)  # the first query may see nothing at all
        yield from ((a + rest, b, kind) for a, b, kind in _cut(q_at[rest:], k_at, bounds))


def _hull(pieces: list[tuple[Tensor, Tensor, str]]) -> list[tuple[Tensor, Tensor, str]]:
    """The one rectangle that holds all pieces, in which positions say what is seen."""
    sides = [torch.cat(side) for side in list(zip(*pieces, strict=True))[:2]]
    return [(*(torch.arange(int(x.min()), int(x.max()) + 1, device="cpu") for x in sides), "mask")] if pieces else []


def visits(
    strand: Strand, queries: Positions, keys: Positions, causal: bool, masked: bool, q_chunk: int | None,
    window: Bounds = (None, None), ragged: bool = False,
) -> list[Visit]:  # fmt: skip
    """Where a strand's queries meet a block of keys; masked: what is seen is not decided by positions alone; ragged:
    whether a kernel takes segments of lengths of their own.
    """
    bounds = (window[0], 0) if causal else window
    return _visits(strand._replace(heads=range(0)), queries, keys, bounds, masked, q_chunk, ragged)


@lru_cache(maxsize=2048)
def _visits(
    strand: Strand, queries: Positions, keys: Positions, bounds: Bounds, masked: bool, q_chunk: int | None, ragged: bool
) -> list[Visit]:
    found: list[Visit] = []
    q_rows, k_rows = strand.rows(queries), strand.rows(keys)
    q_at, k_at = queries.index[q_rows], keys.index[k_rows]
    start, shape = _segments(strand, q_at, k_at)
    if ragged:
        start, shape, some = _uneven(start, shape, q_at, k_at, bounds)
        for begin, how in some:
            rows, others = (
                Rows(every[_joined(first, count)][None])
                for every, first, count in zip((q_rows, k_rows), begin.unbind(1), how.lengths.unbind(1), strict=True)
            )
            found.append(Visit(rows, others, "ragged", (queries, keys), how))
    if None not in bounds:
        start, shape = _banded(start, shape, q_at, k_at, bounds, strand.r, q_chunk)
    for c, kc in shape.unique(dim=0).tolist() if len(shape) else ():
        # segments of one shape, then of one pattern of positions: all but a tail are usually alike
        firsts = start[(shape == shape.new_tensor([c, kc])).all(1)]
        own, others = torch.arange(c, device="cpu"), torch.arange(kc, device="cpu")
        q_index, k_index = firsts[:, :1] + own, firsts[:, 1:] + others
        while len(q_index):
            alike = _like_the_first(q_at, k_at, q_index, k_index)
            pieces = _alike(q_at, k_at, q_index[alike], k_index[alike], bounds, masked, q_chunk)
            found += (Visit(Rows(q_rows[x]), Rows(k_rows[y]), kind, (queries, keys)) for x, y, kind in pieces)
            q_index, k_index = q_index[~alike], k_index[~alike]
    return found


def _like_the_first(q_at: Tensor, k_at: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    """Which segments have the first one's positions, counted from a segment's first query."""
    if len(q_index) == 1:
        return torch.ones(1, dtype=torch.bool, device="cpu")
    origin = q_at[q_index[:, :1]]
    pattern = torch.cat([q_at[q_index] - origin, k_at[k_index] - origin], 1)
    return (pattern == pattern[0]).all(1)


def _segments(strand: Strand, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
    """Of each segment that has queries and keys: where both start among the rows, and how many there are."""
    q_segment, q_count = strand.segment(q_at).unique_consecutive(return_counts=True)
    k_segment, k_count = strand.segment(k_at).unique_consecutive(return_counts=True)
    q_start, k_start = q_count.cumsum(0) - q_count, k_count.cumsum(0) - k_count
    q_shared, k_shared = torch.isin(q_segment, k_segment), torch.isin(k_segment, q_segment)
    start = torch.stack([q_start[q_shared], k_start[k_shared]], 1)
    return start, torch.stack([q_count[q_shared], k_count[k_shared]], 1)


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
            found.append(
                (begin[mine], Ragged(lengths, *(None if no else int(x) for no, x in zip(free, pair, strict=True))))
            )
            rest &= ~mine
    return start[rest], shape[rest], found


def _spacing(at: Tensor, begin: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """How far apart rows lie of these runs of rows, 0 for a single one; and whether it is the same all along."""
    apart = torch.nn.functional.pad(at.diff(), (0, 1))
    changes = torch.nn.functional.pad((apart[1:] != apart[:-1]).cumsum(0), (1, 0))
    last = (begin + count - 2).clamp(min=0)
    some = begin.clamp(max=len(at) - 1)
    return torch.where(count > 1, apart[some], 0), (count < 3) | (changes[last] == changes[some])


def _joined(begin: Tensor, count: Tensor) -> Tensor:
    """Runs of rows, end to end."""
    inside = torch.arange(int(count.sum()), device="cpu") - (count.cumsum(0) - count).repeat_interleave(count)
    return begin.repeat_interleave(count) + inside


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
    q_at: Tensor, k_at: Tensor, q_index: Tensor, k_index: Tensor, bounds: Bounds, masked: bool, q_chunk: int | None
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Segments that are alike, `q_chunk` query rows at a time, whole segments if they fit, else
    parts: which of the queries at `q_at` meet which of the keys at `k_at`, and the kind.
    """
    c = q_index.shape[1]
    some = max(1, (q_chunk or q_index.numel()) // c)
    for i in range(0, len(q_index), some):
        for j in range(0, c, q_chunk or c):
            qi, ki = q_index[i : i + some, j : j + (q_chunk or c)], k_index[i : i + some]
            pieces = list(_cut(q_at[qi[0]], k_at[ki[0]], bounds))
            if masked or len(pieces) > _PIECES:
                pieces = _hull(pieces)
            yield from ((qi[:, a], ki[:, b], kind) for a, b, kind in pieces)
