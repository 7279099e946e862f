"""What a ring holds does not grow with the number of ranks, and its parts keep it small."""

from functools import partial

import pytest
import torch
from common import in_parts, step_peaks

from ringref import simulate
from ringref.engine import kernels

S, H, D = 128, 16, 64


@pytest.mark.parametrize("parts", [3, 4])
def test_peak_is_flat_in_p(parts, monkeypatch):
    monkeypatch.setattr(kernels, "HALF", ())  # as kernels of a GPU: no float32 copies around the one of the CPU
    step = partial(step_peaks, method="ring", causal=True, layout="zigzag", dtype=torch.bfloat16, s=S, h=H, d=D)
    with in_parts(parts):
        peaks = {p: max(both for _, both in simulate(step, p)) / (S * H * D * 2) for p in (2, 3, 4, 8)}
    # own outputs and gradients are 4; a fused backward's accumulator, 2 / parts, is not seen here
    assert max(peaks.values()) + 2 / parts < {3: 10.0, 4: 9.8}[parts], peaks
    assert peaks[2] < peaks[3] < peaks[4] and peaks[8] < 1.02 * peaks[4], peaks
