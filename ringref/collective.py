"""Collective attention: K and V are gathered, dK and dV reduced and scattered; only the queries are
partitioned.
"""

from __future__ import annotations

from torch import Tensor

from .engine.attend import attend
from .engine.route import Trip
from .shard import Attended, Dilation, Shard, eagerly


@eagerly
def collective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens: Tensor | None = None,
    dilation: Dilation | None = None,
    mask_mod=None,
    score_mod=None,
    scale: float | None = None,
    shard: Shard | None = None,
    q_chunk: int | None = None,
    backend: str = "auto",
) -> Attended:
    """Attention on gathered keys; arguments, result and errors as for `dense_attention`.

    A rank holds all K and V, 2·n·d·g elements, and in the backward as many of dK and dV. It moves as
    many elements as the ring, dK and dV in the inputs' dtype, for no sum travels; with a dilation only
    a branch's rows are gathered, only among ranks that are linked by segments (see `ring_attention`).

    Under a window or documents a rank gathers only rows that its queries see: with contiguous shards and a causal
    window of w < n − 1, a rank whose shard starts at a receives b·g·(d + d_v)·min(w, a) elements in forward; of
    documents (`cu_seqlens`) that no shard boundary cuts, nothing.
    """
    return attend(
        gathering, "collective", q, k, v, causal=causal, window=window, cu_seqlens=cu_seqlens, dilation=dilation,
        mask_mod=mask_mod, score_mod=score_mod, scale=scale, shard=shard, q_chunk=q_chunk, backend=backend,
    )  # fmt: skip


def gathering(trip: Trip):
    """My own keys while the others' arrive, then theirs; gradients wait until all are computed."""
    ring, me = trip.ring, trip.ring.rank
    others = [member for member in range(ring.size) if member != me]
    asked, needed = {r: trip.gathered(me, r) for r in others}, {r: trip.gathered(r, me) for r in others}
    arrived = {r: trip.space(load) for r, load in needed.items()}
    arriving = ring.exchange(trip.pack_for(asked), arrived)
    yield trip.own
    arriving.wait()
    shares = {}
    for source, load in needed.items():
        gradients = yield trip.blocks(load, arrived[source])
        if gradients is not None:
            shares[source] = gradients.alone()
    yield None
    return ((asked[r], share) for r, share in ring.scatter(shares, lambda r: trip.space(asked[r]))) if shares else ()
