"""Fuzz the readers: python -m tests.fuzz --target all --count 1000 --seed 0."""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from tests.fuzz.run import fuzz, keep
from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz one target or all, a line for each; exit code 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description="Damage files and see what the readers say.")
    parser.add_argument("--target", choices=["all", *TARGETS], default="all")
    parser.add_argument("--count", type=int, default=1000, help="damaged files per target")
    parser.add_argument("--seed", type=int, default=0, help="of the damage: the same, the same files")
    parser.add_argument("--keep", action="store_true", help="keep files that break a promise in seeds/")
    parser.add_argument("--show", type=int, default=0, help="errors to show per target")
    arguments = parser.parse_args()
    logging.disable()
    names = list(TARGETS) if arguments.target == "all" else [arguments.target]
    broken = 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            report = fuzz(name, arguments.count, arguments.seed, Path(folder))
        print(f"{name:<10} {report.sentence}", flush=True)
        for problem, content in report.errors[: arguments.show]:
            print(f"    {problem[:200]}  of {content[:60]!r}", flush=True)
        broken += len(report.errors)
        if arguments.keep:
            keep(name, report)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
