"""What is often got wrong, in words, and what it would give: guesses, tables of (sentence → what computes the tensors).

A mistake is a small change of one ingredient, everywhere or for some pairs of query and key only: which keys count for
whom (`sights`), whose K or V, which scale, lse or row sum (`ingredients`, `saved`), how parts are merged (`merges`),
where rows and heads stand (`moves`). Forward and backward try the same ones.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..shard import LAYOUTS
from .cases import make_mask, together_in
from .scene import Scene, row_sums, rows

UNKNOWN = "unknown signature"
CALLS = "a call's result depends on another call:"
GRADS = ["dq", "dk", "dv"]
SKIPPED, ALONE = ", but for blocks of which nothing is seen", ", and the token at the end is alone"
REVERSED = "with ranks counted from the end"  # of two ranks much looks like it
LAST = (SKIPPED, ALONE, REVERSED)  # the ends of causes that are believed if no other is as good
TILES = (128, 64, 48, 32, 24, 16)  # rows of a kernel's tile, or of a chunk of queries
ENDS, BOUNDS = {"first": 0, "last": -1}, ("causal mask", "window (left)", "window (right)", "documents")

Guess = tuple[str, Callable[[], dict[str, Tensor]]]
Change = tuple[str, Callable[[], dict[str, Any]]]  # of a scene's ingredients


# ----------------------------------------------------------------------------------- who sees whom


def rules_of(s: Scene) -> tuple[dict[str, Callable], dict[str, dict[str, Any]]]:
    """The rules about a query's and a key's position (m b h q k, m branches) whose product, summed over the branches,
    says who sees whom; and what is put in the place of each.
    """
    case, n, i, j, here, there = s.case, s.case.n, s.i, s.j, s.here, s.there
    rules: dict[str, Callable] = {}
    instead: dict[str, dict[str, Any]] = {}
    if case.causal:
        rules["causal mask"], instead["causal mask"] = lambda i, j: j <= i, {}
        for x in (x for x in TILES if x < max(map(len, case.asks))):
            row, tile, below = here // x, there // x, there % x <= here % x
            instead["causal mask"][f"counted from a tile of {x}"] = torch.where(row == tile, below, j <= i)
            instead["causal mask"][f"counted from a tile of {x} at every hop"] = (tile <= row) & below
    if case.window:
        left, right = case.window
        rules["window (left)"], rules["window (right)"] = lambda i, j: i - j <= left, lambda i, j: j - i <= right
        instead["window (right)"] = {"taken as left": j - i <= left, "taken as 0": j <= i}
    if case.cu_seqlens:
        starts, together = case.cu_seqlens, together_in(case.cu_seqlens, i, j)
        rules["documents"] = partial(together_in, starts[1:-1])
        empty = next((a for a, b in itertools.pairwise(starts) if a == b), n)
        ends = {"after an empty one": empty, "in the last": starts[-2]}
        instead["documents"] = {f"nothing is seen {text}": together & (i < end) for text, end in ends.items()}
        for text, by in {"late": -1, "early": 1}.items():
            instead["documents"][f"a token too {text}{ALONE}"] = together_in(starts, i + by, j + by)
    if case.mask:
        mask, every = make_mask(case.mask, n), torch.ones(case.b, case.h, 1, 1)
        whose = torch.arange(case.b)[:, None, None, None], torch.arange(case.h)[:, None, None]

        def masked(i: Tensor, j: Tensor) -> Tensor:
            if case.mask == "documents":  # a table of n, where the others are formulas
                i, j = i.clamp(0, n - 1), j.clamp(0, n - 1)
            return every * mask(*whose, i, j)

        rules["mask_mod"], seen = masked, masked(i, j)
        instead["mask_mod"] = {"inverted": 1 - seen, "of batch 0 for all": seen[:1]}
        instead["mask_mod"] |= {text: seen[:, of] for text, of in heads_for(s).items()}
    if case.dilation:
        (w, r), h = (torch.tensor(x)[:, None, None, None, None] for x in case.dilation), case.h
        branch, head = torch.arange(len(w))[:, None, None, None, None], torch.arange(h)[:, None, None]
        few, many = h // len(w) or 1, torch.arange(h).tensor_split(len(w))
        own = torch.stack([torch.isin(head, x) for x in many])[:, None]
        usual = (branch % r, own) if case.heads == "grouped" else (head % r, True)
        kept = lambda i, j, w=w, at=usual: (i % w % r == at[0]) & (j % w % r == at[0]) & at[1]
        together = lambda i, j: i // w == j // w
        apart = lambda rule, m: torch.where(branch == m, rule(here, there), rule(i, j))
        rules["dilation offsets"], rules["segments"] = kept, together
        if case.causal:
            instead["causal mask"]["ignored where the rate is more than 1"] = (j <= i) | (r > 1)
            instead["causal mask"] |= {f"ignored in branch {m} only": (j <= i) | (branch == m) for m in range(len(w))}
        instead["segments"] = {"of w · r tokens": i // (w * r) == j // (w * r)}
        instead["segments"] |= {f"counted from the shard in branch {m} only": apart(together, m) for m in range(len(w))}
        instead["dilation offsets"] = {
            "of keys only": (j % w % r == usual[0]) & usual[1],
            "of queries only": (i % w % r == usual[0]) & usual[1],
            "by the key/value head": kept(i, j, at=(head // s.e % r, True)),
            "r − 1 − j mod r": kept(i, j, at=((r - 1 - head) % r, True)),
            "a segment's rows beyond w div r are dropped": kept(i, j)
            & ((i % w).maximum(j % w) < (w // r).clamp(1) * r),
            "none where a segment is as long as the sequence": kept(i, j) | (w >= n),
            "counted from the sequence, not the segment": kept(i, j, w=n),
            "0 for every head": kept(i, j, at=(0, True)),
            "(j div r) mod r for j mod r": kept(i, j, at=(head // r % r, True)),
            "j · r div h for j mod r, the same for heads side by side": kept(i, j, at=(head * r // h, True)),
            "by the branch, not the head": kept(i, j, at=(branch % r, True)),
            "a convention, heads='grouped'": kept(i, j, at=(branch % r, own)),
            "heads unassigned, h no multiple of the branches": kept(i, j, at=(branch % r, head // few == branch)),
            "heads unassigned, h no multiple of the rate": kept(i, j) & (head < h // r * r),
            "the tail that fills no segment is dropped": kept(i, j) & ((j < n // w * w) | (n < w)),
            "a branch whose segment is longer than the sequence is dropped": kept(i, j) & (w <= n),
            "a tail that fills no segment is dropped, be it the whole sequence": kept(i, j) & (j < n // w * w),
            **{f"counted from the shard in branch {m} only": apart(kept, m) for m in range(len(w))},
            **{f"only branch {m} counts": kept(i, j) & (branch == m) for m in range(len(w))},
            **{f"branch {m} is dropped": kept(i, j) & (branch != m) for m in range(len(w))},
        }
    if s.mod:
        rules["score_mod"] = lambda i, j: 1.0  # it hides nothing, but is told positions too
    return rules, instead


def heads_for(s: Scene) -> dict[str, Tensor]:
    """What may be taken for a query head, where something is given per head."""
    head = torch.arange(s.case.h)
    some = {"of head 0 for all": head * 0, "of heads counted from 0 on every rank": head % -(-s.case.h // s.p)}
    some |= {"of the key/value head": head // s.e, "of heads in another order": head.view(s.e, -1).mT.flatten()}
    return {text: of for text, of in some.items() if not torch.equal(of, head)}


def views_of(s: Scene, everywhere: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What may be taken for the positions of query and key."""
    case, n, p = s.case, s.case.n, s.p
    i, j, mine, theirs, here, there = s.i, s.j, s.mine, s.theirs, s.here, s.there
    late = n - case.m  # a query's index is its position less this
    yield "with query and key swapped", j, i
    if not case.window:  # which is no number of ranks
        yield "by rank instead of position", mine, theirs
    yield from ((f"off by one (key j taken for j {by:+d})", i, j + by) for by in (1, -1))
    yield from ((f"a token too {text}", i + by, j + by) for text, by in (("late", -1), ("early", 1)))
    if case.queries:
        first, key = (ends(cut, 0) for cut in (case.asks, case.shards))
        yield "with the keys' positions taken for the queries'", key[mine] + here, j
        yield "with the positions of queries taken for those of keys", i, late + first[theirs] + there
        yield "with the queries' positions taken for the keys'", i, late + first[mine] + j
        yield "with queries counted from 0", i - late, j
    frames = {"in local coordinates at every hop": (here, there)}
    for layout in LAYOUTS if case.lengths is None and not callable(case.layout) and not case.queries else ():
        at = torch.cat(replace(case, layout=layout).shards)[s.order[1]]
        frames[f"as in a {layout} layout"] = at[:, None].expand_as(i), at.expand_as(i)
    held = torch.tensor([*map(len, case.shards)])
    sizes: dict[str, tuple] = {"n div p": (n // p, n // p), "the longest shard": (held.max(), held.max())}
    if case.lengths:
        sizes |= {"the query's shard": (held[mine], held[mine]), "its own shard": (held[mine], held[theirs])}
    for text, (a, b) in sizes.items():
        frames[f"with rank · {text} for its first position"] = mine * a + here, theirs * b + there
    if s.halved:
        half, at = n // p // 2, s.halves_swapped(1)
        frames["with the halves of a shard swapped"] = at[mine, here], at[theirs, there]
        for text, by in {"2p − 2": -half, "2p": half}.items():
            frames[f"with {text} − rank for the late half"] = i + by * (here >= half), j + by * (there >= half)
        for text, view in later_chunk(s, half).items() if everywhere else ():  # which chunk is held is no hop's matter
            yield f"with p + rank for the late half, {text} only", *view
    for text, (a, b) in frames.items():
        yield from ((text, a, b), (f"{text}, queries only", a, j), (f"{text}, keys only", i, b))
    last = "aligned bottom-right on every rank"
    a, b = here + n - torch.tensor([*map(len, case.asks)])[mine], there + n - held[theirs]
    yield last, a, j
    yield from ((f"{last}, keys only", i, b), (f"{last}, queries and keys", a, b)) if everywhere else ()
    if s.even:
        at = torch.stack(case.shards)
        yield "of the own block at every hop", at[mine, here], at[mine, there]
        yield "of the own block at every hop not skipped: one flag, or kept by its shape", i + first_of_shape(s, n), j
        yield "as for an earlier block", at[1][here], at[0][there]
        yield "as for a later block", at[0][here], at[1][there]
        yield REVERSED, at[p - 1 - mine, here], at[p - 1 - theirs, there]
        for text, x in {"rank + hop for rank − hop": 2 * mine - theirs, "+1": theirs + 1, "−1": theirs - 1}.items():
            yield f"with the wrong source rank for a hop ({text})", i, at[x % p, there]
        for text, x in {"rank + hop for rank − hop": 2 * theirs - mine, "+1": mine + 1, "−1": mine - 1}.items():
            yield f"with the wrong source rank for a hop of the queries ({text})", at[x % p, here], j

    packed = {"": (i - late, case.m, lambda x: x + late)} if s.e > 1 else {}
    if packed and s.even:
        packed["a rank's "] = here, n // p, lambda x: torch.stack(case.shards)[mine, x]
    among = torch.arange(case.h)[:, None, None] % s.e  # a head's number in its group
    for whose, (row, size, at) in packed.items():
        yield f"with {whose}rows packed head by head taken for query by query", at((among * size + row) // s.e), j
        yield f"with {whose}rows packed query by query taken for head by head", at((row * s.e + among) % size), j
    for x in (x for x in TILES if x < max(map(len, case.asks))):
        yield f"kept by its shape, as the first tile of {x} had it", i + first_of_shape(s, x), j
        yield f"with queries counted from a tile of {x}", i - here // x * x, j
    yield "with the last query's position for every query's", i * 0 + n - 1, j
    yield "ignored for the first token", i, torch.where(j == 0, i, j)


def later_chunk(s: Scene, half: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Positions where a rank's second zigzag chunk is taken for number p + rank, not 2p − 1 − rank."""
    mine, theirs = (half * (2 * who + 1 - s.p) * (at >= half) for who, at in ((s.mine, s.here), (s.theirs, s.there)))
    return {"queries": (s.i + mine, s.j), "keys": (s.i, s.j + theirs)}


def ends(cut: list[Tensor], at: int) -> Tensor:
    """The first or the last that each rank has."""
    return torch.tensor([int(x[at]) if len(x) else 0 for x in cut])


def first_of_shape(s: Scene, size: int) -> Tensor:
    """How much later a query seems to be, for every key, where what is seen is kept by the sizes of a tile."""
    case, later, first = s.case, torch.zeros_like(s.i), {}
    for rank, t in itertools.product(range(s.p), range(s.p)):
        mine, theirs = case.asks[rank].split(size), case.shards[(rank - s.way * t) % s.p].split(size)
        for asked, keys in itertools.product(mine, theirs):
            if len(asked) and len(keys) and not (case.causal and s.i[asked[-1], 0] < keys[0]):
                shift = int(s.i[asked[0], 0] - keys[0])
                later[asked[:, None], keys] = first.setdefault((rank, len(asked), len(keys)), shift) - shift
    return later


def sights(s: Scene, everywhere: bool) -> Iterator[Change]:
    """Who sees whom, got wrong: one rule, both of a window, all, or all but one are ignored, replaced, or asked in a
    wrong view of the positions.
    """
    (rules, instead), views = rules_of(s), [*views_of(s, everywhere)]

    def seen(right: set[str], wrong: Iterable[str] = (), view: Any = (), rule: Any = 1.0) -> dict[str, Tensor]:
        asked = [rules[name](s.i, s.j) for name in right] + [rules[name](*view) for name in wrong]
        seen = {"times": (math.prod(asked, start=torch.ones(1, *s.times.shape).double()) * rule).sum(0)}
        if s.mod and "score_mod" not in right:
            seen |= {"at": (*s.at[:2], *view)} if view else {"mod": None}
        return seen

    if s.case.dilation:
        yield "a key seen through several branches counts once", lambda: {"times": s.times.clamp(max=1)}
        yield "log of how often a key counts is added twice", lambda: {"times": s.times.square()}
        yield "the log of how often a key counts is base 2", lambda: {"times": s.times ** math.log2(math.e)}
        wrapped = math.prod(rule(s.i, s.j + s.case.n) for rule in rules.values())
        yield "a branch's rows beyond the end wrap to the first ones", lambda: {"times": s.times + wrapped.sum(0)}
    if padded := s.case.padding:  # they hold what the last token has
        text = "padding is attended: the rows of the layout that hold no token"
        yield text, lambda: {"times": s.times + padded * (s.j == s.case.n - 1)}
    if s.case.mask and len(rules) > 1:
        masks = {"mask_mod"}, rules.keys() - {"mask_mod"}
        either = lambda: {"times": sum(seen(some)["times"] for some in masks).clamp(max=1)}
        yield "mask_mod and the other masks are joined by or, not by and", either
    if not s.case.causal and everywhere:
        yield "a causal mask though causal is False", lambda: {"times": s.times * (s.j <= s.i)}
    for name, choices in instead.items():
        for text, rule in choices.items():
            yield f"{name}: {text}", partial(seen, rules.keys() - {name}, rule=rule)
    sizes = {1, len(rules), len(rules) - everywhere} - {0}
    some = [names for m in range(len(rules)) for names in itertools.combinations(rules, m + 1)]
    some = [names for names in some if len(names) in sizes or names == ("window (left)", "window (right)")]
    met = s.seen_in_block() > 0
    for names in some:
        what, right = " and ".join(names), rules.keys() - set(names)
        skips = [("", 1.0), (SKIPPED, met)][: 1 + bool(everywhere and not met.all())]
        each = itertools.product(skips, [("ignored",), *views])
        for (after, rule), (text, *view) in each:
            yield f"{what} {text}{after}", partial(seen, right, names if view else (), view, rule)


def others_rows(s: Scene) -> dict[str, Tensor]:
    """Of which row what belongs to a query may be where ranks' rows travel, m n."""
    ranks = {
        "the keys' rank": s.theirs,
        "the rank after the keys'": s.theirs + 1,
        "the rank before the keys'": s.theirs - 1,
    }
    ranks |= {"the rank after the queries'": s.mine + 1, "the rank before the queries'": s.mine - 1}
    return {text: torch.stack(s.case.asks)[rank % s.p, s.here] for text, rank in ranks.items()}


def counted(s: Scene) -> Iterator[Change]:
    """Some pairs of query and key that are left out, alone there, or there twice."""
    case, n, p, there = s.case, s.case.n, s.p, s.there
    bounds = {name: rule for name, rule in rules_of(s)[0].items() if name in BOUNDS}
    if case.window:
        bounds["window"] = lambda i, j: bounds["window (left)"](i, j) & bounds["window (right)"](i, j)
    for (a, x), (b, y), (name, rule) in itertools.product(ENDS.items(), ENDS.items(), bounds.items()):
        shown = rule(ends(case.asks, x)[s.mine] + n - case.m, ends(case.shards, y)[s.theirs])
        text = f"blocks are skipped of which the {name} hides the {b} key from the {a} query"
        yield text, lambda shown=shown: {"times": s.times * shown}
    corner = s.seen_in_block() <= case.b * case.h
    sides = {"": True, " of earlier ranks": s.theirs < s.mine, " of later ranks": s.theirs > s.mine}
    text = "of which one pair is seen: a bound that is off by one skips them"
    some = {f"blocks{side} {text}": corner & pairs for side, pairs in sides.items()}
    skipped = torch.where(s.seen_in_block() > 0, -1, s.hop).amax(0)  # of a block of keys, the last hop that is
    some["what was added before a hop that is skipped"] = s.hop < skipped
    some |= s.places() | {"the last key": s.j == n - 1} | {f"hops 0 to {t}": s.hop <= t for t in range(1, p - 1)}
    some |= {f"the block of rank {rank}": s.theirs == rank for rank in range(p)}
    held = torch.tensor([*map(len, case.shards)])[s.theirs]
    some["keys beyond the length of the query's own shard"] = there >= torch.tensor([*map(len, case.asks)])[s.mine]
    for x in TILES:
        some[f"the keys after the last whole tile of {x}"] = s.j >= n // x * x
        some[f"a rank's keys after its last whole tile of {x}"] = there >= held // x * x
        some[f"a rank's keys after its first tile of {x}"] = there >= x
    for what, pairs in some.items():
        if pairs.any() and not pairs.all():
            hint = "the rest never arrives, or is skipped" if what == "the own block" else "overwritten, not added"
            yield f"without {what}", lambda pairs=pairs: {"times": s.times * ~pairs}
            yield f"zero but for {what}: {hint}", lambda pairs=pairs: {"times": s.times * pairs}
            yield f"with {what} counted twice", lambda pairs=pairs: {"times": s.times * (1 + pairs.double())}


# --------------------------------------------------------------------------------- other ingredients


def pairwise(s: Scene, everywhere: bool = True) -> Iterator[Change]:
    """What may be wrong for some pairs of query and key only."""
    wrong: dict[str, dict[str, Any]] = {}
    if s.even and not everywhere:
        of = lambda rank: torch.stack(s.case.shards)[rank, s.there]
        sources = {
            "the rank's own": of(s.mine),
            "stale, of the hop before": of((s.theirs + 1) % s.p),
            "of the hop after": of((s.theirs - 1) % s.p),
            "of the rank's counterpart from the end": of(s.p - 1 - s.theirs),
        }
        for who, names in {"K and V are": ("K_of", "V_of"), "K is": ("K_of",), "V is": ("V_of",)}.items():
            for text, at in sources.items():
                wrong[f"{who} {text}"] = dict.fromkeys(names, at)
        each = {"q is that": ("q_of",), "dO is that": ("do_of",), "q and dO are those": ("q_of", "do_of")}
        for (who, names), (text, at) in itertools.product(each.items(), others_rows(s).items()):
            wrong[f"{who} of {text}"] = dict.fromkeys(names, at)
    if s.halved and not everywhere:
        row, key = s.halves_swapped(0)[s.mine, s.here], s.halves_swapped(1)[s.theirs, s.there]
        wrong["K and V are those of the other half of a shard"] = {"K_of": key, "V_of": key}
        for name, of in {"q": row, "do": row, "K": key, "V": key}.items():
            wrong[f"{name} is that of the other half of a shard"] = {f"{name}_of": of}
    if s.K.shape == s.V.shape:
        swaps = {"K is taken for V": ["V_of"], "V is taken for K": ["K_of"], "K and V swap": ["K_of", "V_of"]}
        wrong |= {x + ", everywhere" * everywhere: dict.fromkeys(names, s.j + s.case.n) for x, names in swaps.items()}
    yield from ((text, partial(dict, changed)) for text, changed in wrong.items())
    yield from sights(s, everywhere)
    yield from counted(s) if everywhere else ()
    d = s.case.d
    for text, scale in {
        "scores are not scaled": 1.0,
        "scores are scaled twice": s.scale**2,
        "scale is ignored: 1/√d": d**-0.5,
        **{f"the scale is that of a head dim padded to {x}": x**-0.5 for x in (8, 16, 32, 64) if x / 2 < d < x},
        "the scale is that of v's head dim": s.V.shape[3] ** -0.5,
        "the scale is that of all heads together: 1/√(h·d)": (s.case.h * d) ** -0.5,
        "the scale is that of a rank's heads together: 1/√(h/p·d)": (s.case.h / s.p * d) ** -0.5,
        "scores are taken as base 2 (log2 e missing or doubled)": s.scale * math.log2(math.e),
        "scores are taken as base 2 (ln 2)": s.scale * math.log(2),
    }.items():
        yield text, partial(dict, scale=scale)


def ingredients(s: Scene) -> Iterator[Change]:
    """What a forward or a backward may take for what it should, everywhere."""
    yield from pairwise(s)
    p, e, g, wrong = s.p, s.e, s.case.g, {}
    for low in (-1e4, -1e3, -100.0):
        wrong[f"a masked score is {low:g} or more, not −inf"] = {"hidden": torch.tensor(low).double()}
    if s.mod:
        b, h, i, j = s.at
        wrong |= {
            "score_mod is applied twice": {"mod": lambda x, *at: s.mod(s.mod(x, *at), *at)},
            "score_mod of batch 0 for all": {"at": (b * 0, h, i, j)},
            **{f"score_mod {text}": {"at": (b, of.view(h.shape), i, j)} for text, of in heads_for(s).items()},
            "score_mod comes after the mask, and makes of −inf a number": {"hidden": s.mod(s.times - math.inf, *s.at)},
            "score_mod is applied before the scale": {"mod": lambda x, *at: s.mod(x / s.scale, *at) * s.scale},
        }
    if s.sink is not None:
        out, lse, _ = s.forward(sink=None).values()
        wrong |= {
            "the sink is ignored": {"sink": None},
            "the sink is missing in the saved lse": {"L": lse[..., None]},
            "the sink is missing in the saved out": {"O": out},
            "the sink is missing in the saved lse and out": {"L": lse[..., None], "O": out},
            "the sink's gradient is of batch 0 alone": {"over": lambda x: x[0].sum(-1)},
            "the sink's gradient is of the first rank's rows alone": {"over": lambda x: s.over(x * (s.owner[0] == 0))},
            "the sink's gradient is averaged over the batch": {"over": lambda x: x.mean(0).sum(-1)},
            "the sink's gradient is averaged over the queries": {"over": lambda x: x.sum(0).mean(-1)},
            f"the sink is counted {p} times, once a rank": {"sink": s.sink + math.log(p)},
            "the sink is scaled": {"sink": s.sink * s.scale},
            "the sink is 0": {"sink": s.sink * 0},
            **{f"the sink is that {text}": {"sink": s.sink[of]} for text, of in heads_for(s).items()},
            "the sink is counted twice": {"sink": s.sink + math.log(2)},
            "the sink is natural, taken for base 2": {"sink": s.sink * math.log(2)},
            "the sink is base 2, taken for natural": {"sink": s.sink / math.log(2)},
        }
    for x in (x for x in TILES if x < s.case.m):
        first = s.D[:, :, torch.arange(s.case.m) % x]
        wrong[f"the row sum D is that of the first {x} queries, for every {x} of them"] = {"D": first}
    if s.even:
        at, D = torch.stack(s.case.asks), s.D[..., 0] - s.dlse
        there = {"are read along the keys": at[s.mine, s.there], "stay while queries travel": at[s.theirs, s.here]}
        for text, of in there.items():
            rest = {"rows of lse": {"L": s.L[:, :, of]}, "row sums D": {"D": D[:, :, of] + s.dlse[..., None]}}
            rest |= {"rows of q": {"q_of": of}, "rows of dO": {"do_of": of}}
            wrong |= {f"{who} {text}": changed for who, changed in rest.items()}
    pairs = (("K", "V"), ("K",), ("V",))
    head = torch.arange(s.case.h)
    keys = {f"shifted by {x}": (head + x * e) % len(head) for x in (1, -1)}
    keys |= {"interleaved": head % g * e, "all 0": head * 0}
    of_rank = [(some[0] // e + (some - some[0]) // e) * e for some in head.tensor_split(p) if len(some)]
    keys["counted from a rank's first query head"] = torch.cat(of_rank).clamp(max=len(head) - 1)
    queries = {"interleaved": head.view(e, g).mT.flatten(), "interleaved back": head.view(g, e).mT.flatten()}
    each = [("key/value", *x) for x in itertools.product(pairs, keys.items())]
    each += [("query", *x) for x in itertools.product((("q",), ("do",), ("q", "do")), queries.items())]
    for who, names, (text, of) in (x for x in each if not torch.equal(x[-1][1], head)):
        wrong[f"{who} heads {text} ({' and '.join(names)})"] = {x: getattr(s, x)[:, :, of] for x in names}
    if e > 1:
        strided = lambda x: x.flatten(2, 3).unflatten(2, (e, g)).sum(2)
        wrong |= {
            "only the first query head of a group counts": {"gather": lambda x: x[:, :, :, 0]},
            "the query heads of a group are averaged, not added": {"gather": lambda x: x.mean(3)},
            "query head j adds to j mod g": {"gather": strided},
            "query head j is worked with key/value head j mod g, and adds to it": {"gather": strided}
            | {x: getattr(s, x)[:, :, head % g * e] for x in ("K", "V")},
        }
    yield from ((text, partial(dict, changed)) for text, changed in wrong.items())
    on_ranks = s.moved if s.even else lambda x, change: change(x[:, None])[:, 0]
    for text, shape in {"with heads first": (0, 2, 1, 3), "with the head dim first": (0, 3, 1, 2)}.items():
        each = (1, 0, *(x + 1 for x in shape[1:]))  # of a rank's own b s h d
        lain = on_ranks(s.do, lambda y, each=each: y.permute(each).reshape(y.transpose(0, 1).shape).transpose(0, 1))
        yield f"dO is read with other strides than it has ({text})", partial(dict, do=lain)
    told = on_ranks(s.dlse.mT[..., None], lambda y: y.transpose(2, 3).reshape(y.shape))[..., 0].mT
    yield "the gradient of lse, b h s, is read as if it were b s h", partial(dict, dlse=told)
    for text, of in queries.items() if e > 1 else ():
        yield f"the gradient of lse has query heads {text}", partial(dict, dlse=s.dlse[:, of])
    for names, (text, change) in itertools.product((*pairs, ("q",), ("do",), ("q", "K", "V")), moves(s)):
        moved = lambda names=names, change=change: {x: s.moved(getattr(s, x), change) for x in names}
        yield f"rows of {', '.join(names)} {text}", moved


def moves(s: Scene) -> Iterator[tuple[str, Callable]]:
    """Right rows in the wrong place: (sentence, change of a tensor b p s h d)."""
    if not s.even:
        return
    dealt = torch.cat(s.case.shards)
    for by in (by for by in range(1 - s.p, s.p) if by):
        yield f"end on the wrong rank: rank r has that of rank r{by:+d}", lambda y, by=by: y.roll(-by, 1)
    yield from {
        "have heads interleaved by rank": lambda y: regroup(y, (s.p, -1)),
        "have heads in rank order for interleaved": lambda y: regroup(y, (-1, s.p)),
        "have heads padded in front, cut at the end": lambda y: pad(y, (0, 0, -y.shape[3] % s.p, -(-y.shape[3] % s.p))),
        "have heads padded at the end, cut in front": lambda y: pad(y, (0, 0, -(-y.shape[3] % s.p), -y.shape[3] % s.p)),
        "have heads and tokens reshaped, not transposed": lambda y: y.transpose(2, 3).reshape(y.shape),
        "are those of the rank's own heads, reshaped and not sent back (b h s)":
            lambda y: y.permute(0, 3, 1, 2, 4).reshape(len(y), s.p, y.shape[3], y.shape[2], -1).transpose(2, 3),
        "are those of the rank's own heads, reshaped and not sent back (b s h)":
            lambda y: y.flatten(1, 2).unflatten(2, (s.p, -1)).transpose(1, 2).reshape(y.shape),
        "have tokens interleaved by rank": lambda y: y.transpose(1, 2).reshape(y.shape),
        "have tokens in rank order": lambda y: y.reshape(len(y), -1, s.p, *y.shape[3:]).transpose(1, 2),
        "lie in rank order, taken for a contiguous layout": lambda y: y.flatten(1, 2)[:, dealt].view(y.shape),
        "lie in the order of an inverse permutation": lambda y: y.flatten(1, 2)[:, dealt[dealt]].view(y.shape),
        "have the batch taken for the ranks": lambda y: y.reshape(s.p, -1, *y.shape[2:]).transpose(0, 1),
        "have the ranks taken for the batch": lambda y: y.transpose(0, 1).reshape(y.shape),
        "are the last rank's on every rank": lambda y: y[:, -1:].expand_as(y),
        "are the first rank's on every rank": lambda y: y[:, :1].expand_as(y),
        "are zero for the heads that are left over, which the ranks do not divide":
            lambda y: pad(y[:, :, :, : y.shape[3] // s.p * s.p], (0, 0, 0, y.shape[3] % s.p)),
    }.items()  # fmt: skip


def regroup(y: Tensor, heads: tuple[int, int]) -> Tensor:
    """Heads in two groups, exchanged; as they are where the groups do not come out even."""
    return y if y.shape[3] % max(heads) else y.unflatten(3, heads).transpose(3, 4).flatten(3, 4)


def tried(s: Scene, run: Callable, words: str = "{}") -> Iterator[Guess]:
    """A forward or a backward with every ingredient changed."""
    for text, changed in ingredients(s):
        yield words.format(text), lambda changed=changed: run(**changed())


def tried_on_places(s: Scene, run: Callable, words: str = "{}") -> Iterator[Guess]:
    """The same for some pairs of query and key only."""
    places = s.places(True).items()
    for text, changed in pairwise(s, everywhere=False):
        once = functools.cache(changed)
        for where, pairs in places:
            only = lambda once=once, pairs=pairs: run(**s.on(pairs, once()))
            yield words.format(f"{text}, on {where} only"), only


# -------------------------------------------------------------------------------------- the forward


def forwards(s: Scene) -> Iterator[Guess]:
    """Every wrong forward that has a name."""
    for text, change in moves(s):
        yield f"rows of out {text}", lambda change=change: {"out": s.moved(s.O, change)}
        yield f"rows of lse {text}", lambda change=change: {"lse": s.moved(rows(s.L), change)[..., 0].transpose(1, 2)}
    yield from tried(s, s.forward)
    if s.sink is not None:
        out, lse, _ = s.forward(sink=None).values()
        yield "the sink is missing in out, but not in lse", partial(dict, out=out)
        yield "the sink is missing in lse, but not in out", partial(dict, lse=lse)
    yield from merges(s)
    yield "out is divided by lse instead of exp(lse − max)", lambda: {"out": s.O * rows((s.L - s.top).exp() / s.L)}
    yield "out is divided by lse instead of exp(lse)", lambda: {"out": s.O * rows(s.L.exp() / s.L)}
    yield "out is not normalised", lambda: {"out": s.O * rows(s.L.exp())}
    for count in sorted({1, s.case.n // s.p, 2 * s.p, s.p * max(map(len, s.case.shards)) - s.case.n} - {0}):
        lse = torch.logaddexp(s.L, torch.tensor(math.log(count)))
        text = "a zero key is attended: a sum that starts at 1, or padding" if count == 1 else "padding is attended"
        yield text, lambda lse=lse: {"out": s.O * rows((s.L - lse).exp()), "lse": lse}

    if s.case.dilation and not s.case.causal:
        rules, j = rules_of(s)[0], s.case.n + torch.arange(max(s.case.dilation[0]))
        padded = rules["dilation offsets"](s.i[:, :1], j) & rules["segments"](s.i[:, :1], j)
        lse = torch.logaddexp(s.L, padded.sum((0, -1)).log())
        text = "padding of a branch is attended: zero keys fill its last segment"
        yield text, lambda lse=lse: {"out": s.O * rows((s.L - lse).exp().nan_to_num()), "lse": lse}

    each = (s.case.asks, s.case.shards)
    held = [(at, torch.tensor([*map(len, x)])[owner]) for at, x, owner in zip(s.loc, each, s.owner, strict=True)]
    whole = [(s.i[:, 0], s.case.n), (s.j[0], s.case.n)]
    for x, (whose, sides) in itertools.product(TILES, {"": whole, "a rank's ": held}.items()):
        done, kept = (at < size // x * x for at, size in sides)
        if done.any() and not done.all():
            text = f"out is zero on {whose}rows after the last whole tile of {x}"
            yield text, partial(dict, out=s.O * done[:, None, None])
            seen = s.times * done[:, None] * kept
            yield f"{text}, and keys after it do not count", lambda seen=seen: s.forward(times=seen)

    def over_heads() -> dict[str, Tensor]:
        P = (torch.einsum("bqhd,bqkd->bqhk", s.q, s.K) * s.scale).softmax(-1)
        return {"out": torch.einsum("bqhk,bqkd->bqhd", P, s.V)}

    yield "attention over the head axis: a transpose is missing", over_heads
    yield "lse is the maximum, not the log of the sum", lambda: {"lse": s.top}
    yield "lse is the maximum plus log2 of the sum", lambda: {"lse": s.top + (s.L - s.top) * math.log2(math.e)}
    yield "lse is the sum, its log is missing", lambda: {"lse": s.L.exp()}
    yield "lse lacks its maximum", lambda: {"lse": s.L - s.top}
    yield "lse is reshaped where it should be transposed", lambda: {"lse": s.L.transpose(1, 2).reshape(s.L.shape)}


# What a running out and lse (a) and those of the next part (b) are multiplied by, and the new lse; n is the right one.
STEPS: dict[str, Callable] = {
    "the running output is not rescaled": lambda a, b, n: (torch.ones_like(n), (b - n).exp(), n),
    "the new output is not rescaled": lambda a, b, n: ((a - n).exp(), torch.ones_like(n), n),
    "running and new output have each other's weights": lambda a, b, n: ((b - n).exp(), (a - n).exp(), n),
    "running and new output are averaged": lambda a, b, n: (torch.full_like(n, 0.5), torch.full_like(n, 0.5), n),
    "the weights are exp2 of natural differences": lambda a, b, n: ((a - n).exp2(), (b - n).exp2(), n),
    "the running lse, or maximum, is not updated": lambda a, b, n: ((a - n).exp(), (b - n).exp(), a),
    "the running lse becomes the block's": lambda a, b, n: ((a - n).exp(), (b - n).exp(), b),
}


def merges(s: Scene) -> Iterator[Guess]:
    """Right parts, merged wrongly: all at once, or one after the other."""
    tiles = ((f"tiles of {x} keys", s.j // x) for x in TILES if x < s.case.n)
    tiles = ((what, torch.stack([s.times * (at == t) for t in range(int(at.max()) + 1)])) for what, at in tiles)
    for what, parts in itertools.chain(s.parts(s.hop, -s.hop % s.p, s.owner[1].expand_as(s.hop)), tiles):
        outs, lses, top = s.forward(times=parts, sink=None).values()
        outs = outs * rows((lses.logsumexp(0) - s.L).exp().nan_to_num())  # a sink comes after the merging
        there = lses.isfinite()
        finite = lses.masked_fill(~there, 0.0)
        low, top = (x.masked_fill(~there, -1e30) for x in (lses, top))
        running = top.cummax(0)[0]
        fall = torch.cat([top[1:] - running[:-1], top[:1] * 0])
        slip = running + fall.flip(0).cumsum(0).flip(0)  # exp(old − own) for every one that comes after it
        alone, late, right, over = ((low - x).exp() for x in (top, running, running[-1], 2 * running - running[-1]))
        for text, weights in {
            f"the outputs of {what} are averaged": there / there.sum(0),
            f"the outputs of {what} are averaged, empty ones too": there / len(parts),
            f"the outputs of {what} are added": there.double(),
            f"{what} have each other's weights, in reverse": low.softmax(0).flip(0),
            f"only the first of {what} is in the numerator": torch.cat([low.softmax(0)[:1], low[1:] * 0]),
            f"{what} are merged by the largest lse, not by their logsumexp": (low - low.amax(0)).exp(),
            f"out is divided by the sum of the first of {what} alone": (low - low[0]).exp(),
            f"natural lse merged as base 2 ({what})": (low * math.log(2)).softmax(0),
            f"base-2 lse merged as natural ({what})": (low / math.log(2)).softmax(0),
            f"{what} that a query does not see have lse 0 and take weight": finite.softmax(0),
            f"{what} whose lse is 0 are taken for masked": low.masked_fill(low == 0, -math.inf).softmax(0),
            f"{what} are merged without rescaling to a common maximum": alone / alone.sum(0),
            f"the running denominator is not rescaled when the maximum grows ({what})": right / late.sum(0),
            f"what runs is rescaled by exp(new − old maximum), upside down ({what})": over / over.sum(0),
            f"what runs is rescaled by exp(old − own maximum), not by the larger of both ({what})": (
                low - slip
            ).softmax(0),
            f"the running numerator is not rescaled when the maximum grows ({what})": late / right.sum(0),
        }.items():
            yield text, partial(dict, out=(outs * rows(weights.nan_to_num())).sum(0))
        for text, lse in {"last": lses[-1], "first": lses[0], "largest": lses.amax(0)}.items():
            yield f"lse is that of the {text} of the {what}", partial(dict, lse=lse)
        yield f"lse takes the maximum of the first of {what} alone", partial(dict, lse=s.L - s.top + top[0])
        yield f"the lse of {what} is added instead of merged", partial(dict, lse=finite.sum(0))
        for (text, step), zero in itertools.product(STEPS.items(), (False, True)):
            yield f"merging {what}: {text}{' (from zero)' * zero}", partial(stepwise, outs, low, step, zero)


def stepwise(outs: Tensor, low: Tensor, step: Callable, zero: bool) -> dict[str, Tensor]:
    """Parts merged one after the other, into the first or into nothing."""
    out, lse = (outs[0] * 0, low[0] * 0 - 1e30) if zero else (outs[0], low[0])
    for o, b in zip(outs[not zero :], low[not zero :], strict=True):
        x, y, lse = step(lse, b, torch.logaddexp(lse, b))
        out = rows(x) * out + rows(y) * o
    return {"out": out.nan_to_num(), "lse": lse.masked_fill(lse < -1e29, -math.inf)}


# ------------------------------------------------------------------------------------- the backward


def in_only(about: list[str]) -> str:
    """The words for what is wrong in some gradients of a right forward."""
    return f"in {'the backward' if set(about) >= set(GRADS) else ', '.join(about)} only: {{}}"


def backwards(s: Scene, about: list[str], whole: dict[str, Tensor]) -> Iterator[Guess]:
    """Every wrong backward of a right forward that has a name; `about` are the wrong tensors."""
    who, right = ", ".join(about), s.backward()
    yield from saved(s, about, whole)
    yield from tried(s, s.backward, in_only(about))
    if s.mod:
        yield in_only(about).format("the derivative of score_mod is missing"), lambda: s.backward(slope=1.0)
        D, slope = s.D - s.dlse[..., None], torch.as_tensor(s.scores(s)[1])
        past = torch.where(slope.abs() > 1e-9, D / slope, D) + s.dlse[..., None]
        yield in_only(about).format("the row sum D misses the derivative of score_mod"), lambda: s.backward(D=past)
    swap, both = {"dk": "dv", "dv": "dk"}, right["dk"] + (right["dv"] if s.K.shape == s.V.shape else 0)
    for text, change in moves(s):
        moved = lambda change=change: {n: s.moved(x, change) for n, x in right.items() if x.ndim == 4}
        yield f"{'rows of ' * (len(about) == 1)}{who} {text}", moved
        sums = lambda change=change: {"dk": both, "dv": s.moved(both, change)}
        yield f"dk is dk + dv of this shard, dv too, but its rows {text}", sums
    yield f"{who}: dk + dv of this shard", lambda: dict.fromkeys(swap, both)
    yield "dk and dv are swapped, or one is taken for both", lambda: {n: right[swap[n]] for n in swap}
    last = s.backward(times=s.times * (s.hop == s.p - 1))
    travels = lambda: {n: right[m] - last[m] + last[n] for n, m in swap.items()}
    yield "dk travels in the place of dv, or dv of dk", travels
    odd = s.backward(times=s.times * ((s.p - s.hop) % 2))
    yield "dk and dv are swapped at every hop", lambda: {n: right[n] - odd[n] + odd[m] for n, m in swap.items()}


def saved(s: Scene, about: list[str], whole: dict[str, Tensor], places: bool = False) -> Iterator[Guess]:
    """A backward with another lse or other row sums D = Σ dO·O than the merged ones, as one written per block or per
    branch may have; in some `places` only, or everywhere. Gradients are linear in dlse: its factor is read off.
    """
    for what, parts in s.parts(s.hop):
        outs, lses, _ = s.forward(times=parts).values()
        sums, merged, total = row_sums(s.do, outs), s.L.expand_as(lses), (s.L - s.top).exp().nan_to_num()
        order = torch.arange(len(parts)).view(-1, *[1] * s.L.ndim)
        late = order >= (order * lses.isfinite()).amax(0).clamp(min=1)  # the last part that a query sees, if not alone
        before = lses.masked_fill(late, -math.inf).logsumexp(0).expand_as(lses)
        share = ((lses - before).exp() * ~late).nan_to_num()
        D = row_sums(s.do, s.O).expand_as(sums)
        Ls = {
            "": merged,
            "the lse is base 2, taken for natural": merged * math.log2(math.e),
            f"the backward uses the lse of {what} for the merged lse": lses,
            f"the backward uses the lse of the last of the {what}": lses[-1:].expand_as(lses),
            f"the backward uses the lse from before the last of the {what}": before,
        }
        Ds = {
            "": D,
            "the row sum D is missing: softmax's backward lacks Σ dO·O": sums * 0,
            f"the weights that mix the {what} are detached: D = Σ dO·O with the out of each": sums,
            f"D = Σ P·dP is summed over one of the {what} alone": sums * (lses - s.L).exp().nan_to_num(),
            f"D = Σ dO·O with out from before the last of the {what}": (sums * share).sum(0).expand_as(sums),
            "D = Σ dO·O with out before it is divided by the sum": D * total,
        }
        given = {"times": parts, "L": merged[..., None], "D": D[..., None]}
        if places:
            Ls["the lse is natural, taken for base 2"] = merged * math.log(2)
            Ls["the lse of the own block is taken for the merged one"] = lses[:1].expand_as(lses)
            each = [("L", one) for one in Ls.items()] + [("D", one) for one in Ds.items()]
            some = {text: {name: x[..., None]} for name, (text, x) in each if text}
            of = others_rows(s) if s.even and what == "blocks" else {}
            if s.halved:
                of["the other half of a shard"] = s.halves_swapped(0).flatten()[s.order[0]][:, None]
            for text, at in of.items():
                lse, both = {"L": merged[..., at]}, {"D": (D - s.dlse)[..., at] + s.dlse[..., None]}
                some[f"the lse is that of {text}"], some[f"the row sum D is that of {text}"] = lse, {"D": D[..., at]}
                some[f"the row sum D, less the gradient of lse, is that of {text}"] = both
                some[f"lse and row sum D are those of {text}"] = lse | both
            for (text, wrong), (where, pairs) in itertools.product(some.items(), s.places(True).items()):
                wrong = {name: torch.where(pairs, x, given[name]) for name, x in wrong.items()}
                yield in_only(about).format(f"{text}, on {where} only"), partial(s.backward, **given | wrong)
            continue
        for (a, L), (b, D) in itertools.product(Ls.items(), Ds.items()):
            if (a and torch.equal(L, merged)) or (b and (about == ["dv"] or torch.equal(D, Ds[""]))):
                continue  # this part of the sentence would say nothing of the case
            given |= {"L": L[..., None], "D": D[..., None]}
            bare, full = (s.backward(**given, dlse=m * s.dlse) for m in (0, 1))
            pull = {n: full[n] - bare[n] for n in full}
            m = factor([(whole[n] - bare[n], pull[n]) for n in about]) if s.dlse.any() and about != ["dv"] else 1.0
            c = "" if abs(m - 1) < 1e-3 else off("the gradient of lse", m, s)
            sentence = "; ".join(x for x in (a, b, c) if x)
            yield sentence, lambda bare=bare, pull=pull, m=m: {n: bare[n] + m * pull[n] for n in pull}


def somewhere(s: Scene, about: list[str], whole: dict[str, Tensor]) -> Iterator[Guess]:
    """One ingredient wrong on some blocks only, or in the forward on some ranks; the backward has lse and D besides."""
    if about[0] in (*GRADS, "dsink"):
        yield from tried_on_places(s, s.backward, in_only(about))
        yield from saved(s, about, whole, places=True)
        return
    yield from tried_on_places(s, s.forward)

    def mixed(changed: Callable, at: Tensor) -> dict[str, Tensor]:
        wrong = s.forward(**changed())
        return {"out": torch.where(at[:, None, None], wrong["out"], s.O), "lse": torch.where(at, wrong["lse"], s.L)}

    some = {"all ranks but the first": s.owner[0] > 0, "the first rank": s.owner[0] == 0}
    for (text, changed), (where, at) in itertools.product(ingredients(s), some.items()):
        yield f"{text}, on {where} only", partial(mixed, changed, at)


# ------------------------------------------------------------------------ other calls, and what fits


def crossed(s: Scene, truth: Any, others: list) -> Iterator[Guess]:
    """What calls do to each other."""
    for other in others:
        o = other.scene
        yield f"{CALLS} what one forward saved is overwritten by the next", partial(o.backward, do=s.do, dlse=s.dlse)
        yield f"{CALLS} it is the other's", partial(dict, other.whole)
        kept = {"lse": {"L": o.L[..., None]}, "row sum D": {"D": o.D}, "out": {"O": o.O}, "q": {"q": o.q}}
        kept |= {"K and V": {"K": o.K, "V": o.V}, "lse and row sum D": {"L": o.L[..., None], "D": o.D}}
        for what, changed in kept.items():
            yield f"{CALLS} the {what} that one saved is overwritten by the next", partial(s.backward, **changed)
        grads = {n: x for n, x in other.whole.items() if n in GRADS}
        for old in (other.whole, grads, o.backward(times=o.times * (o.hop == 0))):
            added = lambda old=old: {n: truth.whole[n] + x for n, x in old.items()}
            yield f"{CALLS} a buffer is not cleared, results add up", added


def factor(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The m for which got is nearest to m · unit, over pairs of the two."""
    got, unit = (torch.cat([x.flatten() for x in each]).nan_to_num(0, 0, 0) for each in zip(*pairs, strict=True))
    return ((got * unit).sum() / unit.square().sum()).item()


def off(what: str, m: float, s: Scene) -> str:
    """What a factor means, by its name if it has one."""
    known = {"1/p": 1 / s.p, "p": s.p, "1/√d": s.scale, "√d": 1 / s.scale, "1/d": s.scale**2, "h/g": s.e}
    known |= {"g/h": 1 / s.e, "ln 2": math.log(2), "log2 e": math.log2(math.e), "2": 2, "1/2": 0.5, "−1": -1}
    known |= {"1/(scale·√d), as if none were given": s.case.d**-0.5 / s.scale}
    near = (text for text, x in known.items() if x != 1 and abs(m / x - 1) < 1e-3)
    return f"{what} is wrong by a factor {next(near, f'{m:.3g}')}" if abs(m) > 1e-3 else f"{what} is zero"


def fits(s: Scene, whole: dict[str, Tensor], about: list[str], truth: Any) -> Iterator[Guess]:
    """A factor, or for lse a constant, that is read off the candidate."""
    by = {n: factor([(whole[n], truth.whole[n])]) for n in about}
    yield ", ".join(off(n, m, s) for n, m in by.items()), lambda: {n: m * truth.whole[n] for n, m in by.items()}
    if s.times.all() and all(whole[n].ndim == 4 for n in about):  # a row that sees one key is like many
        yield from held(s, whole, about, truth)
    if about == ["lse"]:
        gap = (whole["lse"] - s.L)[s.L.isfinite() & whole["lse"].isfinite()].mean()
        yield f"lse is off by a constant: {off('its sum', gap.exp().item(), s)}", lambda: {"lse": s.L + gap}
    if about == ["out"]:
        share = (whole["out"] * s.O).sum(-1) / s.O.square().sum(-1)  # of a row, b q h
        for what, total in {"exp(score − max)": s.L - s.top, "exp(score)": s.L}.items():
            total = total.exp().transpose(1, 2)
            eps = ((1 / share - 1) * total).nanmedian()
            out = s.O * (total / (total + eps))[..., None]
            yield f"{eps.item():.1g} is added to the sum of {what}", partial(dict, out=out)


def held(s: Scene, whole: dict[str, Tensor], about: list[str], truth: Any) -> Iterator[Guess]:
    """Rows that are right ones of another place, whichever it is, or zero; what is near to none is no guess."""
    found, kinds, zero = {}, {}, ""
    for n in about:
        got, right = (x.flatten(0, 2) for x in (whole[n], truth.whole[n]))
        at, wrong = torch.arange(len(got)), (got - right).norm(dim=1) > 1e-3 * right.norm(dim=1)
        more = torch.cat([right, right[:1] * 0])
        at[wrong] = torch.cdist(got[wrong], more).argmin(1)
        if (got - more[at]).norm() > 0.01 * (got - right).norm():
            return
        found[n], side = more[at].view_as(whole[n]), int(n in ("dk", "dv"))
        lost = at == len(right)
        zero, at = ", or zero" if lost.any() else zero, at.where(~lost, torch.arange(len(at)))
        batch, token, head = torch.meshgrid(*map(torch.arange, whole[n].shape[:3]), indexing="ij")
        each = {"sequence": batch, "rank": s.owner[side][token], "token": s.loc[side][token], "head": head}
        kinds |= {kind: None for kind, x in each.items() if not torch.equal(x.flatten()[at], x.flatten())}
    if kinds:
        yield f"rows of {', '.join(about)} are right ones of another {' and '.join(kinds)}{zero}", partial(dict, found)
