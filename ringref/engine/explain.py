"""Says what a call would do, and why."""

from __future__ import annotations

from torch import Tensor

from ..shard import EVERYTHING
from .attend import meet, plan
from .call import agree
from .kernels import KERNELS, Kernel, Task, choose
from .route import Trip, heads_of


def explain(
    q: Tensor, k: Tensor | None = None, *, causal: bool = False, dilation=None,
    mask_mod=None, scale=None, shard=None,
    q_chunk: int | None = None, backend: str = "auto", lse_gradient: bool = False,
) -> str:  # fmt: skip
    """Which kernel each kind of block on this rank takes and why not the others, and which keys
    travel between whom; one line each.

    A block that positions cut too finely for a kernel is masked, and goes to `math` whatever the
    backend. The arguments are the call's own (k as q where it is left out). `lse_gradient`: whether
    the backward will carry a gradient through lse. Under a shard every rank must ask, as for the
    call itself.
    """
    arguments = {"causal": causal, "dilation": dilation, "mask_mod": mask_mod, "scale": scale, "shard": shard}
    kinds, ways = paths(q, q if k is None else k, **arguments, q_chunk=q_chunk, backend=backend)
    lines = []
    for kind, single in sorted(kinds):
        task = Task(q.device.type, q.dtype, q.shape[-1], kind, lse_gradient, single, 1.0 if scale is None else scale)
        taken = choose(backend, task)
        lines.append(f"{kind} blocks{' of one query and one key' * single}: {taken.name if taken else 'math'}")
        for kernel in KERNELS:
            if kernel is not taken:
                lines.append(f"  not {kernel.name}: {kernel.why_not(task) or _passed_over(kernel, backend)}")
    return "\n".join(lines + ways)


def _passed_over(kernel: Kernel, backend: str) -> str:
    return "is slower" if backend in ("auto", kernel.family) else f"backend={backend!r} excludes it"


def paths(q: Tensor, k: Tensor, **arguments) -> tuple[set[tuple[str, bool]], list[str]]:
    """What a call would do: the kinds of its visits and whether any is of one query and one key; and
    how its keys travel and its rows are read, a line per strand or set of strands. Every rank must ask.
    """
    call = agree("explain", q, k, k, able=lambda *_: None, **arguments)
    kinds, lines = set(), []
    for part in plan(call, q, k, forward=True):
        for route in part.routes:
            branches = sorted({(x.w, x.r) for x in route.strands})
            named = ", ".join("all keys" if w == EVERYTHING else f"w={w} r={r}" for w, r in branches)
            where = "stay" if len(route.members) == 1 else f"travel among ranks {list(route.members)}"
            trip = Trip(call.ring, route, q.shape[2] // k.shape[2], *[k[:, :, heads_of(part.kv_heads)]] * 2)
            loads = [trip.load(r) for r in range(trip.ring.size) if r != trip.ring.rank]
            blocks = [*trip.own, *(block for load in loads for block in trip.blocks(load, trip.space(load)))]
            met = [x.visit for block in blocks for x in meet(call, part, block)]
            read = {"strided views" if x.queries.strided and x.keys.strided else "copied rows" for x in met}
            kinds |= {(x.kind, x.queries.c == x.keys.c == 1) for x in met}
            visited = f"{len(met)} visits ({', '.join(sorted({x.kind for x in met}))}) of {', '.join(sorted(read))}"
            lines.append(f"{named}: keys {where}; {visited if met else 'none are seen here'}")
    return kinds, list(dict.fromkeys(lines))
