"""What the field ships, judged without a GPU; the outcome is recorded for notebook 08.

    pip install -e '.[test,peers]'
    pip install --no-deps dilated-attention-pytorch==0.2.0 xformers==0.0.35  # it pins an older einops
    python -m pytest -m slow tests/test_peers.py

With a package missing nothing is judged or recorded. A finding is held against plain einsum on every rank, in the
oracle's absence, before it is written down.
"""

import functools
import importlib.metadata
import json
import math
import os
import platform
from datetime import date
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringref.comm.launch import launch
from ringref.oracle import adapt, check

RECORD = Path(__file__).parent.parent / "figures" / "data" / "oracle-peers-cpu.json"
COMMAND = "python -m pytest -m slow tests/test_peers.py"
PACKAGES = ("torch", "ring-attention-pytorch", "yunchang", "torchscale", "dilated-attention-pytorch", "xformers")

# ------------------------------------------------------------------------------------------ PyTorch


def flash(q, k, v, **told):
    """PyTorch's flash attention on b s h d."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **told).transpose(1, 2)


def gathered_keys(q, k, v, *, causal, group, wide=True):
    """Flash for the CPU on keys and values that were all-gathered in float32, or in their own dtype."""
    s, start, dtype = q.shape[1], dist.get_rank(group) * q.shape[1], q.dtype
    travel = torch.promote_types(dtype, torch.float32) if wide else dtype
    k, v = (funcol.all_gather_tensor_autograd(x.to(travel).contiguous(), 1, group).to(dtype) for x in (k, v))
    mask = torch.arange(k.shape[1]) <= torch.arange(start, start + s)[:, None]
    return flash(q, k, v, attn_mask=mask if causal else None)


class TemplatedRing(torch.autograd.Function):
    """The two ring templates under `context_parallel`, given the one kernel that a CPU has."""

    @staticmethod
    def forward(ctx, q, k, v, causal, group):
        from torch.distributed.tensor.experimental import _attention as experimental

        ctx.causal, ctx.group = causal, group
        experimental._cp_options.enable_load_balance = causal
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = experimental._templated_ring_attention(group, 2, op, q, k, v, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, do):
        from torch.distributed.tensor.experimental._context_parallel import _attention as experimental

        experimental._cp_options.enable_load_balance = ctx.causal
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        grads = experimental._templated_ring_attention_backward(
            ctx.group, 2, op, do.transpose(1, 2), "grad_out", *ctx.saved_tensors, ctx.causal, dropout_p=0.0
        )
        return *(x.transpose(1, 2) for x in grads[:3]), None, None


def templated_ring(q, k, v, *, causal, group):
    """Causal and balanced, which wants zigzag; without causality any layout will do."""
    if q.dtype == torch.float64:
        raise NotImplementedError("it accumulates in float32")
    return TemplatedRing.apply(q, k, v, causal, group)


# ---------------------------------------------------------------------------- ring-attention-pytorch


def ring_flash_attn(q, k, v, *, causal, group, striped=False):
    """As its own RingAttention calls it: a ring only where there is more than one rank."""
    from ring_attention_pytorch import ring_flash_attn

    ring = dist.get_world_size(group) > 1
    return ring_flash_attn(q, k, v, causal=causal, ring_reduce_col=ring, striped_ring_attn=striped and ring)


def zig_zag_attn(q, k, v, *, causal, group):
    from ring_attention_pytorch.zig_zag_attention import zig_zag_attn

    rank, p, half = dist.get_rank(group), dist.get_world_size(group), q.shape[1] // 2
    chunks = torch.arange(2 * p * half).view(2 * p, half)
    held = [torch.cat([chunks[r], chunks[2 * p - 1 - r]]) for r in range(p)]
    mask = torch.cat(held) <= held[rank][:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return zig_zag_attn(q, k, v, attn_mask=mask if causal else None).transpose(1, 2)


# ------------------------------------------------------------------------------------------ yunchang


def seq_all_to_all(q, k, v, *, causal, group, wide):
    """Its all-to-all over heads, around flash for the CPU, which may be given float32."""
    from yunchang.comm.all_to_all import SeqAllToAll4D

    if q.shape[2] % dist.get_world_size(group):
        raise NotImplementedError("an all-to-all over heads wants as many heads as ranks, or a multiple")
    q, k, v = (SeqAllToAll4D.apply(group, x, 2, 1, False) for x in (q, k, v))
    inside = torch.promote_types(q.dtype, torch.float32) if wide else q.dtype
    out = flash(*(x.to(inside) for x in (q, k, v)), is_causal=causal).to(q.dtype)
    return SeqAllToAll4D.apply(group, out, 1, 2, False)


def yunchang_ring(q, k, v, *, causal, group, kernel):
    from yunchang import ring_flash_attn_func
    from yunchang.kernels import AttnType

    try:
        return ring_flash_attn_func(q, k, v, causal=causal, group=group, attn_type=AttnType[kernel])
    except (AssertionError, NotImplementedError) as error:
        raise NotImplementedError(str(error).splitlines()[0]) from error


# -------------------------------------------------------------------------- modules for one device


def multihead(q, k, v, *, causal):
    """torchscale's MultiheadAttention with projections that do nothing."""
    from types import SimpleNamespace

    from torchscale.component.multihead_attention import MultiheadAttention

    b, s, h, d = q.shape
    module = MultiheadAttention(SimpleNamespace(multiway=False, xpos_rel_pos=False), h * d, h, self_attention=True).to(
        q.dtype
    )
    for x in module.parameters():
        torch.nn.init.eye_(x) if x.ndim == 2 else torch.nn.init.zeros_(x)
    mask = torch.full((s, s), -math.inf, dtype=q.dtype).triu(1) if causal else None
    return module(*(x.flatten(2) for x in (q, k, v)), attn_mask=mask)[0].view(b, s, h, d)


