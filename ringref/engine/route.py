"""Which rows of keys travel between whom.

Strands whose keys are shared by the same ranks travel together. A `Load` is what travels of one rank's keys, some of
its rows in each of these strands; a `Trip` is how they can travel, as a conductor sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..comm.ring import Message, Ring
from ..shard import EVERYTHING, Positions, Table, unseen, wide
from .visits import Bounds, Rows, Strand, ascending, joined, serving


class Pack(NamedTuple):
    """Rows of one rank's keys that are one tensor `b k g d` of a message: a strand's, or those of neighbouring strands
    of one head each, every next of which starts one row further on. positions: of each strand's rows.
    """

    strands: tuple[Strand, ...]
    kv_heads: range
    rows: Rows
    positions: tuple[Positions, ...]


class Load:
    """What travels of one rank's keys: of each strand some rows, in its tensors' order. Of those that are `together`,
    12 at a time where 12 heads have 12 offsets, one pack is made if their rows allow it.
    """

    def __init__(self, keys: Positions, strands: Sequence[Strand], index: Sequence[Tensor], group: int, together: list):
        self.packs: list[Pack] = []
        for some in together:
            rows = [Rows(index[i][None]) for i in some]
            if len(some) > 1 and all(y.follows(x) for x, y in pairwise(rows)):
                each = [(some, rows[0].slanted(1))]
            else:
                each = [([i], one) for i, one in zip(some, rows, strict=True)]
            for few, first in each:
                heads = serving([j for i in few for j in strands[i].heads], group)
                at = tuple(keys if len(index[i]) == len(keys) else keys[index[i]] for i in few)
                self.packs.append(Pack(tuple(strands[i] for i in few), heads, first, at))
        self._rows = sum(pack.rows.c for pack in self.packs)

    def __len__(self):
        return self._rows

    def among(self, more: Load) -> list[Tensor | None]:
        """Where these rows lie among more, pack by pack; None where they are all of them."""
        pairs = [(some.rows, every.rows) for some, every in zip(self.packs, more.packs, strict=True)]
        return [None if x.c == y.c else torch.searchsorted(y.index[0], x.index[0]) for x, y in pairs]


class Block(NamedTuple):
    """Keys and values `b k g d` that are here, the strands that see them, and where each strand's rows are."""

    positions: tuple[Positions, ...]
    k: Tensor
    v: Tensor
    strands: tuple[Strand, ...]
    kv_heads: range


