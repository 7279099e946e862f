"""Workers that run cases: `Pool`, processes of this machine, and `Ranks`, the same where `torchrun` put its ranks."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing import connection
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from ..comm.launch import preloaded
from . import sanitizer
from .sanitizer import FOREVER, Ledger, Watched, run

# what a worker finds imported besides: a backward imports sympy by the third, a candidate's test module pytest
NEEDED, ASKED = ["rich.progress", "rich.table", "torch.fx.experimental.symbolic_shapes"], ["pytest"]
# what is known of a worker that cannot answer
SILENT = Ledger().dump() | {"steps": [], "error": None, "written": [], "overwritten": [], "line": None}


def serve(rank: int, world: int, backend: str, store: tuple[str, int], door: tuple[str, int], key: bytes) -> None:
    """A worker's life: run the cases that come; a second thread tells how they stand."""
    gc.freeze()  # a collection would touch, and so copy, all pages that came by the fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()  # what a candidate forks is in this group, and ends with it
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    lines = {}
    for what in ("work", "talk"):
        lines[what] = connection.Client(door, authkey=key)
        lines[what].send((what, rank))
    threading.Thread(target=_answer, args=(lines["talk"], lambda _: sanitizer.LEDGER.dump()), daemon=True).start()
    device = "cpu"
    if backend == "nccl":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    dist.Backend.register_backend("watched", Watched, extended_api=True, devices=["cpu"])
    backend = "watched" if backend == "gloo" else backend
    mine = dist.PrefixStore(key.hex(), dist.TCPStore(*store, is_master=False))
    dist.init_process_group(backend, store=mine, rank=rank, world_size=world, timeout=FOREVER)
    _answer(lines["work"], lambda job: run(job, rank, device))


def _answer(line: connection.Connection, respond: Callable) -> None:
    try:
        while True:
            line.send_bytes(pickle.dumps(respond(pickle.loads(line.recv_bytes()))))
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)  # the parent is gone


def _hire(rank: int, *told: Any, method: str = "forkserver") -> Any:
    """A worker process, forked from a server that has imported torch but not ringref, which somebody may be editing."""
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([*preloaded(), *NEEDED, *(name for name in ASKED if name in sys.modules)])
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")  # a script must not run again
    try:
        worker = context.Process(target=serve, args=(rank, *told), daemon=True)
        worker.start()
    finally:
        sys.modules["__main__"] = main
    return worker


class Crew:
    """The processes of one world, each one rank. The line for work is busy with the case, the one to talk is not."""

    def __init__(self, pool: Pool, world: int):
        key = os.urandom(16)
        self.lines: dict[tuple[str, int], connection.Connection] = {}
        with connection.Listener((pool.address[0], 0), backlog=2 * world, authkey=key) as door:
            self.processes = pool.start(world, pool.backend, pool.address, door.address, key)
            while len(self.lines) < 2 * world:
                line = door.accept()
                self.lines[line.recv()] = line

    def close(self) -> None:
        """End every process."""
        for line in self.lines.values():
            line.close()
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def ask(self, rank: int) -> dict[str, Any]:
        """How a rank stands, from the thread that is not busy with the case."""
        line = self.lines["talk", rank]
        try:
            line.send_bytes(pickle.dumps(None))
            return pickle.loads(line.recv_bytes()) if line.poll(5.0) else SILENT
        except (EOFError, OSError):
            return SILENT

    def run(self, jobs: dict[int, dict], deadline: float) -> dict[int, dict[str, Any]]:
        """As `Pool.run`."""
        for rank, job in jobs.items():
            self.lines["work", rank].send_bytes(pickle.dumps(job))
        results: dict[int, dict] = {}
        before: dict[int, dict] = {}
        first: dict[int, float] = {}
        began = time.monotonic()
        while len(results) < len(jobs):
            working = {self.lines["work", rank]: rank for rank in jobs if rank not in results}
            ready = connection.wait(list(working), timeout=0.5)
            for line in ready:
                try:
                    results[working[line]] = pickle.loads(line.recv_bytes())
                except (EOFError, OSError):
                    results[working[line]] = SILENT | {"crash": True}
            if not ready:
                now, seconds = {rank: self.ask(rank) for rank in working.values()}, time.monotonic() - began
                first = {rank: facts["cpu"] for rank, facts in now.items()} | first
                # on a machine that is busy with something else a case may take its time
                busy = max(facts["cpu"] - first[rank] for rank, facts in now.items()) > deadline / 4
                if seconds > (1 if busy else 3) * deadline or stuck(now, before, results):
                    results |= {rank: SILENT | facts | {"hang": seconds} for rank, facts in now.items()}
                before = now
        return dict(sorted(results.items()))


