"""Random bad input on every public function, ranks that are killed, a cable that is cut: nothing hangs, nothing is
lost, every error names its cause. A seeded sample in CI; `-m slow` runs all of it in under 5 minutes.

A trial replaces one or two good arguments with odd ones, on one rank alone, or on all or one of 2 or 3 ranks. It ends
right (the result is that of the definition), or clear (TypeError, ValueError or NotImplementedError that names an
argument), or else the test fails: unclear, wrong, or a hang, which a simulation knows without a clock.
"""

import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import warnings

import numpy as np
import pytest
import torch
from common import METHODS, inputs

import ringref
from ringref import Attended, Dilation, ProcessRing, Shard, partition, simulate
from ringref.comm.launch import RankError, launch
from ringref.comm.simulate import Deadlock

N = 12


class Opaque:
    """Of no use to anybody, and said so."""

    def __repr__(self):
        return "Opaque()"


def odd_values():
    """Made anew for each trial: some of them can be changed."""
    many = torch.arange(12.0)
    return [
        None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**62, 2**63, 10**400, -(10**400), 1.5, 0.0, -0.0, -2.5, 1e308,
        math.nan, math.inf, -math.inf, 1j, "", "auto", "math", "torch", "xformers", "all", "zigzag", b"striped", [], (),
        {}, {1}, [1], [4, 2], (1, 2), (4,), (None, 0), (0, None), (-1, 1), range(3), slice(3), [[4], [2]], object,
        Opaque(), len, print,
        lambda *a: True, lambda *a: None, lambda *a: a, lambda *a: "no", lambda *a: 1 / 0, lambda: True,
        lambda b, h, q, k: q >= k, lambda b, h, q, k: (q >= k).to("meta"), lambda b, h, q, k: (q >= k).to_sparse(),
        lambda b, h, q, k: [[True]], lambda b, h, q, k: (q >= k).double(), lambda s, b, h, q, k: s * 0.5,
        lambda s, b, h, q, k: s.long(), lambda s, b, h, q, k: s[..., :1, :1, None], lambda s, b, h, q, k: None,
        many, many.long(), many.int(), many.bool(), many.cfloat(), many.half(), many.view(3, 4), many.view(1, 3, 2, 2),
        torch.tensor(1.0), torch.tensor(2), torch.tensor([]), torch.tensor([0, 5, N]), torch.tensor([0, N]).int(),
        torch.tensor([3, 1]), torch.tensor([0, 10**8]), torch.tensor([0, 2**62]), torch.tensor([2**63 - 1]),
        torch.tensor([-1, 0]), torch.zeros(1, 1, 1, 1), torch.zeros(2, N, 4, 3).double(),
        torch.zeros(2, N, 2, 0).double(), torch.zeros(0, N, 4, 3).double(),
        torch.zeros(2, 0, 2, 3).double(), torch.zeros(1, 2, 3, 4, 5),
        torch.zeros(2, N, 4, 3, device="meta"), torch.zeros(2, N, 4, 3).to_sparse(), torch.zeros(2, N, 4, 3).cdouble(),
        torch.zeros(2, N, 4, 3).to_mkldnn(), torch.nested.nested_tensor([many, many], layout=torch.jagged),
        torch.quantize_per_tensor(torch.zeros(2, N, 4, 3), 0.1, 0, torch.qint8), np.arange(3),
        np.array(["all", "math"]), np.int64(3), np.float64(0.5), np.float32(2.0), np.bool_(True), torch.float64,
        torch.strided, torch.device("cpu"), torch.nn.Linear(2, 2), Dilation([4], [2]),
        Dilation([2**62 - 1], [2**62 - 1]), Dilation([3, 9], [1, 2], "grouped"),
        Shard(torch.arange(N), None), Shard(torch.arange(3), None), Shard(torch.tensor([1, 2]), None), Attended(1, 2),
        Attended(torch.zeros(2, N, 4, 3).double(), torch.zeros(2, 4, N).double()),
    ]  # fmt: skip


def lists():
    return [
        [], [4], [4, 8], [0], [-1], [2**62], [2**63], [2**62 - 1], [1.5], ["4"], [None], [True], [[4]], "44", 4, None,
        {4: 1}, (4,), range(1, 3), np.array([4]), torch.tensor([4]), [torch.tensor(4)], [np.int32(4)], [10**400],
    ]  # fmt: skip


