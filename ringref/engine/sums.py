"""What accumulates: the running merge of outputs, and sums of gradients.

Blocks wait as they came, in the inputs' dtype, until some are taken in by one pass over memory: at the latest as the
result is written. What comes of them before that is float32 (float64 for float64).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from ..comm.ring import Message
from ..shard import wide
from .visits import Rows


class _Blocks:
    """What blocks of rows come to, each one tensor `b m c h …` or more: `b s h …` of the first."""

    _COUNTS = 1  # as how many of the blocks that are held a total counts

    def __init__(self, shape: Sequence[int], like: Tensor):
        self.shape, self.like, self.dtype = tuple(shape), like, wide(like.dtype)
        self.total: tuple[Tensor, ...] | None = None  # b 1 s h …
        self.waiting: list[tuple] = []  # of each its first row, and its tensors b 1 c h …

    def _is_range(self, rows: Rows, x: Tensor) -> bool:
        """Whether a block is a range of rows of every head."""
        return rows.a_range and x.shape[3] == self.shape[2]

    def _wait(self, rows: Rows, *block: Tensor) -> None:
        """Let a range of rows wait, until more than two and a half whole blocks are held."""
        if block[0].shape[1] > 1:
            block = [x.flatten(1, 2)[:, None] for x in block]
        self.waiting.append((rows.start, *block))
        held = self._COUNTS * self.shape[1] if self.total else 0
        for _, x, *_ in self.waiting:
            held += x.shape[2]
        more = self.total or len(self.waiting) > 1
        # in the accumulating dtype what waits is no smaller than what comes of it
        if 2 * held > 5 * self.shape[1] or (more and self.like.dtype == self.dtype):
            self._fold(self.dtype)

    def _fold(self, dtype: torch.dtype) -> None:
        """Combine with what waits, in as few passes as can be; the total is then of this dtype."""
        blocks, self.waiting = self.waiting, []
        if self.total is None:
            whole = next((i for i, (_, x, *_) in enumerate(blocks) if x.shape[2] == self.shape[1]), None)
            self.total = self._nothing(dtype) if whole is None else blocks.pop(whole)[1:]
        while blocks:
            some, blocks = blocks[: _AT_ONCE - 1], blocks[_AT_ONCE - 1 :]
            self._pass(some, self.dtype if blocks else dtype)
        if self.total[0].dtype != dtype:
            self.total = self.total[0].to(dtype), *self.total[1:]

    def _nothing(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The total of no block."""
        b, *rest = self.shape
        return (self.like.new_zeros((b, 1, *rest), dtype=dtype),)

    def _pass(self, blocks: list[tuple], dtype: torch.dtype) -> None:
        first, *rest = self.total
        if first.dtype != dtype:
            self.total = torch.empty_like(first, dtype=dtype), *rest
            self._combine(self.total, (0, first, *rest), *blocks)
        else:  # in place, the rows that change
            start, end = min(at for at, *_ in blocks), max(at + x.shape[2] for at, x, *_ in blocks)
            mine = [_some(x, start, end - start) for x in self.total]
            self._combine(mine, (0, *mine), *((at - start, *block) for at, *block in blocks))


