"""What accumulates: the running merge of outputs, and sums of gradients.

Both keep the first block as it came, in the inputs' dtype, and others waiting until some are merged or added in one
pass over memory, at the latest as the result is written. What they have come to before is float32 (float64 for
float64). A sum adds blocks of the same rows as one that waits among themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from ..comm.ring import Message
from ..shard import wide
from .visits import Rows


class Running:
    """The running merge of blocks of rows, `out` b s h d and `lse` b s h."""

    def __init__(self, shape: Sequence[int], like: Tensor):
        self.shape, self.like, self.dtype = tuple(shape), like, wide(like.dtype)
        self.out = self.lse = None  # b 1 s h …, as what waits: its first row, out and lse
        self.waiting: list[tuple[int, Tensor, Tensor]] = []

    def merge(self, rows: Rows, heads: slice, out: Tensor, lse: Tensor) -> None:
        if a_range := rows.a_range and out.shape[3] == self.shape[2]:
            out, lse = (x if x.shape[1] == 1 else x.flatten(1, 2)[:, None] for x in (out, lse))
        if self.out is None and a_range and out.shape[2] == self.shape[1]:
            self.out, self.lse = out, lse
            return
        self._start()
        if not a_range or len(self.waiting) == _AT_ONCE - 1:
            self._fold(self.dtype)
        if not a_range:
            self._merge(rows, heads, out, lse)
            return
        self.waiting.append((rows.start, out, lse))
        held = sum(x.shape[2] for _, x, _ in self.waiting)
        if held >= 2 * self.shape[1] or self.like.dtype == self.dtype:
            self._fold(self.dtype)

    def result(self) -> tuple[Tensor, Tensor]:
        """out in the inputs' dtype, lse in the accumulating one; 0 and −inf where nothing was seen."""
        self._start()
        self._fold(self.like.dtype)
        return self.out[:, 0], self.lse[:, 0]

    def _start(self) -> None:
        if self.out is None:
            b, *rest = self.shape
            self.out = self.like.new_zeros((b, 1, *rest))
            self.lse = self.like.new_full((b, 1, *rest[:2]), -torch.inf, dtype=self.dtype)

    def _fold(self, dtype: torch.dtype) -> None:
        """Merge what waits, in one pass; out is then of this dtype."""
        blocks, self.waiting = self.waiting, []
        if not blocks:
            self.out = self.out.to(dtype)
        elif self.out.dtype == dtype:  # in place, and of the rows that change
            start = min(first for first, *_ in blocks)
            rows = slice(start, max(first + x.shape[2] for first, x, _ in blocks))
            mine = self.out[:, :, rows], self.lse[:, :, rows]
            _merged(*mine, (0, *mine), *((first - start, *block) for first, *block in blocks))
        else:
            mine, self.out = self.out, torch.empty_like(self.out, dtype=dtype)
            _merged(self.out, self.lse, (0, mine, self.lse), *blocks)

    def _merge(self, rows: Rows, heads: slice, piece: Tensor, other: Tensor) -> None:
        def write(out: Tensor) -> None:
            rows.change(self.lse[:, 0], heads, lambda lse: _merged(out, lse, (0, out, lse), (0, piece, other)))

        rows.change(self.out[:, 0], heads, write)


def _merged(out: Tensor, lse: Tensor, *blocks: tuple[int, Tensor, Tensor]) -> None:
    _way(_MERGED, out, *(x for _, x, _ in blocks)).merge(out, lse, *blocks)


def merge(out: Tensor, lse: Tensor, whole: tuple[int, Tensor, Tensor], *blocks: tuple[int, Tensor, Tensor]) -> None:
    """Write to out and lse the merge of blocks, each its first row, its out and its lse. The first has every row, and
    may be where out and lse are.
    """
    _, mine, own = whole
    total = own.clone()
    for first, _, its in blocks:
        some = total.narrow(2, first, its.shape[2])
        torch.logaddexp(some, its, out=some)
    kept = torch.mul(mine, _weight(own, total), out=out if out.dtype == lse.dtype else None)
    for first, piece, its in blocks:
        rows = first, its.shape[2]
        kept.narrow(2, *rows).addcmul_(piece, _weight(its, total.narrow(2, *rows)))
    if kept is not out:
        out.copy_(kept)
    lse.copy_(total)


def _weight(lse: Tensor, total: Tensor) -> Tensor:
    # what saw nothing is 0 whatever it weighs, and what is infinite or no number stays as it is
    return (lse - total).exp_().nan_to_num_(1.0)[..., None]


