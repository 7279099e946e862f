"""What nbval lets pass: cells that never ran, pictures, layout; that a changed output fails; and that a notebook lives
when a reader changes its numbers and writes its answers.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = sorted((ROOT / "figures").glob("*.svg"))
if not NOTEBOOKS:
    pytest.skip("not in a checkout", allow_module_level=True)

LONGEST_CELL = 18  # lines, blank ones too
LONGEST_LINE = 120  # columns, of code and of what it prints: as many as a laptop shows beside the book's sidebars
LONGEST_PROSE = 100  # words between two cells of code, formulas and folded answers aside
IGNORED = "# NBVAL_IGNORE_OUTPUT"
QUIETLY = ("-q", "-p", "no:cacheprovider", "-p", "no:ringref")  # our plugin would import torch, as the kernel does
DEAR = ("04_memory", "08_oracle")  # a minute and more, which their own numbers take already
SETTINGS = {  # other numbers that the first cells say may be chosen: one for every run, more for the slow ones
    "00_one_block": ("cut, n, h, d = 2, 31, 3, 8", "cut, n, h, d = 7, 12, 1, 4"),
    "01_ring": ("p, n, h, d = 3, 17, 1, 4", "p, n, h, d = 6, 12, 2, 8"),
    "02_who_holds_what": ("p, n = 3, 25", "p, n = 6, 48", "p, n = 2, 4"),
    "03_collective": ("p, n, h, d = 2, 13, 2, 4", "p, n, h, d = 3, 20, 6, 8", "p, n, h, d = 5, 10, 5, 1"),
    "04_memory": ("d, longest = 8, 2048", "d, longest = 32, 2048"),
    "05_multi_gpu": ("p, n, h, d = 3, 36, 1, 8", "p, n, h, d = 4, 64, 2, 16", "p, n, h, d = 3, 6, 1, 1"),
    "06_dilated": ("n, h, d = 24, 2, 4", "n, h, d = 12, 8, 8"),
    "07_documents_and_windows": (
        "p, h, d, left, ends = 3, 1, 4, 3, [0, 7, 7, 20]",
        "p, h, d, left, ends = 2, 2, 8, 40, [0, 1, 18]",
        "p, h, d, left, ends = 1, 4, 8, 0, [0, 1, 2, 3, 4]",
        "p, h, d, left, ends = 5, 1, 1, 100, [0, 1, 2, 3, 4, 5]",
    ),
    "08_oracle": ("n, h, d = 34, 2, 8", "n, h, d = 12, 1, 32", "n, h, d = 4, 1, 1"),
    "09_training": ("n, steps = 50, 5", "n, steps = 130, 8"),
}
REFUSED = {  # numbers that mean nothing there
    "00_one_block": ("cut, n, h, d = 0, 24, 4, 16", "cut, n, h, d = 4, 11, 4, 16"),
    "01_ring": ("p, n, h, d = 1, 16, 2, 8", "p, n, h, d = 6, 11, 2, 8"),
    "02_who_holds_what": ("p, n = 1, 32", "p, n = 4, 7"),
    "03_collective": ("p, n, h, d = 1, 16, 4, 8", "p, n, h, d = 3, 16, 4, 8", "p, n, h, d = 4, 16, 0, 8"),
    "04_memory": ("d, longest = 4, 2048", "d, longest = 16, 3000"),
    "05_multi_gpu": ("p, n, h, d = 1, 32, 2, 16", "p, n, h, d = 2, 30, 2, 16", "p, n, h, d = 2, 0, 2, 16"),
    "06_dilated": ("n, h, d = 18, 4, 8", "n, h, d = 8, 4, 8", "n, h, d = 16, 1, 8"),
    "07_documents_and_windows": (
        "p, h, d, left, ends = 4, 2, 8, 6, [1, 5]",
        "p, h, d, left, ends = 4, 2, 8, 6, [0, 9, 5]",
        "p, h, d, left, ends = 4, 2, 8, -1, [0, 5]",
    ),
    "08_oracle": ("n, h, d = 33, 4, 16", "n, h, d = 2, 4, 16"),
    "09_training": ("n, steps = 128, 1", "n, steps = 8, 20"),
}
MACHINE = re.compile(
    r"0x[0-9a-f]{6,}|/home/|/root/|/tmp/|PosixPath"  # addresses and paths
    r"|\b\d+(\.\d+)? ?(ms|µs|seconds|MiB|GiB|MB|GB)\b"  # timings and memory
)


def text(lines):
    return lines if isinstance(lines, str) else "".join(lines)


def printed(cell):
    """What a code cell shows as text: streams, and the plain form of what it displays."""
    for output in cell["outputs"]:
        yield text(output.get("text", ""))
        yield text(output.get("data", {}).get("text/plain", ""))


def tagged(cell):
    return " ".join(cell["metadata"].get("tags", []))


def faults(notebook):
    """What is wrong with a notebook as it is saved, in sentences."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and cell["source"]]
    counts = [cell["execution_count"] for cell in code]
    if counts != list(range(1, len(code) + 1)):
        yield f"not executed from top to bottom: execution counts {counts}"
    for cell in code:
        source, where = text(cell["source"]), f"code cell {cell['execution_count']}"
        lines = source.removeprefix(IGNORED).strip().splitlines()
        if len(lines) > LONGEST_CELL:
            yield f"{where}: {len(lines)} lines of code"
        for line in [*lines, *"\n".join(printed(cell)).splitlines()]:
            if len(line) > LONGEST_LINE:
                yield f"{where}: {len(line)} columns: {line[:40]!r}"
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            yield f"{where}: an error is saved"
        if cell["metadata"].get("execution"):
            yield f"{where}: times of execution are saved"
        if IGNORED not in source:
            for found in MACHINE.findall("\n".join(printed(cell))):
                yield f"{where}: depends on the machine and is not ignored: {found}"
    if not code or IGNORED not in text(code[0]["source"]) or not any(printed(code[0])):
        yield "the first cell does not say what the notebook needs and uses"
    if not any("assert" in text(cell["source"]) for cell in code):
        yield "nothing is asserted"
    if [tagged(cell) for cell in code].count("parameters") != 1:
        yield "no cell, or more than one, says what may vary"
    if [tagged(cell) for cell in code].count("exercise") < 2:
        yield "fewer than two exercises"
    prose = [text(x["source"]) for x in notebook["cells"] if x["cell_type"] == "markdown"]
    if not any("<details>" in x for x in prose):
        yield "no question has a folded answer"
    for said in ("**You will know**", "**Takes**", "**Needs**"):
        if said not in prose[0]:
            yield f"the opening does not say {said}"
    if not prose[-1].startswith("## Takeaways") or ".ipynb)" not in prose[-1]:
        yield "the end has no takeaways, or does not lead on"
    if any(x.count("<details>") != x.count("</details>") for x in prose):
        yield "a folded answer is not closed"
    for x in prose:
        spoken = re.sub(r"<details>.*?</details>|\$\$.*?\$\$|^\|.*$", "", x, flags=re.S | re.M)
        if len(spoken.split()) > LONGEST_PROSE:
            yield f"{len(spoken.split())} words without code: {spoken[:40]!r}"
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        yield "cells have no ids of their own"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_as_a_reader_should_find_it(path):
    assert list(faults(json.loads(path.read_text()))) == []


