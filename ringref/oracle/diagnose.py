"""Name the cause: compute in float64 what each famous mistake would give, and see which one the candidate gave.

A guess of `causes` is believed when ‖candidate − prediction‖ is a small part of ‖candidate − truth‖. The best wins,
among equals the one listed first; where none is good, the numbers are asked what they are made of (`readoff`), and
where that is no simple thing, the diagnosis says where the error lives, which guess came nearest, and how much of the
error that leaves. What messages, hangs, exceptions and NaN say needs no guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .causes import CALLS, GRADS, LAST, UNKNOWN, Guess, backwards, crossed, fits, forwards, somewhere
from .readoff import readings
from .scene import Scene, assembled

NOT_FINITE = "NaN or inf"
EARLY = "a receive buffer is read before its wait(): the numbers are right once the oracle leaves the buffer alone"
UNWRITTEN = "memory that nobody wrote is read: there is no NaN once fresh memory holds zeros"
EARLIER = "it passes alone: the cause lies in an earlier case, whose state is kept"
CHANCE = "not deterministic: the same step twice differs in some bits"
PRECISE = "something is kept in low precision: the same in float32 passes"
COARSE = "what bfloat16 or float16 take alone is wrong: the same in float32 passes"
RACE = "it fails at some times only, not alone and after no one case: a race, or much that is kept"
ENOUGH = 0.05  # a guess may leave this share of the error unexplained
MESSAGES = {
    "two-into-one": "two receives into one buffer",
    "receive-into-send": "receiving into the buffer being sent",
    "sent-unreceived": "a receive buffer is sent before its wait",
    "send-overwritten": "send buffer overwritten before its wait",
    "self-send": "self-send",
    "non-contiguous": "a non-contiguous buffer is sent or received",
    "unfinished": "unfinished work",
}
GROUP = "a rank, size or group of the world is used for the group's own (group rank used as global rank?)"
SILENT = "no answer"
LARGE = "large scores overflow or underflow: exp without the maximum, or one that starts at 0 or is for several rows"
NOT_LARGE = ("a masked score", "accumulates in low precision")  # what may show in large scores and is no overflow
SPREAD = "rows whose scores lie far apart spoil each other: one maximum for several rows"
ODD = "heads that the ranks do not divide make it raise"
EMPTY = "a rank without tokens makes it raise"
BLIND = "the lse of a query that sees nothing is a finite number: a maximum or sum that starts at 0"
TAKES = {  # what a case has that fails no more without it, where no number says what is done with it
    **{("dout", x): "dO is read with other strides than it has" for x in ("heads first", "expanded")},
    **{("views", x): "q, k or v is read with other strides than it has" for x in ("packed", "heads first")},
    ("zeros", True): "a score or lse of exactly 0, or a tie, is taken for something else",
    ("plan", "stacked"): f"{CALLS} a part of what one saved is overwritten by the next",
    ("plan", "steps"): f"{CALLS} something is kept from step to step",
}
VAGUE = (UNKNOWN, NOT_FINITE, "it raises", EARLIER, RACE)  # what a finding says when it has nothing better
# what a mistake gives that a case has no room for
NO_ROOM = (RuntimeError, IndexError, ValueError, TypeError, KeyError)
WRITTEN = {"written": "an input was written to", "overwritten": "what a call gave back is overwritten by a later one"}
HARMLESS = ("unfinished work", *WRITTEN.values())  # values are worth a look all the same


class Reading(str):
    """A cause that was read off one case's numbers: between it and one that explains as many, the other is believed."""


# -------------------------------------------------------------------------------- messages and hangs


