"""The main job: what a newcomer runs first, its exit code, and its options."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

import ringref
from ringref import __main__
from ringref.lab import main_job
from ringref.lab.memory import measured, predicted


def run(capsys, tmp_path, *arguments):
    code = main_job.main([*arguments, "--json", "--figure", str(tmp_path / "picture.svg")])
    return code, json.loads(capsys.readouterr().out)["rows"]


def test_every_method_and_case_is_judged(capsys, tmp_path):
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)))
    options = ("--ranks", "2", "--tokens", "96", "--layout", "striped", "--dtype", "bfloat16")
    code, rows = run(capsys, tmp_path, str(text), *options)
    assert code == 0
    cases = [(row["case"], row["method"]) for row in rows]
    assert cases == [(c, m) for c in ("causal", "LongNet") for m in main_job.METHODS]
    for row in rows:
        assert set(row["errors"]) == {"out", "lse", "dq", "dk", "dv"}
        assert 0 < max(row["errors"].values()) < 0.02
        assert 0 < row["budget_used"] <= 1
        assert min(row["peak"], row["predicted"], row["sent"], row["seconds"]) > 0
    assert (tmp_path / "picture.svg").read_text().count("<svg") == 1


def test_over_budget_is_exit_code_1(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(main_job, "MULTIPLE", 1e-3)
    code, rows = run(capsys, tmp_path, "--ranks", "2", "--tokens", "40")
    assert code == 1
    assert max(row["budget_used"] for row in rows) > 1


def test_a_step_whose_lse_has_no_gradient_holds_what_is_predicted():
    q, k, v, dout = torch.randn(4, 1, 256, 4, 16)
    dense = partial(ringref.dense_attention, causal=True)
    main_job.forward_backward(dense, q, k, v, dout, None)
    with measured() as usage:
        main_job.forward_backward(dense, q, k, v, dout, None)
    assert 0.9 < usage.peak / predicted("dense", 256, 1, 4, 16, causal=True) < 1.1


def test_the_table_fits_and_names_everything(capsys, tmp_path):
    told = main_job.options(["--ranks", "1", "--tokens", "24", "--q-chunk", "8"])
    rows = main_job.run(told, main_job.Console(stderr=True))
    assert all(0.9 < row["peak"] / row["predicted"] < 1.1 for row in rows)
    console = main_job.Console(width=main_job.WIDTH)
    console.print(main_job.as_table(rows, told))
    shown = capsys.readouterr().out
    assert "…" not in shown
    for word in ("zigzag", "collective", "LongNet", "predicted", "sent", "float32", "over gloo"):
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens: expected at least 1, got 0"),
        (["--heads", "3"], "--heads, --head-dim: expected even numbers, got 3, 16"),
        (["--layout", "spiral"], "invalid choice: 'spiral'"),
        (["no such file"], "text: no such file is not a file"),
        ([os.devnull], f"text: {os.devnull} is not a file"),
        (["empty"], "empty is empty"),
        (["--ranks", "5000"], "--ranks: expected at most 4096, got 5000"),
        (["--ranks", "two"], "--ranks: invalid number value: 'two'"),
        (["--q-chunk", "0"], "--q-chunk: expected at least 1, got 0"),
        (["--figure", "empty/in/a/file.svg"], "--figure: cannot write there"),
        (["--figure", ""], "--figure: expected a file's name"),
        (["bench", "--ranks", "0"], "--ranks: expected at least 1, got 0"),
        (["bench", "--tokens", "64", "-5"], "--tokens: expected at least 1, got -5"),
        (["bench", "--dilated-tokens", "1"], "--dilated-tokens: expected at least 64, got 1"),
        (["bench", "--data", "empty"], "--data: cannot write there"),
        (["bench", "--sections", "speed"], "--sections: invalid choice: 'speed'"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    """Before any work begins."""
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    with pytest.raises(SystemExit) as caught:
        __main__.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
