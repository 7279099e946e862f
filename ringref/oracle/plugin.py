"""For pytest: `ringref_check` is `ringref.oracle.check`, and a test that calls it fails with the report.

def test_my_attention(ringref_check):
    ringref_check(my_attention, layout="zigzag", features={"causal", "gqa"})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from . import Pool, Report, check


@pytest.fixture(scope="session")
def ringref_pool() -> Iterator[Pool]:
    """Processes for every sweep of the session, started when first needed."""
    with Pool(8) as pool:
        yield pool


@pytest.fixture
def ringref_check(ringref_pool: Pool) -> Callable[..., Report]:
    """Judge a candidate as `ringref.oracle.check` does; a report that is not right fails the test."""

    def judge(fn: Callable, **told: Any) -> Report:
        report = check(fn, **{"pool": ringref_pool, "progress": False} | told)
        if not report:
            pytest.fail(str(report), pytrace=False)
        return report

    return judge