# ------------------------------------------------------------------------- public functions, given good arguments
# each: the good arguments of a rank, and the call; names in an error that speak of an argument by another word


def attention(name):
    def good(ring):
        shard = partition(N, ring, "zigzag")
        q, k, v = (shard.take(x).requires_grad_() for x in inputs(N)[:3])
        optional = dict.fromkeys(("window", "cu_seqlens", "dilation", "mask_mod", "score_mod", "scale", "q_chunk"))
        return {"q": q, "k": k, "v": v, "causal": False, **optional, "shard": shard, "backend": "auto"}

    def call(given):
        out, lse = METHODS[name](given.pop("q"), given.pop("k"), given.pop("v"), **given)
        if out.requires_grad and not out.is_meta:
            (out.sum() + lse.masked_fill(lse == -math.inf, 0.0).sum()).backward()
        return [out.detach(), lse.detach()]

    return good, call


def true(given):
    """What the definition finds; on one rank it is asked itself."""
    return attention("dense")[1](given)


def explaining(ring):
    given = attention("ring")[0](ring)
    return {name: given[name] for name in ("q", "k", "causal", "dilation", "mask_mod", "scale", "shard", "backend")}


def sharding(ring):
    return {"positions": partition(N, ring).positions, "ring": ring, "kv_positions": None}


FUNCTIONS = {
    **{name: attention(name) for name in METHODS},
    "explain": (explaining, lambda given: ringref.explain(given.pop("q"), given.pop("k"), **given)),
    "partition": (lambda ring: {"n": N, "ring": ring, "layout": "zigzag"}, lambda given: partition(**given)),
    "Shard": (sharding, lambda given: Shard(**given)),
    "take": (
        lambda ring: {"shard": partition(N, ring), "x": inputs(N).q, "dim": 1},
        lambda given: Shard.take(partition(N, given["ring"]), given["x"], given["dim"]),
    ),
    "gather": (
        lambda ring: {"shard": partition(N, ring), "x": partition(N, ring).take(inputs(N).q), "dim": 1},
        lambda given: Shard.gather(partition(N, given["ring"]), given["x"], given["dim"]),
    ),
    "Dilation": (
        lambda ring: {"segment_lengths": [4, 8], "dilation_rates": [1, 2], "heads": "all"},
        lambda given: Dilation(**given),
    ),
    "simulate": (
        lambda ring: {"fn": lambda ring: ring.rank, "p": 2, "adversarial": False},
        lambda given: simulate(**given),
    ),
    "launch": (
        lambda ring: {"fn": lambda ring: ring.rank, "p": 1, "backend": "gloo", "timeout": 60.0},
        lambda given: launch(given["fn"], given["p"], given["backend"], timeout=given["timeout"]),
    ),
    "ProcessRing": (lambda ring: {"group_or_mesh": None}, lambda given: ProcessRing(**given)),
}
ALONE = {"Dilation", "simulate", "launch", "ProcessRing"}  # nothing of them is the ranks' to agree upon
AGREE = {*METHODS, "explain", "gather"}  # one rank's mistake is an error on every rank
WORDS = {"shard": ("shard", "positions", "rows"), "k": ("k ", "k:", "heads"), "v": ("v ", "k and v"), "ring": ("ring",)}
WORDS |= {"group_or_mesh": ("process_group", "group"), "dim": ("dim", "x "), "q": ("q ", "q:", "q,", "q's", "d = ")}
WORDS |= {
    "x": ("x ", "x:", "dim"),
    "positions": ("positions",),
    "mask_mod": ("mask_mod",),
    "cu_seqlens": ("cu_seqlens",),
}


