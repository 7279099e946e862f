"""The proof that the oracle is good: it rejects every mutant of the zoo, names most, and accuses
nothing correct.
"""

import json
from pathlib import Path

import pytest
import zoo

from ringref.oracle import check

RECORD = Path(__file__).parent / "zoo" / "last_run.json"
SUBSET = [mutant.name for mutant in zoo.MUTANTS if not mutant.hangs][::9]  # what CI can afford

# What a diagnosis must say to count as the right cause, by the mutant's slug. A mutant whose slug
# is missing here, or whose diagnosis says something else, was rejected without its cause being
# named.
SAYS = {
    "outputs-averaged": "averaged",
    "outputs-added": "added",
    "divided-by-lse": "divided by lse",
    "lse-without-shift": "exp without the maximum",
    "base-2-lse-merged-as-natural": "base-2",
    "zero-lse-for-nothing-seen": "starts at 1",
    "running-max-starts-at-zero": "starts at 0",
    "nan-when-nothing-seen": "NaN where",
    "accumulates-in-bf16": "low precision",
    "lse-not-updated": "lse becomes the block's",
    "running-max-forgotten": "NaN where",
    "denominator-not-rescaled": "denominator is not rescaled",
    "lse-without-max": "lacks its maximum",
    "lse-saved-in-bf16": "low precision",
    "causal-in-local-coordinates": "local coordinates",
    "window-per-block": "window (left) in local coordinates",
    "window-off-by-one": "window (left) off by one",
    "window-sides-confused": "window (right): taken as left",
    "mask-mod-local-indices": "mask_mod in local coordinates",
    "mask-written-in-place": "input was written",
    "mask-batch-ignored": "batch 0",
    "zigzag-treated-as-contiguous": "contiguous layout",
    "padding-attended": "padding is attended",
    "wrong-source-rank": "wrong source rank",
    "causal-off-by-one": "causal mask in local coordinates",  # of a striped layout: the same thing
    "causal-wrong-on-some-hops": "on hops after 1",
    "gqa-heads-interleaved": "interleaved",
    "scale-wrong": "scaled",
    "two-receives-into-one-buffer": "two receives into one buffer",
    "receive-into-buffer-being-sent": "receiving into the buffer being sent",
    "read-before-wait": "read before its wait",
    "send-never-waited": "unfinished work",
    "group-rank-used-as-global": "group",
    "world-instead-of-group": "world",
    "unequal-hop-counts": "unequal hop counts",
    "hops-once-too-often": "wrong rank: rank r has that of rank r-1",
    "self-send": "self-send",
    "non-contiguous-buffer": "non-contiguous",
    "wrong-direction": "wrong source rank",
    "one-tensor-sent-twice": "in the place of",
    "equal-shards-assumed": "wrong size",
    "gradients-not-home": "wrong rank: rank r has that of rank r+1",
    "gather-backward-not-reduced": "zero but for the own block",
    "gradient-averaged-over-ranks": "factor 1/p",
    "block-lse-instead-of-merged": "lse of blocks",
    "block-out-for-delta": "one of the blocks alone",
    "dlse-ignored": "gradient of lse is zero",
    "dlse-sign": "gradient of lse is wrong by a factor −1",
    "scale-missing-in-dq": "factor √d",
    "scale-missing-in-dk": "factor √d",
    "dq-of-last-block-only": "overwritten",
    "gradients-of-own-block-only": "overwritten",
    "saved-block-is-a-neighbours": "rows of K, V end on the wrong rank",
    "dv-uses-wrong-p": "lse of blocks",
    "gqa-gradient-averaged": "query heads of a group are averaged",
    "gqa-gradient-of-one-head": "only the first query head",
    "saved-state-shared-between-calls": "overwritten by the next",
    "stale-gradients": "not cleared",
    "nan-gradient-when-nothing-seen": "NaN where",
    "dk-dv-swapped": "swapped",
    "backward-mask-differs": "in the backward only",
    "input-written-in-place": "input was written",
    "offset-from-shard": "dilation offsets in local coordinates",
    "offset-from-sequence-start": "dilation offsets: counted from the sequence",
    "segment-from-shard": "segments in local coordinates at every hop, queries only",
    "heads-unassigned": "heads unassigned",
    "tail-dropped": "tail",
    "long-segment-skipped": "is dropped",
    "zero-lse-for-unselected-rows": "lse 0",
    "branches-averaged": "averaged",
    "mixing-weights-detached": "detached",
    "lse-of-one-branch": "last of the branches",
    "attends-over-heads": "head axis",
    "offset-j-div-r": "(j div r)",
    "causal-leak": "causal mask by rank instead of position",
    "multiplicity-ignored": "counts once",
    "backward-of-first-branch-only": "in the backward only: dilation offsets: only branch 0",
    "branch-lse-instead-of-merged": "for the merged lse",
    "head-order": "have heads",
    "sequence-order": "have tokens",
    "batch-mixed": "taken for the",
    "padded-heads-kept": "padded",
    "heads-not-divisible": "heads that the ranks do not divide",
    "one-max-for-the-whole-block": "for several rows",
    "mask-from-tile": "counted from a tile",
    "state-under-too-small-a-key": "it passes alone",
    "mask-kept-by-shape": "kept by its shape",
    "scale-of-padded-dim": "head dim padded",
    "scale-ignored": "scale is ignored",
    "unwritten-memory": "memory that nobody wrote",
    "dout-strides": "dO is read with other strides",
    "stale-v-in-backward": "V is the rank's own, on received blocks",
    "positions-of-queries-for-keys": "positions",
    "causal-bottom-right": "bottom-right",
    "documents-off-by-one": "documents a token too late",
    "sink-counted-p-times": "the sink is counted",
    "sink-scaled": "the sink is scaled",
    "score-mod-local-indices": "score_mod in local coordinates",
    "out-of-another-dtype": "out is float32 where",
    "local-maximum": "common maximum",
    "dq-not-reduced": "in dq only: zero but for the own block",
    "epsilon-in-the-sum": "is added to the sum",
    "finite-mask-value": "masked score is -10000",
    "own-v-at-every-hop": "V is the rank's own, on received blocks",
    "scale-wrong-on-received-blocks": "base 2 (ln 2), on received blocks",
    "base-2-lse-on-received-blocks": "the lse is base 2, taken for natural, on received blocks",
    "row-sum-missing-on-received-blocks": "the row sum D is zero: received blocks",
    "stale-k-on-last-hop": "K is stale, of the hop before, on the last hop",
    "ranks-reversed": "ranks counted from the end",
    "zero-lse-taken-for-masked": "whose lse is 0 are taken for masked",
    "sink-missing-in-saved": "the sink is missing in the saved lse and out",
    "dsink-of-batch-0": "the sink's gradient is of batch 0 alone",
    "scale-of-value-dim": "that of v's head dim",
    "delta-of-unnormalised-out": "with out before it is divided",
    "dlse-on-own-block-only": "the gradient of lse is zero: received blocks",
    "sum-in-low-precision": "low precision",
    "rescaled-upside-down": "upside down",
    "only-the-last-tile": "maximum, is not updated",
    "dk-in-the-other-half": "the other half of a shard",
    "sent-before-wait": "sent before its wait",
    "score-mod-not-differentiated": "the derivative of score_mod is missing",
    "positions-by-own-length": "rank · the query's shard for its first position, keys only, on received blocks",
    "late-half-sees-early-keys-only": "pairs are left out: received blocks, the late half of the keys",
}


