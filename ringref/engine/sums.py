"""What accumulates: the running merge of outputs, and sums of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..block import share
from ..comm.ring import Message
from ..shard import wide
from .visits import Rows


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