def stuck(now: dict[int, dict], before: dict[int, dict], done: dict[int, dict]) -> bool:
    """True when every unfinished rank waits and nobody can ever be served: a deadlock, known without a clock."""
    if any(r not in before or not now[r]["waiting"] or now[r]["ticks"] != before[r]["ticks"] for r in now):
        return False
    met = meetings(now | done)
    return not any(meeting(rank, facts["waiting"]) in met for rank, facts in now.items())


def clean(results: dict[int, dict]) -> bool:
    """Whether a crew can go on to another case: it answered, and no message of this one can be left over."""
    if not results or any("hang" in result or "crash" in result for result in results.values()):
        return False
    # a message that was refused when it was posted was counted on one side only
    if any(f["kind"] in ("self-send", "non-contiguous") for result in results.values() for f in result["findings"]):
        return False
    met, ops = meetings(results), [(rank, op) for rank, result in results.items() for op in result["ops"]]
    return all(meeting(rank, op) in met and (op["waited"] or op["kind"] == "send") for rank, op in ops)


def meetings(known: dict[int, dict]) -> set[tuple]:
    """The messages and collectives that all whom they take have posted."""
    posted = Counter(meeting(rank, op) for rank, facts in known.items() for op in facts["ops"])
    return {met for met, count in posted.items() if count == len(met[-1])}


def meeting(rank: int, op: dict[str, Any]) -> tuple:
    """What all who take part in an operation call it, and last who they are."""
    ends = {"send": (rank, op["peer"]), "recv": (op["peer"], rank)}.get(op["kind"], tuple(op["members"]))
    return op["group"], op["peer"] is None, op["tag"], op["seq"], ends


class Pool(AbstractContextManager):
    """Worker processes on this machine for worlds of up to `size` ranks, started when first needed.

    One pool serves many sweeps. A process keeps its rank and its world size for life, as any real one does (published
    code caches both), so there is a crew for each world size; it is replaced only after a case that did not end clean.

    Usage: `with Pool(8) as pool: results = pool.run(fn, jobs, deadline=30)`; `jobs` maps a rank to its part of a case.
    """

    def __init__(self, size: int = 8, backend: str = "gloo"):
        self.size, self.backend, self.crews = size, backend, {}
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.address = "127.0.0.1", self.store.port

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End every worker."""
        while self.crews:
            self.crews.popitem()[1].close()

    def start(self, world: int, *told: Any) -> list[Any]:
        """Start a process for each rank of a world; returns those that are this process's to end."""
        return [_hire(rank, world, *told) for rank in range(world)]

    def run(self, fn: bytes, jobs: dict[int, dict], deadline: float = 30.0, new=False) -> dict[int, dict[str, Any]]:
        """Run one case on ranks 0 … len(jobs)−1; every rank's result, or what it was waiting for when it hung. `new`
        processes remember nothing of earlier cases.
        """
        world, results = len(jobs), {}
        if world > self.size:
            raise ValueError(f"jobs: {world} ranks on a pool of {self.size}")
        crew = self.crews.pop(world, None)
        if crew and new:
            crew.close()
        crew = Crew(self, world) if new or not crew else crew
        try:
            results = crew.run({rank: job | {"fn": fn} for rank, job in jobs.items()}, deadline)
        finally:
            if clean(results):
                self.crews[world] = crew
            else:
                crew.close()
        return results


class Ranks(Pool):
    """The pool where `torchrun` put its ranks: each of them starts the worker of its number. Rank 0 leads."""

    def __init__(self, backend: str = "gloo"):
        self.board, self.rank, self.size = next(dist.rendezvous("env://"))
        self.board.set_timeout(FOREVER)
        self.backend, self.crews, self.told = backend, {}, itertools.count()
        self.address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def start(self, world: int, *told: Any) -> list[Any]:
        self.board.set(f"crew/{next(self.told)}", pickle.dumps((world, *told)))
        return [_hire(0, world, *told)]

    def follow(self) -> None:
        """A rank other than 0: start its part of every crew, until rank 0 closes."""
        while told := pickle.loads(self.board.get(f"crew/{next(self.told)}")):
            if self.rank < told[0]:
                _hire(self.rank, *told, method="fork")  # this process has done nothing else that a fork could break
        self.board.set(f"bye/{self.rank}", b"")

    def close(self) -> None:
        """End every worker and let the followers go; wait for them, as this rank may host what they talk through."""
        super().close()
        if self.rank == 0:
            self.board.set(f"crew/{next(self.told)}", pickle.dumps(None))
            for rank in range(1, self.size):
                self.board.get(f"bye/{rank}")
