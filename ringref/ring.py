"""Ring attention (2310.01889): queries stay, keys and values travel round, gradients travel with
them and come home.
"""

from __future__ import annotations

from torch import Tensor

from .engine.attend import Trip, attend
from .shard import Attended, Dilation, Shard


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    dilation: Dilation | None = None,
    mask_mod=None,
    scale: float | None = None,
    shard: Shard | None = None,
    q_chunk: int | None = None,
    backend: str = "auto",
) -> Attended:
    """Attention whose K and V travel rank to rank; arguments, result and errors as for
    `dense_attention`.

    A rank holds at most three blocks of K and V: its own, the one in hand and the one arriving (two
    at p = 2). Forward, it receives 2·d·g·(n − s) elements. With a dilation only a branch's rows that
    another rank's queries see travel, round the ranks that are linked by segments they share: on
    aligned shards at most 2·d·g·min(r, h/g)·(⌈w/r⌉ − ⌊s/r⌋) elements per branch with w > s, none when
    w divides s. Shards that cut segments anywhere link many ranks; there `dilated_attention` fetches
    less. The backward moves K and V again, and as many elements of dK and dV, which come home: in the
    inputs' dtype from the first rank to add to them, in float32 (float64 for float64) once they are sums.

    `q_chunk` bounds the query rows in work on this rank. `backend` is "auto", "math", "torch" or
    "xformers".
    """
    return attend(
        rotating, "ring", q, k, v, causal=causal, dilation=dilation, mask_mod=mask_mod,
        scale=scale, shard=shard, q_chunk=q_chunk, backend=backend,
    )  # fmt: skip


def rotating(trip: Trip):
    """My own keys, then those of the rank before me, the one before that …; their gradients follow
    one hop behind.
    """
    ring, p = trip.ring, trip.ring.size
    source = ring.rank
    arriving = ring.rotate(trip.pack(trip.load(source)), trip.space(trip.load(source - 1))) if p > 1 else None
    yield trip.own
    returning = None
    for hop in range(1, p):
        source = (ring.rank - hop) % p
        before = trip.load((source - 1) % p)
        keys, arriving = arriving.wait(), None
        if hop < p - 1:  # posted before this block is computed, waited for after it
            arriving = ring.rotate(keys, trip.space(before))
        gradients = yield trip.block(trip.load(source), keys)
        keys = None  # before the gradients' buffers are made
        if gradients is not None:
            gradients = gradients.onto(returning.wait()) if returning else gradients.alone()
            returning = ring.rotate(gradients, trip.space(before, summed=hop > 1))
    yield None
    # after p − 1 hops the next rank round is the owner
    return [(trip.load(ring.rank), returning.wait())] if returning else []