def judged(name, changed, ended):
    """What became of one rank: None if right or clear, else what was not."""
    kind, what = ended
    if kind == "returned":
        return None
    words = [word for argument in changed for word in WORDS.get(argument, (argument,))]
    if name == "ProcessRing" and changed["group_or_mesh"] is None:
        return None if "init_process_group() first" in str(what) else f"unclear: {what}"
    if isinstance(what, Deadlock):
        return f"hang: {what}"
    own = [function for function in (*changed.values(),) if callable(function)]
    if isinstance(what, ZeroDivisionError) and own:
        return None  # the caller's own function, in its own words
    if isinstance(what, TypeError) and own and ("argument" in str(what) or "lambda" in str(what)):
        return None  # the same: it takes other arguments
    if isinstance(what, RankError) and own:
        return None  # with the rank's own traceback
    clear = isinstance(what, (TypeError, ValueError, NotImplementedError))
    if clear and any(word in str(what) for word in words):
        return None
    return f"unclear: {type(what).__name__}: {what}"


def trial(seed):
    """One of them; returns what was wrong about it, or None."""
    dice = random.Random(seed)
    name = dice.choice(list(FUNCTIONS))
    good, call = FUNCTIONS[name]
    p = 1 if name in ALONE else dice.choice((1, 2, 3))
    whose = range(p) if dice.random() < 0.5 else [dice.randrange(p)]
    arguments = [
        x for x in simulate(lambda ring: list(good(ring)), 1)[0] if name not in ("take", "gather") or x != "shard"
    ]
    places = {x: dice.random() for x in dice.sample(arguments, dice.choice((1, 1, 2)) if len(arguments) > 1 else 1)}

    def on(ring):
        given, changed = good(ring), {}
        for argument, place in places.items() if ring.rank in whose else ():
            pool = lists() if argument in ("segment_lengths", "dilation_rates") else odd_values()
            changed[argument] = pool[int(place * len(pool))]
        if name in ("partition", "simulate", "launch") and any(
            isinstance(x, int) and not isinstance(x, bool) and 3 < x < 2**62 for x in changed.values()
        ):
            return ("returned", None), changed  # as many ranks or tokens as that are not a mistake
        given |= changed
        if name in ("take", "gather"):
            given["ring"] = ring
        try:
            return ("returned", call(given)), changed
        except Exception as error:
            return ("raised", error), changed

    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = simulate(on, p, adversarial=dice.random() < 0.5)
    seconds = time.monotonic() - begin
    every = {argument: value for _, changed in ends for argument, value in changed.items()}
    if "shard" in every and any(isinstance(end[1], Deadlock) for end, _ in ends):
        # a rank without a shard of this ring has nobody to tell; over processes its end is what the others notice
        ends = [end for end in ends if not isinstance(end[0][1], Deadlock)]
    wrong = [judged(name, every, end) for end, _ in ends]
    raised = [end[0] == "raised" for end, _ in ends]
    if name in AGREE and any(raised) and not all(raised):
        own = [end[1] for end, _ in ends if end[0] == "raised"]
        if not all(isinstance(x, (ZeroDivisionError, TypeError)) for x in own):
            wrong.append(f"only some ranks raise: {own}")
    if name in METHODS and not any(raised) and name != "dense":
        for end, exact in zip((end for end, _ in ends), simulate(lambda ring: _exact(ring, good, places, whose), p)):
            if not all(map(_alike, end[1], exact)):
                wrong.append("another result than the definition's")
    if seconds > 60:
        wrong.append(f"took {seconds:.0f} s")
    wrong = [x for x in wrong if x]
    return f"{seed}: {name}, p = {p}, ranks {list(whose)}, {every}: {wrong[0]}"[:900] if wrong else None


def _exact(ring, good, places, whose):
    given = good(ring)
    for argument, place in places.items() if ring.rank in whose else ():
        pool = odd_values()
        given[argument] = pool[int(place * len(pool))]
    given["backend"] = "auto"
    return true(given)


def _alike(one, other):
    if one.is_meta or other.is_meta:
        return one.shape == other.shape
    return torch.allclose(one.double(), other.double(), rtol=1e-2, atol=1e-2, equal_nan=True)


def stress(seeds):
    wrong = []
    for seed in seeds:
        try:
            wrong.append(trial(seed))
        except BaseException:  # of the trial's own
            wrong.append(f"{seed}: {traceback.format_exc(limit=-3)}")
    wrong = [x for x in wrong if x]
    assert not wrong, f"{len(wrong)} of {len(seeds)}:\n" + "\n".join(wrong[:40])


def test_odd_arguments():
    stress(range(250))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(1, 9))
