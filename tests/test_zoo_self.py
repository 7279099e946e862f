"""The zoo is what it says: its correct sources are correct, its mutants are small and wrong.

Nothing here imports ringref: the judge of this file is the einsum softmax in `dense` below.
"""

import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait as wait_for
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import zoo

INF = float("inf")


@dataclass(frozen=True)
class Case:
    name: str
    p: int = 2
    needs: frozenset = frozenset()
    lengths: tuple = ()  # uneven shards; otherwise every rank holds s tokens
    s: int = 6
    b: int = 2
    h: int = 4
    g: int = 4
    d: int = 8
    causal: bool = True
    dtype: torch.dtype = torch.float64
    window: tuple = None
    mask: str = None
    dilation: tuple = None
    ranks: tuple = None  # members of a subgroup, as global ranks
    calls: str = "one"
    packed: bool = False  # q, k, v are views of one tensor
    logits: float = 1.0  # scale of q
    low: float = 0.0  # added to every score
    zeros: bool = False  # every third row of q is zero
    strided: bool = False  # dO is a transposed view
    e: int = 0  # head dim of v, if not d
    m: int = 0  # tokens that ask, the last of n, if not all
    scale: float = None
    cu_seqlens: tuple = None
    score_mod: str = None
    sink: bool = False
    seed: int = field(default=0, compare=False)

    @property
    def n(self):
        return sum(self.lengths) if self.lengths else self.p * self.s

    @property
    def members(self):
        return self.ranks or tuple(range(self.p))


SCORE_MODS = {"capped": lambda score, b, h, q, kv: 2 * torch.tanh(score / 2) - 0.1 * (h + 1) * (q - kv).abs()}
STORED = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.6
MASKS = {
    "padding": lambda b, h, q, kv: kv < 9,
    "stored": lambda b, h, q, kv: STORED,
    "documents": lambda b, h, q, kv: q // 5 == kv // 5,
    "blind": lambda b, h, q, kv: (q % 3 != 0) & ((q + kv + h + b) % 4 != 0),
}


def positions_of(case, layout, rank):
    if case.lengths:
        start = sum(case.lengths[:rank])
        return torch.arange(start, start + case.lengths[rank])
    if layout == "zigzag" and case.p > 1:
        chunks = torch.arange(case.n).chunk(2 * case.p)
        return torch.cat((chunks[rank], chunks[2 * case.p - 1 - rank]))
    if layout == "striped":
        return torch.arange(rank, case.n, case.p)
    return torch.arange(rank * case.s, (rank + 1) * case.s)


def queries_of(case, layout, rank):
    """Which of the m queries a rank has: its own tokens, or an equal part of the last m."""
    return torch.arange(case.m).chunk(case.p)[rank] if case.m else positions_of(case, layout, rank)


def whole(case, call):
    """q, k, v, dout, dlse, sink of the whole sequence, the same on every process."""
    gen = torch.Generator().manual_seed(1000 * call + case.seed)
    m, e = case.m or case.n, case.e or case.d
    shapes = (m, case.h, case.d), (case.n, case.g, case.d), (case.n, case.g, e), (m, case.h, e)
    q, k, v, dout = (torch.randn(case.b, *s, generator=gen, dtype=torch.float64) for s in shapes)
    dlse = torch.randn(case.b, case.h, m, generator=gen, dtype=torch.float64)
    if case.low:
        q[..., 0], k[..., 0] = case.low * case.d**0.5, 1.0
    if case.zeros:
        q[:, ::3] = 0.0
    # what a low precision candidate is given is what the reference is given
    q, k, v, dout = (x.to(case.dtype).double() for x in (q * case.logits, k, v, dout))
    return q, k, v, dout, dlse, torch.randn(case.h, generator=gen, dtype=torch.float64)


def as_object(dilation):
    if dilation is None:
        return None
    lengths, rates, *heads = dilation
    heads = heads[0] if heads else "all"
    return SimpleNamespace(segment_lengths=lengths, dilation_rates=rates, heads=heads)