def grouped_heads(segment_lengths, dilation_rates):
    from dilated_attention_pytorch.dilated_attention import DilatedAttention

    module = DilatedAttention(segment_lengths, dilation_rates)

    def attention(q, k, v, is_causal):
        if any(q.shape[1] % w for w in segment_lengths):
            raise NotImplementedError("segment lengths must divide the sequence length")
        return module(q, k, v, is_causal=is_causal)

    return attention


# ------------------------------------------------------------------------- findings, checked by hand


def einsum_gradients(q, k, v, do, rows=slice(None)):
    """out, dq, dk, dv of softmax(q kᵀ/√d) v in float64, as far as the queries in `rows` go."""
    q, k, v, do = (x.double().requires_grad_() for x in (q, k, v, do))
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, rows], k) / math.sqrt(q.shape[-1])
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    out.backward(do[:, rows])
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def whole_problem(p, dtype=torch.float32, lift=0.0):
    """q, k, v, dO of 6 tokens a rank; `lift` is added to v and dO of the first half, taken from those of the second."""
    x = torch.randn(4, 2, 6 * p, 4, 8, generator=torch.Generator().manual_seed(0))
    x[2:] += lift * torch.where(torch.arange(6 * p) < 3 * p, 1, -1)[:, None, None]
    return x.to(dtype).unbind()


def run_alone(fn, problem, ring):
    """One rank's out, dq, dk, dv at contiguous positions, over plain gloo."""
    mine = slice(6 * ring.rank, 6 * ring.rank + 6)
    q, k, v, do = (x[:, mine].clone().requires_grad_() for x in problem)
    out = fn(q, k, v, causal=False, group=dist.group.WORLD)
    out.backward(do.detach())
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def apart(got, want):
    return float((got.double() - want).norm() / want.norm())


