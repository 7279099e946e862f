"""What people have, as the oracle calls it: an adapter takes their function, and gives `fn(q, k, v, *, causal, group)`.

    check(adapt.bhsd(my_attention), features={"causal"})

An adapter only renames and transposes; it does not repair. What it passes on beyond `causal` and `group` is what the
declared features add (see `ringref.oracle`). For other names and fixed arguments a lambda or `partial` is enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .sanitizer import entered, group_ranks

WRAPPERS = ("bhsd", "packed_qkv", "varlen", "interleaved_gqa", "single", "dilated", "grouped")


def name_of(fn: Any) -> str:
    """What a report calls a candidate."""
    if isinstance(fn, partial) and not hasattr(fn, "__qualname__"):
        return name_of(fn.func)
    return getattr(fn, "__qualname__", type(fn).__name__)


ARGUMENTS = {  # what people call an argument that is a feature here; "" is judged by none
    **dict.fromkeys(("scale", "softmax_scale", "sm_scale"), "scale"),
    **dict.fromkeys(("window", "window_size", "sliding_window"), "window"),
    **dict.fromkeys(("sink", "sinks", "s_aux", "attention_sink"), "sink"),
    **dict.fromkeys(("score_mod", "softcap", "logits_soft_cap", "alibi_slopes", "bias", "attn_bias"), "score_mod"),
    **dict.fromkeys(("mask_mod", "mask", "attn_mask", "attention_mask", "block_mask"), "mask"),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "seqlens"), "cu_seqlens"),
    **dict.fromkeys(("dropout", "dropout_p", "attn_dropout"), ""),
    "dilation": "dilation",
    "kv_positions": "kv",
    "deterministic": "deterministic",
}


def undeclared(fn: Any, features: set[str]) -> list[str]:
    """Arguments of a candidate, or of what an adapter has of it, that nobody judges with these features."""
    inner = fn.args[0] if isinstance(fn, partial) and fn.args and callable(fn.args[0]) else fn
    try:
        names = inspect.signature(inner).parameters
    except (TypeError, ValueError):  # not every callable tells
        return []
    fixed = getattr(fn, "keywords", {})
    return [name for name in names if name not in fixed and ARGUMENTS.get(name, "causal") not in {"causal", *features}]


def _adapter(call: Callable) -> Callable:
    """`adapter(fn, **fixed)` is `call` with these fixed: named after what it adapts, and with its convention."""

    def adapter(fn: Callable, **fixed: Any) -> Callable:
        candidate = partial(call, fn, **fixed)
        candidate.__qualname__ = f"{call.__name__}({name_of(fn)})"
        candidate.convention = fixed.get("heads", getattr(fn, "convention", "all"))
        return candidate

    adapter.__name__, adapter.__qualname__, adapter.__doc__ = call.__name__, call.__name__, call.__doc__
    return adapter


def _changed(result: Any, out: Callable, lse: Callable = lambda x: x) -> Any:
    """`out` done to the output, and `lse` to what may come with it."""
    return (out(result[0]), lse(result[1])) if isinstance(result, (tuple, list)) else out(result)


@_adapter
def bhsd(fn: Callable, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Any:
    """For a function over b h s d tensors; a second result, lse, stays b h s."""
    return _changed(fn(*(x.transpose(1, 2) for x in (q, k, v)), **told), lambda x: x.transpose(1, 2))


@_adapter
def packed_qkv(fn: Callable, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Any:
    """For a function over one tensor b s 3 h d."""
    if k.shape[2] != q.shape[2]:
        raise NotImplementedError("packed qkv has as many key/value heads as query heads")
    return fn(torch.stack([q, k, v], 2), **told)


@_adapter
def varlen(fn: Callable, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Any:
    """For a function over (T, h, d) with `cu_seqlens`, the batch laid end to end; lse, if any, is h T."""
    b, s = q.shape[:2]
    starts = s * torch.arange(b + 1, dtype=torch.int32, device=q.device)
    result = fn(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens=starts, **told)
    return _changed(result, lambda x: x.unflatten(0, (b, s)), lambda x: x.unflatten(1, (b, s)).transpose(0, 1))


@_adapter
def interleaved_gqa(fn: Callable, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Any:
    """For a function whose query head j uses key/value head j mod g: the query heads are put in its order and back."""
    g = k.shape[2]

    def swapped(x: Tensor, dim: int, inner: int) -> Tensor:
        return x.unflatten(dim, (-1, inner)).transpose(dim, dim + 1).flatten(dim, dim + 1)

    result = fn(swapped(q, 2, q.shape[2] // g), k, v, **told)
    return _changed(result, lambda x: swapped(x, 2, g), lambda x: swapped(x, 1, g))


@_adapter
def single(fn: Callable, q: Tensor, k: Tensor, v: Tensor, *, group: Any, **told: Any) -> Any:
    """For a function or module on one device, which knows no group: judged at p = 1 alone."""
    if len(group_ranks(group)) > 1:
        raise NotImplementedError("one device only")
    return fn(q, k, v, **told)


@_adapter
def dilated(make: Callable, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, group: Any, dilation: Any = None,
            heads: str = "all", flag: str = "is_causal") -> Any:  # fmt: skip
    """For a dilated-attention module on one device: `make(segment_lengths, dilation_rates)` builds it.

    `heads` is its convention, as `ringref.Dilation` names it; it is judged by that, and the report says so. `flag` is
    its name for causality.
    """
    w, r = (dilation.segment_lengths, dilation.dilation_rates) if dilation else ([q.shape[1]], [1])
    return single(make(list(w), list(r)))(q, k, v, group=group, **{flag: causal})


@_adapter
def grouped(
    make: Callable, q: Tensor, k: Tensor, v: Tensor, *, group: Any, argument="process_group", **told: Any
) -> Any:
    """For a class whose constructor takes the process group: `make(process_group=…)(q, k, v, causal=…)`."""
    return make(**{argument: group})(q, k, v, **told)


def context_parallel(*, rotate: str = "allgather") -> Callable:
    """PyTorch's `context_parallel` around scaled_dot_product_attention, experimental there; causal wants zigzag, and
    without causality any layout will do.

    `rotate` is how keys travel, "allgather" or "alltoall". PyTorch has rings for its CUDA kernels only.
    """

    def context_parallel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, group: Any) -> Tensor:
        if not q.is_cuda:
            raise NotImplementedError(
                "PyTorch's context_parallel has no ring for the CPU: it knows CUDA's flash, efficient and cuDNN "
                "kernels, not aten._scaled_dot_product_flash_attention_for_cpu"
            )
        if q.dtype == torch.float64:
            raise NotImplementedError("PyTorch's context_parallel has no ring for float64: its kernels take less")
        scope = partial(entered, group, rotate, causal, q.shape[1] * len(group_ranks(group)), q.device)
        return _Within.apply(scope, causal, q, k, v)

    return context_parallel


class _Within(torch.autograd.Function):
    """Attention whose forward and backward both run inside a context manager: the oracle calls them one at a time."""

    @staticmethod
    def forward(ctx: Any, scope: Callable, causal: bool, *qkv: Tensor) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in qkv]
        with torch.enable_grad(), scope():
            heads_first = (x.transpose(1, 2).contiguous() for x in leaves)
            out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
        ctx.scope, ctx.leaves, ctx.out = scope, leaves, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple:
        with ctx.scope():
            return None, None, *torch.autograd.grad(ctx.out, ctx.leaves, do)
