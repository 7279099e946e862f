"""Merges and sums in one pass over memory: Triton's interpreter plays the GPU. Large blocks on a real one: test_gpu."""

import sys
import warnings

import pytest
import torch

from ringref import engine

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if torch.cuda.is_available():
    pytest.skip("what is compiled and what is interpreted do not live in one process", allow_module_level=True)


@pytest.fixture
def ways(monkeypatch):
    """sums, and fused.py as the interpreter runs it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from ringref.engine import fused, sums

    return sums, fused


def strided(x):
    """m 2, c 7, h 3 of b 2, s 40, h 6: rows and heads two apart, not from the first."""
    b, row, head, *rest = x.stride()
    return x.as_strided((2, 2, 7, 3, *x.shape[3:]), (b, 20 * row, 2 * row, 2 * head, *rest), row + head)


@pytest.mark.parametrize("d", [64, 72, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_of_any_strides_merge_and_add_in_place(ways, dtype, d):
    sums, fused = ways
    torch.manual_seed(0)
    out, lse = torch.randn(2, 40, 6, d).to(dtype), torch.randn(2, 40, 6)
    piece, other = torch.randn(2, 2, 7, 3, d).bfloat16(), torch.randn(2, 2, 7, 3)
    strided(lse)[0, 0, :2] = other[0, 0, 1:3] = -torch.inf
    strided(lse)[1, 1, 2], other[1, 1, 3], other[1, 0, 0] = torch.inf, torch.inf, torch.nan
    found = []
    for way in (sums._PLAIN, fused):
        mine, its = out.clone(), lse.clone()
        assert fused.takes(strided(mine), piece)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the interpreter's NumPy on inf − inf
            way.merge(strided(mine), strided(its), (0, strided(mine), strided(its)), (0, piece, other))
        total = torch.empty(2, 2, 7, 3, d)
        way.add(total, (0, strided(mine)), (0, piece))
        way.add(strided(mine), (0, strided(mine)), (0, piece))
        found.append((mine, its, total))
    for x, y in zip(*found, strict=True):
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(x, y, rtol=4 * eps, atol=4 * torch.finfo(dtype).eps, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("others", [[(0, 40)], [(20, 20), (5, 30)], [(0, 40), (20, 20), (0, 13)]], ids=str)
def test_up_to_four_blocks_merge_and_add_in_one_pass(ways, others, dtype):
    """Each its own range of rows, as halves of a zigzag shard are."""
    sums, fused = ways
    torch.manual_seed(0)

    def block(first, rows, dtype=torch.bfloat16):
        out, lse = torch.randn(2, 1, rows, 6, 72).to(dtype), 9 * torch.randn(2, 1, rows, 6)
        lse[0, 0, ::3] = -torch.inf
        out[0, 0, ::3] = 0
        return first, out, lse

    whole, *_ = blocks = [block(0, 40, torch.float32), *(block(*x) for x in others)]
    lses, outs = torch.full((len(blocks), 2, 1, 40, 6), -torch.inf), torch.zeros(len(blocks), 2, 1, 40, 6, 72)
    for i, (first, out, lse) in enumerate(blocks):
        lses[i, :, :, first : first + lse.shape[2]], outs[i, :, :, first : first + lse.shape[2]] = lse, out
    true = (lses.softmax(0).nan_to_num()[..., None] * outs).sum(0), lses.logsumexp(0), outs.sum(0)
    for way in (sums._PLAIN, fused):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            total = torch.empty(2, 1, 40, 6, 72, dtype=dtype)
            found = torch.empty_like(total), torch.empty(2, 1, 40, 6), total
            way.merge(*found[:2], *blocks)
            way.add(total, *(block[:2] for block in blocks))
            if dtype == torch.float32:  # in place
                way.add(whole[1], *(block[:2] for block in blocks))
                assert torch.equal(whole[1], total)
                whole[1].copy_(outs[0])
                way.merge(*whole[1:], *blocks)
                assert all(map(torch.equal, whole[1:], found))
        for x, y in zip(found, true, strict=True):
            eps = torch.finfo(x.dtype).eps
            torch.testing.assert_close(x, y.to(x.dtype), rtol=8 * eps, atol=8 * eps)
        whole[1].copy_(outs[0])
        whole[2].copy_(lses[0])


def test_a_pass_takes_as_many_blocks_as_it_has_arguments_for(ways):
    sums, fused = ways
    assert sums._AT_ONCE == len(fused._BLOCKS)


def test_what_it_cannot_address_goes_the_plain_way(ways):
    _, fused = ways
    x = torch.empty(1, 2, 8, 4, 64)
    assert fused.takes(x) and not fused.takes(x.transpose(3, 4)) and not fused.takes(x.double())
    assert not fused.takes(torch.empty(1, 2, 8, 4, 65)) and not fused.takes(x.expand(2**15, 2, 8, 4, 64))
    assert not fused.takes(x[:, :, :1].expand(1, 2, 2**28, 4, 64))


def place(into, c, h, x_c, x_h):
    zero = tl.arange(0, 1)
    tl.store(into + zero, places(zero + c, zero + h, 0, 0, x_c, x_h, 1))  # noqa: F821 (a test brings it)


def test_heads_that_lie_far_apart_are_found(ways, monkeypatch):
    """Of 16M tokens of 128 in b h s d, head 15 begins where an int32 has no room."""
    _, fused = ways
    monkeypatch.setitem(globals(), "places", fused._places)
    into, step = torch.zeros(1, dtype=torch.int64), 128 // fused._LANES.value
    triton.jit(place)[1, 1](into, 2**24 - 1, 15, step, 2**24 * step)
    assert int(into) == (16 * 2**24 - 1) * step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_its_proof_does_not_depend_on_the_default_dtype(ways, dtype):
    sums, fused = ways
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert fused.fault(sums._PLAIN, torch.device("cpu")) is None
    finally:
        torch.set_default_dtype(before)


def test_it_is_proved_before_it_is_trusted(ways, monkeypatch):
    sums, fused = ways
    here = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sums._proved(here) is fused
    monkeypatch.setattr(fused, "add", lambda total, one, *others: total.copy_(one[1]))
    with pytest.warns(RuntimeWarning, match="Triton's merge and sum are passed over on cpu: wrong sum"):
        assert sums._proved(here) is None

    def without_a_compiler(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "merge", without_a_compiler)
    with pytest.warns(RuntimeWarning, match="passed over on cpu: RuntimeError: Failed to find C compiler"):
        assert sums._proved(here) is None

    def without_the_source(*_, **__):
        raise ValueError("@jit functions should be defined in a Python file")

    monkeypatch.setattr(triton, "jit", without_the_source)
    monkeypatch.delattr(engine, "fused")
    monkeypatch.delitem(sys.modules, fused.__name__)
    with pytest.warns(RuntimeWarning, match="passed over on cpu: ValueError: @jit functions should be defined"):
        assert sums._proved(here) is None