def dense(case, call=0):
    """Softmax attention over the whole sequence, every mask written out; log m for m branches."""
    q, k, v, dout, dlse, sink = whole(case, call)
    m = case.m or case.n
    i, j = torch.arange(case.n - m, case.n)[:, None], torch.arange(case.n)[None, :]
    count = torch.ones(case.b, case.h, m, case.n, dtype=torch.float64)
    if case.causal:
        count = count * (j <= i)
    if case.window is not None:
        left, right = case.window
        count = count * ((j >= i - left) | (left < 0)) * ((j <= i + right) | (right < 0))
    b, head = torch.arange(case.b).view(-1, 1, 1, 1), torch.arange(case.h).view(-1, 1, 1)
    if case.cu_seqlens is not None:
        document = torch.repeat_interleave(torch.tensor(case.cu_seqlens).diff())
        count = count * (document[i] == document[j])
    if case.mask is not None:
        count = count * MASKS[case.mask](b, head, i, j)
    if case.dilation is not None:
        seen = torch.zeros(case.h, case.n, case.n, dtype=torch.float64)
        dilation = as_object(case.dilation)
        branches = list(zip(dilation.segment_lengths, dilation.dilation_rates))
        groups = torch.arange(case.h).tensor_split(len(branches))
        for number, (w, r) in enumerate(branches):
            for head in range(case.h):
                offset = head % r
                if dilation.heads == "grouped":
                    offset = number % r
                    if head not in groups[number]:
                        continue
                kept = torch.arange(case.n) % w % r == offset
                seen[head] += kept[:, None] & kept[None, :] & (i // w == j // w)
        count = count * seen
    leaves = [x.requires_grad_() for x in (q, k, v)]
    repeat = case.h // case.g
    wide_k, wide_v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, wide_k) * (case.scale or case.d**-0.5)
    if case.score_mod:
        logits = SCORE_MODS[case.score_mod](logits, b, head, i, j)
    top = logits.detach().masked_fill(count == 0, -INF).amax(-1, keepdim=True)
    top = top.masked_fill(top == -INF, 0.0)
    weight = count * torch.exp((logits - top).masked_fill(count == 0, 0.0))
    total = weight.sum(-1, keepdim=True)
    if case.sink:
        total = total + torch.exp(sink.view(1, -1, 1, 1) - top)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)
    out = torch.einsum("bhij,bjhd->bihd", weight / total, wide_v)
    lse = (total.log() + top).squeeze(-1)
    lse = lse.masked_fill(blind.squeeze(-1), 0.0)
    return leaves, out, lse, blind.squeeze(-1), dout, dlse


def reference(case, layout, with_lse, call=0):
    """Per rank: out, lse, dq, dk, dv."""
    leaves, out, lse, blind, dout, dlse = dense(case, call)
    loss = (out * dout).sum()
    if with_lse:
        loss = loss + (lse * dlse).sum()
    grads = torch.autograd.grad(loss, leaves)
    lse = lse.detach().masked_fill(blind, -INF)
    ranks = []
    for rank in range(case.p):
        asks, mine = queries_of(case, layout, rank), positions_of(case, layout, rank)
        part = {"out": out.detach()[:, asks], "lse": lse[:, :, asks]}
        part.update(zip(("dq", "dk", "dv"), (x[:, rows] for x, rows in zip(grads, (asks, mine, mine)))))
        ranks.append(part)
    return ranks


