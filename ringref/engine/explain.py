"""Says what a call would do, and why."""

from __future__ import annotations

from torch import Tensor

from ..comm.ring import Ring
from ..shard import EVERYTHING
from .attend import meet, plan
from .call import agree
from .kernels import KERNELS, Kernel, Task, choose, fault
from .route import Trip, heads_of


def explain(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, causal: bool = False, window=None,
    cu_seqlens: Tensor | None = None, dilation=None, mask_mod=None, score_mod=None, scale=None, shard=None,
    q_chunk: int | None = None, backend: str = "auto", lse_gradient: bool = False,
) -> str:  # fmt: skip
    """Which kernel each kind of block on this rank takes (and in the backward, where that is another) and why not the
    others, and which keys travel between whom; one line each.

    A block that positions cut too finely for a kernel is masked, and goes to `math` whatever the
    backend. The arguments are the call's own (k as q and v as k where they are left out). `lse_gradient`: whether
    the backward will carry a gradient through lse. Under a shard every rank must ask, as for the
    call itself.
    """
    k = q if k is None else k
    v = k if v is None else v
    arguments = {"causal": causal, "window": window, "cu_seqlens": cu_seqlens, "dilation": dilation}
    arguments |= {"mask_mod": mask_mod, "score_mod": score_mod, "scale": scale, "shard": shard}
    kinds, ways = paths(q, k, v, **arguments, q_chunk=q_chunk, backend=backend)
    lines = []
    for kind, single in sorted(kinds):
        asked = {"lse_gradient": lse_gradient, "single": single, "scale": 1.0 if scale is None else scale}
        task = Task.of(q, v, kind, **asked)
        taken = choose(backend, task)
        back = choose(backend, task._replace(backward=True))
        lines.append(f"{kind} blocks{' of one query' * single}: {taken.name if taken else 'math'}")
        if back is not taken:
            lines.append(f"  backward: {back.name if back else 'math'}")
        lines += (f"  not {x.name}: {_why_not(x, task, backend)}" for x in KERNELS if x not in (taken, back))
    return "\n".join(lines + ways)


def _why_not(kernel: Kernel, task: Task, backend: str) -> str:
    failed = fault(kernel, task, ask=False) or fault(kernel, task._replace(backward=True), ask=False)
    excluded = None if backend in ("auto", kernel.family) else f"backend={backend!r} excludes it"
    return kernel.why_not(task) or excluded or failed or "is slower"


def _by(ring: Ring) -> str:
    """How messages travel where there is a choice: between GPUs."""
    if ring.transport not in ("peer", "nccl"):
        return ""
    why_not = getattr(ring, "unreachable", None)
    return f" by {ring.transport}" + (f" (not peer: {why_not})" if why_not else "")


def paths(q: Tensor, k: Tensor, v: Tensor, **arguments) -> tuple[set[tuple[str, bool]], list[str]]:
    """What a call would do: the kinds of its visits and whether any is of one query; and
    how its keys travel and its rows are read, a line per strand or set of strands. Every rank must ask.
    """
    call = agree("explain", q, k, v, able=lambda *_: None, **arguments)
    kinds, lines = set(), []
    for part in plan(call, q, k, forward=True):
        for route in part.routes:
            branches = sorted({(x.w, x.r) for x in route.strands})
            named = ", ".join("all keys" if w == EVERYTHING else f"w={w} r={r}" for w, r in branches)
            trip = Trip(call.ring, route, *(x[:, :, heads_of(part.kv_heads)] for x in (k, v)))
            loads = [trip.load(r, 1) for r in range(trip.ring.size)]
            way = f"travel among ranks {list(route.members)}{_by(call.ring)}"
            where = way if any(map(len, loads)) else "stay"
            others = loads[: trip.ring.rank] + loads[trip.ring.rank + 1 :]
            blocks = [*trip.own, *(block for load in others for block in trip.blocks(load, trip.space(load)))]
            met = [visit for block in blocks for visit in meet(call, part, block, q)]
            read = {"strided views" if x.queries.strided and x.keys.strided else "copied rows" for x in met}
            kinds |= {(x.kind, x.queries.c == 1) for x in met}
            count = f"{len(met)} visit{'s' if len(met) > 1 else ''}"
            visited = f"{count} ({', '.join(sorted({x.kind for x in met}))}) of {', '.join(sorted(read))}"
            lines.append(f"{named}: keys {where}; {visited if met else 'none are seen here'}")
    return kinds, list(dict.fromkeys(lines))
