"""Through every adapter right code passes, and a planted mistake is found."""

import math
from functools import partial

import pytest
import torch
from test_oracle import Sliced, gathering

from ringref.oracle import adapt, check


def heads_first(q, k, v, **told):
    out, lse = gathering(*(x.transpose(1, 2) for x in (q, k, v)), **told)
    return out.transpose(1, 2), lse


def out_alone(q, k, v, **told):
    return heads_first(q, k, v, **told)[0]


def packed(qkv, **told):
    return gathering(*qkv.unbind(2), **told)


def flat(q, k, v, *, cu_seqlens, **told):
    """One sequence after the other; lse is h T."""
    starts = cu_seqlens.tolist()
    done = [gathering(*(x[None, i:j] for x in (q, k, v)), **told) for i, j in zip(starts, starts[1:])]
    return torch.cat([out[0] for out, _ in done]), torch.cat([lse[0] for _, lse in done], 1)


def interleaved(q, k, v, **told):
    """Query head j uses key/value head j mod g."""
    times = q.shape[2] // k.shape[2]
    return gathering(q, k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1), **told)


class Module:
    """An object that is given its process group once."""

    def __init__(self, process_group, **told):
        self.told = {"group": process_group} | told

    def __call__(self, q, k, v, *, causal):
        return gathering(q, k, v, causal=causal, **self.told)


def local(q, k, v, *, causal, strict=False):
    """One device; `strict` hides a query's own key from all but the first."""
    i = torch.arange(q.shape[1])
    seen = (i[:, None] > i) | (i == 0) if strict else i[:, None] >= i
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1) if causal else scores.softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


class LongNet:
    """Dilated attention on one device by counting; `heads` is its convention, `offset` what it gets wrong."""

    def __init__(self, segment_lengths, dilation_rates, heads="all", offset=0):
        self.branches, self.heads, self.offset = list(zip(segment_lengths, dilation_rates)), heads, offset

    def __call__(self, q, k, v, is_causal):
        i, h = torch.arange(q.shape[1]), q.shape[2]
        groups = torch.arange(h).tensor_split(len(self.branches))
        times = torch.zeros(h, len(i), len(i))
        for branch, (w, r) in enumerate(self.branches):
            heads = torch.arange(h) if self.heads == "all" else groups[branch]
            offset = heads % r if self.heads == "all" else torch.full_like(heads, branch % r)
            kept = i % w % r == ((offset + self.offset) % r)[:, None]
            times[heads] += kept[:, :, None] & kept[:, None] & (i[:, None] // w == i // w)
        times = times * (i[:, None] >= i) if is_causal else times
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]) + times.log()
        blind = times.sum(-1, keepdim=True) == 0
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0).to(v.dtype)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)


ADAPTED = {  # the adapter, code that is right, the same with a mistake, what it declares
    "bhsd": (adapt.bhsd, heads_first, partial(heads_first, wrap=Sliced), {"causal", "gqa", "lse"}),
    "bhsd, out alone": (adapt.bhsd, out_alone, partial(out_alone, wrap=Sliced), {"causal"}),
    "packed_qkv": (adapt.packed_qkv, packed, partial(packed, wrap=Sliced), {"causal", "lse"}),
    "varlen": (adapt.varlen, flat, partial(flat, wrap=Sliced), {"causal", "gqa", "lse"}),
    "interleaved_gqa": (
        adapt.interleaved_gqa, interleaved, partial(interleaved, wrap=Sliced), {"causal", "gqa", "lse"}),
    "grouped": (adapt.grouped, Module, partial(Module, wrap=Sliced), {"causal", "gqa", "subgroup"}),
    "single": (adapt.single, local, partial(local, strict=True), {"causal"}),
    "dilated": (adapt.dilated, LongNet, partial(LongNet, offset=1), {"causal", "dilation"}),
    "dilated, grouped": (
        partial(adapt.dilated, heads="grouped"), partial(LongNet, heads="grouped"),
        partial(LongNet, heads="grouped", offset=1), {"causal", "dilation"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTED)
def test_right_code_passes_through_its_adapter_and_a_mistake_does_not(name, pool):
    adapter, right, wrong, features = ADAPTED[name]
    ranks = 1 if name.startswith(("single", "dilated")) else 3
    report = check(adapter(right), features=features, ranks=ranks, quick=True, pool=pool)
    assert report, str(report)
    assert report.candidate == f"{name.split(',')[0]}({adapt.name_of(right)})"
    assert bool(report.conventions) == (name == "dilated, grouped")
    report = check(adapter(wrong), features=features, ranks=ranks, quick=True, pool=pool, stop_after=1)
    assert report.findings, str(report)


def test_another_convention_has_to_be_declared(pool):
    told = {"features": {"causal", "dilation"}, "ranks": 1, "quick": True, "pool": pool}
    grouped = partial(LongNet, heads="grouped")
    assert not check(adapt.dilated(grouped), **told)
    report = check(adapt.dilated(grouped, heads="grouped"), **told)
    assert report and "grouped" in report.conventions[0] and "convention: " in str(report)


def test_heads_in_another_order_are_found_without_their_adapter(pool):
    report = check(interleaved, features={"causal", "gqa"}, ranks=2, quick=True, pool=pool, stop_after=3)
    assert "interleaved" in report.diagnosis, str(report)


def test_what_one_device_cannot_do_is_not_judged(pool):
    report = check(adapt.single(local), features={"causal"}, ranks=2, quick=True, pool=pool)
    assert report and {"full-p1", "causal-p1"} <= set(report.passed) and all(x.endswith("-p1") for x in report.passed)
    assert any("cases, refused: one device only" in line for line in report.not_judged)


def test_pytorch_context_parallel_is_declined_on_a_cpu_at_once(pool):
    report = check(adapt.context_parallel(), features={"causal"}, layout="zigzag", ranks=2, quick=True, pool=pool)
    assert not report and not report.findings and not report.passed
    assert any("aten._scaled_dot_product_flash_attention_for_cpu" in line for line in report.not_judged)
    assert "was not judged" in str(report) and report.seconds < 20
