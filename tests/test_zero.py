"""Training engines of others on a ring's ranks: the dense loss at every step, once the loss is multiplied by the ring's
size. Needs the extra `engines`.
"""

import re
from functools import partial

import pytest

from ringref import launch
from ringref.lab import zero


def test_a_sum_by_hand_is_the_dense_curve():
    (dense,) = launch(partial(zero.train, engine="torch"), 1)
    both = launch(partial(zero.train, engine="torch"), 2)
    assert [sum(x) for x in zip(*both)] == pytest.approx(dense, rel=1e-6)


@pytest.mark.slow
def test_deepspeed_and_fairscale_train_the_dense_curve():
    pytest.importorskip("deepspeed")
    pytest.importorskip("fairscale")
    found = zero.compare()
    worst = {row["engine"]: row["worst"] for row in found["rows"]}
    stale = worst.pop("FairScale, torch 2's zero_grad()")
    clipped = worst.pop("DeepSpeed, default clipping")
    assert max(worst.values()) < 1e-6 < 1e-4 < min(stale, clipped)
    *posted, refused = found["asynchronous"]
    times = [[float(x) for x in re.findall(r"after (\d+) ms", line)] for line in posted]
    assert all(returned < done - 200 for returned, done in times) and len(times) == 2 and "refuses" in refused