def small():
    """The first notebook up to the first cell whose printed numbers are compared."""
    notebook = json.loads(NOTEBOOKS[0].read_text())
    for i, cell in enumerate(notebook["cells"]):
        shown = cell["cell_type"] == "code" and re.search(r"\d", "".join(printed(cell)))
        if shown and IGNORED not in text(cell["source"]):
            notebook["cells"] = notebook["cells"][: i + 1]
            return notebook
    raise AssertionError("no output to compare")


def change(output):
    """One digit of what a cell printed, raised by one."""
    shown = text(output["text"])
    at = re.search(r"\d", shown).start()
    output["text"] = f"{shown[:at]}{(int(shown[at]) + 1) % 10}{shown[at + 1 :]}"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda cells: cells[-1].update(execution_count=None), "not executed from top to bottom"),
        (lambda cells: cells[-1].update(source="x = 1\n" * 19), "19 lines of code"),
        (lambda cells: cells[-1].update(source="x = 1\n\n" * 9 + "x"), "19 lines of code"),
        (lambda cells: cells[-1].update(source=f"x = {'1' * 117}"), "121 columns"),
        (lambda cells: cells[-1]["outputs"][0].update(text="x" * 121), "121 columns"),
        (lambda cells: cells[-1].update(outputs=[{"output_type": "error"}]), "an error is saved"),
        (lambda cells: cells[-1]["outputs"][0].update(text="took 3.1 ms"), "depends on the machine and is not ignored"),
        (lambda cells: cells[-2].update(source="word " * 101), "101 words without code"),
        (lambda cells: cells[-1].update(id=cells[0]["id"]), "cells have no ids of their own"),
    ],
)
def test_a_spoilt_notebook_is_noticed(spoil, expected):
    notebook = small()
    sound = set(faults(notebook))
    spoil(notebook["cells"])
    assert any(expected in fault for fault in set(faults(notebook)) - sound)


