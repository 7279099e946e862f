"""The command line hands on: `python -m ringref` is the main job, `check` the oracle, `bench` the measurements."""

import sys


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["check"]:
        from .oracle.cli import main as run
    elif argv[:1] == ["bench"]:
        from .lab.bench import main as run
    else:
        return _main_job(argv)
    return run(argv[1:])


def _main_job(argv: list[str]) -> int:
    from .lab.main_job import main as run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
