"""Which rows of keys travel between whom."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..shard import Positions, Table
from .visits import Rows, Strand


class Load:
    """Some rows of a rank's keys, which travel together: where they lie in its tensors, and their
    positions.
    """

    def __init__(self, keys: Positions, rows: Tensor):
        self.rows = Rows(rows[None])
        self.positions = keys if len(rows) == len(keys) else keys[rows]

    def __len__(self):
        return len(self.positions)


class Route(NamedTuple):
    """How a strand's keys can travel: the ranks that share a segment, and what each needs of each.

    `members`: in rank order, me among them. `load[j]`: of rank j, what any other member needs.
    `wanted[i][j]`: of rank j, what rank i needs; one of the two is me.
    """

    members: tuple[int, ...]
    load: dict[int, Load]
    wanted: dict[int, dict[int, Load]]


@lru_cache(maxsize=8)  # asked for twice in a row
def _shared(strand: Strand, table: Table) -> tuple[list[Tensor], list[Tensor], dict[tuple[int, int], Tensor]]:
    """Of every rank: the positions of its queries and the rows of its keys in a strand; of every
    two, which of the rows of the second lie in a segment of the first.
    """
    ranks = range(len(table.keys))
    q_at = [one.index[strand.rows(one)] for one in table.queries]
    # rows in the order of the tensor, so that all of them are the tensor itself
    k_rows = [strand.rows(one).sort().values for one in table.keys]
    k_segment = [one.index[rows] // strand.w for one, rows in zip(table.keys, k_rows, strict=True)]
    q_segment = [(at // strand.w).unique_consecutive() for at in q_at]
    meets = {(i, j): torch.isin(k_segment[j], q_segment[i]) for i in ranks for j in ranks if i != j}
    return q_at, k_rows, {pair: rows for pair, rows in meets.items() if bool(rows.any())}


def travels(strand: Strand, table: Table) -> bool:
    """Whether any rank needs another's keys."""
    return bool(_shared(strand._replace(heads=range(0)), table)[2])


def route(strand: Strand, table: Table, rank: int, causal: bool) -> Route:
    """The route of one strand as one rank sees it; every member computes the same."""
    return _route(strand._replace(heads=range(0)), table, rank, causal)


@lru_cache(maxsize=64)
def _route(strand: Strand, table: Table, rank: int, causal: bool) -> Route:
    q_at, k_rows, meets = _shared(strand, table)
    members, fresh = {rank}, [rank]
    while fresh:
        i = fresh.pop()
        new = {j for pair in meets if i in pair for j in pair} - members
        members |= new
        fresh += new
    load, wanted = {}, {i: {} for i in members}
    for j in members:
        needed = torch.zeros(len(k_rows[j]), dtype=torch.bool)
        for i in members - {j}:
            seen = meets.get((i, j), torch.zeros_like(needed))
            needed |= seen
            if rank in (i, j):
                if causal and len(q_at[i]):
                    seen = seen & (table.keys[j].index[k_rows[j]] <= q_at[i][-1])
                wanted[i][j] = Load(table.keys[j], k_rows[j][seen])
        load[j] = Load(table.keys[j], k_rows[j][needed])
    return Route(tuple(sorted(members)), load, wanted)
