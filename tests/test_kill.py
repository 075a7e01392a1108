"""Training that is killed at any moment ends, resumed, with the bits of a run that nobody killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the trials fork")


def run_trials(*arguments: object) -> list[dict]:
    """Run kill_trials.py and return its lines, the summary last."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_trials.py")), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_five_kills_survive():
    kinds = ("accumulation", "two workers")
    *trials, summary = run_trials("--trials", 5, "--seed", 1, "--kinds", *kinds)
    assert summary["survived"] == summary["trials"] == len(trials) == 5


@pytest.mark.slow
@pytest.mark.parametrize(("number", "count"), [("SIGKILL", 50), ("SIGTERM", 21)])
def test_kills_of_every_kind_of_run_survive(number, count):
    *trials, summary = run_trials("--trials", count, "--signal", number)
    assert summary["survived"] == summary["trials"] == len(trials) == count
    assert len({trial["kind"] for trial in trials}) == 7