def add(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total = one + other."""
    total.copy_(one).add_(other)


_PLAIN = SimpleNamespace(merge=merge, add=add)
# elements from which passes over memory cost more than a launch of Triton's, which in the middle of a step takes the
# host 100 µs, as PyTorch's one pass of a sum in place takes 25
_MERGED, _ADDED = 2**20, 2**23
_AT_ONCE = 4  # blocks that one pass merges
_proofs: dict[torch.device, ModuleType | None] = {}


def _way(least: int, *blocks: Tensor) -> ModuleType | SimpleNamespace:
    """What merges and adds these blocks `b m c h d`: fused.py, in one pass over memory, for large ones where it can and
    has shown it on this device; else the two above.
    """
    x = blocks[0]
    if not x.is_cuda or x.numel() < least or torch._C._len_torch_dispatch_stack():  # a mode counts, traces or fakes
        return _PLAIN
    if x.device not in _proofs and not torch.cuda.is_current_stream_capturing():
        _proofs[x.device] = _proved(x.device)
    module = _proofs.get(x.device)
    return module if module and module.takes(*blocks) else _PLAIN


def _proved(device: torch.device) -> ModuleType | None:
    """fused.py, if this machine has Triton and the same comes out."""
    try:
        from . import fused
    except ImportError:
        return None
    except Exception as error:  # as Triton's where a program is shipped without its source
        fault = f"{type(error).__name__}: {error}"
    else:
        fault = fused.fault(_PLAIN, device)
    if fault:
        warnings.warn(f"Triton's merge and sum are passed over on {device}: {fault}", RuntimeWarning, stacklevel=2)
    return None if fault else fused


def plus(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """one + other, `b m c h d`, in this dtype: in one's memory where it has that."""
    if one.dtype == dtype:
        return one.add_(other)
    total = torch.empty_like(one, dtype=dtype)
    _way(_ADDED, total, one, other).add(total, one, other)
    return total


class Sum:
    """A running sum of blocks of rows, `b s h d`."""

    def __init__(self, shape: Sequence[int], like: Tensor):
        self.shape, self.like, self.dtype = tuple(shape), like, wide(like.dtype)
        self.total, self.waiting = None, []

    def add(self, rows: Rows, heads: slice, x: Tensor) -> None:
        whole = _covers(rows, x, self.shape)
        if self.total is None and whole:
            self.total = x.flatten(1, 2)
        elif self._waits(heads):
            self.waiting.append((rows, heads, x))
        elif whole:
            self._plus(x.flatten(1, 2), self.dtype)
            self._start(self.dtype)
        elif (alike := self._alike(rows, heads)) is not None:
            self.waiting[alike] = rows, heads, plus(self.waiting[alike][2], x, self.dtype)
        else:
            self._start(self.dtype)
            self._add(rows, heads, x)

    def _alike(self, rows: Rows, heads: slice) -> int | None:
        """Which of those that wait has the same rows and heads."""
        same = (i for i, (others, its, _) in enumerate(self.waiting) if its == heads and rows.follows(others, 0))
        return next(same, None)

    def _waits(self, heads: slice) -> bool:
        """Whether these heads' blocks have not begun to accumulate, and none of them waits yet. Several wait only where
        the result may then do without a sum in the accumulating dtype: they would be held beside it.
        """
        if not self.waiting:
            return self.total is None or self.total.dtype != self.dtype
        if self.total is not None or self.like.dtype == self.dtype:
            return False
        every = range(self.shape[2])
        return not any(set(every[heads]) & set(every[others]) for _, others, _ in self.waiting)

    def result(self) -> Tensor:
        """The sum in the inputs' dtype."""
        self._start(self.like.dtype if self.total is None else self.total.dtype)
        return self.total.to(self.like.dtype)

    def onto(self, total: Tensor, where: Tensor | None) -> Tensor:
        """The sum added to a larger one, all of it or the rows `where`, in the accumulating dtype."""
        if where is not None:
            return total.to(self.dtype).index_add_(1, where.to(total.device), self.wide())
        mine, self.total = self.total, total
        if mine is not None:
            self._plus(mine, self.dtype)
        return self.wide()

    def wide(self) -> Tensor:
        self._start(self.dtype)
        return self.total

    def _start(self, dtype: torch.dtype) -> None:
        if self.total is None:
            self.total = self.like.new_zeros(self.shape, dtype=dtype)
        while self.waiting:
            rows, heads, x = self.waiting.pop(0)
            if _covers(rows, x, self.shape):
                self._plus(x.flatten(1, 2), dtype)
            else:
                self.total = self.total.to(dtype)
                self._add(rows, heads, x)
        self.total = self.total.to(dtype)

    def _plus(self, x: Tensor, dtype: torch.dtype) -> None:
        self.total = plus(self.total[:, None], x[:, None], dtype)[:, 0]

    def _add(self, rows: Rows, heads: slice, x: Tensor) -> None:
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
            mine.total, mine.waiting = None, []  # before the next buffers are made
        return tuple(message)