@pytest.mark.parametrize("changed", [False, True], ids=["as saved", "one digit changed"])
def test_a_changed_output_fails(tmp_path, changed):
    notebook = small()
    if changed:
        change(notebook["cells"][-1]["outputs"][0])
    copy = tmp_path / "copy.ipynb"
    copy.write_text(json.dumps(notebook))
    command = [sys.executable, "-m", "pytest", *QUIETLY, "--nbval", str(copy)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == int(changed), run.stdout
    assert ("outputs differ" in run.stdout) == changed


def with_numbers(notebook, setting):
    """The notebook with other numbers, in the one cell that says which may be chosen; returns that cell's source."""
    (cell,) = [cell for cell in notebook["cells"] if tagged(cell) == "parameters"]
    first, limits = text(cell["source"]).split("\n", 1)
    given = re.match(r"(.+?) = ", first)[1]
    assert setting.startswith(f"{given} = "), f"the cell sets {given}"
    cell["source"] = f"{setting}\n{limits}"
    return cell["source"]


def with_answers(notebook):
    """Every exercise with its folded answer; without one that is checked, no exercise."""
    cells = notebook["cells"]
    for i, cell in enumerate(cells):
        if tagged(cell) == "exercise":
            folded = next(text(x["source"]) for x in cells[i:] if x["cell_type"] == "markdown")
            assert "<b>Answer</b>" in folded
            cell["source"] = text(cell["source"]) + "\n\n" + re.search(r"```python\n(.+?)```", folded, re.S)[1]


TWICE = [  # the one on memory measures for minutes
    pytest.param(name, setting, id=f"{name}-{i}", marks=pytest.mark.slow if i or name in DEAR else ())
    for name, settings in SETTINGS.items()
    for i, setting in enumerate(settings)
]


def read(name):
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())


def passes(folder, name, notebook, how, **more):
    """Run a changed notebook in a folder, beside what it reads from the checkout."""
    for beside in ("figures", "tests", "ringref"):
        (folder / beside).symlink_to(ROOT / beside)
    copy = folder / "notebooks" / f"{name}.ipynb"
    copy.parent.mkdir()
    copy.write_text(json.dumps(notebook))
    command = [sys.executable, "-m", "pytest", *QUIETLY, how, str(copy)]
    env = {name: value for name, value in os.environ.items() if name != "RINGREF_FIGURES"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**env, **more})
    assert run.returncode == 0, run.stdout[-6000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "setting"), TWICE)
def test_a_notebook_lives_with_other_numbers_and_its_answers_are_right(tmp_path, name, setting):
    notebook = read(name)
    with_numbers(notebook, setting)
    with_answers(notebook)
    passes(tmp_path, name, notebook, "--nbval-lax", RINGREF_EXERCISES="1")


@pytest.mark.parametrize(("name", "setting"), [(name, x) for name, settings in REFUSED.items() for x in settings])
def test_numbers_that_a_notebook_cannot_serve_are_refused_in_words(name, setting):
    limits = with_numbers(read(name), setting)
    with pytest.raises(AssertionError, match="may vary: .{9}"):
        exec(limits, {})


@pytest.mark.slow
def test_what_is_compared_is_the_same_where_two_gpus_make_two_ranks(tmp_path):
    notebook = read("09_training")
    source = notebook["cells"][1]["source"]
    (at,) = [i for i, line in enumerate(source) if line.startswith("p = ")]
    source[at] = "p = 2\n"
    passes(tmp_path, "09_training", notebook, "--nbval")


@pytest.mark.parametrize("address", ["https://github.com/us/ours", "git@github.com:us/ours.git", "https://us.org/ours"])
def test_a_page_leads_to_colab_where_the_repository_is_on_github(monkeypatch, address):
    monkeypatch.setenv("RINGREF_REPOSITORY", address)
    app = SimpleNamespace(env=SimpleNamespace(doc2path=lambda name: f"{name}.ipynb"))
    for path in NOTEBOOKS:
        source = [path.read_text()]
        runpy.run_path(str(ROOT / "notebooks" / "conf.py"))["badges"](app, path.stem, source)
        opening = text(json.loads(source[0])["cells"][0]["source"])
        assert f"{{download}}`Download this notebook <{path.name}>`" in opening
        there = f"https://colab.research.google.com/github/us/ours/blob/main/notebooks/{path.name}"
        assert (there in opening) == ("github" in address) == ("colab" in opening)


def test_a_recorded_peak_is_near_what_was_predicted_for_it():
    found = []
    for file in sorted((ROOT / "figures" / "data").glob("*.json")):
        for row in json.loads(file.read_text())["rows"]:
            for peak, expected in (("peak_both_q", "predicted_q"), ("peak_bytes", "predicted_bytes")):
                if row.get(peak) is not None and row.get(expected):
                    found.append((file.name, row[peak] / row[expected]))
    assert found and [x for x in found if not 0.9 < x[1] < 1.1] == []


def test_every_notebook_has_other_numbers():
    assert list(SETTINGS) == list(REFUSED) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_figure_has_no_date_and_comes_from_a_cell_that_saves_it(path):
    svg = path.read_text()
    assert "<dc:date>" not in svg and "Matplotlib v" not in svg
    savers = [*NOTEBOOKS, NOTEBOOKS[0].parents[1] / "ringref" / "lab" / "main_job.py"]
    sources = "".join(saver.read_text() for saver in savers)
    assert path.stem in sources or (path.parent / "data" / f"{path.stem}.json").exists()


def test_the_same_picture_gives_the_same_bytes(tmp_path):
    from ringref.lab import draw

    files = []
    for name in ("one", "two"):
        fig, ax = draw.figure(2, 2)
        draw.square([[0, 1], [-1, 2]], ax=ax)
        files.append(draw.save(fig, name, tmp_path).read_bytes())
    assert files[0] == files[1]
