"""What sums.py does to large blocks on a GPU, in one pass over memory instead of four to six (Triton).

Tensors are views `b m c h d` of any strides but d's, which is 1, and lse `b m c h` float32. All but lse may be float32,
bfloat16 or float16, and what is computed is float32.
"""

from __future__ import annotations

import sys
import threading
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LANES = tl.constexpr(8)  # elements that are loaded at once: what other strides are multiples of
_TILE = 4096
_BLOCKS = range(4)
_STEPS = [f"{x}_{axis}" for x in ("o", "l", "p", "q", *(f"{x}{i}" for i in _BLOCKS for x in "xa")) for axis in "bmch"]
_ROWS = [f"{x}{i}" for i in _BLOCKS for x in ("first", "count")]
_once = triton.jit(do_not_specialize=["M", "C", "H", *_STEPS, *_ROWS])  # or it is compiled anew for every kind of shape
_compiling = threading.Lock()  # ranks that are threads come here together


@triton.jit
def _places(c, h, x_b, x_m, x_c, x_h, M):
    """Where rows (c, h) of this program's segment begin, in the unit of the strides."""
    segment = tl.program_id(1).to(tl.int64)
    return segment // M * x_b + segment % M * x_m + c.to(tl.int64) * x_c + h.to(tl.int64) * x_h


@triton.jit
def _tile(C, H, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's rows (c, h), its columns, and which of both there are."""
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    some = row < C * H
    return row // H, row % H, d[None, :], some, some[:, None] & (d < D)[None, :]


@triton.jit
def _lse(lse, c, h, some, first, count, x_b, x_m, x_c, x_h, M):
    """A block's lse, −inf in rows that it has not."""
    c -= first
    return tl.load(lse + _places(c, h, x_b, x_m, x_c, x_h, M), some & (c >= 0) & (c < count), -float("inf"))


@triton.jit
def _logaddexp(a, b):
    ahead = b - a
    both = tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(ahead)))
    return tl.where(a == b, a + 0.6931471805599453, tl.where(ahead == ahead, both, ahead))


@triton.jit
def _weighed(x, lse, total, c, h, d, there, first, count, x_b, x_m, x_c, x_h, M):
    """A block times its weight, 0 in rows that it has not."""
    c -= first
    there = there & ((c >= 0) & (c < count))[:, None]
    weight = tl.exp(lse - total)  # NaN where nothing was seen: what is 0 whatever it weighs
    weight = tl.where(weight == weight, weight, 1.0)[:, None]
    return tl.load(x + _places(c, h, x_b, x_m, x_c, x_h, M)[:, None] * _LANES + d, there, 0.0).to(tl.float32) * weight


