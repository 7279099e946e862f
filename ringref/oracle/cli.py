"""`python -m ringref check`: the oracle from a shell, under torchrun too."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext

from ..comm.launch import torchrun
from ..shard import LAYOUTS
from . import adapt
from .cases import FEATURES, cases
from .judge import check, usable
from .pool import Ranks


def main(argv: list[str] | None = None) -> int:
    """`python -m ringref check mypkg.module:function`: 0 if it passes, 1 if not, 2 for arguments that make no sense.
    Under torchrun its ranks are used.
    """
    parser = argparse.ArgumentParser("ringref check", description="Judge an attention over ranks.")
    add = parser.add_argument
    add("candidate", help="mypkg.module:function, or path/to/file.py:function")
    add("--ranks", type=int, default=4, help="every p up to this is tried")
    add("--layout", default="contiguous", help=f"{', '.join(LAYOUTS)}, or module:function (n, p, rank) -> positions")
    add("--features", default="", help=f"comma-separated, of {', '.join(FEATURES)}")
    add("--claims", choices=("ring",))
    add("--backend", default="gloo", choices=("gloo", "nccl"))
    add("--adapt", choices=adapt.WRAPPERS, help="what stands between the call and yours: see ringref.oracle.adapt")
    add("--quick", action="store_true", help="every level of every factor once, instead of every pair")
    add("--fail-fast", action="store_true", help="stop at the first failing case whose cause has a name")
    add("--seed", type=int, default=0)
    add("--deadline", type=float, help="seconds that a case may take, 30; with --quick 10")
    add("--json", action="store_true", help="print the report for machines")
    told = parser.parse_args(argv)
    sys.path.insert(0, os.getcwd())
    there = "RANK" in os.environ  # torchrun has started us
    sweep = {name: getattr(told, name) for name in ("layout", "claims", "quick", "seed", "ranks", "features")}
    try:
        sweep["ranks"] = min(told.ranks, torchrun()[0]) if there else told.ranks
        fn = find(told.candidate)
        fn = getattr(adapt, told.adapt)(fn) if told.adapt else fn
        sweep["layout"] = find(told.layout, "layout") if ":" in told.layout else told.layout
        usable(fn, told.backend, told.deadline)
        cases(**sweep)
    except (TypeError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    with Ranks(told.backend) if there else nullcontext() as pool:
        if pool and pool.rank:
            pool.follow()
            return 0
        report = check(fn, backend=told.backend, deadline=told.deadline, fail_fast=told.fail_fast, pool=pool, **sweep)
    print(report.to_json() if told.json else report)
    return 0 if report else 1


def find(spec: str, what: str = "candidate") -> Callable:
    """The function that `module:name` or `file.py:name` names.

    Raises:
        ValueError: there is no such module, file or function, or it cannot be imported.
    """
    place, _, name = spec.rpartition(":")
    if not place:
        raise ValueError(f"{what}: expected module:function, got {spec!r}")
    if place.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(place)))
        place = os.path.basename(place)[:-3]
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(place))
    except (Exception, SystemExit) as error:  # anything may go wrong while somebody's file is imported
        raise ValueError(f"{what}: {spec!r} gives {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{what}: {spec!r} is a {type(found).__name__}, not a function")
    return found
