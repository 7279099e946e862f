"""Training engines of others on a ring's ranks: the dense loss at every step, once the loss is multiplied by the ring's
size. Needs the extra `engines`.
"""

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
    began, arrived = (float(line.split(" after ")[1].split(" ms")[0]) for line in found["asynchronous"][:2])
    assert began < arrived - 200 and "refuses" in found["asynchronous"][2]
