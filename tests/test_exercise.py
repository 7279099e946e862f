"""An exercise's answer is missing, wrong or right, and the reader is told which."""

import html
import re

import pytest
import torch

from ringref.lab.exercise import check, side_by_side


def test_an_answer_is_missing_right_or_wrong(capsys, monkeypatch):
    monkeypatch.delenv("RINGREF_EXERCISES", raising=False)
    truth = torch.arange(1.0, 5.0)
    check(None, truth)
    check([None], [truth])
    check(truth.clone(), truth)
    assert capsys.readouterr().out.splitlines() == ["not written yet"] * 2 + [
        "right: every relative error is below 1e-09"
    ]
    for answer, said in ((truth * 1.1, "relative error 0.1"), (truth[:2], "shape"), ([truth, truth], "2 results")):
        with pytest.raises(AssertionError, match=said):
            check(answer, truth)
    with pytest.raises(AssertionError, match="result 1: relative error nan"):
        check([truth, truth * torch.nan], [truth, truth])
    monkeypatch.setenv("RINGREF_EXERCISES", "1")
    with pytest.raises(AssertionError, match="no answer"):
        check(None, truth)


def test_sources_stand_side_by_side():
    shown = side_by_side(check, test_sources_stand_side_by_side)
    assert shown._repr_html_().count("<pre") == 2 and "def check(answer" in repr(shown)
    assert "&lt;= within" in shown._repr_html_()
    bare = html.unescape(re.sub("<[^>]*>", "", shown._repr_html_()))
    assert bare == "".join(shown.sources.values())  # the same text where a reader's program drops the styles
    assert "\n    shown = side_by_side(" in repr(shown) and "\n    answers, truths = " in repr(shown)  # still indented
