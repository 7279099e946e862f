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
_STEPS = [f"{x}_{axis}" for x in "opql" for axis in "bmch"]
_once = triton.jit(do_not_specialize=["M", "C", "H", *_STEPS])  # or it is compiled anew for every kind of shape
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


@_once
def _merge_kernel(
    out, piece, lse, other,
    M, C, H, o_b, o_m, o_c, o_h, p_b, p_m, p_c, p_h, l_b, l_m, l_c, l_h, q_b, q_m, q_c, q_h,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c, h, d, some, there = _tile(C, H, D, ROWS, WIDTH)
    lse += _places(c, h, l_b, l_m, l_c, l_h, M)
    out += _places(c, h, o_b, o_m, o_c, o_h, M)[:, None] * _LANES + d
    a = tl.load(lse, some, 0.0)
    b = tl.load(other + _places(c, h, q_b, q_m, q_c, q_h, M), some, 0.0)
    x = tl.load(out, there, 0.0).to(tl.float32)
    y = tl.load(piece + _places(c, h, p_b, p_m, p_c, p_h, M)[:, None] * _LANES + d, there, 0.0).to(tl.float32)
    ahead = b - a  # NaN where both saw nothing: those are 0 whatever they weigh
    weight = tl.where(ahead == ahead, 1 / (1 + tl.exp(-ahead)), 0.5)[:, None]
    both = tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(ahead)))
    tl.debug_barrier()  # several threads have read one lse: all must have, before one of them writes it
    tl.store(lse, tl.where(a == b, a + 0.6931471805599453, both), some)
    tl.store(out, x * (1 - weight) + y * weight, there)


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


def merge(out: Tensor, lse: Tensor, piece: Tensor, other: Tensor) -> None:
    """Merge a piece and its lse `other` into out and lse, in place."""
    _launch(_merge_kernel, (out, piece, lse, other), (out, piece), (lse, other))


def add(out: Tensor, one: Tensor, other: Tensor) -> None:
    """out = one + other."""
    _launch(_add_kernel, (out, one, other), (out, one, other), ())


def _launch(kernel, pointers: tuple[Tensor, ...], wide: tuple[Tensor, ...], narrow: tuple[Tensor, ...]) -> None:
    b, m, c, h, d = pointers[0].shape
    strides = [x // _LANES.value for tensor in wide for x in tensor.stride()[:4]]
    strides += [x for tensor in narrow for x in tensor.stride()]
    width = 1 << (d - 1).bit_length()
    rows = max(1, _TILE // width)
    with _compiling, torch.cuda.device_of(pointers[0]):
        kernel[-(-c * h // rows), b * m](*pointers, m, c, h, *strides, D=d, ROWS=rows, WIDTH=width)


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
            way.merge(*mine, other)
            way.add(total, out, mine[2])
            found.append((*mine[:2], total))
    except Exception as error:  # whatever a compiler may raise
        return f"{type(error).__name__}: {error}"
    wrong = [name for name, *x in zip(("out", "lse", "sum"), *found, strict=True) if not torch.allclose(*x, 1e-5, 1e-5)]
    return f"wrong {', '.join(wrong)}" if wrong else None
