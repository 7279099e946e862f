"""What accumulates: the running merge of outputs, and sums of gradients.

Both keep the first block as it came, in the inputs' dtype, and the second waiting: two blocks are added as the result
is written, and cost no copy. From the third on they accumulate in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm.ring import Message
from ..shard import wide
from .visits import Rows


class Running:
    """The running merge of blocks of rows, `out` b s h d and `lse` b s h."""

    def __init__(self, shape: Sequence[int], like: Tensor):
        self.shape, self.like, self.dtype = tuple(shape), like, wide(like.dtype)
        self.out = self.lse = self.waiting = None

    def merge(self, rows: Rows, heads: slice, out: Tensor, lse: Tensor) -> None:
        if self.out is None and _covers(rows, out, self.shape):
            self.out, self.lse = out.flatten(1, 2), lse.flatten(1, 2)
        elif self.waiting is None and (self.out is None or self.out.dtype != self.dtype):
            self.waiting = rows, heads, out, lse
        else:
            self._start(self.dtype)
            self._merge_waiting()
            self._merge(rows, heads, out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """out in the inputs' dtype, lse in the accumulating one; 0 and −inf where nothing was seen."""
        self._start(self.like.dtype if self.out is None else self.out.dtype)
        self._merge_waiting()
        return self.out.to(self.like.dtype), self.lse

    def _start(self, dtype: torch.dtype) -> None:
        if self.out is None:
            self.out = self.like.new_zeros(self.shape, dtype=dtype)
            self.lse = self.like.new_full(self.shape[:3], -torch.inf, dtype=self.dtype)
        self.out = self.out.to(dtype)

    def _merge_waiting(self) -> None:
        if self.waiting:
            block, self.waiting = self.waiting, None
            self._merge(*block)

    def _merge(self, rows: Rows, heads: slice, out: Tensor, lse: Tensor) -> None:
        # exp(lse − logaddexp(lse, before)); two that saw nothing are 0 whatever they weigh
        weight = torch.sigmoid((lse - rows.of(self.lse, heads)).nan_to_num_(0.0))[..., None]
        kept = 1 - weight
        rows.change(self.lse, heads, lambda part: torch.logaddexp(part, lse, out=part))
        rows.change(self.out, heads, lambda part: torch.addcmul(_scaled(part, kept), out, weight, out=part))


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor in the factor's dtype, in place where that is x's own."""
    return x.mul_(factor) if x.dtype == factor.dtype else x * factor


class Sum:
    """A running sum of blocks of rows, `b s h d`."""

    def __init__(self, shape: Sequence[int], like: Tensor):
        self.shape, self.like, self.dtype = tuple(shape), like, wide(like.dtype)
        self.total = self.waiting = None

    def add(self, rows: Rows, heads: slice, x: Tensor) -> None:
        if self.total is None and _covers(rows, x, self.shape):
            self.total = x.flatten(1, 2)
        elif self.waiting is None and (self.total is None or self.total.dtype != self.dtype):
            self.waiting = rows, heads, x
        else:
            self._start(self.dtype)
            rows.change(self.total, heads, lambda part: part.add_(x))

    def result(self) -> Tensor:
        """The sum in the inputs' dtype."""
        self._start(self.like.dtype if self.total is None else self.total.dtype)
        return self.total.to(self.like.dtype)

    def onto(self, total: Tensor, where: Tensor | None) -> Tensor:
        """The sum added to a larger one, all of it or the rows `where`, in the accumulating dtype."""
        mine, total = self.result() if self.waiting is None else self.wide(), total.to(self.dtype)
        return total.add_(mine) if where is None else total.index_add_(1, where.to(total.device), mine.to(self.dtype))

    def wide(self) -> Tensor:
        self._start(self.dtype)
        return self.total

    def _start(self, dtype: torch.dtype) -> None:
        if self.total is None:
            self.total = self.like.new_zeros(self.shape, dtype=dtype)
        self.total = self.total.to(dtype)
        if self.waiting:
            (rows, heads, x), self.waiting = self.waiting, None
            rows.change(self.total, heads, lambda part: part.add_(x))


def _covers(rows: Rows, x: Tensor, shape: Sequence[int]) -> bool:
    """Whether a block is the whole: every row and every head of `b s h d`."""
    return rows.all_of(shape[1]) and x.shape[3] == shape[2]


class Gradients:
    """dK and dV of what is in hand, on their way to the rank that owns it: of each block that came together."""

    def __init__(self, blocks: Sequence, like: Tensor):
        self.sums = [[Sum(x.shape, like) for x in (block.k, block.v)] for block in blocks]

    def alone(self) -> Message:
        """One rank's share, in the inputs' dtype: float32 would add nothing to what a kernel returned."""
        return self._let_go(lambda mine, i: mine.result())

    def onto(self, arrived: Message, where: Sequence[Tensor | None]) -> Message:
        """Added to what came from the rank before, which may have more rows: mine are these of each block."""
        return self._let_go(lambda mine, i: mine.onto(arrived[i], where[i // 2]))

    def _let_go(self, finish) -> Message:
        message = []
        for i, mine in enumerate(x for both in self.sums for x in both):
            message.append(finish(mine, i))
            mine.total = mine.waiting = None  # before the next buffers are made
        return tuple(message)