def judged(name, pool, **told):
    facts = zoo.info(name)
    ranks = 4 if facts.ranks > 1 else 1
    return check(zoo.build(name), layout=facts.layout, features=facts.features, ranks=ranks, pool=pool, **told)


def named(name, report):
    said = SAYS.get(zoo.info(name).slug)
    return said is not None and said in (report.diagnosis or "")


@pytest.mark.parametrize("name", zoo.CORRECT)
def test_the_unmutated_pass_quick(name, pool):
    report = judged(name, pool, quick=True)
    assert report, str(report)


@pytest.mark.parametrize("name", SUBSET)
def test_a_subset_is_rejected(name, pool):
    assert judged(name, pool, stop_after=1).findings


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.CORRECT)
def test_the_unmutated_pass(name, pool):
    report = judged(name, pool)
    assert report, str(report)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_zoo_is_rejected_and_most_of_it_named(pool):
    blind = {name: facts["blind"] for name, facts in json.loads(RECORD.read_text()).items() if "blind" in facts}
    record = {}
    for mutant in zoo.MUTANTS:
        report = judged(mutant.name, pool)
        record[mutant.name] = {
            "rejected": bool(report.findings),
            "named": named(mutant.name, report),
            "cause": mutant.cause,
            "diagnosis": report.diagnosis,
            "seconds": round(report.seconds, 1),
        } | ({"blind": blind[mutant.name]} if mutant.name in blind else {})  # before any rule was changed
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    assert [name for name, facts in record.items() if not facts["rejected"]] == []
    assert sum(facts["named"] for facts in record.values()) > 0.8 * len(record)
