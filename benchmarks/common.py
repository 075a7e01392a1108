"""What the measurements share: interleaved timing, a table, a JSON file that explains itself."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from runtime.files import write_json
from runtime.machine import choose_device, describe_machine, describe_versions

RESULTS = Path(__file__).resolve().parent / "results"


def time_pairs(functions: Mapping[str, Callable[[], None]], repeats: int = 5) -> dict[str, list[float]]:
    """Return the seconds of each run of each function: one warm-up each, then round after round of them all.

    Whatever else slows the machine for a while slows all of them, so that their ratios within a round hold.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def write_result(name: str, content: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json: `content`, and the command, date, hardware and versions."""
    path = RESULTS / f"{name}.json"
    made = {
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "hardware": describe_machine(choose_device("auto")),
        "versions": describe_versions(),
    }
    write_json(path, {**content, **made})
    return path


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of one set of columns as an aligned table; floats to four significant digits."""
    print(pd.DataFrame(list(rows)).to_string(index=False, float_format=lambda value: f"{value:.4g}"))