def mismatched(results: dict[int, dict]) -> list[tuple[str, str, int, Any]]:
    """The first message whose two ends disagree about size or dtype, or collective whose ranks do:
    (cause, text, rank, line).
    """
    ends: dict[tuple, tuple[int, dict]] = {}
    receives = {sum(op["kind"] == "recv" for op in r.get("ops", ())) for r in results.values()}
    for rank, op in ((rank, op) for rank, r in results.items() for op in r.get("ops", ())):
        pair = (rank, op["peer"]) if op["kind"] == "send" else (op["peer"], rank)
        between = tuple(op["members"]) if op["peer"] is None else (pair, op["tag"])
        first, other = ends.setdefault((op["group"], between, op["seq"]), (rank, op))
        if op["peer"] is None and other["kind"] != op["kind"]:
            text = f"rank {first} is in {other['kind']}, rank {rank} in {op['kind']}"
            return [("collectives differ", text, rank, op["line"])]
        if op["order"] != other["order"]:  # of what is reduced in place, element by element in memory
            text = f"in {op['kind']} rank {rank}'s are {op['order']}, rank {first}'s {other['order']}"
            return [("ranks reduce tensors of different strides", text, rank, op["line"])]
        if op["peer"] is not None and (op["sizes"], op["dtypes"]) != (other["sizes"], other["dtypes"]):
            sent, got = (op, other) if op["kind"] == "send" else (other, op)
            sends, receipt = (f"{end['sizes'][0]} {end['dtypes'][0]}" for end in (sent, got))
            text = f"rank {pair[0]} sends {sends}, rank {pair[1]} receives {receipt} ({got['phase']}, hop {got['hop']})"
            what = "dtype" if op["sizes"] == other["sizes"] else "size"
            cause = f"message of the wrong {what}" if len(receives) == 1 else "unequal hop counts"
            return [(cause, text, rank, op["line"])]
    return []


def direction(results: dict[int, dict]) -> int:
    """+1 if messages go to the next rank, −1 if to the one before; where that is the same, +1."""
    p = len(results)
    steps = {(op["peer"] - rank) % p for rank, r in results.items() for op in r["ops"] if op["kind"] == "send"}
    return -1 if p > 2 and steps == {p - 1} else 1


def crash(error: dict) -> tuple[str, str]:
    """What an exception says: (cause where it is known, text)."""
    text = (error["text"].splitlines() or [""])[0]
    known = dict.fromkeys(("which is this rank", "same as the rank of the current process"), MESSAGES["self-send"])
    known |= dict.fromkeys(("not part of group", "is not in group"), GROUP)
    known |= {"does not require grad": "no gradient reaches the inputs"}
    cause = next((cause for words, cause in known.items() if words in text), None)
    return (cause, f"{error['type']}: {text}"[:200]) if cause else (f"it raises {error['type']}", text[:200])


def hang(case: Any, results: dict[int, dict]) -> tuple[str, str, int, Any]:
    """Who waits for what: (cause, text, rank, line)."""
    stuck = {rank: r for rank, r in results.items() if "hang" in r}
    waits = {rank: r["waiting"] for rank, r in stuck.items() if r["waiting"]}
    if not waits:
        rank, r = next(iter(stuck.items()))
        return SILENT, f"after {r['hang']:.0f} s, and not waiting for a message", rank, r["line"]
    rank, op = next(iter(waits.items()))
    peer, at = "" if op["peer"] is None else f" with rank {op['peer']}", f"({op['phase']}, hop {op['hop']})"
    cause, text = "deadlock", f"rank {rank} waits in {op['kind']}{peer} {at}"
    ops = {r: facts.get("ops", ()) for r, facts in results.items()}
    posts = {r: tuple(sum(o["kind"] == kind for o in ops[r]) for kind in ("send", "recv")) for r in ops}
    if case.groups and any(list(o["members"]) not in case.teams for r in ops for o in ops[r]):
        cause = GROUP
    elif op["peer"] is None and len(set(posts.values())) == 1:
        inside = [r for r, w in waits.items() if w["peer"] is None]
        text = f"ranks {_list(inside)} wait in {op['kind']} {at}, which the others never enter"
    elif len(waits) > 1 and all(w["kind"] == "send" for w in waits.values()):
        cause = "deadlock: every rank sends before it receives"
    elif len(set(posts.values())) > 1 or any(a != b for a, b in posts.values()):
        told = ", ".join(f"rank {r} {a}/{b}" for r, (a, b) in posts.items())
        cause, text = "unequal hop counts", f"{text}; posted sends/receives: {told}"
    return cause, text, rank, op["line"] or stuck[rank]["line"]


