"""What accumulates: the running merge of outputs, and sums of gradients.

Both keep the first block as it came, in the inputs' dtype, and the second waiting (a sum one of each head, if it has
none that is whole): two blocks are added as the result is written, and cost no copy. From the third on they accumulate
in float32 (float64 for float64), those of the same rows as one that waits in a sum of their own.
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
        self.out = self.lse = self.waiting = None

    def merge(self, rows: Rows, heads: slice, out: Tensor, lse: Tensor) -> None:
        if self.out is None and _covers(rows, out, self.shape):
            self.out, self.lse = out.flatten(1, 2), lse.flatten(1, 2)
        elif self.waiting is None and (self.out is None or self.out.dtype != self.dtype):
            self.waiting = rows, heads, out, lse
        else:
            self._start(self.dtype)
            self._merge(rows, heads, out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """out in the inputs' dtype, lse in the accumulating one; 0 and −inf where nothing was seen."""
        self._start(self.like.dtype if self.out is None else self.out.dtype)
        return self.out.to(self.like.dtype), self.lse

    def _start(self, dtype: torch.dtype) -> None:
        if self.out is None:
            self.out = self.like.new_zeros(self.shape, dtype=dtype)
            self.lse = self.like.new_full(self.shape[:3], -torch.inf, dtype=self.dtype)
        self.out = self.out.to(dtype)
        if self.waiting:
            block, self.waiting = self.waiting, None
            self._merge(*block)

    def _merge(self, rows: Rows, heads: slice, piece: Tensor, other: Tensor) -> None:
        def write(out: Tensor) -> None:
            rows.change(self.lse, heads, lambda lse: _way(_MERGED, out, piece).merge(out, lse, piece, other))

        rows.change(self.out, heads, write)


def merge(out: Tensor, lse: Tensor, piece: Tensor, other: Tensor) -> None:
    """Merge a piece and its lse `other` into out and lse, in place."""
    # exp(other − logaddexp(lse, other)); two that saw nothing are 0 whatever they weigh
    weight = torch.sigmoid((other - lse).nan_to_num_(0.0))[..., None]
    torch.logaddexp(lse, other, out=lse)
    kept = out.mul_(1 - weight) if out.dtype == weight.dtype else out * (1 - weight)
    torch.addcmul(kept, piece, weight, out=out)


def add(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total = one + other."""
    total.copy_(one).add_(other)


_PLAIN = SimpleNamespace(merge=merge, add=add)
# elements from which passes over memory cost more than a launch of Triton's, which in the middle of a step takes the
# host 100 µs, as PyTorch's one pass of a sum in place takes 25
_MERGED, _ADDED = 2**20, 2**23
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
