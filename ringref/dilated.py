"""Dilated attention (LongNet, 2307.02486): each branch's rows are fetched directly from the ranks
of its segment.
"""

from __future__ import annotations

from torch import Tensor

from .engine.attend import attend
from .engine.route import Trip
from .shard import Attended, Dilation, Shard, eagerly


@eagerly
def dilated_attention(
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
    """Attention that fetches from each rank just the rows it needs; arguments, result and errors as
    for `dense_attention`.

    On aligned shards a rank receives in forward at most 2·d·g·min(r, h/g)·(⌈w/r⌉ − ⌊s/r⌋) elements
    per branch with w > s, whatever n is, and nothing when w divides s (LongNet's constant
    communication, section 3.1); under a causal mask less, for rows after its last query are not
    fetched. The backward fetches again and sends dK and dV back.

    Only rows that a rank's queries see are fetched: with contiguous shards and a causal window of w < n − 1, a rank
    whose shard starts at a receives b·g·(d + d_v)·min(w, a) elements in forward; of documents (`cu_seqlens`) that no
    shard boundary cuts, nothing.
    """
    return attend(
        fetching, "dilated", q, k, v, causal=causal, window=window, cu_seqlens=cu_seqlens, dilation=dilation,
        mask_mod=mask_mod, score_mod=score_mod, scale=scale, shard=shard, q_chunk=q_chunk, backend=backend,
    )  # fmt: skip


def fetching(trip: Trip):
    """My own keys while the others' arrive, then theirs; their gradients go straight back."""
    ring, me = trip.ring, trip.ring.rank
    others = [member for member in range(ring.size) if member != me]
    asked, needed = {r: trip.seen(me, r) for r in others}, {r: trip.seen(r, me) for r in others}
    arrived = {r: trip.space(load) for r, load in needed.items()}
    arriving = ring.exchange(trip.pack_for(asked), arrived)
    yield trip.own
    arriving.wait()
    shares = {}
    for source, load in needed.items():
        gradients = yield trip.blocks(load, arrived[source])
        if gradients is not None:
            shares[source] = gradients.alone()
    home = {r: trip.space(load) for r, load in asked.items()} if shares else {}
    returning = ring.exchange(shares, home) if shares else None
    yield None
    if returning:
        returning.wait()
    return [(asked[r], share) for r, share in home.items()]