def by_hand(fn, problem, p):
    """What p ranks gave, what einsum gives, and how far apart they are."""
    got, want = launch(lambda ring: run_alone(fn, problem, ring), p), einsum_gradients(*problem)
    joined = {name: torch.cat([x[name] for x in got], 1) for name in want}
    return joined, want, {name: apart(joined[name], want[name]) for name in want}


def sums_swapped(fn):
    got, want, errors = by_hand(fn, whole_problem(3), 3)
    both = want["dk"] + want["dv"]
    assert max(errors["out"], errors["dq"], apart(got["dk"], both), apart(got["dv"], both.roll(-6, 1))) < 1e-5
    return (
        "out and dq are right. The dk that a rank gets is dk + dv of its shard, its dv is dk + dv of the next rank's "
        f"(relative errors {errors['dk']:.1f} and {errors['dv']:.1f} at p = 3; plain einsum gives the same two sums). "
        "After the last block ring_pass returns (received, sent), and the pair is unpacked as (dk, dv)."
    )


def own_queries_only(fn):
    got, want, errors = by_hand(fn, whole_problem(3), 3)
    shards = [slice(6 * rank, 6 * rank + 6) for rank in range(3)]
    own = [einsum_gradients(*whole_problem(3), rows=mine) for mine in shards]
    for name in ("dk", "dv"):
        kept = torch.cat([x[name][:, mine] for x, mine in zip(own, shards)], 1)
        assert max(errors["out"], errors["dq"], apart(got[name], kept)) < 1e-5
    return (
        "out and dq are right. dk and dv hold what the rank's own queries give; what the other ranks' queries give is "
        f"lost (relative errors {errors['dk']:.1f} and {errors['dv']:.1f} at p = 3; plain einsum over its own queries "
        "gives the same). The backward of AllGather takes its slice without a sum over ranks."
    )


def sums_in_bfloat16(fn):
    problem = whole_problem(8, torch.bfloat16, lift=4.0)
    narrow, wide = (by_hand(f, problem, 8)[2]["dv"] for f in (fn, gathered_keys))
    assert narrow > 1.5 * wide
    return (
        "in bfloat16 the gradients of 8 ranks are added in bfloat16: where they cancel, dv is off by "
        f"{narrow / wide:.1f} times what it is with keys gathered in float32, which passes (plain einsum agrees)."
    )


def the_kernel_sums_in_bfloat16(fn):
    """On one device, where no message is."""
    problem = whole_problem(24, torch.bfloat16)
    want, errors = einsum_gradients(*problem), []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v, do = (x.to(dtype, copy=True).requires_grad_() for x in problem)
        flash(q, k, v).backward(do.detach())
        errors.append(max(apart(x.grad.bfloat16(), want[name]) for name, x in (("dk", k), ("dv", v))))
    assert errors[0] > 1.5 * errors[1]
    return (
        "the all-to-all is right; the kernel inside it, PyTorch's flash for the CPU, adds dk and dv of its tiles of "
        f"queries in bfloat16. Alone, on one device with 144 tokens, it is off by {errors[0] / errors[1]:.1f} times "
        "what it is in float32 (plain einsum agrees)."
    )


# --------------------------------------------------------------------------------------- the record

