"""One deterministic hypothesis profile, and what the swap test took and skipped."""

import hypothesis

hypothesis.settings.register_profile("exact", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("exact")

taken: list[str] = []  # the combinations that the swap test compared
skipped: list[str] = []


def pytest_terminal_summary(terminalreporter):
    if taken or skipped:
        terminalreporter.write_line(f"swap test: {len(taken)} compared, {len(skipped)} skipped")
    for what in skipped:
        terminalreporter.write_line(f"  skipped: {what}")