def evaluate(candidate, case, layout, group, backward=True):
    """Runs in a worker: what a user's two training steps would see, in plain tensors."""
    asks, mine = (of(case, layout, dist.get_rank(group)) for of in (queries_of, positions_of))
    options = {"causal": case.causal, "group": group}
    if case.window is not None:
        options["window"] = case.window
    if case.mask is not None:
        options["mask_mod"] = MASKS[case.mask]
    if case.dilation is not None:
        options["dilation"] = as_object(case.dilation)
    if case.lengths:
        options["positions"] = mine.clone()
    if case.m:
        options |= {"positions": asks + case.n - case.m, "kv_positions": mine.clone()}
    if case.scale is not None:
        options["scale"] = case.scale
    if case.cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    if case.score_mod:
        options["score_mod"] = SCORE_MODS[case.score_mod]
    results = []

    def forward(call):
        q, k, v, dout, dlse, sink = whole(case, call)
        q, k, v, dout = (x[:, rows].to(case.dtype) for x, rows in zip((q, k, v, dout), (asks, mine, mine, asks)))
        if case.sink:
            options["sink"] = sink
        if case.strided:
            dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
        if case.packed:
            packed = torch.stack((q, k, v), dim=2)
            q, k, v = packed.unbind(2)
        kept = [x.clone() for x in (q, k, v, mine, STORED)]
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        got = candidate(*leaves, **options)
        out, lse = got if isinstance(got, tuple) else (got, None)
        return leaves, kept, out, lse, dout, dlse[:, :, asks]

    def finish(leaves, kept, out, lse, dout, dlse):
        result = {"out": out.detach().clone()}
        if lse is not None:
            result["lse"] = lse.detach().clone()
        if backward:
            outputs, grads = (out,), (dout,)
            if lse is not None:
                outputs, grads = (out, lse), (dout, dlse.to(lse.dtype))
            dq, dk, dv = torch.autograd.grad(outputs, leaves, grads)
            result.update(dq=dq.clone(), dk=dk.clone(), dv=dv.clone())
        now = [*leaves, mine, STORED]
        result["written"] = not all(torch.equal(a, b) for a, b in zip(now, kept))
        STORED.copy_(kept[-1])
        results.append(result)

    if case.calls == "two forwards":
        states = [forward(0), forward(1)]
        for state in states:
            finish(*state)
    else:
        for call in range(2 if case.calls == "two steps" else 1):
            finish(*forward(call))
    return results


def serve(rank, size, path, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, size), rank=rank, world_size=size)
    while (job := pipe.recv()) is not None:
        candidates, case, layout, backward = job
        group = dist.new_group(list(case.members))
        answer = []
        if rank in case.members:
            for candidate in candidates:
                try:
                    answer.append(evaluate(candidate, case, layout, group, backward))
                except Exception:
                    answer.append(traceback.format_exc())
        pipe.send(answer)
        dist.destroy_process_group(group) if rank in case.members else None
    os._exit(0)


class Hang(Exception):
    pass


class Pool:
    """Worker processes that outlive a case, and are replaced after a hang."""

    def __init__(self, size):
        self.size, self.workers = size, []

    def start(self):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "zoo"])
        path = tempfile.mktemp()
        self.pipes, self.workers = [], []
        for rank in range(self.size):
            here, there = context.Pipe()
            args = (rank, self.size, path, there)
            worker = context.Process(target=serve, args=args, daemon=True)
            worker.start()
            there.close()
            self.pipes.append(here)
            self.workers.append(worker)

    def run(self, candidates, case, layout, backward=True, timeout=20):
        """Answers of the members in rank order, one list a candidate."""
        if not self.workers:
            self.start()
        for pipe in self.pipes:
            pipe.send((candidates, case, layout, backward))
        answers, missing = {}, set(self.pipes)
        while missing:
            ready = wait_for(missing, timeout)
            if not ready:
                self.stop()
                errors = [x for xs in answers.values() for x in xs if isinstance(x, str)]
                waiting = f"{len(missing)} of {self.size} ranks after {timeout} s"
                raise Hang("\n".join([waiting, *errors]))
            for pipe in ready:
                missing.discard(pipe)
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    self.stop()
                    raise Hang("a rank died") from None
        per_rank = [answers[self.pipes[rank]] for rank in case.members]
        return [list(of_one) for of_one in zip(*per_rank)]

    def stop(self):
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join()
        self.workers = []