class Running(_Blocks):
    """The running merge of blocks of rows, `out` b s h d and `lse` b s h."""

    def merge(self, rows: Rows, heads: slice, out: Tensor, lse: Tensor) -> None:
        if self._is_range(rows, out):
            self._wait(rows, out, lse)
            return
        self._fold(self.dtype)
        whole, its = (x[:, 0] for x in self.total)

        def write(*mine: Tensor) -> None:
            self._combine(mine, (0, *mine), (0, out, lse))

        rows.change(whole, heads, lambda mine: rows.change(its, heads, partial(write, mine)))

    def result(self) -> tuple[Tensor, Tensor]:
        """out in the inputs' dtype, lse in the accumulating one; 0 and −inf where nothing was seen."""
        self._fold(self.like.dtype)
        out, lse = self.total
        return out[:, 0], lse[:, 0]

    def _nothing(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        (out,) = super()._nothing(dtype)
        return out, self.like.new_full(out.shape[:4], -torch.inf, dtype=self.dtype)

    def _combine(self, into: Sequence[Tensor], *blocks: tuple) -> None:
        _way(_MERGED, into[0], *(x for _, x, _ in blocks)).merge(*into, *blocks)


def merge(out: Tensor, lse: Tensor, whole: tuple[int, Tensor, Tensor], *blocks: tuple[int, Tensor, Tensor]) -> None:
    """Write to out and lse the merge of blocks, each its first row, its out and its lse. The first has every row, and
    may be where out and lse are.
    """
    _, mine, own = whole
    top = own.clone()
    for first, _, its in blocks:
        some = _some(top, first, its.shape[2])
        torch.maximum(some, its, out=some)
    weight = _weight(own, top)
    kept, share = torch.mul(mine, weight[..., None], out=out if out.dtype == lse.dtype else None), weight
    for first, piece, its in blocks:
        rows = first, its.shape[2]
        weight = _weight(its, _some(top, *rows))
        _some(kept, *rows).addcmul_(piece, weight[..., None])
        _some(share, *rows).add_(weight)
    torch.div(kept, share[..., None], out=out)
    torch.add(top, share.log_(), out=lse)


def _some(x: Tensor, first: int, count: int) -> Tensor:
    """Some rows of b m c h …; a view that shows everything would cost the host for nothing."""
    return x if count == x.shape[2] else x.narrow(2, first, count)


def _weight(lse: Tensor, top: Tensor) -> Tensor:
    # what saw nothing is 0 whatever it weighs, and what is infinite or no number stays as it is
    return (lse - top).exp_().nan_to_num_(1.0)


def add(total: Tensor, whole: tuple[int, Tensor], *blocks: tuple[int, Tensor]) -> None:
    """Write to total the sum of blocks, each its first row and itself; the first has all rows, and may be the total."""
    # in the total's dtype where nothing is rounded twice
    once = total.dtype == wide(total.dtype) or (len(blocks) == 1 and whole[1].dtype == total.dtype)
    mine = total if once else torch.empty_like(total, dtype=wide(total.dtype))
    if mine is not whole[1]:
        mine.copy_(whole[1])
    for first, x in blocks:
        _some(mine, first, x.shape[2]).add_(x)
    if mine is not total:
        total.copy_(mine)


_PLAIN = SimpleNamespace(merge=merge, add=add)
# elements from which passes over memory cost more than a launch of Triton's, which in the middle of a step takes the
# host 100 µs, as PyTorch's one pass of a sum in place takes 25
_MERGED, _ADDED = 2**20, 2**23
_AT_ONCE = 4  # blocks that one pass takes, as many as fused.py has arguments for
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


class Sum(_Blocks):
    """A running sum of blocks of rows, `b s h d`."""

    _COUNTS = 2  # it is as large as two of bfloat16, and a backward has no room to spare

    def __init__(self, shape: Sequence[int], like: Tensor):
        super().__init__(shape, like)
        self.apart: list[tuple[Rows, slice, Tensor]] = []

    def add(self, rows: Rows, heads: slice, x: Tensor) -> None:
        a_range = self._is_range(rows, x)
        if not a_range and self._is_apart(heads):
            self.apart.append((rows, heads, x))
            return
        if self.apart or not a_range:
            self._fold(self.dtype)
        if a_range:
            self._wait(rows, x)
        else:
            self._add(rows, heads, x)

    def _is_apart(self, heads: slice) -> bool:
        """Whether only blocks of other heads came before: then the result may do without a sum in the accumulating
        dtype, beside which they would be held.
        """
        if self.total or self.waiting or self.like.dtype == self.dtype:
            return False
        every = range(self.shape[2])
        return not any(set(every[heads]) & set(every[others]) for _, others, _ in self.apart)

    def result(self) -> Tensor:
        """The sum in the inputs' dtype."""
        self._fold(self.like.dtype)
        return self.total[0][:, 0]

    def onto(self, total: Tensor, where: Tensor | None) -> Tensor:
        """The sum added to a larger one, all of it or the rows `where`, in the accumulating dtype."""
        if where is not None:
            return total.to(self.dtype).index_add_(1, where.to(total.device), self.wide())
        if self.total:
            self.waiting.append((0, *self.total))
        self.total = (total[:, None],)
        return self.wide()

    def wide(self) -> Tensor:
        self._fold(self.dtype)
        return self.total[0][:, 0]

    def _fold(self, dtype: torch.dtype) -> None:
        super()._fold(dtype)
        apart, self.apart = self.apart, []
        for block in apart:
            self._add(*block)

    def _add(self, rows: Rows, heads: slice, x: Tensor) -> None:
        rows.change(self.total[0][:, 0], heads, lambda part: part.add_(x))

    def _combine(self, into: Sequence[Tensor], whole: tuple, *blocks: tuple) -> None:
        # what is added in place is one pass of PyTorch's, too, where it is one block
        least = _ADDED if len(blocks) > 1 or into[0] is not whole[1] else math.inf
        _way(least, into[0], whole[1], *(x for _, x in blocks)).add(into[0], whole, *blocks)


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