def far(case: Any) -> str | None:
    """What it means when a case would not fail without its scores."""
    return LARGE if case.shift else SPREAD if case.spread else None


def not_finite(truth: Any, got: dict[str, list[Tensor]], wrong: list[str]) -> str:
    """NaN or inf that the oracle did not plant, by the rows where it is."""
    case, s, name = truth.case, truth.scene, wrong[0]
    blind = s.L == -math.inf
    lses = torch.cat([s.forward(times=parts)["lse"] for _, parts in s.parts(s.hop)])
    partly = (lses == -math.inf).any(0) & ~blind
    if name in ("out", "lse", "dq"):
        bad = ~assembled(s, name, got[name]).isfinite()
        bad = bad & s.L.isfinite() if name == "lse" else bad.any(-1).transpose(1, 2)
        blind, partly = blind & bad, partly & bad
        elsewhere = (bad & ~blind & ~partly).any()
    else:
        elsewhere = not (blind.any() or partly.any())
    if case.shift or (case.spread and elsewhere):
        return far(case)
    if elsewhere or not (blind.any() or partly.any()):
        return NOT_FINITE
    if not partly.any():
        return "NaN where a query sees no key at all"
    if case.causal and not (case.mask or case.window or case.dilation or case.cu_seqlens):
        return "NaN where a block of keys is entirely masked"
    return "NaN where a query sees no key of a block, or none at all"


# ---------------------------------------------------------------------------------------- the judge


def name(truth: Any, got: dict, wrong: list, others: list, known: list, way=1, deep=True, quickly=False) -> list[str]:
    """What explains the wrong tensors, the best first; where the error lives, when nothing does. `known` are causes of
    other findings, which are asked first, and `quickly` no others; `deep` looks for what is wrong on some blocks only.
    """
    if quickly and not known:
        return []
    s = Scene(truth, way)
    whole = {n: assembled(s, n, pieces) for n, pieces in got.items()}
    about = [n for n in ("out", "lse") if n in wrong][:1] or [n for n in (*GRADS, "dsink") if n in wrong]
    fine = [n for n in ("out", "lse") if n in whole and n not in wrong]  # which a guess must leave so
    small = precision(whole, truth, about)
    left: dict[str, float] = {}
    denied: set[str] = set()  # causes that do not explain the lse that comes with a wrong out

    def remains(told: str, guess: Callable) -> float:
        with suppress(*NO_ROOM):
            share = {n: _left(whole[n], x, truth.whole[n]) for n, x in guess().items() if n in fine + wrong}
            if all(share.get(n, 0) < 2 for n in fine):
                denied.update([told] if "lse" in wrong and share.get("lse", 0) > ENOUGH else [])
                return max(share[n] for n in about)
        return math.inf

    def ask(many: Iterable[Iterator[Guess]], only: Iterable[str] | None = None) -> float:
        """The least share of the error that any leaves. One that cannot be made must never lose a rejection."""
        for guesses in many:
            with suppress(*NO_ROOM):
                for told, guess in guesses:
                    if told and (only is None or told in only):
                        left[told] = min(remains(told, guess), left.get(told, math.inf))
        return min(left.values(), default=math.inf)

    def usual() -> Iterator[Iterator[Guess]]:
        yield crossed(s, truth, others)
        yield backwards(s, about, whole) if about[0] not in ("out", "lse") else forwards(s)
        yield fits(s, whole, about, truth)

    read = lambda: ((Reading(told), guess) for told, guess in readings(s, about, whole, fine))
    best = ask([*usual(), somewhere(s, about, whole)], set(known)) if known else math.inf
    if known and best > 0.01:
        best = ask([read()], set(known))
    # a wrong term that is not known would have shown in a float32 case before
    if best > 0.01 and small and truth.case.dtype in ("bfloat16", "float16"):
        return [small]
    if quickly and best > 0.01:
        return []
    if best > 0.01:
        best = ask(usual())
    alike = lambda: [told for told, share in left.items() if share <= best + 0.01]
    some = best > ENOUGH or denied.issuperset(alike())
    if some and deep and not small:
        best = ask([somewhere(s, about, whole)])
    if not small and (best > ENOUGH or all(told.endswith(LAST) for told in alike())):
        best = ask([read()])
    named = [told for told in alike() if not told.startswith(UNKNOWN)]
    if best < ENOUGH and named:
        return sorted(named, key=lambda told: (told in denied, told.endswith(LAST)))  # the simpler first
    told = min(left, key=left.__getitem__).removeprefix(f"{UNKNOWN}: ")
    near = f"; {told}" if best < ENOUGH else f"; nearest: {told} (leaves {best:.0%})" if best < 0.7 else ""
    too = "".join(f", {n} too" for n in wrong if n in [*about[1:], "lse"] and n != about[0])
    return [small or f"{UNKNOWN}: {place(s, whole, truth, about[0])}{too}{near}"]


