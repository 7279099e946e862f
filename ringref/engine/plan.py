"""What is worked on together, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch

from ..shard import Dilation, Positions, Table
from .route import Route, most_linked, routes
from .visits import Bounds, Strand, Visit, regular, serving, strands, visits

# of q, that a part has: where three ranks or more share keys, their sums are in flight beside the shares of one. Where
# q is small a part costs more host time than it saves memory: with 8k tokens of 16 heads on each of four H200 a ring's
# step takes 9.3 ms in one part and holds 0.6 GB, 18 times q; in two 14.5 ms and 11 times, in four 23.6 ms and 9 times
_PART_BYTES_OF_TWO, _PART_BYTES, _MOST_PARTS = 2**30, 20 * 2**20, 4


class Part(NamedTuple):
    """Key/value heads that a rank works on from start to end before the next ones, so that what is in flight and what
    accumulates is a share; the query heads that use them, and how their keys travel. Alike on every rank.
    """

    heads: range
    kv_heads: range
    routes: tuple[Route, ...]


@lru_cache(maxsize=64)
def parts(
    dilation: Dilation | None, documents: Positions | None, bounds: Bounds, exact: bool, h: int, g: int,
    row_bytes: int, table: Table, rank: int, forward: bool,
) -> tuple[Part, ...]:  # fmt: skip
    """The parts of a call, in a forward or in a backward. A forward of one strand is one part: it holds less than the
    backward in parts.
    """
    # the widest strand first, which may cover all rows, then the narrow ones
    first, *narrow = strands(dilation, h, documents)
    order, group = [first, *sorted(narrow, key=lambda x: -x.r)], h // g
    size, count = max(map(len, (*table.queries, *table.keys))) * row_bytes, 1
    if dilation is not None or (most_linked(first, table) > 1 and not forward):
        # one row in r of a dilated strand travels
        travel = [size // strand.r // _PART_BYTES for strand in order if most_linked(strand, table) > 2]
        count = max(1, min(max(size // _PART_BYTES_OF_TWO, *travel, 0), g, _MOST_PARTS))
        # as many heads in each: 16 in three parts take a kernel 15 % longer than in four
        count = next((x for x in range(count, _MOST_PARTS + 1) if g % x == 0), count)

    def serves(kv_head: int) -> list[tuple[int, int]]:
        heads = range(kv_head * group, (kv_head + 1) * group)
        return [x[:2] for x in order if any(j in x.heads for j in heads)]

    found = []
    for some in torch.arange(g, device="cpu").tensor_split(count):
        for _, alike in groupby(some.tolist(), serves):
            kv_heads = range((few := list(alike))[0], few[-1] + 1)
            heads = range(kv_heads.start * group, kv_heads.stop * group)
            inside = tuple(one for strand in order for one in _inside(strand, heads, group))
            found.append(Part(heads, kv_heads, routes(inside, table, rank, bounds, exact, group)))
    return tuple(found)


def _inside(strand: Strand, heads: range, group: int) -> list[Strand]:
    """The heads of a strand that are in a part, counted from its first; split where their key/value heads are not
    evenly spaced, so that what travels is a strided view.
    """
    mine = [j - heads.start for j in strand.heads if j in heads]
    if not mine:
        return []
    some = range(mine[0], mine[-1] + 1, strand.heads.step)
    used = sorted({j // group for j in some})
    even = len({b - a for a, b in zip(used, used[1:], strict=False)}) < 2
    return [strand._replace(heads=each) for each in ([some] if even else regular(some, group))]


@lru_cache(maxsize=2048)
def visits_of(
    some: tuple[Strand, ...], kv_heads: range, group: int, queries: Positions, keys: tuple[Positions, ...],
    *told: Any,
) -> tuple[Visit, ...]:  # fmt: skip
    """Everything that some strands do with one block of keys, which has these key/value heads, and each strand's rows
    at these positions; told: the rest that `visits` asks.
    """
    met = [(one, visits(one.pattern, queries, at, *told)) for one, at in zip(some, keys, strict=True)]
    found = []
    while met:
        run = 1
        while group == 1 and run < len(met) and _neighbours(met[: run + 1]):
            run += 1
        found += _slanted(met[:run], group)
        met = met[run:]
    return tuple(x._replace(heads=j, used=_within(serving(j, group), kv_heads)) for x, j in found)


def _within(heads: range, of: range) -> slice:
    """These heads as a slice of those."""
    return slice((heads[0] - of.start) // of.step, (heads[-1] - of.start) // of.step + 1, max(1, heads.step // of.step))


def _neighbours(some: list[tuple[Strand, list[Visit]]]) -> bool:
    """Whether the last of these strands does the same as the first: of each next one, one head further on, with queries
    one row further, and keys as many as the second's are.
    """
    (before, _), (after, last), n = *some[-2:], len(some) - 1
    first, second = (met for _, met in some[:2])
    return after.follows(before) and len(first) == len(second) == len(last) and all(
        x.kind == z.kind in ("full", "causal") and z.queries.follows(x.queries, n)
        and (by := y.keys.start - x.keys.start) >= 0 and z.keys.follows(x.keys, n * by)
        for x, y, z in zip(first, second, last, strict=True)
    )  # fmt: skip


def _slanted(offsets: list[tuple[Strand, list[Visit]]], group: int) -> Iterator[tuple[Visit, range]]:
    """Visits of strands of neighbouring offsets: a visit a strand, or, where that is fewer, one a
    head of the first strand.

    Head j has offset j % r, so neighbouring heads start at neighbouring rows: together they are one
    strided view too. LongNet's forward at 131k tokens takes 4.3 ms with this and 6.9 without (one H200). They travel
    in one pack, so of a branch that crosses four ranks with 12 heads a forward is 4 visits and not 37: 0.9 ms of a
    host's time and not 3.0 (a ring, one CPU core, kernels that only allocate).
    """
    (first, met), count = offsets[0], len(offsets)
    if count > len(first.heads):
        for visit, after in zip(met, offsets[1][1], strict=True):
            rows, keys = (x.slanted(y.start - x.start) for x, y in zip(visit[:2], after[:2], strict=True))
            for head in first.heads:
                yield visit._replace(queries=rows, keys=keys), range(head, head + count)
        return
    for strand, met in offsets:
        for visit in met:
            for heads in regular(strand.heads, group):
                yield visit, heads