@_once
def _merge_kernel(
    out, lse, x0, x1, x2, x3, a0, a1, a2, a3,
    M, C, H, o_b, o_m, o_c, o_h, l_b, l_m, l_c, l_h,
    x0_b, x0_m, x0_c, x0_h, a0_b, a0_m, a0_c, a0_h, first0, count0,
    x1_b, x1_m, x1_c, x1_h, a1_b, a1_m, a1_c, a1_h, first1, count1,
    x2_b, x2_m, x2_c, x2_h, a2_b, a2_m, a2_c, a2_h, first2, count2,
    x3_b, x3_m, x3_c, x3_h, a3_b, a3_m, a3_c, a3_h, first3, count3,
    N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c, h, d, some, there = _tile(C, H, D, ROWS, WIDTH)
    b0 = _lse(a0, c, h, some, first0, count0, a0_b, a0_m, a0_c, a0_h, M)
    b1 = _lse(a1, c, h, some, first1, count1, a1_b, a1_m, a1_c, a1_h, M)
    total = _logaddexp(b0, b1)
    if N > 2:
        b2 = _lse(a2, c, h, some, first2, count2, a2_b, a2_m, a2_c, a2_h, M)
        total = _logaddexp(total, b2)
    if N > 3:
        b3 = _lse(a3, c, h, some, first3, count3, a3_b, a3_m, a3_c, a3_h, M)
        total = _logaddexp(total, b3)
    x = _weighed(x0, b0, total, c, h, d, there, first0, count0, x0_b, x0_m, x0_c, x0_h, M)
    x += _weighed(x1, b1, total, c, h, d, there, first1, count1, x1_b, x1_m, x1_c, x1_h, M)
    if N > 2:
        x += _weighed(x2, b2, total, c, h, d, there, first2, count2, x2_b, x2_m, x2_c, x2_h, M)
    if N > 3:
        x += _weighed(x3, b3, total, c, h, d, there, first3, count3, x3_b, x3_m, x3_c, x3_h, M)
    tl.debug_barrier()  # several threads have read one lse: all must have, before one of them writes it
    tl.store(lse + _places(c, h, l_b, l_m, l_c, l_h, M), total, some)
    tl.store(out + _places(c, h, o_b, o_m, o_c, o_h, M)[:, None] * _LANES + d, x, there)


@_once
def _add_kernel(
    out, one, other,
    M, C, H, o_b, o_m, o_c, o_h, p_b, p_m, p_c, p_h, q_b, q_m, q_c, q_h,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c, h, d, _, there = _tile(C, H, D, ROWS, WIDTH)
    x = tl.load(one + _places(c, h, p_b, p_m, p_c, p_h, M)[:, None] * _LANES + d, there, 0.0).to(tl.float32)
    y = tl.load(other + _places(c, h, q_b, q_m, q_c, q_h, M)[:, None] * _LANES + d, there, 0.0).to(tl.float32)
    tl.store(out + _places(c, h, o_b, o_m, o_c, o_h, M)[:, None] * _LANES + d, x + y, there)


def takes(*tensors: Tensor) -> bool:
    """Whether these kernels can address such tensors."""
    b, m, c, h, _ = tensors[0].shape
    return b * m < 2**16 and c * h < 2**30 and all(map(_aligned, tensors))


def _aligned(x: Tensor) -> bool:
    *rows, last = x.stride()
    return last == 1 and x.dtype in _DTYPES and not any(stride % _LANES.value for stride in rows)


def merge(out: Tensor, lse: Tensor, *blocks: tuple[int, Tensor, Tensor]) -> None:
    """Write to out and lse the merge of two to four blocks, each its first row, its out and its lse."""
    firsts, pieces, others = zip(*blocks, *(blocks[-1:] * (len(_BLOCKS) - len(blocks))), strict=True)
    told = [*_steps(out), *lse.stride()]
    for first, piece, other in zip(firsts, pieces, others, strict=True):
        told += [*_steps(piece), *other.stride(), first, piece.shape[2]]
    _launch(_merge_kernel, (out, lse, *pieces, *others), told, N=len(blocks))


def add(out: Tensor, one: Tensor, other: Tensor) -> None:
    """out = one + other."""
    _launch(_add_kernel, (out, one, other), [step for x in (out, one, other) for step in _steps(x)])


def _steps(x: Tensor) -> list[int]:
    return [step // _LANES.value for step in x.stride()[:4]]


def _launch(kernel, pointers: tuple[Tensor, ...], told: list[int], **constants: int) -> None:
    b, m, c, h, d = pointers[0].shape
    width = 1 << (d - 1).bit_length()
    rows = max(1, _TILE // width)
    with _compiling, torch.cuda.device_of(pointers[0]):
        kernel[-(-c * h // rows), b * m](*pointers, m, c, h, *told, D=d, ROWS=rows, WIDTH=width, **constants)


def fault(plain, device: torch.device) -> str | None:
    """What is wrong with what comes out here, beside `plain.merge` and `plain.add`; None if nothing is."""
    linspace = partial(torch.linspace, dtype=torch.float32, device=device)  # whatever the default dtype is
    out, piece = linspace(-3, 3, 2 * 444 * 80).view(2, 2, 2, 37, 3, 80)[..., :72]
    lse, other = linspace(-200, 200, 2 * 444).view(2, 2, 2, 37, 3)
    lse[:, :, :2], other[:, :, 1:3] = -torch.inf, -torch.inf
    found = []
    try:
        for way in (plain, sys.modules[__name__]):
            mine, total = (out.clone(), lse.clone(), piece.bfloat16()), torch.empty_like(out)
            way.merge(*mine[:2], (0, *mine[:2]), (0, mine[2], other), (5, mine[2][:, :, 5:], other[:, :, :-5]))
            way.add(total, out, mine[2])
            found.append((*mine[:2], total))
    except Exception as error:  # whatever a compiler may raise
        return f"{type(error).__name__}: {error}"
    wrong = [name for name, *x in zip(("out", "lse", "sum"), *found, strict=True) if not torch.allclose(*x, 1e-5, 1e-5)]
    return f"wrong {', '.join(wrong)}" if wrong else None
