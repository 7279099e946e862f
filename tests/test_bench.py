"""The benchmark on the CPU: every section runs, checks what it times and writes what it found; its arithmetic."""

import json
import threading
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import ringref
from ringref.lab import bench


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "HEADS", 2)
    monkeypatch.setattr(bench, "REPEATS", 2)


def rows(section, p=2, **args):
    return ringref.simulate(lambda ring: list(section(bench.Bench(ring), Namespace(**args))), p)[0]


def test_ring_and_collective_are_checked_and_timed():
    found = rows(bench.ring_section, tokens=[32])
    assert [row["method"] for row in found] == ["ideal", "ring", "collective"] * 2
    for row in found:
        assert row["both_ms"] > 0
        if row["method"] != "ideal":
            assert row["checked"] and 4 < row["peak_both_q"] < 20 and row["share_both"] > 0


@pytest.mark.parametrize("causal", [False, True])
def test_a_ceiling_computes_what_a_ring_computes_and_sends_nothing(causal, monkeypatch):
    met, forward, backward = {}, bench.kernels.forward, bench.kernels.backward

    def spy(name, fn):
        def run(*given):
            shapes = [tuple(x.shape) for x in given if isinstance(x, torch.Tensor)]
            met.setdefault(threading.get_ident(), []).append((name, shapes))
            return fn(*given)

        return run

    for name, fn in {"forward": forward, "backward": backward}.items():
        monkeypatch.setattr(bench.kernels, name, spy(name, fn))

    def step(shard):
        inputs, dout = torch.randn(4, 1, 8, 2, 4).split([3, 1])
        q, k, v = (x.requires_grad_() for x in inputs.clone().unbind())
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(ringref.ring_attention(q, k, v, causal=causal, shard=shard).out, (q, k, v), dout[0])
        return met.pop(threading.get_ident())

    heard = ringref.simulate(lambda ring: step(ringref.partition(24, ring, "zigzag")), 3)
    alone = [ringref.partition(24, bench.Echo(rank, 3), "zigzag") for rank in range(3)]
    with bench.unheard(alone):
        assert [step(shard) for shard in alone] == heard
    assert all(len(each) == 6 for each in heard)


def test_a_wrong_result_is_noticed(monkeypatch):
    scaled = lambda *x, **how: ringref.ring_attention(*x, scale=0.1, **how)
    monkeypatch.setitem(bench.METHODS, "ring", scaled)
    found = {row["method"]: row for row in rows(bench.ring_section, tokens=[32])}
    assert found["collective"]["checked"] and not found["ring"]["checked"]


def test_dilated_results_are_checked(monkeypatch):
    def found(*tokens):
        every = rows(bench.dilated_section, dilated_tokens=tokens)
        return {(row["n"], row["method"]): row for row in every}

    cross = "LongNet + w = n, r = 64"
    good = found(512)
    assert all(row["checked"] for row in good.values())
    monkeypatch.setattr(bench, "_SCORES", 2**17)  # so that some rows stand for all
    monkeypatch.setattr(bench, "_CHUNK", 2**15)
    assert all(row["checked"] for row in found(256).values())
    assert good[512, "LongNet"]["received_forward_bytes"] == 0 < good[512, cross]["received_forward_bytes"]
    scaled = lambda *x, **how: ringref.dilated_attention(*x, scale=0.1, **how)
    monkeypatch.setattr(bench, "dilated_attention", scaled)
    assert not any(row["checked"] for row in found(256).values())


def test_kernels_that_only_allocate_take_what_kernels_take():
    computed, allocated = (rows(bench.long_section, longest=longest) for longest in (1024, 0))
    for row, other in zip(computed, allocated):
        assert row["n"] == other["n"] and row["fits"] and other["fits"]
        if row["method"] != "dense":  # and the dQ that cuDNN keeps, which CPU kernels do not
            assert 0.98 * row["peak_bytes"] < other["peak_bytes"] < 1.2 * row["peak_bytes"]


def test_simulated_ranks_hold_what_is_predicted():
    found = rows(bench.flat_section, p=1, tokens=[64])
    assert {(row["method"], row["p"]) for row in found} == {(x, p) for x in bench.METHODS for p in (1, 2, 3, 4, 8)}
    assert all(row["simulated"] and 0.9 < row["peak_both_q"] / row["predicted_q"] < 1.1 for row in found), found
    assert not rows(bench.flat_section, p=2, tokens=[64])


def test_exposed_is_message_time_with_no_compute_under_it():
    spans = [("compute", 0, 4), ("message", 2, 6), ("compute", 5, 7), ("message", 9, 10)]
    kernels = [{"kind": kind, "start_us": a, "duration_us": b - a} for kind, a, b in spans]
    assert bench.exposed_time(kernels) == (1 + 1, 10)


def test_a_hop_hides_from_the_length_after_the_last_at_which_it_does_not():
    def rows(*together):
        return [{"tokens_per_gpu": 2**i, "kernel_ms": 1.0, "together_ms": x} for i, x in enumerate(together)]

    assert bench.hides_from(rows(1.02, 1.2, 1.03, 0.99)) == 4
    assert bench.hides_from(rows(1.0, 1.0)) == 1 and bench.hides_from(rows(1.0, 1.04)) == "not here"


class Replayed(bench.Bench):
    """A graph's replay is the step itself."""

    def captured(self, step):
        return nullcontext(step)

    def host(self, step):
        assert self.ring.traffic.messages, "a first hop, which makes connections, is no measure of the next"
        return super().host(step)


def test_a_hop_is_measured_once_it_has_run():
    for row in ringref.simulate(lambda ring: bench._hop(Replayed(ring), ring, 32), 2):
        names = {f"{name}{how}_ms" for name in ("hop", "kernel", "together") for how in ("", "_captured")}
        assert set(row) == {*names, "host_us", "gb_per_s"} and min(row.values()) > 0


def test_the_command_writes_what_it_found(tmp_path):
    assert bench.main(["--ranks", "1", "--sections", "long", "--longest", "0", "--data", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("long-*-x1.json")
    record = json.loads(file.read_text())
    assert {"machine", "versions", "date", "command"} < set(record) and record["rows"][0]["predicted_bytes"] > 0


def in_context_parallel(ring):
    before, seen = F.scaled_dot_product_attention, []
    for rotation, causal in (("allgather", True), ("alltoall", False)):
        with bench._context_parallel(bench.Bench(ring), rotation, causal):
            seen.append(F.scaled_dot_product_attention is not before)
        seen.append(F.scaled_dot_product_attention is before)
    return seen


def test_torch_context_parallel_is_entered_and_left():
    assert ringref.launch(in_context_parallel, 2, "gloo") == [[True] * 4] * 2
