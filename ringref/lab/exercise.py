"""The notebooks' exercises, judged by their numbers, and the reader's code beside the library's."""

import html
import inspect
import os
import textwrap


def check(answer, truth, within=1e-9):
    """Compare an answer with the truth, and say how far apart they are.

    Args:
        answer: a tensor or a sequence of tensors; None (or a sequence with None in it) while nothing is written.
        truth: as many tensors of the same shapes.
        within: the largest error that is right, relative to the norm of the truth.

    Raises:
        AssertionError: the answer is wrong; or it is missing and the environment variable RINGREF_EXERCISES is set,
            with which the tests insist on the folded answers.
    """
    answers, truths = ([*x] if isinstance(x, (list, tuple)) else [x] for x in (answer, truth))
    if not answers or any(x is None or x is ... for x in answers):
        assert not os.environ.get("RINGREF_EXERCISES"), "the exercise has no answer"
        print("not written yet")
        return
    assert len(answers) == len(truths), f"{len(answers)} results, {len(truths)} expected"
    for i, (x, true) in enumerate(zip(answers, truths, strict=True)):
        assert x.shape == true.shape, f"result {i} has shape {tuple(x.shape)}, expected {tuple(true.shape)}"
        error = float((x - true).norm() / true.norm().clamp_min(1e-300))
        assert error <= within, f"result {i}: relative error {error:.3g}, not yet right"
    print(f"right: every relative error is below {within:g}")


class side_by_side:
    """The sources of some functions in columns: `side_by_side(mine, theirs)` as the last line of a cell."""

    def __init__(self, *functions):
        self.sources = {f.__name__: textwrap.dedent(inspect.getsource(f)).strip() for f in functions}

    def __repr__(self):
        return "\n\n".join(self.sources.values())

    def _repr_html_(self):
        style = "vertical-align:top;text-align:left;padding:0 1em 0 0"
        pre = "font-size:11px;line-height:1.35;white-space:pre-wrap"
        longest = [max(map(len, x.splitlines())) for x in self.sources.values()]  # the longer lines, the wider a column
        row = "".join(
            f'<td style="{style};width:{100 * wide / sum(longest):.0f}%"><pre style="{pre}">{_hanging(x)}</pre></td>'
            for wide, x in zip(longest, self.sources.values(), strict=True)
        )
        return f'<table style="table-layout:fixed;width:100%"><tr>{row}</tr></table>'


def _hanging(source):
    """As HTML, in which what is wrapped of a line stands deeper than the line; without styles the same text."""
    rows = []
    for line in source.splitlines():
        deep = len(line) - len(line.lstrip()) + 4
        look = f"display:inline-block;width:100%;box-sizing:border-box;padding-left:{deep}ch;text-indent:-{deep}ch"
        rows.append(f'<span style="{look}">{html.escape(line)}</span>' if line else "")
    return "\n".join(rows)
