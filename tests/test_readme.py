"""The README's Python runs as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="not in a checkout")
def test_the_first_example_runs():
    example = re.search(r"```python\n(.+?)```", README.read_text(), re.S)[1]
    assert "simulate(fn, 4)" in example
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})


@pytest.mark.skipif(not README.exists(), reason="not in a checkout")
def test_the_job_prints_a_check_on_every_rank(tmp_path):
    (tmp_path / "job.py").write_text(re.search(r"```python\n(# job.py\n.+?)```", README.read_text(), re.S)[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "job.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = re.findall(r"rank (\d): off by ([\d.e+-]+)", run.stdout)  # two lines may come as one
    assert sorted(rank for rank, _ in found) == ["0", "1"], run.stderr[-3000:]
    assert all(float(off) < 1e-5 for _, off in found)


@pytest.mark.skipif(not README.exists(), reason="not in a checkout")
def test_every_file_that_it_links_to_is_there():
    linked = re.findall(r"\]\((?!http)([^)#]+)", README.read_text())
    assert linked and [name for name in linked if not (README.parent / name).exists()] == []
