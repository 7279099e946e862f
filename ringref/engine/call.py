"""One attention call: its arguments, checked here and against every other rank's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from ..comm.ring import Ring
from ..shard import Dilation, Shard, Table, alone, counted, meet

BACKENDS = ("auto", "math", "torch", "xformers")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def exactly(step: Callable) -> Callable:
    """`step` without autocast: mixed precision is the caller's choice of q, k and v, not of what is
    computed with them.
    """

    @wraps(step)
    def run(*args):
        device = next((x.device.type for x in args if isinstance(x, Tensor)), None)
        if device is None or not torch.amp.is_autocast_available(device):
            return step(*args)
        with torch.autocast(device, enabled=False):
            return step(*args)

    return run


class Call(NamedTuple):
    """One attention call as all ranks agreed upon it."""

    causal: bool
    dilation: Dilation | None
    mask_mod: Callable | None
    scale: float
    q_chunk: int | None
    backend: str
    ring: Ring
    table: Table
    anchor: Tensor | None  # makes autograd visit this rank's backward when only its neighbours need a gradient

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """What `mask_mod` says of these indices: booleans of four dimensions that broadcast to b h
        q k.
        """
        keep = torch.as_tensor(self.mask_mod(b, h, q_idx, kv_idx), device=q_idx.device)
        if keep.dtype != torch.bool:
            raise TypeError(f"mask_mod must return booleans (True: the key is seen), got {keep.dtype}")
        full = (len(b), h.shape[1], q_idx.shape[2], kv_idx.shape[3])
        if keep.dim() > 4 or any(x not in (1, y) for x, y in zip(keep.shape[::-1], full[::-1], strict=False)):
            raise ValueError(f"mask_mod must return what broadcasts to b h q k = {full}, got shape {tuple(keep.shape)}")
        return keep[(None,) * (4 - keep.dim())]


_WORDS = ("method", "batch (dim 0 of q)", "heads (dim 2 of q)", "key/value heads (dim 2 of k)", "head dim", "dtype")
_WORDS += ("device", "causal", "scale", "dilation", "mask_mod", "backend", "grad mode")


def agree(method: str, q, k, v, *, able, causal, dilation, mask_mod, scale, shard, q_chunk, backend) -> Call:
    """Check the arguments here and against every other rank's; any rank's mistake is an error on
    all of them.

    `able(q, backend, masked, scale)` raises where the backend cannot do it.
    """
    if shard is not None and not isinstance(shard, Shard):
        raise TypeError(f"shard must be a Shard (see partition) or None, got {type(shard).__name__}")

    def factor() -> float:
        return q.shape[-1] ** -0.5 if scale is None else float(scale)

    def say():
        _check(q, k, v, causal, dilation, mask_mod, scale, shard, q_chunk, backend)
        able(q, backend, mask_mod is not None, factor())
        shape = q.shape[0], q.shape[2], k.shape[2], q.shape[3]
        words = [method, *shape, str(q.dtype), q.device.type, causal, factor(), dilation, mask_mod is not None, backend]
        grad = torch.is_grad_enabled()
        return [*words, grad], grad and any(x.requires_grad for x in (q, k, v))

    if shard is None:
        _, needs = say()
        ring, table = alone(), Table((counted(q.shape[1]),), (counted(k.shape[1]),))
    else:
        needs, table = meet(shard, _WORDS, say)
        ring = shard.ring
    anchor = torch.zeros((), requires_grad=True) if needs and ring.size > 1 else None
    return Call(causal, dilation, mask_mod, factor(), q_chunk, backend, ring, table, anchor)


def _check(q, k, v, causal, dilation, mask_mod, scale, shard, q_chunk, backend) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor b s h d, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have the four dimensions b s h d, got shape {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} and q is {q.dtype} on {q.device}; they must be alike")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    (b, s, h, d), (kb, ks, g, kd) = q.shape, k.shape
    if b != kb or d != kd:
        raise ValueError(f"k: batch and head dim must be q's, {b} and {d}, got {kb} and {kd}")
    if not (h and g and d) or h % g:
        raise ValueError(
            f"k has {g} heads and q {h}: the key/value heads must divide the query heads, and d = {d} be ≥ 1"
        )
    if shard is not None and (s, ks) != (len(shard.queries), len(shard.keys)):
        held = f"{len(shard.queries)} query and {len(shard.keys)} key positions"
        raise ValueError(f"shard has {held}, but q has {s} rows and k has {ks}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    if dilation is not None and not isinstance(dilation, Dilation):
        raise TypeError(f"dilation must be a Dilation or None, got {type(dilation).__name__}")
    if mask_mod is not None and not callable(mask_mod):
        raise TypeError(f"mask_mod must be a function (b, h, q_idx, kv_idx) -> keep, got {type(mask_mod).__name__}")
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale)
    ):
        raise ValueError(f"scale must be a finite number or None (1/√d), got {scale!r}")
    if q_chunk is not None and (isinstance(q_chunk, bool) or not isinstance(q_chunk, int) or q_chunk < 1):
        raise ValueError(f"q_chunk must be a positive number of query rows or None, got {q_chunk!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