@pytest.fixture(scope="module")
def pool():
    pool = Pool(4)
    yield pool
    pool.stop()


def case(name, p, needs="", **changes):
    return Case(name, p, frozenset(needs.split()), **changes)


PLAIN = [
    case("one rank, odd", 1, s=7),
    case("one rank, grouped heads", 1, "gqa", s=5, g=2),
    case("two ranks", 2),
    case("two ranks, full", 2, causal=False),
    case("three ranks, odd chunks, grouped heads", 3, "gqa", s=10, g=2, h=6),
    case("four ranks, one kv head", 4, "gqa", g=1, h=3),
    case("four ranks, full, large logits", 4, causal=False, logits=30.0),
    case("four ranks, causal", 4, b=1, s=2),
    case("two forwards, then their backwards", 2, calls="two forwards"),
    case("two steps", 3, calls="two steps"),
    case("packed qkv", 2, packed=True),
    case("subgroup", 3, "subgroup", ranks=(1, 2, 3)),
    case("subgroup with a gap", 2, "subgroup", ranks=(1, 3)),
    case("float32", 3, dtype=torch.float32),
    case("bfloat16", 4, dtype=torch.bfloat16),
    case("window", 3, "window", window=(4, 0)),
    case("window, both sides", 4, "window", window=(5, 2), causal=False),
    case("documents", 3, "mask", mask="documents"),
    case("queries that see nothing", 4, "mask", mask="blind"),
    case("queries that see nothing, one rank", 1, "mask", mask="blind", causal=False),
    case("uneven", 3, "uneven", lengths=(5, 2, 7)),
    case("uneven, one long", 4, "uneven gqa", lengths=(1, 9, 3, 2), g=2),
    case("empty first", 2, "uneven empty", lengths=(0, 5)),
    case("empty in the middle", 4, "uneven empty", lengths=(4, 0, 3, 0), causal=False),
    case("uneven, mask, window", 3, "uneven mask window", lengths=(3, 6, 2), mask="blind"),
    case("dilated, aligned", 2, "dilation", s=8, dilation=((8, 16), (1, 2))),
    case("dilated, odd", 3, "dilation", s=7, h=5, g=5, dilation=((4, 10, 50), (1, 3, 4))),
    case("dilated, sparse", 4, "dilation gqa", s=5, g=2, dilation=((6, 9), (3, 5))),
    case("dilated, full", 3, "dilation", s=6, causal=False, dilation=((4, 12), (2, 3))),
    case("dilated, one rank", 1, "dilation gqa", s=23, h=6, g=2, dilation=((5, 64), (2, 4))),
    case("dilated, one rank, full", 1, "dilation", s=11, dilation=((4, 8), (2, 8)), causal=False),
    case("dilated, steps of heads", 1, "dilation", s=9, h=3, g=3, dilation=((4,), (5,))),
    case("dilated, grouped", 3, "dilation", s=6, h=5, g=5, dilation=((4, 12), (2, 3), "grouped")),
    case("one rank, two tiles", 1, s=37, b=1),
    case("two ranks, two tiles", 2, s=34, b=1, h=2, g=2),
    case("head dim 12, dO transposed", 2, d=12, strided=True),
    case("scale", 2, "scale", scale=0.2),
    case("head dim of v", 3, "value_dim", e=12),
    case("one kv head, head dim of v, scale", 2, "gqa value_dim scale", g=1, e=4, scale=0.6),
    case("packed documents", 3, "cu_seqlens", cu_seqlens=(0, 4, 4, 11, 18)),
    case("packed documents, window, full", 2, "cu_seqlens window", cu_seqlens=(0, 5, 12), window=(2, 1), causal=False),
    case("sink", 3, "sink", sink=True),
    case("sink, documents, one rank", 1, "sink cu_seqlens", sink=True, cu_seqlens=(0, 1, 6)),
    case("capped scores, ALiBi", 3, "score_mod", score_mod="capped"),
    case("capped scores, window, scale", 2, "score_mod window scale", score_mod="capped", window=(3, 0), scale=0.5),
    case("chunked prefill", 3, "kv", m=6),
    case("cross-attention", 2, "kv gqa", m=8, g=2, causal=False),
    case("dilated, grouped, one", 1, "dilation", s=13, dilation=((4, 9, 13), (2, 3, 1), "grouped")),
]
EXTREME = [
    case("two ranks, grouped heads", 2, "gqa", g=2),
    case("one rank, grouped heads, even", 1, "gqa", s=8, g=2),
    case("stored mask", 1, "mask", s=12, mask="stored"),
    case("padding mask", 2, "mask", mask="padding"),
    case("two ranks, huge logits", 2, logits=1000.0),
    case("scores below any mask value", 2, low=-1e5),
    case("dilated, lse 0", 1, "dilation", s=12, zeros=True, dilation=((4, 12), (4, 2))),
    case("dilated, one rank, aligned", 1, "dilation", s=16, dilation=((8, 16), (1, 2))),
]
MORE = [
    replace(case, name=f"{case.name}, {p} ranks", p=p, dtype=dtype)
    for p, dtype in ((5, torch.float64), (8, torch.float64), (8, torch.bfloat16))
    for case in PLAIN
    if not case.ranks and not case.lengths and case.s % 2 == 0
]


