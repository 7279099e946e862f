"""The README's Python runs as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="not in a checkout")
def test_the_first_example_runs():
    example = re.search(r"```python\n(.+?)```", README.read_text(), re.S)[1]
    assert "simulate(fn, 4)" in example
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})
