"""What people have, as the oracle calls it: an adapter takes their function and gives `fn(q, k, v,
*, causal, group, …)`.

```python check(adapt.bhsd(my_attention), features={"causal"}) ``` An adapter only renames and
transposes; it does not repair. What it passes on beyond `causal` and `group` is what the declared
features add (see `ringref.oracle`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .sanitizer import entered, group_ranks


def _turned(x: Any, *dims: int) -> Any:
    return x.transpose(*dims) if isinstance(x, Tensor) else x


def bhsd(fn: Callable) -> Callable:
    """For a function over b h s d tensors; a second result, lse, stays b h s."""

    def candidate(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Any:
        result = fn(*(x.transpose(1, 2) for x in (q, k, v)), **told)
        if isinstance(result, tuple):
            return (_turned(result[0], 1, 2), *result[1:])
        return _turned(result, 1, 2)

    return candidate


def packed_qkv(fn: Callable) -> Callable:
    """For a function over one tensor b s 3 h d."""

    def candidate(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Any:
        if k.shape[2] != q.shape[2]:
            raise NotImplementedError("packed qkv has as many key/value heads as query heads")
        return fn(torch.stack([q, k, v], 2), **told)

    return candidate


def packed_kv(fn: Callable) -> Callable:
    """For a function over q and one tensor b s 2 g d."""

    def candidate(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Any:
        return fn(q, torch.stack([k, v], 2), **told)

    return candidate


def single(fn: Callable) -> Callable:
    """For a function or module on one device, which knows no group: judged at p = 1 alone."""

    def candidate(q: Tensor, k: Tensor, v: Tensor, *, group: Any, **told: Any) -> Any:
        if len(group_ranks(group)) > 1:
            raise NotImplementedError("one device only")
        return fn(q, k, v, **told)

    return candidate


def dilated(make: Callable, *, heads: str = "all", causal: str = "is_causal") -> Callable:
    """For a dilated-attention module on one device: `make(segment_lengths, dilation_rates)` builds
    it.

    `heads` is its convention, as `ringref.Dilation` names it; with "grouped" the difference to
    LongNet is reported as a convention. `causal` is its name for causality.
    """

    def candidate(q: Tensor, k: Tensor, v: Tensor, *, group: Any, dilation: Any, **told: Any) -> Any:
        if len(group_ranks(group)) > 1:
            raise NotImplementedError("one device only")
        module = make(list(dilation.segment_lengths), list(dilation.dilation_rates))
        return module(q, k, v, **{causal: told["causal"]})

    candidate.convention = heads
    return candidate


def grouped(make: Callable, *, argument: str = "process_group") -> Callable:
    """For a class whose constructor takes the process group: `make(process_group=…)(q, k, v,
    causal=…)`.
    """

    def candidate(q: Tensor, k: Tensor, v: Tensor, *, group: Any, **told: Any) -> Any:
        return make(**{argument: group})(q, k, v, **told)

    return candidate


def renamed(fn: Callable, **names: str) -> Callable:
    """For a function with other names: `renamed(f, group="process_group", causal="is_causal")`."""

    def candidate(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Any:
        return fn(q, k, v, **{names.get(name, name): value for name, value in told.items()})

    return candidate


def interleaved_gqa(fn: Callable) -> Callable:
    """For a function whose query head j uses key/value head j mod g: the query heads are put in its
    order and back.
    """

    def candidate(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Any:
        g = k.shape[2]
        result = fn(q.unflatten(2, (g, -1)).transpose(2, 3).flatten(2, 3), k, v, **told)
        out, *rest = result if isinstance(result, tuple) else (result,)
        out = out.unflatten(2, (-1, g)).transpose(2, 3).flatten(2, 3)
        return (out, rest[0].unflatten(1, (-1, g)).transpose(1, 2).flatten(1, 2)) if rest else out

    candidate.__qualname__ = getattr(fn, "__qualname__", repr(fn))
    return candidate


def varlen(fn: Callable) -> Callable:
    """For a function over (T, h, d) with `cu_seqlens`, the batch laid end to end; lse, if any, is h
    T.
    """

    def candidate(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Any:
        b, s = q.shape[:2]
        lengths = torch.arange(0, (b + 1) * s, s, dtype=torch.int32)[: b + 1]
        result = fn(*(x.reshape(b * s, *x.shape[2:]) for x in (q, k, v)), cu_seqlens=lengths, **told)
        out, *rest = result if isinstance(result, tuple) else (result,)
        out = out.unflatten(0, (b, s))
        return (out, rest[0].unflatten(1, (b, s)).transpose(0, 1)) if rest else out

    return candidate


def context_parallel(*, rotate: str = "allgather") -> Callable:
    """PyTorch's `context_parallel` around scaled_dot_product_attention; experimental there, and
    causal wants zigzag.

    `rotate` is how keys travel, "allgather" or "alltoall". PyTorch has it for its fused kernels, so
    on a CPU only where there is one (its flash attention).
    """

    def candidate(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, group: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        with entered(group, rotate, q.shape[2] * len(group_ranks(group))):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out.transpose(1, 2)

    return candidate


def bound(fn: Callable, **fixed: Any) -> Callable:
    """`fn` with keywords fixed; the report keeps its name."""
    made = partial(fn, **fixed)
    made.__qualname__ = getattr(fn, "__qualname__", repr(fn))
    return made