def test_many_odd_arguments(block):
    stress(range(250 * block, 250 * block + 250))


# ----------------------------------------------------------------------------------------- ranks that are killed


def killed(seed):
    """A rank that dies at a random hop of a forward or a backward is named, in seconds."""
    dice = random.Random(seed)
    method, p, when = dice.choice(list(METHODS)), 3, dice.randrange(2, 14)
    victim = dice.randrange(p)

    def fn(ring):
        from ringref.comm.ring import watchers

        count = 0

        def watch(hop):
            nonlocal count
            count += 1
            if count == when and ring.rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        watchers.append(watch)
        shard = ringref.partition(12, ring, "zigzag")
        attend = getattr(ringref, f"{method}_attention")
        while True:
            q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
            attend(q, k, v, shard=shard, causal=True).out.sum().backward()

    begin = time.monotonic()
    with pytest.raises(RankError, match=f"rank {victim} of 3 died with SIGKILL"):
        launch(fn, p)
    assert time.monotonic() - begin < 90, (method, when, victim)


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_rank(seed):
    killed(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 14))
def test_many_killed_ranks(seed):
    killed(seed)


# ----------------------------------------------------------------------------------------------------- two hosts


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two network namespaces and the cable between them."""
    names = [f"ringref{os.getpid()}{end}" for end in "ab"]
    if sys.platform != "linux" or any(ip("netns", "add", name).returncode for name in names):
        pytest.skip("no network namespaces here")
    try:
        cable = [f"rr{os.getpid() % 10000}{end}" for end in "ab"]
        assert not ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1]).returncode
        for i, (name, end) in enumerate(zip(names, cable)):
            ip("link", "set", end, "netns", name)
            for words in (
                ["addr", "add", f"10.77.0.{i + 1}/24", "dev", end],
                ["link", "set", end, "up"],
                ["link", "set", "lo", "up"],
            ):
                assert not ip("-n", name, *words).returncode
        yield names, cable
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_a_cable_that_is_cut(hosts, tmp_path):
    """Under torchrun on two hosts the results are right; then the link goes: every rank raises after its timeout."""
    names, cable = hosts
    script = """
        import os, time, torch
        from ringref import dense_attention, from_env, partition, ring_attention

        ring = from_env("gloo")
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 12, 2, 4, dtype=torch.float64)
        shard = partition(12, ring, "zigzag")
        whole = dense_attention(q, k, v, causal=True).out
        mine = [shard.take(x) for x in (q, k, v)]
        assert torch.allclose(ring_attention(*mine, causal=True, shard=shard).out, shard.take(whole))
        open(f"right.{ring.rank}", "w")
        try:
            while True:
                ring_attention(*mine, causal=True, shard=shard)
        except RuntimeError as error:
            open(f"raised.{ring.rank}", "w").write(str(error))
            os._exit(3)
    """
    (tmp_path / "job.py").write_text(textwrap.dedent(script))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RINGREF_TIMEOUT": "8",
        "OMP_NUM_THREADS": "1",
    }
    jobs = []
    for i, (name, end) in enumerate(zip(names, cable)):
        run = f"-m torch.distributed.run --nnodes 2 --node-rank {i} --nproc-per-node 2 --master-addr 10.77.0.1".split()
        command = ["ip", "netns", "exec", name, sys.executable, *run, "--master-port", "29511", "job.py"]
        here = {**env, "GLOO_SOCKET_IFNAME": end}
        jobs.append(
            subprocess.Popen(command, cwd=tmp_path, env=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )

    def wait_for(word, seconds):
        end = time.monotonic() + seconds
        while not all((tmp_path / f"{word}.{rank}").exists() for rank in range(4)):
            assert time.monotonic() < end, (word, sorted(os.listdir(tmp_path)))
            time.sleep(0.1)

    try:
        wait_for("right", 120)
        assert not ip("-n", names[0], "link", "set", cable[0], "down").returncode
        wait_for("raised", 60)
        told = [(tmp_path / f"raised.{rank}").read_text() for rank in range(4)]
        assert all(f"rank {rank}, hop" in text and "broke off" in text for rank, text in enumerate(told)), told
    finally:
        for job in jobs:
            job.kill()
            job.wait()