@lru_cache(maxsize=256)
def _reach(strand: Strand, queries: Positions, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Where what any of the strand's queries sees begins and ends: positions in order, apart from each other."""
    held, (left, right) = strand.held(queries), (EVERYTHING - 1 if x is None else x for x in bounds)
    first, last, start, end = held.at, held.at + (held.count - 1) * held.step, held.start, held.end
    if held.step > left + right + 1:  # what two neighbours see is apart
        first = last = held.positions
        start, end = (x.repeat_interleave(held.count) for x in (start, end))
    return _apart(torch.maximum(start, first - left), torch.minimum(end, last + right + 1))


def _apart(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Intervals, those that overlap or touch as one, in order."""
    if len(begin) < 2:
        return begin, end
    if not ascending(begin):
        begin, order = begin.sort()
        end = end[order]
    end = end.cummax(0).values
    new = torch.ones(len(begin) + 1, dtype=torch.bool, device="cpu")
    new[1:-1] = begin[1:] > end[:-1]
    return begin[new[:-1]], end[new[1:]]


def _needed(strand: Strand, keys: Positions, by: Sequence[Positions], bounds: Bounds) -> Tensor:
    """Which of the strand's rows of these keys any of these queries sees, in the tensors' order."""
    held, reach = strand.held(keys), [_reach(strand.pattern, one, bounds) for one in by]
    if not by:
        return held.row[:0]
    ends = torch.stack(_apart(*map(torch.cat, zip(*reach, strict=True))))
    begin, end = torch.searchsorted(held.positions, ends).unbind(0)
    if int((end - begin).sum()) == len(held.rows):
        return held.in_order
    rows = held.rows[joined(begin, end - begin)]
    return rows if held.in_order is held.rows else rows.sort().values


class Route:
    """Who shares the segments of some strands, and what each needs of each: alike on all its members.

    Args:
        exact: whether masks that positions decide trim what travels round; otherwise segments alone do.
        group: query heads that share a key/value head.
    """

    def __init__(
        self, members: tuple[int, ...], strands: tuple[Strand, ...], table: Table, bounds: Bounds, exact: bool,
        group: int,
    ):  # fmt: skip
        self.members, self.strands, self._bounds, self._exact, self._group = members, strands, bounds, exact, group
        self.queries, self.keys = ([side[r] for r in members] for side in table)
        self._together: list[list[int]] = []
        for i, strand in enumerate(strands):
            if i and group == 1 and not exact and strand.follows(strands[i - 1]) and len(strand.heads) == 1:
                self._together[-1].append(i)
            else:
                self._together.append([i])
        self.seen, self.load = cache(unseen(self._seen)), cache(unseen(self._load))

    def _seen(self, of: int, by: int) -> Load:
        """The rows of member `of` that member `by` sees."""
        return self._rows_for(of, [by], True)

    def _load(self, of: int, hop: int) -> Load:
        """The rows of member `of` that travel on at this hop round the ring: what any other sees, and where masks
        trim what travels, only those this far from it and farther.
        """
        p = len(self.members)
        if not self._exact and 1 < hop < p:
            return self.load(of, 1)
        return self._rows_for(of, [(of + t) % p for t in range(hop, p)], self._exact)

    def gathered(self, of: int, by: int) -> Load:
        """The rows of member `of` that are gathered by member `by`: what travels, or where masks trim that, what it
        sees.
        """
        return self.seen(of, by) if self._exact else self.load(of, 1)

    def _rows_for(self, of: int, by: list[int], exact: bool) -> Load:
        """The rows of one member that any of these see: by the masks, or by segments alone."""
        keys, bounds = self.keys[of], self._bounds if exact else (None, None)
        queries = [self.queries[x] for x in by]
        index = [_needed(strand, keys, queries, bounds) for strand in self.strands]
        return Load(keys, self.strands, index, self._group, self._together)


@lru_cache(maxsize=256)
def _linked(strand: Strand, table: Table) -> tuple[tuple[int, ...], ...]:
    """Of each rank those that are linked to it by segments they share, in rank order, itself among them."""
    segments = [[strand.held(one).segment for one in side] for side in table]

    def shared(i: int, j: int) -> bool:
        return any(bool(torch.isin(segments[0][a], segments[1][b]).any()) for a, b in ((i, j), (j, i)))

    found, left = {}, set(range(len(table.keys)))
    while left:
        members, fresh = set(), {left.pop()}
        while fresh:
            members.add(i := fresh.pop())
            fresh |= (new := {j for j in left if shared(i, j)})
            left -= new
        found |= dict.fromkeys(members, tuple(sorted(members)))
    return tuple(found[rank] for rank in range(len(found)))


def most_linked(strand: Strand, table: Table) -> int:
    """How many ranks a strand links at the most."""
    return max(map(len, _linked(strand.pattern, table)))


@lru_cache(maxsize=64)
def routes(
    strands: tuple[Strand, ...], table: Table, rank: int, bounds: Bounds, exact: bool, group: int
) -> tuple[Route, ...]:
    """The strands by the ranks that share their keys: those that stay on this rank first, then in one order on all."""
    found: dict[tuple[int, ...], list[Strand]] = {(rank,): []}
    for strand in strands:
        found.setdefault(_linked(strand.pattern, table)[rank], []).append(strand)
    return tuple(Route(members, tuple(some), table, bounds, exact, group) for members, some in found.items() if some)


class Trip:
    """How the keys of a route travel, as a conductor sees it: what to send, what to receive. Ranks are those of `ring`,
    the route's members.
    """

    def __init__(self, ring: Ring, route: Route, k: Tensor, v: Tensor, backward: bool = False):
        self.ring, self._k, self._v, self.backward = ring.among(route.members), k, v, backward
        self.seen, self.load, self.gathered = route.seen, route.load, route.gathered
        everywhere = (route.keys[self.ring.rank],) * len(route.strands)
        self.own = (Block(everywhere, k, v, route.strands, range(k.shape[2])),)

    def pack_for(self, asked: dict[int, Load]) -> dict[int, Message]:
        """My K and V of these loads, packed once where ranks ask for the same."""
        packed = {id(load): self.pack(load) for load in asked.values()}
        return {rank: packed[id(load)] for rank, load in asked.items()}

    def pack(self, load: Load) -> Message:
        """My K and V of this load, ready to be sent."""
        return tuple(
            pack.rows.of(x, heads_of(pack.kv_heads))[:, 0].contiguous()
            for pack in load.packs
            for x in (self._k, self._v)
        )

    def pass_on(self, message: Message, where: Sequence[Tensor | None]) -> Message:
        """What of a message travels on: these of each pack's rows."""
        return tuple(
            x if where[i // 2] is None else x.index_select(1, where[i // 2].to(x.device)) for i, x in enumerate(message)
        )

    def space(self, load: Load, summed: bool = False) -> Message:
        """Buffers for the K and V of this load, or its dK and dV, which may be summed already."""

        def make():
            return tuple(
                x.new_empty((x.shape[0], pack.rows.c, len(pack.kv_heads), x.shape[3]), dtype=dtype(x.dtype))
                for pack in load.packs
                for x in (self._k, self._v)
            )

        dtype = wide if summed else lambda own: own
        return self.ring.space(make)

    def blocks(self, load: Load, message: Message) -> tuple[Block, ...]:
        """A load that has arrived, a block for each pack."""
        each = zip(load.packs, message[::2], message[1::2], strict=True)
        return tuple(Block(pack.positions, k, v, pack.strands, pack.kv_heads) for pack, k, v in each)

    def home(self, load: Load, message: Message) -> Iterator[tuple[Rows, slice, Tensor, Tensor]]:
        """dK and dV of a load of mine that others computed: to which rows and heads they belong."""
        each = zip(load.packs, message[::2], message[1::2], strict=True)
        return ((pack.rows, heads_of(pack.kv_heads), dk[:, None], dv[:, None]) for pack, dk, dv in each)


def heads_of(heads: range) -> slice:
    """These evenly spaced heads as a slice."""
    return slice(heads.start, heads[-1] + 1, heads.step)
