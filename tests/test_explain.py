"""What `explain` says is what then happens: which kernels run, and whether keys travel."""

import re
import sys
import threading
import warnings

import pytest
import torch
from common import DILATIONS, LAYOUTS, Split, error, layout, sweep, window

import ringref
from ringref import Dilation, explain, partition, ring_attention, simulate
from ringref.engine import kernels
from ringref.lab.memory import measured

N, H, D = 64, 4, 8


def softcap(score, b, h, q_idx, kv_idx):
    return 5 * torch.tanh(score / 5)


@pytest.fixture
def ran(monkeypatch):
    """thread -> (kind, kernel) of each block that it computed."""
    seen, kernel_of = {}, kernels._kernel

    def spy(q, v, what, *rest):
        kernel = kernel_of(q, v, what, *rest)
        seen.setdefault(threading.get_ident(), set()).add((what.kind, kernel.name if kernel else "math"))
        return kernel

    monkeypatch.setattr(kernels, "_kernel", spy)
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dilation", [*DILATIONS.values(), Dilation([8, 16], [1, 2])], ids=[*DILATIONS, "inside"])
@pytest.mark.parametrize("p", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_explain_says_what_happens(p, dilation, name, ran):
    split = Split(layout(name, N, p))
    calls = {"causal": {"causal": True}, "full": {}, "mask": {"mask_mod": window}}
    calls |= {"window": {"window": (9, 2)}, "narrow": {"window": (0, 0)}, "score_mod": {"score_mod": softcap}}
    if name != "decoding":  # whose queries go beyond the last document
        ends = torch.tensor([0, 3, 16, 16, 17, 40, 64])
        calls |= {
            "documents": {"cu_seqlens": ends},
            "packed": {"cu_seqlens": ends, "window": (4, None), "causal": True},
        }
        calls |= {"uncut": {"cu_seqlens": torch.arange(0, N + 1, N // 8), "causal": True}}
    calls |= {"a scale of -1": {"causal": True, "scale": -1.0}, "torch": {"causal": True, "backend": "torch"}}

    def on(ring, how):
        shard = split.shard(ring)
        q, k, v = (torch.randn(1, len(x), H, D) for x in (shard.positions, shard.kv_positions, shard.kv_positions))
        said = explain(q, k, shard=shard, dilation=dilation, **how)
        ringref.ring_attention(q, k, v, shard=shard, dilation=dilation, **how)
        return said, ran.pop(threading.get_ident(), set()), ring.traffic.received

    for what, how in calls.items():
        found = simulate(lambda ring, how=how: on(ring, how), p)
        for said, taken, moved in found:
            assert set(re.findall(r"^(\w+) blocks.*: (\w+)$", said, re.M)) == taken, (what, said)
            assert "keys travel" in said or not moved, (what, said)
        travels = any("keys travel" in said for said, *_ in found)  # some ranks may have nothing to ask
        assert travels == any(moved for *_, moved in found), (what, found)


@pytest.mark.parametrize("layout, visits", [("contiguous", [1, 2, 3, 4]), ("zigzag", [4] * 4)])
def test_neighbouring_offsets_travel_and_meet_as_one(layout, visits):
    """Four heads with four offsets: one visit of each rank whose keys are seen, not four."""
    q, dilation = torch.randn(1, 64, 4, 8), Dilation([64], [8])

    def on(ring, h=4):
        shard = partition(64, ring, layout)
        mine, keys = shard.take(q), shard.take(q)[:, :, :h]
        return explain(mine, keys, shard=shard, causal=True, dilation=dilation)

    def count(found):
        return [int(re.search(r"(\d+) visit", said)[1]) for said in found]

    assert count(simulate(on, 4)) == visits
    if layout == "contiguous":  # two heads of keys have rows for two offsets each, which do not lie side by side
        assert count(simulate(lambda ring: on(ring, 2), 4))[-1] > 4


def test_explain_gives_reasons():
    q = torch.zeros(1, 8, 4, 16)
    said = explain(q, causal=True)
    assert said.startswith("causal blocks: cpu_flash\n  not cudnn: runs on cuda, not on cpu")
    assert said.endswith("all keys: keys stay; 1 visit (causal) of strided views")
    assert "not cpu_flash: backend='math' excludes it" in explain(q, backend="math")
    assert "not cpu_flash: needs a scale of at least 1.2e-38" in explain(q, scale=0.0)
    assert "not cpu_flash: takes full and causal blocks, not a mask" in explain(q, mask_mod=lambda *_: True)
    split = Split(layout("uneven", 8, 4))  # whose last shard is empty
    nothing = lambda ring: explain(q[:, : len(split.shard(ring).positions)], shard=split.shard(ring))
    assert simulate(nothing, 4)[3] == "all keys: keys stay; none are seen here"


def test_the_transport_between_gpus_is_said():
    def on(ring):
        ring.transport, ring.unreachable = "nccl", "rank 1 (accept): no peer access"
        shard = ringref.partition(8, ring)
        return explain(torch.zeros(1, 4, 4, 16), shard=shard)

    assert "keys travel among ranks [0, 1] by nccl (not peer: rank 1 (accept): no peer access)" in simulate(on, 2)[0]


def broken(out=1.0, dq=1.0):
    """CPU flash with results that are off by factors."""
    good = next(x for x in kernels.KERNELS if x.name == "cpu_flash")

    def forward(*how):
        found, lse = good.forward(*how)
        return found * out, lse

    def backward(*how):
        first, *others = good.backward(*how)
        return first * dq, *others

    return good._replace(name="broken", forward=forward, backward=backward)


@pytest.fixture
def asked(monkeypatch):
    """(kernel, backward) of each proof that is asked for, in a process that has asked for none."""
    seen, ask = [], kernels._ask
    monkeypatch.setattr(kernels, "_faults", {})
    monkeypatch.setattr(
        kernels, "_ask", lambda kernel, task: (seen.append((kernel.name, task.backward)), ask(kernel, task))[1]
    )
    yield seen
    kernels._admitted.cache_clear()


def use(monkeypatch, *some):
    monkeypatch.setattr(kernels, "KERNELS", some)
    kernels._admitted.cache_clear()


def test_who_comes_after_the_chosen_is_not_asked(monkeypatch, asked):
    """To ask xFormers is to import it."""

    def why_not(task):
        raise AssertionError

    use(monkeypatch, kernels.KERNELS[-1], kernels.KERNELS[-1]._replace(name="the next", why_not=why_not))
    assert kernels.choose("auto", kernels.Task("cpu", torch.float32, 8, "full")).name == "cpu_flash"


def test_a_library_that_breaks_on_import_is_told_as_a_reason(monkeypatch, tmp_path):
    broken = tmp_path / "xformers"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('built for another CUDA')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    assert kernels._xformers_missing.__wrapped__() == "xformers cannot be imported (built for another CUDA)"


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:]
)
@pytest.mark.parametrize("d", [1, 8, 64, 256])
def test_a_good_kernel_is_never_found_wrong(d, dtype, asked):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, backward, dlse in (("full", False, False), ("causal", True, False), ("full", True, True)):
            assert (
                kernels.choose("auto", kernels.Task("cpu", dtype, d, kind, dlse, backward=backward)).name == "cpu_flash"
            )
    assert len(asked) == 3


@pytest.mark.parametrize("wrong", [{"out": 1.01}, {"dq": float("nan")}, {"dq": float("inf")}, {"dq": 1.01}])
def test_a_kernel_that_fails_its_proof_is_passed_over_with_a_warning(wrong, monkeypatch, asked):
    good = next(x for x in kernels.KERNELS if x.name == "cpu_flash")
    use(monkeypatch, broken(**wrong), good)
    q, k, v = (torch.randn(1, 10, 2, 8, requires_grad=True) for _ in range(3))
    ((name, factor),) = wrong.items()
    said = f"gave a {name} that is {'off by 0.01' if factor == 1.01 else 'not finite'}"
    with pytest.warns(
        RuntimeWarning, match=f"broken is passed over for torch.float32, head dim 8, full blocks: it {said}"
    ):
        ringref.ring_attention(q, k, v).out.sum().backward()
    told = explain(q)
    if name == "dq":
        assert told.startswith("full blocks: broken\n  backward: cpu_flash\n")
    else:
        assert told.startswith("full blocks: cpu_flash\n  backward: broken\n")
    want = {
        "out": [("broken", False), ("cpu_flash", False), ("broken", True)],
        "dq": [("broken", False), ("broken", True), ("cpu_flash", True)],
    }
    assert asked == want[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is asked once in a process
        ringref.ring_attention(q, k, v).out.sum().backward()
    assert asked[: len(want[name])] == want[name]
    # what the caller gets is right all the same
    true = torch.autograd.grad(ringref.dense_attention(q, k, v).out.square().sum(), (q, k, v))
    ours = torch.autograd.grad(ringref.ring_attention(q, k, v).out.square().sum(), (q, k, v))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(ours, true, strict=True))


def test_a_kernel_that_raises_is_passed_over(monkeypatch, asked):
    def refuse(*_):
        raise RuntimeError("no plan")

    use(monkeypatch, broken()._replace(forward=refuse))
    with pytest.warns(RuntimeWarning, match="it raised 'no plan' on 37 queries and 192 keys"):
        ringref.ring_attention(*[torch.randn(1, 4, 2, 8)] * 3)
    with pytest.raises(NotImplementedError, match="backend='torch' cannot do this: broken raised 'no plan'"):
        ringref.ring_attention(*[torch.randn(1, 4, 2, 8)] * 3, backend="torch")


def test_nothing_is_asked_where_its_answer_would_be_counted_or_faked(asked):
    from torch._subclasses.fake_tensor import FakeTensorMode

    q = torch.randn(1, 4, 2, 8)
    with measured():
        ringref.ring_attention(q, q, q)
    ringref.ring_attention(*[torch.empty(1, 4, 2, 8, device="meta")] * 3)
    with FakeTensorMode():
        x = torch.empty(1, 1, 4, 2, 8)
        kernels.choose("auto", kernels.Task(x.device.type, x.dtype, 8, "full"))
    assert not asked
    ringref.ring_attention(q, q, q)
    assert asked == [("cpu_flash", False)]


def test_a_limit_is_not_asked(asked):
    said = explain(torch.zeros(1, 8, 4, 16), mask_mod=lambda *_: True)
    assert "not cpu_flash: takes full and causal blocks" in said and not asked
    cudnn = kernels.KERNELS[0]
    for single, reason in ((True, "needs more than one query: on one its backward returns NaN"), (False, None)):
        found = cudnn.why_not(kernels.Task("cuda", torch.bfloat16, 64, "full", single=single))
        assert found is reason or found.startswith(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cpu_flash_is_right_whatever_the_lengths_and_scores(dtype):
    kernel = next(x for x in kernels.KERNELS if x.name == "cpu_flash")
    calls, wrong = sweep(kernel, dtype, 64, "cpu", (1, 2, 37, 64, 192), (1, 7, 63, 64, 65, 128, 192, 320))
    assert calls == 4 * (5 * 8 + 8) and not wrong
    assert sweep(broken(dq=1.5), dtype, 64, "cpu", (2,), (7,))[1]


@pytest.mark.parametrize("dtype", kernels.HALF, ids=str)
def test_cpu_flash_rounds_no_more_than_math_does(dtype):
    x = [torch.randn(1, 512, 2, 64, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)]

    def gradients(dtype, backend):
        *inputs, dout = (each.to(dtype, copy=True).requires_grad_() for each in x)
        out = ring_attention(*inputs, backend=backend).out
        return torch.autograd.grad(out, inputs, dout.detach())

    true = gradients(torch.float64, "math")
    fused, plain = ([error(*both) for both in zip(gradients(dtype, y), true, strict=True)] for y in ("torch", "math"))
    assert all(a <= 1.2 * b for a, b in zip(fused, plain, strict=True)), (fused, plain)