CAUSAL = {"features": {"causal"}}
EVERY = {"features": {"causal", "gqa", "subgroup"}}
BALANCED = {**CAUSAL, "layout": "zigzag"}
RAP, DAP = "ring-attention-pytorch", "dilated-attention-pytorch"
PEERS = {  # name: (candidate, how to judge it, the verdict, and the check by hand where it is wrong)
    "PyTorch flash for CPU, keys gathered in float32": (gathered_keys, EVERY, "passes", None),
    "PyTorch flash for CPU, keys gathered in their own dtype": (
        functools.partial(gathered_keys, wide=False), EVERY, "is wrong", sums_in_bfloat16),
    "PyTorch context_parallel": (adapt.context_parallel(), BALANCED, "was not judged", None),
    "PyTorch context_parallel's ring templates on the CPU's flash kernel": (templated_ring, BALANCED, "passes", None),
    f"{RAP} ring_flash_attn": (
        adapt.interleaved_gqa(ring_flash_attn), {"features": {"causal", "gqa"}}, "is wrong", sums_swapped),
    f"{RAP} ring_flash_attn, striped": (
        functools.partial(ring_flash_attn, striped=True), {**CAUSAL, "layout": "striped"}, "is wrong", sums_swapped),
    f"{RAP} zig_zag_attn": (zig_zag_attn, BALANCED, "is wrong", own_queries_only),
    "yunchang SeqAllToAll4D around PyTorch flash for CPU in float32": (
        functools.partial(seq_all_to_all, wide=True), EVERY, "passes", None),
    "yunchang SeqAllToAll4D around PyTorch flash for CPU in the inputs' dtype": (
        functools.partial(seq_all_to_all, wide=False), EVERY, "is wrong", the_kernel_sums_in_bfloat16),
    "yunchang ring_flash_attn_func, FlashAttention": (
        functools.partial(yunchang_ring, kernel="FA"), CAUSAL, "was not judged", None),
    "yunchang ring_flash_attn_func, PyTorch kernels": (
        functools.partial(yunchang_ring, kernel="TORCH_FLASH"), CAUSAL, "was not judged", None),
    "torchscale MultiheadAttention (the index has no dilated one)": (
        adapt.single(multihead), {**CAUSAL, "ranks": 1}, "passes", None),
    f"{DAP} DilatedAttention": (
        adapt.dilated(grouped_heads, heads="grouped"), {"features": {"causal", "dilation"}, "ranks": 1},
        "was not judged", None),
}  # fmt: skip


def row(name, report, finding):
    verdict = "passes" if report else "is wrong" if report.findings else "was not judged"
    if report:
        finding = f"{len(report.passed)} cases; at most {max(report.margin.values()):.0%} of an error budget is used"
    if verdict == "was not judged":
        refusal = next(line.split("refused: ")[1] for line in report.not_judged if "refused: " in line)
        finding = refusal.split(". ")[0].rstrip(":")
    return {"candidate": name, "verdict": verdict, "finding": finding}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_field(pool):
    try:
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    except importlib.metadata.PackageNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")
    rows, wrong = [], {}
    for name, (fn, told, verdict, check_by_hand) in PEERS.items():
        report = check(fn, pool=pool, **told)
        rows.append(row(name, report, check_by_hand(fn) if check_by_hand else report.diagnosis))
        if rows[-1]["verdict"] != verdict:
            wrong[name] = str(report)
    assert not wrong, "\n\n".join(f"{name}:\n{text}" for name, text in wrong.items())
    facts = {"command": COMMAND, "machine": f"{os.cpu_count()} cores, {platform.machine()}", "versions": versions}
    record = facts | {"date": str(date.today()), "rows": rows}
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_context_parallel_on_gpus():
    """On all that it claims, over NCCL: causal in zigzag and full attention, in float32 and bfloat16."""
    rows, gpus = [], min(4, torch.cuda.device_count())
    for rotate in ("allgather", "alltoall"):
        told = {**BALANCED, "ranks": gpus, "backend": "nccl"}
        report = check(adapt.context_parallel(rotate=rotate), **told)
        print(report)
        rows.append(row(f"PyTorch context_parallel, {rotate}, {gpus} GPUs", report, report.diagnosis))
    device = torch.cuda.get_device_name()
    facts = {"command": "python -m pytest -m gpu tests/test_peers.py", "machine": f"{gpus} × {device}"}
    facts |= {"versions": {"torch": torch.__version__}, "date": str(date.today()), "rows": rows}
    slug = "-".join(device.lower().removeprefix("nvidia ").split()[:2])
    path = RECORD.with_name(f"oracle-peers-{slug}-x{gpus}.json")
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    assert all(x["verdict"] != "was not judged" for x in rows), rows
