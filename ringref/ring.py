"""Ring attention (2310.01889): queries stay, keys and values travel round, gradients travel with
them and come home.
"""

from __future__ import annotations

from torch import Tensor

from .engine.attend import attend
from .engine.route import Trip
from .shard import Attended, Dilation, Shard, eagerly


@eagerly
def ring_attention(
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
    """Attention whose K and V travel rank to rank; arguments, result and errors as for
    `dense_attention`.

    A rank holds at most three blocks of K and V: its own, the one in hand and the one arriving (two
    at p = 2). Forward, it receives 2·d·g·(n − s) elements. With a dilation only a branch's rows that
    another rank's queries see travel, round the ranks that are linked by segments they share: on
    aligned shards at most 2·d·g·min(r, h/g)·(⌈w/r⌉ − ⌊s/r⌋) elements per branch with w > s, none when
    w divides s. Shards that cut segments anywhere link many ranks; there `dilated_attention` fetches
    less. The backward moves K and V again, and as many elements of dK and dV, which come home: in the
    inputs' dtype from the first rank to add to them, in float32 (float64 for float64) once they are sums.

    Under a window or documents a row travels no further than to the last rank that sees it, and its gradient goes
    home from there: with contiguous shards and a causal window of w < n − 1, a rank whose shard starts at a receives
    b·g·(d + d_v)·min(w, a) elements in forward, for whoever is further on needs none but those; of documents
    (`cu_seqlens`) that no shard boundary cuts, nothing.

    `q_chunk` bounds the query rows worked on at a time on this rank. `backend` is "auto", "math", "torch" or
    "xformers".
    """
    return attend(
        rotating, "ring", q, k, v, causal=causal, window=window, cu_seqlens=cu_seqlens, dilation=dilation,
        mask_mod=mask_mod, score_mod=score_mod, scale=scale, shard=shard, q_chunk=q_chunk, backend=backend,
    )  # fmt: skip


def rotating(trip: Trip):
    """My own keys, then those of the rank before me, the one before that …; their gradients follow one hop behind, and
    leave for home from the last rank that sees any of them. In the backward my own come last, under the message that
    brings my gradients home.
    """
    ring, me, p = trip.ring, trip.ring.rank, trip.ring.size
    after, before = (me + 1) % p, (me - 1) % p

    def load(back: int, hop: int):  # what travels at this hop of the keys of the rank so far before me
        return trip.load((me - back) % p, hop)

    arriving = ring.exchange({after: trip.pack(load(0, 1))}, {before: trip.space(load(1, 1))}) if p > 1 else None
    if not trip.backward:
        yield trip.own
    returning, home = None, None
    for hop in range(1, p):
        here, onward = load(hop, hop), load(hop, hop + 1)
        keys, arriving = arriving.wait()[before], None
        if hop < p - 1:  # posted before this block is computed, waited for after it
            keys_on = trip.pass_on(keys, onward.among(here))
            arriving = ring.exchange({after: keys_on}, {before: trip.space(load(hop + 1, hop + 1))})
            del keys_on
        gradients = yield trip.blocks(here, keys)
        keys = None  # before the gradients' buffers are made
        if not trip.backward:
            continue
        arrived = returning.wait() if returning else {}
        if len(here):
            came = arrived.get(before)
            gradients = gradients.onto(came, here.among(load(hop, 1))) if hop > 1 else gradients.alone()
        to = after if len(onward) else (me - hop) % p
        into = {before: trip.space(load(hop + 1, 1), summed=hop > 1)} if len(load(hop + 1, hop + 1)) else {}
        if len(load(0, hop)) and not len(load(0, hop + 1)):  # my own keys' gradients end their journey
            home = into[(me + hop) % p] = trip.space(load(0, 1), summed=hop > 1)
        returning = ring.exchange({to: gradients} if len(here) else {}, into)
        gradients = came = arrived = into = None
    if trip.backward:
        yield trip.own
    yield None
    if returning:
        returning.wait()
    return [(load(0, 1), home)] if home else []