def applies(case, source):
    declared = source.features
    return case.needs <= declared and case.p <= source.ranks and (case.causal <= ("causal" in declared))


def distance(a, b):
    """Of b from a, relative to a's norm; infinite where one is not finite and the other is."""
    a, b = a.double(), b.double()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return INF
    a, b = a[a.isfinite()], b[b.isfinite()]
    if a.numel() == 0:
        return 0.0
    return float((a - b).norm() / a.norm().clamp_min(1e-12))


BUDGET = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check_correct(pool, case):
    for source in zoo.CORRECT.values():
        if not applies(case, source):
            continue
        (answers,) = pool.run([zoo.build(source.name)], case, source.layout)
        for call in range(1 if case.calls == "one" else 2):
            with_lse = "lse" in source.features
            expected = reference(case, source.layout, with_lse, call)
            for rank, (answer, right) in enumerate(zip(answers, expected)):
                assert not isinstance(answer, str), f"{source.name} rank {rank}\n{answer}"
                got = answer[call]
                assert not got.pop("written"), f"{source.name} writes to its inputs"
                assert ("lse" in got) == with_lse
                for name, tensor in got.items():
                    if name[0] == "d" and case.logits > 100:
                        continue  # saturated: dS is a difference of equal numbers
                    if name != "lse":
                        assert tensor.dtype == case.dtype
                    error = distance(right[name], tensor)
                    where = f"{source.name}: {name} on rank {rank}"
                    assert error < BUDGET[case.dtype], f"{where} is off by {error:.2e}"


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_correct_sources_agree_with_dense_attention(pool, case):
    check_correct(pool, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", EXTREME, ids=lambda case: case.name)
def test_correct_sources_agree_in_extreme_cases(pool, case):
    check_correct(pool, case)


@pytest.mark.slow
def test_correct_sources_agree_on_five_and_eight_ranks():
    pool = Pool(8)
    try:
        for case in MORE:
            check_correct(pool, case)
    finally:
        pool.stop()


def test_mutants_change_one_place_and_say_why():
    assert len(zoo.BY_NAME) == len(zoo.MUTANTS) >= 66
    for mutant in zoo.MUTANTS:
        text = zoo.CORRECT[mutant.base].text
        assert text.count(mutant.old) == 1, mutant.name
        assert mutant.old != mutant.new
        assert mutant.cause.endswith(".") and mutant.slug == mutant.slug.lower().replace(" ", "-")
        compile(zoo.text_of(mutant.name), mutant.name, "exec")
    assert sum(mutant.hangs for mutant in zoo.MUTANTS) <= 4


def test_candidates_travel_by_value_and_name_their_lines(tmp_path):
    # a worker need not be able to import the zoo
    cloudpickle = pytest.importorskip("cloudpickle")
    (tmp_path / "candidate.pkl").write_bytes(cloudpickle.dumps(zoo.build("dilated_local")))
    program = """
import pickle, traceback, torch
f = pickle.load(open("candidate.pkl", "rb"))
x = torch.randn(1, 4, 2, 8)
assert f(x, x, x, causal=True)[0].shape == x.shape
try:
    f(x, None, x, causal=True)
except AttributeError:
    report = traceback.format_exc()
    assert '"<zoo:dilated_local>"' in report and "q.to(wide), k.to(wide)" in report, report
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)


NAIVE = case("naive", 2, s=8, b=1, dtype=torch.float32)


def passes_naive(pool, name):
    """What the field tests: forward, out only, two ranks, even, float32, within 1e-2."""
    layout, features, *_, ranks = zoo.info(name)
    plan = replace(NAIVE, p=ranks, s=16) if ranks == 1 else NAIVE
    if "dilation" in features:
        plan = replace(plan, dilation=((8, 16), (1, 2)))
    try:
        (answers,) = pool.run([zoo.build(name)], plan, layout, backward=False, timeout=10)
    except Hang:
        return False
    if any(isinstance(answer, str) for answer in answers):
        return False
    expected = reference(plan, layout, False)
    return all(
        torch.allclose(answer[0]["out"].double(), right["out"], atol=1e-2, rtol=1e-2)
        for answer, right in zip(answers, expected)
    )


@pytest.mark.slow
def test_most_mutants_pass_a_naive_test():
    pool = Pool(2)
    try:
        assert all(passes_naive(pool, name) for name in zoo.CORRECT)
        passing = [m.name for m in zoo.MUTANTS if passes_naive(pool, m.name)]
    finally:
        pool.stop()
    print(f"{len(passing)} of {len(zoo.MUTANTS)} pass")
    claimed = {m.name for m in zoo.MUTANTS if m.passes_naive and not m.racy}
    timing = {m.name for m in zoo.MUTANTS if m.racy}
    assert set(passing) - timing == claimed
    assert len(claimed) >= 45


NOISE = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 1e-4}


def difference(pool, mutant, case):
    """How the mutant shows itself in this case, or None."""
    source = zoo.CORRECT[mutant.base]
    candidates = [zoo.build(mutant.base), zoo.build(mutant.name)]
    try:
        right, wrong = pool.run(candidates, case, source.layout, timeout=6)
    except Hang as hang:
        return f"hangs: {hang}"
    for rank, (good, bad) in enumerate(zip(right, wrong)):
        if isinstance(bad, str):
            return f"rank {rank} raises: {bad.strip().splitlines()[-1]}"
        for call, (expected, got) in enumerate(zip(good, bad)):
            if got["written"]:
                return f"rank {rank} writes to its inputs"
            for name in ("out", "lse", "dq", "dk", "dv"):
                if name in expected and got[name].dtype != expected[name].dtype:
                    return f"{name} of rank {rank} is {got[name].dtype}"
                if name in expected and distance(expected[name], got[name]) > NOISE[case.dtype]:
                    error = distance(expected[name], got[name])
                    return f"{name} of rank {rank}, call {call}: {error:.1e}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("mutant", zoo.MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_differs_from_its_base(pool, mutant):
    source = zoo.CORRECT[mutant.base]
    for case in [*EXTREME, *PLAIN]:
        if applies(case, source) and (found := difference(pool, mutant, case)):
            print(f"{case.name}: {found}")
            honest = mutant.hangs or "Traceback" in found or not found.startswith("hangs")
            assert honest, found
            return
    assert mutant.racy, "its numbers never differ from those of its base"
