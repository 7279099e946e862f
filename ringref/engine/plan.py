"""What is worked on together, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch

from ..shard import Dilation, Positions, Table
from .route import Load, Route, route, travels
from .visits import Strand, Visit, regular, serving, strands, visits


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
