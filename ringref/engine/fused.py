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
_STEPS = [f"{x}_{axis}" for x in ("o", "l", *(f"{x}{i}" for i in _BLOCKS for x in "xa")) for axis in "bmch"]
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
def _block(x, c, h, d, there, first, count, x_b, x_m, x_c, x_h, M):
    """A block in float32, 0 in rows that it has not."""
    c -= first
    there = there & ((c >= 0) & (c < count))[:, None]
    return tl.load(x + _places(c, h, x_b, x_m, x_c, x_h, M)[:, None] * _LANES + d, there, 0.0).to(tl.float32)


@triton.jit
def _lse(lse, c, h, some, first, count, x_b, x_m, x_c, x_h, M):
    """A block's lse, −inf in rows that it has not."""
    c -= first
    return tl.load(lse + _places(c, h, x_b, x_m, x_c, x_h, M), some & (c >= 0) & (c < count), -float("inf"))


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _weight(lse, top):
    weight = tl.exp(lse - top)  # NaN where nothing was seen: what is 0 whatever it weighs
    return tl.where(weight == weight, weight, 1.0)


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
    top = _max(b0, b1)
    if N > 2:
        b2 = _lse(a2, c, h, some, first2, count2, a2_b, a2_m, a2_c, a2_h, M)
        top = _max(top, b2)
    if N > 3:
        b3 = _lse(a3, c, h, some, first3, count3, a3_b, a3_m, a3_c, a3_h, M)
        top = _max(top, b3)
    w0, w1 = _weight(b0, top), _weight(b1, top)
    share = w0 + w1
    x = w0[:, None] * _block(x0, c, h, d, there, first0, count0, x0_b, x0_m, x0_c, x0_h, M)
    x += w1[:, None] * _block(x1, c, h, d, there, first1, count1, x1_b, x1_m, x1_c, x1_h, M)
    if N > 2:
        w2 = _weight(b2, top)
        share += w2
        x += w2[:, None] * _block(x2, c, h, d, there, first2, count2, x2_b, x2_m, x2_c, x2_h, M)
    if N > 3:
        w3 = _weight(b3, top)
        share += w3
        x += w3[:, None] * _block(x3, c, h, d, there, first3, count3, x3_b, x3_m, x3_c, x3_h, M)
    tl.debug_barrier()  # several threads have read one lse: all must have, before one of them writes it
    tl.store(lse + _places(c, h, l_b, l_m, l_c, l_h, M), top + tl.log(share), some)
    tl.store(out + _places(c, h, o_b, o_m, o_c, o_h, M)[:, None] * _LANES + d, x / share[:, None], there)


@_once
def _add_kernel(
    out, x0, x1, x2, x3,
    M, C, H, o_b, o_m, o_c, o_h,
    x0_b, x0_m, x0_c, x0_h, first0, count0, x1_b, x1_m, x1_c, x1_h, first1, count1,
    x2_b, x2_m, x2_c, x2_h, first2, count2, x3_b, x3_m, x3_c, x3_h, first3, count3,
    N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c, h, d, _, there = _tile(C, H, D, ROWS, WIDTH)
    x = _block(x0, c, h, d, there, first0, count0, x0_b, x0_m, x0_c, x0_h, M)
    x += _block(x1, c, h, d, there, first1, count1, x1_b, x1_m, x1_c, x1_h, M)
    if N > 2:
        x += _block(x2, c, h, d, there, first2, count2, x2_b, x2_m, x2_c, x2_h, M)
    if N > 3:
        x += _block(x3, c, h, d, there, first3, count3, x3_b, x3_m, x3_c, x3_h, M)
    tl.store(out + _places(c, h, o_b, o_m, o_c, o_h, M)[:, None] * _LANES + d, x, there)


def takes(*tensors: Tensor) -> bool:
    """Whether these kernels can address such tensors."""
    b, m, c, h, _ = tensors[0].shape
    return b * m < 2**16 and c * h < 2**30 and all(map(_aligned, tensors))


def _aligned(x: Tensor) -> bool:
    *rows, last = x.stride()
    return last == 1 and x.dtype in _DTYPES and not any(stride % _LANES.value for stride in rows)


def merge(out: Tensor, lse: Tensor, *blocks: tuple[int, Tensor, Tensor]) -> None:
    """Write to out and lse the merge of two to four blocks, each its first row, its out and its lse."""
    _launch(_merge_kernel, (out, lse), blocks)


def add(out: Tensor, *blocks: tuple[int, Tensor]) -> None:
    """Write to out the sum of two to four blocks, each its first row and itself."""
    _launch(_add_kernel, (out,), blocks)


def _steps(x: Tensor) -> list[int]:
    return [step // _LANES.value if x.ndim == 5 else step for step in x.stride()[:4]]


def _launch(kernel, into: tuple[Tensor, ...], blocks: tuple[tuple, ...]) -> None:
    (b, m, c, h, d), n = into[0].shape, len(blocks)
    blocks += blocks[-1:] * (len(_BLOCKS) - n)  # there are as many arguments
    told = [step for x in into for step in _steps(x)]
    for first, *block in blocks:
        told += [*(step for x in block for step in _steps(x)), first, block[0].shape[2]]
    pointers = *into, *(x for each in zip(*(block for _, *block in blocks), strict=True) for x in each)
    width = 1 << (d - 1).bit_length()
    rows = max(1, _TILE // width)
    with _compiling, torch.cuda.device_of(into[0]):
        kernel[-(-c * h // rows), b * m](*pointers, m, c, h, *told, N=n, D=d, ROWS=rows, WIDTH=width)


def fault(plain, device: torch.device) -> str | None:
    """What is wrong with what comes out here, beside `plain.merge` and `plain.add`; None if nothing is."""
    linspace = partial(torch.linspace, dtype=torch.float32, device=device)  # whatever the default dtype is
    out, piece = linspace(-3, 3, 2 * 444 * 80).view(2, 2, 2, 37, 3, 80)[..., :72]
    lse, other = linspace(-200, 200, 2 * 444).view(2, 2, 2, 37, 3)
    lse[:, :, :2], other[:, :, 1:3] = -torch.inf, -torch.inf
    out[:, :, :2], piece[:, :, 1:3] = 0, 0
    found = []
    try:
        for way in (plain, sys.modules[__name__]):
            mine, total = (out.clone(), lse.clone(), piece.bfloat16()), torch.empty_like(out)
            late = mine[2][:, :, 5:], other[:, :, 5:]
            way.merge(*mine[:2], (0, *mine[:2]), (0, mine[2], other), (5, *late), (2, *late))
            way.add(total, (0, out), (0, mine[2]), (5, late[0]), (2, late[0]))
            found.append((*mine[:2], total))
    except Exception as error:  # whatever a compiler may raise
        return f"{type(error).__name__}: {error}"
    wrong = [name for name, *x in zip(("out", "lse", "sum"), *found, strict=True) if not torch.allclose(*x, 1e-5, 1e-5)]
    return f"wrong {', '.join(wrong)}" if wrong else None