def _left(got: Tensor, guess: Tensor, truth: Tensor) -> float:
    """The share of the error that a guess leaves; a number that is not finite has to be guessed exactly."""
    rest, error = ((got - x).norm().item() for x in (guess, truth))
    if not math.isfinite(rest + error):
        got, guess, truth = (x[truth.isfinite()] for x in (got, guess, truth))
        lost = ~(got.isfinite() & guess.isfinite())
        if not torch.equal(got[lost], guess[lost]):
            return math.inf
        rest, error = ((got - x)[~lost].norm().item() for x in (guess, truth))
    return rest / error if error else math.inf if rest else 0.0


def precision(whole: dict[str, Tensor], truth: Any, about: list[str]) -> str | None:
    """A small error everywhere, not a wrong term: bits were lost on the way."""
    pairs = [(whole[n] - truth.whole[n], truth.whole[n], truth.whole[n].isfinite()) for n in about]
    share = max((error[seen].norm() / true[seen].norm()).item() for error, true, seen in pairs)
    # sums that cancel show what they lost many times over; a wrong term leaves heads alone, or has one sign everywhere
    wide = truth.case.dtype in ("float32", "float64")
    if share > (0.3 if truth.case.offset else 0.02) or (wide and any(term(*x) for x in pairs if x[0].ndim == 4)):
        return None
    return f"accumulates in low precision (a relative error of {'1e-3 or more' if share > 1e-3 else 'less than 1e-3'})"


def term(error: Tensor, true: Tensor, seen: Tensor) -> bool:
    """Whether an error b n h d is no noise."""
    error, true = error.masked_fill(~seen, 0.0), true.masked_fill(~seen, 0.0)
    heads, along = error.square().sum((0, 1, 3)), (error * true).sum(-1)
    one_sign = along.sum().abs() > 0.7 * (error.norm(dim=-1) * true.norm(dim=-1)).sum()
    return bool(heads.min() < 1e-4 * heads.max() or one_sign)


def place(s: Scene, whole: dict[str, Tensor], truth: Any, name: str) -> str:
    """Ranks, heads and positions that are wrong, in words."""
    if name == "dsink":
        return "dsink is wrong"
    gap, side = (whole[name] - truth.whole[name]).nan_to_num(0.0, 0.0, 0.0), name in ("dk", "dv")
    size = gap.transpose(1, 2).abs() if name == "lse" else gap.norm(dim=-1)
    bad = size > 0.05 * size.max()
    tokens, heads = bad.any(2).any(0), bad.any(1).any(0)
    which = "every head" if heads.all() else f"heads {_list(heads.nonzero().flatten().tolist())}"
    at = "every position" if tokens.all() else f"local positions {_list(sorted({*s.loc[side][tokens].tolist()}))}"
    what = "wrong" if (whole[name].transpose(1, 2) if name == "lse" else whole[name])[bad].any() else "zero"
    return f"{name} is {what} on ranks {_list(sorted({*s.owner[side][tokens].tolist()}))}, {which}, {at}"


def _list(items: list) -> str:
    return ", ".join(map(str, items[:8])) + (", …" if len(items) > 8 else "")
